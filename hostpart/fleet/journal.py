"""The directory of one fleet run: what was asked, which host took it, and every line that a host said, as it came.

=====================  ============================================================================
``fleet.json``         what was asked of the fleet; written once
``requests.jsonl``     a line per decision on a request: asked, placed, started, ended, ...
``hosts/NAME.jsonl``   a line per thing that a host said of itself, its experiment or its guests
=====================  ============================================================================

A line is appended in one write, so that a kill leaves all of it or a part that whoever opens the file next takes away.
It is not waited for until the disk has it: what this machine's power failure takes is still with the hosts, and
:meth:`Journal.offset` says from where to ask for it again.

Hosts are not trusted. What they say is kept as they said it, as far as it is JSON, and :func:`read` takes of it what
has the form that it should have: the rest is counted as damaged. Texts are bounded, and are made safe to show by
whoever shows them.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
import threading
from collections import OrderedDict
from datetime import UTC, datetime

from ..cpuset import MAX_CPUS, CpuSet
from ..errors import Failed, UsageError
from ..experiment.intake import finite
from ..experiment.results import Results, replace
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from typing import Any

__all__ = ["FLEET", "KINDS", "Fleet", "HostResults", "Journal", "decisions", "file_name", "hosts", "is_fleet", "read"]

FLEET, REQUESTS, HOSTS = "fleet.json", "requests.jsonl", "hosts"
KINDS = ("host", "experiment", "session", "run", "event", "outcome")

_SAFE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}", re.ASCII)
_HASHED = re.compile(r".*-[0-9a-f]{16}", re.ASCII)
_ENDING = ".jsonl"
_OPEN = 64  # files at a time: a cluster may have more hosts than a process may have files
_LONGEST = 16 << 20  # bytes of a line: a run's is some 100 KiB
_TEXT = 8192  # characters of a text that is taken: a kernel's command line has 4,096 at most
_MANY = 100_000  # entries of a list or a table that are taken
_DEEP = 24  # lists and tables in each other
_LARGEST = 1 << 53  # of a number that counts something
_NAME_ONE = "name a directory that 'hostpart fleet' wrote"


class HostResults(Value):
    """What a host of the fleet said.

    :ivar name: its worker's
    :ivar file: its file in ``hosts``, without the ending; it has none where it is only named in a decision
    :ivar hello: what it is (``identity.py``); empty where it never said
    :ivar facts: of the machine, as an experiment's session has them; empty where they are not known
    :ivar skew_s: by how much its clock is ahead of the client's
    :ivar experiment: the design and its plan there
    :ivar sessions: each time the experiment was started there
    :ivar runs: by number; of one that was made again, the last
    :ivar results: the same as one host's experiment; None where it told of no experiment
    :ivar outcomes: the state document of each request that ended there, by its id
    :ivar damaged: how many lines could not be read
    """

    name: str
    file: str | None
    address: str | None
    hello: dict[str, Any]
    facts: dict[str, Any]
    skew_s: float | None
    rtt_s: float | None
    experiment: dict[str, Any] | None
    sessions: tuple[dict[str, Any], ...]
    runs: tuple[dict[str, Any], ...]
    results: Results | None
    outcomes: dict[str, dict[str, Any]]
    damaged: int


class Fleet(Value):
    """What a directory holds.

    :ivar directory: as it was named
    :ivar document: ``fleet.json``
    :ivar requests: the last decision on each request, by its id
    :ivar hosts: by name
    :ivar damaged: how many lines could not be read, of all files
    """

    directory: str
    document: dict[str, Any]
    requests: dict[str, dict[str, Any]]
    hosts: tuple[HostResults, ...]
    damaged: int


def file_name(name: object) -> str:
    """Return how the file of a worker of that *name* is called, without its ending; other names have other files.

    >>> file_name("node-1")
    'node-1'
    >>> file_name("tcp://10.0.0.1:33445")
    'tcp-10.0.0.1-33445-e6295591c16261f3'
    """
    text = str(name)
    if _SAFE.fullmatch(text) and not _HASHED.fullmatch(text):
        return text
    mark = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    readable = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:60] or "host"
    return f"{readable}-{mark}"


# -- writing ---------------------------------------------------------------------------------------------


class Journal:
    """A directory that is being written; one process at a time, any of its threads.

    :param document: of a new directory, what ``fleet.json`` is to say; None: go on with the one that is there
    :ivar document: what ``fleet.json`` says
    :raises UsageError: where another process writes it, it holds another run, or there is none to go on with
    :raises Failed: where it cannot be written
    """

    def __init__(self, directory: str, document: Mapping[str, Any] | None = None) -> None:
        self.directory = directory
        self.document: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._held = -1
        self._files: OrderedDict[str, int] = OrderedDict()  # open ones, that which was used last at the end
        self._offsets: dict[tuple[str, str], int] = {}
        try:
            self._open(document)
        except OSError as error:
            self._release()
            raise _unwritable(directory, error) from None
        except BaseException:
            self._release()
            raise

    def _open(self, document: Mapping[str, Any] | None) -> None:
        if document is None:
            _document(self.directory)  # told before anything is made
        os.makedirs(os.path.join(self.directory, HOSTS) if document is None else self.directory, exist_ok=True)
        self._held = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(self._held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"another process is writing the results in {self.directory}",
                "wait for it, or name another --out DIR",
            ) from None
        path = os.path.join(self.directory, FLEET)
        if document is None or os.path.exists(path):
            self.document = _document(self.directory)
            if document is not None and document.get("run") != self.document.get("run"):
                raise UsageError(
                    f"{self.directory} holds the results of another fleet run",
                    f"name another --out DIR, or go on with that one: --resume {self.directory}",
                )
        elif set(os.listdir(self.directory)) - {HOSTS, f"{FLEET}.new"}:  # a killed one's
            raise UsageError(
                f"{self.directory} is not empty and holds no fleet run", "name another --out DIR, or one not there"
            )
        else:
            self.document = dict(document)
            replace(path, json.dumps(self.document, indent=1, allow_nan=False) + "\n")
        os.makedirs(os.path.join(self.directory, HOSTS), exist_ok=True)
        _mend(os.path.join(self.directory, REQUESTS))
        for file in _files(self.directory):
            _mend(self._path(file))
            for line in _lines(self._path(file)):
                document_of = _parsed(line)
                if document_of is not None:
                    self._remember(file, document_of.get("request"), document_of.get("offset"))

    def host(
        self,
        name: object,
        *,
        address: str | None = None,
        hello: Mapping[str, Any] | None = None,
        facts: Mapping[str, Any] | None = None,
        skew_s: float | None = None,
        rtt_s: float | None = None,
    ) -> None:
        """Note what a host is.

        :raises Failed: where it can't be written; then nothing of it is left in the file
        """
        said = {"address": address, "hello": hello, "facts": facts, "skew_s": skew_s, "rtt_s": rtt_s}
        self._line(name, "host", {"name": str(name), **said})

    def line(self, name: object, kind: str, /, **fields: object) -> None:
        """Append what a host said to its file.

        A field that is not JSON, or has no end, is kept as null, and ``unkept`` names it.

        :param name: the worker's
        :param kind: one of :data:`KINDS`
        :param fields: such as ``request``, ``run``, and ``offset``: that in the errand's events behind it
        :raises ValueError: for another kind
        :raises Failed: where it can't be written; then nothing of it is left in the file
        """
        if kind not in KINDS:
            raise ValueError(f"{kind!r} is none of {', '.join(KINDS)}")
        self._line(name, kind, fields)

    def _line(self, name: object, kind: str, fields: Mapping[str, object]) -> None:
        file = file_name(name)
        text = _dumped({"schema": 1, "received": _now(), "kind": kind}, fields)
        with self._lock:
            self._append(self._path(file), text)
            self._remember(file, fields.get("request"), fields.get("offset"))

    def decision(self, request: str, state: str, /, **fields: object) -> None:
        """Note what became of a request, as the client sees it.

        :param fields: such as ``host``, the worker's name
        :raises Failed: where it can't be written; then nothing of it is left in the file
        """
        text = _dumped({"id": request, "state": state, "host": None, "at": _now()}, fields)
        with self._lock:
            self._append(os.path.join(self.directory, REQUESTS), text)

    def offset(self, name: object | None, request: str) -> int:
        """Return up to where the events of *request* are kept: the last ``offset`` of its lines; 0 without any.

        :param name: the worker's; None: that on whichever host has most of them
        """
        with self._lock:
            if name is not None:
                return self._offsets.get((file_name(name), request), 0)
            return max((at for (_, one), at in self._offsets.items() if one == request), default=0)

    def sync(self) -> None:
        """Wait until the disk has all of it.

        :raises Failed: where it can't be written
        """
        try:
            with self._lock:
                for fd in self._files.values():
                    os.fsync(fd)
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def close(self) -> None:
        """Have the disk write it, and let others do; a second time is none."""
        try:
            self.sync()
        finally:
            self._release()

    def _release(self) -> None:
        with self._lock:
            while self._files:
                os.close(self._files.popitem()[1])
            if self._held >= 0:
                os.close(self._held)
                self._held = -1

    def _path(self, file: str) -> str:
        return os.path.join(self.directory, HOSTS, f"{file}{_ENDING}")

    def _remember(self, file: str, request: object, offset: object) -> None:
        # All that is kept in memory: a number for each request and host.
        if isinstance(request, str) and isinstance(offset, int) and 0 <= offset <= _LARGEST:
            key = (file, request)
            self._offsets[key] = max(self._offsets.get(key, 0), int(offset))

    def _append(self, path: str, text: bytes) -> None:
        try:
            fd = self._file(path)
            size = os.fstat(fd).st_size
            try:
                rest = memoryview(text)
                while rest:
                    rest = rest[os.write(fd, rest) :]
            except OSError:
                os.ftruncate(fd, size)
                raise
        except OSError as error:
            raise _unwritable(self.directory, error) from None

    def _file(self, path: str) -> int:
        if self._held < 0:
            raise ValueError("the journal is closed")
        if path in self._files:
            self._files.move_to_end(path)
        else:
            while len(self._files) >= _OPEN:
                _, eldest = self._files.popitem(last=False)
                try:
                    os.fsync(eldest)  # where a file system tells only now that it is full
                finally:
                    os.close(eldest)
            self._files[path] = _opened(path)
        return self._files[path]


def _opened(path: str) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def _mend(path: str) -> None:
    # A kill may have left a line without its end. Whole but for that it stays; else it is taken away, so that the next
    # one begins on a line of its own.
    fd = _opened(path)
    try:
        size = at = os.fstat(fd).st_size
        tail = b""
        while at and b"\n" not in tail:
            step = min(at, 1 << 16)
            at -= step
            tail = os.pread(fd, step, at) + tail
        tail = tail[tail.rfind(b"\n") + 1 :]
        if not tail:
            return
        if _parsed(tail) is not None:
            os.write(fd, b"\n")
        else:
            os.ftruncate(fd, size - len(tail))
    finally:
        os.close(fd)


def _dumped(first: Mapping[str, object], fields: Mapping[str, object]) -> bytes:
    document = {**first, **fields}
    try:
        text = _compact(document)
    except (ValueError, RecursionError):
        text = None
    if text is None or len(text) > _LONGEST:
        # Which of them it was; what can be kept is.
        unkept = [name for name, value in fields.items() if not _keepable(value)]
        text = _compact({**document, **dict.fromkeys(unkept), "unkept": unkept})
    return text + b"\n"


def _compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":"), allow_nan=False).encode("ascii")


def _keepable(value: object) -> bool:
    try:
        return len(_compact(value)) <= _LONGEST // 16
    except (ValueError, RecursionError):  # a number that JSON does not have, one without end, nested without end
        return False


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _unwritable(directory: str, error: OSError) -> Failed:
    return Failed(
        f"the results cannot be written to {directory}: {error.strerror}",
        f"make room or mend what it says, then go on where it stopped: --resume {directory}",
    )


# -- reading ---------------------------------------------------------------------------------------------


def is_fleet(directory: str) -> bool:
    """Whether *directory* is a fleet run's, and not a single host's experiment."""
    return os.path.isfile(os.path.join(directory, FLEET))


def read(directory: str, each: Callable[[HostResults], HostResults] | None = None) -> Fleet:
    """Return what *directory* holds.

    :param each: what to make of each host as soon as it is read, such as one without its runs: those of all hosts
        together may be more than the memory holds
    :raises UsageError: where it is no fleet run's, or can't be read
    """
    document = _document(directory)
    requests, damaged = _requests(directory)
    every = tuple(each(one) if each else one for one in hosts(directory))
    return Fleet(directory, document, requests, every, damaged + sum(one.damaged for one in every))


def hosts(directory: str) -> Iterator[HostResults]:
    """Go over what each host said, in the order of their names; memory for one is enough.

    :raises UsageError: where it is no fleet run's, or can't be read
    """
    _document(directory)
    requests, _ = _requests(directory)
    try:
        files = _files(directory)
        named = {file: file for file in files}
        # A host that was chosen and never said anything has no file.
        named |= {file_name(one["host"]): one["host"] for one in requests.values() if one["host"] is not None}
        for file in sorted(named, key=_natural):
            yield _host(directory, file, named[file], there=file in files)
    except OSError as error:
        raise _unreadable(directory, error) from None


def decisions(directory: str) -> dict[str, dict[str, Any]]:
    """Return the last decision on each request, by the errand's name; in the order of their first.

    :raises UsageError: where *directory* is no fleet run's
    """
    _document(directory)
    return _requests(directory)[0]


def _natural(file: str) -> list[tuple[int, int, str]]:
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]{1,15})", file)]


def _files(directory: str) -> list[str]:
    try:
        there = os.listdir(os.path.join(directory, HOSTS))
    except FileNotFoundError:
        return []
    return [one.removesuffix(_ENDING) for one in there if one.endswith(_ENDING) and one != _ENDING]


def _document(directory: str) -> dict[str, Any]:
    path = os.path.join(directory, FLEET)
    try:
        with open(path, "rb") as file:
            data = file.read(_LONGEST)
    except OSError as error:
        raise _unreadable(directory, error) from None
    document = _parsed(data)
    if document is None or document.get("schema") != 1 or document.get("kind") not in ("run", "experiment"):
        raise UsageError(f"{path}: it is not a fleet run of a version that this hostpart reads", _NAME_ONE)
    return _table(_tame(document))


def _unreadable(directory: str, error: OSError) -> UsageError:
    return UsageError(f"{directory}: {error.strerror}: {error.filename}", _NAME_ONE)


def _requests(directory: str) -> tuple[dict[str, dict[str, Any]], int]:
    found: dict[str, dict[str, Any]] = {}
    damaged = 0
    for line in _lines(os.path.join(directory, REQUESTS)):
        one = _table(_tame(_parsed(line)))
        if not _text(one.get("id")) or not _text(one.get("state")):
            damaged += 1
            continue
        name = _text(one.get("host"))
        # Which host it was stays known when a later decision says no more of it.
        if name is None and one["state"] in ("ended", "lost", "stopped") and one["id"] in found:
            name = found[one["id"]]["host"]
        found[one["id"]] = {**one, "host": name}
    return found, damaged


def _lines(path: str) -> Iterator[bytes]:
    # One at a time; of one without end only that it is there, which no JSON is made of.
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        return
    with open(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return
        while line := file.readline(_LONGEST + 1):
            while line[-1:] != b"\n" and len(line) > _LONGEST:
                line = b"\0" + file.readline(_LONGEST)
            yield line


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError):  # a number of 5,000 digits is a ValueError
        return None
    return document if isinstance(document, dict) else None


class _Told:
    # What a host's file tells of one experiment: it has several where a request was asked again.

    def __init__(self) -> None:
        self.experiment: dict[str, Any] | None = None
        self.sessions: dict[int, dict[str, Any]] = {}
        self.runs: dict[int, dict[str, Any]] = {}

    @property
    def weight(self) -> tuple[bool, int]:
        return self.experiment is not None, sum(1 for run in self.runs.values() if run["error"] is None)


def _host(directory: str, file: str, named: str, *, there: bool) -> HostResults:
    about: dict[str, Any] = {}
    told: dict[str, _Told] = {}
    outcomes: dict[str, dict[str, Any]] = {}
    damaged = 0
    for line in _lines(os.path.join(directory, HOSTS, f"{file}{_ENDING}")):
        document = _parsed(line) or {}
        kind, request = document.get("kind"), _text(document.get("request"))
        if kind == "host":
            about = {**about, **{name: value for name, value in document.items() if value is not None}}
        elif request is None or kind not in KINDS:
            damaged += 1
        elif kind == "experiment":
            taken = _experiment(document.get("document"))
            damaged += taken is None
            if taken is not None:
                told.setdefault(request, _Told()).experiment = taken
        elif kind == "session":
            session = _session(document.get("session"))
            damaged += session is None
            if session is not None:
                told.setdefault(request, _Told()).sessions[session["session"]] = session
        elif kind == "run":
            run = _run(document.get("run"))
            damaged += run is None
            if run is not None:
                told.setdefault(request, _Told()).runs[run["run"]] = run
        elif kind == "outcome":
            outcomes[request] = _table(_tame(document.get("state")))
    best = max(told.values(), key=lambda one: one.weight, default=_Told())
    sessions = tuple(best.sessions[number] for number in sorted(best.sessions))
    runs = tuple(best.runs[number] for number in sorted(best.runs))
    name = _text(about.get("name"))
    facts = _table(_tame(about.get("facts"))) or _table(next((one["facts"] for one in sessions), {}))
    results = None
    if best.experiment is not None:
        where = os.path.join(directory, HOSTS, file)
        results = Results(where, best.experiment, sessions, runs, damaged)
    return HostResults(
        # A name that another file has by rights is not taken over.
        name if name is not None and file_name(name) == file else named,
        file if there else None,
        _text(about.get("address")),
        _table(_tame(about.get("hello"))),
        facts,
        _seconds(about.get("skew_s")),
        _seconds(about.get("rtt_s")),
        best.experiment,
        sessions,
        runs,
        results,
        outcomes,
        damaged,
    )


def _experiment(given: object) -> dict[str, Any] | None:
    document = _table(_tame(given))
    plan, design = _table(document.get("plan")), document.get("design")
    conditions, runs = plan.get("conditions"), plan.get("runs")
    if document.get("schema") != 1 or not isinstance(design, dict) or not _text(document.get("name")):
        return None
    if not isinstance(conditions, list) or not isinstance(runs, list):
        return None
    if not all(map(_is_condition, conditions)) or not all(map(_is_planned, runs)):
        return None
    return {**document, "design": _design(design)}


def _is_condition(one: object) -> bool:
    one = _table(one)
    return (
        all(_text(one.get(name)) for name in ("id", "victim", "isolation", "placement"))
        and (one.get("aggressor") is None or bool(_text(one["aggressor"])))
        and {"aggressor", "aggressor_pcpus"} <= one.keys()
        and _counted(one.get("victim_pcpu"))
        and one["victim_pcpu"] < MAX_CPUS
        and _is_cpus(one["aggressor_pcpus"])
    )


def _is_planned(one: object) -> bool:
    return bool(_text(_table(one).get("condition")))


def _is_cpus(value: object) -> bool:
    try:
        return value is None or (isinstance(value, str) and CpuSet.parse(value) is not None)
    except ValueError:
        return False


# A report names these, and counts with `count`.
def _design(design: Mapping[str, Any]) -> dict[str, Any]:
    found = dict(design)
    for what in ("victims", "aggressors"):
        listed = design.get(what)
        each = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        found[what] = [
            {
                **one,
                "options": _table(one.get("options")),
                "command": one["command"] if isinstance(one.get("command"), list) else None,
                "count": one["count"] if _counted(one.get("count")) else None,
            }
            for one in each
        ]
    return found


def _session(given: object) -> dict[str, Any] | None:
    session = _table(_tame(given))
    if not _counted(session.get("session")) or not _text(session.get("started")):
        return None
    return {**session, "facts": _table(session.get("facts"))}


def _run(given: object) -> dict[str, Any] | None:
    run = _table(given)
    record = run.get("record")
    # The record is long, and whoever counts with it takes it apart with care.
    run = _table(_tame({name: value for name, value in run.items() if name != "record"}))
    numbers = all(_counted(run.get(name)) for name in ("run", "block", "session"))
    if not numbers or not _text(run.get("condition")):
        return None
    error = run.get("error")
    if error is not None and not isinstance(error, dict):
        return None
    return {
        **run,
        "error": error,
        "metrics": _table(run.get("metrics")),
        "primary": _text(run.get("primary")),
        "verdict": _text(run.get("verdict")),
        "reasons": run["reasons"] if isinstance(run.get("reasons"), list) else [],
        "record": record if isinstance(record, dict) else None,
    }


# What a host said with an end to each of its texts, lists and depths; nothing in the place of what has none.
def _tame(value: object, deep: int = _DEEP) -> Any:
    if isinstance(value, str):
        return value if len(value) <= _TEXT else f"{value[:_TEXT]}…"
    if isinstance(value, dict):
        if not deep or len(value) > _MANY:
            return None
        return {name[:_TEXT]: _tame(one, deep - 1) for name, one in value.items()}
    if isinstance(value, list):
        if not deep or len(value) > _MANY:
            return None
        return [_tame(one, deep - 1) for one in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and not finite(value):
        return None
    return value


def _counted(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _LARGEST


def _seconds(value: object) -> float | None:
    return float(value) if finite(value) and abs(value) < _LARGEST else None


def _table(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return value if isinstance(value, str) and value else None
