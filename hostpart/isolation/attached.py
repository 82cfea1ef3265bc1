"""Running processes that were put into a VM's pCPUs, and the way back for each of their threads.

A thread's mask and its process's cgroup are in the ledger before the first change; they are given back when the VM's
token is no longer in the ledger, or :func:`release` has said so. It takes two steps, since a mask cannot be widened
while a partition still has the CPUs: :func:`leave` moves the processes back to their cgroups before the partition
goes, :func:`unpin` gives the masks back after it. What they forked goes with them, and has what its parent had.
"""

from __future__ import annotations

import errno
import os

from .. import procfs, tree
from ..cpuset import CpuSet
from ..ledger import Known
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from ..host import Host
    from ..ledger import Ledger

__all__ = ["family", "leave", "processes", "release", "take", "unpin"]

_KIND = "attached"
_RETURNING = "returning"
_ROUNDS = 50  # looks for threads that were born meanwhile; two that agree end it
_GONE = (errno.ENOENT, errno.ENODEV, errno.EBUSY, errno.EOPNOTSUPP)  # a cgroup that is no place for processes any more


class _Thread(Value):
    # One record: its name in the ledger and what is known of it. `procs` is the file of the VM's cgroup, if it has one.
    token: str
    tid: int
    pid: int
    start: int
    mask: CpuSet
    cgroup: str
    procs: str
    ours: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{_KIND}:{self.token}:{self.tid}:{self.pid}:{self.start}"

    @property
    def returning(self) -> bool:
        return self.ours[:1] == (_RETURNING,)

    def known(self) -> Known:
        return Known(f"{self.mask}|{self.cgroup}|{self.procs}", self.ours)


def _threads(ledger: Ledger) -> list[_Thread]:
    found = []
    for key, known in ledger.known(tasks=False).items():
        kind, _, rest = key.partition(":")
        if kind == _KIND:
            token, tid, pid, start = rest.split(":")
            mask, cgroup, procs = known.baseline.split("|")
            found.append(_Thread(token, int(tid), int(pid), int(start), CpuSet.parse(mask), cgroup, procs, known.ours))
    return found


def processes(ledger: Ledger) -> frozenset[int]:
    """Return the pids of processes that VMs have now; whoever sweeps leaves these, and what is below them, alone."""
    mine = [one for one in _threads(ledger) if not one.returning]
    # A number that is another process's by now is not theirs.
    gone = {one.pid for one in mine if one.tid == one.pid and procfs.start_time(one.pid) != one.start}
    return frozenset(one.pid for one in mine) - gone


# -- there ---------------------------------------------------------------------------------------------


def take(host: Host, ledger: Ledger, token: str, pids: Iterable[int], pcpus: CpuSet, procs: str = "") -> list[str]:
    """Put processes with all their threads, and all below them, on *pcpus*; return what could not be, a sentence each.

    hostpart's own processes below one, such as a shell's keepers, are left out.

    :param token: the VM's
    :param pcpus: Linux numbers
    :param procs: the ``cgroup.procs`` they have to be in, relative to the host's root; empty: they stay where they are
    """
    known: dict[tuple[int, int], _Thread] = {}
    problems = []
    for pid in pids:
        problems += _take_one(host, ledger, known, token, pid, pcpus, procs)
    return problems


def family(ledger: Ledger, pid: int) -> list[tree.Member]:
    """Return the processes below *pid*, hostpart's keepers and fronts, and what is below those, left out."""
    skip = {one for row in ledger.vms() for one in (row.keeper_pid, row.front_pid)} | {os.getpid(), os.getppid()}
    return tree.descendants(pid, skip - {1, pid})


def _pids(ledger: Ledger, pid: int) -> list[int]:
    return [pid, *(member.pid for member in family(ledger, pid))]


