"""Ping-pong: two vCPUs of one VM hand a word of shared memory to and fro.

vCPU 0 writes a number, vCPU 1 sees it and answers with the same in a word of another cache line, and so on; vCPU 2
and 3 likewise. What is measured is the way of a cache line between two pCPUs, there and back, which waiting for a
lock costs too. No call into the kernel is made on the way. Compiled, words are read and written by one atomic
instruction each. Interpreted, what a number's way through the interpreter takes comes on top of each of the four
steps.

The memory belongs to no file: vCPU 0 makes it and hands it over through a socket without a name in the file system,
so nothing is left behind however the two end. What one of them gets to know by end of file on the socket, that the
other is gone, ends it with its record, cut short.
"""

from __future__ import annotations

import mmap
import os
import time

from . import engine, measurement
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable
    from typing import Any

    from .measurement import Measurement

    # In: the next number, since when it waits for its answer (0: it was not sent), until when to go on. Out: how many
    # rounds were done, since when the next number waits, and how long each round took for the one who leads.
    Rounds = Callable[[int, int, int], tuple[int, int, list[int]]]

__all__ = ["PROBE", "main"]

_PING, _PONG = 0, 32  # which words of 8 bytes: 256 bytes apart, since pCPUs fetch lines in pairs
_OVER = -1  # instead of a number: it is over
_ROUNDS = 2_000  # between two looks whether a signal came
_WAIT_S = 60.0  # for the other vCPU: it may have to compile first, on a pCPU that is busy
_LOOK_NS = 20_000_000  # how long to wait for a number before looking whether the other one is still there


