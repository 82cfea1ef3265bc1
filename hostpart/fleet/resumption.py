"""What is still to be done of a call of the fleet that was cut short, from what is kept of it and what the hosts say.

Pure. Nothing that may have run is begun a second time unless that is asked for; an experiment alone is, since its own
directory on its host says which runs were made.
"""

from __future__ import annotations

from ..value import Value
from .request import number_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from typing import Any

    from .request import Request

__all__ = ["BEGIN", "DONE", "FOLLOW", "UNKNOWN", "Before", "Known", "best", "chosen", "decide", "last"]

DONE, FOLLOW, BEGIN, UNKNOWN = "done", "follow", "begin", "unknown"
# What an errand says of itself, from what counts most: of several of one request the first is it.
_WEIGHT = ("ended", "running", "held", "placing", "lost", "refused", "given-up")


class Before(Value):
    """The last that was kept of a request.

    :ivar state: as it was decided
    :ivar attempt: how often it had been sent out
    :ivar host: where; None: nowhere yet
    :ivar status: with which it ended
    """

    state: str = ""
    attempt: int = 0
    host: str | None = None
    status: int | None = None

    @property
    def begun(self) -> bool:
        """Whether it got the word, and how it ended is not kept."""
        return self.state in ("starting", "started", "lost")


class Known(Value):
    """What a host says of a request now.

    :ivar host: its name
    :ivar attempt: under which the host has it
    :ivar state: the document
    """

    host: str
    attempt: int
    state: Mapping[str, Any]

    @property
    def word(self) -> str:
        """The state itself."""
        return str(self.state.get("state"))


def last(decisions: Mapping[str, Mapping[str, Any]]) -> dict[int, Before]:
    """Return the last of *decisions* on each request, by its number.

    :param decisions: by the errand's name, in the order in which they were made
    """
    found: dict[int, Before] = {}
    for errand, one in decisions.items():
        try:
            number, attempt = number_of(errand)
        except ValueError:
            continue  # no name of this hostpart's
        before = found.get(number, Before())
        if attempt >= before.attempt:
            host, status = one.get("host"), one.get("status")
            found[number] = Before(
                str(one.get("state")),
                attempt,
                str(host) if host is not None else before.host,
                status if isinstance(status, int) else None,
            )
    return found


def best(known: Iterable[Known]) -> Known | None:
    """Return the one of several errands of a request that counts: what has run before what is only held."""
    there = [one for one in known if one.word in _WEIGHT]
    return min(there, key=lambda one: (_WEIGHT.index(one.word), -one.attempt), default=None)


def chosen(before: Before, there: Iterable[Known], on: str = "") -> Known | None:
    """Return which of all that hosts say of a request counts: no other host speaks for the one that has it.

    :param on: the one host that it is for
    """
    there = [one for one in there if not on or one.host == on]
    own = [one for one in there if one.host == before.host] if before.begun else []
    return best(own or there)


def decide(request: Request, before: Before, known: Known | None, *, again: bool = False) -> str:
    """Return what is to be done with a request.

    :param known: what its host says; None: no host that is there knows it
    :param again: whether to run once more what was lost
    :return: :data:`DONE`, :data:`FOLLOW`, :data:`BEGIN`, or :data:`UNKNOWN`: it may have run, and is left
    """
    word = known.word if known is not None else ""
    if request.argv[0] == "experiment":
        if known is not None and (word in ("running", "held", "placing") or known.state.get("status") == 0):
            return FOLLOW
        # Its host may have removed it since, or be another one by now: all that it said was kept.
        return DONE if known is None and before.state == "ended" and before.status == 0 else BEGIN
    if before.state in ("ended", "refused"):
        return DONE
    begun = before.begun
    if word in ("ended", "running"):
        return FOLLOW
    if word in ("held", "placing") and known is not None and (not begun or before.host == known.host):
        return FOLLOW
    if word in ("refused", "given-up") and known is not None and (not begun or before.host == known.host):
        return BEGIN
    return BEGIN if again or not (begun or word == "lost") else UNKNOWN
