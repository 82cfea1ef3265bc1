"""``hostpart run``: one user VM on the host as it is, for one command."""

from __future__ import annotations

import argparse
import os
import signal
import sys

from .. import recovery
from ..config import DRIFT_ANSWERS, Guest, ServiceVm, VmConfig, check_name, parse_sched
from ..cpuset import CpuSet
from ..device_model import Caller
from ..errors import Failed, HostpartError, UsageError
from ..front import Front, Interrupted, exit_code, say
from ..host import Host
from ..isolation import LEVELS, Wish
from ..keeper import Options
from ..topology import read_topology
from . import options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Any

    from workers.probes.measurement import Probe

    from ..front import Running

__all__ = ["FAILED", "PROBES", "add", "check_wish", "level_text", "refuse_nested", "run", "warn_of_throttling"]

FAILED = 125  # hostpart itself failed, as with env(1) and timeout(1)
# The modules of workers.probes that are one; named here so that nothing of them is imported for a command.
PROBES = ("command", "integer", "latency", "memory", "noise", "pingpong", "spin", "syscalls", "thrash", "wakeup")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = (
        "hostpart run [options] [--] COMMAND [ARG ...]\n       hostpart run [options] --probe NAME [its options]"
    )
    parser.description = (
        "Run COMMAND on pCPUs of its own: one process per vCPU, each pinned to one pCPU that no other VM has.\n"
        "The command sees HOSTPART_VM, HOSTPART_VCPU, HOSTPART_VCPUS and HOSTPART_PCPU. vCPU 0 has your standard input."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart run -- make test                  one pCPU\n"
        "  hostpart run -n 2 --smp -- ./threads       one process over two pCPUs\n"
        "  hostpart run --pcpus 3,5 -- ./worker       two processes, on pCPUs 3 and 5\n"
        "  hostpart run --wait=60 -n 4 -- ./job       queue for up to a minute\n"
        "  hostpart run --probe noise --seconds 5     how quiet the pCPU is\n"
        "  hostpart run --probe command --argv '[\"./bench\"]'  how long a program takes\n\n"
        "Exit status: the command's own (the first that is not 0), 128+N after signal N, 127 not found,\n"
        "126 not executable, 125 hostpart itself failed (stderr and the evidence say why), 5 with --strict if it\n"
        "did not hold."
    )
    options.add_request(parser)
    parser.add_argument("--smp", action="store_true", help="one process over all the pCPUs, not one per vCPU")
    parser.add_argument("--name", help="the VM's name (default: run-PID)")
    parser.add_argument(
        "--isolation", choices=LEVELS, default="affinity", help="how far to keep others off (default: affinity)"
    )
    parser.add_argument(
        "--scope",
        type=options.scope,
        metavar="SCOPE",
        help="whose tasks may be moved: host, user, tree:PID, cgroup:PATH",
    )
    parser.add_argument("--require", action="store_true", help="fail rather than run at a lower level of isolation")
    parser.add_argument("--strict", action="store_true", help="exit 5 if the partition did not hold")
    parser.add_argument(
        "--foreign-limit", type=options.percent, default=VmConfig.foreign_limit, metavar="PERCENT",
        help="how much of a pCPU's time others may take before the verdict is tainted (default: 1)",
    )  # fmt: skip
    parser.add_argument(
        "--wait", nargs="?", type=options.wait_seconds, const=float("inf"), metavar="SECONDS",
        help="queue for pCPUs in order of arrival; write --wait=SECONDS, for ever without a number",
    )  # fmt: skip
    parser.add_argument(
        "--on-drift", choices=DRIFT_ANSWERS, default="warn", help="what to do if the guest leaves its pCPU"
    )
    parser.add_argument("--user", help="run the command as this user (root only)")
    parser.add_argument("--group", help="run the command as this group (root only)")
    parser.add_argument(
        "--sched", default="other", metavar="POLICY[:PRIO]", help="other, batch, idle, fifo:1-99 or rr:1-99"
    )
    parser.add_argument("--nice", type=int, metavar="N", help="-20 to 19")
    parser.add_argument(
        "--mems", type=options.cpu_list, default=CpuSet(), metavar="LIST", help="bind its memory to these NUMA nodes"
    )
    parser.add_argument("--mlock", action="store_true", help="lock the guest's memory in RAM")
    parser.add_argument("--evidence", metavar="FILE", help="write what the kernel said of the run to FILE (JSON)")
    parser.add_argument("--events", metavar="FILE", help="append what happens to FILE, a line of JSON each")
    parser.add_argument(
        "--hold", metavar="FIFO", help="START the guest when FIFO says 'start'; if it ends before, nothing has run"
    )
    parser.add_argument("-v", "--verbose", action="count", default=0, help="say what happens; twice: in detail")
    parser.add_argument(
        "--probe", nargs=argparse.REMAINDER, choices=PROBES,
        help="measure the pCPUs, or load them, instead of running COMMAND; comes last: a probe's name "
        f"({', '.join(PROBES)}) and its own options",
    )  # fmt: skip
    parser.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.probe and {"-h", "--help"} & set(args.probe):
        print(_probe_of(args.probe[0]).help())
        return 0
    document: dict[str, Any] = {}
    tell: Callable[[dict[str, Any]], None] = _tell_nobody
    try:
        try:
            if args.events is not None:
                from .events import Events

                tell = Events(args.events).tell
            code = _run(args, document, tell)
        except Interrupted as interrupt:
            ended = Failed(f"{signal.Signals(interrupt.number).name} ended it before its guest ran", "run it again")
            if args.hold is None:
                tell({"event": "error", **ended.to_json(), "exit_code": 128 + interrupt.number})
                return 128 + interrupt.number
            raise ended from None  # whoever holds it may end it so, and is told in the same way as by the FIFO
    except HostpartError as error:
        document["error"] = error.to_json()
        tell({"event": "error", **error.to_json()})
        say(f"{error}\ntry: {error.remedy}")
        code = FAILED
    if args.evidence:
        try:
            _write(args.evidence, {"schema": 1, **document})
        except OSError as error:
            say(f"the evidence cannot be written to {args.evidence!r}: {error.strerror}\ntry: another --evidence FILE")
            return FAILED
    return code


