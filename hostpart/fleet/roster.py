"""The hosts of a fleet: which workers of the scheduler are hostpart's, what they said of themselves, and their names.

What a worker says is checked here, once; whatever it is, it does no harm to whoever reads a :class:`Roster`.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict

from ..cpuset import CpuSet
from ..errors import UsageError
from ..value import Value
from .identity import PROTOCOL
from .supply import NOTHING

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = ["RESOURCES", "FleetHost", "LeftOut", "Roster", "choose", "differences", "look", "read", "resources"]

RESOURCES = tuple(NOTHING)

_MAX_NAME = 64
_MAX_TEXT = 256
_MAX_PATH = 4096
_MAX_COMMAND = 64  # words
_ADDRESS = re.compile(r"[a-z]{2,8}://[0-9A-Za-z.:_%\[\]/-]{1,255}", re.ASCII)
_UNSAFE = re.compile(r"[^A-Za-z0-9._-]+", re.ASCII)
_MACHINE = re.compile(r"[0-9a-f]{16}", re.ASCII)
_PRELOAD = "start it with: dask worker ADDRESS --nthreads 1 --preload hostpart.fleet.agent"
_SAME = "install the same hostpart on that host and here, and restart its worker"
_GOING = ("closing", "closed", "closing_gracefully", "failed", "stopping", "stopped")


class FleetHost(Value):
    """A worker with hostpart in it.

    :ivar name: unique in the fleet, of ``A-Za-z0-9._-``: fit for a file's name, and for a terminal
    :ivar address: the worker's, by which Dask is asked for it
    :ivar hello: what it said of itself when it registered; every field is there and of its type
    :ivar resources: what was free when it last said so, by :data:`RESOURCES`; not below 0
    :ivar shares_with: the names of workers that take pCPUs from the same leases
    """

    name: str
    address: str
    hello: dict[str, Any]
    resources: dict[str, float]
    shares_with: tuple[str, ...] = ()


class LeftOut(Value):
    """A worker that nothing is asked of.

    :ivar name: made as a host's is; no host has it
    :ivar address: the worker's, or empty where it is not fit to be shown
    :ivar why: a clause that goes on from the name
    :ivar remedy: what to do, in the imperative
    """

    name: str
    address: str
    why: str
    remedy: str


class Roster(Value):
    """All workers that a scheduler knows, sorted by name.

    :ivar gone: hosts that were there before, whose names are kept for them
    """

    hosts: tuple[FleetHost, ...] = ()
    left_out: tuple[LeftOut, ...] = ()
    gone: tuple[FleetHost, ...] = ()

    def host(self, name: str) -> FleetHost | None:
        """Return the host of that name, if it is there."""
        return next((host for host in self.hosts if host.name == name), None)


async def look(client: Any, before: Roster | None = None) -> Roster:
    """Ask the scheduler which workers there are now.

    :param client: a ``distributed.Client``, asynchronous
    :param before: an earlier answer: hosts that are still there, or back, keep the names they had in it
    """
    return read(await client.scheduler.identity(n_workers=-1), before)


def read(identity: object, before: Roster | None = None) -> Roster:
    """Return the roster that a scheduler's identity holds. Pure.

    :param identity: what ``Client.scheduler_info`` shows; what is not as Dask writes it is left out
    :param before: see :func:`look`
    """
    workers = identity.get("workers") if isinstance(identity, dict) else None
    found: list[tuple[str, str | None, dict[str, Any], dict[str, float]]] = []
    out: list[tuple[str, str, str, str]] = []
    for address, worker in workers.items() if isinstance(workers, dict) else ():
        fit = address if isinstance(address, str) and _ADDRESS.fullmatch(address) else ""
        if not fit or not isinstance(worker, dict):
            out.append(("", fit, "is no worker as Dask describes one", "see what is connected to the scheduler"))
            continue
        given = _given(worker.get("name"))
        hello = worker.get("hostpart")
        if reason := _refused(hello, worker.get("status")):
            out.append((given or _safe(fit.partition("://")[2]), fit, *reason))
        else:
            fields = dict(_fields(hello))
            fields["command"] = list(fields["command"])
            found.append((fit, given, fields, resources(worker.get("resources"))))
    known = (*before.hosts, *before.gone) if before else ()
    names = _named([(address, given, hello) for address, given, hello, _ in found], known)
    hosts = [
        FleetHost(name, address, hello, resources)
        for name, (address, _, hello, resources) in zip(names, found, strict=True)
    ]
    taken = {*names, *(host.name for host in known)}
    left = []
    for name, address, why, remedy in out:
        left.append(LeftOut(_unique(name or "worker", taken), address, why, remedy))
        taken.add(left[-1].name)
    beside: dict[tuple[object, ...], list[FleetHost]] = defaultdict(list)
    for host in hosts:
        beside[_leases(host)].append(host)
    shared = [host.replace(shares_with=_sharers(host, beside[_leases(host)])) for host in hosts]
    by_name = sorted(shared, key=lambda host: _natural(host.name))
    gone = tuple(host for host in known if host.name not in names)
    return Roster(tuple(by_name), tuple(sorted(left, key=lambda one: _natural(one.name))), gone)


def choose(roster: Roster, names: Sequence[str]) -> Roster:
    """Return *roster* with the hosts of these names only, or with all where there are none.

    :raises UsageError: naming those that are not there, with the reason where it is known
    """
    if not names:
        return roster
    out = {one.name: one for one in roster.left_out}
    unknown = [name for name in names if roster.host(name) is None]
    if unknown:
        known = ", ".join(host.name for host in roster.hosts) or "none"
        told = [f"{name} {out[name].why}" if name in out else f"no host is named {name!r}" for name in unknown]
        remedies = [out[name].remedy for name in unknown if name in out]
        raise UsageError(
            f"{'; '.join(told)}; there are: {known}", remedies[0] if remedies else "hostpart fleet topology"
        )
    return roster.replace(hosts=tuple(host for host in roster.hosts if host.name in names))


def resources(value: object) -> dict[str, float]:
    """Return what a host says that it has free; nothing of what it does not say, or not as a number."""
    given: Mapping[Any, Any] = value if isinstance(value, dict) else {}
    return {name: _number(given.get(name)) for name in RESOURCES}


def differences(hosts: Iterable[FleetHost]) -> tuple[str, ...]:
    """Return a sentence for hostpart's and for Python's version where hosts, or this process and they, differ in it."""
    import platform

    from .. import __version__

    hosts = tuple(hosts)
    sentences = []
    for noun, field, own in (("hostpart", "version", __version__), ("Python", "python", platform.python_version())):
        by_version: dict[str, list[str]] = {}
        for host in hosts:
            by_version.setdefault(host.hello[field], []).append(host.name)
        if by_version and set(by_version) != {own}:
            there = "; ".join(f"{version} on {_listed(names)}" for version, names in sorted(by_version.items()))
            sentences.append(f"versions of {noun} differ: {own} here; {there}")
    return tuple(sentences)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


# What a worker says of itself


def _refused(hello: object, status: object) -> tuple[str, str] | None:
    """Return why this worker is none of the fleet's hosts, and what to do; None if it is one."""
    if hello is None:
        return "has no hostpart in it", _PRELOAD
    if not isinstance(hello, dict):
        return "says of itself what is no table", _SAME
    protocol = hello.get("protocol")
    if type(protocol) is not int:
        return "says of itself that its 'protocol' is no number", _SAME
    if protocol != PROTOCOL:
        version = hello.get("version")
        which = f" (hostpart {version})" if _is_text(version, 32) else ""
        # An int may have any number of digits.
        number = str(protocol) if abs(protocol) < 10**6 else "another"
        return f"speaks protocol {number}{which}, and this hostpart {PROTOCOL}", _SAME
    for field, value in _fields(hello):
        if fault := _fault(field, value):
            return f"says of itself that its {field!r} is {fault}", _SAME
    if isinstance(status, str) and status in _GOING:
        return "is about to end", "restart its worker if it should not"
    return None


