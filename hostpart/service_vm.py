"""The service VM, VM 0: boots with a vCPU on every pCPU of the MADT that no user VM holds, then releases some.

Its vCPUs are workers like all others, made by the same ``create_vcpu``; their guest is to be there. It leases
nothing: the pCPUs it keeps are locked shared, so that no guest gets them, by it and by every other service VM of
this host. It has a keeper of its own, which the front tells what to release.
"""

from __future__ import annotations

import os
import select
import signal
import time

from workers import vcpu as worker

from . import hypercall as hc
from . import procfs, tree
from .cpuset import CpuSet
from .errors import DoesNotFit, Failed, HostpartError, worded
from .hypervisor import SERVICE_VMID, Hypervisor
from .keeper import fork_beside, ignore_terminal
from .lease import Leases
from .ledger import Ledger, VmRow, boot_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

    from .channel import Channel
    from .config import ServiceVm
    from .device_model import Caller
    from .hypervisor import Vcpu, Vm
    from .topology import Topology

__all__ = ["NAME", "fork_service_vm", "keep_wish"]

NAME = "vm0"
_READY_WAIT_S = 30.0


def fork_service_vm(service: ServiceVm, explicit: CpuSet, topology: Topology, caller: Caller) -> tuple[int, Channel]:
    """Fork the service VM's keeper; return its pid and the front's end of the channel.

    It says ``booted`` with its vCPUs and the pCPUs it keeps, and ``released`` after each release.

    :param explicit: pCPUs that user VMs name themselves: it keeps others, while it can
    :raises OSError: where no process or descriptor can be had
    """
    front = os.getpid()
    return fork_beside(lambda theirs: _Keeper(service, explicit, topology, caller, theirs, front).run(), [])


def keep_wish(service: ServiceVm, explicit: CpuSet) -> hc.CreateVm:
    """Return a request that says only what the service VM keeps and what is not to be given out.

    :param explicit: pCPUs that user VMs name themselves
    """
    return hc.CreateVm(
        0,
        b"",
        pcpus=tuple(explicit),
        reserve=tuple(service.reserve),
        keep=tuple(service.keep_cpus),
        keep_count=service.keep,
    )


