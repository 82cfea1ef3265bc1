"""Which pCPUs a machine has, what they share, and which of them this process may use.

Everything is the kernel's word: sysfs for what is shared, the affinity and the cgroup for what may
be used, and the MADT, where asked for, for the firmware's ids. What the kernel does not say is
``None``. Which pCPUs are taken is :mod:`hostpart.lease`'s to know.
"""

from __future__ import annotations

import errno
from functools import cached_property

from .cpuset import MAX_CPUS, CpuSet
from .errors import Failed, UsageError
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any, Protocol, TypeVar

    from .host import Host
    from .madt import Processor

    class Group(Protocol):
        """A set of CPUs, and what is inside it."""

        cpus: CpuSet
        parts: list[Any]

    G = TypeVar("G", bound=Group)

__all__ = ["Pcpu", "Topology", "nested", "read_topology"]

_CPU = "sys/devices/system/cpu"
_NODE = "sys/devices/system/node"
_MADT = "sys/firmware/acpi/tables/APIC"
# One file, by the names it has had, the present one first. The mask comes before the list: it has been there
# since Linux 2.6.16 (lists came ten releases later), and it says the same.
_CORE_FILES = ("core_cpus", "thread_siblings", "core_cpus_list", "thread_siblings_list")
_DIE_FILES = ("die_cpus", "die_cpus_list")
_PACKAGE_FILES = ("package_cpus", "core_siblings", "package_cpus_list", "core_siblings_list")
_CACHE_FILES = ("shared_cpu_map", "shared_cpu_list")
_NODE_FILES = ("cpumap", "cpulist")
_MASKS = ("_cpus", "_siblings", "map")
# Intel's hybrid machines have one PMU per kind of core, with the CPUs it counts.
_PMUS = (("performance", ("cpu_core",)), ("efficiency", ("cpu_atom", "cpu_lowpower")))
_PMU_FOLDERS = ("sys/devices", "sys/bus/event_source/devices")
_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
_JSON_NUMBERS = ("core", "package", "die", "numa", "llc", "apic_id", "acpi_uid")
_ASK_AGAIN = "write it anew with 'hostpart topology --json'"


class Pcpu(Value):
    """One logical CPU, by Linux's number; the ids of what it shares are unique host-wide.

    ``None`` stands for what the kernel does not say, and for all that an offline CPU would share.

    :ivar core: 0, 1, 2 … in order of the core's lowest CPU, as ``die`` and ``llc``
    :ivar package: the kernel's number where those are unique and not negative, else as ``core``
    :ivar die: also ``None`` where the processor knows no dies
    :ivar numa: the kernel's node number
    :ivar llc: the last-level cache: data or unified, of the highest level that says who shares it
    :ivar apic_id: the APIC id; on Arm the MPIDR
    :ivar acpi_uid: the ACPI processor UID
    :ivar kind: ``"performance"`` or ``"efficiency"`` on a hybrid machine
    """

    cpu: int
    core: int | None = None
    package: int | None = None
    die: int | None = None
    numa: int | None = None
    llc: int | None = None
    online: bool = True
    apic_id: int | None = None
    acpi_uid: int | None = None
    kind: str | None = None


