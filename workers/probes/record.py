"""The record that a probe writes at its end, and that another tool's output is read into; as JSON, and to read.

``record.schema.json`` beside this file describes it. What is not known is null, never 0.
"""

from __future__ import annotations

import json
import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from .histogram import Histogram

__all__ = ["SCHEMA", "document", "metric", "percentiles", "text", "write"]

SCHEMA = 1
# What is told of a histogram in one line.
_PERCENTILES = (50.0, 99.0, 99.9)
_NS = ((1_000_000_000, "s"), (1_000_000, "ms"), (1_000, "µs"))
_LARGE = ((1_000_000_000, "G"), (1_000_000, "M"), (1_000, "k"))


def document(probe: str, engine: str, **facts: Any) -> dict[str, Any]:
    """Return a record in which everything that *facts* does not hold is null or empty.

    :param engine: what measured: ``python``, ``numba``, or another tool's name
    """
    empty: dict[str, Any] = {
        "schema": SCHEMA,
        "probe": probe,
        "engine": engine,
        "engine_version": None,
        "fallback": None,
        "parameters": {},
        "started": None,
        "ended": None,
        "cut_short": None,
        "where": None,
        "calibration": None,
        "primary": None,
        "metrics": {},
        "histograms": {},
        "slices": None,
        "usage": None,
    }
    unknown = facts.keys() - empty.keys()
    if unknown:
        raise ValueError(f"a record has no {', '.join(sorted(unknown))}")
    return {**empty, **facts}


def metric(value: float | None, unit: str, better: str) -> dict[str, Any]:
    """Return one figure as a record holds it.

    :param unit: such as ``ns``, ``1/s``, ``B/s``, ``%``; ``1`` for a number of something
    :param better: ``lower`` or ``higher``
    """
    return {"value": value, "unit": unit, "better": better}


def percentiles(histogram: Histogram, unit: str, name: str) -> dict[str, dict[str, Any]]:
    """Return the metrics that are read off a histogram of times: ``NAME_p50`` and so on, and ``NAME_max``."""
    found = {
        f"{name}_p{str(percent).removesuffix('.0').replace('.', '_')}": metric(
            histogram.percentile(percent), unit, "lower"
        )
        for percent in _PERCENTILES
    }
    return {**found, f"{name}_max": metric(histogram.most, unit, "lower")}


def write(record: Mapping[str, Any], *, as_json: bool) -> None:
    """Write the record to standard output: a line of JSON, or some lines to read."""
    out = f"{json.dumps(record, separators=(',', ':'), allow_nan=False)}\n" if as_json else text(record)
    rest = memoryview(out.encode())
    # The vCPUs of a VM share one standard output, and one write is whole on a pipe up to 4 KiB only. A lock of this
    # kind belongs to the process; the other kind would be shared by all that inherited the descriptor.
    try:
        import fcntl

        fcntl.lockf(1, fcntl.LOCK_EX)
    except OSError:
        pass  # it is a socket, or a file of a system that has no locks
    while rest:
        rest = rest[os.write(1, rest) :]


def text(record: Mapping[str, Any]) -> str:
    """Return the record in a few lines, the primary metric first."""
    where = record["where"] or {}
    seat = f"{where['vm']} vCPU {where['vcpu']}, " if where.get("vm") else ""
    cpus = f"{seat}pCPU {where['cpus_allowed']}" if where.get("cpus_allowed") else ""
    seconds = _seconds(record)
    head = ", ".join(part for part in (cpus, seconds, f"engine {record['engine']}") if part)
    lines = [f"{record['probe']}: {head}"]
    names = sorted(record["metrics"], key=lambda name: name != record["primary"])
    width = max(map(len, names), default=0)
    for name in names:
        one, words = record["metrics"][name], name.replace("p99_9", "p99.9").replace("_", " ")
        lines.append(f"  {words:<{width}}  {_shown(one['value'], one['unit'])}")
    if record["cut_short"]:
        lines.append("  cut short by a signal")
    if record["fallback"]:
        lines.append(f"  interpreted: {record['fallback']}")
    return "\n".join(lines) + "\n"


def _seconds(record: Mapping[str, Any]) -> str:
    times = [record[name]["monotonic_ns"] for name in ("started", "ended") if record[name]]
    return f"{(times[1] - times[0]) / 1e9:.3g} s" if len(times) == 2 and None not in times else ""


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "not known"
    if unit == "ns":
        scale, unit = next(((scale, unit) for scale, unit in _NS if value >= scale), (1, "ns"))
        return f"{value / scale:.4g} {unit}"
    if unit in ("1", "%"):
        return f"{value:.4g}{'' if unit == '1' else ' %'}"
    scale, prefix = next(((scale, prefix) for scale, prefix in _LARGE if value >= scale), (1, ""))
    if unit == "1/s":
        return f"{value / scale:.4g}{' ' * bool(prefix)}{prefix}/s"
    return f"{value / scale:.4g} {prefix}{unit}"
