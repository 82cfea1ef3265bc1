"""SIGKILL of any hostpart process at any time: the guests end, the leases are free, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest

from hostpart import procfs
from hostpart.cpuset import CpuSet
from hostpart.ledger import Ledger, VcpuRow, VmRow, boot_id
from tests.conftest import HOSTPART, NOBODY, Place, wait_until

USABLE = CpuSet.of(os.sched_getaffinity(0))

pytestmark = [
    pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs"),
    pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be other users and to look at their processes"),
]

# A guest whose daemons are out of every session, parent, job and descriptor; with "clean", of the environment too.
DAEMONS = """
import os, signal, sys
said, count, clean = sys.argv[1], int(sys.argv[2]), sys.argv[3:] == ["clean"]
log = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
for _ in range(count):
    if os.fork() == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.write(log, b"%d\\n" % os.getpid())
        os.closerange(0, 4096)
        if clean:
            os.execve("/bin/sleep", ["sleep", "300"], {})
        while True:
            signal.pause()
    os.wait()
signal.pause()
"""


def python_of(place: Place) -> str:
    """Return the interpreter that this place's commands use."""
    return next(part for part in place.command if os.path.basename(part).startswith("python") and "=" not in part)


def start(place: Place, count: int = 3, *more: str) -> tuple[subprocess.Popen[str], VmRow, list[int]]:
    """Run a guest with daemons as VM "vm"; return the front, the ledger's row and the daemons' pids."""
    script, said = place.runtime.parent / "daemons.py", place.runtime / "daemons"
    script.write_text(DAEMONS)
    front = place.start("run", "--name", "vm", "--", python_of(place), str(script), str(said), str(count), *more)

    def daemons() -> list[int]:
        return [int(line) for line in said.read_text().split()] if said.exists() else []

    assert wait_until(lambda: len(daemons()) == count, 30)
    with Ledger(str(place.runtime)) as ledger:
        (row,) = ledger.vms()
    assert row.front_pid == front.pid
    return front, row, daemons()


def alive(pids: list[int]) -> list[int]:
    """Return those that are there and no zombies."""
    return [pid for pid in pids if (stat := procfs.read_stat(pid)) is not None and not stat.dead]


def kill_both(row: VmRow) -> None:
    """Kill keeper and front so that neither sees the other's end."""
    # The keeper first: the kernel continues a stopped process group that is orphaned by its parent's end.
    pids = [row.keeper_pid, row.front_pid]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    assert wait_until(lambda: all((stat := procfs.read_stat(pid)) and stat.state == "T" for pid in pids))
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    assert wait_until(lambda: not alive(pids))


@pytest.fixture
def other() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Start a process that is none of hostpart's; it is gone when the test ends."""
    started: list[subprocess.Popen[bytes]] = []

    def start(**options: object) -> subprocess.Popen[bytes]:
        started.append(subprocess.Popen(["sleep", "300"], **options))  # type: ignore[call-overload]
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize("environment", ["own", "clean"])
def test_when_the_front_is_killed_the_guest_ends_with_all_its_daemons(anyones_place: Place, environment: str) -> None:
    front, _, daemons = start(anyones_place, 3, environment)
    front.kill()
    front.wait()
    assert wait_until(lambda: anyones_place.free() == USABLE, 3)
    assert not alive(daemons)  # the leases are let go last
    assert wait_until(anyones_place.is_clean)


@pytest.mark.parametrize("environment", ["own", "clean"])
def test_when_the_keeper_is_killed_the_front_ends_the_guest_and_says_so(anyones_place: Place, environment: str) -> None:
    front, row, daemons = start(anyones_place, 3, environment)
    os.kill(row.keeper_pid, signal.SIGKILL)
    _, said = front.communicate(timeout=30)
    assert front.returncode == 125
    assert (
        f"the keeper of VM 'vm' (pid {row.keeper_pid}) was killed; its guest was ended and its pCPUs are free" in said
    )
    assert "try: run it again" in said
    assert not alive(daemons)
    assert anyones_place.is_clean()


def test_leases_are_held_until_the_last_daemon_is_gone_after_the_keeper_was_killed(anyones_place: Place) -> None:
    front, row, daemons = start(anyones_place, 200)
    os.kill(row.keeper_pid, signal.SIGKILL)
    assert wait_until(lambda: anyones_place.free() == USABLE)
    assert not alive(daemons)
    front.wait(30)


