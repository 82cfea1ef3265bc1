"""Two ways of doing the same, taken in turns, and the ratio pair by pair.

Turns keep the ratio meaningful where the machine's speed drifts, and the median keeps a few runs that
something else disturbed from moving it. What is measured, and what the ratio should be, is each
``bench_*.py``'s to say.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median, quantiles

__all__ = ["confidence", "facts", "in_turns", "place", "report"]


def facts() -> str:
    """Return the machine, as the results have to name it: processor, usable pCPUs, kernel, Python, load."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        names = [line.partition(":")[2].strip() for line in file if line.startswith(("model name", "Model"))]
    load = " ".join(f"{one:.1f}" for one in os.getloadavg())
    return (
        f"machine: {names[0] if names else platform.machine()}, {len(os.sched_getaffinity(0))} usable pCPUs; "
        f"Linux {os.uname().release}; {platform.python_implementation()} {platform.python_version()}; load {load}"
    )


@contextmanager
def place() -> Iterator[dict[str, str]]:
    """Give a lease directory and a runtime directory in RAM, as environment variables: no real lease is touched."""
    with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="hostpart-bench-") as folder:
        os.makedirs(f"{folder}/leases")
        os.makedirs(f"{folder}/run", 0o700)
        yield {"HOSTPART_LEASE_DIR": f"{folder}/leases", "HOSTPART_RUNTIME_DIR": f"{folder}/run"}


def in_turns(runs: int, *ways: Callable[[], float], warm_up: int = 3) -> list[list[float]]:
    """Call each of *ways* in turn, *runs* times after a *warm_up*; return what each returned."""
    taken: list[list[float]] = [[] for _ in ways]
    for number in range(warm_up + runs):
        for way, one in zip(ways, taken, strict=True):
            value = way()
            if number >= warm_up:
                one.append(value)
        if sys.stderr.isatty():
            print(f"\r{number + 1}/{warm_up + runs} ", end="", file=sys.stderr)
    return taken


def report(names: Sequence[str], taken: Sequence[Sequence[float]], unit: str, scale: float = 1.0) -> None:
    """Print what each way took, and the first one's ratio to each of the others, with its spread."""
    for name, one in zip(names, taken, strict=True):
        print(f"  {name:<44} {_spread([value * scale for value in one], unit)}")
    for name, other in zip(names[1:], taken[1:], strict=True):
        ratios = [mine / theirs for mine, theirs in zip(taken[0], other, strict=True)]
        low, high = confidence(ratios)
        print(f"  ratio to {name:<35} {_spread(ratios, '')}; median surely {low:.3f} to {high:.3f}")


def _spread(values: Sequence[float], unit: str) -> str:
    low, _, high = quantiles(values, n=4)
    return f"{median(values):8.3f} {unit:<10} (middle half {low:.3f} to {high:.3f}, {len(values)} runs)"


def confidence(values: Sequence[float]) -> tuple[float, float]:
    """Return where the true median is with 95 %: between two of the values in order, whatever their distribution."""
    ordered, half = sorted(values), 0.98 * len(values) ** 0.5
    middle = len(values) / 2
    return ordered[max(0, int(middle - half))], ordered[min(len(values) - 1, int(middle + half))]
