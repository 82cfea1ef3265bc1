"""Hosts by the thousand in one process: real Dask workers with hostpart's real agent, whose host is a recorded one.

A recorded host places each request by the real allocator against what it has given out, keeps count of what it was
asked to run, and checks every placement by rules of its own: no pCPU twice, no core shared that was to be exclusive, as
many as were asked for. Guests end after the seconds that their command names (``sleep 0.1``), the others at once.

Run as a program, ``python -m tests.fleet.simulated ADDRESS COUNT``, it starts that many workers and says ``up``; to
each line of its standard input it answers with a :func:`tally` in JSON, and it ends with it.
"""

from __future__ import annotations

import asyncio
import gc
import hashlib
import itertools
import json
import os
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hostpart.allocator import Placement, Request, Supply, place, room
from hostpart.cpuset import CpuSet
from hostpart.errors import DoesNotFit
from hostpart.fleet.supply import resources
from hostpart.host import Host
from hostpart.topology import Topology, read_topology
from tests.machines import RECORDED, topology_of

__all__ = ["CONFIG", "MACHINES", "RecordedErrands", "Wish", "machines", "main", "recorded", "tally", "wishes"]

_CASES = Path(__file__).resolve().parent.parent / "cases" / "kubelet_placements.json"
# What a thousand workers in one process would otherwise do all day.
CONFIG: dict[str, object] = {
    "distributed.admin.system-monitor.interval": "1h",
    "distributed.admin.tick.interval": "1h",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.use-file-locking": False,
    "distributed.comm.timeouts.connect": "120s",
    "distributed.worker.http.routes": [],
    "distributed.scheduler.http.routes": [],
}
_LARGEST = 48  # pCPUs
_BELOW_A_CACHE = 8  # that the largest of them has free below one
_THREADS = 8
_LOOK_S = 5.0  # at what is live: twice a second is for a host that has one worker
_AT_ONCE = 50  # workers that register at the same time
_CHANNELS = ("events", "stdout", "stderr")


def machines() -> dict[str, Topology]:
    """Give the recorded machines: that of this folder, and those of the kubelet's own cases that can become full."""
    named = json.loads(_CASES.read_text("utf-8"))["topologies"]
    found = {"2c": read_topology(Host(str(RECORDED))), **{name: topology_of(rows) for name, rows in named.items()}}
    return {name: topology for name, topology in found.items() if len(topology.usable) <= _LARGEST}


MACHINES = machines()


class Wish(tuple[int, str, str]):
    """A request's vCPUs, SMT mode and policy."""

    __slots__ = ()

    @property
    def argv(self) -> tuple[str, ...]:
        """The words for a host's hostpart."""
        count, smt, policy = self
        return ("run", f"--vcpus={count}", f"--smt={smt}", f"--policy={policy}", "--", "true")


def wishes(seed: int) -> Iterator[Wish]:
    """Give requests of mixed needs, without end: mostly small, some that few machines can hold."""
    chance = random.Random(seed)
    while True:
        count = chance.choice((1, 1, 1, 2, 2, 3, 4, 6, 8, 16))
        smt = chance.choice(("exclusive", "exclusive", "shared", "whole"))
        count += count % 2 if smt == "whole" else 0
        policy = chance.choice(("packed", "packed", "spread", "llc" if count <= _BELOW_A_CACHE else "spread"))
        yield Wish((count, smt, policy))


def _option(words: Sequence[str], name: str, default: str) -> str:
    found = [word.partition("=")[2] for word in words if word.startswith(f"--{name}=")]
    return found[-1] if found else default


class _Errand:
    # One of a recorded host's.

    def __init__(self, one: str) -> None:
        self.id = one
        self.state = "placing"
        self.placement: Placement | None = None
        self.leases = CpuSet()
        self.error: dict[str, Any] | None = None
        self.seconds = 0.0
        self.until = 0.0


