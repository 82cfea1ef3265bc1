"""A lab host's first process: keeps one worker running, as systemd's ``Restart=always`` would, and reaps orphans.

Run by its path, ``python -I supervisor.py FILE``; it imports the standard library only. FILE is JSON: ``argv``, ``env``
and ``log`` of the worker, ``idle``: while that file exists, nothing is started; ``hostname`` and ``mounts`` (pairs of
what and where) if the host has namespaces of its own to set them in.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

__all__ = ["main"]

_AGAIN_S = 0.3


def main() -> None:
    """See the module; never returns."""
    told = json.loads(Path(sys.argv[1]).read_text())
    if told["hostname"]:
        socket.sethostname(told["hostname"])
    for what, where in told["mounts"]:
        subprocess.run(["mount", "--bind", what, where], check=True)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal's, which is for who runs the tests
    idle = Path(told["idle"])
    worker = 0
    while True:
        if not worker and not idle.exists():
            with open(told["log"], "ab", buffering=0) as log:
                worker = subprocess.Popen(
                    told["argv"], env=told["env"], stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                    start_new_session=True, cwd=told["env"]["TMPDIR"],
                ).pid  # fmt: skip
        try:
            ended, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            ended = 0
        if ended == worker:
            worker = 0
        if not ended or not worker:
            time.sleep(_AGAIN_S if not worker else 0.05)


if __name__ == "__main__":
    main()
