"""The process tree on the real kernel: every test's processes are its own, under a subreaper of its own.

Each ``keep_…`` function below runs in a process of its own (this file as a script), which makes itself a
subreaper, plays the keeper and prints what it found as JSON. Its guests are forked from it.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import os
import signal
import subprocess
import sys
import time
import uuid
from functools import partial
from typing import TYPE_CHECKING

import psutil
import pytest

from hostpart import procfs, tree

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36
_MARK = "HOSTPART_TEST_TREE"

WALKS = pytest.mark.parametrize("walk", ["children", "scan"])


@pytest.fixture
def keeper() -> Iterator[Callable[..., dict[str, object]]]:
    """Run a ``keep_`` function in a process of its own; afterwards nothing of it may be left."""
    token = uuid.uuid4().hex

    def run(name: str, walk: str = "children") -> dict[str, object]:
        done = subprocess.run(
            [sys.executable, __file__, name, walk],
            env={**os.environ, _MARK: token},
            stdout=subprocess.PIPE,
            timeout=60,
            check=True,
        )
        said: dict[str, object] = json.loads(done.stdout)
        return said

    yield run
    left = _marked(token)
    for process in left:
        process.kill()
    assert not left


def _marked(token: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


# In the keeper's process


def guest(*steps: Callable[[], object]) -> int:
    """Fork a process that runs *steps* and ends; it never outlives the test by much."""
    pid = os.fork()
    if pid:
        return pid
    try:
        signal.alarm(30)
        for step in steps:
            step()
    finally:
        os._exit(0)


def sleeper() -> None:
    """Do nothing until killed."""
    while True:
        signal.pause()


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for *condition*, or fail."""
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it never came"
        time.sleep(0.001)


class Counter:
    """Numbers that forked processes share."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, 4096)

    def __getitem__(self, index: int) -> int:
        return int.from_bytes(self.memory[8 * index : 8 * index + 8], "little")

    def set(self, index: int, value: int) -> None:
        """Set the number, where only an expression will do."""
        self[index] = value

    def __setitem__(self, index: int, value: int) -> None:
        self.memory[8 * index : 8 * index + 8] = value.to_bytes(8, "little")


def oracle() -> set[int]:
    """What psutil finds below this process, zombies left out."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        try:
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
        except psutil.NoSuchProcess:
            continue
    return found


def sides() -> None:
    """Put guests and keeper on CPUs of their own, as the partition does, where there are two to use."""
    cpus = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cpus[-1]})


def keeper_side() -> None:
    """Leave the guests' CPU."""
    os.sched_setaffinity(0, {ALL[0]})


ALL = sorted(os.sched_getaffinity(0))


def family() -> None:
    """A child that sleeps beside a grandchild, and an orphan in a session of its own."""

    def parent() -> None:
        guest(sleeper)
        guest(os.setsid, lambda: guest(sleeper))
        sleeper()

    guest(parent)
    until(lambda: len(oracle()) == 3)
    until(lambda: sum(process.ppid() == os.getpid() for process in psutil.Process().children(recursive=True)) >= 2)


def keep_family() -> dict[str, object]:
    family()
    found = tree.descendants(os.getpid())
    parent = next(member.parent for member in found if member.depth == 2)
    return {
        "agree": {member.pid for member in found} == oracle(),
        "depths": sorted(member.depth for member in found),
        "top_down": all(
            member.parent in [os.getpid(), *(earlier.pid for earlier in found[:i])] for i, member in enumerate(found)
        ),
        "starts": all(procfs.start_time(member.pid) == member.start for member in found),
        "below_first": len(tree.below(found, parent)),
        "skipped": [member.depth for member in tree.descendants(os.getpid(), skip=[parent])],
    }


def keep_zombies() -> dict[str, object]:
    said = Counter()

    def headless() -> None:
        # The main thread ends, the process lives on in the other one.
        import threading

        def work() -> None:
            while True:
                said[0] += 1
                time.sleep(0.001)

        threading.Thread(target=work, daemon=True).start()
        ctypes.CDLL(None).pthread_exit(None)

    gone = guest(lambda: None)
    until(lambda: (stat := procfs.read_stat(gone)) and stat.state == "Z")
    alive = guest(headless)
    until(lambda: (stat := procfs.read_stat(alive)) and stat.state == "Z")
    found = [member.pid for member in tree.descendants(os.getpid())]
    frozen = tree.freeze(os.getpid())
    before = said[0]
    time.sleep(0.05)
    held = said[0] == before
    tree.thaw(frozen.stopped)
    until(lambda: said[0] > before)
    return {"found": found == [alive], "held": held and frozen.holds and not frozen.loose}


