"""``hostpart fleet run``: a command on pCPUs of its own, on a host that has them."""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys

from ..cpuset import MAX_CPUS, CpuSet
from ..errors import HostpartError, UsageError
from ..front import say
from . import options
from . import run as run_command
from .fleet_session import Session, add_ways, resume, serve, tell_outcome, words_of
from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import Any

    from ..fleet.dispatch import Outcome, Word
    from ..fleet.journal import Journal
    from ..fleet.request import Request

__all__ = ["FAILED", "add", "run"]

FAILED = run_command.FAILED
_HOSTS_OWN = ("events", "hold")  # options of `hostpart run` by which a host's agent speaks with it
_OURS = (
    "wait",
    "evidence",
    "name",
    "events",
    "hold",
)  # options of `hostpart run` that mean something else here, or nothing


def add(parser: argparse.ArgumentParser) -> None:
    """Add the action's arguments: those of ``hostpart run``, and its own."""
    run_command.add(parser)
    for action in parser._actions:
        if action.dest in _HOSTS_OWN:
            action.help = argparse.SUPPRESS
    parser.usage = "hostpart fleet [...] run [options] [--] COMMAND [ARG ...]"
    parser.description = (
        "Run COMMAND on pCPUs of its own on a host that has them to give, with the evidence that 'hostpart run'\n"
        "gives. It runs with the host's own hostpart, as the user of its Dask worker, in this directory where the\n"
        "host has it."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart fleet --scheduler tls://head:8786 run -n 2 -- ./mine\n"
        "  hostpart fleet --local 3 run -- hostname\n"
        "  hostpart fleet --ssh hosts run --gang 4 -n 2 -- ./rank   on each of four hosts\n"
        "  hostpart fleet --ssh hosts run --jobs todo --out out   a JSON array per line\n\n"
        "A member of a gang sees HOSTPART_GANG_RANK and HOSTPART_GANG_SIZE.\n\n"
        "Exit status: the command's own, as with 'hostpart run', and 125 where hostpart failed; with --gang, --jobs\n"
        "and --resume: 0 all ended with 0, 1 one did not, 3 the gang does not fit; 128+N after signal N."
    )
    group = parser.add_argument_group("of the fleet")
    group.add_argument(
        "--gang", type=options.count, metavar="N", help="a VM on each of N hosts, started together or not at all"
    )
    group.add_argument("--jobs", metavar="FILE", help="many commands: a JSON array of words per line, '-' is stdin")
    group.add_argument("--json", action="store_true", help="print events as JSON Lines; guests' stdout goes to stderr")
    add_ways(group)


def run(args: argparse.Namespace) -> int:
    """Run it, on the fleet ``args.where`` and its hosts ``args.hosts``."""
    try:
        return _start(args)
    except HostpartError as error:
        if args.gang or args.jobs or args.resume:
            raise
        say(f"{error}\ntry: {error.remedy}")  # as `hostpart run` does, whose statuses are the command's
        return FAILED


def _start(args: argparse.Namespace) -> int:
    from ..fleet import journal as journals
    from ..fleet.request import new_run

    if args.events is not None or args.hold is not None:
        raise UsageError("--events and --hold are for one host's 'hostpart run'", "say --json, or --out DIR")
    if args.resume and (args.command or args.jobs or args.gang or args.probe or args.out):
        raise UsageError("--resume goes on with what is in its directory, and takes no command", "leave the others out")
    if args.probe and {"-h", "--help"} & set(args.probe):
        return run_command.run(args)
    journal: Journal | None = None
    if args.resume:
        journal = journals.Journal(args.resume)
        asked = _asked_before(journal)
    else:
        asked = _asked(args, new_run())
        out = args.out or (f"fleet-{asked['run']}" if args.jobs else None)
        if out:
            journal = journals.Journal(out, asked)
            say(f"what the hosts say is kept in {out}; to finish it later: hostpart fleet ... run --resume {out}")
    try:
        return _run(args, asked, journal)
    finally:
        if journal is not None:
            journal.close()


