"""The guest's virtual devices, and how their drivers are taken from them, where their interrupts are in the way."""

from __future__ import annotations

from pathlib import Path

__all__ = ["DEVICES", "unplug"]

# Where QEMU puts them, and their driver. Debian's kernels lack some of these, see tests/vm/debian.py.
DEVICES = {
    "card": ("0000:00:05.0", "virtio-pci"),
    "card of 8 queues": ("0000:00:06.0", "vmxnet3"),
    "port": ("0000:00:07.0", "virtio-pci"),
    "disk": ("0000:00:08.0", "virtio-pci"),
}


def unplug(*, but: str = "") -> None:
    """Take the drivers from all devices but one: there are some 20 interrupts then and not some 40."""
    for name, (address, driver) in DEVICES.items():
        folder = Path("/sys/bus/pci/drivers", driver)
        if name != but and (folder / address).exists():
            (folder / "unbind").write_text(address)
