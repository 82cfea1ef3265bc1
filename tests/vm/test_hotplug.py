"""The offline and online cycle, inside virtual machines: it changes nothing else, and leaves no CPU offline."""

from __future__ import annotations

import errno
import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation import hotplug, irq
from hostpart.isolation.setting import settle
from hostpart.ledger import Ledger
from hostpart.rehearsal import Rehearsal
from tests.vm.devices import unplug
from tests.vm.fingerprint import difference, fingerprint
from workers import crash

pytestmark = pytest.mark.vm()

CPU = "/sys/devices/system/cpu"
EVERY = set(range(8))


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own; all CPUs are online when the test has ended."""
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        for cpu in EVERY - online():
            put(f"{CPU}/cpu{cpu}/online", "1")


def put(path: str, text: str) -> None:
    """Write as an operator would, not through hostpart."""
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def online() -> set[int]:
    """Return the CPUs that are online by each one's own file; one without is."""
    files = {cpu: Path(f"{CPU}/cpu{cpu}/online") for cpu in EVERY}
    return {cpu for cpu, file in files.items() if not file.exists() or file.read_text() == "1\n"}


class Watched(Host):
    """The live machine; which CPUs were online is looked up before every write."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[set[int], str, str]] = []

    def write_text(self, name: str, text: str) -> None:
        """Look, and write."""
        self.seen.append((online(), name, text))
        super().write_text(name, text)


class Stubborn(Host):
    """The live machine, but CPU 5 does not take one of the orders."""

    def __init__(self, order: str) -> None:
        super().__init__()
        self.order = order

    def write_text(self, name: str, text: str) -> None:
        """Refuse it as the kernel does where a callback of a driver's fails."""
        if name.endswith("cpu5/online") and text == self.order:
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), self.path(name))
        super().write_text(name, text)


def bring_online(ledger: Ledger) -> None:
    """Settle what the ledger has, as a reconcile does first."""
    known = ledger.known()
    there = [one for key in known if (one := hotplug.of(key)) is not None]
    settle(there, known, CpuSet(), CpuSet(), Host(), ledger.remember, ledger.forget)


def test_all_are_offline_before_the_first_comes_back(ledger: Ledger) -> None:
    host = Watched()
    assert hotplug.cycle(host, ledger, CpuSet.parse("4-6")) == []
    assert [(where, name[-12:], text) for where, name, text in host.seen] == [
        (EVERY, "/cpu4/online", "0"),
        (EVERY - {4}, "/cpu5/online", "0"),
        (EVERY - {4, 5}, "/cpu6/online", "0"),
        (EVERY - {4, 5, 6}, "/cpu4/online", "1"),
        (EVERY - {5, 6}, "/cpu5/online", "1"),
        (EVERY - {6}, "/cpu6/online", "1"),
    ]
    assert (online(), ledger.known()) == (EVERY, {})


def test_a_cpu_that_was_offline_before_stays_so(ledger: Ledger) -> None:
    put(f"{CPU}/cpu5/online", "0")
    assert hotplug.cycle(Host(), ledger, CpuSet.parse("4-5")) == []
    assert (online(), ledger.known()) == (EVERY - {5}, {})


def test_the_boot_cpu_is_passed_over_and_said(ledger: Ledger) -> None:
    (problem,) = hotplug.cycle(Host(), ledger, CpuSet.parse("0,4"))
    assert problem.startswith("CPU 0 cannot be taken offline")
    assert (online(), ledger.known()) == (EVERY, {})


def test_called_again_it_does_it_again_and_no_harm(ledger: Ledger) -> None:
    for _ in range(2):
        assert hotplug.cycle(Host(), ledger, CpuSet.parse("6-7")) == []
    assert hotplug.cycle(Host(), ledger, CpuSet()) == []
    assert (online(), ledger.known()) == (EVERY, {})


def test_a_cpu_that_does_not_go_is_said_and_the_others_are_cycled(ledger: Ledger) -> None:
    (problem,) = hotplug.cycle(Stubborn("0"), ledger, CpuSet.parse("4-6"))
    assert problem.startswith("CPU 5 could not be taken offline (Device or resource busy)")
    assert (online(), ledger.known()) == (EVERY, {})