class RecordedErrands:
    """A host that is made up of a recorded topology; it has the methods of :class:`hostpart.fleet.errand.Errands`.

    :ivar started: how often each errand was started
    :ivar violations: what was placed where it does not fit, a sentence each
    :ivar refused: how many requests found it full
    """

    def __init__(self, name: str, topology: Topology) -> None:
        self.name, self.topology = name, topology
        usable = topology.usable
        # As on a real machine, one pCPU stays with what is no guest.
        self._kept = CpuSet.of([min(usable)]) if len(usable) > 1 else CpuSet()
        self._errands: dict[str, _Errand] = {}
        self._holding: dict[str, _Errand] = {}  # those that have pCPUs
        self._mutex = threading.RLock()
        self.started: dict[str, int] = {}
        self.violations: list[str] = []
        self.refused = 0

    def _taken(self) -> CpuSet:
        return CpuSet.of(cpu for errand in self._holding.values() for cpu in errand.leases)

    def _supply(self) -> Supply:
        taken = self._taken()
        return Supply(self.topology.usable - taken - self._kept, self._kept, taken)

    # -- what the agent asks for

    def begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Place it and hold it, or refuse it."""
        with self._mutex:
            self._pass()
            one = str(request["id"])
            if one in self._errands and self._errands[one].state not in ("refused", "given-up"):
                return self.state(one)
            errand = self._errands[one] = _Errand(one)
            words = list(request["argv"])
            own, tail = words[: words.index("--")], words[words.index("--") + 1 :]
            errand.seconds = float(tail[1]) if tail[:1] == ["sleep"] else 0.0
            wanted = Request(
                int(_option(own, "vcpus", "1")),
                policy=_option(own, "policy", "packed"),
                smt=_option(own, "smt", "exclusive"),
            )
            try:
                errand.placement = place(self.topology, self._supply(), wanted)
            except DoesNotFit as error:
                self.refused += 1
                errand.state = "refused"
                errand.error = {"exit_code": error.exit_code, "problem": str(error), "remedy": error.remedy}
                return self.state(one)
            self._check(errand.placement, wanted)
            errand.leases = CpuSet.of(errand.placement.pcpus) | errand.placement.idle
            errand.state = "held"
            self._holding[one] = errand
            return self.state(one)

    def _check(self, placement: Placement, wanted: Request) -> None:
        # By what a VM may claim, and by nothing of the allocator's.
        mine = CpuSet.of(placement.pcpus)
        others = self._taken()
        if len(placement.pcpus) != wanted.count or len(mine) != wanted.count:
            self.violations.append(f"{self.name}: {wanted.count} wanted, {placement.pcpus} given")
        if mine & others or mine & self._kept or mine - self.topology.usable:
            self.violations.append(f"{self.name}: {mine} given, {others} taken, {self._kept} kept")
        for cpu in mine if wanted.smt != "shared" else ():
            if self.topology.siblings(cpu) & others:
                self.violations.append(f"{self.name}: the core of pCPU {cpu} is another VM's too")
        if wanted.policy == "llc" and wanted.count <= 2:
            caches = {self.topology.pcpu(cpu).llc for cpu in mine}
            if len(caches) > 1:
                self.violations.append(f"{self.name}: {mine} lies under {len(caches)} caches")

    def start(self, one: str) -> dict[str, Any]:
        """Start what is held."""
        with self._mutex:
            errand = self._errands.get(one)
            if errand is not None and errand.state == "held":
                self.started[one] = self.started.get(one, 0) + 1
                errand.state, errand.until = "running", time.monotonic() + errand.seconds
            return self.state(one)

    def give_up(self, one: str) -> dict[str, Any]:
        """Give back what is held."""
        with self._mutex:
            errand = self._errands.get(one)
            if errand is not None and errand.state == "held":
                errand.state, errand.leases = "given-up", CpuSet()
                del self._holding[one]
            return self.state(one)

    def stop(self, one: str, grace_s: float = 5.0) -> dict[str, Any]:
        """End what runs."""
        del grace_s  # it knows of none
        with self._mutex:
            errand = self._errands.get(one)
            if errand is not None and errand.state == "running":
                errand.until = 0.0
            return self.give_up(one)

    def _pass(self) -> None:
        now = time.monotonic()
        for errand in list(self._holding.values()):
            if errand.state == "running" and now >= errand.until:
                errand.state, errand.leases = "ended", CpuSet()
                del self._holding[errand.id]

    def state(self, one: str) -> dict[str, Any]:
        """Give the state document."""
        with self._mutex:
            self._pass()
            errand = self._errands.get(one)
            document: dict[str, Any] = {
                "id": one,
                "state": errand.state if errand else "unknown",
                "host": self.name,
                "vm": one if errand and errand.placement else None,
                "vcpus": [{"vcpu": vcpu, "pcpu": cpu} for vcpu, cpu in enumerate(errand.placement.pcpus)]
                if errand and errand.placement
                else None,
                "status": 0 if errand and errand.state == "ended" else None,
                "error": errand.error if errand else None,
                "notes": [],
                "sizes": dict.fromkeys(_CHANNELS, 0),
            }
            if document["state"] == "ended":
                document["inline"] = dict.fromkeys(_CHANNELS, "")
            return document

    def is_over(self, one: str) -> bool:
        """Whether it has ended."""
        return self.state(one)["state"] in ("ended", "refused", "given-up", "unknown")

    def ids(self, run: str = "") -> list[str]:
        """Name those of a run, or all."""
        with self._mutex:
            return [one for one in self._errands if one.startswith(f"{run}." if run else "")]

    def read(self, one: str, channel: str, offset: int, limit: int) -> tuple[int, bytes]:
        """Give what a channel holds: nothing."""
        del one, channel, limit
        return offset, b""

    def ask(self, argv: Sequence[str]) -> tuple[int, str, str]:
        """Answer a question that changes nothing."""
        if list(argv[:1]) == ["topology"]:
            return 0, json.dumps({**self.topology.to_json(), "free": self._free()}), ""
        return 2, "", "a recorded host has no answer to that"

    def _free(self) -> dict[str, Any]:
        with self._mutex:
            self._pass()
            return room(self.topology, self._supply()).to_json()

    def supply(self) -> dict[str, float]:
        """Give what is free, as Dask's resources."""
        return resources({"free": self._free()})

    def sweep(self) -> None:
        """Remove nothing."""

    def hello(self) -> dict[str, Any]:
        """Give what such a host says of itself."""
        return {
            "protocol": 1, "version": "0.2.0", "hostname": self.name,
            "machine": hashlib.sha256(self.name.encode()).hexdigest()[:16],
            "boot_id": self.name, "domain": f"recorded:{self.name}", "usable": str(self.topology.usable),
            "python": "3.11.0", "user": "nobody", "command": ["hostpart"],
        }  # fmt: skip


