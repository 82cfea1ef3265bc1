"""VMs whose vCPUs are threads of a process that stays with the host, inside virtual machines.

A keeper here is one without a front: it is forked, enters its VM, takes the host up the ladder with the code that a
keeper has for that, and starts a process with threads. What holds is read from the kernel's files and by trying.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation import cpuset1, partition
from hostpart.isolation.level import Wish
from hostpart.isolation.watch import Watch
from hostpart.ledger import Holding, Known, Ledger, VcpuRow, VmRow, boot_id
from hostpart.procfs import start_time
from hostpart.rehearsal import Rehearsal
from tests.vm.command import run, sleeper, wait_until
from tests.vm.files import cpu_online, get, put
from tests.vm.fingerprint import difference, fingerprint
from tests.vm.remains import remains
from tests.vm.seldom import SELDOM
from workers import crash

pytestmark = pytest.mark.vm(limit_s=240)

TREE = Path("/sys/fs/cgroup")
HOST = Host()
KEPT = {0, 1}  # where a threaded guest's other threads are
CPUS = CpuSet.parse("0-7")


def old() -> bool:
    """Whether the kernel gives tasks other masks for good (before Linux 6.2)."""
    return os.uname().release.startswith("6.1.")


@pytest.fixture(autouse=True)
def _off() -> None:
    if TREE.joinpath("cgroup.subtree_control").exists() and not os.path.isdir("/run/systemd/system"):
        for name in TREE.joinpath("cgroup.subtree_control").read_text().split():
            put("cgroup.subtree_control", f"-{name}")


@pytest.fixture
def before() -> Iterator[dict[str, str]]:
    """The host as it is before anything; as such it is found again at the end, with an empty ledger."""
    for cpus in ((), (1,), (4,), (1, 4), (4, 5, 6, 7)):
        sleeper(*cpus)
    found = fingerprint()
    yield found
    left: list[str] = []

    def same() -> bool:
        left[:] = remains(found)
        return not left

    assert wait_until(same, 5.0), "\n".join(left)


def refused(tid: int, cpu: int) -> bool:
    """Whether the kernel refuses to let a thread run there."""
    try:
        os.sched_setaffinity(tid, {cpu})
    except OSError as error:
        return error.errno == errno.EINVAL
    return False


class Vm:
    """A VM with its keeper.

    :ivar pid: the keeper
    :ivar guest: the process whose threads are vCPUs, or the one process of a VM that has no such
    :ivar tids: the vCPUs that are threads, in the order of *cpus*
    :ivar others: the further threads of that process, its main one first
    :ivar workers: vCPUs that are processes, each with the child that it has forked
    """

    def __init__(
        self, name: str, *cpus: int, level: str = "cpuset", threaded: bool = True, worker: int | None = None
    ) -> None:
        self.name, self.cpus, self.threaded, self.worker = name, cpus, threaded, worker
        self.token = f"{name:_<32}"
        orders, self._orders = os.pipe()
        self._answers, answers = os.pipe()
        self.pid = os.fork()
        if not self.pid:
            os.close(self._orders)
            os.close(self._answers)
            _Keeper(self, level, orders, answers).run()
        os.close(orders)
        os.close(answers)
        said = self._hear()
        self.guest: int = said["guest"]
        self.tids: list[int] = said["tids"]
        self.others: list[int] = said["others"]
        self.workers: list[int] = said["workers"]
        self.process: str = said["process"]
        self.file: str = said["threads"]

    def _hear(self) -> Any:
        data = b""
        while not data.endswith(b"\n"):
            more = os.read(self._answers, 65536)
            assert more, f"the keeper of {self.name} has ended: {data!r}"
            data += more
        found = json.loads(data)
        assert "failed" not in found, found["failed"]
        return found

    def look(self) -> list[str]:
        """Have the keeper look; return its notes since the last time."""
        os.write(self._orders, b"look\n")
        notes: list[str] = self._hear()["notes"]
        return notes

    def end(self) -> None:
        """End the guest, and then the VM."""
        os.write(self._orders, b"end\n")
        notes = self._hear()["notes"]
        assert os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1]) == 0, notes

    def kill(self) -> None:
        """Kill the keeper, and nothing else."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def holds(self) -> None:
        """See that all is where it should be, and may not be anywhere else."""
        union = CpuSet.of(self.cpus)
        home = "hostpart-threads" if self.threaded else "hostpart"
        assert get(f"{home}/{self.token}/cpuset.cpus.effective") == str(union)
        assert get(f"{home}/{self.token}/cpuset.cpus.partition") == "isolated"
        assert not CpuSet.parse(get("cpuset.cpus.effective")) & union
        inside = [*self.tids, *self.workers] if self.threaded else [self.guest]
        cpus = [*self.cpus[: len(self.tids)], self.worker, self.worker] if self.threaded else [self.cpus[0]]
        for tid, cpu in zip(inside, cpus, strict=False):
            assert os.sched_getaffinity(tid) == {cpu}
            assert cgroup(tid) == f"/{home}/{self.token}"
            assert refused(tid, 0)
            assert os.sched_getaffinity(tid) == {cpu}
        for tid in self.others:
            assert os.sched_getaffinity(tid) == KEPT
            assert cgroup(tid) == "/"
            assert all(refused(tid, cpu) for cpu in self.cpus)
        assert all(refused(tid, cpu) for tid in (0, 1) for cpu in self.cpus)


