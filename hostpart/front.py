"""The front: the process that the user started, with the terminal, the signals and the exit code.

It forks a keeper per VM, holds the leases beside them, and is a subreaper: if a keeper is killed, what that
keeper's guest had orphaned comes here and is ended here. It is single-threaded and waits in one place, for signals:
children that end (SIGCHLD), keepers that say something (SIGIO) and what the user sends. ``sigwaitinfo`` tells
whether a SIGINT came from the terminal, whose whole job got it, or from ``kill``, which meant the front alone and
has to be passed on.
"""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import time

from workers import crash

from . import lease, procfs, recovery, tree
from .cpuset import CpuSet
from .errors import Failed, HostpartError
from .keeper import fork_keeper
from .ledger import Ledger

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from .channel import Channel
    from .config import ServiceVm, VmConfig
    from .device_model import Caller
    from .keeper import Options
    from .topology import Topology

__all__ = ["Front", "Interrupted", "Reported", "Running", "exit_code"]

GRACE_S = 5.0  # between SIGTERM and SIGKILL, when a user asks for the end
_SI_KERNEL = 0x80  # siginfo's si_code of what the kernel itself sends, such as a terminal's SIGINT
_WAITED = (
    signal.SIGCHLD,
    signal.SIGIO,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGTSTP,
    signal.SIGUSR1,
    signal.SIGUSR2,
)
_PASSED_ON = (signal.SIGINT, signal.SIGQUIT, signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2)


class Reported(HostpartError):
    """An error that a keeper met, in its words."""

    def __init__(self, exit_code: int, problem: str, remedy: str) -> None:
        super().__init__(exit_code, problem, remedy)
        self.exit_code, self.problem, self._remedy = exit_code, problem, remedy

    def __str__(self) -> str:
        return self.problem

    @property
    def remedy(self) -> str:
        return self._remedy