def test_when_front_and_keeper_are_killed_the_workers_end_at_once_and_the_daemons_before_their_pcpu_is_used_again(
    anyones_place: Place,
) -> None:
    _, row, daemons = start(anyones_place)
    with Ledger(str(anyones_place.runtime)) as ledger:
        workers = [vcpu.pid for vcpu in ledger.vcpus(row.id)]
    assert len(alive(workers)) == 1
    kill_both(row)
    assert wait_until(lambda: not alive(workers), 3)
    assert anyones_place.free() == USABLE
    assert alive(daemons) == daemons  # nobody is there to end them yet
    listed = anyones_place.run("ps")
    assert "dirty" in listed.stdout
    assert "hostpart restore" in listed.stdout
    # Seen from the next guest: there may be zombies that init has not reaped, and nothing else.
    states = " ".join(f"/proc/{pid}/status" for pid in daemons)
    done = anyones_place.run(
        "run", "--", "sh", "-c", f"cat {states} 2> /dev/null | grep State: | grep -v Z; echo looked"
    )
    assert (done.returncode, done.stdout) == (0, "looked\n")
    assert "ended 3 processes that VM 'vm' left when hostpart was killed" in done.stderr
    assert anyones_place.is_clean()


def test_restore_ends_what_killed_processes_left_and_shows_it_before(anyones_place: Place) -> None:
    _, row, daemons = start(anyones_place)
    kill_both(row)
    shown = anyones_place.run("restore", "--dry-run")
    assert (shown.returncode, alive(daemons)) == (0, daemons)
    assert "would end what is left of VM 'vm'" in shown.stdout
    assert "nothing" not in shown.stdout
    done = anyones_place.run("restore")
    assert (done.returncode, alive(daemons)) == (0, [])
    assert all(str(pid) in done.stdout for pid in daemons)
    assert anyones_place.is_clean()
    assert "nothing is left behind" in anyones_place.run("restore").stdout


def test_the_leaf_finds_daemons_that_dropped_their_environment(place: Place, request: pytest.FixtureRequest) -> None:
    _, row, daemons = start(place, 2, "clean")
    if not row.leaf:
        for pid in daemons:
            os.kill(pid, signal.SIGKILL)
        pytest.skip("needs a cgroup v2 to make a leaf in")
    assert wait_until(lambda: all(procfs.environ_block(pid) == b"" for pid in daemons))
    kill_both(row)
    assert place.run("run", "--", "true").returncode == 0
    assert not alive(daemons)
    assert place.is_clean()
    assert not os.path.exists(row.leaf)


def test_a_guest_of_another_user_is_found_when_root_cleans_up(anyones_place: Place) -> None:
    if "setpriv" in anyones_place.command:
        pytest.skip("needs root's hostpart, which can start guests as other users")
    guest = "setsid sh -c 'echo $$; exec sleep 300' & sleep 300"
    user = ["--user", str(NOBODY), "--group", str(NOBODY)]
    front = anyones_place.start("run", "--name", "vm", *user, "--", "sh", "-c", guest)
    assert front.stdout is not None
    pid = int(front.stdout.readline())
    with Ledger(str(anyones_place.runtime)) as ledger:
        (row,) = ledger.vms()
    kill_both(row)
    assert alive([pid])
    assert anyones_place.run("restore").returncode == 0
    assert not alive([pid])
    assert anyones_place.is_clean()


# -- at each phase of a VM's life -------------------------------------------------------------------

FRONT = ["front.start", "front.forked", "front.created", "front.ready", "front.ended"]
KEEPER = [
    "keeper.born",
    "hypervisor.locked",
    "hypervisor.leased",
    "hypervisor.entered",
    "keeper.leased",
    "hypervisor.forked",
    "keeper.forked",
    "keeper.ready",
    "keeper.started",
    "keeper.ended",
    "hypervisor.freed",
    "keeper.destroyed",
]
WORKER = ["worker.born", "worker.pinned", "worker.ready"]
BOTH = [f"{point},front.lost" for point in KEEPER]


def next_finds_everything_free(place: Place) -> None:
    """Assert that the kernel has let go of everything, and that the next command finds nothing in its way."""
    assert wait_until(lambda: place.free() == USABLE)
    assert wait_until(lambda: not place.processes())
    place.env.pop("HOSTPART_DIE_AT")
    done = place.run("run", "--name", "vm", "--", "echo", "again")
    assert (done.returncode, done.stdout, done.stderr) == (0, "again\n", "")
    assert place.is_clean()


