"""What pCPUs did beside a guest: the kernel's files as recorded, counters made up, and real tasks on real pCPUs."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpart import occupancy, tree
from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.occupancy import (
    Event,
    ForeignTask,
    Guest,
    Interrupts,
    Occupancy,
    Occupied,
    Ticks,
    parse_interrupts,
    parse_schedstat,
    parse_stat,
    taints,
)

TICK = 10_000_000  # USER_HZ is 100 wherever Linux runs
ONE, TWO = CpuSet.of([1]), CpuSet.of([1, 2])

# -- the kernel's files ----------------------------------------------------------------------------------

STAT = b"""cpu  630 0 1210 14044 0 0 82 0 0 0
cpu0 3 1 173 1780 7 2 15 4 5 6
cpu2 406 0 569 921 0 0 25 0 0 0
intr 12434 151 9 0 67 9
ctxt 81
"""


def test_stat_is_read_by_cpu_and_guests_of_kvm_count_once() -> None:
    assert parse_stat(STAT) == {0: Ticks(177, 1787, 2, 15, 4), 2: Ticks(975, 921, 0, 25, 0)}


SCHEDSTAT = {
    # Linux 5.10 to 6.10, 6.11 to 6.14, and from 6.15 on, whose domains have names.
    "15": "cpu0 0 0 0 0 0 0 2506333141 988421473 741\ndomain0 03 0 0 0 0\ncpu2 1 2 3 4 5 6 77 8 9\n",
    "16": "cpu0 0 0 0 0 0 0 2506333141 988421473 741\ndomain0 03 0 0 0 0\ncpu2 1 2 3 4 5 6 77 8 9\n",
    "17": "cpu0 0 0 0 0 0 0 2506333141 988421473 741\ndomain0 SMT 03 0 0 0 0\ncpu2 1 2 3 4 5 6 77 8 9\n",
}


@pytest.mark.parametrize("version", SCHEDSTAT)
def test_schedstat_is_read_by_its_version(version: str) -> None:
    text = f"version {version}\ntimestamp 4294897682\n{SCHEDSTAT[version]}"
    assert parse_schedstat(text.encode()) == {0: 2506333141, 2: 77}


@pytest.mark.parametrize("text", ["", "version 99\ntimestamp 1\ncpu0 0 0 0 0 0 0 5 6 7\n", "no such thing"])
def test_a_schedstat_of_another_version_tells_nothing(text: str) -> None:
    assert parse_schedstat(text.encode()) == {}


INTERRUPTS = b"""           CPU0       CPU2       CPU3
  0:        151          0          0   IO-APIC   2-edge      timer
 24:          0          7          1  PCI-MSIX-0000:00:01.0   0-edge      PCIe PME, aerdrv
 25:          0          0          0   IO-APIC   5-edge
 27:          9          8          7     GICv3  27 Level     arch_timer
