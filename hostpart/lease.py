"""Who holds which pCPU: one ``flock`` per pCPU, kept by the kernel, and the line of those who wait.

A lease on pCPU N is an exclusive ``flock`` on the directory ``/sys/devices/system/cpu/cpuN``. That directory
belongs to root, is always there and can be locked by any user without write permission, so nobody can
remove it, forge it or forget to clean it up. A shared lock on it says that a service VM keeps the pCPU.
``/sys/devices/system/cpu`` itself is the allocator's lock: *look, choose, take* is one step.

What the leases mean to VMs, and which pCPUs to choose, is left to :mod:`hostpart.hypervisor` and
:mod:`hostpart.allocator`. Locks are advisory to other programs, and a network namespace has a sysfs,
and so leases, of its own.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from .cpuset import CpuSet
from .errors import HostpartError
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType

__all__ = [
    "LEASE_FD",
    "AllocatorBusy",
    "AllocatorLock",
    "Holder",
    "Leases",
    "Line",
    "Survey",
    "is_locked",
    "release",
    "relock",
]

LEASE_FD = 200  # guests inherit their lease here or above, out of the way of the shells' 3 to 9 and 10 to 63
_LOCK_WAIT_S = 5.0
_LOOK_AGAIN_S = 0.005


class Holder(Value):
    """A process that holds or waits for a lock, as the kernel tells it.

    :ivar pid: in this process's pid namespace
    :ivar uid: its real user, None where it ended meanwhile or is hidden
    :ivar name: the kernel's name for it (``comm``), likewise
    :ivar stopped: whether it is stopped (SIGSTOP, a debugger)
    """

    pid: int
    uid: int | None = None
    name: str | None = None
    stopped: bool = False

    @classmethod
    def of(cls, pid: int) -> Holder:
        """Read what /proc says of *pid* now."""
        try:
            with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as file:
                facts = dict(line.split(":\t", 1) for line in file if ":\t" in line)
        except OSError:
            return cls(pid)
        return cls(pid, int(facts["Uid"].split()[0]), facts["Name"].strip(), facts["State"][0] in "Tt")

    def __str__(self) -> str:
        if self.name is None:
            return f"pid {self.pid}"
        return f"pid {self.pid} ({self.name}, uid {self.uid}{', stopped' if self.stopped else ''})"


class AllocatorBusy(HostpartError):
    """The allocator's lock did not become free in time; nothing has changed."""

    def __init__(self, waited_s: float, where: str, holders: Iterable[Holder]) -> None:
        holders = tuple(holders)
        super().__init__(waited_s, where, holders)
        self.waited_s, self.where, self.holders = waited_s, where, holders

    def __str__(self) -> str:
        who = ", ".join(map(str, self.holders)) or "a process that /proc/locks does not show here"
        return f"{who} has held the allocator's lock ({self.where}) for the {self.waited_s:g} s waited for it"

    @property
    def remedy(self) -> str:
        if not self.holders:
            return f"find it with 'lslocks' or 'fuser {self.where}', and end it"
        pid = self.holders[0].pid
        if self.holders[0].stopped:
            return f"let it go on with 'kill -CONT {pid}', or end it with 'kill -KILL {pid}'"
        return f"wait for it, or end it with 'kill {pid}'"


class Survey(Value):
    """The leases of a set of pCPUs at one instant.

    :ivar taken: leased to user VMs
    :ivar kept: locked by one or more service VMs
    """

    taken: CpuSet
    kept: CpuSet


