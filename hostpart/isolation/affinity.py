"""Tasks of the host, threads and movable kernel threads, moved off the guests' pCPUs and back to where they might run.

Where a task should be follows from what it had before hostpart first touched it, which is in the ledger before the
first write, and from what VMs hold now; so it does not matter in which order VMs come and go, or where a call was
killed. Untouched tasks are in the ledger too: what a mask means is never guessed for a task that was there. One that
was born since has the mask of whoever forked it, and gets what that one gets. Looks are repeated until two in a row
find nothing to do, since tasks fork while they are looked at.

When to do it, what is released, and which processes are the guests' is :mod:`hostpart.isolation.reconcile`'s to say;
whose tasks are covered is :mod:`hostpart.isolation.scope`'s.
"""

from __future__ import annotations

import errno
import gc
import os
import time

from ..cpuset import CpuSet
from ..ledger import Known
from ..procfs import is_kthread
from ..value import Value
from .level import at_least
from .scope import default_scope, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from ..host import Host
    from ..ledger import Holding, Ledger

__all__ = ["UNREAD", "Swept", "Task", "escapees", "read_tasks", "settle"]

UNREAD = -1

_KTHREAD = 0x00200000  # PF_KTHREAD and
_NO_SETAFFINITY = 0x04000000  # PF_NO_SETAFFINITY, include/linux/sched.h: nobody but the kernel may set the mask
_KINDS = ("task", "kthread")
_WIDE = "wide"
_SWEPT = "swept:0:0"  # no task; in the ledger from the first baselines on until all masks are back
_PASSES = 60  # looks until it is given up; with six processes forking all the while three were enough
_AGAIN = 3  # times that a task which puts itself back is moved; more would be a fight
_BACK_S = 10.0  # within which the kernel has brought its threads to a CPU that is online again
_NAMED = 5  # threads that a sentence names by number
_REFUSED = frozenset({errno.EINVAL, errno.EPERM, errno.EACCES, errno.EBUSY})
_GONE = frozenset({errno.ENOENT, errno.ESRCH})

# Of this process alone, by a task's key: what it was moved off, and how often it has come back since.
_MOVED: dict[str, tuple[CpuSet, int]] = {}
# Likewise: those that stay on released pCPUs, because nobody can move them or because they fight it.
_LEFT: set[str] = set()
# Likewise, by a CPU's number: when it was last seen offline.
_OFFLINE: dict[int, float] = {}


class Task(Value):
    """One thread as it was when looked at.

    :ivar tgid: its process
    :ivar start: clock ticks since boot; with *tid* it names the thread for as long as the machine is up
    :ivar ppid: its process's parent
    :ivar flags: the kernel's ``PF_`` bits
    :ivar uid: the real user id; :data:`UNREAD` where nobody asked for it
    :ivar mask: ``Cpus_allowed_list`` as it is stored: Linux numbers, CPUs that are offline included
    """

    tid: int
    tgid: int
    start: int
    ppid: int
    session: int
    flags: int
    comm: str
    uid: int
    mask: CpuSet

    @property
    def kthread(self) -> bool:
        """Whether it is one of the kernel's own."""
        return bool(self.flags & _KTHREAD)

    @property
    def bound(self) -> bool:
        """Whether nobody but the kernel may set its mask."""
        return bool(self.flags & _NO_SETAFFINITY)

    @property
    def key(self) -> str:
        """Its name in the ledger."""
        name: str | None = self.__dict__.get("key")  # asked for several times, of thousands
        if name is None:
            name = self.__dict__["key"] = f"{_KINDS[self.kthread]}:{self.tid}:{self.start}"
        return name


