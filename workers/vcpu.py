"""One vCPU: a forked process that pins itself, proves it, waits for START and becomes its guest.

The device model's keeper calls :func:`fork` once per vCPU and talks to the child through two pipes. The
child writes lines of at most ``PIPE_BUF`` bytes, so that lines of several vCPUs never mix::

    VCPU ready PROCESSOR        pinned, and the pin was read back; PROCESSOR is where it ran
    VCPU failed STAGE ERRNO     it gives up before START; STAGE is one of STAGES
    VCPU exec ERRNO             the guest's command cannot be executed

START is one byte, read by one worker; end of file instead of it means that there is no keeper any more.
"""

from __future__ import annotations

# What ctypes wraps: the wrapper's classes, one for each type of C, take as long to make as a process.
import _ctypes
import errno
import os
import signal
import sys

from . import crash

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

__all__ = [
    "NOT_EXECUTABLE",
    "NOT_FOUND",
    "NOT_STARTED",
    "STAGES",
    "Order",
    "be_traced",
    "die_with",
    "dispositions",
    "fork",
    "prctl",
]

NOT_STARTED, NOT_EXECUTABLE, NOT_FOUND = 125, 126, 127  # exit statuses, as env(1) and timeout(1) have them
STAGES = ("parent", "cgroup", "pin", "mems", "sched", "nice", "mlock", "user", "cwd", "lease")

_ALL = signal.valid_signals()
_LEASE_FD = 200  # out of the way of the descriptors that shells use by number
_PR_SET_PDEATHSIG = 1
_MCL_CURRENT, _MCL_FUTURE = 1, 2
# Source: arch/x86/entry/syscalls/syscall_64.tbl; include/uapi/asm-generic/unistd.h.
_SET_MEMPOLICY = {"x86_64": 238, "aarch64": 237}
_MPOL_BIND = 2


class Order:
    """All that one vCPU's worker has to know.

    :ivar vm: the VM's name
    :ivar vcpu: its number in the VM
    :ivar pcpus: what to pin to, Linux numbers: one, or all of the VM's for an ``smp`` guest
    :ivar guest: runs the guest and does not return; called with this order once START came
    :ivar environ: the guest's environment, whole
    :ivar lease_fds: descriptors that hold this vCPU's leases, inherited by the guest
    :ivar close_fds: descriptors of the keeper that this worker must not hold open
    :ivar status_fd: the pipe to write lines to
    :ivar start_fd: the pipe to read START from
    :ivar pgrp: the process group to join (the terminal's foreground job), or None
    :ivar session: whether to be in a session of its own instead: the terminal's signals do not reach it
    :ivar stdin_fd: what to put at descriptor 0, or None to keep what is there; so for *stdout_fd*, *stderr_fd*
    :ivar mask: signals blocked in the guest
    :ivar ignored: signals ignored in the guest; all others have their default action
    :ivar enter: the ``cgroup.procs`` of the cgroups to enter
    :ivar ids: uid, gid and supplementary groups to become, or None
    :ivar mems: the NUMA nodes that the guest's memory comes from, or None for any
    :ivar scheduler: policy number and priority for sched_setscheduler(2), or None
    :ivar log: called in the worker before anything else, gives the function to call before exec; or None
    """

    __slots__ = (
        "close_fds",
        "cwd",
        "enter",
        "environ",
        "guest",
        "ids",
        "ignored",
        "lease_fds",
        "log",
        "mask",
        "mems",
        "mlock",
        "nice",
        "pcpus",
        "pgrp",
        "scheduler",
        "session",
        "start_fd",
        "status_fd",
        "stderr_fd",
        "stdin_fd",
        "stdout_fd",
        "vcpu",
        "vm",
    )

    def __init__(
        self,
        vm: str,
        vcpu: int,
        pcpus: frozenset[int],
        guest: Callable[[Order], NoReturn],
        *,
        environ: Mapping[str, str],
        status_fd: int,
        start_fd: int,
        lease_fds: Sequence[int] = (),
        close_fds: Sequence[int] = (),
        pgrp: int | None = None,
        session: bool = False,
        stdin_fd: int | None = None,
        stdout_fd: int | None = None,
        stderr_fd: int | None = None,
        mask: frozenset[int] = frozenset(),
        ignored: frozenset[int] = frozenset(),
        enter: Sequence[str] = (),
        cwd: str | None = None,
        ids: tuple[int, int, Sequence[int]] | None = None,
        scheduler: tuple[int, int] | None = None,
        nice: int | None = None,
        mlock: bool = False,
        mems: frozenset[int] | None = None,
        log: Callable[[], Callable[[], None]] | None = None,
    ) -> None:
        self.vm, self.vcpu, self.pcpus, self.guest, self.environ = vm, vcpu, pcpus, guest, environ
        self.status_fd, self.start_fd, self.lease_fds, self.close_fds = status_fd, start_fd, lease_fds, close_fds
        self.pgrp, self.stdin_fd, self.stdout_fd, self.stderr_fd = pgrp, stdin_fd, stdout_fd, stderr_fd
        self.mask, self.ignored, self.enter, self.cwd = mask, ignored, enter, cwd
        self.ids, self.scheduler, self.nice, self.mlock, self.log = ids, scheduler, nice, mlock, log
        self.mems, self.session = mems, session

    def tell(self, *words: object) -> None:
        """Write one line to the keeper; nobody may be there to read it any more."""
        try:
            os.write(self.status_fd, " ".join(map(str, (self.vcpu, *words))).encode() + b"\n")
        except OSError:
            pass


