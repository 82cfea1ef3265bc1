"""Many simulated hosts and many requests: each is placed where it fits, none is lost, and the client stays small.

``bench/bench_fleet.py`` does it with a thousand hosts, and measures how long it takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from hostpart.allocator import Placement, Request
from hostpart.cpuset import CpuSet
from hostpart.fleet.cluster import quiet
from tests.fleet.simulated import MACHINES, RecordedErrands
from tests.fleet.thousand import Measured, simulation

pytest.importorskip("distributed")

_HOSTS, _REQUESTS = 200, 1000


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    """What came of a thousand requests whose guests run up to half a second, to two hundred hosts."""

    async def made() -> Measured:
        async with simulation(_HOSTS) as here:
            return await here.dispatch(_REQUESTS, seed=1, most_s=0.5)

    with quiet():
        yield asyncio.run(made())


def test_no_request_is_placed_where_it_does_not_fit(measured: Measured) -> None:
    assert measured.tally["violations"] == []


def test_no_request_is_lost_and_none_runs_twice(measured: Measured) -> None:
    assert measured.states == {"ended": _REQUESTS}
    assert measured.numbers == _REQUESTS
    assert measured.tally["started"] == _REQUESTS
    assert measured.tally["twice"] == []


def test_nothing_is_held_in_the_end(measured: Measured) -> None:
    assert not {"placing", "held", "running"} & set(measured.tally["states"]), measured.tally["states"]


def test_the_client_does_not_grow_with_the_requests(measured: Measured) -> None:
    # Of the first requests' growth most is what Python and Dask set up once.
    grown = measured.resident[-1] - measured.resident[2]
    assert grown < 8 << 20, [size >> 10 for size in measured.resident]


def test_a_recorded_host_sees_what_does_not_fit() -> None:
    host = RecordedErrands("h", MACHINES["1s4c2t"])
    held = host.begin({"id": "0.0.1", "argv": ["run", "--vcpus=2", "--", "true"]})
    assert held["state"] == "held"
    mine = tuple(one["pcpu"] for one in held["vcpus"])
    for wrong in (mine, (0, 1), (99, 100), mine[:1]):
        before = len(host.violations)
        host._check(Placement(wrong, CpuSet()), Request(2))
        assert len(host.violations) > before, wrong
    assert host.begin({"id": "0.1.1", "argv": ["run", "--vcpus=8", "--", "true"]})["error"]["exit_code"] == 3
    assert host.start("0.0.1")["state"] == "ended"
    assert host.begin({"id": "0.2.1", "argv": ["run", "--vcpus=6", "--", "true"]})["state"] == "held"
