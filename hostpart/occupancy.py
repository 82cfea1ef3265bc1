"""What a VM's pCPUs did beside its guest: time by kind, tasks by name, interrupts by source, clock rate, hotplug.

All of it is what the kernel counts per CPU, as a difference between START and the latest look, less the guest's own
time. Two of its clocks are used, since neither says all:

* *other* is the time that a pCPU was neither idle nor busy with the guest: tasks, interrupts, steal, whatever it was.
  ``/proc/stat`` counts idle time as it passes, so nothing that runs between two ticks escapes.
* *tasks* is the time that tasks other than the guest's ran: from ``/proc/schedstat`` to the nanosecond, and where
  the kernel has none from the ticks of ``/proc/stat``, which sample.

Who it was costs a walk over ``/proc``. That is made only when *other* has grown since the last one, and so rarely that
all walks together stay below a twentieth of one CPU.

How much is too much is for whoever judges to say (:func:`taints` words it); the guest's own time is for the caller to
know.

Source: proc_stat(5); proc_interrupts(5); in the kernel's tree Documentation/scheduler/sched-stats.rst,
Documentation/admin-guide/pm/cpufreq.rst, and of hotplug lib/kobject_uevent.c.
"""

from __future__ import annotations

import _socket
import errno
import os
import time

from . import procfs
from .cpuset import CpuSet
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from .host import Host
    from .tree import Member

__all__ = [
    "Event",
    "ForeignTask",
    "Guest",
    "Interrupts",
    "Occupancy",
    "Occupied",
    "Ticks",
    "parse_interrupts",
    "parse_schedstat",
    "parse_stat",
    "process_ns",
    "taints",
    "times",
]

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")  # USER_HZ, in which /proc/stat and /proc/PID/stat count
_SCHEDSTAT_VERSIONS = (b"15", b"16", b"17")  # the line of a CPU is the same in these; of others it is not known
# Below these nothing is judged: both ends of an interval are cut to ticks, idle time and iowait each.
_FLOOR_NS = {"schedstat": 10_000_000, "stat": 30_000_000}
_SEARCH_NS = 20_000_000  # other time since the last search that makes the next one worth while
_SEARCH_REST = 20  # times what a search has cost, until the next
_CLOCK_RATE_S = 1.0  # between two readings of a clock rate: before Linux 5.18 each sends the pCPU an interrupt
_KNOWN = 10_000  # tasks remembered between two searches, and named at all
_SAID = 3  # of these in a sentence
_EVENTS = 100
# This kernel has no such file, hides it from this user, or its CPU is offline.
_NOT_TOLD = frozenset(
    {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV, errno.ENXIO, errno.EBUSY, errno.EINVAL}
)
_NETLINK_KOBJECT_UEVENT, _KERNELS = 15, 1  # linux/netlink.h; its own events' group
_INTERRUPT_NS = 10_000  # what one is taken to cost: its handler, and the caches after it


class Ticks(Value):
    """One CPU's line of ``/proc/stat``, in clock ticks since boot; time of virtual machines on it is in *tasks*."""

    tasks: int
    idle: int
    irq: int
    softirq: int
    steal: int


class Interrupts(Value):
    """One line of ``/proc/interrupts``.

    :ivar source: the interrupt's number, or the architecture's name for its own: ``LOC``, ``RES``, ``IPI0``
    :ivar name: as the kernel describes it: the handlers' names for a number
    :ivar counts: by CPU (Linux number), those that are online
    """

    source: str
    name: str
    counts: dict[int, int]

    @property
    def device(self) -> bool:
        """Whether it is a device's: not one CPU's word to another, and not a timer of the CPU's own."""
        return self.source.isdecimal() and not self.name.endswith("timer")


class ForeignTask(Value):
    """A task that is not the guest's and was found on one of its pCPUs.

    :ivar pcpu: where it was found last
    :ivar seen: at how many searches it was there and had run
    :ivar run_ns: how much it ran between searches that found it there: elsewhere too, if it moved meanwhile; 0 where
        there was one search only
    """

    pcpu: int
    pid: int
    tid: int
    comm: str
    kernel: bool
    seen: int = 0
    run_ns: int = 0

    def __str__(self) -> str:
        who = "kernel thread" if self.kernel else f"pid {self.pid}"
        who += f", thread {self.tid}" if self.tid != self.pid else ""
        return f"{self.comm!r} ({who})"


