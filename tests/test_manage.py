"""``ps``, ``show``, ``pause``, ``resume``, ``stop``, ``audit`` and ``restore``, from another process than the VM's."""

from __future__ import annotations

import json
import os
import pwd
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart import evidence, procfs
from hostpart.cpuset import CpuSet
from hostpart.ledger import Ledger
from tests.conftest import HOSTPART, Place, wait_until

SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())
USABLE = sorted(os.sched_getaffinity(0))

# Two processes that count, each in a file of its own, and one that the guest itself has stopped.
COUNTING = """
import os, signal, sys, time
def count(name):
    fd, number = os.open(name, os.O_RDWR | os.O_CREAT), 0
    while True:
        number += 1
        os.pwrite(fd, b"%d\\n" % number, 0)
        time.sleep(0.001)
folder = sys.argv[1]
for name in ("child", "idle"):
    pid = os.fork()
    if not pid:
        os.setsid()
        if name == "idle":
            os.kill(os.getpid(), signal.SIGSTOP)
        count(f"{folder}/{name}")
os.waitpid(pid, os.WUNTRACED)
with open(f"{folder}/stopped.new", "w") as file:
    file.write(str(pid))
os.rename(f"{folder}/stopped.new", f"{folder}/stopped")
count(f"{folder}/guest")
"""


def start(place: Place, name: str, *command: str, **more: object) -> subprocess.Popen[str]:
    """Start a VM and wait until ``ps`` knows it as running."""
    process = place.start("run", "--name", name, "--", *command, **more)
    assert wait_until(lambda: state_of(place, name) == "RUNNING")
    return process


def vm_of(place: Place, name: str) -> dict[str, Any] | None:
    """Return what ``ps`` says of a VM."""
    done = place.run("ps", "--json", cwd="/")
    assert done.returncode == 0, done.stderr
    vms: list[dict[str, Any]] = json.loads(done.stdout)["vms"]
    return next((vm for vm in vms if vm["vm"] == name), None)


def state_of(place: Place, name: str) -> str | None:
    """Return the state that ``ps`` says a VM is in."""
    vm = vm_of(place, name)
    return None if vm is None else str(vm["state"])


@pytest.fixture
def sleeper(place: Place) -> subprocess.Popen[str]:
    """A VM called ``box`` that sleeps."""
    return start(place, "box", "sleep", "60")


# -- pause and resume ----------------------------------------------------------------------------------


@pytest.fixture(params=["with a cgroup where there is one", "without a cgroup"])
def counting(request: pytest.FixtureRequest) -> tuple[Place, Path]:
    """A place and the folder of a VM ``box`` that counts in it."""
    alone = request.param == "without a cgroup"
    place: Place = request.getfixturevalue("nobodys_place" if alone else "place")
    python = next(word for word in place.command if "python" in word)
    folder = place.runtime / "counts"
    folder.mkdir()
    if alone:
        os.chown(folder, 65534, 65534)
    place.start("run", "--name", "box", "--", python, "-S", "-c", COUNTING, str(folder), cwd="/")
    assert wait_until(lambda: (folder / "guest").exists() and (folder / "child").exists())
    if alone:
        assert "hostpart-" not in Path(f"/proc/{(folder / 'stopped').read_text()}/cgroup").read_text()
    return place, folder


def _counts(folder: Path) -> dict[str, str]:
    return {name: (folder / name).read_text() for name in ("guest", "child")}


def test_no_process_of_a_paused_vm_runs_and_all_of_them_do_after_resume(counting: tuple[Place, Path]) -> None:
    place, folder = counting
    idle = int((folder / "stopped").read_text())
    assert place.run("pause", "box", cwd="/").returncode == 0
    before = _counts(folder)
    assert state_of(place, "box") == "PAUSED"
    time.sleep(0.3)  # not a wait for something: the time in which nothing may happen
    assert _counts(folder) == before
    assert place.run("resume", "box", cwd="/").returncode == 0
    assert state_of(place, "box") == "RUNNING"
    for name, count in before.items():
        assert wait_until(lambda name=name, count=count: (folder / name).read_text() != count)
    stat = procfs.read_stat(idle)
    assert stat is not None
    assert stat.state == "T"  # the guest stopped it, and only the guest may let it go on
    assert not (folder / "idle").exists()
    assert place.run("stop", "-t", "0", "box", cwd="/").returncode == 0
    assert procfs.read_stat(idle) is None


