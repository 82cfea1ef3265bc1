"""The numbers and structs that DM, VHM and hypervisor speak, as bytes.

Numbers and layouts of hypercalls and ioctls are those of ACRN's first releases (2018):
``hypervisor/include/public/acrn_hv_defs.h`` and ``acrn_common.h``, and the service VM kernel's
``include/uapi/linux/vhm_ioctl_defs.h``. All integers are little-endian, as on the x86 they come from.
A call answers with 0 or a positive result, or with a negated errno.
"""

from __future__ import annotations

import struct

from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

__all__ = [
    "HC_CREATE_VCPU",
    "HC_CREATE_VM",
    "HC_DESTROY_VM",
    "HC_GET_API_VERSION",
    "HC_PAUSE_VM",
    "HC_SOS_OFFLINE_CPU",
    "HC_START_VM",
    "IC_CREATE_VCPU",
    "IC_CREATE_VM",
    "IC_DESTROY_VM",
    "IC_GET_API_VERSION",
    "IC_PAUSE_VM",
    "IC_START_VM",
    "CreateVcpu",
    "CreateVm",
    "copy_all_from_user",
    "copy_from_user",
    "copy_to_user",
]

_HC_ID = 0x80 << 24
HC_GET_API_VERSION = _HC_ID | 0x00
HC_SOS_OFFLINE_CPU = _HC_ID | 0x01
HC_CREATE_VM = _HC_ID | 0x10
HC_DESTROY_VM = _HC_ID | 0x11
HC_START_VM = _HC_ID | 0x12
HC_PAUSE_VM = _HC_ID | 0x13
HC_CREATE_VCPU = _HC_ID | 0x14

_IC_ID = 0x43 << 24
IC_GET_API_VERSION = _IC_ID | 0x00
IC_CREATE_VM = _IC_ID | 0x10
IC_DESTROY_VM = _IC_ID | 0x11
IC_START_VM = _IC_ID | 0x12
IC_PAUSE_VM = _IC_ID | 0x13
IC_CREATE_VCPU = _IC_ID | 0x14


class CreateVcpu(Value):
    """``struct acrn_create_vcpu``: two ``uint16``, aligned to 8 bytes.

    :ivar vcpu_id: the vCPU's number in its VM
    :ivar pcpu_id: OUT: the pCPU it was bound to, Linux's number
    """

    vcpu_id: int
    pcpu_id: int = 0

    SIZE = 8
    _layout = struct.Struct("<HH4x")

    def pack(self) -> bytearray:
        """Return the struct, writable, for :meth:`hostpart.vhm.Vhm.ioctl`.

        :raises struct.error: where a number is not a ``uint16``
        """
        return bytearray(self._layout.pack(self.vcpu_id, self.pcpu_id))

    @classmethod
    def unpack(cls, data: bytes) -> CreateVcpu:
        """Read the struct's :attr:`SIZE` bytes."""
        return cls(*cls._layout.unpack_from(data))


class CreateVm(Value):
    """``struct acrn_create_vm``, with the VM's whole CPU request in what the seed reserved and behind it.

    The seed's part is ``int32 vmid; uint32 vcpu_num; uint8 GUID[16]; uint8 secure_world_enabled; uint8
    reserved[31]``. Here the GUID is the VM's token, and the reserved bytes hold policy, SMT mode, kind and the
    counts of the lists of ``uint16`` that follow: the explicit pCPUs, the reserved ones and those the service VM
    keeps.

    :ivar vmid: OUT
    :ivar vcpu_num: how many vCPUs, 0 for "all that is left"
    :ivar token: 16 bytes
    :ivar policy: index into :data:`hostpart.allocator.POLICIES`
    :ivar smt: index into :data:`hostpart.allocator.SMT_MODES`
    :ivar kind: 0 any, 1 ``performance``, 2 ``efficiency``
    :ivar pcpus: explicit pCPUs, vCPU i on the i-th
    :ivar reserve: pCPUs never to be given out
    :ivar keep: pCPUs that the service VM keeps
    :ivar keep_count: how many it keeps, the lowest that can be had, where *keep* is empty
    """

    vcpu_num: int
    token: bytes
    policy: int = 0
    smt: int = 0
    kind: int = 0
    pcpus: tuple[int, ...] = ()
    reserve: tuple[int, ...] = ()
    keep: tuple[int, ...] = ()
    keep_count: int = 1
    vmid: int = -1

    SIZE = 56
    _layout = struct.Struct("<iI16sBBBBHHHH20x")

    def pack(self) -> bytearray:
        """Return the struct and its lists, writable."""
        lists = (*self.pcpus, *self.reserve, *self.keep)
        head = self._layout.pack(
            self.vmid,
            self.vcpu_num,
            self.token,
            0,
            self.policy,
            self.smt,
            self.kind,
            len(self.pcpus),
            len(self.reserve),
            len(self.keep),
            self.keep_count,
        )
        return bytearray(head + struct.pack(f"<{len(lists)}H", *lists))

    @classmethod
    def unpack(cls, data: bytes) -> CreateVm:
        """Read the struct and its lists.

        :raises struct.error: where *data* is shorter than it says
        """
        vmid, count, token, _, policy, smt, kind, *sizes, keep_count = cls._layout.unpack_from(data)
        numbers = struct.unpack_from(f"<{sum(sizes)}H", data, cls.SIZE)
        first, second = sizes[0], sizes[0] + sizes[1]
        return cls(
            count, token, policy, smt, kind, numbers[:first], numbers[first:second], numbers[second:], keep_count, vmid
        )


def copy_from_user(buffer: Buffer, size: int) -> bytes | None:
    """Return the first *size* bytes, or None (``EFAULT``) where they cannot be read."""
    try:
        with memoryview(buffer) as view, view.cast("B") as flat:
            return bytes(flat[:size]) if len(flat) >= size else None
    except (TypeError, ValueError, BufferError):
        return None


def copy_all_from_user(buffer: Buffer) -> bytes | None:
    """Return all of *buffer*, or None (``EFAULT``) where it cannot be read."""
    try:
        with memoryview(buffer) as view:
            return view.tobytes()
    except (TypeError, ValueError, BufferError):
        return None


def copy_to_user(buffer: Buffer, data: bytes) -> bool:
    """Write *data* over the start of *buffer*; False (``EFAULT``) where that cannot be done."""
    try:
        with memoryview(buffer) as view, view.cast("B") as flat:
            flat[: len(data)] = data
    except (TypeError, ValueError, BufferError):
        return False
    return True
