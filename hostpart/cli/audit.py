"""``hostpart audit``: check every running VM from outside, without asking its keeper."""

from __future__ import annotations

import argparse
import sys

from ..audit import audit
from ..census import census
from ..errors import UnknownVm
from . import options
from .evidence import summary
from .table import colour_wanted, table

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Look twice at every task of your running VMs, at their leases and at what else runs on their\n"
        "pCPUs, and judge: held, tainted or broken. The VMs' keepers are not asked, so a stopped or a lying one\n"
        "changes nothing."
    )
    parser.epilog = "Exit status: 0 looked, 2 there is no such VM, 5 with --strict if one does not hold."
    parser.add_argument("vm", nargs="*", metavar="VM", help="only these (default: all of yours)")
    parser.add_argument(
        "--interval", type=options.seconds, default=0.5, metavar="SECONDS", help="between the two looks (default: 0.5)"
    )
    parser.add_argument("--strict", action="store_true", help="exit 5 if a partition does not hold")
    parser.add_argument(
        "--foreign-limit", type=options.percent, default=1.0, metavar="PERCENT",
        help="how much of a pCPU's time others may take before the verdict is tainted (default: 1)",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Audit, and print what was found."""
    vms = [vm for vm in census() if not vm.row.service and vm.state != "dirty"]
    names = [vm.row.name for vm in vms]
    for name in args.vm:
        if name not in names:
            raise UnknownVm(name, names)
    chosen = [vm for vm in vms if not args.vm or vm.row.name in args.vm]
    found = audit(chosen, args.interval, args.foreign_limit)
    if args.json:
        import json

        tasks = {one.document["vm"]: [task.to_json() for task in one.tasks] for one in found}
        print(json.dumps({"schema": 1, "vms": [one.document for one in found], "tasks": tasks}))
    else:
        colour = colour_wanted(sys.stdout)
        headers = ["pid", "name", "user", "threads", "may run on", "ran on", "CPU %", "MiB", "foreign"]
        for one in found:
            rows = [
                [t.pid, t.name, t.user, t.threads, str(t.cpus), t.cpu, t.cpu_percent, t.rss_bytes >> 20, t.foreign]
                for t in one.tasks
            ]
            print(summary(one.document, colour=colour), table(headers, rows, colour=colour), sep="\n\n", end="\n\n")
        if not found:
            print("no VM of yours is running")
    return 5 if args.strict and any(one.document["verdict"] != "held" for one in found) else 0
