"""Which VMs there are and who holds which pCPU, from ledger, leases and /proc together."""

from __future__ import annotations

import time

from .cpuset import CpuSet
from .host import Host
from .lease import Holder, Leases
from .ledger import ATTACHED, Ledger, VcpuRow, VmRow
from .recovery import dirty
from .topology import read_topology
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Census", "census", "holders", "leases_of_others"]


class Census(Value):
    """One VM of the caller's.

    :ivar state: as in the ledger, or ``dirty`` where its keeper is gone
    """

    row: VmRow
    vcpus: tuple[VcpuRow, ...]
    state: str

    @property
    def attached(self) -> bool:
        """Whether its processes ran before, so that they are not below its keeper."""
        return self.row.guest.startswith(ATTACHED)

    @property
    def age(self) -> str:
        """How long it has been there, for people."""
        seconds = max(0, int(time.time() - self.row.started))
        if seconds < 60:
            return f"{seconds}s"
        if seconds < 3600:
            return f"{seconds // 60}m{seconds % 60:02d}s"
        return f"{seconds // 3600}h{seconds // 60 % 60:02d}m"

    def to_json(self) -> dict[str, Any]:
        """Return the fields that scripts may rely on."""
        return {
            "vm": self.row.name,
            "service": bool(self.row.service),
            "state": self.state,
            "vcpus": [
                {"vcpu": v.vcpu, "pcpu": v.pcpu, "pid": v.pid, "tid": v.tid or None, "state": v.state}
                for v in self.vcpus
            ],
            "idle": self.row.idle,
            "keeper": self.row.keeper_pid,
            "started": self.row.started,
            "guest": self.row.guest,
            "log": self.row.log or None,
        }


def census() -> list[Census]:
    """Return the caller's VMs, oldest first.

    :raises LedgerUnusable: where the ledger cannot be read
    """
    with Ledger() as ledger:
        gone = {row.id for row in dirty(ledger)}
        return [
            Census(row, tuple(ledger.vcpus(row.id)), "dirty" if row.id in gone else row.state) for row in ledger.vms()
        ]


def leases_of_others(vms: list[Census]) -> list[tuple[int, Holder]]:
    """Return the leased pCPUs that none of *vms* accounts for, each with a process that holds it."""
    leases = Leases()
    own = {vcpu.pcpu for vm in vms if not vm.row.service for vcpu in vm.vcpus}
    own |= {cpu for vm in vms for cpu in CpuSet.parse(vm.row.idle)}
    online = read_topology(Host()).online
    with leases.lock():
        taken = leases.survey(online).taken
    held = leases.holders(taken)
    return [(cpu, held[cpu][0]) for cpu in taken if cpu not in own and cpu in held]


def holders(cpus: CpuSet) -> dict[int, str]:
    """Return who holds each of *cpus*, for people: a VM's name where it is the caller's, else the process."""
    names: dict[int, str] = {}
    for vm in census():
        if not vm.row.service and vm.state != "dirty":
            names |= {vcpu.pcpu: vm.row.name for vcpu in vm.vcpus}
            names |= dict.fromkeys(CpuSet.parse(vm.row.idle), f"{vm.row.name} (idle)")
    leases = Leases()
    with leases.lock():
        survey = leases.survey(cpus)
    held = leases.holders(survey.taken)
    for cpu in survey.taken:
        if cpu not in names:
            names[cpu] = str(held[cpu][0]) if cpu in held else "another user"
    return {**dict.fromkeys(survey.kept, "service VM"), **names}
