"""The host that an experiment is made on: what bears on its figures and what tells it from another one.

Read at every start. What the kernel does not say is None.
"""

from __future__ import annotations

import os
import sys

from .. import __version__
from ..topology import read_topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..host import Host

__all__ = ["distances", "read_facts"]

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_PACKAGES = ("numpy", "scipy", "plotly", "hdrhistogram", "numba", "psutil")
_CPU_FIELDS = {
    "model": "model name",
    "vendor": "vendor_id",
    "microcode": "microcode",
}
_CPU_NUMBERS = {"family": "cpu family", "model_number": "model", "stepping": "stepping"}
# Flags of /proc/cpuinfo that say how time and power behave. Source: arch/x86/include/asm/cpufeatures.h.
_FLAGS = (
    "constant_tsc",
    "nonstop_tsc",
    "tsc_known_freq",
    "hypervisor",
    "aperfmperf",
    "hwp",
    "cpb",
    "ida",
    "cat_l3",
    "mba",
)


def read_facts(host: Host) -> dict[str, Any]:
    """Return the facts, as a line of ``sessions.jsonl`` has them.

    Sources: Documentation/admin-guide/pm/cpufreq.rst, Documentation/ABI/testing/sysfs-devices-system-cpu,
    proc_stat(5), proc_cpuinfo(5).
    """
    topology = read_topology(host)
    uname = os.uname()
    usable = list(topology.usable)
    clocks = _text(host, "sys/devices/system/clocksource/clocksource0/available_clocksource")
    return {
        "hostname": uname.nodename,
        "machine": uname.machine,
        "kernel": {"release": uname.release, "version": uname.version, "cmdline": _text(host, "proc/cmdline")},
        "cpu": _cpu(host),
        "smt": {"active": _flag(_text(host, f"{_CPU}/smt/active")), "control": _text(host, f"{_CPU}/smt/control")},
        "governor": _by_cpu(host, usable, "cpufreq/scaling_governor"),
        "driver": _text(host, f"{_CPU}/cpu{usable[0]}/cpufreq/scaling_driver"),
        "turbo": _turbo(host),
        "frequency_khz": _frequency(host, usable),
        "clocksource": {
            "current": _text(host, "sys/devices/system/clocksource/clocksource0/current_clocksource"),
            "available": None if clocks is None else clocks.split(),
        },
        "hypervisor": _hypervisor(host),
        "steal_percent_since_boot": _steal(host),
        "memory": _memory(host),
        "mitigations": _mitigations(host),
        "isolated": _text(host, f"{_CPU}/isolated") or None,
        "nohz_full": _nohz(host),
        "cgroup": _cgroup(host),
        "load": [round(value, 2) for value in os.getloadavg()],
        "versions": _versions(),
        "topology": topology.to_json(),
        "caches": _caches(host, usable),
    }


def distances(host: Host) -> dict[int, tuple[int, ...]]:
    """Return each NUMA node's distance to each node, as firmware gave it; empty where there is none."""
    found: dict[int, tuple[int, ...]] = {}
    try:
        names = host.listdir(_NODE)
    except OSError:
        return found
    for name in names:
        text = _text(host, f"{_NODE}/{name}/distance") if name.startswith("node") and name[4:].isdecimal() else None
        if text:
            found[int(name[4:])] = tuple(map(int, text.split()))
    return found


def _text(host: Host, name: str) -> str | None:
    try:
        return host.read_text(name).strip()
    except OSError:
        return None


def _flag(text: str | None) -> bool | None:
    return None if text not in ("0", "1") else text == "1"


def _number(text: str | None) -> int | None:
    return int(text) if text is not None and text.isascii() and text.isdigit() else None


def _cpu(host: Host) -> dict[str, Any]:
    block = (_text(host, "proc/cpuinfo") or "").partition("\n\n")[0]
    lines = dict(part.split(":", 1) for part in block.splitlines() if ":" in part)
    said = {name.strip(): value.strip() for name, value in lines.items()}
    flags = (said.get("flags") or said.get("Features") or "").split()
    return {
        **{name: said.get(field) for name, field in _CPU_FIELDS.items()},
        **{name: _number(said.get(field)) for name, field in _CPU_NUMBERS.items()},
        "flags_of_note": [flag for flag in _FLAGS if flag in flags],
    }


