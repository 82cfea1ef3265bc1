"""The device model: launches one user VM, vCPU by vCPU, and answers for it until it is destroyed.

It runs in the VM's keeper (:mod:`hostpart.keeper`, which owns the process side: signals, sockets, time). Every vCPU
goes one way: :meth:`DeviceModel.vm_create_vcpu`, ``ioctl``, hypercall, allocator's pCPU, forked worker.
"""

from __future__ import annotations

import errno
import os
import signal

from workers import vcpu as worker
from workers.guest import Command, Python

from . import hypercall as hc
from . import lease, memlock, tree
from .allocator import POLICIES, SMT_MODES
from .cpuset import CpuSet
from .errors import Failed, HostpartError, NotPermitted, UsageError
from .hypervisor import KINDS
from .vhm import Vhm

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import NoReturn

    from workers.log import WorkerLog

    from .cgroup import Leaf
    from .config import Guest, Part, ServiceVm, VmConfig
    from .hypervisor import Hypervisor, Vcpu, Vm
    from .qemu.machine import Machine

__all__ = ["Caller", "DeviceModel", "refused"]

_SCHEDULERS = {
    "other": os.SCHED_OTHER,
    "batch": os.SCHED_BATCH,
    "idle": os.SCHED_IDLE,
    "fifo": os.SCHED_FIFO,
    "rr": os.SCHED_RR,
}
_RELOCK_WAIT_S = 1.0  # the keeper has more to do than to wait


class Caller:
    """What the guests inherit from whoever called hostpart, noted by the front before it changes anything.

    :ivar pgrp: the job's process group, None where there is no job (detached)
    :ivar mask: blocked signals
    :ivar ignored: ignored signals, without those that Python ignores of itself
    :ivar stdin_fd: descriptor for vCPU 0's standard input, None to leave it; the other vCPUs read /dev/null
    :ivar stdout_fd: descriptor for the guests' standard output, None to leave it; so for *stderr_fd*
    """

    def __init__(self) -> None:
        self.pgrp: int | None = os.getpgrp()
        self.mask = frozenset(signal.pthread_sigmask(signal.SIG_BLOCK, ()))
        self.ignored = worker.dispositions()[0] - {signal.SIGPIPE, signal.SIGXFSZ}
        self.stdin_fd: int | None = None
        self.stdout_fd: int | None = None
        self.stderr_fd: int | None = None
        self.environ: Mapping[str, str] = dict(os.environ)