class Swept(Value):
    """What :func:`settle` did and met; sentences, and names of tasks in *escapees*.

    :ivar moved: how many masks were written
    :ivar passes: how many looks it took
    :ivar escapees: tasks that had put themselves back onto released pCPUs, or were put there
    :ivar foreign: tasks that somebody else has given yet another mask meanwhile, which they keep
    :ivar refused: tasks that may run on released pCPUs all the same
    :ivar unavoidable: kernel threads whose mask the kernel has changed and lets nobody set
    :ivar postponed: tasks that don't have their mask back, because a CPU of it is offline or not in their cpuset; they
        stay in the ledger for the next call
    """

    moved: int = 0
    passes: int = 0
    escapees: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    unavoidable: tuple[str, ...] = ()
    postponed: tuple[str, ...] = ()


def settle(host: Host, ledger: Ledger, holdings: Iterable[Holding], guests: Collection[int]) -> Swept:
    """Give every task the mask it should have: what it had before, without the pCPUs that it is to be kept off.

    With no holding from level ``sweep`` on, all have what they had before, and their records are struck out. A
    rehearsing host is looked at once.

    :param holdings: what VMs hold
    :param guests: processes that are not to be touched, nor anything below them
    :raises OSError: what the kernel is not known to answer to sched_setaffinity(2)
    :raises LedgerUnusable: as :class:`hostpart.ledger.Ledger` does; nothing was written that is not in it
    """
    # Tens of thousands of values are made here, and none is in a ring: the collector would go through all of them time
    # and again, for a fifth of the CPU time with 10,000 tasks, and for more than its share the more there are.
    collects = gc.isenabled()
    gc.disable()
    try:
        return _Sweep(host, ledger, holdings, guests).run()
    finally:
        if collects:
            gc.enable()


def escapees(host: Host, holdings: Iterable[Holding], guests: Collection[int]) -> list[int]:
    """Return threads that should be off released pCPUs and may run there now, by thread id.

    It is for every second: two system calls for each process, one for each further thread, and no file is read but for
    tasks that may run there. Left out are kernel threads, which come back at a CPU's return only, and what the last
    :func:`settle` of this process could not move.

    :param guests: as for :func:`settle`
    """
    held = _held(holdings)
    released = frozenset(cpu for one in held for cpu in one.released)
    if not released:
        return []
    astray: list[tuple[int, int]] = []
    for pid, tids in _threads():
        for tid in tids:
            try:
                # Kernel threads have process group 0, and few others have: init's children before they have their own,
                # and in a container whoever came from outside.
                if not released.isdisjoint(os.sched_getaffinity(tid)) and (os.getpgid(pid) or not is_kthread(pid)):
                    astray.append((pid, tid))
            except OSError:
                continue  # it has ended
    if not astray:
        return []
    masks: dict[bytes, CpuSet] = {}
    tasks: dict[int, Task] = {}
    lineage = _Lineage(tasks, guests, masks)
    suspects = [
        task
        for pid, tid in astray
        if not lineage.is_guest(pid) and (task := _read(pid, tid, masks)) is not None and task.key not in _LEFT
    ]
    if not suspects:
        return []
    covers = [(one.released, parse(one.scope or default_scope()).covers(host, tasks)) for one in held]
    return [one.tid for one in suspects if any(one.mask & released and covered(one) for released, covered in covers)]


# -- reading -------------------------------------------------------------------------------------------


def read_tasks(host: Host) -> dict[int, Task]:
    """Return every thread that ``/proc`` shows, by thread id, zombies too; those that end meanwhile are left out.

    A recorded machine has none.
    """
    return _read_all({}, {}) if host.live else {}


def _read_all(masks: dict[bytes, CpuSet], plain: dict[frozenset[int], CpuSet]) -> dict[int, Task]:
    # In *plain* is what the kernel's answer to sched_getaffinity(2) is sure to mean.
    found: dict[int, Task] = {}
    for pid in _pids():
        task, threads = _read_with_count(pid, pid, masks, plain)
        if task is None:
            continue
        found[pid] = task
        if threads != b"1":
            for tid in _listed(pid):
                if tid != pid and (thread := _read_with_count(pid, tid, masks, plain)[0]) is not None:
                    found[tid] = thread
    return found


def _read(pid: int, tid: int, masks: dict[bytes, CpuSet]) -> Task | None:
    return _read_with_count(pid, tid, masks, {})[0]


