"""Brings the whole host to what the VMs in the ledger ask for: on the way up, on the way down, and after a crash.

There is one function, :func:`reconcile`, and it asks only what *is* held now, by the ledger. A VM that starts enters
itself there first, one that ends strikes itself out first, and one that was killed is struck out by whoever finds
it; each then calls this. So VMs that start and end in any order never undo each other, and a call that was killed at
any instant is mended by the next. When nothing is held any more every baseline is restored and forgotten.

The order is what the kernel needs: tasks leave the pCPUs before interrupts and before the CPUs are taken offline and
online, that before a partition is made (a cycle breaks one); on the way back the partition goes first, since masks
cannot be widened inside it, and masks come last, since making and removing a partition rewrites some of them.
"""

from __future__ import annotations

import errno
import os

from ..cpuset import CpuSet
from ..errors import Failed, HostpartError
from ..host import Host
from ..ledger import Known
from ..procfs import start_time
from ..value import Value
from . import (
    affinity,
    attached,
    cpuset1,
    hotplug,
    irq,
    irqbalance,
    partition,
    pins,
    rps,
    stat_interval,
    watchdog,
    workqueue,
    writeback,
)
from .level import at_least
from .setting import Outcome, settle
from .turn import take

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import ModuleType
    from typing import Any

    from ..ledger import Holding, Ledger

__all__ = ["Report", "bring", "check", "cpusets", "guests", "reconcile", "released", "worded"]

# From which level on, in the order of a release; on the way back it is the other way round, so that irqbalance
# goes on last.
_SETTINGS: tuple[tuple[str, ModuleType], ...] = (
    ("full", irqbalance),
    ("full", irq),
    ("cpuset", workqueue),
    ("cpuset", writeback),
    ("full", watchdog),
    ("full", stat_interval),
    ("full", rps),
)
_LOCK_WAIT_S = 60.0  # a sweep of ten thousand tasks takes a second or two, and several VMs may start at once
_WIDE = "wide"


class Report(Value):
    """What :func:`reconcile` did and met; sentences for people, empty where there is nothing to say.

    :ivar problems: why a level is not what was asked
    :ivar foreign: settings and tasks that somebody else changed meanwhile; they were left alone
    :ivar remains: what could not be moved and may run on the guests' pCPUs all the same
    :ivar unavoidable: what differs from before because the kernel changed it and lets nobody put it back
    :ivar postponed: what waits for a CPU to come online again
    :ivar escapees: tasks that put themselves back
    :ivar moved: how many tasks were given another mask
    """

    problems: tuple[str, ...] = ()
    foreign: tuple[str, ...] = ()
    remains: tuple[str, ...] = ()
    unavoidable: tuple[str, ...] = ()
    postponed: tuple[str, ...] = ()
    escapees: tuple[str, ...] = ()
    moved: int = 0

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the evidence and for ``--json``."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.asdict().items()}

    def __or__(self, other: Report) -> Report:
        """Return both, each sentence once."""
        mine, its = self.asdict(), other.asdict()
        both = {name: tuple(dict.fromkeys((*mine[name], *its[name]))) for name in mine if name != "moved"}
        return Report(**both, moved=self.moved + other.moved)


def released(holdings: list[Holding], level: str) -> CpuSet:
    """Return the pCPUs (Linux numbers) that VMs of at least *level* hold."""
    found = CpuSet()
    for one in holdings:
        if at_least(one.level, level):
            found |= one.released
    return found


def cpusets(host: Host) -> ModuleType:
    """Return the module for the cpusets that this host has: version 1 where the controller is in such a hierarchy."""
    return cpuset1 if cpuset1.mounted(host) else partition


def guests(ledger: Ledger) -> frozenset[int]:
    """Return the processes below which all is a VM's, and no sweep's: live keepers, and those that were attached."""
    # A number may be another process's by now, which is to be moved like any other.
    keepers = (row for row in ledger.vms() if not row.service)
    live = frozenset(row.keeper_pid for row in keepers if start_time(row.keeper_pid) == row.keeper_start)
    return live | attached.processes(ledger)


def reconcile(
    ledger: Ledger,
    host: Host | None = None,
    *,
    cycle: CpuSet | None = None,
    wait_s: float = _LOCK_WAIT_S,
    enter: Callable[[], None] = lambda: None,
) -> Report:
    """Bring the host to what the ledger's VMs hold now; with none, to what it was.

    :param enter: enters in the ledger what a VM holds from now on; done so that nobody's :func:`check` comes between
    :param cycle: pCPUs to take offline and online on the way: those of a VM whose guest has not started yet
    :param wait_s: how long to wait for another process that does the same
    :raises Busy: where that one does not finish
    :raises OSError: what no mechanism expects of the kernel
    """
    host = host or Host()
    if host.rehearses:
        enter()
        return _reconcile(ledger, host, cycle or CpuSet())  # on a copy of the ledger, which is its caller's alone
    turn = take(ledger.directory, wait_s)
    try:
        enter()
        return _reconcile(ledger, host, cycle or CpuSet())
    finally:
        os.close(turn)


def check(ledger: Ledger, host: Host, token: str, wait_s: float = _LOCK_WAIT_S) -> list[str]:
    """Return what does not hold of the cgroups that keep the host off the pCPUs of the VM with that *token*, a sentence
    each.

    While a VM comes or goes they are not as the ledger has them, which is nothing to complain of: what was found is
    looked at again where nobody changes anything.

    :param wait_s: how long to wait for that
    :raises Busy: where another process still brings the host somewhere
    """
    sets = cpusets(host)
    if not sets.check(host, ledger.holdings(), token):
        return []
    turn = take(ledger.directory, wait_s)
    try:
        return list(sets.check(host, ledger.holdings(), token))
    finally:
        os.close(turn)


