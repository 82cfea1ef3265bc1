"""What killed hostpart processes left behind: found by the ledger, ended, and struck out.

A VM whose keeper is gone is *dirty*. Its workers died with the keeper; what its guest had made a daemon, with every
descriptor closed, lives on and may sit on a pCPU whose lease is free again. Such processes carry the VM's token in
their environment, and are in its cgroup where there was one. They are ended before the row is struck out, and rows
are looked at before pCPUs are given out.
"""

from __future__ import annotations

import os
import time

from workers import crash

from . import cgroup, control, tree
from .lease import Leases
from .ledger import Ledger, boot_id
from .procfs import read_stat
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .isolation.reconcile import Report
    from .ledger import VmRow

__all__ = ["Recovered", "dirty", "put_back", "recover", "tidy"]


_PATIENCE_S = 5.0


class Recovered(Value):
    """One dirty VM that was dealt with.

    :ivar pcpus: those its vCPUs had been bound to
    :ivar ended: pids of the processes that were left of it and are gone now
    :ivar left: pids of those that could not be ended; the row stays, and so does the VM's name
    """

    name: str
    pcpus: tuple[int, ...]
    ended: tuple[int, ...]
    left: tuple[int, ...]


def dirty(ledger: Ledger) -> list[VmRow]:
    """Return the VMs whose keeper is gone (of another boot, ended, or its pid is another process by now)."""
    rows = ledger.vms()
    boot = boot_id() if rows else ""
    return [row for row in rows if row.boot_id != boot or not _lives(row.keeper_pid, row.keeper_start)]


def _lives(pid: int, start: int) -> bool:
    # A zombie is gone, and may stay one for as long as a container's init does not reap.
    stat = read_stat(pid)
    return stat is not None and stat.start == start and not stat.dead


def recover(ledger: Ledger, *, only: str | None = None) -> list[Recovered]:
    """End what is left of dirty VMs, remove their files and strike them out.

    :param only: the token of the one VM to look at; all without it
    """
    return [_recover(ledger, row) for row in dirty(ledger) if only in (None, row.token)]


def put_back(ledger: Ledger) -> Report | None:
    """Bring the host to what the VMs that are left in the ledger hold, where anything of it was changed.

    Call it without the allocator's lock: a sweep of all tasks may take longer than others should wait for that.

    :raises HostpartError: where the host cannot be put back now; the ledger still knows how
    """
    if not ledger.remembers():
        return None
    from .isolation.reconcile import reconcile, worded

    try:
        return reconcile(ledger)
    except OSError as error:
        raise worded(error) from error


def tidy() -> None:
    """Put the host back where killed hostpart processes have left it, before this one asks what it may use.

    The mask of every task is a part of that, this process's too: it would else not see the pCPUs that they had.

    :raises HostpartError: as :func:`put_back` does
    """
    with Ledger() as ledger:
        if not ledger.remembers() or (ledger.holdings() and not dirty(ledger)):
            return
        with Leases().lock():
            recover(ledger)
        put_back(ledger)


def _recover(ledger: Ledger, row: VmRow) -> Recovered:
    pcpus = tuple(sorted({vcpu.pcpu for vcpu in ledger.vcpus(row.id)}))
    ended: set[int] = set()
    left: tuple[int, ...] = ()
    crash.point("recovery")
    if row.boot_id == boot_id():
        # Until none is found: what forked between a look and its kills is seen by the next, and ending takes time.
        until = time.monotonic() + _PATIENCE_S
        killed: set[tuple[int, int]] = set()
        while found := tree.find_by_environment("HOSTPART_RUN", row.token):
            refused = tree.kill(found)
            killed |= {(member.pid, member.start) for member in found if member not in refused}
            ended |= {member.pid for member in found} - {member.pid for member in refused}
            if len(refused) == len(found) or time.monotonic() > until:
                break
            time.sleep(0.002)
        # One that is ending has lost its environment with its memory, and may yet be about to leave its pCPU.
        while any(_lives(*one) for one in killed) and time.monotonic() < until:
            time.sleep(0.002)
        left = tuple(member.pid for member in found)
        ended -= set(left)
        if row.leaf:
            leaf = cgroup.Leaf(row.leaf)
            leaf.kill()
            leaf.remove()
    if left:
        return Recovered(row.name, pcpus, tuple(sorted(ended)), left)
    try:
        os.unlink(control.socket_path(ledger.directory, row.name))
    except FileNotFoundError:
        pass  # it was killed before it had one
    for path in row.sockets.splitlines():
        try:
            if control.abandoned(path):
                os.unlink(path)
        except OSError:
            continue  # it is gone, or not this user's to remove
    ledger.remove_vm(row.id)
    return Recovered(row.name, pcpus, tuple(sorted(ended)), left)
