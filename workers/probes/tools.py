"""Other tools' output, read into the records that probes write: text in, records out.

It starts nothing and opens nothing. cyclictest and oslat (rt-tests) are read from their ``--json``, stress-ng from the
table of ``--metrics``, rtla from what ``timerlat hist`` and ``osnoise hist`` print. What a tool does not tell is null.
"""

from __future__ import annotations

import json
import re

from .record import document, metric

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["cyclictest", "oslat", "rtla_hist", "stress_ng"]

_US = 1000  # ns
# "stress-ng: metrc: [6227] cpu  76  2.04  0.06  0.00  37.16  1320.15  2.82  6540"; older ones end before 2.82 or 6540.
_STRESSOR = re.compile(
    r"stress-ng: \w+: +\[\d+\] ([a-z][a-z0-9-]*) +(\d+)((?: +\d+\.\d+){5,6})(?: +(\d+))?\s*", re.ASCII
)
_COLUMN = re.compile(r"(IRQ|Thr|Usr|CPU)-(\d+)", re.ASCII)
_NAMES = {"IRQ": "irq", "Thr": "thread", "Usr": "user", "CPU": "gap"}
_UNITS = {"nanoseconds (ns)": 1, "microseconds (us)": _US}


def cyclictest(text: str) -> tuple[dict[str, Any], ...]:
    """Return a record for each thread of a run of ``cyclictest --json=FILE``.

    Without ``-h`` there is no histogram, and the maximum is the primary metric instead of the 99th percentile. A
    bucket of it holds the latencies of that many whole microseconds; what is beyond the last is in an open one.

    :raises ValueError: where it is something else

    Source: cyclictest(8), "--json"; as version 2.4 of rt-tests writes it.
    """
    top = _rt_tests(text, "cyclictest")
    scale = 1 if top.get("resolution_in_ns") else _US
    records = []
    for number, thread in _threads(top):
        counts = {int(low): int(count) for low, count in thread["histogram"].items()}
        buckets: list[list[int | None]] = [
            [low * scale, (low + 1) * scale, count] for low, count in sorted(counts.items())
        ]
        beyond = int(thread["cycles"]) - sum(counts.values())
        if counts and beyond > 0:
            buckets.append([buckets[-1][1], None, beyond])
        most = int(thread["max"]) * scale
        metrics = _times("latency", buckets, most)
        metrics["wakeups"] = metric(int(thread["cycles"]), "1", "higher")
        histogram = _histogram(buckets, int(thread["min"]) * scale, most)
        records.append(
            document(
                "cyclictest", "cyclictest", **_run(top, thread["cpu"]),
                parameters={"thread": number, "command": top.get("cmdline:")},
                primary="latency_p99" if counts else "latency_max",
                metrics=metrics,
                histograms={"latency": histogram} if counts else {},
            )
        )  # fmt: skip
    return tuple(records)


def oslat(text: str) -> tuple[dict[str, Any], ...]:
    """Return a record for each pCPU of a run of ``oslat --json=FILE``.

    Bucket N holds gaps of N - 1 to N microseconds, so the first is the loop itself and not counted as an event, and
    every figure but the time lost is rounded up to a microsecond. In that, a gap counts with its bucket's middle, half
    a microsecond less. How long the gaps beyond the last bucket were is what is left of the average, which has them
    in full.

    :raises ValueError: where it is something else

    Source: rt-tests, src/oslat/oslat.c, insert_bucket() and calculate(); the JSON as version 2.4 writes it.
    """
    top = _rt_tests(text, "oslat")
    records = []
    for number, thread in _threads(top):
        counts = sorted((int(high), int(count)) for high, count in thread["histogram"].items())
        buckets: list[list[int | None]] = [[(high - 1) * _US, high * _US, count] for high, count in counts]
        most = int(thread["max"]) * _US
        if buckets and most > counts[-1][0] * _US:
            buckets[-1][1] = None
        events = sum(count for high, count in counts if high > 1)
        seconds = float(thread["duration"])
        lost = _lost_us(counts, float(thread["avg"]), int(thread["max"]))
        records.append(
            document(
                "oslat", "oslat", **_run(top, thread["cpu"]),
                parameters={"thread": number, "command": top.get("cmdline:")},
                calibration={"clock": "TSC", "ns_per_loop": None, "floor_ns": None, "threshold_ns": _US},
                primary="longest_gap",
                metrics={
                    "longest_gap": metric(most, "ns", "lower"),
                    "events": metric(events / seconds if seconds else None, "1/s", "lower"),
                    "observed": metric(seconds * 1e9, "ns", "higher"),
                    "lost": metric(lost * _US, "ns", "lower"),
                    "time_lost": metric(lost / seconds / 10_000 if seconds else None, "%", "lower"),
                },
                histograms={"gap": _histogram(buckets, (int(thread["min"]) - 1) * _US, most)},
            )
        )  # fmt: skip
    return tuple(records)


