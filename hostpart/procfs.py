"""What ``/proc`` of the running machine says about one process or one thread.

Every function reads one file once and says ``None`` where the process is gone, where this user
may not look, or where the kernel does not provide the figure: never 0 for "unknown". Pids are
numbers only; whoever keeps one keeps its start time beside it (:func:`start_time`), because
numbers are used again.

Paths are built here and not by :class:`hostpart.host.Host`: processes are of the live machine
only, a recorded tree has none, and these reads happen thousands of times a second.

Deciding what the figures mean is left to :mod:`hostpart.evidence`, finding a guest's processes
to :mod:`hostpart.tree`.
"""

from __future__ import annotations

import os
import signal

from .cpuset import CpuSet
from .value import Value

__all__ = [
    "Stat",
    "Status",
    "allowed",
    "children",
    "environ",
    "environ_block",
    "is_kthread",
    "migrations",
    "pinned_alone",
    "processes",
    "read_stat",
    "read_status",
    "schedstat",
    "start_time",
    "switches",
    "threads",
]

_PF_KTHREAD = 0x00200000  # include/linux/sched.h; part of the ABI since /proc/PID/stat prints the flags


class Stat(Value):
    """One line of ``/proc/PID/stat``, or of one thread's ``/proc/PID/task/TID/stat``.

    :ivar comm: the kernel's name of the task, at most 15 bytes, chosen by the task itself; what is not UTF-8 is escaped
    :ivar state: one letter: ``R`` ``S`` ``D`` ``T`` (stopped) ``t`` (stopped by a tracer) ``Z`` ``X`` ``I`` …
    :ivar flags: the kernel's ``PF_`` bits
    :ivar minflt: minor page faults: of all threads, ended ones too, for a process; of the one for a thread
    :ivar majflt: major page faults, likewise
    :ivar utime: user time in clock ticks (``SC_CLK_TCK``), likewise
    :ivar stime: system time in clock ticks, likewise
    :ivar threads: threads of the process, a main thread that has ended but waits for the others included
    :ivar start: when it started, in clock ticks since boot
    :ivar processor: Linux's number of the CPU it runs on, or ran on last: after a change of mask it stays
        as it was until the task runs again
    :ivar cutime: user time in clock ticks of the children that it has waited for, and that these have
    :ivar cstime: system time, likewise

    Source: proc_pid_stat(5).
    """

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    flags: int
    minflt: int
    majflt: int
    utime: int
    stime: int
    threads: int
    start: int
    processor: int
    cutime: int = 0
    cstime: int = 0

    @property
    def kernel(self) -> bool:
        """Whether it is a kernel thread."""
        return bool(self.flags & _PF_KTHREAD)

    @property
    def dead(self) -> bool:
        """Whether no thread is left: a zombie. A zombie *main thread* with others alive is not dead."""
        return self.state in "ZXx" and self.threads <= 1


class Status(Value):
    """What ``/proc/PID/status`` (or one thread's) says beyond :class:`Stat`; ``None``: the kernel does not.

    :ivar uid: the real user id
    :ivar allowed: the mask as it is stored (Linux CPU numbers), CPUs that are offline included
    :ivar voluntary: switches because the task waited: of this one thread (the main one for a process)
    :ivar involuntary: switches because something else was to run, likewise
    :ivar rss_bytes: resident memory of the process
    :ivar locked_bytes: memory of the process locked into RAM
    :ivar mems: the NUMA nodes that its memory may come from
    :ivar forgets_children: whether it ignores SIGCHLD: nobody is told how long its children ran then
    """

    uid: int | None
    allowed: CpuSet | None
    voluntary: int | None
    involuntary: int | None
    rss_bytes: int | None
    locked_bytes: int | None
    mems: CpuSet | None = None
    forgets_children: bool | None = None


