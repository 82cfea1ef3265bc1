"""The rungs of the ladder, and what became of a wish for one.

``affinity`` pins the guests. ``sweep`` moves other tasks off their pCPUs. ``cpuset`` has the kernel keep them off.
``full`` moves interrupts, timers and the kernel's own housekeeping as well.
"""

from __future__ import annotations

from ..cpuset import CpuSet
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["LEVELS", "Isolation", "Wish", "at_least"]

LEVELS = ("affinity", "sweep", "cpuset", "full")


def at_least(level: str, wanted: str) -> bool:
    """Whether *level* does all that *wanted* does."""
    return LEVELS.index(level) >= LEVELS.index(wanted)


class Wish(Value):
    """What was asked for.

    :ivar scope: whose tasks may be moved; empty: as :func:`hostpart.isolation.scope.default_scope` says
    :ivar require: whether a lower level than *level* is an error
    :ivar mems: NUMA nodes that the guest's memory is bound to; empty: not bound
    :ivar cycle: whether the pCPUs are taken offline and online first at every level (``release = "hotplug"``)
    :ivar threaded: whether some vCPUs are threads of a process whose other threads stay with the host
    """

    level: str = "affinity"
    scope: str = ""
    require: bool = False
    mems: CpuSet = CpuSet()
    cycle: bool = False
    threaded: bool = False


class Isolation(Value):
    """What became of a wish for isolation.

    :ivar scope: whose tasks are moved: ``host``, ``user``, ``tree:PID`` or ``cgroup:PATH``
    :ivar stopped_by: why *reached* is below *asked*; empty where it is not
    :ivar remedy: the command or edit that would raise it; empty likewise
    :ivar remains: what may run on the guests' pCPUs all the same, a sentence each
    """

    asked: str
    reached: str
    scope: str = ""
    stopped_by: str = ""
    remedy: str = ""
    remains: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the evidence."""
        return {**self.asdict(), "remains": list(self.remains)}