def cgroup(tid: int) -> str:
    """Return the cgroup v2 of a thread."""
    return Path(f"/proc/{tid}/cgroup").read_text().split("0::")[1].strip()


class _Keeper:
    def __init__(self, vm: Vm, level: str, orders: int, answers: int) -> None:
        self.vm, self.level = vm, level
        self.orders, self.answers = os.fdopen(orders), answers
        self.notes: list[str] = []

    def run(self) -> NoReturn:
        code = 1
        try:
            self._run()
            code = 0
        except BaseException:
            import traceback

            self._say({"failed": traceback.format_exc()})
        finally:
            os._exit(code)

    def _say(self, what: object) -> None:
        os.write(self.answers, json.dumps(what).encode() + b"\n")

    def _run(self) -> None:
        vm = self.vm
        with Ledger() as ledger:
            row = VmRow(
                0, vm.name, 0, vm.token, boot_id(), "RUNNING", len(vm.cpus), "none", os.getpid(),
                start_time(os.getpid()) or 0, os.getppid(), time.time(), pcpus=str(CpuSet.of(vm.cpus)),
                threaded=int(vm.threaded),
            )  # fmt: skip
            row = row.replace(id=ledger.add_vm(row))
            watch = Watch(ledger, HOST, row, self.notes.append)
            assert watch.begin(Wish(self.level, require=True, threaded=vm.threaded)).reached == self.level
            said = self._threads(watch) if vm.threaded else self._process(watch)
            pids = [said["guest"]] * len(vm.cpus)
            for at, cpu in enumerate(vm.cpus):
                pid = said["workers"][0] if cpu == vm.worker else pids[at]
                tid = said["tids"][at] if at < len(said["tids"]) else 0
                ledger.add_vcpu(VcpuRow(row.id, at, cpu, 0, pid, start_time(pid) or 0, "RUNNING", tid))
            self._say({**said, "process": watch.process, "threads": watch.threads})
            for order in self.orders:
                if order == "end\n":
                    break
                watch.look()
                self._say({"notes": self.notes})
                self.notes.clear()
            for pid in {*pids, *said["workers"]}:
                os.kill(pid, signal.SIGKILL)
            for pid in {said["guest"], *said["workers"][:1]}:
                os.waitpid(pid, 0)
            watch.end()
            ledger.remove_vm(row.id)
            self._say({"notes": self.notes})

    def _process(self, watch: Watch) -> dict[str, Any]:
        assert watch.process == watch.threads == ""
        file = watch.leaf.procs_path if watch.leaf is not None else watch.procs
        pid = os.fork()
        if not pid:
            Path(file).write_text("0")
            os.sched_setaffinity(0, {self.vm.cpus[0]})
            _sleep()
        pin = {self.vm.cpus[0]}
        assert not file or wait_until(lambda: os.sched_getaffinity(pid) == pin)
        return {"guest": pid, "tids": [], "others": [], "workers": []}

    def _threads(self, watch: Watch) -> dict[str, Any]:
        vm = self.vm
        assert watch.leaf is None
        assert watch.procs == ""
        vcpus = [cpu for cpu in vm.cpus if cpu != vm.worker]
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            _guest(watch.process, len(vcpus) + 1, write)
        *tids, extra = json.loads(os.read(read, 4096))
        for tid, cpu in zip(tids, vcpus, strict=True):
            if watch.threads:
                Path(watch.threads).write_text(str(tid))
            os.sched_setaffinity(tid, {cpu})
        workers = []
        if vm.worker is not None:
            worker = os.fork()
            if not worker:
                Path(watch.process).write_text("0")
                Path(watch.threads).write_text("0")
                os.sched_setaffinity(0, {vm.worker})
                born = os.fork()
                os.write(write, f"{born}\n".encode() if born else b"")
                _sleep()
            workers = [worker, int(os.read(read, 16))]
        return {"guest": pid, "tids": tids, "others": [pid, extra], "workers": workers}


