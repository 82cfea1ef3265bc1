"""One scenario on this host: the service VM boots on all pCPUs, releases some, and the user VMs are created on them.

All VMs are READY before any guest starts; if one cannot be, none has run and nothing is left.
"""

from __future__ import annotations

import os

from . import recovery
from .allocator import Request, place_all
from .cpuset import CpuSet
from .device_model import Caller
from .errors import DoesNotFit
from .front import Front, Interrupted
from .host import Host
from .hypervisor import Hypervisor
from .isolation import Wish
from .keeper import Options
from .lease import Leases
from .service_vm import NAME, fork_service_vm, keep_wish
from .topology import read_topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .allocator import Placement, Supply
    from .config import Scenario, ServiceVm, VmConfig
    from .front import Running
    from .isolation import Isolation
    from .topology import Topology

__all__ = ["Launch", "in_order", "launch", "plan", "rehearse", "requests_of", "supply_now", "wish_of"]


def wish_of(vm: VmConfig, service: ServiceVm) -> Wish:
    """Return how far the host is to be kept off one VM's pCPUs."""
    return Wish(vm.isolation, vm.scope, vm.require, vm.mems, service.release == "hotplug", vm.threaded)


def rehearse(scenario: Scenario, placements: Mapping[str, Placement]) -> tuple[list[str], dict[str, Isolation]]:
    """Say what a launch would write on the host, as shell commands in order, and which level each VM would reach.

    What the kernel or the guests would do as a consequence is not in it, nor are the VMs' own processes.

    :raises NotPermitted: where a VM requires a level that is out of reach
    """
    from .isolation.level import at_least
    from .isolation.reach import reach
    from .isolation.reconcile import reconcile
    from .ledger import Ledger, VmRow, boot_id
    from .rehearsal import Rehearsal

    host, levels = Rehearsal(), {}
    with Ledger() as real, real.copy() as ledger:
        for vm in in_order(scenario):
            one = placements[vm.name]
            pcpus, wish = CpuSet.of(one.pcpus), wish_of(vm, scenario.service)
            isolation = levels[vm.name] = reach(wish, host, ledger, pcpus | one.idle)
            row = VmRow(
                0, vm.name, 0, os.urandom(16).hex(), boot_id(), "INIT", len(one.pcpus), "", 0, 0, 0, 0.0,
                idle=str(one.idle), pcpus=str(pcpus), threaded=int(wish.threaded),
            )  # fmt: skip
            ledger.isolate(ledger.add_vm(row), isolation.reached, isolation.scope, str(wish.mems), cycle=wish.cycle)
            cycle = wish.cycle or at_least(isolation.reached, "full")
            reconcile(ledger, host, cycle=pcpus | one.idle if cycle else None)
    return host.writes, levels


def in_order(scenario: Scenario) -> list[VmConfig]:
    """Return the VMs in the order of their creation, that of :func:`hostpart.allocator.place_all`: explicit lists, then
    counts, then the one that takes the rest."""
    return sorted(scenario.vms, key=lambda vm: (not vm.pcpus, not vm.pcpus and not vm.vcpus))


def requests_of(scenario: Scenario) -> dict[str, Request]:
    """Return what each VM asks of the allocator, in the file's order."""
    return {vm.name: Request(len(vm.pcpus) or vm.vcpus, vm.pcpus, vm.policy, vm.smt, vm.kind) for vm in scenario.vms}


def supply_now(
    topology: Topology, service: ServiceVm, explicit: CpuSet, leases: Leases, *, empty: bool = False
) -> Supply:
    """Look at what this host has to give at this instant.

    :param explicit: pCPUs that the VMs name themselves
    :param empty: as if no user VM held anything
    """
    with leases.lock():
        survey = leases.survey(topology.online)
    return Hypervisor.supply_of(topology, keep_wish(service, explicit), survey, empty=empty)


def plan(topology: Topology, scenario: Scenario, supply: Supply) -> dict[str, Placement]:
    """Place all VMs of the scenario, or none.

    :raises DoesNotFit: for the first that does not fit; where others of the scenario would, it says which
    """
    requests = requests_of(scenario)
    try:
        return place_all(topology, supply, requests)
    except DoesNotFit as refusal:
        fitting: dict[str, Request] = {}
        for name, request in requests.items():
            try:
                place_all(topology, supply, {**fitting, name: request})
            except (DoesNotFit, ValueError):
                continue
            fitting[name] = request
        if not fitting or len(requests) == 1:
            raise
        wanted = sum(request.count for request in requests.values())
        raise DoesNotFit(
            max(wanted, 1),
            supply.free,
            [
                f"{scenario.source} has {len(requests)} VMs and {refusal.vm!r} is the first that does not fit",
                *_held(supply),
            ],
            f"launch only {', '.join(fitting)} of them, or 'hostpart launch example:first', which takes what is here",
        ) from None