_FIELDS = (
    "protocol", "version", "hostname", "machine", "boot_id", "domain", "usable", "python", "user", "command",
)  # fmt: skip


def _fields(hello: Any) -> list[tuple[str, Any]]:
    # No more than these are kept: a table may hold anything else.
    return [(field, hello.get(field)) for field in _FIELDS]


def _fault(field: str, value: object) -> str:
    if field == "protocol":
        return ""
    if field == "command":
        words = value if isinstance(value, (list, tuple)) else None
        fits = words is not None and len(words) <= _MAX_COMMAND
        return "" if fits and all(_is_text(word, _MAX_PATH) for word in words or ()) else "no list of words"
    if not _is_text(value, _MAX_PATH if field in ("domain", "usable") else _MAX_TEXT):
        return _kind(value)
    if field == "machine" and not _MACHINE.fullmatch(str(value)):
        return "not 16 hexadecimal digits"
    if field == "usable":
        try:
            CpuSet.parse(str(value))
        except ValueError:
            return "no set of CPUs"
    return ""


def _is_text(value: object, limit: int = _MAX_TEXT) -> bool:
    return isinstance(value, str) and len(value) <= limit and value.isprintable() and value.strip() != ""


def _kind(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, str):
        return "empty" if not value.strip() else "too long" if value.isprintable() else "no plain text"
    return f"of type {type(value).__name__}"


