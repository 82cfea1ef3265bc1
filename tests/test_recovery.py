"""What dead keepers left: found by its token, ended, struck out, and nothing else touched."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hostpart.control import socket_path
from hostpart.ledger import Ledger, VcpuRow, VmRow, boot_id
from hostpart.procfs import processes, read_stat, read_status, start_time
from hostpart.recovery import Recovered, dirty, recover
from tests.conftest import Place, wait_until

NOBODY = 65534
Sleeper = Callable[..., "subprocess.Popen[bytes]"]


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    with Ledger(str(tmp_path)) as there:
        yield there


@pytest.fixture
def sleeper() -> Iterator[Sleeper]:
    """Start a process of no hostpart that sleeps, with these things in its environment."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*before: str, **environ: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen([*before, "sleep", "600"], env={"PATH": os.environ["PATH"], **environ})
        started.append(process)
        # Popen returns after the exec of the first program, which may be setpriv still.
        assert wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text() == "sleep\n")
        return process

    yield start
    for process in started:
        process.kill()
        process.wait()


def enter(ledger: Ledger, name: str = "rt", **changes: object) -> VmRow:
    """Enter a VM with one vCPU on pCPU 5, by default of a keeper that never was."""
    row = VmRow(0, name, 0, os.urandom(16).hex(), boot_id(), "RUNNING", 1, "sleep", 2**22 - 1, 1, 0, 0.0).replace(
        **changes
    )
    row = row.replace(id=ledger.add_vm(row))
    ledger.add_vcpu(VcpuRow(row.id, 0, 5, row.service, 1, 1, "RUNNING"))
    return row


def died(process: subprocess.Popen[bytes]) -> bool:
    return process.wait(10) == -signal.SIGKILL


def test_a_vm_whose_keeper_lives_is_left_alone(ledger: Ledger, sleeper: Sleeper) -> None:
    row = enter(ledger, keeper_pid=os.getpid(), keeper_start=start_time(os.getpid()))
    guest = sleeper(HOSTPART_RUN=row.token)
    assert dirty(ledger) == []
    assert recover(ledger) == []
    assert ledger.vms() == [row]
    assert guest.poll() is None


def test_a_keeper_s_pid_that_is_another_process_by_now_makes_the_vm_dirty_and_that_process_is_not_touched(
    ledger: Ledger, sleeper: Sleeper
) -> None:
    innocent = sleeper()
    start = start_time(innocent.pid)
    assert start is not None
    row = enter(ledger, keeper_pid=innocent.pid, keeper_start=start - 1)
    assert dirty(ledger) == [row]
    assert recover(ledger) == [Recovered("rt", (5,), (), ())]
    assert ledger.vms() == []
    assert innocent.poll() is None


def test_a_vcpu_s_pid_that_is_another_process_by_now_is_not_touched(ledger: Ledger, sleeper: Sleeper) -> None:
    innocent = sleeper()
    row = enter(ledger)
    ledger.set_pid(row.id, 0, innocent.pid, 1)
    assert recover(ledger) == [Recovered("rt", (5,), (), ())]
    assert innocent.poll() is None


def test_a_row_of_another_boot_is_struck_out_and_no_process_is_looked_for(ledger: Ledger, sleeper: Sleeper) -> None:
    own = start_time(os.getpid())
    row = enter(ledger, boot_id="another", keeper_pid=os.getpid(), keeper_start=own)
    guest = sleeper(HOSTPART_RUN=row.token)
    assert recover(ledger) == [Recovered("rt", (5,), (), ())]
    assert ledger.vms() == []
    assert guest.poll() is None


def test_an_orphan_with_the_token_is_ended_and_one_of_the_same_name_with_another_is_not(
    ledger: Ledger, sleeper: Sleeper
) -> None:
    row = enter(ledger)
    orphans = [sleeper(HOSTPART_VM="rt", HOSTPART_RUN=row.token) for _ in range(3)]
    innocent = [
        sleeper(HOSTPART_VM="rt", HOSTPART_RUN="0" * 32),
        sleeper(HOSTPART_VM="rt"),
        sleeper(HOSTPART_RUN=row.token[:-1]),
        sleeper(HOSTPART_RUN_OLD=row.token),
    ]
    assert recover(ledger) == [Recovered("rt", (5,), tuple(sorted(one.pid for one in orphans)), ())]
    assert all(map(died, orphans))
    assert [one.poll() for one in innocent] == [None] * 4
    assert ledger.vms() == []