def start_time(pid: int) -> int | None:
    """Return when process *pid* started, in clock ticks since boot; ``None`` if it is gone.

    With the pid it names one process for as long as the machine is up: field 22 of proc_pid_stat(5).
    """
    data = _read(f"/proc/{pid}/stat", 4096)
    # The name stands in parentheses and may hold any byte, ") R 1" included: only the last ")" is the kernel's.
    return int(data[data.rindex(b")") + 2 :].split(None, 20)[19]) if data else None


def read_stat(pid: int, tid: int | None = None) -> Stat | None:
    """Return the figures of process *pid*, or of its one thread *tid*; ``None`` if it is gone."""
    data = _read(f"{_task(pid, tid)}/stat", 4096)
    if not data:
        return None
    name, end = data.index(b"("), data.rindex(b")")
    field = data[end + 2 :].split()
    return Stat(
        int(data[:name]),
        data[name + 1 : end].decode("utf-8", "backslashreplace"),
        field[0].decode("ascii"),
        int(field[1]),
        int(field[2]),
        int(field[3]),
        int(field[6]),
        int(field[7]),
        int(field[9]),
        int(field[11]),
        int(field[12]),
        int(field[17]),
        int(field[19]),
        int(field[36]),
        int(field[13]),
        int(field[14]),
    )


def read_status(pid: int, tid: int | None = None) -> Status | None:
    """Return the status of process *pid*, or of its one thread *tid*; ``None`` if it is gone."""
    data = _read(f"{_task(pid, tid)}/status", 65536)
    if not data:
        return None
    mask = _after(data, b"\nCpus_allowed_list:")
    rss, locked = _number(data, b"\nVmRSS:"), _number(data, b"\nVmLck:")
    mems, ignored = _after(data, b"\nMems_allowed_list:"), _after(data, b"\nSigIgn:")
    return Status(
        uid=_number(data, b"\nUid:"),
        allowed=None if mask is None else CpuSet.parse(mask.decode("ascii")),
        voluntary=_number(data, b"\nvoluntary_ctxt_switches:"),
        involuntary=_number(data, b"\nnonvoluntary_ctxt_switches:"),
        rss_bytes=None if rss is None else rss * 1024,
        locked_bytes=None if locked is None else locked * 1024,
        mems=None if mems is None else CpuSet.parse(mems.decode("ascii")),
        forgets_children=None if ignored is None else bool(int(ignored, 16) >> signal.SIGCHLD - 1 & 1),
    )


def allowed(pid: int, tid: int | None = None) -> CpuSet | None:
    """Return the CPUs (Linux numbers) the task may run on, as stored: offline ones are not left out."""
    status = read_status(pid, tid)
    return status.allowed if status else None


def switches(pid: int, tid: int | None = None) -> tuple[int, int] | None:
    """Return the voluntary and involuntary context switches of one thread (the main one by default)."""
    status = read_status(pid, tid)
    if status is None or status.voluntary is None or status.involuntary is None:
        return None
    return status.voluntary, status.involuntary


def schedstat(pid: int, tid: int | None = None) -> tuple[int, int, int] | None:
    """Return ``(run_ns, wait_ns, slices)`` of one thread: time on a CPU, time runnable but waiting, times scheduled in.

    Of the main thread by default; its ended siblings and its children are not in it. ``None`` where
    the kernel does not account (it prints ``0 0 0`` then, which no task that has run can have).

    Source: Documentation/scheduler/sched-stats.rst, "/proc/<pid>/schedstat".
    """
    data = _read(f"{_task(pid, tid)}/schedstat", 256)
    if not data:
        return None
    run_ns, wait_ns, slices = map(int, data.split()[:3])
    return (run_ns, wait_ns, slices) if slices else None


def migrations(pid: int, tid: int | None = None) -> int | None:
    """Return how often one thread (the main one by default) was moved to another CPU since it was forked.

    ``None`` where the kernel does not provide ``/proc/PID/sched`` (before Linux 6.15 an option of its build).
    """
    data = _read(f"{_task(pid, tid)}/sched", 16384)
    return _number(data, b"nr_migrations", b":") if data else None


