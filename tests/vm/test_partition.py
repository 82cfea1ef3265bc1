"""Isolated partitions of the cgroup v2 tree, inside virtual machines: what the kernel keeps off, and the tree put back.

What holds is read here from the kernel's files and by trying, not by the module's own eyes.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import os
import random
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.errors import as_root
from hostpart.host import Host
from hostpart.isolation import partition
from hostpart.ledger import Holding, Known, Ledger
from hostpart.rehearsal import Rehearsal
from tests.vm.files import TREE, cpu_online, get, put
from tests.vm.fingerprint import difference, fingerprint
from tests.vm.seldom import SELDOM
from workers import crash

pytestmark = pytest.mark.vm()

HOME = f"{TREE}/hostpart"
NOBODY = 65534
HOST = Host()


@pytest.fixture(autouse=True)
def _off() -> None:
    # Whatever the machine's init has handed on, the tests begin with none.
    if not os.path.isdir("/run/systemd/system"):
        for name in get("cgroup.subtree_control").split():
            put("cgroup.subtree_control", f"-{name}")


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own; the tree is as it was when the test has ended."""
    before = tree()
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        assert partition.settle(HOST, ledger, []) == []
        assert difference(before, tree()) == []
        assert ledger.known() == {}


def vm(token: str, pcpus: str, idle: str = "", mems: str = "", level: str = "cpuset") -> Holding:
    """Return what a VM holds."""
    return Holding(token, 0, 0, level, "host", CpuSet.parse(pcpus), CpuSet.parse(idle), CpuSet.parse(mems), cycle=False)


A, B = vm("a" * 32, "4-5"), vm("b" * 32, "6", idle="7", mems="1")
C = vm("c" * 32, "1,3", mems="0")


def tree() -> dict[str, str]:
    """Return all files that somebody could have changed; masks of tasks are the sweep's."""
    return fingerprint(tasks=False)


def settled(ledger: Ledger, *vms: Holding) -> None:
    """Settle, and see by the kernel's word for the root's own tasks that it is so."""
    assert partition.settle(HOST, ledger, vms) == []
    assert partition.check(HOST, vms) == []
    assert_kept(*vms)


def assert_kept(*vms: Holding) -> None:
    """The tree's root has what the VMs have not, and each VM its own."""
    union = CpuSet()
    for one in vms:
        union |= one.pcpus | one.idle
        assert get(f"hostpart/{one.token}/cpuset.cpus.effective") == str(one.pcpus)
        assert get(f"hostpart/{one.token}/cpuset.cpus.partition") == "isolated"
        assert get(f"hostpart/{one.token}/cpuset.mems.effective") == (str(one.mems) or "0-1")
    assert get("cpuset.cpus.effective") == str(CpuSet.parse("0-7") - union)
    if os.path.exists(f"{TREE}/cpuset.cpus.isolated"):
        assert get("cpuset.cpus.isolated") == str(union)
    there = {entry.name for entry in os.scandir(HOME) if entry.is_dir()} if os.path.isdir(HOME) else set()
    assert there == ({one.token for one in vms} | {"guard"} if vms else set())


class Guest:
    """A process in a VM's cgroup, pinned there."""

    def __init__(self, one: Holding, cpu: int | None = None) -> None:
        self.cpu = one.pcpus.lowest if cpu is None else cpu
        self.pid = os.fork()
        if not self.pid:
            while True:
                time.sleep(0.01)
        put("cgroup.procs", str(self.pid), "/" + partition.leaf(HOST, one.token))
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


def refused_affinity(pid: int, cpu: int) -> bool:
    """Whether the kernel refuses to let a process run there."""
    try:
        os.sched_setaffinity(pid, {cpu})
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


