"""One QEMU process: what it is started with, its vCPU threads, and its life.

The keeper forks it like every other worker and waits for it; what it has to be told and what it says goes through here.
It starts with its guest stopped. Its vCPU threads are found, each is put on its pCPU, all threads are made to run once
where they are now, and what the kernel says of them is read back. Only then does the guest run.

QEMU's other threads stay on the pCPUs that the service VM keeps, where the process was forked. One that a vCPU's thread
starts is born on that one's pCPU; it is taken away from there at the next look.
"""

from __future__ import annotations

import errno
import os
import select
import signal
import socket
import stat
import time

from .. import procfs
from ..control import abandoned
from ..cpuset import CpuSet
from ..errors import Failed, HostpartError, NotPermitted, UsageError
from ..host import Host
from ..value import Value
from . import accelerator, image
from .mirror import mirror, read_facts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..topology import Topology
    from .config import QemuGuest
    from .mirror import Mirror
    from .monitor import Monitor

__all__ = ["KERNEL", "Ended", "Machine", "Seat"]

KERNEL = "HOSTPART_KERNEL"  # in the environment: the host's kernel where it is not in /boot, as in a container

_STOP_S = 5.0  # for a process to be stopped, all of its threads
_CONTINUE_S = 0.5  # for it to run again
_LAST_WORDS = 4096
_UNSAID = 1 << 16  # of what it says, while nobody takes it
_QUIT_S = 5.0  # for QEMU to be gone once it was told to quit


class Seat(Value):
    """One vCPU of the machine.

    :ivar pcpu: Linux's number
    :ivar tid: its thread
    :ivar apic_id: the guest's name for it, as far as it is known
    """

    vcpu: int
    pcpu: int
    tid: int
    apic_id: int | None


class Ended(Value):
    """How the guest came to its end.

    :ivar failed: whether neither the guest nor hostpart meant it
    """

    text: str
    failed: bool = False