class _Keeper:
    def __init__(
        self, service: ServiceVm, explicit: CpuSet, topology: Topology, caller: Caller, front: Channel, front_pid: int
    ) -> None:
        self.service, self.explicit, self.topology, self.caller = service, explicit, topology, caller
        self.front, self.front_pid = front, front_pid
        self.kept: dict[int, int] = {}
        self.vm: Vm | None = None
        self.token = os.urandom(16).hex()

    def run(self) -> NoReturn:
        code = 1
        try:
            self._wake_r, self._wake_w = ignore_terminal()
            tree.adopt()
            self._status_r, self._status_w = os.pipe2(os.O_CLOEXEC)
            self._start_r, self._start_w = os.pipe2(os.O_CLOEXEC)
            self.ledger = Ledger()
            self.hypervisor = Hypervisor(self.topology, Leases(), self.ledger, self._fork)
            try:
                self._boot()
                self._serve()
                code = 0
            finally:
                self._halt()
            self.front.send({"event": "ended"})
        except HostpartError as error:
            self.front.send({"event": "error", **error.to_json()})
        except OSError as error:
            reason = worded(error)
            problem = f"the service VM could not boot: {reason}"
            self.front.send({"event": "error", **reason.to_json(), "problem": problem})
        os._exit(code)

    def _boot(self) -> None:
        row = VmRow(
            0, NAME, 1, self.token, boot_id(), "INIT", 0, "service VM", os.getpid(),
            procfs.start_time(os.getpid()) or 0, self.front_pid, time.time(),
        )  # fmt: skip
        leases = self.hypervisor.leases
        with leases.lock():
            survey = leases.survey(self.topology.online)
            there = self.topology.usable - survey.taken
            keep = self.hypervisor.keep_of(self.topology, keep_wish(self.service, self.explicit), survey)
            if not keep:
                raise DoesNotFit(
                    1,
                    there,
                    ["user VMs hold every usable pCPU, so the service VM has none to keep"],
                    "run it again when one has ended: 'hostpart ps'",
                )
            if not keep <= there:
                raise DoesNotFit(
                    len(keep),
                    there,
                    [f"pCPU {keep - there} is not usable here or leased to a user VM"],
                    "keep other pCPUs",
                )
            for cpu in keep:
                fd = leases.keep(cpu)
                if fd is not None:
                    self.kept[cpu] = fd
        os.sched_setaffinity(0, keep)
        # The BSP is the lowest that it keeps: it is never taken offline.
        pcpus = (keep.lowest, *(cpu for cpu in there if cpu != keep.lowest))
        self.vm = self.hypervisor.boot_service_vm(row.replace(vcpu_num=len(pcpus)), pcpus)
        os.close(self._status_w)
        ran = self._await_ready()
        self._check(self.hypervisor.hypercall(hc.HC_START_VM, 0), "HC_START_VM")
        os.write(self._start_w, b"S" * len(pcpus))
        self.front.send({
            "event": "booted",
            "kept": str(keep),
            "madt": self.topology.madt,
            "vcpus": [
                {"vcpu": vcpu.vcpu_id, "pcpu": vcpu.pcpu, "pid": vcpu.pid, "ran_on": ran[vcpu.vcpu_id]}
                for _, vcpu in sorted(self.vm.vcpus.items())
            ],
        }, list(self.kept.values()))  # fmt: skip

    def _fork(self, _vm: Vm, vcpu: Vcpu) -> int:
        return worker.fork(
            worker.Order(
                NAME,
                vcpu.vcpu_id,
                frozenset((vcpu.pcpu,)),
                _be_there,
                environ={**self.caller.environ, "HOSTPART_RUN": self.token},
                status_fd=self._status_w,
                start_fd=self._start_r,
                close_fds=[self.front.fileno(), self._start_w, self._status_r, *self.kept.values()],
            )
        )

    def _await_ready(self) -> dict[int, int]:
        # All were forked before the first answer is read: they come up in parallel.
        assert self.vm is not None  # noqa: S101 - set by the caller
        ran: dict[int, int] = {}
        said = b""
        until = time.monotonic() + _READY_WAIT_S
        poll = select.poll()
        poll.register(self._status_r, select.POLLIN)
        while len(ran) < len(self.vm.vcpus):
            if not poll.poll(max(0.0, until - time.monotonic()) * 1000):
                raise Failed(
                    f"the service VM's vCPUs were not ready after {_READY_WAIT_S:g} s", "see 'uptime', and run it again"
                )
            part = os.read(self._status_r, 1 << 16)
            said += part
            *lines, said = said.split(b"\n")
            for line in lines:
                number, what, *rest = line.decode().split()
                if what == "failed":
                    pcpu = self.vm.vcpus[int(number)].pcpu
                    raise Failed(
                        f"the service VM's vCPU {number} could not be put on pCPU {pcpu}: {os.strerror(int(rest[1]))}",
                        "see 'grep Cpus_allowed_list /proc/self/status': a cgroup's cpuset may have changed meanwhile",
                    )
                ran[int(number)] = int(rest[0])
            if not part and len(ran) < len(self.vm.vcpus):
                raise Failed("a worker of the service VM was killed while it booted", "run it again")
        return ran

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self.front.fileno(), select.POLLIN)
        poll.register(self._wake_r, select.POLLIN)
        while True:
            for message in self.front.receive():
                if message["do"] == "release":
                    self._release(CpuSet.parse(message["pcpus"]))
                elif message["do"] == "stop":
                    return
            if self.front.ended:
                return
            for fd, _ in poll.poll():
                if fd == self._wake_r:
                    os.read(fd, 4096)

    def _release(self, pcpus: CpuSet) -> None:
        # As launch_uos.sh did it: the CPU leaves the service VM first, then the hypervisor may give it to a guest.
        assert self.vm is not None  # noqa: S101 - it has booted
        gone = [vcpu for vcpu in self.vm.vcpus.values() if vcpu.pcpu in pcpus and vcpu.pcpu not in self.kept]
        for vcpu in gone:
            os.kill(vcpu.pid, signal.SIGKILL)
        for vcpu in gone:
            os.waitpid(vcpu.pid, 0)
            self.hypervisor.vcpu_ended(self.vm, vcpu)
            pcpu = self.topology.pcpu(vcpu.pcpu)
            lapic_id = pcpu.cpu if pcpu.apic_id is None else pcpu.apic_id
            self._check(self.hypervisor.hypercall(hc.HC_SOS_OFFLINE_CPU, lapic_id), "HC_SOS_OFFLINE_CPU")
        self.front.send({"event": "released", "pcpus": str(CpuSet.of(vcpu.pcpu for vcpu in gone))})

    def _check(self, result: int, call: str) -> None:
        if result < 0:
            raise self.hypervisor.refusal or Failed(f"{call} failed: {os.strerror(-result)}", "run it again")

    def _halt(self) -> None:
        vm = self.hypervisor.vms.get(SERVICE_VMID)  # there also where it booted by half
        if vm is not None:
            for vcpu in vm.vcpus.values():
                os.kill(vcpu.pid, signal.SIGKILL)
                os.waitpid(vcpu.pid, 0)
                self.hypervisor.vcpu_ended(vm, vcpu)
            self.hypervisor.hypercall(hc.HC_DESTROY_VM, SERVICE_VMID)
        for fd in self.kept.values():
            os.close(fd)  # not unlocked: the user VMs' keepers may still be using the lock through their own
        self.ledger.close()


def _be_there(_order: worker.Order) -> NoReturn:
    # Woken by nothing but the SIGKILL of a release or of its keeper's end.
    while True:
        signal.pause()
