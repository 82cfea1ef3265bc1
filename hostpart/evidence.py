"""What a run can show for itself, read back from the kernel: looks at each vCPU, a verdict, a document.

A *look* is one reading of a vCPU's process. There is one at START, one at the end while the process
is a zombie that can still be read, and between them *samples*, which go over everything the vCPU has
forked and every thread of it. What the kernel does not tell is ``None``, never 0; each figure says
what it covers: the main ``thread``, the ``process``, or the ``tree`` (the process and those of its
descendants that were waited for, or everything that was in the VM's cgroup).

The rules are plain: ``broken`` if something was seen that must not be, ``tainted`` if it could not be
ruled out or something foreign was in the way, else ``held``. When to look, what else is known of the
host (:class:`Circumstances`) and where the document goes is left to the caller;
``evidence.schema.json`` beside this file describes it.
"""

from __future__ import annotations

import errno
import os
import time

from . import occupancy, procfs
from .cpuset import CpuSet
from .host import Host
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence
    from resource import struct_rusage
    from typing import Any

    from .auditor import Auditor
    from .occupancy import Occupied
    from .tree import Member

    Resting = dict[tuple[int, int], int]  # thread id and start time: how often it had been scheduled in

__all__ = [
    "FOREIGN_LIMIT",
    "Circumstances",
    "Drift",
    "Look",
    "VcpuRecord",
    "Verdict",
    "document",
    "find_drifts",
    "look",
    "utc",
    "verdict",
]

# A look is late when it comes this many periods, and this many seconds, after the one before.
_LATE_PERIODS, _LATE_S = 5, 0.5
_PIDS_TOLD = 5  # a reason is a sentence
_TOLD = 10  # foreign tasks, and interrupts, of one pCPU: the weightiest
FOREIGN_LIMIT = 1.0  # percent of a pCPU's time that may go to others before it taints


class Look(Value):
    """One reading of one process; ``None``: the kernel did not tell, or the process was gone.

    :ivar mono_s: ``CLOCK_MONOTONIC`` at the look
    :ivar allowed: the main thread's mask as stored (Linux CPU numbers)
    :ivar processor: the CPU the main thread runs on, or ran on last
    :ivar run_ns: the main thread's time on a CPU since it was forked
    :ivar wait_ns: the main thread's time runnable but not running, since it was forked
    :ivar migrations: how often the main thread was moved to another CPU since it was forked
    :ivar voluntary: the main thread's switches because it waited
    :ivar involuntary: the main thread's switches because something else was to run
    :ivar minor_faults: of the process since it was forked, ended threads included
    :ivar major_faults: likewise
    :ivar user_s: likewise, as is *system_s*
    :ivar threads: how many the process has
    :ivar start: when the process started, in clock ticks since boot; 0 where it was gone
    :ivar comm: the kernel's name of the main thread
    :ivar mems: the NUMA nodes that its memory may come from
    :ivar forgets_children: whether nobody is told how long its children ran
    """

    mono_s: float
    allowed: CpuSet | None = None
    processor: int | None = None
    run_ns: int | None = None
    wait_ns: int | None = None
    migrations: int | None = None
    voluntary: int | None = None
    involuntary: int | None = None
    minor_faults: int | None = None
    major_faults: int | None = None
    user_s: float | None = None
    system_s: float | None = None
    threads: int | None = None
    start: int = 0
    comm: str = "?"
    mems: CpuSet | None = None
    forgets_children: bool | None = None


class Drift(Value):
    """A task of a guest that was seen where it must not be.

    :ivar at_s: ``CLOCK_REALTIME`` of the look
    :ivar start: when the thread started, in clock ticks since boot
    :ivar pin: the pCPUs (Linux numbers) it was to stay on
    :ivar what: ``"allowed"``: its mask goes beyond the pin; ``"ran"``: it ran on a CPU outside the pin
    :ivar cpus: that mask, or that CPU
    """

    at_s: float
    pid: int
    tid: int
    start: int
    comm: str
    pin: CpuSet
    what: str
    cpus: CpuSet

    def repin(self) -> bool:
        """Put the thread back on its pin; return whether the kernel did so."""
        now = procfs.read_stat(self.pid, self.tid)
        if now is None or now.start != self.start:
            return False
        try:
            os.sched_setaffinity(self.tid, self.pin)
        except (ProcessLookupError, PermissionError):
            return False
        except OSError as error:
            if error.errno != errno.EINVAL:  # none of these CPUs is online, or a cpuset allows none
                raise
            return False
        return True

    def __str__(self) -> str:
        task = f"{self.comm!r} (pid {self.pid}" + (f", thread {self.tid})" if self.tid != self.pid else ")")
        return f"{task} {'was allowed on CPUs' if self.what == 'allowed' else 'ran on CPU'} {self.cpus}"