def _tell_nobody(_event: dict[str, Any]) -> None:
    pass


def _run(args: argparse.Namespace, document: dict[str, Any], tell: Callable[[dict[str, Any]], None]) -> int:
    config = _config(args)
    refuse_nested()
    wish = Wish(config.isolation, config.scope, config.require, config.mems)
    check_wish(wish)
    if args.evidence:
        _probe(args.evidence)
    if args.verbose:
        from .verbosity import enable

        enable(args.verbose)
    caller = Caller()
    recovery.tidy()

    def hear(keeper: Running, message: dict[str, Any]) -> None:
        _hear(keeper, message)
        if message["event"] == "waiting":
            tell({**message, "vm": keeper.name})

    hold = args.hold is not None
    front = Front(read_topology(Host()), caller, stop_on_interrupt=False, hear=hear)
    warn_of_throttling(config)
    try:
        keeper = front.start(config, ServiceVm(reserve=args.reserve), Options(wish, args.wait, hold=hold))
        front.wait(lambda: keeper.has("ready"))
        tell({**keeper.said["ready"], "isolation": keeper.said["created"]["isolation"]})
        if hold:
            _hold(args.hold, front, keeper)
            front.go()
        front.running()
        if text := level_text(keeper.said["created"]["isolation"]):
            say(text)
        front.wait(lambda: keeper.has("ended") or keeper.over)
    finally:
        front.end()
    ended = keeper.said["ended"]
    document.update(ended["evidence"])
    for number in sorted(set(ended["exec_errors"].values())):
        say(f"{args.command[0]!r}: {os.strerror(number)}")
    verdict = document["verdict"]
    code = 5 if args.strict and verdict != "held" else exit_code(ended["statuses"])
    tell({"event": "ended", "vm": config.name, "status": code, "evidence": ended["evidence"]})
    if args.verbose:
        from .evidence import summary
        from .table import colour_wanted

        print(summary(document, colour=colour_wanted(sys.stderr)), file=sys.stderr)
    elif verdict == "broken":
        say(f"the partition did not hold: {'; '.join(document['reasons'])}")
    return code


def _hold(path: str, front: Front, keeper: Running) -> None:
    from .events import Gate

    # Opened after the fork: the guest is not to have it.
    gate = Gate(path)
    try:
        front.listen(gate.fd)
        front.wait(lambda: keeper.has("ready") and gate.given())
    finally:
        gate.close()


def _config(args: argparse.Namespace) -> VmConfig:
    guest = _guest(args)
    try:
        sched, priority = parse_sched(args.sched)
        name = check_name(args.name or f"run-{os.getpid()}")
    except ValueError as error:
        raise UsageError(str(error), "hostpart run --help") from None
    if args.nice is not None and not -20 <= args.nice <= 19:
        raise UsageError(f"--nice takes -20 to 19, got {args.nice}", "hostpart run --help")
    request = options.request_of(args)
    return VmConfig(
        name,
        guest,
        request.count,
        request.pcpus,
        request.policy,
        request.smt,
        request.kind,
        isolation=args.isolation,
        scope=args.scope or "",
        require=args.require,
        mems=args.mems,
        on_drift=args.on_drift,
        foreign_limit=args.foreign_limit,
        user=args.user,
        group=args.group,
        sched=sched,
        priority=priority,
        nice=args.nice,
        mlock=args.mlock,
    )


