"""The runs of an experiment, in the order in which they are made.

Pure: a design and the host's placements in, the plan out, the same for the same seed. A block is A-B-A-C-A: the
victim alone (A) before, between and after every other condition, each of which comes once, in random order. There are
as many blocks of each victim and isolation level as processes are asked for; in each round all of them come, in random
order. So what drifts over the time of an experiment meets all conditions alike, and the A runs show that it drifts.
"""

from __future__ import annotations

from workers.probes import find

from ..cpuset import CpuSet
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from .design import Aggressor, Design, Victim
    from .sharing import Placement

__all__ = ["Condition", "Plan", "Run", "plan"]

OVERHEAD_S = 0.5  # of a run beyond what it measures: starting and ending the processes
COMPILING_S = 3.0  # and of a loop that numba compiles first


class Condition(Value):
    """One combination of factors.

    :ivar aggressor: its name; None: alone
    :ivar aggressor_pcpus: where its processes may run; None: alone
    :ivar aggressor_order: the same, in the order in which processes are pinned, one to each; empty where they are free
    :ivar placed: ``"host"``: host processes; ``"vm"``: a VM of its own; None: alone
    """

    victim: str
    isolation: str
    aggressor: str | None
    placement: str
    degree: str
    victim_pcpu: int
    aggressor_pcpus: CpuSet | None = None
    aggressor_order: tuple[int, ...] = ()
    placed: str | None = None

    @property
    def id(self) -> str:
        """What names it in one experiment."""
        return "|".join([self.victim, self.isolation, *([self.aggressor] if self.aggressor else []), self.placement])

    def to_json(self) -> dict[str, Any]:
        """Return it as ``experiment.json`` and each run have it."""
        document = self.asdict()
        del document["aggressor_order"]
        pcpus, placed = document.pop("aggressor_pcpus"), document.pop("placed")
        return {"id": self.id, **document, "aggressor_pcpus": None if pcpus is None else str(pcpus), "as": placed}


class Run(Value):
    """One run.

    :ivar number: its place in the schedule, from 0
    :ivar block: which A-B-A-C-A it belongs to, from 0
    """

    number: int
    block: int
    condition: Condition


class Plan(Value):
    """All runs, in order.

    :ivar conditions: in order of victim, level, aggressor and closeness
    :ivar seconds: how long it will take, about
    """

    conditions: tuple[Condition, ...]
    runs: tuple[Run, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return it as ``experiment.json`` has it."""
        return {
            "seconds": round(self.seconds, 1),
            "conditions": [one.to_json() for one in self.conditions],
            "runs": [{"run": one.number, "block": one.block, "condition": one.condition.id} for one in self.runs],
        }


def plan(design: Design, places: Sequence[Placement], kept: CpuSet) -> Plan:
    """Return the conditions and the runs.

    :param places: as :func:`hostpart.experiment.sharing.placements` returns them
    :param kept: the pCPUs of the service VM, which no aggressor's VM can have
    """
    import random

    groups = [
        [_condition(victim.name, level, aggressor, place, kept) for aggressor, place in _pairs(design, places, on)]
        for victim in design.victims
        for level in design.isolation
        for on in dict.fromkeys(place.victim for place in places)
    ]
    chance = random.Random(design.seed)  # noqa: S311 - an order, not a secret
    runs: list[Run] = []
    block = 0
    for _ in range(design.processes):
        order = list(groups)
        chance.shuffle(order)
        for alone, *others in order:
            chance.shuffle(others)
            sequence = [alone]
            for other in others:
                sequence += [other, alone]
            runs += [Run(len(runs) + place, block, one) for place, one in enumerate(sequence)]
            block += 1
    seconds = sum(run_seconds(design, run.condition) for run in runs)
    return Plan(tuple(one for group in groups for one in group), tuple(runs), seconds)


def run_seconds(design: Design, condition: Condition) -> float:
    """Return how long a run takes, about: of a command, as if it took as long as a probe measures."""
    settle = design.settle if condition.aggressor else 0.0
    programs: list[Victim | Aggressor] = [one for one in design.victims if one.name == condition.victim]
    programs += [one for one in design.aggressors if one.name == condition.aggressor]
    compiling = COMPILING_S if any(_compiles(one.probe, dict(one.options)) for one in programs) else 0.0
    return design.seconds + design.warmup + settle + OVERHEAD_S + compiling


def _compiles(probe: str, options: Mapping[str, str]) -> bool:
    from importlib.util import find_spec

    if not probe or options.get("engine") == "python":
        return False
    return "numba" in find(probe).engines and find_spec("numba") is not None


def _pairs(design: Design, places: Sequence[Placement], victim: int) -> list[tuple[Aggressor | None, Placement]]:
    here = [place for place in places if place.victim == victim]
    alone, others = here[0], here[1:]
    pairs: list[tuple[Aggressor | None, Placement]] = [(None, alone)]
    pairs += [(aggressor, place) for aggressor in design.aggressors for place in others]
    return pairs


def _condition(victim: str, level: str, aggressor: Aggressor | None, place: Placement, kept: CpuSet) -> Condition:
    if aggressor is None:
        return Condition(victim, level, None, place.name, place.degree, place.victim)
    if place.degree == "free":
        return Condition(
            victim, level, aggressor.name, place.name, place.degree, place.victim, place.others, placed="host"
        )
    order = place.order[: aggressor.count]
    pcpus = CpuSet.of(order)
    # A VM has one vCPU per pCPU, and gets neither the victim's nor what the service VM keeps.
    leasable = len(order) == aggressor.count and not pcpus & (kept | CpuSet.of([place.victim]))
    placed = "vm" if aggressor.vm and leasable else "host"
    return Condition(victim, level, aggressor.name, place.name, place.degree, place.victim, pcpus, order, placed)