class Event(Value):
    """A pCPU that went offline or came back, as a look found it.

    :ivar at_s: ``CLOCK_REALTIME`` of the look
    """

    at_s: float
    pcpu: int
    online: bool


class Guest(Value):
    """How long the guest has run, by then.

    :ivar own_ns: by the set of pCPUs that a vCPU's processes have: their time, as they themselves count it
    :ivar total_ns: all of it, as the VM's cgroup counts; None where there is none
    :ivar whole: whether *own_ns* has everything: the time of a child that nobody waits for is lost
    """

    own_ns: Mapping[CpuSet, int]
    total_ns: int | None = None
    whole: bool = True


class Occupied(Value):
    """What one pCPU did since START; ``None``: the kernel does not tell.

    :ivar over: the pCPUs that *other_ns* and *tasks_ns* are of: more than this one where the guest's own time is
        known for several together only
    :ivar guest_from: ``"tree"``: its processes' own clocks; ``"cgroup"``
    :ivar tasks_from: ``"schedstat"`` or ``"stat"``
    :ivar interrupts: of this pCPU, the most frequent first
    :ivar tasks: found on *over*, those that ran longest first
    :ivar khz: the lowest and the highest clock rate that was read
    """

    RESOLUTION_NS = _TICK_NS  # of all but *tasks_ns*

    pcpu: int
    over: CpuSet
    interval_ns: int
    other_ns: int | None = None
    tasks_ns: int | None = None
    guest_from: str = "tree"
    tasks_from: str = "stat"
    irq_ns: int | None = None
    softirq_ns: int | None = None
    steal_ns: int | None = None
    interrupts: tuple[Interrupts, ...] | None = None
    tasks: tuple[ForeignTask, ...] = ()
    khz: tuple[int, int] | None = None
    events: tuple[Event, ...] = ()

    @property
    def tasks_resolution_ns(self) -> int:
        """The unit in which *tasks_ns* is known."""
        return _TICK_NS if self.tasks_from == "stat" else 1000 if self.guest_from == "cgroup" else 1


def parse_stat(data: bytes) -> dict[int, Ticks]:
    """Return, by CPU (Linux number), what a ``/proc/stat`` says; CPUs that are offline are not in it."""
    found = {}
    for line in data.split(b"\n"):
        if not line.startswith(b"cpu"):
            break  # they come first; interrupts, which can be a long line, after them
        name, *fields = line.split()
        if name != b"cpu":
            user, nice, system, idle, iowait, irq, softirq, steal = map(int, fields[:8])
            found[int(name[3:])] = Ticks(user + nice + system, idle + iowait, irq, softirq, steal)
    return found


def parse_schedstat(data: bytes) -> dict[int, int]:
    """Return, by CPU (Linux number), how long tasks ran there since boot, in ns; empty for a version not known.

    What runs this moment is in it only up to when it was last switched to. Interrupts count as time of the task that
    they hit.
    """
    first, *lines = data.split(b"\n")
    if first.split() not in [[b"version", version] for version in _SCHEDSTAT_VERSIONS]:
        return {}
    fields = (line.split() for line in lines if line.startswith(b"cpu"))
    return {int(line[0][3:]): int(line[7]) for line in fields}


def parse_interrupts(data: bytes, cpus: CpuSet | None = None) -> list[Interrupts]:
    """Return the lines of a ``/proc/interrupts``; those that count for no CPU (``ERR``, ``MIS``) are left out.

    :param cpus: count for these only; a large machine has a thousand lines of as many columns
    """
    first, *lines = data.decode("utf-8", "backslashreplace").split("\n")
    columns = [int(word[3:]) for word in first.split()]
    wanted = [(at, cpu) for at, cpu in enumerate(columns) if cpus is None or cpu in cpus]
    found = []
    for line in lines:
        source, _, rest = line.partition(":")
        words = rest.split(None, len(columns))
        if len(words) <= len(columns):
            continue  # every other line has a description
        name = words[-1].strip()
        if source.strip().isdecimal():
            name = name.rpartition("  ")[2]  # after the chip and its pin: "IO-APIC   2-edge      timer"
        found.append(Interrupts(source.strip(), name, {cpu: int(words[at]) for at, cpu in wanted}))
    return found


def process_ns(pid: int) -> int | None:
    """Return how long process *pid* has run, its ended threads included, its children not; None if it is gone.

    One system call, and anyone's to make: clock_getcpuclockid(3).
    """
    try:
        return time.clock_gettime_ns((~pid << 3) | 2)
    except OSError:
        return None