def _read_with_count(
    pid: int, tid: int, masks: dict[bytes, CpuSet], plain: dict[frozenset[int], CpuSet]
) -> tuple[Task | None, bytes]:
    # A task, and how many threads its process has.
    folder = f"/proc/{pid}" if pid == tid else f"/proc/{pid}/task/{tid}"
    # The figures of the main thread differ from the process's in times only, which nobody asks for here.
    stat = _slurp(f"{folder}/stat")
    if not stat:
        return None, b""
    mask, uid = None, UNREAD
    if plain:
        try:
            mask = plain.get(frozenset(os.sched_getaffinity(tid)))
        except OSError:
            return None, b""  # it has ended
    if mask is None:
        # This file takes the kernel twice as long as all else that is asked of a task.
        status = _slurp(f"{folder}/status")
        at = status.find(b"\nCpus_allowed_list:")
        if at < 0:
            return None, b""
        text = status[at + 19 : status.index(b"\n", at + 19)]
        mask = masks.get(text)
        if mask is None:  # a host has few of them
            mask = masks[text] = CpuSet.parse(text.decode("ascii"))
        at = status.index(b"\nUid:") + 5
        uid = int(status[at : at + 16].split(None, 1)[0])
    # The name stands in parentheses and may hold any byte: only the last ")" is the kernel's.
    name, end = stat.index(b"("), stat.rindex(b")")
    field = stat[end + 2 :].split(None, 20)
    comm = stat[name + 1 : end].decode("utf-8", "backslashreplace")
    task = Task(tid, pid, int(field[19]), int(field[1]), int(field[3]), int(field[6]), comm, uid, mask)
    return task, field[17]


def _slurp(path: str) -> bytes:
    # One read gives the whole file, and what has ended gives none.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (*_GONE, errno.EACCES, errno.EPERM):  # the latter two: a mount with hidepid
            return b""
        raise
    try:
        return os.read(fd, 16384)
    except OSError as error:
        if error.errno in _GONE:
            return b""
        raise
    finally:
        os.close(fd)


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name[0] in "123456789"]


def _listed(pid: int) -> list[int]:
    try:
        return list(map(int, os.listdir(f"/proc/{pid}/task")))
    except OSError:
        return []


def _threads() -> Iterator[tuple[int, list[int]]]:
    # The link count tells a process with one thread in one system call; a listing takes five.
    for pid in _pids():
        try:
            links = os.stat(f"/proc/{pid}/task").st_nlink
        except OSError:
            continue
        yield pid, [pid] if links == 3 else _listed(pid)


class _Lineage:
    # Who descends from a guest. The tasks were not all looked at in one instant: a parent that ended meanwhile leaves a
    # gap, and its child has another parent by now. A guest that was not known for one would be swept.
    def __init__(self, tasks: dict[int, Task], guests: Collection[int], masks: dict[bytes, CpuSet]) -> None:
        self.tasks, self.masks = tasks, masks
        self.known: dict[int, bool] = dict.fromkeys(guests, True) | {0: False}

    def is_guest(self, pid: int) -> bool:
        way = []
        while pid not in self.known:
            way.append(pid)
            self.known[pid] = False  # ends the walk where numbers that were used again make a ring
            pid = self._parent(pid)
        found = self.known[pid]
        self.known.update(dict.fromkeys(way, found))
        return found

    def _parent(self, pid: int) -> int:
        task = self.tasks.get(pid)
        if task is None or (task.ppid and task.ppid not in self.tasks):
            task = _read(pid, pid, self.masks)
            if task is None:
                return 0
            self.tasks[pid] = task
        return task.ppid


# -- settling ------------------------------------------------------------------------------------------


