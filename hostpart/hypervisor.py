"""The hypervisor's side: the pCPU array, and the life of VMs and vCPUs, reached by numbered hypercalls.

It binds and unbinds; it decides nothing about placement (:mod:`hostpart.allocator`), keeps no lock itself
(:mod:`hostpart.lease`) and does not supervise (:mod:`hostpart.device_model`). Each keeper process has
a hypervisor of its own; what makes them one is the leases.
"""

from __future__ import annotations

import errno
import struct

from workers import crash

from . import hypercall as hc
from . import lease
from .allocator import POLICIES, SMT_MODES, Placement, Request, Supply, place, rest_count
from .cpuset import CpuSet
from .errors import DoesNotFit, HostpartError, worded
from .ledger import LedgerUnusable, NameTaken, VcpuRow, VmRow
from .procfs import pinned_alone, start_time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Buffer, Callable  # type: ignore[attr-defined,unused-ignore]

    from .ledger import Ledger
    from .topology import Topology

__all__ = ["KINDS", "SERVICE_VMID", "Hypervisor", "Vcpu", "Vm"]

SERVICE_VMID = 0
KINDS = (None, "performance", "efficiency")
_API_VERSION = struct.pack("<II", 1, 0)

# What may follow what; a vCPU is created in INIT and forgotten after OFFLINE.
_NEXT = {
    "INIT": ("RUNNING", "ZOMBIE"),
    "RUNNING": ("PAUSED", "ZOMBIE"),
    "PAUSED": ("RUNNING", "ZOMBIE"),
    "ZOMBIE": ("OFFLINE",),
    "OFFLINE": (),
}


class Vcpu:
    """One virtual CPU: bound to *pcpu* (Linux's number) from creation to destruction.

    :ivar pid: its worker's, with *start* its start time in clock ticks since boot
    :ivar tid: the worker's thread that it is, where the worker is a process with others; 0: it is the worker
    :ivar state: ``INIT``, ``RUNNING``, ``PAUSED``, ``ZOMBIE`` or ``OFFLINE``
    """

    def __init__(self, vcpu_id: int, pcpu: int) -> None:
        self.vcpu_id, self.pcpu = vcpu_id, pcpu
        self.pid = self.start = self.tid = 0
        self.state = "INIT"


class Vm:
    """One VM as the hypervisor has it.

    :ivar vmid: 0 for the service VM, else the ledger's id
    :ivar placement: where its vCPUs go, fixed when it is created
    :ivar leases: pCPU to the descriptor that holds its lease, idle siblings included
    :ivar kept: pCPU to the descriptor that keeps it for the service VM
    """

    def __init__(self, vmid: int, row: VmRow, placement: Placement) -> None:
        self.vmid, self.row, self.placement = vmid, row, placement
        self.leases: dict[int, int] = {}
        self.kept: dict[int, int] = {}
        self.vcpus: dict[int, Vcpu] = {}
        self.unbound = set(placement.pcpus)

    @property
    def vcpu_num(self) -> int:
        """How many vCPUs it was made for."""
        return len(self.placement.pcpus)

    @property
    def service(self) -> bool:
        """Whether it is the service VM."""
        return self.vmid == SERVICE_VMID


