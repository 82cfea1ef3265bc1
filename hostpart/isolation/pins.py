"""The masks of guests and their keepers, held while the kernel changes cgroups and CPUs.

Before Linux 6.2 (8f9ea86fdf99) each such change gives the tasks of a cgroup whatever the cgroup has now, whatever mask
they had: also the vCPUs of VMs that have nothing to do with it, which no sweep touches. What they had is in the ledger
before the change, and is given back after it, or by the next call where this one was killed in between.
"""

from __future__ import annotations

import errno

from .. import procfs, tree
from ..cpuset import CpuSet
from ..ledger import Known

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

    from ..host import Host
    from ..ledger import Ledger

__all__ = ["give_back", "held"]

_KIND = "guest"
_ROUNDS = 5  # looks for what was forked meanwhile, and has the mask that its parent had then


def held(tops: Collection[int]) -> dict[str, Known]:
    """Return what the ledger has to remember: the mask of each thread of these processes and of all below them."""
    return {f"{_KIND}:{pid}:{tid}:{start}": Known(str(mask)) for pid, tid, start, mask in _threads(tops)}


def give_back(host: Host, ledger: Ledger, tops: Collection[int], wide: Collection[str]) -> None:
    """Give the masks that the ledger remembers back to whoever has one of the kernel's now, and strike them out.

    :param wide: masks, in list form, that the kernel may have given
    """
    known = {key: one for key, one in ledger.known(tasks=False).items() if key.startswith(f"{_KIND}:")}
    if not known:
        return
    for _ in range(_ROUNDS):
        if not _round(host, known, tops, wide):
            break
    ledger.forget(known)


def _round(host: Host, known: Mapping[str, Known], tops: Collection[int], wide: Collection[str]) -> int:
    done = 0
    before = {int(key.split(":")[2]): one.baseline for key, one in known.items()}
    for pid, tid, start, mask in _threads(tops):
        mine = known.get(f"{_KIND}:{pid}:{tid}:{start}")
        had = mine.baseline if mine is not None else before.get(pid) or before.get(_parent(pid))
        if had is None or str(mask) == had or str(mask) not in wide:
            continue
        try:
            host.set_affinity(tid, CpuSet.parse(had))
            done += 1
        except OSError as error:
            if error.errno not in (errno.ESRCH, errno.EINVAL, errno.EPERM):  # gone, or its cpuset has none of these
                raise
    return done


def _threads(tops: Collection[int]) -> Iterator[tuple[int, int, int, CpuSet]]:
    pids = dict.fromkeys(tops)
    for top in tops:
        pids |= dict.fromkeys(member.pid for member in tree.descendants(top))
    for pid in pids:
        for tid in procfs.threads(pid):
            stat, mask = procfs.read_stat(pid, tid), procfs.allowed(pid, tid)
            if stat is not None and not stat.dead and mask is not None:
                yield pid, tid, stat.start, mask


def _parent(pid: int) -> int:
    stat = procfs.read_stat(pid)
    return stat.ppid if stat is not None else 0
