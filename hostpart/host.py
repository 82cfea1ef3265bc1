"""The one opener of ``/sys``, ``/proc`` and cgroup files, of this machine or of a recorded one, and the one writer.

A recorded machine is a directory or a tarball with a ``sys`` folder (and ``proc``, where there is
one) in it. Nothing is extracted, and no name or link leads out of it. What the files mean is
:mod:`hostpart.topology`'s and others' to say.
"""

from __future__ import annotations

import errno
import io
import os
import stat

from workers import crash

from .cpuset import CpuSet
from .errors import NotPermitted, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from tarfile import TarFile

__all__ = ["Host"]

_MAX_LINKS = 40  # as the kernel's path walk
_MAX_FILE = 1 << 20  # bytes; no file of /sys or /proc that is read here comes near
_MAX_STREAM = 512 << 20  # bytes of a tarball, unpacked: 4,096 CPUs with every file of theirs take about 320 MiB
_MAX_KEPT = 64 << 20  # bytes of files that are held in memory
_MAX_MEMBERS = 500_000
_NAME_ONE = "name '/', or a directory or tarball (.tar.bz2, .tar.gz, .tar.xz) with a 'sys' folder in it"


class Host:
    """The files of one machine, by path relative to its root (``"sys/devices/system/cpu/online"``).

    :param root: ``"/"`` is the live machine; any other directory is a recorded tree, whose
        absolute links are relative to that root and whose links never lead out of it
    :ivar rehearses: whether writes are listed and not made (:class:`hostpart.rehearsal.Rehearsal`)
    """

    def __init__(self, root: str = "/") -> None:
        self.root = root
        self.live = root == "/"
        self.rehearses = False
        self._folders: dict[str, str] = {}
        self._cpus = CpuSet()  # as last given to a task, and its members
        self._members: tuple[int, ...] = ()

    @staticmethod
    def open(path: str) -> Host:
        """Return the machine at *path*: ``/``, a directory, or a tarball, which is read into memory once.

        The folder that holds ``sys`` may lie one or two levels below *path*.

        :raises UsageError: where there is none, more than one, or no tarball
        :raises NotPermitted: where *path* cannot be read
        """
        try:
            status = os.stat(path)
            if stat.S_ISDIR(status.st_mode):
                root = os.stat("/")
                if (status.st_dev, status.st_ino) == (root.st_dev, root.st_ino):
                    return Host()
                tree = Host(path)
                top = _top(path, tree)
                return Host(os.path.join(path, top)) if top else tree
            if stat.S_ISREG(status.st_mode):
                return _Archive(path)
        except PermissionError as error:
            raise NotPermitted(f"{path} cannot be read: {error.strerror}", "run as a user who may read it") from error
        except (OSError, ValueError) as error:  # ValueError: a null byte in the path
            reason = error.strerror if isinstance(error, OSError) else str(error)
            raise UsageError(f"{path!r} cannot be read: {reason}", _NAME_ONE) from error
        raise UsageError(f"{path} is neither a directory nor a file", _NAME_ONE)

    def path(self, name: str) -> str:
        """Return the path of *name* for :func:`open`, with a recorded tree's links followed inside it.

        :raises OSError: ``ELOOP`` for links of a recorded tree that lead nowhere
        """
        if self.live:
            return "/" + name
        return os.path.join(self.root, self._inside(name))

    def read_bytes(self, name: str) -> bytes:
        """Return the file's content.

        :raises OSError: as :func:`open` does; ``EFBIG`` for a recorded file over 1 MiB
        """
        # Bare descriptors: an io object costs as much again as the system calls, and topology
        # reads some hundred files on the way of `hostpart run`.
        file = os.open(self.path(name), os.O_RDONLY | os.O_CLOEXEC | (0 if self.live else os.O_NONBLOCK))
        try:
            if not self.live:
                status = os.fstat(file)
                if not stat.S_ISREG(status.st_mode):  # a pipe of a recorded tree must not stop the reader
                    raise OSError(errno.EISDIR if stat.S_ISDIR(status.st_mode) else errno.EINVAL, "not a file", name)
                if status.st_size > _MAX_FILE:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), name)
            # /proc gives a page or less at a time: only an empty read is the end.
            chunk = content = os.read(file, 1 << 16)
            while chunk:
                chunk = os.read(file, 1 << 16)
                content += chunk
            return content
        finally:
            os.close(file)

    def read_text(self, name: str) -> str:
        """Return the file's content; bytes that are not UTF-8 are kept as surrogates.

        :raises OSError: as :meth:`read_bytes` does
        """
        return self.read_bytes(name).decode("utf-8", "surrogateescape")

    def listdir(self, name: str) -> list[str]:
        """Return the directory's entries, sorted.

        :raises OSError: as :func:`os.listdir` does
        """
        return sorted(os.listdir(self.path(name)))

    def exists(self, name: str) -> bool:
        """Whether *name* is there (a dangling link is not)."""
        try:
            return os.path.exists(self.path(name))
        except OSError:
            return False

    def affinity(self, pid: int = 0) -> CpuSet:
        """Return the CPUs, by Linux's number, that thread *pid* of the live machine may run on; 0 is this one.

        :raises OSError: as :func:`os.sched_getaffinity` does; ``ENOSYS`` for a recorded machine
        """
        if not self.live:
            raise OSError(errno.ENOSYS, "a recorded machine runs nothing", self.root)
        return CpuSet.of(os.sched_getaffinity(pid))

    # -- writing ---------------------------------------------------------------------------------------
    #
    # Every change of the host goes through these few, so that a rehearsal can list them and a test can die before
    # and after each: at points "write.before" and "write.after", and at the same with the kind of the write.

    def write_text(self, name: str, text: str) -> None:
        """Write *text* to the file *name*, in one write, as the kernel's own files want it.

        :raises OSError: as the kernel says; ``EROFS`` for a recorded machine
        """
        if not self.live:
            raise OSError(errno.EROFS, "a recorded machine cannot be changed", self.path(name))
        kind = name.rpartition("/")[2]
        self._point("before", kind)
        fd = os.open(self.path(name), os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, text.encode("ascii"))
        except OSError as error:
            error.filename = self.path(name)
            raise
        finally:
            os.close(fd)
        self._point("after", kind)

    def mkdir(self, name: str) -> None:
        """Make the directory *name*.

        :raises OSError: as :func:`os.mkdir` does
        """
        self._point("before", "mkdir")
        os.mkdir(self.path(name))
        self._point("after", "mkdir")

    def rmdir(self, name: str) -> None:
        """Remove the directory *name*.

        :raises OSError: as :func:`os.rmdir` does
        """
        self._point("before", "rmdir")
        os.rmdir(self.path(name))
        self._point("after", "rmdir")

    def set_affinity(self, tid: int, cpus: CpuSet) -> None:
        """Let thread *tid* run on *cpus* (Linux numbers).

        :raises OSError: as :func:`os.sched_setaffinity` does
        """
        if cpus is not self._cpus:
            self._cpus, self._members = cpus, tuple(cpus)  # one mask after the other is the same, for thousands
        self._point("before", "affinity")
        os.sched_setaffinity(tid, self._members)
        self._point("after", "affinity")

    def signal(self, pid: int, number: int) -> None:
        """Send a signal to process *pid*.

        :raises OSError: as :func:`os.kill` does
        """
        self._point("before", "signal")
        os.kill(pid, number)
        self._point("after", "signal")

    @staticmethod
    def _point(when: str, kind: str) -> None:
        crash.point(f"write.{when}")
        crash.point(f"write.{kind}.{when}")

    # A recorded tree's name with its links followed. Folders are remembered: thousands of CPUs
    # have their files in few of them, and each part of a path costs a system call.
    def _inside(self, name: str) -> str:
        folder, _, leaf = name.rpartition("/")
        if folder not in self._folders:
            self._folders[folder] = _follow(folder, self._readlink)
        if leaf in ("", ".", ".."):
            return _follow(name, self._readlink)
        whole = f"{self._folders[folder]}/{leaf}".lstrip("/")
        return whole if self._readlink(whole) is None else _follow(whole, self._readlink)

    def _readlink(self, name: str) -> str | None:
        try:
            return os.readlink(os.path.join(self.root, name))
        except OSError:  # no link, or not there at all: whoever opens it learns which
            return None

    def _is_folder(self, name: str) -> bool:
        try:
            return stat.S_ISDIR(os.lstat(os.path.join(self.root, name)).st_mode)
        except OSError:
            return False