class Leases:
    """The leases below one directory.

    :param directory: holds ``cpuN`` directories; by default ``$HOSTPART_LEASE_DIR``, for tests, and
        without that ``/sys/devices/system/cpu``
    """

    def __init__(self, directory: str | None = None) -> None:
        own = directory or os.environ.get("HOSTPART_LEASE_DIR")
        self.directory = own or "/sys/devices/system/cpu"
        self._make = bool(own)

    def lock(self, wait_s: float = _LOCK_WAIT_S) -> AllocatorLock:
        """Return the allocator's lock, to be held in a ``with`` statement.

        :param wait_s: how long to wait for it
        :raises AllocatorBusy: naming the holder
        """
        return AllocatorLock(self, wait_s)

    def take(self, cpu: int) -> int | None:
        """Lease pCPU *cpu*; to be called under :meth:`lock`.

        :return: the descriptor that holds it (close-on-exec), or None where somebody holds it or it is not there
        :raises OSError: where no descriptor can be had (``EMFILE``)
        """
        return self._flock(cpu, fcntl.LOCK_EX)

    def keep(self, cpu: int) -> int | None:
        """Lock pCPU *cpu* for a service VM; others may do so too. As :meth:`take` otherwise."""
        return self._flock(cpu, fcntl.LOCK_SH)

    def survey(self, cpus: CpuSet) -> Survey:
        """Look at the leases of *cpus*; to be called under :meth:`lock`, since a look takes and lets go."""
        taken = kept = 0
        for cpu in cpus:
            fd = self._flock(cpu, fcntl.LOCK_EX)
            if fd is None:
                fd = self._flock(cpu, fcntl.LOCK_SH)
                if fd is None:
                    taken |= 1 << cpu
                    continue
                kept |= 1 << cpu
            os.close(fd)
        return Survey(CpuSet(taken), CpuSet(kept))

    def holders(self, cpus: CpuSet) -> dict[int, list[Holder]]:
        """Return who holds each of *cpus*, shared or exclusively, from /proc/locks.

        Locks of processes outside this pid namespace are not shown there: a pCPU that
        :meth:`survey` finds taken may be missing here.
        """
        return {cpu: who for cpu in cpus if (who := self._who(self._path(cpu)))}

    def _path(self, cpu: int) -> str:
        return f"{self.directory}/cpu{cpu}"

    def _open(self, path: str) -> int:
        try:
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self._make:
                raise
            os.makedirs(path, exist_ok=True)
            return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def _flock(self, cpu: int, how: int) -> int | None:
        # Always on a fresh descriptor: the kernel converts a lock by letting it go first.
        try:
            fd = self._open(self._path(cpu))
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(fd, how | fcntl.LOCK_NB)
        except OSError as error:
            os.close(fd)
            if error.errno == errno.EWOULDBLOCK:
                return None
            raise
        return fd

    def _who(self, path: str) -> list[Holder]:
        try:
            found = os.stat(path)
        except OSError:
            return []
        inode = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}:{found.st_ino}"
        with open("/proc/locks", encoding="ascii") as file:
            fields = [line.split() for line in file]
        pids = [int(f[4]) for f in fields if len(f) > 5 and f[1] == "FLOCK" and f[5] == inode]
        return [Holder.of(pid) for pid in dict.fromkeys(pids) if pid > 0]


class AllocatorLock:
    """The host-wide lock under which pCPUs are looked at, chosen and taken."""

    def __init__(self, leases: Leases, wait_s: float) -> None:
        self._leases, self._wait_s = leases, wait_s
        self._fd = -1

    def __enter__(self) -> None:
        where = self._leases.directory
        fd = self._leases._open(where)
        until = time.monotonic() + self._wait_s
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno != errno.EWOULDBLOCK:
                    os.close(fd)
                    raise
            else:
                self._fd = fd
                return
            if time.monotonic() >= until:
                os.close(fd)
                raise AllocatorBusy(self._wait_s, where, self._leases._who(where))
            time.sleep(_LOOK_AGAIN_S)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._fd)


def release(fd: int) -> None:
    """Give a lease back: unlocked for all who inherited the descriptor, and closed here."""
    fcntl.flock(fd, fcntl.LOCK_UN)
    os.close(fd)


def relock(fd: int) -> bool:
    """Lock *fd* again after somebody who inherited it let it go; whether that worked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def is_locked(fd: int) -> bool:
    """Whether this open file description still holds its ``flock``, from /proc/self/fdinfo."""
    with open(f"/proc/self/fdinfo/{fd}", "rb", buffering=0) as file:
        return b"\nlock:" in file.read()


class Line:
    """The queue for pCPUs of all users in this network namespace, in order of arrival.

    Each who waits binds an abstract unix socket whose name says when it came (CLOCK_MONOTONIC, ns, the
    same for every process of a boot); /proc/net/unix lists them to everybody, and the kernel takes
    a name away with its process.

    :raises OSError: where no socket can be had
    """

    def __init__(self, leases: Leases) -> None:
        import socket

        found = os.stat(leases.directory)
        self._prefix = f"hostpart-line-{found.st_dev:x}-{found.st_ino:x}-"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._ticket = f"{time.monotonic_ns():020d}-{os.getpid()}"
        self._socket.bind(f"\0{self._prefix}{self._ticket}")
        self.behind: Holder | None = None

    def ahead(self) -> list[int]:
        """Return the pids of those who came before, the first first."""
        mark = f" @{self._prefix}"
        with open("/proc/net/unix", encoding="utf-8", errors="replace") as file:
            names = [line.rstrip("\n").partition(mark)[2] for line in file if mark in line]
        # Any user may bind any name: what is no ticket stands in no line.
        tickets = sorted(name for name in names if all(part.isdecimal() for part in name.split("-", 1)) and "-" in name)
        return [int(ticket.partition("-")[2]) for ticket in tickets if ticket < self._ticket]

    def leave(self) -> None:
        """Stop waiting."""
        self._socket.close()

    def wait(self, ready: Callable[[], bool], until: float | None, interrupted: Callable[[], bool]) -> bool:
        """Wait for the head of the line, and there for *ready*.

        :param ready: tries to get what is waited for; called only at the head of the line
        :param until: ``time.monotonic()`` to give up at, None for never
        :param interrupted: looked at about twenty times a second
        :return: whether *ready* came true; in any case this process has left the line, and :attr:`behind`
            says who was first in it at the last look
        """
        try:
            while True:
                ahead = self.ahead()
                self.behind = Holder.of(ahead[0]) if ahead else None
                if not ahead and ready():
                    return True
                if interrupted() or (until is not None and time.monotonic() >= until):
                    return False
                time.sleep(0.05)
        finally:
            self.leave()