def _asked(args: argparse.Namespace, run: str) -> dict[str, Any]:
    # What is asked for, as fleet.json has it: all that is needed to go on with it.
    from datetime import UTC, datetime

    parser = argparse.ArgumentParser(add_help=False)
    run_command.add(parser)
    words = words_of(parser._actions, args, [*_OURS, "probe"])
    command = args.command[1:] if args.command[:1] == ["--"] else args.command
    jobs = None
    if args.jobs:
        if command or args.probe or args.gang:
            raise UsageError("--jobs has the commands, so there can be no other", "leave COMMAND and --gang out")
        jobs = _jobs(args.jobs)
    elif not command and not args.probe:
        raise UsageError("there is no COMMAND to run", "hostpart fleet run -- COMMAND [ARG ...]")
    request = options.request_of(args)
    return {
        "schema": 1,
        "kind": "run",
        "run": run,
        "name": os.path.basename((command or args.probe or ["jobs"])[0]),
        "argv": sys.argv[1:],
        "created": datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z"),
        "requests": len(jobs) if jobs is not None else args.gang or 1,
        "options": words,
        "tail": ["--probe", *args.probe] if args.probe else ["--", *command],
        "jobs": jobs,
        "gang": args.gang,
        "count": request.count,
        "smt": request.smt,
        "policy": request.policy,
        "cwd": os.getcwd(),
    }


def _asked_before(journal: Journal) -> dict[str, Any]:
    asked = journal.document
    kinds = {"run": str, "options": list, "tail": list, "requests": int, "count": int, "smt": str, "policy": str}
    if asked.get("kind") != "run" or not all(isinstance(asked.get(name), kind) for name, kind in kinds.items()):
        raise UsageError(
            f"{journal.directory} holds no 'fleet run'", f"hostpart fleet experiment --resume {journal.directory}"
        )
    return asked


def _jobs(path: str) -> list[list[str]]:
    jobs: list[list[str]] = []
    number = 0
    try:
        with open(0 if path == "-" else path, encoding="utf-8", closefd=path != "-") as file:
            for line in file:
                number += 1
                if line.strip():
                    words = json.loads(line)
                    if not isinstance(words, list) or not words or not all(isinstance(word, str) for word in words):
                        raise ValueError
                    jobs.append(words)
    except OSError as error:
        raise UsageError(f"--jobs {path}: {error.strerror}", "name a file that can be read") from None
    except (ValueError, RecursionError):
        raise UsageError(
            f"--jobs {path}, line {number}: it is no JSON array of words", 'write a line like ["./mine", "--seed", "7"]'
        ) from None
    if not jobs:
        raise UsageError(f"--jobs {path}: it has no line", 'write a line like ["./mine", "--seed", "7"]')
    return jobs


def _requests(asked: Mapping[str, Any], needs: Mapping[str, float]) -> Iterator[Request]:
    from ..fleet.request import Request

    head = ["run", *asked["options"]]
    tails = [["--", *words] for words in asked["jobs"]] if asked.get("jobs") else [asked["tail"]] * asked["requests"]
    for number, tail in enumerate(tails):
        rank = (
            {"HOSTPART_GANG_RANK": str(number), "HOSTPART_GANG_SIZE": str(asked["gang"])} if asked.get("gang") else {}
        )
        yield Request(asked["run"], number, (*head, *tail), needs, cwd=asked.get("cwd"), env=rank)


def _run(args: argparse.Namespace, asked: Mapping[str, Any], journal: Journal | None) -> int:
    from ..fleet.request import needs_of

    show = _Show(args, asked)
    whole = asked.get("gang") or asked.get("jobs")
    wait_s = args.wait if args.wait is not None else float("inf") if asked.get("jobs") else 0.0

    async def work(session: Session) -> None:
        hosts = await session.dispatcher.hosts()
        # What is there by now, hosts by the thousand among it, stays to the end: to look through it for garbage again
        # and again took a tenth of this process's time.
        gc.freeze()
        widest = max(len(CpuSet.parse(str(host.hello["usable"]))) for host in hosts.values())
        needs = needs_of(asked["count"], asked["smt"], asked["policy"], widest)
        requests = _requests(asked, needs)
        if args.resume:
            await resume(session, list(requests), again=args.again, gang=bool(asked.get("gang")))
            show.unknown, show.failed_before = session.unknown, session.failed
        elif asked.get("gang"):
            await session.dispatcher.gang(list(requests))
        else:
            await session.dispatcher.run(requests)

    try:
        stopped = serve(args, journal, work, hear=show.hear, ended=show.ended, wait_s=wait_s)
    finally:
        show.close()
    if stopped:
        return 128 + stopped
    return show.whole() if whole or args.resume else show.single()


