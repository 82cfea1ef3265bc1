"""Exclusive cpusets of a version 1 hierarchy, inside virtual machines: what the kernel keeps off, and the way back.

What holds is read here from the kernel's files and by trying, not by the module's own eyes.
"""

from __future__ import annotations

import errno
import itertools
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation import cpuset1, partition
from hostpart.isolation.reconcile import cpusets
from hostpart.ledger import Holding, Known, Ledger
from hostpart.rehearsal import Rehearsal
from tests.vm.fingerprint import difference, fingerprint
from workers import crash

pytestmark = pytest.mark.vm(
    kernels=("6.1",), setups=("v1",), every=()
)  # Debian's later kernels have no version 1 cpusets

TREE = "/sys/fs/cgroup/cpuset"
HOST = Host()
FILES = ("cpus", "mems", "cpu_exclusive", "mem_exclusive", "mem_hardwall", "sched_load_balance", "effective_cpus")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own; the hierarchy is as it was when the test has ended."""
    before, tasks = tree(), in_root()
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        assert cpuset1.settle(HOST, ledger, []) == []
        assert difference(before, tree()) == []
        assert {tid for tid in tasks - in_root() if os.path.exists(f"/proc/{tid}")} == set()
        assert ledger.known() == {}


def vm(token: str, pcpus: str, idle: str = "", mems: str = "") -> Holding:
    """Return what a VM holds."""
    return Holding(
        token, 0, 0, "cpuset", "host", CpuSet.parse(pcpus), CpuSet.parse(idle), CpuSet.parse(mems), cycle=False
    )


A, B = vm("a" * 32, "4-5"), vm("b" * 32, "6", idle="7", mems="1")
C = vm("c" * 32, "1,3", mems="0")


def get(name: str) -> str:
    """Return a file's content."""
    return Path(TREE, name).read_text().strip()


def put(name: str, text: str, top: str = TREE) -> None:
    """Write as an operator would, not through hostpart."""
    fd = os.open(f"{top}/{name}", os.O_WRONLY)
    try:
        os.write(fd, text.encode())
    finally:
        os.close(fd)


def in_root() -> set[str]:
    """Return the threads in the root cpuset."""
    return set(get("tasks").split())


def tree() -> dict[str, str]:
    """Return all files that somebody could have changed; masks of tasks are the sweep's."""
    found = fingerprint(tasks=False)
    for folder, _, _ in os.walk(TREE):
        found |= {f"{folder}/{name}": get(f"{folder}/cpuset.{name}") for name in FILES}
    return found


def settled(ledger: Ledger, *vms: Holding) -> None:
    """Settle, and see in the kernel's files that it is so."""
    assert cpuset1.settle(HOST, ledger, vms) == []
    assert cpuset1.check(HOST, vms) == []
    union = CpuSet()
    for one in vms:
        union |= one.pcpus | one.idle
        assert get(f"hostpart/{one.token}/cpuset.effective_cpus") == str(one.pcpus)
        assert get(f"hostpart/{one.token}/cpuset.mems") == (str(one.mems) or "0-1")
    if vms:
        assert get("hostpart/cpuset.cpus") == str(union)
        assert get("hostpart.system/cpuset.effective_cpus") == str(CpuSet.parse("0-7") - union)
        assert get("cpuset.sched_load_balance") == get("hostpart/cpuset.sched_load_balance") == "0"
        assert get("hostpart.system/cpuset.sched_load_balance") == "1"
        there = {entry.name for entry in os.scandir(f"{TREE}/hostpart") if entry.is_dir()}
        assert there == {one.token for one in vms}


class Guest:
    """A process in a VM's cpuset, pinned there."""

    def __init__(self, one: Holding) -> None:
        self.cpu = one.pcpus.lowest
        self.pid = os.fork()
        if not self.pid:
            while True:
                time.sleep(0.01)
        put("cgroup.procs", str(self.pid), "/" + cpuset1.leaf(HOST, one.token))
        os.sched_setaffinity(self.pid, {self.cpu})

    def pinned(self) -> bool:
        """Whether it still is where it was put."""
        return os.sched_getaffinity(self.pid) == {self.cpu}

    def killed(self) -> bool:
        """Whether SIGKILL has ended it; it is reaped."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == -signal.SIGKILL

    def end(self) -> None:
        """End it."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.killed()


