"""The auditor's own account: what its looks cost, and where they ran."""

from __future__ import annotations

import os
import time

from . import procfs
from .cpuset import CpuSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Auditor"]


class Auditor:
    """Entered for each look, by the one thread that makes them.

    :ivar allowed: CPUs (Linux numbers) that it could run on at some look
    :ivar seen: those that it ran on at the end of a look
    :ivar cpu_ns: its own CPU time in looks
    """

    def __init__(self) -> None:
        self.looks = 0
        self.cpu_ns = 0
        self.allowed, self.seen = CpuSet(), CpuSet()
        self._begin_ns, self._since_ns = 0, time.monotonic_ns()

    def __enter__(self) -> None:
        self._begin_ns = time.thread_time_ns()

    def __exit__(self, *_: object) -> None:
        self.allowed |= CpuSet.of(os.sched_getaffinity(0))
        stat = procfs.read_stat(os.getpid())
        if stat is not None:
            self.seen |= CpuSet.of([stat.processor])
        self.looks += 1
        self.cpu_ns += time.thread_time_ns() - self._begin_ns

    def to_json(self) -> dict[str, Any]:
        """Return its account for the evidence."""
        interval_ns = time.monotonic_ns() - self._since_ns
        return {
            "allowed": str(self.allowed) or None,
            "ran_on": str(self.seen) or None,
            "looks": self.looks,
            "cpu_ns": self.cpu_ns,
            "cpu_ns_per_s": round(self.cpu_ns * 1e9 / interval_ns) if interval_ns else None,
        }