def keep_thread_child() -> dict[str, object]:
    said = Counter()

    def parent() -> None:
        import threading

        def work() -> None:
            guest(lambda: said.set(0, 1), sleeper)
            never.wait()

        never = threading.Event()
        threading.Thread(target=work).start()

    guest(parent, sleeper)
    until(lambda: said[0])
    return {"agree": {member.pid for member in tree.descendants(os.getpid())} == oracle(), "count": len(oracle())}


def counting(said: Counter, index: int) -> None:
    """Count for ever, in two threads."""
    import threading

    def count(at: int) -> None:
        while True:
            said[at] += 1

    threading.Thread(target=count, args=(2 * index,), daemon=True).start()
    count(2 * index + 1)


def keep_frozen() -> dict[str, object]:
    said = Counter()

    def parent() -> None:
        guest(lambda: counting(said, 1))
        counting(said, 0)

    guest(parent)
    until(lambda: all(said[index] for index in range(4)))
    frozen = tree.freeze(os.getpid())
    before = [said[index] for index in range(4)]
    time.sleep(0.1)
    after = [said[index] for index in range(4)]
    tree.thaw(frozen.stopped)
    until(lambda: all(said[index] > after[index] for index in range(4)))
    return {
        "stopped": [member.depth for member in frozen.stopped],
        "loose": len(frozen.loose),
        "held": before == after,
    }


def keep_job_control() -> dict[str, object]:
    said = Counter()

    def count() -> None:
        while True:
            said[0] += 1
            time.sleep(0.0005)

    def parent() -> None:
        os.kill(guest(sleeper), signal.SIGSTOP)
        guest(count)
        sleeper()

    guest(parent)
    until(lambda: said[0] and any(member.state == "T" for member in tree.descendants(os.getpid())))
    (suspended,) = (member.pid for member in tree.descendants(os.getpid()) if member.state == "T")
    frozen = tree.freeze(os.getpid())
    tree.thaw(frozen.stopped)
    at = said[0]
    until(lambda: said[0] > at)
    stat = procfs.read_stat(suspended)
    return {
        "stopped": len(frozen.stopped),
        "left_alone": suspended not in [member.pid for member in frozen.stopped],
        "still": stat.state if stat else None,
    }


def keep_order() -> dict[str, object]:
    said = Counter()

    def parent() -> None:
        # As a shell: it wants to know of children that stop.
        guest(sleeper)
        said[1] = 1
        while True:
            _, status = os.waitpid(-1, os.WUNTRACED)
            said[0] += os.WIFSTOPPED(status)

    guest(parent)
    until(lambda: said[1])
    for _ in range(30):
        tree.thaw(tree.freeze(os.getpid()).stopped)
        time.sleep(0.002)
    return {"stops_seen_by_the_parent": said[0]}


def keep_skip() -> dict[str, object]:
    said = Counter()
    spared = guest(lambda: counting(said, 0))
    other = guest(sleeper)
    until(lambda: said[0])
    frozen = tree.freeze(os.getpid(), skip=[spared])
    at = said[0]
    until(lambda: said[0] > at)
    return {"only_the_other": [member.pid for member in frozen.stopped] == [other], "holds": frozen.holds}


def keep_forking_frozen() -> dict[str, object]:
    said = Counter()

    def forking() -> None:
        sides()
        while said[0] < 5000:
            said[0] += 1
            guest(lambda: time.sleep(1))
            try:
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
            except ChildProcessError:
                pass

    guest(forking)
    keeper_side()
    until(lambda: said[0] > 50)
    frozen = tree.freeze(os.getpid(), patience_s=20)
    at = said[0]
    time.sleep(0.1)
    states = {member.state for member in tree.descendants(os.getpid())}
    held = said[0] == at
    tree.thaw(frozen.stopped)
    until(lambda: said[0] > at)
    return {"held": held, "states": sorted(states), "loose": len(frozen.loose), "many": len(frozen.stopped) > 3}


