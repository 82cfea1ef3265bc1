"""Degrees of sharing and the schedule: pure, on machines made up for the purpose."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cpuset import CpuSet
from hostpart.errors import DoesNotFit, UsageError
from hostpart.experiment.design import DEGREES, Aggressor, Design, Victim
from hostpart.experiment.schedule import plan
from hostpart.experiment.sharing import degree, placements
from hostpart.topology import Pcpu, Topology


def machine(
    packages: int = 1, nodes: int = 1, llcs: int = 1, cores: int = 2, threads: int = 1, kinds: tuple[str, ...] = ()
) -> Topology:
    """Return a machine with so many of each in the one before; threads of a core are numbered last, as on x86."""
    pcpus = []
    total = packages * nodes * llcs * cores
    for thread in range(threads):
        for core in range(total):
            llc = core // cores
            node = llc // llcs
            kind = kinds[core % len(kinds)] if kinds else None
            pcpus.append(Pcpu(thread * total + core, core, node // nodes, None, node, llc, kind=kind))
    return Topology(tuple(pcpus), CpuSet.of(range(total * threads)))


TWO_BY_TWO = machine(packages=2, nodes=2, llcs=2, cores=2, threads=2)  # 32 pCPUs


@pytest.mark.parametrize(
    ("one", "other", "how"),
    [
        (3, 3, "same-pcpu"),
        (3, 19, "sibling"),
        (3, 2, "same-llc"),
        (3, 18, "same-llc"),
        (3, 1, "same-node"),
        (3, 5, "other-node"),
        (3, 8, "other-package"),
        (3, 31, "other-package"),
    ],
)
def test_a_degree_is_the_closest_thing_that_is_shared(one: int, other: int, how: str) -> None:
    assert degree(TWO_BY_TWO, one, other) == degree(TWO_BY_TWO, other, one) == how


def test_what_the_kernel_does_not_say_is_not_shared() -> None:
    bare = Topology((Pcpu(0), Pcpu(1)), CpuSet.parse("0-1"))
    assert degree(bare, 0, 1) == "elsewhere"
    assert [one.degree for one in placements(bare, CpuSet.of([0]))] == ["alone", "free", "same-pcpu", "elsewhere"]


def test_a_large_host_has_every_degree_once() -> None:
    found = placements(TWO_BY_TWO, CpuSet.of([0]))
    assert [one.name for one in found] == ["alone", *DEGREES[:-1]]
    assert {one.victim for one in found} == {1}
    here = {one.name: str(one.others) for one in found}
    assert here["alone"] == ""
    assert here["free"] == "0-31"
    assert (here["same-pcpu"], here["sibling"], here["same-llc"]) == ("1", "17", "16")  # the service VM keeps 0
    assert here["same-node"] == "2-3,18-19"


def test_two_cores_have_what_they_have_and_the_kept_one_stands_in() -> None:
    found = placements(machine(cores=2), CpuSet.of([0]))
    assert [(one.name, one.victim, str(one.others)) for one in found] == [
        ("alone", 1, ""),
        ("free", 1, "0-1"),
        ("same-pcpu", 1, "1"),
        ("same-llc", 1, "0"),
    ]


def test_the_victim_keeps_off_the_core_of_the_service_vm() -> None:
    assert {one.victim for one in placements(machine(cores=4, threads=2), CpuSet.of([0]))} == {1}
    # With all cores alike but for the kept one's sibling, that sibling is not taken though its number is the lowest.
    pcpus = tuple(Pcpu(cpu, cpu // 2, 0, None, 0, 0) for cpu in range(6))
    assert {one.victim for one in placements(Topology(pcpus, CpuSet.parse("0-5")), CpuSet.of([0]))} == {2}


def test_kinds_and_distances_are_told_apart() -> None:
    hybrid = machine(cores=4, kinds=("performance", "performance", "efficiency", "efficiency"))
    names = [one.name for one in placements(hybrid, CpuSet.of([0]))]
    assert names == [
        "efficiency/alone",
        "efficiency/free",
        "efficiency/same-pcpu",
        "efficiency/same-llc/efficiency",
        "efficiency/same-llc/performance",
        "performance/alone",
        "performance/free",
        "performance/same-pcpu",
        "performance/same-llc/efficiency",
        "performance/same-llc/performance",
    ]
    ring = machine(packages=4, cores=2)
    rows = {0: (10, 16, 22, 16), 1: (16, 10, 16, 22), 2: (22, 16, 10, 16), 3: (16, 22, 16, 10)}
    far = [one for one in placements(ring, CpuSet.of([0]), distances=rows) if one.degree == "other-package"]
    assert [(one.name, str(one.others)) for one in far] == [
        ("other-package-at-16", "2-3,6-7"),
        ("other-package-at-22", "4-5"),
    ]


def test_only_what_is_wanted_and_where() -> None:
    found = placements(TWO_BY_TWO, CpuSet.of([0]), ("sibling", "other-node"), 9)
    assert [(one.name, one.victim, str(one.others)) for one in found] == [
        ("alone", 9, ""),
        ("sibling", 9, "25"),
        ("other-node", 9, "12-15,28-31"),
    ]
    with pytest.raises(UsageError, match="pCPU 0: the service VM keeps it"):
        placements(TWO_BY_TWO, CpuSet.of([0]), victim=0)
    with pytest.raises(DoesNotFit):
        placements(machine(cores=1), CpuSet.of([0]))


@given(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 2), st.data())
def test_placements_cover_all_degrees_of_any_subset(
    packages: int, nodes: int, llcs: int, cores: int, threads: int, data: st.DataObject
) -> None:
    whole = machine(packages, nodes, llcs, cores, threads)
    usable = CpuSet.of(
        data.draw(st.sets(st.sampled_from(list(whole.usable)), min_size=2)) if len(whole.usable) > 1 else [0]
    )
    if len(usable) < 2:
        return
    topology = whole.replace(usable=usable)
    kept = CpuSet.of([usable.lowest])
    found = placements(topology, kept)
    victim = found[0].victim
    assert victim in usable - kept
    assert {one.degree for one in found} == {"alone", "free"} | {degree(topology, victim, cpu) for cpu in usable}
    for one in found[2:]:
        assert one.others
        assert {degree(topology, victim, cpu) for cpu in one.others} == {one.degree}
    most = max(len({degree(topology, cpu, other) for other in usable}) for cpu in usable - kept)
    assert len(found) == most + 2  # alone and free, which every victim has


DESIGN = Design(
    "d",
    "d.toml",
    (Victim("v", "noise"), Victim("w", "integer")),
    (Aggressor("a", "spin", count=2), Aggressor("b", "thrash", vm=True)),
)


def test_a_block_is_a_b_a_c_a() -> None:
    places = placements(machine(cores=4), CpuSet.of([0]))
    made = plan(DESIGN.replace(processes=5), places, CpuSet.of([0]))
    others = 2 * 3  # aggressors, placements
    assert len(made.runs) == 2 * 5 * (2 * others + 1)
    assert [run.number for run in made.runs] == list(range(len(made.runs)))
    orders = set()
    for _, block in itertools.groupby(made.runs, key=lambda run: run.block):
        runs = list(block)
        assert len({run.condition.victim for run in runs}) == 1
        assert all((run.condition.aggressor is None) == (place % 2 == 0) for place, run in enumerate(runs))
        ids = [run.condition.id for run in runs[1::2]]
        assert len(set(ids)) == others
        orders.add(tuple(ids))
    assert len(orders) > 5  # random, not the same each time
    assert len({one.id for one in made.conditions}) == len(made.conditions) == 2 * (1 + others)


def test_a_seed_says_the_order_and_nothing_else_does() -> None:
    places = placements(machine(cores=4), CpuSet.of([0]))
    kept = CpuSet.of([0])
    assert plan(DESIGN, places, kept) == plan(DESIGN, places, kept)
    other = plan(DESIGN.replace(seed=2), places, kept)
    assert other.conditions == plan(DESIGN, places, kept).conditions
    assert other.runs != plan(DESIGN, places, kept).runs


def test_where_aggressors_are_put() -> None:
    places = placements(TWO_BY_TWO, CpuSet.of([0]))
    made = plan(DESIGN, places, CpuSet.of([0]))
    here = {(one.aggressor, one.placement): (str(one.aggressor_pcpus), one.placed) for one in made.conditions}
    assert here["a", "free"] == ("0-31", "host")
    assert here["a", "same-pcpu"] == ("1", "host")
    assert here["a", "same-node"] == ("2-3", "host")
    assert here["b", "free"] == ("0-31", "host")  # whoever is free has no pCPU to lease
    assert here["b", "same-pcpu"] == ("1", "host")  # nor has who is where the victim is
    assert here["b", "sibling"] == ("17", "vm")
