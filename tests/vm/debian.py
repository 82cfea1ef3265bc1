"""Debian's packages for the lab: kernels with some drivers, and programs that the guest runs.

Nothing is installed on this machine.

apt works in a folder of the cache, with lists and a package state of its own, on the mirror that this machine's own
sources name. What goes where in the guest is left to :mod:`tests.vm.image`.
"""

from __future__ import annotations

import lzma
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tests.vm.cache import CACHE, Unavailable, digest, filled, locked

__all__ = ["KERNELS", "kernel", "lacks", "modules", "packages", "programs"]

# Series of the kernel, and the suite that has it.
KERNELS = {"6.1": "bookworm", "6.12": "trixie", "6.19": "trixie-backports"}
# Drivers of the devices that the machine has, in the order in which they can be loaded. What a kernel has built in is
# not among its modules.
_MODULES = (
    "virtio", "virtio_ring", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_console",
    "failover", "net_failover", "virtio_net", "vmxnet3", "virtio_blk",
)  # fmt: skip
# Programs come from the oldest suite: they run with the libc of any machine that has Python 3.11.
_PROGRAMS = "bookworm"
_KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"
_MIRROR = re.compile(r"\S+/debian/?")


def packages() -> list[str]:
    """Return the packages that are missing on this machine to fetch others."""
    return [] if Path(_KEYRING).exists() else ["debian-archive-keyring"]


def lacks() -> list[str]:
    """Return what else is missing on this machine to fetch packages, worded for "needs ..."."""
    tools = [tool for tool in ("apt-get", "apt-cache", "dpkg-deb") if not shutil.which(tool)]
    mirror = "a Debian mirror among the apt sources, or its address in HOSTPART_LAB_MIRROR"
    return tools or ([] if _mirror() else [mirror])


def kernel(series: str) -> Path:
    """Return a file to boot: the cloud kernel of *series*, the newest that Debian had when it was fetched.

    :raises Unavailable: if there is none of this series any more, or the mirror can't be reached
    """
    return next(_kernel(series).glob("vmlinuz-*"))


def modules(series: str) -> list[Path]:
    """Return the kernel's drivers for the lab's devices, uncompressed, in the order in which they can be loaded.

    :raises Unavailable: as :func:`kernel` does
    """
    found = [_kernel(series) / f"{name}.ko" for name in _MODULES]
    return [path for path in found if path.exists()]


def _kernel(series: str) -> Path:
    home = CACHE / "kernels" / f"{series}-{digest(_MODULES)}"
    with locked("debian"):
        if not home.exists():
            suite = KERNELS[series]
            # From 6.19 on the kernel itself is in linux-binary-*, and linux-image-* only depends on it.
            name = rf"linux-(?:binary|image)-{re.escape(series)}\.[0-9][0-9.+a-z-]*-cloud-amd64"
            named = re.findall(rf"^{name}$", _apt(suite, "apt-cache", "pkgnames", "linux-"), re.MULTILINE)
            # Names that other packages only mention have no candidate.
            policy = _apt(suite, "apt-cache", "policy", *named) if named else ""
            there = re.findall(rf"^({name}):\n.*\n  Candidate: \d", policy, re.MULTILINE)
            if not there:
                raise Unavailable(
                    f"needs a cloud kernel of series {series}, of which Debian's {suite} has none any more"
                )
            chosen = max(there, key=_age)
            # From 6.19 on the drivers are in a package of their own, which a mirror may lack: then there are none.
            drivers = re.sub("^linux-binary", "linux-modules", chosen)
            its = _apt(suite, "apt-cache", "policy", drivers) if drivers != chosen else ""
            wanted = [chosen, drivers] if re.search(r"^  Candidate: \d", its, re.MULTILINE) else [chosen]
            with filled(home) as folder:
                for deb in _downloaded(wanted, suite):
                    _unpack(deb, folder)
        return home


def programs(names: Sequence[str]) -> Path:
    """Return a folder with what the packages *names* hold and the libraries that they need, libc excepted.

    :raises Unavailable: if the mirror can't be reached
    """
    home = CACHE / "programs" / digest(names)
    with locked("debian"):
        if not home.exists():
            # A line for each package that it would fetch: 'address' name_version_arch.deb size hash.
            listed = _apt(_PROGRAMS, "apt-get", "install", "-qq", "--no-install-recommends", "--print-uris", *names)
            needed = [line.split()[1].partition("_")[0] for line in listed.splitlines()]
            libraries = [name for name in needed if name.startswith("lib") and not re.match("libc6|libperl", name)]
            with filled(home) as folder:
                for deb in _downloaded([*names, *libraries], _PROGRAMS):
                    subprocess.run(["dpkg-deb", "-x", deb, folder], check=True)
        return home


def _age(name: str) -> tuple[list[int], bool]:
    return [int(part) for part in re.findall(r"\d+", name)], name.startswith("linux-binary-")


def _unpack(deb: Path, folder: Path) -> None:
    # What the lab needs of a kernel's package: the file to boot, and the drivers.
    with (
        subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as unpacked,
        tarfile.open(fileobj=unpacked.stdout, mode="r|") as archive,
    ):
        for member in archive:
            name = Path(member.name).name
            driver, _, packing = name.partition(".ko")
            wanted = "/boot/vmlinuz-" in member.name or (driver in _MODULES and packing in ("", ".xz"))
            data = archive.extractfile(member) if wanted else None
            if data is not None:
                content = data.read()
                (folder / name.removesuffix(".xz")).write_bytes(lzma.decompress(content) if packing else content)


def _mirror() -> str | None:
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    named = os.environ.get("HOSTPART_LAB_MIRROR")
    return named or next((line for line in listed.stdout.split() if _MIRROR.fullmatch(line)), None)


def _apt(suite: str, tool: str, *args: str) -> str:
    # What an apt tool says of one suite, whose lists are fetched once.
    home = CACHE / "apt" / suite
    sources = home / "sources.list"
    options = {
        "Dir::Etc::sourcelist": sources,
        "Dir::Etc::sourceparts": "-",
        "Dir::State": home,
        "Dir::State::lists": home / "lists",
        "Dir::State::status": "/dev/null",
        "Dir::Cache": home / "cache",
        "APT::Sandbox::User": "root",
        "Acquire::Retries": 3,
    }
    flags = [part for name, value in options.items() for part in ("-o", f"{name}={value}")]
    if not sources.exists():
        with filled(home) as folder:
            for part in ("lists/partial", "cache/archives/partial"):
                (folder / part).mkdir(parents=True)
            line = f"deb [arch=amd64 signed-by={_KEYRING}] {_mirror()} {suite} main\n"
            (folder / "sources.list").write_text(line)
            here = [flag.replace(str(home), str(folder)) for flag in flags]
            _checked(["apt-get", *here, "-qq", "--error-on=any", "update"])
    return _checked([tool, *flags, *args])


def _downloaded(names: Sequence[str], suite: str) -> list[Path]:
    folder = CACHE / "debs"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    here = Path.cwd()
    os.chdir(folder)  # where apt-get puts them
    try:
        _apt(suite, "apt-get", "-qq", "download", *names)
    finally:
        os.chdir(here)
    return sorted(folder.iterdir())


def _checked(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:]
        raise Unavailable(f"needs a Debian mirror that it can reach: {command[0]} said {said}")
    return done.stdout
