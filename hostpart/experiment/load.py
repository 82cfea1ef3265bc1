"""What an experiment starts: ``python -m hostpart.experiment.load``, with :func:`argv`'s words.

It is pinned before it does anything, ends what it started when it is told to, and when whoever started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys

from workers.probes import find, measurement
from workers.vcpu import prctl

from .. import tree
from ..cpuset import CpuSet

__all__ = ["argv", "main"]

_PR_SET_PDEATHSIG = 1


def argv(pcpus: CpuSet, kind: str, *words: str) -> list[str]:
    """Return the command that starts one.

    :param pcpus: Linux numbers of what it may run on
    :param kind: ``probe``: *words* is a probe's name, whose options are in the environment; ``hostpart``: it becomes
        that hostpart command
    """
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), str(pcpus), kind, *words]


def main() -> int:
    """Be one."""
    parent, pcpus, kind, *words = sys.argv[1:]
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return 1  # it was gone before that
    os.sched_setaffinity(0, CpuSet.parse(pcpus))
    if kind == "hostpart":
        os.execv(sys.executable, [sys.executable, "-P", "-m", "hostpart", *words])
    tree.adopt()
    try:
        return measurement.run(find(words[0]))
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tree.end(os.getpid())


if __name__ == "__main__":
    sys.exit(main())
