"""The host's side of a fleet, in its Dask worker: ``dask worker ADDRESS --nthreads 1 --preload hostpart.fleet.agent``.

It says which host this is and what it has to give, and answers for the errands here. The functions of this module are
what a client calls: :func:`place` as a task that Dask finds a host for, the others by ``client.run``. Each takes JSON
text and returns some; what is wrong with it is an ``error`` in the answer. What :func:`place` returns is also told on
the topic :data:`TOPIC`, with the worker's ``address``: it comes sooner, and twice where Dask gave a task to two hosts.

What an errand is, is :mod:`hostpart.fleet.errand`'s to say: all that is here may end at any time.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import threading
import time

from distributed import Status, get_worker

from ..errors import Failed, HostpartError, UsageError
from ..experiment.facts import read_facts
from ..host import Host
from . import supply
from .errand import ASKABLE, CHANNELS, LIVE, Errands
from .identity import identity
from .order import MAX_TEXT, check_id, check_run

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Coroutine, Mapping
    from typing import Any

    from distributed import Worker

__all__ = [
    "TOPIC",
    "Agent",
    "ask",
    "dask_setup",
    "dask_teardown",
    "facts",
    "give_up",
    "look",
    "news",
    "place",
    "start",
    "states",
    "stop",
]

TOPIC = "hostpart"
_EXTENSION = "hostpart"
_LOOK_S = 0.5  # between two looks at what is live here
_REFRESH_S = 30.0
_LESS_S, _MORE_S = 1.5, 0.3  # from when there is less free, and when there is more, to the telling of it
_SWEEP_S = 86400.0
_SOON_S, _LATE_S = 0.05, 0.25  # between two looks for news
_MAX_IDS = 4096
_MAX_WAIT_S, _MAX_BYTES, _MAX_GRACE_S = 60.0, 4 << 20, 3600.0
# More than any host has: the worker starts what it is sent at once. The scheduler alone chooses by what is free, and a
# host that is full by then says so; in the worker's own queue it would wait for a guest's end, and nobody be told.
_PLENTY = 1e6
_MEND = "say it as 'hostpart fleet' of the same version does"

log = logging.getLogger("distributed.hostpart")


class Agent:
    """What one Dask worker knows of its host.

    :param worker: whose extension ``hostpart`` it becomes
    :param errands: :class:`~hostpart.fleet.errand.Errands`, or what has the same methods
    :param hello: what the host says of itself; by default :func:`~hostpart.fleet.identity.identity`
    """

    def __init__(self, worker: Worker, errands: Errands, hello: Mapping[str, Any] | None = None) -> None:
        self.worker, self.errands = worker, errands
        self.hello = dict(hello or {})
        self.live: set[str] = set()
        self._told: dict[str, float] = {}
        self._told_turn = 0
        self._held_told: set[str] = set()  # what may have held something then
        self._placing: set[str] = set()
        self._tasks: list[asyncio.Task[Any]] = []
        self._telling = asyncio.Lock()
        self.turn = 0  # how often it was looked at what is free, the look that is going on included
        self._counting = threading.Lock()
        self._due: asyncio.TimerHandle | None = None  # when what is free is told
        worker.extensions[_EXTENSION] = self

    async def begin(self) -> None:
        """Say who and what is here, before the worker registers, and keep saying it."""
        if not self.hello:
            self.hello = await asyncio.to_thread(identity)
        self.live = await asyncio.to_thread(self._look)
        self._held_told = self._held()
        self._told_turn, self._told = await asyncio.to_thread(self._supply)
        state = self.worker.state
        state.total_resources.update(self._told)
        state.available_resources.update({name: count + _PLENTY for name, count in self._told.items()})
        self.worker.startup_information[_EXTENSION] = lambda _worker: self.hello
        self.worker.metrics[_EXTENSION] = lambda _worker: {"errands": len(self.live)}
        self._tasks = [asyncio.create_task(self._watch()), asyncio.create_task(self._sweep())]

    @property
    def told(self) -> dict[str, Any]:
        """What the scheduler was told last (``free``), and how often it was looked by then (``turn``)."""
        return {"free": dict(self._told), "turn": self._told_turn}

    async def end(self) -> None:
        """Say nothing any more. The errands go on."""
        if self._due is not None:
            self._due.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def refresh(self, *, less: bool = True) -> None:
        """Tell the scheduler what is free now, where that has changed.

        :param less: also where there is nothing but less
        """
        async with self._telling:
            held = self._held()
            turn, now = await asyncio.to_thread(self._supply)
            if now == self._told:
                self._held_told, self._told_turn = held, turn
                return
            more = any(count > self._told.get(name, 0) for name, count in now.items())
            if not more and not less:
                self.changed(_LESS_S)
                return
            self._held_told = held
            await self.worker.set_resources(**now)
            self._told_turn, self._told = turn, now
        if more and self.worker.status == Status.running:
            # Dask's scheduler looks again at tasks that no host could take when a worker comes, not when one has more:
            # Scheduler.add_resources() against handle_worker_status_change(), distributed 2026.8.
            self.worker.status = Status.paused
            self.worker.status = Status.running

    def changed(self, within_s: float) -> None:
        """What is free may be another now: tell of it by then, once for all that happens meanwhile.

        Each telling costs the scheduler a call; where one short guest follows the other there is nothing to tell in
        the end. Whoever sends requests here counts with it (:data:`hostpart.fleet.vacancy.LAG_S`).
        """
        due = time.monotonic() + within_s
        if self._due is not None and self._due.when() <= due:
            return
        if self._due is not None:
            self._due.cancel()
        self._due = asyncio.get_running_loop().call_later(within_s, self._tell, within_s >= _LESS_S)

    def _tell(self, less: bool) -> None:
        self._due = None
        held = self._held()
        if not less and held > self._held_told:
            self.changed(_LESS_S)  # nothing that was told of has ended, so there is no more
        elif held != self._held_told:
            self.later(self.refresh(less=less))

    async def place(self, request: Mapping[str, Any]) -> str:
        """Have a request placed and held, and tell of it; to its end, even where Dask has lost interest.

        :return: what was told, JSON
        """
        return await asyncio.shield(self._keep(self._place(request)))

    async def _place(self, request: Mapping[str, Any]) -> str:
        one = str(request.get("id"))
        self._placing.add(one)
        try:
            found = await asyncio.to_thread(self._begin, request)
        finally:
            self._placing.discard(one)
        self._note(found)
        text = json.dumps(found)
        # In an object Dask's scheduler puts who has sent it; in a text it cannot.
        self.worker.log_event(TOPIC, {"state": text})
        self.changed(_LESS_S)
        return text

    def _begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        try:
            found = self.errands.begin(request)
        except (HostpartError, OSError) as error:
            found = {"id": request.get("id"), "state": "refused", "error": _worded(error).to_json()}
        # Whoever sends the next request is to know what is left.
        turn, free = self._supply()
        return {**found, "free": free, "turn": turn}

    def note(self, found: Mapping[str, Any]) -> None:
        """Take in a state that somebody has asked for."""
        before = len(self.live)
        self._note(found)
        if len(self.live) < before:
            self.changed(_MORE_S)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Do something beside the answer."""
        self._keep(_quietly(work))

    def _keep(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        # The loop itself holds tasks weakly.
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.append(task)
        task.add_done_callback(self._tasks.remove)
        return task

    def _held(self) -> set[str]:
        return self.live | self._placing

    def _note(self, found: Mapping[str, Any]) -> None:
        if found["state"] in LIVE:
            self.live.add(found["id"])
        else:
            self.live.discard(found["id"])

    def _look(self) -> set[str]:
        return {one for one in self.errands.ids() if self.errands.state(one)["state"] in LIVE}

    def _supply(self) -> tuple[int, dict[str, float]]:
        # What is free, and the turn. What ends while it is looked counts as not in it: who takes it for free when it is
        # not is refused once, who takes it for taken when it is free waits.
        with self._counting:
            self.turn += 1
            turn = self.turn
        try:
            return turn, dict(self.errands.supply())
        except (HostpartError, OSError) as error:
            log.warning("%s", error)
            return turn, dict(supply.NOTHING)

    async def _watch(self) -> None:
        due = time.monotonic() + _REFRESH_S
        while True:
            await asyncio.sleep(_LOOK_S)
            for one in sorted(self.live):
                self.note(await asyncio.to_thread(self.errands.state, one))
            if time.monotonic() >= due:
                due = time.monotonic() + _REFRESH_S
                self.later(self.refresh())

    async def _sweep(self) -> None:
        while True:
            await _quietly(asyncio.to_thread(self.errands.sweep))
            await asyncio.sleep(_SWEEP_S)


async def _quietly(work: Awaitable[Any]) -> None:
    try:
        await work
    except (HostpartError, OSError) as error:
        log.warning("%s", error)


async def dask_setup(worker: Worker) -> None:
    """Make this worker a host of the fleet: Dask calls it before the worker registers.

    :raises HostpartError: where it cannot be one
    """
    errands = await asyncio.to_thread(Errands)
    await Agent(worker, errands).begin()


async def dask_teardown(worker: Worker) -> None:
    """Let go of the worker; the errands go on."""
    agent = worker.extensions.pop(_EXTENSION, None)
    if isinstance(agent, Agent):
        await agent.end()


# -- what a client calls -------------------------------------------------------------------------------


async def place(text: str) -> str:
    """Have a request's VM made ready and held here, or be refused; the task that Dask chooses a host for."""
    try:
        return await _agent(get_worker()).place(_object(text))
    except (HostpartError, OSError) as error:
        return _refusal(error)


async def start(text: str, dask_worker: Worker) -> str:
    """Give the word to errands that are held: those in ``ids``, or in ``by`` under this worker's address."""
    return await _each(text, dask_worker, ("ids", "by", "grace_s"), lambda errands, one, _: errands.start(one))


async def give_up(text: str, dask_worker: Worker) -> str:
    """Give back what errands hold that have not been started."""
    return await _each(text, dask_worker, ("ids", "by", "grace_s"), lambda errands, one, _: errands.give_up(one))


async def stop(text: str, dask_worker: Worker) -> str:
    """End errands."""

    def end(errands: Errands, one: str, asked: Mapping[str, Any]) -> dict[str, Any]:
        return errands.stop(one, _number(asked, "grace_s", 5.0, _MAX_GRACE_S))

    return await _each(text, dask_worker, ("ids", "by", "grace_s"), end)


async def states(text: str, dask_worker: Worker) -> str:
    """Return the states of errands: of those that are named, or of a run's."""
    return await _each(text, dask_worker, ("ids", "run"), lambda errands, one, _: errands.state(one))


async def news(text: str, dask_worker: Worker) -> str:
    """Return what errands have said beyond what the client has, and their states, once there is something new."""
    try:
        agent, asked = _agent(dask_worker), _object(text, "wants", "wait_s", "limit")
        wants = _wants(asked)
        wait_s = _number(asked, "wait_s", 10.0, _MAX_WAIT_S)
        limit = int(_number(asked, "limit", 262144, _MAX_BYTES))
        until, pause_s = time.monotonic() + wait_s, _SOON_S
        first: dict[str, str] = {}
        while True:
            found = await asyncio.to_thread(lambda: {one: agent.errands.state(one) for one in wants})
            first = first or {one: state["state"] for one, state in found.items()}
            if time.monotonic() >= until or any(_is_new(found[one], wants[one], first[one]) for one in wants):
                break
            await asyncio.sleep(max(0.0, min(pause_s, until - time.monotonic())))
            pause_s = min(pause_s * 1.3, _LATE_S)
        for one, state in found.items():
            agent.note(state)
            found[one] = {**state, "turn": agent.turn}
        return json.dumps(await asyncio.to_thread(_read, agent.errands, found, wants, limit))
    except (HostpartError, OSError) as error:
        return _refusal(error)


async def ask(text: str, dask_worker: Worker) -> str:
    """Return what a hostpart command that looks, or ends a VM, says here."""
    try:
        agent, asked = _agent(dask_worker), _object(text, "argv")
        argv = asked.get("argv")
        if not isinstance(argv, list) or not argv or not all(isinstance(word, str) for word in argv):
            raise UsageError("argv: want a list of words", _MEND)
        if argv[0] not in ASKABLE or any("\0" in word for word in argv):
            raise UsageError(f"argv: want one of {', '.join(ASKABLE)} first, got {argv[0][:40]!r}", _MEND)
        status, out, err = await asyncio.to_thread(agent.errands.ask, argv)
        return json.dumps({"status": status, "stdout": out, "stderr": err})
    except (HostpartError, OSError) as error:
        return _refusal(error)


async def look(text: str, dask_worker: Worker) -> str:
    """Look at what is free here now, tell the scheduler, and return it: it may have changed by no errand's doing."""
    try:
        agent = _agent(dask_worker)
        _object(text)
        await agent.refresh()
        return json.dumps(agent.told)
    except (HostpartError, OSError) as error:
        return _refusal(error)


async def facts(text: str, dask_worker: Worker) -> str:
    """Return the host's facts, what it says of itself, and its clock."""
    try:
        agent = _agent(dask_worker)
        _object(text)
        found = await asyncio.to_thread(read_facts, Host())
        return json.dumps({"facts": found, "hello": agent.hello, "time": time.time()})
    except (HostpartError, OSError) as error:
        return _refusal(error)


# -- inside --------------------------------------------------------------------------------------------


def _agent(worker: Worker) -> Agent:
    agent = worker.extensions.get(_EXTENSION)
    if not isinstance(agent, Agent):
        raise Failed(
            "this Dask worker is no host of hostpart's", "start it with '--preload hostpart.fleet.agent'"
        ) from None
    return agent


def _worded(error: Exception) -> HostpartError:
    return error if isinstance(error, HostpartError) else Failed(str(error), "see the message, and try it again")


def _refusal(error: Exception) -> str:
    return json.dumps({"error": _worded(error).to_json()})


def _object(text: object, *keys: str) -> dict[str, Any]:
    # With no keys named, all may be there: whoever takes it looks at them.
    if not isinstance(text, str) or len(text) > MAX_TEXT:
        raise UsageError(f"want JSON in {MAX_TEXT >> 20} MiB of text at most", _MEND)
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"want JSON: {error}", _MEND) from None
    if not isinstance(found, dict):
        raise UsageError("want a JSON object", _MEND)
    if keys and (unknown := sorted(str(key)[:40] for key in found.keys() - set(keys))):
        raise UsageError(f"{', '.join(unknown)}: unknown here; this host may have an older hostpart", _MEND)
    return found