def test_this_host_is_one_of_version_1() -> None:
    assert cpuset1.mounted(HOST)
    assert cpusets(HOST) is cpuset1


def test_the_hosts_tasks_leave_and_cannot_come_back(ledger: Ledger) -> None:
    sleeper = os.fork()
    if not sleeper:
        while True:
            time.sleep(0.01)
    os.sched_setaffinity(sleeper, {4, 0})
    settled(ledger, A)
    for pid in (0, 1, sleeper):
        for cpu in (4, 5):
            with pytest.raises(OSError) as refused:
                os.sched_setaffinity(pid, {cpu})
            assert refused.value.errno == errno.EINVAL
    left = {Path(f"/proc/{tid}/stat").read_text().split(")")[1].split()[6] for tid in in_root()}
    assert all(int(flags) & 0x00200000 for flags in left)  # PF_KTHREAD: nothing but the kernel's own stays
    os.kill(sleeper, signal.SIGKILL)
    os.waitpid(sleeper, 0)


@pytest.mark.parametrize(
    "order", list(itertools.permutations((A, B, C))), ids=lambda order: "".join(one.token[0] for one in order)
)
def test_vms_start_and_end_in_any_order(ledger: Ledger, order: Sequence[Holding]) -> None:
    here: list[Holding] = []
    guests: dict[str, Guest] = {}
    for one in (A, B, C):
        here.append(one)
        settled(ledger, *here)
        guests[one.token] = Guest(one)
        assert all(guest.pinned() for guest in guests.values())
    for one in order:
        guests.pop(one.token).end()
        here.remove(one)
        settled(ledger, *here)
        assert all(guest.pinned() for guest in guests.values())


def test_what_forks_all_the_while_is_moved_too_and_back(ledger: Ledger) -> None:
    storm = os.fork()
    if not storm:
        while True:
            pid = os.fork()
            if not pid:
                os._exit(0)
            os.waitpid(pid, 0)
    settled(ledger, A)
    assert "cpuset:/hostpart.system\n" in Path(f"/proc/{storm}/cgroup").read_text()
    assert cpuset1.settle(HOST, ledger, []) == []
    assert "cpuset:/\n" in Path(f"/proc/{storm}/cgroup").read_text()
    os.kill(storm, signal.SIGKILL)
    os.waitpid(storm, 0)


def test_what_is_left_in_a_vms_cpuset_is_killed(ledger: Ledger) -> None:
    settled(ledger, A, B)
    guest, other = Guest(A), Guest(B)
    settled(ledger, B)
    assert guest.killed()
    assert other.pinned()
    other.end()


def test_settling_again_changes_nothing(ledger: Ledger) -> None:
    settled(ledger, A, B)
    before = tree()
    settled(ledger, A, B)
    assert difference(before, tree()) == []


def refuses(ledger: Ledger, wanted: str, *, saying: str, remedy: str) -> None:
    """The question and the deed both say no, and nothing has changed."""
    before = tree()
    found = cpuset1.obstacle(HOST, ledger, CpuSet.parse(wanted))
    assert found is not None
    assert saying in found.problem
    assert remedy in found.remedy
    assert cpuset1.settle(HOST, ledger, [vm("d" * 32, wanted)]) == [found.problem]
    assert difference(before, tree()) == []
    assert ledger.known() == {}


def test_a_siblings_cpus_are_refused_with_what_to_write(ledger: Ledger) -> None:
    os.mkdir(f"{TREE}/docker")
    put("docker/cpuset.cpus", "3-4")
    refuses(ledger, "4-5", saying="/docker has CPU 4", remedy=f"echo 3 > {TREE}/docker/cpuset.cpus")
    put("docker/cpuset.cpus", "3")
    settled(ledger, A)
    assert cpuset1.settle(HOST, ledger, []) == []
    os.rmdir(f"{TREE}/docker")


def test_all_cpus_are_refused(ledger: Ledger) -> None:
    refuses(ledger, "0-7", saying="no CPU of 0-7 would be left", remedy="7 or fewer")