def child(what: Callable[[], object]) -> object:
    """Call it in a process of its own, and return what it says."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            answer = what()
        except BaseException as error:
            answer = error
        os.write(write, repr(answer).encode())
        os._exit(0)
    os.close(write)
    with open(read) as file:
        answer = file.read()
    os.waitpid(pid, 0)
    return answer


def before_linux_6_7() -> bool:
    """Whether the kernel does not list the isolated CPUs."""
    return not os.path.exists(f"{TREE}/cpuset.cpus.isolated")


# -- effect --------------------------------------------------------------------------------------------


def test_the_hosts_tasks_leave_and_cannot_come_back(ledger: Ledger) -> None:
    spinners = []
    for cpu in (4, 5):
        pid = os.fork()
        if not pid:
            while True:
                pass
        os.sched_setaffinity(pid, {cpu, 0})
        spinners.append(pid)
    try:
        settled(ledger, A)
        seen = {int(Path(f"/proc/{pid}/stat").read_text().split()[38]) for pid in spinners for _ in range(50)}
        assert not seen & {4, 5}
        assert all(refused_affinity(pid, cpu) for pid in (*spinners, 0, 1) for cpu in (4, 5))
        assert child(lambda: os.sched_getaffinity(0) & {4, 5}) == "set()"
    finally:
        for pid in spinners:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_a_guest_enters_and_then_pins_itself(ledger: Ledger) -> None:
    settled(ledger, A)
    guest = Guest(A, 5)
    assert guest.pinned()
    assert refused_affinity(guest.pid, 0)
    guest.end()


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="".join(one.token[0] for one in order), marks=() if order[0] is B else SELDOM)
        for order in itertools.permutations((A, B, C))
    ],
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


@pytest.mark.parametrize("seed", range(3))
def test_whatever_is_held_is_what_is_kept(ledger: Ledger, seed: int) -> None:
    chance = random.Random(seed)
    vms = [vm(f"{cpu:032x}", str(cpu), idle="" if cpu < 5 else str(cpu + 2)) for cpu in range(1, 6)]
    put("cgroup.subtree_control", "+cpuset")  # spares the emulated machine the patching of its own kernel
    for _ in range(12):
        settled(ledger, *chance.sample(vms, chance.randrange(len(vms) + 1)))
    assert partition.settle(HOST, ledger, []) == []
    put("cgroup.subtree_control", "-cpuset")


def test_settling_again_writes_nothing(ledger: Ledger) -> None:
    settled(ledger, A, B)
    crash.arm("write.before")  # the first write would kill
    try:
        settled(ledger, A, B)
    finally:
        crash.arm("")


def test_levels_below_get_no_cpuset(ledger: Ledger) -> None:
    before = tree()
    assert partition.settle(HOST, ledger, [vm("s" * 32, "4", level="sweep")]) == []
    assert difference(before, tree()) == []


def test_what_is_left_in_a_vms_cgroup_is_killed(ledger: Ledger) -> None:
    settled(ledger, A, B)
    guest, other = Guest(A), Guest(B)
    nested = f"{HOME}/{A.token}/own/more"
    os.makedirs(nested)
    put("cgroup.procs", str(guest.pid), nested)
    settled(ledger, B)
    assert guest.killed()
    assert other.pinned()
    other.end()


# -- refusals ------------------------------------------------------------------------------------------


def refuses(ledger: Ledger, wanted: str, *, saying: str, remedy: str) -> None:
    """The question and the deed both say no, and nothing has changed."""
    before = tree()
    found = partition.obstacle(HOST, ledger, CpuSet.parse(wanted))
    assert found is not None
    assert saying in found.problem
    assert remedy in found.remedy
    assert partition.settle(HOST, ledger, [vm("d" * 32, wanted)]) == [found.problem]
    assert difference(before, tree()) == []
    assert ledger.known() == {}


@pytest.fixture
def sibling(ledger: Ledger) -> Iterator[str]:
    """A cgroup beside the home, with the controller on."""
    put("cgroup.subtree_control", "+cpuset")
    os.mkdir(f"{TREE}/sibling")
    yield "sibling"
    assert partition.settle(HOST, ledger, []) == []
    os.rmdir(f"{TREE}/sibling")
    put("cgroup.subtree_control", "-cpuset")


def test_a_siblings_cpus_are_refused_with_what_to_write(sibling: str, ledger: Ledger) -> None:
    put(f"{sibling}/cpuset.cpus", "3-4")
    refuses(ledger, "4-5", saying=f"/{sibling} lays claim to CPU 4", remedy=f"echo 3 > {TREE}/{sibling}/cpuset.cpus")
    subprocess.run(["sh", "-c", f"echo 3 > {TREE}/{sibling}/cpuset.cpus"], check=True)
    settled(ledger, A)


def test_a_sibling_with_nothing_else_has_to_go(sibling: str, ledger: Ledger) -> None:
    put(f"{sibling}/cpuset.cpus", "4")
    refuses(ledger, "4-5", saying="lays claim", remedy=f"end what is in {TREE}/{sibling}")


def test_anothers_partition_deeper_down_is_refused(sibling: str, ledger: Ledger) -> None:
    if before_linux_6_7():
        pytest.skip("needs remote partitions, of Linux 6.7 and later")
    put(f"{sibling}/cpuset.cpus.exclusive", "5")
    put(f"{sibling}/cgroup.subtree_control", "+cpuset")
    os.mkdir(f"{TREE}/{sibling}/deep")
    put(f"{sibling}/deep/cpuset.cpus.exclusive", "5")
    put(f"{sibling}/deep/cpuset.cpus.partition", "isolated")
    assert get(f"{sibling}/deep/cpuset.cpus.partition") == "isolated"
    refuses(ledger, "4-5", saying="CPU 5", remedy="ask for other")
    os.rmdir(f"{TREE}/{sibling}/deep")
    put(f"{sibling}/cpuset.cpus.exclusive", "\n")


def test_all_cpus_are_refused(ledger: Ledger) -> None:
    refuses(ledger, "0-7", saying="nothing of CPU 0-7 would be left", remedy="7 or fewer")


def test_a_home_of_somebody_else_is_refused(ledger: Ledger) -> None:
    os.mkdir(HOME)
    refuses(ledger, "4-5", saying="knows nothing of", remedy=f"rmdir {HOME}/*/ {HOME}")
    os.rmdir(HOME)


def test_what_would_break_running_vms_is_refused_before_it_does(sibling: str, ledger: Ledger) -> None:
    settled(ledger, A)
    guest = Guest(A)
    put(f"{sibling}/cpuset.cpus", "6")
    before = tree()
    for more in (B, vm("e" * 32, "0-3,6-7")):
        assert partition.settle(HOST, ledger, [A, more]) != []
        assert difference(before, tree()) == []
    assert_kept(A)
    assert guest.pinned()
    guest.end()
    assert partition.settle(HOST, ledger, []) == []


def test_a_user_is_told_to_ask_root(ledger: Ledger, tmp_path: Path) -> None:
    def asks() -> object:
        os.setresuid(NOBODY, NOBODY, NOBODY)
        return partition.obstacle(HOST, ledger, CpuSet.parse("4"))

    before = tree()
    answer = child(asks)
    assert f"belongs to root, and this is uid {NOBODY}" in str(answer)
    assert as_root() in str(answer)
    assert difference(before, tree()) == []


def unshare(flags: int) -> None:
    """Give this process a mount namespace, and others, of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.unshare(0x20000 | flags) == 0
    assert libc.mount(None, b"/", None, 0x4000 | 0x40000, None) == 0


