"""The built-in guest: a kernel of the host's, and a root file system with busybox, this interpreter and hostpart.

The file system is an archive that the kernel unpacks (initramfs), made here from files of the host; nothing is
installed, and it takes no root. All of it but the command is kept in the runtime directory, which lasts for the boot,
and is made anew where any file that it was made of has changed. How QEMU is told of it is left to others; what the
guest does when it starts is in ``init.sh``, beside which are ``run.sh`` and ``watch.sh``.
"""

from __future__ import annotations

import marshal
import os
import sys

from ..errors import Failed, NotPermitted, UsageError
from . import cpio, kept

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["RESULT_PORT", "build", "find_busybox", "find_kernel", "release_of"]

RESULT_PORT = "/dev/ttyS1"  # the second serial port, as the guest names it

_BUSYBOX = ("/bin/busybox", "/usr/lib/busybox/busybox", "/usr/lib/busybox", "/usr/local/bin/busybox")
_NAME_KERNEL = 'name one with kernel = "/path/to/vmlinuz", or in $HOSTPART_KERNEL'
_DRIVERS = ("acpi/button", "input/evdev")
_HERE = os.path.dirname(os.path.abspath(__file__))
_CACHE = "guest-image"
_FORMAT = 1
_SIZE = 8  # bytes of the number that says how long the head is
# By default the guest shows itself: what hostpart sees in there, and how quiet each of its CPUs is.
_SHOW = """\
hostpart topology
hostpart-guest firmware
for cpu in /sys/devices/system/cpu/cpu[0-9]*; do
    hostpart-guest probe --cpu "${cpu##*cpu}" noise --seconds 3 --engine python &
done
wait
"""
_FOLDERS = (
    ("dev", 0o755), ("etc", 0o755), ("etc/hostpart", 0o755), ("etc/hostpart-guest", 0o755), ("proc", 0o755),
    ("root", 0o700), ("run", 0o755), ("sys", 0o755), ("tmp", 0o1777), ("usr", 0o755), ("usr/bin", 0o755),
    ("usr/lib", 0o755), ("usr/lib/modules", 0o755),
)  # fmt: skip
# Loaders look for libraries in these, whatever the distribution they come from.
_LINKS = (
    ("bin", "usr/bin"), ("sbin", "usr/bin"), ("lib", "usr/lib"), ("lib64", "usr/lib"), ("usr/sbin", "bin"),
    ("usr/lib64", "lib"),
)  # fmt: skip
_FILES = {
    "etc/group": "root:x:0:\nnogroup:x:65534:\n",
    "etc/hostname": "guest\n",
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
}
_SCRIPTS = {"init.sh": "init", "run.sh": "etc/hostpart-guest/run", "watch.sh": "etc/hostpart-guest/watch"}
# Without site, which looks for installations: all that there is lies beside the library.
_COMMANDS = {
    "hostpart": "exec /usr/bin/python3 -IS -m hostpart",
    "hostpart-guest": "exec /usr/bin/python3 -IS -m hostpart.qemu.inside",
    "probe": "exec /usr/bin/python3 -IS -m hostpart.qemu.inside probe",
}


def find_kernel(path: str = "", *, boot: str = "/boot") -> str:
    """Return the kernel to boot: *path* if given, else the running one's file, else the newest there is to read.

    :param boot: where kernels lie, as ``vmlinuz-RELEASE``
    :raises UsageError: where *path* is no file
    :raises NotPermitted: where there are kernels and none may be read (Ubuntu keeps them from all but root)
    :raises Failed: where there is none
    """
    if path:
        if not os.path.isfile(path):
            raise UsageError(f"there is no kernel {path!r}", _NAME_KERNEL)
        if not os.access(path, os.R_OK):
            raise _unreadable([path])
        return path
    try:
        names = [name for name in os.listdir(boot) if name.startswith("vmlinuz-") and not name.endswith(".old")]
    except OSError:
        names = []
    here = f"vmlinuz-{os.uname().release}"
    names.sort(key=lambda name: (name == here, "rescue" not in name, _version(name)), reverse=True)
    paths = [file for name in names if os.path.isfile(file := os.path.join(boot, name))]
    if not paths:
        raise Failed(
            f"there is no kernel for the guest: {boot} has no vmlinuz-*",
            f"install one (Debian: 'apt install linux-image-cloud-amd64'), or {_NAME_KERNEL}",
        )
    readable = next((file for file in paths if os.access(file, os.R_OK)), None)
    if readable is None:
        raise _unreadable(paths)
    return readable


