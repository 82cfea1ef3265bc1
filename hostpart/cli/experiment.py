"""``hostpart experiment``: what sharing costs on this host, measured in a design that can be believed."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sys
import time

from .. import recovery
from ..config import ServiceVm
from ..cpuset import CpuSet
from ..errors import DoesNotFit, HostpartError, UsageError
from ..experiment import design as designs
from ..experiment import results, schedule
from ..experiment.extra import need
from ..experiment.facts import distances, read_facts
from ..experiment.runner import Runner
from ..experiment.sharing import placements
from ..front import say
from ..host import Host
from ..hypervisor import Hypervisor
from ..isolation import LEVELS, Wish
from ..launcher import supply_now
from ..lease import Leases, Survey
from ..service_vm import keep_wish
from . import options
from .plan import topology_of
from .run import check_wish, refuse_nested
from .table import colour_wanted, plain, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import FrameType
    from typing import Any, TypeVar

    from ..experiment.design import Design
    from ..experiment.schedule import Plan, Run
    from ..experiment.sharing import Placement
    from ..topology import Topology

    T = TypeVar("T")

__all__ = ["add", "processes", "run", "seconds", "seed"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Measure victims alone, then beside aggressors at every distinct degree of sharing that this host has, in\n"
        "random order, with the victim alone before and after each; keep every run, and make a page of it."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart experiment --plan example:interference   what, where, how long\n"
        "  hostpart experiment example:interference          run it: some minutes\n"
        "  hostpart experiment mine.toml --out friday        into the directory friday\n\n"
        "Stopped or killed, it goes on where it was when the same command is given again. In the directory are\n"
        "experiment.json, sessions.jsonl, runs.jsonl (a line per run), analysis.json and report.html.\n\n"
        "Exit status: 0 done, 1 a run failed or hostpart did, 2 the file or the options are wrong, 3 no pCPU is left,\n"
        "5 with --strict if a partition did not hold, 128+N after signal N."
    )
    parser.add_argument("file", metavar="FILE", help="what to try (TOML), or example:NAME")
    parser.add_argument("--plan", action="store_true", help="show the schedule and how long it takes; change nothing")
    parser.add_argument("--host", metavar="TOPOLOGY", help="with --plan: for another machine, as with 'hostpart plan'")
    parser.add_argument("--out", metavar="DIR", help="where to keep the results (default: NAME-results)")
    parser.add_argument("--processes", type=processes, metavar="N", help="per condition, instead of the file's")
    parser.add_argument("--seconds", type=seconds, metavar="S", help="each measures, instead of the file's")
    parser.add_argument("--seed", type=seed, metavar="N", help="of the order of the runs, instead of the file's")
    parser.add_argument("--isolation", choices=LEVELS, help="the victims' level, instead of the file's")
    parser.add_argument(
        "--scope", type=_scope, metavar="SCOPE", help="instead of the file's; 'experiment': its own tasks"
    )
    parser.add_argument("--no-report", action="store_true", help="keep the runs only; analyse them another time")
    parser.add_argument("--strict", action="store_true", help="exit 5 if a partition did not hold")
    parser.add_argument("--events", metavar="FILE", help="append each run to FILE as a line of JSON; makes no report")
    parser.add_argument("--json", action="store_true", help="print JSON: the plan, or the analysis")


def run(args: argparse.Namespace) -> int:
    """Run the experiment, or show its plan."""
    if args.events is None:
        return _experiment(args, _tell_nobody)
    from .events import Events

    tell = Events(args.events).tell
    args.no_report = True
    try:
        code = _experiment(args, tell)
    except HostpartError as error:
        tell({"event": "error", **error.to_json()})
        tell({"event": "over", "exit_code": error.exit_code})
        raise
    tell({"event": "over", "exit_code": code})
    return code


def _tell_nobody(_event: dict[str, Any]) -> None:
    pass


def _experiment(args: argparse.Namespace, tell: Callable[[dict[str, Any]], None]) -> int:
    refuse_nested()
    if args.events is not None and args.plan:
        raise UsageError("--events tells of runs, and --plan makes none", "leave one of them out")
    if args.host and not args.plan:
        raise UsageError("--host is for a plan: runs are made on this host only", "add --plan")
    if args.json and args.no_report and not args.plan:
        left_out = "--no-report leaves out" if args.events is None else "is not made with --events"
        raise UsageError(f"--json prints the analysis, which {left_out}", "leave one of them out")
    design = _design(args)
    if not args.plan:
        recovery.tidy()
    topology = topology_of(args.host)
    kept = Hypervisor.keep_of(topology, keep_wish(ServiceVm(), CpuSet()), Survey(CpuSet(), CpuSet()))
    places = placements(topology, kept, design.placements, design.victim_pcpu, {} if args.host else distances(Host()))
    _tell_lacking(design, places)
    plan = schedule.plan(design, places, kept)
    document = {
        "schema": 1,
        "hostpart": _version(),
        "name": design.name,
        "source": design.source,
        "seed": design.seed,
        "design": design.to_json(),
        "plan": plan.to_json(),
    }
    if args.plan:
        return _show_plan(args, design, plan, topology, document)
    if not args.no_report:
        need()
    journal = results.Journal(args.out or f"{design.name}-results", document)
    try:
        tell({"event": "experiment", "document": document})
        return _run(args, design, plan, topology, kept, journal, tell)
    finally:
        journal.close()


def _tell_lacking(design: Design, places: Sequence[Placement]) -> None:
    lacking = [one for one in design.placements if one not in {place.degree for place in places}]
    if lacking and len(lacking) == len(design.placements):
        raise UsageError(
            f"{design.source}: this host has none of the placements {', '.join(lacking)}",
            "see with 'hostpart topology' what it has, or take placements = \"all\"",
        )
    if lacking:
        say(f"this host has no {', '.join(lacking)}: left out")


def _check_host(design: Design, plan: Plan, topology: Topology, kept: CpuSet) -> None:
    # What cannot be, before anything is made.
    for level in design.isolation:
        scope = design.scope.replace(designs.OWN_SCOPE, f"tree:{os.getpid()}")
        check_wish(Wish(level, scope, require=True))
    needed = kept | CpuSet.of(one.victim_pcpu for one in plan.conditions)
    for one in plan.conditions:
        needed |= one.aggressor_pcpus or CpuSet()
    taken = supply_now(topology, ServiceVm(), CpuSet(), Leases()).taken & needed
    if taken:
        raise DoesNotFit(
            len(needed),
            needed - taken,
            [f"the plan takes pCPU {needed}, of which a VM has {taken}"],
            "see 'hostpart ps'; end that VM, or leave its pCPUs out: 'taskset -c LIST hostpart experiment ...'",
        )


def _alone() -> socket.socket:
    # The name goes with its holder. A lease would not do: the victims take and give back theirs.
    here = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    try:
        here.bind(f"\0hostpart-experiment:{os.environ.get('HOSTPART_LEASE_DIR', '')}")
    except OSError:
        here.close()
        raise UsageError(
            "another experiment runs on this host, and the two would disturb each other",
            "wait for it: 'pgrep -af \"hostpart experiment\"' shows which it is",
        ) from None
    return here


def _version() -> str:
    from .. import __version__

    return __version__


def processes(text: str) -> int:
    """Read a number of processes, as the file's key is read."""
    return _read(designs.processes, int, text)


