"""Running processes that were put into a VM's pCPUs, and the way back for each of their threads.

A thread's mask and its process's cgroup are in the ledger before the first change; they are given back when the VM's
token is no longer in the ledger, or :func:`release` has said so. It takes two steps, since a mask cannot be widened
while a partition still has the CPUs: :func:`leave` moves the processes back to their cgroups before the partition
goes, :func:`unpin` gives the masks back after it.
"""

from __future__ import annotations

import errno

from .. import procfs, tree
from ..cpuset import CpuSet
from ..ledger import Known
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..host import Host
    from ..ledger import Ledger

__all__ = ["leave", "processes", "release", "take", "unpin"]

_KIND = "attached"
_RETURNING = "returning"
_ROUNDS = 50  # looks for threads that were born meanwhile; two that agree end it


class _Thread(Value):
    # One record: its name in the ledger and what is known of it.
    token: str
    tid: int
    pid: int
    start: int
    mask: CpuSet
    cgroup: str
    ours: tuple[str, ...]

    @property
    def key(self) -> str:
        return f"{_KIND}:{self.token}:{self.tid}:{self.pid}:{self.start}"

    def known(self) -> Known:
        return Known(f"{self.mask}|{self.cgroup}", self.ours)

    def lives(self) -> bool:
        stat = procfs.read_stat(self.pid, self.tid)
        return stat is not None and stat.start == self.start and not stat.dead


def _threads(ledger: Ledger) -> list[_Thread]:
    found = []
    for key, known in ledger.known().items():
        kind, _, rest = key.partition(":")
        if kind == _KIND:
            token, tid, pid, start = rest.split(":")
            mask, _, cgroup = known.baseline.partition("|")
            found.append(_Thread(token, int(tid), int(pid), int(start), CpuSet.parse(mask), cgroup, known.ours))
    return found


def processes(ledger: Ledger) -> frozenset[int]:
    """Return the pids of processes that VMs have now; whoever sweeps leaves these, and what is below them, alone."""
    return frozenset(one.pid for one in _threads(ledger) if one.ours != (_RETURNING,))


def take(host: Host, ledger: Ledger, token: str, pids: Iterable[int], pcpus: CpuSet, procs: str = "") -> list[str]:
    """Put processes with all their threads on *pcpus* (Linux numbers); return what could not be, a sentence each.

    :param token: the VM's
    :param procs: the ``cgroup.procs`` they have to be in, relative to the host's root; empty: they stay where they are
    """
    problems = []
    for pid in pids:
        problems += _take_one(host, ledger, token, pid, pcpus, procs)
    return problems


def _take_one(host: Host, ledger: Ledger, token: str, pid: int, pcpus: CpuSet, procs: str) -> list[str]:
    known = {(one.tid, one.start): one for one in _threads(ledger) if one.token == token}
    cgroup = _cgroup(host, pid, procs) if procs else ""
    moved = False
    clean = 0
    for _ in range(_ROUNDS):
        found = [
            _Thread(token, tid, pid, stat.start, mask, cgroup, (str(mask), str(pcpus)))
            for tid in procfs.threads(pid)
            if (stat := procfs.read_stat(pid, tid)) is not None
            and not stat.dead
            and (mask := procfs.allowed(pid, tid)) is not None
        ]
        new = [one for one in found if (one.tid, one.start) not in known]
        if moved:
            # A thread that was born since has the mask of one that was moved; what it should get back is the process's.
            main = known.get((pid, procfs.start_time(pid) or -1))
            new = [one.replace(mask=main.mask) if main is not None and one.mask == pcpus else one for one in new]
        if new:
            ledger.remember({one.key: one.known() for one in new})
            known |= {(one.tid, one.start): one for one in new}
        if procs and not moved:
            host.write_text(procs, str(pid))
        moved = True
        astray = [tid for tid in procfs.threads(pid) if procfs.allowed(pid, tid) not in (pcpus, None)]
        for tid in astray:
            try:
                host.set_affinity(tid, pcpus)
            except ProcessLookupError:
                continue
            except OSError as error:
                return [f"thread {tid} of pid {pid} can't be pinned to pCPU {pcpus}: {error.strerror}"]
        clean = 0 if new or astray else clean + 1
        if clean == 2:
            return []
    return [f"pid {pid} makes threads faster than they can be pinned"]


def release(ledger: Ledger, token: str) -> None:
    """Say that a VM gives its processes back; what somebody else has pinned meanwhile stays so."""
    mine = [one for one in _threads(ledger) if one.token == token and one.ours != (_RETURNING,)]
    gone = [one for one in mine if not one.lives() or str(procfs.allowed(one.pid, one.tid)) not in one.ours]
    kept = [one.replace(ours=(_RETURNING,)) for one in mine if one not in gone]
    if gone:
        ledger.forget([one.key for one in gone])
    if kept:
        ledger.remember({one.key: one.known() for one in kept})


def leave(host: Host, ledger: Ledger) -> list[str]:
    """Move the processes of VMs that are over back to their cgroups; return what could not be, a sentence each."""
    there = {row.token for row in ledger.vms()}
    for token in {one.token for one in _threads(ledger)} - there:
        release(ledger, token)
    problems = []
    for pid, cgroup in {one.pid: one.cgroup for one in _threads(ledger) if one.ours == (_RETURNING,)}.items():
        if not cgroup:
            continue
        for member in (pid, *(one.pid for one in tree.descendants(pid))):
            try:
                host.write_text(cgroup, str(member))
            except OSError as error:
                if error.errno == errno.ESRCH:
                    continue
                problems.append(f"pid {member} can't be moved back: /{cgroup}: {error.strerror}")
    return problems


def unpin(host: Host, ledger: Ledger) -> None:
    """Give the masks back to the threads of VMs that are over, to their threads born since, and to their children."""
    returning = [one for one in _threads(ledger) if one.ours == (_RETURNING,)]
    if not returning:
        return
    known = {one.tid: one for one in returning}
    for pid in {one.pid for one in returning}:
        main = known.get(pid) or next(one for one in returning if one.pid == pid)
        for _ in range(_ROUNDS):
            members = [pid, *(member.pid for member in tree.descendants(pid))]
            tasks = [(member, tid) for member in members for tid in procfs.threads(member)]
            wrong = [
                (tid, want)
                for member, tid in tasks
                if (want := (known.get(tid) or main).mask) != procfs.allowed(member, tid)
            ]
            done = 0
            for tid, want in wrong:
                try:
                    host.set_affinity(tid, want)
                    done += 1
                except OSError:
                    continue  # gone, or its own cpuset has none of these
            if not done:
                break
    ledger.forget([one.key for one in returning])


def _cgroup(host: Host, pid: int, procs: str) -> str:
    # The file that takes it back: where it is now, in the hierarchy that *procs* is in.
    top = procs.partition("/hostpart/")[0]
    lines = host.read_text(f"proc/{pid}/cgroup").splitlines()
    fields = [line.split(":", 2) for line in lines]
    unified = host.exists(f"{top}/cgroup.controllers")
    where = next(path for number, names, path in fields if (number == "0" if unified else "cpuset" in names.split(",")))
    return f"{top}/{where.strip('/')}/cgroup.procs".replace("//", "/")
