"""The keeper: the process that supervises one user VM, from before its first worker until nothing of it is left.

It is the workers' parent and a subreaper, so every process of the guest stays below it. It holds the leases, looks
at the guest at a fixed period, answers the VM's control socket, and tells its front what happens. It has one thread
while it forks, ignores what a terminal sends, and ends only when the VM is destroyed; if its front dies, it ends
the VM.
"""

from __future__ import annotations

import os
import select
import signal
import time

from workers import crash

from . import __version__, cgroup, control, evidence, recovery, tree
from .auditor import Auditor
from .channel import Channel
from .cpuset import CpuSet
from .device_model import Caller, DeviceModel
from .errors import DoesNotFit, Failed, HostpartError, worded
from .host import Host
from .hypervisor import Hypervisor
from .isolation import Isolation, Wish
from .isolation.turn import quietly
from .lease import Holder, Leases, Line
from .ledger import Ledger, VmRow, boot_id
from .machines import Machines
from .occupancy import Guest, Occupancy, process_ns, times
from .procfs import pinned_alone, read_stat, start_time, threads
from .topology import read_topology
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from resource import struct_rusage
    from typing import Any, NoReturn

    from . import config
    from .config import ServiceVm, VmConfig
    from .isolation.watch import Watch
    from .occupancy import Occupied
    from .topology import Topology

__all__ = ["Options", "fork_beside", "fork_keeper", "ignore_terminal"]

PERIOD_S = 0.25  # between two looks at the guest; the evidence states it
_READY_WAIT_S = 30.0
_FILLED_PER_S = 1 << 28  # bytes of memory, at the slowest
_STOP_GRACE_S = 5.0
_DRAIN_S = 2.0  # for all workers' log records together, where nobody reads stderr
_FOREIGN_TOLD = 100  # pids of foreign tasks on one pCPU: a host that forks all day must not fill the evidence
# What a terminal or a shell sends to a job is for the front and the guests.
_IGNORED = (
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTSTP,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGHUP,
    signal.SIGPIPE,
)


class Options(Value):
    """How a VM is run, beside what its configuration says.

    :ivar wish: how far the host is to be kept off its pCPUs
    :ivar wait_s: how long to queue for pCPUs: None not at all, ``inf`` for ever
    :ivar hold: wait for the front's word before START
    :ivar log: the file that has the guests' output, for the ledger; empty: none
    """

    wish: Wish = Wish()
    wait_s: float | None = None
    hold: bool = False
    log: str = ""


class _Cancelled(Exception):
    # The front is gone, or wants it stopped, before the guests run.
    pass


def ignore_terminal() -> tuple[int, int]:
    """Leave the job's process group and its signals; return the pipe that wakes poll(2) when a child ends."""
    os.setpgid(0, 0)
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    read, write = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    return read, write


def fork_keeper(
    config: VmConfig, service: ServiceVm, topology: Topology, caller: Caller, options: Options, others: list[Channel]
) -> tuple[int, Channel]:
    """Fork the keeper of one VM; return its pid and the front's end of the channel.

    :param others: the front's ends of other keepers' channels, which this one must not hold open
    :raises OSError: where no process or descriptor can be had
    """
    front = os.getpid()
    return fork_beside(lambda theirs: Keeper(config, service, topology, caller, options, theirs, front).run(), others)


def fork_beside(run: Callable[[Channel], NoReturn], others: list[Channel]) -> tuple[int, Channel]:
    """Fork a process that *run* never leaves; return its pid and this end of the channel whose other end it has.

    :param others: channels that it must not hold open
    :raises OSError: where no process or descriptor can be had
    """
    ours, theirs = Channel.pair()
    pid = os.fork()
    if pid:
        theirs.close()
        return pid, ours
    try:
        for channel in (ours, *others):
            channel.close()
        run(theirs)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(1)