class _Archive(Host):
    """A recorded machine in a tarball.

    Only plain files, folders and links count: members whose names lead out of the tree, devices,
    sparse files and files over 1 MiB are passed over, as if they had not been recorded.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.live = False
        self._files: dict[str, bytes] = {}
        self._links: dict[str, str] = {}
        self._entries: dict[str, dict[str, None]] = {"": {}}  # a folder's names, in order, once each
        self._base = ""
        self._load()
        self._base = _top(root, self)
        self._folders = {}  # what was followed so far was relative to the tarball, not to the tree's top

    def path(self, name: str) -> str:
        return f"{self.root}:{self._name(name)}"

    def read_bytes(self, name: str) -> bytes:
        whole = self._name(name)
        if whole not in self._files:
            raise _error(errno.EISDIR if whole in self._entries else errno.ENOENT, self.path(name))
        return self._files[whole]

    def listdir(self, name: str) -> list[str]:
        whole = self._name(name)
        if whole not in self._entries:
            raise _error(errno.ENOTDIR if whole in self._files else errno.ENOENT, self.path(name))
        return sorted(self._entries[whole])

    def exists(self, name: str) -> bool:
        try:
            whole = self._name(name)
        except OSError:
            return False
        return whole in self._files or whole in self._entries

    def _name(self, name: str) -> str:
        inside = self._inside(name)
        return f"{self._base}/{inside}".strip("/") if self._base else inside

    # Names are relative to the tree's top, as for a directory; the base is put before them here only.
    def _readlink(self, name: str) -> str | None:
        return self._links.get(f"{self._base}/{name}" if self._base else name)

    def _is_folder(self, name: str) -> bool:
        return name in self._entries

    def _load(self) -> None:
        import tarfile

        try:
            with (
                open(self.root, "rb") as packed,
                _unpacked(packed) as stream,
                tarfile.open(fileobj=_Bounded(stream), mode="r|") as archive,
            ):
                self._take(archive)
        except PermissionError:
            raise
        except Exception as error:  # tarfile and each unpacker raise errors of their own, and others on hostile bytes
            raise UsageError(f"{self.root} is not a tarball that can be read: {error}", _NAME_ONE) from error

    def _take(self, archive: TarFile) -> None:
        kept = 0
        for count, member in enumerate(archive):
            vars(archive)["members"] = []  # a stream is read once; tarfile would keep every header
            if count >= _MAX_MEMBERS:
                raise ValueError(f"it has more than {_MAX_MEMBERS:,} members")
            parts = [part for part in member.name.split("/") if part not in ("", ".")]
            if ".." in parts or not parts:
                continue
            name = "/".join(parts)
            if member.isdir():
                self._enter(parts)
                self._entries.setdefault(name, {})
            elif member.issym():
                self._enter(parts)
                self._files.pop(name, None)
                self._links[name] = member.linkname
            elif member.islnk():
                other = self._files.get("/".join(part for part in member.linkname.split("/") if part not in ("", ".")))
                if other is not None:
                    self._keep(parts, other)
            elif member.isreg() and not member.issparse() and member.size <= _MAX_FILE:
                file = archive.extractfile(member)
                content = file.read() if file else b""
                kept += len(content)
                if kept > _MAX_KEPT:
                    raise ValueError(f"its files are larger than {_MAX_KEPT >> 20} MiB together")
                self._keep(parts, content)

    def _keep(self, parts: list[str], content: bytes) -> None:
        self._enter(parts)
        self._links.pop("/".join(parts), None)  # of two members with one name the later counts
        self._files["/".join(parts)] = content

    # Names every part in the folder above it; a tarball need not list its folders.
    def _enter(self, parts: list[str]) -> None:
        for depth in range(len(parts), 0, -1):
            entries = self._entries.setdefault("/".join(parts[: depth - 1]), {})
            if parts[depth - 1] in entries:
                return
            entries[parts[depth - 1]] = None


class _Bounded(io.BufferedIOBase):
    """Reads a stream up to :data:`_MAX_STREAM` bytes, so that a few packed bytes cannot fill the memory."""

    def __init__(self, stream: io.BufferedIOBase) -> None:
        self._stream = stream
        self._left = _MAX_STREAM

    def read(self, size: int | None = -1, /) -> bytes:
        data = self._stream.read(size)
        self._left -= len(data)
        if self._left < 0:
            raise ValueError(f"it unpacks to more than {_MAX_STREAM >> 20} MiB")
        return data


def _unpacked(packed: io.BufferedReader) -> io.BufferedIOBase:
    magic = packed.read(6)
    packed.seek(0)
    if magic.startswith(b"BZh"):
        from bz2 import BZ2File

        return BZ2File(packed)
    if magic.startswith(b"\x1f\x8b"):
        from gzip import GzipFile

        return GzipFile(fileobj=packed)
    if magic.startswith(b"\xfd7zXZ\0"):
        from lzma import LZMAFile

        return LZMAFile(packed)
    return packed  # a plain tar, or none at all: tarfile says so


# The folder of a tree that holds "sys", relative to the tree: itself, or one or two levels below it.
def _top(path: str, tree: Host) -> str:
    level = [""]
    for _ in range(3):
        found = [folder for folder in level if tree._is_folder(f"{folder}/sys".lstrip("/"))]
        if len(found) > 1:
            names = ", ".join(found[:3])
            raise UsageError(f"{path} holds {len(found)} recorded machines ({names} …)", "name one of them")
        if found:
            return found[0]
        below = []
        for folder in level:
            try:
                names_here = tree.listdir(folder)
            except PermissionError:
                continue
            below += [one for name in names_here if tree._is_folder(one := f"{folder}/{name}".lstrip("/"))]
        level = below
    raise UsageError(f"{path} is not a recorded machine: there is no 'sys' folder in it", _NAME_ONE)


# *name* with every link followed as if the tree were the whole file system.
def _follow(name: str, readlink: Callable[[str], str | None]) -> str:
    todo = name.split("/")[::-1]
    done: list[str] = []
    links = 0
    while todo:
        part = todo.pop()
        if part in ("", "."):
            continue
        if part == "..":
            del done[-1:]
            continue
        done.append(part)
        target = readlink("/".join(done))
        if target is None:
            continue
        links += 1
        if links > _MAX_LINKS:
            raise _error(errno.ELOOP, name)
        done = [] if target.startswith("/") else done[:-1]
        todo += target.split("/")[::-1]
    return "/".join(done)


def _error(number: int, name: str) -> OSError:
    return OSError(number, os.strerror(number), name)
