"""The control socket of one VM: how ``stop``, ``pause``, ``resume``, ``show`` and ``audit`` reach its keeper.

One request per connection: a line of JSON each way. Who asks is told by the kernel (``SO_PEERCRED``): the VM's owner
and root are heard, nobody else.
"""

from __future__ import annotations

import _socket
import errno
import os
import stat
import struct
import time

from .errors import Failed, HostpartError, NotPermitted, UnknownVm, UsageError
from .lease import Holder
from .ledger import runtime_directory

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["Request", "Server", "abandoned", "ask", "find", "names", "socket_path"]

_MAX_REQUEST = 4096
_LOOK_AGAIN_S = 1.0
_SUFFIX = ".sock"


def socket_path(directory: str, name: str) -> str:
    """Return where the control socket of the VM *name* is."""
    return f"{directory}/{name}{_SUFFIX}"


def names(directory: str) -> list[str]:
    """Return the names of the VMs that have a socket in *directory*, sorted."""
    return sorted(entry[: -len(_SUFFIX)] for entry in os.listdir(directory) if entry.endswith(_SUFFIX))


def abandoned(path: str) -> bool:
    """Whether there is a socket at *path* that nobody listens at.

    :raises OSError: where nothing is there, or it may not be asked
    """
    if not stat.S_ISSOCK(os.stat(path).st_mode):
        return False
    probe = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    try:
        probe.connect(path)
    except ConnectionRefusedError:
        return True
    finally:
        probe.close()
    return False


def find(name: str) -> str:
    """Return the runtime directory that has the VM *name*: the caller's own, or for root another user's.

    Other users' are looked for in ``/run/user`` and ``/tmp``, where they are by default.

    :raises UsageError: where several users have a VM of that name
    """
    own = runtime_directory()
    if os.geteuid() or name in names(own):
        return own
    there = {uid: folder for uid, folder in _of_others() if name in names(folder)}
    if len(there) > 1:
        raise UsageError(
            f"uids {', '.join(map(str, there))} each have a VM named {name!r}", "say whose: 'sudo -u USER hostpart ...'"
        )
    return next(iter(there.values()), own)


def _of_others() -> Iterator[tuple[int, str]]:
    for parent, prefix, suffix in (("/run/user", "", "/hostpart"), ("/tmp", "hostpart-", "")):
        for entry in os.listdir(parent) if os.path.isdir(parent) else ():
            uid, folder = entry.removeprefix(prefix), f"{parent}/{entry}{suffix}"
            if entry != f"{prefix}{uid}" or not (uid.isascii() and uid.isdecimal()):
                continue
            try:
                found = os.lstat(folder)  # /tmp is anybody's: what another user put there is not followed
            except OSError:
                continue
            if stat.S_ISDIR(found.st_mode) and found.st_uid == int(uid):
                yield int(uid), folder


class Server:
    """The keeper's end; it never blocks.

    :param directory: the runtime directory; a path of any length will do
    :raises OSError: where the socket cannot be made
    """

    def __init__(self, directory: str, name: str) -> None:
        self._path = socket_path(directory, name)
        self._socket = _socket.socket(
            _socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC | _socket.SOCK_NONBLOCK
        )
        # A VM of this name is in the ledger once, so what is here is a dead keeper's.
        try:
            os.unlink(self._path)
        except FileNotFoundError:
            pass
        folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            self._socket.bind(f"/proc/self/fd/{folder}/{name}{_SUFFIX}")  # a unix socket's path has 107 bytes at most
        finally:
            os.close(folder)
        os.chmod(self._path, stat.S_IRUSR | stat.S_IWUSR)
        self._inode = os.stat(self._path).st_ino
        self._socket.listen(16)

    def fileno(self) -> int:
        """Return the descriptor, for poll(2)."""
        return self._socket.fileno()

    def requests(self) -> list[Request]:
        """Accept what has come; whoever may not ask has been refused already."""
        found: list[Request] = []
        while True:
            try:
                fd, _ = self._socket._accept()  # type: ignore[attr-defined]
            except BlockingIOError:
                return found
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ECONNABORTED):
                    return found
                raise
            request = _read(_socket.socket(fileno=fd))
            if request is not None:
                found.append(request)

    def close(self) -> None:
        """Close the socket and remove it, if it is still this one."""
        self._socket.close()
        try:
            if os.stat(self._path).st_ino == self._inode:
                os.unlink(self._path)
        except FileNotFoundError:
            pass