LOC:       1024        512        256   Local timer interrupts
IPI0:         1          2          3       Rescheduling interrupts
ERR:          0
MIS:         12
"""


def test_interrupts_are_read_by_source_without_cpus_that_are_offline() -> None:
    lines = {line.source: line for line in parse_interrupts(INTERRUPTS)}
    assert set(lines) == {"0", "24", "25", "27", "LOC", "IPI0"}
    assert lines["24"] == Interrupts("24", "PCIe PME, aerdrv", {0: 0, 2: 7, 3: 1})
    assert (lines["LOC"].name, lines["LOC"].counts[2]) == ("Local timer interrupts", 512)
    assert [source for source, line in lines.items() if line.device] == ["24", "25"]


def test_interrupts_are_counted_for_the_cpus_asked_for() -> None:
    lines = parse_interrupts(INTERRUPTS, CpuSet.parse("1,3"))
    assert {line.source: line.counts for line in lines}["24"] == {3: 1}


def test_one_cpus_machine_has_errors_that_are_no_interrupts() -> None:
    text = b"           CPU0\n  1:          9   IO-APIC   1-edge      i8042\nERR:          7\nMIS:          0\n"
    assert parse_interrupts(text) == [Interrupts("1", "i8042", {0: 9})]


def test_no_interrupts_are_none() -> None:
    assert parse_interrupts(b"") == []


# -- judging ---------------------------------------------------------------------------------------------

CC1 = ForeignTask(1, 812, 812, "cc1", kernel=False, seen=3, run_ns=300_000_000)
KWORKER = ForeignTask(1, 33, 33, "kworker/1:0", kernel=True, seen=1, run_ns=1_000_000)
STORM = Interrupts("24", "eth0", {1: 12_000})
SECOND = 1_000_000_000


def occupied(**figures: Any) -> Occupied:
    """Return a pCPU that was watched for three seconds and was quiet, but for *figures*."""
    quiet = {"other_ns": 0, "tasks_ns": 0, "irq_ns": 0, "softirq_ns": 0, "steal_ns": 0, "interrupts": ()}
    return Occupied(**{"pcpu": 1, "over": ONE, "interval_ns": 3 * SECOND, **quiet, **figures})


@pytest.mark.parametrize(
    ("figures", "text"),
    [
        pytest.param({}, None, id="quiet"),
        pytest.param({"other_ns": 30_000_000, "tasks_ns": 30_000_000}, None, id="at the limit"),
        pytest.param(
            {"other_ns": 420_000_000, "tasks_ns": 420_000_000, "tasks": (CC1, KWORKER)},
            "others ran 0.42 s (14%) on pCPU 1: 'cc1' (pid 812), 'kworker/1:0' (kernel thread)",
            id="foreign tasks",
        ),
        pytest.param(
            {"other_ns": 420_000_000, "tasks_ns": 420_000_000},
            "others ran 0.42 s (14%) on pCPU 1, tasks that had ended or left before they were searched for",
            id="foreign tasks that nobody saw",
        ),
        pytest.param(
            {"other_ns": 60_000_000, "tasks_ns": 10_000_000},
            "pCPU 1 was busy with other than the guest for 0.06 s (2.0%)",
            id="busy with no task",
        ),
        pytest.param(
            {"other_ns": None, "tasks_ns": None, "tasks": (CC1,)},
            "others ran up to 0.30 s (10%) on pCPU 1: 'cc1' (pid 812)",
            id="the guest's own time is not known",
        ),
        pytest.param(
            {"other_ns": None, "tasks_ns": None},
            "how long others ran on pCPU 1 is not known: the guest ignores SIGCHLD, and has no cgroup",
            id="nothing is known of the guest",
        ),
        pytest.param(
            {"other_ns": None, "tasks_ns": None, "irq_ns": None},
            "is not known: the kernel does not tell",
            id="nothing is known of the pCPU",
        ),
        pytest.param(
            {"other_ns": None, "tasks_ns": None, "events": (Event(0.0, 1, online=False),)}, None, id="offline"
        ),
        pytest.param({"irq_ns": 60_000_000}, "pCPU 1 served interrupts for 0.06 s (2.0%)", id="interrupts"),
        pytest.param({"softirq_ns": 60_000_000}, "(softirq) for 0.06 s (2.0%)", id="softirqs"),
        pytest.param({"steal_ns": 60_000_000}, "took pCPU 1 away (steal) for 0.06 s (2.0%)", id="steal"),
        pytest.param({"irq_ns": None, "softirq_ns": None, "steal_ns": None, "interrupts": None}, None, id="not told"),
        pytest.param(
            {"interrupts": (STORM,)}, "interrupt 24 (eth0) came to pCPU 1 12000 times, 4000 a second", id="storm"
        ),
        pytest.param({"interrupts": (STORM.replace(counts={1: 3000}),)}, None, id="no storm yet"),
        pytest.param({"interrupts": (STORM.replace(source="LOC"),)}, None, id="the CPU's own timer"),
        pytest.param({"interrupts": (STORM.replace(name="arch_timer"),)}, None, id="another one's own timer"),
    ],
)
def test_what_a_pcpu_did_taints_above_the_limit(figures: dict[str, Any], text: str | None) -> None:
    found = taints([occupied(**figures)], 0.01)
    assert len(found) == (text is not None)
    assert text is None or text in found[0]


def test_a_limit_of_all_is_never_passed_and_one_of_nothing_soon() -> None:
    busy = occupied(other_ns=9 * SECOND, tasks_ns=3 * SECOND, interrupts=(STORM,)).replace(other_ns=3 * SECOND)
    assert taints([busy, occupied(other_ns=None, tasks_ns=None)], 1.0) == []
    assert len(taints([busy], 0.0)) == 2


def test_the_nanosecond_clock_is_believed_sooner_than_ticks() -> None:
    short = occupied(interval_ns=SECOND // 10, other_ns=20_000_000, tasks_ns=20_000_000)
    assert taints([short], 0.01) == []
    assert len(taints([short.replace(tasks_from="schedstat")], 0.01)) == 1


def test_several_pcpus_that_are_one_guests_give_one_sentence() -> None:
    both = [occupied(pcpu=cpu, over=TWO, other_ns=SECOND, tasks_ns=SECOND) for cpu in TWO]
    (reason,) = taints(both, 0.01)
    assert "1.00 s (17%) on pCPU 1-2" in reason


def test_the_weightiest_comes_first_over_all_pcpus_and_kinds() -> None:
    second = occupied(
        pcpu=2, over=CpuSet.of([2]), softirq_ns=90_000_000, interrupts=(STORM.replace(counts={2: 20_000}),)
    )
    found = taints([occupied(steal_ns=100_000_000, interrupts=(STORM,)), second], 0.01)
    assert [word for reason in found for word in ("20000", "12000", "steal", "softirq") if word in reason] == [
        "20000", "12000", "steal", "softirq",
    ]  # fmt: skip


# -- counters made up ------------------------------------------------------------------------------------


class Machine:
    """A recorded machine whose counters are set by the test."""

    def __init__(self, root: Path, *, cpus: int = 3, schedstat: bool = True) -> None:
        self.root, self.schedstat = root, schedstat
        self.ticks = {cpu: [0] * 8 for cpu in range(cpus)}
        self.ran = dict.fromkeys(range(cpus), 0)
        (root / "proc").mkdir()
        (root / "proc/interrupts").write_bytes(INTERRUPTS)
        self.write()

    def write(self) -> None:
        """Bring the files up to date."""
        lines = [f"cpu{cpu} {' '.join(map(str, ticks))}\n" for cpu, ticks in self.ticks.items()]
        (self.root / "proc/stat").write_text("cpu  0 0 0 0 0 0 0 0\n" + "".join(lines))
        if self.schedstat:
            lines = [f"cpu{cpu} 0 0 0 0 0 0 {ran} 0 0\n" for cpu, ran in self.ran.items()]
            (self.root / "proc/schedstat").write_text("version 17\ntimestamp 1\n" + "".join(lines))

    def passes(self, seconds: float, **figures: tuple[int, ...]) -> None:
        """Let time pass in which each CPU was idle, but for *figures*: ticks by kind for CPU 1 and the next ones."""
        kinds = ("user", "nice", "system", "idle", "iowait", "irq", "softirq", "steal")
        Clock.now += round(seconds * SECOND)
        for number, ticks in self.ticks.items():
            busy = 0
            for kind, values in figures.items():
                at = number - 1
                amount = values[at] if 0 <= at < len(values) else 0
                ticks[kinds.index(kind)] += amount
                busy += amount
                self.ran[number] += amount * TICK if kind in ("user", "nice", "system") else 0
            ticks[3] += round(seconds * 100) - busy
        self.write()


class Clock:
    """``time.monotonic_ns``, as the test says."""

    now = 0


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have time stand still for readings until a :class:`Machine` lets it pass."""
    Clock.now = 5 * SECOND
    monkeypatch.setattr("hostpart.occupancy.time.monotonic_ns", lambda: Clock.now)