class Keeper:
    """One VM's supervisor; see the module."""

    def __init__(
        self,
        config: VmConfig,
        service: ServiceVm,
        topology: Topology,
        caller: Caller,
        options: Options,
        front: Channel,
        front_pid: int,
    ) -> None:
        self.config, self.service, self.topology, self.options = config, service, topology, options
        self.front, self.front_pid = front, front_pid
        self._host = Host()
        self.caller = caller
        self.model: DeviceModel
        self.machines: Machines
        self.ledger: Ledger
        self.server: control.Server | None = None
        self.records: dict[int, evidence.VcpuRecord] = {}
        self.started = 0.0
        self._grace_until: float | None = None
        self._stopping = False
        self._waiters: list[control.Request] = []
        self._notes: list[str] = []
        self._foreign: dict[int, list[int]] = {}
        self._lost = CpuSet()
        self._offline = CpuSet()
        self._drifts: dict[tuple[int, int], evidence.Drift] = {}
        self._told: set[tuple[int, int]] = set()
        self._final: dict[str, Any] = {}
        self._leftovers = 0
        self._next_look = 0.0
        self._stopped: frozenset[int] = frozenset()
        self._told_stopped = False
        self.isolation = Isolation("affinity", "affinity")
        self._watch: Watch | None = None
        self._cpu_us: int | None = None
        self._occupancy: Occupancy | None = None
        self._occupied: tuple[Occupied, ...] = ()
        self._auditor = Auditor()
        self._orphans_ns: dict[CpuSet, int] = {}
        self._graceful = False

    def run(self) -> NoReturn:
        """Run the VM's whole life and end the process."""
        code = 0
        try:
            self._settle()
            try:
                self._create()
                self._supervise()
            finally:
                self._clean()
            self._report()
        except _Cancelled:
            self.front.send({"event": "cancelled"})
        except HostpartError as error:
            code = 1
            self.front.send({"event": "error", **error.to_json()})
        except OSError as error:
            code, reason = 1, worded(error)
            self.front.send(
                {
                    "event": "error",
                    **reason.to_json(),
                    "problem": f"the VM {self.config.name!r} could not be run: {reason}",
                }
            )
        os._exit(code)

    # -- the process ---------------------------------------------------------------------------------

    def _settle(self) -> None:
        self._wake_r, self._wake_w = ignore_terminal()
        signal.signal(signal.SIGTERM, self._on_term)
        tree.adopt()
        crash.point("keeper.born")

    def _on_term(self, *_: object) -> None:
        self._stopping = True

    # -- creation ------------------------------------------------------------------------------------

    def _create(self) -> None:
        self.ledger = Ledger()
        self.model = DeviceModel(
            self.config, self.service, self.caller, [self.front.fileno(), self._wake_r, self._wake_w]
        )
        self.machines = Machines(self.model, self.records, self._note)
        self.model.attach(Hypervisor(self.topology, Leases(), self.ledger, self.model.boot, self._forget))
        row = VmRow(
            0, self.config.name, 0, self.model.token, boot_id(), "INIT", self.config.vcpus, _guest_text(self.config),
            os.getpid(), start_time(os.getpid()) or 0, self.front_pid, time.time(), log=self.options.log,
            threaded=int(self.config.threaded), sockets="\n".join(self.model.sockets),
        )  # fmt: skip
        # Where the leaf will be is in the ledger before the leaf is there: killed in between, it is found and removed.
        leaf, _ = cgroup.Leaf.find(self.model.token)
        if leaf is not None:
            row = row.replace(leaf=leaf.path)
        self.model.hypervisor.announce(row)
        self._get_pcpus()
        vm = self.model.vm
        self._isolate()
        if self._watch is not None and self._watch.leaf is not None:
            self.model.leaf = self._watch.leaf
        elif leaf is not None and not self.model.threads_process:
            self.model.leaf = None if leaf.make() else leaf  # refused: the tree of processes has to do
        if not self.config.threaded:
            self._withdraw()
        crash.point("keeper.leased")
        self.server = control.Server(self.ledger.directory, self.config.name)
        self.model.close_also(self.server.fileno())
        placement = vm.placement
        self.front.send(
            {
                "event": "created",
                "pcpus": list(placement.pcpus),
                "idle": str(placement.idle),
                "kept": str(CpuSet.of(vm.kept)),
                "why": list(placement.why),
                "isolation": self.isolation.to_json(),
            },
            [*vm.leases.values(), *vm.kept.values()],
        )
        for vcpu_id in range(vm.vcpu_num):
            self.model.vm_create_vcpu(vcpu_id)
        self.model.all_forked()
        crash.point("keeper.forked")
        self.machines.prepare()
        self._await_ready()
        crash.point("keeper.ready")
        for record in self._new_records():
            record.start(evidence.look(record.pid, record.tid))
            self.records[record.tid or record.pid] = record
        self.front.send(
            {
                "event": "ready",
                "vm": self.config.name,
                "vcpus": [
                    {
                        "vcpu": vcpu.vcpu_id,
                        "pcpu": vcpu.pcpu,
                        "pid": vcpu.pid,
                        **({"tid": vcpu.tid} if vcpu.tid else {}),
                    }
                    for _, vcpu in sorted(vm.vcpus.items())
                ],
            }
        )
        # What there is to do while a QEMU starts is done on the VM's own pCPUs, where nothing runs yet.
        self._withdraw()
        if self.options.hold:
            self._await_word()
        self._occupancy = Occupancy([record.pin for record in self.records.values()], self._host)
        whole = [record for record in self.records.values() if record.tid is None]
        self._occupancy.start(self._guest({record.pin: process_ns(record.pid) or 0 for record in whole}))
        self._auditor = Auditor()
        self.started = time.time()
        self.model.vm_start()
        self.model.lock_memory()
        crash.point("keeper.started")

    def _withdraw(self) -> None:
        # The supervisor's own work is the service VM's: it goes where that one stays.
        os.sched_setaffinity(0, self.model.vm.kept or self.topology.usable)

    def _new_records(self) -> list[evidence.VcpuRecord]:
        # In the vCPUs' order. What one process carries is one record, but for a machine, whose threads have one each.
        kinds = {vcpu: part.guest.kind for part in self.model.parts for vcpu in part.vcpus}
        made = []
        for pid, vcpus in self.model.pids.items():
            for group in [[vcpu] for vcpu in vcpus] if pid in self.model.machines else [vcpus]:
                first, pins = group[0], CpuSet.of(vcpu.pcpu for vcpu in group)
                kind = kinds[first.vcpu_id]
                made.append(evidence.VcpuRecord(self.config.name, first.vcpu_id, pins, pid, kind, first.tid or None))
        return made

    def _forget(self) -> None:
        for found in recovery.recover(self.ledger):
            if found.ended:
                self._note(f"ended {len(found.ended)} processes that VM {found.name!r} left when hostpart was killed")
            if found.left:
                pids = " ".join(map(str, found.left))
                raise Failed(
                    f"pid {pids} of the dead VM {found.name!r} is not yours to end",
                    f"have root end it: 'sudo kill -KILL {pids}'",
                )

    def _isolate(self) -> None:
        if self.options.wish.level == "affinity" and not self.ledger.remembers():
            return  # and nothing of the ladder is imported
        from .isolation.watch import Watch

        vm = self.model.vm
        crash.point("keeper.isolating")
        self._watch = Watch(self.ledger, self._host, vm.row, self._note)
        self.isolation = self._watch.begin(self.options.wish)
        self.model.cpuset_procs = self._watch.procs
        self.model.threads, self.model.threads_process = self._watch.threads, self._watch.process
        self.model.threads_leave = self._watch.leave
        crash.point("keeper.isolated")

    def _get_pcpus(self) -> None:
        try:
            self.model.vm_create()
            return
        except DoesNotFit as refusal:
            if self.options.wait_s is None or not self.model.hypervisor.could_ever_fit(self.model.wish()):
                raise
            last: HostpartError = refusal
        line = Line(self.model.hypervisor.leases)
        ahead = line.ahead()
        first = str(Holder.of(ahead[0])) if ahead else ""
        self.front.send({"event": "waiting", "ahead": len(ahead), "first": first, "why": str(last)})
        until = time.monotonic() + self.options.wait_s

        def ready() -> bool:
            nonlocal last
            # What another VM had is this process's to use again when that one has gone.
            self.model.hypervisor.topology = read_topology(self._host)
            try:
                self.model.vm_create()
            except DoesNotFit as refusal:
                last = refusal
                return False
            return True

        if not line.wait(ready, until, self._interrupted):
            if self._stopping or self.front.ended:
                raise _Cancelled
            if isinstance(last, DoesNotFit) and line.behind is not None:
                blocks = (*last.blocks, f"{line.behind} came before and waits still")
                raise DoesNotFit(last.wanted, last.free, blocks, last.fits)
            raise last

    def _interrupted(self) -> bool:
        for message in self.front.receive():
            self._obey(message)
        return self._stopping or self.front.ended

    def _await_ready(self) -> None:
        waiting = set(self.model.pids)
        until = time.monotonic() + _READY_WAIT_S
        by_vcpu = {vcpus[0].vcpu_id: pid for pid, vcpus in self.model.pids.items()}
        poll = self._poller(self.model.status_fd)
        while waiting:
            fds = {fd for fd, _ in poll.poll(100)}
            if self.front.fileno() in fds and self._interrupted():
                raise _Cancelled
            if self.model.status_fd in fds:
                for words in self.model.hear():
                    if words[1] == "failed":
                        raise self.model.refusal_of(words)
                    waiting.discard(by_vcpu[int(words[0])])
            for pid in list(waiting):
                if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                    for words in self.model.hear():
                        if words[1] == "failed":
                            raise self.model.refusal_of(words)
                    raise Failed(
                        f"the worker of VM {self.config.name!r} with pid {pid} was killed before it was ready",
                        "run it again",
                    )
            if self._stopping:
                raise _Cancelled
            if time.monotonic() > until:
                raise Failed(
                    f"{len(waiting)} workers of VM {self.config.name!r} were not ready after {_READY_WAIT_S:g} s",
                    "the host may be overloaded: see 'uptime', and run it again",
                )
        self._await_machines(until)
        for pid in list(self.model.pids):
            if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                raise Failed(
                    f"the worker of VM {self.config.name!r} with pid {pid} was killed before START", "run it again"
                )

    def _await_machines(self, until: float) -> None:
        # Their processes are there, and their guests are stopped until START. Memory that is locked is filled first.
        fill_s = sum(machine.guest.memory_bytes for machine in self.machines.alive()) // _FILLED_PER_S
        until += fill_s
        assert self.server is not None  # noqa: S101 - made in _create
        poll = self._poller(self.server.fileno())
        while not self.machines.ready():
            self.machines.listen(poll)
            self._attend({fd for fd, _ in poll.poll(100)})
            if time.monotonic() > until:
                raise Failed(
                    f"QEMU of VM {self.config.name!r} was not ready after {_READY_WAIT_S + fill_s:g} s",
                    "the host may be overloaded: see 'uptime', and run it again",
                )

    def _await_word(self) -> None:
        assert self.server is not None  # noqa: S101 - made in _create
        poll = self._poller(self.server.fileno())
        self._go = False
        while not self._go:
            self.machines.listen(poll)
            self._attend({fd for fd, _ in poll.poll(1000)})
            self.machines.ready()  # and none has ended
            self.machines.hear()

    def _attend(self, fds: set[int]) -> None:
        # What may come before START.
        if self._wake_r in fds:
            os.read(self._wake_r, 4096)
        if self.server is not None and self.server.fileno() in fds:
            for request in self.server.requests():
                if request.what == "stop":
                    self._stopping = True
                    self._waiters.append(request)
                else:
                    request.refuse(Failed(
                        f"VM {self.config.name!r} starts, and its guest does not run yet",
                        f"try again when it does: 'hostpart ps'; or end it with 'hostpart stop {self.config.name}'",
                    ))  # fmt: skip
        if self._interrupted():
            raise _Cancelled

    def _poller(self, *more: int) -> select.poll:
        poll = select.poll()
        for fd in (self.front.fileno(), self._wake_r, *more):
            poll.register(fd, select.POLLIN)
        return poll

    # -- supervision ---------------------------------------------------------------------------------

    def _supervise(self) -> None:
        assert self.server is not None  # noqa: S101 - made in _create
        poll = self._poller(self.server.fileno())
        status_open = True
        poll.register(self.model.status_fd, select.POLLIN)
        watched = self._watch.files() if self._watch is not None else ()
        for fd in watched:
            poll.register(fd, select.POLLPRI)
        self._next_look = time.monotonic() + PERIOD_S
        self._reap()
        machines = self.machines
        while self.model.alive:
            now = time.monotonic()
            machines.listen(poll)
            deadline = self._next_look if self._grace_until is None else min(self._next_look, self._grace_until)
            fds = {fd for fd, _ in poll.poll(max(0.0, deadline - now) * 1000)}
            machines.hear(fds)
            if self._wake_r in fds:
                os.read(self._wake_r, 4096)
            for fd in fds.intersection(watched):
                os.pread(fd, 4096, 0)  # read, it is silent until the next change
                self._next_look = now
            self._reap()
            self._tell_stops()
            if self.model.status_fd in fds and status_open:
                status_open = bool(self.model.hear())
                if not status_open:
                    poll.unregister(self.model.status_fd)
            if self.front.fileno() in fds:
                for message in self.front.receive():
                    self._obey(message)
                if self.front.ended:
                    return  # _clean ends everything at once
            if self.server.fileno() in fds:
                for request in self.server.requests():
                    self._answer(request)
            if self._stopping and self._grace_until is None:
                self._stop(None)
            now = time.monotonic()
            if self._grace_until is not None and now >= self._grace_until:
                until = machines.quit() if self._graceful else None
                if until is None:
                    return
                self._grace_until = until
            if now >= self._next_look:
                machines.hear()
                machines.kill_late()
                with self._auditor:
                    self._look()
                self._next_look = max(self._next_look + PERIOD_S, time.monotonic() + PERIOD_S / 2)
        if status_open:
            self.model.hear()

    def _reap(self) -> None:
        while True:
            try:
                ended = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if ended is None:
                return
            self._reap_one(ended.si_pid)

    def _tell_stops(self) -> None:
        # The user's shell sees the front: that one stops and goes on with its guest. What came between two stops may
        # have been missed, so each stop is told.
        news = False
        for pid in self.model.alive:
            try:
                found = os.waitid(os.P_PID, pid, os.WSTOPPED | os.WCONTINUED | os.WNOHANG)
            except ChildProcessError:
                continue  # it has ended this instant: the kernel has no such news of a zombie
            if found is not None:
                news = True
                self._stopped = self._stopped - {pid} if found.si_code == os.CLD_CONTINUED else self._stopped | {pid}
        stopped = bool(self.model.alive) and self._stopped.issuperset(self.model.alive) and self._state() == "RUNNING"
        if stopped and news:
            self.front.send({"event": "stopped"})
        elif self._told_stopped and not stopped and os.getppid() == self.front_pid:
            os.kill(self.front_pid, signal.SIGCONT)
        self._told_stopped = stopped

    def _reap_one(self, pid: int) -> None:
        # While it is a zombie its last figures can still be read; wait4 gives the totals and ends that.
        record, machine = self.records.get(pid), self.model.machines.get(pid)
        last = evidence.look(pid) if record else None
        stat = None if record else read_stat(pid)
        _, status, usage = os.wait4(pid, 0)
        if machine is not None:
            status = self.machines.ended(machine, status, started=bool(self.started))
        if record is not None and last is not None:
            record.end(last, usage, status)
        elif stat is not None and machine is None:
            self._count_orphan(stat.processor, _time_ns(usage))
        if pid in self.model.pids:
            self.model.worker_ended(pid, status)

    def _look(self) -> None:
        members = tree.descendants(os.getpid())
        # Kernels before 6.2 give guests other masks while a VM comes or goes.
        quietly(self.ledger.directory, lambda: self._sample(members))
        self._measure(members)
        lost, again, gone = self.model.leases_lost()
        self._lost |= lost
        if again:
            self._note(f"the lease on pCPU {again} was let go by somebody who inherited it, and taken again")
        if gone and not self._stopping:
            # One pCPU carries one vCPU: the one that let go makes room.
            held = self.model.hypervisor.leases.holders(gone)
            who = "; ".join(str(holder) for cpu in gone for holder in held.get(cpu, ())) or "another user"
            self._note(
                f"the lease on pCPU {gone} was let go by a process that inherited it, {who} has it now: the VM is ended"
            )
            self._stop(0.0)
        if self._watch is not None and not self._stopping:
            self._watch.look()
        self._look_at_foreigners({member.pid for member in members})

    def _sample(self, members: Sequence[tree.Member]) -> None:
        rest = {member.pid for member in members}
        astray: list[tuple[evidence.Drift, CpuSet]] = []
        for record in self.records.values():
            if record.tid is None and not record.ended:
                own = tree.below(members, record.pid)
                rest -= {member.pid for member in own}
                record.sample(own)
                if record.drift is not None:
                    astray += [(drift, record.pin) for drift in evidence.find_drifts(own, record.pin)]
        sampled = self.machines.sample(members)
        rest -= sampled.pids
        for drift, _ in sampled.others:
            self._drifts.setdefault((drift.pid, drift.tid), drift)
        astray += [*sampled.vcpus, *sampled.others]
        if self.machines.breaches and self.config.on_drift == "kill":
            self._stop(0.0)
        # Orphans of the guest: whose vCPU they were is not known any more, but the VM's pCPUs they may not leave.
        orphans = [member for member in members if member.pid in rest]
        for drift in evidence.find_drifts(orphans, self.model.pcpus):
            self._drifts.setdefault((drift.pid, drift.tid), drift)
            astray.append((drift, self.model.pcpus))
        self._handle(astray)

    def _measure(self, members: Sequence[tree.Member]) -> None:
        if self._occupancy is None:
            return
        online = CpuSet.parse(self._host.read_text("sys/devices/system/cpu/online"))
        pins = {record.pid: record.pin for record in self.records.values() if record.tid is None}
        guest = self._guest(times([member for member in members if member.pid not in self.model.machines], pins))
        self._occupancy.look(guest, {member.pid for member in members}, online)
        gone_off = (self.model.pcpus - online) | self._occupancy.went_offline
        if gone_off - self._offline:
            self._note(f"pCPU {gone_off - self._offline} went offline under VM {self.config.name!r}")
        self._offline |= gone_off

    def _guest(self, alive_ns: Mapping[CpuSet, int]) -> Guest:
        # How long the guest has run by now: what is alive, what has ended, and the orphans that came here to end.
        own_ns = dict(self._orphans_ns)
        for pin, ran_ns in alive_ns.items():
            own_ns = _plus(own_ns, pin, ran_ns)
        for record in self.records.values():
            if record.tid is not None:
                own_ns = _plus(own_ns, record.pin, record.ran_ns())
            elif record.rusage is not None:
                own_ns = _plus(own_ns, record.pin, _time_ns(record.rusage))
        usage_us = self.model.leaf.cpu_usage_us() if self.model.leaf is not None else None
        forgets = any(record.latest is not None and record.latest.forgets_children for record in self.records.values())
        return Guest(own_ns, None if usage_us is None else usage_us * 1000, not forgets)

    def _count_orphan(self, cpu: int, ran_ns: int) -> None:
        self._orphans_ns = _plus(self._orphans_ns, self._pin_of(cpu), ran_ns)

    def _pin_of(self, cpu: int) -> CpuSet:
        # Whose an orphan was is not known any more, but where it ran is; one that was elsewhere counts for nothing.
        return next((record.pin for record in self.records.values() if cpu in record.pin), CpuSet())

    def _look_at_foreigners(self, ours: set[int]) -> None:
        found = {cpu: set(pids) - ours for cpu, pids in pinned_alone().items() if cpu in self.model.pcpus}
        if any(found.values()):
            # What the guest has forked since it was looked at is its own, and what is gone already was most likely too.
            born = {member.pid for member in tree.descendants(os.getpid())}
            there = pinned_alone()
            found = {cpu: (pids - born).intersection(there.get(cpu, ())) for cpu, pids in found.items()}
            # One of the guest's that has ended keeps its mask until it is reaped, and is below nobody's eyes.
            found = {cpu: {pid for pid in pids if not _ended(pid)} for cpu, pids in found.items()}
        for cpu, pids in found.items():
            known = self._foreign.setdefault(cpu, [])
            new = sorted(pids.difference(known))
            known += new[: max(0, _FOREIGN_TOLD - len(known))]

    def _handle(self, astray: list[tuple[evidence.Drift, CpuSet]]) -> None:
        for drift, pin in astray:
            key = drift.pid, drift.tid
            if key not in self._told:
                self._told.add(key)
                self._note(f"{drift}, not on {pin} alone (on_drift = {self.config.on_drift!r})")
            if self.config.on_drift == "repin":
                # A process's threads all belong to one vCPU, or are QEMU's, each with a place of its own.
                for tid in [drift.tid] if drift.pid in self.model.machines else threads(drift.pid):
                    try:
                        os.sched_setaffinity(tid, pin)
                    except (ProcessLookupError, PermissionError, OSError):
                        continue  # gone, another user's by now, or its pCPU is offline: the next look tells
        if astray and self.config.on_drift == "kill":
            self._stop(0.0)

    def _note(self, text: str) -> None:
        self._notes.append(text)
        self.front.send({"event": "note", "text": text})

    def _obey(self, message: dict[str, Any]) -> None:
        if message["do"] == "start":
            self._go = True
        elif message["do"] == "signal":
            self.model.signal(message["number"])
        elif message["do"] == "stop":
            self._stopping = True
            if self.started:
                self._stop(message["grace_s"], message.get("number", signal.SIGTERM))

    def _stop(self, grace_s: float | None, number: int = signal.SIGTERM) -> None:
        # Without a number of seconds: what is usual, which for a guest operating system is its own power-down's.
        machines = self.machines.alive()
        alone = len(machines) == len(self.model.alive)
        again = self._graceful and bool(machines)
        self._stopping = True
        kills = grace_s == 0
        if grace_s is None:
            usual = [machine.guest.powerdown_s for machine in machines]
            grace_s = max(usual if machines and alone else [_STOP_GRACE_S, *usual])
        if again:
            grace_s = 0.0  # asked twice: the guest has no time any more, QEMU has
        elif not kills:
            self._graceful = True
            self.model.signal(number)
            self._resume_quietly()
            self.model.signal(signal.SIGCONT)  # what a terminal stopped has to run too
            if machines and not self.model.power_down():
                grace_s = 0.0 if alone else min(grace_s, _STOP_GRACE_S)
        until = time.monotonic() + grace_s
        self._grace_until = until if self._grace_until is None else min(until, self._grace_until)

    def _resume_quietly(self) -> None:
        # A guest that is to end has to run for that.
        try:
            self.model.resume()
        except HostpartError:
            pass

    def _answer(self, request: control.Request) -> None:
        try:
            if request.what == "stop":
                self._stop(request.number("grace_s"))
                self._waiters.append(request)  # answered when nothing is left
                return
            if request.what == "pause":
                self.model.pause()
            elif request.what == "resume":
                self.model.resume()
            elif request.what != "show":
                request.refuse(
                    Failed(f"the keeper does not know {request.what!r}", "use the hostpart that started the VM")
                )
                return
            with self._auditor:
                self._look()
                self._occupied = self._occupancy.found() if self._occupancy is not None else ()
            request.reply({"evidence": self._document(), "state": self._state()})
        except HostpartError as error:
            request.refuse(error)

    def _state(self) -> str:
        return next((vcpu.state for vcpu in self.model.vm.vcpus.values() if vcpu.state != "ZOMBIE"), "ZOMBIE")

    # -- the end -------------------------------------------------------------------------------------

    def _clean(self) -> None:
        # Whatever happened: nothing of the guest may be left when the leases are let go.
        model = getattr(self, "model", None)
        if model is None:
            return
        model.cancel()
        self._measure_last()
        self.machines.kill()
        self._finish_tree()
        self._tell_stops()
        self.machines.close()
        self._cpu_us = model.leaf.cpu_usage_us() if model.leaf else None
        # The row is struck out last: as long as there is something to find, it says where.
        if model.leaf is not None and (self._watch is None or model.leaf is not self._watch.leaf):
            model.leaf.remove()  # a partition goes when its VM is out of the ledger: it is missed as long as it is in
        if self._watch is not None:
            self._watch.end()
        if model.vhm.vmid is not None:
            self._final = self._document(time.time())
        if self.server is not None:
            self.server.close()
        crash.point("keeper.ended")
        if model.vhm.vmid is not None:
            model.vm_destroy()
            if model.hypervisor.trouble is not None:
                self._note(f"the VM has ended, but {model.hypervisor.trouble}")
        crash.point("keeper.destroyed")
        for request in self._waiters:
            request.reply({"state": "OFFLINE"})
        until = time.monotonic() + _DRAIN_S
        for log in model.logs:
            log.drain(max(0.0, until - time.monotonic()))
        self.ledger.close()

    def _measure_last(self) -> None:
        # Before what is left of the guest is ended and the host is put back: interrupts come back then.
        if self._occupancy is None or self.front.ended:
            return
        try:
            with self._auditor:
                self._measure(tree.descendants(os.getpid()))
                self._occupied = self._occupancy.found()
        except OSError as error:  # no descriptors, no memory: what is left has to be ended all the same
            self._note(f"the last look at the pCPUs failed: {error.strerror}")

    def _finish_tree(self) -> None:
        # Counted before they are ended: a leaf's end is one write, and then nobody can tell how many there were.
        orderly = not self._stopping and not self.model.alive
        self._leftovers = len(tree.descendants(os.getpid())) if orderly else 0
        survivors = self._kill_round()
        while survivors:
            pids = ", ".join(str(member.pid) for member in survivors)
            self._note(
                f"pid {pids} of VM {self.config.name!r} is not this user's to end; its pCPUs stay leased until it ends"
            )
            while survivors:
                time.sleep(0.5)
                survivors = self._kill_round()

    def _kill_round(self) -> tuple[tree.Member, ...]:
        if self.model.leaf is not None:
            self.model.leaf.kill()
        return tree.end(os.getpid(), self._reap_one).survivors

    def _document(self, ended_s: float | None = None) -> dict[str, Any]:
        return evidence.document(
            version=__version__,
            vm=self.config.name,
            records=list(self.records.values()),
            isolation={**self.isolation.to_json(), **(self._watch.to_json() if self._watch else {})},
            period_s=PERIOD_S,
            started_s=self.started,
            ended_s=ended_s,
            circumstances=evidence.Circumstances(
                lost=self._lost,
                offline=self._offline,
                drifts=tuple(self._drifts.values()),
                foreign=self._foreign,
                leftovers=self._leftovers,
                shares_core=self.model.vm.placement.shares_core,
                breaches=(
                    *(self._watch.breaches if self._watch else ()),
                    *self.machines.breaches,
                ),
                occupied=self._occupied,
                foreign_limit=self.config.foreign_limit,
                auditor=self._auditor,
            ),
            cpu_us=self._cpu_us if ended_s else self.model.leaf.cpu_usage_us() if self.model.leaf else None,
            notes=self._notes,
            machines=[machine.to_json() for machine in self.model.machines.values() if machine.seats],
        )

    def _report(self) -> None:
        self.front.send(
            {
                "event": "ended",
                "statuses": [self.model.statuses.get(vcpu, 0) for vcpu in sorted(self.model.statuses)],
                "exec_errors": self.model.exec_errors,
                "evidence": self._final,
            }
        )


def _guest_text(config: VmConfig) -> str:
    text = " + ".join(_one_guest_text(guest) for guest in config.guests)
    # An argument may be any bytes; the ledger holds text only.
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _one_guest_text(guest: config.Guest) -> str:
    if guest.qemu is not None:
        return " ".join(("qemu", guest.qemu.kernel, *(disk.path for disk in guest.qemu.disks)))
    return f"python {guest.target}" if guest.kind == "python" else " ".join(guest.argv)


def _time_ns(usage: struct_rusage) -> int:
    return round((usage.ru_utime + usage.ru_stime) * 1e9)


def _plus(times: Mapping[CpuSet, int], pin: CpuSet, ran_ns: int) -> dict[CpuSet, int]:
    return {**times, pin: times.get(pin, 0) + ran_ns}


def _ended(pid: int) -> bool:
    stat = read_stat(pid)
    return stat is None or stat.dead
