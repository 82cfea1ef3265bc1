"""``hostpart run --events`` and ``--hold``: what is told, and a guest that waits for a word."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Place, wait_until

pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two usable pCPUs")


def events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kinds(path: Path) -> list[str]:
    return [event["event"] for event in events(path)]


class Held:
    """A guest that is held at a FIFO and leaves a file if it runs."""

    def __init__(self, place: Place, folder: Path) -> None:
        self.place, self.gate, self.told, self.ran = place, folder / "gate", folder / "events", folder / "ran"
        os.mkfifo(self.gate)
        self.process = place.start(
            "run", "--events", str(self.told), "--hold", str(self.gate), "--name", "held",
            "--", "sh", "-c", f"touch {self.ran}; exit 7",
        )  # fmt: skip
        assert wait_until(lambda: kinds(self.told) == ["ready"])

    def say(self, text: str) -> None:
        # Open for reading too: else this would wait for ever where hostpart has gone.
        gate = os.open(self.gate, os.O_RDWR)
        os.write(gate, text.encode())
        os.close(gate)

    def ended(self) -> tuple[int, dict[str, Any]]:
        """Return the exit status and the last event."""
        status = self.process.wait(20)
        assert wait_until(self.place.is_clean)
        return status, events(self.told)[-1]


@pytest.fixture(params=["root", "another user"])
def held(request: pytest.FixtureRequest, tmp_path: Path) -> Held:
    """A held guest of root's, and one of uid 65534."""
    if request.param == "root":
        return Held(request.getfixturevalue("place"), tmp_path)
    place: Place = request.getfixturevalue("nobodys_place")
    folder = place.runtime.parent / "own"
    folder.mkdir()
    folder.chmod(0o777)
    return Held(place, folder)


def test_it_runs_at_the_word_and_not_before(held: Held) -> None:
    time.sleep(0.3)
    assert not held.ran.exists()
    held.say("start\n")
    status, last = held.ended()
    assert (status, last["event"], last["status"]) == (7, "ended", 7)
    assert last["evidence"]["vm"] == last["vm"] == "held"
    assert held.ran.exists()


def test_the_word_may_come_in_pieces(held: Held) -> None:
    with open(held.gate, "w", buffering=1) as file:
        for piece in ("st", "ar"):
            file.write(piece)
            file.flush()
            time.sleep(0.2)
            assert not held.ran.exists()
        file.write("t\n")
        assert held.ended()[0] == 7


@pytest.mark.parametrize("text", ["stop\n", "", "star", "begin\n", "start", "\n", "x" * 5000], ids=repr)
def test_at_any_other_word_or_none_nothing_has_run(place: Place, tmp_path: Path, text: str) -> None:
    held = Held(place, tmp_path)
    held.say(text)
    status, last = held.ended()
    assert (status, last["event"], last["exit_code"]) == (125, "error", 1)
    assert "has not run" in last["problem"]
    assert last["remedy"]
    assert not held.ran.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_ends_the_hold(place: Place, tmp_path: Path, number: signal.Signals) -> None:
    held = Held(place, tmp_path)
    held.process.send_signal(number)
    status, last = held.ended()
    assert (status, last["event"]) == (125, "error")
    assert number.name in last["problem"]
    assert not held.ran.exists()


def test_hostpart_stop_ends_the_hold(place: Place, tmp_path: Path) -> None:
    held = Held(place, tmp_path)
    place.run("stop", "held")
    status, last = held.ended()
    assert (status, last["event"]) == (125, "error")
    assert not held.ran.exists()


def test_without_a_writer_yet_it_waits(place: Place, tmp_path: Path) -> None:
    # A read of such a FIFO says "end of file", as after the last writer.
    held = Held(place, tmp_path)
    time.sleep(2.5)
    assert held.process.poll() is None
    held.say("start\n")
    assert held.ended()[0] == 7


def test_the_guest_has_neither_the_gate_nor_the_events(place: Place, tmp_path: Path) -> None:
    gate, told = tmp_path / "gate", tmp_path / "events"
    os.mkfifo(gate)
    process = place.start(
        "run",
        "--events",
        str(told),
        "--hold",
        str(gate),
        "--",
        "sh",
        "-c",
        "ls -l /proc/self/fd",
        stdout=subprocess.PIPE,
    )
    assert wait_until(lambda: kinds(told) == ["ready"])
    gate.write_text("start\n")
    out = process.communicate(timeout=20)[0]
    assert str(gate) not in out
    assert str(told) not in out


@pytest.mark.parametrize(
    ("option", "path"),
    [
        ("--hold", "/no/such/fifo"),
        ("--hold", "/dev/null"),
        ("--hold", ""),
        ("--events", "/no/such/file"),
        ("--events", "/"),
    ],
)
def test_what_cannot_be_opened_is_refused(place: Place, tmp_path: Path, option: str, path: str) -> None:
    done = place.run("run", option, path, "--", "touch", str(tmp_path / "ran"))
    assert done.returncode == 125
    assert f"{path}" in done.stderr
    assert "try: " in done.stderr
    assert not (tmp_path / "ran").exists()
    assert place.is_clean()


def test_events_are_appended_and_the_output_is_the_guests(place: Place, tmp_path: Path) -> None:
    told = tmp_path / "events"
    for _ in range(2):
        done = place.run("run", "--events", str(told), "--", "sh", "-c", "echo out; exit 3")
        assert (done.returncode, done.stdout, done.stderr) == (3, "out\n", "")
    assert kinds(told) == ["ready", "ended"] * 2
    first = events(told)[0]
    assert [vcpu["vcpu"] for vcpu in first["vcpus"]] == [0]
    assert first["isolation"]["reached"] == "affinity"


def test_a_refusal_is_an_event_with_its_own_exit_code(place: Place, tmp_path: Path) -> None:
    done = place.run("run", "--events", str(tmp_path / "events"), "-n", "8192", "--", "true")
    assert done.returncode == 125
    (event,) = events(tmp_path / "events")
    assert (event["event"], event["exit_code"]) == ("error", 3)
    assert "8192 pCPUs wanted" in event["problem"]


def test_waiting_is_told(place: Place, tmp_path: Path) -> None:
    usable = len(os.sched_getaffinity(0))
    holder = place.start("run", "-n", str(usable - 1), "--", "sleep", "60")
    assert wait_until(lambda: len(place.free()) < usable)
    told = tmp_path / "events"
    waits = place.start("run", "--events", str(told), "--wait=30", "-n", str(usable - 1), "--", "true")
    assert wait_until(lambda: kinds(told) == ["waiting"])
    assert "wanted" in events(told)[0]["why"]
    holder.terminate()
    assert waits.wait(20) == 0
    assert kinds(told) == ["waiting", "ready", "ended"]


def test_a_full_disk_spoils_no_run(place: Place) -> None:
    done = place.run("run", "--events", "/dev/full", "--", "sh", "-c", "exit 4")
    assert done.returncode == 4
    assert done.stderr.count("events cannot be written") == 1