def _sleep() -> NoReturn:
    while True:
        time.sleep(0.01)


def _guest(process: str, count: int, answers: int) -> NoReturn:
    # A process with threads of which it does not know which are vCPUs.
    try:
        if process:
            Path(process).write_text("0")
        os.sched_setaffinity(0, KEPT)
        tids: list[int] = []

        def thread() -> None:
            tids.append(threading.get_native_id())
            _sleep()

        for _ in range(count):
            threading.Thread(target=thread, daemon=True).start()
        while len(tids) < count:
            time.sleep(0.01)
        os.write(answers, json.dumps(tids).encode())
        _sleep()
    finally:
        os._exit(1)


# -- effect --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", ["cpuset", "full"])
def test_threads_are_inside_and_all_others_outside(before: dict[str, str], level: str) -> None:
    vm = Vm("t", 4, 5, level=level)
    assert vm.process == f"{TREE}/cgroup.procs"
    assert vm.file == f"{TREE}/hostpart-threads/{vm.token}/cgroup.threads"
    vm.holds()
    assert vm.look() == []
    assert subprocess.run(["taskset", "-pc", "4", str(vm.others[1])], capture_output=True, check=False).returncode != 0
    assert subprocess.run(["taskset", "-pc", "2", str(vm.tids[1])], capture_output=True, check=False).returncode != 0
    vm.holds()
    vm.end()
    assert not (TREE / "hostpart-threads").exists()


def test_a_vcpu_may_be_a_process_among_threads(before: dict[str, str]) -> None:
    vm = Vm("m", 4, 5, 7, worker=7)
    assert len(vm.workers) == 2
    vm.holds()
    assert vm.look() == []
    vm.end()


# The first letters start, in this order; then they end: t and u have threads, o has none, s is swept only.
@pytest.mark.parametrize(
    "order",
    [pytest.param(order, marks=SELDOM) for order in ("to-to", "to-ot", "ot-to", "ot-ot")] + ["tsuo-suto", "ostu-utos"],
)
def test_vms_of_both_kinds_come_and_go(before: dict[str, str], order: str) -> None:
    make = {
        "t": lambda: Vm("t", 4, 5),
        "o": lambda: Vm("o", 6, threaded=False),
        "u": lambda: Vm("u", 3),
        "s": lambda: Vm("s", 7, level="sweep"),
    }
    come, go = order.split("-")
    vms: dict[str, Vm] = {}
    for name in come:
        vms[name] = make[name]()
        _all_hold(vms)
    for name in go:
        vms.pop(name).end()
        _all_hold(vms)


def _all_hold(vms: dict[str, Vm]) -> None:
    for name, vm in vms.items():
        if name == "s":
            assert [os.sched_getaffinity(tid) for tid in vm.tids] == [{7}]
            assert [os.sched_getaffinity(tid) for tid in vm.others] == [KEPT] * 2
        else:
            vm.holds()
        assert vm.look() == []
    union = CpuSet.of(cpu for name, vm in vms.items() if name != "s" for cpu in vm.cpus)
    assert get("cpuset.cpus.effective") == str(CPUS - union)


