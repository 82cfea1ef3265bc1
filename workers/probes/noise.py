"""Noise: how much time others take from a busy loop that reads the clock and does nothing else.

A gap is the time between two readings of CLOCK_MONOTONIC where that is above a threshold: an interrupt, another task,
the hypervisor below. The figures are of the time inside the loop; between two slices the probe's own work takes some
microseconds, which count as a gap only where they are more than that work can be.

Source of the method: sysjitter (Riddoch, 2010) and oslat of rt-tests.
"""

from __future__ import annotations

import time

from . import engine, measurement
from .parameter import Parameter
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .measurement import Measurement, Slice

    # until_ns in; the first and the last reading out. Gaps go to a place that the function knows.
    Watch = Callable[[int], tuple[int, int]]

__all__ = ["PROBE", "main"]

_THRESHOLD_NS = 1000  # with which both engines agree on the time lost, on a machine of these years
_OWN_WORK_NS = 200_000  # what the probe does between two slices takes less, interpreted and on a slow machine
_CAPACITY = 1 << 20  # gaps of one run that the compiled loop has room for; it starts again from the front then


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    run.calibration = engine.calibrate(run.engine)
    threshold = _threshold(run.whole("threshold_ns"), run.calibration["ns_per_loop"], run.engine)
    run.calibration["threshold_ns"] = threshold
    watch, gaps = _compiled(threshold) if run.engine == "numba" else _interpreted(threshold)
    histogram = run.histogram("gap", "ns")
    observed = longest = lost = last = 0
    seen: list[tuple[Slice, list[int]]] = []
    for piece in run.slices():
        first, end = watch(piece.until_ns)
        found = gaps()
        if piece.warm:
            continue
        if last and first - last > max(_OWN_WORK_NS, threshold):
            found.append(first - last)
            observed += first - last
        observed += end - first
        last = end
        seen.append((piece, found))  # counted later: that would be a gap of the probe's own making
    for piece, found in seen:
        histogram.update(found)
        lost += sum(found)
        longest = max(longest, *found, 0)
        piece.values = {"events": len(found), "time_lost": sum(found), "longest_gap": max(found, default=0)}
    run.series("events", "1")
    run.series("time_lost", "ns")
    run.series("longest_gap", "ns")
    run.metric("time_lost", 100 * lost / observed if observed else None, "%", "lower", primary=True)
    run.metric("events", run.per_second(histogram.count, observed), "1/s", "lower")
    run.metric("longest_gap", longest if observed else None, "ns", "lower")
    run.metric("lost", lost if observed else None, "ns", "lower")
    run.metric("observed", observed, "ns", "higher")
    run.percentiles("gap", "gap")


def _threshold(asked_ns: int, ns_per_loop: float, engine_name: str) -> int:
    least = round(2 * ns_per_loop)
    if not asked_ns:
        return max(_THRESHOLD_NS, least)
    if asked_ns < least:
        raise Refused(
            f"a gap of {asked_ns} ns cannot be told from the loop itself, which takes {ns_per_loop:.0f} ns "
            f"({engine_name})",
            f"--threshold-ns {least} or more"
            + ("" if engine_name == "numba" else f"; a compiled loop is shorter: {engine.REMEDY}"),
        )
    return asked_ns


def _interpreted(threshold_ns: int) -> tuple[Watch, Callable[[], list[int]]]:
    gaps: list[int] = []

    def watch(until_ns: int) -> tuple[int, int]:
        now = time.monotonic_ns
        first = last = now()
        while last < until_ns:
            this = now()
            if this - last > threshold_ns:
                gaps.append(this - last)
            last = this
        return first, last

    def take() -> list[int]:
        taken = gaps[:]
        gaps.clear()
        return taken

    return watch, take


def _compiled(threshold_ns: int) -> tuple[Watch, Callable[[], list[int]]]:
    now = engine.clock()

    def loop(until_ns: Any, threshold: Any, gaps: Any, scratch: Any) -> Any:
        found = 0
        first = last = now(scratch)
        while last < until_ns:
            this = now(scratch)
            if this - last > threshold:
                gaps[found] = this - last
                found += 1
                if found == len(gaps):
                    return first, this, found
            last = this
        return first, last, found

    compiled = engine.compiled(loop, "UniTuple(int64, 3)(int64, int64, int64[::1], int64[::1])")
    gaps, scratch = engine.zeros(_CAPACITY), engine.zeros(2)
    count = 0

    def watch(until_ns: int) -> tuple[int, int]:
        nonlocal count
        first, last, count = compiled(until_ns, threshold_ns, gaps, scratch)
        return first, last

    def take() -> list[int]:
        taken: list[int] = gaps[:count].tolist()
        return taken

    return watch, take


PROBE = measurement.Probe(
    "noise",
    "how much time others take from a busy loop: time lost, gaps per second, longest gap",
    _measure,
    Parameter("threshold_ns", 0, "shortest gap that counts; 0: 1000, or two turns of the loop if longer", high=10**12),
    engines=("numba", "python"),
)
