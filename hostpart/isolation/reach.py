"""How far up the ladder this caller can go on this host, asked before anything is changed.

The kernel has the last word: a level that looks within reach may still be refused when it is tried, and whoever
tries (:mod:`hostpart.keeper`) goes down from there with :func:`below`.
"""

from __future__ import annotations

import os

from ..cpuset import CpuSet
from ..errors import NotPermitted, UsageError, as_root
from . import reconcile
from .level import LEVELS, Isolation, Wish, at_least
from .scope import default_scope, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from ..ledger import Ledger

__all__ = ["below", "reach"]


def reach(wish: Wish, host: Host, ledger: Ledger, wanted: CpuSet | None = None) -> Isolation:
    """Say which level can be had.

    :param wanted: the pCPUs (Linux numbers) it is for; None where they are not known yet
    :raises UsageError: for a scope that cannot be meant
    :raises NotPermitted: where the wish requires more; nothing has changed
    """
    if wish.level == "affinity":
        return Isolation("affinity", "affinity")
    scope = wish.scope or default_scope()
    try:
        parse(scope)
    except ValueError as error:
        raise UsageError(f"--scope {scope}: {error}", "say host, user, tree:PID or cgroup:/PATH") from None
    reached, why, remedy = "affinity", "", ""
    for level in LEVELS[1 : LEVELS.index(wish.level) + 1]:
        why, remedy = _obstacle(level, scope, host, ledger, wanted or CpuSet(), threaded=wish.threaded)
        if why:
            break
        reached = level
    return below(wish, Isolation(wish.level, reached, scope, why, remedy, _remains(reached, scope)))


def below(wish: Wish, isolation: Isolation) -> Isolation:
    """Return *isolation*, unless it is lower than the wish requires.

    :raises NotPermitted: where it is
    """
    if wish.require and isolation.reached != wish.level:
        raise NotPermitted(
            f"level {wish.level!r} is required and cannot be reached: {isolation.stopped_by}", isolation.remedy
        )
    return isolation


def _obstacle(level: str, scope: str, host: Host, ledger: Ledger, wanted: CpuSet, *, threaded: bool) -> tuple[str, str]:
    # Why the level cannot be had, given that the ones below it can, and what would change that.
    root = os.geteuid() == 0
    if level == "sweep":
        if not root and not scope.startswith(("user", "tree:", "cgroup:")):
            return f"scope {scope!r} has other users' tasks in it, which only root may move", as_root()
        online = CpuSet.parse(host.read_text("sys/devices/system/cpu/online"))
        if len(online) < 2:
            return "this host has one CPU online, and the host itself needs that", "bring another CPU online"
        if wanted and not online - wanted - reconcile.released(ledger.holdings(), "sweep"):
            return (
                f"with pCPU {wanted} no CPU would be left for the host itself",
                f"ask for fewer than the {len(online)} there are",
            )
        return "", ""
    if level == "cpuset":
        sets = reconcile.cpusets(host)
        # Of what an administrator has set apart and handed over nothing is taken from anybody else.
        handed_over = sets.handed_over(host)
        if not handed_over and scope != "host" and (root or scope != "user"):
            return (
                f"a cpuset keeps every task of the host off, and the scope is {scope!r}",
                f"run it {'' if root else 'as root '}with --scope host",
            )
        if not root and not handed_over:
            return "taking pCPUs from other users' tasks for good needs root", as_root()
        held = wanted | reconcile.released(ledger.holdings(), "cpuset")
        found = sets.obstacle(host, ledger, held, threaded=threaded)
        return (found.problem, found.remedy) if found is not None else ("", "")
    if not root:
        return "interrupts and the online state of CPUs are root's to change", as_root()
    for name in ("proc/irq/default_smp_affinity", *(f"sys/devices/system/cpu/cpu{cpu}/online" for cpu in wanted)):
        path = host.path(name)
        if host.exists(name) and not os.access(path, os.W_OK):
            return f"{path} can't be written: the mount is read-only", f"have it mounted writable: 'findmnt -T {path}'"
    return "", ""


def _remains(reached: str, scope: str) -> tuple[str, ...]:
    if not at_least(reached, "sweep"):
        return ("every task of the host may run there",)
    if at_least(reached, "full"):
        return ("kernel threads that belong to one CPU",)
    said = []
    if not at_least(reached, "cpuset"):
        said.append(
            "tasks that put themselves back, until the next look"
            if scope == "host"
            else f"all tasks outside scope {scope!r}"
        )
        said.append("unbound kernel workers")
    return (*said, "interrupts, timers that were armed there before, and kernel threads that belong to one CPU")
