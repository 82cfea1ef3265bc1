"""Directories of experiments on many hosts that were never made, written by the journal that writes real ones."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hostpart.fleet.journal import Journal
from tests import experiments

__all__ = ["DOCUMENT", "REQUEST", "add", "facts", "three", "values", "write"]

RUN = "0123456789ab"
REQUEST = f"{RUN}.0"
DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "kind": "experiment",
    "run": RUN,
    "name": "synthetic",
    "argv": ["fleet", "--scheduler", "tls://head:8786", "experiment", "synthetic.toml", "--out", "results"],
    "created": "2026-11-25T21:00:00Z",
    "requests": 3,
}
# How much of its rate a victim keeps, by the aggressor and where it is.
_KEPT = {
    "alone": 1.0,
    "spinner|same-pcpu": 0.5,
    "spinner|sibling": 0.75,
    "spinner|same-llc": 1.0,
    "thrash|same-llc": 0.8,
}


def values(seed: int, speed: float = 1.0, *, noise: float = 0.01, processes: int = 6) -> dict[str, list[Any]]:
    """Return what the runs of one host hold: two victims, of which *speed* times the usual is reached."""
    rng = random.Random(seed)
    found: dict[str, list[Any]] = {}
    for name, part in _KEPT.items():
        count = 2 * processes if name == "alone" else processes
        rates = [1.2e6 * speed * part * rng.gauss(1, noise) for _ in range(count)]
        found[f"integer|affinity|{name}"] = list(rates)
        walls = [2.5 / speed / part * rng.gauss(1, noise) for _ in range(count)]
        found[f"compile|affinity|{name}"] = list(walls)
    return found


def facts(name: str, **changes: Any) -> dict[str, Any]:
    """Return a host's facts, all alike but for its name and *changes*."""
    return {**experiments.FACTS, "hostname": name, **changes}


def write(
    directory: Path,
    hosts: Mapping[str, Mapping[str, Any] | None],
    *,
    about: Mapping[str, Mapping[str, Any]] | None = None,
    document: Mapping[str, Any] = DOCUMENT,
) -> Path:
    """Write the directory of an experiment on *hosts*, and return it.

    :param hosts: what each one's runs hold, as :func:`experiments.write` takes it; None: it was chosen and said nothing
    :param about: by name, what is special: ``facts`` or ``skew_s``
    """
    journal = Journal(str(directory), {**document, "requests": len(hosts)})
    for number, (name, held) in enumerate(hosts.items()):
        add(journal, name, held, f"{RUN}.{number}", **(about or {}).get(name, {}))
    journal.close()
    return directory


def add(
    journal: Journal,
    name: str,
    held: Mapping[str, Any] | None,
    request: str,
    *,
    facts: Mapping[str, Any] | None = None,
    skew_s: float = 0.01,
) -> None:
    """Have *journal* note what a host says in the course of an experiment."""
    journal.decision(request, "asked")
    journal.decision(request, "placed", host=name)
    if held is None:
        journal.decision(request, "lost", host=name)
        return
    known = {**experiments.FACTS, "hostname": name, **(facts or {})}
    hello = {"protocol": 1, "version": "0.2.0", "hostname": name, "usable": "0-7"}
    journal.host(name, address=f"tls://{name}:4000", hello=hello, facts=known, skew_s=skew_s, rtt_s=0.002)
    made = experiments.results(held)
    offset = 0
    journal.line(name, "experiment", request=request, document=made.experiment, offset=(offset := offset + 100))
    for session in made.sessions:
        told = {**session, "facts": known}
        journal.line(name, "session", request=request, session=told, offset=(offset := offset + 100))
    for run in made.runs:
        journal.line(name, "run", request=request, run=run, offset=(offset := offset + 100))
    state = {"id": request, "state": "ended", "host": name, "status": 0, "error": None, "notes": []}
    journal.line(name, "outcome", request=request, state=state)
    journal.decision(request, "ended", host=name, status=0)


def three(directory: Path) -> Path:
    """Write an experiment on three hosts of which the last, ``gamma``, is slowed by 30 %, and return its directory."""
    return write(directory, {"alpha": values(1), "beta": values(2, 1.01), "gamma": values(3, 0.7)})
