"""Do the probes say what other programs say that measure the same? ``noise`` and oslat, ``wakeup`` and cyclictest.

``python -m bench.bench_probes [RUNS [SECONDS]]`` runs each two one after the other on one pCPU, RUNS times (10) for
SECONDS each (3), which of them first drawn anew for each pair from a fixed seed. It does so twice: on the host as it
is, and with a neighbour on that pCPU that works for 2 ms of CPU time every 20 ms. Needs rt-tests and the extra
``probes``.

Two agree where the ranges of their runs overlap and each one's median lies within the other's range. What is
compared, and how both sides are brought to one definition:

- time lost, in percent of the time watched: the sum of all gaps of a microsecond or more. ``noise`` has each to the
  nanosecond, with ``--threshold-ns 1000``. oslat has whole microseconds: bucket N holds gaps from N - 1 up to N, so
  the first bucket is left out, and the others count with their middle, N - 0.5. (N itself, as oslat has it in its
  average, would put half a microsecond on each gap.) Gaps beyond the last bucket are in what is left of the average.
- how late a wake-up is, every 1000 µs, median and 99th percentile: read off both histograms in one way, by
  interpolation, since their buckets differ: a microsecond in cyclictest's, some percent in the probe's. Both run under
  SCHED_OTHER with the timer slack that every process has, 50 µs; as root once more as SCHED_FIFO, where there is no
  slack. ``--default-system`` keeps cyclictest from holding the processor out of idle states, which the probe does not
  do either.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

from bench.measure import confidence, facts
from workers.probes import tools

__all__ = ["main"]

_SEED = 20
_INTERVAL_US, _PRIORITY = 1000, 80
_BUCKETS = 1024  # oslat's largest number
_MOST_US = 100_000  # that cyclictest counts one by one
# Spins for that much CPU time each period, so what it takes does not depend on when it is let run.
_NEIGHBOUR = """
import time
spin_ns, period_ns, due = 2_000_000, 20_000_000, time.monotonic_ns()
while True:
    until = time.thread_time_ns() + spin_ns
    while time.thread_time_ns() < until:
        pass
    due = max(due + period_ns, time.monotonic_ns())
    time.sleep(max(0, due - time.monotonic_ns()) / 1e9)