def times(members: Sequence[Member], pins: Mapping[int, CpuSet]) -> dict[CpuSet, int]:
    """Return how long *members* have run, with the descendants that they have waited for, in ns by pCPUs.

    :param members: each after its parent, as :func:`hostpart.tree.descendants` gives them
    :param pins: the pCPUs of the vCPUs' processes, by pid; members below none of them (orphans) are counted where they
        ran last
    """
    found: dict[CpuSet, int] = {}
    seats: dict[int, CpuSet] = {}
    for member in members:
        pin = pins.get(member.pid) or seats.get(member.parent)
        if pin is None:
            stat = procfs.read_stat(member.pid)
            pin = next((one for one in pins.values() if stat is not None and stat.processor in one), None)
        if pin is not None:
            seats[member.pid] = pin
            ran_ns = (process_ns(member.pid) or 0) + member.reaped * _TICK_NS
            found[pin] = found.get(pin, 0) + ran_ns
    return found


class _Reading(Value):
    # Kept as the kernel gave it: there is no time to parse before START.
    mono_ns: int
    stat: bytes
    schedstat: bytes

    @staticmethod
    def take(host: Host) -> _Reading:
        return _Reading(time.monotonic_ns(), _read(host, "proc/stat"), _read(host, "proc/schedstat"))


class _Hotplug:
    # The kernel's own word on CPUs that go and come, also where both lie between two looks. Closed to nobody, but told
    # to the initial network namespace only: elsewhere there is what the looks find.
    def __init__(self) -> None:
        kind = _socket.SOCK_DGRAM | _socket.SOCK_NONBLOCK | _socket.SOCK_CLOEXEC
        self._socket = None
        try:
            self._socket = _socket.socket(_socket.AF_NETLINK, kind, _NETLINK_KOBJECT_UEVENT)
            self._socket.bind((0, _KERNELS))
        except OSError:  # a sandbox without netlink
            self._socket = None

    def events(self) -> list[tuple[int, bool]]:
        # CPU and whether it came online, in order, since this was last asked.
        found: list[tuple[int, bool]] = []
        while self._socket is not None:
            try:
                data, sender = self._socket.recvfrom(8192)
            except BlockingIOError:
                break
            except OSError:  # so much has happened that the kernel had to drop some: what is left is still true
                continue
            action, _, path = data.partition(b"\0")[0].partition(b"@/devices/system/cpu/cpu")
            if sender[0] == 0 and path.isdigit() and action in (b"online", b"offline"):
                found.append((int(path), action == b"online"))
        return found