def test_a_vm_can_be_paused_again_and_again(counting: tuple[Place, Path]) -> None:
    place, folder = counting
    for _ in range(3):
        assert place.run("pause", "box", cwd="/").returncode == 0
        before = _counts(folder)
        assert place.run("resume", "box", cwd="/").returncode == 0
        for name, count in before.items():
            assert wait_until(lambda name=name, count=count: (folder / name).read_text() != count)
    assert place.run("stop", "box", cwd="/").returncode == 0


def test_pausing_twice_is_an_error_that_changes_nothing(place: Place, sleeper: subprocess.Popen[str]) -> None:
    assert place.run("pause", "box").returncode == 0
    again = place.run("pause", "box")
    assert again.returncode == 1
    assert "cannot be paused" in again.stderr
    assert state_of(place, "box") == "PAUSED"


def test_resuming_what_runs_is_an_error_that_changes_nothing(place: Place, sleeper: subprocess.Popen[str]) -> None:
    again = place.run("resume", "box")
    assert again.returncode == 1
    assert "is not paused" in again.stderr
    assert state_of(place, "box") == "RUNNING"


# -- stop ----------------------------------------------------------------------------------------------

TRAPPED = "trap 'echo cleaning up; exit 4' TERM; echo ready; while :; do sleep 0.05; done"
STUBBORN = "trap '' TERM; echo ready; while :; do sleep 0.05; done"


def test_stop_lets_the_guest_clean_up(place: Place) -> None:
    process = start(place, "box", "sh", "-c", TRAPPED)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert place.run("stop", "box").returncode == 0
    assert place.free() == CpuSet.of(USABLE)  # stop returns when they are
    out, _ = process.communicate(timeout=20)
    assert (process.returncode, out) == (4, "cleaning up\n")
    assert place.is_clean()


@pytest.mark.parametrize("grace", ["0", "0.3"])
def test_a_guest_that_ignores_sigterm_is_killed_when_the_grace_time_is_over(place: Place, grace: str) -> None:
    process = start(place, "box", "sh", "-c", STUBBORN)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    begin = time.monotonic()
    assert place.run("stop", "-t", grace, "box").returncode == 0
    assert time.monotonic() - begin >= float(grace)
    assert place.free() == CpuSet.of(USABLE)
    assert process.wait(20) == 128 + signal.SIGKILL


def test_stop_ends_a_paused_vm_and_it_may_still_clean_up(place: Place) -> None:
    process = start(place, "box", "sh", "-c", TRAPPED)
    assert process.stdout
    assert process.stdout.readline() == "ready\n"
    assert place.run("pause", "box").returncode == 0
    assert place.run("stop", "box").returncode == 0
    assert process.wait(20) == 4


def test_stop_with_no_grace_ends_a_paused_vm(place: Place) -> None:
    process = start(place, "box", "sh", "-c", STUBBORN)
    assert place.run("pause", "box").returncode == 0
    assert place.run("stop", "-t", "0", "box").returncode == 0
    assert process.wait(20) == 128 + signal.SIGKILL


def test_stop_prints_json_where_asked(place: Place, sleeper: subprocess.Popen[str]) -> None:
    done = place.run("stop", "--json", "box")
    assert json.loads(done.stdout) == {"schema": 1, "vm": "box", "state": "OFFLINE", "notes": []}


def test_a_stopped_keeper_is_named_and_not_waited_for(place: Place, sleeper: subprocess.Popen[str]) -> None:
    vm = vm_of(place, "box")
    assert vm is not None
    os.kill(vm["keeper"], signal.SIGSTOP)
    try:
        begin = time.monotonic()
        done = place.run("stop", "box")
        assert time.monotonic() - begin < 8
    finally:
        os.kill(vm["keeper"], signal.SIGCONT)
    assert done.returncode == 1
    assert f"kill -CONT {vm['keeper']}" in done.stderr


# -- whose VM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["show", "pause", "resume", "stop", "audit"])
def test_an_unknown_vm_is_said_to_be_unknown(place: Place, command: str) -> None:
    done = place.run(command, "ghost")
    assert (done.returncode, done.stdout) == (2, "")
    assert "'ghost'" in done.stderr


