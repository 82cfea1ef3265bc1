"""What of this interpreter hostpart and its probes need to run: code, extension modules, libraries.

It is found by importing it, in a process of its own (``python -m hostpart.qemu.inventory``), for the imports stay; the
answer goes to standard output. The probes' compiled loops are left out: numba is 50 times as large as all else.
"""

from __future__ import annotations

import importlib
import importlib.util
import marshal
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import CodeType, ModuleType
    from typing import Any

__all__ = ["interpreter_of", "main", "sources"]

# What is of no use in the guest, with the packages that only it needs: below hostpart, then below hostpart.cli.
_LEFT_OUT = ("experiment", "fleet", "report", "qemu")
_COMMANDS_LEFT_OUT = ("analysis", "experiment", "fleet", "report", "completion", "launch", "systemd_unit")
# Named by the interpreter and not by an import statement.
_BY_NAME = ("encodings.ascii", "encodings.latin_1", "encodings.utf_8", "runpy", "site", "os", "traceback")
# Recorded machines are read with these, and theirs is a third of all libraries; types are for who checks them.
_NOT_NEEDED = ("bz2", "gzip", "lzma", "tarfile", "typing")
_PACKAGES = ("hostpart", "workers")
_DEPENDENCIES = ("multiprocessing_logging", "psutil")


def sources() -> list[str]:
    """Return the names of the modules of hostpart and workers that go into the guest, sorted."""
    home = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    found = ["hostpart.qemu.inside"]
    for package in _PACKAGES:
        for folder, folders, files in os.walk(os.path.join(home, package)):
            name = os.path.relpath(folder, home).replace("/", ".")
            folders[:] = [one for one in folders if one.isidentifier() and not one.startswith("__")]
            if name == "hostpart":
                folders[:] = [one for one in folders if one not in _LEFT_OUT]
            for file in files:
                stem, suffix = os.path.splitext(file)
                if suffix != ".py" or (name == "hostpart.cli" and stem.startswith(_COMMANDS_LEFT_OUT)):
                    continue
                found.append(name if stem == "__init__" else f"{name}.{stem}")
    return sorted(found)


def main() -> None:
    """Write what was found: a mapping that :func:`marshal.load` reads.

    ``magic``: what compiled modules begin with; ``version``: the name of the library's folder, such as ``python3.11``;
    ``code``: module name to whether it is a package and its code, as :func:`marshal.dumps` gives it;
    ``extensions``: module name to file; ``libraries``: the name that a loader looks for to file;
    ``interpreter``: the file; ``loader``: the path at which the kernel looks for its loader, None for a static one;
    ``seen``: every file that this was read from.
    """
    os.environ["OPENBLAS_NUM_THREADS"] = "1"
    names = sources()
    for name in (*_BY_NAME, *names):
        _import(name)
    for name in sorted(_lazy(names)):
        _import(name)
    found: dict[str, Any] = {"code": {}, "extensions": {}}
    seen = set()
    # What an installation imports at every start, by its .pth files, is no part of what is needed.
    roots = sys.stdlib_module_names.union(_PACKAGES, _DEPENDENCIES)
    for name, module in sorted(sys.modules.items()):
        spec = getattr(module, "__spec__", None)  # what stands there for a module need not be one: typing.io
        if spec is None or spec.name != name or name.partition(".")[0] not in roots:
            continue
        code = _code(module)
        if code:
            found["code"][name] = (spec.submodule_search_locations is not None, marshal.dumps(code))
            seen.add(code.co_filename)
        elif spec.has_location and spec.origin:
            found["extensions"][name] = spec.origin
    found["libraries"] = _libraries(set(found["extensions"].values()))
    found["interpreter"] = os.path.realpath(sys.executable)
    found["loader"] = interpreter_of(found["interpreter"])
    found["magic"] = importlib.util.MAGIC_NUMBER
    found["version"] = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    seen |= {*found["libraries"].values(), *found["extensions"].values(), found["interpreter"]}
    found["seen"] = sorted(path for path in seen if path.startswith("/"))
    sys.stdout.buffer.write(marshal.dumps(found))


def interpreter_of(path: str) -> str | None:
    """Return the path of the loader that an ELF program of 64 bits, little-endian, asks for; None for a static one.

    :raises OSError: where it cannot be read
    :raises ValueError: where it is no such program

    Source: elf(5), PT_INTERP.
    """
    with open(path, "rb") as file:
        head = file.read(64)
        if head[:6] != b"\x7fELF\x02\x01" or len(head) < 64:
            raise ValueError(f"{path} is no program of 64 bits")
        start, size, count = (_number(head, *field) for field in ((32, 8), (54, 2), (56, 2)))
        file.seek(start)
        table = file.read(size * count)
        for offset in range(0, len(table), size):
            if _number(table, offset, 4) == 3:
                file.seek(_number(table, offset + 8, 8))
                return file.read(_number(table, offset + 32, 8)).rstrip(b"\0").decode()
    return None


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")


def _import(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        pass  # an interpreter or an installation without it: whoever needs it there says so


# Modules of the library that hostpart imports inside functions only.
def _lazy(names: list[str]) -> set[str]:
    found: set[str] = set()
    for name in names:
        code = _code(sys.modules[name]) if name in sys.modules else None
        if code:
            found.update(_imports(code))
    known = sys.stdlib_module_names.difference(_NOT_NEEDED)
    return {name for name in found if name.partition(".")[0] in known}


def _imports(code: CodeType) -> Iterator[str]:
    import dis

    for step in dis.get_instructions(code):
        if step.opname == "IMPORT_NAME":
            yield step.argval
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            yield from _imports(constant)


def _code(module: ModuleType) -> CodeType | None:
    spec = module.__spec__
    get = getattr(spec.loader, "get_code", None) if spec else None
    if not spec or not get:
        return None
    code: CodeType | None = get(spec.name)
    return code


# By the names that they were looked for by: what a loader is asked for is that, and not the file that a link leads to.
def _libraries(extensions: set[str]) -> dict[str, str]:
    import ctypes

    class Info(ctypes.Structure):
        # struct dl_phdr_info, as far as it is looked at: dl_iterate_phdr(3)
        _fields_ = (("address", ctypes.c_void_p), ("name", ctypes.c_char_p))

    found = {}

    def see(info: Any, _size: int, _data: object) -> int:
        path = os.fsdecode(info.contents.name or b"")
        if path.startswith("/") and path not in extensions:  # else the program itself, or the kernel's vdso
            found[os.path.basename(path)] = os.path.realpath(path)
        return 0

    callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Info), ctypes.c_size_t, ctypes.c_void_p)
    ctypes.CDLL(None).dl_iterate_phdr(callback(see), None)
    return dict(sorted(found.items()))


if __name__ == "__main__":
    main()