"""

_Way = Callable[[], Mapping[str, float]]


def main() -> None:
    """Measure and print."""
    runs, seconds = ([int(word) for word in sys.argv[1:3]] + [10, 3][len(sys.argv) - 1 :])[:2]
    missing = [tool for tool in ("oslat", "cyclictest") if not shutil.which(tool)]
    if missing:
        sys.exit(f"bench_probes needs {' and '.join(missing)}\ntry: apt install rt-tests")
    cpu = max(os.sched_getaffinity(0))
    print(__doc__.splitlines()[0])
    print(f"{facts()}; pCPU {cpu}, {runs} pairs of {seconds} s, seed {_SEED}")
    order = random.Random(_SEED)
    for condition, neighbour in (("as it is", nullcontext()), ("with a neighbour", _neighbour(cpu))):
        with neighbour:
            for title, names, ways in _comparisons(cpu, seconds):
                print(f"{title}, {condition}:")
                _report(names, _pairs(runs, order, *ways))
    print(f"load at the end: {' '.join(f'{one:.1f}' for one in os.getloadavg())}")


def _comparisons(cpu: int, seconds: int) -> Iterator[tuple[str, tuple[str, str], tuple[_Way, _Way]]]:
    yield "time lost", ("noise", "oslat"), (partial(_noise, cpu, seconds), partial(_oslat, cpu, seconds))
    for policy in ("other", "fifo") if os.geteuid() == 0 else ("other",):
        yield (
            f"wake-up, SCHED_{policy.upper()}",
            ("wakeup", "cyclictest"),
            (partial(_wakeup, cpu, seconds, policy), partial(_cyclictest, cpu, seconds, policy)),
        )


def _noise(cpu: int, seconds: int) -> dict[str, float]:
    found = _values(_probe("noise", cpu, seconds, HOSTPART_PROBE_THRESHOLD_NS="1000"))
    return {"time lost, %": found["time_lost"], "gaps per second": found["events"]}


def _oslat(cpu: int, seconds: int) -> dict[str, float]:
    # Its main thread sleeps all the time, on another pCPU where there is one.
    main_cpu = min(os.sched_getaffinity(0))
    command = ["oslat", "-q", "-b", str(_BUCKETS), "-c", str(cpu), "-C", str(main_cpu), "-D", str(seconds)]
    [record] = tools.oslat(_json_of(command))
    found = _values(record)
    return {"time lost, %": found["time_lost"], "gaps per second": found["events"]}


def _wakeup(cpu: int, seconds: int, policy: str) -> dict[str, float]:
    before = ["chrt", "-f", str(_PRIORITY)] if policy == "fifo" else []
    return _late(_probe("wakeup", cpu, seconds, *before, HOSTPART_PROBE_INTERVAL_US=str(_INTERVAL_US)))


def _cyclictest(cpu: int, seconds: int, policy: str) -> dict[str, float]:
    command = ["cyclictest", "-q", "--default-system", "-t", "1", "-a", str(cpu), "-i", str(_INTERVAL_US)]
    command += ["-D", str(seconds), "-h", str(_MOST_US), "--mainaffinity", str(min(os.sched_getaffinity(0)))]
    command += ["--policy", policy, *(["-p", str(_PRIORITY)] if policy == "fifo" else [])]
    [record] = tools.cyclictest(_json_of(command))
    return _late(record)


def _late(record: Mapping[str, Any]) -> dict[str, float]:
    histogram = record["histograms"]["latency"]
    return {"median, µs": _percentile(histogram, 50), "99th percentile, µs": _percentile(histogram, 99)}


def _percentile(histogram: Mapping[str, Any], percent: float) -> float:
    # In µs. Between a bucket's ends the values are taken to be spread evenly.
    left = histogram["count"] * percent / 100
    for low, below, count in histogram["buckets"]:
        if left <= count:
            return float(low + ((histogram["max"] if below is None else below) - low) * left / count) / 1000
        left -= count
    return float(histogram["max"]) / 1000


def _probe(name: str, cpu: int, seconds: int, *before: str, **variables: str) -> dict[str, Any]:
    environ = {**os.environ, **variables, "HOSTPART_PROBE_ENGINE": "numba", "HOSTPART_PROBE_JSON": "1"}
    environ["HOSTPART_PROBE_SECONDS"] = str(seconds)
    code = f"import sys; from workers.probes.{name} import main; sys.exit(main())"
    command = ["taskset", "-c", str(cpu), *before, sys.executable, "-c", code]
    done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def _json_of(command: list[str]) -> str:
    with tempfile.NamedTemporaryFile(mode="r", suffix=".json") as file:
        done = subprocess.run([*command, f"--json={file.name}"], capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"bench_probes: {' '.join(command)} failed: {(done.stderr or done.stdout).strip()}")
        return file.read()


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: one["value"] for name, one in record["metrics"].items()}


@contextmanager
def _neighbour(cpu: int) -> Iterator[None]:
    with subprocess.Popen(["taskset", "-c", str(cpu), sys.executable, "-c", _NEIGHBOUR]) as process:
        try:
            yield
        finally:
            process.kill()


def _pairs(runs: int, order: random.Random, *ways: _Way) -> list[list[Mapping[str, float]]]:
    taken: list[list[Mapping[str, float]]] = [[] for _ in ways]
    for _ in range(runs):
        for which in order.sample(range(len(ways)), len(ways)):
            taken[which].append(ways[which]())
    return taken


def _report(names: tuple[str, str], taken: list[list[Mapping[str, float]]]) -> None:
    for figure in taken[0][0]:
        ours, theirs = ([one[figure] for one in side] for side in taken)
        for name, values in zip(names, (ours, theirs), strict=True):
            print(f"  {figure:<20} {name:<10} {median(values):10.3f} ({min(values):.3f} to {max(values):.3f})")
        ratios = [mine / other for mine, other in zip(ours, theirs, strict=True) if other]
        low, high = confidence(ratios)
        overlap = max(min(ours), min(theirs)) <= min(max(ours), max(theirs))
        within = min(theirs) <= median(ours) <= max(theirs) and min(ours) <= median(theirs) <= max(ours)
        print(
            f"  {'':<20} {'ratio':<10} {median(ratios):10.3f} ({min(ratios):.3f} to {max(ratios):.3f}; median surely "
            f"{low:.3f} to {high:.3f}); ranges {'overlap' if overlap else 'DO NOT OVERLAP'}, "
            f"medians {'within' if within else 'NOT within'} the other's range"
        )


if __name__ == "__main__":
    main()
