"""Errands with real processes: held, started once, given up, taken over; and what a killed process leaves."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hostpart import procfs
from hostpart.errors import Failed, HostpartError, NotPermitted, UsageError
from hostpart.fleet import errand
from hostpart.fleet.errand import Errands, directory_of_all
from hostpart.fleet.identity import machine
from hostpart.fleet.order import Order
from hostpart.fleet.supply import NOTHING
from tests.conftest import Place, wait_until
from tests.test_experiment import QUICK

RUN = "0123456789ab"
two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two usable pCPUs")
pytestmark = two


def request(number: int, *words: str, **more: Any) -> dict[str, Any]:
    """Return a request to run *words* on one pCPU."""
    return {"schema": 1, "id": f"{RUN}.{number}", "argv": ["run", "--", *words], "hold": "vm", **more}


@pytest.fixture
def fleet(place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Errands]:
    """The errands of a place of the test's own."""
    for name, value in place.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HOSTPART_FLEET_DIR", str(tmp_path / "fleet"))
    found = Errands()
    yield found
    _end(found, place)


def _end(found: Errands, place: Place) -> None:
    for one in found.ids():
        found.stop(one, 0.0)
    if not wait_until(lambda: not place.processes(), 10):
        for pid in place.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def state_of(fleet: Errands, number: int) -> str:
    return str(fleet.state(f"{RUN}.{number}")["state"])


def becomes(fleet: Errands, number: int, state: str, timeout: float = 15.0) -> bool:
    return wait_until(lambda: state_of(fleet, number) == state, timeout)


def pid_of(fleet: Errands, number: int, name: str) -> int:
    found = json.loads(Path(fleet.directory, f"{RUN}.{number}", f"{name}.json").read_text())
    return int(found["pid"])


def has_run(folder: Path) -> int:
    """Return how often the guests of :func:`counted` have run."""
    return len(list(folder.glob("ran.*")))


def counted(folder: Path, then: str = "true") -> list[str]:
    """Return a guest that leaves a file each time it is run."""
    return ["sh", "-c", f"touch {folder}/ran.$$; {then}"]


# -- the usual way -----------------------------------------------------------------------------------------


def test_a_guest_does_not_run_before_the_word_and_runs_once_after_it(
    fleet: Errands, place: Place, tmp_path: Path
) -> None:
    held = fleet.begin(request(0, *counted(tmp_path, "echo out; echo err >&2; exit 7")))
    assert held["state"] == "held"
    assert held["vm"]
    assert [vcpu["vcpu"] for vcpu in held["vcpus"]] == [0]
    time.sleep(0.3)
    assert has_run(tmp_path) == 0
    assert fleet.start(f"{RUN}.0")["state"] in ("running", "ended")
    assert becomes(fleet, 0, "ended")
    ended = fleet.state(f"{RUN}.0")
    assert (ended["status"], ended["error"]) == (7, None)
    assert base64.b64decode(ended["inline"]["stdout"]) == b"out\n"
    assert base64.b64decode(ended["inline"]["stderr"]) == b"err\n"
    events = [json.loads(line)["event"] for line in ended["inline"]["events"].splitlines()]
    assert events == ["ready", "ended"]
    assert has_run(tmp_path) == 1
    assert wait_until(place.is_clean)


def test_begun_again_under_its_id_it_is_not_run_again(fleet: Errands, tmp_path: Path) -> None:
    asked = request(0, *counted(tmp_path))
    fleet.begin(asked)
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    assert fleet.begin(asked)["state"] == "ended"
    assert fleet.start(f"{RUN}.0")["state"] == "ended"
    assert has_run(tmp_path) == 1


def test_an_id_stands_for_one_request(fleet: Errands, tmp_path: Path) -> None:
    fleet.begin(request(0, "true"))
    with pytest.raises(UsageError, match="another request"):
        fleet.begin(request(0, "false"))


def test_a_host_that_is_full_refuses_with_3_and_may_be_asked_again(fleet: Errands, tmp_path: Path) -> None:
    usable = len(os.sched_getaffinity(0))
    big = request(1, *counted(tmp_path))
    big["argv"][1:1] = ["-n", str(usable - 1)]
    assert fleet.begin(request(0, "sleep", "60"))["state"] == "held"
    refused = fleet.begin(big)
    assert refused["state"] == "refused"
    assert refused["error"]["exit_code"] == 3
    assert fleet.give_up(f"{RUN}.0")["state"] == "given-up"
    assert fleet.begin(big)["state"] == "held"
    fleet.start(f"{RUN}.1")
    assert becomes(fleet, 1, "ended")
    assert has_run(tmp_path) == 1


