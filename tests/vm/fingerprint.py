"""What a host looks like from outside: all that hostpart may touch, read by code that shares nothing with it."""

from __future__ import annotations

import glob
import os
import re

__all__ = ["difference", "fingerprint"]

_FILES = (
    "/proc/irq/default_smp_affinity",
    "/proc/irq/*/smp_affinity",
    "/sys/devices/virtual/workqueue/cpumask",
    "/sys/devices/virtual/workqueue/cpumask_requested",
    "/sys/devices/virtual/workqueue/*/cpumask",
    "/proc/sys/kernel/watchdog_cpumask",
    "/proc/sys/vm/stat_interval",
    "/sys/class/net/*/queues/rx-*/rps_cpus",
    "/sys/devices/system/cpu/online",
    "/sys/devices/system/cpu/cpu*/online",
)
_CGROUP_FILES = (
    "cgroup.subtree_control", "cgroup.freeze", "cgroup.type", "cpuset.cpus", "cpuset.cpus.effective",
    "cpuset.cpus.partition", "cpuset.cpus.isolated", "cpuset.cpus.exclusive", "cpuset.mems", "cpuset.mems.effective",
    "cpuset.cpu_exclusive", "cpuset.mem_exclusive", "cpuset.sched_load_balance", "cpuset.effective_cpus",
)  # fmt: skip
# Tasks of the kernel's that come and go, under names that say what they do at this instant.
_FLEETING = re.compile(r"kworker/")


def fingerprint(*, tasks: bool = True) -> dict[str, str]:
    """Return every value by a name that says where it was read."""
    found: dict[str, str] = {}
    for pattern in _FILES:
        for path in glob.glob(pattern):
            found[path] = _read(path)
    for top in ("/sys/fs/cgroup", "/sys/fs/cgroup/cpuset"):
        for folder, _, names in os.walk(top):
            for name in _CGROUP_FILES:
                if name in names:
                    found[f"{folder}/{name}"] = _read(f"{folder}/{name}")
            found[folder] = "directory"
    if tasks:
        found |= _tasks()
    return found


def _tasks() -> dict[str, str]:
    found: dict[str, str] = {}
    for path in glob.glob("/proc/[0-9]*/task/[0-9]*"):
        status, stat = _read(f"{path}/status"), _read(f"{path}/stat")
        if not status or not stat:
            continue
        name = stat[stat.index("(") + 1 : stat.rindex(")")]
        fields = stat[stat.rindex(")") + 2 :].split()
        tid, start, flags = path.rpartition("/")[2], fields[19], int(fields[6])
        mask = re.search(r"^Cpus_allowed_list:\s*(\S*)$", status, re.MULTILINE)
        mems = re.search(r"^Mems_allowed_list:\s*(\S*)$", status, re.MULTILINE)
        if _FLEETING.match(name):
            name = "kworker"
        key = f"task {tid} {start} {name}{' (bound)' if flags & 0x04000000 else ''}"
        found[key] = f"cpus {mask[1] if mask else '?'} mems {mems[1] if mems else '?'} in {_read(f'{path}/cgroup')}"
        found[key] += f" state {'stopped' if fields[0] == 'T' else 'not stopped'}"
    return found


def difference(before: dict[str, str], after: dict[str, str], *, bound: bool = True) -> list[str]:
    """Return what is not as it was, a line each; tasks that ended or came since are compared with nobody.

    Nor are kernel workers whose mask nobody can set: one has the mask of the pool that it last worked for, and keeps it
    when that pool is replaced, until the kernel ends it. And an interrupt's thread follows its interrupt, of which the
    kernel chooses the CPU anew whenever the mask is written.

    :param bound: whether kernel threads whose mask nobody but the kernel may set count as well
    """
    lines = []
    for name in sorted(before.keys() | after.keys()):
        was, now = before.get(name), after.get(name)
        if was == now or (name.startswith("task ") and (was is None or now is None)):
            continue
        if name.startswith("task ") and (" irq/" in name or ("(bound)" in name and (not bound or " kworker " in name))):
            continue
        lines.append(f"{name}: was {was}, is {now}")
    return lines


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError as error:
        # A mask of an interrupt that nobody can read stays one.
        return "" if path.startswith("/proc/") and "/task/" in path else f"({error.strerror})"