def _guest(args: argparse.Namespace) -> Guest:
    if args.probe is not None:
        return _probe_guest(args)
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not command:
        raise UsageError("there is no COMMAND to run", "hostpart run -- COMMAND [ARG ...]")
    args.command = command
    return Guest("smp" if args.smp else "command", tuple(command))


def _probe_guest(args: argparse.Namespace) -> Guest:
    from workers.probes import parameter
    from workers.probes.refusal import Refused

    name, *words = args.probe or [""]
    probe = _probe_of(name)
    if args.smp:
        raise UsageError("a probe runs once on each vCPU, so --smp means nothing with --probe", "leave --smp out")
    try:
        variables = parameter.from_options(name, probe.parameters, words)
        parameter.from_environment(name, probe.parameters, {**os.environ, **variables})
    except Refused as refusal:
        raise UsageError(refusal.problem, refusal.remedy) from None
    return Guest("python", target=f"workers.probes.{name}:main", env=tuple(variables.items()))


def _probe_of(name: str) -> Probe:
    if name not in PROBES:
        if name in ("-h", "--help"):
            raise UsageError("--probe wants a name", "hostpart run --help")
        raise UsageError(
            f"there is no probe {name!r}" if name else "--probe wants a name",
            f"hostpart run --probe NAME, one of {', '.join(PROBES)}",
        )
    from workers.probes import find

    return find(name)


def check_wish(wish: Wish) -> None:
    """Refuse what cannot be, before anything is changed.

    :raises HostpartError: a level that is required and out of this caller's reach, a scope or a NUMA node that is none
    """
    if wish.mems:
        from ..isolation import mems

        mems.check(Host(), wish.mems)
    if wish.level == "affinity":
        return
    from ..isolation.reach import reach
    from ..ledger import Ledger

    with Ledger() as ledger:
        reach(wish, Host(), ledger)


def level_text(isolation: Mapping[str, Any], vm: str = "") -> str:
    """Return which level was reached, what stopped the next one, what lifts that, and what remains; empty where the
    lowest was asked for."""
    if isolation["asked"] == "affinity":
        return ""
    who = f"VM {vm!r}: " if vm else ""
    remains = f"may still run there: {'; '.join(isolation['remains'])}"
    if isolation["stopped_by"]:
        return (
            f"{who}isolation is {isolation['reached']!r}, not {isolation['asked']!r}: {isolation['stopped_by']}\n"
            f"try: {isolation['remedy']}\n{remains}"
        )
    return f"{who}isolation {isolation['reached']!r}, scope {isolation['scope']!r}; {remains}"


def refuse_nested() -> None:
    """Refuse to partition inside a partition.

    :raises UsageError: inside a guest of hostpart, whose pCPUs are spoken for
    """
    outer = os.environ.get("HOSTPART_VM")
    if outer is not None:
        raise UsageError(
            f"this is inside vCPU {os.environ.get('HOSTPART_VCPU', '?')} of VM {outer!r}, whose pCPUs are spoken for",
            "start it from outside; where HOSTPART_VM was merely inherited, with 'env -u HOSTPART_VM hostpart ...'",
        )


def _hear(_keeper: Running, message: dict[str, Any]) -> None:
    if message["event"] == "note":
        say(message["text"])
    elif message["event"] == "waiting":
        ahead = message["ahead"]
        behind = f" behind {ahead} other{'s' * (ahead > 1)}, the first {message['first']}" if ahead else ""
        say(f"waiting for pCPUs{behind}: {message['why']}")


def warn_of_throttling(config: VmConfig) -> None:
    """Say so where a real-time guest could starve the kernel on its pCPU."""
    if config.sched not in ("fifo", "rr"):
        return
    with open("/proc/sys/kernel/sched_rt_runtime_us", encoding="ascii") as file:
        if int(file.read()) < 0:
            say(
                "real-time throttling is off on this host: a guest that spins at "
                f"{config.sched}:{config.priority} keeps even the kernel's own threads off its pCPU"
            )


def _probe(path: str) -> None:
    # Before anything runs: evidence that cannot be written would be lost after an hour's work.
    folder = os.path.dirname(path) or "."
    if (
        os.path.isdir(path)
        or not os.path.isdir(folder)
        or not os.access(path if os.path.exists(path) else folder, os.W_OK)
    ):
        raise UsageError(
            f"the evidence cannot be written to {path!r}", "name a file in a directory that is there and writable"
        )


def _write(path: str, document: dict[str, Any]) -> None:
    import json

    with open(path, "w", encoding="utf-8") as file:
        json.dump(document, file, indent=2)
        file.write("\n")
