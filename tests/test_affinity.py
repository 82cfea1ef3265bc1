"""The sweep of a tree of processes of the test's own: who leaves, who stays, and every mask back as it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.isolation import affinity
from hostpart.isolation.affinity import Swept, escapees, read_tasks, settle
from hostpart.ledger import Holding, Known, Ledger
from hostpart.rehearsal import Rehearsal
from workers import crash

USABLE = sorted(os.sched_getaffinity(0))
pytestmark = pytest.mark.skipif(len(USABLE) < 2, reason="needs two CPUs")
KEPT, TAKEN = USABLE[0], USABLE[-1]

# It starts a child for each line: a list of CPUs to pin itself to; each says its pid and sleeps.
TREE = """
import json, os, signal, sys, threading
for line in sys.stdin:
    order = json.loads(line)
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        if order["cpus"]:
            os.sched_setaffinity(0, order["cpus"])
        if order["thread"]:
            ready = threading.Event()
            def thread():
                os.sched_setaffinity(threading.get_native_id(), order["thread"])
                ready.set()
                threading.Event().wait()
            threading.Thread(target=thread, daemon=True).start()
            ready.wait()
        if order["leave"]:
            child = os.fork()
            if child:
                os.write(write, str(child).encode())
                os._exit(0)
        else:
            os.write(write, str(os.getpid()).encode())
        while True:
            signal.pause()
    os.close(write)
    print(int(os.read(read, 20)), flush=True)
    os.close(read)
    if order["leave"]:
        os.waitpid(pid, 0)
"""


class Tree:
    """A process and what it starts, which no other test touches."""

    def __init__(self) -> None:
        self.top = subprocess.Popen(
            [sys.executable, "-c", TREE],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pids: list[int] = []

    def start(self, *cpus: int, thread: tuple[int, ...] = (), leave: bool = False) -> int:
        """Start one pinned to *cpus*, with a thread on other ones, or as the orphan of one that has ended."""
        assert self.top.stdin
        assert self.top.stdout
        self.top.stdin.write(json.dumps({"cpus": cpus, "thread": thread, "leave": leave}) + "\n")
        self.top.stdin.flush()
        self.pids.append(int(self.top.stdout.readline()))
        return self.pids[-1]

    def end(self) -> None:
        """Kill them all."""
        for pid in self.pids:
            os.kill(pid, 9)
        self.top.kill()
        self.top.communicate()

    def holding(self, cpus: CpuSet | None = None, level: str = "sweep") -> Holding:
        """A VM that has a CPU, as far as this tree is concerned."""
        taken = CpuSet.of([TAKEN]) if cpus is None else cpus
        return Holding("t", 0, 0, level, f"tree:{self.top.pid}", taken, CpuSet(), CpuSet(), False)


@pytest.fixture
def tree() -> Iterator[Tree]:
    """A tree with no process but its top; it ends with the test."""
    found = Tree()
    yield found
    found.end()


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    """A ledger of the test's own."""
    with Ledger(str(tmp_path)) as ledger:
        yield ledger
        settle(Host(), ledger, [], ())


def mask(tid: int) -> list[int]:
    """Return where a thread may run, by the system call and not by hostpart's reading."""
    return sorted(os.sched_getaffinity(tid))


def masks(pids: list[int]) -> dict[int, list[int]]:
    """Return where each thread of some processes may run."""
    return {int(tid): mask(int(tid)) for pid in pids for tid in os.listdir(f"/proc/{pid}/task")}


def everybody_else(pids: list[int]) -> dict[int, list[int]]:
    """Return where all other processes of this user's may run."""
    found = {}
    for name in os.listdir("/proc"):
        if name.isdigit() and int(name) not in pids:
            try:
                found[int(name)] = mask(int(name))
            except OSError:
                continue
    return found


def population(tree: Tree) -> list[int]:
    """Start processes that are free, pinned to what stays, pinned to what goes, and of two threads."""
    tree.start()
    tree.start(KEPT)
    tree.start(TAKEN)
    tree.start(thread=(TAKEN,))
    tree.start(TAKEN, thread=(KEPT,))
    return [tree.top.pid, *tree.pids]