def find_busybox() -> str:
    """Return the path of busybox: from ``PATH``, else from where distributions put it.

    :raises Failed: where there is none
    """
    folders = [folder for folder in os.environ.get("PATH", os.defpath).split(":") if folder.startswith("/")]
    for path in (*(os.path.join(folder, "busybox") for folder in folders), *_BUSYBOX):
        if os.path.isfile(path) and os.access(path, os.R_OK | os.X_OK):
            return path
    raise Failed(
        "there is no busybox, of which the guest's shell and tools are made",
        "install it (Debian: 'apt install busybox-static'), or put one into PATH",
    )


def build(
    command: Sequence[str] | str = "",
    *,
    env: Mapping[str, str] | None = None,
    result_port: bool = False,
    kernel: str = "",
    modules: str = "/lib/modules",
    directory: str | None = None,
) -> bytes:
    """Return the guest's first root file system, for QEMU's ``-initrd``; uncompressed, the same for the same inputs.

    The guest runs *command* as root, says ``hostpart guest: exit status N`` on its console, and powers off. Asked to
    end (the ACPI power button, Ctrl-Alt-Del), it sends SIGTERM to the command's process group, SIGKILL 5 s later.

    :param command: words, or a shell's text; empty: show what hostpart sees in the guest, and how quiet its CPUs are
    :param env: the command's environment, beside what the guest sets
    :param result_port: what the command writes to standard output goes to :data:`RESULT_PORT`, byte by byte, and has
        gone out before the guest powers off; else to the console
    :param kernel: the kernel's file: the drivers of the power button are packed where *modules* has them for it
    :param directory: where to keep what is the same for all commands; by default the runtime directory
    :raises UsageError: for a command or an environment that a shell can't be given
    :raises Failed: where something that goes into it is missing or can't be read
    """
    own = [cpio.file("etc/hostpart/command", _command(command, env or {}))]
    if result_port:
        own.append(cpio.file("etc/hostpart/results", f"{RESULT_PORT}\n".encode()))
    if kernel:
        own += [cpio.file(f"usr/lib/modules/{name}", data) for name, data in _drivers(kernel, modules)]
    common = _common(find_busybox(), directory)
    rest = b"".join((*own, cpio.TRAILER))
    return b"".join((common, rest, bytes(-(len(common) + len(rest)) % 512)))


def release_of(kernel: str) -> str | None:
    """Return the release that a kernel's file (bzImage) says it is, such as ``6.12.117+deb13-cloud-amd64``, or None.

    :raises OSError: where it cannot be read

    Source: Documentation/arch/x86/boot.rst, "kernel_version".
    """
    with open(kernel, "rb") as file:
        head = file.read(0x210)
        if head[0x202:0x206] != b"HdrS":
            return None
        file.seek(int.from_bytes(head[0x20E:0x210], "little") + 0x200)
        words = file.read(256).partition(b"\0")[0].split()
    return words[0].decode("ascii", "replace") if words else None


def _unreadable(paths: list[str]) -> NotPermitted:
    return NotPermitted(
        f"no kernel may be read by you: {', '.join(paths)}",
        f"have it made readable ('sudo chmod a+r {paths[0]}'), or {_NAME_KERNEL}",
    )


def _version(name: str) -> list[tuple[int, str]]:
    # "6.12.9" comes before "6.12.10", and a release before its own variants.
    text = "".join(char if char.isascii() and char.isalnum() else "." for char in name)
    return [(int(part) if part.isdecimal() else -1, part) for part in text.split(".")]


# -- the guest's own files ---------------------------------------------------------------------------------


def _command(command: Sequence[str] | str, env: Mapping[str, str]) -> bytes:
    for name in env:
        if not (name.isascii() and name.isidentifier()):
            raise UsageError(f"the guest's environment can't have the name {name!r}", "use letters, digits and '_'")
    text = "".join(f"export {name}={_quoted(env[name])}\n" for name in sorted(env))
    if not command:
        text += _SHOW
    elif isinstance(command, str):
        text += f"{command}\n"
    else:
        text += f"exec {' '.join(map(_quoted, command))}\n"
    if "\0" in text:
        raise UsageError("the guest's command or its environment has a null byte", "leave it out")
    return text.encode("utf-8", "surrogateescape")


def _quoted(word: str) -> str:
    return "'" + word.replace("'", "'\"'\"'") + "'"