class Topology(Value):
    """The pCPUs of one machine, ascending by Linux's number.

    :ivar usable: online, and allowed by this process's affinity and cgroup cpuset
    :ivar root: where it was read
    :ivar madt: whether the MADT was read and agrees
    :ivar doubts: where it does not, or cannot be read, a sentence each; empty if it was not asked for
    """

    pcpus: tuple[Pcpu, ...]
    usable: CpuSet
    root: str = "/"
    madt: bool = False
    doubts: tuple[str, ...] = ()

    @cached_property
    def numbers(self) -> CpuSet:
        """Every pCPU, offline ones too."""
        return CpuSet.of(pcpu.cpu for pcpu in self.pcpus)

    @cached_property
    def online(self) -> CpuSet:
        """The pCPUs that are online, usable or not."""
        return CpuSet.of(pcpu.cpu for pcpu in self.pcpus if pcpu.online)

    @cached_property
    def cores(self) -> tuple[CpuSet, ...]:
        """The online threads of each core, by lowest CPU; one of unknown core counts as its own."""
        threads: dict[object, list[int]] = {}
        for pcpu in self.pcpus:
            if pcpu.online:
                threads.setdefault((pcpu.cpu,) if pcpu.core is None else pcpu.core, []).append(pcpu.cpu)
        return tuple(CpuSet.of(cpus) for cpus in threads.values())

    def pcpu(self, cpu: int) -> Pcpu:
        """Return the pCPU of Linux's number *cpu*.

        :raises KeyError: where the machine has none
        """
        return self._by_number[cpu]

    def siblings(self, cpu: int) -> CpuSet:
        """Return the online threads of *cpu*'s core, *cpu* too; the empty set for one that is not online."""
        return self._siblings.get(cpu, CpuSet())

    @cached_property
    def _by_number(self) -> dict[int, Pcpu]:
        return {pcpu.cpu: pcpu for pcpu in self.pcpus}

    @cached_property
    def _siblings(self) -> dict[int, CpuSet]:
        return {cpu: core for core in self.cores for cpu in core}

    def to_json(self) -> dict[str, Any]:
        """Return what ``hostpart topology --json`` prints, as plain values."""
        order = ("cpu", "core", "package", "die", "numa", "llc", "online", "apic_id", "acpi_uid", "kind")
        return {
            "schema": 1,
            "source": {"root": self.root, "madt": self.madt},
            "usable": str(self.usable),
            "pcpus": [{name: getattr(pcpu, name) for name in order} for pcpu in self.pcpus],
        }

    @classmethod
    def from_json(cls, document: object, name: str = "the topology") -> Topology:
        """Return the topology that :meth:`to_json` gave; keys it does not know are passed over.

        :param name: the document's, for the error
        :raises UsageError: saying what is wrong with it
        """
        try:
            return cls(*_read_json(document))
        except ValueError as error:
            raise UsageError(f"{name} is no topology: {error}", _ASK_AGAIN) from error


def nested(groups: Iterable[G]) -> list[G]:
    """Put groups of CPUs into each other, and return the outermost, all by lowest CPU.

    One that only overlaps another (a node of a machine whose nodes cross its caches) is left out: boxes can't be drawn
    across each other.

    :param groups: each with ``cpus``, and ``parts``, a list that takes those inside it
    """
    outer: list[G] = []
    for group in sorted(groups, key=lambda group: (-len(group.cpus), group.cpus.lowest)):
        level = outer
        while True:
            around = next((other for other in level if other.cpus & group.cpus), None)
            if around is None:
                level.append(group)
                break
            if not group.cpus <= around.cpus:
                break
            level = around.parts
    levels = [outer]
    while levels:
        level = levels.pop()
        level.sort(key=lambda group: group.cpus.lowest)
        levels += [group.parts for group in level]
    return outer


def read_topology(host: Host, *, madt: bool = False) -> Topology:
    """Return what the machine has, with every CPU that sysfs shows as ``cpuN``.

    :param madt: read the firmware's table and map its ids too. That takes ``/proc/cpuinfo``,
        which is slow on a large machine
    :raises UsageError: where *host* shows no CPUs
    :raises Failed: where there are too few descriptors or too little memory to read on

    Source: Documentation/admin-guide/cputopology.rst and ABI/testing/sysfs-devices-system-cpu.
    """
    numbers = _numbers(host)
    online = _online(host, numbers)
    packages = _packages(host, online)
    dies = _dies(host, online, packages)
    nodes = _nodes(host, online)
    cores = _cores(host, online, packages, dies, nodes)
    caches = _caches(host, online)
    kinds = _kinds(host, online, cores)
    processors: dict[int, tuple[int | None, int | None]] = {}
    agrees = False
    doubts: tuple[str, ...] = ()
    if madt:
        processors, doubts = _firmware(host, numbers, online)
        agrees = not doubts
    pcpus = []
    for cpu in numbers:
        apic_id, acpi_uid = processors.get(cpu, (None, None))
        pcpus.append(
            Pcpu(
                cpu,
                cores.get(cpu),
                packages.get(cpu),
                dies.get(cpu),
                nodes.get(cpu),
                caches.get(cpu),
                cpu in online,
                apic_id,
                acpi_uid,
                kinds.get(cpu),
            )
        )
    return Topology(tuple(pcpus), _usable(host, online), host.root, agrees, doubts)


