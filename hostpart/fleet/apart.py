"""Preloaded by workers that ``hostpart fleet --local`` starts, before the agent: out of the terminal's reach.

Ctrl-C is for the client, which then asks the workers to end what they run; they would be gone by then. The client
starts them with SIGINT blocked, so that none comes too early, and here it becomes an ordinary signal again: what a
worker starts inherits it.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    from distributed import Worker

__all__ = ["dask_setup"]


def dask_setup(worker: Worker) -> None:
    """Put this process into a group of its own, and unblock SIGINT: Dask calls it as the worker starts."""
    del worker
    os.setpgid(0, 0)
    # One that has come in the meantime is forgotten.
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGINT, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