def _number(value: object) -> float:
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1e9 and math.isfinite(value):
        return float(value)
    return 0.0


# Names


def _safe(text: str) -> str:
    # Neither "." nor "..", and no option.
    return _UNSAFE.sub("-", text[: 4 * _MAX_NAME])[:_MAX_NAME].strip("-.")


def _given(name: object) -> str | None:
    # A worker without a name has its address for one, which is another after each start, or its number in a cluster.
    if not isinstance(name, str) or "://" in name:
        return None
    return _safe(name) or None


def _unique(name: str, taken: Iterable[str]) -> str:
    if name not in taken:
        return name
    number = 2
    while f"{name[: _MAX_NAME - 5]}-{number}" in taken:
        number += 1
    return f"{name[: _MAX_NAME - 5]}-{number}"


def _named(workers: Sequence[tuple[str, str | None, dict[str, Any]]], known: Sequence[FleetHost]) -> list[str]:
    """Return each worker's name: the one it was given, else its host's; a number is added where two would be alike.

    A host that is in *known* keeps the name that it had, and no other gets it. Else the order is that of the machines'
    identities and then of the addresses, so that it does not matter who has registered first.
    """
    order = sorted(workers, key=lambda one: (one[1] is None, one[2]["machine"], one[2]["domain"], one[0]))
    names: dict[str, str] = {}
    left = list(known)
    # The same worker by its address; then one that was started again, by its host and by the name that it would have.
    for by_address in (True, False):
        for address, given, hello in order:
            for host in left:
                if address in names or (by_address and address != host.address):
                    continue
                if _place(hello) == _place(host.hello) and _stems(host.name, _wanted(given, hello)):
                    names[address] = host.name
                    left.remove(host)
                    break
    taken = {host.name for host in known}
    # First who can have the very name, so that a number that is added takes nobody's.
    for as_it_is in (True, False):
        for address, given, hello in order:
            wanted = _wanted(given, hello)
            if address not in names and not (as_it_is and wanted in taken):
                names[address] = _unique(wanted, taken)
                taken.add(names[address])
    return [names[address] for address, _, _ in workers]


def _wanted(given: str | None, hello: Mapping[str, Any]) -> str:
    return given or _safe(hello["hostname"]) or "host"


def _stems(name: str, wanted: str) -> bool:
    # Whether it is what _unique() makes of it.
    return name == wanted or bool(re.fullmatch(re.escape(wanted[: _MAX_NAME - 5]) + "-[0-9]+", name))


def _place(hello: Mapping[str, Any]) -> tuple[object, ...]:
    # Not the boot: a host that was rebooted is the same host.
    return hello["machine"], hello["hostname"], hello["domain"]


def _leases(host: FleetHost) -> tuple[object, ...]:
    # Those who keep them in one place have the same.
    return host.hello["boot_id"], host.hello["domain"]


def _sharers(host: FleetHost, beside: Sequence[FleetHost]) -> tuple[str, ...]:
    usable = CpuSet.parse(host.hello["usable"])
    return tuple(sorted(one.name for one in beside if one is not host and CpuSet.parse(one.hello["usable"]) & usable))


def _natural(name: str) -> tuple[tuple[bool, int, str], ...]:
    # node-10 after node-9
    return tuple((part.isdigit(), int(part) if part.isdigit() else 0, part) for part in re.split(r"([0-9]+)", name))
