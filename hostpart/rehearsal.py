"""The live machine, with every write listed instead of made: what ``--dry-run`` runs on.

What was written is read back from memory, so the code that rehearses is the code that does. What the kernel would
change as a consequence (a cpuset's effective CPUs) it does not show; whoever verifies asks :attr:`Host.rehearses`.
"""

from __future__ import annotations

import errno
import os
import signal

from .host import Host

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .cpuset import CpuSet

__all__ = ["Rehearsal"]


class Rehearsal(Host):
    """The live machine; nothing on it is changed.

    :ivar writes: what would have been done, in order, each as a shell command that does the same
    """

    def __init__(self) -> None:
        super().__init__()
        self.rehearses = True
        self.writes: list[str] = []
        self._files: dict[str, str] = {}
        self._made: set[str] = set()
        self._removed: set[str] = set()

    def read_bytes(self, name: str) -> bytes:
        """Return what was written there, else the file's content."""
        if name in self._files:
            return self._files[name].encode()
        if self._below(name, self._made):
            return b"\n"  # a file of a directory that would be new
        if self._below(name, self._removed):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name))
        return super().read_bytes(name)

    def listdir(self, name: str) -> list[str]:
        """Return the entries that there would be."""
        there = set() if name in self._made else set(super().listdir(name))
        there |= {made.rpartition("/")[2] for made in self._made if made.rpartition("/")[0] == name}
        there -= {gone.rpartition("/")[2] for gone in self._removed if gone.rpartition("/")[0] == name}
        return sorted(there)

    def exists(self, name: str) -> bool:
        """Whether *name* would be there."""
        if name in self._made or name in self._files or self._below(name, self._made):
            return True
        return name not in self._removed and not self._below(name, self._removed) and super().exists(name)

    def write_text(self, name: str, text: str) -> None:
        """List the write."""
        self.writes.append(f"echo {text} > {self.path(name)}")
        self._files[name] = text

    def mkdir(self, name: str) -> None:
        """List the directory."""
        # In a directory that would be new every name counts as a file of the kernel's, but not as a directory.
        if name in self._made or (not self._below(name, self._made) and self.exists(name)):
            raise OSError(errno.EEXIST, os.strerror(errno.EEXIST), self.path(name))
        self.writes.append(f"mkdir {self.path(name)}")
        self._removed.discard(name)
        self._made.add(name)

    def rmdir(self, name: str) -> None:
        """List the removal."""
        if not self.exists(name):
            raise OSError(errno.ENOENT, os.strerror(errno.ENOENT), self.path(name))
        self.writes.append(f"rmdir {self.path(name)}")
        self._made.discard(name)
        self._removed.add(name)
        self._files = {file: text for file, text in self._files.items() if not file.startswith(f"{name}/")}

    def set_affinity(self, tid: int, cpus: CpuSet) -> None:
        """List the change of mask."""
        self.writes.append(f"taskset -pc {cpus} {tid}")

    def signal(self, pid: int, number: int) -> None:
        """List the signal."""
        self.writes.append(f"kill -{number} {pid}")
        if number in (signal.SIGSTOP, signal.SIGCONT):
            state = "T" if number == signal.SIGSTOP else "S"
            name = f"proc/{pid}/stat"
            before, _, after = self.read_text(name).rpartition(") ")
            self._files[name] = f"{before}) {state}{after[1:]}"

    @staticmethod
    def _below(name: str, folders: set[str]) -> bool:
        return any(name.startswith(f"{folder}/") for folder in folders)
