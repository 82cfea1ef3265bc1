"""The guest's root file system: busybox, this interpreter with the tests' dependencies, systemd and a few tools.

The project is not in it: :func:`project` packs that separately, so that an edit does not cost a boot. What the guest
does when it starts is in ``inside.py`` and in the init script here.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import io
import marshal
import os
import re
import shutil
import stat
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

from tests.vm import debian
from tests.vm.cache import CACHE, digest, filled, locked

__all__ = ["HOME", "ROOT", "image", "project"]

ROOT = Path(__file__).resolve().parents[2]
# Where the project is in the guest.
HOME = "/project"
_PROGRAMS = ("busybox-static", "dash", "irqbalance", "systemd", "util-linux")
_BINARIES = (
    "bin/systemctl", "lib/systemd/systemd", "usr/bin/chrt", "usr/bin/lscpu", "usr/bin/setpriv", "usr/bin/systemd-run",
    "bin/dash", "usr/bin/taskset", "usr/bin/unshare", "usr/bin/nsenter", "usr/sbin/irqbalance", "bin/systemd-notify",
)  # fmt: skip
_UNITS = (
    "basic.target", "emergency.target", "local-fs-pre.target", "local-fs.target", "machine.slice",
    "multi-user.target", "paths.target", "shutdown.target", "slices.target", "sockets.target", "swap.target",
    "sysinit.target", "timers.target", "umount.target", "user.slice",
)  # fmt: skip
_DEPENDENCIES = ("pytest", "hypothesis", "psutil", "multiprocessing-logging", "jsonschema")
_NOT_IN_GUEST = {
    "__pycache__", "dist-packages", "distutils", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "site-packages",
    "test", "tests", "tkinter", "turtledemo", "venv",
}  # fmt: skip
_TAIL = f"-pytest-{pytest.__version__}.pyc"
_INIT = """\
#!/bin/sh
export PATH=/usr/bin:/bin HOME=/root
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts; mount -t tmpfs -o mode=1777 shm /dev/shm; mount -t devpts pts /dev/pts
mount -t tmpfs -o mode=1777 tmp /tmp; mount -t tmpfs -o mode=755 run /run
mount -t debugfs debug /sys/kernel/debug; mount -t tracefs trace /sys/kernel/tracing
ip link set lo up
case " $(cat /proc/cmdline) " in
    *" lab.setup=v1 "*) mount -t tmpfs -o mode=755 cgroup /sys/fs/cgroup; mkdir /sys/fs/cgroup/cpuset
                        mount -t cgroup -o cpuset cpuset /sys/fs/cgroup/cpuset;;
    *) mount -t cgroup2 cgroup2 /sys/fs/cgroup;;
esac
case " $(cat /proc/cmdline) " in
    *" lab.setup=systemd "*) exec /lib/systemd/systemd;;
    *) exec /bin/busybox init;;
