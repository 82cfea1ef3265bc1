"""What stands in the way of a level: a sentence with a remedy, an honest level, and nothing changed."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.vm.command import Done, run
from tests.vm.fingerprint import difference, fingerprint

pytestmark = pytest.mark.vm()


def _refused(*more: str, level: str = "cpuset", says: str) -> None:
    before = fingerprint()
    done = run("run", "--isolation", level, "--require", *more, "--", "echo", "it ran")
    assert (done.code, done.out) == (125, ""), done
    assert re.search(says, done.err), done.err
    assert "\ntry: " in done.err
    assert "Traceback" not in done.err
    assert difference(before, fingerprint(), bound=False) == []


def _lower(*more: str, level: str = "cpuset", reached: str, evidence: Path) -> Done:
    before = fingerprint()
    done = run("run", "--isolation", level, "--evidence", str(evidence), *more, "--", "echo", "it ran")
    assert (done.code, set(done.out.splitlines())) == (0, {"it ran"}), done
    isolation = json.loads(evidence.read_text())["isolation"]
    assert isolation["reached"] == reached
    assert isolation["stopped_by"] in done.err
    assert isolation["remedy"] in done.err
    assert difference(before, fingerprint(), bound=False) == []
    return done


def test_a_sibling_cgroup_that_claims_the_pcpus(tmp_path: Path) -> None:
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+cpuset")
    os.mkdir("/sys/fs/cgroup/theirs")
    Path("/sys/fs/cgroup/theirs/cpuset.cpus").write_text("3-4")
    _refused("--pcpus", "4,6", says="/sys/fs/cgroup/theirs lays claim to CPU 4")
    _lower("--pcpus", "4,6", reached="sweep", evidence=tmp_path / "e.json")


@pytest.mark.vm(kernels=("6.12",), cmdline="isolcpus=4-5")
def test_cpus_that_were_set_apart_at_boot(tmp_path: Path) -> None:
    # Nothing of the host runs there, and they are not among those that a shell may use; root may all the same.
    os.sched_setaffinity(0, range(8))
    _refused("--pcpus", "4", says="isolcpus=")


@pytest.mark.vm(kernels=("6.12",), cmdline="cgroup_disable=cpuset")
def test_a_kernel_without_the_cpuset_controller(tmp_path: Path) -> None:
    _refused("--pcpus", "4", says="cgroup_disable=cpuset")
    _lower("--pcpus", "4", reached="sweep", evidence=tmp_path / "e.json")


def test_all_cpus_asked_for() -> None:
    # The allocator keeps one for the host, whatever the level.
    _refused("--smt", "shared", "--pcpus", "0-7", says="kept by the service VM: pCPU 0")


@pytest.mark.vm(kernels=("6.12",), topology="1")
def test_a_host_with_one_cpu() -> None:
    _refused("--pcpus", "0", level="sweep", says="one CPU")
    # Nor without isolation: the one that there is stays the host's.
    _refused("--pcpus", "0", level="affinity", says="kept by the service VM: pCPU 0")


def test_a_read_only_sysfs(tmp_path: Path) -> None:
    assert ctypes.CDLL(None).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=False)
    subprocess.run(["mount", "-o", "remount,ro,bind", "/sys"], check=True)
    subprocess.run(["mount", "-o", "remount,ro,bind", "/sys/fs/cgroup"], check=True)
    _refused("--pcpus", "4", says="read-only")


def test_a_cgroup_of_that_name_that_is_somebody_elses() -> None:
    Path("/sys/fs/cgroup/cgroup.subtree_control").write_text("+cpuset")
    os.mkdir("/sys/fs/cgroup/hostpart")
    _refused("--pcpus", "4", says="knows nothing of")


def test_a_scope_that_is_not_the_host_has_no_cpuset(tmp_path: Path) -> None:
    scope = f"tree:{os.getpid()}"
    _refused("--pcpus", "4", "--scope", scope, says="keeps every task of the host off")
    _lower("--pcpus", "4", "--scope", scope, reached="sweep", evidence=tmp_path / "e.json")


def test_a_scope_that_is_none() -> None:
    before = fingerprint()
    done = run("run", "--isolation", "sweep", "--scope", "tree:none", "--", "true")
    assert done.code == 125
    assert "tree:" in done.err
    assert difference(before, fingerprint(), bound=False) == []


def test_an_unprivileged_container(tmp_path: Path) -> None:
    # uid 65534 in a user namespace of its own is root there, and can do no more than before.
    before = fingerprint()
    script = "mount -t cgroup2 none /sys/fs/cgroup; mkdir -m 700 /tmp/inside; "
    script += "HOSTPART_RUNTIME_DIR=/tmp/inside hostpart run --isolation cpuset --require --pcpus 4 -- echo it ran"
    become = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "unshare", "-rmCp", "--fork"]
    done = subprocess.run([*become, "sh", "-c", script], capture_output=True, text=True, check=False)
    if "unshare" in done.stderr:
        pytest.skip(f"no user namespace: {done.stderr}")
    assert done.returncode == 125, done
    assert done.stdout == ""
    assert "try: " in done.stderr
    assert "Traceback" not in done.stderr
    assert difference(before, fingerprint(), bound=False) == []
