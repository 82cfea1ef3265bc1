"""On which CPUs the kernel's unbound workqueues may run their work.

From Linux 6.8 on an isolated cpuset partition narrows the mask in force by itself, and ``cpumask_requested`` keeps
what was asked for: that is what is remembered and put back. A write of ``cpumask`` then replaces both, whatever is
isolated at that moment. So where CPUs are isolated that this setting was not narrowed for (somebody else's partition,
``isolcpus=``) it is left as it is: no write could bring back that state, and a partition of hostpart's own keeps the
work off without it.

Kernel threads of work that is bound to a CPU stay there.

Source: Documentation/core-api/workqueue.rst, "Affinity Scopes"; kernel commit fe28f631fa94.
"""

from __future__ import annotations

from ..cpuset import CpuSet
from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_FOLDER = "sys/devices/virtual/workqueue"
_FILE = f"{_FOLDER}/cpumask"
_REQUESTED = f"{_FOLDER}/cpumask_requested"
_ISOLATED = f"{_FOLDER}/cpumask_isolated"


class _Unbound(MaskFile):
    # Written in one file and, where there is such a one, read in another.

    def read(self, host: Host) -> str:
        # A rehearsal has what it wrote in the file that it wrote.
        other = not host.rehearses and host.exists(_REQUESTED)
        return str(CpuSet.parse_mask(host.read_text(_REQUESTED if other else self.key)))


def settings(host: Host) -> list[Setting]:
    """Return the one mask; nothing where there is none, or where CPUs are isolated already."""
    if not host.exists(_FILE):
        return []
    if host.exists(_ISOLATED) and CpuSet.parse_mask(host.read_text(_ISOLATED)):
        return []
    return [_Unbound(_FILE, hexadecimal=True)]


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not this one."""
    return _Unbound(key, hexadecimal=True) if key == _FILE else None
