"""Attaching a process of one's own at level affinity, and getting it back, outside virtual machines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def _hostpart(folder: Path, *args: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "HOSTPART_RUNTIME_DIR": str(folder)}
    return subprocess.run(
        [sys.executable, "-m", "hostpart", *args], env=env, capture_output=True, text=True, timeout=60, check=False
    )


def test_a_process_is_attached_and_given_back(tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two CPUs, one for the host")
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            before = os.sched_getaffinity(sleeper.pid)
            done = _hostpart(tmp_path, "attach", "--wait=30", "--name", "mine", str(sleeper.pid))
            if "--wait" in done.stderr:
                done = _hostpart(tmp_path, "attach", "--name", "mine", str(sleeper.pid))
            assert done.returncode == 0, done.stderr
            assert len(os.sched_getaffinity(sleeper.pid)) == 1
            assert _hostpart(tmp_path, "stop", "mine").returncode == 0
            assert os.sched_getaffinity(sleeper.pid) == before
            assert sleeper.poll() is None
        finally:
            sleeper.kill()


def test_stop_says_which_thread_somebody_else_has_pinned_meanwhile_and_leaves_it(tmp_path: Path) -> None:
    here = sorted(os.sched_getaffinity(0))
    if len(here) < 2:
        pytest.skip("needs two CPUs, one for the host")
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        try:
            done = _hostpart(tmp_path, "attach", "--name", "mine", str(sleeper.pid))
            assert done.returncode == 0, done.stderr
            (pcpu,) = os.sched_getaffinity(sleeper.pid)
            other = next(cpu for cpu in here if cpu != pcpu)
            os.sched_setaffinity(sleeper.pid, {other})
            done = _hostpart(tmp_path, "stop", "--json", "mine")
            assert done.returncode == 0, done.stderr
            said = f"thread {sleeper.pid} of pid {sleeper.pid} has mask {other}, which hostpart did not set"
            assert any(said in text for text in json.loads(done.stdout)["notes"])
            assert f"hostpart: {said}; it was left\n" in done.stderr
            assert os.sched_getaffinity(sleeper.pid) == {other}
        finally:
            sleeper.kill()


def test_what_cannot_be_attached_is_refused_with_a_remedy(tmp_path: Path) -> None:
    for pid in ("1", "2147483000"):
        done = _hostpart(tmp_path, "attach", pid)
        assert done.returncode == 2
        assert "try: " in done.stderr
        assert "Traceback" not in done.stderr
