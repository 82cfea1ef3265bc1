"""A guest that needs no kernel: a boot sector, whose CPUs all compute and which ends at the power button.

An emulated machine inside an emulated machine takes a minute to boot Linux, and this one some seconds.
"""

from __future__ import annotations

__all__ = ["SAYS", "sector"]

SAYS = "it runs"  # on the first serial port, when all CPUs do
_TEXT = f"{SAYS}\r\n\0".encode()
_DISK_BYTES = 1 << 20  # SeaBIOS boots from no smaller one
# Loaded at 0x7C00. The first CPU starts the others, each of which counts itself at 0x600 and computes for ever.
# Sources: Intel's SDM, vol. 3, "MP Initialization Protocol". SeaBIOS puts q35's ACPI registers at 0x600.
_CODE = (
    ("fa 31c0 8ed8 8ec0 8ed0 bc0070 fc", "cli; ds = es = ss = 0; sp = 0x7000; cld"),
    ("ea127c0000", "jmp 0:here"),
    ("be937c bf0080 b90d00 f3a4", "here: copy what the others run to 0x8000"),
    ("890e0006", "word [0x600] = 0"),
    ("0f0116b07c 0f20c0 0c01 0f22c0 bb0800 8ee3 24fe 0f22c0", "fs: from 0 to 4 GB, by way of protected mode"),
    ("66bb0003e0fe 646766c70300450c00", "the APIC's command register: INIT to all others"),
    ("b90040 e2fe", "wait"),
    ("646766c70308460c00 b90040 f390 e2fc", "again: STARTUP at 0x8000 to all others; wait"),
    ("a10006 3b06f87d 72e7", "jump to again while [0x600] is less than [others]"),
    ("ba0206 b80001 ef", "enable the power button"),
    ("beb67c baf803 ac ee 84c0 75fa", "say the text"),
    ("668b0efa7d ba0006", "ecx = [turns]; the power button's port"),
    ("ed f6c401 7504 6649 75f6", "look at it, until it was pressed or the turns are through"),
    ("ba0406 b80020 ef ebfe", "power off"),
    ("31c0 8ed8 f0ff060006 6640 ebfc", "the others: count in [0x600]; inc eax for ever"),
    ("0000000000000000 ffff00000092cf00", "the descriptors: none; data, from 0 to 4 GB"),
    ("0f00 a07c0000", "their size and place"),
)


def sector(cpus: int, turns: int = 0) -> bytes:
    """Return a disk image for a guest with *cpus* CPUs.

    :param turns: how often it looks at the power button before it powers off all the same; 0: four thousand million
    """
    code = b"".join(bytes.fromhex(part) for part, _ in _CODE) + _TEXT
    code = code.ljust(504, b"\0") + (cpus - 1).to_bytes(2, "little") + turns.to_bytes(4, "little") + b"\x55\xaa"
    return code.ljust(_DISK_BYTES, b"\0")
