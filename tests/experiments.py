"""Directories of experiments that were never made: any values, in the order and the form in which runs are kept.

:func:`write` takes what each condition's runs are to hold, and :func:`results` reads the same without a directory;
:func:`example` writes one that has something of everything.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from hostpart.experiment.results import Results
from workers.probes.histogram import Histogram
from workers.probes.record import document

__all__ = ["FACTS", "HYBRID", "METRICS", "example", "hybrid", "latencies", "parts", "record", "results", "write"]

_START = datetime(2026, 11, 25, 21, 0, 0, tzinfo=UTC)
# What a plain number stands for, by the probe: the primary metric's name, unit and direction.
METRICS: dict[str, tuple[str, str, str]] = {
    "integer": ("rate", "1/s", "higher"),
    "memory": ("bandwidth", "B/s", "higher"),
    "wakeup": ("latency_p99", "ns", "lower"),
    "noise": ("time_lost", "%", "lower"),
}
_UNITS = {
    **{name: (unit, better) for name, unit, better in METRICS.values()},
    "latency_p50": ("ns", "lower"),
    "latency_p99_9": ("ns", "lower"),
    "latency_max": ("ns", "lower"),
    "wall": ("s", "lower"),
}
# Where the aggressor of a placement sits on a host of two packages, two cores each, two threads each; victim on 2.
_PCPUS = {"same-pcpu": "2", "sibling": "6", "same-llc": "3", "other-package": "1"}
_VICTIM_PCPU = 2
# The same on a hybrid host of two packages, each with two performance cores of two threads and four efficiency cores of
# one; a victim on each kind. Package 1 is nearer than package 2, of which only one core of each kind is there.
_HYBRID_PCPUS = {
    "performance": {
        "same-pcpu": "2", "sibling": "3", "same-llc/efficiency": "4-7", "same-llc/performance": "0-1",
        "other-package-at-16/efficiency": "12-15", "other-package-at-16/performance": "8-11",
        "other-package-at-32/efficiency": "18", "other-package-at-32/performance": "16-17",
    },
    "efficiency": {
        "same-pcpu": "5", "same-llc/efficiency": "4,6-7", "same-llc/performance": "0-3",
        "other-package-at-16/efficiency": "12-15", "other-package-at-16/performance": "8-11",
        "other-package-at-32/efficiency": "18", "other-package-at-32/performance": "16-17",
    },
}  # fmt: skip
_HYBRID_VICTIMS = {"performance": 2, "efficiency": 5}
_RAN: dict[str, Any] = {"as": "host", "alive": True, "exit": None, "did": None, "allowed": None}

FACTS: dict[str, Any] = {
    "hostname": "bench1",
    "kernel": {"release": "6.12.90", "version": "#1 SMP PREEMPT_DYNAMIC", "cmdline": "root=/dev/sda1 isolcpus=2"},
    "cpu": {
        "model": "Example CPU 2.40GHz",
        "vendor": "GenuineIntel",
        "family": 6,
        "model_number": 106,
        "stepping": 6,
        "microcode": "0xd0003a5",
        "flags_of_note": ["constant_tsc", "nonstop_tsc"],
    },
    "smt": {"active": True, "control": "on"},
    "governor": {str(cpu): "performance" for cpu in range(8)},
    "driver": "intel_pstate",
    "turbo": False,
    "frequency_khz": {"min": 800000, "max": 2400000},
    "clocksource": {"current": "tsc", "available": ["tsc", "hpet"]},
    "hypervisor": None,
    "steal_percent_since_boot": 0.0,
    "memory": {"total_bytes": 68719476736, "nodes": {"0": 34359738368, "1": 34359738368}},
    "mitigations": {"meltdown": "Not affected", "mds": "Mitigation: Clear CPU buffers; SMT vulnerable"},
    "load": [0.12, 0.2, 0.18],
    "versions": {
        "hostpart": "0.2.0",
        "python": "3.11.7",
        "numpy": "2.4.6",
        "scipy": "1.17.1",
        "plotly": "7.1.0",
        "hdrhistogram": "0.10.8",
        "numba": None,
    },
    "topology": {
        "schema": 1,
        "source": {"root": "/", "madt": True},
        "usable": "0-7",
        "pcpus": [
            {
                "cpu": cpu,
                "core": cpu % 4,
                "package": cpu % 4 // 2 ^ 1,
                "die": cpu % 4 // 2 ^ 1,
                "numa": cpu % 4 // 2 ^ 1,
                "llc": cpu % 4 // 2 ^ 1,
                "online": True,
                "apic_id": cpu,
                "acpi_uid": cpu,
                "kind": None,
            }
            for cpu in range(8)
        ],
    },
    "caches": [
        {"level": 3, "type": "Unified", "size_bytes": 33554432, "cpus": "0-1,4-5"},
        {"level": 3, "type": "Unified", "size_bytes": 33554432, "cpus": "2-3,6-7"},
    ],
    "isolated": None,
    "nohz_full": None,
    "cgroup": 2,
}


HYBRID: dict[str, Any] = {
    **FACTS,
    "governor": {str(cpu): "performance" for cpu in range(19)},
    "topology": {
        **FACTS["topology"],
        "usable": "0-18",
        "pcpus": [
            {
                "cpu": cpu,
                "core": cpu // 2 * 2 if cpu % 8 < (4 if cpu < 16 else 2) else cpu,
                **dict.fromkeys(("package", "die", "numa", "llc"), cpu // 8),
                "online": True,
                "apic_id": cpu,
                "acpi_uid": cpu,
                "kind": "performance" if cpu % 8 < (4 if cpu < 16 else 2) else "efficiency",
            }
            for cpu in range(19)
        ],
    },
    "caches": None,
}


def parts(condition: str) -> tuple[str, str, str | None, str]:
    """Return victim, isolation level, aggressor and placement of a condition's id.

    ``integer|affinity|alone`` or ``integer|affinity|spinner|same-pcpu``.
    """
    names = condition.split("|")
    return (names[0], names[1], None, names[2]) if len(names) == 3 else (names[0], names[1], names[2], names[3])


def latencies(rng: random.Random, count: int, median_ns: float, spread: float) -> list[int]:
    """Return times in ns with a long tail: their logarithm is normal, with this standard deviation."""
    return [round(median_ns * rng.lognormvariate(0, spread)) for _ in range(count)]


def record(
    probe: str,
    metrics: Mapping[str, Any],
    primary: str,
    histograms: Mapping[str, Iterable[int]] | None = None,
    series: Mapping[str, tuple[str, Sequence[float | None]]] | None = None,
    cpu: int = _VICTIM_PCPU,
) -> dict[str, Any]:
    """Return a probe's record.

    :param metrics: as a record holds them
    :param histograms: times in ns, by name
    :param series: unit and values of slices of 100 ms, by name
    """
    made = {}
    for name, values in (histograms or {}).items():
        made[name] = Histogram("ns")
        made[name].update(values)
    length = max((len(values) for _, values in (series or {}).values()), default=0)
    return document(
        probe,
        "python",
        engine_version="3.11.7",
        parameters={"seconds": 1.0, "warmup": 0.3},
        where={
            **dict.fromkeys(("vm", "vcpu", "vcpus", "pid", "kernel")),
            "pcpu": str(cpu),
            "cpus_allowed": str(cpu),
            "cpus_seen": [cpu],
        },
        cut_short=False,
        primary=primary,
        metrics=dict(metrics),
        histograms={name: one.to_json() for name, one in made.items()},
        slices={
            "start_ns": [100_000_000 * number for number in range(length)],
            "length_ns": [100_000_000] * length,
            "dropped": 0,
            "series": {name: {"unit": unit, "values": list(values)} for name, (unit, values) in (series or {}).items()},
        },
    )


def write(
    directory: Path,
    values: Mapping[str, Sequence[float | Mapping[str, Any] | None]],
    *,
    seed: int = 1,
    name: str = "synthetic",
    again_after: int | None = None,
) -> Path:
    """Write the directory of an experiment whose runs hold *values*, and return it.

    :param values: for each condition's id, alone ones too, what its runs hold in the order in which they were made.
        A number is the primary metric's value (:data:`METRICS`, by the victim's name; else it is a command's wall
        time). A mapping replaces fields of the run, such as ``verdict`` or ``error``; its ``metrics`` may be plain
        numbers, its ``histograms`` (times in ns) and ``series`` (:func:`record`) go into the record. None was not made.
    :param seed: of the order within the blocks
    :param again_after: how many runs were made before it was stopped and started again; None: never
    """
    made = results(values, seed=seed, name=name, again_after=again_after)
    directory.mkdir(parents=True)
    (directory / "experiment.json").write_text(json.dumps(made.experiment, indent=1) + "\n")
    for file, lines in (("sessions.jsonl", made.sessions), ("runs.jsonl", made.runs)):
        (directory / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory


def results(
    values: Mapping[str, Sequence[float | Mapping[str, Any] | None]],
    *,
    seed: int = 1,
    name: str = "synthetic",
    again_after: int | None = None,
) -> Results:
    """Return what a directory that :func:`write` wrote of the same would hold."""
    planned = _plan(values, seed)
    left = {condition: iter(entries) for condition, entries in values.items()}
    runs, when = [], _START
    for slot in planned:
        entry = next(left[slot["condition"]])
        when += timedelta(seconds=2)
        if entry is not None:
            session = int(again_after is not None and slot["run"] >= again_after)
            runs.append(_run(slot, entry, session, when))
    hybrid_host = any(parts(condition)[3].partition("/")[0] in _HYBRID_PCPUS for condition in values)
    facts = HYBRID if hybrid_host else FACTS
    sessions = [_session(number, facts) for number in range(1 if again_after is None else 2)]
    return Results("synthetic", _experiment(values, planned, seed, name), tuple(sessions), tuple(runs))


def _plan(values: Mapping[str, Sequence[Any]], seed: int) -> list[dict[str, Any]]:
    # Blocks for each victim and level: alone before, between and after; the alone runs are dealt out evenly.
    rng, order = random.Random(seed), []
    for alone in [condition for condition in values if parts(condition)[2] is None]:
        group = _group(alone)
        others = [one for one in values if _group(one) == group and one != alone]
        blocks = max((len(values[one]) for one in others), default=1)
        slots, slot, total = blocks * (len(others) + 1), 0, len(values[alone])
        for block in range(blocks):
            here = [one for one in others if block < len(values[one])]
            rng.shuffle(here)
            for place in range(len(others) + 1):
                order += [(block, alone)] * ((slot + 1) * total // slots - slot * total // slots)
                slot += 1
                order += [(block, one) for one in here[place : place + 1]]
    order.sort(key=lambda one: one[0])
    return [{"run": number, "block": block, "condition": condition} for number, (block, condition) in enumerate(order)]


def _group(condition: str) -> tuple[str, str, int]:
    about = _condition(condition)
    return about["victim"], about["isolation"], about["victim_pcpu"]


def _condition(condition: str) -> dict[str, Any]:
    victim, isolation, aggressor, placement = parts(condition)
    kind, _, name = placement.partition("/")
    name, pcpus = (name, _HYBRID_PCPUS[kind]) if kind in _HYBRID_PCPUS else (placement, _PCPUS)
    return {
        "id": condition,
        "victim": victim,
        "isolation": isolation,
        "aggressor": aggressor,
        "placement": placement,
        "degree": name.partition("/")[0].partition("-at-")[0],
        "victim_pcpu": _HYBRID_VICTIMS.get(kind, _VICTIM_PCPU),
        "aggressor_pcpus": pcpus.get(name) if aggressor else None,
        "as": "host" if aggressor else None,
    }


def _experiment(values: Mapping[str, Any], planned: list[dict[str, Any]], seed: int, name: str) -> dict[str, Any]:
    every = [parts(condition) for condition in values]
    victims = [
        {
            "name": victim,
            "probe": victim if victim in METRICS else None,
            "command": None if victim in METRICS else [victim],
            "metric": None,
            "options": {"seconds": "1"},
        }
        for victim in dict.fromkeys(one[0] for one in every)
    ]
    aggressors = [
        {"name": aggressor, "probe": "spin", "command": None, "count": 1, "vm": False}
        for aggressor in dict.fromkeys(one[2] for one in every if one[2])
    ]
    return {
        "schema": 1,
        "hostpart": "0.2.0",
        "name": name,
        "source": f"{name}.toml",
        "seed": seed,
        "design": {
            "victims": victims,
            "aggressors": aggressors,
            "isolation": list(dict.fromkeys(one[1] for one in every)),
            "processes": max((len(entries) for key, entries in values.items() if parts(key)[2] is not None), default=1),
            "seconds": 1.0,
            "warmup": 0.3,
        },
        "plan": {
            "seconds": 2.0 * len(planned),
            "conditions": [_condition(condition) for condition in values],
            "runs": planned,
        },
    }


def _session(number: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "schema": 1,
        "session": number,
        "started": _utc(_START + timedelta(hours=number)),
        "command": ["hostpart", "experiment", "synthetic.toml", "--out", "results"],
        "cwd": "/home/someone",
        "boot_id": "0c1f9a52-5d39-4a05-b4a5-6d2a4a4f6c11",
        "facts": facts,
    }


def _run(slot: Mapping[str, Any], entry: float | Mapping[str, Any], session: int, when: datetime) -> dict[str, Any]:
    about = _condition(slot["condition"])
    metric, unit, better = METRICS.get(about["victim"], ("wall", "s", "lower"))
    given: dict[str, Any] = dict(entry) if isinstance(entry, Mapping) else {"metrics": {metric: entry}}
    metrics = {
        name: dict(one) if isinstance(one, Mapping) else {"value": one, **_unit(name, unit, better)}
        for name, one in given.pop("metrics", {}).items()
    }
    histograms, series = given.pop("histograms", {}), given.pop("series", {})
    of_probe = about["victim"] in METRICS and bool(metrics)
    about.pop("id")
    aggressor = {"name": about["aggressor"], "pid": 4000 + slot["run"], "pcpus": about["aggressor_pcpus"]}
    return {
        "schema": 1,
        "run": slot["run"],
        "block": slot["block"],
        "session": session,
        "condition": slot["condition"],
        **about,
        "started": _utc(when),
        "seconds": 1.9,
        "metrics": metrics,
        "primary": metric,
        "record": record(about["victim"], metrics, metric, histograms, series) if of_probe else None,
        "aggressors": [{**aggressor, "as": "host", "alive": True, "exit": None, "did": None, "allowed": None}]
        if about["aggressor"]
        else [],
        "evidence": None,
        "verdict": "held",
        "reasons": [],
        "error": None,
        **given,
    }


def _unit(name: str, unit: str, better: str) -> dict[str, str]:
    found = _UNITS.get(name, (unit, better))
    return {"unit": found[0], "better": found[1]}


def _utc(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.") + f"{when.microsecond // 1000:03}Z"


def example(directory: Path, *, seed: int = 1, processes: int = 10) -> Path:
    """Write an experiment that has something of everything, and return its directory.

    Three victims at two levels, one of them a command without a record; histograms and series; a tainted run, a broken
    one, a run that failed, some that were not made, a host that grew slower, and a second start.
    """
    rng = random.Random(seed)
    factors = {"free": 0.8, "same-pcpu": 0.5, "sibling": 0.66, "same-llc": 0.99, "other-package": 1.0}
    values: dict[str, list[float | dict[str, Any] | None]] = {}
    for isolation, better in (("affinity", 0.0), ("cpuset", 0.5)):
        for victim in ("integer", "wakeup", "build"):
            for placement, factor in {"alone": 1.0, **factors}.items():
                name = f"{victim}|{isolation}|" + ("alone" if placement == "alone" else f"spinner|{placement}")
                kept = factor + (1 - factor) * better
                count = processes * (len(factors) + 1) if placement == "alone" else processes
                values[name] = [_entry(rng, victim, kept, number / count) for number in range(count)]
    held = values["integer|affinity|spinner|free"]
    held[0] = {**_mapping(held[0]), "verdict": "tainted", "reasons": ["another task ran on pCPU 2 for 12 ms"]}
    held[1] = {**_mapping(held[1]), "verdict": "broken", "reasons": ["the pin was changed to 0-7"]}
    problem = {"problem": "the aggressor spinner ended early, with status 1", "remedy": "run it by hand"}
    values["integer|cpuset|spinner|sibling"][2] = {**_mapping(_entry(rng, "integer", 0.8, 0)), "error": problem}
    values["build|cpuset|spinner|same-llc"][3] = {
        "error": {"problem": "make: not found", "remedy": "install it"},
        "verdict": None,
    }
    values["wakeup|cpuset|spinner|other-package"][-2:] = [None, None]
    return write(directory, values, seed=seed, name="interference", again_after=100)


def hybrid(directory: Path, *, seed: int = 1, processes: int = 6) -> Path:
    """Write an experiment on a hybrid host, whose efficiency cores are slower, and return its directory.

    Two victims, each on a core of each kind; what an aggressor costs one does not hang on the kind. Alone on the
    efficiency core, integer grew faster by a tenth.
    """
    rng = random.Random(seed)
    factors = {"alone": 1.0, "free": 0.9, "same-pcpu": 0.5, "sibling": 0.66}
    values: dict[str, list[float | dict[str, Any] | None]] = {}
    for victim in ("integer", "wakeup"):
        for kind in _HYBRID_PCPUS:
            slow = kind == "efficiency"
            speed = {"integer": 0.5, "wakeup": 0.9}[victim] if slow else 1.0
            values[f"{victim}|affinity|{kind}/alone"] = []
            for name in ("free", *_HYBRID_PCPUS[kind]):
                values[f"{victim}|affinity|spinner|{kind}/{name}"] = []
            for condition in [one for one in values if _group(one) == _group(f"{victim}|affinity|{kind}/alone")]:
                kept = factors.get(parts(condition)[3].partition("/")[2], 1.0)
                count = processes * (1 if parts(condition)[2] else len(_HYBRID_PCPUS[kind]) + 2)
                drift = 0.1 if slow and victim == "integer" and not parts(condition)[2] else 0.0
                values[condition] = [
                    _entry(rng, victim, kept * speed * (1 + drift * number / count), 0) for number in range(count)
                ]
    return write(directory, values, seed=seed, name="hybrid")


def _mapping(entry: float | dict[str, Any] | None) -> dict[str, Any]:
    assert isinstance(entry, dict)
    return entry


def _entry(rng: random.Random, victim: str, kept: float, progress: float) -> dict[str, Any]:
    if victim == "wakeup":
        times = latencies(rng, 400, 5_000 / kept, 0.4 / kept**2)
        made = Histogram("ns")
        made.update(times)
        percentiles = {"latency_p50": 50.0, "latency_p99": 99.0, "latency_p99_9": 99.9}
        metrics: dict[str, Any] = {name: made.percentile(percent) for name, percent in percentiles.items()}
        return {"metrics": {**metrics, "latency_max": made.most}, "histograms": {"latency": times}}
    if victim == "build":
        # This one's host grew slower by a tenth.
        return {"metrics": {"wall": 3.0 / kept * (1 + 0.1 * progress) * rng.gauss(1, 0.01)}}
    rate = 1.2e6 * kept * rng.gauss(1, 0.01)
    series: dict[str, Any] = {"rate": ("1/s", [rate * rng.gauss(1, 0.02) for _ in range(10)])}
    return {"metrics": {"rate": rate}, "series": series}
