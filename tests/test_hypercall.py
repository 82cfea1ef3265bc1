"""Numbers and layouts as in ACRN's headers of 2018, and what a bad buffer does: EFAULT, never an exception."""

from __future__ import annotations

import array
import ctypes
import errno
import mmap
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from hostpart import hypercall as hc
from tests.partition import FIRST, Partition, machine

# hypervisor/include/public/acrn_hv_defs.h: BASE_HC_ID(HC_ID, 0x00UL) is 0x80 << 24 | ID.
HYPERCALLS = {
    "HC_GET_API_VERSION": 0x80000000,
    "HC_SOS_OFFLINE_CPU": 0x80000001,
    "HC_CREATE_VM": 0x80000010,
    "HC_DESTROY_VM": 0x80000011,
    "HC_START_VM": 0x80000012,
    "HC_PAUSE_VM": 0x80000013,
    "HC_CREATE_VCPU": 0x80000014,
}
# include/uapi/linux/vhm_ioctl_defs.h: IC_ID 0x43, and the same numbers below it.
IOCTLS = {
    "IC_GET_API_VERSION": 0x43000000,
    "IC_CREATE_VM": 0x43000010,
    "IC_DESTROY_VM": 0x43000011,
    "IC_START_VM": 0x43000012,
    "IC_PAUSE_VM": 0x43000013,
    "IC_CREATE_VCPU": 0x43000014,
}
TOKEN = bytes(range(16))
UINT16 = st.integers(0, 0xFFFF)


class AcrnCreateVcpu(ctypes.LittleEndianStructure):
    """``struct acrn_create_vcpu { uint16_t vcpu_id; uint16_t pcpu_id; } __aligned(8);``"""

    _fields_ = (("vcpu_id", ctypes.c_uint16), ("pcpu_id", ctypes.c_uint16), ("_", ctypes.c_uint8 * 4))


class AcrnCreateVm(ctypes.LittleEndianStructure):
    """``struct acrn_create_vm``, 2018."""

    _fields_ = (
        ("vmid", ctypes.c_int32),
        ("vcpu_num", ctypes.c_uint32),
        ("GUID", ctypes.c_uint8 * 16),
        ("secure_world_enabled", ctypes.c_uint8),
        ("reserved", ctypes.c_uint8 * 31),
    )


@pytest.fixture
def partition() -> Iterator[Partition]:
    with Partition(machine(range(FIRST, FIRST + 4))) as there:
        yield there


@pytest.mark.parametrize(("name", "number"), (HYPERCALLS | IOCTLS).items(), ids=[*HYPERCALLS, *IOCTLS])
def test_the_number_is_the_one_in_acrn_s_header(name: str, number: int) -> None:
    assert getattr(hc, name) == number


def test_every_number_that_the_module_has_is_checked_here() -> None:
    assert {name for name in hc.__all__ if name.startswith(("HC_", "IC_"))} == set(HYPERCALLS | IOCTLS)


def test_the_structs_have_acrn_s_sizes() -> None:
    assert (hc.CreateVcpu.SIZE, ctypes.sizeof(AcrnCreateVcpu)) == (8, 8)
    assert (hc.CreateVm.SIZE, ctypes.sizeof(AcrnCreateVm)) == (56, 56)


@given(UINT16, UINT16)
def test_create_vcpu_is_what_a_c_compiler_lays_out(vcpu_id: int, pcpu_id: int) -> None:
    packed = hc.CreateVcpu(vcpu_id, pcpu_id).pack()
    seen = AcrnCreateVcpu.from_buffer(packed)
    assert (seen.vcpu_id, seen.pcpu_id, bytes(seen._)) == (vcpu_id, pcpu_id, bytes(4))
    assert hc.CreateVcpu.unpack(bytes(packed)) == hc.CreateVcpu(vcpu_id, pcpu_id)


def test_create_vcpu_is_this_byte_for_byte() -> None:
    assert bytes(hc.CreateVcpu(0x0102, 0x0304).pack()) == bytes.fromhex("0201040300000000")


def test_create_vm_is_this_byte_for_byte() -> None:
    packed = hc.CreateVm(3, TOKEN, 1, 2, 1, (5, 6, 7), (0,), (1, 0x0203), 9).pack()
    head = ["ffffffff", "03000000", TOKEN.hex(), "00", "01", "02", "01", "0300", "0100", "0200", "0900", "00" * 20]
    assert packed[:56].hex() == "".join(head)
    assert packed[56:].hex() == "".join(["0500", "0600", "0700", "0000", "0100", "0302"])