def watched(machine: Machine, *pins: CpuSet, total: bool = False) -> Occupancy:
    """Return an occupancy of *machine* that has started."""
    one = Occupancy(pins, Host(str(machine.root)))
    one.start(Guest(dict.fromkeys(pins, 7), 9 if total else None))
    return one


ALL = CpuSet.parse("0-2")


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("schedstat", [True, False], ids=["schedstat", "ticks alone"])
def test_what_is_neither_idle_nor_the_guests_is_others(tmp_path: Path, schedstat: bool) -> None:
    machine = Machine(tmp_path, schedstat=schedstat)
    seen = watched(machine, ONE)
    machine.passes(3.0, user=(200,), system=(40,), irq=(3,), softirq=(5,), steal=(2,))
    seen.look(Guest({ONE: 7 + 2 * SECOND}), (), ALL, search=False)
    (found,) = seen.found()
    assert (found.other_ns, found.irq_ns, found.softirq_ns, found.steal_ns) == (50 * TICK, 3 * TICK, 5 * TICK, 2 * TICK)
    # The nanosecond clock runs on while the machine below has taken the CPU away.
    assert found.tasks_ns == (38 if schedstat else 40) * TICK
    assert (found.tasks_from, found.tasks_resolution_ns) == (("schedstat", 1) if schedstat else ("stat", TICK))
    assert (found.interval_ns, found.khz, found.events) == (3 * SECOND, None, ())


