"""One leaf of the cgroup v2 tree per VM, where this process may make one.

Nothing leaves a cgroup by forking, so the leaf freezes and kills a guest whole, in one write and
without a race. It has no controller enabled: it limits and accounts nothing but CPU time, and the
rule against processes in inner cgroups does not concern it. What keeps it from being the only means:
a guest of the same user may write itself back into the cgroup above. Whoever ends a VM looks at the
tree too (:mod:`hostpart.tree`).

It uses the cgroup v2 tree of a unified or a hybrid layout; version 1 hierarchies are not touched.
When to do what is left to the caller, and so is telling people why there is no leaf.

Source: Documentation/admin-guide/cgroup-v2.rst, "Core Interface Files" and "Delegation".
"""

from __future__ import annotations

import errno
import os
import time

from .host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Leaf", "own_cgroup"]

_PREFIX = "hostpart-"
_LETTERS = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-")

# What the kernel answers where a cgroup is not ours to make, to write or to fill, or is not there any more.
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENODEV,
        errno.EBUSY,
        errno.EEXIST,
        errno.EOPNOTSUPP,
        errno.EINVAL,
        errno.EAGAIN,  # cgroup.max.depth or cgroup.max.descendants is reached
        errno.ENOMEM,
        errno.ENOSPC,
        errno.ENAMETOOLONG,
    }
)


def own_cgroup(host: Host) -> tuple[str | None, str]:
    """Return the directory of this process's cgroup v2, and "", or ``None`` and the reason.

    The path is made from where the tree is mounted and which part of it the mount shows: in a container
    that is not the same as what ``/proc/self/cgroup`` says.

    Source: cgroups(7), "/proc/[pid]/cgroup"; proc_pid_mountinfo(5).
    """
    try:
        membership, mounts = host.read_text("proc/self/cgroup"), host.read_text("proc/self/mountinfo")
    except OSError as error:
        return None, f"which cgroup this is can't be read: {error.strerror}"
    own = next((line[3:] for line in membership.splitlines() if line.startswith("0::")), None)
    if own is None:
        return None, "the kernel has no cgroup v2"
    if own.endswith(" (deleted)"):
        return None, "this process's cgroup was removed"
    for line in mounts.splitlines():
        before, _, after = line.partition(" - ")
        if after.split(" ", 1)[0] != "cgroup2":
            continue
        shown, mounted = (_unescape(field) for field in before.split(" ")[3:5])
        shown = shown.rstrip("/")
        if own == shown or own.startswith(f"{shown}/"):
            return (mounted.rstrip("/") + own.removeprefix(shown)).rstrip("/") or "/", ""
    return None, f"no mount shows this process's cgroup {own}"


