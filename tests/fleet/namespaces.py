"""A network of namespaces: one in the middle with a bridge, one per member with a cable to it.

Nothing is made in the namespace that the tests run in, and no address is in use outside of those made here. Names carry
the pid of who made them, so that the next one can take away what a killed one has left. What runs in the namespaces is
left to :mod:`tests.fleet.lab`.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

__all__ = ["Network", "lacking", "leftovers", "sweep"]

_NAME = re.compile(r"hplab([0-9]+)x[0-9]+-[a-z0-9]+", re.ASCII)
_NUMBER = itertools.count()


def _ip(*words: str) -> str:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


def lacking() -> str:
    """Why no network can be made here; empty if it can: tried."""
    if os.geteuid():
        return "needs root, to make network namespaces"
    name = f"hplab{os.getpid()}x{next(_NUMBER)}-try"
    try:
        _ip("netns", "add", name)
        try:
            _ip("-n", name, "link", "add", "br0", "type", "bridge")
            _ip("-n", name, "link", "add", "one", "type", "veth", "peer", "name", "two")
            enter = [
                "ip",
                "netns",
                "exec",
                name,
                "unshare",
                "--uts",
                "--pid",
                "--fork",
                "--mount",
                "--mount-proc",
                "true",
            ]
            done = subprocess.run(enter, capture_output=True, text=True, check=False)
            if done.returncode:
                raise OSError(done.stderr.strip())
        finally:
            _ip("netns", "del", name)
    except OSError as error:
        return f"needs network namespaces with bridge and veth: {error}"
    return ""


def leftovers(pid: int | None = None) -> list[str]:
    """Name the namespaces that were made here by *pid*, or by anyone."""
    names = [path.name for folder in (Path("/run/netns"), Path("/var/run/netns")) for path in folder.glob("hplab*")]
    found = [match for name in sorted(set(names)) if (match := _NAME.fullmatch(name))]
    return [match[0] for match in found if pid is None or int(match[1]) == pid]


def sweep() -> None:
    """Take away what processes that are no longer there have left."""
    for name in leftovers():
        match = _NAME.fullmatch(name)
        if match and not Path(f"/proc/{match[1]}").exists():
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


class Network:
    """Namespaces that reach each other; see the module. Made at once, taken away by :meth:`close`.

    :ivar middle: the namespace of the bridge, which has address :attr:`address` itself
    """

    address = "10.77.0.254"

    def __init__(self, members: Sequence[str]) -> None:
        self._mark = f"hplab{os.getpid()}x{next(_NUMBER)}"
        self._addresses = {name: f"10.77.0.{number}" for number, name in enumerate(members, 1)}
        self.middle = f"{self._mark}-net"
        try:
            _ip("netns", "add", self.middle)
            self._in(self.middle, "link", "add", "br0", "type", "bridge")
            self._in(self.middle, "addr", "add", f"{self.address}/24", "dev", "br0")
            self._in(self.middle, "link", "set", "lo", "up")
            self._in(self.middle, "link", "set", "br0", "up")
            for name in members:
                self._member(name)
        except BaseException:
            self.close()
            raise

    def _in(self, namespace: str, *words: str) -> None:
        _ip("-n", namespace, *words)

    def _member(self, name: str) -> None:
        own = self.namespace(name)
        _ip("netns", "add", own)
        self._in(self.middle, "link", "add", f"to-{name}", "type", "veth", "peer", "name", "eth0", "netns", own)
        self._in(self.middle, "link", "set", f"to-{name}", "master", "br0", "up")
        self._in(own, "addr", "add", f"{self._addresses[name]}/24", "dev", "eth0")
        self._in(own, "link", "set", "lo", "up")
        self._in(own, "link", "set", "eth0", "up")

    def namespace(self, name: str) -> str:
        """Name the member's namespace."""
        return f"{self._mark}-{name}"

    def address_of(self, name: str) -> str:
        """Give the member's address."""
        return self._addresses[name]

    def unplug(self, name: str) -> None:
        """Pull the member's cable out, at the bridge: what is sent is lost, and nobody is told."""
        self._in(self.middle, "link", "set", f"to-{name}", "down")

    def plug(self, name: str) -> None:
        """Put the member's cable back in."""
        self._in(self.middle, "link", "set", f"to-{name}", "up")

    def close(self) -> None:
        """Take every namespace away; cables and bridge go with them once nobody lives there."""
        for name in leftovers(os.getpid()):
            if name.startswith(f"{self._mark}-"):
                subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)
