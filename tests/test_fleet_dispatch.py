"""The way of requests: nothing is started twice, nothing is lost, whatever hosts, Dask and the network between do.

Schedulers and workers are Dask's own, with the real agent, in this process; what a host runs is recorded, and can be
told to misbehave.
"""

from __future__ import annotations

import asyncio
import base64
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import pytest

pytest.importorskip("distributed")

import dask
from distributed import Client, Scheduler, Worker

from hostpart.errors import DoesNotFit, Failed
from hostpart.fleet import agent, dispatch
from hostpart.fleet.agent import Agent
from hostpart.fleet.cluster import Cluster, quiet
from hostpart.fleet.dispatch import Dispatcher, Outcome, Word
from hostpart.fleet.journal import Journal
from hostpart.fleet.link import Link
from hostpart.fleet.request import Request
from hostpart.fleet.supply import CORE_PCPUS, PCPUS, resources

RUN = "0123456789ab"
CHANNELS = ("events", "stdout", "stderr")
CONFIG: dict[str, object] = {
    "distributed.admin.system-monitor.interval": "1h",
    "distributed.worker.profile.enabled": False,
    "distributed.worker.use-file-locking": False,
    "distributed.worker.http.routes": [],
    "distributed.scheduler.http.routes": [],
    "distributed.scheduler.allowed-failures": 0,
}
FULL = {"exit_code": 3, "problem": "it is full", "remedy": "wait"}


class Host:
    """A host of so many pCPUs; its guests say and do what their command is.

    ``true``; ``sleep S``; ``say TEXT``; ``exit N``. It has the methods of :class:`hostpart.fleet.errand.Errands`.

    :ivar started: the errands that got the word, once for each time that it made a difference
    :ivar docs: what is laid over the state document of each errand, or of all (``""``)
    """

    def __init__(self, name: str, pcpus: int = 2) -> None:
        self.name, self.pcpus = name, pcpus
        self.advertised: int | None = None
        self.states: dict[str, str] = {}
        self.until: dict[str, float] = {}
        self.words: dict[str, list[str]] = {}
        self.said: dict[str, dict[str, bytes]] = {}
        self.docs: dict[str, dict[str, Any]] = {}
        self.started: list[str] = []
        self.stopped: list[str] = []
        self.inline = True
        self.refuses: list[dict[str, Any]] = []
        self.place_s = 0.0
        self._mutex = threading.RLock()

    def begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        one = str(request["id"])
        time.sleep(self.place_s)
        with self._mutex:
            if one in self.states:
                return self.state(one)
            if self.refuses or self._free() < 1:
                error = self.refuses.pop(0) if self.refuses else FULL
                return {**self.state(one), "state": "refused", "error": error}
            words = list(request["argv"])
            self.words[one] = words[words.index("--") + 1 :] if "--" in words else ["true"]
            self.said[one] = dict.fromkeys(CHANNELS, b"")
            self.states[one] = "held"
            return self.state(one)

    def start(self, one: str) -> dict[str, Any]:
        with self._mutex:
            if self.states.get(one) == "held":
                self.started.append(one)
                self.states[one] = "running"
                what, *rest = self.words[one]
                self.until[one] = time.monotonic() + (float(rest[0]) if what == "sleep" else 0.0)
                if what == "say":
                    self.said[one]["stdout"] = rest[0].encode()
            return self.state(one)

    def give_up(self, one: str) -> dict[str, Any]:
        with self._mutex:
            if self.states.get(one) == "held":
                self.states[one] = "given-up"
            return self.state(one)

    def stop(self, one: str, grace_s: float = 5.0) -> dict[str, Any]:
        del grace_s
        self.stopped.append(one)
        with self._mutex:
            if self.states.get(one) == "running":
                self.until[one] = 0.0
            return self.give_up(one)

    def state(self, one: str) -> dict[str, Any]:
        with self._mutex:
            if self.states.get(one) == "running" and time.monotonic() >= self.until[one]:
                self.states[one] = "ended"
            said = self.said.get(one, dict.fromkeys(CHANNELS, b""))
            words = self.words.get(one, ["true"])
            document: dict[str, Any] = {
                "id": one, "state": self.states.get(one, "unknown"), "host": self.name, "vm": None, "vcpus": None,
                "status": None, "error": None, "notes": [], "sizes": {name: len(data) for name, data in said.items()},
            }  # fmt: skip
            if document["state"] == "ended":
                document["status"] = int(words[1]) if words[0] == "exit" else 0
                if self.inline:
                    document["inline"] = {
                        name: data.decode() if name == "events" else base64.b64encode(data).decode()
                        for name, data in said.items()
                    }
            return {**document, **self.docs.get("", {}), **self.docs.get(one, {})}

    def is_over(self, one: str) -> bool:
        return self.state(one)["state"] not in ("placing", "held", "running")

    def ids(self, run: str = "") -> list[str]:
        return [one for one in self.states if one.startswith(f"{run}." if run else "")]

    def read(self, one: str, channel: str, offset: int, limit: int) -> tuple[int, bytes]:
        return offset, self.said[one][channel][offset : offset + limit]

    def ask(self, argv: Sequence[str]) -> tuple[int, str, str]:
        return 2, "", f"no {argv[0]}"

    def _free(self) -> int:
        with self._mutex:
            return self.pcpus - sum(self.state(one)["state"] in ("held", "running") for one in self.states)

    def supply(self) -> dict[str, float]:
        free = self._free() if self.advertised is None else self.advertised
        about = {"cpus": f"0-{free - 1}" if free else "", "pcpus": free, "cores": free, "core_pcpus": free, "llc": free}
        return resources({"free": about})

    def sweep(self) -> None: ...

    def hello(self) -> dict[str, Any]:
        return {
            "protocol": 1, "version": "0.2.0", "hostname": self.name, "machine": f"{hash(self.name) % 16**16:016x}",
            "boot_id": self.name, "domain": self.name, "usable": f"0-{self.pcpus}", "python": "3.11.2", "user": "me",
            "command": ["hostpart"],
        }  # fmt: skip


