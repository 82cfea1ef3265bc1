"""``hostpart plan``: which pCPUs a scenario's VMs, or one request, would get."""

from __future__ import annotations

import argparse
import os

from ..allocator import Placement, Request, Supply, place
from ..config import ServiceVm, load_scenario
from ..cpuset import CpuSet
from ..errors import UsageError
from ..host import Host
from ..hypervisor import Hypervisor
from ..launcher import plan, supply_now
from ..lease import Leases, Survey
from ..service_vm import keep_wish
from ..topology import Topology, read_topology
from . import options

__all__ = ["add", "render", "run", "topology_of"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Show which pCPUs each VM of FILE, or one VM of N vCPUs, would get. Changes nothing."
    parser.epilog = (
        "examples:\n"
        "  hostpart plan example:four-core\n"
        "  hostpart plan -n 4 --policy spread\n"
        "  hostpart plan -n 16 --host machine.tar.bz2 --free 0-63\n\n"
        "Exit status: 0 it fits, 2 the file or the options are wrong, 3 it does not fit."
    )
    parser.add_argument("file", nargs="?", metavar="FILE", help="scenario (TOML), or example:NAME")
    parser.add_argument(
        "--host",
        metavar="TOPOLOGY",
        help="plan for another machine: what 'topology --json' printed, or a recorded tree",
    )
    options.add_request(parser)
    parser.add_argument(
        "--free", type=options.cpu_list, metavar="LIST", help="what is free, instead of what is free now"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Plan, and print it."""
    one = args.vcpus or args.pcpus
    if bool(args.file) == bool(one):
        raise UsageError(
            "want either a FILE, or -n N or --pcpus LIST", "hostpart plan example:first, or hostpart plan -n 2"
        )
    topology = topology_of(args.host)
    if args.file:
        scenario = load_scenario(args.file)
        service = scenario.service.replace(reserve=scenario.service.reserve | args.reserve)
        supply = _supply(args, topology, scenario.explicit, service)
        placements = plan(topology, scenario, supply)
    else:
        request: Request = options.request_of(args)
        supply = _supply(args, topology, CpuSet.of(request.pcpus), ServiceVm(reserve=args.reserve))
        placements = {"vm": place(topology, supply, request)}
    render(placements, args.json, topology, supply)
    return 0


def topology_of(source: str | None) -> Topology:
    """Return this host's topology, or that of ``--host``: what ``topology --json`` printed, or a recorded tree."""
    if source is None:
        return read_topology(Host())
    if os.path.isfile(source):
        with open(source, "rb") as file:
            head = file.read(1)
        if head in (b"{", b" ", b"\n"):
            import json

            try:
                with open(source, encoding="utf-8") as text:
                    return Topology.from_json(json.load(text), source)
            except ValueError as error:
                raise UsageError(f"{source} is not JSON: {error}", "make it with 'hostpart topology --json'") from None
    return read_topology(Host.open(source))


def _supply(args: argparse.Namespace, topology: Topology, explicit: CpuSet, service: ServiceVm) -> Supply:
    if args.free is not None:
        # Said by the user: nothing of this is kept for the service VM unless they say so with --reserve.
        free = (args.free & topology.usable) - service.reserve
        return Supply(free, host=service.reserve & topology.usable, taken=topology.usable - args.free - service.reserve)
    if args.host is None:
        return supply_now(topology, service, explicit, Leases())
    # Another machine, of whose leases nothing is known: as if there were none.
    keep = Hypervisor.keep_of(topology, keep_wish(service, explicit), Survey(CpuSet(), CpuSet()))
    host = keep | service.reserve
    return Supply(topology.usable - host, host=host)


def render(
    placements: dict[str, Placement],
    as_json: bool,
    topology: Topology,
    supply: Supply,
    writes: list[str] | None = None,
) -> None:
    """Print placements, as a table or as JSON, and what would be written on the host, where that was asked."""
    cpus = CpuSet.of(pcpu for one in placements.values() for pcpu in one.pcpus)
    idle = CpuSet.of(cpu for one in placements.values() for cpu in one.idle)
    rows = [(name, vcpu, pcpu) for name, one in placements.items() for vcpu, pcpu in enumerate(one.pcpus)]
    why = [
        f"{name}: {sentence}" if len(placements) > 1 else sentence
        for name, one in placements.items()
        for sentence in one.why
    ]
    if as_json:
        import json

        more = {} if writes is None else {"writes": writes}
        placement = [{"vm": name, "vcpu": vcpu, "pcpu": pcpu} for name, vcpu, pcpu in rows]
        print(
            json.dumps({"schema": 1, "placement": placement, "cpus": str(cpus), "idle": str(idle), "why": why, **more})
        )
        return
    import sys

    from .table import colour_wanted, table

    cells = [[name, vcpu, pcpu, *_seat(topology, pcpu)] for name, vcpu, pcpu in rows]
    print(table(["VM", "vCPU", "pCPU", "core", "LLC", "node", "package"], cells, colour=colour_wanted(sys.stdout)))
    print(f"\nservice VM  pCPU {supply.host}" if supply.host else "")
    if idle:
        print(f"idle        pCPU {idle}")
    for sentence in why:
        print(f"  {sentence}")
    if writes is not None:
        print(f"\nwould change the host with {len(writes)} writes" + (":" if writes else ""))
        for line in writes:
            print(f"  {line}")


def _seat(topology: Topology, cpu: int) -> tuple[int | None, ...]:
    pcpu = topology.pcpu(cpu)
    return pcpu.core, pcpu.llc, pcpu.numa, pcpu.package