class DeviceModel:
    """One VM, from its configuration to its destruction.

    :param config: the VM as it was asked for
    :param service: what the service VM keeps
    :param hypervisor: made with this object's :meth:`boot` as its ``boot``
    :param caller: what the guests inherit
    :param close_fds: descriptors of the keeper that no worker may hold open
    :ivar pids: worker's pid to the vCPUs it carries (one, or all of an ``smp`` guest's and of a machine's)
    :ivar machines: those of the workers that are QEMU, by pid
    :ivar threads: the file that takes a vCPU which is a thread into the VM's cpuset; empty where it has none
    :ivar threads_process: the file that takes the thread's process to where that one has to be first
    :ivar threads_leave: the file that takes a thread which is no vCPU's out of the VM's cpuset
    :ivar parts: which guest is on which vCPUs, once the first worker is forked
    :ivar statuses: wait status of each vCPU that has ended
    """

    def __init__(self, config: VmConfig, service: ServiceVm, caller: Caller, close_fds: Sequence[int]) -> None:
        self.config, self.service, self.caller = config, service, caller
        self.hypervisor: Hypervisor
        self.vhm: Vhm
        self.token = os.urandom(16).hex()
        self.pids: dict[int, list[Vcpu]] = {}
        self.statuses: dict[int, int] = {}
        self.leaf: Leaf | None = None
        self.cpuset_procs: str = ""
        self.threads: str = ""
        self.threads_process: str = ""
        self.threads_leave: str = ""
        self.logs: list[WorkerLog] = []
        self.frozen: tree.Frozen | None = None
        self.exec_errors: dict[int, int] = {}
        self._close_fds = list(close_fds)
        self._ids = _ids(config)
        self.parts: tuple[Part, ...] = ()
        self.machines: dict[int, Machine] = {}
        self._ready_machines = self._make_machines()
        if config.mlock and any(one.kind in ("command", "smp") for one in config.guests) and not memlock.SUPPORTED:
            raise UsageError(
                f"locking a command's memory is not known how to do on {os.uname().machine}",
                "have the command call mlockall(2) itself, or use a python guest",
            )
        self._null = -1
        # A machine is there before its guest runs: it does not wait for START, it has one of its own.
        self._machine_start_r, fd = os.pipe2(os.O_CLOEXEC)
        os.write(fd, b"S" * len(self._ready_machines))
        os.close(fd)
        self._status_r, self._status_w = os.pipe2(os.O_CLOEXEC)
        self._start_r, self._start_w = os.pipe2(os.O_CLOEXEC)
        self._said = b""

    @property
    def vm(self) -> Vm:
        """The hypervisor's object for this VM."""
        assert self.vhm.vmid is not None  # noqa: S101 - callers have created it
        return self.hypervisor.vms[self.vhm.vmid]

    @property
    def pcpus(self) -> CpuSet:
        """All pCPUs that the VM's vCPUs are bound to."""
        return CpuSet.of(self.vm.placement.pcpus)

    def attach(self, hypervisor: Hypervisor) -> None:
        """Open the VHM device of *hypervisor*."""
        self.hypervisor = hypervisor
        self.vhm = Vhm(hypervisor)

    def close_also(self, fd: int) -> None:
        """Name another descriptor of the keeper that no worker may hold open."""
        self._close_fds.append(fd)

    def wish(self) -> hc.CreateVm:
        """Return the request that ``IC_CREATE_VM`` carries."""
        config, keep = self.config, tuple(self.service.keep_cpus)
        return hc.CreateVm(
            config.vcpus,
            bytes.fromhex(self.token),
            POLICIES.index(config.policy),
            SMT_MODES.index(config.smt),
            KINDS.index(config.kind),
            config.pcpus,
            tuple(self.service.reserve),
            keep,
            self.service.keep,
        )

    def vm_create(self) -> None:
        """Create the VM: all its pCPUs leased, or none.

        :raises HostpartError: why not
        """
        result = self.vhm.ioctl(hc.IC_CREATE_VM, self.wish().pack())
        if result < 0:
            raise self.explain(result, "IC_CREATE_VM")

    def vm_create_vcpu(self, vcpu_id: int) -> int:
        """Create one vCPU and return the pCPU (Linux's number) it was bound to.

        :raises HostpartError: why not
        """
        buffer = hc.CreateVcpu(vcpu_id).pack()
        result = self.vhm.ioctl(hc.IC_CREATE_VCPU, buffer)
        if result < 0:
            raise self.explain(result, "IC_CREATE_VCPU")
        return hc.CreateVcpu.unpack(bytes(buffer)).pcpu_id

    def vm_call(self, request: int, name: str) -> None:
        """Make one of the ioctls that take no buffer.

        :raises HostpartError: why not
        """
        result = self.vhm.ioctl(request)
        if result < 0:
            raise self.explain(result, name)

    def explain(self, result: int, call: str) -> HostpartError:
        """Return the sentence for a negated errno."""
        return self.hypervisor.refusal or Failed(
            f"{call} for VM {self.config.name!r} failed: {os.strerror(-result)} "
            f"({errno.errorcode.get(-result, -result)})",
            f"run 'hostpart show {self.config.name}' to see its state",
        )

    # -- workers -------------------------------------------------------------------------------------

    def _make_machines(self) -> list[Machine]:
        # Whatever they need is looked for before anything is created.
        made = []
        for part in self.config.parts(self.config.vcpus):
            guest = part.guest
            if guest.qemu is not None:
                from .qemu.machine import Machine

                folder = os.path.join(os.getcwd(), guest.cwd or "")
                made.append(Machine(self.config.name, guest.qemu, part.first, folder, dict(guest.env)))
        return made

    @property
    def sockets(self) -> list[str]:
        """The paths that machines which are not forked yet will listen at."""
        return [machine.socket_path for machine in self._ready_machines if machine.socket_path]

    def boot(self, vm: Vm, vcpu: Vcpu) -> int:
        """Start the worker of one vCPU and return its pid; called by the hypervisor's ``create_vcpu``.

        An ``smp`` guest is one process over all its pCPUs, and so is a machine: the first vCPU's worker carries the
        others. A machine's process stays on the pCPUs that the service VM keeps; its vCPUs' threads leave those later.
        """
        self.parts = self.parts or self.config.parts(vm.vcpu_num)
        part = next(part for part in self.parts if vcpu.vcpu_id in part.vcpus)
        if part.guest.shared and vcpu.vcpu_id != part.first:
            pid = vm.vcpus[part.first].pid
            self.pids[pid].append(vcpu)
            return pid
        pcpus = vm.placement.pcpus[part.first : part.first + part.count] if part.guest.shared else (vcpu.pcpu,)
        machine = self._ready_machines.pop(0) if part.guest.qemu is not None else None
        stdin_fd, stdout_fd = self._stdin(vcpu.vcpu_id), self.caller.stdout_fd
        if machine is not None:
            stdin_fd, stdout_fd = machine.stdio(
                0 if stdin_fd is None else stdin_fd, 1 if stdout_fd is None else stdout_fd
            )
        log, others = self._new_log(vcpu), list(self.logs)
        order = worker.Order(
            self.config.name,
            vcpu.vcpu_id,
            frozenset(pcpus) if machine is None else self._emulator_pcpus(vm),
            self._guest(part.guest) if machine is None else self._machine(machine, vm, pcpus),
            environ=self._environ(vm, vcpu, part.guest, pcpus),
            status_fd=self._status_w,
            start_fd=self._start_r if machine is None else self._machine_start_r,
            lease_fds=[vm.leases[pcpu] for pcpu in sorted(pcpus)],
            close_fds=[*self._close_fds, self._start_w, self._status_r, *self._of_machines()],
            pgrp=self.caller.pgrp,
            session=machine is not None,
            stdin_fd=stdin_fd,
            stdout_fd=stdout_fd,
            stderr_fd=self.caller.stderr_fd if machine is None else machine.stderr_fd,
            mask=self.caller.mask,
            ignored=self.caller.ignored,
            enter=self._enter(machine is not None),
            cwd=part.guest.cwd,
            ids=self._ids,
            # Of a machine these are its vCPU threads' alone.
            scheduler=self._scheduler() if machine is None else None,
            nice=self.config.nice if machine is None else None,
            mlock=self.config.mlock and machine is None,
            mems=frozenset(self.config.mems) or None,
            log=(lambda: log.send(others)) if log else None,
        )
        pid = worker.fork(order)
        if log:
            log.forked()
            self.logs.append(log)
        self.pids[pid] = [vcpu]
        if machine is not None:
            machine.forked(pid, 2 if self.caller.stderr_fd is None else self.caller.stderr_fd)
            self.machines[pid] = machine
        return pid

    def _of_machines(self) -> list[int]:
        # What is open for machines, but for the one that is being booted.
        there = (*self._ready_machines, *self.machines.values())
        return [fd for machine in there for fd in machine.descriptors()]

    def _enter(self, machine: bool) -> list[str]:
        paths = [self.leaf.procs_path if self.leaf else "", self.cpuset_procs, self.threads_process]
        # A machine's threads enter one by one, and only those that are vCPUs.
        return [path for path in (*paths, "" if machine else self.threads) if path]

    @staticmethod
    def _emulator_pcpus(vm: Vm) -> frozenset[int]:
        if not vm.kept:
            raise Failed(
                f"the VM {vm.row.name!r} has every pCPU there is, and none is left for QEMU's own threads",
                "give it fewer vCPUs, or leave one of the pCPUs out",
            )
        return frozenset(vm.kept)

    def _machine(self, machine: Machine, vm: Vm, pcpus: Sequence[int]) -> Command:
        kept = CpuSet.of(vm.kept)
        argv = machine.argv(self.hypervisor.topology, pcpus, kept, self.config.mems, mlock=self.config.mlock)
        return Command(argv, machine.inherited)

    def _guest(self, guest: Guest) -> Callable[[worker.Order], NoReturn]:
        return Python(guest.target) if guest.kind == "python" else Command(guest.argv)

    def find_threads(self) -> bool:
        """Take a step towards READY of the machines: their vCPU threads are found and pinned; whether all are.

        :raises HostpartError: why not
        """
        done = True
        for pid, machine in self.machines.items():
            if machine.seats:
                continue
            if not machine.find_threads():
                done = False
                continue
            machine.pin(self.threads, self._scheduler(), self.config.nice)
            for vcpu, seat in zip(self.pids[pid], machine.seats, strict=True):
                self.hypervisor.set_thread(self.vm, vcpu, seat.tid)
        return done

    def _new_log(self, vcpu: Vcpu) -> WorkerLog | None:
        import sys

        logging = sys.modules.get("logging")
        if logging is None or not logging.getLogger().handlers:
            return None  # no level is enabled
        from workers.log import WorkerLog

        try:
            return WorkerLog(f"{self.config.name}/vcpu{vcpu.vcpu_id} pCPU {vcpu.pcpu}")
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise
            raise Failed(
                f"the workers' log records need semaphores in /dev/shm: {error.strerror}",
                "see 'ls -ld /dev/shm', which has mode 1777 where all is well, or run it without -v",
            ) from None

    def _environ(self, vm: Vm, vcpu: Vcpu, guest: Guest, pcpus: Sequence[int]) -> dict[str, str]:
        environ = {**self.caller.environ, **dict(guest.env)}
        if self._ids and self.config.user is not None:
            environ |= _home(self._ids[0])
        environ |= {
            "HOSTPART_VM": self.config.name,
            "HOSTPART_VCPU": str(vcpu.vcpu_id),
            "HOSTPART_VCPUS": str(vm.vcpu_num),
            "HOSTPART_PCPU": str(CpuSet.of(pcpus)) if guest.shared else str(vcpu.pcpu),
            "HOSTPART_RUN": self.token,
        }
        if guest.kind == "smp":
            environ["OMP_PLACES"] = ",".join(f"{{{pcpu}}}" for pcpu in pcpus)
            environ["OMP_PROC_BIND"] = "true"
            environ["GOMP_CPU_AFFINITY"] = " ".join(map(str, pcpus))
        return environ

    def _stdin(self, vcpu_id: int) -> int | None:
        if vcpu_id == 0:
            return self.caller.stdin_fd
        if self._null < 0:
            self._null = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        return self._null

    def _scheduler(self) -> tuple[int, int] | None:
        if self.config.sched == "other" and not self.config.priority:
            return None
        return _SCHEDULERS[self.config.sched], self.config.priority

    def all_forked(self) -> None:
        """Say that no worker will be forked any more; log receivers may start."""
        os.close(self._status_w)
        self._status_w = -1
        for log in self.logs:
            log.receive()

    @property
    def status_fd(self) -> int:
        """Where the workers' lines come from."""
        return self._status_r

    def hear(self) -> list[list[str]]:
        """Read what workers have said since the last time: lists of words; empty at end of file."""
        self._said += os.read(self._status_r, 1 << 16)
        *lines, self._said = self._said.split(b"\n")
        heard = [line.decode().split() for line in lines]
        for words in heard:
            if words[1] == "exec":
                self.exec_errors[int(words[0])] = int(words[2])
        return heard

    def refusal_of(self, words: list[str]) -> HostpartError:
        """Word a worker's ``failed`` line."""
        vcpu = self.vm.vcpus[int(words[0])]
        return refused(self.config, vcpu.vcpu_id, vcpu.pcpu, words[2], int(words[3]))

    def vm_start(self) -> None:
        """Let the guests run: all workers are READY."""
        self.vm_call(hc.IC_START_VM, "IC_START_VM")
        for machine in self.machines.values():
            machine.start()
        os.write(self._start_w, b"S" * (len(self.pids) - len(self.machines)))
        os.close(self._start_w)
        os.close(self._start_r)
        self._start_w = -1

    def lock_memory(self) -> None:
        """Lock the memory of commands that were started with ``mlock``, before their first instruction.

        :raises HostpartError: where the kernel refuses; none of their instructions has run in that case
        """
        if not self.config.mlock:
            return
        python = {vcpu for part in self.parts if part.guest.kind == "python" for vcpu in part.vcpus}
        for pid, vcpus in self.pids.items():
            if pid in self.machines or vcpus[0].vcpu_id in python:
                continue  # these have locked their own
            number = memlock.lock_at_exec(pid)
            if number:
                os.kill(pid, signal.SIGKILL)
                raise refused(self.config, vcpus[0].vcpu_id, vcpus[0].pcpu, "mlock", number)

    def cancel(self) -> None:
        """Let workers that wait for START go: end of file tells them."""
        if self._start_w >= 0:
            os.close(self._start_w)
            self._start_w = -1

    # -- life ----------------------------------------------------------------------------------------

    @property
    def alive(self) -> list[int]:
        """Pids of the workers that have not been reaped."""
        return [pid for pid, vcpus in self.pids.items() if vcpus[0].vcpu_id not in self.statuses]

    def signal(self, number: int) -> None:
        """Send a signal to every worker that is no machine; they are this process's children, so no pid can have been
        recycled."""
        for pid in self.alive:
            if pid in self.machines:
                continue  # what is meant for programs would end QEMU at once
            try:
                os.kill(pid, number)
            except (ProcessLookupError, PermissionError):
                continue

    def pause(self) -> None:
        """Stop every process of the guest: none runs an instruction until :meth:`resume`.

        :raises HostpartError: where some process could not be stopped (it then runs on, all of it)
        """
        self.vm_call(hc.IC_PAUSE_VM, "IC_PAUSE_VM")
        # A machine's clock stops with its vCPUs. One that does not answer is stopped as every other process is.
        paused = [pid for pid, machine in self.machines.items() if pid in self.alive and machine.pause()]
        if self.leaf is not None:
            if self._freeze_leaf(self.leaf):
                return
            self.leaf.thaw()
        self.frozen = tree.freeze(os.getpid(), skip=paused)
        if not self.frozen.holds:
            loose = ", ".join(f"pid {member.pid}" for member in self.frozen.loose) or "something"
            self.resume()
            raise Failed(
                f"{loose} of VM {self.config.name!r} could not be stopped, so the VM runs on",
                "try again; a set-uid program can be stopped by root only: start the VM as root, with --user",
            )

    def _freeze_leaf(self, leaf: Leaf) -> bool:
        # A guest of the same user may have written itself out of the leaf: what is put back freezes as it enters.
        for _ in range(20):
            if not leaf.freeze():
                return False
            inside = leaf.procs()
            outside = [member.pid for member in tree.descendants(os.getpid()) if member.pid not in inside]
            if not outside:
                return True
            for pid in outside:
                leaf.enter(pid)
        return False

    def resume(self) -> None:
        """Let the guest run again; what was stopped before the pause stays stopped, but for a guest of QEMU's that
        somebody else has stopped.

        :raises HostpartError: where it does not run (it is paused then still), or was not stopped
        """
        machines = [(pid, machine) for pid, machine in self.machines.items() if pid in self.alive]
        halted = any(vcpu.state == "RUNNING" for vcpu in self.vm.vcpus.values()) and any(
            machine.halted for _, machine in machines
        )
        if not halted:
            self.vm_call(hc.IC_START_VM, "IC_START_VM")
        if self.frozen is not None:
            tree.thaw(self.frozen.stopped)
            self.frozen = None
        elif self.leaf is not None:
            self.leaf.thaw()
        silent = [pid for pid, machine in machines if not machine.resume()]
        if silent:
            if not halted:
                self.vm_call(hc.IC_PAUSE_VM, "IC_PAUSE_VM")
            raise Failed(
                f"QEMU of VM {self.config.name!r} (pid {silent[0]}) does not let its guest go on",
                f"try again, or end it with 'hostpart stop {self.config.name}'",
            )

    def power_down(self) -> bool:
        """Press the power buttons of the machines; whether there is a guest that may heed that."""
        pressed = [machine.power_down() for pid, machine in self.machines.items() if pid in self.alive]
        return any(pressed)

    def worker_ended(self, pid: int, status: int) -> None:
        """Say that the worker *pid* was reaped with wait status *status*."""
        for vcpu in self.pids[pid]:
            self.statuses[vcpu.vcpu_id] = status
            self.hypervisor.vcpu_ended(self.vm, vcpu)

    def leases_lost(self) -> tuple[CpuSet, CpuSet, CpuSet]:
        """Return the pCPUs whose lease somebody let go (``flock -u`` on an inherited descriptor): all, those that are
        taken again, and those that somebody else has now. What is neither is tried again at the next look."""
        lost = [pcpu for pcpu, fd in self.vm.leases.items() if not lease.is_locked(fd)]
        if not lost:
            return CpuSet(), CpuSet(), CpuSet()
        again: list[int] = []
        try:
            # Under the allocator's lock: others' looks take what is free for a moment.
            with self.hypervisor.leases.lock(_RELOCK_WAIT_S):
                again = [pcpu for pcpu in lost if lease.relock(self.vm.leases[pcpu])]
        except lease.AllocatorBusy:
            return CpuSet.of(lost), CpuSet(), CpuSet()
        return CpuSet.of(lost), CpuSet.of(again), CpuSet.of(lost) - CpuSet.of(again)

    def vm_destroy(self) -> None:
        """Destroy the VM once all its workers have ended: vCPUs unbound, pCPUs freed, the ledger's rows struck out."""
        for vcpu in list(self.vm.vcpus.values()):
            if vcpu.state != "ZOMBIE":
                self.hypervisor.vcpu_ended(self.vm, vcpu)
        self.vm_call(hc.IC_DESTROY_VM, "IC_DESTROY_VM")


