"""A plain aggressor: it keeps its pCPU busy and touches no memory.

It measures nothing but how often it looked at the clock, which says that it ran.
"""

from __future__ import annotations

import time

from . import measurement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .measurement import Measurement

__all__ = ["PROBE", "main"]


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    total = spent = 0
    for piece in run.slices():
        start = now = time.monotonic_ns()
        done = 0
        while now < piece.until_ns and not run.ended:
            for _ in range(1000):
                pass
            done += 1
            now = time.monotonic_ns()
        piece.values = {"loops": run.per_second(done, now - start)}
        if not piece.warm:
            total, spent = total + done, spent + now - start
    run.series("loops", "1/s")
    run.metric("loops", run.per_second(total, spent), "1/s", "higher", primary=True)


PROBE = measurement.Probe(
    "spin", "an aggressor: keeps its pCPU busy until it is ended or for a time", _measure, seconds=0.0
)
