"""The guest's topology: what QEMU is told, so that the guest's scheduler knows what its vCPUs share on the host.

Packages become sockets, cores cores and SMT siblings threads. QEMU gives x86 guests one last-level cache per die, so
what becomes a die is the smallest of a die, a last-level cache and a NUMA node: a package with four such caches (AMD's
core complexes) has four dies in the guest. Where the placement leaves gaps (one core with both its threads, another
with one), the seats in them stay empty: they are hot-pluggable CPUs that are never plugged, which the firmware's table
lists as disabled.

What QEMU's x86 machines can't express, and no note tells, since the host's topology does not know it either: L2 caches
that several cores share, and the caches' sizes (``host-cache-info=on`` would show these, with the package's sharing
instead of the die's).

Whether the guest got what is said here is for others to check; so is which thread of QEMU's is which vCPU.
"""

from __future__ import annotations

from itertools import permutations, product
from math import prod

from ..cpuset import CpuSet
from ..errors import UsageError
from ..isolation.mems import nodes
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from ..host import Host
    from ..topology import Pcpu, Topology

    Place = tuple[object, object, object, object]
    Ids = tuple[int, int, int, int]

__all__ = ["Facts", "Mirror", "Seat", "mirror", "read_facts"]

_MIB = 1 << 20
_GRAIN = 8192  # QEMU rounds memory up to these, and then wants the nodes' to be as much
# The eight-bit id 255 means every APIC; what lies above needs x2APIC, which TCG lacks before QEMU 9.0 and KVM without
# an interrupt controller of its own.
_MAX_APIC_ID = 254
_MOST_IN_MASK = 8
_MAX_VCPUS = {"x86_64": _MAX_APIC_ID + 1, "aarch64": 512}
_IDS = {
    "x86_64": ("socket-id", "die-id", "core-id", "thread-id"),
    "aarch64": ("socket-id", "cluster-id", "core-id", "thread-id"),
}
_COUNTS = {"x86_64": "dies", "aarch64": "clusters"}
# As sysfs writes CPU vendors: arch/x86/include/asm/processor.h, X86_VENDOR_*.
_VENDORS = {"0000": "GenuineIntel", "0002": "AuthenticAMD", "0009": "HygonGenuine"}
# Their guests learn of threads and dies from leaves that -cpu host does not turn on by itself.
_NEED_TOPOEXT = ("AuthenticAMD", "HygonGenuine")
# TCG's own "max" is an AMD without those leaves, which QEMU can't emulate: Linux 6.1 shows its threads as cores and all
# series show one cache. With Intel's name on it they read leaves 0xB, 0x1F and 4, which are there.
_TCG_MODEL = "max,vendor=GenuineIntel"
_FOLDER = "sys/devices/system/node"


class Facts(Value):
    """What of the host plays a part besides its topology; empty where it is not known.

    :ivar vendor: the CPU's, as ``/proc/cpuinfo`` names it (``AuthenticAMD``)
    :ivar mems: the NUMA nodes that have memory
    :ivar distances: from node, to node, how far in the units of ACPI's SLIT: 10 is the node itself
    """

    vendor: str = ""
    mems: CpuSet = CpuSet()
    distances: tuple[tuple[int, int, int], ...] = ()


class Seat(Value):
    """Where the guest finds a vCPU; all are the guest's numbers, counted from 0 inside what is around them.

    :ivar die: on Arm the cluster
    :ivar node: the NUMA node; ``None`` where the guest has no table of them
    :ivar apic_id: the APIC id; ``None`` on Arm
    :ivar linux_cpu: the number that Linux gives it in the guest, which counts in the order of the ids
    """

    socket: int
    die: int
    core: int
    thread: int
    node: int | None
    apic_id: int | None
    linux_cpu: int

    def is_of(self, props: Mapping[str, object]) -> bool:
        """Whether *props* of QEMU's ``query-cpus-fast`` are of this seat; QEMU leaves out ids of which there is one."""
        die = props.get("die-id", props.get("cluster-id", 0))
        found = (props.get("socket-id", 0), die, props.get("core-id", 0), props.get("thread-id", 0))
        return found == (self.socket, self.die, self.core, self.thread)