class Circumstances(Value):
    """What the caller knows beyond the looks, for one VM.

    :ivar lost: pCPUs whose lease was not held all the time
    :ivar offline: pCPUs of the VM that went offline
    :ivar drifts: of processes that no vCPU's process is above any more (orphans)
    :ivar foreign: by pCPU of the VM, the pids of foreign processes that may run there only
    :ivar leftovers: how many of the guest's processes outlived its vCPUs and had to be ended
    :ivar shares_core: pCPUs of the VM whose core the service VM shares
    :ivar breaches: when the kernel did not keep others off, a sentence each
    :ivar occupied: what each pCPU of the VM did beside the guest
    :ivar foreign_limit: percent of a pCPU's time that may go to others, and to each kind of interruption
    :ivar auditor: the looks' own account; ``None``: it was not kept
    """

    lost: CpuSet = CpuSet()
    offline: CpuSet = CpuSet()
    drifts: tuple[Drift, ...] = ()
    foreign: Mapping[int, Sequence[int]] = {}
    leftovers: int = 0
    shares_core: CpuSet = CpuSet()
    breaches: tuple[str, ...] = ()
    occupied: tuple[Occupied, ...] = ()
    foreign_limit: float = FOREIGN_LIMIT
    auditor: Auditor | None = None


class Verdict(Value):
    """``"held"``, ``"tainted"`` or ``"broken"``, and why: sentences, the weightiest first."""

    word: str
    reasons: tuple[str, ...] = ()


