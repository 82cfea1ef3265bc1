"""``hostpart fleet ps``: the VMs of all hosts, and what others hold there."""

from __future__ import annotations

import sys

from ..cpuset import CpuSet
from . import fleet_hosts
from .table import colour_wanted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from ..fleet.roster import FleetHost
    from .fleet_hosts import Answer

__all__ = ["add", "distinct", "run", "vms_of"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.description = "List your VMs on every host, and how many pCPUs other users' VMs hold there."
    parser.epilog = "Exit status: 0 done, also where there is none; 1 a host did not answer."
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    asked = fleet_hosts.ask_all(args, ["ps", "--json"])
    failed = any(answer.problem for answer in asked.answers)
    if args.json:
        entries = [
            fleet_hosts.entry(
                answer, {"vms": vms_of(answer), "others": _table(answer).get("others", []) if answer.document else None}
            )
            for answer in asked.answers
        ]
        fleet_hosts.print_json(asked, entries)
        return 1 if failed else 0
    found = distinct(asked.answers)
    rows = [[answer.host.name, *cells] for answer in asked.answers for cells in _rows(answer, found)]
    if rows:
        print(table(["host", "VM", "state", "pCPU", "vCPUs", "guest"], rows, colour=colour_wanted(sys.stdout)))
    else:
        print("no VM of yours is running on any host")
    fleet_hosts.trouble(asked)
    return 1 if failed else 0


def vms_of(answer: Answer) -> list[dict[str, object]]:
    """Return the VMs in a host's answer to ``ps --json``, those that have a name."""
    vms = _table(answer).get("vms")
    return [vm for vm in vms if isinstance(vm, dict) and isinstance(vm.get("vm"), str)] if isinstance(vms, list) else []


def distinct(answers: Sequence[Answer]) -> list[tuple[FleetHost, dict[str, object]]]:
    """Return all VMs, each with its host: with the first, where workers that share one all tell of it."""
    seen = set()
    found = []
    for answer in answers:
        for vm in vms_of(answer):
            hello = answer.host.hello
            key = (hello["boot_id"], hello["domain"], *(str(vm.get(field)) for field in ("vm", "keeper", "started")))
            if key not in seen:
                seen.add(key)
                found.append((answer.host, vm))
    return found


def _table(answer: Answer) -> dict[str, object]:
    return dict(answer.document or {})


def _rows(answer: Answer, found: Sequence[tuple[FleetHost, dict[str, object]]]) -> Iterator[list[object]]:
    if answer.problem:
        yield [None, "no answer" if not answer.answered else "failed", None, None, None]
    for vm in (vm for host, vm in found if host is answer.host):
        vcpus = vm.get("vcpus")
        told = [one for one in vcpus if isinstance(one, dict)] if isinstance(vcpus, list) else []
        pcpus = [one.get("pcpu") for one in told]
        guest = vm.get("guest")
        yield [vm["vm"], vm.get("state"), ",".join(map(str, pcpus)), len(told), None if guest is None else str(guest)]
    others = _table(answer).get("others")
    held = [one.get("pcpu") for one in others if isinstance(one, dict)] if isinstance(others, list) else []
    cpus = CpuSet.of(cpu for cpu in held if type(cpu) is int and 0 <= cpu < 8192)
    if cpus:
        yield [None, "held by others", str(cpus), len(cpus), None]