class Request:
    """One request that waits for its answer.

    :ivar what: ``show``, ``pause``, ``resume`` or ``stop``
    """

    def __init__(self, connection: _socket.socket, message: dict[str, Any]) -> None:
        self._connection, self._message = connection, message
        self.what = str(message.get("do"))

    def number(self, key: str) -> float | None:
        """Return a number of the request, or None where it has none."""
        value = self._message.get(key)
        return float(value) if isinstance(value, (int, float)) and 0 <= value < 1e9 else None

    def reply(self, answer: dict[str, Any]) -> None:
        """Answer, and close; whoever asked may be gone."""
        import json

        try:
            # Bounded: a client that does not read must not hold the keeper.
            self._connection.settimeout(2.0)
            self._connection.sendall(json.dumps({"schema": 1, **answer}).encode() + b"\n")
        except OSError:
            pass
        finally:
            self._connection.close()

    def refuse(self, error: HostpartError) -> None:
        """Answer with an error."""
        self.reply({"error": error.to_json()})


def _read(connection: _socket.socket) -> Request | None:
    import json

    _, uid, _ = struct.unpack("3i", connection.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
    request = Request(connection, {})
    if uid not in (0, os.geteuid()):
        request.refuse(NotPermitted("this VM is another user's", "ask its owner, or root"))
        return None
    connection.settimeout(0.5)
    try:
        data = b""
        while not data.endswith(b"\n") and len(data) < _MAX_REQUEST:
            part = connection.recv(_MAX_REQUEST)
            if not part:
                break
            data += part
        message = json.loads(data)
    except (OSError, ValueError):
        message = None
    if not isinstance(message, dict):
        request.refuse(Failed("that is no request", "use the hostpart command"))
        return None
    return Request(connection, message)


def _answer(sock: _socket.socket, name: str, pid: int, until: float) -> bytes:
    # A stopped keeper answers nobody, however long the wait.
    data = b""
    while True:
        try:
            part = sock.recv(1 << 16)
        except TimeoutError:
            if Holder.of(pid).stopped:
                raise Failed(
                    f"the keeper of VM {name!r} (pid {pid}) is stopped and does not answer",
                    f"let it go on with 'kill -CONT {pid}'",
                ) from None
            if time.monotonic() >= until:
                raise
            continue
        if not part:
            return data
        data += part


def ask(directory: str, name: str, message: dict[str, Any], wait_s: float) -> dict[str, Any]:
    """Ask the keeper of the VM *name* and return its answer.

    :param wait_s: how long to wait for it
    :raises UnknownVm: where no such VM runs
    :raises HostpartError: what the keeper answered, or that it does not
    """
    import json

    if name not in names(directory):
        raise UnknownVm(name, names(directory))
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
    folder = os.open(directory, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        sock.settimeout(min(wait_s, _LOOK_AGAIN_S))
        sock.connect(f"/proc/self/fd/{folder}/{name}{_SUFFIX}")
        sock.sendall(json.dumps(message).encode() + b"\n")
        pid, _, _ = struct.unpack("3i", sock.getsockopt(_socket.SOL_SOCKET, _socket.SO_PEERCRED, 12))
        answer = json.loads(_answer(sock, name, pid, time.monotonic() + wait_s))
    except (FileNotFoundError, ConnectionRefusedError):
        raise UnknownVm(name, names(directory)) from None
    except PermissionError:
        raise NotPermitted(f"VM {name!r} is another user's", "ask its owner, or root") from None
    except TimeoutError:
        raise Failed(
            f"the keeper of VM {name!r} did not answer within {wait_s:g} s",
            "see 'uptime' and 'hostpart ps', and run it again",
        ) from None
    except (OSError, ValueError) as error:
        raise Failed(
            f"the keeper of VM {name!r} broke off ({error})", "run 'hostpart ps' to see whether it is still there"
        ) from None
    finally:
        sock.close()
        os.close(folder)
    if "error" in answer:
        said = answer["error"]
        refusal = NotPermitted if said["exit_code"] == 4 else Failed
        raise refusal(said["problem"], said["remedy"])
    return dict(answer)