class VcpuRecord:
    """What was seen of one vCPU's process so far, or of its thread where it is one of a process that has others.

    :param pin: the pCPUs (Linux numbers) it may use: one, but for a guest of kind ``smp``
    :param kind: what runs on it: ``command``, ``python``, ``smp`` or ``qemu``
    :param tid: the thread that it is; None: it is the process, and all that it forks
    :ivar resting: threads that were put there in their sleep, from :func:`resting`: where they ran last was before it,
        for as long as they have not run again
    :ivar pages: how many pages of its memory are on each NUMA node, where somebody has asked; see
        :func:`hostpart.isolation.mems.held`
    """

    def __init__(
        self, vm: str, vcpu: int, pin: CpuSet, pid: int, kind: str = "command", tid: int | None = None
    ) -> None:
        self.vm, self.vcpu, self.pin, self.pid, self.kind, self.tid = vm, vcpu, pin, pid, kind, tid
        self.first: Look | None = None
        self.latest: Look | None = None
        self.ended = False
        self.rusage: struct_rusage | None = None
        self.status: int | None = None
        self.looks = 0
        self.tasks = 0
        self.longest_gap_s = 0.0
        self.seen = CpuSet()
        self.drift: Drift | None = None
        self.resting: Resting = {}
        self.pages: Mapping[int, int] | None = None
        self._last_s: float | None = None
        self._new: list[Drift] = []
        self._drifting: set[tuple[int, int]] = set()

    def start(self, seen: Look) -> None:
        """Take the look at START: figures count from here."""
        self.first = seen
        self.update(seen)

    def update(self, seen: Look) -> None:
        """Take a look in between, which brings the figures up to date."""
        self.latest = seen
        self._looked(seen.mono_s)
        self.tasks = max(self.tasks, (seen.threads or 0) if self.tid is None else 1)
        processor, tid = seen.processor, self.pid if self.tid is None else self.tid
        if processor is not None and processor not in self.pin and _rests(self.resting, self.pid, tid, seen.start):
            processor = None
        if processor is not None:
            self.seen |= CpuSet.of([processor])
        found = _drift_of(self.pid, tid, seen.start, seen.comm, seen.allowed, processor, self.pin)
        if found:
            self._drifted([found])
            self._drifting.add((found.tid, found.start))

    def sample(self, members: Iterable[Member], mono_s: float | None = None) -> None:
        """Look at every thread of the vCPU's process and of *members*, which are below it; or at its one thread.

        Only the first drift is kept. A task that ends meanwhile is passed over.

        :param mono_s: ``CLOCK_MONOTONIC`` of the look; now by default
        """
        self._looked(time.monotonic() if mono_s is None else mono_s)
        pids = {self.pid, *(member.pid for member in members)} if self.tid is None else {self.pid}
        only = None if self.tid is None else {self.tid}
        tasks, seen, found = _go_over(sorted(pids), self.pin, self.resting, only)
        self.tasks = max(self.tasks, tasks)
        self.seen |= seen
        self._drifted(found)
        self._drifting = {(drift.tid, drift.start) for drift in found}

    def new_drifts(self) -> list[Drift]:
        """Return what has drifted since this was last asked, less what had drifted at the look before already."""
        new, self._new = self._new, []
        return new

    def end(self, seen: Look, rusage: struct_rusage | None, status: int | None) -> None:
        """Take the look at the end, under ``waitid(WNOWAIT)``, and what ``wait4`` said after it.

        :param status: the wait status (not the exit code)
        """
        self.update(seen)
        self.ended, self.rusage, self.status = True, rusage, status

    def ran_ns(self) -> int:
        """Return how long its process, or its thread, has run by now; one that has ended, as far as it was seen."""
        now = procfs.schedstat(self.pid, self.tid)
        return now[0] if now is not None else (self.latest and self.latest.run_ns) or 0

    @property
    def migrations(self) -> int | None:
        """How often the main thread was moved to another CPU since START."""
        return self._since("migrations")

    def _since(self, name: str) -> int | None:
        if self.first is None or self.latest is None:
            return None
        begin, now = getattr(self.first, name), getattr(self.latest, name)
        return None if begin is None or now is None else now - begin

    def _drifted(self, found: list[Drift]) -> None:
        self._new += [drift for drift in found if (drift.tid, drift.start) not in self._drifting]
        if self.drift is None and found:
            self.drift = found[0]

    def _looked(self, mono_s: float) -> None:
        if self._last_s is not None:
            self.longest_gap_s = max(self.longest_gap_s, mono_s - self._last_s)
        self._last_s = mono_s
        self.looks += 1

    def _figures(self) -> dict[str, Any]:
        last, usage = self.latest or Look(mono_s=0.0), self.rusage
        covers = "tree" if usage else "process" if self.tid is None else "thread"
        totals: dict[str, float | None] = {
            "user_s": usage.ru_utime if usage else last.user_s,
            "system_s": usage.ru_stime if usage else last.system_s,
            "minor_faults": usage.ru_minflt if usage else last.minor_faults,
            "major_faults": usage.ru_majflt if usage else last.major_faults,
        }
        thread = {
            "migrations": "migrations",
            "voluntary_switches": "voluntary",
            "involuntary_switches": "involuntary",
            "run_ns": "run_ns",
            "wait_ns": "wait_ns",
        }
        return {
            **{name: {"value": self._since(field), "covers": "thread"} for name, field in thread.items()},
            **{name: {"value": _rounded(value), "covers": covers} for name, value in totals.items()},
        }

    def _document(self) -> dict[str, Any]:
        mask = {"start": self.first and self.first.allowed, "end": self.latest and self.latest.allowed}
        mems = {"start": self.first and self.first.mems, "end": self.latest and self.latest.mems}
        return {
            "vcpu": self.vcpu,
            "pcpu": self.pin.lowest if len(self.pin) == 1 else None,
            "pcpus": str(self.pin),
            "pid": self.pid,
            "tid": self.tid,
            "kind": self.kind,
            "affinity": {when: None if cpus is None else str(cpus) for when, cpus in mask.items()},
            "cpus_seen": str(self.seen) if self.seen else None,
            "mems": {
                **{when: None if nodes is None else str(nodes) for when, nodes in mems.items()},
                "pages": None if self.pages is None else {str(node): count for node, count in self.pages.items()},
            },
            "looks": self.looks,
            "longest_gap_s": _rounded(self.longest_gap_s),
            "tasks_seen": self.tasks or None,
            **self._figures(),
            "drift": None if self.drift is None else _drift_document(self.drift),
            "exit": _exit(self.status),
        }


