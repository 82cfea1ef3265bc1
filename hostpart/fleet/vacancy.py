"""What hosts have free, as far as it is known to who sends them requests.

Hosts tell the scheduler in their own time, and Dask chooses among several. So what is on its way to them is counted
here, and what a host says of itself when something has come to it limits what it has told before.
"""

from __future__ import annotations

import time
from collections import defaultdict

from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

__all__ = ["LAG_S", "Vacancy"]

LAG_S = 5.0  # within which a host has told the scheduler of what it took, be it ever so busy
_NOTHING: Mapping[str, float] = {}


class _Said(Value):
    # What a host has said that it has, or what has ended there; *turn*: how often it had looked by then.
    at: float
    turn: int
    free: dict[str, float]


class Vacancy:
    """See the module. Hosts go by their names, resources by those of :mod:`hostpart.fleet.supply`.

    Hosts count how often they have looked at what they have: a host's *turn*. What ends there in an earlier turn than
    that of what it has said is in that already; what ends later is not, whichever of the two is heard first.
    """

    def __init__(self) -> None:
        self._told: dict[str, dict[str, float]] = {}
        self._said: dict[str, _Said] = {}
        self._given: dict[str, list[_Said]] = defaultdict(list)  # what has ended since that turn, or in it
        self._reserved: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
        self._able: dict[tuple[tuple[str, float], ...], list[str]] = {}  # by needs: who has told of as much
        self._cursor = 0

    def told(self, resources: Mapping[str, Mapping[str, float]]) -> None:
        """Take in what all hosts have told the scheduler; who is not among them has nothing."""
        since = time.monotonic() - LAG_S
        self._told = {name: dict(free) for name, free in resources.items()}
        self._able = {}
        self._said = {name: said for name, said in self._said.items() if said.at > since}
        for name, given in self._given.items():
            self._given[name] = [one for one in given if one.at > since]

    def say(self, name: str, free: Mapping[str, float], turn: int) -> None:
        """Take in what a host says of itself."""
        if self._take_in(name, free, turn):
            self._given[name] = [one for one in self._given[name] if one.turn >= turn]
            for one in self._given[name]:
                self._add(name, one.free)

    def take(self, name: str, needs: Mapping[str, float], turn: int) -> None:
        """Something holds a VM on a host that has not said what it has left."""
        free = self.of(name)
        self._take_in(name, {what: count - needs.get(what, 0.0) for what, count in free.items()}, turn)

    def give(self, name: str, needs: Mapping[str, float], turn: int) -> None:
        """It holds nothing there any more."""
        said = self._said.get(name)
        if said is None or turn >= said.turn:
            self._given[name].append(_Said(time.monotonic(), turn, dict(needs)))
            self._add(name, needs)

    def of(self, name: str) -> dict[str, float]:
        """Return what a host has free; nothing of one that is not there."""
        told, said = self._told.get(name, {}), self._said.get(name)
        if said is None:
            return dict(told)
        return {what: min(count, said.free.get(what, 0.0)) for what, count in told.items()}

    def reserve(self, names: Collection[str], needs: Mapping[str, float]) -> None:
        """Something is on its way to one of some hosts: it has room on each of them until :meth:`settle`."""
        self._reserve(names, needs, +1)

    def settle(self, names: Collection[str], needs: Mapping[str, float]) -> None:
        """It is known who has it."""
        self._reserve(names, needs, -1)

    def fitting(self, needs: Mapping[str, float], without: Collection[str], most: int) -> list[str]:
        """Return hosts with room, going round."""
        return self._with_room(needs, without, most, {})

    def spare(self, needs: Mapping[str, float], without: Collection[str], most: int) -> list[str]:
        """Return hosts with room beside all that is on its way to them, going round."""
        return self._with_room(needs, without, most, self._reserved)

    def free(self) -> dict[str, dict[str, float]]:
        """Return what each host has free."""
        return {name: self.of(name) for name in self._told}

    def _take_in(self, name: str, free: Mapping[str, float], turn: int) -> bool:
        # Whether it is no older than what was heard before.
        said = self._said.get(name)
        if said is not None and turn < said.turn:
            return False
        self._said[name] = _Said(time.monotonic(), turn, dict(free))
        return True

    def _add(self, name: str, needs: Mapping[str, float]) -> None:
        if (said := self._said.get(name)) is not None:
            for what, wanted in needs.items():
                said.free[what] = said.free.get(what, 0.0) + wanted

    def _with_room(
        self,
        needs: Mapping[str, float],
        without: Collection[str],
        most: int,
        reserved: Mapping[str, Mapping[str, float]],
    ) -> list[str]:
        key = tuple(sorted(needs.items()))
        if (names := self._able.get(key)) is None:
            names = self._able[key] = [
                name
                for name, told in self._told.items()
                if all(told.get(what, 0.0) >= wanted for what, wanted in needs.items())
            ]
        first = self._cursor
        found: list[str] = []
        for step in range(len(names)):
            name = names[(first + step) % len(names)]
            if name in without:
                continue
            free, beside = self.of(name), reserved.get(name, _NOTHING)
            if all(free.get(what, 0.0) - beside.get(what, 0.0) >= wanted for what, wanted in needs.items()):
                found.append(name)
                if len(found) == most:
                    self._cursor = first + step + 1
                    break
        return found

    def _reserve(self, names: Collection[str], needs: Mapping[str, float], sign: int) -> None:
        for name in names:
            there = self._reserved[name]
            for what, wanted in needs.items():
                there[what] += sign * wanted
            if not any(there.values()):
                del self._reserved[name]
