"""How two vCPUs hand a turn to each other through a page of memory that both have mapped.

Three ways, of :data:`WAYS`: by storing a number that the other one waits to load; by putting the next number into one
word with compare-and-swap, which who waits tries again and again, as at a contended lock; and by a semaphore each, at
which who waits sleeps in the kernel. Who meets whom, and what comes of the times, is :mod:`workers.probes.pingpong`'s.
"""

from __future__ import annotations

import array
import ctypes
import time

from . import engine
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    # In: the next number, since when it waits for its answer (0: it was not sent), until when to go on. Out: how many
    # rounds were done, since when the next number waits, and how long each round took for the one who leads.
    Rounds = Callable[[int, int, int], tuple[int, int, list[int]]]
    # The page's words in, what does rounds with them out.
    Bind = Callable[[memoryview], Rounds]

__all__ = ["OVER", "PING", "PONG", "WAYS", "prepare", "set_up", "wake"]

WAYS = ("store", "cas", "semaphore")
# Which words of 8 bytes are whose: 256 bytes apart, since pCPUs fetch lines in pairs.
PING, PONG = 0, 32  # what the one who leads has sent, and the one who follows
_TURN = 64  # of compare-and-swap: even, where the one who leads may go on
_SEMAPHORES = {PING: 96, PONG: 128}  # each posted by the one whose word it is
OVER = -1  # instead of a number: it is over
_ROUNDS = 2_000  # between two looks whether a signal came
_SPINS = 200  # between two looks at the clock


def prepare(how: str, engine_name: str, *, leads: bool) -> Bind:
    """Return one side of a way to hand over, compiled if that is the engine; it takes seconds then.

    :param how: one of :data:`WAYS`
    :raises Refused: where the engine cannot do it
    """
    compiled = engine_name == "numba"
    if how == "cas":
        if not compiled:
            raise Refused(
                "compare-and-swap takes a compiled loop, and this one is interpreted",
                f"--how store or --how semaphore; to have it compiled, {engine.REMEDY}",
            )
        return _swapping(leads)
    if how == "semaphore":
        return _sleeping_compiled(leads) if compiled else _sleeping(leads)
    return _storing_compiled(leads) if compiled else _storing(leads)


def set_up(words: memoryview) -> None:
    """Make the semaphores in a page that the other one does not have yet.

    :raises OSError: where the system has none between processes
    """
    for word in _SEMAPHORES.values():
        # Source: sem_init(3); what is not 0 says that several processes share it.
        if _libc().sem_init(_address(words, word), 1, 0):
            raise OSError(ctypes.get_errno(), "sem_init")


def wake(words: memoryview, mine: int) -> None:
    """Wake the other one from its sleep at the semaphore that goes with word *mine*."""
    _libc().sem_post(_address(words, _SEMAPHORES[mine]))


def _address(words: memoryview, index: int) -> int:
    return ctypes.addressof(ctypes.c_int64.from_buffer(words, 8 * index))


def _libc() -> ctypes.CDLL:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.sem_init.argtypes = (ctypes.c_ssize_t, ctypes.c_int, ctypes.c_uint)
    libc.sem_post.argtypes = (ctypes.c_ssize_t,)
    libc.sem_timedwait.argtypes = (ctypes.c_ssize_t, ctypes.c_void_p)
    for function in (libc.sem_init, libc.sem_post, libc.sem_timedwait):
        function.restype = ctypes.c_int
    return libc


# -- storing and loading -------------------------------------------------------------------------------