@pytest.mark.usefixtures("clock")
def test_a_quiet_run_is_quiet(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    seen = watched(machine, ONE)
    machine.passes(3.0, user=(250,))
    seen.look(Guest({ONE: 7 + 250 * TICK + 3_000_000}), (), ALL, search=False)
    assert (seen.found()[0].other_ns, seen.found()[0].tasks_ns) == (0, 0)
    assert taints(seen.found(), 0.01) == []


@pytest.mark.usefixtures("clock")
def test_each_vcpus_own_time_is_taken_from_its_own_pcpu(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    seen = watched(machine, ONE, CpuSet.of([2]))
    machine.passes(2.0, user=(150, 150))
    seen.look(Guest({ONE: 7 + 150 * TICK, CpuSet.of([2]): 7 + 50 * TICK}), (), ALL, search=False)
    assert [one.other_ns for one in seen.found()] == [0, 100 * TICK]


@pytest.mark.usefixtures("clock")
def test_what_only_the_cgroup_counted_is_the_guests_and_over_all_its_pcpus(tmp_path: Path) -> None:
    # Children that nobody waited for: their time is in no process's account.
    machine = Machine(tmp_path)
    pins = (ONE, CpuSet.of([2]))
    seen = watched(machine, *pins, total=True)
    machine.passes(2.0, user=(150, 150))
    seen.look(Guest(dict.fromkeys(pins, 7 + 50 * TICK), 9 + 290 * TICK), (), ALL, search=False)
    found = seen.found()
    assert [(one.other_ns, str(one.over), one.guest_from) for one in found] == [(10 * TICK, "1-2", "cgroup")] * 2


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize("total", [None, 9 + 50 * TICK], ids=["no cgroup", "a cgroup"])
def test_where_the_guests_own_time_is_not_known_neither_is_the_rest(tmp_path: Path, total: int | None) -> None:
    machine = Machine(tmp_path)
    seen = watched(machine, ONE, total=total is not None)
    machine.passes(1.0, user=(60,))
    seen.look(Guest({ONE: 7}, total, whole=False), (), ALL, search=False)
    assert seen.found()[0].other_ns == (None if total is None else 10 * TICK)


@pytest.mark.usefixtures("clock")
def test_a_pcpu_that_was_offline_is_told_and_its_time_is_not(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    seen = watched(machine, ONE)
    for online in ("0-2", "0,2", "0,2", "0-2"):
        seen.look(Guest({ONE: 7}), (), CpuSet.parse(online), search=False)
    (found,) = seen.found()
    assert [event.online for event in found.events] == [False, True]
    assert seen.went_offline == ONE
    assert (found.other_ns, found.tasks_ns) == (None, None)


@pytest.mark.usefixtures("clock")
def test_a_pcpu_that_was_offline_between_two_looks_is_told_by_the_kernels_own_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = watched(Machine(tmp_path), ONE)
    monkeypatch.setattr(seen._hotplug, "events", lambda: [(2, False), (1, False), (1, True)])
    seen.look(Guest({ONE: 7}), (), ALL, search=False)
    assert [(event.pcpu, event.online) for event in seen.found()[0].events] == [(1, False), (1, True)]


@pytest.mark.usefixtures("clock")
@pytest.mark.parametrize(
    "looks",
    [
        pytest.param([("0,2", []), ("0,2", [False]), ("0-2", [True])], id="the deed before the word"),
        pytest.param([("0,2", [False]), ("0-2", []), ("0-2", [True])], id="the word on the way back last"),
        pytest.param([("0,2", []), ("0-2", [False, True])], id="the words together"),
    ],
)
def test_what_a_look_has_found_and_the_kernel_says_after_it_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, looks: list[tuple[str, list[bool]]]
) -> None:
    seen = watched(Machine(tmp_path), ONE)
    for online, words in looks:
        said = [(1, came) for came in words]
        monkeypatch.setattr(seen._hotplug, "events", lambda said=said: said)
        seen.look(Guest({ONE: 7}), (), CpuSet.parse(online), search=False)
    assert [event.online for event in seen.found()[0].events] == [False, True]


class Words:
    """A netlink socket that has *words* to say."""

    def __init__(self, *words: tuple[bytes, int] | OSError) -> None:
        self.words = list(words)

    def recvfrom(self, _size: int) -> tuple[bytes, tuple[int, int]]:
        """Say the next."""
        if not self.words:
            raise BlockingIOError
        word = self.words.pop(0)
        if isinstance(word, OSError):
            raise word
        return word[0], (word[1], 1)


def test_only_the_kernels_word_on_cpus_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    hotplug = occupancy._Hotplug()
    words = Words(
        (b"offline@/devices/system/cpu/cpu4\0ACTION=offline\0", 0),
        OSError(errno.ENOBUFS, "some were dropped"),
        (b"offline@/devices/system/cpu/cpu5\0", 812),  # a process's
        (b"add@/devices/system/cpu/cpu6\0", 0),
        (b"online@/devices/system/memory/memory3\0", 0),
        (b"online@/devices/system/cpu/cpu4\0", 0),
    )
    monkeypatch.setattr(hotplug, "_socket", words)
    assert hotplug.events() == [(4, False), (4, True)]
    assert hotplug.events() == []


@pytest.mark.usefixtures("clock")
def test_interrupts_are_what_came_since_the_start_the_most_frequent_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path)
    seen = watched(machine, CpuSet.of([2]))
    later = INTERRUPTS.replace(b"0          7 ", b"0      1007 ").replace(b"512", b"514").replace(b"8  ", b"9  ")
    (tmp_path / "proc/interrupts").write_bytes(later)
    machine.passes(1.0)
    seen.look(Guest({CpuSet.of([2]): 7}), (), ALL, search=False)
    lines = seen.found()[0].interrupts
    assert lines is not None
    assert [(line.source, line.counts[2]) for line in lines] == [("24", 1000), ("LOC", 2), ("27", 1)]


@pytest.mark.usefixtures("clock")
def test_a_clock_rate_is_a_range_where_the_cpu_has_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = tmp_path / "sys/devices/system/cpu/cpu1/cpufreq/scaling_cur_freq"
    rate.parent.mkdir(parents=True)
    rate.write_text("2400000\n")
    seen = watched(Machine(tmp_path), ONE, CpuSet.of([2]))
    monkeypatch.setattr(occupancy, "_CLOCK_RATE_S", 0.0)
    for text in ("800000\n", "<unknown>\n", "3500000\n"):
        seen._khz_next = 0.0
        seen._rated = ONE
        rate.write_text(text)
        seen.look(Guest({}), (), ALL, search=False)
    assert [one.khz for one in seen.found()] == [(800_000, 3_500_000), None]


@pytest.mark.usefixtures("clock")
def test_a_machine_that_tells_nothing_gives_none_and_no_noughts(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    seen = Occupancy([ONE], Host(str(tmp_path)))
    seen.start(Guest({ONE: 0}))
    seen.look(Guest({ONE: 5}), (), ALL, search=False)
    (found,) = seen.found()
    figures = (found.other_ns, found.tasks_ns, found.irq_ns, found.softirq_ns, found.steal_ns, found.interrupts)
    assert figures == (None,) * 6


# -- real tasks ------------------------------------------------------------------------------------------

SPIN = "import os, sys, time\nos.sched_setaffinity(0, {int(sys.argv[1])})\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def spinner() -> Iterator[Callable[[int], int]]:
    """Start processes that spin on a pCPU; called with it, it returns the pid. They are killed afterwards."""
    started: list[subprocess.Popen[bytes]] = []

    def start(cpu: int) -> int:
        process = subprocess.Popen([sys.executable, "-c", SPIN, str(cpu)], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout
        process.stdout.readline()
        return process.pid

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_a_search_names_who_ran_there_and_leaves_out_who_is_the_guests(
    pcpu: int, spinner: Callable[[int], int]
) -> None:
    foreign, own = spinner(pcpu), spinner(pcpu)
    pin = CpuSet.of([pcpu])
    seen = Occupancy([pin], Host())
    seen.start(Guest({pin: 0}))
    for _ in range(2):
        seen.search({own})
        time.sleep(0.5)
    seen.look(Guest({pin: 0}), {own}, CpuSet.of(os.sched_getaffinity(0)), search=True)
    tasks = {task.pid: task for task in seen.found()[0].tasks}
    assert own not in tasks
    assert tasks[foreign].comm.startswith("python")
    assert tasks[foreign].seen >= 2
    assert 0 < tasks[foreign].run_ns < 10 * SECOND
    assert not tasks[foreign].kernel


@pytest.mark.usefixtures("two_pcpus")
def test_what_a_task_ran_elsewhere_is_not_counted(pcpu: int, spinner: Callable[[int], int]) -> None:
    (elsewhere, *_) = os.sched_getaffinity(0) - {pcpu}
    moving = spinner(elsewhere)
    seen = Occupancy([CpuSet.of([pcpu])], Host())
    seen.start(Guest({}))
    for _ in range(2):
        seen.search(())
        time.sleep(0.3)
    os.sched_setaffinity(moving, {pcpu})
    seen.look(Guest({}), (), CpuSet.of(os.sched_getaffinity(0)), search=True)
    (task,) = [task for task in seen.found()[0].tasks if task.pid == moving]
    assert task.seen == 1
    assert task.run_ns < 0.6 * SECOND


def test_no_search_is_made_for_a_guest_that_accounts_for_all(pcpu: int) -> None:
    pin = CpuSet.of([pcpu])
    seen = Occupancy([pin], Host())
    seen.start(Guest({pin: 0}))
    time.sleep(0.1)
    seen.look(Guest({pin: 10 * SECOND}), (), CpuSet.of(os.sched_getaffinity(0)))
    assert seen.searches == 0
    seen.look(Guest({pin: 0}), (), CpuSet.of(os.sched_getaffinity(0)), search=True)
    assert seen.searches == 1


def test_searches_are_rare_where_they_are_dear(pcpu: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pin = CpuSet.of([pcpu])
    seen = Occupancy([pin], Host())
    seen.start(Guest({pin: 0}))
    spent = iter(range(0, 10**12, 10**9))  # each search takes a second of CPU
    monkeypatch.setattr("hostpart.occupancy.time.thread_time_ns", lambda: next(spent))
    monkeypatch.setattr(Occupancy, "_other_ns", lambda _: Clock.now)
    for _ in range(50):
        Clock.now += SECOND
        seen.look(Guest({pin: 0}), (), CpuSet.of(os.sched_getaffinity(0)))
    assert seen.searches == 1


def test_a_guests_time_has_its_children_whether_they_run_or_have_ended() -> None:
    source = (
        "import os, sys, time\n"
        "def burn():\n    end = time.process_time() + 0.1\n    while time.process_time() < end: pass\n"
        "if not os.fork(): burn(); os._exit(0)\n"
        "os.wait()\n"
        "child = os.fork()\n"
        "if not child: burn(); print(flush=True); time.sleep(60)\n"
        "burn(); print(flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE)
    try:
        assert process.stdout
        for _ in range(2):
            process.stdout.readline()
        top = tree.member(process.pid)
        assert top is not None
        family = [top, *tree.descendants(process.pid)]
        (found,) = occupancy.times(family, {process.pid: ONE}).items()
        assert found[0] == ONE
        assert 0.28 * SECOND < found[1] < 5 * SECOND
        (alone,) = occupancy.times(family[:1], {process.pid: ONE}).values()
        assert alone < found[1] - 0.09 * SECOND
    finally:
        for one in tree.descendants(process.pid):
            os.kill(one.pid, signal.SIGKILL)
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_an_orphan_counts_where_it_ran_last(pcpu: int, spinner: Callable[[int], int]) -> None:
    orphan = tree.member(spinner(pcpu))
    assert orphan is not None
    pin, elsewhere = CpuSet.of([pcpu]), CpuSet.of([4000])
    assert set(occupancy.times([orphan], {4_000_000: pin, 4_000_001: elsewhere})) == {pin}
    assert occupancy.times([orphan], {4_000_001: elsewhere}) == {}


def test_a_process_that_is_gone_has_no_time() -> None:
    process = subprocess.Popen(["true"])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert (occupancy.process_ns(process.pid) or 0) > 0  # a zombie's is still told
    process.wait()
    assert occupancy.process_ns(process.pid) is None
