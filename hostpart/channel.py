"""Messages between a front and its keepers: values of Python's own types, and descriptors.

Both ends are forks of one interpreter, so ``marshal`` is format enough, and costs no import. ``_socket`` is what
``socket`` wraps: the wrapper's enumerations cost as much time as a fork.
"""

from __future__ import annotations

import _socket
import errno
import marshal
import os
import struct

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["Channel"]

_MAX_FDS = 250  # SCM_MAX_FD is 253
_HEAD, _FD = struct.Struct("<I"), struct.Struct("i")


class Channel:
    """One end of a socket pair; reading never blocks, writing does.

    :ivar fds: descriptors that came and were not fetched yet
    :ivar ended: whether the other end is gone
    """

    def __init__(self, sock: _socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()
        self.fds: list[int] = []
        self.ended = False

    @classmethod
    def pair(cls) -> tuple[Channel, Channel]:
        """Return the two ends of a new channel."""
        one, other = _socket.socketpair(_socket.AF_UNIX, _socket.SOCK_STREAM | _socket.SOCK_CLOEXEC)
        return cls(one), cls(other)

    def fileno(self) -> int:
        """Return the descriptor, for poll(2)."""
        return self._socket.fileno()

    def send(self, message: dict[str, Any], fds: list[int] | None = None) -> bool:
        """Send one message and, with it, descriptors; whether the other end is still there."""
        body = marshal.dumps(message)
        data = _HEAD.pack(len(body)) + body
        rest = list(fds or ())
        try:
            while rest:
                some, rest = rest[:_MAX_FDS], rest[_MAX_FDS:]
                rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, struct.pack(f"{len(some)}i", *some))
                # A byte of its own for each load but the last keeps the loads apart; length 0 is skipped by the reader.
                if rest:
                    self._socket.sendmsg([_HEAD.pack(0)], [rights])
                else:
                    sent = self._socket.sendmsg([data], [rights])
                    data = data[sent:]
            self._socket.sendall(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                raise
            return False  # what the other end said before it went can still be read
        return True

    def receive(self) -> list[dict[str, Any]]:
        """Return all messages that have come by now, none if there is none."""
        size = _socket.CMSG_SPACE(_MAX_FDS * _FD.size)
        while not self.ended:
            try:
                data, rights, _, _ = self._socket.recvmsg(
                    1 << 16, size, _socket.MSG_DONTWAIT | _socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                break
            except ConnectionResetError:
                data, rights = b"", []
            for level, kind, payload in rights:
                if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
                    self.fds += struct.unpack_from(f"{len(payload) // _FD.size}i", payload)
            self.ended = not data
            self._buffer += data
        messages: list[dict[str, Any]] = []
        while len(self._buffer) >= _HEAD.size:
            (length,) = _HEAD.unpack_from(self._buffer)
            if len(self._buffer) < _HEAD.size + length:
                break
            body = bytes(self._buffer[_HEAD.size : _HEAD.size + length])
            del self._buffer[: _HEAD.size + length]
            if body:
                messages.append(marshal.loads(body))  # noqa: S302 - from our own fork
        return messages

    def close(self) -> None:
        """Close this end, and what descriptors came through it."""
        self._socket.close()
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()
