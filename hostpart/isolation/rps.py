"""Which CPUs a network queue hands its packets to, where such steering is on; an empty mask is "off" and stays so.

Only interfaces of this network namespace are there to be seen. Where the kernel keeps CPUs from housekeeping since
boot it refuses a mask that names none but those.

Source: Documentation/networking/scaling.rst, "RPS: Receive Packet Steering".
"""

from __future__ import annotations

from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_NET = "sys/class/net"
_FILE = "rps_cpus"


def settings(host: Host) -> list[Setting]:
    """Return the mask of each queue, by interface and queue."""
    found: list[Setting] = []
    for interface in _listed(host, _NET):
        folder = f"{_NET}/{interface}/queues"
        queues = sorted(
            (name for name in _listed(host, folder) if name.startswith("rx-")), key=lambda name: int(name[3:])
        )
        keys = [f"{folder}/{queue}/{_FILE}" for queue in queues]
        found += [setting for key in keys if host.exists(key) and (setting := of(key)) is not None]
    return found


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not a network queue's."""
    its = key.startswith(f"{_NET}/") and key.endswith(f"/{_FILE}")
    return MaskFile(key, hexadecimal=True, empty=True) if its else None


def _listed(host: Host, folder: str) -> list[str]:
    try:
        return host.listdir(folder)
    except OSError:  # an interface that went away; a plain file among them (bonding_masters); no network at all
        return []