@given(st.integers(-(2**31), 2**31 - 1), st.integers(0, 2**32 - 1), st.binary(min_size=16, max_size=16))
def test_create_vm_s_own_fields_are_where_a_c_compiler_puts_them(vmid: int, count: int, token: bytes) -> None:
    seen = AcrnCreateVm.from_buffer(hc.CreateVm(count, token, vmid=vmid).pack())
    assert (seen.vmid, seen.vcpu_num, bytes(seen.GUID), seen.secure_world_enabled) == (vmid, count, token, 0)


LISTS = st.lists(UINT16, max_size=9).map(tuple)


@given(st.integers(0, 2**32 - 1), *[st.integers(0, 255)] * 3, LISTS, LISTS, LISTS, UINT16)
def test_create_vm_round_trips(
    count: int,
    policy: int,
    smt: int,
    kind: int,
    pcpus: tuple[int, ...],
    reserve: tuple[int, ...],
    keep: tuple[int, ...],
    keep_count: int,
) -> None:
    wish = hc.CreateVm(count, TOKEN, policy, smt, kind, pcpus, reserve, keep, keep_count)
    assert hc.CreateVm.unpack(bytes(wish.pack())) == wish


@given(LISTS, LISTS, st.data())
def test_create_vm_cut_short_anywhere_is_a_struct_error(
    pcpus: tuple[int, ...], keep: tuple[int, ...], data: st.DataObject
) -> None:
    packed = bytes(hc.CreateVm(1, TOKEN, pcpus=pcpus, keep=keep).pack())
    cut = data.draw(st.integers(0, len(packed) - 1))
    with pytest.raises(struct.error):
        hc.CreateVm.unpack(packed[:cut])


def released() -> memoryview:
    view = memoryview(bytearray(64))
    view.release()
    return view


UNREADABLE: dict[str, Callable[[], object]] = {
    "None": lambda: None,
    "a number": lambda: 8,
    "text": lambda: "x" * 64,
    "a list": lambda: [0] * 64,
    "empty": bytearray,
    "one byte short of a vCPU": lambda: bytearray(7),
    "released": released,
    "every second byte": lambda: memoryview(bytearray(128))[::2],
    "backwards": lambda: memoryview(bytearray(64))[::-1],
}
READABLE: dict[str, Callable[[], object]] = {
    "bytearray": lambda: bytearray(64),
    "memoryview": lambda: memoryview(bytearray(64)),
    "array of uint16": lambda: array.array("H", [0] * 32),
    "array of doubles": lambda: array.array("d", [0.0] * 8),
    "ctypes struct": AcrnCreateVm,
    "anonymous mapping": lambda: mmap.mmap(-1, 64),
    "two-dimensional": lambda: memoryview(bytearray(64)).cast("B", (8, 8)),
}


@pytest.mark.parametrize("make", UNREADABLE.values(), ids=list(UNREADABLE))
def test_a_buffer_that_cannot_be_copied_is_told_and_not_raised(make: Callable[[], Any]) -> None:
    assert hc.copy_from_user(make(), 8) is None
    assert hc.copy_to_user(make(), bytes(8)) is False


@pytest.mark.parametrize("make", READABLE.values(), ids=list(READABLE))
def test_whatever_has_writable_bytes_is_read_and_written_through(make: Callable[[], Any]) -> None:
    buffer = make()
    assert hc.copy_to_user(buffer, b"\1\2\3\4\5\6\7\x08")
    assert hc.copy_from_user(buffer, 8) == b"\1\2\3\4\5\6\7\x08"
    size = 56 if isinstance(buffer, AcrnCreateVm) else 64
    assert hc.copy_all_from_user(buffer) == b"\1\2\3\4\5\6\7\x08" + bytes(size - 8)


def test_read_only_bytes_are_read_and_not_written() -> None:
    assert hc.copy_from_user(b"12345678tail", 8) == b"12345678"
    assert hc.copy_to_user(b"12345678", b"x") is False


