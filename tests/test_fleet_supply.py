"""What a host has to give: the resources, and that the allocator gives neither less nor more."""

from __future__ import annotations

import json
import os
import subprocess
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hostpart.allocator import Request, Supply, place, room
from hostpart.cpuset import CpuSet
from hostpart.errors import DoesNotFit
from hostpart.fleet import supply
from hostpart.host import Host
from hostpart.topology import Pcpu, Topology, read_topology
from tests.conftest import Place
from tests.machines import RECORDED, topology_of
from tests.test_allocator import CASES, laws, situations

MACHINES = {
    "2c-firecracker": read_topology(Host(str(RECORDED))),
    **{name: topology_of(rows) for name, rows in CASES["topologies"].items()},
}


def most(topology: Topology, given: Supply, smt: str) -> int:
    """Return the largest count that the allocator gives, found by asking for each."""
    found = 0
    for count in range(1, len(topology.pcpus) + 2):
        try:
            place(topology, given, Request(count, smt=smt))
        except DoesNotFit:
            continue
        found = count
    return found


def whole_cores(topology: Topology, free: CpuSet) -> int:
    """Return how many cores have all their online threads in *free*; a pCPU that names no core is one."""
    cores: dict[object, set[int]] = {}
    for pcpu in topology.pcpus:
        if pcpu.online:
            cores.setdefault(("cpu", pcpu.cpu) if pcpu.core is None else pcpu.core, set()).add(pcpu.cpu)
    return sum(all(cpu in free for cpu in threads) for threads in cores.values())


def below_one_cache(topology: Topology, free: CpuSet) -> int:
    """Return the most of *free* that share the last-level cache of their core's first thread."""
    first: dict[object, Pcpu] = {}
    count: dict[object, int] = {}
    for pcpu in topology.pcpus:
        if not pcpu.online:
            continue
        core = ("cpu", pcpu.cpu) if pcpu.core is None else pcpu.core
        cache = first.setdefault(core, pcpu).llc
        count[cache] = count.get(cache, 0) + (pcpu.cpu in free)
    return max(count.values(), default=0)


def check(topology: Topology, given: Supply) -> None:
    found = room(topology, given)
    assert found.pcpus == most(topology, given, "shared") == len(found.cpus)
    assert found.core_pcpus == most(topology, given, "exclusive")
    assert found.cores == whole_cores(topology, found.cpus)
    assert found.llc == below_one_cache(topology, found.cpus)
    assert not found.cpus & (given.host | given.taken)


@laws
@given(situations())
def test_what_is_said_to_be_free_is_what_the_allocator_gives(situation: tuple[Topology, Supply]) -> None:
    check(*situation)


@pytest.mark.parametrize("name", MACHINES)
@settings(laws, max_examples=15)
@given(data=st.data())
def test_so_it_is_on_recorded_machines(name: str, data: st.DataObject) -> None:
    topology = MACHINES[name]
    numbers = sorted(topology.usable)
    roles = data.draw(
        st.lists(
            st.sampled_from(["free", "free", "free", "host", "taken"]), min_size=len(numbers), max_size=len(numbers)
        )
    )
    sets = {
        role: CpuSet.of(cpu for cpu, its in zip(numbers, roles, strict=True) if its == role)
        for role in ("free", "host", "taken")
    }
    check(topology, Supply(sets["free"], sets["host"], sets["taken"]))


def test_a_core_shared_with_the_service_vm_counts_and_one_shared_with_another_vm_does_not() -> None:
    topology = MACHINES["1s4c2t"]  # siblings 0,4 1,5 2,6 3,7
    given = Supply(CpuSet.parse("2-7"), host=CpuSet.parse("0"), taken=CpuSet.parse("1"))
    assert room(topology, given).to_json() == {"cpus": "2-7", "pcpus": 6, "cores": 2, "core_pcpus": 5, "llc": 6}


# -- from JSON to resources ----------------------------------------------------------------------------


def test_the_resources_are_the_jsons_numbers() -> None:
    free = {"cpus": "2-5", "pcpus": 4, "cores": 1, "core_pcpus": 3, "llc": 2}
    assert supply.resources({"free": free}) == {
        "hostpart-pcpus": 4.0,
        "hostpart-cores": 1.0,
        "hostpart-core-pcpus": 3.0,
        "hostpart-llc": 2.0,
    }


@pytest.mark.parametrize("document", [{}, {"free": None}, {"free": None, "schema": 1}, []], ids=repr)
def test_where_it_is_not_said_nothing_is_free(document: object) -> None:
    assert supply.resources(document) == dict(supply.NOTHING)


@pytest.mark.parametrize("wrong", [-1, 8193, 1.5, True, "4", None], ids=repr)
@pytest.mark.parametrize("key", ["pcpus", "cores", "core_pcpus", "llc"])
def test_what_is_no_number_of_pcpus_is_refused_by_its_key(key: str, wrong: object) -> None:
    free = {"cpus": "", "pcpus": 0, "cores": 0, "core_pcpus": 0, "llc": 0, key: wrong}
    with pytest.raises(ValueError, match=f"free.{key}"):
        supply.resources({"free": free})


# -- the command ---------------------------------------------------------------------------------------


def topology_json(place: Place, *before: str) -> dict[str, Any]:
    done = subprocess.run(
        [*before, *place.command, "topology", "--json"], env=place.env, capture_output=True, text=True, check=True
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_command_says_what_the_next_request_gets(place: Place) -> None:
    free = topology_json(place)["free"]
    kept = min(os.sched_getaffinity(0))
    assert free["cpus"] == str(CpuSet.of(os.sched_getaffinity(0)) - CpuSet.of([kept]))
    assert free["pcpus"] == len(os.sched_getaffinity(0)) - 1
    for count, fits in ((free["core_pcpus"], True), (free["core_pcpus"] + 1, False)):
        if count:
            assert (place.run("plan", "-n", str(count)).returncode == 0) is fits


@pytest.mark.usefixtures("two_pcpus")
def test_what_a_vm_holds_is_not_free(place: Place) -> None:
    before = topology_json(place)["free"]
    assert before["pcpus"]
    guest = place.start("run", "--", "sh", "-c", "echo up; sleep 30")
    assert guest.stdout is not None
    assert guest.stdout.readline() == "up\n"
    during = topology_json(place)["free"]
    assert during["pcpus"] == before["pcpus"] - 1
    guest.terminate()
    guest.wait()
    assert topology_json(place)["free"] == before


@pytest.mark.usefixtures("two_pcpus")
def test_only_what_the_process_may_use_is_free(place: Place) -> None:
    last = max(os.sched_getaffinity(0))
    document = topology_json(place, "taskset", "-c", str(last))
    assert document["usable"] == str(last)
    # The one pCPU is kept for the service VM.
    assert document["free"] == {"cpus": "", "pcpus": 0, "cores": 0, "core_pcpus": 0, "llc": 0}


def test_of_a_recorded_machine_nothing_is_said_to_be_free(place: Place) -> None:
    done = place.run("topology", "--json", "--root", str(RECORDED))
    assert "free" not in json.loads(done.stdout)
