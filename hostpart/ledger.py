"""What cannot be a lock: VMs and vCPUs by name, pid and start time, and their states, in SQLite.

One ledger per user, in a runtime directory that only that user can enter. It holds no truth about who may
use a pCPU (the leases do); it says what to look for when a hostpart process was killed. What host settings
were before hostpart touched them is here too, committed before the first write.
"""

from __future__ import annotations

# What sqlite3 wraps: the wrapper imports datetime and collections.abc for conversions that nothing here uses.
import _sqlite3 as sqlite3
import errno
import os
import stat

from workers import crash

from .cpuset import CpuSet
from .errors import HostpartError
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from types import TracebackType
    from typing import Any

__all__ = [
    "ATTACHED",
    "Holding",
    "Known",
    "Ledger",
    "LedgerUnusable",
    "NameTaken",
    "VcpuRow",
    "VmRow",
    "boot_id",
    "runtime_directory",
]

ATTACHED = "attached: pid "  # how the guest of a VM reads whose processes ran before

# A newer hostpart brings an older ledger up, a step at a time; user_version counts the steps taken.
_STEPS = (
    """
    CREATE TABLE vm (
        id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL, service INTEGER NOT NULL, token TEXT NOT NULL UNIQUE,
        boot_id TEXT NOT NULL, state TEXT NOT NULL, vcpu_num INTEGER NOT NULL, guest TEXT NOT NULL,
        keeper_pid INTEGER NOT NULL, keeper_start INTEGER NOT NULL, front_pid INTEGER NOT NULL, started REAL NOT NULL);
    CREATE UNIQUE INDEX vm_name ON vm (name) WHERE service = 0;
    CREATE TABLE vcpu (
        vm INTEGER NOT NULL REFERENCES vm (id) ON DELETE CASCADE, vcpu INTEGER NOT NULL, pcpu INTEGER NOT NULL,
        service INTEGER NOT NULL, pid INTEGER NOT NULL, start INTEGER NOT NULL, state TEXT NOT NULL,
        PRIMARY KEY (vm, vcpu));
    CREATE UNIQUE INDEX vcpu_pcpu ON vcpu (pcpu) WHERE service = 0;
    """,
    """
    ALTER TABLE vm ADD COLUMN idle TEXT NOT NULL DEFAULT '';
    ALTER TABLE vm ADD COLUMN leaf TEXT NOT NULL DEFAULT '';
    ALTER TABLE vm ADD COLUMN log TEXT NOT NULL DEFAULT '';
    CREATE TABLE baseline (setting TEXT PRIMARY KEY, boot_id TEXT NOT NULL, value TEXT NOT NULL, ours TEXT NOT NULL);
    """,
    """
    ALTER TABLE vm ADD COLUMN pcpus TEXT NOT NULL DEFAULT '';
    ALTER TABLE vm ADD COLUMN level TEXT NOT NULL DEFAULT 'affinity';
    ALTER TABLE vm ADD COLUMN scope TEXT NOT NULL DEFAULT '';
    ALTER TABLE vm ADD COLUMN mems TEXT NOT NULL DEFAULT '';
    ALTER TABLE vm ADD COLUMN cycle INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE vm ADD COLUMN threaded INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE vm ADD COLUMN sockets TEXT NOT NULL DEFAULT '';
    ALTER TABLE vcpu ADD COLUMN tid INTEGER NOT NULL DEFAULT 0;
    """,
)
_BUSY_MS = 5000
# Kinds of keys whose settings are tasks; as ranges, which the table's index finds without a look at each row.
_NO_TASKS = "WHERE setting < 'kthread:' OR (setting >= 'kthread;' AND setting < 'task:') OR setting >= 'task;'"


class LedgerUnusable(HostpartError):
    """The ledger or its directory cannot be used; nothing has changed.

    :param path: the file or the directory
    :param problem: what is wrong with it
    :param remedy: what mends it
    """

    def __init__(self, path: str, problem: str, remedy: str, exit_code: int = 1) -> None:
        super().__init__(path, problem, remedy, exit_code)
        self.path, self.problem, self.exit_code = path, problem, exit_code
        self._remedy = remedy

    def __str__(self) -> str:
        return f"{self.path} {self.problem}"

    @property
    def remedy(self) -> str:
        return self._remedy