def _numbers(host: Host) -> CpuSet:
    try:
        names = host.listdir(_CPU)
    except OSError as error:
        raise UsageError(f"{host.root} shows no CPUs: {_CPU}: {error.strerror}", "mount sysfs on /sys") from error
    # "possible" would also name slots that no CPU was ever put in, and old kernels lack it.
    numbers = CpuSet.of(
        int(name[3:])
        for name in names
        if name[:3] == "cpu" and name[3:].isdecimal() and name.isascii() and len(name) < 8 and int(name[3:]) < MAX_CPUS
    )
    if not numbers:
        raise UsageError(f"{host.root} shows no CPUs in {_CPU}", "mount sysfs on /sys, or record the machine again")
    return numbers


def _online(host: Host, numbers: CpuSet) -> CpuSet:
    online = _read_set(host, f"{_CPU}/online")
    if online is not None:
        return online & numbers
    # Before Linux 2.6.26 each CPU said it for itself; one that cannot go offline has no such file.
    return CpuSet.of(cpu for cpu in numbers if _read_number(host, f"{_CPU}/cpu{cpu}/online") != 0)


def _packages(host: Host, online: CpuSet) -> dict[int, int]:
    sets, rest = _partition(host, online, _PACKAGE_FILES)
    names = [_topology_number(host, group.lowest, "physical_package_id") for group in sets]
    by_name: dict[int, int] = {}
    for cpu in rest:
        name = _topology_number(host, cpu, "physical_package_id")
        if name is not None and name >= 0:
            by_name[name] = by_name.get(name, 0) | 1 << cpu
    sets += [CpuSet(mask) for mask in by_name.values()]
    names += by_name
    kept = [name for name in names if name is not None and name >= 0]
    if len(kept) == len(names) == len(set(kept)):
        return {cpu: name for group, name in zip(sets, kept, strict=True) for cpu in group}
    # Virtual machines, s390 and old POWER say -1; two books of an s390 may number their sockets alike.
    return _numbered(sets)


def _dies(host: Host, online: CpuSet, packages: dict[int, int]) -> dict[int, int]:
    # A kernel has these files for every CPU or for none: one that has a package answers for all.
    asked = min(packages, default=None)
    if asked is not None and _first_set(host, f"{_CPU}/cpu{asked}/topology", _DIE_FILES) is None:
        return {}
    sets, _ = _partition(host, online, _DIE_FILES)
    # Where the architecture knows no dies, the kernel made one of each CPU and called it -1.
    return _numbered(group for group in sets if (_topology_number(host, group.lowest, "die_id") or 0) >= 0)


def _cores(
    host: Host, online: CpuSet, packages: dict[int, int], dies: dict[int, int], nodes: dict[int, int]
) -> dict[int, int]:
    sets, rest = _partition(host, online, _CORE_FILES)
    shared = next((group for group in sets if len(group) > 1), None)
    if shared and len({_topology_number(host, cpu, "core_id") for cpu in shared}) > 1:
        # AMD's compute units (family 15h): older kernels list a unit's two cores as siblings,
        # but number them as the two cores that AMD and hwloc count.
        sets = [part for group in sets for part in _by_core_id(host, group, lambda _: ())]
    # Where nothing lists the threads, a core_id is unique in a die or a node at best.
    alike = _by_core_id(host, rest, lambda cpu: (packages.get(cpu), dies.get(cpu), nodes.get(cpu)))
    return _numbered([*sets, *alike])


