"""What systemd is told, and the unit that is printed for it."""

from __future__ import annotations

import configparser
import socket
from pathlib import Path

import pytest

from hostpart.systemd import notify, unit
from tests.conftest import Place


def test_the_manager_is_told_where_there_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify("READY=1")
        assert manager.recv(100) == b"READY=1"


def test_the_manager_may_listen_at_an_abstract_address(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{tmp_path}")
        monkeypatch.setenv("NOTIFY_SOCKET", f"@{tmp_path}")
        assert notify("STOPPING=1")
        assert manager.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("where", ["", "relative", "/nowhere/there"])
def test_nobody_is_told_where_nobody_listens(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", where)
    assert not notify("READY=1")


def test_the_unit_launches_the_scenario_of_its_name_and_restores_before_and_after() -> None:
    parser = configparser.RawConfigParser(strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string(unit("/opt/bin/hostpart", "rt"))
    service = dict(parser["Service"])
    assert service["ExecStart"] == "/opt/bin/hostpart launch /etc/hostpart/rt.toml"
    assert service["ExecStartPre"] == service["ExecStopPost"] == "/opt/bin/hostpart restore"
    assert service["Type"] == "notify"


def test_launch_says_that_it_is_ready_once_its_guests_run(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text('[[vm]]\nname = "box"\nvcpus = 1\ncommand = ["sleep", "0.2"]\n')
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(20)
        place.env["NOTIFY_SOCKET"] = str(tmp_path / "notify")
        done = place.run("launch", str(file))
        assert done.returncode == 0, done.stderr
        assert manager.recv(200).startswith(b"READY=1\nSTATUS=guests run: box")
        assert manager.recv(200) == b"STOPPING=1"


def test_a_name_that_is_none_is_refused(place: Place) -> None:
    done = place.run("systemd-unit", "No Name")
    assert (done.returncode, done.stdout) == (2, "")
    assert "try:" in done.stderr
