"""The firmware's list of processors: the bytes of an ACPI MADT, read and checked.

Ids are the firmware's; :mod:`hostpart.topology` maps them to Linux CPUs. Interrupt controllers,
overrides and every other entry that is no processor are passed over.
"""

from __future__ import annotations

from .errors import HostpartError
from .value import Value

__all__ = ["Processor", "TableError", "parse_madt"]

_HEADER_BYTES = 44  # the common 36, the interrupt controller's address, the table's flags
_GICC_BYTES = 76  # where MPIDR ends; later versions of ACPI lengthen the entry


class TableError(HostpartError):
    """An ACPI table is not what it says it is.

    :param offset: the byte at which it shows
    :param problem: what is wrong there
    """

    def __init__(self, offset: int, problem: str) -> None:
        super().__init__(offset, problem)
        self.offset, self.problem = offset, problem

    def __str__(self) -> str:
        return f"the MADT is broken at byte {self.offset}: {self.problem}"

    @property
    def remedy(self) -> str:
        return "look at it with 'iasl -d'; update the firmware"


class Processor(Value):
    """One processor that the firmware declares.

    :ivar entry: ``"local-apic"``, ``"x2apic"`` or ``"gicc"``
    :ivar acpi_uid: the ACPI processor UID
    :ivar apic_id: the APIC id; the MPIDR of a ``gicc``
    :ivar enabled: ready for use when the machine started
    :ivar online_capable: may be enabled later, where it is not enabled now
    """

    entry: str
    acpi_uid: int
    apic_id: int
    enabled: bool
    online_capable: bool


def parse_madt(table: bytes) -> tuple[Processor, ...]:
    """Return the processors a MADT declares, in table order, disabled ones too.

    :param table: the whole table, its 44-byte header included
    :return: one value per structure of type 0 (8 bytes), 9 (16 bytes) and 11 (76 bytes or more);
        other types are skipped
    :raises TableError: on a wrong signature, length or checksum, and on a structure of a length
        that its type cannot have or that runs past the end, with its byte offset

    Source: ACPI 6.5, sections 5.2.12 (the table), 5.2.12.2 (local APIC), 5.2.12.12 (local x2APIC)
    and 5.2.12.14 (GICC).
    """
    if table[:4] != b"APIC":
        raise TableError(0, f"its signature is {table[:4]!r}, not b'APIC'")
    if len(table) < _HEADER_BYTES:
        raise TableError(len(table), f"it ends inside its {_HEADER_BYTES}-byte header")
    declared = _number(table, 4, 4)
    if declared != len(table):
        raise TableError(4, f"it says it has {declared} bytes and has {len(table)}")
    if sum(table) & 0xFF:
        raise TableError(9, f"its bytes sum to {sum(table) & 0xFF} modulo 256, not to 0")
    processors = []
    offset = _HEADER_BYTES
    while offset < len(table):
        if offset + 2 > len(table):
            raise TableError(offset, "a structure ends inside its first two bytes")
        length = table[offset + 1]
        if length < 2:
            raise TableError(offset, f"a structure says it has {length} bytes")
        if offset + length > len(table):
            raise TableError(offset, f"a structure of {length} bytes runs past the end at {len(table)}")
        processor = _processor(table[offset : offset + length], offset)
        if processor:
            processors.append(processor)
        offset += length
    return tuple(processors)


def _processor(structure: bytes, offset: int) -> Processor | None:
    kind, length = structure[0], len(structure)
    if kind == 0:
        if length != 8:
            raise TableError(offset, f"a local APIC structure has 8 bytes, not {length}")
        flags = _number(structure, 4, 4)
        return Processor("local-apic", structure[2], structure[3], bool(flags & 1), bool(flags & 2))
    if kind == 9:
        if length != 16:
            raise TableError(offset, f"a local x2APIC structure has 16 bytes, not {length}")
        flags = _number(structure, 8, 4)
        uid, apic_id = _number(structure, 12, 4), _number(structure, 4, 4)
        return Processor("x2apic", uid, apic_id, bool(flags & 1), bool(flags & 2))
    if kind == 11:
        if length < _GICC_BYTES:
            raise TableError(offset, f"a GICC structure has {_GICC_BYTES} bytes or more, not {length}")
        flags = _number(structure, 12, 4)  # online capable is bit 3 here: 1 and 2 are interrupt modes
        return Processor("gicc", _number(structure, 8, 4), _number(structure, 68, 8), bool(flags & 1), bool(flags & 8))
    return None


def _number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "little")