def test_a_read_only_tree_is_refused(ledger: Ledger) -> None:
    def asks() -> object:
        unshare(0)
        assert ctypes.CDLL(None).mount(None, TREE.encode(), None, 0x20 | 0x1 | 0x1000, None) == 0
        return partition.obstacle(HOST, ledger, CpuSet.parse("4")), partition.settle(HOST, ledger, [A])

    answer = str(child(asks))
    assert f"{TREE} is mounted read-only" in answer
    assert f"mount -o remount,rw {TREE}" in answer


def test_a_containers_tree_is_refused(ledger: Ledger) -> None:
    os.mkdir(f"{TREE}/container")

    def asks() -> object:
        put("container/cgroup.procs", "0")
        unshare(0x02000000)
        libc = ctypes.CDLL(None)
        assert libc.umount2(TREE.encode(), 2) == 0
        assert libc.mount(b"cgroup", TREE.encode(), b"cgroup2", 0, None) == 0
        assert not os.path.exists(f"{TREE}/container")
        return partition.obstacle(HOST, ledger, CpuSet.parse("4")), partition.settle(HOST, ledger, [A])

    answer = str(child(asks))
    assert "this is a container" in answer
    assert "run it on the host" in answer
    os.rmdir(f"{TREE}/container")


@pytest.mark.vm(cmdline="isolcpus=4-5 nohz_full=4-5")
def test_cpus_set_apart_at_boot_are_refused(ledger: Ledger) -> None:
    refuses(ledger, "4-5", saying="CPU 4-5 was set apart at boot with isolcpus=", remedy="kernel's command line")
    settled_isolated = vm("f" * 32, "2-3")
    assert partition.settle(HOST, ledger, [settled_isolated]) == []
    assert get("cpuset.cpus.effective") == "0-1,4-7"


