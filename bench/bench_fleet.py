"""How much slower than Dask's own empty tasks do requests get to the hosts of a fleet, and what does the client need?

A thousand simulated hosts: real Dask workers with hostpart's real agent, all in one process, whose host is a recorded
topology with the real allocator (``tests/fleet/simulated.py``). Five thousand requests of mixed needs go through the
dispatcher, are held, started and followed to their end; in turn with that Dask's client gives as many empty tasks to
the same workers, all at once (``Client.map``) and one by one (``Client.submit``), as requests come to a fleet. Guests
end at once. In the hosts' process Python's garbage collector is off, since with a thousand workers in it it took half
of the time, of either side. Wanted: a ratio of at most 2, and a client that does not grow.

    python -m bench.bench_fleet [-n RUNS] [--hosts N] [--requests N]
"""

from __future__ import annotations

import argparse
import asyncio

from bench.measure import facts, report
from hostpart.fleet.cluster import quiet
from tests.fleet.thousand import Measured, simulation

__all__ = ["main"]


async def _measure(runs: int, hosts: int, requests: int) -> tuple[list[Measured], list[float], list[float]]:
    ours, bare, singly = [], [], []
    async with simulation(hosts, 600) as here:
        await here.bare(requests, "warm-up")
        for run in range(runs):
            ours.append(await here.dispatch(requests, seed=run))
            bare.append(await here.bare(requests, str(run)))
            singly.append(await here.bare(requests, f"singly-{run}", singly=True))
    return ours, bare, singly


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-n", type=int, default=5, metavar="RUNS", help="how many, from 2 (default: 5)")
    parser.add_argument("--hosts", type=int, default=1000, metavar="N", help="how many (default: 1000)")
    parser.add_argument("--requests", type=int, default=5000, metavar="N", help="how many in a run (default: 5000)")
    args = parser.parse_args()
    print(facts())
    with quiet():
        ours, bare, singly = asyncio.run(_measure(args.n, args.hosts, args.requests))
    print(f"{args.requests} requests to {args.hosts} hosts, {args.n} runs")
    took = [one.seconds for one in ours]
    report(["hostpart fleet", "empty tasks, mapped", "empty tasks, submitted"], [took, bare, singly], "s")
    for number, one in enumerate(ours):
        fifth = len(one.resident) // 5
        sizes = f"{one.resident[fifth - 1] / 1e6:.1f} MB after a fifth, {one.resident[-1] / 1e6:.1f} MB in the end"
        seen = one.tally
        print(
            f"  run {number}: {one.states}; refused as full {seen['refused']} times so far, placed where it does not"
            f" fit {len(seen['violations'])}, started twice {len(seen['twice'])}; the client has {sizes}"
        )


if __name__ == "__main__":
    main()
