"""A fleet of three real hosts, and what goes wrong: nothing runs twice, nothing is lost unsaid, nothing is left."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hostpart.fleet import journal
from tests.conftest import wait_until
from tests.fleet.lab import Host, Lab

pytest.importorskip("distributed")

NAMES = ("a", "b", "c")
HOLD_S = 8
_TALE = "faults"


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """Three hosts with two pCPUs each."""
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two usable pCPUs")
    with Lab(tmp_path_factory.mktemp(_TALE), NAMES) as here:
        for host in here.hosts.values():
            _as_it_was(host)
            host.boot()
        yield here


def _as_it_was(host: Host) -> None:
    two = sorted(os.sched_getaffinity(0))[:2]
    host.prefix = ["taskset", "--cpu-list", ",".join(map(str, two))]
    host.options, host.preload = [], True
    host.env.pop("HOSTPART_COMMAND", None)
    host.env["HOSTPART_FLEET_HOLD_S"] = str(HOLD_S)


@pytest.fixture
def fleet(lab: Lab) -> Iterator[Lab]:
    """The lab with all hosts up; whatever a test does to them, no lease, process or VM may be left in the end."""
    _heal(lab)
    yield lab
    for host in lab.hosts.values():
        if lab.apart:
            lab.plug(host.name)
    wait_until(lambda: lab.left() == [], HOLD_S + 10)
    for host in lab.hosts.values():
        if host.up and host.left():
            # What a host that was killed whole has in its books is struck out by the next who wants something there.
            host.run("run", "--", "true")
    wait_until(lambda: lab.left() == [], 5)
    left = lab.left()
    for host in lab.hosts.values():
        if host.up and host.left():
            host.kill()
            host.boot()
            host.run("run", "--", "true")
    assert left == [], lab.logs()


def _heal(lab: Lab) -> None:
    if lab.workers() == {} and not lab.scheduler_runs():
        lab.start_scheduler()
    for host in lab.hosts.values():
        host.restarts(True)
        if lab.apart:
            lab.plug(host.name)
        if not host.up:
            host.boot()
    # What somebody has there who is no errand is known with the next look, which comes every 30 s.
    assert wait_until(lambda: _all_there(lab) and _all_free(lab), 60), lab.logs()


def _all_free(lab: Lab) -> bool:
    return all(worker["resources"]["hostpart-pcpus"] >= 1 for worker in lab.workers().values())


def _all_there(lab: Lab) -> bool:
    workers = lab.workers()
    return set(workers) == set(NAMES) and all((one["hostpart"] or {}).get("protocol") == 1 for one in workers.values())


@pytest.fixture
def cables(fleet: Lab) -> Lab:
    """The same, where there are cables to pull."""
    if not fleet.apart:
        pytest.skip(fleet.why_not)
    return fleet


class Tale:
    """A file that guests write lines to, and a guest that does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def guest(self, seconds: float, text: str = "") -> list[str]:
        """Give the words of a guest that says where it begins, and ends after some seconds."""
        script = (
            f'echo "begin $(hostname) $1" >> {self.path}; sleep {seconds}; echo "end $(hostname) $1" >> {self.path}; '
        )
        return ["sh", "-c", script + "echo heard", "sh", text]

    def lines(self, word: str = "") -> list[str]:
        """Give the lines that begin with a word."""
        return (
            [line for line in self.path.read_text().splitlines() if line.startswith(word)] if self.path.exists() else []
        )

    def begun(self, count: int = 1) -> bool:
        """Wait until so many guests have begun."""
        return wait_until(lambda: len(self.lines("begin")) >= count, 40)

    def host(self) -> str:
        """Name the host that the last one began on: the worker's name."""
        return self.lines("begin")[-1].split()[1].removeprefix("host-")


@pytest.fixture
def tale(tmp_path: Path) -> Tale:
    """A file for guests to write to."""
    return Tale(tmp_path / "tale")


def _fill(host: Host) -> subprocess.Popen[str]:
    # Somebody who has logged in takes all that is free there.
    free = json.loads(host.run("topology", "--json").stdout)["free"]["pcpus"]
    taken = host.start("run", "-n", str(free), "--smt", "shared", "--name", "local", "--", "sleep", "300")
    assert wait_until(lambda: any("VM local" in one for one in host.left()))
    return taken


