"""An aggressor on the cache: it writes all over a buffer of the last-level cache's size, again and again.

What others had in that cache is thereby thrown out of it. The parts written at a time are small, so that the C library
does not write past the cache.
"""

from __future__ import annotations

import time

from . import buffer, measurement
from .buffer import Buffer
from .parameter import Parameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .measurement import Measurement

__all__ = ["PROBE", "main"]

_PART = 256 << 10


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    llc = buffer.llc_bytes()
    here = Buffer((run.whole("buffer_mib") << 20) or llc or buffer.UNKNOWN_LLC)
    run.parameters |= {"buffer_mib": here.size >> 20, "llc_bytes": llc}
    total = spent = offset = 0
    for piece in run.slices():
        start = now = time.monotonic_ns()
        done = 0
        while now < piece.until_ns and not run.ended:
            here.write(offset, _PART)
            done += _PART
            offset = (offset + _PART) % here.size
            now = time.monotonic_ns()
        piece.values = {"write": run.per_second(done, now - start)}
        if not piece.warm:
            total, spent = total + done, spent + now - start
    run.series("write", "B/s")
    run.metric("write", run.per_second(total, spent), "B/s", "higher", primary=True)
    run.metric("laps", total / here.size, "1", "higher")


PROBE = measurement.Probe(
    "thrash",
    "an aggressor: writes all over the last-level cache until it is ended or for a time",
    _measure,
    Parameter("buffer_mib", 0, "memory to write; 0: the last-level cache's size", high=1 << 20),
    seconds=0.0,
)
