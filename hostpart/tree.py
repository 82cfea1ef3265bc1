"""The processes below one process: find them, stop them, let them run again, end them.

The process on top is a subreaper: whatever its guest orphans becomes its child again, so nothing a
guest forks leaves the tree, however it daemonizes. Two limits: a process that this user may not
signal (one that runs as another user after a set-uid exec) is named and left, and a guest that does
nothing but fork and end, faster than one look takes, can outrun the looks. Everything here is
bounded in time and says what it did not achieve. Where a cgroup can be had, :mod:`hostpart.cgroup`
does both without these limits.

A signal goes through a pidfd, after the start time has been compared: a number that is in use again
is never hit. Deciding when to do any of this is left to the caller.
"""

from __future__ import annotations

import os
import signal
import time

from workers.vcpu import prctl

from . import procfs
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from .procfs import Stat

__all__ = [
    "Ended",
    "Frozen",
    "Member",
    "adopt",
    "below",
    "descendants",
    "end",
    "find_by_environment",
    "freeze",
    "kill",
    "member",
    "thaw",
]

_PR_SET_CHILD_SUBREAPER = 36
_WALL = 0x40000000  # __WALL of <linux/wait.h>: children of any kind of clone(2)
_SETTLE_S = 0.1  # how long a look that can't get any better is repeated
_COURTESY_S = 0.1  # how long a freeze waits, in all, for parents to stop before it goes on to their children


class Member(Value):
    """One living process of a tree, as it was when looked at.

    :ivar start: clock ticks since boot; with *pid* it names the process for good
    :ivar parent: its parent's pid
    :ivar depth: 1 for a child of the root; 0 where no root was walked from
    :ivar state: the letter of ``/proc/PID/stat``; from :func:`freeze`, of a thread that had not stopped
    :ivar reaped: how long the children that it has waited for ran, and theirs, in clock ticks
    """

    pid: int
    start: int
    parent: int
    depth: int
    state: str
    reaped: int = 0


class Frozen(Value):
    """What :func:`freeze` did.

    :ivar stopped: exactly those it sent a stop, parents first: for :func:`thaw`
    :ivar loose: those of the tree that had not stopped when it gave up, refused ones included
    :ivar settled: whether the last looks agreed, with nobody born or ended between them
    """

    stopped: tuple[Member, ...]
    loose: tuple[Member, ...] = ()
    settled: bool = True

    @property
    def holds(self) -> bool:
        """Whether no member runs an instruction of its own.

        State ``D`` is inside the kernel with the stop pending, which it meets before it returns: a
        parent in vfork(2) stays so for as long as its child is stopped.
        """
        return self.settled and all(member.state == "D" for member in self.loose)


class Ended(Value):
    """What :func:`end` did.

    :ivar killed: how many processes it sent a kill
    :ivar survivors: those that were there when it gave up: another user's, or in the kernel (state ``D``)
    """

    killed: int
    survivors: tuple[Member, ...] = ()


def adopt() -> None:
    """Become a subreaper: orphans below this process become its children."""
    prctl(_PR_SET_CHILD_SUBREAPER, 1)


def descendants(root: int, skip: Collection[int] = ()) -> list[Member]:
    """Return the living processes below *root*, each after its parent; *root* itself and zombies are left out.

    A zombie main thread with other threads alive is a living process. One that is born or whose
    parent ends during the look may be missing: whoever needs all of them looks until nothing changes.

    :param skip: pids to leave out, with everything below them
    """
    return [_member(stat, depth) for stat, depth in _walk(root, skip)]


def member(pid: int) -> Member | None:
    """Return process *pid* as a root, at depth 0; None if it is gone, or a zombie."""
    stat = procfs.read_stat(pid)
    return None if stat is None or stat.dead else _member(stat, 0)


def below(members: Iterable[Member], pid: int) -> list[Member]:
    """Return *pid* and what is below it, out of *members*, which come each after its parent."""
    inside = {pid}
    found: list[Member] = []
    for member in members:
        if member.pid == pid or member.parent in inside:
            inside.add(member.pid)
            found.append(member)
    return found


