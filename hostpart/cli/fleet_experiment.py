"""``hostpart fleet experiment``: one experiment on every host, and one page in which each host is a column."""

from __future__ import annotations

import argparse
import os
import re
import sys

from ..errors import UsageError
from ..experiment import design as designs
from ..front import say
from . import experiment as experiment_command
from .fleet_session import Session, add_ways, resume, serve, tell_outcome, words_of
from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..fleet.dispatch import Outcome, Word
    from ..fleet.journal import Journal
    from ..fleet.request import Request
    from ..fleet.resumption import Known

__all__ = ["add", "run"]

_OURS = ("file", "plan", "host", "out", "no_report", "json", "strict")


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments."""
    parser.description = (
        "Make an experiment on every host of the fleet, each with its own hostpart and on its own placements, and one\n"
        "page of it in which the host is a factor: each host's map and figures, all together, and who is out of line."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart fleet --scheduler tls://head:8786 experiment example:interference\n"
        "  hostpart fleet --ssh hosts --hosts a,b experiment mine.toml --out friday\n"
        "  hostpart fleet --ssh hosts experiment --resume friday    what is missing\n\n"
        "Exit status: 0 done, 1 a run failed, a host was lost or hostpart failed, 2 the file or the options are\n"
        "wrong, 128+N after signal N."
    )
    parser.add_argument("file", metavar="FILE", nargs="?", help="what to try (TOML), or example:NAME")
    for name, kind, metavar, text in (
        ("--processes", experiment_command.processes, "N", "per condition, instead of the file's"),
        ("--seconds", experiment_command.seconds, "S", "each measures, instead of the file's"),
        ("--seed", experiment_command.seed, "N", "of the order of the runs, instead of the file's"),
    ):
        parser.add_argument(name, type=kind, metavar=metavar, help=text)
    parser.add_argument("--no-report", action="store_true", help="keep the runs only; analyse them another time")
    parser.add_argument("--json", action="store_true", help="print the analysis of all hosts as JSON")
    add_ways(parser)


def run(args: argparse.Namespace) -> int:
    """Run it, on the fleet ``args.where`` and its hosts ``args.hosts``."""
    from ..fleet import journal as journals

    if bool(args.resume) == bool(args.file):
        raise UsageError(
            "FILE says what to try, and --resume goes on with a directory: one of the two is needed",
            "hostpart fleet experiment example:interference",
        )
    if not args.no_report:
        from ..experiment.extra import need

        need()
    if args.resume:
        journal = journals.Journal(args.resume)
        asked = journal.document
        if asked.get("kind") != "experiment" or not isinstance(asked.get("text"), str):
            raise UsageError(f"{args.resume} holds no 'fleet experiment'", f"hostpart fleet run --resume {args.resume}")
    else:
        asked = _asked(args)
        journal = journals.Journal(args.out or f"{asked['name']}-fleet-results", asked)
    try:
        code = _run(args, asked, journal)
    finally:
        journal.close()
    if not args.no_report and code < 128:
        _report(args, journal.directory)
    return code


def _asked(args: argparse.Namespace) -> dict[str, Any]:
    from datetime import UTC, datetime

    from ..fleet.request import new_run

    design = designs.load(args.file)
    parser = argparse.ArgumentParser(add_help=False)
    add(parser)
    return {
        "schema": 1,
        "kind": "experiment",
        "run": new_run(),
        "name": design.name,
        "argv": sys.argv[1:],
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "requests": None,
        "file": f"{re.sub(r'[^A-Za-z0-9._-]', '-', os.path.basename(design.name)) or 'design'}.toml",
        "text": designs.text_of(args.file).decode(),
        "options": words_of(
            [one for one in parser._actions if one.dest in ("processes", "seconds", "seed")], args, _OURS
        ),
        "cwd": os.getcwd(),
    }


def _request(asked: Mapping[str, Any], number: int) -> Request:
    from ..fleet.request import DIR, Request

    argv = ("experiment", f"{DIR}/{asked['file']}", "--out", f"{DIR}/results", *asked["options"])
    files = {str(asked["file"]): str(asked["text"])}
    return Request(str(asked["run"]), number, argv, {}, "start", asked.get("cwd"), files)


def _run(args: argparse.Namespace, asked: Mapping[str, Any], journal: Journal) -> int:
    show = _Show()

    async def work(session: Session) -> None:
        hosts = await session.dispatcher.hosts()
        # A host keeps its number: its errand has it in its name.
        numbers, gone = _numbers(journal, sorted(hosts), await session.dispatcher.find(str(asked["run"])))
        on = {number: name for name, number in numbers.items()}
        for name in gone if not args.hosts else ():
            show.code = 1
            say(f"host {plain(name)} is not there, and what it has not told is missing\ntry: the same once it is back")
        requests = [_request(asked, number) for number in sorted(on)]
        show.expect(len(requests))
        await resume(session, requests, again=True, on=lambda request: on[request.number])

    stopped = serve(args, journal, work, hear=show.hear, ended=show.ended, wait_s=float("inf"))
    if stopped:
        say(f"stopped; to go on: hostpart fleet ... experiment --resume {journal.directory}")
        return 128 + stopped
    return show.code


def _numbers(
    journal: Journal, names: Sequence[str], there: Mapping[int, Sequence[Known]]
) -> tuple[dict[str, int], list[str]]:
    from ..fleet import journal as journals
    from ..fleet import resumption

    # The numbers of the hosts that are there, and the names of those that are missing and have not done it all.
    before = resumption.last(journals.decisions(journal.directory))
    found = {one.host: number for number, one in sorted(before.items()) if one.host is not None}
    numbers = {name: found[name] for name in names if name in found}
    for number, known in sorted(there.items()):
        # A host that has another name now still has its errand.
        for one in known:
            if one.host in names and one.host not in numbers and number not in numbers.values():
                numbers[one.host] = number
    free = max([-1, *found.values(), *there]) + 1
    for name in names:
        if name not in numbers:
            numbers[name], free = free, free + 1
            # Before anything is sent: whoever goes on has to know whose it is.
            journal.decision(f"{journal.document['run']}.{numbers[name]}.1", "asked", host=name)
    done = {number for number, one in before.items() if one.state == "ended" and one.status == 0}
    gone = [name for name, number in found.items() if number not in {*numbers.values(), *done}]
    return numbers, gone


class _Show:
    # What there is to tell while the hosts are at it.

    def __init__(self) -> None:
        self.code = 0
        self._runs: dict[str, set[int]] = {}
        self._planned: dict[str, int] = {}
        self._told = 0

    def expect(self, hosts: int) -> None:
        """Say how many hosts there are."""
        say(f"{hosts} host{'s' * (hosts != 1)}")

    def hear(self, word: Word) -> None:
        if word.channel == "note":
            say(plain(str(word.data)))
        elif word.channel == "event":
            self._event(word.host, word.data)

    def _event(self, host: str, event: Mapping[str, Any]) -> None:
        kind = event.get("event")
        if kind == "experiment":
            document = event.get("document")
            plan = document.get("plan") if isinstance(document, dict) else None
            runs = plan.get("runs") if isinstance(plan, dict) else None
            self._planned[host] = len(runs) if isinstance(runs, list) else 0
            say(f"host {plain(host)}: {self._planned[host]} runs planned")
        elif kind == "run" and isinstance(run := event.get("run"), dict) and isinstance(run.get("run"), int):
            self._runs.setdefault(host, set()).add(run["run"])
            done, planned = sum(map(len, self._runs.values())), sum(self._planned.values())
            if planned and done * 10 // planned > self._told:
                self._told = done * 10 // planned
                say(f"{done} of {planned} runs made")
        elif kind == "error":
            say(f"host {plain(host)}: {plain(str(event.get('problem')))}\ntry: {plain(str(event.get('remedy')))}")

    def ended(self, outcome: Outcome) -> None:
        if outcome.state != "ended" or outcome.status != 0:
            self.code = 1
            if outcome.state == "ended":
                say(f"host {plain(outcome.host)}: the experiment ended with status {outcome.status}")
            else:
                tell_outcome(outcome)


def _report(args: argparse.Namespace, directory: str) -> None:
    from ..experiment.analysis import ANALYSIS
    from .report import write_fleet

    path = write_fleet(directory)
    if args.json:
        with open(os.path.join(directory, ANALYSIS), encoding="utf-8") as file:
            print(file.read(), end="")
    else:
        print(f"the page: {path}")
