"""The two ways a probe's loop can run: interpreted, honest to about half a microsecond, or compiled with numba.

numba is an extra (``hostpart[probes]``) and takes seconds to import, so nothing here does before it is asked to. What
is compiled reads CLOCK_MONOTONIC, as ``time.monotonic_ns`` does, so the times of both engines compare.
"""

from __future__ import annotations

import ctypes
import os
import time

from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = [
    "ENGINES",
    "REMEDY",
    "calibrate",
    "choose",
    "clock",
    "compare_and_swap",
    "compiled",
    "load",
    "nanosleep",
    "sleep_until",
    "store",
    "zeros",
]

ENGINES = ("numba", "python")  # the better one first
REMEDY = "pip install 'hostpart[probes]'"
_LOOPS = 20_000


def choose(probe: str, asked: str, offered: Sequence[str]) -> tuple[str, str | None]:
    """Return the engine to use, and the reason where it is not the better one of those that the probe offers.

    :param asked: ``auto`` or one of :data:`ENGINES`
    :raises Refused: where the one that was asked for, or the only one there is, cannot be had
    """
    if asked != "auto" and asked not in offered:
        raise Refused(f"probe {probe!r} has no engine {asked!r}", f"--engine {offered[0]}")
    if asked == "python" or "numba" not in offered:
        return "python", None
    problem = _numba_problem()
    if problem is None:
        return "numba", None
    if asked == "auto" and "python" in offered:
        return "python", f"{problem}; {REMEDY}"
    raise Refused(f"probe {probe!r} needs numba for what it measures: {problem}", REMEDY)


def _numba_problem() -> str | None:
    # The threads that numpy's linear algebra would start are no part of what is measured.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    try:
        import numba  # noqa: F401
    except ImportError as error:
        return "numba is not installed" if error.name == "numba" else f"numba cannot be imported: {error}"
    return None


def compiled(function: Callable[..., Any], signature: str) -> Any:
    """Return *function* compiled for that one signature, now and not at its first call."""
    import numba

    return numba.njit(signature)(function)


def zeros(count: int) -> Any:
    """Return an array of that many whole numbers of 64 bits, all 0 and all of its memory there."""
    import numpy

    array: Any = numpy.empty(count, numpy.int64)
    array.fill(0)
    return array


def clock() -> Any:
    """Return a compiled function: an array of two whole numbers to work in goes in, CLOCK_MONOTONIC in ns comes out.

    Source: clock_gettime(3); a ``struct timespec`` is two numbers of 64 bits where hostpart runs.
    """
    read = ctypes.CDLL(None).clock_gettime
    read.argtypes, read.restype = (ctypes.c_int, ctypes.c_void_p), ctypes.c_int
    monotonic = time.CLOCK_MONOTONIC

    def now(scratch: Any) -> Any:
        read(monotonic, scratch.ctypes)
        return scratch[0] * 1_000_000_000 + scratch[1]

    return compiled(now, "int64(int64[::1])")


def sleep_until() -> Any:
    """Return a compiled function that sleeps until a time of CLOCK_MONOTONIC in ns: 0, or an errno where it woke early.

    Source: clock_nanosleep(2), TIMER_ABSTIME.
    """
    sleep = nanosleep()
    monotonic, absolute = time.CLOCK_MONOTONIC, 1

    def until(wanted_ns: Any, scratch: Any) -> Any:
        scratch[0] = wanted_ns // 1_000_000_000
        scratch[1] = wanted_ns % 1_000_000_000
        return sleep(monotonic, absolute, scratch.ctypes, 0)

    return compiled(until, "int64(int64, int64[::1])")


def nanosleep() -> Any:
    """Return the C library's clock_nanosleep(2), which takes addresses of ``struct timespec``."""
    function = ctypes.CDLL(None).clock_nanosleep
    function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    function.restype = ctypes.c_int
    return function


def load() -> Any:
    """Return what compiles to one load of 64 bits that nothing may be moved in front of: its address goes in."""
    return _atomic(1, lambda builder, word, _: builder.load_atomic(word, "acquire", 8))


def store() -> Any:
    """Return what compiles to one store of 64 bits that nothing may be moved behind: address and value go in."""

    def emit(builder: Any, word: Any, values: Any) -> Any:
        builder.store_atomic(values[0], word, "release", 8)
        return values[0]

    return _atomic(2, emit)


def compare_and_swap() -> Any:
    """Return what compiles to one atomic comparison and exchange of 64 bits: address, expected and new value go in.

    What was there comes out: the expected value, where it was replaced. Nothing may be moved across it.

    Source: LLVM Language Reference, "cmpxchg"; on x86 it is ``lock cmpxchg``.
    """

    def emit(builder: Any, word: Any, values: Any) -> Any:
        found = builder.cmpxchg(word, values[0], values[1], "seq_cst", "seq_cst")
        return builder.extract_value(found, 0)

    return _atomic(3, emit)


def _atomic(words: int, emit: Callable[[Any, Any, Any], Any]) -> Any:
    # numba would take a plain load in a loop for one that can be made once, before the loop.
    from llvmlite import ir
    from numba.core import types
    from numba.extending import intrinsic

    def generate(_context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        word = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
        return emit(builder, word, arguments[1:])

    word = types.int64
    # numba counts the arguments of what it is given.
    if words == 1:
        return intrinsic(lambda _typing, address: (word(address), generate))
    if words == 2:
        return intrinsic(lambda _typing, address, value: (word(address, value), generate))
    return intrinsic(lambda _typing, address, expected, value: (word(address, expected, value), generate))


def calibrate(engine: str) -> dict[str, Any]:
    """Read the clock in a loop and return what this engine can tell at best here.

    :return: ``ns_per_loop``, the median time between two readings, and ``floor_ns``, the shortest
    """
    if engine == "numba":
        now, apart = clock(), zeros(_LOOPS)

        def read(apart: Any, scratch: Any) -> None:
            last = now(scratch)
            for turn in range(len(apart)):
                this = now(scratch)
                apart[turn] = this - last
                last = this

        compiled(read, "void(int64[::1], int64[::1])")(apart, zeros(2))
        found = sorted(apart.tolist())
    else:
        found = sorted(_read_clock())
    return {
        "clock": "CLOCK_MONOTONIC",
        "ns_per_loop": float(found[len(found) // 2]),
        "floor_ns": float(found[0]),
        "threshold_ns": None,
    }


def _read_clock() -> list[int]:
    now = time.monotonic_ns
    apart = [0] * _LOOPS
    last = now()
    for turn in range(_LOOPS):
        this = now()
        apart[turn] = this - last
        last = this
    return apart
