"""Integer throughput: how many steps of a mixing function a pCPU does per second.

A step is a shift, an exclusive or and a multiplication on 64 bits, each of which needs the result before it; a
compiler cannot make one of two, as it does with a linear congruential generator. Compiled it is what the pCPU can
do; interpreted it is what the interpreter can do on it, twenty times less or worse, so only figures of one engine
compare.
"""

from __future__ import annotations

import time

from . import engine, measurement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .measurement import Measurement

__all__ = ["PROBE", "main"]

# Source: Steele, Lea, Flood: Fast splittable pseudorandom number generators (2014), the shape of its mix function; the
# factor is of Knuth, The Art of Computer Programming, volume 2, section 3.3.4 (MMIX).
_FACTOR, _SHIFT, _MASK = 6364136223846793005, 29, (1 << 64) - 1
_STEPS = {"numba": 200_000, "python": 2_000}  # between two looks at the clock: a fraction of a millisecond


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    steps = _STEPS[run.engine]
    turn = _compiled() if run.engine == "numba" else _interpret
    run.calibration = engine.calibrate(run.engine)
    state, total, spent = 1, 0, 0
    rates = []
    for piece in run.slices():
        start = now = time.monotonic_ns()
        done = 0
        while now < piece.until_ns and not run.ended:
            state = turn(state, steps)
            done += steps
            now = time.monotonic_ns()
        if piece.warm:
            continue
        total, spent = total + done, spent + now - start
        rate = run.per_second(done, now - start)
        piece.values = {"operations": rate}
        if rate is not None:
            rates.append(rate)
    run.series("operations", "1/s")
    run.metric("operations", run.per_second(total, spent), "1/s", "higher", primary=True)
    run.metric("operations_slowest_slice", min(rates, default=None), "1/s", "higher")
    run.calibration["ns_per_loop"] = spent / total if total else None


def _interpret(state: int, steps: int) -> int:
    for _ in range(steps):
        state = (state ^ state >> _SHIFT) * _FACTOR & _MASK
    return state


def _compiled() -> Callable[[int, int], int]:
    # Numbers are signed here, so what is shifted in has to be cleared; a product wraps as it does without a sign.
    factor, shift, low = _FACTOR, _SHIFT, _MASK >> _SHIFT

    def loop(state: Any, steps: Any) -> Any:
        for _ in range(steps):
            state = (state ^ (state >> shift & low)) * factor
        return state

    compiled: Callable[[int, int], int] = engine.compiled(loop, "int64(int64, int64)")
    return compiled


PROBE = measurement.Probe(
    "integer",
    "integer throughput: dependent steps of shift, exclusive or and multiplication per second",
    _measure,
    engines=("numba", "python"),
)