class NameTaken(HostpartError):
    """A VM of that name is running (exit code 2)."""

    exit_code = 2

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name

    def __str__(self) -> str:
        return f"a VM named {self.name!r} is running already"

    @property
    def remedy(self) -> str:
        return f"give this one another name, or run 'hostpart stop {self.name}' first"


class VmRow(Value):
    """One VM as the ledger has it.

    :ivar token: in the environment of all its processes, as ``HOSTPART_RUN``
    :ivar keeper_start: the keeper's start time, clock ticks since boot
    :ivar started: seconds since the epoch
    :ivar idle: pCPUs leased to stay idle, in list form
    :ivar leaf: its cgroup's directory, or empty
    :ivar log: where its output goes, or empty
    :ivar pcpus: those that its vCPUs are placed on, in list form
    :ivar level: how far the host is to be kept off them and the idle ones (:data:`hostpart.isolation.LEVELS`)
    :ivar scope: whose tasks are moved for that
    :ivar mems: NUMA nodes that its memory is bound to, in list form; empty: not bound
    :ivar cycle: whether its pCPUs are taken offline and online once before it starts
    :ivar threaded: whether some of its vCPUs are threads of a process whose other threads stay with the host
    :ivar sockets: paths of the sockets that its machines listen at, a line each
    """

    id: int
    name: str
    service: int
    token: str
    boot_id: str
    state: str
    vcpu_num: int
    guest: str
    keeper_pid: int
    keeper_start: int
    front_pid: int
    started: float
    idle: str = ""
    leaf: str = ""
    log: str = ""
    pcpus: str = ""
    level: str = "affinity"
    scope: str = ""
    mems: str = ""
    cycle: int = 0
    threaded: int = 0
    sockets: str = ""


class Holding(Value):
    """What one user VM has taken from the host, as far as isolation is concerned; fields as in :class:`VmRow`."""

    token: str
    keeper_pid: int
    front_pid: int
    level: str
    scope: str
    pcpus: CpuSet
    idle: CpuSet
    mems: CpuSet
    cycle: bool
    threaded: bool = False

    @property
    def released(self) -> CpuSet:
        """All pCPUs (Linux numbers) that the host is to be kept off: the vCPUs' and the idle siblings."""
        return self.pcpus | self.idle


class Known(Value):
    """What the ledger remembers of one host setting.

    :ivar baseline: its value before hostpart first touched it
    :ivar ours: the values that hostpart's own hand may have left: what stood before its last write, and after it;
        none where it was recorded and never written
    """

    baseline: str
    ours: tuple[str, ...] = ()


class VcpuRow(Value):
    """One vCPU as the ledger has it; *pid* and *start* are 0 until its worker is forked.

    :ivar tid: the thread that it is, where it is one of its process's threads; 0: the process is the vCPU
    """

    vm: int
    vcpu: int
    pcpu: int
    service: int
    pid: int
    start: int
    state: str
    tid: int = 0


def boot_id() -> str:
    """Return the kernel's id of this boot."""
    with open("/proc/sys/kernel/random/boot_id", "rb", buffering=0) as file:
        return file.read().decode().strip()


def runtime_directory() -> str:
    """Return the caller's runtime directory, made if it was not there, owned and entered by the caller alone.

    ``$HOSTPART_RUNTIME_DIR``, for tests; ``/run/hostpart`` for root; else ``$XDG_RUNTIME_DIR/hostpart``,
    ``/run/user/UID/hostpart`` or ``/tmp/hostpart-UID``.

    :raises LedgerUnusable: where it is a link, another user's, open to others, or cannot be made
    """
    uid = os.geteuid()
    path = os.environ.get("HOSTPART_RUNTIME_DIR") or _home(uid)
    try:
        os.mkdir(path, 0o700)
    except FileExistsError:
        pass
    except OSError as error:
        raise _cannot_make(path, error) from None
    # A directory in /tmp may have been put there by somebody else: look at it, never follow it.
    found = os.lstat(path)
    if stat.S_ISLNK(found.st_mode):
        raise LedgerUnusable(
            path,
            "is a symbolic link, and is not followed",
            f"see who made it with 'ls -ld {path}', then 'rm {path}'",
            4,
        )
    if not stat.S_ISDIR(found.st_mode):
        raise LedgerUnusable(path, "is not a directory", f"move it away: 'mv {path} {path}.old'")
    if found.st_uid != uid:
        raise LedgerUnusable(
            path,
            f"belongs to uid {found.st_uid}, not to you (uid {uid})",
            "set XDG_RUNTIME_DIR to a directory of your own, or have it removed",
            4,
        )
    if found.st_mode & 0o077:
        raise LedgerUnusable(path, f"is open to others (mode {found.st_mode & 0o777:o})", f"chmod 700 {path}", 4)
    return path


