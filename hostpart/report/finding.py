"""What an analysis found, in sentences: the largest cost first, and beside it what it costs at the best distance.

The figures are the analysis's; nothing is computed here but which of them to tell.
"""

from __future__ import annotations

import math
import re

from . import quantity
from .markup import Html, element, join

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = [
    "Group",
    "cost",
    "groups",
    "headline",
    "kind",
    "meaning",
    "metric_words",
    "primary",
    "ratio_of",
    "ratio_words",
    "sentences",
    "short",
    "where",
]

# Where the aggressor was, as seen from the victim: as the end of "beside X …" and as a sentence of its own.
_WHERE = {
    "same-pcpu": ("on its own pCPU", "on the victim's own pCPU"),
    "sibling": ("on the other thread of its core", "on the other thread of the victim's core"),
    "same-llc": ("on another core of the same cache", "on another core that shares the last-level cache"),
    "same-node": ("on another core of the same NUMA node", "on another core of the same NUMA node"),
    "other-node": ("in another NUMA node", "in another NUMA node of the same package"),
    "other-package": ("in another package", "in another package"),
    "elsewhere": ("on another pCPU", "on another pCPU; what the two share is not known"),
    "free": ("left free to run anywhere", "not pinned: on any pCPU that may be used, the victim's too"),
}


class Group:
    """What is compared with the same alone runs: one victim on one pCPU at one isolation level.

    :ivar place: ``performance pCPU 2``, where the victim ran on several pCPUs; else empty
    :ivar alone: the condition without an aggressor, where there is one
    :ivar conditions: those with one, in the plan's order
    """

    def __init__(self, victim: str, isolation: str, number: int, place: str = "") -> None:
        self.victim, self.isolation, self.number, self.place = victim, isolation, number, place
        self.alone: Mapping[str, Any] | None = None
        self.alones: list[Mapping[str, Any]] = []
        self.conditions: list[Mapping[str, Any]] = []

    @property
    def name(self) -> str:
        """The victim, and where it ran if that differs."""
        return f"{self.victim} on {self.place}" if self.place else self.victim

    @property
    def every(self) -> list[Mapping[str, Any]]:
        """All conditions, alone first."""
        return [*self.alones, *self.conditions]

    @property
    def aggressors(self) -> list[str]:
        """The aggressors' names, in the plan's order."""
        return list(dict.fromkeys(str(one["aggressor"]) for one in self.conditions))

    @property
    def placements(self) -> list[str]:
        """The placements' names, in the plan's order."""
        return list(dict.fromkeys(str(one["placement"]) for one in self.conditions))

    @property
    def metric(self) -> str | None:
        """The name of the primary metric, where a run has told it."""
        return next((str(one["primary"]) for one in self.every if one.get("primary")), None)

    def one(self, aggressor: str, placement: str) -> Mapping[str, Any] | None:
        """Return the condition of that aggressor and placement; None where none is planned."""
        return next(
            (one for one in self.conditions if (one["aggressor"], one["placement"]) == (aggressor, placement)), None
        )


def groups(analysis: Mapping[str, Any]) -> list[Group]:
    """Return the analysis's conditions by victim, isolation level and victim's pCPU.

    A victim's levels come one after the other. On a hybrid host it ran on a pCPU of each kind, and alone on each. A
    condition of several hosts says itself which ``place`` it is of: their pCPUs have other numbers.
    """
    pcpus: dict[str, set[str]] = {}
    for one in analysis["conditions"]:
        pcpus.setdefault(str(one["victim"]), set()).add(str(one.get("victim_pcpu")))
    found: dict[tuple[str, str, str], Group] = {}
    for one in analysis["conditions"]:
        victim, isolation, pcpu = key = (str(one["victim"]), str(one["isolation"]), str(one.get("victim_pcpu")))
        place = f"{kind(str(one['placement']))} pCPU {pcpu}".strip() if len(pcpus[victim]) > 1 else ""
        if "place" in one:
            place = str(one["place"])
            key = (victim, isolation, place)
        group = found.setdefault(key, Group(victim, isolation, len(found), place))
        if one.get("aggressor") is None:
            group.alones.append(one)
            group.alone = group.alone or one
        else:
            group.conditions.append(one)
    victims = list(dict.fromkeys(victim for victim, _, _ in found))
    return sorted(found.values(), key=lambda group: victims.index(group.victim))