class _Sweep:
    # One call of settle: what it knows, and what came of it.
    def __init__(self, host: Host, ledger: Ledger, holdings: Iterable[Holding], guests: Collection[int]) -> None:
        self.host, self.ledger, self.guests = host, ledger, guests
        held = _held(holdings)
        self.released = CpuSet.of(cpu for one in held for cpu in one.released)
        self.scopes: dict[str, CpuSet] = {}
        for one in held:
            scope = one.scope or default_scope()
            self.scopes[scope] = self.scopes.get(scope, CpuSet()) | one.released
        remembered = ledger.known()
        self.known = {key: one for key, one in remembered.items() if key.partition(":")[0] in _KINDS}
        # Those that wait for a CPU or for their cpuset may be there, and no others: what those have now is theirs.
        self.left = dict(self.known)
        self.marked = _SWEPT in remembered
        self.first = not self.marked
        self.wide = frozenset(remembered[_WIDE].ours) if _WIDE in remembered else frozenset[str]()
        self.possible = self.online = CpuSet()
        self.away = CpuSet()  # CPUs that are offline, or were a moment ago
        self.masks: dict[bytes, CpuSet] = {}
        # A host has few masks and many tasks: what follows from one is made once.
        self.parsed: dict[str, CpuSet] = {}
        self.wants: dict[tuple[int, int], CpuSet] = {}
        self.rights: dict[int, set[int]] = {}
        self.alike: dict[tuple[str, tuple[str, ...]], Known] = {}
        self.everybody = CpuSet()  # the pCPUs that all of the host's tasks are to be kept off
        self.tasks: dict[int, Task] = {}
        # What sched_getaffinity(2) says of a task that is as it should be; None for those that are let be.
        self.right: dict[int, set[int] | None] = {}
        self.covers: list[tuple[CpuSet, Callable[[Task], bool]]] = []
        self.led_to: dict[str, set[str]] | None = None
        self.ended: dict[int, list[tuple[int, str]]] | None = None
        self.said: dict[str, dict[str, tuple[Task, str]]] = {name: {} for name in Swept._fields[2:]}
        self.kept: set[str] = set()  # tasks that may get their masks back another time
        self.moved = 0

    def run(self) -> Swept:
        if self.first and not self.known and not self.released:
            return Swept()
        self._read_tasks()
        self._find_missed()
        _LEFT.clear()
        passes = clean = 0
        looked_at: Iterable[Task] = list(self.tasks.values())
        while True:
            passes += 1
            clean = 0 if self._step(looked_at) else clean + 1
            self.first = False
            if self.host.rehearses or clean == 2 or passes == _PASSES:
                break
            looked_at = self._look()
        if self.host.rehearses:
            return self._swept(passes)
        self._look_at_bound()
        if self.released:
            self._prune()
        elif clean == 2:
            self._forget([key for key in self.known if key not in self.kept], _SWEPT)
        for key in [key for key in _MOVED if key not in self.known]:
            del _MOVED[key]
        late = f"tasks are born faster than they can be moved: after {passes} looks some may run on {self.released}"
        return self._swept(passes, () if clean == 2 else (late,))

    def _swept(self, passes: int, more: tuple[str, ...] = ()) -> Swept:
        said = {name: _sentences(found.values()) for name, found in self.said.items()}
        said["refused"] += more
        return Swept(self.moved, passes, **said)

    def _read_tasks(self) -> None:
        self.possible = self._cpus("possible")
        self._see_online()
        self.tasks = _read_all(self.masks, self._plain())
        if self._see_online():
            self.tasks = _read_all(self.masks, {})

    def _see_online(self) -> bool:
        # Whether a CPU came or went since.
        before, self.online = self.online, self._cpus("online")
        now = time.monotonic()
        _OFFLINE.update(dict.fromkeys(self.possible - self.online, now))
        self.away = CpuSet.of(cpu for cpu, at in _OFFLINE.items() if now - at < _BACK_S)
        return self.online != before

    def _plain(self) -> dict[frozenset[int], CpuSet]:
        # sched_getaffinity(2) costs a twentieth of the file with the mask, but hides CPUs that are offline. Who may run
        # on all that there can ever be, may; and of those that have what hostpart wrote, or found, nothing is hidden
        # while all are online. The file is asked for any other, and where a scope goes by the user, whom only it names.
        if any(parse(scope).kind == "user" for scope in self.scopes):
            return {}
        found = {frozenset(self.possible): self.possible}
        if self.online == self.possible:
            for one in self.wide.union(*({known.baseline, *known.ours} for known in self._kinds())):
                found[frozenset(self._parsed(one))] = self._parsed(one)
        return found

    def _cpus(self, name: str) -> CpuSet:
        return CpuSet.parse(self.host.read_text(f"sys/devices/system/cpu/{name}"))

    # Threads come and go while a process's are listed, and the kernel may skip one then: no task that is remembered is
    # given up because a list did not show it.
    def _find_missed(self) -> None:
        for key in self.known:
            tid = int(key.split(":")[1])
            if tid not in self.tasks and (status := _slurp(f"/proc/{tid}/status")):
                at = status.index(b"\nTgid:") + 6
                task = _read(int(status[at : at + 16].split(None, 1)[0]), tid, self.masks)
                if task is not None:
                    self.tasks[tid] = task

    def _look(self) -> list[Task]:
        # Those that are new, or not as they should be.
        if self._see_online():
            for one in (self.wants, self.rights, self.right):
                one.clear()
        there: set[int] = set()
        found = []
        for pid, tids in _threads():
            for tid in tids:
                there.add(tid)
                right = self.right.get(tid, set())
                try:
                    if right is None or right == os.sched_getaffinity(tid):
                        continue
                except OSError:
                    continue  # it has ended
                task = _read(pid, tid, self.masks)
                if task is not None:
                    self.tasks[tid] = task
                    found.append(task)
        for tid in self.tasks.keys() - there:
            del self.tasks[tid]
            self.right.pop(tid, None)
        return found

    def _step(self, tasks: Iterable[Task]) -> bool:
        # Whether anything had to be written. What was, is in the ledger first, all in one transaction.
        lineage = _Lineage(self.tasks, self.guests, self.masks)
        descends = lineage.known
        mine = []
        for task in tasks:
            if descends[task.tgid] if task.tgid in descends else lineage.is_guest(task.tgid):
                self.right[task.tid] = None
            else:
                mine.append(task)
        scopes = [(cpus, parse(text)) for text, cpus in self.scopes.items()]
        self.everybody = CpuSet.of(cpu for cpus, scope in scopes if scope.kind == "host" for cpu in cpus)
        self.covers = [(cpus, one.covers(self.host, self.tasks)) for cpus, one in scopes if one.kind != "host"]
        self.led_to = self.ended = None
        changed: dict[str, Known] = {}
        writes: list[tuple[Task, CpuSet]] = []
        # Parents first: whoever is born in the middle of this has what its parent will have been given, or before.
        for task in sorted(mine, key=lambda one: (one.start, one.tid)):
            known = self.known.get(task.key)
            if known is None:
                known = changed[task.key] = self.known[task.key] = self._born(task)
            want, after = self._decide(task, known)
            if after is not known:
                changed[task.key] = self.known[task.key] = after
            if want is not None:
                writes.append((task, want))
        if changed:
            self.ledger.remember(changed if self.marked or not self.released else {_SWEPT: Known(""), **changed})
            self.marked = self.marked or bool(self.released)
        for task, want in writes:
            self._write(task, want)
        return bool(writes)

    # -- deciding ----------------------------------------------------------------------------------------

    def _decide(self, task: Task, known: Known) -> tuple[CpuSet | None, Known]:
        # What to write, if anything, and what to remember from then on.
        now, key = str(task.mask), task.key
        if task.bound:
            self.right[task.tid] = None
            if not task.kthread and (there := task.mask & self._released_to(task)):
                self._leave(task, f"may run on {there}: its mask is the kernel's alone to set")
            return None, known
        free = self._released_to(task)
        baseline = self._parsed(known.baseline)
        want = self._wanted(task, baseline, free)
        if task.mask == want:
            self._is_right(task)
            return None, known
        there = task.mask & free
        gone = not there and want != baseline and not (task.mask ^ want) & self.online
        if gone and self._is_ours(task, now, known):
            # The kernel forgets CPUs that are offline, before Linux 6.2 any task's; there is no more to be had now.
            self._is_right(task)
            return None, known
        by_kernel = task.kthread or now in self.wide
        if not self._is_ours(task, now, known):
            if not there:
                # Somebody else has given it a mask that is in nobody's way: that is what it has from now on.
                if known.ours:
                    self._say("foreign", task, f"has {now}, which hostpart did not set; it was left")
                self.right[task.tid] = None
                return None, Known(now)
            known = Known(now)  # what it chose is what it gets back
            want = self._wanted(task, task.mask, free)
            if not by_kernel:
                self._say("escapees", task)
        if there:
            off, times = _MOVED.get(key, (CpuSet(), 0))
            if off == free and not by_kernel:
                self._say("escapees", task)
                if times == _AGAIN:
                    self._leave(task, f"may run on {there}: it has put itself back {times} times, and is left")
                    return None, known
                _MOVED[key] = free, times + 1
            else:
                _MOVED[key] = free, 0
        else:
            _MOVED.pop(key, None)
        # What the kernel may make of it is as much ours as what is asked for, should this be killed in between.
        ours = (now, str(want)) if want <= self.online else (now, str(want), str(want & self.online))
        return want, self._known(known.baseline, tuple(dict.fromkeys(ours)))

    def _is_ours(self, task: Task, now: str, known: Known) -> bool:
        # Whether it is as hostpart may have left it.
        if now in known.ours or now == known.baseline or now in self.wide:
            return True
        # What its own cpuset, narrowed by somebody since, leaves of a mask of ours is no choice of the task's.
        there = _cpuset(self.host, task.tid, CpuSet())
        if now in {str(CpuSet.parse(one) & there) for one in (*known.ours, known.baseline)}:
            return True
        # When a CPU goes offline the kernel takes it out of the masks of some threads of its own (rcu_exp_*), and when
        # it comes back, into those of others, one CPU after the other (kcompactd).
        return task.kthread and any(
            task.mask <= one and one - task.mask <= self.away
            for one in map(self._parsed, (*known.ours, known.baseline))
        )

    def _released_to(self, task: Task) -> CpuSet:
        # The pCPUs that this task is to be kept off.
        found = self.everybody
        for cpus, covers in self.covers:
            if covers(task):
                found |= cpus
        return found

    def _wanted(self, task: Task, baseline: CpuSet, free: CpuSet) -> CpuSet:
        want = self.wants.get((baseline.mask, free.mask))
        if want is not None:
            return want
        rest = baseline - free if free & baseline else baseline
        if rest == baseline or rest & self.online:
            self.wants[baseline.mask, free.mask] = rest
            return rest
        # It was pinned to nothing else. Its own cpuset may not have all that the service VM keeps.
        service = self.online - self.released
        return service & _cpuset(self.host, task.tid, service) or service

    def _is_right(self, task: Task) -> None:
        self.right[task.tid] = self._right(task.mask)

    def _right(self, mask: CpuSet) -> set[int]:
        found = self.rights.get(mask.mask)
        if found is None:
            found = self.rights[mask.mask] = set(mask & self.online)
        return found

    def _parsed(self, text: str) -> CpuSet:
        found = self.parsed.get(text)
        if found is None:
            found = self.parsed[text] = CpuSet.parse(text)
        return found

    def _known(self, baseline: str, ours: tuple[str, ...] = ()) -> Known:
        found = self.alike.get((baseline, ours))
        if found is None:
            found = self.alike[baseline, ours] = Known(baseline, ours)
        return found

    def _kinds(self) -> Collection[Known]:
        # What is remembered, of those that are alike one.
        return {id(known): known for known in self.known.values()}.values()

    def _say(self, what: str, task: Task, text: str = "") -> None:
        self.said[what][task.key] = task, text

    def _leave(self, task: Task, text: str) -> None:
        _LEFT.add(task.key)
        self.right[task.tid] = None
        self._say("refused", task, text)

    # -- those born since --------------------------------------------------------------------------------

    def _born(self, task: Task) -> Known:
        # What a task that is not in the ledger had "before": what whoever gave it its mask had.
        now = str(task.mask)
        if task.bound:
            return self._known(now)
        if self.first:
            above = self._above(task) if self.left else ()
            return self._known(next((self.left[one.key].baseline for one in above if self._waits(one, now)), now))
        baseline = self._inherited(task, now)
        return self._known(baseline, () if baseline == now else (now,))

    def _waits(self, task: Task, now: str) -> bool:
        # Whether it waits for its mask with *now*, which those that it has forked since have too.
        return task.key in self.left and str(task.mask) == now

    def _inherited(self, task: Task, now: str) -> str:
        nearest: Known | None = None
        for one in self._above(task):
            if (known := self.known.get(one.key)) is None:
                continue
            nearest = nearest or known
            if (found := _source(now, known, str(one.mask))) is not None:
                return found
        leader = self._leader(task)
        if leader is not None and (found := _source(now, *leader)) is not None:
            return found
        first = self.known.get(self.tasks[1].key) if 1 in self.tasks else None
        if first is not None and first.ours:
            # The whole host is swept, and whoever forked this one has ended. Where all that have or had its mask are of
            # one mind, so was that one. In a smaller scope it may be a stranger that chose this mask for itself.
            if len(agreed := self._led_to(now)) == 1:
                return next(iter(agreed))
            if (found := _source(now, first, "")) is not None:
                return found
        return nearest.baseline if nearest is not None and now in self.wide else now

    def _led_to(self, now: str) -> set[str]:
        # What those had before that have, or had, mask *now*.
        if self.led_to is None:
            self.led_to = {}
            for key, known in self.known.items():
                if key.startswith("kthread"):
                    continue  # its mask is nobody's inheritance
                for mask in known.ours or (known.baseline,):
                    self.led_to.setdefault(mask, set()).add(known.baseline)
        return self.led_to.get(now, set())

    def _above(self, task: Task) -> Iterator[Task]:
        # The threads of its process, the main one first, then those of its parent, and so on.
        seen = set()
        pid = task.tgid
        while pid not in seen and (main := self.tasks.get(pid)) is not None:
            seen.add(pid)
            if main.tid != task.tid:
                yield main
            yield from (one for tid in self._others(pid) if tid != task.tid and (one := self.tasks.get(tid)))
            pid = main.ppid

    @staticmethod
    def _others(pid: int) -> list[int]:
        try:
            if os.stat(f"/proc/{pid}/task").st_nlink == 3:
                return []
        except OSError:
            return []
        return [tid for tid in sorted(_listed(pid)) if tid != pid]

    def _leader(self, task: Task) -> tuple[Known, str] | None:
        # The session's first process, alive or not.
        leader = self.tasks.get(task.session)
        if leader is not None:
            return (known, str(leader.mask)) if (known := self.known.get(leader.key)) else None
        if self.ended is None:
            self.ended = {}
            for key in self.known:
                _, tid, start = key.split(":")
                if int(tid) not in self.tasks:
                    self.ended.setdefault(int(tid), []).append((int(start), key))
        before = [one for one in self.ended.get(task.session, ()) if one[0] <= task.start]
        return (self.known[max(before)[1]], "") if before else None

    # -- doing -------------------------------------------------------------------------------------------

    def _write(self, task: Task, want: CpuSet) -> None:
        try:
            if os.sched_getaffinity(task.tid) != self._right(task.mask):
                # Somebody was there since it was read, as the kernel is when CPUs come back: what they gave it would be
                # lost. The next look takes it in.
                return
            self.host.set_affinity(task.tid, want)
        except OSError as error:
            if error.errno in _GONE:
                return
            if error.errno not in _REFUSED:
                raise
            there = task.mask & self._released_to(task)
            what = f"may run on {there}" if there else f"has {task.mask} and not {want}"
            self._leave(task, f"{what}: {error.strerror}")
            if error.errno in (errno.EINVAL, errno.EBUSY):
                self.kept.add(task.key)
            return
        self.moved += 1
        if self.host.rehearses:
            return
        right = self._right(want)
        try:
            if want <= self.online and os.sched_getaffinity(task.tid) == right:
                self.right[task.tid] = right
                return
        except OSError:
            return  # it has ended
        after = _read(task.tgid, task.tid, self.masks)
        if after is None or not after.mask <= want:
            return  # somebody else's hand was there at once; the next look tells
        self._is_right(after)
        if after.mask == want:
            return
        # A cpuset of its own that has shrunk, or a kernel that forgets CPUs which are offline.
        known = self.known[task.key]
        if str(after.mask) not in known.ours:
            self.known[task.key] = Known(known.baseline, (*known.ours, str(after.mask)))
            self.ledger.remember({task.key: self.known[task.key]})
        if str(want) == known.baseline:
            self.kept.add(task.key)
            self._say("postponed", task, f"has {after.mask} and gets {want} back when all of these are there again")

    def _look_at_bound(self) -> None:
        # Last: what the kernel changed on the way it may have put right by itself.
        if self.released:
            return
        for task in [one for one in self.tasks.values() if one.bound]:
            after, known = _read(task.tgid, task.tid, self.masks), self.known.get(task.key)
            if after is not None and known is not None and str(after.mask) != known.baseline:
                self._say("unavoidable", after, f"has {after.mask} and had {known.baseline}, as the kernel changed it")

    def _prune(self) -> None:
        # Of those that have ended, the ledger keeps whoever a task born since may be traced back to.
        alive = {task.key for task in self.tasks.values()}
        gone = self.known.keys() - alive
        if not gone:
            return
        sessions = {task.session for task in self.tasks.values()}
        kinds = set({id(known): known for key, known in self.known.items() if key in alive}.values())
        ended = []
        for key in [key for key in self.known if key in gone]:
            tid, known = int(key.split(":")[1]), self.known[key]
            if tid in sessions or (tid not in self.tasks and os.path.exists(f"/proc/{tid}")):
                continue
            if known in kinds:
                ended.append(key)
            kinds.add(known)
        if ended:
            self._forget(ended)

    def _forget(self, keys: list[str], *more: str) -> None:
        self.ledger.forget([*keys, *more])
        for key in keys:
            del self.known[key]