@pytest.mark.vm(cmdline="nohz_full=4-7")
def test_the_last_cpu_without_nohz_full_stays_with_the_host(ledger: Ledger) -> None:
    refuses(ledger, "0-3", saying="only CPU 4-7 would be left", remedy="leave another CPU to the host")
    settled(ledger, A)


@pytest.mark.vm(cmdline="cgroup_disable=cpuset")
def test_a_controller_switched_off_at_boot_is_named(ledger: Ledger) -> None:
    refuses(ledger, "4", saying="switched off at boot with 'cgroup_disable=cpuset'", remedy="command line")


@pytest.mark.vm(topology="1")
def test_a_host_with_one_cpu_keeps_it(ledger: Ledger) -> None:
    refuses(ledger, "0", saying="nothing of CPU 0 would be left", remedy="one CPU can give none away")


# -- others interfere ----------------------------------------------------------------------------------


def polled(files: Sequence[int]) -> list[int]:
    """Return which of the files the kernel says have changed."""
    poll = select.poll()
    for fd in files:
        poll.register(fd, select.POLLPRI)
    found = [files.index(fd) for fd, _ in poll.poll(1000)]
    for fd in files:
        os.pread(fd, 4096, 0)
    return found


def test_a_sibling_that_comes_later_is_seen_and_told(sibling: str, ledger: Ledger) -> None:
    settled(ledger, A)
    guest = Guest(A)
    files = [os.open(HOST.path(name), os.O_RDONLY) for name in partition.watch_files(HOST, A.token)]
    assert [os.pread(fd, 4096, 0) for fd in files] == [b"isolated\n"] * 2
    put(f"{sibling}/cpuset.cpus", "4")
    assert 0 in polled(files)
    assert any("no isolated partition any more" in problem for problem in partition.check(HOST, [A]))
    assert any("lays claim to CPU 4" in problem for problem in partition.settle(HOST, ledger, [A]))
    put(f"{sibling}/cpuset.cpus", "0")
    settled(ledger, A)
    assert guest.pinned()
    guest.end()
    for fd in files:
        os.close(fd)
    assert partition.settle(HOST, ledger, []) == []


def off_and_on(*cpus: int) -> None:
    """Take all of them offline and then all online again."""
    for to in (False, True):
        for cpu in cpus:
            cpu_online(cpu, to=to)
    time.sleep(0.3)


