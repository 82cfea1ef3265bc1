"""``hostpart restore``: free what killed hostpart processes left behind."""

from __future__ import annotations

import argparse

from ..errors import NotPermitted
from ..lease import Leases
from ..ledger import Ledger
from ..recovery import dirty, recover

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "End what is left of VMs whose hostpart was killed, and strike them out. VMs that run are not touched.\n"
        "Every command that gives out pCPUs does this by itself first."
    )
    parser.epilog = "Exit status: 0 nothing is left, 4 something is left that is not yours to end."
    parser.add_argument("--dry-run", action="store_true", help="list what would be done; change nothing")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Restore, and say what was done."""
    with Ledger() as ledger:
        if args.dry_run:
            found = [{"vm": row.name, "pcpus": sorted({v.pcpu for v in ledger.vcpus(row.id)})} for row in dirty(ledger)]
            _print(args, found, "would end what is left of VM {vm!r}, which was on pCPU {pcpus}")
            return 0
        with Leases().lock():
            done = recover(ledger)
    rows = [
        {"vm": one.name, "pcpus": list(one.pcpus), "ended": list(one.ended), "left": list(one.left)} for one in done
    ]
    _print(args, rows, "VM {vm!r} was on pCPU {pcpus}; processes ended: {ended}; not yours to end: {left}")
    left = " ".join(str(pid) for one in done for pid in one.left)
    if left:
        raise NotPermitted(f"pid {left} is not yours to end", f"have root end it: 'sudo kill -KILL {left}'")
    return 0


def _print(args: argparse.Namespace, rows: Sequence[Mapping[str, object]], sentence: str) -> None:
    if args.json:
        import json

        print(json.dumps({"schema": 1, "dry_run": args.dry_run, "vms": rows}))
        return
    for row in rows:
        print(sentence.format_map({key: _worded(value) for key, value in row.items()}))
    if not rows:
        print("nothing is left behind")


def _worded(value: object) -> object:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
