"""The lab's cache: where it is, how processes agree on who fills it, and how a file in it comes to be all at once.

What is in it can be removed at any time; it is made anew. Who makes what is left to the other modules.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

__all__ = ["CACHE", "LabError", "Unavailable", "digest", "filled", "locked"]

CACHE = Path(
    os.environ.get("HOSTPART_LAB_CACHE")
    or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "hostpart-lab"
)


class LabError(Exception):
    """The lab can't do what it was asked; the text says what is wrong and what would mend it."""


class Unavailable(LabError):
    """What the lab needs can't be had here."""


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold the cache's lock *name* against other processes."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def filled(path: Path) -> Iterator[Path]:
    """Give a new folder to fill, which becomes *path* at the end, or is removed if that is not reached."""
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".new-", dir=path.parent))
    try:
        yield folder
        folder.rename(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def digest(parts: Iterable[object]) -> str:
    """Return a name for what *parts* say, in their order."""
    found = hashlib.sha256()
    for part in parts:
        found.update(part if isinstance(part, bytes) else str(part).encode())
        found.update(b"\0")
    return found.hexdigest()[:16]