class Occupancy:
    """One VM's pCPUs, looked at from START on.

    :param pins: the set of pCPUs (Linux numbers) of each of its vCPUs' processes
    :ivar searches: how often tasks were searched for
    """

    def __init__(self, pins: Iterable[CpuSet], host: Host) -> None:
        self.pins = list(pins)
        self.pcpus = CpuSet.of(cpu for pin in self.pins for cpu in pin)
        self.searches = 0
        self._host = host
        self._tasks: dict[tuple[int, int], ForeignTask] = {}
        self._before: dict[tuple[int, int], int] | None = None
        self._searched_ns = 0  # other time at the last search
        self._search_next = 0.0
        self._khz: dict[int, tuple[int, int]] = {}
        self._khz_next = 0.0
        self._events: list[Event] = []
        self._online = self.pcpus

    def start(self, guest: Guest) -> None:
        """Take the reading that all figures count from."""
        self._hotplug = _Hotplug()
        self._first_interrupts = _read(self._host, "proc/interrupts")
        self._started_ticks = time.clock_gettime(time.CLOCK_BOOTTIME) * os.sysconf("SC_CLK_TCK")
        self._guest0 = self._guest = guest
        self._first = self._latest = _Reading.take(self._host)
        self._began: dict[int, Ticks] | None = None
        self._rated = self._read_rates(self.pcpus)

    def look(self, guest: Guest, own: Collection[int], online: CpuSet, *, search: bool | None = None) -> None:
        """Bring the figures up to date; search for tasks if there is reason to.

        :param own: pids of the guest's processes, which are not foreign
        :param online: the CPUs (Linux numbers) that are online
        :param search: whether to, instead
        """
        self._latest, self._guest = _Reading.take(self._host), guest
        self._note_online(online)
        if time.monotonic() >= self._khz_next:
            self._rated = self._read_rates(self._rated)
        if search is None:
            search = self._other_ns() - self._searched_ns > _SEARCH_NS and time.monotonic() >= self._search_next
        if search:
            self.search(own)

    @property
    def went_offline(self) -> CpuSet:
        """The pCPUs that were offline at some time."""
        return CpuSet.of(event.pcpu for event in self._events if not event.online)

    def found(self) -> tuple[Occupied, ...]:
        """Return what each pCPU did up to the latest look, in ascending order."""
        now, begin = self._ticks()
        interval_ns = self._latest.mono_ns - self._first.mono_ns
        there = self._interrupts()
        found = {}
        for over, own_ns, guest_from in self._shares():
            other_ns, tasks_ns, tasks_from = self._beside(over, own_ns, begin, now)
            tasks = tuple(task for task in self._tasks.values() if task.pcpu in over)
            tasks = tuple(sorted(tasks, key=lambda task: (-task.run_ns, -task.seen, task.tid)))
            for cpu in over:
                kinds = {}
                if cpu in begin and cpu in now:
                    for kind in ("irq", "softirq", "steal"):
                        kinds[f"{kind}_ns"] = _since(getattr(begin[cpu], kind), getattr(now[cpu], kind)) * _TICK_NS
                found[cpu] = Occupied(
                    pcpu=cpu, over=over, interval_ns=interval_ns, other_ns=other_ns, tasks_ns=tasks_ns,
                    guest_from=guest_from, tasks_from=tasks_from, **kinds, tasks=tasks,
                    interrupts=None if there is None else _of_cpu(there, cpu), khz=self._khz.get(cpu),
                    events=tuple(event for event in self._events if event.pcpu == cpu),
                )  # fmt: skip
        return tuple(one for _, one in sorted(found.items()))

    # -- time ----------------------------------------------------------------------------------------------

    def _ticks(self) -> tuple[dict[int, Ticks], dict[int, Ticks]]:
        # Those of the latest reading, and of the first.
        if self._began is None:
            self._began = parse_stat(self._first.stat)
        return parse_stat(self._latest.stat), self._began

    def _shares(self) -> list[tuple[CpuSet, int | None, str]]:
        # Sets of pCPUs, and how long the guest ran on each.
        own = {pin: _since(self._guest0.own_ns.get(pin, 0), self._guest.own_ns.get(pin, 0)) for pin in self.pins}
        if self._guest0.total_ns is not None and self._guest.total_ns is not None:
            total_ns = _since(self._guest0.total_ns, self._guest.total_ns)
            # The cgroup knows of children that nobody waited for, but not where they ran.
            missing_ns = total_ns - sum(own.values())
            if len(own) == 1 or missing_ns > max(_FLOOR_NS["stat"], total_ns // 100):
                return [(self.pcpus, max(total_ns, sum(own.values())), "cgroup")]
        elif not self._guest.whole:
            return [(pin, None, "tree") for pin in own]
        return [(pin, own_ns, "tree") for pin, own_ns in own.items()]

    def _beside(
        self, over: CpuSet, own_ns: int | None, begin: Mapping[int, Ticks], now: Mapping[int, Ticks]
    ) -> tuple[int | None, int | None, str]:
        ran, ran_now = parse_schedstat(self._first.schedstat), parse_schedstat(self._latest.schedstat)
        exact = all(cpu in ran and cpu in ran_now for cpu in over)
        source = "schedstat" if exact else "stat"
        away = any(event.pcpu in over for event in self._events)  # neither idle nor busy is counted while offline
        if own_ns is None or away or not all(cpu in begin and cpu in now for cpu in over):
            return None, None, source
        interval_ns = self._latest.mono_ns - self._first.mono_ns
        idle_ns = sum(_since(begin[cpu].idle, now[cpu].idle) for cpu in over) * _TICK_NS
        other_ns = max(0, interval_ns * len(over) - idle_ns - own_ns)
        if exact:
            # What the machine below has taken away is in it, and never in the guest's own time.
            taken_ns = sum(_since(begin[cpu].steal, now[cpu].steal) for cpu in over) * _TICK_NS
            tasks_ns = sum(_since(ran[cpu], ran_now[cpu]) for cpu in over) - own_ns - taken_ns
        else:
            tasks_ns = sum(_since(begin[cpu].tasks, now[cpu].tasks) for cpu in over) * _TICK_NS - own_ns
        return other_ns, min(other_ns, max(0, tasks_ns)), source

    def _other_ns(self) -> int:
        # At most: for whether to search.
        now, begin = self._ticks()
        guest = sum(own_ns or 0 for _, own_ns, _ in self._shares())
        idle = sum(_since(begin[cpu].idle, now[cpu].idle) for cpu in self.pcpus if cpu in begin and cpu in now)
        cpus = sum(cpu in begin and cpu in now for cpu in self.pcpus)
        return (self._latest.mono_ns - self._first.mono_ns) * cpus - idle * _TICK_NS - guest

    # -- tasks ---------------------------------------------------------------------------------------------

    def search(self, own: Collection[int]) -> None:
        """Go over all tasks of the host for those that are on the pCPUs and not among the processes *own*."""
        begin_ns = time.thread_time_ns()
        self.searches += 1
        self._searched_ns = self._other_ns()
        before = self._before
        now: dict[tuple[int, int], int] = {}
        for pid in procfs.processes():
            if pid in own or self._is_elsewhere(pid):
                continue
            main = procfs.read_stat(pid)
            if main is None or main.dead:
                continue
            for tid in [pid] if main.threads == 1 else procfs.threads(pid):
                stat = main if main.threads == 1 else procfs.read_stat(pid, tid)
                if stat is None or len(now) >= _KNOWN:
                    continue
                key = tid, stat.start
                now[key] = ran_ns = _ran_ns(pid, stat, alone=main.threads == 1)
                if stat.processor not in self.pcpus:
                    continue
                # One that began after START had run for nothing then.
                since = 0 if stat.start > self._started_ticks else (before or {}).get(key)
                grown_ns = 0 if since is None else ran_ns - since
                if grown_ns > 0 or (since is None and stat.state == "R"):
                    self._saw(key, pid, stat, grown_ns)
        self._before = now
        self._search_next = time.monotonic() + _SEARCH_REST * (time.thread_time_ns() - begin_ns) / 1e9

    def _is_elsewhere(self, pid: int) -> bool:
        # Most kernel threads may run on one CPU only, and that takes no file to find out. Their process group is 0.
        try:
            return not os.getpgid(pid) and pid != 1 and not self.pcpus & CpuSet.of(os.sched_getaffinity(pid))
        except (ProcessLookupError, PermissionError):
            return False

    def _saw(self, key: tuple[int, int], pid: int, stat: procfs.Stat, grown_ns: int) -> None:
        known = self._tasks.get(key)
        if known is None:
            if len(self._tasks) >= _KNOWN:
                return
            known = ForeignTask(stat.processor, pid, key[0], stat.comm, stat.kernel)
        self._tasks[key] = known.replace(
            pcpu=stat.processor, comm=stat.comm, seen=known.seen + 1, run_ns=known.run_ns + grown_ns
        )

    # -- the rest ------------------------------------------------------------------------------------------

    def _interrupts(self) -> list[Interrupts] | None:
        if not self._first_interrupts:
            return None
        begin = {one.source: one.counts for one in parse_interrupts(self._first_interrupts, self.pcpus)}
        return [
            one.replace(counts={cpu: _since(begin.get(one.source, {}).get(cpu, 0), n) for cpu, n in one.counts.items()})
            for one in parse_interrupts(_read(self._host, "proc/interrupts"), self.pcpus)
        ]

    def _read_rates(self, cpus: CpuSet) -> CpuSet:
        # Returns those that have one: the others are not asked again.
        self._khz_next = time.monotonic() + _CLOCK_RATE_S
        have = []
        for cpu in cpus:
            text = _read(self._host, f"sys/devices/system/cpu/cpu{cpu}/cpufreq/scaling_cur_freq").strip()
            if text.isdigit():
                have.append(cpu)
                low, high = self._khz.get(cpu, (int(text), int(text)))
                self._khz[cpu] = min(low, int(text)), max(high, int(text))
        return CpuSet.of(have)

    def _note_online(self, online: CpuSet) -> None:
        # The kernel's word comes after the deed: a look in between has found it already.
        known, events = self._online, []
        for cpu, came in self._hotplug.events():
            if cpu in self.pcpus and came != (cpu in known):
                known ^= CpuSet.of([cpu])
                events.append((cpu, came))
        self._online = online & self.pcpus
        events += [(cpu, cpu in self._online) for cpu in known ^ self._online]
        self._events += [Event(time.time(), cpu, came) for cpu, came in events][: max(0, _EVENTS - len(self._events))]


def taints(found: Sequence[Occupied], limit: float) -> list[str]:
    """Return what of it is more than *limit*, a sentence each, the weightiest first.

    :param limit: share of the time since START, from 0 to 1
    """
    weighed: list[tuple[int, str]] = []
    for one in found:
        if one.pcpu == one.over.lowest:
            weighed += _beside_text(one, limit)
        kinds = (
            (one.irq_ns, f"pCPU {one.pcpu} served interrupts"),
            (one.softirq_ns, f"pCPU {one.pcpu} did the kernel's deferred work of interrupts (softirq)"),
            (one.steal_ns, f"the machine below this one took pCPU {one.pcpu} away (steal)"),
        )
        for spent_ns, what in kinds:
            if spent_ns is not None and _too_much(spent_ns, one.interval_ns, limit, _FLOOR_NS["stat"]):
                weighed.append((spent_ns, f"{what} for {_portion(spent_ns, one.interval_ns)}"))
        for interrupt in one.interrupts or ():
            count = interrupt.counts[one.pcpu]
            if interrupt.device and _too_much(count * _INTERRUPT_NS, one.interval_ns, limit, _FLOOR_NS["schedstat"]):
                rate = f"{count * 1e9 / one.interval_ns:.0f} a second"
                text = f"interrupt {interrupt.source} ({interrupt.name}) came to pCPU {one.pcpu} {count} times, {rate}"
                weighed.append((count * _INTERRUPT_NS, text))
    return [text for _, text in sorted(weighed, key=lambda pair: -pair[0])]


def _beside_text(one: Occupied, limit: float) -> list[tuple[int, str]]:
    all_ns = one.interval_ns * len(one.over)
    named = ", ".join(map(str, one.tasks[:_SAID])) + (" and others" if len(one.tasks) > _SAID else "")
    if one.tasks_ns is None or one.other_ns is None:
        seen_ns = sum(task.run_ns for task in one.tasks)
        if _too_much(seen_ns, all_ns, limit, _FLOOR_NS["stat"]):
            return [(seen_ns, f"others ran up to {_portion(seen_ns, all_ns)} on pCPU {one.over}: {named}")]
        if one.events or limit >= 1:
            return []  # nothing is counted while it is offline, which is said elsewhere; or nobody minds
        why = "the kernel does not tell" if one.irq_ns is None else "the guest ignores SIGCHLD, and has no cgroup"
        return [(0, f"how long others ran on pCPU {one.over} is not known: {why}")]
    if _too_much(one.tasks_ns, all_ns, limit, _FLOOR_NS[one.tasks_from]):
        said = f": {named}" if named else ", tasks that had ended or left before they were searched for"
        return [(one.tasks_ns, f"others ran {_portion(one.tasks_ns, all_ns)} on pCPU {one.over}{said}")]
    if _too_much(one.other_ns, all_ns, limit, _FLOOR_NS["stat"]):
        what = f"pCPU {one.over} was busy with other than the guest for {_portion(one.other_ns, all_ns)}"
        return [(one.other_ns, what + (f": {named}" if named else ""))]
    return []


def _too_much(spent_ns: int, interval_ns: int, limit: float, floor_ns: int) -> bool:
    return spent_ns > floor_ns and spent_ns > limit * interval_ns


def _portion(spent_ns: int, interval_ns: int) -> str:
    share = min(1.0, spent_ns / interval_ns) if interval_ns else 0.0
    return f"{spent_ns / 1e9:.2f} s ({share:.{0 if share >= 0.095 else 1}%})"


def _of_cpu(lines: Iterable[Interrupts], cpu: int) -> tuple[Interrupts, ...]:
    there = [one for one in lines if one.counts.get(cpu)]
    return tuple(sorted(there, key=lambda one: -one.counts[cpu]))


def _ran_ns(pid: int, stat: procfs.Stat, *, alone: bool) -> int:
    if alone and (ran_ns := process_ns(pid)) is not None:
        return ran_ns
    account = procfs.schedstat(pid, stat.pid)
    return account[0] if account else (stat.utime + stat.stime) * _TICK_NS


def _since(begin: int, now: int) -> int:
    # Idle time, and that of tasks which nobody waited for, can run backwards.
    return max(0, now - begin)


def _read(host: Host, name: str) -> bytes:
    try:
        return host.read_bytes(name)
    except OSError as error:
        if error.errno not in _NOT_TOLD:
            raise
        return b""
