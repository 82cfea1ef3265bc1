"""``hostpart restore``: end what killed hostpart processes left behind, and put the host back."""

from __future__ import annotations

import argparse

from ..errors import Failed, NotPermitted
from ..isolation.reconcile import Report, reconcile
from ..lease import Leases
from ..ledger import Ledger
from ..recovery import dirty, put_back, recover
from ..rehearsal import Rehearsal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "End what is left of VMs whose hostpart was killed, strike them out, and put every host setting back that no\n"
        "running VM needs. VMs that run are not touched, nor is what somebody else changed meanwhile: that is listed.\n"
        "Every command that gives out pCPUs does this by itself first."
    )
    parser.epilog = (
        "Exit status: 0 nothing is left, 1 something waits for a CPU to come online or could not be put back,\n"
        "4 something is left that is not yours to end."
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="list what would be ended and every write to the host; change nothing"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Restore, and say what was done."""
    with Ledger() as ledger:
        if args.dry_run:
            return _rehearse(args, ledger)
        with Leases().lock():
            done = recover(ledger)
        report = put_back(ledger)
    rows = [
        {"vm": one.name, "pcpus": list(one.pcpus), "ended": list(one.ended), "left": list(one.left)} for one in done
    ]
    _print(args, rows, "VM {vm!r} was on pCPU {pcpus}; processes ended: {ended}; not yours to end: {left}", report)
    left = " ".join(str(pid) for one in done for pid in one.left)
    if left:
        raise NotPermitted(f"pid {left} is not yours to end", f"have root end it: 'sudo kill -KILL {left}'")
    if report is not None and (report.postponed or report.problems):
        raise Failed(
            "; ".join((*report.postponed, *report.problems)), "mend what it names and run 'hostpart restore' again"
        )
    return 0


def _rehearse(args: argparse.Namespace, ledger: Ledger) -> int:
    gone = dirty(ledger)
    host = Rehearsal()
    with ledger.copy() as copy:
        for row in gone:
            copy.remove_vm(row.id)
        report = reconcile(copy, host)
    found = [{"vm": row.name, "pcpus": sorted({v.pcpu for v in ledger.vcpus(row.id)})} for row in gone]
    _print(args, found, "would end what is left of VM {vm!r}, which was on pCPU {pcpus}", report, host.writes)
    return 0


def _print(
    args: argparse.Namespace,
    rows: Sequence[Mapping[str, object]],
    sentence: str,
    report: Report | None,
    writes: Sequence[str] = (),
) -> None:
    if args.json:
        import json

        host = {} if report is None else {"host": report.to_json()}
        more = {"writes": list(writes)} if args.dry_run else {}
        print(json.dumps({"schema": 1, "dry_run": args.dry_run, "vms": rows, **host, **more}))
        return
    for row in rows:
        print(sentence.format_map({key: _worded(value) for key, value in row.items()}))
    for line in writes:
        print(f"would: {line}")
    if report is not None and not args.dry_run:
        print(f"the host's settings were put back ({report.moved} tasks moved)")
    if report is not None:
        for label, texts in (
            ("left as somebody else set it", report.foreign),
            ("cannot be put back", report.unavoidable),
        ):
            for text in texts:
                print(f"{label}: {text}")
    if not rows and not writes and (report is None or args.dry_run):
        print("nothing is left behind")


def _worded(value: object) -> object:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else value
