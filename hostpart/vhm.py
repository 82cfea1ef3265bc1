"""The driver between device model and hypervisor: copies buffers in, makes the hypercall, counts vCPUs."""

from __future__ import annotations

import errno

from . import hypercall as hc

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Buffer  # type: ignore[attr-defined,unused-ignore]

    from .hypervisor import Hypervisor

__all__ = ["Vhm"]


class Vhm:
    """One open of the device: at most one VM, as with an open ``/dev/acrn_vhm``.

    :ivar vmid: the VM's id, None before ``IC_CREATE_VM`` and after ``IC_DESTROY_VM``
    :ivar vcpu_num: how many vCPUs were created through it
    """

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.vmid: int | None = None
        self.vcpu_num = 0

    def ioctl(self, request: int, buffer: Buffer | None = None) -> int:
        """Make one request.

        :param request: ``IC_*`` of :mod:`hostpart.hypercall`
        :param buffer: the struct that the request takes; OUT fields are written into it
        :return: 0 or a positive result, or a negated errno: ``EFAULT`` where the buffer cannot be copied, ``ENODEV``
            before a VM is there, ``EBUSY`` where there is one already, ``ENOTTY`` for an unknown request, else the
            hypercall's
        """
        if request == hc.IC_GET_API_VERSION:
            return self.hypervisor.hypercall(hc.HC_GET_API_VERSION, buffer)
        if request == hc.IC_CREATE_VM:
            return self._create_vm(buffer)
        if request not in (hc.IC_CREATE_VCPU, hc.IC_START_VM, hc.IC_PAUSE_VM, hc.IC_DESTROY_VM):
            return -errno.ENOTTY
        if self.vmid is None:
            return -errno.ENODEV
        if request == hc.IC_CREATE_VCPU:
            return self._create_vcpu(buffer)
        number = {
            hc.IC_START_VM: hc.HC_START_VM,
            hc.IC_PAUSE_VM: hc.HC_PAUSE_VM,
            hc.IC_DESTROY_VM: hc.HC_DESTROY_VM,
        }[request]
        result = self.hypervisor.hypercall(number, self.vmid)
        if request == hc.IC_DESTROY_VM and result == 0:
            self.vmid, self.vcpu_num = None, 0
        return result

    def _create_vm(self, buffer: Buffer | None) -> int:
        if self.vmid is not None:
            return -errno.EBUSY
        if buffer is None or hc.copy_from_user(buffer, hc.CreateVm.SIZE) is None:
            return -errno.EFAULT
        result = self.hypervisor.hypercall(hc.HC_CREATE_VM, buffer)
        if result >= 0:
            self.vmid = result
        return result

    def _create_vcpu(self, buffer: Buffer | None) -> int:
        if buffer is None or hc.copy_from_user(buffer, hc.CreateVcpu.SIZE) is None:
            return -errno.EFAULT
        result = self.hypervisor.hypercall(hc.HC_CREATE_VCPU, self.vmid, buffer)
        if result >= 0:
            self.vcpu_num += 1
        return result
