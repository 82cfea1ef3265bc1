"""The first guest to try: say where the kernel runs this vCPU, then work for a second.

It is called inside the worker, with no arguments. It measures nothing and pins nothing.
"""

from __future__ import annotations

import os
import sys
import time

__all__ = ["main"]

_WORK_S = 1.0


def main() -> int:
    """Print one line about this vCPU, keep its pCPU busy for about a second, and succeed.

    :return: the exit status, 0
    :raises KeyError: outside a worker, where no ``HOSTPART_*`` variable says which vCPU this is
    """
    seat = {name: os.environ[f"HOSTPART_{name}"] for name in ("VM", "VCPU", "VCPUS", "PCPU")}
    line = (
        f"{seat['VM']} vCPU {seat['VCPU']} of {seat['VCPUS']} on pCPU {seat['PCPU']}: "
        f"Cpus_allowed_list {_allowed()}, running on CPU {_running_on()}\n"
    )
    # One write, newline included: the lines of several vCPUs on one terminal then never mix.
    sys.stdout.write(line)
    sys.stdout.flush()
    _work(_WORK_S)
    return 0


def _allowed() -> str:
    with open("/proc/thread-self/status", encoding="utf-8", errors="replace") as file:
        return next(line.split()[1] for line in file if line.startswith("Cpus_allowed_list:"))


def _running_on() -> int:
    # proc(5): field 39 is the CPU last run on, which for the one that asks is where it runs.
    # Field 2, the name, may hold blanks and brackets; field 3 follows the last bracket.
    with open("/proc/thread-self/stat", encoding="utf-8", errors="replace") as file:
        return int(file.read().rpartition(")")[2].split()[39 - 3])


def _work(seconds: float) -> None:
    end = time.monotonic() + seconds
    number = 1
    while time.monotonic() < end:
        for _ in range(10_000):
            number = number * 6364136223846793005 + 1442695040888963407 & 0xFFFFFFFFFFFFFFFF