def look(pid: int, tid: int | None = None) -> Look:
    """Read what the kernel tells of process *pid* now, a zombie included, or of its one thread *tid*; four files."""
    now = time.monotonic()
    stat, status = procfs.read_stat(pid, tid), procfs.read_status(pid, tid)
    if stat is None or status is None:
        return Look(mono_s=now)
    run_ns, wait_ns, _ = procfs.schedstat(pid, tid) or (None, None, None)
    tick = os.sysconf("SC_CLK_TCK")
    return Look(
        mono_s=now,
        allowed=status.allowed,
        processor=stat.processor,
        run_ns=run_ns,
        wait_ns=wait_ns,
        migrations=procfs.migrations(pid, tid),
        voluntary=status.voluntary,
        involuntary=status.involuntary,
        minor_faults=stat.minflt,
        major_faults=stat.majflt,
        user_s=stat.utime / tick,
        system_s=stat.stime / tick,
        threads=stat.threads,
        start=stat.start,
        comm=stat.comm,
        mems=status.mems,
        forgets_children=status.forgets_children,
    )


def find_drifts(members: Iterable[Member], pin: CpuSet, skip: Collection[int] = ()) -> list[Drift]:
    """Return every thread of *members* that may run, or ran, outside *pin*.

    :param skip: threads that are not looked at
    """
    drifts = _go_over([member.pid for member in members], pin)[2]
    return [drift for drift in drifts if drift.tid not in skip] if skip else drifts


def verdict(
    records: Sequence[VcpuRecord], period_s: float | None, circumstances: Circumstances, *, live: bool = False
) -> Verdict:
    """Judge one VM's records.

    :param period_s: how far apart the samples were meant to be; ``None``: there were none
    :param live: whether the VM still runs, so that no end can have been seen
    """
    broken: list[str] = []
    tainted: list[str] = []
    if circumstances.lost:
        broken.append(f"the lease on pCPU {circumstances.lost} was not held all the time")
    if circumstances.offline:
        broken.append(f"pCPU {circumstances.offline} went offline")
    broken += circumstances.breaches
    for record in records:
        begin = record.first.allowed if record.first else None
        # A wider mask is a drift, below; a narrower one at the end is a guest that binds its threads itself (OpenMP).
        if begin is not None and begin != record.pin and begin <= record.pin:
            broken.append(f"{_name(record)} was on CPUs {begin} at its start, not on {record.pin}")
    broken += [f"{_name(record)}: {record.drift}" for record in records if record.drift]
    broken += [f"an orphan of the guest: {drift}" for drift in circumstances.drifts]
    broken += [
        f"{_name(record)} was moved to another CPU {_times(record.migrations)}"
        for record in records
        if len(record.pin) == 1 and record.migrations
    ]
    for record in records:
        unseen = [
            *(["start"] if record.first is None or record.first.allowed is None else []),
            *(
                ["end"]
                if not live and (not record.ended or record.latest is None or record.latest.allowed is None)
                else []
            ),
        ]
        if unseen:
            tainted.append(f"{_name(record)} could not be looked at at its {' and its '.join(unseen)}")
        if period_s is not None and record.longest_gap_s > _LATE_PERIODS * period_s + _LATE_S:
            gap = f"{record.longest_gap_s:.1f} s, where a look every {period_s:g} s was meant"
            tainted.append(f"{_name(record)} was not looked at for {gap}")
    pcpus = CpuSet.of(one.pcpu for one in circumstances.occupied)
    if circumstances.auditor is not None and circumstances.auditor.seen & pcpus:
        tainted.append(f"the auditor itself ran on pCPU {circumstances.auditor.seen & pcpus}")
    tainted += occupancy.taints(circumstances.occupied, circumstances.foreign_limit / 100)
    tainted += [
        f"foreign processes may run on pCPU {cpu} only: pid {_some(pids)}"
        for cpu, pids in sorted(circumstances.foreign.items())
        if pids
    ]
    if count := circumstances.leftovers:
        tainted.append(f"{count} process{'es' * (count > 1)} of the guest outlived its vCPUs and had to be ended")
    if circumstances.shares_core:
        tainted.append(f"pCPU {circumstances.shares_core} shares a core with the host")
    word = "broken" if broken else "tainted" if tainted else "held"
    return Verdict(word, (*broken, *tainted))