def threads(pid: int) -> list[int]:
    """Return the thread ids of process *pid*, ascending; empty if it is gone."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")))
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return []


def children(pid: int, tid: int) -> list[int] | None:
    """Return the pids of the processes whose parent is thread *tid* of process *pid*.

    ``None`` where the thread is gone or the kernel has no such file (``CONFIG_PROC_CHILDREN``). The
    list is sure to be whole only while the thread and its children are stopped.

    Source: proc_tid_children(5).
    """
    data = _unbounded(f"/proc/{pid}/task/{tid}/children")
    return None if data is None else list(map(int, data.split()))


def environ(pid: int) -> dict[bytes, bytes] | None:
    """Return the environment of process *pid* by name; of a name given twice the first counts, as in getenv(3).

    ``None`` and its truth: as :func:`environ_block`.
    """
    block = environ_block(pid)
    if block is None:
        return None
    pairs = [entry.partition(b"=") for entry in block.split(b"\0")]
    return {name: value for name, equals, value in reversed(pairs) if equals}


def environ_block(pid: int) -> bytes | None:
    """Return the environment process *pid* was given at its exec: ``NAME=value`` entries, a NUL after each.

    ``None`` if it is gone or not this user's to read. It is memory of the process: one that
    overwrites it (to show a title in ``ps``) shows something else, a zombie and a kernel thread show nothing.
    """
    return _unbounded(f"/proc/{pid}/environ")


def is_kthread(pid: int) -> bool:
    """Whether *pid* is a kernel thread (not: a process that is gone)."""
    stat = read_stat(pid)
    return stat is not None and stat.kernel


def processes() -> list[int]:
    """Return the pids that ``/proc`` shows, ascending, kernel threads included, threads not.

    A mount with ``hidepid`` shows this user's only.
    """
    return sorted(int(name) for name in os.listdir("/proc") if name[0] in "123456789")


def pinned_alone() -> dict[int, list[int]]:
    """Return, by CPU (Linux number), the pids of the processes that may run on that one CPU only.

    Main threads only: a thread that pinned itself in a process that did not is not looked at. Kernel
    threads and this process are left out, the caller's own guests are not. On a host with one CPU
    online everything is where it must be, and the answer is empty.

    It is on the way of every start, so it asks with two system calls per process and opens no file but
    ``/proc``. Kernel threads are told by their process group 0, which a process whose group lies
    outside this pid namespace shows as well: such a one is passed over, pid 1 is not.
    """
    found: dict[int, list[int]] = {}
    if os.sysconf("SC_NPROCESSORS_ONLN") < 2:
        return found
    this = os.getpid()
    for pid in processes():
        try:
            if (not os.getpgid(pid) and pid != 1) or pid == this:
                continue
            cpus = os.sched_getaffinity(pid)
        except (ProcessLookupError, PermissionError):
            continue
        if len(cpus) == 1:
            found.setdefault(cpus.pop(), []).append(pid)
    return found


def _task(pid: int, tid: int | None) -> str:
    return f"/proc/{pid}" if tid is None else f"/proc/{pid}/task/{tid}"


def _read(path: str, size: int) -> bytes | None:
    # One read gives the whole file: the kernel makes these in one piece, if they fit.
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        return os.read(fd, size)
    except (ProcessLookupError, PermissionError):
        return None
    finally:
        os.close(fd)


def _unbounded(path: str) -> bytes | None:
    # For the two files that come in pieces.
    try:
        fd = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return None
    try:
        parts: list[bytes] = []
        while part := os.read(fd, 65536):
            parts.append(part)
        return b"".join(parts)
    except (ProcessLookupError, PermissionError):
        return None
    finally:
        os.close(fd)


def _after(data: bytes, label: bytes) -> bytes | None:
    at = data.find(label)
    if at < 0:
        return None
    at += len(label)
    end = data.find(b"\n", at)
    return data[at : end if end >= 0 else None]


def _number(data: bytes, label: bytes, then: bytes = b"") -> int | None:
    line = _after(data, label)
    if line is None:
        return None
    return int(line.partition(then)[2] if then else line.split(None, 1)[0])