def be_traced() -> None:
    """Let the parent trace this process: the kernel stops it at the end of its next exec.

    :raises OSError: where that is forbidden (``kernel.yama.ptrace_scope`` 3, a seccomp filter)
    """
    _libc("ptrace", 0, 0, 0, 0)


def prctl(option: int, argument: int) -> None:
    """Call prctl(2), which Python does not have.

    :raises OSError: as the kernel says
    """
    _libc("prctl", option, argument, 0, 0, 0)


class _Function(_ctypes.CFuncPtr):
    _flags_ = _ctypes.FUNCFLAG_CDECL | _ctypes.FUNCFLAG_USE_ERRNO


_LIBC = _ctypes.dlopen(None, 0)  # type: ignore[arg-type]


def _libc(name: str, *arguments: int | bytes) -> int:
    # Call a function of the C library that takes C ints and addresses of bytes, and returns an int: -1 with an errno
    # where it fails.
    result: int = _Function(_ctypes.dlsym(_LIBC, name))(*arguments)
    if result == -1:
        raise OSError(_ctypes.get_errno(), os.strerror(_ctypes.get_errno()))
    return result


def die_with(parent: int) -> None:
    """Have the kernel kill this process when the thread that forked it ends.

    It is cleared by a change of uid and by exec of a set-uid program; call it again after the former.

    :raises ProcessLookupError: where *parent* is gone already
    """
    prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        raise ProcessLookupError(parent)


def fork(order: Order) -> int:
    """Fork the worker and return its pid; the caller must have one thread only.

    :raises OSError: ``EAGAIN`` where no process can be had
    """
    keeper = os.getpid()
    pid = os.fork()
    if pid:
        try:
            # It starts there at once, beside this process and not after it. That it is there is its own to make
            # sure of.
            os.sched_setaffinity(pid, order.pcpus)
        except OSError:
            pass  # the worker meets this too, and tells
        return pid
    # From here on nothing may return or raise into the keeper's frames.
    try:
        _work(order, keeper)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # needs no import, which another user's worker might not be allowed
    finally:
        os._exit(NOT_STARTED)


