"""Random-access latency: how long a load takes whose address is the result of the load before it.

The chain goes through a buffer in one random round, a cache line a step, so neither the pCPU nor the compiler can
know the next address. Buffers are sized by the caches of the pCPU that the probe runs on: half of L1, of L2 and of
the last level, and four times the last level for memory. Slices take turns; each begins with a round that isn't
timed, so that what a cache can hold is in it. Translation of addresses is part of the time; large pages are asked
for.

Source of the method: lmbench's lat_mem_rd (McVoy, Staelin, 1996).
"""

from __future__ import annotations

import time

from . import buffer, engine, measurement, seat
from .buffer import Buffer
from .parameter import Parameter
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .measurement import Measurement

__all__ = ["LEVELS", "PROBE", "main", "sizes"]

LEVELS = ("l1", "l2", "llc", "memory")
_LINE = 64  # bytes, where the kernel does not say
_WORD = 8
_CHUNK_NS = 200_000  # of loads between two looks at the clock, about
_LLCS = 4


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def sizes(caches: dict[str, int | None]) -> dict[str, int | None]:
    """Return the buffer's size in bytes for each of :data:`LEVELS`, None where there is no such cache.

    :param caches: as :func:`workers.probes.seat.caches` returns them
    """
    l1, l2, llc = caches["l1"], caches["l2"], caches["llc"]
    return {
        "l1": l1 // 2 if l1 else None,
        "l2": l2 // 2 if l2 else None,
        "llc": llc // 2 if llc and llc != l2 else None,
        "memory": (llc or buffer.UNKNOWN_LLC) * _LLCS,
    }


def _measure(run: Measurement) -> None:
    caches = seat.caches(seat.current_cpu())
    wanted = sizes(caches)
    level, line = str(run.parameters["level"]), caches["line"] or _LINE
    if level != "all":
        wanted = {level: wanted[level]}
    asked = run.whole("buffer_kib") << 10
    if asked:
        wanted = {"memory" if level == "all" else level: asked}
    if not any(wanted.values()):
        raise Refused(
            f"the kernel describes no cache {level!r} of pCPU {seat.current_cpu()}",
            "give the size with --buffer-kib, or take --level memory",
        )
    names = [name for name in LEVELS if wanted.get(name)]
    run.parameters |= {"buffer_bytes": {name: wanted[name] for name in names}, "line_bytes": line}
    run.calibration = engine.calibrate(run.engine)
    weave, chase = _compiled()
    chains = [_Chain(wanted[name] or 0, line, weave, chase) for name in names]
    total, spent = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    for number, piece in enumerate(run.slices()):
        which = number % len(names)
        name, chain = names[which], chains[which]
        if name != "memory":
            chain.go(chain.count)
        took = run.histogram(f"load_{name}", "ps")
        times: list[int] = []
        now = 0
        while not times or (now < piece.until_ns and not run.ended):  # the round may have taken all of the slice
            before = time.monotonic_ns()
            chain.go(chain.loads)
            now = time.monotonic_ns()
            times.append(now - before)
        took.update(time_ns * 1000 // chain.loads for time_ns in times)
        done = chain.loads * len(times)
        piece.values = {name: sum(times) / done}
        if not piece.warm:
            total[name] += done
            spent[name] += sum(times)
    primary = "llc" if "llc" in names else names[-1]
    for name in names:
        value = spent[name] / total[name] if total[name] else None
        run.series(name, "ns")
        run.metric(f"load_{name}", value, "ns", "lower", primary=name == primary)


class _Chain:
    # One round through a buffer. Its words are indices, so the next one is found by one load.
    def __init__(self, size: int, line: int, weave: Any, chase: Any) -> None:
        import numpy

        self._buffer = Buffer(size)
        words = numpy.frombuffer(self._buffer.memory, numpy.int64)
        self.count = max(2, size // line)
        self._words, self._chase, self._at = words, chase, 0
        weave(words, self.count, line // _WORD, size)
        start = time.monotonic_ns()
        self.go(self.count)
        per_load = max(1.0, (time.monotonic_ns() - start) / self.count)
        self.loads = max(100, int(_CHUNK_NS / per_load))

    def go(self, loads: int) -> None:
        self._at = self._chase(self._words, self._at, loads)


def _compiled() -> tuple[Any, Any]:
    factor, summand, low = 6364136223846793005, 1442695040888963407, (1 << 31) - 1

    def weave(words: Any, count: Any, stride: Any, seed: Any) -> None:
        # Sattolo's shuffle makes a permutation of one cycle: the chain comes through every line before it repeats.
        for index in range(count):
            words[index * stride] = index * stride
        for index in range(count - 1, 0, -1):
            seed = seed * factor + summand
            other = (seed >> 33 & low) % index
            kept = words[index * stride]
            words[index * stride] = words[other * stride]
            words[other * stride] = kept

    def chase(words: Any, at: Any, loads: Any) -> Any:
        for _ in range(loads):
            at = words[at]
        return at

    return (
        engine.compiled(weave, "void(int64[::1], int64, int64, int64)"),
        engine.compiled(chase, "int64(int64[::1], int64, int64)"),
    )


PROBE = measurement.Probe(
    "latency",
    "random-access latency: ns per dependent load from each cache and from memory",
    _measure,
    Parameter("level", "all", "from where", choices=("all", *LEVELS)),
    Parameter("buffer_kib", 0, "size of the buffer; 0: by the level's cache", high=1 << 30),
    engines=("numba",),
)
