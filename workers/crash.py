"""Named points at which a process can be made to die, so that tests can kill each one at each phase.

``HOSTPART_DIE_AT`` holds names, with commas between them; whoever passes a point of such a name gets SIGKILL from
itself there: ``NAME`` the first time, ``NAME@7`` the seventh. ``NAME@7=parent`` kills its parent instead (the front,
where a keeper passes it), ``NAME@7=both`` the parent and then itself. ``HOSTPART_POINTS`` names a file that gets a line
for each point that is passed. Without either a point costs two looks, into an empty dictionary and at an empty text.
"""

from __future__ import annotations

import os
import signal

__all__ = ["arm", "point", "record"]

_LEFT: dict[str, int] = {}
_WHOM: dict[str, str] = {}
_LOG = [""]


def arm(text: str) -> None:
    """Name the points at which this process and its children kill, as ``HOSTPART_DIE_AT`` does; an empty text: none."""
    _LEFT.clear()
    _WHOM.clear()
    for one in filter(None, text.split(",")):
        named, _, whom = one.partition("=")
        name, _, count = named.partition("@")
        _LEFT[name] = int(count or 1)
        _WHOM[name] = whom


def record(path: str) -> None:
    """Have this process and its children append each point that they pass to the file *path*; empty: to none."""
    _LOG[0] = path


def point(name: str) -> None:
    """Die here, if this point was named and this is the time for it."""
    if _LOG[0]:
        with open(_LOG[0], "a", encoding="utf-8") as file:
            file.write(f"{name}\n")
    if name in _LEFT:
        _LEFT[name] -= 1
        if not _LEFT[name]:
            if _WHOM[name]:
                os.kill(os.getppid(), signal.SIGKILL)
            if _WHOM[name] != "parent":
                os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("HOSTPART_DIE_AT", ""))
record(os.environ.get("HOSTPART_POINTS", ""))
