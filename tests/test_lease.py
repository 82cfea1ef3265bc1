"""Leases on the real kernel, between real processes.

Each ``do_…`` function below runs in a process of its own (this file as a script), says one line when it has done what
its name says, and holds on to it until its standard input ends.
"""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostpart.cpuset import CpuSet
from hostpart.errors import DoesNotFit
from hostpart.lease import AllocatorBusy, Holder, Leases, Line, is_locked, release, relock
from hostpart.procfs import read_stat
from tests.conftest import SYSTEM_LEASES, Place, wait_until
from tests.partition import FIRST, Partition, machine

Other = Callable[..., "subprocess.Popen[str]"]
NOBODY = 65534


def _say(text: object) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
    sys.stdin.read()


def do_take(directory: str, cpu: str) -> None:
    _say(Leases(directory).take(int(cpu)) is not None)


def do_keep(directory: str, cpu: str) -> None:
    _say(Leases(directory).keep(int(cpu)) is not None)


def do_lock(directory: str) -> None:
    with Leases(directory).lock():
        _say("locked")


def do_queue(directory: str) -> None:
    line = Line(Leases(directory))
    _say("queued")
    line.leave()


def do_unlock(fd: str) -> None:
    import fcntl

    fcntl.flock(int(fd), fcntl.LOCK_UN)
    _say("unlocked")


def do_race(root: str, racers: str) -> None:
    """Fork racers; each gets one of three pCPUs once, by HC_CREATE_VM, and shows by a file that nobody else has it.

    The first three hold theirs until all the others have been refused.
    """
    owners = Path(root) / "owners"
    owners.mkdir()
    pids = []
    for number in range(int(racers)):
        pid = os.fork()
        if not pid:
            status = 1
            try:
                _race(Path(root), owners, number, int(racers) - 3)
                status = 0
            finally:
                os._exit(status)
        pids.append(pid)
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    said = [json.loads(path.read_text()) for path in Path(root).glob("said-*")]
    json.dump({"failed": sum(map(bool, statuses)), "said": said}, sys.stdout)


def _race(root: Path, owners: Path, number: int, losers: int) -> None:
    own = root / f"racer-{number}"
    own.mkdir()
    refusals: list[str] = []
    with Partition(machine(range(FIRST, FIRST + 4)), own) as there:
        there.hypervisor.leases = Leases(str(root / "leases"))
        until = time.monotonic() + 60
        while (vmid := there.create(1)) < 0:
            assert vmid == -errno.ENOSPC, (vmid, there.hypervisor.refusal)
            assert isinstance(there.hypervisor.refusal, DoesNotFit)
            refusals.append(str(there.hypervisor.refusal))
            (root / f"refused-{number}").touch()
            assert time.monotonic() < until
            time.sleep(0.01)
        (pcpu,) = there.pcpus(vmid)
        mark = owners / str(pcpu)
        os.close(os.open(mark, os.O_CREAT | os.O_EXCL))  # raises where somebody else is its owner at this instant
        assert wait_until(lambda: len(list(root.glob("refused-*"))) == losers, 60)
        mark.unlink()
        assert there.destroy(vmid) == 0
    (root / f"said-{number}").write_text(json.dumps({"pcpu": pcpu, "refusals": refusals}))