def _storing(leads: bool) -> Bind:
    def bind(words: memoryview) -> Rounds:
        clock = time.monotonic_ns

        def lead(number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            times: list[int] = []
            last = since or clock()
            for ping in range(number, number + _ROUNDS):
                words[PING] = ping
                while words[PONG] != ping:
                    if words[PONG] == OVER or clock() > until_ns:
                        return len(times), last, times
                now = clock()
                times.append(now - last)
                last = now
            return len(times), 0, times

        def follow(number: int, _since: int, until_ns: int) -> tuple[int, int, list[int]]:
            for done in range(_ROUNDS):
                while words[PING] != number + done:
                    if words[PING] == OVER or clock() > until_ns:
                        return done, 0, []
                words[PONG] = number + done
            return _ROUNDS, 0, []

        return lead if leads else follow

    return bind


def _storing_compiled(leads: bool) -> Bind:
    now, load, store = engine.clock(), engine.load(), engine.store()
    over, spins, rounds = OVER, _SPINS, _ROUNDS

    def loop(mine: Any, theirs: Any, number: Any, since: Any, until_ns: Any, times: Any, scratch: Any) -> Any:
        last = since or now(scratch)
        for done in range(rounds):
            ping = number + done
            if leads:
                store(mine, ping)
            spun = 0
            while True:
                seen = load(theirs)
                if seen == ping:
                    break
                spun += 1
                if seen == over or (spun % spins == 0 and now(scratch) > until_ns):
                    return done, last
            if leads:
                this = now(scratch)
                times[done] = this - last
                last = this
            else:
                store(mine, ping)
        return rounds, 0

    return _bound(loop, leads, lambda words: _mine_and_theirs(words, leads))


# -- compare-and-swap ----------------------------------------------------------------------------------


def _swapping(leads: bool) -> Bind:
    now, load, swap = engine.clock(), engine.load(), engine.compare_and_swap()
    over, spins, rounds = OVER, _SPINS, _ROUNDS

    def loop(turn: Any, theirs: Any, number: Any, since: Any, until_ns: Any, times: Any, scratch: Any) -> Any:
        last = since or now(scratch)
        for done in range(rounds):
            before = 2 * (number + done - 1)
            if leads and (done or not since):
                swap(turn, before, before + 1)
            # Who leads swaps the number that it waits for for the same: it takes the line, as a lock's taker does.
            wanted = before + 2 if leads else before + 1
            spun = 0
            while swap(turn, wanted, before + 2) != wanted:
                spun += 1
                if spun % spins == 0 and (load(theirs) == over or now(scratch) > until_ns):
                    return done, last
            if leads:
                this = now(scratch)
                times[done] = this - last
                last = this
        return rounds, 0

    return _bound(loop, leads, lambda words: (_address(words, _TURN), _mine_and_theirs(words, leads)[1]))


# -- semaphores ----------------------------------------------------------------------------------------


def _sleeping(leads: bool) -> Bind:
    libc = _libc()
    post, wait, clock = libc.sem_post, libc.sem_timedwait, time.monotonic_ns
    until = array.array("q", [0, 0])  # a struct timespec
    deadline, _ = until.buffer_info()

    def bind(words: memoryview) -> Rounds:
        theirs = PONG if leads else PING
        my_semaphore, their_semaphore = _semaphores(words, leads)

        def rounds(_number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            until[0], until[1] = _timespec(until_ns)
            times: list[int] = []
            last = since or clock()
            for done in range(_ROUNDS):
                if leads and (done or not since):
                    post(my_semaphore)
                # What ends it early, the time or a signal, is looked at by the caller.
                if wait(their_semaphore, deadline) or words[theirs] == OVER:
                    return done, last, times
                if leads:
                    now = clock()
                    times.append(now - last)
                    last = now
                else:
                    post(my_semaphore)
            return _ROUNDS, 0, times

        return rounds

    return bind


def _sleeping_compiled(leads: bool) -> Bind:
    libc = _libc()
    now, load, post, wait = engine.clock(), engine.load(), libc.sem_post, libc.sem_timedwait
    over, rounds = OVER, _ROUNDS

    def loop(
        mine: Any, semaphore: Any, theirs: Any, since: Any, deadline: Any, times: Any, scratch: Any
    ) -> Any:  # fmt: skip
        last = since or now(scratch)
        for done in range(rounds):
            if leads and (done or not since):
                post(mine)
            if wait(semaphore, deadline.ctypes) or load(theirs) == over:
                return done, last
            if leads:
                this = now(scratch)
                times[done] = this - last
                last = this
            else:
                post(mine)
        return rounds, 0

    compiled = engine.compiled(
        loop, "UniTuple(int64, 2)(int64, int64, int64, int64, int64[::1], int64[::1], int64[::1])"
    )

    def bind(words: memoryview) -> Rounds:
        mine, semaphore = _semaphores(words, leads)
        theirs = _mine_and_theirs(words, leads)[1]
        times, scratch, deadline = engine.zeros(_ROUNDS), engine.zeros(2), engine.zeros(2)

        def rounds(_number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            deadline[0], deadline[1] = _timespec(until_ns)
            done, since = compiled(mine, semaphore, theirs, since, deadline, times, scratch)
            return done, since, times[:done].tolist() if leads else []

        return rounds

    return bind


def _timespec(until_ns: int) -> tuple[int, int]:
    # sem_timedwait(3) goes by CLOCK_REALTIME; where that is set meanwhile, a look comes early or late.
    return divmod(time.time_ns() + until_ns - time.monotonic_ns(), 1_000_000_000)


def _semaphores(words: memoryview, leads: bool) -> tuple[int, int]:
    ping, pong = (_address(words, _SEMAPHORES[word]) for word in (PING, PONG))
    return (ping, pong) if leads else (pong, ping)


# -- what is compiled ----------------------------------------------------------------------------------


def _mine_and_theirs(words: memoryview, leads: bool) -> tuple[int, int]:
    ping, pong = _address(words, PING), _address(words, PONG)
    return (ping, pong) if leads else (pong, ping)


def _bound(loop: Callable[..., Any], leads: bool, addresses: Callable[[memoryview], tuple[int, int]]) -> Bind:
    signature = "UniTuple(int64, 2)(int64, int64, int64, int64, int64, int64[::1], int64[::1])"
    compiled = engine.compiled(loop, signature)

    def bind(words: memoryview) -> Rounds:
        first, second = addresses(words)
        times, scratch = engine.zeros(_ROUNDS), engine.zeros(2)

        def rounds(number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            done, since = compiled(first, second, number, since, until_ns, times, scratch)
            return done, since, times[:done].tolist() if leads else []

        return rounds

    return bind
