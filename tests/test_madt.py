"""MADT: what the firmware's bytes say, and that no bytes do harm."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.host import Host
from hostpart.madt import Processor, TableError, parse_madt
from tests.machines import RECORDED, madt


def encode(processor: Processor) -> bytes:
    flags = processor.enabled | processor.online_capable << (3 if processor.entry == "gicc" else 1)
    if processor.entry == "local-apic":
        return bytes([0, 8, processor.acpi_uid, processor.apic_id]) + flags.to_bytes(4, "little")
    if processor.entry == "x2apic":
        ids = processor.apic_id.to_bytes(4, "little"), processor.acpi_uid.to_bytes(4, "little")
        return bytes([9, 16, 0, 0]) + ids[0] + flags.to_bytes(4, "little") + ids[1]
    uid = processor.acpi_uid.to_bytes(4, "little")
    return (
        bytes([11, 82])
        + bytes(6)
        + uid
        + flags.to_bytes(4, "little")
        + bytes(52)
        + processor.apic_id.to_bytes(8, "little")
        + bytes(6)
    )


def processors(entry: str, uid_bits: int, id_bits: int) -> st.SearchStrategy[Processor]:
    return st.builds(
        Processor,
        st.just(entry),
        st.integers(0, 2**uid_bits - 1),
        st.integers(0, 2**id_bits - 1),
        st.booleans(),
        st.booleans(),
    )


any_processor = processors("local-apic", 8, 8) | processors("x2apic", 32, 32) | processors("gicc", 32, 64)
# Types 1 (I/O APIC), 2 (override), 4 and 10 (NMI), 12 (GIC distributor), and types of the vendors.
others = st.builds(
    lambda kind, body: bytes([kind, 2 + len(body)]) + body,
    st.sampled_from([1, 2, 3, 4, 10, 12, 14, 16, 0x80, 0xFF]),
    st.binary(max_size=60),
)


@given(st.lists(any_processor | others, max_size=20))
def test_every_processor_comes_back_and_nothing_else(entries: list[Processor | bytes]) -> None:
    table = madt(*(entry if isinstance(entry, bytes) else encode(entry) for entry in entries))
    assert parse_madt(table) == tuple(entry for entry in entries if isinstance(entry, Processor))


def refusal(table: bytes) -> TableError | None:
    try:
        parse_madt(table)
    except TableError as error:
        return error
    return None


@given(st.binary(max_size=300))
def test_no_bytes_raise_anything_but_a_table_error(data: bytes) -> None:
    for table in (data, b"APIC" + data, madt(data)):
        error = refusal(table)
        assert error is None or (0 <= error.offset <= len(table) and error.exit_code == 1 and error.remedy)


@given(st.lists(any_processor, min_size=1, max_size=4), st.data())
def test_a_table_cut_short_is_refused(entries: list[Processor], data: st.DataObject) -> None:
    table = madt(*map(encode, entries))
    end = data.draw(st.integers(0, len(table) - 1))
    with pytest.raises(TableError):
        parse_madt(table[:end])


@given(st.lists(any_processor, max_size=4), st.data())
def test_a_changed_bit_is_noticed(entries: list[Processor], data: st.DataObject) -> None:
    table = bytearray(madt(*map(encode, entries)))
    table[data.draw(st.integers(0, len(table) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    with pytest.raises(TableError):
        parse_madt(bytes(table))


@pytest.mark.parametrize(
    ("structures", "offset", "said"),
    [
        pytest.param([bytes(1)], 44, "first two bytes", id="one byte left over"),
        pytest.param([bytes([5, 0])], 44, "0 bytes", id="no length: would never end"),
        pytest.param([bytes([5, 2]), bytes([5, 1])], 46, "1 bytes", id="shorter than its own head"),
        pytest.param([bytes([5, 2]), bytes([1, 12, 0, 0])], 46, "past the end", id="past the end"),
        pytest.param([bytes([0, 9]) + bytes(7)], 44, "8 bytes, not 9", id="local APIC too long"),
        pytest.param([bytes([0, 7]) + bytes(5)], 44, "8 bytes, not 7", id="local APIC too short"),
        pytest.param([bytes([9, 15]) + bytes(13)], 44, "16 bytes, not 15", id="x2APIC too short"),
        pytest.param([bytes([11, 40]) + bytes(38)], 44, "76 bytes or more, not 40", id="GICC without an MPIDR"),
    ],
)
def test_a_broken_structure_is_named_by_its_offset(structures: list[bytes], offset: int, said: str) -> None:
    with pytest.raises(TableError, match=said) as caught:
        parse_madt(madt(*structures))
    assert caught.value.offset == offset
    assert f"byte {offset}" in str(caught.value)


@pytest.mark.parametrize(
    ("table", "offset"),
    [
        pytest.param(b"", 0, id="nothing"),
        pytest.param(b"FACP" + bytes(40), 0, id="another table"),
        pytest.param(b"APIC" + bytes(8), 12, id="no whole header"),
        pytest.param(madt() + b"\0", 4, id="longer than it says"),
        pytest.param(madt()[:9] + b"\x01" + madt()[10:], 9, id="wrong checksum"),
    ],
)
def test_a_broken_header_is_named_by_its_offset(table: bytes, offset: int) -> None:
    with pytest.raises(TableError) as caught:
        parse_madt(table)
    assert caught.value.offset == offset


def test_a_real_table_lists_its_processors() -> None:
    table = Host(str(RECORDED)).read_bytes("sys/firmware/acpi/tables/APIC")
    assert parse_madt(table) == (
        Processor("local-apic", 0, 0, enabled=True, online_capable=False),
        Processor("local-apic", 1, 1, enabled=True, online_capable=False),
    )