class Mirror(Value):
    """How QEMU is told, and what the guest has then.

    :ivar arguments: QEMU's options ``-smp``, ``-cpu``, ``-m``, ``-object``, ``-numa``, ``-device``, each with its value
    :ivar seats: one for each vCPU, in their order
    :ivar notes: what is not mirrored, a sentence each
    """

    arguments: tuple[str, ...]
    seats: tuple[Seat, ...]
    notes: tuple[str, ...] = ()


def read_facts(host: Host) -> Facts:
    """Return what the kernel says of *host*.

    Source: ABI/stable/sysfs-devices-node (``has_memory``, ``distance``); ``modalias`` of the CPUs, which is there on
    x86 and quicker to read than ``/proc/cpuinfo``.
    """
    vendor = _read(host, "sys/devices/system/cpu/modalias").partition(",ven")[2][:4]
    try:
        online = list(CpuSet.parse(_read(host, f"{_FOLDER}/online")))
        rows = [[int(word) for word in _read(host, f"{_FOLDER}/node{node}/distance").split()] for node in online]
        distances = tuple(
            (one, other, distance)
            for one, row in zip(online, rows, strict=True)
            for other, distance in zip(online, row, strict=True)
        )
    except ValueError:
        distances = ()
    return Facts(_VENDORS.get(vendor, ""), nodes(host), distances)


