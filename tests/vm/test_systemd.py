"""A scenario as a service, where systemd is PID 1: ready when its guests run, the host put back however it ends."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import pytest

from tests.vm.command import run, wait_until
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


def test_a_service_whose_scenario_is_wrong_fails_and_changes_nothing() -> None:
    _install("7")
    before = fingerprint()
    assert "failed" in _systemctl("start", _UNIT)
    assert _systemctl("is-active", _UNIT) == "failed\n"
    assert _left(before) == []
