"""CpuSet: the kernel's list and mask forms, both ways, and the algebra."""

from __future__ import annotations

import itertools
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cpuset import MAX_CPUS, CpuSet

cpus = st.integers(min_value=0, max_value=MAX_CPUS - 1)
near = st.integers(min_value=0, max_value=80)
cpusets = st.sets(near | cpus, max_size=60).map(CpuSet.of)


@given(cpusets)
def test_the_list_form_reads_back(x: CpuSet) -> None:
    assert CpuSet.parse(str(x)) == x
    assert CpuSet.parse(f"{x}\n") == x


@given(cpusets)
def test_the_mask_form_reads_back(x: CpuSet) -> None:
    assert CpuSet.parse_mask(x.to_mask()) == x


@given(st.sets(near, max_size=40), st.sets(near, max_size=40))
def test_it_is_the_set_of_its_numbers(a: set[int], b: set[int]) -> None:
    x, y = CpuSet.of(a), CpuSet.of(b)
    assert list(x) == sorted(a)
    assert len(x) == len(a)
    assert bool(x) == bool(a)
    assert all((cpu in x) == (cpu in a) for cpu in range(90))
    for ours, theirs in ((x & y, a & b), (x | y, a | b), (x - y, a - b), (x ^ y, a ^ b)):
        assert set(ours) == theirs
    assert (x <= y) == (a <= b)
    assert (x == y) == (a == b)
    if a == b:
        assert hash(x) == hash(y)
    if a:
        assert x.lowest == min(a)


@given(cpusets)
def test_the_list_form_is_the_shortest(x: CpuSet) -> None:
    spans = [tuple(map(int, part.split("-"))) for part in str(x).split(",") if part]
    assert all(first < last for first, last in (span for span in spans if len(span) == 2))
    assert all(right[0] > left[-1] + 1 for left, right in itertools.pairwise(spans))


@given(cpusets)
def test_it_survives_pickling(x: CpuSet) -> None:
    assert pickle.loads(pickle.dumps(x)) == x  # noqa: S301  our own bytes


@given(st.text(alphabet="0123456789,- +_x\t\nab٣", max_size=12))
def test_what_parses_is_what_the_kernel_could_print(text: str) -> None:
    try:
        x = CpuSet.parse(text)
    except ValueError:
        return
    body = text.strip(" \t\n")
    assert all(part.isascii() and part.replace("-", "", 1).isdigit() for part in body.split(",") if body)
    assert bool(x) == bool(body)


@pytest.mark.parametrize(
    "text",
    ["0,", ",0", "0,,1", "1-", "-1", "2-1", "0-1-2", "0x1", "+1", "1_0", "٣", "0 1", "0-8192", "8192", "99999", "0:2"],
)
def test_a_list_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"CPU|backwards|beyond"):
        CpuSet.parse(text)


@pytest.mark.parametrize("text", ["", ",", "g", "0x1", "000000001", "1,,1", "1,000000001", " 1 1"])
def test_a_mask_of_another_form_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="mask"):
        CpuSet.parse_mask(text)


def test_a_mask_beyond_the_last_cpu_is_refused() -> None:
    largest = CpuSet(1 << MAX_CPUS - 1)
    assert CpuSet.parse_mask(largest.to_mask()) == largest
    with pytest.raises(ValueError, match="beyond"):
        CpuSet.parse_mask("1" + ",00000000" * (MAX_CPUS // 32))


def test_a_mask_counts_from_the_last_word() -> None:
    assert CpuSet.parse_mask("00000001,80000001\n") == CpuSet.parse("0,31-32")
    assert CpuSet.parse("0-1,32").to_mask() == "00000001,00000003"
    assert CpuSet().to_mask() == "00000000"


def test_it_is_frozen() -> None:
    with pytest.raises(TypeError):
        CpuSet(1).mask = 2


def test_the_empty_set_has_no_lowest_and_no_number_is_negative() -> None:
    with pytest.raises(ValueError, match="empty"):
        _ = CpuSet().lowest
    with pytest.raises(ValueError, match="negative"):
        CpuSet.of([-1])
    assert -1 not in CpuSet(1)
