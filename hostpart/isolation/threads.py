"""vCPUs that are threads, in their VM's cgroup: which of them somebody has moved out, and back in.

A process at the root of the cgroup tree is nobody's in the eyes of others: systemd, for one, moves all that it finds
there elsewhere when it executes itself again, and their threads with them. What the VM's keeper does once when it
starts is done here again.
"""

from __future__ import annotations

import errno
import os

from .. import procfs, tree
from ..cpuset import CpuSet
from .cgroup_files import set_masks, words

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

    from ..host import Host
    from ..ledger import VcpuRow

__all__ = ["enter", "others", "outside"]


def outside(host: Host, rows: Iterable[VcpuRow], threads: str) -> list[VcpuRow]:
    """Return the vCPUs that run and are not where they have to be.

    :param threads: the file that lists who is, relative to the host's root
    """
    inside = set(words(host, threads))
    return [row for row in rows if row.pid and str(row.tid or row.pid) not in inside and _runs(row)]


def others(host: Host, rows: Iterable[VcpuRow]) -> dict[int, CpuSet]:
    """Return the masks, by thread id, of the threads beside vCPUs: those of the same processes that are none."""
    vcpus = {row.tid: row.pid for row in rows if row.tid}
    return {tid: mask for tid, mask in _masks(host, dict.fromkeys(vcpus.values())).items() if tid not in vcpus}


def enter(host: Host, rows: Iterable[VcpuRow], process: str, threads: str) -> None:
    """Put vCPUs where they have to be, and pin them there; all other threads of their processes keep their masks.

    :param rows: all vCPUs of the VM
    :param process: the ``cgroup.procs`` that a process of threads has to be in, relative to the host's root, or empty
    :param threads: the file that takes a thread
    :raises OSError: where the kernel lets one in no more
    """
    rows = list(rows)
    for pid in dict.fromkeys(row.pid for row in outside(host, rows, threads)):
        its = [row for row in rows if row.pid == pid]
        vcpus = {row.tid: CpuSet.of([row.pcpu]) for row in its if row.tid}
        if vcpus:
            _enter_threads(host, pid, vcpus, process, threads)
        else:
            _enter_processes(host, pid, CpuSet.of(row.pcpu for row in its), threads)


def _enter_threads(host: Host, pid: int, vcpus: dict[int, CpuSet], process: str, threads: str) -> None:
    before = _masks(host, [pid])
    # It takes the vCPUs along, those that are in their place too.
    if process and str(pid) not in words(host, process):
        _write(host, process, pid)
    for tid in vcpus:
        _write(host, threads, tid)
    set_masks(host, before | vcpus)


def _enter_processes(host: Host, pid: int, pin: CpuSet, threads: str) -> None:
    pids = [pid, *(member.pid for member in tree.descendants(pid))]
    for one in pids:
        _write(host, f"{os.path.dirname(threads)}/cgroup.procs", one)
    set_masks(host, dict.fromkeys(_masks(host, pids), pin))


def _masks(host: Host, pids: Iterable[int]) -> dict[int, CpuSet]:
    found = {}
    for tid in (tid for pid in pids for tid in procfs.threads(pid)):
        try:
            found[tid] = host.affinity(tid)
        except ProcessLookupError:
            continue
    return found


def _write(host: Host, name: str, number: int) -> None:
    try:
        host.write_text(name, str(number))
    except OSError as error:
        if error.errno != errno.ESRCH:  # it has ended
            raise


def _runs(row: VcpuRow) -> bool:
    stat = procfs.read_stat(row.pid, row.tid or row.pid)
    return stat is not None and not stat.dead
