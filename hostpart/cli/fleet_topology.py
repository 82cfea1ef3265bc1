"""``hostpart fleet topology``: a line for each host of what it has, and what of it is free."""

from __future__ import annotations

import sys

from ..errors import HostpartError
from ..topology import Topology
from . import fleet_hosts
from .table import colour_wanted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from .fleet_hosts import Answer

__all__ = ["add", "run"]

_HEADERS = ("host", "pCPUs", "cores", "LLCs", "nodes", "SMT", "usable", "free", "free cores", "hostpart")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.description = "Show what each host has: pCPUs, cores, last-level caches, NUMA nodes, and what is free now."
    parser.epilog = (
        "'hostpart topology' on a host draws it. With --json, each host's own document is there as 'topology'.\n\n"
        "Exit status: 0 done, 1 a host did not answer, 2 there is no such fleet or host."
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the table."""
    asked = fleet_hosts.ask_all(args, ["topology", "--json"])
    if args.json:
        fleet_hosts.print_json(
            asked,
            [
                fleet_hosts.entry(answer, {"hello": answer.host.hello, "shares_with": list(answer.host.shares_with),
                                           "topology": answer.document})
                for answer in asked.answers
            ],
        )  # fmt: skip
    else:
        rows = [_row(answer) for answer in asked.answers]
        print(table(_HEADERS, rows, colour=colour_wanted(sys.stdout)))
        fleet_hosts.trouble(asked)
        shared = [host for host in asked.roster.hosts if host.shares_with]
        for host in shared:
            print(f"{host.name} takes pCPUs from the same leases as {', '.join(host.shares_with)}")
    return 1 if asked.silent else 0


def _row(answer: Answer) -> list[object]:
    name = answer.host.name
    if answer.document is None:
        return [name, *[None] * 6, "no answer" if not answer.answered else "failed", None, None]
    try:
        topology = Topology.from_json(dict(answer.document), name)
    except (HostpartError, ValueError, KeyError, TypeError, AttributeError):
        return [name, *[None] * 6, "not understood", None, answer.host.hello["version"]]
    free = answer.document.get("free")
    cpus, cores = (free.get("cpus"), free.get("cores")) if isinstance(free, dict) else (None, None)
    online = [pcpu for pcpu in topology.pcpus if pcpu.online]
    return [
        name, len(online), len(topology.cores), *(len({getattr(one, key) for one in online} - {None}) or None
        for key in ("llc", "numa")), max(map(len, topology.cores), default=0) > 1, str(topology.usable) or "none",
        str(cpus) or "none" if isinstance(cpus, str) else None, cores if type(cores) is int else None,
        answer.host.hello["version"],
    ]  # fmt: skip
