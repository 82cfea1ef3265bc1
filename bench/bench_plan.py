"""How long the allocator takes to plan 256 vCPUs on a machine of 4,096 pCPUs, and how that grows.

Run with ``python bench/bench_plan.py`` (pyperf's options are understood, such as ``--fast`` and
``-o FILE``). The machines have two threads a core, four cores a cache and at most 16 NUMA nodes in 8
packages; one pCPU in seven is leased to other VMs, so that nothing is whole. A machine of n pCPUs
is asked for n / 16 vCPUs. From 256 pCPUs to 4,096, n log n grows 24-fold.
"""

from __future__ import annotations

from math import log

import pyperf

from hostpart.allocator import POLICIES, Placement, Request, Supply, place
from hostpart.cpuset import CpuSet
from hostpart.topology import Pcpu, Topology

SIZES = (256, 1024, 4096)


def machine(size: int) -> Topology:
    """Return a machine of *size* pCPUs, siblings numbered apart by half of them."""
    cores = size // 2
    return Topology(
        tuple(
            Pcpu(
                cpu,
                core=cpu % cores,
                package=cpu % cores * 8 // cores,
                numa=cpu % cores * 16 // cores,
                llc=cpu % cores // 4,
            )
            for cpu in range(size)
        ),
        CpuSet((1 << size) - 1),
    )


def supply(topology: Topology) -> Supply:
    """Return what is free on it: every seventh pCPU is leased, the lowest is the service VM's."""
    taken = CpuSet.of(range(3, len(topology.pcpus), 7))
    return Supply(topology.usable - taken - CpuSet(1), host=CpuSet(1), taken=taken)


def plan_anew(topology: Topology, what: Supply, request: Request) -> Placement:
    """Place on a topology that was not looked at before."""
    return place(Topology(topology.pcpus, topology.usable), what, request)


def main() -> None:
    """Measure every policy on every size; the first process prints the table."""
    runner = pyperf.Runner(metadata={"question": "planning n/16 vCPUs on n pCPUs"})
    medians: dict[tuple[str, int], float] = {}
    for policy in (*POLICIES, "packed, first look"):
        for size in SIZES:
            topology = machine(size)
            request = Request(size // 16, policy=policy.partition(",")[0], smt="shared")
            plan = plan_anew if "," in policy else place
            result = runner.bench_func(f"{policy}, {size} pCPUs", plan, topology, supply(topology), request)
            if result is not None and not runner.args.worker:
                medians[policy, size] = result.median()
    if runner.args.worker:
        return
    small, large = SIZES[0], SIZES[-1]
    allowed = large * log(large) / (small * log(small))
    print(f"\n{'policy':20}" + "".join(f"{size:>9} pCPUs" for size in SIZES) + f"   growth (n log n: {allowed:.0f})")
    for policy in dict.fromkeys(policy for policy, _ in medians):
        times = [medians.get((policy, size)) for size in SIZES]
        cells = "".join(f"{time * 1e3:12.2f} ms" if time is not None else f"{'-':>15}" for time in times)
        first, last = times[0], times[-1]
        print(f"{policy:20}{cells}   {last / first:.1f}" if first and last else f"{policy:20}{cells}   -")


if __name__ == "__main__":
    main()
