"""Wake-up latency: how late a sleep ends that was to end at a certain time.

The probe sleeps until a time of CLOCK_MONOTONIC, one interval after the last, and reads the clock when it runs
again. A time that has passed before it could be slept for counts as missed and is skipped, so a long delay is one
event and not a burst of them. What a sleep costs that is over already is the floor.

Source of the method: cyclictest of rt-tests; clock_nanosleep(2), TIMER_ABSTIME.
"""

from __future__ import annotations

import array
import time

from . import engine, measurement
from .parameter import Parameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .measurement import Measurement

    # A time to wake at in, the time when it was awake out; 0 where a signal ended the sleep.
    Sleep = Callable[[int], int]

__all__ = ["PROBE", "main"]

_ABSOLUTE = 1  # TIMER_ABSTIME
_FLOOR_TRIES = 1000


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    interval = run.whole("interval_us") * 1000
    sleep = _compiled() if run.engine == "numba" else _interpreted()
    run.calibration = engine.calibrate(run.engine)
    run.calibration |= _floor(sleep)
    latency = run.histogram("latency", "ns")
    missed = 0
    seen: list[list[int]] = []
    wanted = time.monotonic_ns() + interval
    for piece in run.slices():
        late: list[int] = []
        skipped = 0
        # A slice ends with a wake-up, so there is one in each, however long the interval is.
        while not run.ended:
            awake = sleep(wanted)
            if not awake:
                break
            late.append(awake - wanted)
            passed = (awake - wanted) // interval
            skipped += passed
            wanted += interval * (passed + 1)
            if wanted > piece.until_ns:
                break
        piece.values = {"wakeups": len(late), "latency_max": max(late, default=None), "missed": skipped}
        if not piece.warm:
            seen.append(late)  # counted later: that would make the next one late
            missed += skipped
    for late in seen:
        latency.update(late)
    run.series("wakeups", "1")
    run.series("latency_max", "ns")
    run.series("missed", "1")
    run.percentiles("latency", "latency", primary="p99")
    run.metric("wakeups", latency.count, "1", "higher")
    run.metric("missed", missed, "1", "lower")


def _floor(sleep: Sleep) -> dict[str, float]:
    took = []
    for _ in range(_FLOOR_TRIES):
        before = time.monotonic_ns()
        took.append(sleep(before) - before)
    took.sort()
    return {"ns_per_loop": float(took[len(took) // 2]), "floor_ns": float(took[0])}


def _interpreted() -> Sleep:
    call, now = engine.nanosleep(), time.monotonic_ns
    until = array.array("q", [0, 0])  # a struct timespec
    address, _ = until.buffer_info()

    def sleep(wanted_ns: int) -> int:
        until[0], until[1] = divmod(wanted_ns, 1_000_000_000)
        return 0 if call(time.CLOCK_MONOTONIC, _ABSOLUTE, address, 0) else now()

    return sleep


def _compiled() -> Sleep:
    now, until = engine.clock(), engine.sleep_until()

    def loop(wanted_ns: Any, scratch: Any) -> Any:
        return 0 if until(wanted_ns, scratch) else now(scratch)

    compiled, scratch = engine.compiled(loop, "int64(int64, int64[::1])"), engine.zeros(2)

    def sleep(wanted_ns: int) -> int:
        return int(compiled(wanted_ns, scratch))

    return sleep


PROBE = measurement.Probe(
    "wakeup",
    "how late a sleep ends: latency of wake-ups at a fixed interval",
    _measure,
    Parameter("interval_us", 1000, "from one wake-up to the next", low=10, high=10**7),
    engines=("numba", "python"),
)