def mirror(
    topology: Topology,
    pcpus: Sequence[int],
    *,
    memory_bytes: int,
    accelerator: str,
    cpu: str = "",
    mems: CpuSet = CpuSet(),  # noqa: B008  it is frozen
    flat: bool = False,
    facts: Facts = Facts(),  # noqa: B008  likewise
    architecture: str = "x86_64",
) -> Mirror:
    """Return how QEMU (7.2 or newer; machine ``q35`` or ``pc``, on Arm ``virt``) is told of a placement.

    vCPU 0 is the guest's boot processor and has APIC id 0: everything is numbered in the order in which it first
    appears among the vCPUs.

    :param pcpus: Linux's number of the pCPU of each vCPU
    :param memory_bytes: the guest's memory, in steps of 8 KiB; each of its NUMA nodes gets as many whole MiB, and the
        first what is left
    :param accelerator: ``"kvm"`` or ``"tcg"``
    :param cpu: QEMU's name of a CPU model, features behind it, which is used as it is; empty for one that shows all
        that is mirrored: ``host``, under TCG ``max`` by Intel's name
    :param mems: host nodes to bind all memory to, instead of each guest node's to the node its pCPUs are on. (That is
        what is done where these are just the nodes of the pCPUs.) Without it, nothing is bound on a host with one node
        that has memory
    :param flat: mirror nothing: cores of one socket, and no NUMA node but one that *mems* are bound to
    :param architecture: ``"x86_64"`` or ``"aarch64"``; on Arm what can't be uniform is shown coarser, since ``virt``
        has no empty seats
    :raises UsageError: for more vCPUs than QEMU has ids for, and for less than a MiB a node
    :raises ValueError: for no pCPU, for one that *topology* does not have or that comes twice, and for memory that is
        not in such steps

    Source: QEMU's include/hw/i386/topology.h, hw/i386/x86-common.c and hw/core/numa.c; qemu(1).
    """
    if not pcpus or len(set(pcpus)) < len(pcpus) or not CpuSet.of(pcpus) <= topology.numbers:
        raise ValueError(f"want pCPUs of the topology, each once, got {list(pcpus)}")
    if memory_bytes <= 0 or memory_bytes % _GRAIN:
        raise ValueError(f"want memory in steps of {_GRAIN} bytes, got {memory_bytes}")
    most = _MAX_VCPUS[architecture]
    if len(pcpus) > most:
        raise UsageError(
            f"{len(pcpus)} vCPUs are more than the {most} that a guest can have", f"ask for {most} or less"
        )
    chosen = [topology.pcpu(pcpu) for pcpu in pcpus]
    seats, counts, notes = _chosen(chosen, flat, architecture)
    model = cpu or _model(accelerator, architecture, facts.vendor)
    if cpu and accelerator == "tcg" and architecture == "x86_64" and (counts[1] > 1 or counts[3] > 1):
        notes.append(f"under TCG a guest sees threads and dies with Intel's models only; {cpu!r} was asked for")

    homes = [None if flat else pcpu.numa for pcpu in chosen]
    bound, more = _bound(topology, homes, mems, facts)
    notes += more
    numbers = {home: number for number, home in enumerate(bound)}
    numa = [numbers[home] for home in homes] if len(bound) > 1 or any(bound.values()) else None

    if accelerator == "tcg" and architecture == "x86_64":
        counts = _padded(seats, counts)
    there = {_index(seat, counts) for seat in seats}
    lead = next(index for index in range(len(seats) + 1) if index not in there)
    smp = f"cpus={lead},maxcpus={prod(counts)},sockets={counts[0]},{_COUNTS[architecture]}={counts[1]}"
    arguments = ["-smp", f"{smp},cores={counts[2]},threads={counts[3]}", "-cpu", model, "-m", _size(memory_bytes)]
    ids = _IDS[architecture]
    if numa is not None:
        arguments += _memory(list(bound.values()), memory_bytes)
        # There QEMU takes a die's id only where a socket has several.
        named = ids if architecture == "aarch64" or counts[1] > 1 else (ids[0], "", *ids[2:])
        for prefix, node in _nodes_of(seats, counts, numa):
            arguments += ["-numa", f"cpu,node-id={node},{_where(named, prefix)}"]
        distances, more = _distances(bound, facts)
        arguments += distances
        notes += more
    for seat in seats:
        if _index(seat, counts) >= lead:
            arguments += ["-device", f"{model.partition(',')[0]}-{architecture}-cpu,{_where(ids, seat)}"]
    return Mirror(tuple(arguments), _numbered(seats, counts, numa, architecture), tuple(notes))


def _whole(pcpu: Pcpu) -> Place:
    return pcpu.package, (pcpu.die, pcpu.llc, pcpu.numa), _core(pcpu), pcpu.cpu


def _without_dies(pcpu: Pcpu) -> Place:
    return (pcpu.package, pcpu.numa), None, _core(pcpu), pcpu.cpu


def _without_threads(pcpu: Pcpu) -> Place:
    return (pcpu.package, pcpu.numa), None, pcpu.cpu, None


def _flat(pcpu: Pcpu) -> Place:
    return None, None, pcpu.cpu, None


def _core(pcpu: Pcpu) -> object:
    return (pcpu.cpu,) if pcpu.core is None else pcpu.core


# Finest first: what is a socket, a die, a core and a thread, and what is not shown that way.
_FORMS: tuple[tuple[Callable[[Pcpu], Place], str], ...] = (
    (_whole, ""),
    (_without_dies, "the guest sees no die and no last-level cache smaller than a socket"),
    (_without_threads, "the guest sees no threads, and no die and no last-level cache smaller than a socket"),
    (_flat, "the guest sees its CPUs as cores of one socket"),
)


