"""``hostpart fleet plan``: which host could take a VM now, where, and why another could not."""

from __future__ import annotations

import sys

from ..cpuset import CpuSet
from ..errors import UsageError
from . import fleet_hosts, options
from .table import colour_wanted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse

    from .fleet_hosts import Answer

__all__ = ["add", "run"]

_DOES_NOT_FIT = 3


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.description = "Show which hosts could take one VM of N vCPUs now, and which of its pCPUs. Changes nothing."
    parser.epilog = (
        "examples:\n"
        "  hostpart fleet --local 2 plan -n 1\n"
        "  hostpart fleet plan -n 4 --policy llc\n\n"
        "Exit status: 0 it fits on a host, 1 a host did not answer, 2 the options are wrong, 3 it fits on none."
    )
    options.add_request(parser)
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Ask every host, and print where it fits."""
    if not (args.vcpus or args.pcpus):
        raise UsageError("want -n N or --pcpus LIST", "hostpart fleet plan -n 2")
    asked = fleet_hosts.ask_all(args, ["plan", "--json", *words(args)])
    if args.json:
        entries = [
            fleet_hosts.entry(answer, {"fits": _fits(answer), "plan": answer.document}) for answer in asked.answers
        ]
        fleet_hosts.print_json(asked, entries)
    else:
        rows = [[answer.host.name, _fits(answer), *_where(answer)] for answer in asked.answers]
        print(table(["host", "fits", "pCPU", "why"], rows, colour=colour_wanted(sys.stdout)))
        fleet_hosts.left_out(asked.roster)
    if asked.silent:
        return 1
    if any(map(_fits, asked.answers)):
        return 0
    return max((answer.status or 0 for answer in asked.answers), default=0) or _DOES_NOT_FIT


def words(args: argparse.Namespace) -> list[str]:
    """Return the options of :func:`hostpart.cli.options.add_request` as a command line has them."""
    pcpus = ",".join(map(str, args.pcpus or ()))
    kind = ["--kind", args.kind] if args.kind else []
    reserve = ["--reserve", str(args.reserve)] if args.reserve else []
    which = ["--pcpus", pcpus] if pcpus else ["-n", str(args.vcpus)]
    return [*which, "--policy", args.policy, "--smt", args.smt, *kind, *reserve]


def _fits(answer: Answer) -> bool | None:
    return answer.status == 0 if answer.answered else None


def _where(answer: Answer) -> tuple[str | None, str]:
    if answer.document is None or answer.status:
        return None, answer.problem
    cpus, why = answer.document.get("cpus"), answer.document.get("why")
    told = "; ".join(map(str, why)) if isinstance(why, list) else ""
    return _cpus(cpus), told[:500]


def _cpus(text: object) -> str | None:
    try:
        return str(CpuSet.parse(text)) if isinstance(text, str) else None
    except ValueError:
        return None
