"""The allocator: kubelet's and ACRN's own answers, and the laws that every placement keeps."""

from __future__ import annotations

import json
import os
import pickle
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from hostpart import allocator
from hostpart.allocator import (
    POLICIES,
    SMT_MODES,
    Placement,
    Request,
    Supply,
    place,
    place_all,
    rest_count,
)
from hostpart.cpuset import CpuSet
from hostpart.errors import DoesNotFit
from hostpart.topology import Pcpu, Topology
from tests.machines import topology_of

CASES: dict[str, Any] = json.loads((Path(__file__).parent / "cases" / "kubelet_placements.json").read_text("utf-8"))

laws = settings(
    max_examples=60, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def smt_machine(cores: int, threads: int = 2) -> Topology:
    """One node and package; the siblings of pCPU 0 are numbered *cores* apart."""
    return topology_of(
        [[core, 0, 0, 0, ",".join(str(core + t * cores) for t in range(threads))] for core in range(cores)]
    )


def cpus(text: str) -> CpuSet:
    return CpuSet.parse(text)


# --- cited cases -------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES["cases"], ids=[case["id"] for case in CASES["cases"]])
def test_a_policy_gives_what_kubelet_gives(case: dict[str, Any]) -> None:
    topology = topology_of(CASES["topologies"][case["topology"]])
    request = Request(case["request"], policy=case["policy"], smt=case["smt"])
    try:
        given = str(CpuSet.of(place(topology, Supply(cpus(case["available"])), request).pcpus))
    except DoesNotFit:
        given = None
    assert given == case["expect"], case["source"]


def plain_split(
    free: list[int], need: int, unit: int, low: int, high: int
) -> tuple[int, list[int], dict[int, int]] | None:
    # KEP-2902 by trying everything.
    def thousandths(number: float) -> float:
        return int(number * 1000 + 0.5) / 1000

    def uneven(left: list[int]) -> float:
        mean = thousandths(sum(left) / len(left))
        return thousandths((sum((one - mean) ** 2 for one in left) / len(left)) ** 0.5)

    for many in range(low, high + 1):
        share = need // many // unit * unit
        found: list[tuple[float, list[int], dict[int, int]]] = []
        for combo in combinations(range(len(free)), many):
            left = [count - share * (node in combo) for node, count in enumerate(free)]
            if min(left) < 0 or sum(free[node] // unit for node in combo) * unit < need:
                continue
            able = [node for node in combo if left[node] >= unit]
            scores: list[tuple[float, list[int], dict[int, int]]] = []
            for givers in range(len(able), 0, -1) if need > share * many else (0,):
                for subset in combinations(able, givers):
                    after, rest, extra = list(left), need - share * many, dict[int, int]()
                    if sum(left[node] // unit for node in subset) * unit < rest:
                        continue
                    while rest:
                        for node in subset:
                            if rest and after[node] >= unit:
                                after[node] -= unit
                                rest -= unit
                                extra[node] = extra.get(node, 0) + 1
                    scores.append((uneven(after), list(combo), extra))
            if scores:
                found.append(min(scores, key=lambda score: score[0]))
        if found:
            return share, *min(found, key=lambda score: score[0])[1:]
    return None


@settings(laws, max_examples=120)
@given(st.lists(st.integers(1, 24), min_size=1, max_size=6), st.integers(1, 2), st.data())
def test_numa_spread_picks_the_nodes_that_trying_everything_picks(
    free: list[int], unit: int, data: st.DataObject
) -> None:
    need = data.draw(st.integers(1, max(1, sum(free) // unit))) * unit
    assume(need <= sum(free))
    high = min(need // unit, len(free))
    assert allocator._split(free, need, unit, 1, high) == plain_split(free, need, unit, 1, high)


def test_numa_spread_over_very_many_nodes_ends_and_is_even() -> None:
    free = [40 + node * 7 % 23 for node in range(200)]
    split = allocator._split(free, 4001, 1, 100, 200)
    assert split is not None
    share, nodes, extra = split
    assert share * len(nodes) + sum(extra.values()) == 4001
    assert all(share + extra.get(node, 0) <= free[node] for node in nodes)


class AllocatePcpu(RuleBasedStateMachine):
    """ACRN's ``allocate_pcpu()`` and ``free_pcpu()`` (2018, hypervisor/arch/x86/cpu.c): a bitmap, lowest bit first."""

    size = 6

    def __init__(self) -> None:
        super().__init__()
        self.used = [False] * self.size
        self.topology = smt_machine(self.size // 2)

    @rule()
    def allocate(self) -> None:
        expected = next((pcpu for pcpu in range(self.size) if not self.used[pcpu]), None)
        taken = CpuSet.of(pcpu for pcpu in range(self.size) if self.used[pcpu])
        supply = Supply(self.topology.usable - taken, taken=taken)
        try:
            given = place(self.topology, supply, Request(1, policy="first-fit", smt="shared")).pcpus[0]
        except DoesNotFit:
            given = None
        assert given == expected
        if expected is not None:
            self.used[expected] = True

    @precondition(lambda self: any(self.used))
    @rule(data=st.data())
    def free(self, data: st.DataObject) -> None:
        self.used[data.draw(st.sampled_from([pcpu for pcpu in range(self.size) if self.used[pcpu]]))] = False


def test_first_fit_shared_gives_acrns_sequence_under_any_interleaving() -> None:
    run_state_machine_as_test(AllocatePcpu, settings=settings(laws, max_examples=20, stateful_step_count=20))


# --- laws --------------------------------------------------------------------------------------


@st.composite
def topologies(draw: st.DrawFn) -> Topology:
    packages, nodes, cores = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    total = packages * nodes * cores
    threads = (
        [draw(st.integers(1, 3)) for _ in range(total)] if draw(st.booleans()) else [draw(st.integers(1, 3))] * total
    )
    seats = [(core, thread) for core in range(total) for thread in range(threads[core])]
    if draw(st.booleans()):
        seats.sort(key=lambda seat: (seat[1], seat[0]))
    forgotten = draw(st.sets(st.sampled_from(["core", "package", "numa", "llc"]), max_size=2))
    kinds = draw(st.booleans())
    stride = draw(st.integers(1, 3))
    pcpus = []
    for number, (core, _) in enumerate(seats):
        known = {"core": core, "package": core // (nodes * cores), "numa": core // cores, "llc": core // 2}
        known = {name: value for name, value in known.items() if name not in forgotten}
        kind = ("performance" if core % 2 else "efficiency") if kinds else None
        pcpus.append(Pcpu(number * stride, online=not draw(st.sampled_from([False] * 9 + [True])), kind=kind, **known))
    online = [pcpu.cpu for pcpu in pcpus if pcpu.online]
    return Topology(tuple(pcpus), CpuSet.of(cpu for cpu in online if draw(st.sampled_from([True] * 9 + [False]))))


@st.composite
def situations(draw: st.DrawFn) -> tuple[Topology, Supply]:
    topology = draw(topologies())
    roles: dict[str, list[int]] = {"free": [], "host": [], "taken": [], "other": []}
    for cpu in topology.usable:
        roles[draw(st.sampled_from(["free"] * 6 + ["host", "host", "taken", "other"]))].append(cpu)
    avoid = [cpu for cpu in topology.usable if draw(st.sampled_from([False] * 4 + [True]))]
    sets = {role: CpuSet.of(numbers) for role, numbers in roles.items()}
    return topology, Supply(sets["free"], host=sets["host"], taken=sets["taken"], avoid=CpuSet.of(avoid))


requests = st.builds(
    Request,
    st.integers(1, 9),
    policy=st.sampled_from(POLICIES),
    smt=st.sampled_from(SMT_MODES),
    kind=st.sampled_from([None, None, None, "performance", "other"]),
)


def cores_of(topology: Topology) -> list[CpuSet]:
    cores: dict[object, list[int]] = {}
    for pcpu in topology.pcpus:
        if pcpu.online:
            cores.setdefault(("own", pcpu.cpu) if pcpu.core is None else pcpu.core, []).append(pcpu.cpu)
    return [CpuSet.of(threads) for threads in cores.values()]


def check(topology: Topology, supply: Supply, request: Request, placement: Placement) -> None:
    own = CpuSet.of(placement.pcpus)
    used = CpuSet.of(cpu for core in cores_of(topology) if core & own for cpu in core)
    assert len(placement.pcpus) == len(own) == request.count
    assert own <= supply.free
    assert not own & (supply.host | supply.taken)
    assert not placement.idle & (own | supply.host | supply.taken)
    if not request.pcpus:
        assert list(placement.pcpus) == sorted(placement.pcpus)
    if request.kind is not None:
        assert all(pcpu.kind == request.kind for pcpu in topology.pcpus if pcpu.cpu in own)
    if request.smt == "shared":
        assert not placement.idle
    elif request.smt == "whole":
        assert used == own
        assert not placement.idle
    else:
        assert not used & supply.taken
        assert used == own | placement.idle | (used & supply.host)
        assert placement.shares_core == CpuSet.of(
            cpu for core in cores_of(topology) if core & supply.host for cpu in core & own
        )
    if placement.shares_core:
        assert any(f"pCPU {placement.shares_core} shares a core with the host" in line for line in placement.why)


def fits(topology: Topology, supply: Supply, request: Request) -> bool:
    try:
        place(topology, supply, request)
    except DoesNotFit:
        return False
    return True


def refused(topology: Topology, supply: Supply, request: Request) -> DoesNotFit:
    with pytest.raises(DoesNotFit) as caught:
        place(topology, supply, request)
    return caught.value


@laws
@given(situations(), requests)
def test_a_placement_keeps_every_law_and_a_refusal_changes_nothing(
    situation: tuple[Topology, Supply], request: Request
) -> None:
    topology, supply = situation
    before = repr((topology, supply, request))
    if fits(topology, supply, request):
        event("placed")
        placement = place(topology, supply, request)
        check(topology, supply, request, placement)
        assert place(topology, supply, request) == placement
    else:
        event("refused")
        refusal = refused(topology, supply, request)
        assert (refusal.wanted, refusal.free) == (request.count, supply.free)
        assert str(refusal)
        assert refusal.remedy
    assert repr((topology, supply, request)) == before


@settings(laws, max_examples=80)
@given(situations(), requests)
def test_what_a_refusal_says_would_fit_does_and_one_more_does_not(
    situation: tuple[Topology, Supply], request: Request
) -> None:
    topology, supply = situation
    if fits(topology, supply, request):
        request = request.replace(count=len(topology.pcpus) + 1)
    refusal = refused(topology, supply, request)
    asked = re.search(r"ask for (\d+)(?: or fewer)? vCPUs?(?:, in multiples of (\d+))?", refusal.remedy)
    if asked:
        most, step = int(asked[1]), int(asked[2] or 1)
        assert all(fits(topology, supply, request.replace(count=count)) for count in range(step, most + 1, step))
        assert not fits(topology, supply, request.replace(count=most + step))
    else:
        assert not any(fits(topology, supply, request.replace(count=count)) for count in (1, 2, 3))
    for mode, most in re.findall(r"use --smt (\w+) for up to (\d+)", refusal.remedy):
        assert fits(topology, supply, request.replace(count=int(most), smt=mode))
        assert not fits(topology, supply, request.replace(count=int(most) + 1, smt=mode))
    without = re.search(r"leave out the kind for up to (\d+)", refusal.remedy)
    if without:
        assert fits(topology, supply, request.replace(count=int(without[1]), kind=None))
    if "stop a VM" in refusal.remedy:
        assert not fits(topology, supply, request.replace(count=1, smt="shared"))


@laws
@given(situations(), requests)
def test_a_vm_shares_a_core_with_the_host_only_where_it_would_not_fit_otherwise(
    situation: tuple[Topology, Supply], request: Request
) -> None:
    topology, supply = situation
    request = request.replace(smt="exclusive", kind=None)
    supply = supply.replace(avoid=CpuSet())
    if not fits(topology, supply, request):
        return
    clean = CpuSet.of(cpu for core in cores_of(topology) if not core & (supply.host | supply.taken) for cpu in core)
    placement = place(topology, supply, request)
    check(topology, supply, request, placement)
    assert len(placement.shares_core) == max(0, request.count - len(clean & supply.free))


@laws
@given(situations(), requests)
def test_avoided_pcpus_are_used_only_when_the_others_are_used_up(
    situation: tuple[Topology, Supply], request: Request
) -> None:
    topology, supply = situation
    request = request.replace(kind=None)
    if not fits(topology, supply, request):
        return
    placement = place(topology, supply, request)
    avoided = CpuSet.of(placement.pcpus) & supply.avoid
    if fits(topology, supply.replace(free=supply.free - supply.avoid), request) and request.smt != "whole":
        assert not avoided
    assert bool(avoided) == any("tasks of others are pinned" in line for line in placement.why)


@laws
@given(situations(), requests, st.data())
def test_an_explicit_list_is_honoured_in_its_order_or_refused(
    situation: tuple[Topology, Supply], request: Request, data: st.DataObject
) -> None:
    topology, supply = situation
    assume(topology.pcpus)
    wanted = tuple(data.draw(st.lists(st.sampled_from([pcpu.cpu for pcpu in topology.pcpus]), min_size=1, max_size=4)))
    request = request.replace(pcpus=wanted, count=len(wanted), kind=None)
    own = CpuSet.of(wanted)
    used = [core for core in cores_of(topology) if core & own]
    good = (
        len(own) == len(wanted)
        and own <= supply.free
        and not (request.smt == "exclusive" and any(core & supply.taken for core in used))
        and not (request.smt == "whole" and any(core - own for core in used))
    )
    if not good:
        with pytest.raises(DoesNotFit):
            place(topology, supply, request)
        return
    placement = place(topology, supply, request)
    assert placement.pcpus == wanted
    check(topology, supply, request, placement)


@laws
@given(situations(), requests)
def test_the_rest_fits_and_leaves_nothing_as_good(situation: tuple[Topology, Supply], request: Request) -> None:
    topology, supply = situation
    try:
        count = rest_count(topology, supply, request)
    except DoesNotFit:
        assert request.kind == "other" or not fits(topology, supply, request.replace(count=1)) or request.smt == "whole"
        return
    placement = place(topology, supply, request.replace(count=count))
    check(topology, supply, request.replace(count=count), placement)
    if placement.shares_core or CpuSet.of(placement.pcpus) & supply.avoid:
        return
    held = CpuSet.of(placement.pcpus) | placement.idle
    left = supply.replace(free=supply.free - held - supply.avoid, taken=supply.taken | held)
    if request.smt != "whole" and fits(topology, left, request.replace(count=1)):
        assert place(topology, left, request.replace(count=1)).shares_core


@laws
@given(situations(), st.lists(requests, max_size=4), st.booleans())
def test_a_scenario_is_placed_whole_and_its_vms_never_meet(
    situation: tuple[Topology, Supply], wants: list[Request], rest: bool
) -> None:
    topology, supply = situation
    named: dict[str, Request | None] = {f"vm{number}": want for number, want in enumerate(wants)}
    if rest:
        named = {"rest": None, **named}
    try:
        placed = place_all(topology, supply, named)
    except DoesNotFit as refusal:
        vm, said = refusal.vm, str(refusal)
    else:
        vm, said = None, ""
    if said:
        event("refused")
        assert vm in named
        assert said.startswith(f"VM {vm!r}: ")
        return
    assert list(placed) == list(named)
    taken = CpuSet()
    for placement in placed.values():
        held = CpuSet.of(placement.pcpus) | placement.idle
        assert placement.pcpus
        assert not held & taken
        taken |= held
    for name, placement in placed.items():
        if (named[name] or Request(0)).smt == "exclusive":
            own = CpuSet.of(placement.pcpus)
            used = CpuSet.of(cpu for core in cores_of(topology) if core & own for cpu in core)
            others = taken - own - placement.idle
            assert not used & (others | supply.taken)


# --- single sentences --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "outer"),
    [("2s4n40c2t", "the package"), ("4s2n40c2t", "the node")],
    ids=["nodes in packages", "packages in nodes"],
)
def test_what_holds_the_other_is_chosen_before_it(topology: str, outer: str) -> None:
    # Of the quarters, 10, 3, 6 and 6 cores are free: the second is the fullest, but in the emptier half.
    machine = topology_of(CASES["topologies"][topology])
    free = cpus("0-9,40-49,10-12,50-52,20-25,60-65,30-35,70-75")
    for policy in ("packed", "llc"):
        assert place(machine, Supply(free), Request(2, policy=policy)).pcpus == (20, 60), outer


def test_packed_fills_a_core_before_the_next_and_the_odd_sibling_idles() -> None:
    placement = place(smt_machine(4), Supply(cpus("0-7")), Request(3))
    assert placement.pcpus == (0, 1, 4)
    assert placement.idle == cpus("5")


def test_spread_takes_one_thread_per_core_however_siblings_are_numbered() -> None:
    adjacent = topology_of([[core, 0, 0, 0, f"{2 * core}-{2 * core + 1}"] for core in range(4)])
    for smt in ("shared", "exclusive"):
        request = Request(3, policy="spread", smt=smt)
        assert place(adjacent, Supply(cpus("0-7")), request).pcpus == (0, 2, 4)
        assert place(smt_machine(4), Supply(cpus("1,5-7")), request).pcpus == (1, 6, 7)


def test_idle_siblings_may_lie_outside_the_usable_set() -> None:
    topology = smt_machine(2).replace(usable=cpus("0-1"))
    placement = place(topology, Supply(cpus("1"), host=cpus("0")), Request(1))
    assert placement.idle == cpus("3")


def test_the_core_of_the_host_comes_last_and_is_told_of() -> None:
    supply = Supply(cpus("1-3"), host=cpus("0"))
    assert place(smt_machine(2), supply, Request(2)).pcpus == (1, 3)
    placement = place(smt_machine(2), supply, Request(3))
    assert placement.pcpus == (1, 2, 3)
    assert placement.shares_core == cpus("2")
    assert not placement.idle


@pytest.mark.parametrize(
    ("pcpus", "fact"),
    [
        ((1, 1), "listed more than once: pCPU 1"),
        ((99,), "not on this machine: pCPU 99"),
        ((0,), "kept by the service VM: pCPU 0"),
        ((4,), "reserved: pCPU 4"),
        ((2,), "leased to other VMs: pCPU 2"),
        ((6,), "cores shared with another VM: it holds pCPU 2"),
        ((3,), "not usable by this process (affinity or cgroup): pCPU 3"),
        ((7,), "offline: pCPU 7"),
    ],
    ids=["twice", "absent", "kept", "reserved", "leased", "sibling leased", "not usable", "offline"],
)
def test_an_explicit_list_is_refused_with_the_fact(pcpus: tuple[int, ...], fact: str) -> None:
    whole = smt_machine(4)
    offline = tuple(pcpu.replace(online=pcpu.cpu != 7) for pcpu in whole.pcpus)
    topology = Topology(offline, cpus("0-2,4-6"))
    supply = Supply(cpus("1,5-6"), host=cpus("0,4"), taken=cpus("2"), reserved=cpus("4"))
    with pytest.raises(DoesNotFit) as caught:
        place(topology, supply, Request(len(pcpus), pcpus=pcpus))
    assert caught.value.blocks == (fact,)
    assert caught.value.remedy == "list pCPUs of 1,5"


def test_a_refusal_names_what_holds_the_rest_and_what_would_fit() -> None:
    supply = Supply(cpus("1-3,5-6"), host=cpus("0"), taken=cpus("4,7"))
    with pytest.raises(DoesNotFit) as caught:
        place(smt_machine(4), supply, Request(6))
    refusal = caught.value
    assert str(refusal) == (
        "6 pCPUs wanted, 5 free (pCPU 1-3,5-6); leased to other VMs: pCPU 4,7; "
        "kept by the service VM: pCPU 0; cores shared with another VM: pCPU 3"
    )
    assert refusal.remedy == "ask for 4 or fewer vCPUs, or use --smt shared for up to 5"


def test_whole_says_of_which_number_a_request_must_be_a_multiple() -> None:
    with pytest.raises(DoesNotFit) as caught:
        place(smt_machine(3, 4), Supply(cpus("1-11"), host=cpus("0")), Request(6, smt="whole"))
    assert "6 is not a multiple of 4, the threads of a core" in caught.value.blocks
    assert caught.value.remedy == "ask for 8 or fewer vCPUs, in multiples of 4, or use --smt exclusive for up to 11"
    with pytest.raises(DoesNotFit) as caught:
        place(smt_machine(3, 4), Supply(cpus("1-2,4-5,7-8,10-11")), Request(6, smt="whole"))
    assert caught.value.remedy == "ask for 8 or fewer vCPUs, in multiples of 4, or use --smt exclusive for up to 8"


def test_whole_finds_cores_of_several_sizes_that_make_up_the_request() -> None:
    hybrid = topology_of([[0, 0, 0, 0, "0-1"], [1, 0, 0, 0, "2-3"], [2, 0, 0, 0, "4"]])
    for policy in POLICIES:
        assert len(place(hybrid, Supply(cpus("0-4")), Request(4, policy=policy, smt="whole")).pcpus) == 4
        assert 4 not in place(hybrid, Supply(cpus("0-4")), Request(2, policy=policy, smt="whole")).pcpus


def test_first_fit_of_whole_cores_steps_back_where_a_small_core_spoils_the_sum() -> None:
    one_offline = topology_of([[0, 0, 0, 0, "0"], [1, 0, 0, 0, "1-2"], [2, 0, 0, 0, "3-4"]])
    request = Request(2, policy="first-fit", smt="whole")
    assert place(one_offline, Supply(cpus("0-4")), request).pcpus == (1, 2)


def test_a_kind_keeps_to_its_pcpus_and_a_machine_without_kinds_says_so() -> None:
    plain = smt_machine(2)
    hybrid = Topology(
        tuple(p.replace(kind="efficiency" if p.cpu % 2 else "performance") for p in plain.pcpus), plain.usable
    )
    assert place(hybrid, Supply(cpus("0-3")), Request(2, kind="efficiency")).pcpus == (1, 3)
    with pytest.raises(DoesNotFit, match="this machine's pCPUs have no kinds") as caught:
        place(plain, Supply(cpus("0-3")), Request(2, kind="performance"))
    assert caught.value.remedy == "leave out the kind for up to 4"
    with pytest.raises(DoesNotFit, match="there are efficiency, performance"):
        place(hybrid, Supply(cpus("0-3")), Request(2, kind="golden"))


def test_with_one_usable_pcpu_the_refusal_says_why_nothing_can_be_released() -> None:
    topology = Topology((Pcpu(0),), cpus("0"))
    with pytest.raises(DoesNotFit, match="the only usable pCPU and the host needs one, so nothing can be released"):
        rest_count(topology, Supply(CpuSet(), host=cpus("0")), Request(0))


def test_there_is_no_rest_where_no_count_of_whole_cores_will_do() -> None:
    topology = topology_of([[0, 0, 0, 0, "0-2"], [1, 0, 0, 0, "3-4"], [2, 0, 0, 0, "5-6"]])
    with pytest.raises(DoesNotFit):
        rest_count(topology, Supply(cpus("3-6"), host=cpus("0-2")), Request(0, smt="whole"))


def test_the_rest_leaves_the_core_of_the_host_alone_while_there_are_others() -> None:
    assert rest_count(smt_machine(4), Supply(cpus("1-7"), host=cpus("0")), Request(0)) == 6
    assert rest_count(smt_machine(1), Supply(cpus("1"), host=cpus("0")), Request(0)) == 1


def test_explicit_lists_go_first_and_the_rest_last_whatever_the_order_of_the_file() -> None:
    placed = place_all(
        smt_machine(4), Supply(cpus("0-7")), {"rest": Request(0), "two": Request(2), "fixed": Request(2, pcpus=(4, 0))}
    )
    assert {name: placement.pcpus for name, placement in placed.items()} == {
        "rest": (2, 3, 6, 7),
        "two": (1, 5),
        "fixed": (4, 0),
    }


def test_the_idle_sibling_of_one_vm_is_not_given_to_the_next() -> None:
    shared = Request(1, smt="shared")
    placed = place_all(smt_machine(2), Supply(cpus("0-3")), {"a": Request(1), "b": shared, "c": shared})
    assert [placement.pcpus for placement in placed.values()] == [(0,), (1,), (3,)]


def test_a_supply_that_lists_held_pcpus_as_free_gives_none_of_them() -> None:
    supply = Supply(cpus("0-3"), host=cpus("0"), taken=cpus("1"))
    assert place(smt_machine(2), supply, Request(2, smt="shared")).pcpus == (2, 3)


@pytest.mark.parametrize(
    "request_",
    [Request(1, policy="best"), Request(1, smt="maybe"), Request(-1), Request(1, pcpus=(1, 2))],
    ids=["policy", "smt", "count", "length"],
)
def test_a_request_that_means_nothing_is_a_mistake_of_the_program(request_: Request) -> None:
    with pytest.raises(ValueError):
        place(smt_machine(2), Supply(cpus("0-3")), request_)


def test_two_vms_cannot_both_have_the_rest() -> None:
    with pytest.raises(ValueError, match="only one VM can have the rest: a, b"):
        place_all(smt_machine(2), Supply(cpus("0-3")), {"a": None, "b": Request(0)})


def test_a_machine_that_tells_nothing_is_planned_as_one_node_of_single_threads() -> None:
    topology = Topology(tuple(Pcpu(cpu) for cpu in (0, 3, 8)), cpus("0,3,8"))
    for policy in POLICIES:
        for smt in SMT_MODES:
            assert place(topology, Supply(cpus("3,8")), Request(2, policy=policy, smt=smt)).pcpus == (3, 8)


def test_a_refusal_survives_pickling_with_its_vm() -> None:
    refusal = DoesNotFit(2, cpus("1"), ["reserved: pCPU 0"], "ask for 1 vCPU", vm="rt")
    again = pickle.loads(pickle.dumps(refusal))  # noqa: S301 - our own bytes
    assert (str(again), again.remedy, again.vm) == (str(refusal), refusal.remedy, "rt")


_PLAN = """
from hostpart.allocator import POLICIES, SMT_MODES, Request, Supply, place
from hostpart.cpuset import CpuSet
from hostpart.topology import Pcpu, Topology
kinds = ["performance", "efficiency", "low"]
topology = Topology(
    tuple(
        Pcpu(c, core=c % 32, package=c % 32 // 16, numa=c % 32 // 8, llc=c % 32 // 4, kind=kinds[c % 32 % 3])
        for c in range(64)
    ),
    CpuSet((1 << 64) - 1),
)
taken = CpuSet.of(range(5, 64, 9))
supply = Supply(topology.usable - taken - CpuSet(1), host=CpuSet(1), taken=taken, avoid=CpuSet.of(range(2, 64, 5)))
for policy in POLICIES:
    for smt in SMT_MODES:
        print(place(topology, supply, Request(20, policy=policy, smt=smt)))
"""


def test_no_placement_depends_on_the_seed_of_hashing() -> None:
    root = str(Path(__file__).parent.parent)
    plans = [
        subprocess.run(
            [sys.executable, "-c", _PLAN],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": root},
            capture_output=True,
            check=True,
            text=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert plans[0] == plans[1] != ""