def recorded(count: int) -> list[RecordedErrands]:
    """Make so many hosts, of the recorded machines in turn."""
    kinds = itertools.cycle(MACHINES.values())
    return [RecordedErrands(f"h{number}", topology) for number, topology in zip(range(count), kinds, strict=False)]


def tally(hosts: Sequence[RecordedErrands]) -> dict[str, Any]:
    """Sum up what the hosts have seen: what was started and how often, what was violated, what is left."""
    started: dict[str, int] = {}
    for host in hosts:
        for one, times in host.started.items():
            started[one] = started.get(one, 0) + times
    states: dict[str, int] = {}
    for host in hosts:
        for one in host.ids():
            state = host.state(one)["state"]
            states[state] = states.get(state, 0) + 1
    return {
        "started": len(started),
        "twice": sorted(one for one, times in started.items() if times > 1),
        "violations": [text for host in hosts for text in host.violations],
        "refused": sum(host.refused for host in hosts),
        "states": states,
        "pcpus": sum(len(host.topology.usable) for host in hosts),
    }


async def _at_once(function: Callable[..., Any], /, *args: Any, **words: Any) -> Any:
    # A recorded host waits for nothing; a thousand of them in threads would wait for one interpreter's lock instead.
    return function(*args, **words)


async def _serve(address: str, count: int) -> None:
    from distributed import Worker

    from hostpart.fleet import agent
    from hostpart.fleet.agent import Agent

    agent._LOOK_S = _LOOK_S
    asyncio.to_thread = _at_once
    hosts = recorded(count)
    workers = []
    # Dask's own would be a thread per worker: a thousand that wait for one interpreter's lock, which no real host does.
    threads = ThreadPoolExecutor(_THREADS)
    for host in hosts:
        worker = Worker(
            address, nthreads=1, name=host.name, dashboard=False, dashboard_address="127.0.0.1:0", memory_limit=0,
            heartbeat_interval="60s", host="127.0.0.1", executor=threads,
        )  # fmt: skip
        await Agent(worker, host, host.hello()).begin()  # type: ignore[arg-type]  # it has the same methods
        workers.append(worker)
    for first in range(0, count, _AT_ONCE):
        await asyncio.gather(*workers[first : first + _AT_ONCE])
    # What a thousand workers consist of would be gone through again and again, for whatever they do; a host has one.
    gc.disable()
    print("up", flush=True)  # noqa: T201
    loop = asyncio.get_running_loop()
    with ThreadPoolExecutor(1) as reader:
        while await loop.run_in_executor(reader, sys.stdin.readline):
            print(json.dumps(tally(hosts)), flush=True)  # noqa: T201


def main() -> None:
    """See the module."""
    import logging

    import dask

    # Their end is this process's, and nobody's trouble.
    logging.disable(logging.CRITICAL)
    with dask.config.set(CONFIG):
        try:
            asyncio.run(_serve(sys.argv[1], int(sys.argv[2])))
        finally:
            sys.stdout.flush()
            os._exit(0)


if __name__ == "__main__":
    main()
