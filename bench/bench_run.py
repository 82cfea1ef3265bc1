"""What ``hostpart run -- true`` costs as a whole process, against ``python3 -c pass`` and against another tool's help.

Its interpreter has to have hostpart installed, not in editable mode, so that compiled modules are used as by any user::

    python3 -m venv /tmp/installed && /tmp/installed/bin/pip install .
    python -m bench.bench_run /tmp/installed/bin [RUNS]

Each figure is of the whole process with its children: wall-clock time, and CPU time (user and system) from
wait4(2), which what else runs on the machine disturbs less. ``cset`` is Debian's package ``cpuset``, a
Python program that moves tasks between cpusets; it is compared where it is installed.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable

from .measure import facts, in_turns, place, report

_ALLOWED = "at most 5 x python3, 1.5 x cset"


class Command:
    """One command line, run to its end with its output thrown away.

    :ivar cpu_s: CPU seconds of each run, warm-up included
    """

    def __init__(self, argv: list[str], environment: dict[str, str]) -> None:
        self.argv, self.environment = argv, environment
        self.cpu_s: list[float] = []
        self._null = os.open(os.devnull, os.O_RDWR)

    def __call__(self) -> float:
        """Return the wall-clock seconds of one run."""
        streams = [(os.POSIX_SPAWN_DUP2, self._null, fd) for fd in (0, 1, 2)]
        begin = time.perf_counter()
        pid = os.posix_spawn(self.argv[0], self.argv, self.environment, file_actions=streams)
        _, status, usage = os.wait4(pid, 0)
        taken = time.perf_counter() - begin
        if status:
            sys.exit(f"{' '.join(self.argv)} ended with status {os.waitstatus_to_exitcode(status)}")
        self.cpu_s.append(usage.ru_utime + usage.ru_stime)
        return taken


def main() -> None:
    """Measure and print."""
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    folder, runs = os.path.abspath(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 100
    lines = [
        [f"{folder}/hostpart", "run", "--", "true"],
        [f"{folder}/python3", "-c", "pass"],
    ]
    cset = shutil.which("cset")
    if cset:
        lines.append([cset, "--help"])
    print(facts())
    with place() as more:
        # The first run writes the compiled modules, if that was not done at the installation.
        environment = {**os.environ, **more}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        commands = [Command(line, environment) for line in lines]
        ways: list[Callable[[], float]] = list(commands)
        walls = in_turns(runs, *ways)
    names = [" ".join([os.path.basename(line[0]), *line[1:]]) for line in lines]
    print(f"CPU time of the whole process ({_ALLOWED}):")
    report(names, [command.cpu_s[-runs:] for command in commands], "ms", 1e3)
    print(f"wall-clock time ({_ALLOWED}):")
    report(names, walls, "ms", 1e3)


if __name__ == "__main__":
    main()