def test_what_hostpart_itself_refuses_is_told_in_its_words(fleet: Errands) -> None:
    asked = request(0, "true")
    asked["argv"][1:1] = ["--bogus"]
    refused = fleet.begin(asked)
    assert refused["state"] == "refused"
    assert "unrecognized arguments: --bogus" in refused["error"]["problem"] + str(
        fleet.read(f"{RUN}.0", "stderr", 0, 4096)
    )


def test_files_env_and_directory_are_the_requests(fleet: Errands, tmp_path: Path) -> None:
    asked = request(
        0, "sh", "-c", 'cat "$1"; echo "$GREETING"; pwd', "sh", f"{fleet.directory}/{RUN}.0/a.txt",
        files={"a.txt": "text\n"}, env={"GREETING": "hello"}, cwd=str(tmp_path),
    )  # fmt: skip
    fleet.begin(asked)
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    assert fleet.read(f"{RUN}.0", "stdout", 0, 4096) == (0, f"text\nhello\n{tmp_path}\n".encode())


def test_a_directory_that_the_host_lacks_is_told_of(fleet: Errands) -> None:
    held = fleet.begin(request(0, "pwd", cwd="/no/such/directory"))
    assert "/no/such/directory" in held["notes"][0]
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    assert fleet.read(f"{RUN}.0", "stdout", 0, 4096)[1].decode().strip() == f"{fleet.directory}/{RUN}.0"


def test_a_running_one_is_stopped_in_order(fleet: Errands, place: Place) -> None:
    fleet.begin(request(0, "sleep", "60"))
    fleet.start(f"{RUN}.0")
    ended = fleet.stop(f"{RUN}.0", 5.0)
    assert (ended["state"], ended["status"]) == ("ended", 143)
    assert json.loads(ended["inline"]["events"].splitlines()[-1])["evidence"]["vm"] == ended["vm"]
    assert wait_until(place.is_clean)


def test_one_that_minds_no_sigterm_is_killed_after_the_grace_time(fleet: Errands, place: Place) -> None:
    fleet.begin(request(0, "sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"))
    fleet.start(f"{RUN}.0")
    time.sleep(0.5)
    begun = time.monotonic()
    ended = fleet.stop(f"{RUN}.0", 0.5)
    assert (ended["state"], ended["status"]) == ("ended", 137)
    assert time.monotonic() - begun < 4.0  # the front's own grace time is 5 s
    assert wait_until(place.is_clean)


# -- the word ----------------------------------------------------------------------------------------------


def test_of_many_words_at_once_one_counts(fleet: Errands, tmp_path: Path) -> None:
    other = Errands(fleet.directory)
    for number in range(5):
        fleet.begin(request(number, *counted(tmp_path)))
        gate = threading.Barrier(4)
        said: list[str] = []

        def say(what: str, whose: Errands, number: int = number, gate: threading.Barrier = gate) -> None:
            gate.wait()
            found = whose.start(f"{RUN}.{number}") if what == "start" else whose.give_up(f"{RUN}.{number}")
            said.append(found["state"])  # noqa: B023 - joined below

        threads = [
            threading.Thread(target=say, args=args)
            for args in (("start", fleet), ("start", other), ("give-up", fleet), ("give-up", other))
        ]
        before = has_run(tmp_path)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wait_until(lambda number=number: state_of(fleet, number) in ("ended", "given-up"))
        assert has_run(tmp_path) - before == (state_of(fleet, number) == "ended")
        assert said.count("given-up") in (0, 4) or "running" in said or "ended" in said