def document(
    *,
    version: str,
    vm: str,
    records: Sequence[VcpuRecord],
    isolation: Mapping[str, Any],
    period_s: float | None,
    started_s: float,
    ended_s: float | None,
    circumstances: Circumstances | None = None,
    cpu_us: int | None = None,
    notes: Sequence[str] = (),
    machines: Sequence[Mapping[str, Any]] = (),
    error: Mapping[str, Any] | None = None,
    host: Host | None = None,
) -> dict[str, Any]:
    """Return the evidence of one VM as what JSON can hold; its schema is ``evidence.schema.json``.

    :param version: hostpart's
    :param isolation: the level asked for and reached, as the caller words it
    :param period_s: how far apart the samples were meant to be; ``None``: there were none
    :param started_s: ``CLOCK_REALTIME``; *ended_s* likewise, ``None`` for a VM that still runs
    :param cpu_us: what the VM's cgroup counted
    :param notes: what happened meanwhile that a reader should know, a sentence each
    :param machines: of each guest operating system, what :meth:`hostpart.qemu.machine.Machine.to_json` says
    :param error: why there was no run, or no whole one; without records there is no verdict then
    """
    host, circumstances = host or Host(), circumstances or Circumstances()
    judged = verdict(records, period_s, circumstances, live=ended_s is None)
    nothing = error is not None and not records
    try:
        boot_id = host.read_text("proc/sys/kernel/random/boot_id").strip()
    except OSError:
        boot_id = None
    return {
        "schema": 1,
        "hostpart": version,
        "boot_id": boot_id,
        "kernel": os.uname().release,
        "vm": vm,
        "isolation": dict(isolation),
        "sampling_period_s": period_s,
        "started": utc(started_s),
        "ended": None if ended_s is None else utc(ended_s),
        "verdict": None if nothing else judged.word,
        "reasons": [] if nothing else list(judged.reasons),
        "notes": list(notes),
        "vcpus": [record._document() for record in records],
        "pcpus": [_pcpu_document(one) for one in circumstances.occupied],
        "foreign_limit_percent": circumstances.foreign_limit,
        "auditor": circumstances.auditor and circumstances.auditor.to_json(),
        "cpu_us": {"value": cpu_us, "covers": "tree"},
        "unseen": _unseen(period_s, records, str(isolation.get("reached"))),
        **({"machines": [dict(machine) for machine in machines]} if machines else {}),
        **({} if error is None else {"error": dict(error)}),
    }


def resting(pids: Iterable[int]) -> Resting:
    """Return how often each thread of *pids* has been scheduled in by now."""
    return {
        (tid, stat.start): _slices(pid, tid)
        for pid in pids
        for tid in procfs.threads(pid)
        if (stat := procfs.read_stat(pid, tid)) is not None and stat.state != "R"
    }


def _slices(pid: int, tid: int) -> int:
    return (procfs.schedstat(pid, tid) or (0, 0, 0))[2]


def _rests(resting: Resting, pid: int, tid: int, start: int | None) -> bool:
    slices = resting.get((tid, start or 0))
    return slices is not None and slices == _slices(pid, tid)


def _go_over(
    pids: Iterable[int], pin: CpuSet, resting: Resting | None = None, only: Collection[int] | None = None
) -> tuple[int, CpuSet, list[Drift]]:
    # Threads looked at; CPUs they run on or ran on last; those outside the pin.
    tasks, mask = 0, 0
    drifts: list[Drift] = []
    for pid in pids:
        stat = procfs.read_stat(pid)
        if stat is None or stat.dead:
            continue
        for tid in only if only is not None else [pid] if stat.threads == 1 else procfs.threads(pid):
            thread = stat if stat.threads == 1 and tid == pid else procfs.read_stat(pid, tid)
            if thread is None or thread.state in "ZXx":
                continue
            try:
                # A hundredth of the time of reading status; what it leaves out are CPUs that are offline.
                cpus = CpuSet.of(os.sched_getaffinity(tid))
            except (ProcessLookupError, PermissionError):
                continue
            tasks += 1
            processor: int | None = thread.processor
            if resting and thread.processor not in pin and _rests(resting, pid, tid, thread.start):
                processor = None
            else:
                mask |= 1 << thread.processor
            if found := _drift_of(pid, tid, thread.start, thread.comm, cpus, processor, pin):
                drifts.append(found)
    return tasks, CpuSet(mask), drifts