# *cpus* split by core_id and *place*; those that have no core_id are left out.
def _by_core_id(host: Host, cpus: CpuSet, place: Callable[[int], tuple[object, ...]]) -> list[CpuSet]:
    masks: dict[object, int] = {}
    for cpu in cpus:
        core_id = _topology_number(host, cpu, "core_id")
        if core_id is not None:
            key = (core_id, *place(cpu))
            masks[key] = masks.get(key, 0) | 1 << cpu
    return [CpuSet(mask) for mask in masks.values()]


def _caches(host: Host, online: CpuSet) -> dict[int, int]:
    # Each CPU that no cache seen so far covers is asked for its own; those of one core type may
    # have an L3 that others of the same package have not.
    last: dict[int, tuple[int, int]] = {}  # CPU -> level, mask
    for cpu in online:
        if cpu in last:
            continue
        cache = _last_cache(host, cpu, online)
        if cache:
            for other in CpuSet(cache[1]):
                last.setdefault(other, cache)
    groups: dict[tuple[int, int], int] = {}
    for cpu, cache in last.items():
        groups[cache] = groups.get(cache, 0) | 1 << cpu
    return _numbered(map(CpuSet, groups.values()))


def _last_cache(host: Host, cpu: int, online: CpuSet) -> tuple[int, int] | None:
    folder = f"{_CPU}/cpu{cpu}/cache"
    try:
        names = host.listdir(folder)
    except OSError:
        return None  # s390, many virtual machines
    levels = []
    for name in names:
        if name.startswith("index"):
            level = _read_number(host, f"{folder}/{name}/level")
            if level is not None:
                levels.append((level, name))
    for level, name in sorted(levels, reverse=True):
        if (_read(host, f"{folder}/{name}/type") or "").startswith("Instruction"):
            continue
        if (_read(host, f"{folder}/{name}/size") or "").strip() == "0K":
            continue  # Knights Landing declares an L3 of no size
        shared = _first_set(host, f"{folder}/{name}", _CACHE_FILES)
        if shared is None:
            continue
        if not shared:  # ia64: a cache that lists nobody is the core's own
            shared = _first_set(host, f"{_CPU}/cpu{cpu}/topology", _CORE_FILES) or shared
        return level, (shared & online).mask | 1 << cpu
    return None


def _nodes(host: Host, online: CpuSet) -> dict[int, int]:
    try:
        names = host.listdir(_NODE)
    except OSError:
        return {}  # a kernel without CONFIG_NUMA
    nodes: dict[int, int] = {}
    seen = CpuSet()
    for node in sorted(int(name[4:]) for name in names if name[:4] == "node" and name[4:].isdecimal()):
        cpus = _first_set(host, f"{_NODE}/node{node}", _NODE_FILES) or CpuSet()
        if not cpus & seen:  # a CPU has one node; hwloc too takes one that claims another's CPUs for broken
            seen |= cpus
            nodes.update(dict.fromkeys(cpus & online, node))
    return nodes


def _kinds(host: Host, online: CpuSet, cores: dict[int, int]) -> dict[int, str]:
    kinds: dict[int, str] = {}
    for kind, pmus in _PMUS:
        for pmu in pmus:
            for folder in _PMU_FOLDERS:
                cpus = _read_set(host, f"{folder}/{pmu}/cpus")
                if cpus is not None:
                    kinds.update(dict.fromkeys(cpus & online, kind))
                    break
    if kinds:
        return kinds
    # One value per core, for its threads are alike. Capacity is there on Arm, and on x86 since Linux 6.12.
    # Base frequency tells of Intel's hybrids where the PMUs were not recorded; it differs on some servers
    # too (Speed Select), so it counts only where some cores have more threads than others.
    members: dict[int, list[int]] = {}
    for cpu in online:
        members.setdefault(cores.get(cpu, -1 - cpu), []).append(cpu)
    mixed = len({len(threads) for threads in members.values()}) > 1
    for file in ("cpu_capacity", "cpufreq/base_frequency") if mixed else ("cpu_capacity",):
        values = {}
        for core, threads in members.items():
            value = _read_number(host, f"{_CPU}/cpu{threads[0]}/{file}")
            if value is None:
                break
            values[core] = value
        if len(values) == len(members) and len(set(values.values())) > 1:
            biggest = max(values.values())
            for core, threads in members.items():
                kinds.update(dict.fromkeys(threads, "performance" if values[core] == biggest else "efficiency"))
            break
    return kinds