@pytest.mark.parametrize("beside", [False, True])
def test_a_killed_keepers_vm_leaves_nothing(before: dict[str, str], beside: bool) -> None:
    other = Vm("o", 6, threaded=False) if beside else None
    vm = Vm("t", 4, 5, 7, worker=7)
    vm.kill()
    assert os.path.exists(f"/proc/{vm.guest}")  # nobody has told it
    done = run("restore")
    assert done.code == 0, done.err
    for pid in (vm.guest, *vm.workers):
        assert wait_until(lambda pid=pid: _ended(pid), 5.0)
    if other is not None:
        other.holds()
        other.end()


def _ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return True


# -- others interfere ----------------------------------------------------------------------------------


def test_the_controller_cannot_be_taken_away_above(before: dict[str, str]) -> None:
    vm = Vm("t", 4, 5)
    with pytest.raises(OSError, match="busy"):
        put("cgroup.subtree_control", "-cpuset")
    os.rmdir(TREE / "hostpart-threads" / "guard")
    with pytest.raises(OSError, match="busy"):
        put("cgroup.subtree_control", "-cpuset")
    vm.holds()
    vm.end()


@pytest.mark.parametrize("file", ["home", "vm"])
def test_a_broken_partition_is_seen_and_mended(before: dict[str, str], file: str) -> None:
    vm, other = Vm("t", 4, 5), Vm("o", 6, threaded=False)
    assert vm.look() == []
    put(f"hostpart-threads/{vm.token if file == 'vm' else ''}/cpuset.cpus.partition", "member")
    assert other.look() == []
    notes = vm.look()
    assert any("is no isolated partition any more" in note for note in notes), notes
    assert any("the partition was mended" in note for note in notes), notes
    _pin(vm)
    vm.holds()
    other.holds()
    vm.end()
    other.end()


def _pin(vm: Vm) -> None:
    # What a keeper does about threads that have drifted.
    for tid, cpu in zip(vm.tids, vm.cpus, strict=True):
        os.sched_setaffinity(tid, {cpu})


@pytest.mark.parametrize("whole", [False, True])
def test_a_thread_that_was_moved_out_comes_back(before: dict[str, str], whole: bool) -> None:
    vm = Vm("m", 4, 5, 7, worker=7)
    os.mkdir(TREE / "elsewhere")
    assert vm.look() == []
    for tid in (vm.guest, vm.workers[0]) if whole else (vm.tids[0], vm.workers[0]):
        put("elsewhere/cgroup.procs" if whole else "cgroup.threads", str(tid))
    notes = vm.look()
    assert any("vCPU 0 is not in" in note for note in notes), notes
    assert any("was mended" in note and "vCPU 2 is not in" in note for note in notes), notes
    assert vm.look() == []
    vm.holds()
    vm.end()
    os.rmdir(TREE / "elsewhere")


@pytest.mark.parametrize("cpus", [(5,), (4, 5)], ids=str)
def test_cpus_that_go_and_come_back_are_kept_again(before: dict[str, str], cpus: Sequence[int]) -> None:
    vm, other = Vm("t", 4, 5), Vm("o", 6, threaded=False)
    for cpu in cpus:
        cpu_online(cpu, to=False)
    time.sleep(0.3)
    vm.look()
    other.look()
    assert [os.sched_getaffinity(tid) for tid in vm.others] == [KEPT] * 2
    for cpu in cpus:
        cpu_online(cpu, to=True)
    time.sleep(0.3)
    vm.look()
    vm.look()
    other.look()
    _pin(vm)
    os.sched_setaffinity(other.guest, {6})
    vm.holds()
    other.holds()
    assert vm.look() == []
    vm.end()
    other.end()


@pytest.mark.vm(setups=("systemd",))
def test_systemd_neither_takes_the_home_away_nor_keeps_the_process() -> None:
    vm = Vm("t", 4, 5)
    assert vm.look() == []
    for command in ("daemon-reload", "daemon-reexec", "daemon-reload"):
        subprocess.run(["systemctl", command], check=True, timeout=60)
        time.sleep(0.5)
        notes = vm.look()
        # When it executes itself anew it moves all processes of the tree's root to its own cgroup.
        assert (command == "daemon-reexec") == any("vCPU 0 is not in" in note for note in notes), notes
        vm.holds()
        assert vm.look() == []
    vm.end()
    assert not (TREE / "hostpart-threads").exists()