def _number(asked: Mapping[str, Any], key: str, default: float, most: float) -> float:
    value = asked.get(key, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value >= 0:
        raise UsageError(f"{key}: want a number from 0, got {str(value)[:40]!r}", _MEND)
    return min(value, most)


def _ids(agent: Agent, asked: Mapping[str, Any]) -> list[str]:
    ids = asked.get("ids")
    if "by" in asked:
        # One text for many hosts.
        by = asked["by"]
        ids = by.get(agent.worker.address, []) if isinstance(by, dict) else None
    if not isinstance(ids, list) or len(ids) > _MAX_IDS:
        raise UsageError(f"ids: want a list of {_MAX_IDS} at most", _MEND)
    return [check_id(one) for one in ids]


async def _each(
    text: str,
    worker: Worker,
    keys: tuple[str, ...],
    do: Callable[[Errands, str, dict[str, Any]], dict[str, Any]],
) -> str:
    # One thread each: some wait for an end.
    try:
        agent, asked = _agent(worker), _object(text, *keys)
        if "run" in asked:
            ids = await asyncio.to_thread(agent.errands.ids, check_run(asked["run"]))
        else:
            ids = _ids(agent, asked)
        done = await asyncio.gather(*(asyncio.to_thread(do, agent.errands, one, asked) for one in ids))
        for state in done:
            agent.note(state)
        return json.dumps({one: {**state, "turn": agent.turn} for one, state in zip(ids, done, strict=True)})
    except (HostpartError, OSError) as error:
        return _refusal(error)


def _wants(asked: Mapping[str, Any]) -> dict[str, dict[str, int]]:
    wants = asked.get("wants")
    if not isinstance(wants, dict) or len(wants) > _MAX_IDS:
        raise UsageError(f"wants: want an object of {_MAX_IDS} ids at most", _MEND)
    found: dict[str, dict[str, int]] = {}
    for one, offsets in wants.items():
        if not isinstance(offsets, dict) or offsets.keys() - set(CHANNELS):
            raise UsageError(f"wants: want offsets of {', '.join(CHANNELS)} for {check_id(one)}", _MEND)
        for offset in offsets.values():
            if isinstance(offset, bool) or not isinstance(offset, int) or not 0 <= offset < 1 << 62:
                raise UsageError(f"wants: want a number of bytes, got {str(offset)[:40]!r}", _MEND)
        found[check_id(one)] = dict(offsets)
    return found


def _is_new(state: Mapping[str, Any], offsets: Mapping[str, int], first: str) -> bool:
    if state["state"] != first or state["state"] not in LIVE:
        return True
    return any(state["sizes"][channel] > offset for channel, offset in offsets.items())


def _read(
    errands: Errands, found: Mapping[str, dict[str, Any]], wants: Mapping[str, Mapping[str, int]], limit: int
) -> dict[str, Any]:
    answer: dict[str, Any] = {}
    for one, state in found.items():
        told: dict[str, Any] = {"state": state}
        for channel, offset in wants[one].items():
            # Not beyond what the state tells of: a state that is the last one then has all of it.
            room = max(0, min(limit, state["sizes"][channel] - offset))
            at, data = errands.read(one, channel, offset, room) if room else (offset, b"")
            limit -= len(data)
            told[channel] = {"offset": at, "data": base64.b64encode(data).decode()}
        answer[one] = told
    return answer