def test_a_name_that_is_near_a_running_one_is_answered_with_those_there_are(
    place: Place, sleeper: subprocess.Popen[str]
) -> None:
    done = place.run("show", "bok")
    assert done.returncode == 2
    assert "there are box" in done.stderr


@pytest.mark.parametrize("command", ["show", "pause", "stop"])
@pytest.mark.parametrize("name", ["../box", "/etc/passwd", "", "a" * 300, "\x1b[31m", "box\n"])
def test_what_is_no_name_is_an_unknown_vm(place: Place, command: str, name: str) -> None:
    done = place.run(command, name)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr
    assert "\x1b" not in done.stderr


def test_another_users_vm_is_not_listed_by_name_and_cannot_be_managed(place: Place, nobodys_place: Place) -> None:
    start(nobodys_place, "box", "sleep", "60", cwd="/")
    # The same leases, so that the pCPU is seen to be held; a ledger of one's own.
    place.env["HOSTPART_LEASE_DIR"] = str(nobodys_place.leases)
    listed = json.loads(place.run("ps", "--json").stdout)
    assert listed["vms"] == []
    assert [held["uid"] for held in listed["others"]] == [65534]
    shown = place.run("ps").stdout
    assert pwd.getpwuid(65534).pw_name in shown
    assert "box" not in shown
    assert "sleep" not in shown
    done = place.run("stop", "box")
    assert done.returncode == 2
    place.env["HOSTPART_RUNTIME_DIR"] = str(nobodys_place.runtime)
    done = place.run("stop", "box")
    assert done.returncode == 4
    assert "belongs to uid 65534" in done.stderr


def test_roots_directory_is_refused_to_another_user(place: Place, nobodys_place: Place) -> None:
    nobodys_place.env["HOSTPART_RUNTIME_DIR"] = str(place.runtime)
    done = nobodys_place.run("ps", cwd="/")
    assert done.returncode in (1, 4)
    assert "Traceback" not in done.stderr


# -- what is shown -------------------------------------------------------------------------------------


def test_ps_shows_what_the_kernel_knows_too(place: Place, sleeper: subprocess.Popen[str]) -> None:
    vm = vm_of(place, "box")
    assert vm is not None
    [vcpu] = vm["vcpus"]
    assert os.sched_getaffinity(vcpu["pid"]) == {vcpu["pcpu"]}
    stat = procfs.read_stat(vcpu["pid"])
    assert stat is not None
    assert stat.ppid == vm["keeper"]
    assert (vm["guest"], vm["service"], vcpu["state"]) == ("sleep 60", False, "RUNNING")
    line = next(line for line in place.run("ps").stdout.splitlines() if line.startswith("box"))
    assert line.split()[:5] == ["box", "RUNNING", str(vcpu["pcpu"]), "1", str(vm["keeper"])]


def test_ps_names_gives_what_completion_needs(place: Place, sleeper: subprocess.Popen[str]) -> None:
    assert place.run("ps", "--names").stdout == "box\n"


def test_without_a_vm_ps_and_audit_say_so_and_succeed(place: Place) -> None:
    for command in ("ps", "audit"):
        done = place.run(command)
        assert (done.returncode, done.stderr) == (0, "")
        assert "no VM" in done.stdout
    assert json.loads(place.run("ps", "--json").stdout)["vms"] == []
    assert json.loads(place.run("audit", "--json").stdout)["vms"] == []


def test_show_and_audit_give_evidence_that_agrees_with_the_schema(place: Place, sleeper: subprocess.Popen[str]) -> None:
    shown = json.loads(place.run("show", "--json", "box").stdout)
    [audited] = json.loads(place.run("audit", "--json", "--interval", "0.1", "box").stdout)["vms"]
    for document in (shown["evidence"], audited):
        jsonschema.Draft202012Validator(SCHEMA).validate(document)
        assert document["vm"] == "box"
        assert document["ended"] is None
        assert document["vcpus"][0]["exit"] is None
    assert shown["state"] == "RUNNING"