@pytest.mark.parametrize("name", ["hostpart", "hostpart.system"])
def test_a_cpuset_of_somebody_else_by_our_name_is_refused(ledger: Ledger, name: str) -> None:
    os.mkdir(f"{TREE}/{name}")
    refuses(ledger, "4", saying="knows nothing of", remedy=f"{TREE}/{name}'")
    os.rmdir(f"{TREE}/{name}")


def test_version_2_says_that_the_controller_is_not_there(ledger: Ledger) -> None:
    found = partition.obstacle(HOST, ledger, CpuSet.parse("4"))
    assert found is not None
    assert "cgroup v2 is not mounted" in found.problem or "no cpuset controller" in found.problem


@pytest.mark.parametrize("cpu", [5, 2], ids=["a VM's", "the host's"])
def test_a_cpu_that_goes_and_comes_back_is_where_it_was(ledger: Ledger, cpu: int) -> None:
    settled(ledger, A, B)
    guest = Guest(A)
    put(f"cpu{cpu}/online", "0", "/sys/devices/system/cpu")
    assert cpuset1.settle(HOST, ledger, [A, B]) == []
    assert cpuset1.check(HOST, [A, B]) == []
    put(f"cpu{cpu}/online", "1", "/sys/devices/system/cpu")
    time.sleep(0.3)
    assert cpuset1.check(HOST, [A, B]) != []
    settled(ledger, A, B)
    assert guest.pinned()
    guest.end()


def test_what_somebody_wrote_is_seen_and_mended(ledger: Ledger) -> None:
    settled(ledger, A, B)
    for name, text in (
        ("cpuset.sched_load_balance", "1"),
        ("hostpart/cpuset.sched_load_balance", "1"),
        (f"hostpart/{A.token}/cpuset.cpus", "4"),
        (f"hostpart/{B.token}/cpuset.mems", "0"),
        ("hostpart.system/cpuset.cpus", "0-2"),
    ):
        put(name, text)
        assert cpuset1.check(HOST, [A, B]) != [], name
        settled(ledger, A, B)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.vm(kernels=("6.1",), setups=("v1",), limit_s=300, every=())
def test_a_death_at_any_write_is_undone_by_the_next_call(ledger: Ledger, when: str) -> None:
    before = tree()
    # All but the moves of tasks, which are alike: of those the first, some in the middle, and none beyond the last.
    for kind in ("mkdir", "rmdir", "cpuset.cpus", "cpuset.mems", "cpuset.cpu_exclusive", "cpuset.sched_load_balance"):
        for number in itertools.count(1):
            if not dies(ledger, f"write.{kind}.{when}@{number}"):
                break
            undone(ledger, before, f"{kind} {number}")
        assert number > 1
    for number in (1, 2, 5, 9, 30):
        if dies(ledger, f"write.tasks.{when}@{number}"):
            undone(ledger, before, f"task {number}")


def undone(ledger: Ledger, before: dict[str, str], where: str) -> None:
    """The next call undoes it all."""
    assert cpuset1.settle(HOST, ledger, []) == []
    assert difference(before, tree()) == [], where
    assert ledger.known() == {}


def dies(ledger: Ledger, point: str) -> bool:
    """Settle some steps in a process that dies at that point; whether it got there."""
    pid = os.fork()
    if not pid:
        with Ledger(ledger.directory) as own:  # SQLite's connections do not survive a fork
            crash.arm(point)
            for step in ([A], [A, B], [B], []):
                cpuset1.settle(HOST, own, step)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_rehearsal_lists_the_writes_and_makes_none(ledger: Ledger) -> None:
    before = tree()
    host = Rehearsal()
    assert cpuset1.settle(host, ledger.copy(), [B]) == []
    assert difference(before, tree()) == []
    settled(ledger, B)
    really = tree()
    assert cpuset1.settle(HOST, ledger, []) == []
    for line in host.writes:
        # As in earnest, some of the kernel's own tasks stay where they are.
        subprocess.run(["sh", "-c", line], check="/tasks" not in line, stderr=subprocess.DEVNULL)
    assert difference(really, tree()) == []
    ledger.remember({"cpuset1:sys/fs/cgroup/cpuset": Known("1", ("0",))})  # what was done by hand is not in it