def _done(process: subprocess.Popen[str], timeout: float = 90) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


@contextlib.contextmanager
def _filled(*hosts: Host) -> Iterator[None]:
    taken = [_fill(host) for host in hosts]
    try:
        yield
    finally:
        for host, front in zip(hosts, taken, strict=True):
            host.run("stop", "local")
            _done(front, 30)


# -- where a run lands ------------------------------------------------------------------------------------


def test_a_run_ends_as_its_command_does_with_what_it_said_and_the_evidence(fleet: Lab, tmp_path: Path) -> None:
    evidence = tmp_path / "evidence.json"
    words = ["--evidence", str(evidence), "--", "sh", "-c", "hostname; pwd; echo alas >&2; exit 7"]
    done = fleet.run("run", *words)
    assert done.returncode == 7, done.stderr
    where, cwd = done.stdout.split()
    assert cwd == str(fleet.folder / "user"), "the directory that it was called in is there on the host"
    assert "alas" in done.stderr
    document = json.loads(evidence.read_text())
    assert document["host"] in NAMES
    assert not fleet.apart or where == f"host-{document['host']}"
    assert document["verdict"] in ("held", "tainted", "broken")


def test_a_full_host_is_passed_over(fleet: Lab, tale: Tale) -> None:
    with _filled(fleet["a"], fleet["c"]):
        for _ in range(2):
            done = fleet.run("run", "--wait=30", "--", *tale.guest(0))
            assert done.returncode == 0, done.stderr
    assert len(tale.lines("begin")) == 2
    assert not fleet.apart or {line.split()[1] for line in tale.lines()} == {"host-b"}


def test_where_none_has_room_nothing_runs_and_every_host_is_named(fleet: Lab, tale: Tale) -> None:
    with _filled(*fleet.hosts.values()):
        done = fleet.run("run", "--", *tale.guest(0))
    assert done.returncode == 125, done.stderr
    assert all(f"{name}: " in done.stderr or f"{name} has" in done.stderr for name in NAMES), done.stderr
    assert "try:" in done.stderr
    assert tale.lines() == []


def test_a_vm_that_would_span_hosts_is_refused(fleet: Lab, tale: Tale) -> None:
    done = fleet.run("run", "-n", "3", "--", *tale.guest(0))
    assert done.returncode == 125, done.stderr
    assert "none that spans several is made" in done.stderr
    assert "--gang" in done.stderr
    assert tale.lines() == []


# -- what dies ----------------------------------------------------------------------------------------------


def test_a_guest_outlives_its_dask_worker_and_runs_once(fleet: Lab, tale: Tale) -> None:
    running = fleet.fleet("run", "--", *tale.guest(6))
    assert tale.begun(), fleet.logs()
    fleet[_host_of(fleet, tale)].kill_worker()
    done = _done(running)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
    assert (len(tale.lines("begin")), len(tale.lines("end"))) == (1, 1)


def test_a_worker_that_dies_while_it_places_runs_nothing_twice(fleet: Lab, tale: Tale) -> None:
    running = fleet.fleet("run", "--wait=60", "--", *tale.guest(1))
    hit = _first_with_a_vm(fleet, running)
    if hit is not None:
        hit.kill_worker()
    done = _done(running)
    assert done.returncode in (0, 125), done.stderr
    assert done.returncode == 0 or tale.lines() == []
    assert len(tale.lines("begin")) == len(tale.lines("end")) <= 1


def _first_with_a_vm(fleet: Lab, running: subprocess.Popen[str]) -> Host | None:
    until = time.monotonic() + 40
    while running.poll() is None and time.monotonic() < until:
        for host in fleet.hosts.values():
            if any(host.errands.glob("*.*.*")):
                request = max(host.errands.glob("*.*.*"), key=lambda path: path.stat().st_mtime)
                if time.time() - request.stat().st_mtime < 5 and not (request / "outcome.json").exists():
                    return host
    return None


def _host_of(fleet: Lab, tale: Tale) -> str:
    if fleet.apart:
        return tale.host()
    return next(name for name, host in fleet.hosts.items() if any("VM" in one for one in host.left()))


