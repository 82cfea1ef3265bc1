"""``hostpart show``: one VM, its vCPUs, and what the kernel says of them now."""

from __future__ import annotations

import argparse
import sys

from .. import control

__all__ = ["add", "run"]

ANSWER_WAIT_S = 10.0


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Show one VM: its state, where its vCPUs are, and its evidence so far."
    parser.epilog = "Exit status: 0 shown, 1 its keeper does not answer, 2 there is no such VM."
    parser.add_argument("vm", metavar="VM", help="the VM's name (see 'hostpart ps')")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Print it."""
    answer = control.ask(control.find(args.vm), args.vm, {"do": "show"}, ANSWER_WAIT_S)
    if args.json:
        import json

        print(json.dumps({"schema": 1, "vm": args.vm, "state": answer["state"], "evidence": answer["evidence"]}))
        return 0
    from ..census import census
    from .evidence import summary
    from .table import colour_wanted

    for vm in census():
        if vm.row.name == args.vm and not vm.row.service:
            print(f"{args.vm}  {answer['state']}  up {vm.age}  keeper {vm.row.keeper_pid}  guest {vm.row.guest!r}")
            if vm.row.log:
                print(f"output in {vm.row.log}")
    print(summary(answer["evidence"], colour=colour_wanted(sys.stdout)))
    return 0
