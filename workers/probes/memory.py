"""Streaming bandwidth: how many bytes per second go through memory that no cache holds.

A slice is shared in equal parts by reading, writing and copying. A copy counts what it reads and what it writes, as
STREAM does (McCalpin, 1995); that a write reads its line first is not counted, since the C library may avoid it.
"""

from __future__ import annotations

import time

from . import buffer, engine, measurement
from .buffer import CHUNK, Buffer
from .parameter import Parameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .measurement import Measurement

__all__ = ["PROBE", "main"]

_LLCS = 4  # so many times the last-level cache: what it holds of it is a small part
_LEAST = 64 << 20


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    llc = buffer.llc_bytes()
    asked = run.whole("buffer_mib") << 20
    here = Buffer(asked or max(_LEAST, _LLCS * (llc or buffer.UNKNOWN_LLC)))
    run.parameters |= {"buffer_mib": here.size >> 20, "llc_bytes": llc}
    run.calibration = engine.calibrate("python")
    run.calibration["ns_per_loop"] = _cost_of_a_call(here)
    half = here.size // 2
    # Each goes on where it stopped: the function, the end of its part, what a byte counts.
    ways = {"read": (here.read, here.size, 1), "write": (here.write, here.size, 1), "copy": (here.copy, half, 2)}
    at = dict.fromkeys(ways, 0)
    moved, spent = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
    for piece in run.slices():
        share = (piece.until_ns - piece.start_ns) // len(ways)
        for number, (name, (go, end, factor)) in enumerate(ways.items(), 1):
            until = piece.start_ns + number * share
            start = now = time.monotonic_ns()
            offset, done = at[name], 0
            while now < until and not run.ended:
                go(offset, CHUNK)
                done += CHUNK * factor
                offset = (offset + CHUNK) % end
                now = time.monotonic_ns()
            at[name] = offset
            piece.values[name] = run.per_second(done, now - start)
            if not piece.warm:
                moved[name] += done
                spent[name] += now - start
    for name in ways:
        run.series(name, "B/s")
        run.metric(name, run.per_second(moved[name], spent[name]), "B/s", "higher", primary=name == "copy")


def _cost_of_a_call(here: Buffer) -> float:
    start = time.monotonic_ns()
    for _ in range(1000):
        here.read(0, 1)
    return (time.monotonic_ns() - start) / 1000


PROBE = measurement.Probe(
    "memory",
    "streaming bandwidth: bytes per second read, written and copied",
    _measure,
    Parameter("buffer_mib", 0, "memory to go through; 0: four times the last-level cache", high=1 << 20),
)