def test_only_the_vm_that_is_named_is_recovered(ledger: Ledger, sleeper: Sleeper) -> None:
    one = enter(ledger, "one")
    row = VmRow(0, "two", 0, "ab" * 16, boot_id(), "RUNNING", 1, "sleep", 2**22 - 1, 1, 0, 0.0)
    ledger.add_vm(row)
    guest = sleeper(HOSTPART_RUN=one.token)
    assert [found.name for found in recover(ledger, only="ab" * 16)] == ["two"]
    assert [left.name for left in ledger.vms()] == ["one"]
    assert guest.poll() is None


def test_a_stopped_orphan_is_ended_too(ledger: Ledger, sleeper: Sleeper) -> None:
    orphan = sleeper(HOSTPART_RUN=enter(ledger).token)
    orphan.send_signal(signal.SIGSTOP)
    assert wait_until(lambda: (stat := read_stat(orphan.pid)) is not None and stat.state == "T")
    assert recover(ledger)[0].ended == (orphan.pid,)
    assert died(orphan)


def test_an_orphan_that_forks_for_its_life_is_ended_with_all_its_children(ledger: Ledger, tmp_path: Path) -> None:
    row = enter(ledger)
    script = "import os, time\nwhile True:\n    if not os.fork(): time.sleep(600)\n    time.sleep(0.002)"
    orphan = subprocess.Popen(
        ["sh", "-c", f"{sys.executable} -c '{script}' & exec sleep 600"], env={"HOSTPART_RUN": row.token}
    )
    mark = f"HOSTPART_RUN={row.token}".encode()

    def members() -> int:
        count = 0
        for pid in processes():
            try:
                count += mark in Path(f"/proc/{pid}/environ").read_bytes()
            except OSError:
                continue
        return count

    assert wait_until(lambda: members() > 5)
    (found,) = recover(ledger)
    assert len(found.ended) > 5
    assert died(orphan)
    assert wait_until(lambda: members() == 0)


def test_root_ends_an_orphan_that_runs_as_another_user(ledger: Ledger, sleeper: Sleeper) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    row = enter(ledger)
    orphan = sleeper("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", HOSTPART_RUN=row.token)
    status = read_status(orphan.pid)
    assert status is not None
    assert status.uid == NOBODY
    assert recover(ledger)[0].ended == (orphan.pid,)
    assert died(orphan)


def test_a_socket_that_was_left_is_removed_and_a_live_vm_s_is_not(ledger: Ledger) -> None:
    enter(ledger, "dead")
    own = start_time(os.getpid())
    ledger.add_vm(VmRow(0, "live", 0, "cd" * 16, boot_id(), "RUNNING", 1, "s", os.getpid(), own or 0, 0, 0.0))
    for name in ("dead", "live"):
        Path(socket_path(ledger.directory, name)).touch()
    recover(ledger)
    assert not os.path.exists(socket_path(ledger.directory, "dead"))
    assert os.path.exists(socket_path(ledger.directory, "live"))


# -- after a real kill of everything -------------------------------------------------------------------

# Its daemon closes all descriptors, so no lease and no pipe shows that it lives.
_CLOSE_ALL = "import os; os.setsid(); os.closerange(0, 4096); os.execvp('sleep', ['sleep', '600'])"
DAEMON = f'({sys.executable} -c "{_CLOSE_ALL}" &); exec sleep 600'