def keep_vfork() -> dict[str, object]:
    fifo = f"/tmp/hostpart-test-{os.getpid()}"
    os.mkfifo(fifo)

    def parent() -> None:
        # posix_spawn's child opens the FIFO before its exec, and waits there: its parent is in vfork until then.
        os.posix_spawn("/bin/true", ["true"], os.environ, file_actions=[(os.POSIX_SPAWN_OPEN, 9, fifo, os.O_RDONLY, 0)])

    pid = guest(parent)
    try:
        until(lambda: (stat := procfs.read_stat(pid)) and stat.state == "D" and len(oracle()) == 2)
        frozen = tree.freeze(os.getpid(), patience_s=20)
        return {"holds": frozen.holds, "loose": [member.pid == pid for member in frozen.loose]}
    finally:
        os.unlink(fifo)


def keep_daemons() -> dict[str, object]:
    said = Counter()

    def daemonize(first: int) -> None:
        def daemon(number: int) -> int:
            return guest(lambda: said.set(number, 1), sleeper)

        os.setsid()
        os.closerange(0, 1024)
        guest(os.setsid, lambda: [daemon(first + number) for number in range(3)])

    for first in range(0, 15, 3):
        guest(partial(daemonize, first))
    # All are there, and those who forked them are not: one of these may be there for a daemon that is not yet.
    until(lambda: all(said[number] for number in range(15)) and len(oracle()) == 15)
    ended = tree.end(os.getpid())
    return {"killed": ended.killed, "survivors": len(ended.survivors), "left": len(oracle())}


def keep_thousand() -> dict[str, object]:
    script = "exec <&- >&- 2>&-; i=0; while [ $i -lt 1000 ]; do sleep 60 & i=$((i+1)); done; wait"
    guest(sides, os.setsid, lambda: os.execvp("sh", ["sh", "-c", script]))
    keeper_side()
    until(lambda: len(tree.descendants(os.getpid())) == 1001, 30)
    ended = tree.end(os.getpid(), patience_s=20)
    return {"killed": ended.killed, "survivors": len(ended.survivors), "left": len(oracle())}


def _bomb(body: Callable[[Counter], None]) -> dict[str, object]:
    said = Counter()
    limit = 4000

    def first() -> None:
        sides()
        os.setsid()
        body(said)

    guest(first)
    keeper_side()
    until(lambda: said[0] > 60)
    ended = tree.end(os.getpid(), patience_s=20)
    at = said[0]
    time.sleep(0.05)
    return {
        "beaten": at < limit and said[0] == at,
        "survivors": len(ended.survivors),
        "left": len(oracle()),
    }


def keep_bomb() -> dict[str, object]:
    def body(said: Counter) -> None:
        while said[0] < 4000:
            said[0] += 1
            try:
                os.fork()
            except BlockingIOError:
                continue
        sleeper()

    return _bomb(body)


def keep_comet() -> dict[str, object]:
    def body(said: Counter) -> None:
        # One living process at any instant, always a new one, always an orphan.
        while said[0] < 4000:
            said[0] += 1
            if os.fork():
                os._exit(0)

    return _bomb(body)


def keep_hydra() -> dict[str, object]:
    def body(said: Counter) -> None:
        while said[0] < 4000:
            pid = os.fork()
            if pid:
                os.waitpid(pid, 0)  # and another one, should it end
            else:
                said[0] += 1

    return _bomb(body)


def keep_reap() -> dict[str, object]:
    seen: dict[int, tuple[str, int]] = {}

    def reap(pid: int) -> None:
        stat = procfs.read_stat(pid)
        _, status, _ = os.wait4(pid, 0)
        seen[pid] = (stat.state if stat else "gone", status)

    done = guest(lambda: None)
    until(lambda: (stat := procfs.read_stat(done)) and stat.state == "Z")
    running = guest(sleeper)
    tree.end(os.getpid(), reap)
    return {"done": seen[done], "running": seen[running], "count": len(seen)}


def keep_nothing() -> dict[str, object]:
    # No child is the proof that there is no descendant: /proc need not be looked at.
    tree._walk = None  # type: ignore[assignment]
    return {"killed": tree.end(os.getpid()).killed}


