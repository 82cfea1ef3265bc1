"""Which CPUs may take an interrupt: the mask of each, and the one that new interrupts begin with.

What is remembered are masks: the CPU that an interrupt really goes to (``effective_affinity_list``) is the kernel's
choice among them, and follows at the next interrupt. Some cannot be steered: the timer, the cascade, and the queues
of drivers that have the kernel spread them (NVMe, virtio). They stay, and :func:`~.setting.settle` reports them. That
nothing else steers them meanwhile is :mod:`hostpart.isolation.irqbalance`'s.

An interrupt that appears while pCPUs are released begins with the default mask, which hostpart has narrowed. It would
keep that for good, so it is entered as one that was narrowed (:func:`newcomers`). Which were there before is written
down with that: one that somebody had set to just that mask is not to be taken for new.

Source: Documentation/core-api/irq/irq-affinity.rst.
"""

from __future__ import annotations

import errno

from ..cpuset import CpuSet
from ..ledger import Known
from .setting import MaskFile

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..host import Host
    from .setting import Setting

__all__ = ["NOTES", "newcomers", "numbers", "of", "settings"]

_IRQ = "proc/irq"
_DEFAULT = f"{_IRQ}/default_smp_affinity"
_FILE = "smp_affinity_list"
# Keys in the ledger, as long as anything is released: the interrupts that have been looked at, by number, and what the
# default mask was and has been since.
_SEEN, _BEGAN = "irq:seen", "irq:default"
NOTES = (_SEEN, _BEGAN)


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
    files = [_DEFAULT, *(_key(number) for number in numbers(host))]
    return [setting for key in files if host.exists(key) and (setting := of(key)) is not None]


def numbers(host: Host) -> tuple[int, ...]:
    """Return the numbers of the interrupts that are there; none where ``/proc/irq`` is not there."""
    try:
        names = host.listdir(_IRQ)
    except OSError:
        return ()
    return tuple(sorted(int(name) for name in names if name.isascii() and name.isdigit()))


def newcomers(host: Host, known: Mapping[str, Known], released: CpuSet) -> dict[str, Known]:
    """Return what the ledger is to be told before interrupts are settled: of those that appeared meanwhile, and what
    tells them from the others next time.

    One counts as new if it was not there at the last call, or has gone since, and has the mask that the kernel gives
    an interrupt under a default of hostpart's. Its baseline is the one that it would have had otherwise.

    :param known: what the ledger has
    :param released: the pCPUs (Linux numbers) that it is about to be settled for; empty: the default comes back
    """
    default = MaskFile(_DEFAULT, hexadecimal=True)
    there = numbers(host)
    if not there or not host.exists(_DEFAULT):
        return {}
    entries: dict[str, Known] = {}
    began = known.get(_BEGAN)
    if began is not None:
        seen = frozenset(known[_SEEN].ours) if _SEEN in known else frozenset(map(str, there))
        for number in there:
            if str(number) not in seen and _key(number) not in known:
                entries |= _entered(host, number, began)
    if released:
        now = default.read(host)
        began = began or Known(now, (now,))
        # Also the one that is about to be written: an interrupt may come with it before the next call.
        will = default.wanted(began.baseline, CpuSet(), released)
        entries[_BEGAN] = Known(began.baseline, tuple(dict.fromkeys((*began.ours, will))))
        entries[_SEEN] = Known("", tuple(map(str, there)))
    return {key: one for key, one in entries.items() if known.get(key) != one}


def _entered(host: Host, number: int, began: Known) -> dict[str, Known]:
    try:
        now = MaskFile(_key(number)).read(host)
        before, *narrowed = (_first_mask(host, number, CpuSet.parse(mask)) for mask in (began.baseline, *began.ours))
    except OSError:
        return {}  # it has gone again, or it is one that can't be read
    is_ours = now != str(before) and now in map(str, narrowed)
    return {_key(number): Known(str(before), (now,))} if is_ours else {}


def _first_mask(host: Host, number: int, default: CpuSet) -> CpuSet:
    # What irq_setup_affinity() of kernel/irq/manage.c makes of the default: of its CPUs that are online those of the
    # device's node, where there are any.
    online = CpuSet.parse(host.read_text("sys/devices/system/cpu/online"))
    found = default & online or online
    try:
        node = host.read_text(f"{_IRQ}/{number}/node").strip()
        near = CpuSet.parse(host.read_text(f"sys/devices/system/node/node{node}/cpulist"))
    except OSError:  # it is on no node (-1), or the kernel knows none
        return found
    return found & near or found


def _key(number: int) -> str:
    return f"{_IRQ}/{number}/{_FILE}"


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not an interrupt's."""
    if key == _DEFAULT:
        return MaskFile(key, hexadecimal=True)
    top, _, file = key.rpartition("/")
    folder, _, number = top.rpartition("/")
    return _Interrupt(key) if folder == _IRQ and number.isdigit() and file == _FILE else None