@pytest.fixture
def other() -> Iterator[Other]:
    """Start a ``do_`` function in a process of its own; it has done its part when this returns."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *args: object, pass_fds: tuple[int, ...] = ()) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, __file__, name, *map(str, args)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=pass_fds,
        )  # fmt: skip
        started.append(process)
        assert process.stdout is not None
        process.said = process.stdout.readline().strip()  # type: ignore[attr-defined]
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def leases(tmp_path: Path) -> Leases:
    return Leases(str(tmp_path))


def said(process: subprocess.Popen[str]) -> str:
    return str(process.said)  # type: ignore[attr-defined]


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()


def take(leases: Leases, cpu: int) -> int:
    fd = leases.take(cpu)
    assert fd is not None
    return fd


# -- one lease ----------------------------------------------------------------------------------------


def test_a_pcpu_leased_by_one_process_cannot_be_leased_by_another(leases: Leases, other: Other) -> None:
    holder = other("do_take", leases.directory, 5)
    assert said(holder) == "True"
    assert leases.take(5) is None
    assert said(other("do_take", leases.directory, 5)) == "False"
    assert said(other("do_take", leases.directory, 6)) == "True"
    end(holder)
    os.close(take(leases, 5))


def test_a_lease_lives_on_in_a_child_that_was_exec_d(leases: Leases) -> None:
    fd = take(leases, 1)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    os.close(fd)
    try:
        assert leases.take(1) is None
    finally:
        end(child)  # type: ignore[arg-type]
    os.close(take(leases, 1))


def test_a_lease_is_not_inherited_unless_it_is_meant_to_be(leases: Leases) -> None:
    fd = take(leases, 1)
    child = subprocess.Popen(["sleep", "60"], close_fds=False)
    os.close(fd)
    try:
        os.close(take(leases, 1))
    finally:
        end(child)  # type: ignore[arg-type]


def test_release_ends_a_lease_for_those_too_who_inherited_it(leases: Leases) -> None:
    fd = take(leases, 1)
    child = subprocess.Popen(["sleep", "60"], pass_fds=[fd])
    try:
        release(fd)
        os.close(take(leases, 1))
    finally:
        end(child)  # type: ignore[arg-type]


def test_several_keep_a_pcpu_and_nobody_can_lease_it_until_the_last_lets_go(leases: Leases, other: Other) -> None:
    first, second = other("do_keep", leases.directory, 0), other("do_keep", leases.directory, 0)
    assert (said(first), said(second)) == ("True", "True")
    end(first)
    assert leases.take(0) is None
    end(second)
    os.close(take(leases, 0))


def test_a_leased_pcpu_cannot_be_kept(leases: Leases, other: Other) -> None:
    other("do_take", leases.directory, 0)
    assert leases.keep(0) is None


@pytest.mark.parametrize("first", ["take", "keep"])
def test_a_lock_is_never_converted_not_even_by_its_holder(leases: Leases, first: str) -> None:
    fd = getattr(leases, first)(3)
    assert leases.take(3) is None
    if first == "keep":
        again = leases.keep(3)
        assert again is not None
        os.close(again)
    else:
        assert leases.keep(3) is None
    assert is_locked(fd), "the attempt cost the holder its lock"
    os.close(fd)


def test_a_lease_let_go_by_an_heir_is_noticed_and_can_be_taken_again(leases: Leases, other: Other) -> None:
    fd = take(leases, 2)
    os.set_inheritable(fd, True)
    assert is_locked(fd)
    other("do_unlock", fd, pass_fds=(fd,))
    assert not is_locked(fd)
    assert relock(fd)
    assert is_locked(fd)
    assert leases.take(2) is None
    other("do_unlock", fd, pass_fds=(fd,))
    other("do_take", leases.directory, 2)
    assert not relock(fd), "somebody else has it by now"
    os.close(fd)


def test_a_pcpu_that_is_not_there_cannot_be_leased(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSTPART_LEASE_DIR", raising=False)
    leases = Leases()
    assert leases.take(8191) is None
    assert leases.keep(8191) is None


def test_the_directory_is_the_kernel_s_unless_a_test_says_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSTPART_LEASE_DIR", raising=False)
    assert Leases().directory == "/sys/devices/system/cpu"
    monkeypatch.setenv("HOSTPART_LEASE_DIR", "/somewhere")
    assert Leases().directory == "/somewhere"


# -- who holds what -----------------------------------------------------------------------------------


def test_a_survey_tells_taken_from_kept_and_leaves_everything_as_it_was(leases: Leases, other: Other) -> None:
    other("do_take", leases.directory, 1)
    other("do_keep", leases.directory, 2)
    own = take(leases, 4)
    before = sorted(os.listdir("/proc/self/fd"))
    with leases.lock():
        survey = leases.survey(CpuSet.parse("0-5"))
    assert (str(survey.taken), str(survey.kept)) == ("1,4", "2")
    assert sorted(os.listdir("/proc/self/fd")) == before
    assert is_locked(own)
    for cpu in (0, 3, 5):
        os.close(take(leases, cpu))
    os.close(own)


def test_holders_are_named_by_pid_user_and_name(leases: Leases, other: Other) -> None:
    holder, one, two = (
        other("do_take", leases.directory, 1),
        other("do_keep", leases.directory, 2),
        other("do_keep", leases.directory, 2),
    )
    found = leases.holders(CpuSet.parse("0-3"))
    assert sorted(found) == [1, 2]
    name = Path(f"/proc/{holder.pid}/comm").read_text().strip()
    assert found[1] == [Holder(holder.pid, os.getuid(), name)]
    assert str(found[1][0]) == f"pid {holder.pid} ({name}, uid {os.getuid()})"
    assert {who.pid for who in found[2]} == {one.pid, two.pid}


def test_a_holder_that_is_gone_is_a_bare_pid() -> None:
    child = subprocess.Popen(["true"])
    child.wait()
    assert Holder.of(child.pid) == Holder(child.pid)
    assert str(Holder.of(child.pid)) == f"pid {child.pid}"


# -- the allocator's lock -----------------------------------------------------------------------------


def wait_for_lock(leases: Leases) -> AllocatorBusy:
    with pytest.raises(AllocatorBusy) as caught, leases.lock(0.2):
        pass
    return caught.value


def test_a_stopped_holder_of_the_allocator_s_lock_is_named_with_what_ends_it(leases: Leases, other: Other) -> None:
    holder = other("do_lock", leases.directory)
    holder.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: (stat := read_stat(holder.pid)) is not None and stat.state == "T")
    busy = wait_for_lock(leases)
    assert [who.pid for who in busy.holders] == [holder.pid]
    assert busy.holders[0].stopped
    assert f"pid {holder.pid} (" in str(busy)
    assert ", stopped)" in str(busy)
    assert leases.directory in str(busy)
    assert busy.remedy == f"let it go on with 'kill -CONT {holder.pid}', or end it with 'kill -KILL {holder.pid}'"
    subprocess.run(["sh", "-c", f"kill -KILL {holder.pid}"], check=True)
    holder.wait()
    with leases.lock(5):
        pass


def test_a_holder_that_runs_is_named_with_another_remedy(leases: Leases, other: Other) -> None:
    holder = other("do_lock", leases.directory)
    busy = wait_for_lock(leases)
    assert not busy.holders[0].stopped
    assert busy.remedy == f"wait for it, or end it with 'kill {holder.pid}'"


def test_a_failed_wait_leaves_no_descriptor(leases: Leases, other: Other) -> None:
    other("do_lock", leases.directory)
    before = sorted(os.listdir("/proc/self/fd"))
    wait_for_lock(leases)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_commands_wait_a_bounded_time_for_a_stopped_one_and_say_who_it_is(place: Place, other: Other) -> None:
    holder = other("do_lock", place.leases)
    holder.send_signal(signal.SIGSTOP)
    done = place.run("restore", timeout=30)
    assert done.returncode == 1
    assert f"kill -CONT {holder.pid}" in done.stderr


# -- the line -----------------------------------------------------------------------------------------


def test_the_line_is_in_order_of_arrival_and_the_killed_and_the_gone_drop_out(leases: Leases, other: Other) -> None:
    waiting = [other("do_queue", leases.directory) for _ in range(4)]
    line = Line(leases)
    try:
        assert line.ahead() == [process.pid for process in waiting]
        end(waiting[1])
        assert line.ahead() == [waiting[at].pid for at in (0, 2, 3)]
        waiting[0].communicate("")
        assert line.ahead() == [waiting[at].pid for at in (2, 3)]
        other("do_queue", leases.directory)
        assert line.ahead() == [waiting[at].pid for at in (2, 3)], "who comes later is behind"
    finally:
        line.leave()


def test_only_the_head_of_the_line_is_asked_whether_it_is_ready(leases: Leases, other: Other) -> None:
    before = other("do_queue", leases.directory)
    asked: list[int] = []
    looks = 0

    def interrupted() -> bool:
        nonlocal looks
        looks += 1
        if looks == 3:
            assert asked == []
            end(before)
        return False

    def ready() -> bool:
        asked.append(looks)
        return len(asked) == 2

    assert Line(leases).wait(ready, None, interrupted)
    assert asked[0] >= 3
    assert Line(leases).ahead() == [], "it has left the line"


def test_a_wait_ends_in_time_and_by_interruption(leases: Leases, other: Other) -> None:
    other("do_queue", leases.directory)
    assert not Line(leases).wait(lambda: True, time.monotonic() + 0.1, lambda: False)
    assert not Line(leases).wait(lambda: True, None, lambda: True)


def test_lines_of_two_lease_directories_are_two(leases: Leases, other: Other, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    other("do_queue", tmp_path / "second")
    line = Line(leases)
    assert line.ahead() == []
    line.leave()


def test_a_stranger_s_socket_name_is_no_ticket(leases: Leases) -> None:
    import socket

    line = Line(leases)
    strangers = []
    for name in ("", "!", "0-", "-1", "000-x", "0-1-2", "1e9-7", "0" * 20):
        strangers.append(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        strangers[-1].bind(f"\0{line._prefix}{name}")
    try:
        assert line.ahead() == []
    finally:
        line.leave()
        for stranger in strangers:
            stranger.close()


# -- many at once, others, and too little ---------------------------------------------------------------


def test_fifty_processes_race_for_three_pcpus_and_no_pcpu_ever_has_two_owners(tmp_path: Path) -> None:
    (tmp_path / "leases").mkdir()
    race = subprocess.run(
        [sys.executable, __file__, "do_race", str(tmp_path), "50"],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    result = json.loads(race.stdout)
    assert result["failed"] == 0, race.stderr
    assert len(result["said"]) == 50
    assert {one["pcpu"] for one in result["said"]} == {FIRST + 1, FIRST + 2, FIRST + 3}
    first = [one["refusals"][0] for one in result["said"] if one["refusals"]]
    assert len(first) == 47
    for text in first:
        assert f"leased to other VMs: pCPU {FIRST + 1}-{FIRST + 3}" in text
        assert [f" holds pCPU {FIRST + at}" in text for at in (1, 2, 3)] == [True] * 3, text


def test_another_user_can_lease_a_real_pcpu_without_any_permission(tmp_path: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    script = (
        "import os, sys\nfrom hostpart.lease import Leases, release, is_locked\n"
        f"leases = Leases({SYSTEM_LEASES!r})\n"
        "with leases.lock(30):\n"
        "    fds = [fd for cpu in sorted(os.sched_getaffinity(0)) if (fd := leases.take(cpu)) is not None][:1]\n"
        "    for fd in fds: assert is_locked(fd); release(fd)\n"
        "print(os.getuid(), len(fds))"
    )
    setpriv = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"]
    if subprocess.run([*setpriv, sys.executable, "-c", "import hostpart"], cwd="/", check=False).returncode:
        pytest.skip("needs an interpreter and a hostpart that other users can read")
    done = subprocess.run([*setpriv, sys.executable, "-c", script], cwd="/", capture_output=True, text=True, check=True)
    uid, leased = done.stdout.split()
    assert uid == str(NOBODY)
    if leased == "0":
        pytest.skip("needs a pCPU that nobody leases at the moment")


def test_without_descriptors_a_lease_is_an_error_and_none_is_left(leases: Leases) -> None:
    os.close(take(leases, 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            leases.take(1)
        with pytest.raises(OSError, match="Too many open files"), leases.lock():
            pass
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    os.close(take(leases, 1))


@pytest.mark.parametrize("command", ["run", "ps", "restore", "topology"])
def test_too_few_descriptors_give_a_sentence_whichever_step_they_fail_at(place: Place, command: str) -> None:
    place.run("ps")  # the ledger is there
    args = ("run", "--", "true") if command == "run" else (command,)
    codes = {}
    for limit in (6, 7, 9, 11, 12, 13, 14, 15, 40):
        done = place.run(
            *args, preexec_fn=lambda limit=limit: resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
        )
        codes[limit] = done.returncode
        assert "Traceback" not in done.stderr, (limit, done.stderr)
        if done.returncode:
            assert "no file descriptor is left" in done.stderr, (limit, done.stderr)
            assert "ulimit -n" in done.stderr
        assert place.is_clean(), limit
    assert codes[40] == 0
    assert set(codes.values()) <= {0, 125 if command == "run" else 1}
    if command == "run":
        assert any(codes.values()), "no limit was low enough"


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
