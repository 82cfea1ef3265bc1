"""What the host refuses: descriptors, processes, room, permission, CPUs; and files that are not what they should be."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from hostpart import ledger as ledger_module
from hostpart import procfs
from hostpart.cli import main
from hostpart.cpuset import CpuSet
from hostpart.lease import AllocatorBusy, Leases
from hostpart.ledger import Ledger, boot_id
from tests.conftest import NOBODY, Place, wait_until

USABLE = CpuSet.of(os.sched_getaffinity(0))

pytestmark = [
    pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users and to mount"),
]


def refused(done: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """Assert that a command failed with a code, sentences, and something to try; and never with a traceback."""
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith("hostpart: ")
    assert re.search(r"^try: \S", done.stderr, re.MULTILINE)
    assert "Traceback" not in done.stderr
    for sentence in said:
        assert sentence in done.stderr


# -- the allocator's lock --------------------------------------------------------------------------

HOLD = """
import os, signal, sys
from hostpart.lease import Leases
with Leases(sys.argv[1]).lock():
    os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.fixture
def stopped_holder(place: Place) -> Iterator[int]:
    """A process that was stopped while it held the allocator's lock; its pid."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(place.leases)])
    assert wait_until(lambda: (stat := procfs.read_stat(process.pid)) is not None and stat.state == "T")
    yield process.pid
    process.kill()
    process.wait()


def test_a_stopped_holder_of_the_allocators_lock_is_named_after_a_bounded_wait(
    place: Place, stopped_holder: int
) -> None:
    done = place.run("run", "--", "true")
    refused(
        done,
        125,
        f"pid {stopped_holder} (python",
        "uid 0, stopped) has held the allocator's lock",
        "for the 5 s waited for it",
        f"try: let it go on with 'kill -CONT {stopped_holder}', or end it with 'kill -KILL {stopped_holder}'",
    )
    os.kill(stopped_holder, signal.SIGCONT)
    assert place.run("run", "--", "true").returncode == 0
    assert place.is_clean()


def test_the_wait_for_the_allocators_lock_takes_as_long_as_it_says(place: Place, stopped_holder: int) -> None:
    with pytest.raises(AllocatorBusy) as caught, Leases(str(place.leases)).lock(0.3):
        pass
    assert caught.value.waited_s == 0.3
    assert [holder.pid for holder in caught.value.holders] == [stopped_holder]


# -- descriptors and processes ---------------------------------------------------------------------


@pytest.mark.parametrize("limit", range(5, 21))
def test_a_limit_on_descriptors_is_kept_or_named(place: Place, limit: int) -> None:
    place.command = ["prlimit", f"--nofile={limit}", *place.command]
    done = place.run("run", "--", "echo", "done")
    if done.returncode:
        refused(done, 125, "no file descriptor is left", "ulimit -n")
    else:
        assert (done.stdout, done.stderr) == ("done\n", "")
    assert place.is_clean()


def test_some_limit_on_descriptors_stops_a_run_and_a_lower_than_usual_one_does_not(place: Place) -> None:
    command = place.command
    place.command = ["prlimit", "--nofile=8", *command]
    assert place.run("run", "--", "true").returncode == 125
    place.command = ["prlimit", "--nofile=64", *command]
    assert place.run("run", "--", "true").returncode == 0


@pytest.fixture
def lonely_place(nobodys_place: Place) -> Place:
    """A place of a user who has no other process, so that a limit on processes means this place's."""
    uid = 100_000 + os.getpid()
    for folder in nobodys_place.leases, nobodys_place.runtime:
        os.chown(folder, uid, uid)
    nobodys_place.command = [part.replace(f"={NOBODY}", f"={uid}") for part in nobodys_place.command]
    return nobodys_place


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_limit_on_processes_is_kept_or_named(lonely_place: Place, limit: int) -> None:
    # Front, keeper, worker: the first has one process too few, then the second; three are enough.
    setpriv = lonely_place.command.index("sh")
    lonely_place.command[setpriv:setpriv] = ["prlimit", f"--nproc={limit}"]
    done = lonely_place.run("run", "--", "echo", "done")
    if limit < 3:
        refused(done, 125, "ulimit")
        assert "Resource temporarily unavailable" in done.stderr or "EAGAIN" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    assert lonely_place.is_clean()


