"""``hostpart attach``: put running processes on pCPUs of their own, until ``hostpart stop`` gives them back."""

from __future__ import annotations

import argparse
import os
import select

from .. import recovery
from ..attachment import Attachment, check_processes
from ..config import Guest, ServiceVm, VmConfig, check_name
from ..cpuset import CpuSet
from ..errors import Failed, UsageError
from ..front import Reported, say
from ..host import Host
from ..isolation import LEVELS, Wish
from ..keeper import fork_beside
from ..topology import read_topology
from . import options
from .run import check_wish, level_text, refuse_nested

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from ..channel import Channel

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Put running processes, with all their threads and what they fork, on pCPUs of a new VM. They run on, and\n"
        "'hostpart stop VM' gives them back to where they were; so does 'hostpart restore' after a kill. They stay\n"
        "yours: hostpart never signals or ends them. The VM ends when they have."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart attach 4711                           one pCPU\n"
        "  sudo hostpart attach --isolation cpuset 4711   and nothing else runs there\n"
        "  hostpart stop attach-4711\n\n"
        "Exit status: 0 attached, 2 no such process, 3 does not fit, 4 not permitted."
    )
    options.add_request(parser)
    parser.add_argument("--name", help="the VM's name (default: attach-PID)")
    parser.add_argument(
        "--isolation", choices=LEVELS, default="affinity", help="how far to keep others off (default: affinity)"
    )
    parser.add_argument(
        "--scope",
        type=options.scope,
        metavar="SCOPE",
        help="whose tasks may be moved: host, user, tree:PID, cgroup:PATH",
    )
    parser.add_argument("--require", action="store_true", help="fail rather than attach at a lower level of isolation")
    parser.add_argument(
        "--on-drift", choices=("warn", "repin"), default="warn", help="what to do if one leaves the VM's pCPUs"
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("pid", nargs="+", type=int, metavar="PID", help="a process, by its number")


def run(args: argparse.Namespace) -> int:
    """Attach, and leave the VM's keeper behind."""
    refuse_nested()
    pids = list(dict.fromkeys(args.pid))
    try:
        name = check_name(args.name or f"attach-{pids[0]}")
    except ValueError as error:
        raise UsageError(str(error), "hostpart attach --help") from None
    request = options.request_of(args)
    config = VmConfig(
        name, Guest("smp", tuple(map(str, pids))), request.count, request.pcpus, request.policy, request.smt,
        request.kind, isolation=args.isolation, scope=args.scope or "", require=args.require, on_drift=args.on_drift,
    )  # fmt: skip
    wish = Wish(config.isolation, config.scope, config.require)
    check_processes(pids)
    check_wish(wish)
    recovery.tidy()
    topology, service = read_topology(Host()), ServiceVm(reserve=args.reserve)
    pid, channel = fork_beside(lambda theirs: Attachment(config, service, topology, wish, pids, theirs).run(), [])
    said = _answer(channel, pid)
    if said["event"] == "error":
        raise Reported(said["exit_code"], said["problem"], said["remedy"])
    if text := level_text(said["isolation"]):
        say(text)
    if args.json:
        import json

        print(json.dumps({"schema": 1, "vm": name, "pcpus": list(CpuSet.parse(said["pcpus"])), "pids": pids,
                          "isolation": said["isolation"]}))  # fmt: skip
    else:
        print(
            f"pid {', '.join(map(str, pids))} on pCPU {said['pcpus']} as VM {name!r}; back with 'hostpart stop {name}'"
        )
    return 0


def _answer(channel: Channel, pid: int) -> dict[str, Any]:
    poll = select.poll()
    poll.register(channel.fileno(), select.POLLIN)
    while True:
        poll.poll()
        for message in channel.receive():
            return message
        if channel.ended:
            _, status = os.waitpid(pid, 0)
            raise Failed(
                f"the keeper ended before the processes were attached (wait status {status})", "hostpart restore"
            )