def _held(supply: Supply) -> list[str]:
    said = []
    if supply.host:
        said.append(f"kept by the service VM: pCPU {supply.host}")
    if supply.taken:
        said.append(f"leased to other VMs: pCPU {supply.taken}")
    return said


class Launch:
    """One launch.

    :param front: waits and passes on signals
    :param callers: what each VM's guests inherit, by the VM's name
    :ivar service: the service VM's keeper
    :ivar vms: the user VMs' keepers, in order of creation
    """

    def __init__(
        self,
        scenario: Scenario,
        front: Front,
        callers: Mapping[str, Caller],
        wait_s: float | None = None,
        log: Mapping[str, str] | None = None,
    ) -> None:
        self.scenario, self.front, self.callers, self.wait_s = scenario, front, callers, wait_s
        self.log = log or {}
        self.service: Running | None = None
        self.vms: list[Running] = []
        self.explicit = scenario.explicit

    def start(self) -> None:
        """Boot, release, create, and let the guests run.

        :raises HostpartError: why not; :meth:`end` then leaves nothing behind
        """
        front, service = self.front, self.scenario.service
        guests = [guest.qemu for vm in self.scenario.vms for guest in vm.guests]
        if any(machine is not None and machine.console == "stdio" for machine in guests):
            front.keep_terminal()
        planned = self._plan()
        pid, channel = fork_service_vm(service, self.explicit, front.topology, front.caller)
        booted = self.service = front.watch(NAME, pid, channel)
        if any(guests):
            from .qemu import machine  # noqa: F401 - every keeper will need it, and here it is waited anyway
        front.wait(lambda: booted.has("booted"))
        kept = CpuSet.parse(booted.said["booted"]["kept"])
        self._release(booted, CpuSet.of(cpu for one in planned.values() for cpu in (*one.pcpus, *one.idle)))
        for vm in in_order(self.scenario):
            options = Options(wish_of(vm, service), self.wait_s, hold=True, log=self.log.get(vm.name, ""))
            front.caller = self.callers[vm.name]
            keeper = front.start(vm, service.replace(keep=len(kept), keep_cpus=kept), options)
            self.vms.append(keeper)
            front.wait(lambda keeper=keeper: keeper.has("created"))  # type: ignore[misc]
            created = keeper.said["created"]
            self._release(booted, CpuSet.of(created["pcpus"]) | CpuSet.parse(created["idle"]))
        front.wait(lambda: all(keeper.has("ready") for keeper in self.vms))
        front.go()

    def wait(self) -> None:
        """Wait until every guest has ended."""
        self.front.wait(lambda: all(keeper.over for keeper in self.vms))

    def end(self) -> None:
        """End what still runs, and the service VM last."""
        self.front.end()

    def _plan(self) -> dict[str, Placement]:
        topology, leases = self.front.topology, Leases()
        try:
            return plan(topology, self.scenario, supply_now(topology, self.scenario.service, self.explicit, leases))
        except DoesNotFit:
            if self.wait_s is None:
                raise
            # Waiting is for what would fit an empty host.
            plan(
                topology, self.scenario, supply_now(topology, self.scenario.service, self.explicit, leases, empty=True)
            )
            return {}

    def _release(self, service: Running, pcpus: CpuSet) -> None:
        if pcpus:
            service.said.pop("released", None)
            service.channel.send({"do": "release", "pcpus": str(pcpus)})
            self.front.wait(lambda: service.has("released"))


def launch(scenario: Scenario, *, wait_s: float | None = None) -> dict[str, dict[str, Any]]:
    """Run a scenario to its end and return each VM's evidence, by name; the guests have this process's terminal.

    The calling process is the front meanwhile: SIGINT and SIGTERM end the guests and raise
    :exc:`~hostpart.front.Interrupted`.

    :param wait_s: how long to queue for pCPUs; None: not at all
    :raises HostpartError: why it could not be run, or not to its end; nothing is left then
    :raises RuntimeError: where this process has more than one thread, since it forks
    """
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("hostpart forks its workers, and this process has threads: call it from a process with one")
    recovery.tidy()
    caller = Caller()
    front = Front(read_topology(Host(), madt=True), caller, stop_on_interrupt=True)
    one = Launch(scenario, front, {vm.name: caller for vm in scenario.vms}, wait_s)
    try:
        one.start()
        one.wait()
    finally:
        one.end()
    if front.stopped_by is not None:
        raise Interrupted(front.stopped_by)
    for keeper in one.vms:
        if keeper.error is not None:
            raise keeper.error
    return {keeper.name: keeper.said["ended"]["evidence"] for keeper in one.vms}
