"""Many simulated hosts take many requests from the real dispatcher, beside as many empty tasks from Dask's own client.

The hosts are a process of their own, so that what this one uses is what the client uses.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import itertools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from typing import Any

from hostpart.fleet import cluster
from hostpart.fleet.dispatch import Dispatcher, Outcome
from hostpart.fleet.link import Link
from hostpart.fleet.request import Request, needs_of, new_run
from hostpart.value import Value
from tests.fleet.simulated import CONFIG, MACHINES, Wish, wishes

__all__ = ["Measured", "Simulation", "simulation"]

_WIDEST = max(len(topology.usable) for topology in MACHINES.values())


class Measured(Value):
    """What came of it.

    :ivar seconds: from the first request to the last outcome
    :ivar states: how many ended how
    :ivar numbers: how many different requests have an outcome
    :ivar resident: bytes of this process at each hundredth outcome
    :ivar tally: what the hosts say of it (:func:`tests.fleet.simulated.tally`)
    """

    seconds: float
    states: dict[str, int]
    numbers: int
    resident: tuple[int, ...]
    tally: dict[str, Any]


class Simulation:
    """So many hosts, connected.

    :ivar fleet: the connection
    """

    def __init__(self, fleet: cluster.Cluster, hosts: subprocess.Popen[str]) -> None:
        self.fleet, self._hosts = fleet, hosts

    async def dispatch(self, count: int, seed: int, most_s: float = 0.0) -> Measured:
        """Bring so many requests of mixed needs to their ends.

        :param most_s: how long guests run at most; 0: they end at once
        """
        states: dict[str, int] = {}
        numbers: set[int] = set()
        resident: list[int] = []

        def ended(outcome: Outcome) -> None:
            states[outcome.state] = states.get(outcome.state, 0) + 1
            numbers.add(outcome.request.number)
            if len(numbers) % 100 == 0:
                resident.append(_resident())

        dispatcher = Dispatcher(Link(self.fleet), wait_s=float("inf"), ended=ended)
        await dispatcher.hosts()
        gc.collect()
        gc.freeze()  # as 'hostpart fleet run' does
        began = time.monotonic()
        try:
            await dispatcher.run(_requests(count, seed, most_s))
        finally:
            seconds = time.monotonic() - began
            await dispatcher.close()
        return Measured(seconds, states, len(numbers), tuple(resident), await self.tally())

    async def tally(self) -> dict[str, Any]:
        """Ask the hosts what they have seen."""
        assert self._hosts.stdin
        assert self._hosts.stdout
        self._hosts.stdin.write("\n")
        self._hosts.stdin.flush()
        found: dict[str, Any] = json.loads(await asyncio.to_thread(self._hosts.stdout.readline))
        return found

    async def bare(self, count: int, name: str, *, singly: bool = False) -> float:
        """Have Dask's client do so many empty tasks on the same workers; return the seconds.

        :param name: another one each time
        :param singly: submit each by itself, and not all at once
        """
        client = self.fleet.client
        keys = [f"bare-{name}-{number}" for number in range(count)]
        began = time.monotonic()
        if singly:
            futures = [client.submit(_empty, number, key=key) for number, key in enumerate(keys)]
        else:
            futures = client.map(_empty, range(count), key=keys)
        await client.gather(futures)
        return time.monotonic() - began


def _empty(_: int) -> None:
    return None


def _requests(count: int, seed: int, most_s: float) -> Iterator[Request]:
    run = new_run()
    for number, wish in enumerate(itertools.islice(wishes(seed), count)):
        vcpus, smt, policy = wish
        tail = ("sleep", f"{number * 7919 % 1000 / 1000 * most_s:g}") if most_s else ("true",)
        yield Request(run, number, (*Wish(wish).argv[:-1], *tail), needs_of(vcpus, smt, policy, _WIDEST))


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.asynccontextmanager
async def simulation(count: int, limit_s: float = 120.0) -> AsyncIterator[Simulation]:
    """Give so many hosts and a connection to them; all is gone afterwards."""
    import dask

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    env = {name: value for name, value in os.environ.items() if not name.startswith(("HOSTPART_", "DASK_"))}
    env |= {f"DASK_{name.upper().replace('.', '__').replace('-', '_')}": str(value) for name, value in CONFIG.items()}
    quiet: dict[str, Any] = {"stderr": subprocess.DEVNULL, "env": env, "text": True}
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    words = ["--host", "127.0.0.1", "--port", address.rpartition(":")[2], "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        for argv, more in (
            ([sys.executable, "-m", "distributed.cli.dask_scheduler", *words], {}),
            ([sys.executable, "-m", "tests.fleet.simulated", address, str(count)], pipes),
        ):
            process = stack.enter_context(subprocess.Popen(["setpriv", "--pdeathsig", "KILL", *argv], **quiet, **more))
            stack.callback(process.kill)
        assert process.stdout
        up = await asyncio.wait_for(asyncio.to_thread(process.stdout.readline), limit_s)
        assert up == "up\n", up
        with dask.config.set(CONFIG):
            async with cluster.connect(cluster.Where(scheduler=address)) as fleet:
                yield Simulation(fleet, process)