@pytest.mark.parametrize("number", [hc.HC_CREATE_VM, hc.HC_CREATE_VCPU, hc.HC_GET_API_VERSION])
@pytest.mark.parametrize("make", UNREADABLE.values(), ids=list(UNREADABLE))
def test_a_hypercall_with_such_a_buffer_gives_efault_and_changes_nothing(
    partition: Partition, make: Callable[[], object], number: int
) -> None:
    vmid = partition.create(1)
    before = partition.taken(), partition.ledger.vms(), partition.ledger.vcpus(vmid)
    params = (vmid, make()) if number == hc.HC_CREATE_VCPU else (make(),)
    assert partition.hypervisor.hypercall(number, *params) == -errno.EFAULT
    assert (partition.taken(), partition.ledger.vms(), partition.ledger.vcpus(vmid)) == before


def test_a_read_only_request_for_a_vm_gives_efault_and_leases_nothing(partition: Partition) -> None:
    wish = bytes(partition.wish(2))
    assert partition.hypervisor.hypercall(hc.HC_CREATE_VM, wish) == -errno.EFAULT
    assert partition.untouched()
    assert not partition.hypervisor.vms


def test_a_read_only_request_for_a_vcpu_gives_efault_before_a_worker_is_forked(partition: Partition) -> None:
    vmid = partition.create(1)
    assert partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, vmid, bytes(8)) == -errno.EFAULT
    assert partition.ledger.vcpus(vmid) == []
    assert partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, vmid, bytearray(8)) == 0


def test_a_list_that_runs_past_the_buffer_gives_efault(partition: Partition) -> None:
    wish = partition.wish(3, (FIRST + 1, FIRST + 2, FIRST + 3))
    assert partition.hypervisor.hypercall(hc.HC_CREATE_VM, wish[:-1]) == -errno.EFAULT
    assert partition.untouched()


@pytest.mark.parametrize("params", [(), (1, 2, 3, 4)], ids=["none", "four"])
@pytest.mark.parametrize("number", HYPERCALLS.values(), ids=list(HYPERCALLS))
def test_a_wrong_number_of_parameters_gives_einval(
    partition: Partition, number: int, params: tuple[object, ...]
) -> None:
    assert partition.hypervisor.hypercall(number, *params) == -errno.EINVAL


KNOWN = st.sampled_from(list((HYPERCALLS | IOCTLS).values()))
NUMBERS = st.integers(-(2**33), 2**33) | st.integers() | KNOWN
ANYTHING = st.binary(max_size=80).map(bytearray) | st.integers() | st.none() | st.text(max_size=3) | st.floats()


@given(st.lists(st.tuples(NUMBERS, st.lists(ANYTHING, max_size=3)), max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_number_and_no_parameter_raises_or_leaves_anything(
    partition: Partition, calls: list[tuple[int, list[object]]]
) -> None:
    for number, params in calls:
        result = partition.hypervisor.hypercall(number, *params)
        assert isinstance(result, int)
        assert result == 0 or -result in errno.errorcode
    assert not partition.hypervisor.vms
    assert partition.untouched()


@given(st.binary(max_size=40), st.binary(max_size=30), st.integers(0, 3), st.integers(0, 3))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_request_of_random_bytes_is_done_whole_or_not_at_all(
    partition: Partition, body: bytes, lists: bytes, count: int, listed: int
) -> None:
    # The token is right and the counts are near what makes sense, so that the bytes get as far as they can.
    wish = partition.wish(count)
    wish[25 : 25 + len(body[:31])] = body[:31]
    wish[28:30] = struct.pack("<H", listed)
    wish += lists
    result = partition.hypervisor.hypercall(hc.HC_CREATE_VM, wish)
    if result < 0:
        assert -result in (errno.EFAULT, errno.EINVAL, errno.ENOSPC)
    else:
        assert struct.unpack_from("<i", wish) == (result,)
        vm = partition.hypervisor.vms[result]
        assert partition.taken().mask == sum(1 << cpu for cpu in vm.leases)
        assert partition.destroy(result) == 0
    assert partition.untouched()


@given(st.binary(max_size=20))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_vcpu_of_random_bytes_is_made_or_refused(partition: Partition, body: bytes) -> None:
    vmid = partition.create(2)
    assume(vmid > 0)
    result = partition.hypervisor.hypercall(hc.HC_CREATE_VCPU, vmid, bytearray(body))
    if len(body) < 8:
        assert result == -errno.EFAULT
    else:
        assert result == (0 if struct.unpack_from("<H", body)[0] < 2 else -errno.EINVAL)
    assert len(partition.ledger.vcpus(vmid)) == (result == 0)
    assert partition.destroy(vmid) == 0
    assert partition.untouched()
