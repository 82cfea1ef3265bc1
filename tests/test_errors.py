"""Remedies that can be typed as they stand."""

from __future__ import annotations

import sys

import pytest

from hostpart.errors import as_root


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        (["/venv/bin/python3", "/venv/bin/hostpart", "run", "--", "echo", "a b"],
         "sudo /venv/bin/hostpart run -- echo 'a b'"),
        (["python3", "-m", "hostpart", "run", "-n", "2"], f"sudo {sys.executable} -m hostpart run -n 2"),
        (["python3", "launch.py"], f"sudo {sys.executable} launch.py"),
    ],
    ids=["command", "module", "program"],
)  # fmt: skip
def test_the_command_for_root_is_the_one_that_was_typed(
    typed: list[str], wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "orig_argv", typed)
    monkeypatch.setattr(sys, "argv", typed[1:])  # of a module the interpreter makes a path, which is no hostpart either
    assert as_root() == wanted
