"""The files of a cgroup tree, of either version: read where they are there, and written, or refused in words.

What the values mean, and which to write, is :mod:`hostpart.isolation.partition`'s and
:mod:`hostpart.isolation.cpuset1`'s to say. Names are relative to the host's root.
"""

from __future__ import annotations

import errno
import os
import signal
import time

from ..cpuset import CpuSet
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from ..host import Host

__all__ = [
    "Mount",
    "Obstacle",
    "Refused",
    "below",
    "children",
    "cpus",
    "kill",
    "make",
    "masks",
    "mounts",
    "ours",
    "read",
    "remove",
    "set_masks",
    "until",
    "words",
    "write",
]

# What the kernel answers where a cgroup can't be had or a value is not for it; anything else is a fault.
_REFUSED = frozenset(
    {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOENT,
        errno.ENODEV,
        errno.EBUSY,
        errno.EEXIST,
        errno.EINVAL,
        errno.EOPNOTSUPP,
        errno.ENOTEMPTY,
        errno.ESRCH,
        errno.EAGAIN,  # cgroup.max.depth or cgroup.max.descendants is reached
        errno.ENOMEM,
        errno.ENOSPC,
    }
)


class Obstacle(Value):
    """Why pCPUs can't be kept from the host in this way.

    :ivar problem: what is in the way, a sentence
    :ivar remedy: the command or the edit that takes it away
    """

    problem: str
    remedy: str


class Refused(Exception):
    """The kernel did not take a change; a sentence that says which and why.

    :ivar number: its errno, or 0
    """

    def __init__(self, problem: str, number: int = 0) -> None:
        super().__init__(problem)
        self.number = number


class Mount(Value):
    """Where a cgroup tree is mounted.

    :ivar kind: ``cgroup2`` or ``cgroup`` (version 1)
    :ivar options: of the tree: with version 1 its controllers
    """

    directory: str
    kind: str
    readonly: bool
    options: tuple[str, ...]


def mounts(host: Host) -> list[Mount]:
    """Return the cgroup trees that are mounted, version 2 and version 1, in the order of their mounting.

    Source: proc_pid_mountinfo(5).
    """
    found = []
    for line in read(host, "proc/self/mountinfo").splitlines():
        before, _, after = line.partition(" - ")
        fields, (kind, _, options) = before.split(" "), after.split(" ", 2)
        if kind in ("cgroup", "cgroup2"):
            directory = fields[4].strip("/").replace("\\040", " ")
            found.append(Mount(directory, kind, "ro" in fields[5].split(","), tuple(options.split(","))))
    return found


def read(host: Host, name: str) -> str:
    """Return the file's content; nothing where it is not there, as where a controller is not handed down."""
    try:
        return host.read_text(name)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENODEV, errno.EACCES, errno.EPERM):
            raise
        return ""


def words(host: Host, name: str) -> list[str]:
    """Return the file's words."""
    return read(host, name).split()


def cpus(host: Host, name: str) -> CpuSet:
    """Return the file's set of CPUs or nodes; the empty one where it is not there."""
    text = read(host, name).strip()
    # Without nohz_full= its file is not there, is empty, or says this, as the kernel's version has it.
    return CpuSet() if text == "(null)" else CpuSet.parse(text)


def children(host: Host, directory: str) -> list[str]:
    """Return the names of the cgroups in *directory*, sorted."""
    try:
        return [name for name in host.listdir(directory) if host.exists(f"{directory}/{name}/cgroup.procs")]
    except FileNotFoundError:
        return []


def below(host: Host, directory: str) -> list[str]:
    """Return every cgroup below *directory*, each after the one it is in."""
    found = [f"{directory}/{name}" for name in children(host, directory)]
    for one in found:
        found += [f"{one}/{name}" for name in children(host, one)]
    return found


def masks(host: Host, files: list[str]) -> dict[int, CpuSet]:
    """Return the masks of the threads that these files list; one that ends meanwhile is left out."""
    found = {}
    for tid in (int(word) for name in files for word in words(host, name)):
        try:
            found[tid] = host.affinity(tid)
        except ProcessLookupError:
            continue
    return found


def set_masks(host: Host, found: Mapping[int, CpuSet]) -> None:
    """Give threads their masks back where they have others now, and where their cgroup still has such CPUs."""
    for tid, cpus in found.items():
        try:
            if host.affinity(tid) != cpus:
                host.set_affinity(tid, cpus)
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EINVAL, errno.EPERM):
                raise


def ours(host: Host, *names: str) -> bool:
    """Whether this process may write to all of these files and directories."""
    return all(os.access(host.path(name), os.W_OK, effective_ids=True) for name in names)


def write(host: Host, name: str, text: str) -> None:
    """Write *text* to the file.

    :raises Refused: where the kernel does not take it
    :raises OSError: what it is not known to answer here
    """
    _do(lambda: host.write_text(name, text), f"/{name} takes no {text!r}")


def make(host: Host, directory: str) -> None:
    """Make the cgroup, where it is not there.

    :raises Refused: where it can't be
    """
    parent, _, name = directory.rpartition("/")
    if name not in host.listdir(parent):
        _do(lambda: host.mkdir(directory), f"the cgroup /{directory} can't be made")


def remove(host: Host, directory: str) -> None:
    """Remove the cgroup with those in it, as a guest may have made some.

    :raises Refused: where something still runs in one
    """
    for one in (*reversed(below(host, directory)), directory):
        _do(lambda one=one: host.rmdir(one), f"the cgroup /{one} can't be removed")  # type: ignore[misc]


def kill(host: Host, directory: str, name: str) -> bool:
    """Send SIGKILL to all that the files *name* of the cgroup and those in it list: processes, or a process by any of
    its threads.

    :return: whether there was none
    """
    found = {int(word) for one in (directory, *below(host, directory)) for word in words(host, f"{one}/{name}")}
    for number in found:
        try:
            host.signal(number, signal.SIGKILL)
        except ProcessLookupError:
            continue
    return not found


def until(done: Callable[[], bool], patience_s: float) -> bool:
    """Wait for *done* and return whether it came, in *patience_s* seconds."""
    begin, nap = time.monotonic(), 0.0005
    while not done():
        if time.monotonic() - begin >= patience_s:
            return False
        time.sleep(nap)
        nap = min(2 * nap, 0.02)
    return True


def _do(change: Callable[[], None], problem: str) -> None:
    try:
        change()
    except OSError as error:
        if error.errno not in _REFUSED:
            raise
        raise Refused(f"{problem}: {error.strerror}", error.errno or 0) from error