def test_isolation_in_name_only_is_seen_and_mended(ledger: Ledger) -> None:
    settled(ledger, A)
    guest = Guest(A)
    put(f"{A.token}/cpuset.cpus.partition", "member", HOME)  # so that the home itself has tasks
    off_and_on(4, 5)
    leaked = CpuSet.parse(get("cpuset.cpus.effective")) & A.pcpus
    if not before_linux_6_7():
        assert get("hostpart/cpuset.cpus.partition") == "isolated"
        assert leaked
    if leaked:
        assert any("says it is isolated, and tasks of the host may run" in line for line in partition.check(HOST, [A]))
    assert partition.check(HOST, [A]) != []
    settled(ledger, A)
    assert refused_affinity(0, 4)
    assert refused_affinity(0, 5)
    guest.end()


@pytest.mark.parametrize("cpus", [(5,), (4, 5), (6,), (4, 5, 6, 7)], ids=str)
def test_cpus_that_go_and_come_back_are_kept_again(ledger: Ledger, cpus: tuple[int, ...]) -> None:
    settled(ledger, A, B)
    guests = Guest(A), Guest(B)
    for cpu in cpus:
        cpu_online(cpu, to=False)
    gone = [one for one in (A, B) if one.pcpus <= CpuSet.of(cpus)]
    said = partition.check(HOST, [A, B])
    assert len(said) == len(gone)
    assert all("is offline" in problem for problem in said)
    assert partition.settle(HOST, ledger, [A, B]) == said
    for cpu in cpus:
        cpu_online(cpu, to=True)
    time.sleep(0.3)
    settled(ledger, A, B)
    for guest in guests:
        guest.end()


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hostpart/cpuset.cpus.partition", "member"),
        ("hostpart/cpuset.cpus.partition", "root"),
        (f"hostpart/{A.token}/cpuset.cpus.partition", "member"),
        (f"hostpart/{A.token}/cpuset.cpus.partition", "root"),
        ("hostpart/cpuset.cpus", "2,4-7"),
        ("hostpart/cpuset.cpus", "4-6"),
        (f"hostpart/{A.token}/cpuset.cpus", "4"),
        (f"hostpart/{B.token}/cpuset.mems", "0"),
        ("hostpart/cgroup.subtree_control", "-cpuset"),
    ],
    ids=lambda value: value.rpartition("/")[2],
)
def test_what_somebody_wrote_is_seen_and_mended(ledger: Ledger, name: str, text: str) -> None:
    settled(ledger, A, B)
    guests = Guest(A), Guest(B)
    put(name, text)
    assert partition.check(HOST, [A, B]) != []
    settled(ledger, A, B)
    for guest in guests:
        guest.end()


def test_the_controller_cannot_be_taken_away_above(ledger: Ledger) -> None:
    settled(ledger, A)
    with pytest.raises(OSError, match="busy"):
        put("cgroup.subtree_control", "-cpuset")
    put("cgroup.subtree_control", "-cpuset", HOME)
    put("cgroup.subtree_control", "-cpuset")
    assert any("switched off" in problem for problem in partition.check(HOST, [A]))
    settled(ledger, A)


def test_other_controllers_are_left_alone(ledger: Ledger) -> None:
    settled(ledger, A)
    put("cgroup.subtree_control", "+pids")
    assert partition.settle(HOST, ledger, []) == []
    assert get("cgroup.subtree_control") == "pids"
    put("cgroup.subtree_control", "-pids")


def test_a_controller_that_others_use_by_now_stays_on_and_is_said(ledger: Ledger) -> None:
    settled(ledger, A)
    os.mkdir(f"{TREE}/late")
    put("late/cpuset.cpus", "0-1")
    said = partition.settle(HOST, ledger, [])
    assert len(said) == 1
    assert "stays on" in said[0]
    assert "'late'" in said[0]
    assert get("late/cpuset.cpus") == "0-1"
    assert partition.settle(HOST, ledger, []) == []
    os.rmdir(f"{TREE}/late")
    put("cgroup.subtree_control", "-cpuset")


