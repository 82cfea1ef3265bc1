"""The pCPU array and the lives of VMs and vCPUs, with real leases and a real ledger on machines of several shapes."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from hostpart import hypercall as hc
from hostpart import procfs
from hostpart.config import ServiceVm
from hostpart.cpuset import CpuSet
from hostpart.device_model import Caller
from hostpart.errors import DoesNotFit
from hostpart.host import Host
from hostpart.lease import Leases
from hostpart.ledger import LedgerUnusable
from hostpart.service_vm import fork_service_vm
from hostpart.topology import read_topology
from tests.conftest import Place, wait_until
from tests.partition import FIRST, Partition, machine, row

CPUS = range(FIRST, FIRST + 8)


@pytest.fixture
def partition(tmp_path: Path) -> Iterator[Partition]:
    with Partition(machine(CPUS), tmp_path) as there:
        yield there


# -- placement through the real hypercalls ---------------------------------------------------------------


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 7)), max_size=24),
    st.sets(st.integers(FIRST, 200), min_size=3, max_size=9),
)
@settings(max_examples=15, deadline=None)
def test_first_fit_shared_gives_acrn_s_sequence_under_any_interleaving(
    steps: list[tuple[bool, int]], numbers: set[int]
) -> None:
    # ACRN, hypervisor/common/hv_main.c, 2018: for (i = 0; i < phy_cpu_num; i++)
    #     if (bitmap_test_and_set_lock(i, &pcpu_used_bitmap) == 0) return i;   return -1;
    # with the service VM's own pCPU, the lowest, set from the start.
    used = {min(numbers)}
    running: list[tuple[int, int]] = []
    with Partition(machine(numbers, 2)) as there:
        for allocate, which in steps:
            if allocate:
                expected = min(numbers - used, default=None)
                vmid = there.create(1, keep=(min(numbers),))
                if expected is None:
                    assert vmid == -errno.ENOSPC
                else:
                    assert there.pcpus(vmid) == (expected,)
                    used.add(expected)
                    running.append((vmid, expected))
            elif running:
                vmid, pcpu = running.pop(which % len(running))
                assert there.destroy(vmid) == 0
                used.discard(pcpu)
            assert there.taken() == CpuSet.of(used - {min(numbers)})


def test_an_explicit_list_binds_vcpu_i_to_the_i_th(partition: Partition) -> None:
    wanted = (FIRST + 5, FIRST + 2, FIRST + 7)
    vmid = partition.create(3, wanted)
    for vcpu in (2, 0, 1):
        assert partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, vmid, hc.CreateVcpu(vcpu).pack()) == 0
    rows = {vcpu.vcpu: vcpu.pcpu for vcpu in partition.ledger.vcpus(vmid)}
    assert rows == dict(enumerate(wanted))


def test_idle_siblings_are_leased_too_and_freed_with_the_vm() -> None:
    with Partition(machine(CPUS, 2)) as there:
        vmid = there.create(1, smt="exclusive", policy="packed")
        (pcpu,) = there.pcpus(vmid)
        core = there.topology.siblings(pcpu)
        assert there.taken() == core
        assert CpuSet.parse(there.ledger.vms()[0].idle) == core - CpuSet.of([pcpu])
        assert there.destroy(vmid) == 0
        assert there.untouched()


def test_the_service_vm_s_pcpu_is_kept_shared_by_every_platform_and_given_to_no_guest(partition: Partition) -> None:
    first, second = partition.create(1), partition.create(1)
    assert partition.kept() == CpuSet.of([FIRST])
    assert partition.create(1, (FIRST,)) == -errno.ENOSPC
    assert partition.destroy(first) == 0
    assert partition.kept() == CpuSet.of([FIRST]), "the other VM's platform keeps it still"
    assert partition.destroy(second) == 0
    assert partition.kept() == CpuSet()


def test_the_rest_is_all_that_is_left(partition: Partition) -> None:
    partition.create(2)
    vmid = partition.create(0)
    assert partition.pcpus(vmid) == tuple(CPUS[3:])
    assert partition.ledger.vms()[-1].vcpu_num == 5
    assert partition.create(0) == -errno.ENOSPC


def test_a_reserved_pcpu_is_never_given_out(partition: Partition) -> None:
    assert partition.create(7, reserve=(FIRST + 3,)) == -errno.ENOSPC
    vmid = partition.create(6, reserve=(FIRST + 3,))
    assert FIRST + 3 not in partition.pcpus(vmid)


def test_a_lease_snatched_by_a_stranger_undoes_the_whole_request(partition: Partition) -> None:
    # A program that takes no allocator's lock may lock a pCPU between look and take.
    taken: list[int] = []
    real = partition.leases.take

    def take(cpu: int) -> int | None:
        if cpu == FIRST + 2:
            fd = real(cpu)
            assert fd is not None
            taken.append(fd)
            return None
        return real(cpu)

    partition.leases.take = take  # type: ignore[method-assign]
    assert partition.create(3) == -errno.ENOSPC
    assert f"pCPU {FIRST + 2} was locked this instant" in str(partition.hypervisor.refusal)
    assert partition.taken() == CpuSet.of([FIRST + 2]), "what the request had taken already is given back"
    os.close(taken[0])
    assert partition.untouched()


def test_a_refusal_names_who_holds_what(partition: Partition) -> None:
    partition.create(7, name="greedy")
    assert partition.create(1) == -errno.ENOSPC
    refusal = partition.hypervisor.refusal
    assert isinstance(refusal, DoesNotFit)
    assert f"VM 'greedy' holds pCPU {CpuSet.of(CPUS[1:])}" in refusal.blocks
    with Partition(partition.topology) as stranger:
        stranger.hypervisor.leases = partition.leases
        assert stranger.create(1) == -errno.ENOSPC
        assert f"pid {os.getpid()} (" in str(stranger.hypervisor.refusal), "of another user's VM the process is named"


# -- the vCPU's life ------------------------------------------------------------------------------------


class Life(RuleBasedStateMachine):
    """Hypercalls and ends of workers in any order, against the states as DESIGN has them."""

    @initialize(count=st.integers(1, 3))
    def create(self, count: int) -> None:
        self.there = Partition(machine(CPUS))
        self.count = count
        self.vmid = self.there.create(count)
        self.model: dict[int, str] = {}

    def call(self, number: int, *params: object) -> int:
        return self.there.hypervisor.hypercall(number, self.vmid, *params)

    @rule(vcpu=st.integers(0, 3))
    def create_vcpu(self, vcpu: int) -> None:
        result = self.call(hc.HC_CREATE_VCPU, hc.CreateVcpu(vcpu).pack())
        if vcpu >= self.count:
            assert result == -errno.EINVAL
        elif vcpu in self.model:
            assert result == -errno.EBUSY
        else:
            assert result == 0
            self.model[vcpu] = "INIT"

    @rule()
    def start(self) -> None:
        alive = [state for state in self.model.values() if state != "ZOMBIE"]
        may = len(self.model) == self.count and bool(alive) and all(state in ("INIT", "PAUSED") for state in alive)
        assert self.call(hc.HC_START_VM) == (0 if may else -errno.EBUSY)
        if may:
            self._all("RUNNING")

    @rule()
    def pause(self) -> None:
        may = "RUNNING" in self.model.values()
        assert self.call(hc.HC_PAUSE_VM) == (0 if may else -errno.EBUSY)
        if may:
            self._all("PAUSED")

    @precondition(lambda self: any(state != "ZOMBIE" for state in self.model.values()))
    @rule(data=st.data())
    def end_one(self, data: st.DataObject) -> None:
        vcpu = data.draw(st.sampled_from(sorted(v for v, state in self.model.items() if state != "ZOMBIE")))
        vm = self.there.hypervisor.vms[self.vmid]
        self.there.hypervisor.vcpu_ended(vm, vm.vcpus[vcpu])
        self.model[vcpu] = "ZOMBIE"

    @rule()
    def end_twice(self) -> None:
        vm = self.there.hypervisor.vms[self.vmid]
        for vcpu, state in self.model.items():
            if state == "ZOMBIE":
                with pytest.raises(OSError, match="cannot become ZOMBIE") as caught:
                    self.there.hypervisor.vcpu_ended(vm, vm.vcpus[vcpu])
                assert caught.value.errno == errno.EBUSY

    @rule()
    def destroy(self) -> None:
        may = all(state == "ZOMBIE" for state in self.model.values())
        assert self.call(hc.HC_DESTROY_VM) == (0 if may else -errno.EBUSY)
        if may:
            assert self.there.untouched()
            assert self.call(hc.HC_START_VM) == -errno.ENODEV
            self.vmid = self.there.create(self.count)
            self.model = {}

    def _all(self, state: str) -> None:
        self.model = {vcpu: "ZOMBIE" if old == "ZOMBIE" else state for vcpu, old in self.model.items()}

    @invariant()
    def the_ledger_and_the_leases_say_the_same(self) -> None:
        rows = self.there.ledger.vcpus(self.vmid)
        assert {row.vcpu: row.state for row in rows} == self.model
        assert {row.pcpu for row in rows} <= set(self.there.pcpus(self.vmid))
        assert len({row.pcpu for row in rows}) == len(rows)
        assert self.there.taken() == CpuSet.of(self.there.pcpus(self.vmid))

    def teardown(self) -> None:
        if hasattr(self, "there"):
            self.there.destroy(self.vmid)
            untouched = self.there.untouched()
            self.there.__exit__()
            assert untouched


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=25, stateful_step_count=25, deadline=None)


# -- the service VM's side ------------------------------------------------------------------------------


def boot_service_vm(partition: Partition, pcpus: tuple[int, ...]) -> None:
    partition.hypervisor.boot_service_vm(row("vm0").replace(service=1, vcpu_num=len(pcpus)), pcpus)


def test_the_bsp_is_never_offlined(partition: Partition) -> None:
    boot_service_vm(partition, (FIRST, FIRST + 1))
    vm = partition.hypervisor.vms[0]
    for state in ("INIT", "ZOMBIE"):
        assert partition.hypervisor.hypercall(hc.HC_SOS_OFFLINE_CPU, 2 * FIRST) == -errno.EINVAL, state
        if state == "INIT":
            partition.hypervisor.vcpu_ended(vm, vm.vcpus[0])
    assert sorted(vm.vcpus) == [0, 1]


def test_offlining_goes_by_apic_id_and_only_once_the_vcpu_has_ended(partition: Partition) -> None:
    boot_service_vm(partition, (FIRST, FIRST + 1, FIRST + 2))
    vm, offline = partition.hypervisor.vms[0], hc.HC_SOS_OFFLINE_CPU
    apic_id = 2 * (FIRST + 1)
    assert partition.hypervisor.hypercall(offline, apic_id) == -errno.EBUSY
    partition.hypervisor.vcpu_ended(vm, vm.vcpus[1])
    assert partition.hypervisor.hypercall(offline, apic_id) == 0
    assert partition.hypervisor.hypercall(offline, apic_id) == -errno.EINVAL, "it is not the service VM's any more"
    assert [vcpu.pcpu for vcpu in partition.ledger.vcpus(vm.row.id)] == [FIRST, FIRST + 2]


def test_a_released_pcpu_is_not_the_service_vm_s_to_take_again(partition: Partition) -> None:
    boot_service_vm(partition, (FIRST, FIRST + 1))
    vm = partition.hypervisor.vms[0]
    partition.hypervisor.vcpu_ended(vm, vm.vcpus[1])
    assert partition.hypervisor.hypercall(hc.HC_SOS_OFFLINE_CPU, 2 * (FIRST + 1)) == 0
    assert partition.create(1, (FIRST + 1,)) > 0
    assert partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, 0, hc.CreateVcpu(1).pack()) == -errno.ENOSPC


@pytest.mark.parametrize("apic_id", [-1, 2 * FIRST + 1, 10**6], ids=["negative", "odd", "huge"])
def test_an_apic_id_that_the_machine_does_not_have_is_einval(partition: Partition, apic_id: int) -> None:
    boot_service_vm(partition, (FIRST,))
    assert partition.hypervisor.hypercall(hc.HC_SOS_OFFLINE_CPU, apic_id) == -errno.EINVAL


def test_offlining_without_a_service_vm_is_enodev(partition: Partition) -> None:
    assert partition.hypervisor.hypercall(hc.HC_SOS_OFFLINE_CPU, 2 * FIRST) == -errno.ENODEV


def test_the_service_vm_s_vcpus_may_be_where_a_guest_s_will_be_and_lease_nothing(partition: Partition) -> None:
    boot_service_vm(partition, tuple(CPUS))
    assert partition.taken() == CpuSet()
    assert partition.create(7) > 0


# -- a ledger that breaks -------------------------------------------------------------------------------


def running(partition: Partition) -> int:
    vmid = partition.create(2)
    for vcpu in range(2):
        assert partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, vmid, hc.CreateVcpu(vcpu).pack()) == 0
    assert partition.hypervisor.hypercall(hc.HC_START_VM, vmid) == 0
    return vmid


def remove_ledger(partition: Partition) -> None:
    os.unlink(partition.ledger.path)


def damage_ledger(partition: Partition) -> None:
    with open(partition.ledger.path, "r+b") as file:
        file.write(os.urandom(os.stat(partition.ledger.path).st_size))


BREAKS = pytest.mark.parametrize("breaks", [remove_ledger, damage_ledger], ids=["removed", "damaged"])


@BREAKS
def test_a_vm_ends_and_frees_its_pcpus_though_its_ledger_is_gone(partition: Partition, breaks: object) -> None:
    vmid = running(partition)
    assert callable(breaks)
    breaks(partition)
    assert partition.destroy(vmid) == 0
    assert isinstance(partition.hypervisor.trouble, LedgerUnusable)
    assert partition.taken() == CpuSet()
    assert partition.kept() == CpuSet()


@BREAKS
def test_a_vm_that_cannot_be_entered_is_refused_and_leases_nothing(partition: Partition, breaks: object) -> None:
    partition.destroy(running(partition))
    assert callable(breaks)
    breaks(partition)
    assert partition.create(2) == -errno.EIO
    assert isinstance(partition.hypervisor.refusal, LedgerUnusable)
    assert partition.taken() == CpuSet()
    assert not partition.hypervisor.vms


def test_a_pause_that_cannot_be_entered_has_not_happened(partition: Partition) -> None:
    vmid = running(partition)
    remove_ledger(partition)
    assert partition.hypervisor.hypercall(hc.HC_PAUSE_VM, vmid) == -errno.EIO
    assert {vcpu.state for vcpu in partition.hypervisor.vms[vmid].vcpus.values()} == {"RUNNING"}
    partition.destroy(vmid)


# -- the service VM for real ----------------------------------------------------------------------------

SCENARIO = """
[[vm]]
name = "rt"
vcpus = 1
command = ["sleep", "60"]
"""


def test_the_service_vm_has_a_pinned_vcpu_on_each_pcpu_that_no_user_vm_holds(
    place: Place, tmp_path: Path, two_pcpus: None
) -> None:
    usable = sorted(os.sched_getaffinity(0))
    (tmp_path / "one.toml").write_text(SCENARIO)
    launch = place.start("launch", str(tmp_path / "one.toml"))

    def listed() -> dict[str, dict[str, object]]:
        return {vm["vm"]: vm for vm in json.loads(place.run("ps", "--json").stdout)["vms"]}

    assert wait_until(lambda: listed().get("rt", {}).get("state") == "RUNNING", 30), launch.poll()
    vms = listed()
    assert vms["vm0"]["state"] == "RUNNING"
    held = {vcpu["pcpu"] for vcpu in vms["rt"]["vcpus"]}  # type: ignore[attr-defined]
    own = {vcpu["pcpu"]: vcpu["pid"] for vcpu in vms["vm0"]["vcpus"]}  # type: ignore[attr-defined]
    assert set(own) == set(usable) - held
    for pcpu, pid in own.items():
        assert os.sched_getaffinity(pid) == {pcpu}
        stat = procfs.read_stat(pid)
        assert stat is not None
        assert stat.processor == pcpu
    launch.terminate()
    assert launch.wait(20) == 128 + 15
    assert wait_until(place.is_clean)


def test_a_pcpu_leased_by_somebody_else_is_left_out_of_the_service_vm(
    place: Place, tmp_path: Path, two_pcpus: None
) -> None:
    usable = sorted(os.sched_getaffinity(0))
    leases = Leases(str(place.leases))
    with leases.lock():
        fd = leases.take(usable[-1])
    assert fd is not None
    # In a process of its own: what forks a service VM has one thread.
    done = subprocess.run(
        [sys.executable, __file__], env=place.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    (booted,) = json.loads(done.stdout)
    assert booted["event"] == "booted", booted
    assert [(vcpu["pcpu"], vcpu["ran_on"]) for vcpu in booted["vcpus"]] == [(cpu, cpu) for cpu in usable[:-1]]
    os.close(fd)
    assert place.is_clean()


def boot_and_halt() -> None:
    """Boot a service VM, print what it said of that as JSON, and halt it."""
    pid, channel = fork_service_vm(ServiceVm(), CpuSet(), read_topology(Host()), Caller())
    said: list[dict[str, object]] = []

    def booted() -> bool:
        said.extend(channel.receive())
        return bool(said)

    wait_until(booted)
    json.dump(said, sys.stdout)
    channel.send({"do": "stop"})
    _, status = os.waitpid(pid, 0)
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    boot_and_halt()