def _usable(host: Host, online: CpuSet) -> CpuSet:
    if host.live:
        # The cgroup need not be asked: the kernel refuses an affinity outside the cpuset, cuts
        # every task's when the cpuset shrinks, and leaves offline CPUs out of what it returns.
        # (kernel/sched/syscalls.c: __sched_setaffinity, sched_getaffinity; kernel/cgroup/cpuset.c)
        return host.affinity() & online
    usable = online
    for line in (_read(host, "proc/self/status") or "").splitlines():
        if line.startswith("Cpus_allowed_list:"):
            allowed = _parse_set(line.partition(":")[2], mask=False)
            usable = usable if allowed is None else usable & allowed
    limit = _cgroup_cpus(host)
    return usable & limit if limit else usable


# What the cgroup of a recorded process leaves it, or None. The first hierarchy that controls
# cpusets counts: a controller is in one hierarchy only.
def _cgroup_cpus(host: Host) -> CpuSet | None:
    mounts = _read(host, "proc/mounts") or _read(host, "proc/self/mounts") or ""
    for line in mounts.splitlines():
        fields = line.split(" ")
        if len(fields) < 4:
            continue
        folder, kind, options = _unescaped(fields[1]).strip("/"), fields[2], fields[3].split(",")
        if kind == "cgroup2":
            if "cpuset" not in (_read(host, f"{folder}/cgroup.controllers") or "").split():
                continue
            file = "cpuset.cpus.effective"
        elif kind == "cpuset" or (kind == "cgroup" and "cpuset" in options and "noprefix" in options):
            file = "cpus"
        elif kind == "cgroup" and "cpuset" in options:
            file = "cpuset.cpus"  # not effective_cpus, which not every kernel has: offline CPUs go out below
        else:
            continue
        place = _cgroup_path(host, version=2 if kind == "cgroup2" else 1)
        if place is None:
            return None
        # Upwards: version 2 has the file only where the parent enables the controller, and what
        # holds there holds below.
        parts = [part for part in place.split("/") if part]
        for depth in range(len(parts), -1, -1):
            cpus = _read_set(host, "/".join([folder, *parts[:depth], file]))
            if cpus:
                return cpus
        return None
    return None


def _cgroup_path(host: Host, version: int) -> str | None:
    place = _read(host, "proc/self/cpuset")
    if place:
        return place.strip("\n")
    for line in (_read(host, "proc/self/cgroup") or "").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if (controllers == "") if version == 2 else ("cpuset" in controllers.split(",")):
            return path
    return None


# The kernel writes blanks of a mount point in octal.
def _unescaped(text: str) -> str:
    head, *rest = text.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] if part[:3].isdecimal() else "\\" + part for part in rest)