class Interrupted(Exception):
    """The user ended it before any guest ran; nothing is left.

    :ivar number: the signal
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class Running:
    """One keeper as the front sees it.

    :ivar created: its ``created`` message once the VM has its pCPUs; so for *ready*, *ended*, *booted*
    :ivar error: why it failed
    :ivar over: whether the keeper has said its last word, or is gone
    """

    def __init__(self, name: str, pid: int, channel: Channel) -> None:
        self.name, self.pid, self.channel = name, pid, channel
        self.said: dict[str, dict[str, Any]] = {}
        self.error: HostpartError | None = None
        self.over = self.reaped = False

    def has(self, event: str) -> bool:
        """Whether the keeper has said *event*; raise its error where it failed or was ended instead."""
        if self.error is not None:
            raise self.error
        if "cancelled" in self.said:
            raise Failed(f"VM {self.name!r} was ended before its guest ran", "run it again")
        return event in self.said


def exit_code(statuses: list[int]) -> int:
    """Return a shell's exit code for the wait statuses of a VM's vCPUs: the first that is not 0, 128+N for signal N."""
    for status in statuses:
        code = 128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
        if code:
            return code
    return 0


class Front:
    """The front of one command.

    :param topology: the host's pCPUs
    :param caller: what the guests inherit
    :param stop_on_interrupt: SIGINT ends everything (``launch``); else the guests decide (``run``, as env(1))
    :param hear: called with each message of a keeper, for progress and events
    """

    def __init__(
        self,
        topology: Topology,
        caller: Caller,
        *,
        stop_on_interrupt: bool,
        hear: Callable[[Running, dict[str, Any]], None] = lambda *_: None,
    ) -> None:
        self.topology, self.caller = topology, caller
        self.keepers: list[Running] = []
        self.stopped_by: int | None = None
        self._stop_on_interrupt, self._hear = stop_on_interrupt, hear
        self._started = False
        self._affinity = os.sched_getaffinity(0)
        self._modes: list[Any] | None = None
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        tree.adopt()

    def start(self, config: VmConfig, service: ServiceVm, options: Options) -> Running:
        """Fork the keeper of a user VM; it goes to work at once.

        :raises OSError: where no process or descriptor can be had
        """
        channels = [keeper.channel for keeper in self.keepers if not keeper.reaped]
        try:
            crash.point("front.start")
            pid, channel = fork_keeper(config, service, self.topology, self.caller, options, channels)
            crash.point("front.forked")
        except OSError as error:
            raise Failed(
                f"no keeper can be started for VM {config.name!r}: {error.strerror}",
                "see the limits with 'ulimit -a' (processes, open files) and end what is not needed",
            ) from None
        return self.watch(config.name, pid, channel)

    def watch(self, name: str, pid: int, channel: Channel) -> Running:
        """Take a keeper's channel into the wait."""
        self.listen(channel.fileno())
        running = Running(name, pid, channel)
        self.keepers.append(running)
        return running

    def listen(self, fd: int) -> None:
        """Have :meth:`wait` look again when there is something to read from *fd*."""
        fcntl.fcntl(fd, fcntl.F_SETOWN, os.getpid())
        fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_ASYNC)

    def keep_terminal(self) -> None:
        """Note how the terminal is set, to set it so again at the end: a guest's console changes that, and one that is
        killed does not put it back."""
        import termios

        try:
            self._modes = termios.tcgetattr(0)
        except termios.error:
            pass  # it is none

    def go(self) -> None:
        """Tell keepers that hold to START their guests."""
        self._started = True
        for keeper in self.keepers:
            keeper.channel.send({"do": "start"})

    def running(self) -> None:
        """Say that guests run: a signal to stop lets them end first."""
        self._started = True

    def wait(self, done: Callable[[], bool]) -> None:
        """Wait until *done*, passing on messages and signals.

        :raises Interrupted: where the user ended it before any guest ran
        """
        while True:
            self._pump()
            finished = done()
            # Also when it is over already: a Ctrl-C that ended the guest is why.
            found = signal.sigtimedwait(_WAITED, 0 if finished else 1.0)
            if found is not None:
                self._signalled(found)
            elif finished:
                return

    def stop(self, grace_s: float | None = None) -> None:
        """Ask all keepers to end their VMs.

        :param grace_s: what their guests have until they are killed; None: what each VM takes for usual
        """
        for keeper in self.keepers:
            if not keeper.over:
                keeper.channel.send({"do": "stop", "grace_s": grace_s})

    def end(self) -> None:
        """Wait for all keepers to be gone, stopping those that are not asked yet; then give the terminal back."""
        if any(not keeper.over for keeper in self.keepers):
            self.stop(0.0)
        while any(not keeper.reaped for keeper in self.keepers):
            self._pump()
            if any(not keeper.reaped for keeper in self.keepers):
                signal.sigtimedwait((signal.SIGCHLD, signal.SIGIO), 0.2)
        for keeper in self.keepers:
            keeper.channel.close()
        _take_back()
        if self._modes is not None:
            _set_again(self._modes)
        os.sched_setaffinity(0, self._affinity)
        # What was sent meanwhile has been heard: it must not be met a second time now.
        while signal.sigtimedwait(_WAITED, 0) is not None:
            continue
        signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    # -- inside ----------------------------------------------------------------------------------------

    def _pump(self) -> None:
        for keeper in self.keepers:
            if not keeper.reaped:
                for message in keeper.channel.receive():
                    self._take(keeper, message)
        while True:
            try:
                pid, _ = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            for keeper in self.keepers:
                if keeper.pid == pid:
                    self._gone(keeper)

    def _take(self, keeper: Running, message: dict[str, Any]) -> None:
        event = message["event"]
        keeper.said[event] = message
        if event == "error":
            keeper.error = Reported(message["exit_code"], message["problem"], message["remedy"])
        if event == "created":
            # What a front does is the service VM's work: it stays where no guest will be.
            kept = frozenset(CpuSet.parse(message["kept"]))
            # Above level affinity it was moved with all other tasks, and will be moved back with them.
            if kept and message["isolation"]["reached"] == "affinity":
                os.sched_setaffinity(0, kept)
        if event == "stopped":
            self._stop_too()
        crash.point(f"front.{event}")
        keeper.over = keeper.over or event in ("ended", "error", "cancelled")
        self._hear(keeper, message)

    def _gone(self, keeper: Running) -> None:
        for message in keeper.channel.receive():
            self._take(keeper, message)
        keeper.reaped = True
        if keeper.over:
            return
        crash.point("front.lost")
        # Killed: its workers died with it, and the orphans of its guest are this process's children now.
        keeper.over = True
        left = self._end_orphans()
        try:
            with Ledger() as ledger:
                recovery.recover(ledger)
                recovery.put_back(ledger)
        except HostpartError as problem:
            say(f"{problem}\ntry: {problem.remedy}")  # the other VMs go on
        if not left:
            for fd in keeper.channel.fds:
                lease.release(fd)
            keeper.channel.fds.clear()
        keeper.error = Failed(
            f"the keeper of VM {keeper.name!r} (pid {keeper.pid}) was killed; "
            + (f"{left} of its processes could not be ended" if left else "its guest was ended and its pCPUs are free"),
            "see 'hostpart restore --dry-run', and have root end them" if left else "run it again",
        )
        self._hear(keeper, {"event": "lost"})

    def _end_orphans(self) -> int:
        live = [keeper.pid for keeper in self.keepers if not keeper.reaped]
        until = time.monotonic() + 5.0
        while True:
            members = tree.descendants(os.getpid(), skip=live)
            if not members or time.monotonic() > until:
                return len(members)
            tree.kill(members)
            time.sleep(0.002)
            for member in members:
                # Those that are children of this process by now; the others have a parent that is being ended too.
                try:
                    os.waitpid(member.pid, os.WNOHANG)
                except ChildProcessError:
                    continue

    def _signalled(self, found: signal.struct_siginfo) -> None:
        number = found.si_signo
        if number in (signal.SIGCHLD, signal.SIGIO):
            return
        from_terminal = found.si_code == _SI_KERNEL
        stops = number in (signal.SIGTERM, signal.SIGHUP) or (number == signal.SIGINT and self._stop_on_interrupt)
        if not self._started and number not in (signal.SIGTSTP, signal.SIGUSR1, signal.SIGUSR2):
            self.stop(0.0)
            raise Interrupted(number)
        if stops:
            self.stopped_by = self.stopped_by or number
            for keeper in self.keepers:
                if not keeper.over:
                    keeper.channel.send({"do": "stop", "grace_s": None, "number": int(number)})
        elif number in _PASSED_ON and not from_terminal:
            self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        for keeper in self.keepers:
            if not keeper.over:
                keeper.channel.send({"do": "signal", "number": int(number)})

    def _stop_too(self) -> None:
        # A terminal stops a job whole, and its shell has its turn when this process stops: not before the guests
        # have, which may mind the signal, or stop of themselves (`suspend`). News may be old: what runs again is
        # not to be stopped.
        ready = [keeper.said["ready"] for keeper in self.keepers if not keeper.over and "ready" in keeper.said]
        pids = [vcpu["pid"] for message in ready for vcpu in message["vcpus"]]
        stats = [procfs.read_stat(pid) for pid in pids]
        if any(stat is not None and not stat.dead and stat.state != "T" for stat in stats):
            return
        tty = _terminal()
        if tty is None:
            return
        had = _job_of(tty)
        os.kill(os.getpid(), signal.SIGSTOP)
        # A guest shell has a job of its own, which the user's shell knows nothing of: `fg` gave the terminal to this.
        if had not in (-1, os.getpgrp()) and _job_of(tty) == os.getpgrp():
            _give(tty, had)
        os.close(tty)
        # Nor did its SIGCONT reach a guest that has one. To others a second would come late, after the next stop.
        if any(_group_of(pid) not in (-1, os.getpgrp()) for pid in pids):
            self._pass_on(signal.SIGCONT)