def _ids(config: VmConfig) -> tuple[int, int, list[int]] | None:
    # Looked up before anything is created, so that a misspelt name changes nothing.
    if config.user is None and config.group is None:
        return None
    import grp
    import pwd

    uid, gid, groups = os.getuid(), os.getgid(), os.getgroups()
    try:
        if config.user is not None:
            entry = pwd.getpwuid(int(config.user)) if config.user.isdigit() else pwd.getpwnam(config.user)
            uid, gid = entry.pw_uid, entry.pw_gid
            groups = os.getgrouplist(entry.pw_name, gid)
    except KeyError:
        if not (config.user or "").isdigit():
            raise UsageError(f"there is no user {config.user!r}", "see 'getent passwd'") from None
        if config.group is None:
            # Its group would stay the caller's, and that is root's.
            raise UsageError(
                f"user {config.user} has no entry, so its group is not known", "give its group too, with --group"
            ) from None
        uid = int(config.user or 0)
        groups = []
    try:
        if config.group is not None:
            gid = int(config.group) if config.group.isdigit() else grp.getgrnam(config.group).gr_gid
            if config.user is None:
                groups = [gid]
    except KeyError:
        raise UsageError(f"there is no group {config.group!r}", "see 'getent group'") from None
    if os.geteuid() != 0 and (uid, gid) != (os.getuid(), os.getgid()):
        raise NotPermitted(
            f"becoming user {config.user or uid}, group {config.group or gid} needs root",
            "run it with sudo, or without --user and --group",
        )
    if os.geteuid() != 0:
        return None  # it is who the caller is already, and setgroups(2) is root's
    return uid, gid, groups