def keep_other_root() -> dict[str, object]:
    said = Counter()

    def parent() -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
        guest(lambda: guest(lambda: said.set(0, 1), sleeper))
        sleeper()

    pid = guest(parent)
    until(lambda: said[0] and len(tree.descendants(pid)) == 1)
    ended = tree.end(pid)
    return {"killed": ended.killed, "survivors": len(ended.survivors), "root_lives": oracle() == {pid}}


def keep_refused() -> dict[str, object]:
    said = Counter()
    mine = guest(lambda: os.setresuid(65534, 65534, 65534), lambda: said.set(0, 1), sleeper)
    other = guest(sleeper)
    until(lambda: said[0])
    os.setresuid(65534, 65534, 0)
    begin = time.monotonic()
    frozen = tree.freeze(os.getpid(), patience_s=20)
    ended = tree.end(os.getpid(), patience_s=20)
    seconds = time.monotonic() - begin
    os.setresuid(0, 0, 0)
    return {
        "stopped": [member.pid == mine for member in frozen.stopped],
        "holds": frozen.holds,
        "survivors": [member.pid == other for member in ended.survivors],
        "gave_up_early": seconds < 10,
    }


def _keep(name: str, walk: str) -> None:
    libc = ctypes.CDLL(None)
    libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    if walk == "scan":
        procfs.children = lambda *_: None  # a kernel without CONFIG_PROC_CHILDREN
    try:
        print(json.dumps(globals()[f"keep_{name}"]()), flush=True)  # noqa: T201
    finally:
        # Not with the code under test: it may be broken.
        for process in psutil.Process().children(recursive=True):
            try:
                process.kill()
            except psutil.Error:
                continue


# The tests


@WALKS
def test_the_tree_holds_orphans_and_daemons_each_after_its_parent(
    keeper: Callable[..., dict[str, object]], walk: str
) -> None:
    assert keeper("family", walk) == {
        "agree": True,
        "depths": [1, 1, 2],
        "top_down": True,
        "starts": True,
        "below_first": 2,
        "skipped": [1],
    }


@WALKS
def test_a_zombie_is_left_out_but_not_one_whose_other_threads_live(
    keeper: Callable[..., dict[str, object]], walk: str
) -> None:
    assert keeper("zombies", walk) == {"found": True, "held": True}


@WALKS
def test_no_thread_runs_while_frozen_and_all_do_after(keeper: Callable[..., dict[str, object]], walk: str) -> None:
    assert keeper("frozen", walk) == {"stopped": [1, 2], "loose": 0, "held": True}


@WALKS
def test_the_child_of_a_thread_that_is_not_the_main_one_is_found(
    keeper: Callable[..., dict[str, object]], walk: str
) -> None:
    assert keeper("thread_child", walk) == {"agree": True, "count": 2}


