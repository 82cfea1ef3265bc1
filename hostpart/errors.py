"""What can go wrong that an operator can mend, with exit codes and remedies."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from .cpuset import CpuSet

__all__ = [
    "ConfigError",
    "DoesNotFit",
    "Failed",
    "HostpartError",
    "NotPermitted",
    "UnknownVm",
    "UsageError",
    "as_root",
    "worded",
]


class HostpartError(Exception):
    """A failure the operator can act on.

    Subclasses take facts as positional arguments and word them in ``__str__``,
    so callers can branch on fields and the error survives pickling.
    """

    exit_code = 1

    @property
    def remedy(self) -> str:
        """The command or the edit that mends it, in the imperative."""
        raise NotImplementedError

    def to_json(self) -> dict[str, int | str]:
        """Return what another process, or a script, has to know of it."""
        return {"exit_code": self.exit_code, "problem": str(self), "remedy": self.remedy}


class _Said(HostpartError):
    """An error whose facts are two sentences: what is wrong, and what to do."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(problem, remedy)
        self.problem = problem
        self._remedy = remedy

    def __str__(self) -> str:
        return self.problem

    @property
    def remedy(self) -> str:
        return self._remedy


class Failed(_Said):
    """Something failed at run time (exit code 1)."""


class UsageError(_Said):
    """The command line asks for what cannot be meant (exit code 2)."""

    exit_code = 2


class NotPermitted(_Said):
    """The kernel or another user's ownership forbids it (exit code 4)."""

    exit_code = 4


class UnknownVm(HostpartError):
    """No VM of that name is known to this user (exit code 2)."""

    exit_code = 2

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(name, tuple(known))
        self.name, self.known = name, tuple(known)

    def __str__(self) -> str:
        there = f"there are {', '.join(self.known)}" if self.known else "none is running"
        return f"no VM is named {self.name!r}; {there}"

    @property
    def remedy(self) -> str:
        return "run 'hostpart ps' for the VMs you own; another user's VMs are theirs to manage"


class ConfigError(HostpartError):
    """A scenario file has faults: all of them at once, each led by its key (exit code 2)."""

    exit_code = 2

    def __init__(self, source: str, faults: Sequence[str]) -> None:
        super().__init__(source, tuple(faults))
        self.source, self.faults = source, tuple(faults)

    def __str__(self) -> str:
        if len(self.faults) == 1:
            return f"{self.source}: {self.faults[0]}"
        return "\n  ".join([f"{self.source} has {len(self.faults)} faults:", *self.faults])

    @property
    def remedy(self) -> str:
        return f"mend it and look at it with 'hostpart plan {self.source}'; 'hostpart plan example:first' is right"


class DoesNotFit(HostpartError):
    """A request for pCPUs cannot be met; nothing has changed (exit code 3).

    :param wanted: how many pCPUs were asked for
    :param free: the pCPUs that were free to give
    :param blocks: what holds the rest, a sentence each
    :param fits: what would fit, in the imperative ("ask for 3 or fewer vCPUs")
    :param vm: the VM it is about, where there are several
    """

    exit_code = 3

    def __init__(self, wanted: int, free: CpuSet, blocks: Sequence[str], fits: str, vm: str | None = None) -> None:
        super().__init__(wanted, free, tuple(blocks), fits, vm)
        self.wanted, self.free, self.blocks, self.fits, self.vm = wanted, free, tuple(blocks), fits, vm

    def __str__(self) -> str:
        noun = "pCPU" if self.wanted == 1 else "pCPUs"
        there = f"{len(self.free)} free (pCPU {self.free})" if self.free else "none free"
        about = f"VM {self.vm!r}: " if self.vm is not None else ""
        return about + "; ".join([f"{self.wanted} {noun} wanted, {there}", *self.blocks])

    @property
    def remedy(self) -> str:
        return self.fits


def as_root() -> str:
    """Return the command line that this process was started with, with ``sudo`` before it, to be typed as it stands.

    sudo has a search path of its own, which has no virtual environment in it: the program is named as it was found.
    """
    import shlex

    command = sys.argv if os.path.basename(sys.argv[0]) == "hostpart" else [sys.executable, *sys.orig_argv[1:]]
    return f"sudo {shlex.join(command)}"


def worded(error: OSError) -> HostpartError:
    """Return what the kernel refused as an error with a remedy, by its errno."""
    if error.errno == errno.EAGAIN:
        return Failed(
            "no process can be had for a worker: the limit on processes is reached (EAGAIN)",
            "raise it with 'ulimit -u', or end some processes: 'ps -u $USER'",
        )
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return Failed(
            f"no file descriptor is left ({os.strerror(error.errno)})",
            "raise the limit: 'ulimit -n 4096', and run it again",
        )
    where = f": {error.filename!r}" if error.filename else ""
    return Failed(f"{error.strerror or error}{where}", "see the message, mend what it names and run it again")