def _terminal() -> int | None:
    try:
        return os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None  # there is none, or it is gone


def _take_back() -> None:
    # A guest that is a shell gives the terminal to its own jobs; killed, it does not give it back.
    tty = _terminal()
    if tty is None:
        return
    try:
        # Only from a job that has no process left: the shell may have put this one into the background meanwhile.
        os.killpg(os.tcgetpgrp(tty), 0)
    except ProcessLookupError:
        _give(tty, os.getpgrp())
    except OSError:
        pass  # it is somebody's
    os.close(tty)


def _set_again(modes: list[Any]) -> None:
    import termios

    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        termios.tcsetattr(0, termios.TCSADRAIN, modes)
    except termios.error:
        pass  # it is gone
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _group_of(pid: int) -> int:
    try:
        return os.getpgid(pid)
    except ProcessLookupError:
        return -1


def _job_of(tty: int) -> int:
    try:
        return os.tcgetpgrp(tty)
    except OSError:
        return -1  # the terminal is gone


def _give(tty: int, pgrp: int) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGTTOU,))
    try:
        os.tcsetpgrp(tty, pgrp)
    except OSError:
        pass  # the terminal, or that job, is gone
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def say(text: str) -> None:
    """Write one line of hostpart's own to stderr."""
    sys.stderr.write(f"hostpart: {text}\n")
    sys.stderr.flush()
