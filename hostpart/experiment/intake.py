"""What an analysis takes from a line of ``runs.jsonl``: all that can be counted with, in the form that the schema has.

A line may be of another version, of another tool, or edited by hand. What of it cannot be read is not known, and is no
reason to show nothing of the rest. JSON's numbers have no end: ``1e999`` is read as infinite, and is not known either.
"""

from __future__ import annotations

import math

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any, TypeGuard

__all__ = ["VERDICTS", "finite", "take"]

VERDICTS = ("held", "tainted", "broken")  # of a run, from the best to the worst
_LARGEST = 1 << 62  # that a histogram counts, and counts to: what HdrHistogram holds


def finite(value: object) -> TypeGuard[float]:
    """Whether *value* is a number that a float can hold."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number beyond what a float holds
        return False


def take(run: Mapping[str, Any]) -> tuple[dict[str, Any], bool]:
    """Return the run with what can be read of it, and whether all of its record can.

    A metric keeps its value, whatever it is.
    """
    record, whole = _record(run.get("record"))
    error = run.get("error")
    problem = error.get("problem") if isinstance(error, dict) else error
    verdict = run.get("verdict")
    return {
        **run,
        "metrics": {name: one for name, one in _table(run.get("metrics")).items() if _is_metric(one)},
        "primary": _text(run.get("primary")),
        "record": record,
        "verdict": verdict if isinstance(verdict, str) and verdict in VERDICTS else None,
        "reasons": [one for one in _list(run.get("reasons")) if isinstance(one, str)],
        "error": None if error is None else {"problem": _text(problem) or "for a reason that cannot be read"},
    }, whole


def _record(given: object) -> tuple[dict[str, Any] | None, bool]:
    if given is None:
        return None, True
    if not isinstance(given, dict) or not _text(given.get("engine")):
        return None, False
    told = _table(given.get("histograms"))
    histograms = {name: made for name, one in told.items() if (made := _histogram(one)) is not None}
    slices = _slices(given.get("slices"))
    whole = isinstance(given.get("histograms"), dict) and len(histograms) == len(told)
    whole = whole and (given.get("slices") is None or slices is not None)
    return {"engine": given["engine"], "histograms": histograms, "slices": slices}, whole


def _histogram(one: object) -> dict[str, Any] | None:
    if not isinstance(one, dict) or not _text(one.get("unit")) or not isinstance(one.get("buckets"), list):
        return None
    most, buckets = one.get("max"), one["buckets"]
    if most is not None and not _countable(most):
        return None
    for bucket in buckets:
        if not isinstance(bucket, list) or len(bucket) != 3:
            return None
        first, below, count = bucket
        # A bucket without an end counts as the largest value of all, which has to be known then.
        if not _countable(first) or not _countable(most if below is None else below):
            return None
        if not isinstance(count, int) or not _countable(count) or count < 0:
            return None
    return {"unit": one["unit"], "max": most, "buckets": [bucket for bucket in buckets if bucket[2]]}


def _countable(value: object) -> bool:
    return isinstance(value, (int, float)) and finite(value) and value <= _LARGEST


def _slices(given: object) -> dict[str, Any] | None:
    if not isinstance(given, dict) or not isinstance(given.get("series"), dict):
        return None
    starts = _list(given.get("start_ns"))
    if not all(map(finite, starts)):
        return None
    series = {}
    for name, one in given["series"].items():
        values = _list(_table(one).get("values"))
        if not _text(_table(one).get("unit")) or len(values) != len(starts):
            return None
        series[name] = {"unit": one["unit"], "values": [value if finite(value) else None for value in values]}
    return {"start_ns": starts, "series": series}


def _is_metric(one: object) -> bool:
    return isinstance(one, dict) and bool(_text(one.get("unit"))) and one.get("better") in ("lower", "higher")


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
