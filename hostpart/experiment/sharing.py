"""What a pCPU shares with another one: the degrees that this host has, up to its symmetry.

Pure: a topology in, placements out. Of all pCPUs that share equally much with the victim's one stands for the rest: the
lowest ones that the service VM does not keep. Where a hybrid machine has kinds of cores, or nodes lie at different
distances, those count as different.
"""

from __future__ import annotations

from ..cpuset import CpuSet
from ..errors import DoesNotFit, UsageError
from ..value import Value
from .design import DEGREES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..topology import Topology

__all__ = ["Placement", "degree", "placements"]


class Placement(Value):
    """Where a victim and its aggressors are.

    :ivar name: for people: the degree, with kinds and distance where the host has several
    :ivar degree: of :data:`hostpart.experiment.design.DEGREES`, or ``alone``
    :ivar victim: the victim's pCPU (Linux's number)
    :ivar others: pCPUs that the aggressors may be put on; empty: no aggressor (``alone``)
    :ivar order: the same in the order in which they are taken: one thread of each core before any second one
    """

    name: str
    degree: str
    victim: int
    others: CpuSet = CpuSet()
    order: tuple[int, ...] = ()


def degree(topology: Topology, one: int, other: int) -> str:
    """Return how much two pCPUs (Linux's numbers) share.

    ``elsewhere`` where the kernel does not say enough.
    """
    if one == other:
        return "same-pcpu"
    a, b = topology.pcpu(one), topology.pcpu(other)
    if a.core is not None and a.core == b.core:
        return "sibling"
    if a.llc is not None and a.llc == b.llc:
        return "same-llc"
    if a.package is not None and b.package is not None and a.package != b.package:
        return "other-package"
    if a.numa is not None and b.numa is not None and a.numa != b.numa:
        return "other-node"
    return "same-node" if a.numa is not None and a.numa == b.numa else "elsewhere"


def placements(
    topology: Topology,
    kept: CpuSet,
    wanted: tuple[str, ...] = (),
    victim: int | None = None,
    distances: Mapping[int, tuple[int, ...]] | None = None,
) -> tuple[Placement, ...]:
    """Return every distinct placement, per victim's pCPU, ``alone`` first, then from the closest to the farthest.

    :param kept: pCPUs of the service VM's, which no victim can have
    :param wanted: only these degrees; empty: all
    :param victim: the victim's pCPU; None: per kind of core that one from which most degrees can be had, and of those
        the one farthest from what the service VM keeps, then the lowest
    :param distances: by node: its distance to each node
    :raises DoesNotFit: where no pCPU is left for a victim
    :raises UsageError: where *victim* is none that it can have
    """
    candidates = topology.usable - kept
    if not candidates:
        raise DoesNotFit(1, CpuSet(), [f"the service VM keeps pCPU {kept}"], "take a host with two usable pCPUs")
    if victim is not None and victim not in candidates:
        why = "the service VM keeps it" if victim in kept else "it is not usable"
        raise UsageError(f"the victim cannot be on pCPU {victim}: {why}", f"take one of {candidates}")
    kinds = sorted({topology.pcpu(cpu).kind or "" for cpu in topology.usable})
    found: list[Placement] = []
    for kind in kinds if victim is None else [topology.pcpu(victim).kind or ""]:
        own = [cpu for cpu in candidates if (topology.pcpu(cpu).kind or "") == kind]
        if not own:
            continue  # the only one of its kind is the service VM's
        here = victim if victim is not None else max(own, key=lambda cpu: _merit(topology, kept, cpu, distances))
        prefix = f"{kind}/" if len(kinds) > 1 else ""
        found.append(Placement(f"{prefix}alone", "alone", here))
        groups = _groups(topology, kept, here, distances)
        for key, others in groups.items():
            if not wanted or key[0] in wanted:
                name = _name(key, groups, prefix, len(kinds) > 1)
                found.append(Placement(name, key[0], here, others, _order(topology, others)))
    return tuple(found)


_Key = tuple[str, str, int]  # degree, the other's kind, distance of its node


def _groups(
    topology: Topology, kept: CpuSet, victim: int, distances: Mapping[int, tuple[int, ...]] | None
) -> dict[_Key, CpuSet]:
    masks: dict[_Key, int] = {("free", "", 0): topology.usable.mask}
    for cpu in topology.usable:
        how = degree(topology, victim, cpu)
        key = (how, topology.pcpu(cpu).kind or "", _distance(topology, victim, cpu, how, distances))
        masks[key] = masks.get(key, 0) | 1 << cpu
    # What the service VM keeps has the auditor on it: it stands for the rest only where there is no other.
    return {
        key: (CpuSet(mask) - kept if key[0] != "free" else CpuSet(mask)) or CpuSet(mask)
        for key, mask in sorted(masks.items(), key=lambda one: (DEGREES.index(one[0][0]), one[0][2], one[0][1]))
    }


def _order(topology: Topology, cpus: CpuSet) -> tuple[int, ...]:
    # As policy "spread": the first threads of all cores, then the second ones.
    return tuple(sorted(cpus, key=lambda cpu: (len(topology.siblings(cpu) & cpus & CpuSet((1 << cpu) - 1)), cpu)))


def _distance(
    topology: Topology, one: int, other: int, how: str, distances: Mapping[int, tuple[int, ...]] | None
) -> int:
    here, there = topology.pcpu(one).numa, topology.pcpu(other).numa
    if how not in ("other-node", "other-package") or here is None or there is None or distances is None:
        return 0
    row = distances.get(here, ())
    return row[there] if there < len(row) else 0


def _merit(
    topology: Topology, kept: CpuSet, cpu: int, distances: Mapping[int, tuple[int, ...]] | None
) -> tuple[int, int, int]:
    keys = [key for key in _groups(topology, kept, cpu, distances) if key[0] != "same-pcpu"]
    apart = min((DEGREES.index(degree(topology, cpu, other)) for other in kept & topology.online), default=0)
    # Far from the kept one beyond its core is worth nothing: all else equal the choice is the plainest.
    return len(keys), min(apart, DEGREES.index("same-llc")), -cpu


def _name(key: _Key, groups: Mapping[_Key, CpuSet], prefix: str, hybrid: bool) -> str:
    how, kind, distance = key
    several = len({one[2] for one in groups if one[0] == how}) > 1
    suffix = f"/{kind}" if hybrid and kind and how not in ("free", "same-pcpu", "sibling") else ""
    return f"{prefix}{how}{f'-at-{distance}' if several else ''}{suffix}"
