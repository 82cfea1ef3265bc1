"""Whether a guest that only computes gets as much done under ``hostpart run`` as under taskset(1).

The same interpreter counts in a loop for a fixed time, on the same pCPU, and says how many rounds it
made per second of wall-clock time and per second of its own CPU time. The first shows what hostpart
costs a guest in all, and whatever else runs on that pCPU; the second leaves other tasks out. The
keeper looks at the guest four times a second from another pCPU.

Run with ``python -m bench.bench_guest [RUNS [SECONDS]]`` in a checkout.
"""

from __future__ import annotations

import os
import subprocess
import sys

from .measure import facts, in_turns, place, report

_ALLOWED = "0.99 to 1.01"
_GUEST = """
import sys, time
def rounds():
    total = 0
    for number in range(20000):
        total += number & 7
    return total
rounds()
count, until = 0, time.perf_counter() + float(sys.argv[1])
begin, cpu = time.perf_counter(), time.process_time()
while time.perf_counter() < until:
    rounds()
    count += 1
print(count / (time.perf_counter() - begin), count / (time.process_time() - cpu))
"""
_HOSTPART = [sys.executable, "-c", "from hostpart.__main__ import main; main()"]


class Worker:
    """The guest, started by *prefix*.

    :ivar per_cpu_s: rounds per second of CPU time, of each run, warm-up included
    """

    def __init__(self, prefix: list[str], seconds: float, environment: dict[str, str]) -> None:
        self.argv = [*prefix, sys.executable, "-S", "-c", _GUEST, str(seconds)]
        self.environment = environment
        self.per_cpu_s: list[float] = []

    def __call__(self) -> float:
        """Return the rounds per second of wall-clock time of one run."""
        done = subprocess.run(self.argv, env=self.environment, stdout=subprocess.PIPE, text=True, check=True)
        per_s, per_cpu_s = map(float, done.stdout.split())
        self.per_cpu_s.append(per_cpu_s)
        return per_s


def main() -> None:
    """Measure and print."""
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    seconds = float(sys.argv[2]) if len(sys.argv) > 2 else 0.2
    pcpu = str(max(os.sched_getaffinity(0)))
    print(facts())
    with place() as more:
        environment = {**os.environ, **more}
        ours = Worker([*_HOSTPART, "run", "--pcpus", pcpu, "--"], seconds, environment)
        theirs = Worker(["taskset", "-c", pcpu], seconds, environment)
        taken = in_turns(runs, ours, theirs, warm_up=1)
    names = ("hostpart run", "taskset")
    print(f"rounds per second of wall-clock time, guests of {seconds:g} s on pCPU {pcpu} ({_ALLOWED} is wanted):")
    report(names, taken, "/s")
    print("rounds per second of CPU time:")
    report(names, (ours.per_cpu_s[-runs:], theirs.per_cpu_s[-runs:]), "/s")


if __name__ == "__main__":
    main()