class Line(Link):
    """The line to the hosts, on which answers can be lost.

    :ivar lose: decides on each answer by the function's name and the address: it is lost where this is true
    :ivar calls: the names of what was called
    """

    lose: Callable[[str, str], bool] = staticmethod(lambda _name, _address: False)

    def __init__(self, cluster: Cluster) -> None:
        super().__init__(cluster)
        self.calls: list[str] = []
        self.deaf = False

    async def call(
        self, function: Callable[..., Any], document: Mapping[str, Any], addresses: Sequence[str], limit_s: float = 30.0
    ) -> dict[str, dict[str, Any]]:
        self.calls.append(function.__name__)
        said = await super().call(function, document, addresses, limit_s)
        return {one: answer for one, answer in said.items() if not self.lose(function.__name__, one)}

    def _take(self, event: tuple[float, Any]) -> None:
        if not self.deaf:
            super()._take(event)


class Ring:
    """A fleet of recorded hosts, and a dispatcher's surroundings."""

    def __init__(self, scheduler: Scheduler, workers: list[Worker], line: Line, hosts: Sequence[Host]) -> None:
        self.scheduler, self.workers, self.line, self.hosts = scheduler, workers, line, hosts
        self.words: list[Word] = []
        self.outcomes: dict[int, Outcome] = {}
        self.many = 0

    def ended(self, outcome: Outcome) -> None:
        self.many += 1
        assert outcome.request.number not in self.outcomes, "it ended twice"
        self.outcomes[outcome.request.number] = outcome

    def dispatcher(self, **more: Any) -> Dispatcher:
        return Dispatcher(self.line, **{"hear": self.words.append, "ended": self.ended, "patience_s": 2.0, **more})

    def heard(self, number: int, channel: str = "stdout") -> bytes:
        return b"".join(word.data for word in self.words if (word.request.number, word.channel) == (number, channel))

    @property
    def started(self) -> list[str]:
        return [one for host in self.hosts for one in host.started]

    @property
    def notes(self) -> list[str]:
        return [word.data for word in self.words if word.channel == "note"]

    def states(self) -> list[str]:
        return [host.state(one)["state"] for host in self.hosts for one in host.states]


