"""The machine's facts in words, under the same labels for every machine, so that two can be compared."""

from __future__ import annotations

from ..cpuset import CpuSet
from ..experiment.intake import finite
from . import quantity

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

__all__ = ["UNKNOWN", "changes", "rows", "short", "size"]

UNKNOWN = "not known"
# What differs from one start to the next on any host, and so is no change of it.
_RESTLESS = frozenset({"load when it started"})


def rows(session: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    """Return label and text of every fact, in the order to read them; all are there, those not known as such.

    :param session: a line of ``sessions.jsonl``; None: there is none
    """
    session = session or {}
    facts = _mapping(session.get("facts"))
    kernel, cpu, smt = (_mapping(facts.get(name)) for name in ("kernel", "cpu", "smt"))
    clock, memory = _mapping(facts.get("clocksource")), _mapping(facts.get("memory"))
    steal = facts.get("steal_percent_since_boot")
    return [
        ("host", _text(facts.get("hostname"))),
        ("started", _text(session.get("started"))),
        ("boot id", _text(session.get("boot_id"))),
        ("kernel", _text(kernel.get("release"))),
        ("kernel version", _text(kernel.get("version"))),
        ("kernel command line", _text(kernel.get("cmdline"))),
        ("processor", _text(cpu.get("model"))),
        ("family, model, stepping", _identity(cpu)),
        ("microcode", _text(cpu.get("microcode"))),
        ("flags of note", _list(cpu.get("flags_of_note"))),
        ("pCPUs", _pcpus(_mapping(facts.get("topology")))),
        ("caches", _caches(facts.get("caches"))),
        ("SMT", _smt(smt)),
        ("governor", _governor(facts.get("governor"))),
        ("frequency driver", _text(facts.get("driver"))),
        ("turbo", _switch(facts.get("turbo"))),
        ("frequency", _frequency(_mapping(facts.get("frequency_khz")))),
        ("clock source", _clock(clock)),
        ("hypervisor", _text(facts.get("hypervisor"), "none reported")),
        ("time stolen since boot", f"{quantity.number(steal)} %" if finite(steal) else UNKNOWN),
        ("memory", _memory(memory)),
        ("mitigations", _mitigations(facts.get("mitigations"))),
        ("isolated pCPUs (isolcpus)", _text(facts.get("isolated"), "none reported")),
        ("tickless pCPUs (nohz_full)", _text(facts.get("nohz_full"), "none reported")),
        ("cgroup version", _text(facts.get("cgroup"))),
        ("load when it started", _list(facts.get("load"))),
        ("versions", _versions(_mapping(facts.get("versions")))),
    ]


def changes(sessions: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """Return the facts that are not the same in all of *sessions*: label, and the text in each.

    What is never the same (when it started, the load) is left out.
    """
    each = [dict(rows(session)) for session in sessions]
    labels = list(each[0]) if each else []
    found = [(label, [one[label] for one in each]) for label in labels]
    return [(label, texts) for label, texts in found if len(set(texts)) > 1 and label not in {*_RESTLESS, "started"}]


def short(session: Mapping[str, Any] | None) -> str:
    """Return the host in a line: its name, processor, kernel and date; only what is known of it."""
    known = dict(rows(session))
    parts = [known[label] for label in ("host", "processor", "kernel")]
    parts[2] = UNKNOWN if parts[2] == UNKNOWN else f"Linux {parts[2]}"
    date = known["started"][:10] if known["started"] != UNKNOWN else UNKNOWN
    return " · ".join(part for part in (*parts, date) if part != UNKNOWN)


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


# Makes a fact that is not as hostpart writes it, from another version or by hand, one that is not known.
def _readable(told: Callable[[Any], str]) -> Callable[[Any], str]:
    def guarded(fact: object) -> str:
        try:
            return told(fact)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError):
            return UNKNOWN

    return guarded


def _text(value: object, missing: str = UNKNOWN) -> str:
    return missing if value is None or value == "" else str(value)


def _list(values: object) -> str:
    return ", ".join(map(str, values)) if isinstance(values, list) and values else UNKNOWN


def _switch(value: object) -> str:
    return UNKNOWN if value is None else "on" if value else "off"


@_readable
def _identity(cpu: Mapping[str, Any]) -> str:
    numbers = [cpu.get(name) for name in ("family", "model_number", "stepping")]
    if all(one is None for one in numbers):
        return UNKNOWN
    maker = f"{cpu['vendor']} " if cpu.get("vendor") else ""
    return maker + ", ".join("?" if one is None else str(one) for one in numbers)


@_readable
def _pcpus(topology: Mapping[str, Any]) -> str:
    pcpus = [one for one in topology.get("pcpus") or () if isinstance(one, dict)]
    online = [one for one in pcpus if one.get("online")]
    if not pcpus:
        return UNKNOWN
    parts = [quantity.count(len(online), "pCPU")]
    for field, noun in (("core", "core"), ("package", "package"), ("numa", "NUMA node")):
        known = {one[field] for one in online if one.get(field) is not None}
        if known:
            parts.append(quantity.count(len(known), noun))
    if len(online) < len(pcpus):
        parts.append(f"{len(pcpus) - len(online)} offline")
    if topology.get("usable"):
        parts.append(f"usable {topology['usable']}")
    return ", ".join(parts)


@_readable
def _caches(caches: object) -> str:
    kinds: dict[str, int] = {}
    for one in caches if isinstance(caches, list) else ():
        letter = {"Data": "d", "Instruction": "i"}.get(one.get("type"), "")
        name = f"L{one.get('level')}{letter} {size(one.get('size_bytes'))}"
        kinds[name] = kinds.get(name, 0) + 1
    return ", ".join(f"{many} × {name}" for name, many in sorted(kinds.items(), key=lambda one: one[0])) or UNKNOWN


def size(value: object) -> str:
    """Return a size of memory in powers of two, as caches and nodes are sold by: ``32 MiB``."""
    if not isinstance(value, (int, float)) or not finite(value):
        return "of unknown size"
    steps = ((1 << 40, "TiB"), (1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB"))
    step, unit = next(((step, unit) for step, unit in steps if value >= step), (1, "bytes"))
    return f"{quantity.number(value / step)} {unit}"


@_readable
def _smt(smt: Mapping[str, Any]) -> str:
    active, control = smt.get("active"), smt.get("control")
    if active is None:
        return _text(control)
    return _switch(active) + (f" (control: {control})" if control else "")


@_readable
def _governor(governors: object) -> str:
    if not isinstance(governors, dict) or not governors:
        return UNKNOWN
    by_name: dict[str, list[int]] = {}
    for cpu, name in governors.items():
        by_name.setdefault(str(name), []).append(int(cpu))
    if len(by_name) == 1:
        return next(iter(by_name))
    return ", ".join(f"{name} on {CpuSet.of(cpus)}" for name, cpus in sorted(by_name.items()))


@_readable
def _frequency(frequency: Mapping[str, Any]) -> str:
    ends = [frequency.get(name) for name in ("min", "max")]
    if all(end is None for end in ends):
        return UNKNOWN
    return " to ".join("?" if end is None else f"{end / 1e6:.2f}" if finite(end) else UNKNOWN for end in ends) + " GHz"


@_readable
def _clock(clock: Mapping[str, Any]) -> str:
    others = [str(name) for name in clock.get("available") or () if name != clock.get("current")]
    return _text(clock.get("current")) + (f" (also there: {', '.join(others)})" if others else "")


@_readable
def _memory(memory: Mapping[str, Any]) -> str:
    if memory.get("total_bytes") is None:
        return UNKNOWN
    nodes = memory.get("nodes") or {}
    each = ", ".join(f"node {node}: {size(value)}" for node, value in nodes.items())
    return size(memory["total_bytes"]) + (f" ({each})" if len(nodes) > 1 else "")


@_readable
def _mitigations(mitigations: object) -> str:
    if not isinstance(mitigations, dict) or not mitigations:
        return UNKNOWN
    # What the processor is not affected by fills half a page and tells nothing.
    told = [f"{name}: {text}" for name, text in mitigations.items() if text != "Not affected"]
    spared = len(mitigations) - len(told)
    return "; ".join(
        [*told, f"not affected by {quantity.count(spared, 'other')}" if told else f"not affected by any of {spared}"]
    )


@_readable
def _versions(versions: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {version or 'not there'}" for name, version in versions.items()) or UNKNOWN
