"""The way of requests to hosts and back: placed, held, started once, followed to their end.

A request is placed by a Dask task: Dask chooses among the hosts that have room, the host's allocator chooses the pCPUs,
and the VM is held before its guest's first instruction. Dask may do that twice, as when a worker dies. So the word to
start is given here, for one placement of a request and never for a second one; what is held elsewhere and gets no
word is given up by its host. Once started, a guest needs neither Dask nor this process.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import secrets
import time
from collections import defaultdict

from ..cpuset import CpuSet
from ..errors import DoesNotFit, Failed
from ..experiment.intake import finite
from ..value import Value
from . import agent
from .link import Parcel
from .order import object_of
from .request import Request, number_of
from .resumption import Known
from .roster import choose, resources
from .supply import CORE_PCPUS, PCPUS
from .vacancy import Vacancy

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from typing import Any

    from .journal import Journal
    from .link import Link, Placing
    from .roster import FleetHost, Roster

__all__ = ["CHANNELS", "OVER", "Dispatcher", "Outcome", "Word"]

CHANNELS = ("events", "stdout", "stderr")
OVER = ("ended", "refused", "given-up", "lost")  # states of an errand that nothing follows
# Requests that are being placed at the same time: however few hosts there are, and however many. More would only wait,
# in Dask's queues and held, for what one scheduler brings about in a second.
_LEAST, _MOST_PLACED = 32, 256
_MOST = 10**8  # attempts
_ANEW_S = 2.0  # between two times that hosts are asked to look at what is free
_ASKED = 256  # of them, then
# Tasks that are over are let go of together, at so many and after so long: alone each costs a message to its host.
_DONE, _DONE_S = 4096, 10.0
_BATCH = 100  # requests that are brought to Dask in one message
_SHORTLIST = 8  # hosts at most that Dask is to choose among; fewer where much is on its way
_STARTED = 32  # requests that are started in one message, which every one of their hosts reads
# For more to come before a message is sent: the least, for each that is on its way, and the most.
_GATHER_S, _GATHER_EACH_S, _GATHER_MOST_S = 0.005, 2e-4, 0.05
_CHECK_S = 0.25  # between two looks at what Dask says of the placing
_PLACE_S = 90.0  # for a placement: the host itself gives up sooner
_QUEUE_S = 5.0  # for one that does not wait for room, to get to a host: what is known to be free may be so no more
_START_S = 10.0  # for a host to answer to the word: it only passes it on
_POLL_S = 10.0  # that a host may take to answer that there is nothing new
_LATE_S = 20.0  # beyond that, until it counts as one that does not answer
_REST_S = 10.0  # for a host to give what it says that an errand which is over has said
_PAUSE_S = 0.25  # between two answers that came at once and brought nothing
_POLLED = 256  # errands that a host is asked about in one message
_LINE = 1 << 25  # of an errand's events
_PIECE = 1 << 20
_PASSING = ("inline", "free", "turn")  # what is not kept of a state
_SHOWN = 1000  # characters of an error's text from a host
# Why no host has a request, where none says that it does.
_UNSENT, _WAITING, _SILENT, _STOPPED = "unsent", "waiting", "silent", "stopped"


class Word(Value):
    """Something that a request has said, as it comes.

    :ivar host: where it runs
    :ivar channel: ``stdout`` or ``stderr`` of the guest, with bytes; ``event`` with a document of its hostpart;
        ``note`` with a sentence of the dispatcher
    """

    request: Request
    host: str
    channel: str
    data: Any


class Outcome(Value):
    """How a request ended.

    :ivar state: ``ended``: its guest ran to its end; ``refused``: it ran nowhere, *error* says why; ``lost``: it was
        started, and what became of it is not known; ``given-up``: it was taken back before it ran
    :ivar host: where; empty if nowhere
    :ivar status: a shell's exit code
    :ivar error: as errors have it: exit code, problem, remedy
    """

    request: Request
    state: str
    host: str = ""
    status: int | None = None
    error: Mapping[str, Any] | None = None


class _Job:
    # One request on its way.

    def __init__(self, request: Request, attempt: int = 0, offset: int = 0) -> None:
        self.request, self.attempt = request, attempt
        self.kept = offset  # up to where its events were kept by an earlier call
        self.host = ""
        self.state: dict[str, Any] = {}
        self.offsets = dict.fromkeys(CHANNELS, 0)
        self.rest = b""
        self.answer: asyncio.Future[dict[str, Any] | str] | None = None
        self.placing: Placing | None = None
        self.hosts: tuple[str, ...] = ()  # one of which gets it
        self.asked, self.limit_s = 0.0, _PLACE_S
        self.look_at = 0.0  # when to look for who has it, where nobody has said so
        self.looking = False
        self.polled = False
        self.heard = 0  # bytes in the last answer
        self.silent: float | None = None  # since when its host has not answered for it
        self.stuck: float | None = None  # since when it is over, and not all of it has come
        self.told = False  # its host, that it is to end
        self.over = asyncio.Event()

    @property
    def id(self) -> str:
        return self.request.id(self.attempt)

    @property
    def is_over(self) -> bool:
        return self.state.get("state") in OVER

    @property
    def read(self) -> bool:
        # Whether all that it has said was heard.
        sizes = self.state.get("sizes")
        return not isinstance(sizes, dict) or all(self.offsets[one] >= _count(sizes.get(one)) for one in CHANNELS)


class Dispatcher:
    """See the module.

    :param link: the line to the hosts
    :param journal: where to keep what happens; None: nowhere
    :param names: only these hosts; empty: all
    :param attempts: how often a request goes elsewhere, since a host was full when it came there
    :param wait_s: how long a request waits for room
    :param patience_s: how long a host that does not answer is waited for
    :param hear: called with each word as it comes
    :param ended: called with each outcome
    """

    def __init__(
        self,
        link: Link,
        *,
        journal: Journal | None = None,
        names: Sequence[str] = (),
        attempts: int = 3,
        wait_s: float = 0.0,
        patience_s: float = 60.0,
        hear: Callable[[Word], None] = lambda _: None,
        ended: Callable[[Outcome], None] = lambda _: None,
    ) -> None:
        self._link, self._journal = link, journal
        link.listen(self._word)
        self._names, self._attempts, self._wait_s, self._patience_s = tuple(names), attempts, wait_s, patience_s
        self._hear, self._ended = hear, ended
        self._hosts: dict[str, FleetHost] = {}
        self._names_at: dict[str, str] = {}
        self._vacancy = Vacancy()
        self._looked = float("-inf")
        self._looking = asyncio.Lock()
        self._jobs: dict[str, _Job] = {}  # by the errand's name: those being placed
        self._to_place: dict[tuple[tuple[tuple[str, float], ...], frozenset[str]], list[_Job]] = defaultdict(list)
        self._to_start: list[_Job] = []
        self._flushing: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._checking: asyncio.Task[None] | None = None
        self._done: dict[str, tuple[str, float, Placing]] = {}  # by the errand's name: who has it, since when
        self._letting_go: asyncio.TimerHandle | None = None
        self._followed: dict[str, dict[str, _Job]] = defaultdict(dict)
        self._known: set[str] = set()
        self._learning: set[asyncio.Task[None]] = set()
        self._unheard: set[str] = set()  # hosts that do not answer
        self._dropped_ids: set[str] = set()  # errands' names that will get no word: what holds one gives it back
        self._window = asyncio.Semaphore(_LEAST)
        self._kept: set[asyncio.Task[Any]] = set()
        self._broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._stopping = self._closing = self._told_waiting = False
        self._anew = float("-inf")  # when hosts were asked last what is free
        self._grace_s = 0.0

    # -- what is asked of it ---------------------------------------------------------------------------

    async def hosts(self) -> dict[str, FleetHost]:
        """Return the hosts that requests may go to, by name.

        :raises HostpartError: where there is none
        """
        roster = await self._link.roster()
        if roster is None:
            raise Failed("the scheduler does not answer any more", "see whether it runs, and give the command again")
        self._meet(choose(roster, self._names))
        if not self._hosts:
            left = "; ".join(f"{one.name}: {one.why}" for one in roster.left_out)
            raise Failed(
                f"no host can take anything{': ' + left if left else ', since no Dask worker is there'}",
                "start one on each host: 'dask worker ADDRESS --nthreads 1 --preload hostpart.fleet.agent'",
            )
        self._window = asyncio.Semaphore(max(_LEAST, min(_MOST_PLACED, 2 * len(self._hosts))))
        return dict(self._hosts)

    async def run(self, requests: Iterable[Request]) -> None:
        """Bring every request to its end.

        They are taken one by one: of those that wait no more are being placed than two for each host, and than
        :data:`_MOST_PLACED`.
        """
        running: set[asyncio.Task[None]] = set()
        for request in requests:
            await self._turn()
            if self._stopping:
                break
            task = self._keep(self._one(_Job(request)))
            running.add(task)
            task.add_done_callback(running.discard)
            if len(running) % _BATCH == 0:
                await asyncio.sleep(0)
        while running:
            await asyncio.wait((*running, self._broken), return_when=asyncio.FIRST_COMPLETED)
            self._raise_if_broken()

    async def _turn(self) -> None:
        # Those before may wait for what has gone wrong, and so for ever.
        turn = asyncio.ensure_future(self._window.acquire())
        await asyncio.wait((turn, self._broken), return_when=asyncio.FIRST_COMPLETED)
        self._raise_if_broken()

    def _raise_if_broken(self) -> None:
        # What went wrong in a task is this call's to tell: else all would wait for ever.
        if self._broken.done():
            self._broken.result()

    async def gang(self, requests: Sequence[Request], attempts: Mapping[int, int] | None = None) -> None:
        """Bring each request to a host of its own, and start them together or not at all.

        :param attempts: how often each was sent out before, by its number
        :raises DoesNotFit: where not all find a host; then none has run
        """
        until = time.monotonic() + self._wait_s
        tried = dict(attempts or {})
        while True:
            try:
                jobs = await self._hold_all(requests, tried)
                break
            except _Gang:
                if time.monotonic() >= until or self._stopping:
                    raise
                # Not at the same time as another gang that wants the same hosts.
                await asyncio.sleep(min(0.2 + secrets.randbelow(800) / 1000, max(0.0, until - time.monotonic())))
                await self._look(0.0)
        await self._start_all(jobs)
        await self._all([self._to_end(job) for job in jobs])

    async def _all(self, coroutines: Sequence[Any]) -> None:
        tasks = [self._keep(one) for one in coroutines]
        while pending := [task for task in tasks if not task.done()]:
            await asyncio.wait((*pending, self._broken), return_when=asyncio.FIRST_COMPLETED)
            self._raise_if_broken()

    async def adopt(self, request: Request, known: Known, offset: int) -> None:
        """Follow to its end what an earlier call of the fleet has begun.

        :param known: what its host says of it
        :param offset: up to where its events are kept
        """
        job = _Job(request, known.attempt)
        job.host, job.state = known.host, dict(known.state)
        job.offsets["events"] = offset
        await self._all([self._again(job)])

    async def _again(self, job: _Job) -> None:
        if job.state.get("state") in ("placing", "held"):
            await self._start(job)
        await self._to_end(job)

    async def begin(self, request: Request, on: str = "", attempt: int = 0, offset: int = 0) -> None:
        """Bring one request to its end.

        :param on: the one host that it is for
        :param attempt: how often it was sent out before
        :param offset: up to where its events are kept, where it goes on in a directory that it has on its host
        """
        await self._turn()
        await self._all([self._one(_Job(request, attempt, offset), on)])

    async def find(self, run: str) -> dict[int, list[Known]]:
        """Return all that the hosts know of the requests of an earlier call, by number."""
        addresses = dict(self._names_at)
        said = await self._link.call(agent.states, {"run": run}, list(addresses))
        found: dict[int, list[Known]] = defaultdict(list)
        for address, answer in said.items():
            for errand, state in answer.items():
                try:
                    number, attempt = number_of(errand)
                except ValueError:
                    continue
                if attempt > _MOST:
                    continue  # none was sent out so often, and the next one's name could not be read back
                if isinstance(state, dict) and errand.startswith(f"{run}.") and address in addresses:
                    found[number].append(Known(addresses[address], attempt, state))
        return found

    async def take_back(self, known: Iterable[Known]) -> None:
        """Give back what an earlier call has left held."""
        named = [(one.host, str(one.state.get("id"))) for one in known]
        await asyncio.gather(*(self._tell(host, agent.give_up, [errand]) for host, errand in named))

    async def stop(self, grace_s: float) -> None:
        """End what runs, give back what is held, and begin nothing more."""
        self._stopping, self._grace_s = True, grace_s
        await asyncio.gather(self._withdraw(), *(self._stop_on(name) for name in list(self._followed)))

    async def _withdraw(self) -> None:
        # What is on its way to a host is not to be held there.
        jobs = list(self._jobs.values())
        ids = [job.id for job in jobs]
        for job in jobs:
            if job.placing is not None:
                job.placing.cancel()
            self._drop(job)
            self._answer(job, _STOPPED)
        for first in range(0, len(ids), _POLLED):
            addresses = [host.address for host in self._hosts.values()]
            await self._link.call(agent.give_up, {"ids": ids[first : first + _POLLED]}, addresses, _START_S)

    def _drop(self, job: _Job) -> None:
        # An experiment is asked for again by the same name.
        if self._stopping or job.request.argv[0] != "experiment":
            self._dropped_ids.add(job.id)

    async def _stop_on(self, name: str) -> None:
        # What was started meanwhile, or while its host was out of reach, is told when it can be.
        jobs = [job for job in self._followed[name].values() if not job.told]
        for job in jobs:
            job.told = True
        said = await self._tell(name, agent.stop, [job.id for job in jobs], self._grace_s)
        for job in jobs:
            job.told = isinstance(said.get(job.id), dict)

    async def _tell(
        self, name: str, function: Callable[..., Any], ids: Sequence[str], grace_s: float = 0.0
    ) -> dict[str, Any]:
        host = self._hosts.get(name)
        if host is None or not ids:
            return {}
        document = {"ids": list(ids), "grace_s": grace_s}
        said = await self._link.call(function, document, [host.address], grace_s + 30.0)
        return said.get(host.address, {})

    # -- one request -----------------------------------------------------------------------------------

    async def _one(self, job: _Job, on: str = "") -> None:
        try:
            outcome = await self._place(job, frozenset(), time.monotonic() + self._wait_s, on)
        finally:
            self._window.release()
        if outcome is None:
            await self._start(job)
            await self._to_end(job)
        else:
            self._end(outcome, job)

    async def _place(self, job: _Job, without: frozenset[str], until: float, on: str = "") -> Outcome | None:
        # Hold it on some host; else say how it ended.
        full: dict[str, str] = {}
        silent = 0
        anew = False
        unsent: float | None = None
        while not self._stopping:
            avoided = frozenset(without | full.keys() | (self._hosts.keys() - {on} if on else set()))
            if not await self._room(job.request.needs, avoided):
                if not anew:
                    anew = True
                    await self._ask_what_is_free(job.request, avoided)
                    continue
                if time.monotonic() >= until:
                    return Outcome(job.request, "refused", error=self._no_room(job.request, without, full, on))
                self._tell_waiting(job.request, without, full, on)
                full.clear()
                await asyncio.sleep(min(0.5, max(0.0, until - time.monotonic())))
                await self._look(0.5)
                continue
            # Two gangs that hold what the other one wants would stand in Dask's queue for ever.
            job.limit_s = max(_QUEUE_S, min(_PLACE_S, until - time.monotonic()))
            state = await self._ask(job, avoided)
            name = None if isinstance(state, str) else self._name_of(state)
            if state == _STOPPED:
                break
            if isinstance(state, str) or name is None:
                # Nobody has it; what holds it without being known to us gives it back.
                unsent = (unsent or time.monotonic()) if state == _UNSENT else None
                silent += state not in (_UNSENT, _WAITING)
                if error := self._unheld(job, without, full, on, silent, unsent, state == _WAITING, until):
                    return Outcome(job.request, "refused", error=error)
                await self._look(0.0)
                continue
            unsent = None
            job.host, job.state = name, state
            if state.get("state") in ("held", "running", "ended"):
                if not self._hear_free(name, state):
                    self._vacancy.take(name, job.request.needs, _count(state.get("turn")))
                if job.kept <= _size(state, "events"):
                    job.offsets["events"] = job.kept  # it goes on in its directory
                self._decide(job, "placed")
                return None
            error = state.get("error")
            if not isinstance(error, dict) or error.get("exit_code") != DoesNotFit.exit_code:
                self._drain(job)
                return self._refused(job)
            # It has become full meanwhile; what is free there is known when it is looked at again.
            full[name] = str(error.get("problem"))[:_SHOWN]
            if not self._hear_free(name, state):
                self._vacancy.say(name, {}, _count(state.get("turn")))
            if len(full) >= self._attempts and time.monotonic() >= until:
                return Outcome(job.request, "refused", error=self._no_room(job.request, without, full, on))
        return Outcome(job.request, "given-up")

    def _tell_waiting(self, request: Request, without: frozenset[str], full: Mapping[str, str], on: str) -> None:
        # Once: of thousands the first stands for all.
        if not self._told_waiting:
            self._told_waiting = True
            error = self._no_room(request, without, full, on)
            self._hear(Word(request, "", "note", f"waiting for room: {error['problem']}"))

    def _unheld(
        self,
        job: _Job,
        without: frozenset[str],
        full: Mapping[str, str],
        on: str,
        silent: int,
        unsent: float | None,
        waited: bool,
        until: float,
    ) -> dict[str, Any] | None:
        # The error of a request that nobody has, where it is not to be tried once more.
        now = time.monotonic()
        if silent > self._attempts:
            problem = f"it was sent out {silent} times, and no host has said that it has it"
            return _error(1, problem, "see the workers' logs")
        if unsent is not None and now - unsent > self._patience_s:
            problem = f"the scheduler could not be reached for {self._patience_s:g} s"
            return _error(1, problem, "see whether it runs, and give the command again")
        return self._no_room(job.request, without, full, on) if waited and now >= until else None

    def _refused(self, job: _Job) -> Outcome:
        given = job.state.get("error")
        error = given if isinstance(given, dict) else _error(1, f"host {job.host} did not take it", "see its errand")
        error = {name: one[:_SHOWN] if isinstance(one, str) else one for name, one in error.items()}
        return Outcome(job.request, "refused", job.host, error=error)

    def _no_room(self, request: Request, without: frozenset[str], full: Mapping[str, str], on: str) -> dict[str, Any]:
        wanted = int(request.needs.get(PCPUS, 1))
        noun = "pCPU" if wanted == 1 else "pCPUs"
        told = [f"{name}: {why}" for name, why in sorted(full.items())]
        for name, free in sorted(self._vacancy.free().items()):
            if name not in full and name not in without and (not on or name == on):
                there = int(free.get(CORE_PCPUS if CORE_PCPUS in request.needs else PCPUS, 0))
                told.append(f"{name} has {there} free")
        shown = [*told[:8], *([f"and {len(told) - 8} more"] if len(told) > 8 else [])]
        where = f"host {on} does not have" if on else "no host has"
        problem = f"{wanted} {noun} wanted, and {where} as many to give: {'; '.join(shown) or 'none is there'}"
        return _error(DoesNotFit.exit_code, problem, "wait for them with --wait, or ask for fewer; 'hostpart fleet ps'")

    async def _room(self, needs: Mapping[str, float], without: frozenset[str]) -> bool:
        if self._vacancy.fitting(needs, without, 1):
            return True
        await self._look(0.2)
        return bool(self._vacancy.fitting(needs, without, 1))

    async def _ask_what_is_free(self, request: Request, without: frozenset[str]) -> None:
        # A host does not notice at once what others than this fleet give back there.
        now = time.monotonic()
        if now - self._anew < _ANEW_S:
            return
        self._anew = now
        wanted = request.needs.get(PCPUS, 0.0)
        usable = [one for one in self._hosts.values() if len(CpuSet.parse(str(one.hello["usable"]))) >= wanted]
        asked = [one.address for one in usable if one.name not in without][:_ASKED]
        if asked:
            said = await self._link.call(agent.look, {}, asked, 10.0)
            await self._look(0.0)
            for address, answer in said.items():
                if name := self._names_at.get(address):
                    self._hear_free(name, answer)

    def _hear_free(self, name: str, said: Mapping[str, Any]) -> bool:
        # Whether a host says in it what it has left.
        if not isinstance(free := said.get("free"), dict):
            return False
        self._vacancy.say(name, resources(free), _count(said.get("turn")))
        return True

    def _name_of(self, state: Mapping[str, Any]) -> str | None:
        return self._names_at.get(str(state.get("address")))

    def _word(self, document: dict[str, Any]) -> None:
        errand, address = str(document.get("id")), document.get("address")
        job = self._jobs.get(errand)
        if job is not None and errand not in self._dropped_ids:
            if self._name_of(document) in job.hosts:  # no other was asked
                self._answer(job, document)
        elif document.get("state") == "held" and isinstance(address, str):
            # Dask does once more what a host has done that it has lost, as long as it has not been let go of.
            again = errand in self._done and self._done[errand][0] != self._name_of(document)
            if again or errand in self._dropped_ids:
                self._keep(self._link.call(agent.give_up, {"ids": [errand]}, [address]))

    # -- placing ---------------------------------------------------------------------------------------

    async def _ask(self, job: _Job, without: frozenset[str]) -> dict[str, Any] | str:
        # What a host says of it; or why none does.
        # An experiment goes on under one name, in its own directory on its host.
        job.attempt = 1 if job.request.argv[0] == "experiment" else job.attempt + 1
        job.answer = asyncio.get_running_loop().create_future()
        job.looking = False
        self._jobs[job.id] = job
        key = (tuple(sorted(job.request.needs.items())), without)
        self._to_place[key].append(job)
        if self._flushing is None or self._flushing.done():
            self._flushing = self._keep(self._flush())
        if self._checking is None or self._checking.done():
            self._checking = self._keep(self._check())
        try:
            answer = await job.answer
        finally:
            self._jobs.pop(job.id, None)
            self._vacancy.settle(job.hosts, job.request.needs)
            job.hosts = ()
            placing, job.placing = job.placing, None
        if isinstance(answer, str):
            self._drop(job)
        elif placing is not None:
            self._done[job.id] = self._name_of(answer) or "", time.monotonic(), placing
            if len(self._done) >= _DONE:
                self._let_go()
            self._let_go_later()
        return answer

    def _let_go_later(self) -> None:
        if self._letting_go is None and self._done:
            self._letting_go = asyncio.get_running_loop().call_later(_DONE_S, self._let_go)

    def _let_go(self) -> None:
        # Of one that has just said something, and is about to be over, later: Dask would stop it.
        if self._letting_go is not None:
            self._letting_go.cancel()
            self._letting_go = None
        since = time.monotonic() - _DONE_S / 2
        self._done = {name: one for name, one in self._done.items() if not one[2].over and one[1] > since}
        self._let_go_later()

    async def _flush(self) -> None:
        pause_s = self._gather_s()
        while any(self._to_place.values()):
            await asyncio.sleep(pause_s)
            pause_s = self._gather_s() if await self._send() else _GATHER_MOST_S

    def _gather_s(self) -> float:
        # Where hundreds are on their way, one more waits for them anyhow.
        return min(_GATHER_MOST_S, _GATHER_S + len(self._jobs) * _GATHER_EACH_S)

    async def _send(self) -> bool:
        # Bring to Dask what there is room for; return whether there was any.
        waiting, self._to_place = self._to_place, defaultdict(list)
        most = max(2, min(_SHORTLIST, len(self._hosts) // max(1, len(self._jobs))))
        sent: dict[str, _Job] = {}
        parcels: list[Parcel] = []
        for (needs, without), given in waiting.items():
            jobs = [job for job in given if job.answer is not None and not job.answer.done()]
            while jobs and not self._stopping and (names := self._vacancy.spare(dict(needs), without, most)):
                job = jobs.pop(0)
                job.hosts = tuple(names)
                self._vacancy.reserve(names, job.request.needs)
                addresses = [self._hosts[name].address for name in names]
                parcels.append(Parcel(job.id, job.request.text(job.attempt), addresses, job.request.needs))
                sent[job.id] = job
            if jobs and not self._stopping and self._vacancy.fitting(dict(needs), without, 1):
                # Others are on their way to those that have room: it is to be seen what they leave.
                self._to_place[needs, without] = jobs + self._to_place[needs, without]
                continue
            for job in jobs:
                self._answer(job, _STOPPED if self._stopping else _WAITING)
        for first in range(0, len(parcels), _BATCH):
            batch = parcels[first : first + _BATCH]
            placings = await self._link.place(batch)
            for parcel in batch:
                self._on_its_way(sent[parcel.name], placings[parcel.name] if placings else None)
        return bool(sent)

    def _on_its_way(self, job: _Job, placing: Placing | None) -> None:
        if placing is None:
            self._answer(job, _UNSENT)
        elif job.answer is not None and job.answer.done():
            placing.cancel()  # it was stopped while it was being sent
        else:
            job.placing = placing
            job.asked = time.monotonic()
            job.look_at = job.asked + job.limit_s

    async def _check(self) -> None:
        # Dask says when it has given up a task; what a host says comes by itself.
        grace: dict[str, float] = {}
        while self._jobs:
            await asyncio.sleep(_CHECK_S)
            now = time.monotonic()
            grace = {name: at for name, at in grace.items() if name in self._jobs}
            due = []
            for name, job in self._jobs.items():
                placing = job.placing
                if placing is None or job.looking:
                    continue
                over = placing.over and now > grace.setdefault(name, now + 2.0)
                if placing.failed or over or now > job.look_at:
                    job.looking = True
                    due.append(job)
            for first in range(0, len(due), _POLLED):
                self._keep(self._ask_again(due[first : first + _POLLED]))

    async def _ask_again(self, jobs: Sequence[_Job]) -> None:
        # No word came, as when this process was not connected, or no host had room: whoever has it says so.
        queued = {job.id for job in jobs if job.placing is not None and not job.placing.over}
        found = await self._states([job.id for job in jobs], [host.address for host in self._hosts.values()])
        now = time.monotonic()
        for job in jobs:
            job.looking = False
            there = sorted(found[job.id], key=lambda state: state.get("state") != "held")
            if ready := [one for one in there if one.get("state") in ("held", "refused", "running", "ended")]:
                self._answer(job, ready[0])
            elif there and there[0].get("state") == "placing" and now < job.asked + 2 * _PLACE_S:
                job.look_at = now + _QUEUE_S
            else:
                if job.placing is not None:
                    job.placing.cancel()
                self._answer(job, _WAITING if job.id in queued and not there else _SILENT)

    def _answer(self, job: _Job, state: dict[str, Any] | str) -> None:
        if job.answer is not None and not job.answer.done():
            job.answer.set_result(state)

    async def _states(self, ids: Sequence[str], addresses: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        # What is said of each of *ids*, with the address of who says it.
        said = await self._link.call(agent.states, {"ids": list(ids)}, addresses) if addresses else {}
        found: dict[str, list[dict[str, Any]]] = defaultdict(list)
        for address, answer in said.items():
            for name in ids:
                state = answer.get(name)
                if isinstance(state, dict) and state.get("state") != "unknown":
                    found[name].append({**state, "address": address})
        return found

    # -- starting --------------------------------------------------------------------------------------

    async def _start(self, job: _Job) -> None:
        self._decide(job, "starting")
        job.answer = asyncio.get_running_loop().create_future()
        self._to_start.append(job)
        if self._starting is None or self._starting.done():
            self._starting = self._keep(self._flush_starts())
        state = await job.answer
        if isinstance(state, str) or state.get("state") in ("placing", "held", "unknown"):
            state = await self._settle(job)
        job.state = state
        if not job.is_over:
            self._decide(job, "started")

    def _verb(self) -> Callable[..., Any]:
        # What is said to one that is held.
        return agent.give_up if self._stopping else agent.start

    async def _flush_starts(self) -> None:
        while self._to_start:
            await asyncio.sleep(self._gather_s())
            waiting, self._to_start = self._to_start, []
            batches = [waiting[first : first + _STARTED] for first in range(0, len(waiting), _STARTED)]
            await asyncio.gather(*(self._give_word(jobs) for jobs in batches))

    async def _give_word(self, jobs: Sequence[_Job]) -> None:
        by: dict[str, list[str]] = defaultdict(list)
        for job in jobs:
            if address := self._address(job):
                by[address].append(job.id)
        said = await self._link.call(self._verb(), {"by": by}, list(by), _START_S) if by else {}
        found = {name: state for address, names in by.items() for name in names
                 if isinstance(state := said.get(address, {}).get(name), dict)}  # fmt: skip
        for job in jobs:
            self._answer(job, found.get(job.id, _SILENT))

    async def _settle(self, job: _Job) -> dict[str, Any]:
        # Whether the word to start came through is not known: its host says, once it can be reached.
        until = time.monotonic() + self._patience_s
        while True:
            await self._look(0.5)
            if address := self._address(job):
                for state in (await self._states([job.id], [address]))[job.id]:
                    if state.get("state") not in ("placing", "held"):
                        return state
                    if state.get("state") == "held":
                        await self._link.call(self._verb(), {"ids": [job.id]}, [address], _START_S)
            if time.monotonic() > until:
                return {**job.state, "state": "lost"}
            await asyncio.sleep(0.5)

    # -- gangs -----------------------------------------------------------------------------------------

    async def _hold_all(self, requests: Sequence[Request], tried: dict[int, int]) -> list[_Job]:
        # One after another, each on a host that none of the others has: two gangs at once do not wait for each other.
        needs, wanted = requests[0].needs, len(requests)
        if len(self._vacancy.fitting(needs, frozenset(), wanted)) < wanted:
            await self._look(0.2)
        if len(there := self._vacancy.fitting(needs, frozenset(), wanted)) < wanted:
            # Seen before a VM is made: one that waits would make and give back some all the time.
            raise _Gang(wanted, 0, f"hosts with room: {len(there)}")
        held: list[_Job] = []
        for request in requests:
            job = _Job(request, tried.get(request.number, 0))
            outcome = await self._place(job, frozenset(one.host for one in held), time.monotonic())
            tried[request.number] = job.attempt
            if outcome is None:
                held.append(job)
                continue
            await self._release(held)
            error = outcome.error or {}
            problem = str(error.get("problem", "it was stopped"))
            if error.get("exit_code", DoesNotFit.exit_code) != DoesNotFit.exit_code:
                raise Failed(f"the gang was not started: {problem}", str(error.get("remedy")))
            raise _Gang(len(requests), len(held), problem)
        # All are looked at once more before the first gets the word.
        said = await asyncio.gather(*(self._states([job.id], [self._address(job)]) for job in held))
        kept = [job for job, found in zip(held, said, strict=True) if _is_held(found[job.id])]
        if self._stopping or len(kept) < len(held):
            await self._release(kept)
            gone = [job.host for job in held if job not in kept]
            why = f"host {gone[0]} did not keep its VM until the start" if gone else "it was stopped"
            raise _Gang(len(requests), len(kept), why)
        return held

    async def _release(self, held: Sequence[_Job]) -> None:
        await asyncio.gather(*(self._tell(job.host, agent.give_up, [job.id]) for job in held))
        for job in held:
            self._vacancy.give(job.host, job.request.needs, _count(job.state.get("turn")))
            self._decide(job, "given-up")

    async def _start_all(self, jobs: Sequence[_Job]) -> None:
        await asyncio.gather(*(self._start(job) for job in jobs))
        if failed := [job for job in jobs if job.state.get("state") in ("given-up", "lost", "refused", "unknown")]:
            # What has been started meanwhile cannot be unsaid: it is ended.
            await asyncio.gather(
                *(self._tell(job.host, agent.stop, [job.id], 0.0) for job in jobs if job not in failed)
            )
            for job in jobs:
                text = f"host {failed[0].host} did not start its VM of the gang; the others were ended"
                self._hear(Word(job.request, job.host, "note", text))

    def _address(self, job: _Job) -> str:
        host = self._hosts.get(job.host)
        return host.address if host else ""

    # -- following -------------------------------------------------------------------------------------

    async def _to_end(self, job: _Job) -> None:
        self._drain(job)
        if not job.is_over or not job.read:
            self._followed[job.host][job.id] = job
            self._keep(self._follow(job.host))
            if self._stopping:
                self._keep(self._stop_on(job.host))
            await job.over.wait()
        state = str(job.state.get("state"))
        self._vacancy.give(job.host, job.request.needs, _count(job.state.get("turn")))
        if state == "refused":
            self._end(self._refused(job), job)
            return
        status, error = job.state.get("status"), job.state.get("error")
        outcome = Outcome(
            job.request,
            state,
            job.host,
            status if isinstance(status, int) and not isinstance(status, bool) and 0 <= status < 256 else None,
            error if isinstance(error, dict) else None,
        )
        self._end(outcome, job)

    async def _follow(self, name: str) -> None:
        # What runs on one host and nobody asks about; of several who do so one is left after a poll's time, since all
        # polls of a host end together. One alone would hear of a newcomer only when it is over.
        await asyncio.sleep(_GATHER_S)
        while asked := [job for job in self._followed[name].values() if not job.polled][:_POLLED]:
            for job in asked:
                job.polled = True
            await self._poll(name, asked)
            for job in asked:
                job.polled = False
                self._followed[name].pop(job.id, None)
            # Who was heard comes last: a guest that never stops talking would leave no room for others' words.
            asked.sort(key=lambda job: job.heard)
            self._followed[name].update((job.id, job) for job in asked if not job.over.is_set())
            await asyncio.sleep(_GATHER_S)

    async def _poll(self, name: str, asked: Sequence[_Job]) -> None:
        began = time.monotonic()
        wait_s = _POLL_S - (began + hash(name) % 1000 / 1000 * _POLL_S) % _POLL_S
        said: dict[str, Any] = {}
        if host := self._hosts.get(name):
            wants = {job.id: dict(job.offsets) for job in asked}
            document = {"wants": wants, "wait_s": wait_s, "limit": _PIECE}
            said = (await self._link.call(agent.news, document, [host.address], wait_s + _LATE_S)).get(host.address, {})
        news = {job.id: answer for job in asked if isinstance(answer := said.get(job.id), dict)}
        if not news and name not in self._unheard:
            self._unheard.add(name)
            self._note(asked, name, f"host {name} does not answer; its guests go on; waiting for it")
        elif news and name in self._unheard:
            self._unheard.discard(name)
            self._note(asked, name, f"host {name} answers again")
        if news and self._stopping:
            self._keep(self._stop_on(name))
        now = time.monotonic()
        moved = [job for job in asked if job.id in news and self._hear_news(job, news[job.id])]
        crowded = sum(job.heard for job in moved) >= _PIECE // 2
        for job in asked:
            if job.id in news:
                job.silent = None
                self._see_over(job, name, None if crowded else now)
            else:
                job.silent = job.silent or now
                if now - job.silent > self._patience_s:
                    job.state = {**job.state, "state": "lost"}
                    job.over.set()
        if not moved and now - began < 1.0:
            await asyncio.sleep(_PAUSE_S)
        if not news:
            await self._look(0.5)

    def _see_over(self, job: _Job, name: str, now: float | None) -> None:
        # *now*: None where others have used up what fits into an answer.
        if not job.is_over:
            return
        if job.read:
            job.over.set()
            return
        job.stuck = None if now is None else job.stuck or now
        if now is not None and job.stuck is not None and now - job.stuck > _REST_S:
            self._note([job], name, f"host {name} does not give all that request {job.request.number} has said")
            job.over.set()

    def _note(self, jobs: Sequence[_Job], name: str, text: str) -> None:
        if jobs:
            self._hear(Word(jobs[0].request, name, "note", text))

    def _hear_news(self, job: _Job, answer: Mapping[str, Any]) -> bool:
        # Whether there was something new in it.
        before, offsets = job.state.get("state"), dict(job.offsets)
        state = answer.get("state")
        if isinstance(state, dict):
            job.state = {"sizes": {}, **state} if state.get("state") in ("lost", "unknown") else state
            if state.get("state") == "unknown":
                job.state["state"] = "lost"  # its host has forgotten it, as after its directory was removed
        for channel in CHANNELS:
            piece = answer.get(channel)
            if isinstance(piece, dict) and _count(piece.get("offset")) == job.offsets[channel]:
                self._heard(job, channel, _bytes(piece.get("data")))
        job.heard = sum(job.offsets.values()) - sum(offsets.values())
        if job.heard:
            job.stuck = None
        return offsets != job.offsets or before != job.state.get("state")

    def _drain(self, job: _Job) -> None:
        # What was little comes with the end itself.
        inline = job.state.get("inline")
        if not isinstance(inline, dict):
            return
        for channel in CHANNELS:
            given = inline.get(channel)
            data = given.encode(errors="replace") if channel == "events" and isinstance(given, str) else _bytes(given)
            self._heard(job, channel, data[job.offsets[channel] :])

    def _heard(self, job: _Job, channel: str, data: bytes) -> None:
        if not data:
            return
        job.offsets[channel] += len(data)
        if channel != "events":
            self._hear(Word(job.request, job.host, channel, data))
            return
        start = job.offsets[channel] - len(data) - len(job.rest)
        *lines, job.rest = (job.rest + data).split(b"\n")
        if len(job.rest) > _LINE:
            job.rest = b""  # no line of hostpart's is so long; the rest of it is no document, and is left out
        for line in lines:
            start += len(line) + 1
            self._event(job, line, start)

    def _event(self, job: _Job, line: bytes, offset: int) -> None:
        if (event := object_of(line)) is None:
            return
        self._hear(Word(job.request, job.host, "event", event))
        if self._journal is None:
            return
        kind = event.get("event")
        given = event.get("document" if kind == "experiment" else str(kind))
        if kind in ("experiment", "session", "run") and isinstance(given, dict):
            name = "document" if kind == "experiment" else kind
            self._line(job, kind, **{name: given}, offset=offset)
        else:
            self._line(job, "event", event=event, offset=offset)

    # -- what is kept ----------------------------------------------------------------------------------

    def _end(self, outcome: Outcome, job: _Job) -> None:
        if self._journal is not None:
            if job.host:
                self._line(
                    job, "outcome", state={name: value for name, value in job.state.items() if name not in _PASSING}
                )
            about = {"host": outcome.host or None, "status": outcome.status, "error": outcome.error}
            self._journal.decision(job.id, outcome.state, **about)
        self._ended(outcome)

    def _decide(self, job: _Job, state: str) -> None:
        if self._journal is not None:
            self._journal.decision(job.id, state, host=job.host or None)

    def _line(self, job: _Job, kind: str, **fields: Any) -> None:
        if self._journal is not None:
            self._introduce(job.host)
            self._journal.line(job.host, kind, request=job.id, **fields)

    def _introduce(self, name: str) -> None:
        # A host's file begins with who it is; its facts and its clock follow when it has told them.
        host = self._hosts.get(name)
        if self._journal is None or name in self._known or host is None:
            return
        self._known.add(name)
        self._journal.host(name, address=host.address, hello=dict(host.hello), facts=None, skew_s=None, rtt_s=None)
        task = self._keep(self._learn(host))
        self._learning.add(task)
        task.add_done_callback(self._learning.discard)

    async def _learn(self, host: FleetHost) -> None:
        began, before = time.time(), time.monotonic()
        said = (await self._link.call(agent.facts, {}, [host.address])).get(host.address)
        took = time.monotonic() - before
        if said is None or self._journal is None:
            return
        theirs = said.get("time")
        # Taken to have been read half-way. A host's times are its own; nothing here is ordered by them.
        skew = round(theirs - began - took / 2, 3) if finite(theirs) else None
        facts = said.get("facts") if isinstance(said.get("facts"), dict) else None
        self._journal.host(
            host.name, address=host.address, hello=dict(host.hello), facts=facts, skew_s=skew, rtt_s=round(took, 4)
        )

    # -- who is there ----------------------------------------------------------------------------------

    async def _look(self, age_s: float) -> None:
        # Look at who is there, where the last look is older than *age_s*.
        async with self._looking:
            if time.monotonic() - self._looked <= age_s:
                return
            roster = await self._link.roster()
            self._looked = time.monotonic()
            if roster is not None:
                self._meet(roster)

    def _meet(self, roster: Roster) -> None:
        hosts = {one.name: one for one in roster.hosts if not self._names or one.name in self._names}
        self._hosts = hosts
        self._names_at = {host.address: name for name, host in hosts.items()}
        self._vacancy.told({name: host.resources for name, host in hosts.items()})
        self._looked = time.monotonic()

    def _keep(self, coroutine: Any) -> asyncio.Task[Any]:
        # The loop itself holds tasks weakly.
        task: asyncio.Task[Any] = asyncio.create_task(coroutine)
        self._kept.add(task)
        task.add_done_callback(self._dropped)
        return task

    def _dropped(self, task: asyncio.Task[Any]) -> None:
        self._kept.discard(task)
        if self._closing or self._broken.done():
            return
        if task.cancelled():
            # Nothing here does that: Dask does, with what waits for an answer when its connection ends.
            self._broken.set_exception(Failed("the connection to the scheduler ended", "give the command again"))
        elif (error := task.exception()) is not None:
            self._broken.set_exception(error)

    async def close(self, wait_s: float = 10.0) -> None:
        """Let go of all that is under way.

        :param wait_s: for what hosts are being asked about themselves
        """
        self._closing = True
        if self._letting_go is not None:
            self._letting_go.cancel()
        self._done.clear()
        if self._learning and wait_s:
            await asyncio.wait(self._learning, timeout=wait_s)
        for task in list(self._kept):
            task.cancel()
        if self._broken.done():
            self._broken.exception()  # it was told, or there was nobody to tell


class _Gang(DoesNotFit):
    # So many hosts were wanted, so few had room.

    def __init__(self, wanted: int, held: int, why: str) -> None:
        super().__init__(wanted, CpuSet(), (), "")
        self.held, self.why = held, why

    def __str__(self) -> str:
        there = f"{self.held} of {self.wanted} hosts held a VM for it"
        return f"the gang was not started: {there}; {self.why}"

    @property
    def remedy(self) -> str:
        return "wait for room with --wait, or ask for a smaller gang; 'hostpart fleet ps' shows who holds what"


def _error(exit_code: int, problem: str, remedy: str) -> dict[str, Any]:
    return {"exit_code": exit_code, "problem": problem, "remedy": remedy}


def _is_held(found: Sequence[Mapping[str, Any]]) -> bool:
    return any(state.get("state") == "held" for state in found)


def _size(state: Mapping[str, Any], channel: str) -> int:
    sizes = state.get("sizes")
    return _count(sizes.get(channel)) if isinstance(sizes, dict) else 0


def _count(value: object) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else 0


def _bytes(text: object) -> bytes:
    try:
        return base64.b64decode(text, validate=True) if isinstance(text, str) else b""
    except (binascii.Error, ValueError):
        return b""