class Hypervisor:
    """Owner of the pCPU array, as far as this process is concerned.

    :param topology: the host's pCPUs
    :param leases: who holds which
    :param ledger: where VMs and vCPUs are entered
    :param boot: starts one vCPU's worker and returns its pid
    :param forget: deals with what dead keepers left, before their pCPUs are given out again;
        called under the allocator's lock
    :ivar refusal: why the last hypercall failed, where there is a sentence for it
    :ivar trouble: why the ledger could not be told of an end
    """

    def __init__(
        self,
        topology: Topology,
        leases: lease.Leases,
        ledger: Ledger,
        boot: Callable[[Vm, Vcpu], int],
        forget: Callable[[], None] = lambda: None,
    ) -> None:
        self.topology, self.leases, self.ledger = topology, leases, ledger
        self.vms: dict[int, Vm] = {}
        self.refusal: HostpartError | None = None
        self.trouble: LedgerUnusable | None = None
        self._boot, self._forget = boot, forget
        self._papers: dict[bytes, VmRow] = {}

    def announce(self, row: VmRow) -> bytes:
        """Say what the ledger shall have of a VM before it is created; return its token for ``HC_CREATE_VM``."""
        token = bytes.fromhex(row.token)
        self._papers[token] = row
        return token

    def hypercall(self, number: int, *params: object) -> int:
        """Make one hypercall.

        :param number: ``HC_*`` of :mod:`hostpart.hypercall`
        :param params: as that hypercall takes them
        :return: 0 or a positive result, or a negated errno: ``ENODEV`` no such VM, ``EFAULT`` a buffer that cannot be
            read or written, ``EINVAL`` what makes no sense (an unknown number too), ``EBUSY`` not in this state,
            ``ENOSPC`` no pCPU for it, ``EEXIST`` a name in use, or what the kernel said. :attr:`refusal` then has
            the sentence, where there is one
        """
        self.refusal = None
        handler = self._calls.get(number)
        if handler is None:
            return -errno.EINVAL
        try:
            return handler(self, *params)
        except DoesNotFit as refusal:
            self.refusal = refusal
            return -errno.ENOSPC
        except NameTaken as refusal:
            self.refusal = refusal
            return -errno.EEXIST
        except HostpartError as refusal:
            self.refusal = refusal
            return -errno.EIO
        except OSError as error:
            self.refusal = worded(error)
            return -(error.errno or errno.EIO)
        except (TypeError, ValueError, AttributeError):
            return -errno.EINVAL

    # -- what the hypercalls do, by their ACRN names ------------------------------------------------

    def allocate_pcpu(self, vm: Vm, vcpu_id: int) -> int | None:
        """Give a vCPU the pCPU that the VM was placed on for it; None where it has had it and gave it back."""
        pcpu = vm.placement.pcpus[vcpu_id]
        if pcpu not in vm.unbound:
            return None
        vm.unbound.remove(pcpu)
        return pcpu

    def free_pcpu(self, vm: Vm, pcpu: int) -> None:
        """Give the pCPU back: its lease ends here, also for those who inherited its descriptor."""
        fd = vm.leases.pop(pcpu, None)
        if fd is not None:
            lease.release(fd)

    def create_vcpu(self, vm: Vm, vcpu_id: int, pcpu: int) -> Vcpu:
        """Bind vCPU and pCPU 1:1, start the worker and enter both in the ledger.

        :raises OSError: where no process can be had; the pCPU is then the VM's to bind again
        """
        vcpu = Vcpu(vcpu_id, pcpu)
        vm.vcpus[vcpu_id] = vcpu
        try:
            vcpu.pid = self._boot(vm, vcpu)
            crash.point("hypervisor.forked")
            vcpu.start = start_time(vcpu.pid) or 0
            self.ledger.add_vcpu(VcpuRow(vm.row.id, vcpu_id, pcpu, int(vm.service), vcpu.pid, vcpu.start, vcpu.state))
        except BaseException:
            if not vcpu.pid:
                del vm.vcpus[vcpu_id]
                vm.unbound.add(pcpu)
            raise
        return vcpu

    def set_thread(self, vm: Vm, vcpu: Vcpu, tid: int) -> None:
        """Say which of its worker's threads a vCPU is."""
        vcpu.tid = tid
        self.ledger.set_thread(vm.row.id, vcpu.vcpu_id, tid)

    def set_state(self, vcpu: Vcpu, state: str) -> None:
        """Take a vCPU to its next state.

        :raises OSError: ``EBUSY`` where that state cannot follow
        """
        if state not in _NEXT[vcpu.state]:
            raise OSError(errno.EBUSY, f"vCPU {vcpu.vcpu_id} is {vcpu.state} and cannot become {state}")
        vcpu.state = state

    def vcpu_ended(self, vm: Vm, vcpu: Vcpu) -> None:
        """Say that the vCPU's worker is no more: ZOMBIE, its pCPU still leased."""
        self.set_state(vcpu, "ZOMBIE")
        self._strike(self.ledger.set_vcpu_state, vm.row.id, vcpu.vcpu_id, "ZOMBIE")

    def destroy_vcpu(self, vm: Vm, vcpu: Vcpu) -> None:
        """Unbind a vCPU that has ended and free its pCPU.

        :raises OSError: ``EBUSY`` where it has not ended
        """
        self.set_state(vcpu, "OFFLINE")
        del vm.vcpus[vcpu.vcpu_id]
        self._strike(self.ledger.remove_vcpu, vm.row.id, vcpu.vcpu_id)
        self.free_pcpu(vm, vcpu.pcpu)

    def boot_service_vm(self, row: VmRow, pcpus: tuple[int, ...]) -> Vm:
        """Create VM 0 with a vCPU on each of *pcpus*, the first one the BSP; it leases nothing."""
        row = row.replace(id=self.ledger.add_vm(row))
        vm = self.vms[SERVICE_VMID] = Vm(SERVICE_VMID, row, Placement(pcpus))
        for vcpu_id in range(len(pcpus)):
            pcpu = self.allocate_pcpu(vm, vcpu_id)
            assert pcpu is not None  # noqa: S101 - as many as it was placed on
            self.create_vcpu(vm, vcpu_id, pcpu)
        return vm

    def _strike(self, write: Callable[..., None], *values: object) -> None:
        # What has ended has ended: a ledger that broke meanwhile keeps no guest alive and no pCPU leased. The row
        # that stays is dirty.
        try:
            write(*values)
        except LedgerUnusable as trouble:
            self.trouble = trouble

    # -- hypercalls ----------------------------------------------------------------------------------

    def _vm(self, vmid: object) -> Vm:
        if not isinstance(vmid, int) or vmid not in self.vms:
            raise OSError(errno.ENODEV, f"there is no VM {vmid}")
        return self.vms[vmid]

    def _get_api_version(self, param: Buffer) -> int:
        return 0 if hc.copy_to_user(param, _API_VERSION) else -errno.EFAULT

    def _create_vm(self, param: Buffer) -> int:
        data = hc.copy_all_from_user(param)
        if data is None or hc.copy_from_user(param, hc.CreateVm.SIZE) is None:
            return -errno.EFAULT
        try:
            wish = hc.CreateVm.unpack(data)
        except struct.error:
            return -errno.EFAULT
        row = self._papers.get(wish.token)
        if row is None or wish.policy >= len(POLICIES) or wish.smt >= len(SMT_MODES) or wish.kind >= len(KINDS):
            return -errno.EINVAL
        if wish.pcpus and len(wish.pcpus) != wish.vcpu_num:
            return -errno.EINVAL
        with self.leases.lock():
            crash.point("hypervisor.locked")
            self._forget()
            vm = self._take(wish, row)
        self.vms[vm.vmid] = vm
        if not hc.copy_to_user(param, struct.pack("<i", vm.vmid)):
            self._let_go(vm)
            return -errno.EFAULT
        return vm.vmid

    def _take(self, wish: hc.CreateVm, row: VmRow) -> Vm:
        # Look, choose, take: one step, under the allocator's lock.
        survey = self.leases.survey(self.topology.online)
        # A guest can unlock the lease it inherited; until its keeper has seen that, the ledger still knows better.
        bound = CpuSet.of(self.ledger.bound())
        survey = lease.Survey(survey.taken | bound, survey.kept - bound)
        supply = self.supply_of(self.topology, wish, survey)
        request = self._request(wish)
        try:
            if not request.count:
                request = request.replace(count=rest_count(self.topology, supply, request))
            placement = place(self.topology, supply, request)
        except DoesNotFit as refusal:
            blocks = (*refusal.blocks, *self._who_holds(survey.taken))
            raise DoesNotFit(refusal.wanted, refusal.free, blocks, refusal.fits) from None
        row = row.replace(
            vcpu_num=len(placement.pcpus), idle=str(placement.idle), pcpus=str(CpuSet.of(placement.pcpus))
        )
        vm = Vm(-1, row, placement)
        try:
            for cpu in (*placement.pcpus, *placement.idle):
                fd = self.leases.take(cpu)
                if fd is None:
                    raise DoesNotFit(
                        request.count,
                        supply.free - CpuSet.of([cpu]),
                        [f"pCPU {cpu} was locked this instant by a program that does not ask for the allocator's lock"],
                        "run it again",
                    )
                vm.leases[cpu] = fd
            crash.point("hypervisor.leased")
            for cpu in self.keep_of(self.topology, wish, survey):
                fd = self.leases.keep(cpu)
                if fd is not None:
                    vm.kept[cpu] = fd
            vm.row = row.replace(id=self.ledger.add_vm(row))
            vm.vmid = vm.row.id
            crash.point("hypervisor.entered")
        except BaseException:
            self._let_go(vm)
            raise
        return vm

    def _who_holds(self, taken: CpuSet) -> list[str]:
        # The caller's own VMs by name, from the ledger; of others' the kernel tells the process.
        names = {vm.keeper_pid: f"VM {vm.name!r}" for vm in self.ledger.vms()}
        held: dict[str, list[int]] = {}
        for cpu, (holder, *_) in self.leases.holders(taken).items():
            held.setdefault(names.get(holder.pid, str(holder)), []).append(cpu)
        return [f"{who} holds pCPU {CpuSet.of(cpus)}" for who, cpus in held.items()]

    @staticmethod
    def supply_of(topology: Topology, wish: hc.CreateVm, survey: lease.Survey, *, empty: bool = False) -> Supply:
        """Say what there is to give: pCPUs of the topology by what is done with them now.

        :param empty: as if no user VM held anything
        """
        usable, reserve = topology.usable, CpuSet.of(wish.reserve)
        taken = CpuSet() if empty else survey.taken
        host = (Hypervisor.keep_of(topology, wish, survey.replace(taken=taken)) | survey.kept | reserve) - taken
        free = usable - taken - host
        return Supply(free=free, host=host, taken=taken, avoid=CpuSet.of(pinned_alone()) & free)

    @staticmethod
    def keep_of(topology: Topology, wish: hc.CreateVm, survey: lease.Survey) -> CpuSet:
        """Say which pCPUs the service VM keeps: those it names, else as many as it wants of those that can be had.

        First those that other service VMs keep already, then the lowest; but not what this VM names itself, so that
        ``--pcpus 0`` means what it says.
        """
        if wish.keep:
            return CpuSet.of(wish.keep)
        there = topology.usable - survey.taken
        there = there - CpuSet.of(wish.pcpus) or there
        in_order = (*(there & survey.kept), *(there - survey.kept))
        return CpuSet.of(in_order[: wish.keep_count])

    def could_ever_fit(self, wish: hc.CreateVm) -> bool:
        """Whether the request would fit if no user VM held anything."""
        try:
            with self.leases.lock():
                survey = self.leases.survey(self.topology.online)
            supply, request = self.supply_of(self.topology, wish, survey, empty=True), self._request(wish)
            if not request.count:
                return rest_count(self.topology, supply, request) > 0
            place(self.topology, supply, request)
        except DoesNotFit:
            return False
        return True

    def _request(self, wish: hc.CreateVm) -> Request:
        return Request(wish.vcpu_num, wish.pcpus, POLICIES[wish.policy], SMT_MODES[wish.smt], KINDS[wish.kind])

    def _let_go(self, vm: Vm) -> None:
        # Its rows first, all at once: a pCPU that can be leased again must not be bound in the ledger.
        if vm.vmid >= 0:
            self._strike(self.ledger.remove_vm, vm.row.id)
            self.vms.pop(vm.vmid, None)
        for fd in (*vm.leases.values(), *vm.kept.values()):
            lease.release(fd)
        vm.leases.clear()
        vm.kept.clear()
        crash.point("hypervisor.freed")

    def _create_vcpu(self, vmid: int, param: Buffer) -> int:
        vm = self._vm(vmid)
        data = hc.copy_from_user(param, hc.CreateVcpu.SIZE)
        if data is None:
            return -errno.EFAULT
        wish = hc.CreateVcpu.unpack(data)
        if not hc.copy_to_user(param, data):
            return -errno.EFAULT  # read-only: say so before anything is made
        if wish.vcpu_id >= vm.vcpu_num:
            return -errno.EINVAL
        if wish.vcpu_id in vm.vcpus:
            return -errno.EBUSY
        pcpu = self.allocate_pcpu(vm, wish.vcpu_id)
        if pcpu is None:
            return -errno.ENOSPC
        self.create_vcpu(vm, wish.vcpu_id, pcpu)
        hc.copy_to_user(param, bytes(hc.CreateVcpu(wish.vcpu_id, pcpu).pack()))
        return 0

    def _start_vm(self, vmid: int) -> int:
        vm = self._vm(vmid)
        alive = [vcpu for vcpu in vm.vcpus.values() if vcpu.state != "ZOMBIE"]
        if len(vm.vcpus) != vm.vcpu_num or not alive or any(vcpu.state not in ("INIT", "PAUSED") for vcpu in alive):
            raise OSError(errno.EBUSY, f"VM {vm.row.name!r} is not paused, and not ready to be started")
        self._all(vm, "RUNNING")
        return 0

    def _pause_vm(self, vmid: int) -> int:
        vm = self._vm(vmid)
        if not any(vcpu.state == "RUNNING" for vcpu in vm.vcpus.values()):
            raise OSError(errno.EBUSY, f"VM {vm.row.name!r} does not run, so it cannot be paused")
        self._all(vm, "PAUSED")
        return 0

    def _all(self, vm: Vm, state: str) -> None:
        self.ledger.set_vm_state(vm.row.id, state)  # first: it may fail, what follows cannot
        for vcpu in vm.vcpus.values():
            if vcpu.state != "ZOMBIE":
                self.set_state(vcpu, state)

    def _destroy_vm(self, vmid: int) -> int:
        vm = self._vm(vmid)
        if any(vcpu.state not in ("ZOMBIE", "OFFLINE") for vcpu in vm.vcpus.values()):
            return -errno.EBUSY
        for vcpu in vm.vcpus.values():
            self.set_state(vcpu, "OFFLINE")
        vm.vcpus.clear()
        self._let_go(vm)
        return 0

    def _sos_offline_cpu(self, lapicid: int) -> int:
        vm = self._vm(SERVICE_VMID)
        pcpu = self.pcpu_of_apic(lapicid)
        vcpu = next((vcpu for vcpu in vm.vcpus.values() if vcpu.pcpu == pcpu), None)
        if vcpu is None or vcpu.vcpu_id == 0:
            return -errno.EINVAL  # not the service VM's, or the BSP, which is never taken offline
        if vcpu.state != "ZOMBIE":
            return -errno.EBUSY
        self.destroy_vcpu(vm, vcpu)
        return 0

    def pcpu_of_apic(self, apic_id: int) -> int | None:
        """Return Linux's number of the pCPU with that APIC id; where no MADT was read the two are taken as the same."""
        for pcpu in self.topology.pcpus:
            if (pcpu.cpu if pcpu.apic_id is None else pcpu.apic_id) == apic_id:
                return pcpu.cpu
        return None

    _calls: dict[int, Callable[..., int]] = {  # noqa: RUF012 - a table, never written
        hc.HC_GET_API_VERSION: _get_api_version,
        hc.HC_SOS_OFFLINE_CPU: _sos_offline_cpu,
        hc.HC_CREATE_VM: _create_vm,
        hc.HC_DESTROY_VM: _destroy_vm,
        hc.HC_START_VM: _start_vm,
        hc.HC_PAUSE_VM: _pause_vm,
        hc.HC_CREATE_VCPU: _create_vcpu,
    }