def _home(uid: int) -> dict[str, str]:
    import pwd

    try:
        entry = pwd.getpwuid(uid)
    except KeyError:
        return {}
    return {"HOME": entry.pw_dir, "USER": entry.pw_name, "LOGNAME": entry.pw_name, "SHELL": entry.pw_shell or "/bin/sh"}


def refused(config: VmConfig, vcpu_id: int, pcpu: int, stage: str, number: int) -> HostpartError:
    """Word what the kernel refused a worker before START.

    :param stage: one of :data:`workers.vcpu.STAGES`
    :param number: the errno
    """
    why = f"{os.strerror(number)} ({errno.errorcode.get(number, number)})"
    who = f"vCPU {vcpu_id} of VM {config.name!r}"
    if stage == "pin":
        return Failed(
            f"the kernel refused to pin {who} to pCPU {pcpu}: {why}; no cpuset of its has it, or it is offline",
            "see 'grep Cpus_allowed_list /proc/self/status' and 'hostpart topology' for the pCPUs there are",
        )
    if stage == "sched":
        asked = f"{config.sched}:{config.priority}" if config.priority else config.sched
        return NotPermitted(
            f"the kernel refused --sched {asked} for {who}: {why}",
            "run it with sudo, or allow it with 'ulimit -r 99' (rtprio in /etc/security/limits.conf)",
        )
    if stage == "nice":
        return NotPermitted(
            f"the kernel refused --nice {config.nice} for {who}: {why}",
            "a value below the caller's needs root or 'ulimit -e' (nice in /etc/security/limits.conf)",
        )
    if stage == "mems":
        return Failed(
            f"the kernel refused to bind the memory of {who} to NUMA node {config.mems}: {why}",
            "see 'cat /sys/devices/system/node/has_memory' and 'grep Mems_allowed_list /proc/self/status' for the nodes"
            " there are; leave --mems away where it is none of them, or not x86-64 or arm64",
        )
    if stage == "mlock":
        return NotPermitted(
            f"the kernel refused to lock the memory of {who}: {why}",
            "raise the limit with 'ulimit -l unlimited' (memlock in /etc/security/limits.conf), or run it with sudo",
        )
    if stage == "user":
        return NotPermitted(f"{who} cannot become user {config.user}, group {config.group}: {why}", "run it with sudo")
    if stage == "cwd":
        return UsageError(
            f"{who} cannot start in {config.guest.cwd!r}: {why}", "name a directory that its user may enter"
        )
    return Failed(f"{who} failed at {stage!r}: {why}", "run it again with -v to see how far it came")
