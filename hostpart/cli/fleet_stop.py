"""``hostpart fleet stop``: end a VM, on whichever host it is."""

from __future__ import annotations

from ..errors import Failed, UnknownVm, UsageError
from ..fleet import cluster, roster
from ..front import Reported
from . import fleet_hosts, options
from .fleet_ps import distinct
from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from .fleet_hosts import Answer, Asked

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.description = (
        "End a VM on the host that has it, as 'hostpart stop' does there. Returns when its pCPUs are free."
    )
    parser.epilog = (
        "Exit status: 0 it is gone, 1 it is not, or a host did not answer, 2 no host has such a VM, or several have,\n"
        "4 it is not yours."
    )
    parser.add_argument("vm", metavar="VM", help="the VM's name (see 'hostpart fleet ps')")
    parser.add_argument("--host", metavar="NAME", help="the host that it is on, where several have one of that name")
    parser.add_argument(
        "-t", "--time", type=options.seconds, metavar="SECONDS", help="the grace time (default: as 'hostpart stop')"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Find it, and end it."""
    asked, done = cluster.run(_stop(args))
    if args.json:
        fleet_hosts.print_json(
            asked, [fleet_hosts.entry(done, {"vm": args.vm, "status": done.status, "stop": done.document})]
        )
    elif not done.problem:
        fleet_hosts.note(f"{args.vm} on {done.host.name} is gone")
    if done.problem:
        where = done.host.name
        raise Reported(done.status or Failed.exit_code, f"{where}: {done.problem}", f"see 'hostpart ps' on {where}")
    return 0


async def _stop(args: argparse.Namespace) -> tuple[Asked, Answer]:
    # Where it is and its end are one connection: a cluster that is started for the command goes with it.
    async with cluster.connect(args.where) as fleet:
        chosen = await fleet_hosts.look(fleet, args.hosts)
        if args.host:
            chosen = roster.choose(chosen, [args.host])
        asked = fleet_hosts.Asked(chosen, tuple(await fleet_hosts.ask(fleet, chosen.hosts, ["ps", "--json"])))
        holder = _holder(args.vm, asked.answers)
        grace = [] if args.time is None else ["--time", f"{args.time:g}"]
        wait_s = fleet_hosts.ANSWER_S + (args.time or 0)
        done = await fleet_hosts.ask(fleet, [holder], ["stop", "--json", *grace, "--", args.vm], wait_s)
        return asked, done[0]


def _holder(vm: str, answers: Sequence[Answer]) -> roster.FleetHost:
    vms = distinct(answers)
    found = [host for host, one in vms if one["vm"] == vm]
    if len(found) > 1:
        names = ", ".join(host.name for host in found)
        raise UsageError(f"{len(found)} hosts have a VM named {vm!r}: {names}", f"add --host {found[0].name}")
    if found:
        return found[0]
    silent = [answer for answer in answers if answer.problem]
    if silent:
        told = "; ".join(f"{answer.host.name}: {answer.problem}" for answer in silent)
        raise Failed(
            f"no host that answers has a VM named {vm!r}; {told}", "see to those hosts, or look there: 'hostpart ps'"
        )
    raise _Unknown(vm, sorted({plain(str(one["vm"])) for _, one in vms}))


class _Unknown(UnknownVm):
    def __str__(self) -> str:
        there = f"there are {', '.join(self.known)}" if self.known else "none is running"
        return f"no host has a VM named {self.name!r}; {there}"

    @property
    def remedy(self) -> str:
        return "hostpart fleet ps"
