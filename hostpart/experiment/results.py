"""The directory of one experiment: what was planned, on which host, and a line of JSON per run, as it ended.

=================  ==================================================================================
``experiment.json``  the design and the plan; written once
``sessions.jsonl``   a line each time it was started: when, by which command, the host's facts
``runs.jsonl``       a line per run, appended in one write and flushed to the disk as it ended
=================  ==================================================================================

A line that a kill or a full disk cut short is taken away by whoever appends next; its run is made again. To read the
runs elsewhere: ``pandas.read_json("DIR/runs.jsonl", lines=True)``, ``polars.read_ndjson("DIR/runs.jsonl")``.

What is in the documents is said in ``run.schema.json`` beside this file.
"""

from __future__ import annotations

import fcntl
import json
import os

from ..errors import Failed, UsageError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["Journal", "Results", "read"]

EXPERIMENT, SESSIONS, RUNS = "experiment.json", "sessions.jsonl", "runs.jsonl"


class Results(Value):
    """What a directory holds.

    :ivar directory: as it was named
    :ivar experiment: the design and the plan
    :ivar sessions: in order of time
    :ivar runs: by ``run``, ascending: of a run that was made again, the last one
    :ivar damaged: how many lines could not be read: the one that was cut short, if any
    """

    directory: str
    experiment: dict[str, Any]
    sessions: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, Any], ...]
    damaged: int = 0

    @property
    def done(self) -> frozenset[int]:
        """The numbers of the runs that were made and did not fail."""
        return frozenset(run["run"] for run in self.runs if run["error"] is None)


def read(directory: str) -> Results:
    """Return what *directory* holds.

    :raises UsageError: where it is no experiment's
    """
    path = os.path.join(directory, EXPERIMENT)
    try:
        with open(path, encoding="utf-8") as file:
            experiment = json.load(file)
        if not isinstance(experiment, dict) or experiment.get("schema") != 1 or "plan" not in experiment:
            raise ValueError("it is not an experiment of a version that this hostpart reads")
        sessions, cut = _lines(os.path.join(directory, SESSIONS))
        runs, more = _lines(os.path.join(directory, RUNS))
    except OSError as error:
        raise UsageError(
            f"{directory}: {error.strerror}: {error.filename}", "name a directory that 'hostpart experiment' wrote"
        ) from None
    except ValueError as error:
        raise UsageError(f"{path}: {error}", "name a directory that 'hostpart experiment' wrote") from None
    latest = {run["run"]: run for run in runs}
    return Results(
        directory, experiment, tuple(sessions), tuple(latest[number] for number in sorted(latest)), cut + more
    )


def _lines(path: str) -> tuple[list[dict[str, Any]], int]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return [], 0
    found, damaged = [], 0
    for line in data.splitlines():
        try:
            found.append(json.loads(line))
        except ValueError:
            damaged += 1
    return found, damaged


class Journal:
    """A directory that is being written; one process at a time.

    :raises UsageError: where another process writes it, or it holds another experiment
    :raises Failed: where it cannot be written
    """

    def __init__(self, directory: str, experiment: Mapping[str, Any]) -> None:
        self.directory = directory
        try:
            os.makedirs(directory, exist_ok=True)
            self._lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UsageError(
                    f"another process is writing the experiment in {directory}",
                    "wait for it, or name another --out DIR",
                ) from None
            path = os.path.join(directory, EXPERIMENT)
            if os.path.exists(path):
                self._same(experiment)
            elif os.listdir(directory):
                raise UsageError(
                    f"{directory} is not empty and holds no experiment",
                    "name another --out DIR, or one that is not there",
                )
            else:
                _replace(path, experiment)
            self._runs = _Lines(os.path.join(directory, RUNS))
            self._sessions = _Lines(os.path.join(directory, SESSIONS))
        except OSError as error:
            raise _unwritable(directory, error) from None

    def _same(self, experiment: Mapping[str, Any]) -> None:
        there = read(self.directory).experiment
        if there["design"] != experiment["design"] or there["plan"] != experiment["plan"]:
            raise UsageError(
                f"{self.directory} holds an experiment of another design or on another host",
                "name another --out DIR; or go on with that one from where it was made, with its own file and options",
            )

    def begin(self, session: Mapping[str, Any]) -> None:
        """Note that it was started (again)."""
        self._append(self._sessions, session)

    def append(self, run: Mapping[str, Any]) -> None:
        """Note a run, on the disk.

        :raises Failed: where it can't be written; then nothing of it is left in the file
        """
        self._append(self._runs, run)

    def _append(self, lines: _Lines, document: Mapping[str, Any]) -> None:
        try:
            lines.append(document)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def close(self) -> None:
        """Let others write it."""
        for fd in (self._runs.fd, self._sessions.fd, self._lock):
            os.close(fd)


class _Lines:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        end = size = os.fstat(self.fd).st_size
        # A kill may have left a line without its end: it is taken away, so that the next begins on a line of its own.
        while end and os.pread(self.fd, 1, end - 1) != b"\n":
            end -= 1
        if end != size:
            os.ftruncate(self.fd, end)

    def append(self, document: Mapping[str, Any]) -> None:
        line = json.dumps(document, separators=(",", ":"), allow_nan=False).encode() + b"\n"
        size = os.fstat(self.fd).st_size
        try:
            rest = memoryview(line)
            while rest:
                rest = rest[os.write(self.fd, rest) :]
            os.fsync(self.fd)
        except OSError:
            os.ftruncate(self.fd, size)
            raise


def _replace(path: str, document: Mapping[str, Any]) -> None:
    # Whole or not at all.
    fd = os.open(path + ".new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o644)
    try:
        with open(fd, "w", encoding="utf-8") as file:
            json.dump(document, file, indent=1)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(path + ".new", path)
    except OSError:
        os.unlink(path + ".new")
        raise


def _unwritable(directory: str, error: OSError) -> Failed:
    return Failed(
        f"the experiment cannot be written to {directory}: {error.strerror}",
        "make room or mend what it says, then give the same command again: it goes on where it stopped",
    )
