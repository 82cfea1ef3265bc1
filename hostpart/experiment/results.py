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

from ..cpuset import CpuSet
from ..errors import Failed, UsageError
from ..value import Value
from .intake import VERDICTS

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["ConditionKey", "Journal", "Results", "against", "by_key", "overlaps", "read", "replace"]

_NAME_ONE = "name a directory that 'hostpart experiment' wrote"
_NONE = type(None)
_EXPERIMENT: dict[str, type | tuple[type, ...]] = {"schema": int, "name": str, "design": dict, "plan": dict}
_PLAN: dict[str, type | tuple[type, ...]] = {"conditions": list, "runs": list}
_SESSION: dict[str, type | tuple[type, ...]] = {"session": int, "started": str, "facts": dict}
_RUN: dict[str, type | tuple[type, ...]] = {
    "run": int,
    "block": int,
    "session": int,
    "condition": str,
    "victim_pcpu": int,
    "aggressor_pcpus": (str, _NONE),
    "metrics": dict,
    "primary": (str, _NONE),
    "record": (dict, _NONE),
    "verdict": (str, _NONE),
    "reasons": list,
    "error": (dict, _NONE),
}

ConditionKey = tuple[str, str, "str | None", str]  # victim, isolation, aggressor, placement
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
    experiment = _experiment(directory)
    try:
        sessions, cut = _lines(os.path.join(directory, SESSIONS), _SESSION)
        runs, more = _lines(os.path.join(directory, RUNS), _RUN)
    except OSError as error:
        raise _unreadable(directory, error) from None
    latest = {run["run"]: run for run in runs}
    return Results(
        directory, experiment, tuple(sessions), tuple(latest[number] for number in sorted(latest)), cut + more
    )


def _experiment(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, EXPERIMENT)
    try:
        with open(path, encoding="utf-8") as file:
            experiment = json.load(file)
        if not _is(experiment, _EXPERIMENT) or experiment["schema"] != 1 or not _is(experiment["plan"], _PLAN):
            raise ValueError("it is not an experiment of a version that this hostpart reads")
    except OSError as error:
        raise _unreadable(directory, error) from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: {error}", _NAME_ONE) from None
    return dict(experiment)


def _unreadable(directory: str, error: OSError) -> UsageError:
    return UsageError(f"{directory}: {error.strerror}: {error.filename}", _NAME_ONE)


def replace(path: str, text: str) -> None:
    """Write a file whole or not at all, and on the disk.

    Half a file is of use to nobody, and on a full disk it takes the room that is left: nothing of it stays, whatever
    stops it.

    :raises OSError: where it can't be written
    """
    new = f"{path}.new"
    try:
        with open(new, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
    except BaseException:
        try:
            os.unlink(new)
        except OSError:
            pass
        raise


def by_key(analysis: Mapping[str, Any]) -> dict[ConditionKey, Mapping[str, Any]]:
    """Return an analysis's conditions by what they have in common with those of another host or date."""
    found: dict[ConditionKey, Mapping[str, Any]] = {}
    for one in analysis["conditions"]:
        aggressor = one.get("aggressor")
        key = (
            str(one["victim"]),
            str(one["isolation"]),
            None if aggressor is None else str(aggressor),
            str(one["placement"]),
        )
        found.setdefault(key, one)
    return found


def against(condition: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the verdicts that speak against a condition's figures.

    Where the aggressor is on the victim's pCPU by design, it is what taints.

    :param condition: as an analysis has it
    """
    return VERDICTS[2:] if condition.get("overlaps") else VERDICTS[1:]


def overlaps(run: Mapping[str, Any]) -> bool:
    """Whether the aggressor may run on the victim's pCPU by design: what its presence taints was planned then.

    :param run: a run, or a condition
    """
    return run["victim_pcpu"] in CpuSet.parse(run["aggressor_pcpus"] or "")


def _lines(path: str, fields: Mapping[str, type | tuple[type, ...]]) -> tuple[list[dict[str, Any]], int]:
    try:
        with open(path, "rb") as file:
            data = file.read()
    except FileNotFoundError:
        return [], 0
    found, damaged = [], 0
    for line in data.splitlines():
        try:
            document = json.loads(line)
        except (ValueError, RecursionError):
            document = None
        if _is(document, fields):
            found.append(document)
        else:
            damaged += 1
    return found, damaged


def _is(document: object, fields: Mapping[str, type | tuple[type, ...]]) -> bool:
    # Whether it has what is asked of it without looking; the schemas say it all.
    return isinstance(document, dict) and all(
        name in document and isinstance(document[name], kind) for name, kind in fields.items()
    )


class Journal:
    """A directory that is being written; one process at a time.

    :raises UsageError: where another process writes it, or it holds another experiment
    :raises Failed: where it cannot be written
    """

    def __init__(self, directory: str, experiment: Mapping[str, Any]) -> None:
        self.directory = directory
        self._fds: list[int] = []
        try:
            self._open(experiment)
        except OSError as error:
            self.close()
            raise _unwritable(directory, error) from None
        except UsageError:
            self.close()
            raise

    def _open(self, experiment: Mapping[str, Any]) -> None:
        os.makedirs(self.directory, exist_ok=True)
        self._fds.append(os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
        try:
            fcntl.flock(self._fds[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing the experiment in {self.directory}",
                "wait for it, or name another --out DIR",
            ) from None
        path = os.path.join(self.directory, EXPERIMENT)
        if os.path.exists(path):
            self._same(experiment)
        elif set(os.listdir(self.directory)) - {f"{EXPERIMENT}.new"}:  # a killed one's
            raise UsageError(
                f"{self.directory} is not empty and holds no experiment",
                "name another --out DIR, or one that is not there",
            )
        else:
            replace(path, json.dumps(experiment, indent=1) + "\n")
        self._runs = _Lines(os.path.join(self.directory, RUNS))
        self._fds.append(self._runs.fd)
        self._sessions = _Lines(os.path.join(self.directory, SESSIONS))
        self._fds.append(self._sessions.fd)

    def _same(self, experiment: Mapping[str, Any]) -> None:
        there = _experiment(self.directory)
        # Where the file lay, and how long it was thought to take, make no other experiment of it.
        for part, ignored in (("design", "source"), ("plan", "seconds")):
            had, wanted = there[part], experiment[part]
            keys = sorted((had.keys() | wanted.keys()) - {ignored})
            differ = [key for key in keys if had.get(key) != wanted.get(key)]
            if differ:
                where = "" if part == "design" else ", as on a host whose pCPUs are others"
                raise UsageError(
                    f"{self.directory} holds another experiment: its {part} differs in {', '.join(differ)}{where}",
                    "name another --out DIR; or go on with that one with its own file and options, on its host",
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
        while self._fds:
            os.close(self._fds.pop())


class _Lines:
    def __init__(self, path: str) -> None:
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self.fd).st_size
        data = os.pread(self.fd, size, 0)
        tail = data[data.rfind(b"\n") + 1 :]
        if not tail:
            return
        # A kill may have left a line without its end. Whole but for that it stays; else it is taken away, so that the
        # next one begins on a line of its own.
        try:
            json.loads(tail)
            os.write(self.fd, b"\n")
        except (ValueError, RecursionError):
            os.ftruncate(self.fd, size - len(tail))

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


def _unwritable(directory: str, error: OSError) -> Failed:
    return Failed(
        f"the experiment cannot be written to {directory}: {error.strerror}",
        "make room or mend what it says, then give the same command again: it goes on where it stopped",
    )
