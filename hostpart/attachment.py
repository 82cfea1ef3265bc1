"""The keeper of a VM whose guests ran before: processes that were attached to pCPUs and are given back when it stops.

Everything else is as for any VM: the allocator places it, the leases are taken, the host is kept off, and looks are
made. What differs is whose the processes are: they are not this process's children, so their end is told by pidfds;
they are never signalled or ended, and what they inherit is nobody's lease: the leases are this keeper's alone.
"""

from __future__ import annotations

import os
import select
import signal
import time

from . import __version__, control, evidence, procfs, recovery, tree
from .auditor import Auditor
from .cpuset import CpuSet
from .device_model import Caller, DeviceModel
from .errors import Failed, HostpartError, NotPermitted, UsageError, as_root, worded
from .host import Host
from .hypervisor import Hypervisor
from .isolation import attached
from .isolation.level import Wish
from .isolation.turn import quietly
from .isolation.watch import Watch
from .keeper import PERIOD_S, ignore_terminal
from .lease import Leases
from .ledger import ATTACHED, Ledger, VmRow, boot_id
from .occupancy import Guest, Occupancy, Occupied, process_ns

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any, NoReturn

    from .channel import Channel
    from .config import ServiceVm, VmConfig
    from .hypervisor import Vcpu, Vm
    from .topology import Topology

__all__ = ["Attachment", "check_processes"]


def check_processes(pids: Sequence[int]) -> None:
    """Refuse processes that can't be attached.

    :raises UsageError: for one that is not there, a kernel thread, pid 1, hostpart's own or a guest of hostpart
    :raises NotPermitted: for another user's, without root
    """
    with Ledger() as ledger:
        keepers = {row.keeper_pid for row in ledger.vms()} | {row.front_pid for row in ledger.vms()}
        held = attached.processes(ledger)
    for pid in pids:
        status = procfs.read_status(pid)
        if status is None:
            raise UsageError(f"there is no process {pid}", "see 'ps -e'")
        if procfs.read_stat(pid, None) is None or pid == 1 or procfs.is_kthread(pid):
            raise UsageError(f"pid {pid} is {'init' if pid == 1 else 'a kernel thread'}", "name processes of yours")
        if os.geteuid() != 0 and status.uid != os.geteuid():
            raise NotPermitted(f"pid {pid} is another user's", as_root())
        if pid in held or pid in keepers or b"HOSTPART_RUN" in (procfs.environ(pid) or {}):
            raise UsageError(f"pid {pid} is hostpart's own, or in a VM already", "see 'hostpart ps'")


