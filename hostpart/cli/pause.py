"""``hostpart pause``: Stop every process of a VM: none runs an instruction until it is resumed."""

from __future__ import annotations

import argparse

from .. import control
from .show import ANSWER_WAIT_S

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "Stop every process of a VM: none runs an instruction until it is resumed."
    parser.epilog = "Exit status: 0 done, 1 it could not be done, 2 there is no such VM, 4 it is not yours."
    parser.add_argument("vm", metavar="VM", help="the VM's name (see 'hostpart ps')")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Pause it."""
    answer = control.ask(control.find(args.vm), args.vm, {"do": "pause"}, ANSWER_WAIT_S)
    if args.json:
        import json

        print(json.dumps({"schema": 1, "vm": args.vm, "state": answer["state"]}))
    return 0
