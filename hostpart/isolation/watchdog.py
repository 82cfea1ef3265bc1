"""On which CPUs the kernel watches for lockups: on each of these a timer, and a thread of the highest priority.

Source: Documentation/admin-guide/lockup-watchdogs.rst.
"""

from __future__ import annotations

from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_FILE = "proc/sys/kernel/watchdog_cpumask"


def settings(host: Host) -> list[Setting]:
    """Return the one mask; nothing where the kernel has no such watchdog."""
    setting = of(_FILE)
    return [setting] if setting is not None and host.exists(_FILE) else []


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not this one."""
    # The empty set is no watching at all, and a write of nothing changes nothing.
    return MaskFile(key, empty=True) if key == _FILE else None