@asynccontextmanager
async def ring(*hosts: Host) -> AsyncIterator[Ring]:
    with dask.config.set(CONFIG), quiet():
        scheduler = Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0")
        await scheduler
        workers = []
        try:
            for host in hosts:
                worker = Worker(
                    scheduler.address, nthreads=1, name=host.name, host="127.0.0.1", memory_limit=0, dashboard=False,
                    dashboard_address="127.0.0.1:0",
                )  # fmt: skip
                await Agent(worker, host, host.hello()).begin()  # type: ignore[arg-type]  # it has the same methods
                workers.append(worker)
            await asyncio.gather(*workers)
            async with Client(scheduler.address, asynchronous=True, set_as_default=False) as client:
                yield Ring(scheduler, workers, Line(Cluster(client, scheduler.address, (), False)), hosts)
        finally:
            for worker in workers:
                there = worker.extensions.get("hostpart")
                if isinstance(there, Agent):
                    await there.end()
                await worker.close(timeout=1)
            await scheduler.close()


def within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        await asyncio.wait_for(work, seconds)

    asyncio.run(main())


def request(number: int, *command: str, pcpus: int = 1) -> Request:
    words = command or ("true",)
    return Request(RUN, number, ("run", "--", *words), {PCPUS: float(pcpus), CORE_PCPUS: float(pcpus)})


async def until(there: Callable[[], bool], seconds: float = 5.0) -> None:
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def dispatching(fleet: Ring, **more: Any) -> AsyncIterator[Dispatcher]:
    dispatcher = fleet.dispatcher(**more)
    await dispatcher.hosts()
    try:
        yield dispatcher
    finally:
        await dispatcher.close(0)


async def brought(fleet: Ring, requests: Sequence[Request], **more: Any) -> Dispatcher:
    async with dispatching(fleet, **more) as dispatcher:
        await dispatcher.run(requests)
    return dispatcher


def test_each_of_many_runs_once_and_says_all_that_it_has_to_say() -> None:
    async def work() -> None:
        async with ring(Host("a", 3), Host("b", 2)) as fleet:
            await brought(fleet, [request(number, "say", f"<{number}>") for number in range(60)], wait_s=30.0)
            assert sorted(fleet.started) == sorted(set(fleet.started))
            assert len(fleet.started) == 60
            assert {one.status for one in fleet.outcomes.values()} == {0}
            assert all(fleet.heard(number) == b"<%d>" % number for number in range(60))

    within(30, work())


def test_what_others_have_given_back_is_found_before_a_request_is_refused() -> None:
    async def work() -> None:
        a = Host("a", 1)
        a.advertised = 0
        async with ring(a, Host("b", 0)) as fleet:
            a.advertised = None  # which its agent looks at again in half a minute
            await brought(fleet, [request(0, "true")])
            assert fleet.outcomes[0].state == "ended"

    within(15, work())


@pytest.mark.parametrize("lost", ["the word that it is held", "the answer to the word to start", "both"])
def test_an_answer_that_is_lost_starts_nothing_twice(lost: str) -> None:
    async def work() -> None:
        async with ring(Host("a", 4)) as fleet:
            fleet.line.deaf = lost != "the answer to the word to start"
            fleet.line.lose = lambda name, _: name == "start" and lost != "the word that it is held"
            await brought(fleet, [request(0, "exit", "7"), request(1, "sleep", "0.1")])
            assert sorted(fleet.started) == [f"{RUN}.0.1", f"{RUN}.1.1"]
            assert fleet.outcomes[0].status == 7
            assert fleet.outcomes[1].status == 0

    within(20, work())


def test_one_that_two_hosts_hold_is_started_on_one_of_them() -> None:
    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet, dispatching(fleet) as dispatcher:
            for host in (a, b):
                host.begin({"id": f"{RUN}.0.1", "argv": ["run", "--", "sleep", "0.3"]})
            doing = asyncio.ensure_future(dispatcher.run([request(0, "sleep", "0.3")]))
            for _ in range(20):
                for host, worker in zip(fleet.hosts, fleet.workers, strict=True):
                    worker.log_event(agent.TOPIC, {"state": json.dumps(host.state(f"{RUN}.0.1"))})
                await asyncio.sleep(0.01)
            await doing
            assert fleet.started == [f"{RUN}.0.1"]
            await until(lambda: sorted(fleet.states()) == ["ended", "given-up"])

    within(20, work())


