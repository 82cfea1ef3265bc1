"""One VM's hold on the ladder: up before its guest starts, watched while it runs, down when it has ended.

It decides what to ask of :mod:`hostpart.isolation.reconcile` and when; the host is brought there by that one alone.
Lives in the VM's keeper, which calls it at every look.
"""

from __future__ import annotations

import os
import time

from workers import crash

from ..cgroup import Leaf
from ..cpuset import CpuSet
from ..errors import HostpartError
from . import affinity, irq, threads
from .cgroup_files import set_masks
from .level import LEVELS, Isolation, at_least
from .reach import below, reach
from .reconcile import Report, check, cpusets, guests, reconcile, worded
from .turn import Busy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

    from ..host import Host
    from ..ledger import Ledger, VcpuRow, VmRow
    from .level import Wish

__all__ = ["Watch"]

_SWEEP_S = 1.0  # between two searches for tasks that put themselves back, and for new interrupts
_TRIES = 3  # mendings of one problem in a row: whoever undoes it each time is not to be fought
_AGAIN_S = 10.0  # and then one at such intervals: what stood in the way may have gone
_SLEPT_S = 1.0  # the clock that counts suspend ran ahead by more than this: the host was suspended


class Watch:
    """See the module.

    :param row: the VM as the ledger has it
    :param note: told each thing that happens, once, as a sentence
    :ivar leaf: the cgroup that its guest's processes have to be in, or None
    :ivar procs: the ``cgroup.procs`` of another cgroup (version 1) that they have to enter, or empty
    :ivar process: of a VM whose vCPUs are threads, the ``cgroup.procs`` that their process has to enter before it makes
        them, or empty; such a VM has neither *leaf* nor *procs*
    :ivar threads: likewise, the file that each vCPU's thread id has to be written to before it is pinned, or empty
    :ivar leave: likewise, the file that takes a thread which is no vCPU's out again
    :ivar breaches: when the kernel's own guard was down, a sentence each
    """

    def __init__(self, ledger: Ledger, host: Host, row: VmRow, note: Callable[[str], None]) -> None:
        self.ledger, self.host, self.row = ledger, host, row
        self.leaf: Leaf | None = None
        self.procs = self.process = self.threads = self.leave = ""
        self.breaches: list[str] = []
        self.isolation = Isolation("affinity", "affinity")
        self.report = Report()
        self._note = note
        self._pcpus = CpuSet.parse(row.pcpus) | CpuSet.parse(row.idle)
        self._next_sweep = 0.0
        self._online = ""
        self._interrupts: tuple[int, ...] = ()
        self._asleep_s = _asleep()
        self._tries: dict[str, int] = {}
        self._again = 0.0
        self._told: set[str] = set()
        self._others: dict[int, CpuSet] = {}  # masks of threads beside vCPUs, when all was well
        self._fds: list[int] = []

    # -- up ----------------------------------------------------------------------------------------------

    def begin(self, wish: Wish) -> Isolation:
        """Go as far up as this host lets, and say how far that is.

        :raises NotPermitted: where the wish requires more; the host is as it was
        :raises HostpartError: where the host can't be changed; whoever calls ends the VM with :meth:`end`
        """
        wish = wish.replace(threaded=bool(self.row.threaded))  # what the ledger says is what is done
        isolation = reach(wish, self.host, self.ledger, self._pcpus)
        while at_least(isolation.reached, "sweep"):
            cycle = self._pcpus if wish.cycle or at_least(isolation.reached, "full") else CpuSet()
            report = self._reconcile(cycle, enter=lambda one=isolation: self._enter(wish, one))
            problems = (*report.problems, *self._check(isolation.reached))
            if not problems:
                break
            lower = LEVELS[LEVELS.index(isolation.reached) - 1]
            isolation = isolation.replace(
                reached=lower,
                stopped_by="; ".join(problems),
                remedy="see 'dmesg | tail', mend what it names, run it again",
            )
            self.ledger.isolate(self.row.id, "affinity")
            self.report = Report()
            below(wish, isolation)
        self.isolation = isolation
        if isolation.reached == "affinity":
            self._reconcile(CpuSet())  # also what a killed process has left
        if at_least(isolation.reached, "cpuset"):
            self._find_place()
        self._online = self._read_online()
        self._next_sweep = time.monotonic() + _SWEEP_S
        return isolation

    def _enter(self, wish: Wish, isolation: Isolation) -> None:
        self.ledger.isolate(self.row.id, isolation.reached, isolation.scope, str(wish.mems), cycle=wish.cycle)
        crash.point("watch.entered")

    def _find_place(self) -> None:
        sets, token, threaded = cpusets(self.host), self.row.token, bool(self.row.threaded)
        if threaded:
            self.process, self.threads = (f"/{name}" if name else "" for name in sets.threads(self.host, token))
            self.leave = f"/{sets.leave(self.host)}"
        elif sets.UNIFIED:
            self.leaf = Leaf("/" + sets.leaf(self.host, token))
        else:
            self.procs = f"/{sets.leaf(self.host, token)}/cgroup.procs"
        self._fds = [
            os.open(self.host.path(name), os.O_RDONLY | os.O_CLOEXEC)
            for name in sets.watch_files(self.host, token, threaded=threaded)
        ]
        for fd in self._fds:
            os.pread(fd, 4096, 0)

    # -- watching ----------------------------------------------------------------------------------------

    def files(self) -> Sequence[int]:
        """Return the descriptors that poll(2) says ``POLLPRI`` of when a partition's state changes."""
        return self._fds

    def look(self) -> None:
        """See whether it holds, and mend what does not."""
        if self.isolation.reached == "affinity":
            return
        try:
            problems = self._check(self.isolation.reached, wait_s=0.0)
        except Busy:
            return  # a VM comes or goes; the next look comes soon
        online, asleep_s = self._read_online(), _asleep()
        slept = asleep_s - self._asleep_s > _SLEPT_S
        changed = slept or online != self._online
        if slept:
            self._tell(f"the host was suspended for {asleep_s - self._asleep_s:.0f} s")
        if online != self._online:
            self._note(f"CPUs {self._online} were online, now {online} are")
        self._online, self._asleep_s = online, asleep_s
        if self.threads and not problems:
            self._others = threads.others(self.host, self.ledger.vcpus(self.row.id))
        for problem in problems:
            if problem not in self.breaches:
                self.breaches.append(problem)
                self._note(problem)
        if changed or problems or self._escaped():
            self._mend(problems, changed=changed)

    def _escaped(self) -> bool:
        if time.monotonic() < self._next_sweep:
            return False
        self._next_sweep = time.monotonic() + _SWEEP_S
        if at_least(self.isolation.reached, "full") and irq.numbers(self.host) != self._interrupts:
            return True  # a device came or went
        return bool(affinity.escapees(self.host, self.ledger.holdings(), guests(self.ledger)))

    def _mend(self, problems: tuple[str, ...], *, changed: bool) -> None:
        tries = [self._tries.get(problem, 0) for problem in problems]
        if problems and min(tries) >= _TRIES and not changed and time.monotonic() < self._again:
            return
        self._again = time.monotonic() + _AGAIN_S
        self._tries |= {problem: count + 1 for problem, count in zip(problems, tries, strict=True)}
        try:
            report = self._reconcile(CpuSet(), wait_s=0.0)
        except Busy:
            return  # another keeper is at it; the next look comes soon
        except HostpartError as error:
            self._tell(str(error))
            return
        self._put_back()
        for who in report.escapees:
            self._tell(f"{who} put itself back onto pCPUs of VM {self.row.name!r}")
        try:
            left = self._check(self.isolation.reached, wait_s=0.0)
        except Busy:
            return  # as above
        if problems and not left:
            self._note("the partition was mended: " + "; ".join(problems))
        for problem in left:
            self._tell(
                f"{problem}, and it could not be mended: {'; '.join(report.problems) or 'the kernel gave no reason'}"
            )

    # -- down --------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Put the host back, as far as no other VM holds it; nothing of the guest may run any more."""
        for fd in self._fds:
            os.close(fd)
        self._fds = []
        crash.point("watch.ending")
        try:
            self._reconcile(CpuSet(), enter=lambda: self.ledger.isolate(self.row.id, "affinity"))
        except HostpartError as error:
            if isinstance(error, Busy):
                self.ledger.isolate(self.row.id, "affinity")  # for whoever comes next
            self._note(f"the host was not put back: {error}; run 'hostpart restore'")
        for text in (*self.report.foreign, *self.report.postponed, *self.report.problems):
            self._tell(text)
        crash.point("watch.ended")

    def to_json(self) -> dict[str, Any]:
        """Return what was met on the host, for the evidence."""
        return {"host": self.report.to_json(), "breaches": list(self.breaches)}

    # -- inside ------------------------------------------------------------------------------------------

    def _reconcile(self, cycle: CpuSet, **more: Any) -> Report:
        interrupts = irq.numbers(self.host)
        try:
            report = reconcile(self.ledger, self.host, cycle=cycle, **more)
        except OSError as error:
            raise worded(error) from error
        self._interrupts = interrupts
        self.report |= report
        return report

    def _check(self, level: str, **more: float) -> tuple[str, ...]:
        if not at_least(level, "cpuset"):
            return ()
        problems = check(self.ledger, self.host, self.row.token, **more)
        return (*problems, *(f"vCPU {row.vcpu} is not in {os.path.dirname(self.threads)}" for row in self._outside()))

    def _outside(self) -> list[VcpuRow]:
        if not self.threads:
            return []
        return threads.outside(self.host, self.ledger.vcpus(self.row.id), self.threads.lstrip("/"))

    def _put_back(self) -> None:
        if not self.threads:
            return
        rows = self.ledger.vcpus(self.row.id)
        try:
            threads.enter(self.host, rows, self.process.lstrip("/"), self.threads.lstrip("/"))
            # Before Linux 6.2 what others do to a cgroup gives all tasks in it, and at the tree's root, other masks.
            there = threads.others(self.host, rows)
            set_masks(self.host, {tid: mask for tid, mask in self._others.items() if tid in there})
        except OSError as error:
            self._tell(f"the vCPUs can't enter {error.filename} again: {error.strerror}")

    def _read_online(self) -> str:
        return self.host.read_text("sys/devices/system/cpu/online").strip()

    def _tell(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            self._note(text)


def _asleep() -> float:
    # Seconds that the host has been suspended since it booted.
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