# Each vCPU's socket, die, core and thread, and the most that there are of each in what is around it.
def _seated(places: Sequence[Place]) -> tuple[list[Ids], Ids]:
    numbers: dict[tuple[object, ...], int] = {}
    inside: dict[tuple[object, ...], int] = {}
    most = [0, 0, 0, 0]

    def number(place: Place, depth: int) -> int:
        key, around = place[: depth + 1], place[:depth]
        if key not in numbers:
            numbers[key] = inside.get(around, 0)
            inside[around] = numbers[key] + 1
            most[depth] = max(most[depth], inside[around])
        return numbers[key]

    seats = [(number(place, 0), number(place, 1), number(place, 2), number(place, 3)) for place in places]
    return seats, (most[0], most[1], most[2], most[3])


# The seats and their counts in the finest form that QEMU can express, and what that does not show.
def _chosen(pcpus: Sequence[Pcpu], flat: bool, architecture: str) -> tuple[list[Ids], Ids, list[str]]:
    notes = []
    for form, lost in _FORMS[-1:] if flat else _FORMS:
        seats, counts = _seated([form(pcpu) for pcpu in pcpus])
        if architecture == "aarch64":
            fits = prod(counts) == len(seats)
            why = "the placement is uneven, and QEMU's virt machine has no empty seats"
        else:
            # Empty seats count too: QEMU wants every id that could be plugged to fit.
            fits = _apic_id([count - 1 for count in counts], counts) <= _MAX_APIC_ID
            why = f"to show it would take APIC ids above {_MAX_APIC_ID}"
        if fits:
            if lost and not flat:
                notes.append(f"{lost}: {why}")
            break
    if not flat and len({pcpu.kind for pcpu in pcpus}) > 1:
        notes.append("performance and efficiency cores look alike to the guest: QEMU knows one kind")
    return seats, counts, notes


def _numbered(seats: Sequence[Ids], counts: Ids, numa: Sequence[int] | None, architecture: str) -> tuple[Seat, ...]:
    ranks = {seat: rank for rank, seat in enumerate(sorted(seats))}
    made = []
    for vcpu, seat in enumerate(seats):
        node = None if numa is None else numa[vcpu]
        apic_id = _apic_id(seat, counts) if architecture == "x86_64" else None
        made.append(Seat(*seat, node, apic_id, ranks[seat]))
    return tuple(made)


def _where(names: Sequence[str], ids: Sequence[int]) -> str:
    return ",".join(f"{name}={number}" for name, number in zip(names, ids, strict=False) if name)


