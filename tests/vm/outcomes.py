"""Cases that end in every way a case can; collected only when this file is named, as ``test_lab.py`` does."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.vm(kernels=("6.12",))


@pytest.mark.parametrize("word", ["one", "two"])
def test_passes(word: str, tmp_path: Path) -> None:
    (tmp_path / word).write_text(word)


def test_fails() -> None:
    sys.stdout.write("said before it failed\n")
    assert os.getpid() == 1, "a process among others"


def test_skips() -> None:
    pytest.skip("skipped inside")


@pytest.mark.xfail(reason="expected inside")
def test_fails_as_expected() -> None:
    raise AssertionError


@pytest.fixture
def broken() -> None:
    raise OSError("broken inside")


def test_has_a_broken_fixture(broken: None) -> None:
    pass


def test_is_killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_brings_the_kernel_down() -> None:
    Path("/proc/sysrq-trigger").write_text("c")


@pytest.mark.vm(limit_s=5)
def test_never_ends() -> None:
    time.sleep(3600)
