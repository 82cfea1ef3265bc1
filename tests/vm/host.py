"""What this machine has and lacks for the lab, and how it gets what it lacks if it is told to."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable

from tests.vm import debian
from tests.vm.cache import locked

__all__ = ["lacking", "missing"]

# Programs, and Debian's packages that have them.
_TOOLS = {"qemu-system-x86_64": "qemu-system-x86", "ldd": "libc-bin"}


def lacking() -> str:
    """Return a sentence on what is missing for the lab and what would mend it; empty if nothing is.

    With HOSTPART_TEST_INSTALL=1 what is missing is installed first, as root on Debian or Ubuntu.
    """
    if platform.machine() != "x86_64":
        return f"needs an x86-64 machine, not {platform.machine()}"
    if why := missing(_packages, "its virtual machines"):
        return why
    lacks = debian.lacks()
    return f"needs {', '.join(lacks)}, to fetch kernels" if lacks else ""


def missing(packages: Callable[[], list[str]], use: str) -> str:
    """Return a sentence on the Debian packages that *packages* still names at the end, and on *use*; empty if none.

    With HOSTPART_TEST_INSTALL=1 they are installed first, as root on Debian or Ubuntu, by one process at a time.
    """
    lacks = packages()
    if lacks and os.environ.get("HOSTPART_TEST_INSTALL") == "1" and os.geteuid() == 0 and shutil.which("apt-get"):
        with locked("install"):
            said = _install(packages())
        if lacks := packages():
            return f"needs {', '.join(lacks)}, which apt-get could not install: {said}"
    if lacks:
        return (
            f"needs the Debian packages {', '.join(lacks)} for {use}: install them, "
            "or set HOSTPART_TEST_INSTALL=1 as root on Debian or Ubuntu"
        )
    return ""


def _packages() -> list[str]:
    found = [package for tool, package in _TOOLS.items() if not shutil.which(tool)]
    return [*found, *debian.packages()]


def _install(packages: list[str]) -> str:
    if not packages:
        return ""
    env = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=300", "-o", "Acquire::Retries=3"]
    said = ""
    for command in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = subprocess.run([*apt, *command], env=env, capture_output=True, text=True, check=False)
        said = (done.stderr or done.stdout).strip()[-500:]
    return said