def _lost_us(counts: list[tuple[int, int]], average: float, most: int) -> float:
    lost = sum((high - 0.5) * count for high, count in counts if high > 1)
    if counts and most > counts[-1][0]:
        # The average is over all turns of the loop, each as its bucket's number, plus what is beyond the last bucket.
        # It is told to a millionth of a microsecond, which is 0.002 % of the time at 40 million turns a second.
        turns, whole = sum(count for _, count in counts), sum(high * count for high, count in counts)
        lost += max(0.0, average * turns - whole)
    return lost


def stress_ng(text: str) -> tuple[dict[str, Any], ...]:
    """Return a record for each stressor in the table that ``stress-ng --metrics`` prints, in its order.

    Its "bogo ops" are its own units of work: those of one stressor and one version compare, and no others.

    :raises ValueError: where there is no such table

    Source: stress-ng(1), "--metrics"; the columns of version 0.15.06, and of older ones, which have fewer.
    """
    records = []
    for line in text.splitlines():
        found = _STRESSOR.fullmatch(line)
        if not found:
            continue
        name, operations, numbers, rss_kb = found.groups()
        wall, user, system, per_second, per_cpu_second, *used = map(float, numbers.split())
        records.append(
            document(
                f"stress-ng:{name}", "stress-ng",
                primary="operations",
                metrics={
                    "operations": metric(per_second, "1/s", "higher"),
                    "operations_per_cpu_second": metric(per_cpu_second, "1/s", "higher"),
                    "operations_done": metric(int(operations), "1", "higher"),
                    "wall": metric(wall * 1e9, "ns", "lower"),
                    "user": metric(user * 1e9, "ns", "lower"),
                    "system": metric(system * 1e9, "ns", "lower"),
                    "cpu_used": metric(used[0] if used else None, "%", "higher"),
                    "memory": metric(int(rss_kb) * 1024 if rss_kb else None, "B", "lower"),
                },
            )
        )  # fmt: skip
    if not records:
        raise ValueError("this is not what stress-ng --metrics prints: no line of it tells a stressor's bogo ops")
    return tuple(records)


def rtla_hist(text: str, *, bucket: int = 1, entries: int = 256) -> tuple[dict[str, Any], ...]:
    """Return a record for each pCPU in what ``rtla timerlat hist`` or ``rtla osnoise hist`` prints.

    The primary metric is the largest latency of the timer's thread, or the longest gap; averages are not taken over.

    :param bucket: a bucket's width in the printed unit, what ``-b`` was: the output does not tell
    :param entries: how many buckets there were at most, what ``-E`` was; what is beyond is in an open bucket
    :raises ValueError: where it is something else

    Source: Documentation/tools/rtla/rtla-timerlat-hist.rst and rtla-osnoise-hist.rst in Linux;
    tools/tracing/rtla/src/timerlat_hist.c, timerlat_hist_header(). A summary over all pCPUs, which may follow, is left.
    """
    title = re.match(r"# RTLA (timerlat|osnoise) histogram\n# Time unit is (.*)\n", text)
    if not title or title[2] not in _UNITS:
        raise ValueError("this is not what rtla hist prints: no title and unit in the first two lines")
    scale = _UNITS[title[2]]
    rows = [line.split() for line in text.partition("\nALL:")[0].splitlines() if line and line[0] != "#"]
    if not rows or rows[0][:1] != ["Index"]:
        raise ValueError("this is not what rtla hist prints: no line of it begins with 'Index'")
    header, *table = rows
    cpus: dict[int, dict[str, tuple[dict[str, Any], int | None]]] = {}
    for place, heading in enumerate(header[1:], 1):
        column = _COLUMN.fullmatch(heading)
        if not column or any(len(row) <= place for row in table):
            raise ValueError(f"this is not what rtla hist prints: column {heading!r} is none, or has gaps")
        cells = {row[0].rstrip(":"): row[place] for row in table}
        buckets: list[list[int | None]] = [
            [int(low) * scale, (int(low) + bucket) * scale, int(count)]
            for low, count in cells.items()
            if low.isdigit() and int(count)
        ]
        if int(cells.get("over", 0)):
            buckets.append([bucket * entries * scale, None, int(cells["over"])])
        # A column that counted nothing has a line instead of figures.
        least, most = (int(cells[name]) * scale if cells.get(name, "-").isdigit() else None for name in ("min", "max"))
        histogram = _histogram(buckets, least if buckets else None, most if buckets else None)
        cpus.setdefault(int(column[2]), {})[_NAMES[column[1]]] = histogram, histogram["max"]
    name = f"rtla:{title[1]}"
    return tuple(_of_rtla(name, cpu, columns) for cpu, columns in cpus.items())