esac
"""
# Without it the machine is of no use, and whoever waits for it is to hear that at once.
_RESIDENT = """\
#!/bin/sh
cd /; /usr/bin/python3 -P /lab/inside.py </dev/null >/dev/ttyS0 2>&1
sleep 1; poweroff -f
"""
_FILES = {
    "init": _INIT,
    "etc/inittab": "::once:/lab/resident\n",
    "lab/resident": _RESIDENT,
    "usr/bin/hostpart": '#!/bin/sh\nexec /usr/bin/python3 -P -m hostpart "$@"\n',
    "etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
    "etc/group": "root:x:0:\ntty:x:5:\nnogroup:x:65534:\n",
    "etc/hostname": "lab\n",
    "etc/hosts": "127.0.0.1 localhost lab\n",
    "etc/machine-id": "0123456789abcdef0123456789abcdef\n",
    "etc/os-release": "ID=lab\nNAME=lab\n",
    "etc/systemd/system/lab.target": "[Unit]\nWants=lab.service\nRequires=basic.target\nAfter=basic.target\n",
    "etc/systemd/system/lab.service": "[Service]\nExecStart=/lab/resident\nEnvironment=HOME=/root\n",
}


def image() -> Path:
    """Return the guest's root file system, an initramfs; made when it is not in the cache.

    :raises Unavailable: if programs that it needs can't be fetched
    """
    contents: list[object] = [repr(sorted(_FILES.items())), _PROGRAMS, _BINARIES, _UNITS, sys.version]
    contents += [os.path.realpath(sys.executable)]
    contents += [Path(__file__).with_name(name).read_bytes() for name in ("inside.py", "image.py")]
    contents += [f"{one.name} {one.version}" for one in _distributions()]
    home = CACHE / "images" / digest(contents)
    with locked("image"):
        if not home.exists():
            debs = debian.programs(_PROGRAMS)
            with filled(home) as folder, (folder / "root.cpio").open("wb") as file:
                archive = _Cpio(file)
                _system(archive, debs)
                _python(archive)
                archive.end()
            for other in home.parent.iterdir():
                if other != home:
                    shutil.rmtree(other, ignore_errors=True)
    return home / "root.cpio"


def project(*, everything: bool = False) -> bytes:
    """Return a tar archive of the project with its compiled modules, to unpack at ``/`` of the guest.

    :param everything: with the tests that are not cases for virtual machines, too, and what they read
    """
    packed = io.BytesIO()
    sources = list(_sources(everything=everything))
    rewritten = dict(_rewritten(sources))
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for path in sources:
            name = path.relative_to(ROOT)
            members = [(f"{HOME}/{name}", path.read_bytes())]
            if path.suffix == ".py":
                members.append((importlib.util.cache_from_source(members[0][0]), _compiled(path, members[0][0])))
            if path in rewritten:
                members.append((_beside(members[0][0]), rewritten[path]))
            for member, data in members:
                entry = tarfile.TarInfo(member.lstrip("/"))
                entry.size, entry.mode = len(data), 0o755 if os.access(path, os.X_OK) else 0o644
                archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _sources(*, everything: bool) -> Iterator[Path]:
    yield ROOT / "pyproject.toml"
    tests = ("tests/**/*",) if everything else ("tests/[!t]*.py", "tests/vm/**/*")
    for pattern in ("hostpart/**/*", "workers/**/*", *tests):
        for path in sorted(ROOT.glob(pattern)):
            if path.is_file() and "__pycache__" not in path.parts:
                yield path


def _rewritten(sources: Iterable[Path]) -> Iterator[tuple[Path, bytes]]:
    # What pytest has made of the assertions in a test's source, as a file that it keeps beside it and knows again by
    # the source's hash: to do so takes the guest fifteen seconds. Where there is none, or an older pytest, it does.
    tests = [path for path in sources if path.name == "conftest.py" or path.name.startswith("test_")]
    if not all(_kept(path) for path in tests):
        command = [sys.executable, "-m", "pytest", "--collect-only", "-qq", "-p", "no:cacheprovider", "tests/vm"]
        env = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
        subprocess.run(command, cwd=ROOT, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    for path in tests:
        if data := _kept(path):
            yield path, data


def _kept(path: Path) -> bytes:
    made = Path(_beside(str(path)))
    data = made.read_bytes() if made.exists() else b""
    return data if data[8:16] == importlib.util.source_hash(path.read_bytes()) else b""


def _beside(name: str) -> str:
    return importlib.util.cache_from_source(name).removesuffix(".pyc") + _TAIL


class _Cpio:
    # An archive in the form that the kernel unpacks (Documentation/driver-api/early-userspace/buffer-format.rst).

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file = file
        self.seen: set[str] = set()

    def add(self, name: str, data: bytes, mode: int) -> None:
        name = name.strip("/")
        if name in self.seen:
            return
        folder = name.rpartition("/")[0]
        if folder and folder not in self.seen:
            self.add(folder, b"", stat.S_IFDIR | 0o755)
        self.seen.add(name)
        raw = name.encode() + b"\0"
        fields = (len(self.seen), mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(raw), 0)
        header = b"070701" + b"".join(b"%08x" % field for field in fields) + raw
        self.file.write(header + bytes(-len(header) % 4) + data + bytes(-len(data) % 4))

    def text(self, name: str, text: str) -> None:
        self.add(name, text.encode(), stat.S_IFREG | (0o755 if text.startswith("#!") else 0o644))

    def copy(self, name: str, path: Path) -> None:
        # A file, what a link leads to, or all that is in a folder.
        if path.is_dir():
            for one in sorted(path.iterdir()):
                self.copy(f"{name}/{one.name}", one)
        else:
            self.add(name, path.read_bytes(), stat.S_IFREG | (0o755 if os.access(path, os.X_OK) else 0o644))

    def link(self, name: str, to: str) -> None:
        self.add(name, to.encode(), stat.S_IFLNK | 0o777)

    def end(self) -> None:
        self.add("TRAILER!!!", b"", 0)
        self.file.write(bytes(-self.file.tell() % 512))


def _system(archive: _Cpio, debs: Path) -> None:
    for name in ("proc", "sys", "dev", "tmp", "run", "root", "usr/bin", "usr/lib", "usr/lib64", "var/log", "var/lib"):
        archive.add(name, b"", stat.S_IFDIR | 0o755)
    for name in ("bin", "sbin", "usr/sbin"):
        archive.link(name, "/usr/bin")
    for name in ("lib", "lib64"):
        archive.link(name, f"/usr/{name}")
    for name, text in _FILES.items():
        archive.text(name, text)
    archive.copy("lab/inside.py", Path(__file__).with_name("inside.py"))
    found = [debs / name for name in _BINARIES]
    for path in found:
        folder = "usr/lib/systemd" if path.parent.name == "systemd" else "usr/bin"
        archive.copy(f"{folder}/{path.name}", path)
    units = debs / "lib/systemd/system"
    for name in _UNITS:
        archive.copy(f"usr/lib/systemd/system/{name}", units / name)
    archive.link("etc/systemd/system/default.target", "lab.target")
    interpreter = Path(os.path.realpath(sys.executable))
    dynamic = [
        path for path in sorted((Path(sysconfig.get_path("stdlib")) / "lib-dynload").glob("*.so")) if _wanted(path)
    ]
    dynamic += [path for one in _distributions() for _, path in _members(one) if path.suffix == ".so"]
    _libraries(archive, [interpreter, *dynamic], "")
    folders = {path.parent for path in debs.rglob("*.so*")}
    _libraries(archive, found, ":".join(map(str, sorted(folders))))
    # busybox's own shell would run its applets instead of the tools above, which it knows less well.
    archive.link("usr/bin/sh", "dash")
    archive.copy("usr/bin/busybox", debs / "bin/busybox")
    applets = subprocess.run([debs / "bin/busybox", "--list"], capture_output=True, text=True, check=True).stdout
    for applet in applets.split():
        archive.link(f"usr/bin/{applet}", "busybox")


def _libraries(archive: _Cpio, binaries: Iterable[Path], search: str) -> None:
    # All in one folder that every loader looks into; the first of a name stays, so the interpreter's own go first.
    env = {**os.environ, "LD_LIBRARY_PATH": search}
    said = subprocess.run(["ldd", *binaries], capture_output=True, text=True, env=env, check=False).stdout
    for name, path in re.findall(r"(\S+) => (/\S+)", said):
        archive.copy(f"usr/lib/{name}", Path(path))
    for path in re.findall(r"^\s+(/\S*/ld-linux\S+)", said, re.MULTILINE):
        archive.copy(f"usr/lib64/{Path(path).name}", Path(path))


def _python(archive: _Cpio) -> None:
    stdlib = Path(sysconfig.get_path("stdlib"))
    home = f"/usr/lib/{stdlib.name}"
    archive.copy(f"usr/bin/{stdlib.name}", Path(os.path.realpath(sys.executable)))
    archive.link("usr/bin/python3", stdlib.name)
    # Neither -I nor an empty environment may hide the project and what it needs.
    extra = f"import sys\nsys.path += ['/lab/site', '{HOME}']\n"
    archive.text(f"{home}/sitecustomize.py", extra)
    for folder, names, files in os.walk(stdlib):
        names[:] = [one for one in names if one not in _NOT_IN_GUEST and not one.startswith("config-")]
        for file in files:
            path = Path(folder, file)
            if _wanted(path):
                _module(archive, f"{home}/{path.relative_to(stdlib)}", path)
    for distribution in _distributions():
        for name, path in _members(distribution):
            _module(archive, f"/lab/site/{name}", path)


def _wanted(path: Path) -> bool:
    # Debian's has a sitecustomize.py, too; the guest's own says where the project is.
    return path.suffix in (".py", ".so") and not path.name.startswith(("_test", "_tkinter", "sitecustomize"))


def _members(distribution: importlib.metadata.Distribution) -> Iterator[tuple[str, Path]]:
    for entry in distribution.files or ():
        path = Path(str(distribution.locate_file(entry)))
        if ".." not in entry.parts and "__pycache__" not in entry.parts and path.is_file():
            yield str(entry), path


def _module(archive: _Cpio, name: str, path: Path) -> None:
    archive.copy(name, path)
    if path.suffix == ".py":
        try:
            archive.add(importlib.util.cache_from_source(name), _compiled(path, name), stat.S_IFREG | 0o644)
        except SyntaxError:
            pass  # a template, or a test of what does not parse


def _compiled(path: Path, name: str) -> bytes:
    # Of the form that is not checked against the source (PEP 552): the guest's clock and file times do not matter,
    # and compiling there takes ten times as long.
    head = importlib.util.MAGIC_NUMBER + (1).to_bytes(4, "little") + bytes(8)
    made = Path(importlib.util.cache_from_source(str(path)))
    status = path.stat()
    current = (
        bytes(4) + (int(status.st_mtime) & 0xFFFFFFFF).to_bytes(4, "little") + status.st_size.to_bytes(4, "little")
    )
    if made.exists():
        data = made.read_bytes()
        if data[:16] == importlib.util.MAGIC_NUMBER + current:
            return head + data[16:]
    return head + marshal.dumps(compile(path.read_bytes(), name, "exec", dont_inherit=True, optimize=0))


def _distributions() -> list[importlib.metadata.Distribution]:
    # What the tests need, with what that needs in turn, in a fixed order.
    from packaging.requirements import Requirement

    found: dict[str, importlib.metadata.Distribution] = {}
    left = list(_DEPENDENCIES)
    while left:
        name = re.sub(r"[-_.]+", "-", left.pop()).lower()
        if name not in found:
            found[name] = importlib.metadata.distribution(name)
            for text in found[name].requires or ():
                one = Requirement(text)
                if one.marker is None or one.marker.evaluate({"extra": ""}):
                    left.append(one.name)
    return [found[name] for name in sorted(found)]
