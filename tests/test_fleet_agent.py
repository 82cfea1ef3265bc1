"""A host of a fleet in a real Dask worker, with a real scheduler and real guests."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from hostpart.fleet import agent, identity, supply
from tests.conftest import Place, wait_until

distributed = pytest.importorskip("distributed")

RUN = "0123456789ab"
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two usable pCPUs")
FREE = len(os.sched_getaffinity(0)) - 1  # one is kept for the service VM
WORKER = "import sys; from dask.__main__ import main; sys.exit(main())"


def request(number: int, *words: str, **more: Any) -> dict[str, Any]:
    """Return a request to run *words* on one pCPU."""
    return {"schema": 1, "id": f"{RUN}.{number}", "argv": ["run", "--", *words], "hold": "vm", **more}


@pytest.fixture
def home(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A place whose leases and errands the worker in this process has too."""
    place.env["HOSTPART_FLEET_DIR"] = str(tmp_path / "fleet")
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    logging.getLogger("distributed").setLevel(logging.ERROR)
    yield place
    for process in place.started:
        process.kill()
        process.wait()
    # The shims go on without their worker, as they are to.
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in place.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if wait_until(lambda: not place.processes(), 10):
            break


class Fleet:
    """A scheduler, its client, and what a client of hostpart's asks."""

    def __init__(self, scheduler: Any, client: Any) -> None:
        self.scheduler, self.client = scheduler, client
        self.made: list[Any] = []

    @property
    def workers(self) -> list[str]:
        return list(self.scheduler.workers)

    def resources(self, address: str = "") -> dict[str, float]:
        return dict(self.scheduler.workers[address or self.workers[0]].resources)

    def has(self, pcpus: int) -> Callable[[], Awaitable[bool]]:
        async def there() -> bool:
            return self.resources()[supply.PCPUS] == pcpus

        return there

    def submit(self, asked: dict[str, Any] | str, need: float = 1.0) -> Any:
        text = asked if isinstance(asked, str) else json.dumps(asked)
        return self.client.submit(agent.place, text, resources={supply.PCPUS: need}, pure=False)

    async def place(self, asked: dict[str, Any] | str, need: float = 1.0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(await asyncio.wait_for(self.submit(asked, need), 60))
        return found

    async def call(self, function: Callable[..., Any], document: object, address: str = "") -> dict[str, Any]:
        address = address or self.workers[0]
        text = document if isinstance(document, str) else json.dumps(document)
        said = await self.client.run(function, text, workers=[address], on_error="return")
        assert isinstance(said[address], str), said
        found: dict[str, Any] = json.loads(said[address])
        return found

    async def state(self, number: int, address: str = "") -> str:
        one = f"{RUN}.{number}"
        return str((await self.call(agent.states, {"ids": [one]}, address))[one]["state"])


async def until(what: Callable[[], Awaitable[bool]], timeout: float = 15.0) -> bool:
    end = time.monotonic() + timeout
    while not await what():
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.05)
    return True


def with_fleet(test: Callable[[Fleet], Awaitable[None]], workers: int = 1) -> None:
    """Run *test* with a scheduler and workers in this process."""

    async def whole() -> None:
        async with AsyncExitStack() as stack:
            fleet = Fleet(*await _connected(stack))
            for _ in range(workers):
                worker = distributed.Worker(
                    fleet.scheduler.address, nthreads=1, preload=["hostpart.fleet.agent"], dashboard=False
                )
                fleet.made.append(await stack.enter_async_context(worker))
            await asyncio.wait_for(test(fleet), 120)

    asyncio.run(whole())


async def _connected(stack: AsyncExitStack) -> tuple[Any, Any]:
    scheduler = distributed.Scheduler(host="127.0.0.1", port=0, dashboard=False, dashboard_address="127.0.0.1:0")
    await stack.enter_async_context(scheduler)
    return scheduler, await stack.enter_async_context(distributed.Client(scheduler.address, asynchronous=True))