def _take_one(
    host: Host,
    ledger: Ledger,
    known: dict[tuple[int, int], _Thread],
    token: str,
    pid: int,
    pcpus: CpuSet,
    procs: str,
) -> list[str]:
    moved: set[int] = set()
    clean = 0
    for number in range(_ROUNDS):
        new, wrong = [], []
        for member in _pids(ledger, pid):
            cgroup = None
            for tid, start, mask in _tasks(member):
                if mask != pcpus:
                    wrong.append((member, tid))
                if (tid, start) in known:
                    continue
                # Who was born since has what one that was moved already had; it gets back what that one had before.
                parent = next((one for one in known.values() if one.pid in (member, pid)), None) if number else None
                if cgroup is None:
                    cgroup = _cgroup(host, member, procs) if procs else ""
                    cgroup = parent.cgroup if parent is not None and cgroup == procs else cgroup
                baseline = parent.mask if parent is not None and mask == pcpus else mask
                ours = (str(mask), str(pcpus))
                new.append(_Thread(token, tid, member, start, baseline, cgroup, procs, ours))
        if new:
            # Swept before with all other tasks of the host: what it had before that is what it gets back.
            swept = ledger.known()
            keys = [key for one in new if (key := f"task:{one.tid}:{one.start}") in swept]
            new = [
                one.replace(mask=CpuSet.parse(before.baseline))
                if (before := swept.get(f"task:{one.tid}:{one.start}")) is not None and str(one.mask) in before.ours
                else one
                for one in new
            ]
            ledger.remember({one.key: one.known() for one in new})
            ledger.forget(keys)
            known |= {(one.tid, one.start): one for one in new}
        for member in {one.pid: None for one in new} if procs else ():
            if member not in moved:
                moved.add(member)
                try:
                    host.write_text(procs, str(member))
                except ProcessLookupError:
                    continue
                except OSError as error:
                    return [f"pid {member} can't enter the VM's cgroup /{os.path.dirname(procs)}: {error.strerror}"]
        for member, tid in wrong:
            try:
                host.set_affinity(tid, pcpus)
            except ProcessLookupError:
                continue
            except OSError as error:
                return [f"thread {tid} of pid {member} can't be pinned to pCPU {pcpus}: {error.strerror}"]
        clean = 0 if new or wrong else clean + 1
        if clean == 2:
            return []
    return [f"pid {pid} makes threads faster than they can be pinned, or another program pins them too"]


def _tasks(pid: int) -> Iterator[tuple[int, int, CpuSet]]:
    # Thread, start time and mask of all that live.
    for tid in procfs.threads(pid):
        stat, mask = procfs.read_stat(pid, tid), procfs.allowed(pid, tid)
        if stat is not None and not stat.dead and mask is not None:
            yield tid, stat.start, mask


# -- back ----------------------------------------------------------------------------------------------


def release(host: Host, ledger: Ledger, token: str) -> list[str]:
    """Say that a VM gives its processes back.

    :return: the threads that somebody else has pinned meanwhile, a sentence each; they keep that mask
    """
    mine = {(one.tid, one.start): one for one in _threads(ledger) if one.token == token and not one.returning}
    foreign: list[str] = []
    if not mine:
        return foreign
    mains = {one.pid: one for one in reversed(mine.values())}
    mains |= {one.pid: one for one in mine.values() if one.tid == one.pid}
    pcpus = CpuSet.parse(next(iter(mine.values())).ours[-1])
    online = CpuSet.parse(host.read_text("sys/devices/system/cpu/online"))
    ours = (_RETURNING, str(_now()))
    returning: dict[str, Known] = {}
    seen = set()
    for pid, main in _members(host, ledger, mains.values()):
        for tid, start, mask in _tasks(pid):
            one = mine.get((tid, start))
            untouched = mask == pcpus or mask == pcpus & online or (one is not None and str(mask) in one.ours)
            if one is None and pid not in mains and not untouched and not main.procs:
                continue  # a child that has chosen a mask for itself
            if not untouched:
                foreign.append(f"thread {tid} of pid {pid} has mask {mask}, which hostpart did not set; it was left")
            seen.add((tid, start))
            base = one if one is not None else main.replace(tid=tid, pid=pid, start=start)
            base = base.replace(ours=ours, mask=base.mask if untouched else mask)
            returning[base.key] = base.known()
    ledger.remember(returning)
    ledger.forget([one.key for key, one in mine.items() if key not in seen])
    return foreign