def seconds(text: str) -> float:
    """Read a time, likewise."""
    return _read(designs.seconds, float, text)


def seed(text: str) -> int:
    """Read a seed, likewise."""
    return _read(designs.seed, int, text)


def _read(reader: Callable[[object], T], kind: type, text: str) -> T:
    # As the file's key is read.
    try:
        value = kind(text) if text.isascii() else text
    except ValueError:
        value = text
    try:
        return reader(value)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _scope(text: str) -> str:
    return text if text == designs.OWN_SCOPE else options.scope(text)


def _design(args: argparse.Namespace) -> Design:
    design = designs.load(args.file)
    changes = {name: getattr(args, name) for name in ("processes", "seconds", "seed", "scope")}
    changes["isolation"] = (args.isolation,) if args.isolation else None
    return design.replace(**{name: value for name, value in changes.items() if value is not None})


def _show_plan(
    args: argparse.Namespace, design: Design, plan: Plan, topology: Topology, document: dict[str, Any]
) -> int:
    if args.json:
        import json

        print(json.dumps(document))
        return 0
    counts: dict[str, int] = {}
    for one in plan.runs:
        counts[one.condition.id] = counts.get(one.condition.id, 0) + 1
    rows = [
        [
            one.victim,
            one.isolation,
            one.aggressor,
            one.placement,
            one.victim_pcpu,
            None if one.aggressor_pcpus is None else str(one.aggressor_pcpus),
            one.placed,
            counts[one.id],
        ]
        for one in plan.conditions
    ]
    headers = ["victim", "isolation", "aggressor", "placement", "its pCPU", "aggressor's", "as", "runs"]
    blocks = plan.runs[-1].block + 1 if plan.runs else 0
    first = [one.condition for one in plan.runs if one.block == 0]
    order = " ".join(one.placement if one.aggressor is None else f"[{one.aggressor} {one.placement}]" for one in first)
    print(table(headers, rows, colour=colour_wanted(sys.stdout)))
    if any(one.command for one in design.victims):
        print(f"\na run of a command is taken to last as long as one of a probe: {design.seconds:g} s")
    print(
        f"\n{len(plan.runs)} runs in {blocks} blocks, about {_duration(plan.seconds)}; seed {design.seed}; "
        f"usable pCPUs {topology.usable}\nfirst block: {order}"
    )
    return 0