def test_a_host_that_dies_whole_is_said_and_what_it_ran_is_not_run_twice(
    fleet: Lab, tale: Tale, tmp_path: Path
) -> None:
    out, jobs = tmp_path / "out", tmp_path / "jobs"
    jobs.write_text("".join(json.dumps(tale.guest(6, f"job{number}")) + "\n" for number in range(4)))
    running = fleet.fleet("run", "--jobs", str(jobs), "--out", str(out), "--patience", "4")
    assert tale.begun(3), fleet.logs()
    name = _host_of(fleet, tale)
    lost = tale.lines("begin")[-1].split()[2]
    fleet[name].kill()
    done = _done(running)
    assert done.returncode == 1, done.stderr
    assert f"{name}" in done.stderr
    assert "lost" in done.stderr, done.stderr
    assert len(tale.lines("begin")) == 4, "the others went on, and the fourth ran elsewhere"
    assert sorted(line.split()[2] for line in tale.lines("end")) == sorted({"job0", "job1", "job2", "job3"} - {lost})
    kept = journal.read(str(out))
    assert kept.damaged == 0
    assert name in {host.name for host in kept.hosts}, "what it said before is there"

    fleet[name].boot()
    assert wait_until(lambda: _all_there(fleet), 60), fleet.logs()
    done = fleet.run("run", "--resume", str(out), "--patience", "4")
    assert done.returncode == 1, done.stderr
    assert "not run a second time" in done.stderr
    assert len(tale.lines("begin")) == 4
    done = fleet.run("run", "--resume", str(out), "--again")
    assert done.returncode == 0, done.stderr
    assert [line.split()[2] for line in tale.lines("begin")].count(lost) == 2
    assert len(tale.lines("end")) == 4


