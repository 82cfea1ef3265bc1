"""Where a probe runs: what hostpart says, what the kernel says, and the caches of the pCPU."""

from __future__ import annotations

import ctypes
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["allowed", "caches", "current_cpu", "describe"]

_CPU = "/sys/devices/system/cpu"
_sched_getcpu = ctypes.CDLL(None).sched_getcpu
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def current_cpu() -> int:
    """Return the pCPU (Linux's number) that this thread runs on at this moment."""
    return int(_sched_getcpu())


def allowed() -> str | None:
    """Return the pCPUs that this thread may run on, in the kernel's list form."""
    return _status("Cpus_allowed_list")


def describe(environ: Mapping[str, str]) -> dict[str, Any]:
    """Return this process's seat: VM and vCPU as hostpart named them, null outside of a worker; pid, mask and host."""
    vcpu, vcpus = environ.get("HOSTPART_VCPU"), environ.get("HOSTPART_VCPUS")
    return {
        "vm": environ.get("HOSTPART_VM"),
        "vcpu": int(vcpu) if vcpu is not None else None,
        "vcpus": int(vcpus) if vcpus is not None else None,
        "pcpu": environ.get("HOSTPART_PCPU"),
        "cpus_allowed": allowed(),
        "cpus_seen": [current_cpu()],
        "pid": os.getpid(),
        "kernel": os.uname().release,
    }


def caches(cpu: int, folder: str = _CPU) -> dict[str, int | None]:
    """Return the sizes in bytes of the data caches of pCPU *cpu*: ``l1``, ``l2``, ``llc``, and the ``line``.

    ``llc`` is the last level there is, which may be the second. What the kernel does not say is None.

    Source: Documentation/ABI/testing/sysfs-devices-system-cpu, "cache/index[0-3]/".
    """
    found: dict[str, int | None] = {"l1": None, "l2": None, "llc": None, "line": None}
    top = 0
    here = f"{folder}/cpu{cpu}/cache"
    try:
        names = sorted(name for name in os.listdir(here) if name.startswith("index"))
    except OSError:
        return found  # many virtual machines and boards describe no caches
    for name in names:
        kind, level, size = (_line(f"{here}/{name}/{file}") for file in ("type", "level", "size"))
        if kind not in ("Data", "Unified") or not level or not size:
            continue
        number = _bytes(size)
        if level in ("1", "2"):
            found[f"l{level}"] = number
        if int(level) > top and number:
            top, found["llc"] = int(level), number
            line = _line(f"{here}/{name}/coherency_line_size")
            found["line"] = int(line) if line else found["line"]
    return found


def _bytes(size: str) -> int | None:
    digits = size.rstrip("KMG")
    return int(digits) * _UNITS.get(size[len(digits) :], 1) if digits.isdigit() else None


def _line(path: str) -> str | None:
    try:
        with open(path, encoding="ascii") as file:
            return file.read().strip()
    except OSError:
        return None


def _status(name: str) -> str | None:
    with open("/proc/thread-self/status", encoding="utf-8", errors="replace") as file:
        return next((line.split()[1] for line in file if line.startswith(f"{name}:")), None)