# -- crashes -------------------------------------------------------------------------------------------

STEPS: tuple[list[Holding], ...] = ([A], [A, B], [B], [])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.vm(limit_s=300)
def test_a_death_at_any_write_is_undone_by_the_next_call(ledger: Ledger, when: str) -> None:
    # With the controller on already: an emulated machine does not like its kernel to patch itself that often.
    put("cgroup.subtree_control", "+cpuset")
    before = tree()
    for number in itertools.count(1):
        if not dies(ledger, f"write.{when}@{number}", STEPS):
            break
        assert partition.settle(HOST, ledger, []) == []
        assert difference(before, tree()) == [], f"after a death {when} write {number}"
        assert ledger.known() == {}
    assert number > 20
    put("cgroup.subtree_control", "-cpuset")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_while_the_controller_is_switched_is_undone(ledger: Ledger, when: str) -> None:
    before = tree()
    for kind in ("write.cgroup.subtree_control", "write.mkdir", "write.rmdir", "ledger.remember", "ledger.forget"):
        assert dies(ledger, f"{kind}.{when}", ([A], []))
        assert partition.settle(HOST, ledger, []) == []
        assert difference(before, tree()) == [], kind


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_death_on_the_way_up_is_gone_on_with(ledger: Ledger, when: str) -> None:
    put("cgroup.subtree_control", "+cpuset")
    for number in itertools.count(1):
        if not dies(ledger, f"write.{when}@{number}", ([A, B],)):
            break
        settled(ledger, A, B)
        assert partition.settle(HOST, ledger, []) == []
    assert number > 10
    assert partition.settle(HOST, ledger, []) == []
    put("cgroup.subtree_control", "-cpuset")


def dies(ledger: Ledger, point: str, steps: Sequence[list[Holding]]) -> bool:
    """Settle one step after the other in a process that dies at that point; whether it got there."""
    pid = os.fork()
    if not pid:
        with Ledger(ledger.directory) as own:  # SQLite's connections do not survive a fork
            crash.arm(point)
            for step in steps:
                partition.settle(HOST, own, step)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


def test_a_rehearsal_lists_the_writes_and_makes_none(ledger: Ledger) -> None:
    before = tree()
    host = Rehearsal()
    assert partition.settle(host, ledger.copy(), [B]) == []
    assert difference(before, tree()) == []
    for line in host.writes:
        subprocess.run(["sh", "-c", line], check=True)
    assert_kept(B)
    ledger.remember({"partition:sys/fs/cgroup": Known("-", (str(B.released),))})  # what was done by hand is not in it
    host = Rehearsal()
    assert partition.settle(host, ledger.copy(), []) == []
    assert_kept(B)
    for line in host.writes:
        subprocess.run(["sh", "-c", line], check=True)
    assert difference(before, tree()) == []


# -- other homes ---------------------------------------------------------------------------------------


@pytest.fixture
def handed_over() -> Iterator[str]:
    """A partition that an administrator has made for the user nobody, with a cgroup for shells in it."""
    put("cgroup.subtree_control", "+cpuset")
    top = f"{TREE}/theirs"
    os.makedirs(f"{top}/shell")
    put("cpuset.cpus", "4-7", top)
    put("cpuset.cpus.partition", "root", top)
    for name in ("", "cgroup.procs", "cgroup.subtree_control", "cgroup.threads", "shell", "shell/cgroup.procs"):
        os.chown(f"{top}/{name}", NOBODY, NOBODY)
    yield top
    os.rmdir(f"{top}/shell")
    os.rmdir(top)
    put("cgroup.subtree_control", "-cpuset")


