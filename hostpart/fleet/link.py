"""The line to the hosts: calls to their agents through Dask, which outlive a scheduler that restarts.

All that is sent and all that comes back is text with JSON in it. What cannot be reached is missing in the answer:
whoever asked decides how long to try.
"""

from __future__ import annotations

import asyncio
import json
import secrets

from dask.highlevelgraph import HighLevelGraph, MaterializedLayer
from dask.task_spec import Task

from ..value import Value
from .agent import TOPIC, place
from .order import object_of
from .roster import Roster, look
from .supply import CORE_PCPUS, PCPUS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from .cluster import Cluster

__all__ = ["Link", "Parcel", "Placing"]

_LONGEST = 1 << 26  # of an answer, in characters
_APART_S = 10.0  # for a host that keeps all others waiting, when it is asked by itself


class Placing(Value):
    """A request on its way to a host of Dask's choice.

    :ivar future: Dask's, which is kept until it is over: to let it go would take the task back
    """

    future: Any

    @property
    def failed(self) -> bool:
        """Whether Dask has given it up: its worker died, or the scheduler forgot it."""
        return bool(self.future.status in ("error", "cancelled", "lost"))

    @property
    def over(self) -> bool:
        """Whether the task has ended; what it had to say comes, or came, by itself."""
        return bool(self.future.status != "pending")

    def cancel(self) -> None:
        """Take it back, where no host has it yet."""
        self.future.release()


class Parcel(Value):
    """A request to be brought to one of some hosts.

    :ivar name: the errand's
    :ivar text: what is sent
    :ivar addresses: those of the hosts
    :ivar needs: what has to be free there
    """

    name: str
    text: str
    addresses: Sequence[str]
    needs: Mapping[str, float]


class Link:
    """See the module.

    :param cluster: the connection
    """

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._hear: Callable[[dict[str, Any]], None] = lambda _: None
        self._subscribed: object = None
        self._roster: Roster | None = None
        self._reaching = asyncio.Lock()
        self._slow: set[str] = set()  # addresses of those who did not answer

    def listen(self, hear: Callable[[dict[str, Any]], None]) -> None:
        """Have *hear* called with every word that an agent sends by itself: a state document with its ``address``."""
        self._hear = hear

    async def roster(self) -> Roster | None:
        """Return the hosts that are there; None where the scheduler cannot be reached."""
        try:
            client = await self._client()
            # With the last one, so that a host whose worker was restarted keeps its name.
            self._roster = await asyncio.wait_for(look(client, self._roster), 30)
        except Exception:  # whatever is at the other end, it may answer anything
            return None
        return self._roster

    async def place(self, parcels: Sequence[Parcel]) -> dict[str, Placing] | None:
        """Ask Dask to bring requests to hosts, all in one message.

        :return: by the errand's name; None where the scheduler cannot be reached
        """
        # A key is used once: Dask would give the answer that it has to a second task of that name, such as an
        # experiment that was refused before.
        keys = [f"hostpart-{one.name}-{secrets.token_hex(4)}" for one in parcels]
        layers = {
            key: MaterializedLayer(
                {key: Task(key, place, one.text)},
                annotations={"workers": list(one.addresses), "resources": _least(one.needs)},
            )
            for key, one in zip(keys, parcels, strict=True)
        }
        try:
            client = await self._client()
            # No retries: what has failed is looked into.
            graph = HighLevelGraph(layers, {key: set() for key in keys})
            futures = client.get(graph, keys, sync=False, retries=0)
        except (TimeoutError, OSError, RuntimeError):
            return None
        return {one.name: Placing(future) for one, future in zip(parcels, futures, strict=True)}

    async def call(
        self, function: Callable[..., Any], document: Mapping[str, Any], addresses: Sequence[str], limit_s: float = 30.0
    ) -> dict[str, dict[str, Any]]:
        """Call a function of :mod:`hostpart.fleet.agent` on some hosts, all at once.

        :return: by address, the answers of those who gave one in time
        """
        text = json.dumps(document)
        try:
            client = await self._client()
        except (TimeoutError, OSError, RuntimeError):
            return {}
        slow = [one for one in addresses if one in self._slow] if len(addresses) > 1 else []
        quick = [one for one in addresses if one not in slow]
        apart = [self._ask(client, function, text, [one], min(limit_s, _APART_S)) for one in slow]
        found, *others = await asyncio.gather(self._ask(client, function, text, quick, limit_s), *apart)
        if not found and len(quick) > 1:
            # Dask has no answer before it has all: each is asked by itself, so that one alone is missing.
            apart = [self._ask(client, function, text, [one], min(limit_s, _APART_S)) for one in quick]
            others += await asyncio.gather(*apart)
        for one in others:
            found |= one
        self._slow = (self._slow | set(addresses)) - found.keys()
        return found

    async def _ask(
        self, client: Any, function: Callable[..., Any], text: str, addresses: Sequence[str], limit_s: float
    ) -> dict[str, dict[str, Any]]:
        if not addresses:
            return {}
        try:
            said = await asyncio.wait_for(
                client.run(function, text, workers=list(addresses), on_error="return"), limit_s
            )
        except Exception:  # whatever is at the other end, it may answer anything
            return {}
        found = {address: _document(answer) for address, answer in said.items()}
        return {address: answer for address, answer in found.items() if answer is not None}

    async def _client(self) -> Any:
        async with self._reaching:  # one of all who wait makes the connection anew
            client = await self._cluster.reach()
        # A scheduler that has restarted knows of no subscription.
        if client.scheduler_comm is not self._subscribed:
            client.subscribe_topic(TOPIC, self._take)
            self._subscribed = client.scheduler_comm
        return client

    def _take(self, event: tuple[float, Any]) -> None:
        # Who has sent it is the scheduler's word, not the sender's.
        said = event[1]
        if isinstance(said, dict) and (document := _document(said.get("state"))) is not None:
            self._hear({**document, "address": said.get("worker")})


def _least(needs: Mapping[str, float]) -> dict[str, float]:
    # For each resource Dask looks through all hosts; who has so many pCPUs of whole cores has as many pCPUs.
    return {what: wanted for what, wanted in needs.items() if what != PCPUS or needs.get(CORE_PCPUS, 0.0) < wanted}


def _document(answer: object) -> dict[str, Any] | None:
    # What a host says is checked where it is used; here only that it can be looked into.
    if not isinstance(answer, str) or len(answer) > _LONGEST:
        return None
    return object_of(answer)