def test_show_is_a_table_for_people(place: Place, sleeper: subprocess.Popen[str]) -> None:
    out = place.run("show", "box").stdout
    assert out.startswith("box  RUNNING  up ")
    assert "guest 'sleep 60'" in out
    assert "pCPU" in out


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs")
def test_audit_finds_a_vcpu_that_was_moved_though_the_keeper_is_stopped(
    place: Place, sleeper: subprocess.Popen[str]
) -> None:
    vm = vm_of(place, "box")
    assert vm is not None
    os.kill(vm["keeper"], signal.SIGSTOP)
    try:
        [vcpu] = vm["vcpus"]
        os.sched_setaffinity(vcpu["pid"], set(USABLE) - {vcpu["pcpu"]})
        done = place.run("audit", "--strict", "--json", "--interval", "0.1")
    finally:
        os.kill(vm["keeper"], signal.SIGCONT)
    assert done.returncode == 5
    [document] = json.loads(done.stdout)["vms"]
    assert document["verdict"] == "broken"


def test_control_characters_of_a_command_never_reach_the_terminal(place: Place) -> None:
    start(place, "box", "sh", "-c", "exec sleep 60", "\x1b]0;owned\x07\x9b31m\u202e\udcff")
    for command in (["ps"], ["show", "box"], ["audit"], ["ps", "--json"], ["show", "--json", "box"]):
        done = subprocess.run([*place.command, *command], env=place.env, capture_output=True, timeout=60, check=False)
        assert done.returncode == 0
        text = (done.stdout + done.stderr).decode("utf-8")
        assert [c for c in text if not c.isprintable() and c != "\n"] == []


# -- restore -------------------------------------------------------------------------------------------


def test_restore_leaves_what_runs_alone(place: Place, sleeper: subprocess.Popen[str]) -> None:
    for options in ([], ["--dry-run"]):
        done = place.run("restore", *options)
        assert (done.returncode, done.stdout) == (0, "nothing is left behind\n")
    assert sleeper.poll() is None
    assert state_of(place, "box") == "RUNNING"


def test_restore_strikes_out_what_a_killed_hostpart_left_and_dry_run_does_not(
    place: Place, sleeper: subprocess.Popen[str]
) -> None:
    vm = vm_of(place, "box")
    assert vm is not None
    guest = vm["vcpus"][0]["pid"]
    os.kill(sleeper.pid, signal.SIGKILL)
    os.kill(vm["keeper"], signal.SIGKILL)
    sleeper.wait(20)
    assert wait_until(lambda: procfs.start_time(guest) is None)
    assert wait_until(lambda: state_of(place, "box") in ("dirty", None))
    shown = place.run("ps").stdout
    assert "hostpart restore" in shown
    looked = json.loads(place.run("restore", "--dry-run", "--json").stdout)
    assert looked["vms"] == [{"vm": "box", "pcpus": [vm["vcpus"][0]["pcpu"]]}]
    assert (looked["schema"], looked["dry_run"], looked["writes"]) == (1, True, [])
    with Ledger(str(place.runtime)) as ledger:
        assert [row.name for row in ledger.vms()] == ["box"]
    done = place.run("restore")
    assert done.returncode == 0
    assert "'box'" in done.stdout
    assert place.is_clean()
    assert place.run("restore").stdout == "nothing is left behind\n"


def test_root_reaches_another_users_vm_by_its_name(nobodys_place: Place, tmp_path: Path) -> None:
    # Where a user's runtime directory is by default, which is where root looks.
    home = Path("/tmp/hostpart-65534")
    if home.exists() and any(home.glob("*.sock")):
        pytest.skip("uid 65534 has VMs of its own on this host")
    env = {name: value for name, value in nobodys_place.env.items() if name != "HOSTPART_RUNTIME_DIR"}
    guest = subprocess.Popen(
        [*nobodys_place.command, "run", "--name", "theirs", "--", "sleep", "60"], env=env, stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until((home / "theirs.sock").exists, 20)
        root = {**nobodys_place.env, "HOSTPART_RUNTIME_DIR": str(tmp_path / "roots")}
        done = subprocess.run([*HOSTPART, "stop", "theirs"], env=root, capture_output=True, text=True, check=False)
        assert done.stderr == ""
        assert done.returncode == 0
        assert guest.wait(10) == 128 + signal.SIGTERM
    finally:
        if guest.poll() is None:
            guest.terminate()
            guest.wait(15)
