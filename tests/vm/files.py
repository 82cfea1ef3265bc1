"""The kernel's files as an operator reads and writes them, not through hostpart."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["TREE", "cpu_online", "get", "put"]

TREE = "/sys/fs/cgroup"


def get(name: str, top: str = TREE) -> str:
    """Return a file's content, or why there is none."""
    try:
        return Path(top, name).read_text().strip()
    except OSError as error:
        return f"({error.strerror})"


def put(name: str, text: str, top: str = TREE) -> None:
    """Write as an operator would, not through hostpart."""
    fd = os.open(f"{top}/{name}", os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def cpu_online(cpu: int, *, to: bool) -> None:
    """Take a CPU offline or online."""
    put(f"cpu{cpu}/online", str(int(to)), "/sys/devices/system/cpu")