def as_nobody(what: Callable[[Ledger], object], cgroup: str, directory: Path) -> str:
    """Call it as the user nobody, in that cgroup, with a ledger of that user's."""

    def does() -> object:
        put("cgroup.procs", "0", cgroup)
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        with Ledger(str(directory)) as own:
            return what(own)

    directory.mkdir()
    os.chown(directory, NOBODY, NOBODY)
    for above in directory.parents:
        above.chmod(above.stat().st_mode | 0o755)
    return str(child(does))


def test_a_user_has_a_home_in_a_partition_handed_over(handed_over: str, tmp_path: Path) -> None:
    mine = vm("a" * 32, "5-6")

    def uses(own: Ledger) -> object:
        said: list[object] = [
            partition.obstacle(HOST, own, mine.pcpus),
            partition.settle(HOST, own, [mine]),
            partition.check(HOST, [mine]),
        ]
        guest = Guest(mine)
        said += [get("cpuset.cpus.effective", handed_over), guest.pinned(), refused_affinity(0, 5)]
        said += [
            partition.settle(HOST, own, []),
            guest.killed(),
            get("cpuset.cpus.effective", handed_over),
            own.known(),
        ]
        return said

    before = tree()
    assert as_nobody(uses, f"{handed_over}/shell", tmp_path / "own") == str(
        [None, [], [], "4,7", True, True, [], True, "4-7", {}]
    )
    assert difference(before, tree()) == []


def test_a_user_can_take_no_more_than_was_handed_over(handed_over: str, tmp_path: Path) -> None:
    def asks(own: Ledger) -> object:
        return [partition.settle(HOST, own, [vm("a" * 32, cpus)]) for cpus in ("3-4", "4-7")]

    before = tree()
    said = as_nobody(asks, f"{handed_over}/shell", tmp_path / "own")
    assert "CPU 3 is not among those" in said
    assert "nothing of CPU 4-7 would be left" in said
    assert difference(before, tree()) == []


def systemctl(*args: str) -> None:
    """Have systemd do something, and let it end what it does after its answer."""
    subprocess.run(["systemctl", *args], check=True, timeout=60)
    time.sleep(0.5)


@pytest.mark.vm(setups=("systemd",))
def test_systemd_neither_takes_the_home_away_nor_is_disturbed(ledger: Ledger) -> None:
    assert Path("/proc/1/comm").read_text() == "systemd\n"
    Path("/run/systemd/system/other.service").write_text("[Service]\nExecStart=/bin/sleep 1000\nSlice=other.slice\n")
    settled(ledger, A)
    guest = Guest(A)
    for command in (
        ["daemon-reload"],
        ["start", "other.service"],
        ["set-property", "--runtime", "other.slice", "AllowedCPUs=0-2"],
        ["restart", "other.service"],
        ["daemon-reload"],
        ["daemon-reexec"],
        ["set-property", "--runtime", "other.slice", "AllowedCPUs="],
        ["stop", "other.service", "other.slice"],
        ["daemon-reload"],
    ):
        systemctl(*command)
        assert partition.check(HOST, [A]) == [], command
        assert_kept(A)
        assert guest.pinned()
    guest.end()
    os.unlink("/run/systemd/system/other.service")


@pytest.mark.vm(setups=("systemd",))
def test_a_slice_that_overlaps_is_narrowed_as_the_remedy_says(ledger: Ledger) -> None:
    # A systemd that could not switch the controller off believes it is on until it next starts or reloads anything.
    systemctl("daemon-reload")
    systemctl("set-property", "--runtime", "system.slice", "AllowedCPUs=0-4")
    found = partition.obstacle(HOST, ledger, A.pcpus)
    assert found is not None
    assert "system.slice lays claim to CPU 4" in found.problem
    command = found.remedy.split("'")[1]
    assert command == "systemctl set-property --runtime system.slice AllowedCPUs=0-3"
    systemctl(*command.split()[1:])
    settled(ledger, A)
    assert partition.settle(HOST, ledger, []) == []
    systemctl("set-property", "--runtime", "system.slice", "AllowedCPUs=")