def test_a_cpu_that_does_not_come_back_is_said_and_remembered_until_it_does(ledger: Ledger) -> None:
    (problem,) = hotplug.cycle(Stubborn("1"), ledger, CpuSet.parse("4-6"))
    assert problem.startswith("CPU 5 did not come online again (Device or resource busy)")
    assert f"echo 1 > {CPU}/cpu5/online" in problem
    assert (online(), list(ledger.known())) == (EVERY - {5}, [f"{CPU[1:]}/cpu5/online"])
    bring_online(ledger)
    assert (online(), ledger.known()) == (EVERY, {})


def test_the_next_cycle_brings_back_what_a_killed_one_left(ledger: Ledger, tmp_path: Path) -> None:
    assert dies(tmp_path, "write.online.after@2")
    assert online() == EVERY - {4, 5}
    assert hotplug.cycle(Host(), ledger, CpuSet.parse("7")) == []
    assert (online(), ledger.known()) == (EVERY, {})


def dies(directory: Path, where: str) -> bool:
    """Cycle 4-6 in a child that dies at the named point; return whether it did."""
    pid = os.fork()
    if not pid:
        try:
            with Ledger(str(directory)) as ledger:
                crash.arm(where)
                hotplug.cycle(Host(), ledger, CpuSet.parse("4-6"))
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("point", ["write.before", "write.after", "ledger.remember.after", "ledger.forget.before"])
def test_killed_at_any_point_every_cpu_comes_back(ledger: Ledger, tmp_path: Path, point: str) -> None:
    left = set()
    for number in itertools.count(1):
        if not dies(tmp_path, f"{point}@{number}"):
            break
        left.add(len(EVERY - online()))
        bring_online(ledger)
        assert (online(), ledger.known()) == (EVERY, {}), number
    assert left >= ({0, 1, 2, 3} if point == "write.after" else {0})
    assert number > (6 if point.startswith("write") else 1)


def test_a_rehearsal_lists_it_and_takes_no_cpu(ledger: Ledger) -> None:
    host = Rehearsal()
    with ledger.copy() as copy:
        assert hotplug.cycle(host, copy, CpuSet.parse("4-5")) == []
        assert copy.known() == {}
    assert host.writes == [f"echo {order} > {CPU}/cpu{cpu}/online" for order in (0, 1) for cpu in (4, 5)]
    assert online() == EVERY


# -- what else it changes ------------------------------------------------------------------------------


def keep_off(cpus: set[int]) -> None:
    """Move every task that can be moved off *cpus*, as the sweep does; twice, for those born meanwhile."""
    for _ in range(2):
        for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
            tid = int(task.name)
            try:
                mask = os.sched_getaffinity(tid)
                if mask & cpus:
                    os.sched_setaffinity(tid, mask - cpus or EVERY - cpus)
            except OSError:
                continue  # it ended, or it is a thread of the kernel's that is bound


def test_after_tasks_and_interrupts_were_moved_it_changes_nothing_else(ledger: Ledger) -> None:
    unplug()  # their drivers spread their interrupts anew whenever a CPU comes online
    pinned = os.fork()
    if not pinned:
        os.sched_setaffinity(0, {1, 5})
        signal.pause()
    time.sleep(0.1)
    host, cpus = Host(), CpuSet.parse("4-5")
    keep_off({4, 5})
    put("/sys/devices/virtual/workqueue/cpumask", "cf")
    settle(irq.settings(host), {}, cpus, CpuSet.parse("0-3,6-7"), host, ledger.remember, ledger.forget)
    before = fingerprint()
    assert hotplug.cycle(host, ledger, cpus) == []
    time.sleep(0.2)
    after = fingerprint()
    settle(irq.settings(host), ledger.known(), CpuSet(), cpus, host, ledger.remember, ledger.forget)
    put("/sys/devices/virtual/workqueue/cpumask", "ff")
    os.kill(pinned, signal.SIGKILL)
    os.waitpid(pinned, 0)
    changed = difference(before, after)
    if os.uname().release.startswith("6.1."):
        # Before 6.2 the kernel gives its compaction threads all CPUs of their node whenever one comes online: the
        # sweep that follows takes them back.
        changed = [line for line in changed if " kcompactd" not in line]
    assert changed == []
    assert {name.split()[3] for name in before.keys() - after.keys() if "(bound)" in name} <= {"kworker"}
    assert {name.split()[3] for name in after.keys() - before.keys()} <= {"kworker"}
