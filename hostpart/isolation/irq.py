"""Which CPUs may take an interrupt: the mask of each, and the one that new interrupts begin with.

What is remembered are masks: the CPU that an interrupt really goes to (``effective_affinity_list``) is the kernel's
choice among them, and follows at the next interrupt. Some cannot be steered: the timer, the cascade, and the queues
of drivers that have the kernel spread them (NVMe, virtio). They stay, and :func:`~.setting.settle` reports them. That
nothing else steers them meanwhile is :mod:`hostpart.isolation.irqbalance`'s.

Source: Documentation/core-api/irq/irq-affinity.rst.
"""

from __future__ import annotations

import errno

from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from .setting import Setting

__all__ = ["of", "settings"]

_IRQ = "proc/irq"
_DEFAULT = f"{_IRQ}/default_smp_affinity"
_FILE = "smp_affinity_list"


class _Interrupt(MaskFile):
    # A file in list form, whose refusal is worth a sentence.

    def write(self, host: Host, value: str) -> None:
        try:
            super().write(host, value)
        except OSError as error:
            # EIO on 6.1, EPERM since (the interrupt is there and its chip or its driver will not have it moved).
            if error.errno not in (errno.EIO, errno.EPERM):
                raise
            raise OSError(
                error.errno, f"the kernel does not let this interrupt be steered{self._target(host)}"
            ) from None

    def _target(self, host: Host) -> str:
        try:
            cpus = host.read_text(self.key.replace(_FILE, "effective_affinity_list")).strip()
        except OSError:
            return ""
        return f"; it goes to CPU {cpus}" if cpus else "; it is not in use"


def settings(host: Host) -> list[Setting]:
    """Return the default mask and each interrupt's, by number; nothing where ``/proc/irq`` is not there."""
    try:
        names = host.listdir(_IRQ)
    except OSError:
        return []
    numbers = sorted(int(name) for name in names if name.isascii() and name.isdigit())
    files = [_DEFAULT, *(f"{_IRQ}/{number}/{_FILE}" for number in numbers)]
    return [setting for key in files if host.exists(key) and (setting := of(key)) is not None]


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not an interrupt's."""
    if key == _DEFAULT:
        return MaskFile(key, hexadecimal=True)
    top, _, file = key.rpartition("/")
    folder, _, number = top.rpartition("/")
    return _Interrupt(key) if folder == _IRQ and number.isdigit() and file == _FILE else None
