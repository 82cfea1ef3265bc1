"""An analysis, to be read on a terminal: a table for each victim and level, then the warnings and what is missing."""

from __future__ import annotations

from .table import plain, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

__all__ = ["summary"]

_HEADERS = (
    "BESIDE IT",
    "PLACEMENT",
    "RUNS",
    "MEDIAN",
    "95 % INTERVAL",
    "TO ALONE",
    "95 % INTERVAL",
    "DIFFERENCE",
    "HELD",
)
_TIMES = ((1e9, "s"), (1e6, "ms"), (1e3, "µs"), (1.0, "ns"))
_LARGE = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def summary(analysis: Mapping[str, Any], *, colour: bool = False) -> str:
    """Return the analysis in words and tables, without a newline at the end.

    Only the primary metric of each victim is in it.

    :param analysis: as :func:`hostpart.experiment.analysis.analyse` returns it
    :param colour: whether the headers are bold
    """
    groups: dict[tuple[str, str, int], list[Mapping[str, Any]]] = {}
    for one in analysis["conditions"]:
        groups.setdefault((one["victim"], one["isolation"], one["victim_pcpu"]), []).append(one)
    # Whatever is told comes from files, which others may have written: a line is made plain as a whole.
    parts = [f"{plain(_title(group))}\n{_table(group, colour)}" for group in groups.values()]
    warnings = [plain(f"warning: {warning}") for warning in analysis["warnings"]]
    missing = [
        plain(f"missing: {one['condition']}: {one['done']} of {_runs(one['planned'])}: {'; '.join(one['why'])}")
        for one in analysis["missing"]
    ]
    parts += ["\n".join(lines) for lines in (warnings, missing) if lines]
    return "\n\n".join(parts)


def _title(conditions: Sequence[Mapping[str, Any]]) -> str:
    first = conditions[0]
    head = f"{first['victim']} on pCPU {first['victim_pcpu']}, isolation {first['isolation']}"
    for one in conditions:
        if one["primary"] in one["metrics"]:
            metric = one["metrics"][one["primary"]]
            return f"{head}: {one['primary'].replace('_', ' ')}, {metric['better']} is better"
    return f"{head}: nothing was measured"


def _table(conditions: Sequence[Mapping[str, Any]], colour: bool) -> str:
    return table(_HEADERS, [_row(one) for one in conditions], colour=colour)


def _row(one: Mapping[str, Any]) -> tuple[object, ...]:
    metric = one["metrics"].get(one["primary"])
    runs = f"{one['done']}" if one["done"] == one["planned"] else f"{one['done']} of {one['planned']}"
    beside = one["aggressor"] or "-"
    if metric is None:
        return beside, one["placement"], runs, "-", "-", "-", "-", "-", _held(one)
    factor, unit = _scale(metric["median"] or 0, metric["unit"])
    median = "-" if metric["median"] is None else f"{_digits(metric['median'] * factor)}{unit}"
    ratio = metric["ratio"] or {"value": None, "ci": None, "difference": "-"}
    value = "-" if ratio["value"] is None else f"{ratio['value']:.3f}"
    return (
        beside, one["placement"], runs, median, _interval(metric["ci"], factor), value, _interval(ratio["ci"], 1, 3),
        ratio["difference"], _held(one),
    )  # fmt: skip


def _held(one: Mapping[str, Any]) -> str:
    # All the same is the usual case, and said in a word.
    counts = {name: count for name, count in one["verdicts"].items() if count}
    if set(counts) <= {"held"}:
        return "all" if counts else "-"
    words = {"none": "not known"}
    return ", ".join(f"{count} {words.get(name, name)}" for name, count in counts.items())


def _interval(found: Sequence[float] | None, factor: float, places: int | None = None) -> str:
    if found is None:
        return "-"
    low, high = (_digits(end * factor) if places is None else f"{end:.{places}f}" for end in found)
    return f"[{low}, {high}]"


def _digits(value: float) -> str:
    # Four digits, and no exponent where the number is of a usual size.
    if value and not 1e-3 <= abs(value) < 1e6:
        return f"{value:.3e}"
    places = 3 if abs(value) < 10 else 2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0
    return f"{value:.{places}f}"


def _scale(value: float, unit: str) -> tuple[float, str]:
    # What a number is multiplied by to be shown, and the unit that it then has, led by a space.
    size = abs(value)
    if unit == "ns":
        per, name = next(((per, name) for per, name in _TIMES if size >= per), (1.0, "ns"))
        return 1 / per, f" {name}"
    if unit in ("1/s", "B/s", "B", "1"):
        per, prefix = next(((per, prefix) for per, prefix in _LARGE if size >= per), (1.0, ""))
        name = {"1/s": "/s", "1": ""}.get(unit, unit)
        return 1 / per, f" {prefix}{name}".rstrip()
    return 1.0, f" {unit}"


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
