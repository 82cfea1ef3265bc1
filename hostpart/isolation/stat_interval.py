"""How often, in seconds, each CPU folds its counters of memory use into the machine's.

One interval for all CPUs, done by a worker thread on each that has something to fold. While pCPUs are released it is
long; figures in ``/proc/vmstat`` may then lag as much.

Source: Documentation/admin-guide/sysctl/vm.rst, "stat_interval".
"""

from __future__ import annotations

from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..cpuset import CpuSet
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_FILE = "proc/sys/vm/stat_interval"
_LONG_S = 120


class _Interval(Value):
    key: str = _FILE

    def read(self, host: Host) -> str:
        return str(int(host.read_text(self.key)))

    def wanted(self, baseline: str, service: CpuSet, released: CpuSet) -> str:  # noqa: ARG002 - as every setting's
        return str(max(_LONG_S, int(baseline)))

    def write(self, host: Host, value: str) -> None:
        host.write_text(self.key, value)


def settings(host: Host) -> list[Setting]:
    """Return the one interval; nothing where the kernel has none."""
    return [_Interval()] if host.exists(_FILE) else []


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not this one."""
    return _Interval() if key == _FILE else None