def _work(order: Order, keeper: int) -> None:
    stage = ""
    try:
        stage = "parent"
        signal.set_wakeup_fd(-1)
        # What would reach the keeper's handlers reaches nobody here until the guest has its own.
        signal.pthread_sigmask(signal.SIG_SETMASK, _ALL)
        die_with(keeper)
        crash.point("worker.born")
        if order.session:
            os.setsid()
        elif order.pgrp is not None:
            try:
                os.setpgid(0, order.pgrp)
            except OSError:
                pass  # the job's group is gone: the front ended, and the keeper will see to that
        for fd in order.close_fds:
            os.close(fd)
        flush = order.log() if order.log else None
        stage = "cgroup"
        for path in order.enter:
            fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
            os.write(fd, b"0")
            os.close(fd)
        stage = "pin"
        os.sched_setaffinity(0, order.pcpus)
        crash.point("worker.pinned")
        if os.sched_getaffinity(0) != order.pcpus:
            raise OSError(22, "the mask that was read back differs")
        processor = _libc("sched_getcpu")
        if processor not in order.pcpus:
            raise OSError(22, f"it runs on pCPU {processor}")
        stage = "mems"
        if order.mems is not None:
            _bind_memory(order.mems)
        stage = "nice"
        if order.nice is not None:
            os.setpriority(os.PRIO_PROCESS, 0, order.nice)
        stage = "sched"
        if order.scheduler:
            os.sched_setscheduler(0, order.scheduler[0], os.sched_param(order.scheduler[1]))
        stage = "lease"
        import fcntl

        for fd in order.lease_fds:
            try:
                fcntl.fcntl(fd, fcntl.F_DUPFD, _LEASE_FD)
            except OSError:
                fcntl.fcntl(fd, fcntl.F_DUPFD, 10)  # the limit on descriptors is below 200
        stage = "user"
        if order.ids:
            uid, gid, groups = order.ids
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            die_with(keeper)
        stage = "cwd"
        if order.cwd is not None:
            os.chdir(order.cwd)
        stage = "mlock"
        if order.mlock and not getattr(order.guest, "execs", False):
            _lock_memory()
        if order.log:
            import logging

            logging.getLogger("hostpart.vcpu").info("pinned to %s, runs on pCPU %d", sorted(order.pcpus), processor)
    except OSError as error:
        order.tell("failed", stage, error.errno or 0)
        os._exit(NOT_STARTED)
    order.tell("ready", processor)
    crash.point("worker.ready")
    if os.read(order.start_fd, 1) != b"S":
        os._exit(NOT_STARTED)
    for number, given in enumerate((order.stdin_fd, order.stdout_fd, order.stderr_fd)):
        if given is not None and given != number:
            os.dup2(given, number)
    if order.log:
        import logging

        logging.getLogger("hostpart.vcpu").info("START")
    order.guest(order) if flush is None else _run_logged(order, flush)


def _run_logged(order: Order, flush: Callable[[], None]) -> None:
    # The queue's feeder thread would be lost in exec together with the records it has not sent yet.
    if getattr(order.guest, "execs", False):
        flush()
    order.guest(order)


def _lock_memory() -> None:
    _libc("mlockall", _MCL_CURRENT | _MCL_FUTURE)


# From now on all memory of this thread, of what it forks and of what it executes comes from *nodes*. What it shares
# with its keeper since the fork stays where it is until one of the two writes to it.
# Source: set_mempolicy(2), which no C library has: libnuma does.
def _bind_memory(nodes: frozenset[int]) -> None:
    number = _SET_MEMPOLICY.get(os.uname().machine)
    if number is None or sys.maxsize < 1 << 32:  # a 32-bit program of a 64-bit kernel has other numbers
        raise OSError(errno.ENOSYS, "the system call's number is not known")
    size = max(nodes, default=0) // 64 + 1
    mask = sum(1 << node for node in nodes).to_bytes(8 * size, sys.byteorder)
    _libc("syscall", number, _MPOL_BIND, mask, 64 * size + 1)


def dispositions() -> tuple[frozenset[int], frozenset[int]]:
    """Return the signals that this process ignores, and those it catches, as the kernel has them.

    Source: proc_pid_status(5), "SigIgn". To ask Python for each signal takes ten times as long.
    """
    with open("/proc/self/status", "rb", buffering=0) as file:
        status = file.read()
    masks = [int(status.partition(b"\n" + name)[2].split(None, 1)[0], 16) for name in (b"SigIgn:", b"SigCgt:")]
    ignored, caught = (frozenset(n for n in range(1, signal.NSIG) if mask >> n - 1 & 1) for mask in masks)
    return ignored, caught


def settle_signals(order: Order) -> None:
    """Give the guest the signal actions and the mask that the caller of hostpart had.

    Python ignores SIGPIPE and SIGXFSZ; without this every guest in a pipe would outlive its reader.
    """
    ignored, caught = dispositions()
    for number in ignored | caught | order.ignored:
        try:
            signal.signal(number, signal.SIG_IGN if number in order.ignored else signal.SIG_DFL)
        except (OSError, ValueError):
            continue  # the C library keeps two real-time signals for itself
    signal.pthread_sigmask(signal.SIG_SETMASK, order.mask)