def test_an_experiment_goes_on_where_a_killed_host_left_it(fleet: Lab, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--seconds", "0.2", "--processes", "1", "--no-report", "--patience", "4", "--out", str(out)]
    running = fleet.fleet("experiment", "example:interference", *words)
    assert wait_until(lambda: len(_runs(out).get("b", ())) >= 3, 90), fleet.logs()
    fleet["b"].kill()
    done = _done(running, 200)
    assert done.returncode == 1, done.stderr
    assert "host b" in done.stderr
    before = _runs(out)
    planned = len(before["a"])
    assert planned == len(before["c"]) > len(before["b"]) >= 3

    fleet["b"].boot()
    assert wait_until(lambda: _all_there(fleet), 60), fleet.logs()
    done = fleet.run("experiment", "--resume", str(out), "--no-report", timeout=200)
    assert done.returncode == 0, done.stderr
    after = _runs(out)
    assert (after["a"], after["c"]) == (before["a"], before["c"])
    assert [run["run"] for run in after["b"]] == [run["run"] for run in after["a"]]
    # The one that the kill fell into is made again.
    assert after["b"][: len(before["b"]) - 1] == before["b"][:-1]


def _runs(out: Path) -> dict[str, tuple[dict[str, object], ...]]:
    if not (out / "fleet.json").exists():
        return {}
    return {host.name: host.runs for host in journal.read(str(out)).hosts}


def test_a_guest_outlives_its_scheduler(fleet: Lab, tale: Tale) -> None:
    running = fleet.fleet("run", "--", *tale.guest(6))
    assert tale.begun(), fleet.logs()
    fleet.kill_scheduler()
    time.sleep(1)
    fleet.start_scheduler()
    done = _done(running)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr + fleet.logs()
    assert (len(tale.lines("begin")), len(tale.lines("end"))) == (1, 1)


def test_a_guest_outlives_its_client_which_is_resumed(fleet: Lab, tale: Tale, tmp_path: Path) -> None:
    out = tmp_path / "out"
    running = fleet.fleet("run", "--out", str(out), "--", *tale.guest(4))
    assert tale.begun(), fleet.logs()
    running.send_signal(signal.SIGKILL)
    running.wait()
    done = fleet.run("run", "--resume", str(out))
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
    assert (len(tale.lines("begin")), len(tale.lines("end"))) == (1, 1)
    assert fleet.run("run", "--resume", str(out)).returncode == 0, "there is nothing left to do"
    assert len(tale.lines("begin")) == 1


@pytest.mark.parametrize("after_s", [0.0, 0.3, 0.8])
def test_what_a_killed_client_had_placed_is_given_up_and_runs_once_when_resumed(
    fleet: Lab, tale: Tale, tmp_path: Path, after_s: float
) -> None:
    out = tmp_path / "out"
    running = fleet.fleet("run", "--out", str(out), "--", *tale.guest(0.5))
    assert wait_until((out / "fleet.json").exists, 30)
    _first_with_a_vm(fleet, running)
    time.sleep(after_s)
    running.kill()
    running.wait()
    done = fleet.run("run", "--resume", str(out))
    assert done.returncode == 0, done.stderr
    assert (len(tale.lines("begin")), len(tale.lines("end"))) == (1, 1)


# -- the network --------------------------------------------------------------------------------------------


def test_a_guest_outlives_a_cable_that_is_pulled(cables: Lab, tale: Tale) -> None:
    running = cables.fleet("run", "--patience", "60", "--", *tale.guest(5))
    assert tale.begun(), cables.logs()
    name = tale.host()
    cables.unplug(name)
    assert wait_until(lambda: len(tale.lines("end")) == 1, 20), "it does not notice"
    time.sleep(12)
    assert running.poll() is None
    cables.plug(name)
    done = _done(running)
    assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr + cables.logs()
    assert (len(tale.lines("begin")), len(tale.lines("end"))) == (1, 1)


def test_a_host_out_of_reach_is_passed_over(cables: Lab, tale: Tale) -> None:
    cables.unplug("b")
    try:
        with _filled(cables["a"]):
            done = cables.run("run", "--wait=60", "--", *tale.guest(0), timeout=150)
    finally:
        cables.plug("b")
    assert done.returncode == 0, done.stderr
    assert {line.split()[1] for line in tale.lines("begin")} == {"host-c"}
    assert len(tale.lines("begin")) == 1


def test_a_cable_that_is_pulled_while_a_request_is_placed_runs_nothing_twice(cables: Lab, tale: Tale) -> None:
    running = cables.fleet("run", "--wait=60", "--patience", "40", "--", *tale.guest(1))
    hit = _first_with_a_vm(cables, running)
    if hit is not None:
        cables.unplug(hit.name)
        time.sleep(HOLD_S)
        cables.plug(hit.name)
    done = _done(running, 150)
    assert done.returncode in (0, 125), done.stderr
    assert len(tale.lines("begin")) == len(tale.lines("end")) <= 1
    assert (done.returncode == 0) == (len(tale.lines("begin")) == 1), done.stderr


# -- hosts that are not what they should be -----------------------------------------------------------------


@contextlib.contextmanager
def _another(fleet: Lab, name: str) -> Iterator[Host]:
    # The host as the test wants it, and afterwards as it was.
    host = fleet[name]
    host.kill()
    assert wait_until(lambda: name not in fleet.workers(), 40), fleet.logs()
    try:
        yield host
    finally:
        if host.up:
            host.kill()
        _as_it_was(host)


def _preloaded(fleet: Lab, text: str) -> list[str]:
    # A module that the worker loads before hostpart's.
    path = fleet.folder / "before.py"
    path.write_text(text)
    return ["--preload", str(path)]


def test_a_worker_without_hostpart_is_left_out_and_told(fleet: Lab, tale: Tale) -> None:
    with _another(fleet, "b") as host:
        host.preload = False
        host.boot()
        assert fleet.joined(*NAMES), fleet.logs()
        with _filled(fleet["a"], fleet["c"]):
            done = fleet.run("run", "--", *tale.guest(0))
        assert done.returncode == 125, done.stderr
        done = fleet.run("--hosts", "b", "run", "--", *tale.guest(0))
        assert done.returncode == 125, done.stderr
        assert "no hostpart in it" in done.stderr
    assert tale.lines() == []


def test_a_host_of_another_protocol_is_left_out_and_told(fleet: Lab, tale: Tale) -> None:
    with _another(fleet, "c") as host:
        host.options = _preloaded(fleet, "import hostpart.fleet.identity as identity\nidentity.PROTOCOL = 2\n")
        host.boot()
        assert fleet.joined(*NAMES), fleet.logs()
        done = fleet.run("topology")
        assert "protocol 2" in done.stdout + done.stderr
        done = fleet.run("--hosts", "c", "run", "--", *tale.guest(0))
        assert done.returncode == 125, done.stderr
        assert "protocol 2" in done.stderr
    assert tale.lines() == []


def test_a_host_whose_hostpart_is_too_old_refuses_and_says_so(fleet: Lab, tale: Tale, tmp_path: Path) -> None:
    old = tmp_path / "old-hostpart"
    says = 'echo "hostpart run: unrecognized arguments: $2" >&2; exit 125'
    old.write_text(f'#!/bin/sh\n[ "$1" = topology ] && exec "$REAL" "$@"\n{says}\n')
    old.chmod(0o755)
    with _another(fleet, "a") as host:
        host.env |= {"HOSTPART_COMMAND": str(old), "REAL": str(Path(fleet.python).parent / "hostpart")}
        host.boot()
        assert wait_until(lambda: _all_there(fleet), 60), fleet.logs()
        done = fleet.run("--hosts", "a", "run", "--", *tale.guest(0))
        assert done.returncode == 125, done
        assert "unrecognized arguments" in done.stderr
        del host.env["REAL"]
    assert tale.lines() == []


def test_a_clock_that_is_wrong_is_told_and_changes_nothing(fleet: Lab, tale: Tale, tmp_path: Path) -> None:
    out = tmp_path / "out"
    # What the host tells is made up: the kernel knows of one clock, and files have its time.
    ahead = (
        "import time, types, hostpart.fleet.agent as agent\n"
        "agent.time = types.SimpleNamespace(time=lambda: time.time() + 3600, monotonic=time.monotonic)\n"
    )
    with _another(fleet, "a") as host:
        host.options = _preloaded(fleet, ahead)
        host.boot()
        assert wait_until(lambda: _all_there(fleet), 60), fleet.logs()
        done = fleet.run("--hosts", "a", "run", "--out", str(out), "--", *tale.guest(1))
        assert (done.returncode, done.stdout) == (0, "heard\n"), done.stderr
    (kept,) = journal.read(str(out)).hosts
    assert kept.skew_s == pytest.approx(3600, abs=5)
    assert len(tale.lines("begin")) == 1


# -- gangs --------------------------------------------------------------------------------------------------


def test_a_gang_runs_on_three_hosts_at_once(fleet: Lab, tale: Tale) -> None:
    done = fleet.run("run", "--gang", "3", "--", *tale.guest(3))
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in tale.lines()] == ["begin"] * 3 + ["end"] * 3, "all began before one ended"
    assert not fleet.apart or len({line.split()[1] for line in tale.lines()}) == 3


