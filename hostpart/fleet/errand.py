"""What a host was asked to do: a directory for each request, and a process that sees to it and outlives whoever asked.

All that is known of an errand is in its directory, so that whoever comes after a killed Dask worker can answer for it:

================  =====================================================================================
``request.json``    what was asked; a directory comes into being with it, by one rename
``word``            a link whose target says how the hold ended: made once, so that one of all who try wins
``gate``            the FIFO that hostpart waits at; only wakes: what counts is ``word``
``events``          hostpart's own, with ``stdout`` and ``stderr``
``begun``           where in ``events`` the present attempt begins
``shim.json``       the process: ``python -m hostpart.fleet.errand DIR``; ``lock`` is locked by it while it lives
``child.json``      hostpart, its child
``outcome.json``    written when hostpart has ended
================  =====================================================================================

No shell sees a word of it, and no path outside the directory is made from what came from outside.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time

from .. import procfs
from ..errors import Failed, NotPermitted, UsageError
from ..ledger import boot_id
from . import supply
from .identity import command, machine
from .order import Order, check_id, check_run, is_id, object_of

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["ASKABLE", "CHANNELS", "LIVE", "Errand", "Errands", "directory_of_all", "main"]

CHANNELS = ("events", "stdout", "stderr")
LIVE = ("placing", "held", "running")
ASKABLE = ("topology", "plan", "ps", "show", "stop", "audit")
_PLACE_S = 60.0  # until a VM must be READY
_HOLD_S = 120.0  # from then on until the word must have come
_GRACE_S = 5.0  # as the front's, where nobody said another
_ORDERLY_S = 15.0  # beyond a grace time, until one who was asked to end is made to
_YOUNG_S = 10.0  # a directory without a process may still be waiting for it
_KEEP_S = 30 * 86400.0
_INLINE = 64 << 10
_READ = 1 << 20
_ASK_S, _ASK_BYTES = 30.0, 4 << 20
_LATE = {"exit_code": 1, "problem": f"its VM was not ready after {_PLACE_S:g} s", "remedy": "see how busy that host is"}
# Events that a state does not follow from, and that are long and many.
_PASSED_OVER = (b'{"event":"run",', b'{"event":"session",', b'{"event":"experiment",')


def directory_of_all() -> str:
    """Return the directory of all errands: this user's, and nobody else's to look into.

    :raises NotPermitted: where it is a link, another user's or open to others
    :raises Failed: where it cannot be made
    """
    path = os.environ.get("HOSTPART_FLEET_DIR") or _home()
    try:
        os.makedirs(path, mode=0o700, exist_ok=True)
        found = os.lstat(path)
    except OSError as error:
        raise Failed(f"{path} cannot be made: {error.strerror}", "set HOSTPART_FLEET_DIR to a directory") from None
    if not stat.S_ISDIR(found.st_mode):
        raise NotPermitted(f"{path} is a link, and is not followed", f"see who made it: 'ls -ld {path}'")
    if found.st_uid != os.geteuid():
        raise NotPermitted(
            f"{path} belongs to uid {found.st_uid}, not to you (uid {os.geteuid()})",
            "set HOSTPART_FLEET_DIR to a directory of your own",
        )
    if found.st_mode & 0o077:
        raise NotPermitted(f"{path} is open to others (mode {found.st_mode & 0o777:o})", f"chmod 700 {path}")
    return os.path.abspath(path)


def _home() -> str:
    if os.geteuid() == 0:
        return "/var/lib/hostpart/fleet"
    own = os.environ.get("XDG_STATE_HOME", "")
    home = own if own.startswith("/") else os.path.expanduser("~/.local/state")
    return os.path.join(home, "hostpart", "fleet", machine())  # hosts may share a home, and no errands


def _write(path: str, document: object) -> None:
    # Whole or not at all. The name of the new one is this writer's own: there may be two.
    new = f"{path}.{os.getpid()}-{threading.get_ident()}"
    fd = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    with open(fd, "w", encoding="utf-8") as file:
        json.dump(document, file)
        file.flush()
        os.fsync(fd)
    os.replace(new, path)


def _read(path: str) -> dict[str, Any] | None:
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _alive(who: Mapping[str, Any] | None) -> bool:
    # Whether the process of a file is the same that wrote it, and no zombie.
    if who is None or who.get("boot_id") != boot_id():
        return False
    found = procfs.read_stat(int(who["pid"]))
    return found is not None and found.start == who["start"] and not found.dead


def _this(pid: int) -> dict[str, Any]:
    return {"pid": pid, "start": procfs.start_time(pid), "boot_id": boot_id()}


class Errand:
    """One errand, as its directory shows it.

    :ivar directory: which need not be there
    """

    def __init__(self, directory: str) -> None:
        self.directory = directory
        self.id = os.path.basename(directory)
        self._lock = threading.Lock()
        self._forget()

    def _forget(self) -> None:
        self._begun: int | None = None
        self._seen = 0
        self._vm: str | None = None
        self._vcpus: list[Any] | None = None
        self._error: dict[str, Any] | None = None
        self._status: int | None = None

    def path(self, name: str) -> str:
        """Return the path of one of its files."""
        return os.path.join(self.directory, name)

    def request(self) -> dict[str, Any]:
        """Return the request, empty where there is none."""
        return _read(self.path("request.json")) or {}

    def word(self) -> str:
        """Return how the hold ended: ``start``, ``give-up``, ``late``, ``ended`` (by itself), or empty: not yet."""
        try:
            return os.readlink(self.path("word"))
        except OSError:
            return ""

    def settle(self, word: str) -> bool:
        """End the hold with *word*, if nobody has yet; whether it was this call.

        A link comes into being with its target, in one step, and only where none is.
        """
        try:
            os.symlink(word, self.path("word"))
        except OSError:
            return False
        return True

    def wake(self, line: bytes) -> None:
        """Say a line to who waits at the gate, if anybody does."""
        try:
            fd = os.open(self.path("gate"), os.O_WRONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        try:
            os.write(fd, line)
        except OSError:
            pass  # it is full of such lines
        finally:
            os.close(fd)

    def sizes(self) -> dict[str, int]:
        """Return how many bytes there are to read, by channel."""
        return {name: self._size(name) for name in CHANNELS}

    def read(self, channel: str, offset: int, limit: int) -> tuple[int, bytes]:
        """Return bytes of a channel, and the offset that they begin at: the end, where there are none yet."""
        if channel not in CHANNELS:
            raise UsageError(f"there is no channel {channel[:40]!r}", f"one of {', '.join(CHANNELS)}")
        try:
            fd = os.open(self.path(channel), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return 0, b""
        try:
            offset = min(offset, os.fstat(fd).st_size)
            return offset, os.pread(fd, min(limit, _READ), offset)
        finally:
            os.close(fd)

    def is_over(self) -> bool:
        """Whether it is known to be over, at the cost of one look."""
        return os.path.exists(self.path("outcome.json"))

    def state(self, host: str = "") -> dict[str, Any]:
        """Return the state document.

        :param host: the host's name, for it
        """
        document: dict[str, Any] = {
            "id": self.id,
            "state": "unknown",
            "host": host or os.uname().nodename,
            "vm": None,
            "vcpus": None,
            "status": None,
            "error": None,
            "notes": [],
            "sizes": dict.fromkeys(CHANNELS, 0),
        }
        if not os.path.isdir(self.directory):
            return document
        with self._lock:
            self._fill(document)
        document["sizes"] = self.sizes()
        if document["state"] == "ended" and sum(document["sizes"].values()) <= _INLINE:
            events, out, err = (self.read(name, 0, _INLINE)[1] for name in CHANNELS)
            document["inline"] = {
                "events": events.decode(errors="replace"),
                "stdout": base64.b64encode(out).decode(),
                "stderr": base64.b64encode(err).decode(),
            }
        return document

    def _fill(self, document: dict[str, Any]) -> None:
        outcome = _read(self.path("outcome.json"))
        shim = _read(self.path("shim.json"))
        living = outcome is None and _alive(shim)
        if outcome is None and not living:
            outcome = _read(self.path("outcome.json"))  # it may have ended between the two looks
        word = self.word()
        self._scan()
        document.update(vm=self._vm, vcpus=self._vcpus, error=self._error, notes=list((shim or {}).get("notes", [])))
        if outcome is not None:
            document["status"] = outcome["status"]
            document["state"] = self._end_of(word, document)
        elif living:
            waits = self._vm is not None or (shim or {}).get("hold") == "start"
            document["state"] = {"start": "running", "give-up": "given-up", "late": "refused"}.get(
                word, "held" if waits else "placing"
            )
        elif word == "start" and _alive(_read(self.path("child.json"))):
            document["state"] = "running"
            document["notes"].append("the process that watched over it was killed; hostpart goes on")
        elif shim is None and time.time() - self._made() < _YOUNG_S:
            document["state"] = "placing"
        elif self._status is not None or (self._error is not None and word == "start"):
            # hostpart said so itself, before or after its shim was killed.
            document["state"] = "ended"
            document["status"] = 125 if self._status is None else self._status
        elif self._error is not None:
            document["state"] = "refused"
        else:
            document["state"] = "given-up" if word in ("give-up", "late") else "lost"
        if word == "late":
            document["error"] = dict(_LATE)
        if document["state"] == "refused" and document["error"] is None:
            document["error"] = self._unsaid(document["status"])

    def _end_of(self, word: str, document: dict[str, Any]) -> str:
        if word == "start":
            return "ended"
        if word == "give-up":
            document["error"] = document["status"] = None  # what hostpart says of being held in vain is no error
            return "given-up"
        return "refused"

    def _unsaid(self, status: int | None) -> dict[str, Any]:
        size = self._size("stderr")
        lines = self.read("stderr", max(0, size - 2000), 2000)[1].decode(errors="replace").strip().splitlines()
        said = f": {lines[-1]}" if lines else ""
        code = status if status in (1, 2, 3, 4, 5) else 1
        how = "" if status is None else f" with status {status}"
        return {
            "exit_code": code,
            "problem": f"hostpart ended{how} before its guest ran{said}",
            "remedy": "try the same command on that host: 'hostpart run ...'",
        }

    def _scan(self) -> None:
        # What hostpart has told since the last look.
        begun = (_read(self.path("begun")) or {}).get("events", 0)
        if begun != self._begun:
            self._forget()
            self._begun = self._seen = begun
        try:
            fd = os.open(self.path("events"), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except OSError:
            return
        with open(fd, "rb") as file:
            file.seek(self._seen)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._seen += len(line)
                if not line.startswith(_PASSED_OVER):
                    self._take(line)

    def _take(self, line: bytes) -> None:
        if (event := object_of(line)) is None:
            return
        kind = event.get("event")
        if kind == "ready":
            self._vm, self._vcpus = event.get("vm"), event.get("vcpus")
        elif kind == "error":
            self._error = {name: event.get(name) for name in ("exit_code", "problem", "remedy")}
        elif kind in ("ended", "over"):
            status = event.get("status" if kind == "ended" else "exit_code")
            self._status = status if isinstance(status, int) else None

    def _size(self, name: str) -> int:
        try:
            return os.lstat(self.path(name)).st_size
        except OSError:
            return 0

    def _made(self) -> float:
        try:
            return os.lstat(self.path("begun")).st_mtime
        except OSError:
            return 0.0


class Errands:
    """All errands of this host and user.

    Several may look after one directory: each step that must happen once is one system call that only one of all who
    try can make.

    :param directory: by default :func:`directory_of_all`
    :raises HostpartError: where that cannot be used
    """

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory_of_all() if directory is None else directory
        self._host = os.uname().nodename
        self._known: dict[str, Errand] = {}
        self._shims: list[subprocess.Popen[bytes]] = []
        self._mutex = threading.Lock()

    # -- the way of one ------------------------------------------------------------------------------

    def begin(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Begin an errand, and return its state once it is held or refused.

        One that is known is not begun a second time, unless nothing of it has run, or it is an experiment, which goes
        on where it stopped.

        :param request: as it came, not looked at yet
        :raises UsageError: where it cannot be carried out anywhere, or its id stands for another one here
        """
        order = Order.parse(request)
        errand = self._errand(order.id)
        if errand.word() in ("give-up", "late", "ended"):
            self._until_over(errand, _GRACE_S)
        if errand.is_over():
            self._until_gone(errand)
        shim: subprocess.Popen[bytes] | None = None
        with self._alone():
            there = os.path.isdir(errand.directory)
            if there and errand.request() != order.document:
                raise UsageError(f"{order.id} stands for another request on this host", "give each an id of its own")
            now = self.state(order.id)
            if not there or self._may_go_on(order, errand, now) or self._waits_for_shim(errand):
                problem = self._in_the_way(order)
                if problem:
                    error = {"exit_code": 3, "problem": problem, "remedy": "take another host, or wait for that to end"}
                    return {**now, "state": "refused", "error": error}
                if not there:
                    self._make(order)
                if not self._waits_for_shim(errand):
                    self._clear(errand)
                shim = self._begin_shim(errand)
            elif now["state"] not in ("placing", "held"):
                return now
        return self._placed(errand, shim)

    def start(self, one: str) -> dict[str, Any]:
        """Give the word to one that is held; to others it means nothing."""
        errand = self._errand(one)
        if self.state(one)["state"] == "held" and errand.settle("start"):
            errand.wake(b"start\n")
        return self.state(one)

    def give_up(self, one: str) -> dict[str, Any]:
        """Give back what is held for one; nothing of it has run then. One that runs is left alone."""
        errand = self._errand(one)
        if self.state(one)["state"] in ("placing", "held") and errand.settle("give-up"):
            errand.wake(b"stop\n")
        if errand.word() == "give-up":
            self._until_over(errand, _GRACE_S)
        return self.state(one)

    def stop(self, one: str, grace_s: float = _GRACE_S) -> dict[str, Any]:
        """End one: SIGTERM to its guests, SIGKILL after *grace_s*; what is held is given back."""
        found = self.give_up(one)
        if found["state"] != "running":
            return found
        errand = self._errand(one)
        _write(errand.path("stop"), {"grace_s": grace_s})
        until = time.monotonic() + grace_s + _GRACE_S
        signalled: object = None
        while time.monotonic() < until and self.state(one)["state"] == "running":
            # The shim passes it on; one that is about to die when it is signalled does not.
            documents = (_read(errand.path(name)) for name in ("shim.json", "child.json"))
            who = next((one for one in documents if one is not None and _alive(one)), None)
            if who is not None and who["pid"] != signalled:
                signalled = who["pid"]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(who["pid"]), signal.SIGTERM)
            self._until_over(errand, 0.5)
        return self.state(one)

    def state(self, one: str) -> dict[str, Any]:
        """Return the state document of one."""
        self._reap()
        return self._errand(one).state(self._host)

    def read(self, one: str, channel: str, offset: int, limit: int) -> tuple[int, bytes]:
        """Return bytes of a channel of one, and the offset that they begin at."""
        return self._errand(one).read(channel, offset, limit)

    # -- all of them ---------------------------------------------------------------------------------

    def ids(self, run: str = "") -> list[str]:
        """Return the ids that are known here.

        :param run: of this run only
        """
        start = f"{check_run(run)}." if run else ""
        return sorted(name for name in os.listdir(self.directory) if name.startswith(start) and is_id(name))

    def ask(self, argv: Sequence[str]) -> tuple[int, str, str]:
        """Run a hostpart command that looks, or ends a VM; return its status, stdout and stderr.

        :raises UsageError: for another command
        :raises Failed: where it does not end
        """
        if not argv or argv[0] not in ASKABLE:
            raise UsageError(f"{' '.join(argv)[:80]!r} is not for the asking", f"one of {', '.join(ASKABLE)}")
        try:
            done = subprocess.run(
                [*command(), *argv], stdin=subprocess.DEVNULL, capture_output=True, timeout=_ASK_S, check=False
            )
        except subprocess.TimeoutExpired:
            raise Failed(f"'hostpart {argv[0]}' did not end within {_ASK_S:g} s", "see how busy that host is") from None
        except OSError as error:
            raise Failed(f"{command()[0]!r} cannot be executed: {error.strerror}", "mend HOSTPART_COMMAND") from None
        out, err = (data[:_ASK_BYTES].decode(errors="replace") for data in (done.stdout, done.stderr))
        return 128 - done.returncode if done.returncode < 0 else done.returncode, out, err

    def supply(self) -> dict[str, float]:
        """Return what a request can have now, by resource: nothing beside an experiment, which is not disturbed either.

        :raises Failed: where it is not known
        """
        if any(kind == "experiment" for _, kind in self._live()):
            return dict(supply.NOTHING)
        status, out, err = self.ask(["topology", "--json"])
        try:
            if status:
                raise ValueError(err.strip() or f"exit status {status}")
            return supply.resources(json.loads(out))
        except (ValueError, RecursionError) as error:
            raise Failed(f"what is free is not known: {error}", "see 'hostpart topology --json' on that host") from None

    def sweep(self) -> None:
        """Remove what has ended long ago, and what a kill left half made."""
        now = time.time()
        for name in os.listdir(self.directory):
            path, old = os.path.join(self.directory, name), False
            if name.startswith(".new-"):
                old = now - _mtime(path) > 3600
            elif is_id(name):
                outcome = _read(os.path.join(path, "outcome.json"))
                ended = _mtime(path) if outcome is None else outcome.get("ended", now)
                old = now - ended > _KEEP_S and self.state(name)["state"] not in LIVE
            if old:
                shutil.rmtree(path, ignore_errors=True)
                self._known.pop(name, None)

    # -- inside --------------------------------------------------------------------------------------

    def _errand(self, one: str) -> Errand:
        with self._mutex:
            found = self._known.get(check_id(one))
            if found is None:
                found = self._known[one] = Errand(os.path.join(self.directory, one))
            return found

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        # Whoever begins one looks at the others first: a step for one at a time, of all threads and processes.
        fd = os.open(
            os.path.join(self.directory, ".lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _live(self) -> list[tuple[str, str]]:
        found = []
        for one in self.ids():
            errand = self._errand(one)
            if not errand.is_over() and self.state(one)["state"] in LIVE:
                found.append((one, str(errand.request().get("argv", ["run"])[0])))
        return found

    def _in_the_way(self, order: Order) -> str:
        for one, kind in self._live():
            if one != order.id and "experiment" in (kind, order.kind):
                who = "an experiment" if kind == "experiment" else "a guest"
                return f"{who} ({one}) is on this host, and an experiment is alone on its host"
        return ""

    @staticmethod
    def _may_go_on(order: Order, errand: Errand, now: Mapping[str, Any]) -> bool:
        # Nothing of it has run, or what has run is kept and the rest is still to be made.
        if now["state"] in LIVE or _alive(_read(errand.path("shim.json"))):
            return False
        if errand.word() != "start":
            return True
        return order.kind == "experiment" and (now["state"] != "ended" or now["status"] not in (0, 5))

    @staticmethod
    def _waits_for_shim(errand: Errand) -> bool:
        # Whoever made the directory was killed before there was a process.
        return os.path.exists(errand.path("begun")) and not (
            errand.word() or errand.is_over() or os.path.exists(errand.path("shim.json"))
        )

    def _make(self, order: Order) -> None:
        new = os.path.join(self.directory, f".new-{os.getpid()}-{threading.get_ident()}")
        shutil.rmtree(new, ignore_errors=True)
        try:
            os.mkdir(new, 0o700)
            _write(os.path.join(new, "request.json"), order.document)
            os.mkfifo(os.path.join(new, "gate"), 0o600)
            for name, text in (*order.files, *((name, "") for name in CHANNELS)):
                flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
                fd = os.open(os.path.join(new, name), flags, 0o600)
                with open(fd, "w", encoding="utf-8", newline="") as file:
                    file.write(text)
            _write(os.path.join(new, "begun"), {"events": 0})
            os.rename(new, os.path.join(self.directory, order.id))
        except OSError as error:
            shutil.rmtree(new, ignore_errors=True)
            raise Failed(
                f"errand {order.id} cannot be written to {self.directory}: {error.strerror}",
                "make room or mend what it says: see 'df'",
            ) from None

    @staticmethod
    def _clear(errand: Errand) -> None:
        # For another attempt. What the earlier one told and printed stays.
        for name in ("outcome.json", "stop", "child.json", "shim.json", "word"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(errand.path(name))
        with contextlib.suppress(OSError):
            os.unlink(errand.path("gate"))  # with what was said at it
        os.mkfifo(errand.path("gate"), 0o600)
        _write(errand.path("begun"), {"events": errand.sizes()["events"]})

    def _begin_shim(self, errand: Errand) -> subprocess.Popen[bytes]:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        log = os.open(errand.path("shim.log"), flags, 0o600)
        try:
            # A session of its own: what ends the Dask worker, or its terminal, is not meant for it.
            shim = subprocess.Popen(
                [sys.executable, "-P", "-m", "hostpart.fleet.errand", errand.directory],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True, close_fds=True,
            )  # fmt: skip
        except OSError as error:
            raise Failed(f"no process can be had for {errand.id}: {error.strerror}", "see 'ulimit -u'") from None
        finally:
            os.close(log)
        with self._mutex:
            self._shims.append(shim)
        return shim

    def _reap(self) -> None:
        with self._mutex:
            self._shims = [shim for shim in self._shims if shim.poll() is None]

    def _placed(self, errand: Errand, shim: subprocess.Popen[bytes] | None) -> dict[str, Any]:
        until, pause_s = time.monotonic() + _PLACE_S, 0.01
        while (now := self.state(errand.id))["state"] == "placing":
            # One that finds another at work ends with 0.
            if shim is not None and shim.poll() and not os.path.exists(errand.path("shim.json")):
                return {**now, "state": "refused", "error": self._no_shim(errand)}
            if time.monotonic() > until:
                if errand.settle("late"):
                    errand.wake(b"stop\n")
                self._until_over(errand, _GRACE_S)
                return self.state(errand.id)
            time.sleep(pause_s)
            pause_s = min(pause_s * 1.3, 0.1)
        if now["state"] in ("refused", "given-up"):
            self._until_over(errand, _GRACE_S)  # and its pCPUs are free
            now = self.state(errand.id)
        return now

    @staticmethod
    def _no_shim(errand: Errand) -> dict[str, Any]:
        try:
            with open(errand.path("shim.log"), encoding="utf-8", errors="replace") as file:
                said = file.read()[-2000:].strip().splitlines()
        except OSError:
            said = []
        why = f": {said[-1]}" if said else ""
        return {
            "exit_code": 1,
            "problem": f"the errand's process did not come up{why}",
            "remedy": f"see {errand.path('shim.log')} on that host",
        }

    def _until_over(self, errand: Errand, wait_s: float) -> None:
        until = time.monotonic() + wait_s
        while not errand.is_over() and time.monotonic() < until:
            if self.state(errand.id)["state"] in ("ended", "lost", "unknown"):
                return
            time.sleep(0.02)

    def _until_gone(self, errand: Errand) -> None:
        # The outcome is the last that a shim writes, and its lock goes with its end.
        until = time.monotonic() + _GRACE_S
        while _alive(_read(errand.path("shim.json"))) and time.monotonic() < until:
            time.sleep(0.01)


def _mtime(path: str) -> float:
    try:
        return os.lstat(path).st_mtime
    except OSError:
        return time.time()


# -- the process ---------------------------------------------------------------------------------------


class _Shim:
    # Starts hostpart, hands it the word, ends it in order, and says how it ended. While the guest runs it only waits.

    def __init__(self, directory: str) -> None:
        self.errand = Errand(directory)
        self.order = Order.parse(self.errand.request())
        self.child: subprocess.Popen[bytes] | None = None
        self.unstarted = 0
        self.told = self.asked = False
        self.hold_s = float(os.environ.get("HOSTPART_FLEET_HOLD_S") or _HOLD_S)
        self.until = time.monotonic() + _PLACE_S + self.hold_s
        self.held = False
        self.kill_at: float | None = None
        self.term_at: float | None = None

    def run(self) -> int:
        errand = self.errand
        lock = os.open(errand.path("lock"), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return 0  # another sees to it
        if errand.is_over() or errand.word() or os.path.exists(errand.path("shim.json")):
            return 0
        self.wake_r, wake_w = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._on_term)
        # Open for writing too: while this process lives, nobody reads the end of the file.
        self.gate = os.open(errand.path("gate"), os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        folder, notes = self._folder()
        _write(errand.path("shim.json"), {**_this(os.getpid()), "hold": self.order.hold, "notes": notes})
        self.folder = folder
        if self.order.hold == "vm":
            self._start()
        while not self._over():
            self._wait()
        errand.settle("ended")
        status = self.unstarted
        if self.child is not None:
            code = self.child.wait()
            status = 128 - code if code < 0 else code
        _write(errand.path("outcome.json"), {"status": status, "ended": time.time()})
        return 0

    def _over(self) -> bool:
        if self.child is not None:
            if self.child.poll() is not None:
                return True
        elif self.unstarted:
            return True
        word = self.errand.word()
        if not word and (self.asked or time.monotonic() > self._limit()):
            self.errand.settle("give-up")
        word = self.errand.word()
        if word == "start":
            self._go()
        elif word:
            if self.child is None:
                return True
            if not self.told:
                self.told = True
                os.write(self.gate, b"stop\n")
                self.term_at, self.kill_at = time.monotonic() + 2.0, time.monotonic() + _ORDERLY_S
        self._insist()
        return False

    def _limit(self) -> float:
        # The time begins when the VM is READY.
        if not self.held and self.errand.state()["state"] == "held":
            self.held = True
            self.until = time.monotonic() + self.hold_s
        return self.until

    def _go(self) -> None:
        if self.child is None and not self.unstarted:
            self.told = True
            self._start()
        elif not self.told:
            # Whoever won the word may have been killed before it said it.
            self.told = True
            os.write(self.gate, b"start\n")
        if self.asked:
            self.asked = False
            self._end()

    def _wait(self) -> None:
        poll = select.poll()
        poll.register(self.wake_r, select.POLLIN)
        word = self.errand.word()
        if self.child is None:
            poll.register(self.gate, select.POLLIN)
        times = [at - time.monotonic() for at in (self.term_at, self.kill_at) if at is not None]
        if not word:
            times.append(0.1)
        if self.unstarted or (self.asked and word) or (word == "start" and not self.told):
            times.append(0.0)
        for fd, _ in poll.poll(max(0.0, min(times)) * 1000 + 1 if times else None):
            if fd == self.wake_r:
                os.read(fd, 4096)
            elif not self.errand.word():
                time.sleep(0.01)  # the line comes after the word, but for one who made it up

    def _on_term(self, *_: object) -> None:
        self.asked = True

    def _end(self) -> None:
        if self.child is None:
            return
        asked = (_read(self.errand.path("stop")) or {}).get("grace_s", _GRACE_S)
        grace_s = float(asked) if isinstance(asked, (int, float)) else _GRACE_S
        now = time.monotonic()
        vm = self.errand.state()["vm"]
        if self.order.kind == "run" and isinstance(vm, str):
            # So that the grace time is the one that was asked for, and the evidence is written.
            try:
                words = [*command(), "stop", "--time", f"{grace_s:g}", vm]
                subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, env=self._environment())
                self.term_at, self.kill_at = now + grace_s + _ORDERLY_S, now + grace_s + 2 * _ORDERLY_S
                return
            except OSError:
                pass
        self.term_at, self.kill_at = now, now + grace_s + 2 * _ORDERLY_S

    def _insist(self) -> None:
        if self.child is None:
            return
        now = time.monotonic()
        if self.term_at is not None and now >= self.term_at:
            self.term_at = None
            self.child.terminate()
        if self.kill_at is not None and now >= self.kill_at:
            self.kill_at = None
            self.child.kill()

    def _folder(self) -> tuple[str, list[str]]:
        asked = self.order.cwd
        if asked is None:
            return self.errand.directory, []
        if os.path.isdir(asked) and os.access(asked, os.X_OK):
            return asked, []
        return self.errand.directory, [f"there is no directory {asked} on this host: it ran in the errand's own"]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **dict(self.order.env)}

    def _words(self) -> list[str]:
        errand = self.errand
        kind, *words = self.order.words(errand.directory)
        own = ["--events", errand.path("events")]
        if self.order.hold == "vm":
            own += ["--hold", errand.path("gate")]
        if kind == "experiment" and not any(word.partition("=")[0] == "--out" for word in words):
            own += ["--out", errand.path("results")]
        return [*command(), kind, *own, *words]

    def _start(self) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        out, err = (os.open(self.errand.path(name), flags, 0o600) for name in ("stdout", "stderr"))
        try:
            self.child = subprocess.Popen(
                self._words(), stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=self.folder,
                env=self._environment(), close_fds=True,
            )  # fmt: skip
        except OSError as error:
            self.unstarted = 127 if isinstance(error, FileNotFoundError) else 126
            failed = Failed(f"hostpart cannot be executed here: {error.strerror}: {error.filename}", "mend that host")
            fd = os.open(self.errand.path("events"), flags, 0o600)
            os.write(fd, json.dumps({"event": "error", **failed.to_json()}).encode() + b"\n")
            os.close(fd)
            return
        finally:
            os.close(out)
            os.close(err)
        _write(self.errand.path("child.json"), _this(self.child.pid))


def main(argv: Sequence[str] | None = None) -> int:
    """Be an errand's process.

    :param argv: its directory, by default from the command line
    """
    (directory,) = sys.argv[1:] if argv is None else argv
    return _Shim(directory).run()


if __name__ == "__main__":
    sys.exit(main())