class Machine:
    """See the module. Everything that can be missing is looked for here, before anything is made.

    :param name: the VM's
    :param guest: the machine as it was asked for
    :param first: its first vCPU's number in the VM
    :param folder: what paths are relative to
    :param environ: variables for the built-in guest
    :raises HostpartError: for a program, a file or an accelerator that cannot be had
    :ivar pid: QEMU's; 0 before it is forked
    :ivar seats: its vCPUs, once their threads are known
    :ivar ended: how the guest ended, once it has; QEMU is still there
    :ivar halted: whether the guest was stopped, by QEMU or by somebody else
    :ivar resets: how often the guest was reset
    :ivar must_end: when QEMU has to be gone (``CLOCK_MONOTONIC``), once it was told to quit; else 0
    :ivar news: what has happened, a sentence each; for the keeper to tell, and to clear
    :ivar born: threads that were born on a vCPU's pCPU and taken away: where they ran last may be there still
    :ivar breaches: when QEMU was not the machine that hostpart made
    """

    def __init__(
        self,
        name: str,
        guest: QemuGuest,
        first: int,
        folder: str,
        environ: Mapping[str, str] = {},
    ) -> None:
        self.name, self.guest, self.first = name, guest, first
        self.pid = 0
        self.seats: tuple[Seat, ...] = ()
        self.ended: Ended | None = None
        self.halted = False
        self.resets = 0
        self.must_end = 0.0
        self.kept = CpuSet()
        self.news: list[str] = []
        self.breaches: list[str] = []
        self.mirror: Mirror
        self._folder = folder
        self._monitor: Monitor | None = None
        self._pcpus: tuple[int, ...] = ()
        self._known: set[int] = set()
        self.born: set[int] = set()
        self._births = 0
        self._missing: set[int] = set()
        self._words = self._unsaid = b""
        self._paused = self._going = self._asked = False
        self._initrd, self._relay_fd = -1, 2
        self._opened: set[int] = set()
        _need_qmp()
        host = os.uname().machine
        self.binary = accelerator.find(guest.binary or f"qemu-system-{_ARCHITECTURES.get(host, host)}")
        self.type = guest.machine or ("q35" if self.binary.endswith(("x86_64", "i386")) else "virt")
        self.architecture = self.binary.rpartition("qemu-system-")[2] or host
        self._look_for_files()
        cpu = guest.cpu or "host"
        self.accelerator = accelerator.choose(guest.accelerator, self.binary, machine=self.type, cpu=cpu)
        self.kernel = ""
        if guest.kernel:
            named = os.environ.get(KERNEL, "") if guest.kernel == "host" else self._path(guest.kernel)
            self.kernel = image.find_kernel(named)
        if guest.run is not None:
            self._initrd = os.memfd_create("initrd")
            with open(self._initrd, "wb", closefd=False) as file:
                file.write(image.build(guest.run, env=environ, result_port=bool(guest.output), kernel=self.kernel))
        ours, theirs = socket.socketpair()
        self._ours, self._theirs = ours, theirs
        self._stderr_r, self._stderr_w = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(self._stderr_r, False)

    # -- what it is started with -----------------------------------------------------------------------

    def argv(self, topology: Topology, pcpus: Sequence[int], kept: CpuSet, mems: CpuSet, *, mlock: bool) -> list[str]:
        """Return QEMU's arguments, its own name first.

        :param pcpus: its vCPUs', in order
        :param kept: where its other threads stay
        """
        guest = self.guest
        self._pcpus, self.kept = tuple(pcpus), kept
        self.mirror = mirror(
            topology, pcpus, memory_bytes=guest.memory_bytes, accelerator=self.accelerator.name, cpu=guest.cpu,
            mems=mems, flat=guest.topology == "flat", facts=read_facts(Host()), architecture=self.architecture,
        )  # fmt: skip
        argv = [
            self.binary, "-S", "-name", f"guest={self.name},debug-threads=on", "-nodefaults", "-no-user-config",
            "-display", "none", "-machine", self.type, "-accel", self.accelerator.argument, *self.mirror.arguments,
            "-chardev", f"socket,id=qmp,fd={self._theirs.fileno()}", "-mon", "chardev=qmp,mode=control",
            # It waits with a guest that has ended until its threads have been looked at for the last time.
            "-action", f"shutdown=pause,reboot={'shutdown' if guest.on_reboot == 'end' else 'reset'},panic=shutdown",
        ]  # fmt: skip
        if self.type.startswith(("q35", "pc")):
            argv += ["-device", "pvpanic"]
        if mlock:
            argv += ["-overcommit", "mem-lock=on"]
        argv += self._console()
        if self.kernel:
            argv += ["-kernel", self.kernel]
        if self._initrd >= 0:
            argv += ["-initrd", f"/proc/self/fd/{self._initrd}"]
        elif guest.initrd:
            argv += ["-initrd", self._path(guest.initrd)]
        # The built-in guest ends with a reset where its command has failed.
        failure = ("hostpart.failure=reset",) if guest.run is not None and guest.on_reboot == "end" else ()
        if guest.append or failure:
            argv += ["-append", " ".join((guest.append, *failure))]
        for disk in guest.disks:
            readonly = ",readonly=on" if disk.readonly else ""
            argv += ["-drive", f"file={_escaped(self._path(disk.path))},format={disk.format},if=virtio{readonly}"]
        return [*argv, *guest.args]

    @property
    def inherited(self) -> tuple[int, ...]:
        """The descriptors that QEMU is given by their numbers."""
        return (self._theirs.fileno(), *((self._initrd,) if self._initrd >= 0 else ()))

    @property
    def stderr_fd(self) -> int:
        """Where QEMU's own messages go."""
        return self._stderr_w

    def descriptors(self) -> tuple[int, ...]:
        """Return what is open for this machine here, which no other worker may hold open."""
        ends = (self._ours.fileno(), self._theirs.fileno(), self._stderr_r, self._stderr_w, self._initrd)
        return tuple(fd for fd in ends if fd >= 0)

    def stdio(self, stdin_fd: int, stdout_fd: int) -> tuple[int, int]:
        """Return what QEMU is to have as its standard input and output, for the caller's.

        It sets both to non-blocking, which whoever shares an opened terminal or pipe with it would have too: it gets
        them opened anew. Where the console is elsewhere it reads nothing.
        """
        if self.guest.console != "stdio":
            given = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC), stdout_fd
        else:
            given = _opened_anew(stdin_fd, os.O_RDONLY), _opened_anew(stdout_fd, os.O_WRONLY)
        self._opened = set(given) - {stdin_fd, stdout_fd}
        return given

    def _console(self) -> list[str]:
        kind, _, path = self.guest.console.partition(":")
        # The terminal's signals are hostpart's to pass on: QEMU is in a session of its own.
        ways = {
            "stdio": ("stdio", ""),
            "file": ("file", f",path={_escaped(self._path(path))}"),
            "unix": ("socket", f",path={_escaped(self._path(path))},server=on,wait=off"),
            "none": ("null", ""),
        }
        name, options = ways[kind]
        words = ["-chardev", f"{name},id=console{options}", "-serial", "chardev:console"]
        if self.guest.output:
            path = _escaped(self._path(self.guest.output))
            words += ["-chardev", f"file,id=output,path={path}", "-serial", "chardev:output"]
        return words

    def _path(self, path: str) -> str:
        return os.path.join(self._folder, path)

    def _look_for_files(self) -> None:
        # QEMU would say it too, but only when pCPUs are taken and others have been moved off them.
        guest = self.guest
        wanted = [("initrd", guest.initrd, os.R_OK)] if guest.initrd else []
        wanted += [("disk image", disk.path, os.R_OK | (0 if disk.readonly else os.W_OK)) for disk in guest.disks]
        for what, path, mode in wanted:
            full = self._path(path)
            if not os.path.exists(full):
                raise UsageError(
                    f"the {what} {full!r} of VM {self.name!r} is not there", "mend its path in the scenario file"
                )
            if not os.access(full, mode):
                raise NotPermitted(
                    f"the {what} {full!r} of VM {self.name!r} can't be {'written' if mode & os.W_OK else 'read'}",
                    f"see 'ls -l {full}'" + ("; or say readonly = true" if mode & os.W_OK else ""),
                )
        kind, _, path = guest.console.partition(":")
        for what, file in (("console", path), ("output", guest.output)):
            folder = os.path.dirname(self._path(file)) or "/"
            if file and not os.access(folder, os.W_OK | os.X_OK):
                raise UsageError(
                    f"the {what} {file!r} of VM {self.name!r} can't be made: {folder} is not there, or is not yours to"
                    " write", "name another path in the scenario file",
                )  # fmt: skip
        if path:
            if kind == "unix" and len(os.fsencode(self._path(path))) > 107:
                raise UsageError(
                    f"the console's path {self._path(path)!r} is longer than a unix socket's 107 bytes",
                    "name a shorter one",
                )
            if kind == "unix" and os.path.exists(self._path(path)) and not abandoned(self._path(path)):
                raise UsageError(
                    f"the console's path {self._path(path)!r} is taken: it is no socket that nobody listens at",
                    "name another path, or remove it",
                )

    # -- its threads -----------------------------------------------------------------------------------

    def forked(self, pid: int, relay_fd: int) -> None:
        """Say that the worker that becomes QEMU was forked; the descriptors that are its alone are closed here.

        :param relay_fd: where what it says on standard error is passed on to
        """
        self.pid, self._relay_fd = pid, _opened_anew(relay_fd, os.O_WRONLY)
        if self._relay_fd != relay_fd:
            os.set_blocking(self._relay_fd, False)
        self._theirs.close()
        os.close(self._stderr_w)
        self._stderr_w = -1
        if self._initrd >= 0:
            os.close(self._initrd)
            self._initrd = -1
        for fd in self._opened:
            os.close(fd)

    @property
    def monitor(self) -> Monitor:
        """The connection to QEMU, made when it is first needed: its import takes as long as QEMU does to start."""
        if self._monitor is None:
            from .monitor import Monitor

            self._monitor = Monitor(self.name, self._ours)
        return self._monitor

    def fds(self) -> tuple[int, ...]:
        """Return the descriptors that poll(2) has to wait for; :meth:`step` reads them."""
        found = [self._stderr_r] if self._stderr_r >= 0 else []
        if self._monitor is not None and self._monitor.fileno() >= 0:
            found.append(self._monitor.fileno())
        return tuple(found)

    def find_threads(self) -> bool:
        """Take a step towards knowing QEMU's vCPU threads; whether they are known now.

        :raises HostpartError: where QEMU has ended, or has other vCPUs than the VM
        """
        self._hear()
        if not self.monitor.connected():
            return False
        from .monitor import Silent

        try:
            there = self._query()
        except Silent:
            return False  # it may be locking its memory still
        seats = []
        for number, (pcpu, seat) in enumerate(zip(self._pcpus, self.mirror.seats, strict=True)):
            found = next(((tid, props) for tid, props in there if seat.is_of(props)), None)
            if found is None:
                raise Failed(
                    f"QEMU has not the vCPU of VM {self.name!r} that was asked for ({seat})",
                    'say topology = "flat" in [vm.qemu], and take -smp, -cpu and CPU devices out of args',
                )
            there.remove(found)
            tid, _ = found
            # What it says is only what it says: another process's thread is nothing to pin.
            if tid == self.pid or procfs.read_stat(self.pid, tid) is None:
                raise Failed(
                    f"QEMU of VM {self.name!r} has no thread of its own for vCPU {self.first + number}: it names thread"
                    f" {tid}, which {'runs its main loop' if tid == self.pid else 'is not one of its'}",
                    "see which program binary names in [vm.qemu], and take what is about CPUs out of args",
                )
            seats.append(Seat(self.first + number, pcpu, tid, seat.apic_id))
        if there or len({seat.tid for seat in seats}) != len(seats):
            raise Failed(
                f"QEMU runs several vCPUs of VM {self.name!r} in one thread"
                if not there
                else f"QEMU has {len(seats) + len(there)} vCPUs and VM {self.name!r} has {len(seats)}",
                "take what says so out of args: icount and thread=single, or -smp, -cpu and -device of CPUs",
            )
        self.seats = tuple(seats)
        return True

    def _query(self) -> list[tuple[int, dict[str, Any]]]:
        # Each vCPU that there is: its thread, and where it sits.
        answer = self.monitor.execute("query-cpus-fast")
        try:
            return [(int(cpu["thread-id"]), dict(cpu["props"])) for cpu in answer]
        except (TypeError, ValueError, KeyError):
            raise self.monitor.nonsense("query-cpus-fast") from None

    def pin(self, enter: str = "", scheduler: tuple[int, int] | None = None, nice: int | None = None) -> None:
        """Put each vCPU's thread on its pCPU, have every thread run there once, and read back that it did.

        :param enter: the file that its number is written to first, to enter the VM's cpuset
        :raises HostpartError: where the kernel refuses, or says otherwise; QEMU's guest has not run
        """
        for seat in self.seats:
            stage = "cpuset"
            try:
                if enter:
                    _write(enter, str(seat.tid))
                stage = "pin"
                os.sched_setaffinity(seat.tid, {seat.pcpu})
                if nice is not None:
                    stage = "nice"
                    os.setpriority(os.PRIO_PROCESS, seat.tid, nice)
                if scheduler is not None:
                    stage = "sched"
                    os.sched_setscheduler(seat.tid, scheduler[0], os.sched_param(scheduler[1]))
            except OSError as error:
                raise self._refused(seat, stage, error.errno or 0) from None
        # A thread that sleeps keeps the CPU that it ran on last, and would be counted as moved when it wakes. To be
        # stopped, each one has to run.
        self._run_once()
        for seat in self.seats:
            found, mask = procfs.read_stat(self.pid, seat.tid), procfs.allowed(self.pid, seat.tid)
            if found is None or mask != CpuSet.of([seat.pcpu]) or found.processor != seat.pcpu:
                where = f"may run on {mask} and ran on {found.processor}" if found else "is gone"
                raise Failed(
                    f"vCPU {seat.vcpu} of VM {self.name!r} is to be on pCPU {seat.pcpu}, and thread {seat.tid} {where}",
                    "see who else pins it, and run it again",
                )
        vcpus = {seat.tid for seat in self.seats}
        for tid in procfs.threads(self.pid):
            if tid not in vcpus:
                mask = procfs.allowed(self.pid, tid)
                if mask is not None and not mask <= self.kept:
                    raise Failed(
                        f"QEMU's thread {tid} of VM {self.name!r} may run on CPUs {mask}, not only on {self.kept}",
                        "see who else moves it, and run it again",
                    )
                self._known.add(tid)

    def _run_once(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        try:
            if not self._became(os.WSTOPPED, _STOP_S):
                raise Failed(
                    f"QEMU of VM {self.name!r} (pid {self.pid}) did not stop within {_STOP_S:g} s",
                    "the host may be overloaded: see 'uptime', and run it again",
                )
        except ChildProcessError:
            raise self.failure() from None
        finally:
            os.kill(self.pid, signal.SIGCONT)
        try:
            # News that would be heard as somebody else's later; there is none where somebody else has stopped it again.
            self._became(os.WCONTINUED, _CONTINUE_S)
        except ChildProcessError:
            pass

    def _became(self, what: int, limit_s: float) -> bool:
        until = time.monotonic() + limit_s
        while os.waitid(os.P_PID, self.pid, what | os.WNOHANG) is None:
            if time.monotonic() > until:
                return False
            time.sleep(0.0005)
        return True

    def _refused(self, seat: Seat, stage: str, number: int) -> HostpartError:
        why = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
        who = f"vCPU {seat.vcpu} of VM {self.name!r}"
        if stage in ("sched", "nice"):
            return NotPermitted(
                f"the kernel refused {stage} for {who}: {why}", "run it with sudo, or raise 'ulimit -r' and 'ulimit -e'"
            )
        return Failed(
            f"the kernel refused to {'pin' if stage == 'pin' else 'move'} {who} to pCPU {seat.pcpu}: {why}",
            "see 'grep Cpus_allowed_list /proc/self/status' and 'hostpart topology' for the pCPUs there are",
        )

    def meet_newcomers(self, leave: str = "") -> None:
        """Take threads that were not there at the last look away from a vCPU's pCPU, where they were born there; note
        one that is a vCPU as a breach.

        :param leave: the file that such a thread's number is written to first, to leave the VM's cpuset
        """
        own = {seat.tid for seat in self.seats}
        there = set(procfs.threads(self.pid)) - own
        new = sorted(there - self._known)
        self._known &= there
        self.born &= there
        self._known.update(new)
        if new and self._monitor is not None and not self._monitor.lost:
            self._look_for_more_vcpus(set(new))
        for tid in new:
            try:
                mask = CpuSet.of(os.sched_getaffinity(tid))
                if mask <= CpuSet.of(self._pcpus):
                    if leave:
                        _write(leave, str(tid))
                    os.sched_setaffinity(tid, self.kept)
                    self.born.add(tid)
                    self._births += 1
                    if _is_told(self._births):
                        comm = (procfs.read_stat(self.pid, tid) or _NOBODY).comm
                        said = f"QEMU's thread {comm!r} ({tid}) was born on pCPU {mask} and was taken to {self.kept}"
                        self.news.append(said + (f", the {self._births}th such" if self._births > 1 else ""))
            except OSError:
                continue  # it has ended since; or it may not be moved, and is met as one that is astray

    def _look_for_more_vcpus(self, new: set[int]) -> None:
        try:
            there = [tid for tid, _ in self._query()]
        except HostpartError:
            return
        for tid in sorted(new.intersection(there)):
            self.breach(
                f"QEMU has a vCPU more than the VM: thread {tid}, which somebody has plugged in, has no pCPU of its own"
            )

    def breach(self, text: str) -> None:
        """Note that QEMU is not the machine that hostpart made."""
        self.breaches.append(text)
        self.news.append(text)

    def gone(self) -> list[Seat]:
        """Return the vCPUs whose threads have ended while QEMU goes on: somebody has unplugged them."""
        if self.ended is not None or self.must_end:
            return []
        there = set(procfs.threads(self.pid))
        missing = {seat.tid for seat in self.seats if there and seat.tid not in there}
        # The threads of a process that is killed end one by one, too: then QEMU does not answer, and is gone soon.
        if missing and self._monitor is not None and not self._monitor.lost:
            try:
                missing -= {tid for tid, _ in self._query()}
            except HostpartError:
                missing.clear()
        found = missing if self._monitor is not None and not self._monitor.lost else missing & self._missing
        self._missing = missing
        return [seat for seat in self.seats if seat.tid in found]

    # -- its life --------------------------------------------------------------------------------------

    def start(self) -> None:
        """Let the guest run its first instruction.

        :raises HostpartError: where QEMU does not
        """
        self.monitor.execute("cont")
        self._going = True

    def step(self) -> None:
        """Hear what QEMU has to say; never waits."""
        self._hear()
        if self._monitor is None:
            return
        was = self._monitor.lost
        self._monitor.step()
        events = self._monitor.events()
        for name, data in events:
            self._take(name, data)
        if any(name in ("STOP", "RESUME") for name, _ in events) and not self.ended and not self.must_end:
            self._check_state()
        if self._monitor.lost and not was and self._going and not self.ended and not self.must_end and self.alive():
            self.news.append(
                f"the QMP connection to QEMU is gone ({self._monitor.lost}): the guest runs on and stays where it is;"
                " 'pause' stops QEMU's process now, and 'stop' ends it without asking the guest"
            )

    def _take(self, name: str, data: dict[str, Any]) -> None:
        if name == "GUEST_PANICKED":
            self.ended = self._end_of("guest-panic")
        elif name == "SHUTDOWN" and self.ended is None:  # it says so again when it quits
            self.ended = self._end_of(str(data.get("reason", "")))
        elif name == "RESET":
            self.resets += 1
            if data.get("guest") and _is_told(self.resets):
                times = "" if self.resets == 1 else f" {self.resets} times"
                self.news.append(f"the guest has restarted itself{times}; its vCPUs are where they were")

    def _end_of(self, reason: str) -> Ended:
        if reason == "guest-reset" and self._asked:
            return Ended("the guest was reset when it was asked to power off")
        if reason == "guest-reset" and self.guest.run is not None:
            said = (
                "its command ended with another status than 0, it was rebooted, or its kernel panicked: see its console"
            )
            return Ended(f"the guest failed: {said}", failed=True)
        if reason == "guest-reset":
            return Ended(
                'the guest reset itself, which on_reboot = "end" makes its end: a reboot, or a panic of its kernel; '
                "see its console", failed=True,
            )  # fmt: skip
        if reason == "guest-panic":
            return Ended("the guest's kernel panicked: see its console", failed=True)
        if reason.startswith("host") and not self.must_end:
            return Ended(f"QEMU was told to end by somebody else ({reason})", failed=True)
        return Ended("the guest powered off" if reason == "guest-shutdown" else f"QEMU ended the guest ({reason})")

    def _check_state(self) -> None:
        # Which of the two came last, and whose doing it was, is for QEMU to say: others may have a monitor too.
        try:
            found = self.monitor.query("query-status")
            if self._paused and found.get("running") is True:
                self.monitor.execute("stop")
                self.news.append("somebody else let the guest go on while the VM is paused; it was stopped again")
        except HostpartError:
            return
        status = found.get("status")
        self.halted = status in ("paused", "io-error", "watchdog", "suspended") and not self._paused
        if status == "internal-error":
            self.ended = Ended("QEMU met an internal error and stopped the guest: see its own messages", failed=True)
        elif self.halted:
            self.news.append(f"the guest was stopped, not by hostpart ({status}); 'hostpart resume' lets it go on")

    def alive(self) -> bool:
        """Whether QEMU's process runs."""
        found = procfs.read_stat(self.pid) if self.pid else None
        return found is not None and not found.dead

    def pause(self) -> bool:
        """Have QEMU stop its vCPUs; whether it says that it has. Else there is still its process to be stopped."""
        try:
            # One that does not answer may do it later all the same.
            self._paused = not self.monitor.lost
            self.monitor.execute("stop")
            return self.monitor.query("query-status").get("running") is False
        except HostpartError:
            return False

    def resume(self) -> bool:
        """Let the guest go on, whoever has stopped it; whether it does."""
        try:
            self.monitor.execute("cont")
        except HostpartError:
            return not self._paused and not self.halted
        self._paused = self.halted = False
        return True

    def power_down(self) -> bool:
        """Press the guest's power button; whether QEMU has done that."""
        try:
            self._asked = True
            if self._paused or self.halted:
                self.resume()
            self.monitor.execute("system_powerdown", limit_s=1.0)
            if self.guest.run is not None:
                # Where the kernel has no driver for the button, the built-in guest takes these keys for the same.
                keys = [{"type": "qcode", "data": key} for key in ("ctrl", "alt", "delete")]
                self.monitor.execute("send-key", {"keys": keys}, limit_s=1.0)
        except HostpartError:
            return False
        return True

    def quit(self) -> None:
        """Have QEMU end: it writes out what its disks still have to get. Its process is the keeper's to wait for."""
        if self.must_end:
            return
        self.must_end = time.monotonic() + _QUIT_S
        try:
            self.monitor.execute("quit", limit_s=1.0)
        except HostpartError:
            try:
                os.kill(self.pid, signal.SIGTERM)
                os.kill(self.pid, signal.SIGCONT)
            except ProcessLookupError:
                pass

    def failure(self) -> HostpartError:
        """Word the end of a QEMU whose guest has not run, by its own last words."""
        self._hear()
        lines = [line for line in self._words.decode("utf-8", "replace").splitlines() if line.strip()]
        # Hints follow what is wrong, which it begins with its own name.
        own = [line for line in lines if line.startswith(os.path.basename(self.binary))] or lines
        said = (
            own[-1].partition(": ")[2] or own[-1]
            if own
            else "it gave no reason (does args have -daemonize, or something that asks for help?)"
        )
        return Failed(
            f"QEMU ended before the guest of VM {self.name!r} ran: {said}",
            f"mend what it says in [vm.qemu], or try its command: {self.binary} -accel help; -machine help; -cpu help",
        )

    def _hear(self) -> None:
        # QEMU's own messages, passed on as they are; a pipe because the last of them is why it ended.
        while self._stderr_r >= 0:
            try:
                part = os.read(self._stderr_r, 65536)
            except BlockingIOError:
                break
            if not part:
                os.close(self._stderr_r)
                self._stderr_r = -1
                break
            self._words = (self._words + part)[-_LAST_WORDS:]
            self._unsaid = (self._unsaid + part)[:_UNSAID]
        self._pass_on()

    def _pass_on(self) -> None:
        # Never waits for a reader: what is left is tried again, and what is too much is left out.
        poll = select.poll()
        poll.register(self._relay_fd, select.POLLOUT)
        try:
            while self._unsaid and poll.poll(0):
                self._unsaid = self._unsaid[os.write(self._relay_fd, self._unsaid[: select.PIPE_BUF]) :]
        except BlockingIOError:
            pass
        except OSError:
            self._unsaid = b""  # nobody reads it any more

    @property
    def socket_path(self) -> str:
        """Where the console's socket is; empty where there is none."""
        kind, _, path = self.guest.console.partition(":")
        return self._path(path) if kind == "unix" else ""

    def close(self) -> None:
        """Close what is open, and remove the console's socket, where nobody listens at it any more; QEMU is gone."""
        self._hear()
        for fd in (self._stderr_r, self._stderr_w, self._initrd):
            if fd >= 0:
                os.close(fd)
        self._stderr_r = self._stderr_w = self._initrd = -1
        self._theirs.close()
        if self._monitor is not None:
            self._monitor.close()
        self._ours.close()
        # QEMU removes it when it ends in order.
        try:
            if self.socket_path and abandoned(self.socket_path):
                os.unlink(self.socket_path)
        except OSError:
            pass

    def to_json(self) -> dict[str, Any]:
        """Return what there is to say of the machine, for the evidence."""
        return {
            "pid": self.pid,
            "accelerator": self.accelerator.name,
            "accelerator_why": self.accelerator.why or None,
            "emulator_pcpus": str(self.kept),
            "topology": list(self.mirror.arguments),
            "not_mirrored": list(self.mirror.notes),
            "vcpus": [{"vcpu": seat.vcpu, "tid": seat.tid, "apic_id": seat.apic_id} for seat in self.seats],
            "resets": self.resets,
            "end": None if self.ended is None else self.ended.text,
        }


_ARCHITECTURES = {"i686": "i386", "arm64": "aarch64", "armv7l": "arm"}
_NOBODY = procfs.Stat(0, "?", "X", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)


def _need_qmp() -> None:
    # Its import takes as long as QEMU does to start, and is made meanwhile.
    from importlib.util import find_spec

    try:
        there = find_spec("qemu.qmp")
    except ImportError:
        there = None
    if there is None:
        raise UsageError(
            "guests under QEMU need the package qemu.qmp, which is not installed", "pip install 'hostpart[qemu]'"
        )


def _is_told(count: int) -> bool:
    # What happens over and over is not to fill the evidence: the 1st, the 10th, the 100th.
    return str(count).strip("0") == "1"


def _opened_anew(fd: int, way: int) -> int:
    try:
        mode = os.fstat(fd).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):
            # A named pipe whose other end is gone would be waited for.
            new = os.open(f"/proc/self/fd/{fd}", way | os.O_NOCTTY | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(new, True)
            return new
    except OSError:
        pass  # such as a terminal of another user's: shared, it works too
    return fd


def _escaped(text: str) -> str:
    return text.replace(",", ",,")  # in QEMU's options a comma ends a value


def _write(path: str, text: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)
