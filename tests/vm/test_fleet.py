"""A host of many inside a cgroup with some of the machine's CPUs only, as a batch system's job or a container has."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.command import run

pytestmark = pytest.mark.vm()

_TREE = Path("/sys/fs/cgroup")
_JOB = _TREE / "job"


@pytest.fixture
def _job() -> Iterator[None]:
    # As Slurm's task/cgroup and the kubelet's CPU manager do it: a cpuset around the job's processes.
    (_TREE / "cgroup.subtree_control").write_text("+cpuset")
    _JOB.mkdir()
    (_JOB / "cpuset.cpus").write_text("2-3,6")
    mine = os.sched_getaffinity(0)
    (_JOB / "cgroup.procs").write_text("0")
    yield
    (_TREE / "cgroup.procs").write_text("0")
    os.sched_setaffinity(0, mine)


@pytest.mark.usefixtures("_job")
def test_what_may_be_used_is_what_the_job_has() -> None:
    done = run("topology", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["usable"] == "2-3,6"


@pytest.mark.usefixtures("_job")
def test_a_job_gets_its_own_pcpus_and_no_other() -> None:
    # One of the job's is kept for what is no guest, here as on a whole machine.
    done = run("run", "-n", "2", "--smt", "shared", "--", "grep", "Cpus_allowed_list", "/proc/self/status")
    assert done.code == 0, done.err
    assert sorted(line.split()[1] for line in done.out.splitlines()) == ["3", "6"]
    done = run("run", "-n", "3", "--smt", "shared", "--", "true")
    assert (done.code, done.out) == (125, ""), done
    assert "not usable by this process (affinity or cgroup): pCPU 0-1,4-5,7" in done.err
    for level in ("cpuset", "full"):
        done = run("run", "--isolation", level, "--require", "--", "true")
        assert done.code == 125, done
