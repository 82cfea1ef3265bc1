"""What the actions of ``hostpart fleet`` share: the connection, all hosts asked at once, and what they answered.

What comes from a host is checked before it is used, and printed through :mod:`hostpart.cli.table` only.
"""

from __future__ import annotations

import asyncio
import json

from ..errors import Failed
from ..fleet import cluster, roster
from ..fleet.order import object_of
from ..front import say
from ..value import Value
from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..fleet.cluster import Cluster
    from ..fleet.roster import FleetHost, Roster

__all__ = [
    "ANSWER_S", "Answer", "Asked", "ask", "ask_all", "entry", "left_out", "look", "note", "print_json", "read_answer",
    "trouble",
]  # fmt: skip

ANSWER_S = 20.0  # a host's time for one answer
_AT_ONCE = 64
_MAX_ANSWER = 16 << 20  # characters: far more than what the largest host's topology takes


class Answer(Value):
    """What one host answered to one command.

    :ivar status: the command's exit status; None where there was no answer
    :ivar document: what it printed, where that is a table of JSON
    :ivar problem: what went wrong: with asking, or as the command has said it
    """

    host: FleetHost
    status: int | None = None
    document: Mapping[str, Any] | None = None
    problem: str = ""

    @property
    def answered(self) -> bool:
        """Whether the command ran, whatever came of it."""
        return self.status is not None


class Asked(Value):
    """What all chosen hosts answered, in the order of their names."""

    roster: Roster
    answers: tuple[Answer, ...]

    @property
    def silent(self) -> bool:
        """Whether a host did not answer."""
        return not all(answer.answered for answer in self.answers)


def ask_all(args: argparse.Namespace, argv: Sequence[str]) -> Asked:
    """Connect to the fleet of ``args.where`` and give every host of ``args.hosts`` the same command.

    :raises HostpartError: where there is no connection, or no such host
    """

    async def all_of_them() -> Asked:
        async with cluster.connect(args.where) as fleet:
            chosen = await look(fleet, args.hosts)
            return Asked(chosen, tuple(await ask(fleet, chosen.hosts, argv)))

    return cluster.run(all_of_them())


async def look(fleet: Cluster, names: Sequence[str]) -> Roster:
    """Return the chosen hosts, with what there is to say about the fleet said.

    :raises Failed: where it has no host
    :raises UsageError: where one that is named is not in it
    """
    there = await roster.look(fleet.client)
    for text in (*fleet.notes, *roster.differences(there.hosts)):
        note(text)
    chosen = roster.choose(there, names)
    if not chosen.hosts and not chosen.left_out:
        raise Failed(
            f"no worker is connected to {fleet.address}",
            f"on each host: dask worker {fleet.address} --nthreads 1 --preload {cluster.PRELOAD}",
        )
    return chosen


async def ask(
    fleet: Cluster, hosts: Sequence[FleetHost], argv: Sequence[str], wait_s: float | None = None
) -> list[Answer]:
    """Give every host the same command, at once, and return what each answered, in the same order.

    :param wait_s: a host's time, by default :data:`ANSWER_S`; one that has not answered then holds nobody up
    """
    turns = asyncio.Semaphore(_AT_ONCE)

    async def one(host: FleetHost) -> Answer:
        async with turns:
            return await _ask(fleet, host, argv, ANSWER_S if wait_s is None else wait_s)

    return list(await asyncio.gather(*map(one, hosts)))


async def _ask(fleet: Cluster, host: FleetHost, argv: Sequence[str], wait_s: float) -> Answer:
    from ..fleet import agent

    text = json.dumps({"argv": list(argv)})
    try:
        said = await asyncio.wait_for(
            fleet.client.run(agent.ask, text, workers=[host.address], on_error="return"), wait_s
        )
    except TimeoutError:
        return Answer(host, problem=f"no answer within {wait_s:g} s")
    except Exception as error:  # Dask's, or whatever it was given by the host
        return Answer(host, problem=f"not reached: {_short(error)}")
    answer = said.get(host.address) if isinstance(said, dict) else None
    if answer is None:
        return Answer(host, problem="it has gone")
    if isinstance(answer, BaseException):
        return Answer(host, problem=f"it could not answer: {_short(answer)}")
    return read_answer(host, answer)


def read_answer(host: FleetHost, text: object) -> Answer:
    """Return what the text of an answer holds. Pure."""
    bad = Answer(host, problem="its answer is not what it should be")
    if not isinstance(text, str) or len(text) > _MAX_ANSWER:
        return bad
    try:
        told = json.loads(text)
        if isinstance(refusal := told.get("error"), dict):
            return Answer(host, problem=plain(f"it refused: {refusal.get('problem')}")[:500])
        status, out, err = told["status"], told["stdout"], told["stderr"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return bad
    if type(status) is not int or not isinstance(out, str) or not isinstance(err, str):
        return bad
    document = object_of(out)
    if status == 0 and document is None:
        return bad
    return Answer(host, status, document, _problem(err) if status else "")


def _problem(stderr: str) -> str:
    # As hostpart's own main() words it: "hostpart: PROBLEM", "try: REMEDY".
    lines = [line for line in stderr.splitlines() if line.strip() and not line.startswith("try: ")]
    told = [line.removeprefix("hostpart: ") for line in lines if line.startswith("hostpart: ")]
    return plain((told or lines or ["no word why"])[-1])[:500]


def _short(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return plain(f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__)[:200]


def note(text: str) -> None:
    """Say a sentence on stderr, whoever has worded it."""
    say(plain(text))


def trouble(asked: Asked) -> None:
    """Say on stderr which hosts could not be asked, or failed, and which workers are no hosts of the fleet, and why."""
    for answer in asked.answers:
        if answer.problem:
            note(f"{answer.host.name}: {answer.problem}")
    left_out(asked.roster)


def left_out(chosen: Roster) -> None:
    """Say on stderr which workers are no hosts of the fleet, and why."""
    for one in chosen.left_out:
        note(f"left out: {one.name}{f' ({one.address})' if one.address else ''} {one.why}; {one.remedy}")


def entry(answer: Answer, more: Mapping[str, object]) -> dict[str, object]:
    """Return a host's part of what ``--json`` prints."""
    return {"name": answer.host.name, "address": answer.host.address, "problem": answer.problem or None, **more}


def print_json(asked: Asked, hosts: Sequence[Mapping[str, object]], **more: object) -> None:
    """Print the document of an action."""
    print(
        json.dumps({"schema": 1, "hosts": list(hosts), "left_out": [o.asdict() for o in asked.roster.left_out], **more})
    )