def _of_rtla(name: str, cpu: int, columns: Mapping[str, tuple[dict[str, Any], int | None]]) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for column, (histogram, most) in columns.items():
        metrics |= _times(column, histogram["buckets"], most)
    primary = "gap_max" if "gap" in columns else "thread_max" if "thread" in columns else next(iter(metrics))
    return document(
        name, "rtla", where=_where(str(cpu), None), primary=primary, metrics=metrics,
        histograms={column: histogram for column, (histogram, _) in columns.items()},
    )  # fmt: skip


def _rt_tests(text: str, tool: str) -> dict[str, Any]:
    try:
        top = json.loads(text)
    except ValueError as error:
        raise ValueError(f"this is not {tool}'s JSON: {error}") from None
    command = top.get("cmdline:", "") if isinstance(top, dict) else ""
    # The colon is the tool's own.
    if tool not in str(command).partition(" ")[0] or not isinstance(top.get("thread"), dict):
        raise ValueError(f"this is not {tool}'s JSON: it has no 'cmdline:' of {tool}, or no 'thread'")
    return dict(top)


def _threads(top: Mapping[str, Any]) -> list[tuple[int, dict[str, Any]]]:
    return sorted((int(number), thread) for number, thread in top["thread"].items())


def _run(top: Mapping[str, Any], cpu: int) -> dict[str, Any]:
    return {
        "engine_version": top.get("rt_test_version:"),
        "started": _time(top.get("start_time")),
        "ended": _time(top.get("end_time")),
        "where": _where(str(cpu) if cpu >= 0 else None, top.get("sysinfo", {}).get("release")),
    }


def _time(text: str | None) -> dict[str, Any] | None:
    if text is None:
        return None
    from datetime import UTC
    from email.utils import parsedate_to_datetime

    when = parsedate_to_datetime(text).astimezone(UTC)
    return {"monotonic_ns": None, "utc": when.strftime("%Y-%m-%dT%H:%M:%SZ")}


def _where(cpu: str | None, kernel: str | None) -> dict[str, Any]:
    nobody = dict.fromkeys(("vm", "vcpu", "vcpus", "pcpu", "pid"))
    return {**nobody, "cpus_allowed": cpu, "cpus_seen": [], "kernel": kernel}


def _histogram(buckets: list[list[int | None]], least: int | None, most: int | None) -> dict[str, Any]:
    count = sum(bucket[2] or 0 for bucket in buckets)
    return {"unit": "ns", "count": count, "min": least, "max": most, "buckets": buckets}


def _times(name: str, buckets: list[list[int | None]], most: int | None) -> dict[str, Any]:
    # As a probe's own histogram tells them: never below the truth.
    total, found = sum(bucket[2] or 0 for bucket in buckets), {}
    for label, percent in (("p50", 50.0), ("p99", 99.0), ("p99_9", 99.9)):
        seen, value = 0, None
        for _, below, count in buckets:
            seen += count or 0
            if seen >= total * percent / 100:
                value = most if below is None else below - 1
                break
        found[f"{name}_{label}"] = metric(value, "ns", "lower")
    return {**found, f"{name}_max": metric(most, "ns", "lower")}
