"""``hostpart stop``: end a VM and free its pCPUs."""

from __future__ import annotations

import argparse

from .. import control
from ..front import GRACE_S, say
from ..qemu.config import MAX_POWERDOWN_S
from . import options

__all__ = ["add", "run"]

_KILL_WAIT_S = 10.0  # what a keeper may need to end a large tree


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "End a VM: SIGTERM to its guests, SIGKILL to what is left after the grace time. A guest under QEMU has its\n"
        "power button pressed; after that time QEMU is told to quit. Asked twice, it quits at once.\n"
        "Returns when its pCPUs are free."
    )
    parser.epilog = "Exit status: 0 it is gone, 1 it is not, 2 there is no such VM, 4 it is not yours."
    parser.add_argument("vm", metavar="VM", nargs="+", help="the VM's name (see 'hostpart ps')")
    parser.add_argument(
        "-t",
        "--time",
        type=options.seconds,
        metavar="SECONDS",
        help=f"the grace time (default: {GRACE_S:g}; under QEMU: its 'powerdown')",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """End them, one after the other."""
    for name in args.vm:
        wait_s = (MAX_POWERDOWN_S if args.time is None else args.time) + _KILL_WAIT_S
        answer = control.ask(control.find(name), name, {"do": "stop", "grace_s": args.time}, wait_s)
        # A VM of attached processes has no front that would have said so.
        notes = answer.get("notes", [])
        for text in notes:
            say(text)
        if args.json:
            import json

            print(json.dumps({"schema": 1, "vm": name, "state": answer["state"], "notes": notes}))
    return 0