class Attachment:
    """See the module.

    :param front: told ``ready``, or ``error``; nobody has to listen after that
    """

    def __init__(
        self, config: VmConfig, service: ServiceVm, topology: Topology, wish: Wish, pids: Sequence[int], front: Channel
    ) -> None:
        self.config, self.topology, self.wish, self.pids, self.front = config, topology, wish, tuple(pids), front
        self.model = DeviceModel(config, service, Caller(), [])
        self._host = Host()
        self._notes: list[str] = []
        self._waiters: list[control.Request] = []
        self._records: dict[int, evidence.VcpuRecord] = {}
        self._auditor = Auditor()
        self._alive: dict[tuple[int, int], tuple[int, int]] = {}
        self._ended_ns = 0
        self._stopping = False
        self._occupancy: Occupancy
        self._watch: Watch
        self._server: control.Server

    def run(self) -> NoReturn:
        """Attach, watch, give back, and end the process."""
        code = 1
        try:
            self._wake_r, _ = ignore_terminal()
            signal.signal(signal.SIGTERM, self._on_term)
            with Ledger() as self.ledger:
                try:
                    self._create()
                    self._supervise()
                    code = 0
                finally:
                    self._clean()
        except HostpartError as error:
            self.front.send({"event": "error", **error.to_json()})
        except OSError as error:
            self.front.send({"event": "error", **worded(error).to_json()})
        os._exit(code)

    def _on_term(self, *_: object) -> None:
        self._stopping = True

    # -- up ----------------------------------------------------------------------------------------------

    def _create(self) -> None:
        check_processes(self.pids)
        self._fds = {pid: os.pidfd_open(pid) for pid in self.pids}
        self._starts = {pid: procfs.start_time(pid) for pid in self.pids}
        model = self.model
        model.attach(Hypervisor(self.topology, Leases(), self.ledger, self._boot, lambda: None))
        row = VmRow(
            0, self.config.name, 0, model.token, boot_id(), "INIT", self.config.vcpus,
            ATTACHED + " ".join(map(str, self.pids)), os.getpid(), procfs.start_time(os.getpid()) or 0,
            os.getpid(), time.time(),
        )  # fmt: skip
        model.hypervisor.announce(row)
        recovery.recover(self.ledger)
        model.vm_create()
        os.sched_setaffinity(0, model.vm.kept or self.topology.usable)
        self._watch = Watch(self.ledger, self._host, model.vm.row, self._note)
        isolation = self._watch.begin(self.wish)
        self._server = control.Server(self.ledger.directory, self.config.name)
        for vcpu_id in range(model.vm.vcpu_num):
            model.vm_create_vcpu(vcpu_id)
        model.vm_start()
        self._take()
        for number, pid in enumerate(self.pids):
            record = self._records[pid] = evidence.VcpuRecord(self.config.name, number, model.pcpus, pid, "smp")
            record.resting = evidence.resting([pid, *(one.pid for one in attached.family(self.ledger, pid))])
            record.start(evidence.look(pid))
        self._occupancy = Occupancy([model.pcpus], self._host)
        self._occupancy.start(self._guest(self._members()))
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):  # whoever waits for the end of what 'hostpart attach' prints does not wait for this one
            os.dup2(null, fd)
        os.close(null)
        self.front.send({
            "event": "ready", "vm": self.config.name, "pcpus": str(model.pcpus), "isolation": isolation.to_json(),
        })  # fmt: skip

    def _boot(self, _vm: Vm, _vcpu: Vcpu) -> int:
        return self.pids[0]

    def _take(self) -> None:
        procs = self._watch.leaf.procs_path if self._watch.leaf is not None else self._watch.procs
        problems = attached.take(
            self._host, self.ledger, self.model.token, self.pids, self.model.pcpus, procs.lstrip("/")
        )
        if problems:
            raise Failed("; ".join(problems), "see who else pins it: 'taskset -pc PID'; then run it again")

    # -- watching ----------------------------------------------------------------------------------------

    def _supervise(self) -> None:
        poll = select.poll()
        for fd in (self._wake_r, self._server.fileno(), *self._fds.values()):
            poll.register(fd, select.POLLIN)
        for fd in self._watch.files():
            poll.register(fd, select.POLLPRI)
        next_look = time.monotonic() + PERIOD_S
        while self._fds and not self._stopping:
            for fd, _ in poll.poll(max(0.0, next_look - time.monotonic()) * 1000):
                if fd == self._wake_r:
                    os.read(fd, 4096)
                elif fd in self._watch.files():
                    os.pread(fd, 4096, 0)
                for pid in [pid for pid, its in self._fds.items() if its == fd]:
                    poll.unregister(fd)
                    os.close(self._fds.pop(pid))
            for request in self._server.requests():
                self._answer(request)
            if time.monotonic() >= next_look:
                with self._auditor:
                    self._look()
                next_look = time.monotonic() + PERIOD_S

    def _look(self) -> None:
        quietly(self.ledger.directory, self._sample)  # as for the keeper of a guest
        self._watch.look()
        self._measure()

    def _measure(self) -> None:
        members = self._members()
        online = CpuSet.parse(self._host.read_text("sys/devices/system/cpu/online"))
        self._occupancy.look(self._guest(members), {member.pid for member in members}, online)

    def _members(self) -> list[tree.Member]:
        tops = [top for pid in self._fds if (top := tree.member(pid)) is not None]
        return [*tops, *(member for top in tops for member in attached.family(self.ledger, top.pid))]

    def _guest(self, members: list[tree.Member]) -> Guest:
        # Nobody here reaps them, so what has ended counts with what it had at the last look.
        now = {(member.pid, member.start): (process_ns(member.pid) or 0, member.reaped) for member in members}
        ended = [self._alive[key] for key in self._alive.keys() - now.keys() if key[0] in self.pids]
        self._ended_ns += sum(ran_ns + reaped * Occupied.RESOLUTION_NS for ran_ns, reaped in ended)
        self._alive = now
        alive_ns = sum(ran_ns + reaped * Occupied.RESOLUTION_NS for ran_ns, reaped in now.values())
        return Guest({self.model.pcpus: self._ended_ns + alive_ns})

    def _sample(self) -> None:
        for pid in self._fds:
            family = attached.family(self.ledger, pid)
            self._records[pid].sample(family)
            for drift in self._records[pid].new_drifts():
                self._note(f"{drift}, not on {self.model.pcpus} alone (on_drift = {self.config.on_drift!r})")
            if self.config.on_drift == "repin":
                self._repin([pid, *(one.pid for one in family)])

    def _repin(self, family: list[int]) -> None:
        for pid in family:
            for tid in procfs.threads(pid):
                try:
                    if procfs.allowed(pid, tid) != self.model.pcpus:
                        self._host.set_affinity(tid, self.model.pcpus)
                except OSError:
                    continue  # gone, or its pCPU is offline: the next look tells

    def _note(self, text: str) -> None:
        self._notes.append(text)

    def _answer(self, request: control.Request) -> None:
        if request.what == "stop":
            self._stopping = True
            self._waiters.append(request)
        elif request.what == "show":
            request.reply({"evidence": self._document(None), "state": "RUNNING"})
        else:
            request.refuse(
                UsageError(
                    f"VM {self.config.name!r} was attached: its processes are not hostpart's to {request.what}",
                    f"kill -STOP and kill -CONT them yourself: pid {' '.join(map(str, self.pids))}",
                )
            )

    def _document(self, ended_s: float | None) -> dict[str, Any]:
        for pid in self._fds:
            self._records[pid].update(evidence.look(pid))
        row = self.model.vm.row
        return evidence.document(
            version=__version__,
            vm=self.config.name,
            records=list(self._records.values()),
            isolation={**self._watch.isolation.to_json(), **self._watch.to_json()},
            period_s=PERIOD_S,
            started_s=row.started,
            ended_s=ended_s,
            circumstances=evidence.Circumstances(
                breaches=tuple(self._watch.breaches),
                shares_core=self.model.vm.placement.shares_core,
                occupied=self._occupancy.found(),
                auditor=self._auditor,
            ),
            notes=self._notes,
        )

    # -- down --------------------------------------------------------------------------------------------

    def _clean(self) -> None:
        model = self.model
        if getattr(model, "vhm", None) is None or model.vhm.vmid is None:
            return
        self._notes += attached.release(self._host, self.ledger, model.token)
        watch = getattr(self, "_watch", None)
        if watch is not None:
            watch.end()
        server = getattr(self, "_server", None)
        if server is not None:
            server.close()
        model.cancel()
        model.vm_destroy()
        for request in self._waiters:
            request.reply({"state": "OFFLINE", "notes": self._notes})