def primary(condition: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the condition's primary metric; None where no run told it."""
    metric = (condition.get("metrics") or {}).get(condition.get("primary"))
    return metric if metric and metric.get("median") is not None else None


def cost(metric: Mapping[str, Any] | None) -> float | None:
    """Return the logarithm to base 2 of the metric's ratio, positive for worse; None where there is no ratio.

    That of 0 is infinite.
    """
    ratio = ratio_of(metric)
    if metric is None or ratio is None or ratio["value"] < 0:
        return None
    size = math.log2(ratio["value"]) if ratio["value"] else -math.inf
    return -size if metric.get("better") == "higher" else size


def ratio_of(metric: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """Return the metric's ratio to alone; None where it has none."""
    ratio = (metric or {}).get("ratio")
    return ratio if ratio and ratio.get("value") is not None else None


def ratio_words(condition: Mapping[str, Any]) -> tuple[str, str]:
    """Return the ratio of the condition's primary metric and its interval as text; two dashes where there is none."""
    ratio = ratio_of(primary(condition))
    return quantity.ratio(ratio["value"], ratio.get("ci")) if ratio else ("–", "–")


def metric_words(name: str | None) -> str:
    """Return a metric's name as words: ``latency p99.9``."""
    if name == "wall":
        return "wall time"
    return re.sub(r"(p[0-9]+)_([0-9]+)", r"\1.\2", name or "").replace("_", " ")


def kind(placement: str) -> str:
    """Return the victim's kind of core in a placement's name, which begins with it on a hybrid host; else nothing."""
    return _parted(placement)[0]


def short(placement: str) -> str:
    """Return a placement's name without the victim's kind of core: ``same-llc/efficiency``, ``other-package-at-32``."""
    return _parted(placement)[1]


def _parted(placement: str) -> tuple[str, str]:
    first, slash, rest = placement.partition("/")
    return (first, rest) if slash and _degree(rest) in (*_WHERE, "alone") else ("", placement)


# The degree that a name without the victim's kind begins with; a distance and the other's kind may follow.
def _degree(name: str) -> str:
    return name.partition("/")[0].partition("-at-")[0]


def where(placement: str) -> str:
    """Return where the aggressor of *placement* is, as the end of a sentence that began with the victim."""
    return _worded(placement, 0)


def meaning(placement: str) -> str:
    """Return what *placement* means, on its own."""
    return "no aggressor" if short(placement) == "alone" else _worded(placement, 1)


def _worded(placement: str, form: int) -> str:
    name = short(placement)
    degree = _degree(name)
    if degree not in _WHERE:
        return f"at {placement}"
    words = _WHERE[degree][form]
    return words if name == degree else f"{words} ({name})"


def headline(analysis: Mapping[str, Any], design: Mapping[str, Any]) -> Html:
    """Return the sentence on the largest cost that was found; or that there is none, or nothing to tell it from."""
    found = groups(analysis)
    costs = [(cost(primary(one)), group) for group in found for one in group.conditions]
    known = [(value, group) for value, group in costs if value is not None]
    if not known:
        return join(["Nothing can be compared yet: no condition has both runs beside an aggressor and runs alone."])
    # What can be told from chance goes first; of those, the largest.
    best = max(found, key=lambda group: max((_weight(one) for one in group.conditions), default=(-1, 0.0)))
    return _sentence(best, design, several=len({group.isolation for group in found}) > 1)


def sentences(analysis: Mapping[str, Any], design: Mapping[str, Any]) -> list[Html]:
    """Return a sentence for each victim at each level, in the plan's order."""
    found = groups(analysis)
    several = len({group.isolation for group in found}) > 1
    return [_sentence(group, design, several=several) for group in found]


def _weight(one: Mapping[str, Any]) -> tuple[int, float]:
    metric = primary(one)
    size = cost(metric)
    if metric is None or size is None:
        return -1, 0.0
    return int(metric["ratio"].get("difference") == "worse"), size


def _sentence(group: Group, design: Mapping[str, Any], *, several: bool) -> Html:
    victim = element("b", group.victim)
    level = f"{group.name[len(group.victim) :]}{f' ({group.isolation})' if several else ''}"
    compared = [one for one in group.conditions if cost(primary(one)) is not None]
    if not compared:
        return join([victim, f"{level} cannot be compared with itself alone: a run of one or of the other is missing."])
    worst = max(compared, key=_weight)
    if not _weight(worst)[0]:
        return _unharmed(victim, level, group, compared)
    metric = primary(worst) or {}
    if metric.get("unit") == "%":
        return _shares(victim, level, group, worst, compared, design)
    value, bounds = ratio_words(worst)
    name = metric_words(group.metric)
    told: list[object] = ["Beside ", *_aggressor(worst, design), f" {where(worst['placement'])}, "]
    if metric.get("better") == "higher":
        told += [victim, level, " reached ", _figure(value, bounds), f" of the {name} that it has alone"]
    else:
        told += [f"the {name} of ", victim, level, " was ", _figure(value, bounds), " times what it is alone"]
    gentle = _gentle(worst, compared)
    if gentle is not None:
        told += [f"; with {_it(worst, design)} {where(gentle['placement'])}, ", _figure(*ratio_words(gentle))]
    return join([*told, "."])


def _shares(
    victim: Html,
    level: str,
    group: Group,
    worst: Mapping[str, Any],
    compared: Sequence[Mapping[str, Any]],
    design: Mapping[str, Any],
) -> Html:
    # Of a share of time the share itself is told: a ratio to next to nothing says little.
    name = metric_words(group.metric)
    told: list[object] = ["Beside ", *_aggressor(worst, design), f" {where(worst['placement'])}, the {name} of "]
    told += [victim, level, " was ", _share(worst)]
    gentle = _gentle(worst, compared)
    if gentle is not None:
        told += [f"; with {_it(worst, design)} {where(gentle['placement'])}, ", _share(gentle)]
    if group.alone is not None:
        told += ["; alone, ", _share(group.alone)]
    return join([*told, "."])


def _share(condition: Mapping[str, Any]) -> Html:
    metric = primary(condition) or {}
    value, _, bounds = quantity.interval(metric.get("median"), metric.get("ci"), "%").partition(" ")
    return _figure(value, bounds)


def _gentle(worst: Mapping[str, Any], compared: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    rest = [one for one in compared if one["aggressor"] == worst["aggressor"] and one is not worst]
    gentle = min(rest, key=lambda one: abs(cost(primary(one)) or 0.0), default=None)
    return gentle if gentle is not None and _weight(gentle) < _weight(worst) else None


def _it(condition: Mapping[str, Any], design: Mapping[str, Any]) -> str:
    return "them" if _count(condition, design) > 1 else "it"


def _unharmed(victim: Html, level: str, group: Group, compared: Sequence[Mapping[str, Any]]) -> Html:
    ratios = sorted(float(ratio["value"]) for one in compared if (ratio := ratio_of(primary(one))))
    low, high = (quantity.ratio(value, None)[0] for value in (ratios[0], ratios[-1]))
    spread = low if low == high else f"{low} to {high}"
    what = quantity.count(len(compared), "condition")
    name = metric_words(group.metric)
    told = f"{level}: none of {what} made its {name} worse, as far as these runs can tell (ratio {spread})."
    return join([victim, told])


def _figure(value: str, bounds: str) -> Html:
    return element("span", element("strong", value), f" {bounds}", class_="figure")


def _aggressor(condition: Mapping[str, Any], design: Mapping[str, Any]) -> Iterable[object]:
    many = _count(condition, design)
    yield f"{many} × " if many > 1 else ""
    yield element("b", condition["aggressor"])


def _count(condition: Mapping[str, Any], design: Mapping[str, Any]) -> int:
    name = condition["aggressor"]
    return next((int(one.get("count") or 1) for one in design.get("aggressors") or () if one.get("name") == name), 1)