# The modules that the power button takes, as far as they are there: a kernel may have them built in, and a file to boot
# may come without its modules.
def _drivers(kernel: str, modules: str) -> Iterator[tuple[str, bytes]]:
    try:
        release = release_of(kernel)
    except OSError as error:
        raise _missing(error) from error
    for driver in _DRIVERS if release else ():
        file = f"{modules}/{release}/kernel/drivers/{driver}.ko"
        for suffix in ("", ".xz", ".gz", ".zst"):
            try:
                with open(file + suffix, "rb") as packed:
                    data = _unpacked(packed.read(), suffix)
            except OSError:
                continue
            if data:
                yield f"{os.path.basename(driver)}.ko", data
            break


def _unpacked(data: bytes, suffix: str) -> bytes | None:
    if suffix == ".xz":
        import lzma

        return lzma.decompress(data)
    if suffix == ".gz":
        import gzip

        return gzip.decompress(data)
    if suffix == ".zst":
        import subprocess

        try:  # Python reads it from 3.14 on, if it was built with it
            done = subprocess.run(["zstd", "-dcq"], input=data, capture_output=True, check=False)
        except OSError:
            return None
        return done.stdout if done.returncode == 0 else None
    return data


# -- what is the same for all guests -----------------------------------------------------------------------


def _common(busybox: str, directory: str | None) -> bytes | memoryview:
    if directory is None:
        from ..ledger import runtime_directory

        directory = runtime_directory()
    path = os.path.join(directory, _CACHE)
    key = _key(busybox)
    there = _kept(path, key)
    if there is not None:
        return there
    files, archive = _make(busybox)
    _keep(path, key, files, archive)
    return archive


# What says whether a kept archive is the one that would be made: who makes it, and of which modules of hostpart.
def _key(busybox: str) -> list[object]:
    from .inventory import sources

    return [_FORMAT, sys.version, sys.executable, busybox, sources()]


def _kept(path: str, key: list[object]) -> memoryview | None:
    content = kept.read(path)
    if content is None:
        return None
    size = int.from_bytes(content[:_SIZE], "little")
    head, archive = content[_SIZE : _SIZE + size], content[_SIZE + size :]
    try:
        found, states = marshal.loads(head)  # noqa: S302 - this user wrote it
    except (EOFError, ValueError, TypeError):
        return None
    if found != key or _states(states) != states:
        return None
    return archive


def _keep(path: str, key: list[object], files: list[str], archive: bytes) -> None:
    head = marshal.dumps((key, _states(files)))
    kept.write(path, len(head).to_bytes(_SIZE, "little"), head, archive)


# The files that an archive was made of, each as it is now: size and time of change, None for one that is gone.
def _states(files: Iterable[str]) -> dict[str, tuple[int, int] | None]:
    states: dict[str, tuple[int, int] | None] = {}
    for path in files:
        try:
            status = os.stat(path)
            states[path] = status.st_size, status.st_mtime_ns
        except OSError:
            states[path] = None
    return states


def _make(busybox: str) -> tuple[list[str], bytes]:
    found = _inventory()
    try:
        tools = _libraries_of(busybox)
        files = [busybox, *tools.values(), *found["seen"]]
        files += [os.path.join(_HERE, name) for name in (*_SCRIPTS, "cpio.py", "image.py", "inventory.py")]
        return files, b"".join(_entries(busybox, tools, found))
    except OSError as error:
        raise _missing(error) from error


def _missing(error: OSError) -> Failed:
    return Failed(
        f"the guest can't be made: {error.filename}: {error.strerror}", "see that it is there and readable by you"
    )


def _inventory() -> dict[str, Any]:
    import subprocess

    # Sets are in one order, so that the same code gives the same bytes; the current directory has no say in what is
    # imported, and where this hostpart lies has.
    home = os.path.dirname(os.path.dirname(_HERE))
    code = f"import sys; sys.path.insert(0, {home!r}); from hostpart.qemu.inventory import main; main()"
    env = {**os.environ, "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", code], env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()[-1:]
        raise Failed(
            f"the guest can't be made: what {sys.executable} needs was not found out: {' '.join(said)}",
            "see whether 'hostpart topology' works with this interpreter",
        )
    found: dict[str, Any] = marshal.loads(done.stdout)  # noqa: S302 - a process of this program
    return found