def test_what_dask_does_once_more_when_a_host_is_gone_is_given_back_there() -> None:
    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet, dispatching(fleet) as dispatcher:
            await dispatcher.run([request(0)])
            (task,) = fleet.scheduler.tasks.values()
            (first,) = [number for number, host in enumerate((a, b)) if host.states]
            other = (a, b)[1 - first]
            await fleet.workers[first].close(timeout=1)
            await until(lambda: other.states == {f"{RUN}.0.1": "given-up"}, 10)
            assert fleet.started == [f"{RUN}.0.1"]
            assert fleet.outcomes[0].state == "ended"
            assert task.state in ("memory", "processing")

    within(30, work())


def test_tasks_that_are_over_are_let_go_of_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_DONE", 6)
    monkeypatch.setattr(dispatch, "_DONE_S", 1.0)

    async def work() -> None:
        async with ring(Host("a", 4)) as fleet:
            dispatcher = fleet.dispatcher(wait_s=30.0)
            await dispatcher.hosts()
            for first in range(0, 20, 4):
                await dispatcher.run([request(number) for number in range(first, first + 4)])
                await until(lambda: all(one.state == "memory" for one in fleet.scheduler.tasks.values()))
                assert len(fleet.scheduler.tasks) < 6 + 4
            await until(lambda: not fleet.scheduler.tasks)
            await dispatcher.run([request(20)])
            assert len(fleet.scheduler.tasks) == 1
            await dispatcher.close(0)
            await until(lambda: not fleet.scheduler.tasks)

    within(30, work())