def test_a_gang_that_finds_two_hosts_only_does_not_run(fleet: Lab, tale: Tale) -> None:
    with _filled(fleet["b"]):
        done = fleet.run("run", "--gang", "3", "--", *tale.guest(0))
    assert done.returncode == 3, done.stderr
    assert "gang" in done.stderr
    assert tale.lines() == []


def test_a_gang_whose_member_dies_before_the_start_does_not_run(fleet: Lab, tale: Tale) -> None:
    running = fleet.fleet("run", "--gang", "3", "--patience", "5", "--", *tale.guest(2))
    hit = _first_with_a_vm(fleet, running)
    assert hit is not None
    hit.kill()
    done = _done(running)
    begun = len(tale.lines("begin"))
    assert done.returncode in (1, 3), done.stderr
    assert begun == 0, f"the gang began on {begun} hosts: {done.stderr}"


# -- limited hosts ------------------------------------------------------------------------------------------


def test_a_host_that_may_use_one_pcpu_offers_that_one(fleet: Lab, tale: Tale) -> None:
    one = max(os.sched_getaffinity(0))
    with _another(fleet, "b") as host:
        host.prefix = ["taskset", "--cpu-list", str(one)]
        host.boot()
        assert wait_until(lambda: _all_there(fleet), 60), fleet.logs()
        worker = fleet.workers()["b"]
        assert worker["hostpart"]["usable"] == str(one)
        assert worker["resources"]["hostpart-pcpus"] <= 1
        words = ["--", "grep", "Cpus_allowed_list", "/proc/self/status"]
        done = fleet.run("--hosts", "b", "run", *words)
        assert done.returncode in (0, 3, 125), done.stderr
        assert done.returncode or done.stdout.split()[1] == str(one)