def test_what_gets_no_word_is_given_up_by_the_host(
    fleet: Errands, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOSTPART_FLEET_HOLD_S", "0.5")
    fleet.begin(request(0, *counted(tmp_path)))
    assert becomes(fleet, 0, "given-up", 5)
    assert wait_until(place.is_clean)
    assert fleet.start(f"{RUN}.0")["state"] == "given-up"
    assert has_run(tmp_path) == 0


def test_a_word_that_its_giver_could_not_say_at_the_gate_counts(fleet: Errands, tmp_path: Path) -> None:
    fleet.begin(request(0, *counted(tmp_path)))
    os.symlink("start", Path(fleet.directory, f"{RUN}.0", "word"))  # and is killed
    assert becomes(fleet, 0, "ended")
    assert has_run(tmp_path) == 1


def test_a_line_at_the_gate_without_the_word_starts_nothing_in_an_errand_not_begun(
    fleet: Errands, tmp_path: Path
) -> None:
    fleet.begin(request(0, *counted(tmp_path), hold="start"))
    fleet._errand(f"{RUN}.0").wake(b"start\n")
    time.sleep(0.5)
    assert state_of(fleet, 0) == "held"
    assert has_run(tmp_path) == 0
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    assert has_run(tmp_path) == 1


# -- kills -------------------------------------------------------------------------------------------------

WORKER = """
import json, os, sys
from hostpart.fleet.errand import Errands
print(json.dumps(Errands().begin(json.loads(sys.argv[1]))), flush=True)
os.kill(os.getpid(), 9)
"""


def begun_by_one_that_is_killed(asked: dict[str, Any]) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-c", WORKER, json.dumps(asked)], capture_output=True, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_what_is_held_outlives_whoever_asked_and_the_next_one_starts_it(fleet: Errands, tmp_path: Path) -> None:
    asked = request(0, *counted(tmp_path))
    assert begun_by_one_that_is_killed(asked)["state"] == "held"
    assert fleet.ids(RUN) == [f"{RUN}.0"]
    assert fleet.begin(asked)["state"] == "held"
    assert fleet.start(f"{RUN}.0")["state"] in ("running", "ended")
    assert becomes(fleet, 0, "ended")
    assert has_run(tmp_path) == 1


def test_what_runs_outlives_whoever_asked(fleet: Errands, tmp_path: Path) -> None:
    begun_by_one_that_is_killed(request(0, *counted(tmp_path, "sleep 1; exit 9")))
    fleet.start(f"{RUN}.0")
    assert Errands(fleet.directory).state(f"{RUN}.0")["state"] == "running"
    assert becomes(fleet, 0, "ended")
    assert fleet.state(f"{RUN}.0")["status"] == 9


def test_a_directory_whose_maker_was_killed_is_gone_on_with(fleet: Errands, tmp_path: Path) -> None:
    asked = request(0, *counted(tmp_path))
    fleet._make(Order.parse(asked))
    assert state_of(fleet, 0) == "placing"
    assert fleet.begin(asked)["state"] == "held"


def test_two_at_once_begin_one_once(fleet: Errands, tmp_path: Path) -> None:
    asked, found = request(0, *counted(tmp_path)), []
    threads = [
        threading.Thread(target=lambda: found.append(Errands(fleet.directory).begin(asked)["state"])) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["held"] * 4
    assert len(Path(fleet.directory, f"{RUN}.0", "events").read_text().splitlines()) == 1


def test_a_shim_killed_while_it_holds_gives_all_back(fleet: Errands, place: Place, tmp_path: Path) -> None:
    asked = request(0, *counted(tmp_path))
    fleet.begin(asked)
    os.kill(pid_of(fleet, 0, "shim"), signal.SIGKILL)
    assert becomes(fleet, 0, "refused")
    assert wait_until(place.is_clean)
    assert fleet.start(f"{RUN}.0")["state"] == "refused"
    assert has_run(tmp_path) == 0
    assert fleet.begin(asked)["state"] == "held"  # nothing of it has run


def test_a_shim_killed_later_leaves_a_guest_whose_end_is_told(fleet: Errands, place: Place, tmp_path: Path) -> None:
    asked = request(0, *counted(tmp_path, "sleep 1.5; exit 4"))
    fleet.begin(asked)
    fleet.start(f"{RUN}.0")
    os.kill(pid_of(fleet, 0, "shim"), signal.SIGKILL)
    time.sleep(0.2)
    going_on = fleet.state(f"{RUN}.0")
    assert going_on["state"] == "running"
    assert "killed" in going_on["notes"][0]
    assert fleet.begin(asked)["state"] == "running"
    assert becomes(fleet, 0, "ended")
    assert fleet.state(f"{RUN}.0")["status"] == 4
    assert fleet.begin(asked)["state"] == "ended"
    assert has_run(tmp_path) == 1
    assert wait_until(place.is_clean)


def test_a_guest_without_its_shim_can_be_stopped(fleet: Errands, place: Place, tmp_path: Path) -> None:
    fleet.begin(request(0, *counted(tmp_path, "exec sleep 60")))
    fleet.start(f"{RUN}.0")
    assert wait_until(lambda: has_run(tmp_path) == 1)
    os.kill(pid_of(fleet, 0, "shim"), signal.SIGKILL)
    ended = fleet.stop(f"{RUN}.0")
    assert (ended["state"], ended["status"]) == ("ended", 143)
    assert wait_until(place.is_clean)


def test_where_shim_and_hostpart_are_killed_it_is_lost_and_not_run_again(
    fleet: Errands, place: Place, tmp_path: Path
) -> None:
    asked = request(0, *counted(tmp_path, "sleep 60"))
    fleet.begin(asked)
    fleet.start(f"{RUN}.0")
    assert wait_until(lambda: has_run(tmp_path) == 1)
    for name in ("shim", "child"):
        os.kill(pid_of(fleet, 0, name), signal.SIGKILL)
    assert becomes(fleet, 0, "lost")
    assert fleet.begin(asked)["state"] == "lost"
    assert has_run(tmp_path) == 1
    assert wait_until(place.is_clean)


def test_a_shim_of_an_earlier_boot_is_not_taken_for_a_living_one(fleet: Errands, tmp_path: Path) -> None:
    fleet.begin(request(0, *counted(tmp_path)))
    path = Path(fleet.directory, f"{RUN}.0", "shim.json")
    shim = json.loads(path.read_text())
    path.write_text(json.dumps({**shim, "boot_id": "another"}))
    assert state_of(fleet, 0) == "lost"
    path.write_text(json.dumps({**shim, "start": shim["start"] + 1}))
    assert state_of(fleet, 0) == "lost"
    path.write_text(json.dumps(shim))
    assert state_of(fleet, 0) == "held"


def test_the_shim_has_a_session_of_its_own_and_no_descriptor_of_ours(fleet: Errands) -> None:
    read, write = os.pipe()
    os.set_inheritable(write, True)
    try:
        fleet.begin(request(0, "sleep", "60"))
        shim = pid_of(fleet, 0, "shim")
        stat_of = procfs.read_stat(shim)
        assert stat_of is not None
        assert stat_of.session == shim
        assert os.readlink(f"/proc/{shim}/fd/0") == "/dev/null"
        opened = {os.readlink(f"/proc/{shim}/fd/{fd}") for fd in os.listdir(f"/proc/{shim}/fd")}
        assert os.readlink(f"/proc/self/fd/{write}") not in opened
    finally:
        os.close(read)
        os.close(write)


def test_while_a_guest_runs_the_shim_only_waits(fleet: Errands) -> None:
    fleet.begin(request(0, "sleep", "60"))
    fleet.start(f"{RUN}.0")
    shim = pid_of(fleet, 0, "shim")
    time.sleep(0.5)
    before = procfs.switches(shim)
    time.sleep(1.0)
    assert procfs.switches(shim) == before


# -- what is not taken ----------------------------------------------------------------------------------------

BAD = {
    "no object": [],
    "no schema": {"schema": None},
    "id up": {"id": "../x"},
    "id with a slash": {"id": "a/b"},
    "id with dots": {"id": "a..b"},
    "id hidden": {"id": ".lock"},
    "id none": {"id": None},
    "id long": {"id": "a" * 102},
    "id with a line end": {"id": "a\n"},
    "another command": {"argv": ["launch", "x.toml"]},
    "no words": {"argv": []},
    "a text of words": {"argv": "run -- true"},
    "a number among words": {"argv": ["run", 1]},
    "a NUL": {"argv": ["run", "--", "a\0b"]},
    "half a character": {"argv": ["run", "--", "\ud800"]},
    "its own gate": {"argv": ["run", "--hold", "/tmp/x", "--", "true"]},
    "its own events": {"argv": ["run", "--events=/etc/passwd", "--", "true"]},
    "a path that leaves": {"argv": ["experiment", "{dir}/../../x"]},
    "a file up": {"files": {"../x": ""}},
    "a file below": {"files": {"a/b": ""}},
    "a file that is kept": {"files": {"word": "start"}},
    "a file of a number": {"files": {"a": 1}},
    "too many bytes": {"files": {"a": "x" * (17 << 20)}},
    "the host's variable": {"env": {"HOSTPART_LEASE_DIR": "/tmp"}},
    "no variable": {"env": {"A=B": "c"}},
    "a path from nowhere": {"cwd": "home"},
    "no hold": {"hold": "vmx"},
    "an experiment held as a VM": {"argv": ["experiment", "x"], "hold": "vm"},
    "another kind": {"kind": "experiment"},
    "a key of tomorrow": {"shell": "true"},
}


@pytest.mark.parametrize("change", BAD.values(), ids=BAD.keys())
def test_what_is_not_right_is_refused_and_leaves_nothing(fleet: Errands, change: Any) -> None:
    asked = {**request(0, "true"), **change} if isinstance(change, dict) else change
    with pytest.raises(HostpartError) as caught:
        fleet.begin(asked)
    assert caught.value.exit_code == 2
    assert os.listdir(fleet.directory) == []


@pytest.mark.parametrize("one", ["../x", "/etc", "", ".", "..", ".lock", "a/b", "A"])
def test_no_id_names_a_path(fleet: Errands, one: str) -> None:
    for call in (fleet.state, fleet.start, fleet.give_up, fleet.stop):
        with pytest.raises(UsageError):
            call(one)
    with pytest.raises(UsageError):
        fleet.read(one, "events", 0, 1)


@pytest.mark.parametrize("channel", ["request.json", "../x", "word", ""])
def test_only_channels_can_be_read(fleet: Errands, channel: str) -> None:
    fleet.begin(request(0, "true"))
    with pytest.raises(UsageError):
        fleet.read(f"{RUN}.0", channel, 0, 10)


def test_a_link_in_the_place_of_a_channel_is_not_followed(fleet: Errands, tmp_path: Path) -> None:
    fleet.begin(request(0, "true"))
    (tmp_path / "secret").write_text("secret")
    path = Path(fleet.directory, f"{RUN}.0", "stdout")
    path.unlink()
    path.symlink_to(tmp_path / "secret")
    assert fleet.read(f"{RUN}.0", "stdout", 0, 10) == (0, b"")


@pytest.mark.parametrize("argv", [["run", "--", "true"], ["launch"], [], ["restore"], ["experiment"]], ids=repr)
def test_only_what_looks_may_be_asked(fleet: Errands, argv: list[str]) -> None:
    with pytest.raises(UsageError):
        fleet.ask(argv)


def test_no_shell_reads_a_word(fleet: Errands, tmp_path: Path) -> None:
    fleet.begin(request(0, "echo", f"$(touch {tmp_path}/x)", ";", f"touch {tmp_path}/y", env={"A": "`id`"}))
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    assert fleet.read(f"{RUN}.0", "stdout", 0, 4096)[1] == f"$(touch {tmp_path}/x) ; touch {tmp_path}/y\n".encode()
    assert not (tmp_path / "x").exists()
    assert not (tmp_path / "y").exists()


# -- the directory ------------------------------------------------------------------------------------------


def test_nobody_else_can_look_into_it(fleet: Errands) -> None:
    fleet.begin(request(0, "true", files={"a.txt": "secret"}))
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    for path in (Path(fleet.directory), *Path(fleet.directory).rglob("*")):
        found = path.lstat()
        if not stat.S_ISLNK(found.st_mode):
            assert stat.S_IMODE(found.st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_a_directory_of_others_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "fleet"
    monkeypatch.setenv("HOSTPART_FLEET_DIR", str(path))
    path.mkdir(mode=0o755)
    with pytest.raises(NotPermitted, match="open to others"):
        directory_of_all()
    path.chmod(0o700)
    assert directory_of_all() == str(path)
    monkeypatch.setenv("HOSTPART_FLEET_DIR", str(tmp_path / "link"))
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(NotPermitted, match="link"):
        directory_of_all()
    if os.geteuid() == 0:
        os.chown(path, 65534, 65534)
        monkeypatch.setenv("HOSTPART_FLEET_DIR", str(path))
        with pytest.raises(NotPermitted, match="belongs to uid 65534"):
            directory_of_all()


def test_the_directory_is_where_such_things_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HOSTPART_FLEET_DIR", raising=False)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1 if os.getuid() == 0 else os.getuid())
    assert errand._home() == f"{tmp_path}/hostpart/fleet/{machine()}"  # a home may be several hosts'
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert errand._home() == "/var/lib/hostpart/fleet"


def test_what_ended_long_ago_is_swept_and_what_lives_is_not(fleet: Errands, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet.begin(request(0, "true"))
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended")
    fleet.begin(request(1, "sleep", "60"))
    Path(fleet.directory, "Not-An-Errand").mkdir()
    fleet.sweep()
    assert fleet.ids() == [f"{RUN}.0", f"{RUN}.1"]
    outcome = Path(fleet.directory, f"{RUN}.0", "outcome.json")
    outcome.write_text(json.dumps({"status": 0, "ended": time.time() - 31 * 86400}))
    os.utime(Path(fleet.directory, f"{RUN}.1"), (0, 0))
    fleet.sweep()
    assert fleet.ids() == [f"{RUN}.1"]
    assert Path(fleet.directory, "Not-An-Errand").exists()


def test_ids_are_those_of_a_run(fleet: Errands) -> None:
    fleet.begin(request(0, "true"))
    fleet.give_up(f"{RUN}.0")
    fleet.begin({**request(0, "true"), "id": "ffffffffffff.0"})
    assert fleet.ids(RUN) == [f"{RUN}.0"]
    assert fleet.ids() == [f"{RUN}.0", "ffffffffffff.0"]
    assert fleet.ids("eeeeeeeeeeee") == []


def test_a_command_that_is_not_there_is_said_to_be_missing(fleet: Errands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOSTPART_COMMAND", "/no/such/hostpart")
    refused = fleet.begin(request(0, "true"))
    assert refused["state"] == "refused"
    assert "/no/such/hostpart" in refused["error"]["problem"]
    with pytest.raises(Failed, match="no/such/hostpart"):
        fleet.ask(["ps"])


# -- experiments --------------------------------------------------------------------------------------------


def experiment(number: int, text: str = QUICK) -> dict[str, Any]:
    return {
        "schema": 1, "id": f"{RUN}.{number}", "kind": "experiment", "argv": ["experiment", "{dir}/design.toml"],
        "hold": "start", "files": {"design.toml": text},
    }  # fmt: skip


def test_an_experiment_is_begun_with_the_word_and_tells_of_each_run(fleet: Errands) -> None:
    assert fleet.begin(experiment(0))["state"] == "held"
    time.sleep(0.3)
    assert fleet.state(f"{RUN}.0")["sizes"]["events"] == 0
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended", 60)
    assert fleet.state(f"{RUN}.0")["status"] == 0
    at, data = fleet.read(f"{RUN}.0", "events", 0, 1 << 20)
    kinds = [json.loads(line)["event"] for line in data.splitlines()]
    assert at == 0
    assert kinds[:2] == ["experiment", "session"]
    assert kinds[-1] == "over"
    assert kinds.count("run") == len(kinds) - 3 > 1
    assert fleet.begin(experiment(0))["state"] == "ended"


def test_an_experiment_is_alone_on_its_host(fleet: Errands) -> None:
    assert fleet.supply() != NOTHING
    fleet.begin(request(0, "sleep", "60"))
    refused = fleet.begin(experiment(1))
    assert (refused["state"], refused["error"]["exit_code"]) == ("refused", 3)
    fleet.give_up(f"{RUN}.0")
    assert fleet.begin(experiment(1))["state"] == "held"
    assert fleet.supply() == NOTHING
    refused = fleet.begin(request(2, "true"))
    assert (refused["state"], refused["error"]["exit_code"]) == ("refused", 3)
    assert fleet.ids() == [f"{RUN}.0", f"{RUN}.1"]  # what was only turned away has left nothing
    fleet.give_up(f"{RUN}.1")
    assert fleet.begin(request(2, "true"))["state"] == "held"


def test_an_experiment_that_was_cut_short_goes_on_in_its_directory(fleet: Errands) -> None:
    asked = experiment(0, QUICK.replace("seconds = 0.1", "seconds = 0.5"))
    fleet.begin(asked)
    fleet.start(f"{RUN}.0")

    def runs() -> int:
        return fleet.read(f"{RUN}.0", "events", 0, 1 << 20)[1].count(b'{"event":"run"')

    assert wait_until(lambda: runs() >= 1, 60)
    stopped = fleet.stop(f"{RUN}.0", 10.0)
    assert stopped["state"] == "ended"
    assert stopped["status"] == 143
    before = fleet.read(f"{RUN}.0", "events", 0, 1 << 20)[1]
    assert fleet.begin(asked)["state"] == "held"
    fleet.start(f"{RUN}.0")
    assert becomes(fleet, 0, "ended", 60)
    assert fleet.state(f"{RUN}.0")["status"] == 0
    after = fleet.read(f"{RUN}.0", "events", 0, 1 << 20)[1]
    assert after.startswith(before)
    events = [json.loads(line) for line in after[len(before) :].splitlines()]
    assert [event["event"] for event in events[:2]] == ["experiment", "session"]
    assert events[2] == {"event": "run", "run": json.loads(before.splitlines()[2])["run"]}  # made before