@pytest.mark.parametrize("back", [True, False], ids=["and is back", "for good"])
def test_a_scheduler_that_is_away_is_waited_for(back: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with ring(Host("a")) as fleet:
            real, away = fleet.line.place, [None] * 20

            async def place(*words: Any) -> Any:
                if back and not away:
                    return await real(*words)
                del away[:1]
                return None

            monkeypatch.setattr(fleet.line, "place", place)
            await brought(fleet, [request(0)], attempts=1, patience_s=10.0 if back else 0.5)
            assert fleet.outcomes[0].state == ("ended" if back else "refused")
            assert len(fleet.started) == back

    within(20, work())


def test_a_short_guest_does_not_wait_for_the_news_of_a_quiet_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_POLL_S", 1000.0)
    monkeypatch.setattr(agent, "_MAX_WAIT_S", 1000.0)

    async def work() -> None:
        async with ring(Host("a", 2)) as fleet, dispatching(fleet, wait_s=30.0) as dispatcher:
            doing = asyncio.ensure_future(dispatcher.run([request(0, "sleep", "1000")]))
            await until(lambda: len(fleet.started) == 1)
            await asyncio.sleep(0.3)
            await dispatcher.run([request(number) for number in range(1, 4)])
            assert not doing.done()
            await dispatcher.stop(0)
            await doing

    within(60, work())


def test_what_waits_for_room_longer_than_dask_is_waited_for_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_PLACE_S", 0.3)
    monkeypatch.setattr(dispatch, "_QUEUE_S", 0.3)

    async def work() -> None:
        async with ring(Host("a", 1)) as fleet:
            await brought(
                fleet, [request(number, "sleep", "0.7") for number in range(4)], wait_s=float("inf"), attempts=1
            )
            assert {one.state for one in fleet.outcomes.values()} == {"ended"}
            assert len(fleet.started) == len(set(fleet.started)) == 4

    within(30, work())


def test_a_refusal_for_want_of_room_sends_it_elsewhere_and_another_ends_it() -> None:
    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet:
            a.refuses, b.refuses = [FULL] * 2, [FULL] * 2
            await brought(fleet, [request(0)], wait_s=20.0)
            assert fleet.outcomes[0].state == "ended"
            a.refuses = b.refuses = [{"exit_code": 2, "problem": "x" * 5000, "remedy": "y"}] * 3
            await brought(fleet, [request(1)], wait_s=20.0)
            assert fleet.outcomes[1].state == "refused"
            error = fleet.outcomes[1].error
            assert error is not None
            assert len(error["problem"]) <= 1000

    within(20, work())


LIES: dict[str, dict[str, Any]] = {
    "sizes without end": {"sizes": dict.fromkeys(CHANNELS, 10**30)},
    "sizes that are none": {"sizes": "many"},
    "sizes below nothing": {"sizes": dict.fromkeys(CHANNELS, -5)},
    "a state that is a list": {"state": ["ended"]},
    "no text inline": {"inline": {"events": "\ud800", "stdout": 5, "stderr": "%"}},
    "a status that is none": {"status": 1 << 70},
    "a status that reads as success": {"status": 256},
    "an error that is none": {"error": 7, "notes": 3, "vcpus": "x", "host": ["b"]},
}


@pytest.mark.parametrize("lie", LIES)
def test_a_host_that_lies_hurts_itself_alone(lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_REST_S", 0.5)
    monkeypatch.setattr(dispatch, "_POLL_S", 1.0)

    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet:
            dispatcher = fleet.dispatcher(patience_s=1.0)
            await dispatcher.hosts()
            doing = asyncio.ensure_future(dispatcher.run([request(0, "sleep", "0.2"), request(1, "sleep", "0.2")]))
            await until(lambda: len(fleet.started) == 2)
            a.docs[""] = LIES[lie]
            # One that is told a state which is none waits for another one: it says that it is not over.
            await until(lambda: len(fleet.outcomes) == (1 if "list" in lie else 2), 10)
            theirs = next(one for one in fleet.outcomes.values() if one.host == "b")
            assert (theirs.state, theirs.status) == ("ended", 0)
            mine = [one for one in fleet.outcomes.values() if one.host == "a"]
            assert all(one.status == 0 or "status" in lie or one.state == "lost" for one in mine)
            assert all(one.status in (0, None) for one in mine)
            await dispatcher.close(0)
            doing.cancel()

    within(20, work())


def test_news_that_do_not_follow_on_what_was_heard_are_left_out() -> None:
    async def work() -> None:
        a = Host("a")
        a.inline = False
        async with ring(a) as fleet:
            real = a.read

            def read(one: str, channel: str, offset: int, limit: int) -> tuple[int, bytes]:
                at, data = real(one, channel, offset, min(limit, 10))
                if len(fleet.words) == 2 and not jumps:
                    jumps.append(at)
                    return 0, data
                return at, data

            jumps: list[int] = []
            a.read = read  # type: ignore[method-assign]
            await brought(fleet, [request(0, "say", "".join(map(str, range(30))))])
            assert jumps
            assert fleet.heard(0) == "".join(map(str, range(30))).encode()

    within(20, work())


def test_a_guest_that_never_stops_talking_leaves_room_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_REST_S", 0.3)
    monkeypatch.setattr(dispatch, "_PIECE", 1000)

    async def work() -> None:
        a = Host("a", 3)
        a.inline = False
        async with ring(a) as fleet:
            read, flood = a.read, f"{RUN}.0.1"
            a.docs[flood] = {"sizes": {"events": 0, "stdout": 1 << 40, "stderr": 0}}
            a.read = lambda one, channel, offset, limit: (  # type: ignore[method-assign]
                (offset, b"x" * limit) if one == flood else read(one, channel, offset, limit)
            )
            dispatcher = fleet.dispatcher()
            await dispatcher.hosts()
            doing = asyncio.ensure_future(dispatcher.run([request(0, "sleep", "60")]))
            await until(lambda: len(fleet.heard(0)) > 2000)
            await dispatcher.run([request(1, "say", "hello" * 500), request(2, "say", "hello" * 500)])
            assert fleet.heard(1) == fleet.heard(2) == b"hello" * 500
            assert not fleet.notes
            await dispatcher.close(0)
            doing.cancel()

    within(20, work())


def test_one_host_that_does_not_answer_keeps_no_other_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    from hostpart.fleet import link

    monkeypatch.setattr(link, "_APART_S", 0.5)
    monkeypatch.setattr(dispatch, "_START_S", 0.5)

    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet:
            gate = threading.Event()
            dispatcher = fleet.dispatcher(patience_s=20.0)
            await dispatcher.hosts()
            a.start = lambda one: (gate.wait(), Host.start(a, one))[1]  # type: ignore[method-assign]
            doing = asyncio.ensure_future(dispatcher.run([request(0), request(1)]))
            await until(lambda: len(fleet.outcomes) == 1, 5)
            assert next(iter(fleet.outcomes.values())).host == "b"
            gate.set()
            await doing
            assert len(fleet.started) == 2
            await dispatcher.close(0)

    within(20, work())


def test_what_is_wrong_while_a_request_is_on_its_way_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        async with ring(Host("a", 200)) as fleet:

            def broken(*_: object) -> None:
                raise BrokenPipeError

            dispatcher = fleet.dispatcher(hear=broken, wait_s=30.0)
            await dispatcher.hosts()
            with pytest.raises(BrokenPipeError):
                await dispatcher.run([request(number, "say", "x") for number in range(50)])
            await dispatcher.close(0)
            other = fleet.dispatcher(wait_s=30.0)
            await other.hosts()
            monkeypatch.setattr(fleet.line, "place", broken)
            with pytest.raises(BrokenPipeError):
                await other.run([request(number) for number in range(100, 200)])
            await other.close(0)

    within(20, work())


@pytest.mark.parametrize("when", ["queued", "held", "starting", "running"])
def test_a_stop_at_any_time_leaves_nothing_held_and_nothing_running(when: str) -> None:
    async def work() -> None:
        a = Host("a", 1)
        async with ring(a) as fleet:
            a.place_s = 0.5 if when == "held" else 0.0
            a.advertised = 4 if when == "queued" else None
            dispatcher = fleet.dispatcher(wait_s=float("inf"))
            await dispatcher.hosts()
            if when == "starting":
                start = Host.start

                def late(one: str) -> dict[str, Any]:
                    state = start(a, one)
                    time.sleep(0.4)
                    return state

                a.start = late  # type: ignore[method-assign]
            doing = asyncio.ensure_future(dispatcher.run([request(number, "sleep", "60") for number in range(40)]))
            if when == "held":
                await asyncio.sleep(0.25)
            else:
                await until(lambda: bool(fleet.started))
            await asyncio.sleep(0.0 if when == "starting" else 0.2)
            began = time.monotonic()
            await dispatcher.stop(0.0)
            await asyncio.wait_for(doing, 5)
            assert time.monotonic() - began < 3
            await asyncio.sleep(0.6)
            assert not {"held", "running"} & set(fleet.states())
            assert len(fleet.started) <= 1
            await dispatcher.close(0)

    within(20, work())


def test_a_gang_is_started_on_hosts_of_their_own_or_not_at_all() -> None:
    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet:
            dispatcher = fleet.dispatcher()
            await dispatcher.hosts()
            await dispatcher.gang([request(0), request(1)])
            assert sorted(map(len, (a.started, b.started))) == [1, 1]
            with pytest.raises(DoesNotFit):
                await dispatcher.gang([request(number) for number in (2, 3, 4)])
            assert len(fleet.started) == len(fleet.states()) == 2
            a.advertised = b.advertised = 2
            a.pcpus = 0
            with pytest.raises(DoesNotFit):
                await dispatcher.gang([request(number) for number in (7, 8)])
            assert len(fleet.started) == 2
            assert "held" not in fleet.states()
            a.refuses = b.refuses = [{"exit_code": 2, "problem": "no such option", "remedy": "leave it out"}] * 9
            waits = fleet.dispatcher(wait_s=float("inf"))
            await waits.hosts()
            with pytest.raises(Failed, match="no such option"):
                await waits.gang([request(number) for number in (5, 6)])
            await dispatcher.close(0)
            await waits.close(0)

    within(20, work())


def test_two_gangs_that_want_the_same_hosts_both_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_QUEUE_S", 0.5)

    async def work() -> None:
        async with (
            ring(Host("a", 1), Host("b", 1)) as fleet,
            Client(fleet.scheduler.address, asynchronous=True, set_as_default=False) as other,
        ):
            lines = fleet.line, Line(Cluster(other, fleet.scheduler.address, (), False))
            gangs = []
            for number, line in enumerate(lines):
                dispatcher = Dispatcher(line, wait_s=float("inf"), ended=fleet.ended)
                await dispatcher.hosts()
                members = [request(10 * number + rank, "sleep", "0.2") for rank in range(2)]
                gangs.append(dispatcher.gang(members))
            await asyncio.gather(*gangs)
            assert len(fleet.started) == len(set(fleet.started)) == 4

    within(30, work())


def test_what_another_call_has_begun_is_followed_and_what_it_held_is_started() -> None:
    async def work() -> None:
        a = Host("a")
        async with ring(a) as fleet:
            a.begin({"id": f"{RUN}.0.1", "argv": ["run", "--", "say", "hello"]})
            a.states["..."] = a.states[f"{RUN}.x.1"] = a.states[f"{RUN}.1_0.1"] = "given-up"
            a.states[f"{RUN}.0.999999999"] = "given-up"
            a.states[f"{RUN}.5.1"] = "placing"
            a.words[f"{RUN}.5.1"], a.said[f"{RUN}.5.1"] = ["true"], dict.fromkeys(CHANNELS, b"")
            dispatcher = fleet.dispatcher()
            await dispatcher.hosts()
            found = await dispatcher.find(RUN)
            assert {number: len(known) for number, known in found.items()} == {0: 1, 5: 1}
            asyncio.get_running_loop().call_later(0.5, a.states.update, {f"{RUN}.5.1": "held"})
            await asyncio.gather(*(dispatcher.adopt(request(number), known, 0) for number, (known,) in found.items()))
            assert sorted(a.started) == [f"{RUN}.0.1", f"{RUN}.5.1"]
            assert fleet.heard(0) == b"hello"
            await dispatcher.close(0)

    within(20, work())


def test_a_host_that_is_gone_is_waited_for_and_then_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_POLL_S", 0.5)
    monkeypatch.setattr(dispatch, "_LATE_S", 1.0)

    async def work() -> None:
        a, b = Host("a"), Host("b")
        async with ring(a, b) as fleet, dispatching(fleet, patience_s=1.0) as dispatcher:
            doing = asyncio.ensure_future(dispatcher.run([request(0, "sleep", "1"), request(1, "sleep", "1")]))
            await until(lambda: len(fleet.started) == 2)
            await fleet.workers[0].close(timeout=1)
            await doing
            states = {one.host: one.state for one in fleet.outcomes.values()}
            assert states == {"a": "lost", "b": "ended"}
            assert any("host a does not answer" in note for note in fleet.notes)

    within(20, work())


def test_a_journal_that_cannot_be_written_ends_the_call(tmp_path: Any) -> None:
    async def work() -> None:
        async with ring(Host("a")) as fleet:
            journal = Journal(str(tmp_path / "out"), {"schema": 1, "kind": "run", "run": RUN})

            def full(*_: object, **__: object) -> None:
                raise Failed("the disk is full", "make room")

            journal.decision = full  # type: ignore[method-assign]
            dispatcher = fleet.dispatcher(journal=journal)
            await dispatcher.hosts()
            with pytest.raises(Failed, match="full"):
                await dispatcher.run([request(0)])
            assert not fleet.started
            await dispatcher.close(0)
            journal.close()

    within(20, work())


def test_a_host_that_was_not_asked_has_no_say() -> None:
    async def test() -> None:
        one, other = Host("one"), Host("other")
        async with ring(one, other) as fleet:
            one.place_s = 1.0
            lie = {"id": f"{RUN}.0.1", "state": "refused", "error": {"exit_code": 1, "problem": "a lie", "remedy": "-"}}
            work = asyncio.create_task(_alone(fleet, on="one"))
            await asyncio.sleep(0.5)
            fleet.workers[1].log_event(agent.TOPIC, {"state": json.dumps(lie), "worker": fleet.workers[0].address})
            await work
            assert fleet.outcomes[0].state == "ended"
            assert fleet.outcomes[0].host == "one"
            assert one.started == [f"{RUN}.0.1"]

    within(20, test())


async def _alone(fleet: Ring, on: str) -> None:
    async with dispatching(fleet) as dispatcher:
        await dispatcher.begin(request(0), on)