def main() -> int:
    """Run the probe in this process, which must be one of two vCPUs."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    where = run.where
    if where["vcpus"] is None or where["vcpus"] % 2:
        raise Refused(
            f"it takes two vCPUs of one VM, or pairs of them, and this VM has {where['vcpus'] or 'none'}",
            "hostpart run -n 2 --probe pingpong",
        )
    leads = where["vcpu"] % 2 == 0
    run.calibration = engine.calibrate(run.engine)
    # Compiled before the two meet, so that neither waits for the other while it measures.
    bind = _compiled(leads) if run.engine == "numba" else _interpreted(leads)
    with _meet(leads, where["vcpu"] // 2) as peer:
        run.parameters["role"] = "leads" if leads else "follows"
        _play(run, _Words(_share(peer, leads), bind, leads=leads), peer)


def _play(run: Measurement, words: _Words, peer: socket.socket) -> None:
    took = run.histogram("round_trip", "ns") if words.leads else None
    total = spent = 0
    # The one who follows ends when the other one says so, else it would end the other one's time.
    for piece in run.slices(endless=not words.leads):
        now = time.monotonic_ns()
        done = playing = 0
        while now < piece.until_ns and not run.ended:
            start = now
            count, times = words.rounds(min(now + _LOOK_NS, piece.until_ns))
            playing += time.monotonic_ns() - start
            done += count
            if took:
                took.update(times)
            if words.over or (not count and _is_gone(peer)):
                run.leave(cut_short=words.leads or not words.over)
            now = time.monotonic_ns()
        piece.values = {"round_trips": done}
        if not piece.warm:
            total, spent = total + done, spent + playing
    words.finish()
    run.series("round_trips", "1")
    run.metric("round_trips_done", total, "1", "higher")
    # Only the one who leads knows which of the time was spent on playing.
    if words.leads:
        run.metric("round_trips", run.per_second(total, spent), "1/s", "higher", primary=True)
        run.percentiles("round_trip", "round_trip")


class _Words:
    # The two words, and how far the numbers have come.
    def __init__(self, memory: mmap.mmap, bind: Callable[[memoryview], Rounds], *, leads: bool) -> None:
        self.leads, self.over = leads, False
        self._words = memoryview(memory).cast("q")
        self._rounds = bind(self._words)
        self._mine, self._theirs = (_PING, _PONG) if leads else (_PONG, _PING)
        self._number, self._since = 1, 0

    def rounds(self, until_ns: int) -> tuple[int, list[int]]:
        # Do some rounds; how many there were, and how long each took for the one who leads.
        done, self._since, times = self._rounds(self._number, self._since, until_ns)
        self._number += done
        self.over = self._words[self._theirs] == _OVER
        return done, times

    def finish(self) -> None:
        self._words[self._mine] = _OVER


def _interpreted(leads: bool) -> Callable[[memoryview], Rounds]:
    def bind(words: memoryview) -> Rounds:
        clock = time.monotonic_ns

        def lead(number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            times: list[int] = []
            last = since or clock()
            for ping in range(number, number + _ROUNDS):
                words[_PING] = ping
                while words[_PONG] != ping:
                    if words[_PONG] == _OVER or clock() > until_ns:
                        return len(times), last, times
                now = clock()
                times.append(now - last)
                last = now
            return len(times), 0, times

        def follow(number: int, _since: int, until_ns: int) -> tuple[int, int, list[int]]:
            for done in range(_ROUNDS):
                while words[_PING] != number + done:
                    if words[_PING] == _OVER or clock() > until_ns:
                        return done, 0, []
                words[_PONG] = number + done
            return _ROUNDS, 0, []

        return lead if leads else follow

    return bind


def _compiled(leads: bool) -> Callable[[memoryview], Rounds]:
    now, load, store = engine.clock(), engine.load(), engine.store()
    over, spins, rounds = _OVER, 200, _ROUNDS

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

    signature = "UniTuple(int64, 2)(int64, int64, int64, int64, int64, int64[::1], int64[::1])"
    compiled = engine.compiled(loop, signature)

    def bind(words: memoryview) -> Rounds:
        import ctypes

        ping, pong = (ctypes.addressof(ctypes.c_int64.from_buffer(words, 8 * index)) for index in (_PING, _PONG))
        mine, theirs = (ping, pong) if leads else (pong, ping)
        times, scratch = engine.zeros(_ROUNDS), engine.zeros(2)

        def rounds(number: int, since: int, until_ns: int) -> tuple[int, int, list[int]]:
            done, since = compiled(mine, theirs, number, since, until_ns, times, scratch)
            return done, since, times[:done].tolist() if leads else []

        return rounds

    return bind


def _meet(leads: bool, pair: int) -> socket.socket:
    # The VM's token makes the name nobody else's; a name that begins with NUL is in no file system.
    import socket

    name = f"\0hostpart-pingpong-{os.environ.get('HOSTPART_RUN', os.getppid())}-{pair}"
    until = time.monotonic() + _WAIT_S
    if leads:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen(1)
            listener.settimeout(_WAIT_S)
            try:
                peer, _ = listener.accept()
            except TimeoutError:
                raise _nobody() from None
        peer.settimeout(_WAIT_S)
        return peer
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(_WAIT_S)
    while True:
        try:
            peer.connect(name)
        except ConnectionRefusedError:
            if time.monotonic() > until:
                peer.close()
                raise _nobody() from None
            time.sleep(0.01)
        else:
            return peer


def _nobody() -> Refused:
    return Refused(
        f"the other vCPU did not come within {_WAIT_S:.0f} s", "see what the other one says, or start both again"
    )


def _share(peer: socket.socket, leads: bool) -> mmap.mmap:
    import socket

    if leads:
        fd = os.memfd_create("hostpart-pingpong", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        socket.send_fds(peer, [b"memory"], [fd])
    else:
        said, (*fds,), _, _ = socket.recv_fds(peer, 16, 1)
        if not fds:
            raise Refused(f"the other vCPU ended before it began{f', {said!r}' if said else ''}", "see what it says")
        [fd] = fds
    memory = mmap.mmap(fd, mmap.PAGESIZE)
    os.close(fd)
    return memory


def _is_gone(peer: socket.socket) -> bool:
    # Nothing is ever sent after the memory: what there is to read is end of file.
    import select

    return bool(select.select([peer], [], [], 0)[0])


PROBE = measurement.Probe(
    "pingpong",
    "how fast two vCPUs hand a cache line to and fro: round trips per second, latency",
    _measure,
    engines=("numba", "python"),
)