# Of one that is not static: what its loader finds for it, as ldd(1) asks it.
def _libraries_of(program: str) -> dict[str, str]:
    import subprocess

    from .inventory import interpreter_of

    try:
        loader = interpreter_of(program)
    except ValueError as error:
        raise Failed(f"the guest can't be made: {error}", "install busybox-static") from error
    if loader is None:
        return {}
    env = {"LD_TRACE_LOADED_OBJECTS": "1", "PATH": os.defpath}
    done = subprocess.run([program], env=env, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    found = {loader: loader}
    for line in done.stdout.decode(errors="replace").splitlines():
        words = line.split()
        if len(words) > 2 and words[1] == "=>" and words[2].startswith("/"):
            found[words[0]] = words[2]
    return found


def _entries(busybox: str, tools: dict[str, str], found: dict[str, Any]) -> Iterator[bytes]:
    folders = {name for name, _ in _FOLDERS}
    yield from (cpio.folder(name, mode=mode) for name, mode in _FOLDERS)
    yield cpio.device("dev/console", 5, 1)
    yield from (cpio.link(name, to) for name, to in _LINKS)
    yield from (cpio.file(name, text.encode()) for name, text in _FILES.items())
    for script, place in _SCRIPTS.items():
        yield cpio.file(place, _read(os.path.join(_HERE, script)), executable=True)
    yield cpio.file("usr/bin/busybox", _read(busybox), executable=True)
    yield from (_script(name, text) for name, text in _COMMANDS.items())
    version = found["version"]
    yield cpio.file(f"usr/bin/{version}", _stripped(_read(found["interpreter"])), executable=True)
    yield cpio.link("usr/bin/python3", version)
    # A library that both need is one, for both come from this host; what busybox alone needs joins it.
    libraries = {**tools, **found["libraries"]}
    if found["loader"]:
        libraries[found["loader"]] = found["loader"]
    # A loader is where its program says, a library in the one folder that all loaders look into.
    places = {_usual(name.lstrip("/")) if "/" in name else f"usr/lib/{name}": libraries[name] for name in libraries}
    for place, path in sorted(places.items()):
        yield from _above(place, folders)
        yield cpio.file(place, _stripped(_read(path)), executable=True)
    home = f"usr/lib/{version}"
    folders.add(home)
    yield cpio.folder(home)
    yield cpio.folder(f"{home}/lib-dynload")  # the interpreter looks whether it is there
    for name, (package, code) in found["code"].items():
        place = f"{home}/{name.replace('.', '/')}{'/__init__' if package else ''}.pyc"
        yield from _above(place, folders)
        # Of the form that is not checked against a source (PEP 552): there is none.
        yield cpio.file(place, found["magic"] + (1).to_bytes(4, "little") + bytes(8) + code)
    for name, path in found["extensions"].items():
        place = f"{home}/{name.replace('.', '/').rpartition('/')[0]}/{os.path.basename(path)}".replace("//", "/")
        yield from _above(place, folders)
        yield cpio.file(place, _stripped(_read(path)), executable=True)


def _script(name: str, text: str) -> bytes:
    return cpio.file(f"usr/bin/{name}", f'#!/bin/sh\n{text} "$@"\n'.encode(), executable=True)


# The path in the archive of what a link there leads to: an entry's own folder can't be a link.
def _usual(place: str) -> str:
    for link, to in _LINKS:
        whole = to if "/" not in link else f"usr/{to}"
        if place.startswith(f"{link}/"):
            return whole + place[len(link) :]
    return place


def _above(place: str, folders: set[str]) -> Iterator[bytes]:
    parts = place.split("/")[:-1]
    for depth in range(1, len(parts) + 1):
        name = "/".join(parts[:depth])
        if name not in folders:
            folders.add(name)
            yield cpio.folder(name)


def _read(path: str) -> bytes:
    with open(path, "rb", buffering=0) as file:
        return file.readall()


# A program or library without what no loader reads: symbols for debuggers can be four times all else.
def _stripped(data: bytes) -> bytes:
    if data[:6] != b"\x7fELF\x02\x01":
        return data
    start, size, count = (
        int.from_bytes(data[at : at + length], "little") for at, length in ((32, 8), (54, 2), (56, 2))
    )
    end = start + size * count
    for offset in range(start, end, size):
        place, length = (int.from_bytes(data[offset + at : offset + at + 8], "little") for at in (8, 32))
        end = max(end, place + length)
    # No section table: its place, the size of an entry, their number, and which has the names.
    return data[:40] + bytes(8) + data[48:58] + bytes(6) + data[64:end]
