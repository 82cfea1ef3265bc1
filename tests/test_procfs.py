"""What /proc says, compared with psutil, the os module and ``taskset``-like system calls on real processes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest

from hostpart import procfs
from hostpart.cpuset import CpuSet

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = sorted(os.sched_getaffinity(0))


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for *condition*, or fail."""
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it never came"
        time.sleep(0.001)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "30"], env={"A": "1", "B": "x=y", "EMPTY": ""}) as process:
        try:
            until(lambda: (stat := procfs.read_stat(process.pid)) and stat.comm == "sleep" and stat.state == "S")
            yield process
        finally:
            process.kill()


@pytest.fixture
def gone() -> int:
    """A pid that was just used and is free again."""
    with subprocess.Popen(["true"]) as process:
        pass
    return process.pid


def test_the_start_time_is_that_of_the_clock_psutil_reads(sleeper: subprocess.Popen[bytes]) -> None:
    start = procfs.start_time(sleeper.pid)
    assert start is not None
    assert psutil.boot_time() + start / os.sysconf("SC_CLK_TCK") == pytest.approx(
        psutil.Process(sleeper.pid).create_time(), abs=1.5
    )
    assert start >= (procfs.start_time(os.getpid()) or start + 1)


@pytest.mark.parametrize("name", ["plain", "two words", "a) R 1 1 1", "((()))", "line\nbreak"])
def test_a_name_cannot_forge_the_fields_after_it(name: str) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(None).prctl(15, sys.argv[1].encode()); input()", name],
        stdin=subprocess.PIPE,
    )
    try:
        until(lambda: (stat := procfs.read_stat(process.pid)) and stat.comm == name)
        stat = procfs.read_stat(process.pid)
        assert stat is not None
        assert (stat.pid, stat.ppid) == (process.pid, os.getpid())
        assert (stat.pgrp, stat.session) == (os.getpgid(process.pid), os.getsid(process.pid))
        assert stat.start == procfs.start_time(process.pid)
        assert stat.threads == 1
        assert stat.processor == psutil.Process(process.pid).cpu_num()
    finally:
        process.communicate(b"\n")


def test_the_times_and_faults_are_those_of_getrusage() -> None:
    stop = time.process_time() + 0.05
    while time.process_time() < stop:
        pass
    before = resource.getrusage(resource.RUSAGE_SELF)
    stat = procfs.read_stat(os.getpid())
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert stat is not None
    tick = 1 / os.sysconf("SC_CLK_TCK")
    assert before.ru_utime - tick <= stat.utime * tick <= after.ru_utime + tick
    assert before.ru_stime - tick <= stat.stime * tick <= after.ru_stime + tick
    assert before.ru_minflt <= stat.minflt <= after.ru_minflt
    assert before.ru_majflt <= stat.majflt <= after.ru_majflt


def test_the_switches_of_the_main_thread_are_those_the_kernel_tells_psutil(sleeper: subprocess.Popen[bytes]) -> None:
    told = psutil.Process(sleeper.pid).num_ctx_switches()
    assert procfs.switches(sleeper.pid) == (told.voluntary, told.involuntary)


def test_the_status_tells_memory_and_user(sleeper: subprocess.Popen[bytes]) -> None:
    status = procfs.read_status(sleeper.pid)
    assert status is not None
    assert status.uid == os.getuid()
    assert status.rss_bytes == psutil.Process(sleeper.pid).memory_info().rss
    assert status.locked_bytes == 0


@pytest.mark.parametrize("cpus", [[ALL[-1]], ALL], ids=["one", "all"])
def test_the_mask_is_what_was_set(sleeper: subprocess.Popen[bytes], cpus: list[int]) -> None:
    os.sched_setaffinity(sleeper.pid, cpus)
    assert procfs.allowed(sleeper.pid) == CpuSet.of(cpus)


def test_each_thread_has_a_mask_of_its_own() -> None:
    ready, done = threading.Event(), threading.Event()
    tids: list[int] = []

    def pinned() -> None:
        os.sched_setaffinity(0, {ALL[0]})
        tids.append(threading.get_native_id())
        ready.set()
        done.wait()

    thread = threading.Thread(target=pinned)
    thread.start()
    try:
        ready.wait()
        assert tids[0] in procfs.threads(os.getpid())
        assert procfs.allowed(os.getpid(), tids[0]) == CpuSet.of([ALL[0]])
        assert procfs.allowed(os.getpid()) == CpuSet.of(ALL)
        stat = procfs.read_stat(os.getpid(), tids[0])
        assert stat is not None
        assert (stat.pid, stat.processor, stat.threads) == (tids[0], ALL[0], len(procfs.threads(os.getpid())))
    finally:
        done.set()
        thread.join()


def test_the_run_time_grows_with_the_work() -> None:
    before = procfs.schedstat(os.getpid())
    if before is None:
        pytest.skip("needs /proc/PID/schedstat (CONFIG_SCHED_INFO)")
    used = time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID)
    while time.clock_gettime_ns(time.CLOCK_THREAD_CPUTIME_ID) - used < 50_000_000:
        pass
    after = procfs.schedstat(os.getpid())
    assert after is not None
    assert 45_000_000 < after[0] - before[0] < 1_000_000_000
    assert after[1] >= before[1]
    assert after[2] >= before[2] > 0


