"""One request to a fleet: what a host's own hostpart is to be called with, and what a host needs to have for it.

It travels as JSON text. The host checks every part of it again before it does anything (``errand.py``).
"""

from __future__ import annotations

import json
import re
import secrets

from ..errors import UsageError
from ..value import Value
from .supply import CORE_PCPUS, LLC, PCPUS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["DIR", "Request", "needs_of", "new_run", "number_of"]

DIR = "{dir}"  # in argv: the errand's directory on the host
_ERRAND = re.compile(r"[0-9a-f]{12}\.(0|[1-9][0-9]{0,8})\.(0|[1-9][0-9]{0,8})", re.ASCII)


class Request(Value):
    """See the module.

    :ivar run: of which call of the fleet it is a part: 12 hexadecimal digits
    :ivar number: its place in that, from 0
    :ivar argv: the arguments of the host's hostpart, ``run`` or ``experiment`` first
    :ivar needs: how much of which resource (:mod:`hostpart.fleet.supply`) a host has to have free
    :ivar hold: ``vm``: the VM is made and held before START; ``start``: nothing is begun before the word
    :ivar cwd: the directory to run in, where the host has it
    :ivar files: texts to put into the errand's directory, by name
    :ivar env: more variables
    """

    run: str
    number: int
    argv: tuple[str, ...]
    needs: Mapping[str, float]
    hold: str = "vm"
    cwd: str | None = None
    files: Mapping[str, str] = {}
    env: Mapping[str, str] = {}

    def text(self, attempt: int) -> str:
        """Return what a host is sent.

        :param attempt: which one it is: the id of one that a host has been sent is not sent to another
        """
        document: dict[str, Any] = {
            "schema": 1,
            "id": self.id(attempt),
            "kind": self.argv[0],
            "argv": list(self.argv),
            "hold": self.hold,
            "cwd": self.cwd,
            "files": dict(self.files),
            "env": dict(self.env),
        }
        return json.dumps(document)

    def id(self, attempt: int) -> str:
        """Return the name of the errand on a host."""
        return f"{self.run}.{self.number}.{attempt}"


def number_of(errand: str) -> tuple[int, int]:
    """Return the request's number and the attempt of an errand's name.

    :raises ValueError: where it is none
    """
    found = _ERRAND.fullmatch(errand)
    if not found:
        raise ValueError(f"{errand!r} is no errand's name")
    return int(found[1]), int(found[2])


def new_run() -> str:
    """Return a name for one call of the fleet."""
    return secrets.token_hex(6)


def needs_of(count: int, smt: str, policy: str, widest: int) -> dict[str, float]:
    """Return what a host has to have free for *count* vCPUs.

    :param smt: of the request, as in ``hostpart run``
    :param widest: how many usable pCPUs the host with most of them has
    :raises UsageError: where no host could ever have it
    """
    if count > widest:
        raise UsageError(
            f"{count} vCPUs are wanted, and the host with most has {widest} usable pCPUs: a VM lies on one host, and"
            " none that spans several is made",
            f"ask for {widest} or fewer; or for a VM on each of several hosts: 'hostpart fleet run --gang N -n M ...'",
        )
    needs = {PCPUS: float(count)}
    if smt != "shared":
        needs[CORE_PCPUS] = float(count)
    if policy == "llc":
        needs[LLC] = float(count)
    return needs
