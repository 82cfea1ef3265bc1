"""Recorded machines, and machines made up from a few CPU lists.

``2c-firecracker`` is a virtual machine (Firecracker, AMD, Linux 6.18) as it stood. To record one::

    for f in /sys/devices/system/cpu/online /sys/devices/system/cpu/cpu*/topology/* \
             /sys/devices/system/cpu/cpu*/cache/index*/{level,type,size,shared_cpu_map} \
             /sys/devices/system/node/node*/cpumap /sys/firmware/acpi/tables/APIC
    do mkdir -p "NAME${f%/*}"; cat "$f" > "NAME$f"; done
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.topology import Pcpu, Topology

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["RECORDED", "fake_files", "fake_host", "madt", "topology_of", "write_tree"]

RECORDED = Path(__file__).parent / "2c-firecracker"
_CPU = "sys/devices/system/cpu"


def fake_host(
    root: Path,
    cores: Sequence[str],
    *,
    packages: Sequence[str] | None = None,
    dies: Sequence[str] = (),
    caches: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
    offline: str = "",
    files: Mapping[str, str | bytes | None] | None = None,
) -> Host:
    """Write a machine below *root* and return it; see :func:`fake_files`."""
    write_tree(
        root,
        fake_files(cores, packages=packages, dies=dies, caches=caches, nodes=nodes, offline=offline, files=files),
    )
    return Host(str(root))


def fake_files(
    cores: Sequence[str],
    *,
    packages: Sequence[str] | None = None,
    dies: Sequence[str] = (),
    caches: Sequence[str] | None = None,
    nodes: Sequence[str] | None = None,
    offline: str = "",
    files: Mapping[str, str | bytes | None] | None = None,
) -> dict[str, str | bytes]:
    """Return a machine's files by name, from CPU lists.

    :param cores: the online threads of each core
    :param packages: what each package holds; one with all by default; likewise *caches* (the L3s) and *nodes*
    :param offline: CPUs that are there and off
    :param files: others besides; ``None`` takes one away
    """
    online = CpuSet.of(cpu for core in cores for cpu in CpuSet.parse(core))
    numbers = online | CpuSet.parse(offline)
    every = (str(online),)
    made: dict[str, str | bytes] = {f"{_CPU}/online": f"{online}\n", f"{_CPU}/possible": f"{numbers}\n"}
    for cpu in CpuSet.parse(offline):
        made[f"{_CPU}/cpu{cpu}/online"] = "0\n"

    def share(name: str, groups: Sequence[str], number: str | None = None) -> None:
        for index, group in enumerate(groups):
            members = CpuSet.parse(group)
            for cpu in members:
                made[f"{_CPU}/cpu{cpu}/{name}"] = f"{members.to_mask()}\n"
                if number is not None:
                    made[f"{_CPU}/cpu{cpu}/{number}"] = f"{index}\n"

    share("topology/core_cpus", cores, "topology/core_id")
    share("topology/package_cpus", every if packages is None else packages, "topology/physical_package_id")
    share("topology/die_cpus", dies, "topology/die_id")
    for index, level, kind, groups in (
        (0, 1, "Data", cores),
        (1, 1, "Instruction", cores),
        (2, 2, "Unified", cores),
        (3, 3, "Unified", every if caches is None else caches),
    ):
        share(f"cache/index{index}/shared_cpu_map", groups)
        for cpu in CpuSet.of(cpu for group in groups for cpu in CpuSet.parse(group)):
            made[f"{_CPU}/cpu{cpu}/cache/index{index}/level"] = f"{level}\n"
            made[f"{_CPU}/cpu{cpu}/cache/index{index}/type"] = f"{kind}\n"
            made[f"{_CPU}/cpu{cpu}/cache/index{index}/size"] = "32K\n"
    for number, node in enumerate(every if nodes is None else nodes):
        made[f"sys/devices/system/node/node{number}/cpumap"] = CpuSet.parse(node).to_mask() + "\n"
    for name, content in (files or {}).items():
        if content is None:
            made.pop(name, None)
        else:
            made[name] = content
    return made


def topology_of(rows: Sequence[Sequence[Any]]) -> Topology:
    """Return the topology of *rows*: core, package, NUMA node and cache, and the CPU list of the core's threads."""
    pcpus = [
        Pcpu(cpu, core=core, package=package, numa=numa, llc=llc)
        for core, package, numa, llc, threads in rows
        for cpu in CpuSet.parse(threads)
    ]
    pcpus.sort(key=lambda pcpu: pcpu.cpu)
    return Topology(tuple(pcpus), CpuSet.of(pcpu.cpu for pcpu in pcpus))


def write_tree(root: Path, files: Mapping[str, str | bytes]) -> None:
    """Write *files* below *root*."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def madt(*structures: bytes) -> bytes:
    """Return a MADT of *structures*, with the length and the checksum that make it whole."""
    body = b"".join(structures)
    table = bytearray(b"APIC" + (44 + len(body)).to_bytes(4, "little") + bytes(36) + body)
    table[9] = -sum(table) & 0xFF
    return bytes(table)
