"""Ping-pong: two vCPUs of one VM hand a turn to each other through shared memory, to and fro.

vCPU 0 hands over to vCPU 1, which hands back, and so on; vCPU 2 and 3 likewise. What is measured is the round trip:
the way between two pCPUs, there and back. How they hand over can be chosen:

- ``store``: one writes a number, the other one sees it and answers in a word of another cache line. Compiled, words
  are read and written by one atomic instruction each.
- ``cas``: both change one word by compare-and-swap, and who waits tries to, again and again: a contended lock. Only
  compiled: the interpreter has no such operation.
- ``semaphore``: POSIX semaphores between processes, at which who waits sleeps: two calls into the kernel (futex(2))
  and two wake-ups come with each round trip.

The first two make no call into the kernel. Interpreted, what a step's way through the interpreter takes comes on top.

The memory belongs to no file: vCPU 0 makes it and hands it over through a socket without a name in the file system,
so nothing is left behind however the two end. What one of them gets to know by end of file on the socket, that the
other is gone, ends it with its record, cut short.
"""

from __future__ import annotations

import mmap
import os
import time

from . import engine, handover, measurement
from .handover import OVER, PING, PONG
from .parameter import Parameter
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from .handover import Bind
    from .measurement import Measurement

__all__ = ["PROBE", "main"]

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
    bind = handover.prepare(str(run.parameters["how"]), run.engine, leads=leads)
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
        run.metric("hand_overs", run.per_second(2 * total, spent), "1/s", "higher")
        run.percentiles("round_trip", "round_trip")


class _Words:
    # The shared page, and how far the numbers have come.
    def __init__(self, memory: mmap.mmap, bind: Bind, *, leads: bool) -> None:
        self.leads, self.over = leads, False
        self._words = memoryview(memory).cast("q")
        self._rounds = bind(self._words)
        self._mine, self._theirs = (PING, PONG) if leads else (PONG, PING)
        self._number, self._since = 1, 0

    def rounds(self, until_ns: int) -> tuple[int, list[int]]:
        # Do some rounds; how many there were, and how long each took for the one who leads.
        done, self._since, times = self._rounds(self._number, self._since, until_ns)
        self._number += done
        self.over = self._words[self._theirs] == OVER
        return done, times

    def finish(self) -> None:
        self._words[self._mine] = OVER
        handover.wake(self._words, self._mine)


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
        memory = mmap.mmap(fd, mmap.PAGESIZE)
        handover.set_up(memoryview(memory).cast("q"))
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
    "how fast two vCPUs hand over to each other: round trips per second, latency",
    _measure,
    Parameter("how", "store", "store, compare-and-swap (compiled only) or semaphore", choices=handover.WAYS),
    engines=("numba", "python"),
)