def sweep(ledger: Ledger, *holdings: Holding, guests: tuple[int, ...] = ()) -> Swept:
    """Bring the tree to what *holdings* say."""
    return settle(Host(), ledger, holdings, guests)


def test_what_is_read_is_what_the_kernel_says() -> None:
    started, ready = threading.Event(), threading.Event()

    def thread() -> None:
        os.sched_setaffinity(threading.get_native_id(), {TAKEN})
        ready.set()
        started.wait()

    one = threading.Thread(target=thread)
    one.start()
    ready.wait()
    tasks = read_tasks(Host())
    started.set()
    one.join()
    this = tasks[os.getpid()]
    assert (this.tid, this.tgid, this.ppid) == (os.getpid(), os.getpid(), os.getppid())
    assert (this.uid, this.session, list(this.mask)) == (os.getuid(), os.getsid(0), USABLE)
    assert one.native_id is not None
    other = tasks[one.native_id]
    assert (other.tgid, list(other.mask), other.ppid) == (os.getpid(), [TAKEN], os.getppid())
    assert not this.kthread
    assert read_tasks(Host("/nowhere")) == {}


def test_a_tree_leaves_and_is_as_it_was_afterwards(tree: Tree, ledger: Ledger) -> None:
    pids = population(tree)
    before, others = masks(pids), everybody_else(pids)
    swept = sweep(ledger, tree.holding())
    service = sorted(CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text()) - CpuSet.of([TAKEN]))
    rest = [cpu for cpu in USABLE if cpu != TAKEN]
    want = {tid: [KEPT] if was == [KEPT] else service if was == [TAKEN] else rest for tid, was in before.items()}
    assert masks(pids) == want
    assert (swept.foreign, swept.escapees, swept.refused) == ((), (), ())
    assert swept.moved == sum(want[tid] != was for tid, was in before.items())
    after = everybody_else(pids)
    assert {pid: after[pid] for pid in others if pid in after} == {pid: others[pid] for pid in others if pid in after}
    back = sweep(ledger)
    assert masks(pids) == before
    assert (back.foreign, back.refused, back.postponed) == ((), (), ())
    assert ledger.known() == {}


def test_all_is_remembered_before_anything_is_written(tree: Tree, ledger: Ledger) -> None:
    population(tree)
    seen: list[int] = []

    class Looking(Host):
        def set_affinity(self, tid: int, cpus: CpuSet) -> None:
            with Ledger(ledger.directory) as other:
                known = other.known()
            assert [key for key in known if key.startswith(f"task:{tid}:") and str(cpus) in known[key].ours]
            assert {int(key.split(":")[1]) for key in known} >= {*tree.pids, tree.top.pid}
            seen.append(tid)
            super().set_affinity(tid, cpus)

    settle(Looking(), ledger, [tree.holding()], ())
    assert len(seen) > 3


def test_nothing_held_and_nothing_remembered_reads_nothing(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "listdir", lambda *_: pytest.fail("it looked"))
    assert sweep(ledger) == Swept()