def _reconcile(ledger: Ledger, host: Host, cycle: CpuSet) -> Report:
    holdings, known = ledger.holdings(), ledger.known(tasks=False)
    if not holdings and not known and not ledger.remembers():
        return Report()
    keepers = guests(ledger)
    if _WIDE in known:  # a killed call was at the cgroups
        pins.give_back(host, ledger, keepers, known[_WIDE].ours)
    problems, foreign = attached.leave(host, ledger)
    report = Report(problems=(*_bring_online(ledger, host, known), *problems), foreign=tuple(foreign))
    sets = cpusets(host)
    inside = sets.held(host, ledger)  # what the cgroups keep from the host at this moment
    taken = released(holdings, "cpuset")
    if cycle or not taken <= inside or (taken != inside and sets.rewrites(host)):
        if not taken <= inside and sets.remembered(known):
            # It is broken, and the kernel has rewritten masks with it as when it is removed.
            ledger.remember({_WIDE: Known("", sets.wide(host, holdings))})
        # What a partition still has is not to be given back to tasks before it is gone. And what others have set
        # meanwhile is written down before the kernel makes it its own.
        there = [*holdings, *_as_holdings(inside)]
        report |= _sweep(host, ledger, there, keepers)
        report |= _settle(host, ledger, holdings)
    if cycle or released(holdings, "cpuset") or sets.remembered(known):
        # Making and removing partitions rewrites masks; what is written down now tells ours from others' later.
        wide = sets.wide(host, holdings)
        ledger.remember({_WIDE: Known("", wide), **({} if host.rehearses else pins.held(keepers))})
        if cycle:
            report |= Report(problems=tuple(hotplug.cycle(host, ledger, cycle)))
        if released(holdings, "cpuset") or sets.remembered(known):
            report |= Report(problems=tuple(sets.settle(host, ledger, holdings)))
        pins.give_back(host, ledger, keepers, wide)
    report |= _settle(host, ledger, holdings)
    attached.unpin(host, ledger)
    report |= _sweep(host, ledger, holdings, keepers)
    ledger.forget([_WIDE])
    return report


def _as_holdings(cpus: CpuSet) -> list[Holding]:
    from ..ledger import Holding

    return [Holding("", 0, 0, "cpuset", "host", cpus, CpuSet(), CpuSet(), False)] if cpus else []


def _sweep(host: Host, ledger: Ledger, holdings: list[Holding], keepers: frozenset[int]) -> Report:
    swept = affinity.settle(host, ledger, holdings, keepers)
    return Report(
        foreign=swept.foreign,
        remains=swept.refused,
        unavoidable=swept.unavoidable,
        postponed=swept.postponed,
        escapees=swept.escapees,
        moved=swept.moved,
    )


def _settle(host: Host, ledger: Ledger, holdings: list[Holding]) -> Report:
    service = CpuSet.parse(host.read_text("sys/devices/system/cpu/online")) - released(holdings, "sweep")
    outcomes = bring(host, ledger, {level: released(holdings, level) for level, _ in _SETTINGS}, service)
    return Report(
        foreign=tuple(
            f"/{one.key} has {one.now or 'nothing'}, which hostpart did not write; it was left"
            for one in outcomes
            if one.what == "foreign"
        ),
        remains=tuple(f"/{one.key} stays {one.now}: {one.why}" for one in outcomes if one.what == "refused"),
    )


def bring(host: Host, ledger: Ledger, taken: Mapping[str, CpuSet], service: CpuSet) -> list[Outcome]:
    """Settle the small settings of every mechanism, in order.

    :param taken: the pCPUs that VMs of at least each level hold
    :param service: those that are left to the host
    """
    outcomes: list[Outcome] = []
    for level, mechanism in _SETTINGS if any(taken.values()) else reversed(_SETTINGS):
        if mechanism is irq and (entries := irq.newcomers(host, ledger.known(tasks=False), taken[level])):
            ledger.remember(entries)
        outcomes += _bring(host, ledger, mechanism, taken[level], service)
        notes = [key for key in irq.NOTES if key in ledger.known(tasks=False)] if mechanism is irq else []
        if notes and not taken[level]:
            # What appeared just before the default mask came back.
            if late := irq.newcomers(host, ledger.known(tasks=False), CpuSet()):
                ledger.remember(late)
                outcomes += _bring(host, ledger, irq, CpuSet(), service)
            ledger.forget(notes)
    return outcomes


def _bring(host: Host, ledger: Ledger, mechanism: ModuleType, taken: CpuSet, service: CpuSet) -> list[Outcome]:
    known = ledger.known(tasks=False)
    there = {one.key: one for one in mechanism.settings(host)} if taken else {}
    there |= {key: one for key in known if (one := mechanism.of(key)) is not None and key not in there}
    return settle(there.values(), known, taken, service, host, ledger.remember, ledger.forget)


def _bring_online(ledger: Ledger, host: Host, known: dict[str, Known]) -> list[str]:
    # A CPU that a killed process left offline in the middle of its cycle.
    off = [one for key in known if (one := hotplug.of(key)) is not None]
    outcomes = settle(off, known, CpuSet(), CpuSet(), host, ledger.remember, ledger.forget) if off else []
    return [f"/{one.key} stays {one.now}: {one.why}" for one in outcomes if one.what == "refused"]


def worded(error: OSError) -> HostpartError:
    """Return what a mechanism did not expect of the kernel, as an error with a remedy."""
    where = f" at {error.filename}" if error.filename else ""
    name = errno.errorcode.get(error.errno or 0, "no errno")
    return Failed(
        f"the kernel refused to isolate pCPUs{where}: {error.strerror} ({name})",
        "run 'hostpart restore' to put the host back, and see 'dmesg | tail'",
    )
