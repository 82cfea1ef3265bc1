"""One try of an accelerator: QEMU with a firmware that ends it, in a process that cannot hold the caller up.

The process dies with its caller and when its time is over. What comes of it is a :class:`Trial`, with QEMU's own last
words where it failed. When to try, and what follows, is :mod:`hostpart.qemu.accelerator`'s.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import time

from workers.vcpu import die_with

from ..value import Value
from . import firmware

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import NoReturn

__all__ = ["Trial", "attempt", "attempt_ioctls"]

# include/uapi/linux/kvm.h
_KVM_CREATE_VM, _KVM_CHECK_EXTENSION, _KVM_CREATE_VCPU = 0xAE01, 0xAE03, 0xAE41
_KVM_CAP_ARM_VM_IPA_SIZE = 165

_FIRMWARE_FD = 3
_LAST_S = 0.2  # how long QEMU may still speak after it said that the guest has stopped
_KILL_S = 2.0  # how long a killed process may take to end; one in the kernel's D state never does
_MOST_SAID = 16384  # bytes of QEMU's words: the first and the last half of it
# What QEMU says when it stops a guest and goes on itself: accel/kvm/kvm-all.c and target/i386/kvm/kvm.c.
_STOPPED = (b"KVM internal error", b"KVM: entry failed", b"KVM: unknown exit", b"kvm run failed")

# How long an answer is believed, in seconds of this boot. A failure may have been mended since, or another hypervisor
# was in the way; a machine may have been busy; but a KVM that hangs must not cost every launch the whole limit.
_WORKS_S, _FAILS_S, _LATE_S = float("inf"), 600.0, 60.0


class Trial(Value):
    """What came of running the firmware.

    :ivar works: whether it ran to its end and computed rightly
    :ivar seen: what was seen where it did not, QEMU's own words in it; else empty
    :ivar lasts_s: for how many seconds it is to be believed; 0 where it tells nothing of KVM
    """

    works: bool
    seen: str
    lasts_s: float


def attempt(
    path: str, accel: str, *, machine: str, cpu: str, limit_s: float = 3.0, image: bytes | None = None
) -> Trial:
    """Have QEMU run a firmware, whatever was seen before.

    :param path: QEMU's path
    :param accel: for ``-accel``, such as ``kvm`` or ``tcg``
    :param image: another firmware than :func:`hostpart.qemu.firmware.image`
    """
    argv = [path, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-m", "16M"]
    argv += ["-machine", machine, "-accel", accel, "-cpu", cpu]
    argv += ["-bios", f"/proc/self/fd/{_FIRMWARE_FD}", "-device", firmware.DEVICE]
    try:
        fd = _memory_file(firmware.image() if image is None else image)
        try:

            def start() -> NoReturn:
                os.dup2(fd, _FIRMWARE_FD)
                os.closerange(_FIRMWARE_FD + 1, os.sysconf("SC_OPEN_MAX"))
                os.execv(path, argv)

            end = _supervise(start, limit_s)
        finally:
            os.close(fd)
    except OSError as error:  # no process, no descriptor, no memory
        return Trial(False, f"it could not be tried ({error.strerror})", 0)
    return _judge(end, os.path.basename(path), limit_s)


def attempt_ioctls(device: str, limit_s: float) -> Trial:
    """Ask KVM for a VM and its first vCPU, as far as it can be asked without a program for the guest."""

    def start() -> None:
        import fcntl

        kvm = os.open(device, os.O_RDWR | os.O_CLOEXEC)
        # 0 is "the default" everywhere; some arm64 machines have fewer address bits than that and say how many.
        kind = 0
        if os.uname().machine == "aarch64":
            kind = fcntl.ioctl(kvm, _KVM_CHECK_EXTENSION, _KVM_CAP_ARM_VM_IPA_SIZE)
        vm = fcntl.ioctl(kvm, _KVM_CREATE_VM, kind)
        fcntl.ioctl(vm, _KVM_CREATE_VCPU, 0)

    try:
        end = _supervise(start, limit_s)
    except OSError as error:
        return Trial(False, f"it could not be tried ({error.strerror})", 0)
    if end.unkillable or end.late:
        return Trial(False, f"it did not make a VM within {limit_s:g} s", _LATE_S)
    if end.status == 0:
        return Trial(True, "", _WORKS_S)
    return Trial(
        False, f"it does not make a VM with a vCPU ({_words(end.said, '') or f'status {end.status}'})", _FAILS_S
    )


# -- one process with a time limit ---------------------------------------------------------------------


class _End(Value):
    # status: as Popen's returncode, None where it is not known. said: bytes of its stderr.
    status: int | None
    said: bytes
    late: bool
    unkillable: bool


# Runs *start* in a forked process, until it ends, says that the guest has stopped, or *limit_s* seconds are over.
def _supervise(start: Callable[[], object], limit_s: float) -> _End:
    ours, theirs = os.pipe()
    try:
        # Where SIGCHLD is ignored, as after nohup in some shells, the kernel would throw the exit status away.
        ignored = signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN
        try:
            if ignored:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        except ValueError:  # not in the main thread; then the status is not known
            ignored = False
        try:
            parent = os.getpid()
            pid = os.fork()
            if not pid:
                _be_the_child(start, parent, theirs)
            os.close(theirs)
            theirs = -1
            return _watch(pid, ours, limit_s)
        finally:
            if ignored:
                signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    finally:
        os.close(ours)
        if theirs >= 0:
            os.close(theirs)


def _be_the_child(start: Callable[[], object], parent: int, stderr: int) -> NoReturn:
    try:
        os.setsid()
        die_with(parent)
        # stderr first: a caller without standard streams has the pipe at one of their numbers.
        os.dup2(stderr, 2)
        null = os.open(os.devnull, os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        for fd in (0, 1, 2):  # dup2 does nothing where it is that number already
            os.set_inheritable(fd, True)
        import resource

        # QEMU ends by abort(3) where KVM fails it: no core shall be left. With 1, unlike 0, the kernel does not
        # start a program for it either: fs/coredump.c.
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (1 if hard else 0, hard))
        for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores these, and exec would keep that
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        start()
        os._exit(0)
    except BaseException as error:
        os.write(2, f"{error}\n".encode(errors="replace"))
    finally:
        os._exit(126)


def _watch(pid: int, stderr: int, limit_s: float) -> _End:
    os.set_blocking(stderr, False)
    said = bytearray()
    handle = -1
    try:
        handle = os.pidfd_open(pid)
        late = _listen(handle, stderr, said, limit_s)
    finally:  # an interrupt from the keyboard, too, leaves no process behind
        try:
            ended, status = _end(pid, handle)
        finally:
            if handle >= 0:
                os.close(handle)
    while _take(stderr, said):
        pass
    return _End(status, bytes(said), late, not ended)


# Collects what is said until the process ends or has no more to say; whether the time was over before.
def _listen(handle: int, stderr: int, said: bytearray, limit_s: float) -> bool:
    until = time.monotonic() + limit_s
    poll = select.poll()
    poll.register(handle, select.POLLIN)
    poll.register(stderr, select.POLLIN)
    stopped = False
    while (left_s := until - time.monotonic()) > 0:
        events = dict(poll.poll(left_s * 1000))
        if stderr in events and not _take(stderr, said):
            poll.unregister(stderr)  # closed: the process's end is what is left to wait for
        if handle in events:
            return False
        if not stopped and any(word in said for word in _STOPPED):
            # The guest stands still, and QEMU would wait for somebody to look at it.
            stopped = True
            until = min(until, time.monotonic() + _LAST_S)
        if stopped and b"Code=" in said and said.endswith(b"\n"):  # the last line of the registers
            return False
    return not stopped


# Kills a process and its group and reaps it: whether it has ended, and its status where that is known.
def _end(pid: int, handle: int) -> tuple[bool, int | None]:
    # Before it is reaped its number is its own, and so is its group's.
    for kill in (os.kill, os.killpg):
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):  # no group yet; of another user after a set-uid exec
            pass
    if handle >= 0:
        poll = select.poll()
        poll.register(handle, select.POLLIN)
        if not poll.poll(_KILL_S * 1000):
            return False, None
    try:
        return True, os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except ChildProcessError:  # reaped for us: SIGCHLD is ignored
        return True, None


# Reads what is there; False where there is nothing now, or never will be.
def _take(fd: int, said: bytearray) -> bool:
    try:
        chunk = os.read(fd, 4096)
    except BlockingIOError:
        return False
    said += chunk
    if len(said) > _MOST_SAID:
        del said[_MOST_SAID // 2 : len(said) - _MOST_SAID // 2]
    return bool(chunk)


def _judge(end: _End, name: str, limit_s: float) -> Trial:
    words = _words(end.said, name)
    said = f': "{words}"' if words else ""
    if end.unkillable:
        return Trial(False, f"QEMU was killed and has not ended: the kernel holds it{said}", _LATE_S)
    if any(word in end.said for word in _STOPPED):
        return Trial(False, f"the guest was stopped{said}", _FAILS_S)
    if end.late:
        return Trial(False, f"a program of some milliseconds was not through after {limit_s:g} s{said}", _LATE_S)
    if end.status == firmware.PASSED:
        return Trial(True, "", _WORKS_S)
    if end.status == firmware.WRONG:
        return Trial(False, "a program that ran in the guest got wrong results", _FAILS_S)
    if end.status is None:
        return Trial(False, f"how QEMU ended is not known{said}", 0)
    if end.status == 0:
        return Trial(False, f"the guest was reset before its program was through{said}", _FAILS_S)
    if end.status < 0:
        try:
            number = signal.Signals(-end.status).name
        except ValueError:
            number = f"signal {-end.status}"
        # SIGKILL is somebody else's, or the kernel's for lack of memory.
        return Trial(False, f"QEMU was ended by {number}{said}", 0 if number == "SIGKILL" else _FAILS_S)
    return Trial(False, f"QEMU ended with status {end.status}{said}", _FAILS_S)


# QEMU's last words, as one line: what is wrong, without the registers and without warnings, if there is more.
def _words(said: bytes, name: str) -> str:
    text = "".join(one if one.isprintable() or one == "\n" else " " for one in said.decode("utf-8", "replace"))
    lines = [line.strip().removeprefix(f"{name}: ") for line in text.split("\n")]
    for at, line in enumerate(lines):
        if any(word.decode() in line for word in _STOPPED):
            kept = [line]
            for more in lines[at + 1 :]:
                if "=" in more:  # the registers
                    break
                if more and not more.startswith("extra data"):
                    kept.append(more)
            code = text.partition("Code=")[2].partition("<")[2].split("\n")[0].replace(">", "").split()[:8]
            kept += [f"at the instruction {' '.join(code)}"] if code else []
            return ", ".join(kept)[:400]
    lines = [line for line in lines if line]
    telling = [line for line in lines if "warning: " not in line] or lines[-1:]
    return "; ".join(telling[-2:])[:400]


def _memory_file(content: bytes) -> int:
    # At a number of which the child makes nothing else: whose standard streams are closed would get it at theirs.
    # MFD_NOEXEC_SEAL: without it vm.memfd_noexec=2 refuses (Linux 6.3); kernels before do not know it.
    import fcntl

    try:
        fd = os.memfd_create("hostpart-firmware", os.MFD_CLOEXEC | 0x8)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        fd = os.memfd_create("hostpart-firmware", os.MFD_CLOEXEC)
    try:
        os.write(fd, content)
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRMWARE_FD + 1)
    finally:
        os.close(fd)
