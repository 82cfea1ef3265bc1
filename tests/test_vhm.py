"""The driver: one VM per open device, buffers copied, vCPUs counted, errno-true."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hostpart import hypercall as hc
from hostpart.hypervisor import Vcpu, Vm
from hostpart.vhm import Vhm
from tests.partition import FIRST, Partition, machine

VCPU_REQUESTS = {
    "start": hc.IC_START_VM,
    "pause": hc.IC_PAUSE_VM,
    "destroy": hc.IC_DESTROY_VM,
    "vcpu": hc.IC_CREATE_VCPU,
}


@pytest.fixture
def partition() -> Iterator[Partition]:
    with Partition(machine(range(FIRST, FIRST + 4))) as there:
        yield there


@pytest.fixture
def vhm(partition: Partition) -> Vhm:
    return Vhm(partition.hypervisor)


def end_workers(partition: Partition, vmid: int) -> None:
    vm = partition.hypervisor.vms[vmid]
    for vcpu in list(vm.vcpus.values()):
        partition.hypervisor.vcpu_ended(vm, vcpu)


def test_the_api_version_is_asked_for_before_there_is_a_vm(vhm: Vhm) -> None:
    buffer = bytearray(8)
    assert vhm.ioctl(hc.IC_GET_API_VERSION, buffer) == 0
    assert struct.unpack("<II", buffer) == (1, 0)
    assert vhm.ioctl(hc.IC_GET_API_VERSION, bytearray(7)) == -errno.EFAULT


def test_an_unknown_request_is_enotty_with_and_without_a_vm(partition: Partition, vhm: Vhm) -> None:
    for request in (0, -1, hc.HC_CREATE_VM, hc.IC_CREATE_VM | 0x100, 2**64):
        assert vhm.ioctl(request, bytearray(64)) == -errno.ENOTTY
    vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1))
    assert vhm.ioctl(0x43000015, bytearray(64)) == -errno.ENOTTY


@pytest.mark.parametrize("request_", VCPU_REQUESTS.values(), ids=list(VCPU_REQUESTS))
def test_whatever_needs_a_vm_is_enodev_before_there_is_one_and_after(
    partition: Partition, vhm: Vhm, request_: int
) -> None:
    assert vhm.ioctl(request_, bytearray(8)) == -errno.ENODEV
    vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1))
    assert vhm.ioctl(hc.IC_DESTROY_VM) == 0
    assert vhm.ioctl(request_, bytearray(8)) == -errno.ENODEV


def test_a_second_vm_through_one_device_is_ebusy_and_leases_nothing(partition: Partition, vhm: Vhm) -> None:
    vmid = vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1))
    before = partition.taken()
    assert vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1)) == -errno.EBUSY
    assert (vhm.vmid, partition.taken()) == (vmid, before)


def test_a_vm_s_id_is_returned_and_written_into_the_buffer(partition: Partition, vhm: Vhm) -> None:
    wish = partition.wish(1)
    vmid = vhm.ioctl(hc.IC_CREATE_VM, wish)
    assert vmid > 0
    assert hc.CreateVm.unpack(bytes(wish)).vmid == vmid == vhm.vmid


def test_a_vm_that_does_not_fit_is_enospc_and_the_device_is_free_for_another(partition: Partition, vhm: Vhm) -> None:
    assert vhm.ioctl(hc.IC_CREATE_VM, partition.wish(9)) == -errno.ENOSPC
    assert vhm.vmid is None
    assert partition.untouched()
    assert vhm.ioctl(hc.IC_CREATE_VM, partition.wish(3)) > 0


def test_vcpu_num_counts_what_was_created_and_nothing_that_was_refused(partition: Partition, vhm: Vhm) -> None:
    vhm.ioctl(hc.IC_CREATE_VM, partition.wish(2))
    assert vhm.vcpu_num == 0
    assert vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(0).pack()) == 0
    assert vhm.vcpu_num == 1
    assert vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(0).pack()) == -errno.EBUSY
    assert vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(2).pack()) == -errno.EINVAL
    assert vhm.ioctl(hc.IC_CREATE_VCPU, bytearray(7)) == -errno.EFAULT
    assert vhm.ioctl(hc.IC_CREATE_VCPU, None) == -errno.EFAULT
    assert vhm.ioctl(hc.IC_CREATE_VCPU, bytes(8)) == -errno.EFAULT
    assert vhm.vcpu_num == 1
    assert vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(1).pack()) == 0
    assert vhm.vcpu_num == 2
    assert vhm.vmid is not None
    end_workers(partition, vhm.vmid)
    assert vhm.ioctl(hc.IC_DESTROY_VM) == 0
    assert vars(vhm)["vmid"] is None
    assert vhm.vcpu_num == 0
    assert partition.untouched()


@pytest.mark.parametrize("written", [0, FIRST + 2, 0xFFFF], ids=["zero", "another pCPU", "all ones"])
def test_pcpu_id_is_out_only(partition: Partition, vhm: Vhm, written: int) -> None:
    vhm.ioctl(hc.IC_CREATE_VM, partition.wish(2, (FIRST + 3, FIRST + 1)))
    for vcpu_id, pcpu in enumerate((FIRST + 3, FIRST + 1)):
        buffer = hc.CreateVcpu(vcpu_id, written).pack()
        assert vhm.ioctl(hc.IC_CREATE_VCPU, buffer) == 0
        assert hc.CreateVcpu.unpack(bytes(buffer)) == hc.CreateVcpu(vcpu_id, pcpu)


def test_destroying_a_vm_whose_vcpu_has_not_ended_is_ebusy_and_changes_nothing(partition: Partition, vhm: Vhm) -> None:
    vmid = vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1))
    vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(0).pack())
    before = partition.taken(), partition.ledger.vms(), partition.ledger.vcpus(vmid)
    assert vhm.ioctl(hc.IC_DESTROY_VM) == -errno.EBUSY
    assert (vhm.vmid, vhm.vcpu_num) == (vmid, 1)
    assert (partition.taken(), partition.ledger.vms(), partition.ledger.vcpus(vmid)) == before


def test_starting_a_vm_with_a_vcpu_missing_is_ebusy(partition: Partition, vhm: Vhm) -> None:
    vhm.ioctl(hc.IC_CREATE_VM, partition.wish(2))
    vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(0).pack())
    assert vhm.ioctl(hc.IC_START_VM) == -errno.EBUSY
    assert vhm.ioctl(hc.IC_PAUSE_VM) == -errno.EBUSY
    vhm.ioctl(hc.IC_CREATE_VCPU, hc.CreateVcpu(1).pack())
    assert vhm.ioctl(hc.IC_START_VM) == 0


def test_a_name_that_is_taken_is_eexist_and_leases_nothing(partition: Partition) -> None:
    assert partition.create(1, name="rt") > 0
    before = partition.taken()
    vhm = Vhm(partition.hypervisor)
    assert vhm.ioctl(hc.IC_CREATE_VM, partition.wish(1, name="rt")) == -errno.EEXIST
    assert "'rt' is running already" in str(partition.hypervisor.refusal)
    assert (vhm.vmid, partition.taken()) == (None, before)


def test_a_token_that_nobody_announced_is_einval(vhm: Vhm) -> None:
    assert vhm.ioctl(hc.IC_CREATE_VM, hc.CreateVm(1, bytes(16)).pack()) == -errno.EINVAL


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EMFILE, errno.ENOMEM], ids=["EAGAIN", "EMFILE", "ENOMEM"])
def test_a_worker_that_cannot_be_forked_gives_that_errno_and_the_vcpu_can_be_tried_again(number: int) -> None:
    refusals = [OSError(number, "no")]

    def boot(_: Vm, __: Vcpu) -> int:
        if refusals:
            raise refusals.pop()
        return there.idle.pid

    with Partition(machine(range(FIRST, FIRST + 4)), boot=boot) as there:
        vhm = Vhm(there.hypervisor)
        vmid = vhm.ioctl(hc.IC_CREATE_VM, there.wish(1))
        buffer = hc.CreateVcpu(0).pack()
        assert vhm.ioctl(hc.IC_CREATE_VCPU, buffer) == -number
        assert vhm.vcpu_num == 0
        assert there.ledger.vcpus(vmid) == []
        assert there.hypervisor.refusal is not None
        assert there.hypervisor.refusal.remedy
        assert vhm.ioctl(hc.IC_CREATE_VCPU, buffer) == 0
        assert hc.CreateVcpu.unpack(bytes(buffer)).pcpu_id == there.pcpus(vmid)[0]


REQUESTS = st.sampled_from([*VCPU_REQUESTS.values(), hc.IC_CREATE_VM, hc.IC_GET_API_VERSION]) | st.integers()
BUFFERS = st.none() | st.binary(max_size=64).map(bytearray) | st.integers(0, 3).map(lambda n: hc.CreateVcpu(n).pack())


@given(st.lists(st.tuples(REQUESTS, BUFFERS), max_size=30), st.booleans())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_request_raises_and_what_it_leaves_is_what_it_says(
    partition: Partition, requests: list[tuple[int, bytearray | None]], create: bool
) -> None:
    vhm = Vhm(partition.hypervisor)
    if create:
        assert vhm.ioctl(hc.IC_CREATE_VM, partition.wish(2)) > 0
    for request, buffer in requests:
        result = vhm.ioctl(request, buffer)
        assert result >= 0 or -result in errno.errorcode
        rows = partition.ledger.vms()
        assert [row.id for row in rows] == ([vhm.vmid] if vhm.vmid is not None else [])
        assert vhm.vcpu_num == (len(partition.ledger.vcpus(vhm.vmid)) if vhm.vmid is not None else 0)
        assert len(partition.taken()) == (2 if vhm.vmid is not None else 0)
    if vhm.vmid is not None:
        end_workers(partition, vhm.vmid)
        assert vhm.ioctl(hc.IC_DESTROY_VM) == 0
    assert partition.untouched()