# With at most eight CPUs a guest may send interrupts to masks of them. QEMU's own APIC, which TCG has, looks for those
# in a mask only up to the first id that is not there (7.2's apic_get_delivery_bitmask), and the interrupts for all
# behind it are lost: Linux 6.1 hangs. If more than eight could be there, QEMU tells the guest in the FADT to name
# each by its id, so sockets that stay empty are added where there are gaps.
def _padded(seats: Sequence[Ids], counts: Ids) -> Ids:
    sockets, *inside = counts
    if sorted(_apic_id(seat, counts) for seat in seats) != list(range(len(seats))):
        sockets = max(sockets, _MOST_IN_MASK // prod(inside) + 1)
    return (sockets, *counts[1:])


# QEMU's index of a seat among all that there are, empty ones too.
def _index(seat: Ids, counts: Ids) -> int:
    index = 0
    for number, count in zip(seat, counts, strict=True):
        index = index * count + number
    return index


# Each level has as many bits as its largest number takes.
def _apic_id(seat: Sequence[int], counts: Ids) -> int:
    apic_id = 0
    for number, count in zip(seat, counts, strict=True):
        apic_id = apic_id << (count - 1).bit_length() | number
    return apic_id


def _model(accelerator: str, architecture: str, vendor: str) -> str:
    if accelerator == "kvm":
        return "host,topoext=on" if architecture == "x86_64" and vendor in _NEED_TOPOEXT else "host"
    return _TCG_MODEL if architecture == "x86_64" else "max"


# The guest's nodes in their order: the host's number of each, and the host nodes that its memory is bound to.
def _bound(
    topology: Topology, kept: Sequence[int | None], mems: CpuSet, facts: Facts
) -> tuple[dict[int | None, CpuSet], list[str]]:
    homes = list(dict.fromkeys(kept))
    own = CpuSet.of(home for home in homes if home is not None)
    if mems and (mems != own or None in homes):
        said = f"the memory of each of the guest's nodes is bound to host node {mems}, and its CPUs are on node {own}"
        return dict.fromkeys(homes, mems), [said] if len(homes) > 1 else []
    there = facts.mems or CpuSet.of(pcpu.numa for pcpu in topology.pcpus if pcpu.numa is not None)
    bound: dict[int | None, CpuSet] = {}
    notes = []
    for home in homes:
        bound[home] = CpuSet()
        if home is not None and (len(there) > 1 or mems):
            bound[home] = CpuSet.of([home])
            if home not in there:
                bound[home] = _nearest(home, there, facts)
                notes.append(f"host node {home} has no memory: its CPUs' is bound to node {bound[home]}")
    return bound, notes


def _nearest(home: int, there: CpuSet, facts: Facts) -> CpuSet:
    far = {other: distance for one, other, distance in facts.distances if one == home and other in there}
    return CpuSet.of(other for other in far if far[other] == min(far.values())) or there


def _memory(bound: Sequence[CpuSet], memory_bytes: int) -> Iterator[str]:
    each = memory_bytes // len(bound) // _MIB * _MIB
    if not each:
        raise UsageError(
            f"{memory_bytes} bytes are less than a MiB for each of {len(bound)} NUMA nodes", "ask for more"
        )
    for node, mems in enumerate(bound):
        size = each if node else memory_bytes - each * (len(bound) - 1)
        # QEMU reads lists as repeated keys and ranges.
        policy = "".join(f",host-nodes={span}" for span in str(mems).split(",")) + ",policy=bind" if mems else ""
        yield from ("-object", f"memory-backend-ram,id=memory{node},size={_size(size)}{policy}")
        yield from ("-numa", f"node,nodeid={node},memdev=memory{node}")


def _size(size: int) -> str:
    return f"{size // 1024}K" if size % _MIB else f"{size // _MIB}M"


# Which node each socket is of, or each die, core or thread where the larger ones are of several. Empty seats have to
# be of one, too: they go with their neighbours.
def _nodes_of(seats: Sequence[Ids], counts: Ids, numa: Sequence[int]) -> Iterator[tuple[tuple[int, ...], int]]:
    first: dict[tuple[int, ...], int] = {}
    mixed = [False] * 5
    for seat, node in zip(seats, numa, strict=True):
        for depth in range(5):
            mixed[depth] |= first.setdefault(seat[:depth], node) != node
    depth = mixed.index(False, 1)
    for prefix in product(*map(range, counts[:depth])):
        around = next(prefix[:length] for length in range(depth, -1, -1) if prefix[:length] in first)
        yield prefix, first[around]


def _distances(bound: dict[int | None, CpuSet], facts: Facts) -> tuple[list[str], list[str]]:
    # A node whose memory is elsewhere is not as near to it as the table says of every node.
    elsewhere = [home for home, mems in bound.items() if home is None or (mems and mems != CpuSet.of([home]))]
    if len(bound) < 2 or elsewhere or not facts.distances:
        return [], []
    known = {(one, other): distance for one, other, distance in facts.distances}
    arguments = []
    for (src, one), (dst, other) in permutations(enumerate(bound), 2):
        distance = known.get((one or 0, other or 0), 0)
        # Linux throws a table away in which another node is as near as the own one.
        if not 10 < distance < 255:
            return [], [f"the host's NUMA distances are not shown: node {other} is {distance} from node {one}"]
        arguments += ["-numa", f"dist,src={src},dst={dst},val={distance}"]
    return arguments, []


def _read(host: Host, name: str) -> str:
    try:
        return host.read_text(name)
    except OSError:
        return ""
