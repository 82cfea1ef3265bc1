"""Takes released CPUs offline and online again, once, before their guests start: timers and deferred work that were
queued there go elsewhere, and stay there.

All are offline before the first is online again: what leaves one would else go to the next. It is not undone, as
there is nothing to undo; what it must not do is leave a CPU offline, and so each is in the ledger first.

It is for CPUs that nothing needs any more: a task whose mask has no other CPU gets all CPUs for good, an interrupt
likewise, and a cpuset partition may lose the CPU. Tasks and interrupts are moved before, partitions made after, and
running guests left alone, by :mod:`hostpart.isolation.reconcile`.

Source: Documentation/core-api/cpu_hotplug.rst.
"""

from __future__ import annotations

import os

from ..cpuset import CpuSet
from ..ledger import Known
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..host import Host
    from ..ledger import Ledger
    from .setting import Setting

__all__ = ["cycle", "of"]

_CPU = "sys/devices/system/cpu"
_OFF, _ON = "0", "1"


class _Online(Value):
    key: str

    def read(self, host: Host) -> str:
        return host.read_text(self.key).strip()

    def wanted(self, baseline: str, service: CpuSet, released: CpuSet) -> str:  # noqa: ARG002 - as every setting's
        return baseline

    def write(self, host: Host, value: str) -> None:
        host.write_text(self.key, value)


def of(key: str) -> Setting | None:
    """Return the setting of that ledger key, or ``None`` where it is not a CPU's.

    It wants the CPU online, which is what a killed :func:`cycle` leaves to be done.
    """
    return _Online(key) if _number(key) is not None else None


def cycle(host: Host, ledger: Ledger, cpus: CpuSet) -> list[str]:
    """Take *cpus* (Linux numbers) offline, all of them, and then online again.

    Those that are offline already stay so, unless an earlier call was killed in the middle. A CPU that does not come
    back is kept in the ledger, and tried again by whoever settles it next.

    :return: what did not go as it should, a sentence each with what to do about it
    """
    problems: list[str] = []
    before = _online(host)
    ours = [cpu for key in ledger.known(tasks=False) if (cpu := _number(key)) is not None]
    chosen = []
    for cpu in cpus & before:
        if host.exists(_key(cpu)):
            chosen.append(cpu)
        else:
            # The boot CPU on x86, and every one of a kernel without hotplug.
            problems.append(
                f"CPU {cpu} cannot be taken offline on this kernel, so timers that were set there stay;"
                " leave it to the service VM if that matters"
            )
    if not before - CpuSet.of(chosen):
        problems.append(f"CPU {before} are all there are, and none was taken offline; leave one to the service VM")
        chosen = []
    ledger.remember({_key(cpu): Known(_ON, (_ON, _OFF)) for cpu in chosen})
    try:
        for cpu in chosen:
            try:
                host.write_text(_key(cpu), _OFF)
            except OSError as error:
                problems.append(
                    f"CPU {cpu} could not be taken offline ({error.strerror}), so timers that were set there stay;"
                    " see 'dmesg | tail'"
                )
    finally:
        back, failed = _bring_online(host, sorted({*chosen, *ours}))
        ledger.forget([_key(cpu) for cpu in back])
    return problems + failed


# Returns those that are online now, and a sentence for each that is not.
def _bring_online(host: Host, cpus: list[int]) -> tuple[list[int], list[str]]:
    reasons: dict[int, str] = {}
    for cpu in cpus:
        try:
            if host.read_text(_key(cpu)).strip() == _OFF:
                host.write_text(_key(cpu), _ON)
        except OSError as error:
            reasons[cpu] = error.strerror or os.strerror(error.errno or 0)
    there = CpuSet.of(cpus) if host.rehearses else _online(host)
    failed = [
        f"CPU {cpu} did not come online again ({reasons.get(cpu, 'the kernel does not list it')});"
        f" see 'dmesg | tail', then 'echo 1 > /{_key(cpu)}'"
        for cpu in cpus
        if cpu not in there
    ]
    return [cpu for cpu in cpus if cpu in there], failed


def _online(host: Host) -> CpuSet:
    return CpuSet.parse(host.read_text(f"{_CPU}/online"))


def _key(cpu: int) -> str:
    return f"{_CPU}/cpu{cpu}/online"


def _number(key: str) -> int | None:
    name = key.removeprefix(f"{_CPU}/cpu").removesuffix("/online")
    return int(name) if name.isdigit() and key == _key(int(name)) else None