class Leaf:
    """The cgroup of one VM, made by :meth:`create`.

    :ivar path: its directory
    """

    def __init__(self, path: str) -> None:
        self.path = path

    @classmethod
    def create(cls, token: str, host: Host | None = None) -> tuple[Leaf | None, str]:
        """Find the place and :meth:`make` the cgroup: return it and "", or ``None`` and the reason."""
        leaf, reason = cls.find(token, host)
        if leaf is not None:
            reason = leaf.make()
        return (leaf, "") if leaf is not None and not reason else (None, reason)

    @classmethod
    def find(cls, token: str, host: Host | None = None) -> tuple[Leaf | None, str]:
        """Return ``hostpart-TOKEN`` below this process's own cgroup and "", or ``None`` and the reason; none is made.

        So its path can be noted before it is there, for whoever cleans up after a kill.

        :param token: letters, digits, ``.``, ``_`` and ``-``; unique on this host
        :raises ValueError: for another token
        """
        if not token or not _LETTERS.issuperset(token):
            raise ValueError(f"{token!r} can't be part of a cgroup's name")
        host = host or Host()
        own, reason = own_cgroup(host)
        if own is None:
            return None, reason
        own = host.path(own.lstrip("/"))
        # To move a process one must be allowed to write to the nearest cgroup above both places: that is our own.
        if not os.access(f"{own}/cgroup.procs", os.W_OK, effective_ids=True):
            return None, f"cgroup {own} is not delegated to this user"
        return cls(os.path.join(own, _PREFIX + token)), ""

    def make(self) -> str:
        """Make the directory; return "" or why it can't be, and nothing is left then."""
        own = os.path.dirname(self.path)
        try:
            os.mkdir(self.path)
        except OSError as error:
            return _said(error, f"no cgroup can be made in {own}")
        try:
            kind = self._read("cgroup.type").strip()
            reason = "" if kind == "domain" else f"a cgroup in {own} would be {kind!r} and hold no processes"
        except OSError as error:
            reason = _said(error, f"{self.path} is not usable")
        if reason:
            self.remove(0)
        return reason

    @property
    def procs_path(self) -> str:
        """The file that a process enters by: a child writes ``0`` after the fork."""
        return f"{self.path}/cgroup.procs"

    def enter(self, pid: int) -> str:
        """Move process *pid* (0: the caller) with all its threads here; return "" or why it could not be.

        What it forked before stays where it is.
        """
        return self._write("cgroup.procs", str(pid))

    def freeze(self, patience_s: float = 1.0) -> bool:
        """Stop every task in the leaf and below; return whether the kernel says, in time, that all are.

        Where it does not, the order stands, and whatever is inside the kernel stops on its way out.
        """
        return not self._write("cgroup.freeze", "1") and self._until(lambda: self._event("frozen") == 1, patience_s)

    def thaw(self) -> bool:
        """Let the tasks run again; return whether the kernel took the order."""
        return not self._write("cgroup.freeze", "0")

    def kill(self) -> bool:
        """Send SIGKILL to every task in the leaf and below, forks under way included; frozen ones die too.

        They have ended when :meth:`populated` says so. False where the kernel can't: it has ``cgroup.kill`` from
        Linux 5.14 on.
        """
        return not self._write("cgroup.kill", "1")

    def populated(self) -> bool | None:
        """Whether a living process is in the leaf or below (zombies don't count); ``None`` where the leaf is gone."""
        value = self._event("populated")
        return None if value is None else value == 1

    def procs(self) -> set[int]:
        """Return the pids in the leaf and in the cgroups made in it; those of threaded ones are left out."""
        found: set[int] = set()
        for directory in self._directories():
            try:
                with open(f"{directory}/cgroup.procs", encoding="ascii") as file:
                    found |= {int(line) for line in file}
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
        return found

    def cpu_usage_us(self) -> int | None:
        """Return the CPU time in microseconds of all that ever ran in the leaf and below.

        Every thread and every child counts, reaped or not. ``None`` where the kernel does not tell.
        """
        return self._value("cpu.stat", "usage_usec")

    def remove(self, patience_s: float = 1.0) -> bool:
        """Remove the leaf with the cgroups that the guest has made in it; return whether it is gone.

        :param patience_s: how long to go on while processes are still ending in it
        """
        return self._until(self._removed, patience_s)

    def _directories(self) -> list[str]:
        # Each after the one it is in. Not os.walk: before Python 3.12 it recurses, and a guest may nest deeper than
        # Python does.
        directories = [self.path]
        try:
            for directory in directories:
                with os.scandir(directory) as entries:
                    directories += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except FileNotFoundError:
            pass
        return directories

    def _removed(self) -> bool:
        for directory in reversed(self._directories()):
            try:
                os.rmdir(directory)
            except FileNotFoundError:
                continue
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                return False
        return True

    def _read(self, name: str) -> str:
        with open(f"{self.path}/{name}", "rb", buffering=0) as file:
            return file.read().decode()

    def _write(self, name: str, text: str) -> str:
        # "" or why not.
        try:
            fd = os.open(f"{self.path}/{name}", os.O_WRONLY)
            try:
                os.write(fd, text.encode("ascii"))
            finally:
                os.close(fd)
        except ProcessLookupError:
            return f"process {text} is gone"
        except OSError as error:
            return _said(error, f"{self.path}/{name} can't be written")
        return ""

    def _event(self, name: str) -> int | None:
        return self._value("cgroup.events", name)

    def _value(self, file: str, name: str) -> int | None:
        try:
            lines = self._read(file).splitlines()
        except OSError as error:
            if error.errno not in _REFUSED:
                raise
            return None
        return next((int(value) for key, _, value in (line.partition(" ") for line in lines) if key == name), None)

    def _until(self, done: Callable[[], bool], patience_s: float) -> bool:
        begin, nap = time.monotonic(), 0.0002
        while not done():
            if time.monotonic() - begin >= patience_s:
                return False
            time.sleep(nap)
            nap = min(2 * nap, 0.01)
        return True


def _said(error: OSError, what: str) -> str:
    # A refusal is an answer; anything else (EMFILE, EIO) is a fault that the caller must hear of.
    if error.errno not in _REFUSED:
        raise error
    return f"{what}: {error.strerror}"


def _unescape(field: str) -> str:
    # The kernel prints space, tab, newline and backslash as three octal digits.
    head, *rest = field.split("\\")
    return head + "".join(chr(int(part[:3], 8)) + part[3:] for part in rest)
