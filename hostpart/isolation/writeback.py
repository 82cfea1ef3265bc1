"""On which CPUs the kernel writes dirty pages back: a mask of its own beside that of all unbound workqueues.

An empty mask stands for the latter's, and is left.

Source: Documentation/core-api/workqueue.rst.
"""

from __future__ import annotations

from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_FILE = "sys/devices/virtual/workqueue/writeback/cpumask"


def settings(host: Host) -> list[Setting]:
    """Return the one mask; nothing where the kernel has none."""
    setting = of(_FILE)
    return [setting] if setting is not None and host.exists(_FILE) else []


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not this one."""
    return MaskFile(key, hexadecimal=True, empty=True) if key == _FILE else None