def _home(uid: int) -> str:
    if uid == 0:
        return "/run/hostpart"
    own = os.environ.get("XDG_RUNTIME_DIR", "")
    for parent in (own, f"/run/user/{uid}"):
        try:
            if parent.startswith("/") and os.stat(parent).st_uid == uid:
                return f"{parent}/hostpart"
        except OSError:
            continue
    return f"/tmp/hostpart-{uid}"


def _cannot_make(path: str, error: OSError) -> LedgerUnusable:
    parent = os.path.dirname(path)
    return LedgerUnusable(
        path,
        f"cannot be made: {error.strerror}",
        f"see that {parent} is there and writable: 'ls -ld {parent}; df {parent}'",
    )


class Ledger:
    """The ledger of the calling user.

    Every method is one transaction. Use it as a context manager, or :meth:`close` it.

    :param directory: by default :func:`runtime_directory`
    :raises LedgerUnusable: where the file is damaged, newer than this hostpart, read-only or the disk is full
    """

    _of_this_boot = False  # whether that is known of all that is remembered; later rows can be of no other

    def __init__(self, directory: str | None = None) -> None:
        self.directory = directory or runtime_directory()
        self.path = f"{self.directory}/ledger.sqlite"
        with self._worded():
            self._db = sqlite3.connect(self.path, timeout=_BUSY_MS / 1000, isolation_level=None)
            # It lives in memory and is of one boot; what must survive is a process's death, not the machine's.
            self._db.execute("PRAGMA synchronous = OFF")
            self._db.execute("PRAGMA foreign_keys = ON")
            self._bring_up()

    def _bring_up(self) -> None:
        version = self._version()
        if version == len(_STEPS):
            return
        if version > len(_STEPS):
            raise LedgerUnusable(
                self.path,
                f"is of version {version}, made by a newer hostpart; this one knows {len(_STEPS)}",
                "use the newer hostpart, or end its VMs and remove the file",
            )
        self._db.execute("BEGIN IMMEDIATE")
        try:
            for number in range(self._version(), len(_STEPS)):  # again: another process may have done it meanwhile
                for statement in _STEPS[number].split(";"):
                    self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {len(_STEPS)}")
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def _version(self) -> int:
        return int(self._db.execute("PRAGMA user_version").fetchone()[0])

    def close(self) -> None:
        """Close the file; calling it twice does no harm."""
        self._db.close()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add_vm(self, row: VmRow) -> int:
        """Enter a VM and return its id (positive; *row.id* is not used).

        :raises NameTaken: where a user VM of that name is entered
        """
        fields = [name for name in VmRow._fields if name != "id"]
        sql = f"INSERT INTO vm ({', '.join(fields)}) VALUES ({', '.join('?' * len(fields))})"  # noqa: S608 - our own names
        with self._worded():
            try:
                return int(self._db.execute(sql, [getattr(row, name) for name in fields]).lastrowid or 0)
            except sqlite3.IntegrityError:
                raise NameTaken(row.name) from None

    def add_vcpu(self, row: VcpuRow) -> None:
        """Enter a vCPU.

        :raises LedgerUnusable: where the ledger already has a user vCPU on that pCPU (rule 1)
        """
        with self._worded():
            try:
                self._db.execute("INSERT INTO vcpu VALUES (?, ?, ?, ?, ?, ?, ?, ?)", row._key())
            except sqlite3.IntegrityError:
                raise LedgerUnusable(
                    self.path,
                    f"has a vCPU on pCPU {row.pcpu}, or vCPU {row.vcpu} of this VM, already",
                    "run 'hostpart restore'",
                ) from None

    def set_pid(self, vm: int, vcpu: int, pid: int, start: int) -> None:
        """Say which process a vCPU is, by pid and start time."""
        self._run("UPDATE vcpu SET pid = ?, start = ? WHERE vm = ? AND vcpu = ?", pid, start, vm, vcpu)

    def set_thread(self, vm: int, vcpu: int, tid: int) -> None:
        """Say which thread of its process a vCPU is."""
        self._run("UPDATE vcpu SET tid = ? WHERE vm = ? AND vcpu = ?", tid, vm, vcpu)

    def set_vcpu_state(self, vm: int, vcpu: int, state: str) -> None:
        """Say which state one vCPU is in."""
        self._run("UPDATE vcpu SET state = ? WHERE vm = ? AND vcpu = ?", state, vm, vcpu)

    def set_vm_state(self, vm: int, state: str) -> None:
        """Say which state a VM and all its vCPUs that have not ended are in."""
        with self._worded(), _Transaction(self._db):
            self._db.execute("UPDATE vm SET state = ? WHERE id = ?", (state, vm))
            self._db.execute(
                "UPDATE vcpu SET state = ? WHERE vm = ? AND state NOT IN ('ZOMBIE', 'OFFLINE')", (state, vm)
            )

    def remove_vcpu(self, vm: int, vcpu: int) -> None:
        """Strike out a vCPU."""
        self._run("DELETE FROM vcpu WHERE vm = ? AND vcpu = ?", vm, vcpu)

    def remove_vm(self, vm: int) -> None:
        """Strike out a VM and what vCPUs it has left: it is closed in order."""
        self._run("DELETE FROM vm WHERE id = ?", vm)

    def vms(self) -> list[VmRow]:
        """Return all VMs, oldest first."""
        sql = f"SELECT {', '.join(VmRow._fields)} FROM vm ORDER BY id"  # noqa: S608 - our own names
        with self._worded():
            return [VmRow(*row) for row in self._db.execute(sql)]

    def vcpus(self, vm: int) -> list[VcpuRow]:
        """Return a VM's vCPUs in order."""
        with self._worded():
            rows = self._db.execute(
                "SELECT vm, vcpu, pcpu, service, pid, start, state, tid FROM vcpu WHERE vm = ? ORDER BY vcpu", (vm,)
            )
            return [VcpuRow(*row) for row in rows]

    def bound(self) -> list[int]:
        """Return the pCPUs that user VMs' vCPUs are bound to."""
        with self._worded():
            return [pcpu for (pcpu,) in self._db.execute("SELECT pcpu FROM vcpu WHERE service = 0")]

    # -- isolation -------------------------------------------------------------------------------------

    def isolate(self, vm: int, level: str, scope: str = "", mems: str = "", *, cycle: bool = False) -> None:
        """Say how far the host is to be kept off a VM's pCPUs from now on; ``affinity`` ends it."""
        self._run(
            "UPDATE vm SET level = ?, scope = ?, mems = ?, cycle = ? WHERE id = ?", level, scope, mems, int(cycle), vm
        )

    def holdings(self) -> list[Holding]:
        """Return what user VMs of this boot hold above level ``affinity``, oldest first, dead keepers' included."""
        sql = (
            "SELECT token, keeper_pid, front_pid, level, scope, pcpus, idle, mems, cycle, threaded FROM vm"
            " WHERE service = 0 AND level != 'affinity' AND boot_id = ? ORDER BY id"
        )
        with self._worded():
            return [
                Holding(
                    token,
                    keeper,
                    front,
                    level,
                    scope,
                    CpuSet.parse(pcpus),
                    CpuSet.parse(idle),
                    CpuSet.parse(mems),
                    bool(cycle),
                    bool(threaded),
                )
                for (
                    token,
                    keeper,
                    front,
                    level,
                    scope,
                    pcpus,
                    idle,
                    mems,
                    cycle,
                    threaded,
                ) in self._db.execute(sql, (boot_id(),))
            ]

    def known(self, *, tasks: bool = True) -> dict[str, Known]:
        """Return what is remembered of host settings, by key; what was of another boot is forgotten.

        :param tasks: those of tasks too, of which there may be thousands
        """
        found: dict[str, Known] = {}
        alike: dict[tuple[str, str], Known] = {}  # thousands of tasks had the same, and are to share one value
        with self._worded():
            if not self._of_this_boot:
                self._db.execute("DELETE FROM baseline WHERE boot_id != ?", (boot_id(),))
                self._of_this_boot = True
            where = "" if tasks else _NO_TASKS
            rows = self._db.execute(f"SELECT setting, value, ours FROM baseline {where} ORDER BY rowid")  # noqa: S608 - our own words
            for key, value, ours in rows:
                known = alike.get((value, ours))
                if known is None:
                    known = alike[value, ours] = Known(value, tuple(ours.split("\n")) if ours else ())
                found[key] = known
        return found

    def remembers(self) -> bool:
        """Whether anything is remembered of host settings."""
        with self._worded():
            return self._db.execute("SELECT 1 FROM baseline LIMIT 1").fetchone() is not None

    def remember(self, known: Mapping[str, Known]) -> None:
        """Enter or replace settings, all in one transaction."""
        boot = boot_id()
        with self._worded(), _Transaction(self._db):
            crash.point("ledger.remember.before")
            self._db.executemany(
                "INSERT INTO baseline VALUES (?1, ?2, ?3, ?4)"
                " ON CONFLICT (setting) DO UPDATE SET boot_id = ?2, value = ?3, ours = ?4",
                [(key, boot, one.baseline, "\n".join(one.ours)) for key, one in known.items()],
            )
        crash.point("ledger.remember.after")

    def forget(self, keys: Iterable[str]) -> None:
        """Strike settings out, all in one transaction."""
        with self._worded(), _Transaction(self._db):
            crash.point("ledger.forget.before")
            self._db.executemany("DELETE FROM baseline WHERE setting = ?", [(key,) for key in keys])
        crash.point("ledger.forget.after")

    def copy(self) -> Ledger:
        """Return a copy in memory, for a rehearsal."""
        other = Ledger.__new__(Ledger)
        other.directory, other.path = self.directory, ":memory:"
        with self._worded():
            other._db = sqlite3.connect(":memory:", isolation_level=None)
            self._db.backup(other._db)
        return other

    def _run(self, sql: str, *values: Any) -> None:
        with self._worded():
            self._db.execute(sql, values)

    def _worded(self) -> _Worded:
        return _Worded(self)