# CPU -> (APIC id, ACPI uid), and what speaks against the table, a sentence each.
def _firmware(
    host: Host, numbers: CpuSet, online: CpuSet
) -> tuple[dict[int, tuple[int | None, int | None]], tuple[str, ...]]:
    from .madt import TableError, parse_madt

    apic_ids = _apic_ids(host)
    uids = {
        cpu: uid for cpu in numbers if (uid := _read_number(host, f"{_CPU}/cpu{cpu}/firmware_node/uid")) is not None
    }
    table: tuple[Processor, ...] = ()
    doubts = []
    try:
        table = parse_madt(host.read_bytes(_MADT))
    except TableError as error:
        doubts.append(str(error))
    except OSError as error:
        doubts.append(f"the MADT cannot be read: {error.strerror}")
    # Of two entries for one processor (some firmware lists it as a local APIC and as an x2APIC) the enabled one counts.
    by_apic: dict[int, Processor] = {}
    by_uid: dict[int, Processor] = {}
    for processor in sorted(table, key=lambda processor: processor.enabled):
        by_apic[processor.apic_id] = by_uid[processor.acpi_uid] = processor
    ids: dict[int, tuple[int | None, int | None]] = {}
    matched = {}
    for cpu in numbers:
        apic_id, uid = apic_ids.get(cpu), uids.get(cpu)
        found = (
            by_uid.get(uid) if apic_id is None and uid is not None else by_apic.get(-1 if apic_id is None else apic_id)
        )
        if found:
            matched[cpu] = found
            ids[cpu] = found.apic_id, found.acpi_uid
        else:
            ids[cpu] = apic_id, uid
    if table:
        enabled = {processor.apic_id for processor in by_apic.values() if processor.enabled}
        doubts += _disagreements(numbers, online, matched, ids, enabled)
    elif not doubts:
        doubts.append("the MADT lists no processor")
    return ids, tuple(doubts)


def _disagreements(
    numbers: CpuSet,
    online: CpuSet,
    matched: dict[int, Processor],
    ids: dict[int, tuple[int | None, int | None]],
    enabled: set[int],
) -> list[str]:
    said = []
    unknown = [cpu for cpu in online if ids[cpu] == (None, None)]
    absent = [cpu for cpu in online if cpu not in matched and ids[cpu] != (None, None)]
    disabled = [cpu for cpu in online if cpu in matched and matched[cpu].apic_id not in enabled]
    if unknown:
        said.append(f"the kernel tells no firmware id of CPU {CpuSet.of(unknown)}")
    if absent:
        said.append(f"the MADT does not list CPU {CpuSet.of(absent)}")
    if disabled:
        said.append(f"the MADT lists CPU {CpuSet.of(disabled)} as disabled, and it is online")
    # Offline CPUs have no id that could be matched: they may account for as many entries.
    over = len(enabled - {processor.apic_id for processor in matched.values()}) - len(numbers - CpuSet.of(matched))
    if over > 0:
        said.append(f"the MADT lists {len(enabled)} enabled processors, and the kernel has {len(numbers)} CPUs")
    return said


def _apic_ids(host: Host) -> dict[int, int]:
    ids: dict[int, int] = {}
    cpu = None
    for line in (_read(host, "proc/cpuinfo") or "").splitlines():
        name, _, value = line.partition(":")
        name = name.strip()
        if name == "processor":
            cpu = _number(value)
        elif name == "apicid" and cpu is not None:
            apic_id = _number(value)
            if apic_id is not None:
                ids[cpu] = apic_id
    return ids


# *online* split into the sets that one of *files* gives, read once per set, by lowest CPU; and the
# CPUs that have no such file.
def _partition(host: Host, online: CpuSet, files: tuple[str, ...]) -> tuple[list[CpuSet], CpuSet]:
    sets: list[CpuSet] = []
    untold, rest = CpuSet(), online
    while rest:
        cpu = rest.lowest
        one = CpuSet(1 << cpu)
        members = _first_set(host, f"{_CPU}/cpu{cpu}/topology", files)
        if members is None:
            untold |= one
            rest -= one
        else:
            group = members & rest | one
            sets.append(group)
            rest -= group
    return sets, untold


def _numbered(groups: Iterable[CpuSet]) -> dict[int, int]:
    ordered = sorted(groups, key=lambda group: group.lowest)
    return {cpu: number for number, group in enumerate(ordered) for cpu in group}