# -- the cgroups alone ---------------------------------------------------------------------------------


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own; the tree is as it was when the test has ended."""
    tree = fingerprint(tasks=False)
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        assert partition.settle(HOST, ledger, []) == []
        assert difference(tree, fingerprint(tasks=False)) == []
        assert ledger.known() == {}


def held(letter: str, pcpus: str, *, threaded: bool, mems: str = "") -> Holding:
    """Return what a VM holds."""
    return Holding(
        letter * 32, 0, 0, "cpuset", "host", CpuSet.parse(pcpus), CpuSet(), CpuSet.parse(mems), False, threaded
    )


T, U = held("t", "4-5", threaded=True), held("u", "3", threaded=True, mems="0")
Q, P = held("o", "6", threaded=False, mems="1"), held("p", "4-5", threaded=False)


def settled(ledger: Ledger, *vms: Holding) -> None:
    """Settle, and see by the kernel's word that it is so."""
    assert partition.settle(HOST, ledger, vms) == []
    assert partition.check(HOST, vms) == []
    union = CpuSet.of(cpu for one in vms for cpu in one.pcpus)
    assert get("cpuset.cpus.effective") == str(CPUS - union)
    if (TREE / "cpuset.cpus.isolated").exists():
        assert get("cpuset.cpus.isolated") == str(union)
    for home, threaded in (("hostpart", False), ("hostpart-threads", True)):
        its = {one.token: one for one in vms if one.threaded == threaded}
        there = {entry.name for entry in os.scandir(TREE / home) if entry.is_dir()} if (TREE / home).is_dir() else set()
        assert there == ({*its, "guard"} if its else set())
        for token, one in its.items():
            assert get(f"{home}/{token}/cpuset.cpus.effective") == str(one.pcpus)
            assert get(f"{home}/{token}/cpuset.cpus.partition") == "isolated"
            assert get(f"{home}/{token}/cpuset.mems.effective") == (str(one.mems) or "0-1")
            assert get(f"{home}/{token}/cgroup.type") == ("threaded" if threaded else "domain")


def test_pcpus_go_from_one_home_to_the_other(ledger: Ledger) -> None:
    settled(ledger, T, Q)
    settled(ledger, P, U)
    settled(ledger, P, Q)
    settled(ledger, T, U)
    settled(ledger, held("q", "3,5", threaded=False), held("v", "4", threaded=True), Q)
    settled(ledger, held("w", "3,6", threaded=True), held("x", "4", threaded=False), held("y", "5", threaded=True))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=SELDOM) for seed in (1, 2))])
def test_whatever_is_held_is_what_is_kept(ledger: Ledger, seed: int) -> None:
    chance = random.Random(seed)
    put("cgroup.subtree_control", "+cpuset")  # spares the emulated machine the patching of its own kernel
    # Each pCPU may be one VM's or another's, of either kind.
    vms: dict[int, Holding] = {}
    for number in range(10):
        for cpu in range(1, 7):
            if chance.random() < 0.5:
                vms.pop(cpu, None)
                if chance.random() < 0.6:
                    name = chr(ord("a") + number) + str(cpu)
                    vms[cpu] = held(name, str(cpu), threaded=chance.random() < 0.5)
        settled(ledger, *vms.values())
    assert partition.settle(HOST, ledger, []) == []
    put("cgroup.subtree_control", "-cpuset")


def test_settling_again_writes_nothing(ledger: Ledger) -> None:
    settled(ledger, T, Q)
    crash.arm("write.before")  # the first write would kill
    try:
        settled(ledger, T, Q)
    finally:
        crash.arm("")


def test_a_home_of_somebody_else_is_refused(ledger: Ledger) -> None:
    os.mkdir(TREE / "hostpart-threads")
    for one in (T, Q):
        found = partition.obstacle(HOST, ledger, one.pcpus, threaded=one.threaded)
        assert found is not None
        assert f"{TREE}/hostpart-threads that this ledger" in found.problem
        assert partition.settle(HOST, ledger, [one]) == [found.problem]
    os.rmdir(TREE / "hostpart-threads")