def leave(host: Host, ledger: Ledger) -> tuple[list[str], list[str]]:
    """Move the processes of VMs that are over back to their cgroups.

    :return: what could not be done, and what somebody else has changed meanwhile, a sentence each
    """
    there = {row.token for row in ledger.vms()}
    problems: list[str] = []
    foreign: list[str] = []
    for token in {one.token for one in _threads(ledger)} - there:
        foreign += release(host, ledger, token)
    for _ in range(_ROUNDS):
        returning = [one for one in _threads(ledger) if one.returning and one.procs]
        known = {one.pid for one in returning}
        for one in {one.procs: one for one in returning}.values():
            # Born since, by one of those: a cgroup is emptied before it is removed, or the kernel would not let go.
            inside = _inside(host, one.procs)
            for pid in inside - known:
                born = [one.replace(tid=tid, pid=pid, start=start) for tid, start, _ in _tasks(pid)]
                ledger.remember({new.key: new.known() for new in born})
                returning += born
            moved = [entry for entry in {entry.pid: entry for entry in returning}.values() if entry.pid in inside]
            for entry in moved:
                problems += _move(host, entry.pid, entry.cgroup, foreign)
        if problems or not any(_inside(host, procs) for procs in {one.procs for one in returning}):
            break
    return problems, foreign


def _move(host: Host, pid: int, procs: str, foreign: list[str]) -> list[str]:
    # Where its cgroup is gone, into the nearest above it that takes processes: in the VM's it would be killed.
    place = procs
    while True:
        try:
            host.write_text(place, str(pid))
        except OSError as error:
            if error.errno == errno.ESRCH:
                return []
            above = f"{os.path.dirname(os.path.dirname(place))}/cgroup.procs"
            if error.errno in _GONE and host.exists(above):
                place = above
                continue
            return [f"pid {pid} can't be moved back: /{procs}: {error.strerror}"]
        if place != procs:
            foreign.append(f"pid {pid} is in /{os.path.dirname(place)}, for /{os.path.dirname(procs)} is gone")
        return []


def unpin(host: Host, ledger: Ledger) -> None:
    """Give the masks back to the threads of VMs that are over, to their threads born since, and to their children."""
    returning = [one for one in _threads(ledger) if one.returning]
    if not returning:
        return
    known = {(one.tid, one.start): one for one in returning}
    mains = {one.pid: one for one in reversed(returning)}
    since = min(int(one.ours[1]) for one in returning)
    refused: set[tuple[int, int]] = set()
    for _ in range(_ROUNDS):
        done = 0
        for pid in dict.fromkeys(pid for one in mains for pid in _pids(ledger, one)):
            for tid, start, mask in _tasks(pid):
                one = known.get((tid, start))
                if one is None and start >= since:
                    one = mains.get(pid) or mains[next(iter(mains))]
                if one is None or one.mask == mask or (tid, start) in refused:
                    continue
                try:
                    host.set_affinity(tid, one.mask)
                    done += 1
                except OSError:
                    pass  # gone, or its own cpuset has none of these
                refused.add((tid, start))  # once: the kernel may leave less of it, with a cpuset that has shrunk
        if not done:
            break
    ledger.forget([one.key for one in returning])


# -- who and where -------------------------------------------------------------------------------------


def _members(host: Host, ledger: Ledger, mains: Iterable[_Thread]) -> Iterator[tuple[int, _Thread]]:
    # Every process that was put there or forked by one, with a thread of whoever it came with.
    seen = set()
    mains = list(mains)
    for main in mains:
        if main.pid not in seen:
            seen.add(main.pid)
            yield main.pid, main
    for main in mains:
        inside = _inside(host, main.procs) if main.procs else set()  # orphans too
        for pid in (*_pids(ledger, main.pid), *inside):
            if pid not in seen:
                seen.add(pid)
                yield pid, main


def _inside(host: Host, procs: str) -> set[int]:
    try:
        return {int(word) for word in host.read_text(procs).split()} - {0}
    except FileNotFoundError:
        return set()


def _now() -> int:
    # Now, as start times are counted: clock ticks since boot.
    import time

    return int(time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK"))


def _cgroup(host: Host, pid: int, procs: str) -> str:
    # The file that takes it back: where it is now, in the hierarchy that *procs* is in.
    top = os.path.dirname(procs)
    while host.exists(f"{os.path.dirname(top)}/cgroup.procs"):
        top = os.path.dirname(top)
    unified = host.exists(f"{top}/cgroup.controllers")
    for line in host.read_text(f"proc/{pid}/cgroup").splitlines():
        number, names, path = line.split(":", 2)
        if number == "0" if unified else "cpuset" in names.split(","):
            return os.path.normpath(f"{top}/{path.strip('/')}/cgroup.procs")
    raise FileNotFoundError(errno.ENOENT, f"pid {pid} is in no cgroup of /{top}")