def kill_all_of(place: Place, *options: str, guest: str = DAEMON) -> tuple[int, int]:
    """Run a VM whose guest has a daemon, kill its front and its keeper; return the daemon's pid and its pCPU."""
    front = place.start("run", "--name", "rt", *options, "--", "sh", "-c", guest)

    def vm() -> dict[str, object]:
        return next(iter(json.loads(place.run("ps", "--json").stdout)["vms"]), {})

    assert wait_until(lambda: vm().get("state") == "RUNNING", 20), front.poll()
    keeper, vcpu = vm()["keeper"], vm()["vcpus"][0]  # type: ignore[index]
    assert isinstance(keeper, int)

    def daemons() -> list[int]:
        return [
            pid for pid in place.processes()
            if pid != vcpu["pid"] and (stat := read_stat(pid)) is not None and stat.ppid == keeper
            and Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
        ]  # fmt: skip

    assert wait_until(lambda: len(daemons()) == 1)
    (daemon,) = daemons()
    # The front is stopped, so that it does not see its keeper end. The other way round the kernel would wake the
    # keeper: a stopped process group that is orphaned is continued.
    os.kill(front.pid, signal.SIGSTOP)
    assert wait_until(lambda: (stat := read_stat(front.pid)) is not None and stat.state == "T")
    for pid in (keeper, front.pid):
        os.kill(pid, signal.SIGKILL)
    front.wait()
    assert wait_until(lambda: start_time(vcpu["pid"]) is None), "the worker outlived its keeper"
    return daemon, vcpu["pcpu"]


def test_a_daemon_of_a_killed_vm_is_ended_before_its_pcpu_is_given_out_again(place: Place, two_pcpus: None) -> None:
    daemon, pcpu = kill_all_of(place)
    assert start_time(daemon) is not None
    assert os.sched_getaffinity(daemon) == {pcpu}
    listed = json.loads(place.run("ps", "--json").stdout)["vms"]
    assert [vm["state"] for vm in listed] == ["dirty"]
    look = (
        f"test ! -e /proc/{daemon} || grep -q '^State:.Z' /proc/{daemon}/status"  # whoever adopts it reaps it some time
    )
    done = place.run("run", "--pcpus", str(pcpu), "--", "sh", "-c", look)
    assert done.returncode == 0, done.stderr
    assert "that VM 'rt' left" in done.stderr
    assert wait_until(place.is_clean)


def test_restore_shows_first_and_then_does_it_and_a_second_time_there_is_nothing_to_do(
    place: Place, two_pcpus: None
) -> None:
    daemon, pcpu = kill_all_of(place)
    shown = place.run("restore", "--dry-run")
    assert f"would end what is left of VM 'rt', which was on pCPU {pcpu}" in shown.stdout
    assert start_time(daemon) is not None
    done = json.loads(place.run("restore", "--json").stdout)
    assert done["vms"] == [{"vm": "rt", "pcpus": [pcpu], "ended": [daemon], "left": []}]
    assert wait_until(place.is_clean)
    assert place.run("restore").stdout == "nothing is left behind\n"


def test_root_restores_what_a_guest_of_another_user_left(place: Place, two_pcpus: None) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to become another user")
    guest = "setsid -f sleep 600; exec sleep 600"
    daemon, _ = kill_all_of(place, "--user", str(NOBODY), "--group", str(NOBODY), guest=guest)
    status = read_status(daemon)
    assert status is not None
    assert status.uid == NOBODY
    done = place.run("restore")
    assert done.returncode == 0, done.stderr
    assert f"processes ended: {daemon}" in done.stdout
    assert wait_until(place.is_clean)


def test_two_who_restore_at_once_get_on(place: Place, two_pcpus: None) -> None:
    kill_all_of(place)
    both = [place.start("restore"), place.start("restore")]
    said = [process.communicate(timeout=30) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert wait_until(place.is_clean)


@pytest.mark.parametrize("breaks", ["removed", "damaged"])
def test_a_vm_ends_clean_with_its_own_exit_code_though_its_ledger_is_gone(
    place: Place, tmp_path: Path, breaks: str, two_pcpus: None
) -> None:
    ready, go = tmp_path / "ready", tmp_path / "go"
    script = "(setsid sleep 600 >/dev/null 2>&1 </dev/null &); "
    script += f"touch {ready}; while ! [ -e {go} ]; do sleep 0.02; done; exit 7"
    front = place.start("run", "--", "sh", "-c", script)
    assert wait_until(ready.exists, 20), front.poll()
    path = place.runtime / "ledger.sqlite"
    if breaks == "removed":
        path.unlink()
    else:
        path.write_bytes(os.urandom(path.stat().st_size))
    go.touch()
    _, errors = front.communicate(timeout=30)
    assert front.returncode == 7, errors
    assert f"the VM has ended, but {path} " in errors
    path.unlink(missing_ok=True)
    assert wait_until(place.is_clean)
