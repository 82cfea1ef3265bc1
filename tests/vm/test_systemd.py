"""A scenario as a service, where systemd is PID 1: ready when its guests run, the host put back however it ends."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from hostpart.ledger import Ledger
from tests.vm.command import Started, run, start, wait_until
from tests.vm.fingerprint import difference, fingerprint

pytestmark = pytest.mark.vm(setups=("systemd",), limit_s=240)

_UNIT = "hostpart@rt"
_EFFECTIVE = Path("/sys/fs/cgroup/cpuset.cpus.effective")


def _systemctl(*words: str) -> str:
    done = subprocess.run(["systemctl", *words], capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _install(command: str) -> None:
    Path("/etc/hostpart").mkdir()
    Path("/etc/hostpart/rt.toml").write_text(
        f'[[vm]]\nname = "rt"\npcpus = "4,6"\nisolation = "cpuset"\nrequire = true\ncommand = {command}\n'
    )
    unit = run("systemd-unit").out
    Path("/etc/systemd/system/hostpart@.service").write_text(
        "".join(
            line.partition("=")[0] + "=/usr/bin/hostpart " + line.partition(" ")[2] + "\n"
            if line.startswith("Exec")
            else f"{line}\n"
            for line in unit.splitlines()
        )
    )
    _systemctl("daemon-reload")


def _left(before: dict[str, str]) -> list[str]:
    # The slice for the instances of a template is systemd's own, and stays.
    return [line for line in difference(before, fingerprint(), bound=False) if "system-hostpart.slice" not in line]


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_service_takes_its_pcpus_and_gives_them_back(end: str) -> None:
    _install('["sleep", "1000"]')
    before = fingerprint()
    assert _systemctl("start", _UNIT) == ""
    assert _systemctl("is-active", _UNIT) == "active\n"
    assert _EFFECTIVE.read_text() == "0-3\n"
    _systemctl("daemon-reload")
    time.sleep(1.0)
    assert _EFFECTIVE.read_text() == "0-3\n"
    _systemctl(*(("stop", _UNIT) if end == "stop" else ("kill", "--signal=KILL", _UNIT)))
    assert wait_until(lambda: _left(before) == [], 30.0), _left(before)
    assert _systemctl("is-active", _UNIT).strip() == ("inactive" if end == "stop" else "failed")


def test_a_service_that_starts_and_stops_restores_first_and_last_and_that_fails_nowhere() -> None:
    # As at boot: /run is empty, and there is no ledger.
    _install('["sleep", "1000"]')
    assert _systemctl("start", _UNIT) == ""
    shown = _systemctl("show", _UNIT, "--property=ExecStartPre")
    assert "/usr/bin/hostpart restore" in shown, shown
    assert "code=exited ; status=0" in shown, shown
    assert _systemctl("stop", _UNIT) == ""
    assert _systemctl("is-active", _UNIT) == "inactive\n"  # and not failed, as it would be by its last command too
    done = run("restore")
    assert (done.code, done.out) == (0, "nothing is left behind\n")


def test_a_service_whose_scenario_is_wrong_fails_and_changes_nothing() -> None:
    _install("7")
    before = fingerprint()
    assert "failed" in _systemctl("start", _UNIT)
    assert _systemctl("is-active", _UNIT) == "failed\n"
    assert _left(before) == []


# -- the home beside what systemd does -----------------------------------------------------------------


def _launched(evidence: Path) -> Started:
    started = start(
        "run", "--isolation", "cpuset", "--require", "--pcpus", "4,6", "--name", "rt", "--evidence", str(evidence),
        "--", "sleep", "1000",
    )  # fmt: skip
    assert wait_until(lambda: _runs() or started.ended()), started.err
    assert not started.ended(), started.err
    assert _kept()
    return started


def _runs() -> bool:
    with Ledger() as ledger:
        return any(row.name == "rt" and row.state == "RUNNING" for row in ledger.vms())


def _kept() -> bool:
    # By the tree's root, and by trying.
    try:
        os.sched_setaffinity(1, {5})
    except OSError:
        return _EFFECTIVE.read_text() == "0-3\n"
    return False


def _ended(started: Started, evidence: Path) -> dict[str, object]:
    started.kill()
    started.wait()
    found: dict[str, object] = json.loads(evidence.read_text())
    return found


def _other(*words: str) -> None:
    # A service of somebody else's, in a slice of its own: what a slice once had set cannot be taken back, but it ends.
    assert "Running as unit" in _ran("systemd-run", "--slice=other.slice", *words, "sleep", "1000")


def _ran(*words: str) -> str:
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    return done.stdout + done.stderr


def _slice_with(*allowed: str) -> None:
    _other("--unit=other")
    for cpus in allowed:
        assert _systemctl("set-property", "--runtime", "other.slice", f"AllowedCPUs={cpus}") == ""


_DEEDS: dict[str, Callable[[], object]] = {
    "daemon-reload": lambda: _systemctl("daemon-reload"),
    "daemon-reexec": lambda: _systemctl("daemon-reexec"),
    "a transient service": lambda: _ran("systemd-run", "--wait", "true"),
    "a service with CPUAffinity=": lambda: _ran("systemd-run", "--wait", "--property=CPUAffinity=1-2", "true"),
    "a service with CPUAffinity= on the guests' pCPUs": lambda: _ran(
        "systemd-run", "--wait", "--property=CPUAffinity=4", "true"
    ),
    "a slice with AllowedCPUs=": lambda: _slice_with("0-1", "2"),
    "its end": lambda: _systemctl("stop", "other.service", "other.slice"),
    "another reload": lambda: _systemctl("daemon-reload"),
}


def test_what_systemd_does_elsewhere_leaves_the_partition_alone(tmp_path: Path) -> None:
    before = fingerprint()
    started = _launched(tmp_path / "e.json")
    for name, deed in _DEEDS.items():
        said = deed()
        time.sleep(0.5)  # for two looks, of hostpart's too
        assert _kept(), (name, said, started.err)
    document = _ended(started, tmp_path / "e.json")
    assert document["verdict"] != "broken", document
    assert wait_until(lambda: _left(before) == [], 10.0), _left(before)


def test_a_slice_that_is_given_the_guests_pcpus_is_said_and_the_partition_mended_once_it_is_not(
    tmp_path: Path,
) -> None:
    before = fingerprint()
    started = _launched(tmp_path / "e.json")
    _other("--unit=other")
    assert _systemctl("set-property", "--runtime", "other.slice", "AllowedCPUs=0-5") == ""
    assert wait_until(lambda: "could not be mended" in started.err and "other.slice" in started.err), started.err
    time.sleep(3.0)  # longer than it tries in a row
    assert _systemctl("set-property", "--runtime", "other.slice", "AllowedCPUs=0-3") == ""
    assert wait_until(lambda: "the partition was mended" in started.err), started.err
    assert wait_until(_kept)
    document = _ended(started, tmp_path / "e.json")
    assert document["verdict"] == "broken"
    _systemctl("stop", "other.service", "other.slice")
    _systemctl("daemon-reload")
    assert wait_until(lambda: _left(before) == [], 10.0), _left(before)
