"""What cases with guests under QEMU need in the machine on top of its image: QEMU itself, and a kernel for its guests.

It is brought into a machine that has booted, so that the others pay nothing for it. All of it is this machine's, in the
versions that the lab runs with; the kernel is the one that the machine runs, where distributions put it.
"""

from __future__ import annotations

import importlib.metadata
import io
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from pathlib import Path

from tests.vm import debian

__all__ = ["CARGOES", "LOADER", "brought"]

CARGOES = ("qemu",)
LOADER = "lab/cargo/load"
_PROGRAM = "qemu-system-x86_64"
_FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin")
# Debian's QEMU has its emulation in a file of its own, and loads it by its path.
_MODULES = ("accel-tcg-x86_64.so", "accel-tcg-i386.so")
_PACKAGE = "qemu.qmp"
# The libraries that the image has already are in use.
_LOAD = """\
#!/bin/sh -e
cd /lab/cargo/lib
for file in *; do [ -e "/usr/lib/$file" ] || mv "$file" /usr/lib/; done
rm -r /lab/cargo/lib
cd /lab/site
python3 -m compileall -q --invalidation-mode unchecked-hash qemu
qemu-system-x86_64 -accel tcg -machine none -display none -monitor none -S -daemonize -pidfile /run/tried
kill "$(cat /run/tried)"
"""
_CHUNK = 20 << 20  # the window that it goes through has 32 MB


def brought(kernel: str) -> Iterator[bytes]:
    """Give tar archives to unpack at ``/`` one after the other; then :data:`LOADER` is to be run.

    :param kernel: the machine's series
    :raises Unavailable: if the kernel can't be had
    """
    chunk: list[tuple[str, bytes, int]] = []
    for file in _files(kernel):
        if chunk and sum(len(data) for _, data, _ in [*chunk, file]) > _CHUNK:
            yield _packed(chunk)
            chunk = []
        chunk.append(file)
    yield _packed(chunk)


def _packed(files: list[tuple[str, bytes, int]]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=tarfile.USTAR_FORMAT) as archive:
        for name, data, mode in files:
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), mode
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def _files(kernel: str) -> Iterator[tuple[str, bytes, int]]:
    program = shutil.which(_PROGRAM)
    assert program is not None, "the lab itself needs it"
    yield f"usr/bin/{_PROGRAM}", Path(program).read_bytes(), 0o755
    modules = [path for name in _MODULES for path in sorted(Path("/usr/lib").glob(f"**/qemu/{name}"))]
    for path in modules:
        yield str(path).lstrip("/"), path.read_bytes(), 0o644
    said = subprocess.run(["ldd", program, *modules], capture_output=True, text=True, check=False).stdout
    for name, path in sorted(set(re.findall(r"(\S+) => (/\S+)", said))):
        yield f"lab/cargo/lib/{name}", Path(path).read_bytes(), 0o644
    said = subprocess.run([program, "-L", "help"], capture_output=True, text=True, check=True).stdout
    folders = [Path(line) for line in said.splitlines() if line.startswith("/")]
    for name in _FIRMWARE:
        found = next((folder / name for folder in folders if (folder / name).exists()), None)
        if found is not None:
            yield f"{str(folders[0]).lstrip('/')}/{name}", found.read_bytes(), 0o644
    boot = debian.kernel(kernel)
    yield f"boot/{boot.name}", boot.read_bytes(), 0o644
    distribution = importlib.metadata.distribution(_PACKAGE)
    for entry in distribution.files or ():
        if entry.suffix == ".py" and ".." not in entry.parts:
            yield f"lab/site/{entry}", entry.read_binary(), 0o644
    yield LOADER, _LOAD.encode(), 0o755