def _drift_of(
    pid: int, tid: int, start: int, comm: str, cpus: CpuSet | None, processor: int | None, pin: CpuSet
) -> Drift | None:
    if cpus is not None and not cpus <= pin:
        what, where = "allowed", cpus
    elif processor is not None and processor not in pin:
        # Also where the mask is right: it was on another CPU after its pin, and has not run since it was put back.
        what, where = "ran", CpuSet.of([processor])
    else:
        return None
    return Drift(time.time(), pid, tid, start, comm, pin, what, where)


def _drift_document(drift: Drift) -> dict[str, Any]:
    return {
        "at": utc(drift.at_s),
        "pid": drift.pid,
        "tid": drift.tid,
        "comm": drift.comm,
        "what": drift.what,
        "cpus": str(drift.cpus),
    }


def _exit(status: int | None) -> dict[str, int] | None:
    if status is None:
        return None
    code = os.waitstatus_to_exitcode(status)
    return {"code": code} if code >= 0 else {"signal": -code}


def _pcpu_document(one: Occupied) -> dict[str, Any]:
    lines, rate = one.interrupts, one.khz
    return {
        "pcpu": one.pcpu,
        "interval_s": round(one.interval_ns / 1e9, 6),
        "other_ns": {
            "value": one.other_ns,
            "over": str(one.over),
            "resolution_ns": one.RESOLUTION_NS,
            "guest_from": one.guest_from,
        },
        "tasks_ns": {
            "value": one.tasks_ns,
            "over": str(one.over),
            "resolution_ns": one.tasks_resolution_ns,
            "from": one.tasks_from,
        },
        "irq_ns": one.irq_ns,
        "softirq_ns": one.softirq_ns,
        "steal_ns": one.steal_ns,
        "foreign_tasks": [
            {name: value for name, value in task.asdict().items() if name != "pcpu"} for task in one.tasks[:_TOLD]
        ],
        "foreign_tasks_more": max(0, len(one.tasks) - _TOLD),
        "interrupts": None
        if lines is None
        else [{"source": line.source, "name": line.name, "count": line.counts[one.pcpu]} for line in lines[:_TOLD]],
        "interrupts_more": None if lines is None else max(0, len(lines) - _TOLD),
        "khz": None if rate is None else {"min": rate[0], "max": rate[1]},
        "events": [{"at": utc(event.at_s), "online": event.online} for event in one.events],
    }


def _unseen(period_s: float | None, records: Sequence[VcpuRecord], level: str) -> str:
    counted = all(record.migrations is not None for record in records) and bool(records)
    apart = f"Looks were meant to be {period_s:g} s apart" if period_s else "There were looks at the start and end only"
    text = f"{apart}: a task whose mask was changed and changed back between two looks is not seen"
    text += "; of each main thread the kernel's count of moves covers the time between" if counted else ""
    if level in ("cpuset", "full"):
        text += f". Isolation {level!r} leaves little to miss: the kernel refuses others' tasks the VM's pCPUs, and the"
        return (
            text
            + " VM's tasks all others; between the VM's own pCPUs they can still move, and the kernel's threads stay."
        )
    text += f". At isolation {level!r} nothing prevents that: 'cpuset' does, where the kernel refuses such a mask. "
    return (
        text + "Foreign tasks are named where they are found at a look; what came and went between counts as time only."
    )


def _some(pids: Sequence[int]) -> str:
    more = len(pids) - _PIDS_TOLD
    return ", ".join(map(str, pids[:_PIDS_TOLD])) + (f" and {more} more" if more > 0 else "")


def _name(record: VcpuRecord) -> str:
    return f"vCPU {record.vcpu}"


def _times(count: int | None) -> str:
    return "once" if count == 1 else f"{count} times"


def _rounded(value: float | None) -> float | None:
    return round(value, 6) if isinstance(value, float) else value


def utc(at_s: float) -> str:
    """Return ``CLOCK_REALTIME`` *at_s* as the documents have it: ``2026-11-25T21:00:00.123Z``."""
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at_s))}.{int(at_s % 1 * 1000):03d}Z"
