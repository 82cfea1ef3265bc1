"""Named points at which a process can be made to die, so that tests can kill each one at each phase.

``HOSTPART_DIE_AT`` holds names, with commas between them; whoever passes a point of such a name gets SIGKILL from
itself there: ``NAME`` the first time, ``NAME@7`` the seventh. Without the variable a point costs one look into an
empty dictionary.
"""

from __future__ import annotations

import os
import signal

__all__ = ["arm", "point"]

_LEFT: dict[str, int] = {}


def arm(text: str) -> None:
    """Name the points at which this process and its children die, as ``HOSTPART_DIE_AT`` does; an empty text: none."""
    _LEFT.clear()
    for one in filter(None, text.split(",")):
        name, _, count = one.partition("@")
        _LEFT[name] = int(count or 1)


def point(name: str) -> None:
    """Die here, if this point was named and this is the time for it."""
    if name in _LEFT:
        _LEFT[name] -= 1
        if not _LEFT[name]:
            os.kill(os.getpid(), signal.SIGKILL)


arm(os.environ.get("HOSTPART_DIE_AT", ""))
