"""``hostpart fleet run`` and what it shares with ``fleet experiment``, as a shell sees them, on this host's workers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("distributed")

from hostpart.cli import fleet_experiment, fleet_run
from hostpart.fleet.dispatch import Outcome, Word
from hostpart.fleet.journal import Journal
from hostpart.fleet.request import Request
from hostpart.fleet.resumption import Known

from .conftest import wait_until

RUN = "0123456789ab"
NAN = float("nan")


@pytest.fixture
def home(tmp_path: Path) -> dict[str, str]:
    """Give an environment in which nothing is shared with other tests."""
    own = {f"HOSTPART_{name}_DIR": str(tmp_path / name.lower()) for name in ("FLEET", "LEASE", "RUNTIME")}
    return {**os.environ, **own}


def fleet(home: Mapping[str, str], *words: str, **more: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "hostpart", "fleet", "--local", "1", "run", "--smt=shared", "--wait=20", *words],
        env=dict(home), stdout=subprocess.PIPE, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True, **more,
    )  # fmt: skip


def outcomes(home: Mapping[str, str]) -> list[int]:
    folder = Path(home["HOSTPART_FLEET_DIR"])
    return [json.loads(file.read_text())["status"] for file in sorted(folder.glob("*/outcome.json"))]


def test_who_has_read_enough_ends_the_guest(home: dict[str, str]) -> None:
    with fleet(home, "--", "yes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "y\n"
        process.stdout.close()
        assert process.wait(60) == 128 + signal.SIGPIPE
    assert wait_until(lambda: outcomes(home) == [128 + signal.SIGTERM], 20)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_guest_and_is_the_exit_code(home: dict[str, str], number: signal.Signals) -> None:
    with fleet(home, "--", "sh", "-c", "echo up; exec sleep 300") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        process.send_signal(number)
        assert process.wait(60) == 128 + number
    assert wait_until(lambda: outcomes(home) == [128 + signal.SIGTERM], 20)


def test_what_was_done_is_not_done_again_and_what_failed_is_not_forgotten(home: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "jobs").write_text('["echo", "one"]\n["sh", "-c", "exit 3"]\n')
    out = str(tmp_path / "out")
    first = fleet(home, "--jobs", str(tmp_path / "jobs"), "--out", out)
    said = first.communicate(timeout=120)
    assert first.returncode == 1, said
    assert said[0].endswith(": one\n")
    before = sorted(os.listdir(home["HOSTPART_FLEET_DIR"]))
    again = fleet(home, "--resume", out)
    said = again.communicate(timeout=120)
    assert again.returncode == 1, said
    assert said[0] == ""
    assert sorted(os.listdir(home["HOSTPART_FLEET_DIR"])) == before


@pytest.mark.parametrize(
    "event",
    [
        {"event": "ready", "vcpus": [{"pcpu": 10**4000}, {"pcpu": "\x1b[2J"}, {"pcpu": -1}, {"pcpu": True}, 5]},
        {"event": "ready", "vcpus": "\x1b"},
        {"event": "ended", "evidence": {"time": NAN}},
        {"event": "error", "problem": NAN},
        {"event": ["ended"]},
    ],
    ids=lambda event: str(event)[:40],
)
@pytest.mark.parametrize("as_json", [True, False])
def test_an_event_may_hold_anything(
    event: dict[str, Any], as_json: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = SimpleNamespace(json=as_json, evidence=str(tmp_path / "evidence"))
    show = fleet_run._Show(args, {"requests": 1})  # type: ignore[arg-type]  # what it takes of it
    request = Request(RUN, 0, ("run", "--", "true"), {})
    show.hear(Word(request, "a", "event", event))
    show.ended(Outcome(request, "ended", "a", 0, {"problem": NAN}))
    said = capsys.readouterr()
    assert "\x1b" not in said.out + said.err
    for line in said.out.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


def test_hosts_keep_their_numbers_and_one_that_is_missing_is_named(tmp_path: Path) -> None:
    journal = Journal(str(tmp_path / "out"), {"schema": 1, "kind": "experiment", "run": RUN})
    assert fleet_experiment._numbers(journal, ["b", "c"], {}) == ({"b": 0, "c": 1}, [])
    # Nothing but that was kept when it was killed: a host that joins takes no other's number.
    assert fleet_experiment._numbers(journal, ["a", "b", "c"], {}) == ({"a": 2, "b": 0, "c": 1}, [])
    assert fleet_experiment._numbers(journal, ["a", "b"], {}) == ({"a": 2, "b": 0}, ["c"])
    journal.decision(f"{RUN}.1.1", "ended", host="c", status=0)
    assert fleet_experiment._numbers(journal, ["a", "b"], {}) == ({"a": 2, "b": 0}, [])
    # It has another name by now, and its errand still.
    there = {1: [Known("d", 1, {"state": "running"})]}
    assert fleet_experiment._numbers(journal, ["a", "b", "d"], there)[0] == {"a": 2, "b": 0, "d": 1}
    journal.close()