def test_a_service_vm_that_cannot_have_all_its_workers_leaves_none(lonely_place: Place) -> None:
    path = lonely_place.runtime.parent / "one.toml"
    path.write_text('[[vm]]\nname = "vm"\nvcpus = 1\ncommand = ["true"]\n')
    setpriv = lonely_place.command.index("sh")
    lonely_place.command[setpriv:setpriv] = ["prlimit", "--nproc=3"]  # front, keeper, the BSP; no second worker
    refused(lonely_place.run("launch", str(path)), 1, "ulimit")
    assert lonely_place.is_clean()


# -- room ------------------------------------------------------------------------------------------


def on_a_small_disk(place: Place, script: str) -> subprocess.CompletedProcess[str]:
    """Run a shell script in which ``$run``, the runtime directory, is a file system of 128 KiB; gone afterwards."""
    mount = f"mount -t tmpfs -o size=128k,mode=700 none {place.runtime} || exit 77\n"
    hostpart = " ".join(f"'{part}'" for part in place.command)
    text = f'run={place.runtime}\nhostpart() {{ {hostpart} "$@"; }}\n{mount}{script}'
    done = subprocess.run(
        ["unshare", "--mount", "sh", "-c", text],
        env=place.env, capture_output=True, text=True, timeout=60, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if done.returncode == 77 or done.stderr.startswith("unshare:"):
        pytest.skip(f"needs to mount a tmpfs in a mount namespace: {done.stderr.strip()}")
    return done


def test_a_full_disk_under_the_ledger_is_named_and_nothing_starts(place: Place) -> None:
    done = on_a_small_disk(place, "head -c 1M /dev/zero > $run/fill 2> /dev/null\nhostpart run -- echo ran")
    refused(done, 125, "cannot grow: the disk is full", "try: make room: 'df ")
    assert done.stdout == ""
    assert place.is_clean()


def test_a_disk_that_fills_while_a_vm_runs_changes_nothing_for_the_guest(place: Place) -> None:
    script = """
        hostpart run --name vm -- sh -c "head -c 1M /dev/zero > $run/fill 2> /dev/null; exit 3"
        echo status $?
        rm $run/fill
        hostpart run --name vm -- echo again
        hostpart ps
        find $run -type s
    """
    done = on_a_small_disk(place, script)
    assert done.stdout == "status 3\nagain\nno VM of yours is running\n"
    assert "the VM has ended, but" in done.stderr
    assert "the disk is full" in done.stderr
    assert place.is_clean()


def test_evidence_that_finds_no_room_is_an_error_and_the_vm_is_gone(place: Place) -> None:
    refused(place.run("run", "--evidence", "/dev/full", "--", "true"), 125, "'/dev/full': No space left on device")
    assert place.is_clean()


def test_evidence_that_could_not_be_written_is_told_before_the_guest_runs(place: Place) -> None:
    done = place.run("run", "--evidence", "/no/such/folder/evidence.json", "--", "echo", "ran")
    assert done.returncode == 125
    assert "\ntry: name a file in a directory that is there and writable" in done.stderr
    assert done.stdout == ""
    assert place.is_clean()


def test_results_that_find_no_room_are_an_error_and_the_vms_are_gone(place: Place) -> None:
    path = place.runtime.parent / "one.toml"
    path.write_text('[[vm]]\nname = "vm"\nvcpus = 1\ncommand = ["true"]\n')
    results = place.runtime.parent / "results"
    results.mkdir()
    (results / "vm.json").symlink_to("/dev/full")
    done = place.run("launch", "--results", str(results), str(path))
    refused(done, 1, "the evidence of VM 'vm' cannot be written", "No space left on device")
    assert place.is_clean()


# -- the ledger ------------------------------------------------------------------------------------


def test_a_read_only_ledger_is_named_and_nothing_starts(place: Place) -> None:
    done = on_a_small_disk(place, "hostpart run -- true\nmount -o remount,ro $run\nhostpart run -- echo ran")
    refused(done, 125, "ledger.sqlite cannot be written", "try: see 'ls -l ")
    assert done.stdout == ""
    assert place.is_clean()


@pytest.mark.parametrize("what", ["the directory", "the file"])
def test_a_ledger_that_its_user_may_not_write_is_named(nobodys_place: Place, what: str) -> None:
    assert nobodys_place.run("run", "--", "true").returncode == 0
    if what == "the directory":
        nobodys_place.runtime.joinpath("ledger.sqlite").unlink()
        nobodys_place.runtime.chmod(0o500)
    else:
        nobodys_place.runtime.joinpath("ledger.sqlite").chmod(0o400)
    refused(nobodys_place.run("run", "--", "echo", "ran"), 125, "cannot be written", "try: see 'ls -l ")
    assert nobodys_place.free() == USABLE
    assert not nobodys_place.processes()


@pytest.mark.parametrize(
    "content", [b"no database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096], ids=["text", "torn"]
)
def test_a_corrupt_ledger_is_named_and_the_remedy_mends_it(place: Place, content: bytes) -> None:
    path = place.runtime / "ledger.sqlite"
    path.write_bytes(content)
    done = place.run("run", "--", "true")
    refused(done, 125, f"{path} is damaged")
    refused(place.run("ps"), 1, f"{path} is damaged")
    remedy = re.search(r"^try: move it away: '(mv [^']*)'", done.stderr, re.MULTILINE)
    assert remedy
    subprocess.run(remedy[1].split(), check=True)
    assert place.run("run", "--", "true").returncode == 0
    assert place.is_clean()


@pytest.mark.parametrize("harm", ["vanishes", "is overwritten", "is replaced"])
def test_a_ledger_that_comes_to_harm_while_a_vm_runs_keeps_no_guest_alive_and_no_pcpu_leased(
    place: Place, harm: str
) -> None:
    stop, path = place.runtime / "stop", place.runtime / "ledger.sqlite"
    front = place.start("run", "--name", "vm", "--", "sh", "-c", f"until test -e {stop}; do sleep 0.05; done; exit 3")
    assert wait_until((place.runtime / "vm.sock").exists)
    assert wait_until(lambda: "RUNNING" in place.run("show", "vm").stdout)
    if harm == "vanishes":
        path.unlink()
    elif harm == "is overwritten":
        path.write_bytes(b"\xff" * path.stat().st_size)
    else:
        path.unlink()
        assert place.run("ps").returncode == 0  # makes a new one
    assert place.free() != USABLE
    stop.touch()
    _, said = front.communicate(timeout=30)
    assert front.returncode == 3
    assert "Traceback" not in said
    assert f"the VM has ended, but {path} " in said
    assert place.free() == USABLE
    path.unlink(missing_ok=True)
    assert place.run("run", "--name", "vm", "--", "true").returncode == 0
    assert place.is_clean()


def test_a_runtime_directory_that_vanishes_while_a_vm_runs_keeps_no_pcpu_leased(place: Place) -> None:
    stop = place.runtime.parent / "stop"
    front = place.start("run", "--name", "vm", "--", "sh", "-c", f"until test -e {stop}; do sleep 0.05; done; exit 3")
    assert wait_until(lambda: "RUNNING" in place.run("show", "vm").stdout)
    shutil.rmtree(place.runtime)
    stop.touch()
    _, said = front.communicate(timeout=30)
    assert front.returncode == 3
    assert "Traceback" not in said
    assert place.free() == USABLE
    assert place.run("run", "--name", "vm", "--", "true").returncode == 0
    assert place.is_clean()


def test_an_older_ledger_is_brought_up_with_what_it_holds(place: Place) -> None:
    with sqlite3.connect(place.runtime / "ledger.sqlite") as db:
        db.executescript(ledger_module._STEPS[0] + "; PRAGMA user_version = 1")
        columns = "name, service, token, boot_id, state, vcpu_num, guest, keeper_pid, keeper_start, front_pid, started"
        values = ("old", 0, "00" * 16, boot_id(), "RUNNING", 1, "x", 1 << 22, 1, 1 << 22, 0.0)
        db.execute(f"INSERT INTO vm ({columns}) VALUES ({', '.join('?' * len(values))})", values)  # noqa: S608
    db.close()
    assert re.search(r"^old +dirty", place.run("ps").stdout, re.MULTILINE)
    assert place.run("run", "--name", "old", "--", "true").returncode == 0
    assert place.is_clean()


def test_a_newer_ledger_is_left_alone_and_named(place: Place) -> None:
    path = place.runtime / "ledger.sqlite"
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE future (x)")
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = path.read_bytes()
    refused(place.run("run", "--", "true"), 125, "is of version 99, made by a newer hostpart")
    assert path.read_bytes() == before
    assert place.free() == USABLE


# -- the runtime directory -------------------------------------------------------------------------


def test_a_runtime_directory_of_somebody_else_is_not_used(place: Place) -> None:
    os.chown(place.runtime, NOBODY, NOBODY)
    refused(place.run("run", "--", "true"), 125, f"{place.runtime} belongs to uid {NOBODY}, not to you (uid 0)")
    refused(place.run("ps"), 4, "belongs to uid")
    assert not list(place.runtime.iterdir())
    os.chown(place.runtime, 0, 0)
    assert place.is_clean()


def test_a_runtime_directory_that_is_a_link_is_not_followed(place: Place) -> None:
    target = place.runtime.parent / "target"
    target.mkdir(mode=0o700)
    place.runtime.rmdir()
    place.runtime.symlink_to(target)
    refused(place.run("run", "--", "true"), 125, "is a symbolic link, and is not followed", f"'rm {place.runtime}'")
    assert not list(target.iterdir())
    place.runtime.unlink()
    assert place.run("run", "--", "true").returncode == 0
    assert place.is_clean()


def test_a_runtime_directory_that_others_may_enter_is_refused_and_the_remedy_mends_it(place: Place) -> None:
    place.runtime.chmod(0o755)
    done = place.run("run", "--", "true")
    refused(done, 125, "is open to others (mode 755)", f"try: chmod 700 {place.runtime}")
    place.runtime.chmod(0o700)
    assert place.run("run", "--", "true").returncode == 0
    assert place.is_clean()


def test_a_link_that_another_user_put_into_tmp_is_not_followed(nobodys_place: Place) -> None:
    # Without any runtime directory a user's is /tmp/hostpart-UID, where anybody can have put something before.
    uid = 200_000 + os.getpid()
    trap, target = Path(f"/tmp/hostpart-{uid}"), nobodys_place.runtime.parent / "target"
    target.mkdir(mode=0o700)
    os.chown(target, uid, uid)
    os.chown(nobodys_place.leases, uid, uid)
    trap.symlink_to(target)
    try:
        nobodys_place.command = [part.replace(f"={NOBODY}", f"={uid}") for part in nobodys_place.command]
        del nobodys_place.env["HOSTPART_RUNTIME_DIR"]
        refused(nobodys_place.run("run", "--", "true"), 125, f"{trap} is a symbolic link, and is not followed")
        assert not list(target.iterdir())
    finally:
        trap.unlink()
    assert nobodys_place.free() == USABLE


# -- CPUs that a cgroup takes away -----------------------------------------------------------------


@pytest.fixture
def cpuset() -> Iterator[Path]:
    """A version 1 cpuset with all that this process may use, for this test's children only."""
    folder = Path(f"/sys/fs/cgroup/cpuset/hostpart-test-{os.getpid()}")
    try:
        folder.mkdir()
        (folder / "cpuset.mems").write_text((folder.parent / "cpuset.mems").read_text())
        (folder / "cpuset.cpus").write_text(str(USABLE))
    except OSError as error:
        pytest.skip(f"needs a cgroup v1 cpuset to make others in: {error.strerror}")
    yield folder

    def removed() -> bool:
        try:
            folder.rmdir()
        except OSError:
            return False
        return True

    assert wait_until(removed)


def test_a_pcpu_that_a_cgroup_takes_away_before_the_pin_is_named_and_freed(place: Place, cpuset: Path) -> None:
    pcpu = max(USABLE)
    place.command = ["sh", "-c", f'echo 0 > {cpuset}/tasks && exec "$@"', "sh", *place.command]
    leases = Leases(str(place.leases))
    with leases.lock():
        # The topology has been read once there are two processes, front and keeper; the second waits for this lock.
        front = place.start("run", "--pcpus", str(pcpu), "--", "echo", "ran")
        assert wait_until(lambda: len([pid for pid in place.processes() if procfs.read_stat(pid)]) == 2)
        (cpuset / "cpuset.cpus").write_text(str(USABLE - CpuSet.of([pcpu])))
    out, said = front.communicate(timeout=30)
    assert (front.returncode, out) == (125, "")
    assert f"the kernel refused to pin vCPU 0 of VM 'run-{front.pid}' to pCPU {pcpu}: Invalid argument (EINVAL)" in said
    assert "\ntry: see 'grep Cpus_allowed_list /proc/self/status' and 'hostpart topology'" in said
    assert place.is_clean()


def test_a_pcpu_outside_the_cgroup_is_refused_with_what_is_there(place: Place, cpuset: Path) -> None:
    pcpu = max(USABLE)
    (cpuset / "cpuset.cpus").write_text(str(USABLE - CpuSet.of([pcpu])))
    place.command = ["sh", "-c", f'echo 0 > {cpuset}/tasks && exec "$@"', "sh", *place.command]
    refused(place.run("run", "--pcpus", str(pcpu), "--", "true"), 125, "1 pCPU wanted")
    assert place.is_clean()


def test_a_guest_whose_pcpu_a_cgroup_takes_away_while_it_runs_is_called_broken(place: Place, cpuset: Path) -> None:
    pcpu, evidence = max(USABLE), place.runtime.parent / "evidence.json"
    place.command = ["sh", "-c", f'echo 0 > {cpuset}/tasks && exec "$@"', "sh", *place.command]
    front = place.start("run", "--name", "vm", "--evidence", str(evidence), "--", "sleep", "300")
    assert wait_until(lambda: "RUNNING" in place.run("show", "vm").stdout)
    (cpuset / "cpuset.cpus").write_text(str(USABLE - CpuSet.of([pcpu])))
    assert wait_until(lambda: "was allowed on CPUs" in place.run("show", "vm").stdout)
    front.terminate()
    front.communicate(timeout=30)
    assert json.loads(evidence.read_text())["verdict"] == "broken"
    assert place.is_clean()


# -- a file of anything ----------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(content=st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(content=b"")
@example(content=b"\x00")
@example(content=b"\xff\xfe[vm]")
@example(content=b'[[vm]]\nname = "a"\nvcpus = 99999999999999999999\ncommand = ["x"]')
@example(content=b"[" * 5000)
@example(content=b"a = " + b"[" * 5000 + b"]" * 5000)
def test_a_file_of_any_bytes_is_a_sentence_and_status_2(content: bytes, capsys: pytest.CaptureFixture[str]) -> None:
    with tempfile.NamedTemporaryFile(suffix=".toml") as file:
        file.write(content)
        file.flush()
        for command in (["plan"], ["launch", "--dry-run"]):
            assert main([*command, file.name]) == 2
            said = capsys.readouterr()
            assert said.err.startswith(f"hostpart: {file.name}")
            assert "\ntry: " in said.err
            assert said.out == ""


def test_a_launch_of_random_bytes_changes_nothing(place: Place) -> None:
    path = place.runtime.parent / "random.toml"
    path.write_bytes(os.urandom(1000))
    refused(place.run("launch", str(path)), 2, str(path))
    assert place.is_clean()
    with Ledger(str(place.runtime)) as ledger:
        assert ledger.vms() == []