def freeze(root: int, skip: Collection[int] = (), patience_s: float = 1.0) -> Frozen:
    """Stop everything below *root*: parents first, and again until two looks find nothing running and nobody ended.

    What was stopped before, by job control or by a tracer, is left alone and stays so after
    :func:`thaw`; a process counts as stopped when all its threads are. Where nothing more will change
    (the rest is in the kernel, or not this user's to stop) it gives up early.

    :param skip: pids to leave running, with everything below them
    :param patience_s: the longest it goes on
    """
    stopped: dict[tuple[int, int], Member] = {}
    refused: set[tuple[int, int]] = set()
    begin = time.monotonic()
    changed, nap, clean, courtesy = begin, 0.0005, 0, _COURTESY_S
    ended_before: set[tuple[int, int]] = set()
    while True:
        loose: list[Member] = []
        ended: set[tuple[int, int]] = set()
        for stat, depth in _walk(root, skip, ended):
            moving = _moving(stat)
            if not moving:
                continue
            key = stat.pid, stat.start
            member = _member(stat, depth, moving)
            loose.append(member)
            if key in refused:
                continue
            # Again also where it was sent before: another guest process may have continued it.
            try:
                sent = _send(member, signal.SIGSTOP)
            except PermissionError:
                refused.add(key)
                continue
            if sent and key not in stopped:
                stopped[key] = member
                changed = time.monotonic()
                courtesy -= _let_stop(stat, courtesy)
        # Whoever ended since the last look may have left a child where this one had been already.
        quiet = ended <= ended_before
        clean = clean + 1 if quiet and not loose else 0
        ended_before = ended
        now = time.monotonic()
        hopeless = all(member.state == "D" or (member.pid, member.start) in refused for member in loose)
        if clean == 2 or now - begin >= patience_s or (loose and hopeless and now - changed >= _SETTLE_S):
            return Frozen(
                tuple(sorted(stopped.values(), key=_depth)), tuple(loose), clean == 2 or (quiet and bool(loose))
            )
        if not clean:
            time.sleep(nap)
            nap = min(2 * nap, 0.01)


def thaw(members: Iterable[Member]) -> None:
    """Let *members* run again, children before their parents; whatever is gone since, or refused, is passed over.

    A parent that ran first would see its children as stopped, and a shell would say so.
    """
    for member in sorted(members, key=_depth, reverse=True):
        try:
            _send(member, signal.SIGCONT)
        except PermissionError:
            continue


def kill(members: Iterable[Member]) -> list[Member]:
    """Send SIGKILL to *members*, in their order; return those that this user may not signal."""
    refused: list[Member] = []
    for member in members:
        try:
            _send(member, signal.SIGKILL)
        except PermissionError:
            refused.append(member)
    return refused


def end(root: int, reap: Callable[[int], None] | None = None, patience_s: float = 2.0) -> Ended:
    """Kill everything below *root*, again and again, until nothing is left.

    Where *root* is the calling process its ended children are reaped, and that it has no child any more
    is the proof: the kernel gives a subreaper every orphan. That is one system call where nothing was left to do.

    :param reap: called with the pid of each ended child of this process while it is a zombie that can
        still be read; it may reap it (``os.wait4(pid, 0)``), else it is reaped afterwards
    :param patience_s: the longest it goes on
    """
    own = root == os.getpid()
    killed: set[tuple[int, int]] = set()
    begin = changed = time.monotonic()
    nap, clean = 0.0002, 0
    while True:
        if own and _reap(reap):
            return Ended(len(killed))
        alive: list[Member] = []
        hopeless = True
        for stat, depth in _walk(root):
            member = _member(stat, depth)
            try:
                sent = _send(member, signal.SIGKILL)
            except PermissionError:
                alive.append(member)
                continue
            if not sent:
                continue
            alive.append(member)
            hopeless = False
            if (member.pid, member.start) not in killed:
                killed.add((member.pid, member.start))
                changed = time.monotonic()
        clean = 0 if alive or own else clean + 1
        now = time.monotonic()
        if clean == 2 or now - begin >= patience_s or (alive and hopeless and now - changed >= _SETTLE_S):
            return Ended(len(killed), tuple(alive))
        time.sleep(nap)
        nap = min(2 * nap, 0.01)


def find_by_environment(name: str, value: str, uid: int | None = None) -> list[Member]:
    """Return the processes that were started with *name* = *value* in their environment, by pid.

    For what a dead owner has left. The caller is not among them, its ancestors may be. What has
    overwritten or cleared its environment isn't found, nor what this user may not read.

    :param uid: only processes of this real user id; by default of any, since a guest of root's may run as another user
    """
    wanted = b"\0" + os.fsencode(name) + b"=" + os.fsencode(value) + b"\0"
    this = os.getpid()
    found: list[Member] = []
    for pid in procfs.processes():
        if pid == this or (stat := procfs.read_stat(pid)) is None or stat.dead:
            continue
        block = procfs.environ_block(pid)
        if block is None or wanted not in b"\0" + block:
            continue
        # The start time is from before the environment: a pid taken anew in between fails the check at the signal.
        if uid is None or ((status := procfs.read_status(pid)) is not None and status.uid == uid):
            found.append(_member(stat, 0))
    return found


def _depth(member: Member) -> int:
    return member.depth


def _member(stat: Stat, depth: int, state: str = "") -> Member:
    return Member(stat.pid, stat.start, stat.ppid, depth, state or stat.state, stat.cutime + stat.cstime)


def _send(member: Member, number: int) -> bool:
    # Whether it was there to be sent to.
    try:
        fd = os.pidfd_open(member.pid)
    except ProcessLookupError:
        return False
    try:
        if procfs.start_time(member.pid) != member.start:
            return False
        signal.pidfd_send_signal(fd, number)
    except ProcessLookupError:
        return False
    finally:
        os.close(fd)
    return True


