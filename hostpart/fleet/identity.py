"""Which host this is, for those who see many: names and numbers that tell it from others, and no figures.

What it measures like is for :mod:`hostpart.experiment.facts` to say.
"""

from __future__ import annotations

import hashlib
import os
import platform
import pwd
import shlex
import sys

from .. import __version__
from ..errors import UsageError
from ..host import Host
from ..ledger import boot_id
from ..topology import read_topology

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["PROTOCOL", "command", "domain", "identity", "machine"]

PROTOCOL = 1  # of what host and client say to each other; raised when the two must match


def command() -> list[str]:
    """Return the words that ``hostpart`` is called by here: ``HOSTPART_COMMAND``, else this interpreter's module.

    :raises UsageError: where that variable has an open quote
    """
    asked = os.environ.get("HOSTPART_COMMAND", "")
    try:
        words = shlex.split(asked)
    except ValueError as error:
        raise UsageError(f"HOSTPART_COMMAND is {asked!r}: {error}", "close its quote") from None
    # -P: a folder 'hostpart' in the directory that a request names is not meant.
    return words or [sys.executable, "-P", "-m", "hostpart"]


def domain() -> str:
    """Return who shares leases: two workers of one host with equal domains do."""
    own = os.environ.get("HOSTPART_LEASE_DIR")
    return own or f"sysfs:{os.stat('/proc/self/ns/net').st_ino}"


def identity() -> dict[str, Any]:
    """Return what a host says of itself when it comes.

    :raises HostpartError: where its topology cannot be read
    """
    return {
        "protocol": PROTOCOL,
        "version": __version__,
        "hostname": os.uname().nodename,
        "machine": machine(),
        "boot_id": boot_id(),
        "domain": domain(),
        "usable": str(read_topology(Host()).usable),
        "python": platform.python_version(),
        "user": _user(),
        "command": command(),
    }


def machine() -> str:
    """Return which machine this is, in 16 hexadecimal digits."""
    # The id itself is confidential: machine-id(5) wants a hash of it shown.
    host = Host()
    try:
        with open("/etc/machine-id", encoding="ascii") as file:
            told = file.read().strip()
    except (OSError, ValueError):
        told = ""
    # A container may have none; what it has then is its name, and the boot.
    told = told or f"{os.uname().nodename} {host.read_text('proc/sys/kernel/random/boot_id').strip()}"
    return hashlib.sha256(b"hostpart:" + told.encode()).hexdigest()[:16]


def _user() -> str:
    uid = os.geteuid()
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