def _run(
    args: argparse.Namespace,
    design: Design,
    plan: Plan,
    topology: Topology,
    kept: CpuSet,
    journal: results.Journal,
    tell: Callable[[dict[str, Any]], None],
) -> int:
    before = results.read(journal.directory)
    done = before.done & {one.number for one in plan.runs}
    stopped, code, failure = 0, 0, None
    handled = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in handled.items():
        if handler != signal.SIG_IGN:  # as under nohup(1)
            signal.signal(number, _interrupt)
    try:
        if len(done) == len(plan.runs):
            for run in before.runs:
                tell({"event": "run", "run": run})
            _tell(
                f"all {len(done)} runs are made already: {journal.directory}; name another --out DIR to make them anew"
            )
        else:
            with _alone():
                _check_host(design, plan, topology, kept)
                stopped, failure = _make(design, plan, kept, journal, before, done, tell)
        code = _show(args, journal.directory)
    except KeyboardInterrupt as interrupt:
        stopped = stopped or _number(interrupt)
    except HostpartError as error:
        failure = failure or error  # what stopped the runs; a full disk stops the page as well
    finally:
        for number, handler in handled.items():
            signal.signal(number, handler)
    if stopped:
        made = len(results.read(journal.directory).done)
        again = shlex.join(["hostpart", *sys.argv[1:]])
        _tell(f"stopped with {made} of {len(plan.runs)} runs made; the same command goes on: {again}")
        return 128 + stopped
    if failure is not None:
        raise failure
    return code


def _make(
    design: Design,
    plan: Plan,
    kept: CpuSet,
    journal: results.Journal,
    before: results.Results,
    done: frozenset[int],
    tell: Callable[[dict[str, Any]], None],
) -> tuple[int, HostpartError | None]:
    # Make the runs; return the signal that stopped them, or 0, and the error that did.
    session, host = len(before.sessions), Host()
    begun = {
        "schema": 1,
        "session": session,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": ["hostpart", *sys.argv[1:]],
        "cwd": os.getcwd(),
        "boot_id": host.read_text("proc/sys/kernel/random/boot_id").strip(),
        "facts": read_facts(host),
    }
    journal.begin(begun)
    tell({"event": "session", "session": begun})
    for run in before.runs:
        tell({"event": "run", "run": run})
    if done:
        _tell(f"{len(done)} of {len(plan.runs)} runs are made already; going on in {journal.directory}")
    from .progress import Progress

    with Progress(plan, done, sys.stderr) as progress:

        def hear(run: Run, document: dict[str, Any] | None) -> None:
            if document is not None:
                tell({"event": "run", "run": document})
            progress.hear(run, document)

        runner = Runner(design, plan, journal, session, kept, hear)
        try:
            runner.run(done)
        except KeyboardInterrupt as interrupt:
            return _number(interrupt), None
        except HostpartError as error:
            return 0, error
    if runner.given_up:
        _tell(f"given up, since run after run failed: {', '.join(runner.given_up)}; the same command tries again")
    return 0, None


def _number(interrupt: KeyboardInterrupt) -> int:
    return int(interrupt.args[0]) if interrupt.args else int(signal.SIGINT)


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _show(args: argparse.Namespace, directory: str) -> int:
    found = results.read(directory)
    if not args.no_report:
        from ..experiment.analysis import analyse, keep
        from ..report.page import report
        from .analysis import summary
        from .report import write

        analysis = analyse(found)
        keep(analysis, directory)
        path = os.path.join(directory, "report.html")
        write(path, report(found, analysis))
        if args.json:
            import json

            print(json.dumps(analysis))
        else:
            print(summary(analysis, colour=colour_wanted(sys.stdout)), f"the page: {path}", sep="\n\n")
    failed = [one for one in found.runs if one["error"] is not None]
    for problem, remedy in dict.fromkeys((one["error"]["problem"], one["error"]["remedy"]) for one in failed):
        count = sum(1 for one in failed if one["error"]["problem"] == problem)
        _tell(f"{count} run{'s' * (count > 1)} failed: {plain(problem)}\ntry: {plain(remedy)}")
    # What an aggressor taints that is on the victim's pCPU by design was asked for.
    bad = [one for one in found.runs if one["verdict"] != "held"]
    if args.strict and any(one["verdict"] != "tainted" or not results.overlaps(one) for one in bad):
        return 5
    return 1 if failed else 0


def _tell(text: str) -> None:
    try:
        say(text)
    except (OSError, AttributeError):
        pass  # the terminal is gone, or there never was one; the runs count


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