def _reap(reap: Callable[[int], None] | None) -> bool:
    # Whether this process has no child left.
    while True:
        try:
            ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL)
        except ChildProcessError:
            return True
        if ended is None:
            return False
        if reap is not None:
            reap(ended.si_pid)
        try:
            os.waitpid(ended.si_pid, os.WNOHANG | _WALL)
        except ChildProcessError:
            continue


def _let_stop(stat: Stat, patience_s: float) -> float:
    # How long it took. A shell asleep in wait(2) wakes up to stop, and looks at its children once more on the way: one
    # that has stopped by then is taken for a job that the user suspended.
    begin = time.monotonic()
    spent = 0.0
    while spent < patience_s:
        now = procfs.read_stat(stat.pid)
        if now is None or now.dead or _moving(now) in ("", "D"):
            break
        time.sleep(0.0001)
        spent = time.monotonic() - begin
    return spent


def _moving(stat: Stat) -> str:
    # The state of a thread that is not stopped; "" if all are. "D" only if there is no worse.
    if stat.threads == 1:
        return "" if stat.state in "Tt" else stat.state
    worst = ""
    for tid in procfs.threads(stat.pid):
        thread = procfs.read_stat(stat.pid, tid)
        if thread is None or thread.state in "TtZXx":
            continue
        if thread.state != "D":
            return thread.state
        worst = "D"
    return worst


def _walk(
    root: int, skip: Collection[int] = (), ended: set[tuple[int, int]] | None = None
) -> Iterator[tuple[Stat, int]]:
    # Each process is handed out as soon as it is known, so that a signal follows the look at once: what
    # forks and ends in between is met at some look, not at none. Into ended goes who is met dead, by pid and start.
    ended = set() if ended is None else ended
    if procfs.children(root, root) is None:
        return _walk_scan(root, skip, ended)
    return _walk_children(root, skip, ended)


def _walk_children(root: int, skip: Collection[int], ended: set[tuple[int, int]]) -> Iterator[tuple[Stat, int]]:
    inside = {root, *skip}
    level: list[tuple[int, bool]] = [(root, True)]
    depth = 0
    while level:
        depth += 1
        below: list[tuple[int, bool]] = []
        for pid, many in level:
            for tid in procfs.threads(pid) if many else (pid,):
                # The newest first: where one forks and ends all the time, the rest of a long list are its zombies.
                for child in reversed(procfs.children(pid, tid) or []):
                    if child in inside:
                        continue
                    stat = procfs.read_stat(child)
                    if stat is None or stat.dead:
                        ended.add((child, stat.start if stat else -1))
                        continue
                    # Its parent ended meanwhile: then the root or another reaper within has it, or its number is
                    # somebody else's by now.
                    if stat.ppid not in inside or stat.ppid in skip:
                        continue
                    inside.add(child)
                    below.append((child, stat.threads > 1))
                    yield stat, depth
        level = below


def _walk_scan(root: int, skip: Collection[int], ended: set[tuple[int, int]]) -> Iterator[tuple[Stat, int]]:
    depth = {root: 0}
    waiting: dict[int, list[Stat]] = {}
    dead: list[Stat] = []

    def enter(stat: Stat) -> Iterator[tuple[Stat, int]]:
        ready = [stat]
        while ready:
            one = ready.pop()
            if one.pid in skip or one.pid in depth:
                continue
            depth[one.pid] = depth[one.ppid] + 1
            yield one, depth[one.pid]
            ready += waiting.pop(one.pid, ())

    for pid in _user_processes(root):
        stat = procfs.read_stat(pid)
        if stat is None:
            continue
        if stat.dead:
            dead.append(stat)
        elif stat.ppid in depth:
            yield from enter(stat)
        else:
            waiting.setdefault(stat.ppid, []).append(stat)
    # A parent that ended between its own turn and its child's: the child has a new one.
    for parent in [parent for parent in waiting if not os.path.exists(f"/proc/{parent}")]:
        for orphan in waiting.pop(parent, ()):
            stat = procfs.read_stat(orphan.pid)
            if stat is not None and not stat.dead and stat.start == orphan.start and stat.ppid in depth:
                yield from enter(stat)
    ended.update((stat.pid, stat.start) for stat in dead if stat.ppid in depth)


def _user_processes(root: int) -> Iterator[int]:
    # Kernel threads are most of /proc on a large host and show process group 0; so does a tree whose groups lie
    # outside this pid namespace, and then nothing is left out.
    try:
        grouped = os.getpgid(root) != 0
    except ProcessLookupError:
        return
    for pid in reversed(procfs.processes()):
        try:
            if not grouped or os.getpgid(pid):
                yield pid
        except ProcessLookupError:
            continue
