"""Whose turn it is: one process at a time changes the host, and who looks at it meanwhile waits for another look.

While one brings masks and cgroups from one state to the next they are neither, which says nothing about who is to
blame. What is changed is :mod:`hostpart.isolation.reconcile`'s.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time

from ..errors import Failed

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["Busy", "quietly", "take"]


class Busy(Failed):
    """Another process brings the host somewhere at this moment."""


def take(directory: str, wait_s: float) -> int:
    """Return a descriptor that holds the turn until it is closed, which the kernel does with its holder's end.

    :param directory: the runtime directory
    :param wait_s: how long to wait for others
    :raises Busy: where they do not finish
    """
    path = _path(directory)
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    until, nap = time.monotonic() + wait_s, 0.001
    while not _locked(fd, fcntl.LOCK_EX):
        if time.monotonic() >= until:
            os.close(fd)
            raise Busy(
                f"another hostpart process has been changing host settings for {wait_s:g} s ({path} is locked)",
                f"find it with 'fuser {path}', and run it again",
            )
        time.sleep(nap)
        nap = min(2 * nap, 0.05)
    return fd


def quietly(directory: str, look: Callable[[], None]) -> None:
    """Call *look*, which is to be short, while nobody changes the host; where somebody does, leave it for next time."""
    try:
        fd = os.open(_path(directory), os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        look()  # nobody ever did
        return
    if not _locked(fd, fcntl.LOCK_SH):
        os.close(fd)
        return
    try:
        look()
    finally:
        os.close(fd)


def _path(directory: str) -> str:
    return f"{directory}/isolation.lock"


def _locked(fd: int, how: int) -> bool:
    try:
        fcntl.flock(fd, how | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EAGAIN, errno.EINTR):
            os.close(fd)
            raise
        return False
    return True
