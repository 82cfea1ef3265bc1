"""The way into the kernel and back: system calls per second, and forks per second.

A system call here is getppid(2), which does next to nothing in the kernel; a fork is fork(2), the child's exit and
the wait for it. Slices are shared by the two in equal parts. The interpreter's own share of a call is the floor.
"""

from __future__ import annotations

import os
import time

from . import engine, measurement
from .parameter import Parameter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .measurement import Measurement

__all__ = ["PROBE", "main"]

_CALLS = 500  # between two looks at the clock


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    what = str(run.parameters["what"])
    run.calibration = engine.calibrate("python")
    run.calibration["ns_per_loop"] = _loop_ns()
    names = ("calls", "forks") if what == "both" else (what,)
    total, spent = dict.fromkeys(names, 0), dict.fromkeys(names, 0)
    took = run.histogram("fork", "ns")
    for piece in run.slices():
        share = (piece.until_ns - piece.start_ns) // len(names)
        for number, name in enumerate(names, 1):
            until = piece.start_ns + number * share
            start = time.monotonic_ns()
            done = 0
            now = start
            while now < until and not run.ended:
                if name == "calls":
                    _call()
                    done += _CALLS
                    now = time.monotonic_ns()
                else:
                    before = now
                    _fork()
                    done += 1
                    now = time.monotonic_ns()
                    took.add(now - before)
            piece.values[name] = run.per_second(done, now - start)
            if not piece.warm:
                total[name] += done
                spent[name] += now - start
    for name in names:
        run.series(name, "1/s")
        run.metric(name, run.per_second(total[name], spent[name]), "1/s", "higher", primary=name == names[0])
    if "forks" in names:
        run.percentiles("fork", "fork")


def _call() -> None:
    call = os.getppid
    for _ in range(_CALLS):
        call()


def _fork() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def _loop_ns() -> float:
    start = time.monotonic_ns()
    for _ in range(10_000):
        _nothing()
    return (time.monotonic_ns() - start) / 10_000


def _nothing() -> None:
    pass


PROBE = measurement.Probe(
    "syscalls",
    "system calls and forks per second",
    _measure,
    Parameter("what", "both", "what to do", choices=("both", "calls", "forks")),
)
