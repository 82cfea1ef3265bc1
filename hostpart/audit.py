"""Every running VM looked at from outside: by ledger, leases, /proc and psutil, without asking its keeper."""

from __future__ import annotations

import os
import time

import psutil

from . import __version__, evidence, tree
from .auditor import Auditor
from .cgroup import Leaf
from .cpuset import CpuSet
from .host import Host
from .isolation import mems
from .lease import Leases
from .ledger import ATTACHED
from .occupancy import Guest, Occupancy, times
from .procfs import pinned_alone, start_time
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    from .census import Census
    from .ledger import VcpuRow

__all__ = ["Audit", "Task", "audit"]


class Task(Value):
    """One process, as psutil reads it: a second reader, whose code is not hostpart's.

    :ivar cpus: what its main thread may run on
    :ivar cpu: what its main thread ran on last
    :ivar cpu_percent: of one CPU, all its threads, over the interval of the audit
    :ivar foreign: it is not the VM's, and pinned to one of its pCPUs alone
    """

    pid: int
    name: str
    user: str
    threads: int
    cpus: CpuSet
    cpu: int
    cpu_percent: float
    rss_bytes: int
    foreign: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the fields, the CPUs in list form."""
        return {**self.asdict(), "cpus": str(self.cpus)}


class Audit(Value):
    """What was found of one VM.

    :ivar document: its evidence, as in ``evidence.schema.json``
    :ivar tasks: its processes, and foreign ones that are pinned to its pCPUs alone
    """

    document: dict[str, Any]
    tasks: tuple[Task, ...]


def audit(vms: Sequence[Census], interval_s: float, foreign_limit: float = evidence.FOREIGN_LIMIT) -> list[Audit]:
    """Look twice at every task of *vms*, at their leases, and at what else runs on their pCPUs.

    This thread stays off those meanwhile, as far as there are others.

    :param interval_s: between the two looks
    :param foreign_limit: percent of a pCPU's time that may go to others
    """
    before = os.sched_getaffinity(0)
    apart = before - {cpu for vm in vms for cpu in _pcpus(vm)}
    try:
        if apart:
            os.sched_setaffinity(0, apart)
        return _audit(vms, interval_s, foreign_limit)
    finally:
        if apart:
            os.sched_setaffinity(0, before)


def _audit(vms: Sequence[Census], interval_s: float, foreign_limit: float) -> list[Audit]:
    started = time.time()
    auditor, host = Auditor(), Host()
    occupancy: dict[int, Occupancy] = {}
    records = {vm.row.id: _records(vm) for vm in vms}
    drifts: dict[int, dict[tuple[int, int], evidence.Drift]] = {vm.row.id: {} for vm in vms}
    readers = {vm.row.id: _Reader(vm) for vm in vms}
    for number in range(2):
        with auditor:
            for vm in vms:
                members = _members(vm, records[vm.row.id])
                guests = [*members, *_attached(vm)]
                machines = {vcpu.pid for vcpu in vm.vcpus if vcpu.tid}
                own_ns = times(
                    [one for one in guests if one.pid not in machines],
                    {one.pid: one.pin for one in records[vm.row.id] if one.tid is None},
                )
                for record in records[vm.row.id]:
                    if record.tid is not None:
                        own_ns[record.pin] = own_ns.get(record.pin, 0) + record.ran_ns()
                usage_us = Leaf(vm.row.leaf).cpu_usage_us() if vm.row.leaf else None
                guest = Guest(own_ns, None if usage_us is None else usage_us * 1000)
                own = {member.pid for member in guests}
                if number:
                    online = CpuSet.parse(host.read_text("sys/devices/system/cpu/online"))
                    occupancy[vm.row.id].look(guest, own, online, search=True)
                else:
                    pins = [record.pin for record in records[vm.row.id]]
                    occupancy[vm.row.id] = Occupancy(pins, host)
                    occupancy[vm.row.id].start(guest)
                    occupancy[vm.row.id].search(own)
                rest = {member.pid for member in members}
                for record in records[vm.row.id]:
                    seen = evidence.look(record.pid, record.tid)
                    if vm.attached and not number:
                        record.resting = evidence.resting([record.pid, *(one.pid for one in members)])
                    if number:
                        record.update(seen)
                        record.pages = dict(mems.held(host, record.pid).pages) or None
                    else:
                        record.start(seen)
                    own_members = tree.below(members, record.pid)
                    rest -= {member.pid for member in own_members}
                    record.sample(own_members)
                orphans = [member for member in members if member.pid in rest]
                astray = evidence.find_drifts(orphans, _pcpus(vm))
                if machines:
                    # QEMU's other threads are the host's, and belong on any other pCPU.
                    threads = {record.tid for record in records[vm.row.id] if record.tid is not None}
                    emulators = [member for member in members if member.pid in machines]
                    elsewhere = CpuSet.parse(host.read_text("sys/devices/system/cpu/possible")) - _pcpus(vm)
                    astray += evidence.find_drifts(emulators, elsewhere, threads)
                for drift in astray:
                    drifts[vm.row.id].setdefault((drift.pid, drift.tid), drift)
        if not number:
            time.sleep(interval_s)
    leases = Leases()
    all_pcpus = CpuSet.of(cpu for vm in vms for cpu in _pcpus(vm))
    with leases.lock():
        free = all_pcpus - leases.survey(all_pcpus).taken
    pinned = pinned_alone()
    found = []
    for vm in vms:
        foreign = readers[vm.row.id].foreign(pinned)
        document = evidence.document(
            version=__version__,
            vm=vm.row.name,
            records=records[vm.row.id],
            isolation={"asked": None, "reached": vm.row.level, "stopped_by": "", "remedy": ""},
            period_s=None,
            started_s=started,
            ended_s=None,
            circumstances=evidence.Circumstances(
                lost=_pcpus(vm) & free,
                drifts=tuple(drifts[vm.row.id].values()),
                foreign=foreign,
                occupied=occupancy[vm.row.id].found(),
                foreign_limit=foreign_limit,
                auditor=auditor,
            ),
        )
        pids = [pid for one in foreign.values() for pid in one]
        found.append(Audit(document, readers[vm.row.id].tasks(pids)))
    return found


def _pcpus(vm: Census) -> CpuSet:
    return CpuSet.of(vcpu.pcpu for vcpu in vm.vcpus)


def _members(vm: Census, records: Sequence[evidence.VcpuRecord]) -> list[tree.Member]:
    members = tree.descendants(vm.row.keeper_pid)
    for record in records if vm.attached else ():
        members += [member for member in tree.descendants(record.pid) if member.pid != vm.row.keeper_pid]
    return members


def _attached(vm: Census) -> list[tree.Member]:
    # The processes that it was given, which are above its members.
    pids = vm.row.guest.removeprefix(ATTACHED).split() if vm.attached else ()
    return [found for pid in pids if (found := tree.member(int(pid))) is not None]


def _records(vm: Census) -> list[evidence.VcpuRecord]:
    alive = [vcpu for vcpu in vm.vcpus if start_time(vcpu.pid) == vcpu.start]
    pids: dict[tuple[int, int], list[VcpuRow]] = {}
    for vcpu in alive:
        pids.setdefault((vcpu.pid, vcpu.tid), []).append(vcpu)
    return [
        evidence.VcpuRecord(
            vm.row.name,
            rows[0].vcpu,
            CpuSet.of(row.pcpu for row in rows),
            pid,
            "qemu" if tid else "smp" if len(rows) > 1 else "command",
            tid or None,
        )
        for (pid, tid), rows in pids.items()
    ]


class _Reader:
    # psutil's view of one VM; cpu_percent counts from the first call for each process.
    def __init__(self, vm: Census) -> None:
        self.vm = vm
        self.processes = self._below()
        for process in self.processes:
            _read(process)

    def _below(self) -> list[psutil.Process]:
        try:
            if not self.vm.attached:
                return psutil.Process(self.vm.row.keeper_pid).children(recursive=True)
            tops = [psutil.Process(pid) for pid in {vcpu.pid for vcpu in self.vm.vcpus}]
            return [*tops, *(one for top in tops for one in top.children(recursive=True))]
        except psutil.Error:
            return []

    def foreign(self, pinned: dict[int, list[int]]) -> dict[int, list[int]]:
        ours = {process.pid for process in self._below()}
        return {cpu: [pid for pid in pids if pid not in ours] for cpu, pids in pinned.items() if cpu in _pcpus(self.vm)}

    def tasks(self, foreign: list[int]) -> tuple[Task, ...]:
        own = [task for process in self.processes if (task := _read(process)) is not None]
        others = [task for pid in foreign if psutil.pid_exists(pid) and (task := _read_foreign(pid)) is not None]
        return (*own, *others)


def _read(process: psutil.Process) -> Task | None:
    try:
        with process.oneshot():
            return Task(
                process.pid,
                process.name(),
                process.username(),
                process.num_threads(),
                CpuSet.of(process.cpu_affinity() or ()),
                process.cpu_num(),
                process.cpu_percent(),
                process.memory_info().rss,
            )
    except psutil.Error:
        return None


def _read_foreign(pid: int) -> Task | None:
    try:
        task = _read(psutil.Process(pid))
    except psutil.Error:
        return None
    return None if task is None else task.replace(foreign=True)
