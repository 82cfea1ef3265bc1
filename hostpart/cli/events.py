"""What ``--events`` and ``--hold`` are for the commands that have them: a file that is told, and a word that is waited
for.

Imported only where one of the two is asked for: ``hostpart run`` does without ``json`` otherwise.
"""

from __future__ import annotations

import json
import os
import select
import stat

from ..errors import Failed, UsageError
from ..front import say

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

__all__ = ["Events", "Gate"]

_WORD = 4096  # bytes of a line that is read from a gate


class Events:
    """A file to which each event is appended as a line of JSON, in one write.

    :raises UsageError: where it cannot be written
    """

    def __init__(self, path: str) -> None:
        self._path, self._cut, self._told = path, False, False
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UsageError(
                f"events cannot be written to {path!r}: {error.strerror}",
                "name a file in a directory that is there and writable",
            ) from None

    def tell(self, event: Mapping[str, Any]) -> None:
        """Append *event*. Where that fails it is said once: what is measured or run counts more."""
        line = json.dumps(event, separators=(",", ":")).encode() + b"\n"
        if self._cut:
            line = b"\n" + line  # the rest of one that was cut short must not spoil this one
        try:
            self._cut = os.write(self._fd, line) < len(line)
            problem = "no room is left" if self._cut else ""
        except OSError as error:
            problem = str(error.strerror)
        if problem and not self._told:
            self._told = True
            say(f"events cannot be written to {self._path!r}: {problem}\ntry: make room there: see 'df'")


class Gate:
    """A FIFO that a VM is held at until it says ``start``.

    :raises UsageError: where it is none, or cannot be read
    """

    def __init__(self, path: str) -> None:
        self._path, self._said = path, b""
        try:
            self.fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise UsageError(f"--hold {path}: {error.strerror}", f"make it first: 'mkfifo {path}'") from None
        if not stat.S_ISFIFO(os.fstat(self.fd).st_mode):
            self.close()
            raise UsageError(f"--hold {path}: it is no FIFO", "name another, made by 'mkfifo'")
        self._poll = select.poll()
        self._poll.register(self.fd, select.POLLIN)

    def given(self) -> bool:
        """Whether the word has come.

        :raises Failed: where another came, or nobody is left who could give it
        """
        # Before a first writer has come a read says "end of file" too; the kernel tells the two apart in poll(2) only
        # (fs/pipe.c, pipe_poll(): POLLHUP not before a writer has been there).
        hung_up = any(what & select.POLLHUP for _, what in self._poll.poll(0))
        try:
            part = os.read(self.fd, _WORD)
        except BlockingIOError:
            return False
        self._said += part
        word, end, _ = self._said.partition(b"\n")
        if end and word == b"start":
            return True
        if end or len(self._said) >= _WORD:
            said = "stop" if word == b"stop" else repr(word[:40].decode(errors="replace"))
            raise Failed(f"{self._path} said {said}: the guest has not run, and all is given back", "run it again")
        if not part and hung_up:
            raise Failed(
                f"{self._path} was closed without a word: the guest has not run, and all is given back", "run it again"
            )
        return False

    def close(self) -> None:
        """Let go of it."""
        os.close(self.fd)