class Opened:
    """Which tasks' files with the mask were opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.tids: set[int] = set()
        real = affinity._slurp

        def slurp(path: str) -> bytes:
            if path.endswith("/status"):
                self.tids.add(int(path.split("/")[-2]))
            return real(path)

        monkeypatch.setattr(affinity, "_slurp", slurp)


def _all_online() -> bool:
    folder = Path("/sys/devices/system/cpu")
    return (folder / "online").read_text() == (folder / "possible").read_text()


def test_the_file_is_read_of_tasks_only_whose_mask_the_call_does_not_surely_tell(
    tree: Tree, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, pinned = tree.start(), tree.start(KEPT)
    everywhere = mask(free) == sorted(CpuSet.parse(Path("/sys/devices/system/cpu/possible").read_text()))
    opened = Opened(monkeypatch)
    sweep(ledger, tree.holding())
    assert pinned in opened.tids
    assert (free in opened.tids) is not everywhere
    opened.tids.clear()
    sweep(ledger)
    # What is in the ledger is sure while no CPU is offline.
    assert (free in opened.tids, pinned in opened.tids) == (not _all_online(), not _all_online())
    assert (mask(free), mask(pinned)) == (USABLE, [KEPT])


def test_all_are_read_from_files_where_a_cpu_came_or_went_meanwhile(
    tree: Tree, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tree.start()
    said = [f"{KEPT}\n"]

    class Changing(Host):
        def read_text(self, name: str) -> str:
            return said.pop() if name.endswith("/online") and said else super().read_text(name)

    opened = Opened(monkeypatch)
    settle(Changing(), ledger, [tree.holding()], ())
    assert free in opened.tids
    assert TAKEN not in mask(free)


def test_a_scope_that_goes_by_the_user_reads_whose_each_task_is(
    tree: Tree, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = tree.start()
    opened = Opened(monkeypatch)
    settle(Rehearsal(), ledger.copy(), [tree.holding().replace(scope="user")], ())
    assert {free, os.getpid()} <= opened.tids


def test_a_rehearsal_lists_what_it_would_do_and_does_nothing(tree: Tree, ledger: Ledger) -> None:
    pids = population(tree)
    before = masks(pids)
    rehearsal = Rehearsal()
    swept = settle(rehearsal, ledger.copy(), [tree.holding()], ())
    assert len(rehearsal.writes) == swept.moved > 3
    assert all(write.startswith("taskset -pc ") for write in rehearsal.writes)
    assert masks(pids) == before
    assert ledger.known() == {}


def test_a_guest_and_those_below_it_stay(tree: Tree, ledger: Ledger) -> None:
    pids = population(tree)
    before = masks(pids)
    sweep(ledger, tree.holding(), guests=(tree.top.pid,))
    assert masks(pids) == before
    assert not {int(key.split(":")[1]) for key in ledger.known()} & set(before)
    assert escapees(Host(), [tree.holding()], (tree.top.pid,)) == []
    assert set(escapees(Host(), [tree.holding()], ())) > {tree.top.pid}


def test_who_puts_itself_back_is_found_and_moved_three_times(tree: Tree, ledger: Ledger) -> None:
    pid = tree.start()
    sweep(ledger, tree.holding())
    for _ in range(3):
        assert escapees(Host(), [tree.holding()], ()) == []
        os.sched_setaffinity(pid, USABLE)
        assert escapees(Host(), [tree.holding()], ()) == [pid]
        swept = sweep(ledger, tree.holding())
        assert len(swept.escapees) == 1
        assert f"(tid {pid})" in swept.escapees[0]
        assert TAKEN not in mask(pid)
    os.sched_setaffinity(pid, {TAKEN})
    swept = sweep(ledger, tree.holding())
    assert [text for text in swept.refused if f"(tid {pid})" in text]
    assert mask(pid) == [TAKEN]
    assert escapees(Host(), [tree.holding()], ()) == []


def test_a_third_partys_mask_is_kept_and_said_once(tree: Tree, ledger: Ledger) -> None:
    pid = tree.start(TAKEN)
    sweep(ledger, tree.holding())
    os.sched_setaffinity(pid, {KEPT})
    if mask(pid) == sorted(CpuSet.parse(Path("/sys/devices/system/cpu/online").read_text()) - CpuSet.of([TAKEN])):
        pytest.skip("needs three CPUs: with two there is only one other mask, which is hostpart's own")
    assert [text for text in sweep(ledger, tree.holding()).foreign if f"(tid {pid})" in text]
    assert sweep(ledger, tree.holding()).foreign == ()
    assert sweep(ledger).foreign == ()
    assert mask(pid) == [KEPT]


def test_a_mask_that_somebody_sets_while_others_are_moved_is_what_it_gets_back(tree: Tree, ledger: Ledger) -> None:
    pid = tree.start(TAKEN)

    class Between(Host):
        def set_affinity(self, tid: int, cpus: CpuSet) -> None:
            if tid == tree.top.pid:
                os.sched_setaffinity(pid, {KEPT, TAKEN})
            super().set_affinity(tid, cpus)

    settle(Between(), ledger, [tree.holding()], ())
    assert mask(pid) == [KEPT]
    sweep(ledger)
    assert mask(pid) == sorted({KEPT, TAKEN})


def test_a_stranger_born_since_with_a_mask_like_ours_is_left_alone(tree: Tree, ledger: Ledger) -> None:
    tree.start()  # all that had this mask before, had one other: nothing but the scope tells the stranger from them
    sweep(ledger, tree.holding())
    rest = [cpu for cpu in USABLE if cpu != TAKEN]
    stranger = Tree()  # its parent is this process, which is in no scope
    try:
        pid = stranger.start(*rest)
        sweep(ledger, tree.holding())
        sweep(ledger)
        assert mask(pid) == rest
    finally:
        stranger.end()


def test_a_child_born_since_gets_what_its_parent_gets(tree: Tree, ledger: Ledger) -> None:
    tree.start(KEPT)
    sweep(ledger, tree.holding())
    child, orphan = tree.start(), tree.start(leave=True)
    rest = [cpu for cpu in USABLE if cpu != TAKEN]
    assert (mask(child), mask(orphan)) == (rest, rest)
    sweep(ledger)
    assert (mask(child), mask(orphan)) == (USABLE, USABLE)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("point", ["ledger.remember", "write.affinity", "write.affinity@3", "ledger.forget"])
@pytest.mark.parametrize("returning", [False, True], ids=["releasing", "returning"])
def test_killed_at_any_point_all_comes_back(
    tree: Tree, ledger: Ledger, point: str, when: str, *, returning: bool
) -> None:
    pids = population(tree)
    before = masks(pids)
    if returning:
        sweep(ledger, tree.holding())
    child = os.fork()
    if not child:
        name, at, count = point.partition("@")
        crash.arm(f"{name}.{when}{at}{count}")
        try:
            with Ledger(ledger.directory) as own:
                sweep(own, *([] if returning else [tree.holding()]))
        finally:
            os._exit(0)
    status = os.waitpid(child, 0)[1]
    # A release forgets only tasks that have ended meanwhile, and there may be some.
    code = os.waitstatus_to_exitcode(status)
    assert code == -9 or (code == 0 and point == "ledger.forget" and not returning)
    back = sweep(ledger)
    assert masks(pids) == before
    assert (back.foreign, back.escapees) == ((), ())
    assert ledger.known() == {}


def test_a_task_that_cannot_be_moved_is_named_and_nobody_is_woken_for_it(tree: Tree, ledger: Ledger) -> None:
    pid = tree.start()

    class Refusing(Host):
        def set_affinity(self, tid: int, cpus: CpuSet) -> None:
            if tid == pid:
                raise PermissionError(1, "Operation not permitted")
            super().set_affinity(tid, cpus)

    swept = settle(Refusing(), ledger, [tree.holding()], ())
    assert len(swept.refused) == 1
    assert swept.refused[0].endswith(f"(tid {pid}) may run on {TAKEN}: Operation not permitted")
    assert escapees(Host(), [tree.holding()], ()) == []
    sweep(ledger)
    assert ledger.known() == {}


def test_an_error_that_no_one_expects_is_not_hidden(tree: Tree, ledger: Ledger) -> None:
    class Broken(Host):
        def set_affinity(self, *_: object) -> None:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        settle(Broken(), ledger, [tree.holding()], ())


def test_of_the_ended_the_ledger_keeps_one_of_a_kind(tree: Tree, ledger: Ledger) -> None:
    sweep(ledger, tree.holding())
    ended = {f"task:{1 << 24 | number}:{number}": Known("0-1", ("0-1", "0")) for number in range(50)}
    ledger.remember(ended)
    sweep(ledger, tree.holding())
    assert len(ended.keys() & ledger.known().keys()) <= 1


def test_many_tasks_with_one_name_and_one_trouble_are_one_sentence() -> None:
    tasks = list(read_tasks(Host()).values())[:1] * 9
    said = affinity._sentences((one, "is there") for one in tasks)
    assert len(said) == 1
    assert said[0].endswith("and 4 more) is there")