def test_a_sibling_that_overlaps_is_named_before_it_breaks_either_home(ledger: Ledger) -> None:
    settled(ledger, T, Q)
    os.mkdir(TREE / "sibling")
    put("sibling/cpuset.cpus", "3")
    assert any("sibling lays claim to CPU 3" in problem for problem in partition.settle(HOST, ledger, [T, Q, U]))
    settled(ledger, T, Q)
    assert partition.settle(HOST, ledger, [])[0].endswith("the cgroup 'sibling' uses it by now")
    os.rmdir(TREE / "sibling")
    put("cgroup.subtree_control", "-cpuset")


def test_a_rehearsal_lists_the_writes_and_makes_none(ledger: Ledger) -> None:
    before = fingerprint(tasks=False)
    host = Rehearsal()
    assert partition.settle(host, ledger.copy(), [T]) == []
    assert f"echo threaded > {TREE}/hostpart-threads/{T.token}/cgroup.type" in host.writes
    assert difference(before, fingerprint(tasks=False)) == []
    for line in host.writes:
        subprocess.run(["sh", "-c", line], check=True)
    assert partition.check(HOST, [T]) == []
    assert partition.settle(HOST, ledger, []) == []  # what was done by hand is not in it
    assert (TREE / "hostpart-threads").is_dir()
    copy = ledger.copy()
    copy.remember({f"partition:{str(TREE)[1:]}": Known("-", (str(T.released),))})
    host = Rehearsal()
    assert partition.settle(host, copy, []) == []
    for line in host.writes:
        subprocess.run(["sh", "-c", line], check=True)
    assert difference(before, fingerprint(tasks=False)) == []


STEPS: tuple[list[Holding], ...] = ([T], [T, Q], [P, U], [])


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.vm(limit_s=400, every=())
def test_a_death_at_any_write_is_undone_by_the_next_call(ledger: Ledger, when: str) -> None:
    put("cgroup.subtree_control", "+cpuset")
    before = fingerprint(tasks=False)
    for number in itertools.count(1):
        pid = os.fork()
        if not pid:
            with Ledger(ledger.directory) as own:
                crash.arm(f"write.{when}@{number}")
                for step in STEPS:
                    partition.settle(HOST, own, step)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0
        if died and number % 3 == 0:
            settled(ledger, U, Q)  # gone on with, and not only undone
        assert partition.settle(HOST, ledger, []) == []
        assert difference(before, fingerprint(tasks=False)) == [], f"after a death {when} write {number}"
        if not died:
            break
    sys.stdout.write(f"{number} writes\n")
    assert number > 30
    put("cgroup.subtree_control", "-cpuset")


# -- version 1 -----------------------------------------------------------------------------------------


@pytest.mark.vm(kernels=("6.1",), setups=("v1",), every=())
def test_version_1_takes_single_threads(before: dict[str, str]) -> None:
    vm, other = Vm("t", 4, 5), Vm("o", 6, threaded=False)
    home = f"{TREE}/cpuset/hostpart"
    assert (vm.process, vm.file) == ("", f"{home}/{vm.token}/tasks")
    for _ in range(2):
        assert Path(vm.file).read_text().split() == list(map(str, vm.tids))
        assert [os.sched_getaffinity(tid) for tid in vm.tids] == [{4}, {5}]
        assert [os.sched_getaffinity(tid) for tid in vm.others] == [KEPT] * 2
        assert all(refused(tid, 4) for tid in (0, 1, *vm.others))
        assert refused(vm.tids[0], 0)
        assert vm.look() == []
        Path(TREE / "cpuset/hostpart.system/tasks").write_text(str(vm.tids[0]))
        assert any("vCPU 0 is not in" in note for note in vm.look())
    other.end()
    assert [os.sched_getaffinity(tid) for tid in (*vm.tids, *vm.others)] == [{4}, {5}, KEPT, KEPT]
    with Ledger() as ledger:
        assert cpuset1.check(HOST, ledger.holdings()) == []
    vm.kill()
    assert run("restore").code == 0
    assert wait_until(lambda: _ended(vm.guest), 5.0)
