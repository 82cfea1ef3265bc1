"""The daemon that spreads interrupts over all CPUs: paused while pCPUs are released, going on when none is.

It would move interrupts back to the guests' pCPUs within seconds. It can be told which CPUs to leave out, by a socket
in ``/run/irqbalance``, and would go on balancing among the others; but then it, and not hostpart, writes the masks,
at a time of its own choosing, nothing of what it was told outlives its restart, and the way back would be to whatever
it makes of the machine next. SIGSTOP is one bit that the kernel reports, holds for every version, and is undone by
``kill -CONT`` whoever does it. The price: the other interrupts are not balanced either, as long as it lasts.

A daemon that is restarted meanwhile is another process, and found and paused at the next look.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cpuset import CpuSet
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_NAME = "irqbalance"
_RUNNING, _STOPPED = "running", "stopped"
_PATIENCE_S = 0.5  # a task in the kernel stops on its way out


class _Daemon(Value):
    # One process, by pid and start time (clock ticks since boot): the number may be another's by now.
    pid: int
    start: int

    @property
    def key(self) -> str:
        return f"{_NAME}:{self.pid}:{self.start}"

    def read(self, host: Host) -> str:
        found = _stat(host, self.pid)
        if found is None or found[2] != self.start or found[1] in "ZXx":
            raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
        return _STOPPED if found[1] == "T" else _RUNNING

    def wanted(self, baseline: str, service: CpuSet, released: CpuSet) -> str:  # noqa: ARG002 - as every setting's
        return _STOPPED

    def write(self, host: Host, value: str) -> None:
        self.read(host)
        host.signal(self.pid, signal.SIGSTOP if value == _STOPPED else signal.SIGCONT)
        until = time.monotonic() + _PATIENCE_S
        while self.read(host) != value and time.monotonic() < until:
            time.sleep(0.001)


def settings(host: Host) -> list[Setting]:
    """Return the daemon, or the daemons, of this machine, by pid.

    A process of that name that is not root's is none: it could not steer anything.
    """
    try:
        pids = sorted(int(name) for name in host.listdir("proc") if name.isascii() and name.isdigit())
    except OSError:
        return []
    found: list[Setting] = []
    for pid in pids:
        stat = _stat(host, pid)
        if stat is not None and stat[0] == _NAME and stat[1] not in "ZXx" and _is_roots(host, pid):
            found.append(_Daemon(pid, stat[2]))
    return found


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not the daemon's."""
    name, _, process = key.partition(":")
    pid, _, start = process.partition(":")
    return _Daemon(int(pid), int(start)) if name == _NAME and pid.isdigit() and start.isdigit() else None


def _stat(host: Host, pid: int) -> tuple[str, str, int] | None:
    # Name, state and start time; through the host, so that a rehearsal reads back what it would have stopped.
    try:
        text = host.read_text(f"proc/{pid}/stat")
    except OSError:
        return None  # it is gone, or hidden from this user
    before, _, after = text.rpartition(")")
    field = after.split()
    return before.partition("(")[2], field[0], int(field[19])


def _is_roots(host: Host, pid: int) -> bool:
    try:
        return os.stat(host.path(f"proc/{pid}")).st_uid == 0
    except OSError:
        return False