def _source(now: str, known: Known, present: str) -> str | None:
    # What a task with mask *now* had before, if whoever is known like this, and has *present*, forked it; else None.
    if now in known.ours or now == known.baseline:
        return known.baseline
    return now if now == present else None  # a mask that somebody else has chosen since: its own


def _held(holdings: Iterable[Holding]) -> list[Holding]:
    return [one for one in holdings if at_least(one.level, "sweep")]


def _cpuset(host: Host, tid: int, default: CpuSet) -> CpuSet:
    # The CPUs that the task's cpuset cgroup lets it have, of version 1 or 2, where that can be read.
    path = _slurp(f"/proc/{tid}/cpuset").decode("utf-8", "surrogateescape").strip().strip("/")
    for top, name in (("sys/fs/cgroup/cpuset", "cpuset.effective_cpus"), ("sys/fs/cgroup", "cpuset.cpus.effective")):
        try:
            return CpuSet.parse(host.read_text(f"{top}/{path}/{name}"))
        except (OSError, ValueError):
            continue
    return default


def _sentences(said: Iterable[tuple[Task, str]]) -> tuple[str, ...]:
    groups: dict[tuple[str, str], list[int]] = {}
    for task, text in said:
        comm = "".join(letter if letter.isprintable() else "?" for letter in task.comm)
        groups.setdefault((comm, text), []).append(task.tid)
    found = []
    for (comm, text), tids in groups.items():
        more = f" and {len(tids) - _NAMED} more" if len(tids) > _NAMED else ""
        found.append(f"{comm} (tid {', '.join(map(str, tids[:_NAMED]))}{more}) {text}".rstrip())
    return tuple(found)