def offsets(number: int, **had: int) -> dict[str, dict[str, int]]:
    return {f"{RUN}.{number}": {"events": 0, "stdout": 0, "stderr": 0, **had}}


@pytest.mark.usefixtures("home")
def test_the_worker_comes_with_its_name_and_what_is_free() -> None:
    async def test(fleet: Fleet) -> None:
        told = fleet.scheduler.workers[fleet.workers[0]].identity()
        assert told["resources"][supply.PCPUS] == FREE
        assert set(told["resources"]) == set(supply.NOTHING)
        hello = told["hostpart"]
        assert (hello["protocol"], hello["hostname"]) == (1, os.uname().nodename)
        assert hello["domain"] == os.environ["HOSTPART_LEASE_DIR"]
        assert len(hello["machine"]) == 16
        assert told["metrics"]["hostpart"] == {"errands": 0}
        facts = await fleet.call(agent.facts, {})
        assert facts["hello"] == {**hello, "command": list(hello["command"])}
        assert facts["facts"]["hostname"] == os.uname().nodename
        assert abs(facts["time"] - time.time()) < 10

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_a_request_is_held_started_and_followed_to_its_end() -> None:
    async def test(fleet: Fleet) -> None:
        words: list[tuple[str, dict[str, Any]]] = []
        fleet.client.subscribe_topic(
            agent.TOPIC, lambda event: words.append((event[1]["worker"], json.loads(event[1]["state"])))
        )
        held = await fleet.place(request(0, "sh", "-c", "echo out; sleep 0.3; exit 7"))
        assert held["state"] == "held"
        # Whoever asked knows at once what is left, and the scheduler soon.
        assert held["free"][supply.PCPUS] == FREE - 1
        assert await until(fleet.has(FREE - 1), 5)
        assert await fleet.state(0) == "held"
        started = await fleet.call(agent.start, {"by": {fleet.workers[0]: [f"{RUN}.0"], "tcp://other:1": ["x.1"]}})
        assert list(started) == [f"{RUN}.0"]
        had, out, state = {"events": 0, "stdout": 0, "stderr": 0}, b"", ""
        while state != "ended":
            news = await fleet.call(agent.news, {"wants": offsets(0, **had), "wait_s": 10, "limit": 1 << 18})
            found = news[f"{RUN}.0"]
            state = found["state"]["state"]
            for channel in had:
                data = base64.b64decode(found[channel]["data"])
                assert found[channel]["offset"] == had[channel]
                had[channel] += len(data)
                out += data if channel == "stdout" else b""
        assert out == b"out\n"
        assert found["state"]["status"] == 7
        assert had == found["state"]["sizes"]
        assert await until(fleet.has(FREE), 5)
        assert [(address, word["id"], word["state"]) for address, word in words] == [
            (fleet.workers[0], f"{RUN}.0", "held")
        ]

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_of_a_short_guest_the_scheduler_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(fleet: Fleet) -> None:
        told: list[dict[str, float]] = []
        tell = fleet.made[0].set_resources

        async def note(**resources: float) -> None:
            told.append(resources)
            await tell(**resources)

        monkeypatch.setattr(fleet.made[0], "set_resources", note)
        monkeypatch.setattr(agent, "_LESS_S", 4.0)
        await fleet.place(request(0, "true"))
        await fleet.call(agent.start, {"ids": [f"{RUN}.0"]})

        async def ended() -> bool:
            return await fleet.state(0) == "ended"

        assert await until(ended)
        await fleet.place(request(1, "true"))
        # What is held for longer is told of, and so is what is given back.
        await asyncio.sleep(5.0)
        assert [resources[supply.PCPUS] for resources in told] == [FREE - 1]
        await fleet.call(agent.give_up, {"ids": [f"{RUN}.1"]})
        assert await until(fleet.has(FREE), 5)

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_what_no_host_can_take_waits_for_one_that_can_again() -> None:
    async def test(fleet: Fleet) -> None:
        for number in range(FREE):
            assert (await fleet.place(request(number, "sleep", "60")))["state"] == "held"
        assert await until(fleet.has(0), 5)
        waiting = fleet.submit(request(99, "true"))
        await asyncio.sleep(0.3)
        assert waiting.status == "pending"
        await fleet.call(agent.give_up, {"ids": [f"{RUN}.0"]})
        assert json.loads(await asyncio.wait_for(waiting, 10))["state"] == "held"

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_a_host_that_is_full_says_so_at_once_and_keeps_nobody_waiting() -> None:
    async def test(fleet: Fleet) -> None:
        asked = [request(number, "sleep", "60") for number in range(FREE + 2)]
        # Sent together: the scheduler sees all as fitting.
        found = await asyncio.gather(*(fleet.place(one) for one in asked[: FREE + 1]), return_exceptions=True)
        states = [one["state"] if isinstance(one, dict) else repr(one) for one in found]
        assert states.count("held") == FREE
        (refused,) = (one for one in found if isinstance(one, dict) and one["state"] == "refused")
        assert refused["error"]["exit_code"] == 3

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_two_workers_on_one_directory_answer_for_the_same_and_start_it_once(tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        assert (await fleet.place(request(0, "sh", "-c", f"touch {tmp_path}/ran.$$; sleep 0.2")))["state"] == "held"
        one, other = fleet.workers
        assert [await fleet.state(0, one), await fleet.state(0, other)] == ["held", "held"]
        asked = {"ids": [f"{RUN}.0"]}
        await asyncio.gather(*(fleet.call(agent.start, asked, address) for address in (one, other) * 4))

        async def ended() -> bool:
            return await fleet.state(0, other) == "ended"

        assert await until(ended)
        assert len(list(tmp_path.glob("ran.*"))) == 1

    with_fleet(test, 2)


@pytest.mark.usefixtures("home")
def test_a_task_that_dask_runs_again_places_nothing_new() -> None:
    async def test(fleet: Fleet) -> None:
        first = await fleet.place(request(0, "sleep", "60"))
        again = await fleet.place(request(0, "sleep", "60"), 0.0)
        assert again["state"] == "held"
        assert again["vcpus"] == first["vcpus"]

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_news_wait_without_work_and_come_with_the_first_byte() -> None:
    async def test(fleet: Fleet) -> None:
        held = await fleet.place(request(0, "sh", "-c", "sleep 1; echo late; sleep 60"))
        await fleet.call(agent.start, {"ids": [f"{RUN}.0"]})
        known = held["sizes"]
        begun, spent = time.monotonic(), time.process_time()
        news = await fleet.call(agent.news, {"wants": offsets(0, **known), "wait_s": 10})
        assert 0.3 < time.monotonic() - begun < 3
        assert time.process_time() - spent < 0.5
        assert base64.b64decode(news[f"{RUN}.0"]["stdout"]["data"]) == b"late\n"
        known = news[f"{RUN}.0"]["state"]["sizes"]
        begun = time.monotonic()
        news = await fleet.call(agent.news, {"wants": offsets(0, **known), "wait_s": 0.5})
        assert 0.4 < time.monotonic() - begun < 3
        assert news[f"{RUN}.0"]["state"]["state"] == "running"
        limited = await fleet.call(agent.news, {"wants": offsets(0), "wait_s": 0, "limit": 10})
        assert sum(len(base64.b64decode(limited[f"{RUN}.0"][name]["data"])) for name in known) == 10
        stopped = await fleet.call(agent.stop, {"ids": [f"{RUN}.0"], "grace_s": 5})
        assert stopped[f"{RUN}.0"]["status"] == 143

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_beside_an_experiment_nothing_is_offered_and_its_host_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(fleet: Fleet) -> None:
        asked = {
            "schema": 1, "id": f"{RUN}.0", "argv": ["experiment", "example:null"], "hold": "start",
            "kind": "experiment",
        }  # fmt: skip
        assert (await fleet.place(asked))["state"] == "held"
        assert await until(fleet.has(0), 5)
        assert fleet.resources() == dict(supply.NOTHING)
        calls: list[object] = []

        def note(_errands: object, argv: object) -> tuple[int, str, str]:
            calls.append(argv)
            return 0, "{}", ""

        with monkeypatch.context() as patch:
            patch.setattr("hostpart.fleet.errand.Errands.ask", note)
            await fleet.made[0].extensions["hostpart"].refresh()
        assert calls == []
        refused = await fleet.place(request(1, "true"), 0.0)
        assert (refused["state"], refused["error"]["exit_code"]) == ("refused", 3)

    with_fleet(test)


BAD: dict[str, tuple[Callable[..., Any], object]] = {
    "no JSON": (agent.states, "{"),
    "no object": (agent.states, "[]"),
    "deep": (agent.states, "[" * 100_000),
    "no ids": (agent.states, {}),
    "an id that is a path": (agent.start, {"ids": ["../../etc"]}),
    "a number for an id": (agent.give_up, {"ids": [1]}),
    "a key of tomorrow": (agent.start, {"ids": [], "force": True}),
    "by is a list": (agent.start, {"by": []}),
    "a run that is none": (agent.states, {"run": "*"}),
    "a grace time of ages": (agent.stop, {"ids": [f"{RUN}.0"], "grace_s": "5"}),
    "a grace time of no number": (agent.stop, {"ids": [f"{RUN}.0"], "grace_s": -1}),
    "another channel": (agent.news, {"wants": {f"{RUN}.0": {"request.json": 0}}}),
    "a negative offset": (agent.news, {"wants": {f"{RUN}.0": {"events": -1}}}),
    "an offset of no number": (agent.news, {"wants": {f"{RUN}.0": {"events": 1.5}}}),
    "a wait of no number": (agent.news, {"wants": {}, "wait_s": "x"}),
    "news of a path": (agent.news, {"wants": {"../x": {}}}),
    "no wants": (agent.news, {}),
    "a command that runs": (agent.ask, {"argv": ["run", "--", "true"]}),
    "a text of a command": (agent.ask, {"argv": "topology"}),
    "facts of no JSON": (agent.facts, "x"),
}


@pytest.mark.usefixtures("home")
def test_what_is_not_right_is_an_error_in_the_answer() -> None:
    async def test(fleet: Fleet) -> None:
        for what, (function, document) in BAD.items():
            answer = await fleet.call(function, document)
            assert list(answer) == ["error"], what
            assert answer["error"]["exit_code"] == 2, what
        for text in ("{", "[]", "1"):
            assert (await fleet.place(text))["error"]["exit_code"] == 2
        refused = await fleet.place({**request(0, "true"), "id": "../../etc"})
        assert (refused["state"], refused["error"]["exit_code"]) == ("refused", 2)
        assert os.listdir(os.environ["HOSTPART_FLEET_DIR"]) == [".lock"] or not os.listdir(
            os.environ["HOSTPART_FLEET_DIR"]
        )

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_an_endless_wait_is_cut_short_and_infinity_is_no_size() -> None:
    async def test(fleet: Fleet) -> None:
        for number in ("Infinity", "NaN", "1e999"):
            answer = await fleet.call(agent.news, f'{{"wants": {{}}, "wait_s": 0, "limit": {number}}}')
            assert "error" in answer or answer == {}

    with_fleet(test)


@pytest.mark.usefixtures("home")
def test_a_question_is_hostparts_own_answer() -> None:
    async def test(fleet: Fleet) -> None:
        said = await fleet.call(agent.ask, {"argv": ["topology", "--json"]})
        assert said["status"] == 0
        assert json.loads(said["stdout"])["free"]["pcpus"] == FREE
        said = await fleet.call(agent.ask, {"argv": ["plan", "-n", "8192"]})
        assert said["status"] == 3
        assert "8192 pCPUs wanted" in said["stderr"]

    with_fleet(test)


# -- workers of their own ------------------------------------------------------------------------------------


def _start_worker(home: Place, address: str, *before: str) -> subprocess.Popen[str]:
    command = [
        *before, sys.executable, "-c", WORKER, "worker", address, "--nthreads", "1", "--no-nanny", "--no-dashboard",
        "--host", "127.0.0.1", "--preload", "hostpart.fleet.agent",
    ]  # fmt: skip
    process = subprocess.Popen(
        command, env=home.env, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, text=True
    )
    home.started.append(process)
    return process


def with_scheduler(test: Callable[[Fleet], Awaitable[None]]) -> None:
    """Run *test* with a scheduler in this process, and no worker yet."""
    with_fleet(test, 0)


async def _there(fleet: Fleet, count: int) -> bool:
    async def there() -> bool:
        return len(fleet.workers) == count

    return await until(there, 30)


def test_a_worker_that_comes_after_a_killed_one_answers_for_its_errands(home: Place, tmp_path: Path) -> None:
    async def test(fleet: Fleet) -> None:
        first = _start_worker(home, fleet.scheduler.address)
        assert await _there(fleet, 1)
        assert (await fleet.place(request(0, "sh", "-c", f"touch {tmp_path}/ran.$$; exit 5")))["state"] == "held"
        first.kill()
        first.wait()
        assert await _there(fleet, 0)
        _start_worker(home, fleet.scheduler.address)
        assert await _there(fleet, 1)
        assert fleet.resources()[supply.PCPUS] == FREE - 1
        assert fleet.scheduler.workers[fleet.workers[0]].identity()["metrics"]["hostpart"] == {"errands": 1}
        assert await fleet.call(agent.states, {"run": RUN}) != {}
        await fleet.call(agent.start, {"ids": [f"{RUN}.0"]})

        async def ended() -> bool:
            return await fleet.state(0) == "ended"

        assert await until(ended)
        assert (await fleet.call(agent.states, {"run": RUN}))[f"{RUN}.0"]["status"] == 5
        assert len(list(tmp_path.glob("ran.*"))) == 1

    with_scheduler(test)


def test_a_worker_offers_only_what_it_may_use(home: Place) -> None:
    async def test(fleet: Fleet) -> None:
        usable = sorted(os.sched_getaffinity(0))
        _start_worker(home, fleet.scheduler.address, "taskset", "-c", f"{usable[-1]}")
        assert await _there(fleet, 1)
        assert fleet.scheduler.workers[fleet.workers[0]].identity()["hostpart"]["usable"] == str(usable[-1])
        assert fleet.resources() == dict(supply.NOTHING)  # its one pCPU is kept for the service VM
        refused = await fleet.place(request(0, "true"), 0.0)
        assert (refused["state"], refused["error"]["exit_code"]) == ("refused", 3)

    with_scheduler(test)


def test_a_worker_whose_directory_is_anothers_is_no_host(home: Place, tmp_path: Path) -> None:
    (tmp_path / "fleet").mkdir(mode=0o755)

    async def test(fleet: Fleet) -> None:
        process = _start_worker(home, fleet.scheduler.address)
        await asyncio.sleep(3)
        hellos = [worker.identity().get("hostpart") for worker in fleet.scheduler.workers.values()]
        assert process.poll() is not None or hellos == [None]

    with_scheduler(test)


# -- identity ------------------------------------------------------------------------------------------------


def test_two_with_one_lease_directory_are_of_one_domain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSTPART_LEASE_DIR", raising=False)
    assert identity.domain() == f"sysfs:{os.stat('/proc/self/ns/net').st_ino}"
    monkeypatch.setenv("HOSTPART_LEASE_DIR", "/somewhere")
    assert identity.domain() == "/somewhere"


def test_the_machine_id_itself_is_not_told() -> None:
    told = json.dumps(identity.identity())
    try:
        own = Path("/etc/machine-id").read_text().strip()
    except OSError:
        pytest.skip("needs /etc/machine-id")
    assert not own or own[:16] not in told


def test_hostpart_is_called_by_the_words_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTPART_COMMAND", "sudo -n '/opt/my hostpart'")
    assert identity.command() == ["sudo", "-n", "/opt/my hostpart"]
    monkeypatch.delenv("HOSTPART_COMMAND")
    assert identity.command()[1:] == ["-P", "-m", "hostpart"]