class _Transaction:
    def __init__(self, db: sqlite3.Connection) -> None:
        self._db = db

    def __enter__(self) -> None:
        self._db.execute("BEGIN IMMEDIATE")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._db.execute("ROLLBACK" if kind else "COMMIT")


class _Worded:
    # SQLite's errors become sentences, in one place.
    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not isinstance(
            error, (sqlite3.Error, UnicodeDecodeError)
        ):  # the latter: a damaged file's message may quote it
            return
        if isinstance(error, sqlite3.ProgrammingError):
            return  # such as a closed ledger: a mistake of the caller's
        path, name = self._ledger.path, getattr(error, "sqlite_errorname", "")
        if name.startswith("SQLITE_READONLY_DBMOVED"):
            raise LedgerUnusable(
                path,
                "was removed or replaced while it was open",
                "leave it to hostpart; the next command makes a new one",
            ) from None
        if name.startswith("SQLITE_CANTOPEN"):
            # SQLite keeps the errno to itself; where it is the caller's limits, this open meets it too.
            try:
                os.close(os.open(self._ledger.directory, os.O_RDONLY))
            except OSError as limit:
                if limit.errno in (errno.EMFILE, errno.ENFILE):
                    raise limit from None
        if name.startswith(("SQLITE_CORRUPT", "SQLITE_NOTADB")) or (
            not name and isinstance(error, (sqlite3.DatabaseError, UnicodeDecodeError))
        ):
            raise LedgerUnusable(
                path,
                f"is damaged ({error})",
                f"move it away: 'mv {path} {path}.damaged'; VMs that run keep their leases and end as always",
            ) from None
        if name.startswith("SQLITE_FULL"):
            raise LedgerUnusable(
                path, "cannot grow: the disk is full", f"make room: 'df {self._ledger.directory}'"
            ) from None
        if name.startswith(("SQLITE_READONLY", "SQLITE_CANTOPEN", "SQLITE_IOERR", "SQLITE_PERM", "SQLITE_AUTH")):
            raise LedgerUnusable(
                path,
                f"cannot be written ({error})",
                f"see 'ls -l {path}; df {self._ledger.directory}'; it must be writable by you",
                4,
            ) from None
        if name.startswith(("SQLITE_BUSY", "SQLITE_LOCKED")):
            raise LedgerUnusable(
                path, f"was locked by another process for {_BUSY_MS // 1000} s", f"find it with 'fuser {path}'"
            ) from None
        raise LedgerUnusable(path, f"cannot be used ({error})", f"move it away: 'mv {path} {path}.damaged'") from None