def _first_set(host: Host, folder: str, files: tuple[str, ...]) -> CpuSet | None:
    for file in files:
        found = _read_set(host, f"{folder}/{file}")
        if found is not None:
            return found
    return None


def _read_set(host: Host, name: str) -> CpuSet | None:
    text = _read(host, name)
    return None if text is None else _parse_set(text, mask=name.endswith(_MASKS))


def _parse_set(text: str, *, mask: bool) -> CpuSet | None:
    try:
        return CpuSet.parse_mask(text) if mask else CpuSet.parse(text)
    except ValueError:
        return None


def _topology_number(host: Host, cpu: int, file: str) -> int | None:
    return _read_number(host, f"{_CPU}/cpu{cpu}/topology/{file}")


def _read_number(host: Host, name: str) -> int | None:
    text = _read(host, name)
    return None if text is None else _number(text)


def _number(text: str) -> int | None:
    try:
        return int(text)
    except ValueError:
        return None


def _read(host: Host, name: str) -> str | None:
    try:
        # Some kernels print a list's NUL too (arm64, a node's cpulist), and tar fills what sysfs
        # calls a file of 4,096 bytes up with them.
        return host.read_text(name).rstrip("\0")
    except OSError as error:
        # Not there, not for us, or of a CPU that has just gone: the kernel does not say. But want
        # of descriptors is not the kernel's silence, and must not become a false topology.
        if error.errno in _EXHAUSTED:
            raise Failed(f"{name} cannot be read: {error.strerror}", "close files or raise 'ulimit -n'") from error
        return None


# The fields of a Topology, from JSON.
def _read_json(document: object) -> tuple[tuple[Pcpu, ...], CpuSet, str, bool]:
    if not isinstance(document, dict) or document.get("schema") != 1:
        raise ValueError('it has no "schema": 1')
    source, usable, rows = (document.get(key) for key in ("source", "usable", "pcpus"))
    if not isinstance(source, dict):
        source = {}
    if not isinstance(usable, str):
        raise ValueError(f"usable: want a CPU list, got {usable!r}")
    if not isinstance(rows, list) or not rows:
        raise ValueError("pcpus: want a list of pCPUs")
    pcpus: dict[int, Pcpu] = {}
    for index, row in enumerate(rows):
        pcpu = _read_json_pcpu(row, f"pcpus[{index}]")
        if pcpu.cpu in pcpus:
            raise ValueError(f"pcpus[{index}].cpu: {pcpu.cpu} is there twice")
        pcpus[pcpu.cpu] = pcpu
    allowed = CpuSet.parse(usable)
    strange = allowed - CpuSet.of(cpu for cpu, pcpu in pcpus.items() if pcpu.online)
    if strange:
        raise ValueError(f"usable: {strange} is not online")
    ordered = tuple(pcpus[cpu] for cpu in sorted(pcpus))
    return ordered, allowed, str(source.get("root", "/")), source.get("madt") is True


def _read_json_pcpu(row: object, key: str) -> Pcpu:
    if not isinstance(row, dict):
        raise ValueError(f"{key}: want an object, got {row!r}")
    cpu, online, kind = row.get("cpu"), row.get("online", True), row.get("kind")
    if type(cpu) is not int or not 0 <= cpu < MAX_CPUS:
        raise ValueError(f"{key}.cpu: want a whole number from 0 to {MAX_CPUS - 1}, got {cpu!r}")
    if not isinstance(online, bool):
        raise ValueError(f"{key}.online: want true or false, got {online!r}")
    if kind is not None and not isinstance(kind, str):
        raise ValueError(f"{key}.kind: want a text or null, got {kind!r}")
    numbers: dict[str, int | None] = {}
    for name in _JSON_NUMBERS:
        value = row.get(name)
        if value is not None and (type(value) is not int or value < 0):
            raise ValueError(f"{key}.{name}: want a whole number from 0 or null, got {value!r}")
        numbers[name] = value
    return Pcpu(cpu, online=online, kind=kind, **numbers)
