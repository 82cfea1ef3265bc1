"""The hostpart command inside the guest, without the seconds that an emulated interpreter takes to start: forked."""

from __future__ import annotations

import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import NamedTuple, NoReturn

from hostpart import cli
from workers import crash

__all__ = ["Done", "Started", "run", "sleeper", "start", "wait_until"]


class Done(NamedTuple):
    """What became of a command: its exit code (negative: the signal that ended it), stdout and stderr."""

    code: int
    out: str
    err: str


class Started:
    """A command that runs.

    :ivar pid: its front
    """

    def __init__(self, pid: int, out: str, err: str) -> None:
        self.pid, self._out, self._err = pid, out, err
        self._code: int | None = None

    @property
    def err(self) -> str:
        """What it has written to stderr so far."""
        with open(self._err, encoding="utf-8", errors="replace") as file:
            return file.read()

    @property
    def out(self) -> str:
        """What it has written to stdout so far."""
        with open(self._out, encoding="utf-8", errors="replace") as file:
            return file.read()

    def kill(self, number: int = signal.SIGTERM) -> None:
        """Send its front a signal."""
        os.kill(self.pid, number)

    def ended(self) -> bool:
        """Whether it has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self._code = os.waitstatus_to_exitcode(status)
        return self._code is not None

    def wait(self, timeout: float = 120.0) -> Done:
        """Wait for its end."""
        if not wait_until(self.ended, timeout):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            raise AssertionError(f"it did not end within {timeout:g} s; stdout {self.out!r}, stderr {self.err!r}")
        assert self._code is not None
        return Done(self._code, self.out, self.err)


def start(
    *args: str, die_at: str = "", points: str = "", uid: int = 0, environ: Mapping[str, str] | None = None
) -> Started:
    """Start a hostpart command.

    :param die_at: as ``HOSTPART_DIE_AT``
    :param points: as ``HOSTPART_POINTS``
    """
    folder = tempfile.mkdtemp(prefix="command-")
    out, err = f"{folder}/out", f"{folder}/err"
    pid = os.fork()
    if not pid:
        _child(args, out, err, (die_at, points), uid, environ or {})
    return Started(pid, out, err)


def run(
    *args: str,
    die_at: str = "",
    points: str = "",
    uid: int = 0,
    timeout: float = 120.0,
    environ: Mapping[str, str] | None = None,
) -> Done:
    """Run a hostpart command to its end."""
    return start(*args, die_at=die_at, points=points, uid=uid, environ=environ).wait(timeout)


def _child(
    args: tuple[str, ...], out: str, err: str, hooks: tuple[str, str], uid: int, environ: Mapping[str, str]
) -> NoReturn:
    code = 99
    try:
        os.setsid()
        for path, fd in ((os.devnull, 0), (out, 1), (err, 2)):
            flags = os.O_RDONLY if fd == 0 else os.O_WRONLY | os.O_CREAT
            os.dup2(os.open(path, flags, 0o666), fd)
        sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        os.environ.update(environ)
        if uid:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
        logging.getLogger().handlers.clear()  # pytest's, which would have every worker send its records
        crash.arm(hooks[0])
        crash.record(hooks[1])
        code = cli.main(list(args))
        sys.stdout.flush()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 98
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def sleeper(*cpus: int) -> int:
    """Start a task of the host's that sleeps, pinned to *cpus* if there are any; return its pid."""
    pid = os.fork()
    if not pid:
        if cpus:
            os.sched_setaffinity(0, cpus)
        signal.pause()
        os._exit(0)
    assert wait_until(lambda: not cpus or os.sched_getaffinity(pid) == set(cpus))
    return pid


def wait_until(what: object, timeout: float = 60.0) -> bool:
    """Poll until the callable *what* is true; whether it came true in time."""
    assert callable(what)
    until = time.monotonic() + timeout
    while not what():
        if time.monotonic() > until:
            return False
        time.sleep(0.02)
    return True