@pytest.mark.parametrize("points", [*FRONT, *KEEPER, *WORKER, *BOTH])
def test_a_kill_at_any_phase_leaves_nothing_in_the_way(anyones_place: Place, points: str) -> None:
    anyones_place.env["HOSTPART_DIE_AT"] = points
    died = anyones_place.run("run", "--name", "vm", "--", "true")
    # A worker that dies when it is READY dies before START or just after.
    codes = (
        (125, 128 + signal.SIGKILL) if points == "worker.ready" else (-signal.SIGKILL if "front" in points else 125,)
    )
    assert died.returncode in codes
    if died.returncode == 125:
        assert "was killed" in died.stderr
        assert "\ntry: run it again" in died.stderr
    assert "Traceback" not in died.stderr
    next_finds_everything_free(anyones_place)


@pytest.mark.parametrize(
    "points", ["keeper.ready", "keeper.ended,front.lost", "front.start", "front.booted", "front.ready"]
)
def test_a_launch_that_is_killed_leaves_nothing_in_the_way(place: Place, points: str) -> None:
    place.env["HOSTPART_DIE_AT"] = points
    died = place.run("launch", scenario(place, 'command = ["true"]'))
    assert died.returncode == (-signal.SIGKILL if "front" in points else 1)
    assert "Traceback" not in died.stderr
    next_finds_everything_free(place)


@pytest.mark.parametrize("point", ["front.start", "front.booted", "front.ready"])
def test_a_detaching_launch_that_is_killed_is_told_to_the_user(place: Place, point: str) -> None:
    place.env["HOSTPART_DIE_AT"] = point
    died = place.run("launch", "-d", scenario(place, 'command = ["true"]'))
    assert died.returncode == 128 + signal.SIGKILL
    assert "signal 9 ended the process in the background" in died.stderr
    assert "\ntry: " in died.stderr
    next_finds_everything_free(place)


def scenario(place: Place, guest: str, name: str = "vm") -> str:
    """Write a scenario of one VM with one vCPU and return its path."""
    path = place.runtime.parent / "scenario.toml"
    path.write_text(f'[[vm]]\nname = "{name}"\nvcpus = 1\n{guest}\n')
    return str(path)


def test_when_the_front_of_a_detached_launch_is_killed_its_vm_ends(place: Place) -> None:
    assert place.run("launch", "-d", scenario(place, 'command = ["sleep", "300"]')).returncode == 0
    with Ledger(str(place.runtime)) as ledger:
        service, user = ledger.vms()
        (vcpu,) = ledger.vcpus(user.id)
    assert (service.name, user.name, service.front_pid) == ("vm0", "vm", user.front_pid)
    os.kill(user.front_pid, signal.SIGKILL)
    assert wait_until(lambda: place.free() == USABLE, 3)
    assert not alive([vcpu.pid])
    assert wait_until(place.is_clean)


def test_a_user_vm_goes_on_when_the_service_vms_keeper_is_killed(place: Place) -> None:
    stop = place.runtime / "stop"
    launch = place.start(
        "launch", scenario(place, f'command = ["sh", "-c", "until test -e {stop}; do sleep 0.05; done"]')
    )

    def rows() -> list[VmRow]:
        with Ledger(str(place.runtime)) as ledger:
            return ledger.vms()

    assert wait_until(lambda: [row.state for row in rows()] == ["RUNNING", "RUNNING"])
    service, user = rows()
    os.kill(service.keeper_pid, signal.SIGKILL)
    assert wait_until(lambda: [row.name for row in rows()] == ["vm"])
    assert place.free() != USABLE
    assert alive([user.keeper_pid])
    stop.touch()
    _, said = launch.communicate(timeout=30)
    assert launch.returncode == 0
    assert "the keeper of VM 'vm0' was killed" in said
    assert place.is_clean()


# Two VMs of one front on a host with two pCPUs: the service VM keeps none. No command can ask for that.
TWO_VMS = """
import sys
from hostpart.config import Guest, ServiceVm, VmConfig
from hostpart.device_model import Caller
from hostpart.errors import HostpartError
from hostpart.front import Front
from hostpart.host import Host
from hostpart.keeper import Options
from hostpart.topology import read_topology

front = Front(read_topology(Host()), Caller(), stop_on_interrupt=True)
guest = Guest("command", ("sh", "-c", "until test -e %s; do sleep 0.05; done" % sys.argv[1]))
options = Options()
keepers = [front.start(VmConfig(name, guest, vcpus=1), ServiceVm(keep=0), options) for name in ("one", "two")]
front.wait(lambda: all(keeper.has("ready") for keeper in keepers))
front.running()
front.wait(lambda: all(keeper.over for keeper in keepers))
front.end()
print(*(keeper.error or keeper.said["ended"]["statuses"] for keeper in keepers), sep="\\n")
"""


