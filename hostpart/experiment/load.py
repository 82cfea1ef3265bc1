"""What runs beside a victim as part of the host: ``python -m hostpart.experiment.load``, with :func:`argv`'s words.

It is pinned before it does anything, ends what it started when it is told to, and when whoever started it is gone.
"""

from __future__ import annotations

import os
import signal
import sys

from workers.vcpu import prctl

from .. import tree
from ..cpuset import CpuSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import FrameType

__all__ = ["argv", "main"]

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


def argv(pcpus: str, kind: str, words: tuple[str, ...]) -> list[str]:
    """Return the command that starts one.

    :param pcpus: what it may run on; its own words are a probe's name, or a command
    :param kind: ``probe``, ``command``, or ``front``: a hostpart command, which is told to end by SIGTERM
    """
    return [sys.executable, "-P", "-m", __name__, str(os.getpid()), pcpus, kind, *words]


def main() -> int:
    """Be one."""
    parent, pcpus, kind, *words = sys.argv[1:]
    prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != int(parent):
        return 1  # it was gone before that
    if pcpus:
        os.sched_setaffinity(0, CpuSet.parse(pcpus))
    if kind == "front":
        os.execv(sys.executable, [sys.executable, "-P", "-m", "hostpart", *words])
    if kind == "probe":
        return int(__import__(f"workers.probes.{words[0]}", fromlist=["main"]).main())
    return _supervise(words)


def _supervise(words: list[str]) -> int:
    # A command may have children of its own: all of them end with it.
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.signal(signal.SIGTERM, _stop)
    try:
        pid = os.posix_spawnp(words[0], words, os.environ, setsigdef=[signal.SIGTERM, signal.SIGPIPE])
    except OSError as error:
        sys.stderr.write(f"{words[0]}: {error.strerror}\n")
        return 127
    try:
        while True:
            done, status = os.waitpid(-1, 0)
            if done == pid:
                return os.waitstatus_to_exitcode(status) & 0xFF
    except _Told:
        return 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tree.end(os.getpid())


class _Told(Exception):
    pass


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise _Told


if __name__ == "__main__":
    sys.exit(main())
