"""Whose tasks the service VM may move: all of the host's, a user's, a tree's or a cgroup's.

It says who is covered and moves nobody: :mod:`hostpart.isolation.affinity` does.
"""

from __future__ import annotations

import errno
import os

from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from typing import Protocol

    from ..host import Host

    class Member(Protocol):
        """What is asked of a task: its process, that one's parent, and whose it is."""

        @property
        def tgid(self) -> int:
            """The process."""

        @property
        def ppid(self) -> int:
            """The process's parent."""

        @property
        def uid(self) -> int:
            """The real user id."""


__all__ = ["Scope", "below", "default_scope", "parse"]

_MOUNT = "sys/fs/cgroup"


class Scope(Value):
    """See the module; :func:`parse` makes one.

    :ivar kind: ``host``, ``user``, ``tree`` or ``cgroup``
    :ivar pid: the tree's topmost process; 0 for the other kinds
    :ivar path: the cgroup, absolute: as it is mounted, or below the mount; empty for the other kinds
    """

    kind: str
    pid: int = 0
    path: str = ""

    def __str__(self) -> str:
        return f"tree:{self.pid}" if self.pid else f"cgroup:{self.path}" if self.path else self.kind

    def covers(self, host: Host, tasks: Mapping[int, Member]) -> Callable[[Member], bool]:
        """Return what tells whether one of *tasks*, by thread id, is covered; what has to be read is read here, once.

        ``user`` goes by the real user id, which is the caller's. ``tree`` goes by parents: a process whose parents have
        ended, all up to the topmost, is covered no more. A cgroup that is not there covers nobody.
        """
        if self.kind == "host":
            return lambda _: True
        if self.kind == "user":
            uid = os.getuid()
            return lambda task: task.uid == uid
        if self.kind == "tree":
            is_below = below({self.pid}, tasks)
            return lambda task: is_below(task.tgid)
        pids = _inside(host, self.path)
        return lambda task: task.tgid in pids


def parse(text: str) -> Scope:
    """Read ``host``, ``user``, ``tree:PID`` or ``cgroup:/PATH``.

    :raises ValueError: naming the part that is wrong
    """
    kind, colon, what = text.partition(":")
    if kind in ("host", "user"):
        if colon:
            raise ValueError(f"want {kind!r} alone, got {text!r}")
        return Scope(kind)
    if kind == "tree":
        if not (what.isascii() and what.isdigit() and len(what) <= 10 and int(what)):
            raise ValueError(f"want a process id after 'tree:', got {what!r}")
        return Scope(kind, pid=int(what))
    if kind == "cgroup":
        if not what.startswith("/") or "\0" in what or ".." in what.split("/"):
            raise ValueError(f"want a path from '/' on, without '..', after 'cgroup:', got {what!r}")
        return Scope(kind, path=what)
    raise ValueError(f"want host, user, tree:PID or cgroup:/PATH, got {text!r}")


def default_scope() -> str:
    """Return whose tasks are moved where nobody says: ``$HOSTPART_SCOPE``; else ``host`` for root, else ``user``."""
    return os.environ.get("HOSTPART_SCOPE") or ("user" if os.geteuid() else "host")


def below(tops: set[int] | frozenset[int], tasks: Mapping[int, Member]) -> Callable[[int], bool]:
    """Return what tells whether a process is one of *tops* or descends from one, by the parents that *tasks* name."""
    known: dict[int, bool] = dict.fromkeys(tops, True) | {0: False}

    def is_below(pid: int) -> bool:
        way = []
        while pid not in known:
            way.append(pid)
            known[pid] = False  # ends the walk where numbers that were used again make a ring
            task = tasks.get(pid)
            pid = task.ppid if task is not None else 0
        found = known[pid]
        known.update(dict.fromkeys(way, found))
        return found

    return is_below


def _inside(host: Host, path: str) -> set[int]:
    top = path.strip("/")
    if f"{top}/".startswith(f"{_MOUNT}/"):
        tops = [top]
    else:
        # Of a hybrid layout the version 2 tree is one folder down, and version 1's are beside it.
        tops = [f"{_MOUNT}/{top}", *(f"{_MOUNT}/{name}/{top}" for name in ("unified", "cpuset", "systemd"))]
    pids: set[int] = set()
    for one in tops:
        if host.exists(f"{one}/cgroup.procs"):
            _collect(host, one.rstrip("/"), pids)
            break
    return pids


def _collect(host: Host, folder: str, pids: set[int]) -> None:
    try:
        try:
            text = host.read_text(f"{folder}/cgroup.procs")
        except OSError as error:
            if error.errno != errno.EOPNOTSUPP:
                raise
            text = ""  # a threaded cgroup: its processes are listed by the cgroup above it
        names = host.listdir(folder)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EACCES):
            raise
        return  # removed meanwhile, or not to be looked into
    pids.update(map(int, text.split()))
    for name in names:
        if os.path.isdir(host.path(f"{folder}/{name}")):
            _collect(host, f"{folder}/{name}", pids)
