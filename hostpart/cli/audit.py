"""``hostpart audit``: check every running VM from outside, without asking its keeper."""

from __future__ import annotations

import argparse
import sys
import time

from .. import __version__, evidence, tree
from ..census import Census, census
from ..cpuset import CpuSet
from ..errors import UnknownVm
from ..lease import Leases
from ..procfs import pinned_alone, start_time
from .table import colour_wanted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Look twice at every task of your running VMs, at their leases and at what else is pinned to their pCPUs, and judge:\n"
        "held, tainted or broken. The VMs' keepers are not asked, so a stopped or a lying one changes nothing."
    )
    parser.epilog = "Exit status: 0 looked (with --strict: and all held), 2 there is no such VM, 5 with --strict if one did not hold."
    parser.add_argument("vm", nargs="*", metavar="VM", help="only these (default: all of yours)")
    parser.add_argument("--interval", type=float, default=0.5, metavar="SECONDS", help="between the two looks (default: 0.5)")
    parser.add_argument("--strict", action="store_true", help="exit 5 if a partition does not hold")
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(args: argparse.Namespace) -> int:
    """Audit, and print what was found."""
    vms = [vm for vm in census() if not vm.row.service and vm.state != "dirty"]
    names = [vm.row.name for vm in vms]
    for name in args.vm:
        if name not in names:
            raise UnknownVm(name, names)
    documents = _audit([vm for vm in vms if not args.vm or vm.row.name in args.vm], args.interval)
    if args.json:
        import json

        print(json.dumps({"schema": 1, "vms": documents}))
    else:
        for document in documents:
            print(evidence.summary(document, colour=colour_wanted(sys.stdout)))
        if not documents:
            print("no VM of yours is running")
    return 5 if args.strict and any(document["verdict"] != "held" for document in documents) else 0


def _audit(vms: list[Census], interval_s: float) -> list[dict[str, Any]]:
    started = time.time()
    records = {vm.row.id: _records(vm) for vm in vms}
    drifts: dict[int, dict[tuple[int, int], evidence.Drift]] = {vm.row.id: {} for vm in vms}
    for look in range(2):
        for vm in vms:
            members = tree.descendants(vm.row.keeper_pid)
            rest = {member.pid for member in members}
            for record in records[vm.row.id]:
                seen = evidence.look(record.pid)
                record.update(seen) if look else record.start(seen)
                own = tree.below(members, record.pid)
                rest -= {member.pid for member in own}
                record.sample(own)
            pin = CpuSet.of(vcpu.pcpu for vcpu in vm.vcpus)
            for drift in evidence.find_drifts([member for member in members if member.pid in rest], pin):
                drifts[vm.row.id].setdefault((drift.pid, drift.tid), drift)
        if not look:
            time.sleep(interval_s)
    leases = Leases()
    pcpus = CpuSet.of(vcpu.pcpu for vm in vms for vcpu in vm.vcpus)
    with leases.lock():
        free = pcpus - leases.survey(pcpus).taken
    pinned = pinned_alone()
    return [
        evidence.document(
            version=__version__,
            vm=vm.row.name,
            records=records[vm.row.id],
            isolation={"asked": None, "reached": "affinity", "stopped_by": "", "remedy": ""},
            period_s=None,
            started_s=started,
            ended_s=None,
            circumstances=_circumstances(vm, free, pinned, drifts[vm.row.id]),
        )
        for vm in vms
    ]


def _records(vm: Census) -> list[evidence.VcpuRecord]:
    pids: dict[int, list[int]] = {}
    for vcpu in vm.vcpus:
        if start_time(vcpu.pid) == vcpu.start:
            pids.setdefault(vcpu.pid, []).append(vcpu.pcpu)
    first = {vcpu.pid: vcpu.vcpu for vcpu in reversed(vm.vcpus)}
    return [
        evidence.VcpuRecord(vm.row.name, first[pid], CpuSet.of(pcpus), pid, "smp" if len(pcpus) > 1 else "command")
        for pid, pcpus in pids.items()
    ]


def _circumstances(
    vm: Census, free: CpuSet, pinned: dict[int, list[int]], drifts: dict[tuple[int, int], evidence.Drift]
) -> evidence.Circumstances:
    pcpus = CpuSet.of(vcpu.pcpu for vcpu in vm.vcpus)
    ours = {member.pid for member in tree.descendants(vm.row.keeper_pid)}
    foreign = {cpu: [pid for pid in pids if pid not in ours] for cpu, pids in pinned.items() if cpu in pcpus}
    return evidence.Circumstances(lost=pcpus & free, drifts=tuple(drifts.values()), foreign=foreign)
