"""``hostpart experiment``: what sharing costs on this host, measured in a design that can be believed."""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import sys
import time

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
from ..isolation import LEVELS
from ..launcher import supply_now
from ..lease import Leases, Survey
from ..service_vm import keep_wish
from . import options
from .plan import topology_of
from .run import refuse_nested
from .table import colour_wanted, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType
    from typing import Any

    from ..experiment.design import Design
    from ..experiment.schedule import Plan
    from ..topology import Topology

__all__ = ["add", "run"]


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
    parser.add_argument("--processes", type=options.count, metavar="N", help="per condition, instead of the file's")
    parser.add_argument("--seconds", type=options.seconds, metavar="S", help="each measures, instead of the file's")
    parser.add_argument("--seed", type=int, metavar="N", help="of the order of the runs, instead of the file's")
    parser.add_argument("--isolation", choices=LEVELS, help="the victims' level, instead of the file's")
    parser.add_argument(
        "--scope", type=_scope, metavar="SCOPE", help="instead of the file's; 'experiment': its own tasks"
    )
    parser.add_argument("--no-report", action="store_true", help="keep the runs only; analyse them another time")
    parser.add_argument("--strict", action="store_true", help="exit 5 if a partition did not hold")
    parser.add_argument("--json", action="store_true", help="print JSON: the plan, or the analysis")


def run(args: argparse.Namespace) -> int:
    """Run the experiment, or show its plan."""
    refuse_nested()
    design = _design(args)
    if args.host and not args.plan:
        raise UsageError("--host is for a plan: runs are made on this host only", "add --plan")
    host = Host()
    topology = topology_of(args.host)
    kept = Hypervisor.keep_of(topology, keep_wish(ServiceVm(), CpuSet()), Survey(CpuSet(), CpuSet()))
    places = placements(topology, kept, design.placements, design.victim_pcpu, {} if args.host else distances(host))
    plan = schedule.plan(design, places, kept)
    out = args.out or f"{design.name}-results"
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
    victims = CpuSet.of(place.victim for place in places)
    if taken := supply_now(topology, ServiceVm(), CpuSet(), Leases()).taken & victims:
        raise DoesNotFit(
            len(victims), topology.usable - kept - taken, [f"the victim's pCPU {taken} is leased to a VM"],
            "see 'hostpart ps'; end that VM, or name another pCPU with victim_pcpu in the file",
        )  # fmt: skip
    if not args.no_report:
        need()
    journal = results.Journal(out, document)
    try:
        return _run(args, design, plan, kept, journal, host)
    finally:
        journal.close()


def _version() -> str:
    from .. import __version__

    return __version__


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
    print(
        f"\n{len(plan.runs)} runs in {blocks} blocks, about {_duration(plan.seconds)}; seed {design.seed}; "
        f"usable pCPUs {topology.usable}\nfirst block: {order}"
    )
    return 0


def _run(
    args: argparse.Namespace, design: Design, plan: Plan, kept: CpuSet, journal: results.Journal, host: Host
) -> int:
    stopped, code, failure = 0, 0, None
    before = results.read(journal.directory)
    done = before.done & {one.number for one in plan.runs}
    if len(done) == len(plan.runs):
        say(f"all {len(done)} runs are made already: {journal.directory}; name another --out DIR to make them anew")
    else:
        session = len(before.sessions)
        journal.begin(
            {
                "schema": 1,
                "session": session,
                "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                "command": [os.path.basename(sys.argv[0]), *sys.argv[1:]],
                "cwd": os.getcwd(),
                "boot_id": host.read_text("proc/sys/kernel/random/boot_id").strip(),
                "facts": read_facts(host),
            }
        )
        if done:
            say(f"{len(done)} of {len(plan.runs)} runs are made already; going on in {journal.directory}")
        from .progress import Progress

        with Progress(plan, done, sys.stderr) as progress:
            runner = Runner(design, plan, journal, session, kept, progress.hear)
            signal.signal(signal.SIGTERM, _interrupt)
            signal.signal(signal.SIGHUP, _interrupt)
            try:
                runner.run(done)
            except KeyboardInterrupt as interrupt:
                stopped = int(interrupt.args[0]) if interrupt.args else int(signal.SIGINT)
            except HostpartError as error:
                failure = error
        if runner.given_up and failure is None:
            say(f"given up, since run after run failed: {', '.join(runner.given_up)}; the same command tries again")
    try:
        code = _tell(args, journal.directory)
    except HostpartError:
        if failure is None:
            raise
    if failure is not None:
        raise failure  # what stopped the runs; a full disk stops the page as well
    if stopped:
        made = len(results.read(journal.directory).done)
        again = shlex.join(["hostpart", *sys.argv[1:]])
        say(f"stopped with {made} of {len(plan.runs)} runs made; the same command goes on: {again}")
        return 128 + stopped
    return code


def _interrupt(number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt(number)


def _tell(args: argparse.Namespace, directory: str) -> int:
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
        say(f"{count} run{'s' * (count > 1)} failed: {problem}\ntry: {remedy}")
    if args.strict and any(one["verdict"] != "held" for one in found.runs):
        return 5
    return 1 if failed else 0


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