class _Show:
    # Shows what comes, as it comes; for people, or as JSON Lines.

    def __init__(self, args: argparse.Namespace, asked: Mapping[str, Any]) -> None:
        self.args = args
        self.many = bool(asked.get("gang") or asked.get("jobs"))
        self.requests = int(asked["requests"])
        self.tally: dict[str, int] = {}
        self.failed: list[str] = []
        self.last: Outcome | None = None
        self.unknown = self.failed_before = 0
        self.code = 0
        self._rest: dict[tuple[int, str], bytes] = {}

    def hear(self, word: Word) -> None:
        host = plain(word.host)
        if word.channel == "event":
            self._event(word, host)
        elif word.channel == "note":
            say(plain(str(word.data)))
        else:
            out = sys.stdout if word.channel == "stdout" and not self.args.json else sys.stderr
            data = self._labelled(word, host) if self.many else bytes(word.data)
            out.flush()
            out.buffer.write(data)
            out.buffer.flush()

    def _labelled(self, word: Word, host: str) -> bytes:
        # Whose line it is; a line at a time, so that two hosts do not share one.
        key = word.request.number, word.channel
        *lines, rest = (self._rest.pop(key, b"") + word.data).split(b"\n")
        if len(rest) > 1 << 16:
            lines, rest = [*lines, rest], b""
        if rest:
            self._rest[key] = rest
        return b"".join(b"%s: %s\n" % (host.encode(), line) for line in lines)

    def _event(self, word: Word, host: str) -> None:
        kind = word.data.get("event")
        if self.args.json and kind in ("ready", "ended", "error"):
            self._json({**word.data, "request": word.request.number, "host": word.host})
        elif kind == "ready" and not (self.many and self.requests > 16):
            given = word.data.get("vcpus")
            there = [one.get("pcpu") for one in given if isinstance(one, dict)] if isinstance(given, list) else []
            say(f"host {host}, pCPU {CpuSet.of(one for one in there if type(one) is int and 0 <= one < MAX_CPUS)}")
        if kind == "ended" and self.args.evidence and not self.many:
            self._write({"schema": 1, **_table(word.data.get("evidence")), "host": word.host})

    def _write(self, document: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(document, indent=2, allow_nan=False)
            with open(self.args.evidence, "w", encoding="utf-8") as file:
                file.write(f"{text}\n")
        except OSError as error:
            say(f"the evidence cannot be written to {self.args.evidence!r}: {error.strerror}\ntry: another --evidence")
            self.code = FAILED
        except (ValueError, RecursionError):
            say(f"what host {plain(str(document['host']))} says is no evidence\ntry: see to that host's hostpart")
            self.code = FAILED

    def ended(self, outcome: Outcome) -> None:
        if self.many:
            for channel in ("stdout", "stderr"):
                rest = self._rest.pop((outcome.request.number, channel), b"")
                if rest:
                    out = sys.stdout if channel == "stdout" and not self.args.json else sys.stderr
                    out.buffer.write(b"%s: %s\n" % (plain(outcome.host).encode(), rest))
                    out.buffer.flush()
        self.last = outcome
        good = outcome.state == "ended" and outcome.status == 0
        self.tally[outcome.state] = self.tally.get(outcome.state, 0) + 1
        if self.args.json:
            about = {"request": outcome.request.number, "state": outcome.state, "host": outcome.host or None}
            self._json({"event": "outcome", **about, "status": outcome.status, "error": outcome.error})
        if not good:
            self.failed.append(f"request {outcome.request.number}: {_how(outcome)}")
            if len(self.failed) <= 10:
                tell_outcome(outcome)
            del self.failed[10:]
            self.code = self.code or 1

    def _json(self, document: Mapping[str, Any]) -> None:
        try:
            text = json.dumps(document, allow_nan=False)
        except (ValueError, RecursionError):  # a host says what JSON has no word for
            about = ("event", "request", "host", "state", "status")
            text = json.dumps({**{name: document[name] for name in about if name in document}, "unkept": True})
        print(text, flush=True)

    def close(self) -> None:
        """Have everything out."""
        sys.stdout.flush()

    def single(self) -> int:
        """Return the exit code of one command."""
        if self.last is None or self.last.state != "ended" or self.last.status is None:
            return FAILED
        return self.last.status or self.code

    def whole(self) -> int:
        """Return the exit code of many, having said how they went."""
        if not self.args.json:
            told = ", ".join(f"{many} {state}" for state, many in sorted(self.tally.items()))
            say(f"of {self.requests}: {told or 'nothing was left to do'}")
            if self.failed_before:
                say(f"not with status 0 before: {self.failed_before}")
            for text in self.failed:
                say(text)
        return 1 if self.code or self.unknown or self.failed_before else 0


def _how(outcome: Outcome) -> str:
    where = f" on host {plain(outcome.host)}" if outcome.host else ""
    return f"{outcome.state}{where}" + (f" with status {outcome.status}" if outcome.status is not None else "")


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