def test_what_job_control_stopped_before_stays_stopped_after(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("job_control") == {"stopped": 2, "left_alone": True, "still": "T"}


def test_a_waiting_parent_never_sees_its_child_stopped(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("order") == {"stops_seen_by_the_parent": 0}


def test_what_is_to_be_skipped_runs_on(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("skip") == {"only_the_other": True, "holds": True}


@WALKS
def test_a_guest_that_forks_all_the_time_is_frozen_whole(keeper: Callable[..., dict[str, object]], walk: str) -> None:
    assert keeper("forking_frozen", walk) == {"held": True, "states": ["T"], "loose": 0, "many": True}


@WALKS
@pytest.mark.parametrize(("always_new", "settled"), [(True, False), (False, True)], ids=["a new one", "the same"])
def test_a_freeze_that_meets_a_new_zombie_at_every_look_claims_nothing(
    monkeypatch: pytest.MonkeyPatch, walk: str, always_new: bool, settled: bool
) -> None:
    # A guest that forks and ends all the time can be missed at each look, but not its dead. Made up: the real one is
    # caught too soon.
    root, dead = 1 << 22, [1 << 22]

    def pids(*_: object) -> list[int]:
        dead[0] += always_new
        return [dead[0] + 1]

    def read_stat(pid: int, tid: int | None = None) -> procfs.Stat:
        return procfs.Stat(pid, "comet", "Z", root, 1, 1, 0, 0, 0, 0, 0, 1, pid, 0)

    monkeypatch.setattr(procfs, "read_stat", read_stat)
    monkeypatch.setattr(procfs, "threads", lambda pid: [pid])
    monkeypatch.setattr(procfs, "children", pids if walk == "children" else lambda *_: None)
    monkeypatch.setattr(tree, "_user_processes", pids)
    assert tree.freeze(root, patience_s=0.02) == tree.Frozen((), (), settled)


def test_a_parent_in_vfork_is_held_by_its_stopped_child(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("vfork") == {"holds": True, "loose": [True]}


@WALKS
def test_daemons_that_closed_every_descriptor_are_ended(keeper: Callable[..., dict[str, object]], walk: str) -> None:
    assert keeper("daemons", walk) == {"killed": 15, "survivors": 0, "left": 0}


def test_a_thousand_children_are_ended(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("thousand") == {"killed": 1001, "survivors": 0, "left": 0}


@WALKS
@pytest.mark.skipif(len(ALL) < 2, reason="needs two CPUs: the guest forks on one, the keeper looks from the other")
@pytest.mark.parametrize("kind", ["bomb", "comet", "hydra"])
def test_a_guest_that_forks_against_its_end_is_beaten(
    keeper: Callable[..., dict[str, object]], kind: str, walk: str
) -> None:
    assert keeper(kind, walk) == {"beaten": True, "survivors": 0, "left": 0}


def test_each_ended_child_is_shown_as_a_zombie_before_it_is_reaped(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("reap") == {"done": ["Z", 0], "running": ["Z", int(signal.SIGKILL)], "count": 2}


def test_where_nothing_is_left_nothing_is_looked_at(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("nothing") == {"killed": 0}


@WALKS
def test_the_tree_of_another_process_is_ended_and_its_root_left(
    keeper: Callable[..., dict[str, object]], walk: str
) -> None:
    assert keeper("other_root", walk) == {"killed": 1, "survivors": 0, "root_lives": True}


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_process_is_named_and_not_waited_for(keeper: Callable[..., dict[str, object]]) -> None:
    assert keeper("refused") == {"stopped": [True], "holds": False, "survivors": [True], "gave_up_early": True}


@pytest.fixture
def marked() -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """A sleeping process with a mark of its own in its environment."""
    token = uuid.uuid4().hex
    with subprocess.Popen(["sleep", "30"], env={**os.environ, _MARK: token}) as process:
        try:
            # Until its exec it shows the environment of this one.
            until(lambda: (procfs.environ(process.pid) or {}).get(_MARK.encode()) == token.encode())
            yield process, token
        finally:
            process.kill()


def test_a_pid_in_use_again_is_not_hit(marked: tuple[subprocess.Popen[bytes], str]) -> None:
    process, _ = marked
    start = procfs.start_time(process.pid)
    assert start is not None
    member = tree.Member(process.pid, start, os.getpid(), 1, "S")

    assert tree.kill([member.replace(start=start - 1)]) == []
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.05)

    assert tree.kill([member]) == []
    assert process.wait(10) == -signal.SIGKILL
    assert tree.kill([member]) == []


def test_a_process_is_found_by_its_whole_environment_entry(marked: tuple[subprocess.Popen[bytes], str]) -> None:
    process, token = marked
    (found,) = tree.find_by_environment(_MARK, token)
    assert (found.pid, found.start) == (process.pid, procfs.start_time(process.pid))
    assert tree.find_by_environment(_MARK, token[:-1]) == []
    assert tree.find_by_environment(_MARK[1:], token) == []
    assert tree.find_by_environment(_MARK, token, uid=os.geteuid() + 1) == []


def test_the_subtree_of_one_member_is_cut_out() -> None:
    rows = [(10, 1, 1), (11, 1, 1), (12, 10, 2), (13, 11, 2), (14, 12, 3)]
    members = [tree.Member(pid, 0, parent, depth, "S") for pid, parent, depth in rows]
    assert [member.pid for member in tree.below(members, 10)] == [10, 12, 14]
    assert [member.pid for member in tree.below(members, 99)] == []


if __name__ == "__main__":
    _keep(sys.argv[1], sys.argv[2])