@pytest.mark.parametrize("ledger", ["there", "removed"])
def test_when_one_vms_keeper_is_killed_the_other_vms_of_the_front_go_on(place: Place, ledger: str) -> None:
    stop = place.runtime / "stop"
    place.command = [sys.executable, "-c", TWO_VMS]
    front = place.start(str(stop))

    def rows() -> list[VmRow]:
        with Ledger(str(place.runtime)) as ledger:
            return ledger.vms()

    assert wait_until(lambda: [row.state for row in rows()] == ["RUNNING", "RUNNING"])
    assert not place.free()
    one, two = sorted(rows(), key=lambda row: row.name)
    if ledger == "removed":
        place.runtime.joinpath("ledger.sqlite").unlink()
    os.kill(one.keeper_pid, signal.SIGKILL)
    assert wait_until(lambda: len(place.free()) == 1)
    assert alive([two.keeper_pid])
    stop.touch()
    out, said = front.communicate(timeout=30)
    assert f"the keeper of VM 'one' (pid {one.keeper_pid}) was killed" in out
    assert out.endswith("\n[0]\n")
    assert "Traceback" not in said
    if ledger == "removed":
        # Nothing knew of its empty leaf and its socket any more; they are in nobody's way.
        if one.leaf:
            os.rmdir(one.leaf)
        place.command = HOSTPART
        assert place.run("run", "--name", "one", "--", "true").returncode == 0
    assert place.is_clean()


# -- pids are used again --------------------------------------------------------------------------


def test_a_recycled_pid_is_nobodys_keeper_and_is_left_alone(
    place: Place, other: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process, pcpu = other(), max(USABLE)
    began = procfs.start_time(process.pid)
    assert began is not None
    with Ledger(str(place.runtime)) as ledger:
        row = VmRow(
            0, "vm", 0, os.urandom(16).hex(), boot_id(), "RUNNING", 1, "x", process.pid, began - 1, process.pid, 0.0
        )
        ledger.add_vcpu(VcpuRow(ledger.add_vm(row), 0, pcpu, 0, process.pid, began - 1, "RUNNING"))
    assert "dirty" in place.run("ps").stdout
    done = place.run("run", "--name", "vm", "--pcpus", str(pcpu), "--", "echo", "mine")
    assert (done.returncode, done.stdout) == (0, "mine\n")
    assert process.poll() is None
    assert place.is_clean()


def test_a_row_of_another_boot_names_no_process_of_this_one(
    place: Place, other: Callable[..., subprocess.Popen[bytes]]
) -> None:
    token = os.urandom(16).hex()
    process = other(env={**os.environ, "HOSTPART_RUN": token})
    began = procfs.start_time(process.pid)
    assert began is not None
    with Ledger(str(place.runtime)) as ledger:
        ledger.add_vm(VmRow(0, "vm", 0, token, "another", "RUNNING", 1, "x", process.pid, began, process.pid, 0.0))
    assert place.run("restore").returncode == 0
    assert process.poll() is None
    assert place.is_clean()


def test_a_keeper_that_nobody_reaps_is_gone_all_the_same(place: Place) -> None:
    with subprocess.Popen(["true"]) as zombie:
        assert wait_until(lambda: (stat := procfs.read_stat(zombie.pid)) is not None and stat.dead)
        began = procfs.start_time(zombie.pid)
        assert began is not None
        with Ledger(str(place.runtime)) as ledger:
            ledger.add_vm(
                VmRow(
                    0, "vm", 0, os.urandom(16).hex(), boot_id(), "RUNNING", 1, "x", zombie.pid, began, zombie.pid, 0.0
                )
            )
        assert place.run("run", "--name", "vm", "--", "true").returncode == 0
        assert place.is_clean()


def test_a_running_vm_is_no_business_of_restores(place: Place) -> None:
    front, row, daemons = start(place)
    assert "nothing is left behind" in place.run("restore").stdout
    assert alive(daemons) == daemons
    assert alive([row.keeper_pid, row.front_pid]) == [row.keeper_pid, row.front_pid]
    front.send_signal(signal.SIGTERM)
    front.communicate(timeout=30)
    assert not alive(daemons)
    assert place.is_clean()
