"""``hostpart ps``: the caller's VMs, and every lease on this host."""

from __future__ import annotations

import argparse
import sys

from ..census import census, leases_of_others
from ..cpuset import CpuSet
from .table import colour_wanted, table

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = "List your VMs with their vCPUs, and the pCPUs that other users' VMs hold."
    parser.epilog = "Exit status: 0, also where there is none."
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--json", action="store_true", help="print JSON")
    which.add_argument("--names", action="store_true", help="print the names of your VMs only, one per line")


def run(args: argparse.Namespace) -> int:
    """Print the list."""
    vms = census()
    if args.names:
        for vm in vms:
            if not vm.row.service:
                print(vm.row.name)
        return 0
    others = leases_of_others(vms)
    if args.json:
        import json

        print(
            json.dumps(
                {
                    "schema": 1,
                    "vms": [vm.to_json() for vm in vms],
                    "others": [{"pcpu": cpu, "pid": holder.pid, "uid": holder.uid} for cpu, holder in others],
                }
            )
        )
        return 0
    rows = [
        [
            vm.row.name, vm.state, ",".join(str(vcpu.pcpu) for vcpu in vm.vcpus), len(vm.vcpus), vm.row.keeper_pid,
            vm.age, vm.row.guest,
        ]
        for vm in vms
    ]  # fmt: skip
    colour = colour_wanted(sys.stdout)
    if rows:
        print(table(["VM", "state", "pCPU", "vCPUs", "keeper", "up", "guest"], rows, colour=colour))
    else:
        print("no VM of yours is running")
    if any(vm.state == "dirty" for vm in vms):
        print("\na dirty VM's hostpart was killed: 'hostpart restore' ends what is left of it")
    if others:
        owned: dict[int | None, list[int]] = {}
        for cpu, holder in others:
            owned.setdefault(holder.uid, []).append(cpu)
        cells = [[_owner(uid), str(CpuSet.of(cpus))] for uid, cpus in owned.items()]
        print("\nheld by others\n" + table(["owner", "pCPU"], cells, colour=colour))
    return 0


def _owner(uid: int | None) -> str:
    if uid is None:
        return "another user"
    import pwd

    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"uid {uid}"