@pytest.mark.skipif(len(ALL) < 2, reason="needs two CPUs to move between")
def test_a_move_to_another_cpu_is_counted() -> None:
    # In a process of its own: pinned first, so that nothing but the test moves it.
    source = f"""
import os
from hostpart import procfs
os.sched_setaffinity(0, {{{ALL[0]}}})
counts = [procfs.migrations(os.getpid())]
for cpu in ({ALL[1]}, {ALL[0]}, {ALL[1]}):
    os.sched_setaffinity(0, {{cpu}})
    counts.append(procfs.migrations(os.getpid()))
print(counts)
"""
    counts = subprocess.run([sys.executable, "-c", source], stdout=subprocess.PIPE, check=True, text=True).stdout
    if "None" in counts:
        pytest.skip("needs /proc/PID/sched")
    first, *rest = map(int, counts.strip("[]\n").split(","))
    assert rest == [first + 1, first + 2, first + 3]


def test_the_environment_is_the_one_given_at_exec(sleeper: subprocess.Popen[bytes]) -> None:
    assert procfs.environ(sleeper.pid) == {b"A": b"1", b"B": b"x=y", b"EMPTY": b""}
    assert procfs.environ_block(sleeper.pid) == b"A=1\0B=x=y\0EMPTY=\0"


def test_a_long_environment_is_read_whole() -> None:
    with subprocess.Popen(["sleep", "30"], env={f"N{n}": "x" * 1000 for n in range(300)} | {"LAST": "1"}) as process:
        try:
            until(lambda: len(procfs.environ(process.pid) or ()) == 301)
        finally:
            process.kill()


def test_the_children_are_those_psutil_finds(sleeper: subprocess.Popen[bytes]) -> None:
    found = procfs.children(os.getpid(), os.getpid())
    if found is None:
        pytest.skip("needs /proc/PID/task/TID/children (CONFIG_PROC_CHILDREN)")
    assert sleeper.pid in found
    assert set(found) == {child.pid for child in psutil.Process().children()}


def test_every_process_psutil_sees_is_listed(sleeper: subprocess.Popen[bytes]) -> None:
    before, found, after = set(psutil.pids()), set(procfs.processes()), set(psutil.pids())
    assert before & after <= found <= before | after | found
    assert {sleeper.pid, os.getpid(), 1} <= found


def test_a_kernel_thread_is_told_from_a_process(sleeper: subprocess.Popen[bytes]) -> None:
    assert not procfs.is_kthread(sleeper.pid)
    daemon = procfs.read_stat(2)
    if daemon is None or daemon.comm != "kthreadd":
        pytest.skip("needs the host's pid namespace")
    assert procfs.is_kthread(2)


@pytest.mark.skipif(os.sysconf("SC_NPROCESSORS_ONLN") < 2 or len(ALL) < 2, reason="needs two CPUs")
def test_a_process_pinned_alone_is_found_by_its_cpu(sleeper: subprocess.Popen[bytes]) -> None:
    assert sleeper.pid not in [pid for pids in procfs.pinned_alone().values() for pid in pids]
    os.sched_setaffinity(sleeper.pid, {ALL[-1]})
    found = procfs.pinned_alone()
    assert [cpu for cpu, pids in found.items() if sleeper.pid in pids] == [ALL[-1]]


@pytest.mark.skipif(os.sysconf("SC_NPROCESSORS_ONLN") < 2, reason="on one CPU everything is pinned alone")
def test_kernel_threads_and_this_process_are_not_among_the_pinned() -> None:
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {ALL[0]})
    try:
        found = [pid for pids in procfs.pinned_alone().values() for pid in pids]
    finally:
        os.sched_setaffinity(0, mine)
    assert os.getpid() not in found
    assert not [pid for pid in found if procfs.is_kthread(pid)]


def test_what_is_gone_is_none_everywhere(gone: int) -> None:
    for ask in (
        procfs.start_time,
        procfs.read_stat,
        procfs.read_status,
        procfs.allowed,
        procfs.switches,
        procfs.schedstat,
        procfs.migrations,
        procfs.environ,
        procfs.environ_block,
    ):
        assert ask(gone) is None, ask.__name__
    assert procfs.children(gone, gone) is None
    assert procfs.threads(gone) == []
    assert not procfs.is_kthread(gone)


def test_a_zombie_is_still_told_of_until_it_is_reaped() -> None:
    with subprocess.Popen(["true"]) as process:
        pid = process.pid
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        stat = procfs.read_stat(pid)
        assert stat is not None
        assert (stat.state, stat.dead) == ("Z", True)
        assert procfs.allowed(pid) == CpuSet.of(ALL)
        assert procfs.switches(pid) is not None
        assert (procfs.schedstat(pid) is None) == (procfs.schedstat(os.getpid()) is None)
        assert (procfs.migrations(pid) is None) == (procfs.migrations(os.getpid()) is None)
    assert procfs.read_stat(pid) is None


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another user")
def test_another_users_environment_is_none_and_its_mask_is_not(sleeper: subprocess.Popen[bytes]) -> None:
    # Imported before: that user may not be able to read this interpreter's library.
    source = """
import os, sys
from hostpart import procfs
pid = int(sys.argv[1])
os.setresuid(65534, 65534, 65534)
print(procfs.environ(pid), procfs.environ_block(pid), procfs.allowed(pid) is None, procfs.start_time(pid) is None)
"""
    done = subprocess.run(
        [sys.executable, "-c", source, str(sleeper.pid)],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(procfs.__file__).parents[1])},
    )
    assert done.stdout == "None None False False\n"
