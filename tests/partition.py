"""A hypervisor with leases and a ledger of its own, on a machine of any shape.

The machine's pCPUs have numbers beyond those of the host, so what other programs are pinned to plays no part. Its
workers are one process that sleeps: what is tested with it is who has what, not what runs there.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hostpart import hypercall as hc
from hostpart.allocator import POLICIES, SMT_MODES
from hostpart.cpuset import CpuSet
from hostpart.hypervisor import Hypervisor, Vcpu, Vm
from hostpart.lease import Leases
from hostpart.ledger import Ledger, VmRow, boot_id
from hostpart.procfs import start_time
from hostpart.topology import Pcpu, Topology

FIRST = 64  # above the numbers of the machines that tests run on


def machine(cpus: Iterable[int], threads_per_core: int = 1) -> Topology:
    """Return a machine of one package with these pCPUs, neighbours in the list being threads of one core."""
    cpus = list(cpus)
    pcpus = tuple(
        Pcpu(cpu, at // threads_per_core, 0, None, 0, 0, apic_id=2 * cpu) for at, cpu in enumerate(sorted(cpus))
    )
    return Topology(pcpus, CpuSet.of(cpus))


def row(name: str, token: str | None = None) -> VmRow:
    """Return what the ledger shall have of a VM whose keeper is this process."""
    pid = os.getpid()
    token = token or os.urandom(16).hex()
    return VmRow(0, name, 0, token, boot_id(), "INIT", 0, "sleep", pid, start_time(pid) or 0, pid, time.time())


class Partition:
    """One hypervisor and what is below it; use it as a context manager.

    :param root: where its lease directory and its ledger are; without it, a temporary directory of its own
    """

    def __init__(
        self, topology: Topology, root: Path | None = None, *, boot: Callable[[Vm, Vcpu], int] | None = None
    ) -> None:
        self._own = None if root else tempfile.TemporaryDirectory()
        self.root = root or Path(self._own.name if self._own else "")
        (self.root / "run").mkdir(mode=0o700, exist_ok=True)
        (self.root / "leases").mkdir(exist_ok=True)
        self.topology = topology
        self.leases = Leases(str(self.root / "leases"))
        self.ledger = Ledger(str(self.root / "run"))
        self.idle = subprocess.Popen(["sleep", "1000"])
        self.hypervisor = Hypervisor(topology, self.leases, self.ledger, boot or (lambda *_: self.idle.pid))
        self._names = 0

    def __enter__(self) -> Partition:
        return self

    def __exit__(self, *_: object) -> None:
        self.idle.kill()
        self.idle.wait()
        for vm in self.hypervisor.vms.values():
            for fd in (*vm.leases.values(), *vm.kept.values()):
                os.close(fd)
        self.ledger.close()
        if self._own:
            self._own.cleanup()

    def wish(
        self,
        count: int,
        pcpus: tuple[int, ...] = (),
        *,
        policy: str = "first-fit",
        smt: str = "shared",
        name: str | None = None,
        keep: tuple[int, ...] = (),
        keep_count: int = 1,
        reserve: tuple[int, ...] = (),
    ) -> bytearray:
        """Announce a VM and return the buffer that creates it."""
        self._names += 1
        token = self.hypervisor.announce(row(name or f"vm-{self._names}"))
        kinds = POLICIES.index(policy), SMT_MODES.index(smt)
        return hc.CreateVm(count, token, *kinds, 0, pcpus, reserve, keep, keep_count).pack()

    def create(self, count: int, pcpus: tuple[int, ...] = (), **more: object) -> int:
        """Create a VM and return the hypercall's result."""
        return self.hypervisor.hypercall(hc.HC_CREATE_VM, self.wish(count, pcpus, **more))  # type: ignore[arg-type]

    def pcpus(self, vmid: int) -> tuple[int, ...]:
        """Return where the VM was placed, vCPU by vCPU."""
        return self.hypervisor.vms[vmid].placement.pcpus

    def destroy(self, vmid: int) -> int:
        """End a VM's vCPUs and destroy it."""
        vm = self.hypervisor.vms[vmid]
        for vcpu in list(vm.vcpus.values()):
            if vcpu.state != "ZOMBIE":
                self.hypervisor.vcpu_ended(vm, vcpu)
        return self.hypervisor.hypercall(hc.HC_DESTROY_VM, vmid)

    def taken(self) -> CpuSet:
        """Return what is leased, asked of the kernel."""
        with self.leases.lock():
            return self.leases.survey(self.topology.online).taken

    def kept(self) -> CpuSet:
        """Return what service VMs keep, asked of the kernel."""
        with self.leases.lock():
            return self.leases.survey(self.topology.online).kept

    def untouched(self) -> bool:
        """Whether no lease and no row is there."""
        return not self.taken() and not self.kept() and not self.ledger.vms()