def _by_cpu(host: Host, cpus: list[int], name: str) -> dict[str, str] | None:
    found = {str(cpu): text for cpu in cpus if (text := _text(host, f"{_CPU}/cpu{cpu}/{name}")) is not None}
    return found or None


def _turbo(host: Host) -> bool | None:
    off = _flag(_text(host, f"{_CPU}/intel_pstate/no_turbo"))
    return _flag(_text(host, f"{_CPU}/cpufreq/boost")) if off is None else not off


def _frequency(host: Host, cpus: list[int]) -> dict[str, int | None] | None:
    least = [_number(_text(host, f"{_CPU}/cpu{cpu}/cpufreq/cpuinfo_min_freq")) for cpu in cpus]
    most = [_number(_text(host, f"{_CPU}/cpu{cpu}/cpufreq/cpuinfo_max_freq")) for cpu in cpus]
    low, high = [value for value in least if value], [value for value in most if value]
    return {"min": min(low), "max": max(high)} if low and high else None


def _hypervisor(host: Host) -> str | None:
    kind = _text(host, "sys/hypervisor/type")  # Xen says it here; others in the firmware's tables
    if kind:
        return kind
    if "hypervisor" not in _cpu(host)["flags_of_note"]:
        return None
    product = _text(host, "sys/class/dmi/id/product_name")
    vendor = _text(host, "sys/class/dmi/id/sys_vendor")
    return " ".join(part for part in (vendor, product) if part) or _asked() or "yes, which one is not said"


def _asked() -> str | None:
    # Else only the processor knows, by an instruction: util-linux asks it.
    import subprocess

    try:
        done = subprocess.run(["lscpu"], capture_output=True, text=True, timeout=10, env={"LC_ALL": "C"}, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return next((line.split(":")[1].strip() for line in done.stdout.splitlines() if "Hypervisor vendor" in line), None)


def _steal(host: Host) -> float | None:
    first = (_text(host, "proc/stat") or "").partition("\n")[0].split()
    if len(first) < 9 or first[0] != "cpu":
        return None
    ticks = list(map(int, first[1:9]))
    return round(100 * ticks[7] / sum(ticks), 3) if sum(ticks) else None


def _memory(host: Host) -> dict[str, Any]:
    def total(text: str | None) -> int | None:
        for line in (text or "").splitlines():
            if "MemTotal:" in line:
                return int(line.split("MemTotal:")[1].split()[0]) * 1024
        return None

    try:
        names = [name for name in host.listdir(_NODE) if name.startswith("node") and name[4:].isdecimal()]
    except OSError:
        names = []
    return {
        "total_bytes": total(_text(host, "proc/meminfo")),
        "nodes": {name[4:]: total(_text(host, f"{_NODE}/{name}/meminfo")) for name in names},
    }


def _mitigations(host: Host) -> dict[str, str]:
    folder = f"{_CPU}/vulnerabilities"
    try:
        names = host.listdir(folder)
    except OSError:
        return {}
    return {name: text for name in names if (text := _text(host, f"{folder}/{name}")) is not None}


def _nohz(host: Host) -> str | None:
    text = _text(host, f"{_CPU}/nohz_full")
    return None if text in (None, "", "(null)") else text


def _cgroup(host: Host) -> int | None:
    if host.exists("sys/fs/cgroup/cgroup.controllers"):
        return 2
    return 1 if host.exists("proc/cgroups") else None


def _versions() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    def of(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "hostpart": __version__,
        "python": ".".join(map(str, sys.version_info[:3])),
        **{name: of(name) for name in _PACKAGES},
    }


def _caches(host: Host, cpus: list[int]) -> list[dict[str, Any]]:
    found: dict[tuple[int, str, str], dict[str, Any]] = {}
    for cpu in cpus:
        folder = f"{_CPU}/cpu{cpu}/cache"
        try:
            names = [name for name in host.listdir(folder) if name.startswith("index")]
        except OSError:
            continue
        for name in names:
            level, kind = _number(_text(host, f"{folder}/{name}/level")), _text(host, f"{folder}/{name}/type")
            shared, size = (_text(host, f"{folder}/{name}/{file}") for file in ("shared_cpu_list", "size"))
            if level is None or kind is None or shared is None:
                continue
            bytes_ = int(size[:-1]) * 1024 if size and size[-1] == "K" and size[:-1].isdigit() else None
            found[level, kind, shared] = {"level": level, "type": kind, "size_bytes": bytes_, "cpus": shared}
    return [found[key] for key in sorted(found)]
