"""The lab itself: the machine is the one asked for, and what happens in it is told outside as it was."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.vm.host import lacking

CPU = Path("/sys/devices/system/cpu")


def _says(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@pytest.mark.vm(setups=("v2", "systemd"))
def test_the_machine_is_the_one_asked_for(machine: tuple[str, str]) -> None:
    kernel, setup = machine
    assert os.uname().release.startswith(f"{kernel}.")
    assert os.geteuid() == 0
    assert os.sched_getaffinity(0) == set(range(8))
    assert (CPU / "cpu5/topology/thread_siblings_list").read_text() == "4-5\n"
    assert Path("/sys/devices/system/node/node1/cpulist").read_text() == "4-7\n"
    assert Path("/proc/1/comm").read_text() == {"v2": "busybox\n", "systemd": "systemd\n"}[setup]
    controllers = Path("/sys/fs/cgroup/cgroup.controllers").read_text().split()
    assert {"cpuset", "cpu", "memory"} <= set(controllers)
    enabled = Path("/sys/fs/cgroup/cgroup.subtree_control").read_text().split()
    assert "cpuset" not in enabled
    assert setup == "systemd" or not enabled


@pytest.mark.vm(kernels=("6.1",), setups=("v1",))
def test_the_cpuset_controller_can_be_of_version_1() -> None:
    assert Path("/sys/fs/cgroup/cpuset/cpuset.cpus").read_text() == "0-7\n"
    assert not Path("/sys/fs/cgroup/cgroup.controllers").exists()


@pytest.mark.vm(kernels=("6.12",), topology="1")
def test_a_machine_can_have_one_cpu() -> None:
    assert (CPU / "online").read_text() == "0\n"


@pytest.mark.vm(kernels=("6.12",), cmdline="isolcpus=4-5")
def test_a_case_can_add_to_the_kernels_command_line() -> None:
    assert (CPU / "isolated").read_text() == "4-5\n"


@pytest.mark.vm
def test_hostpart_is_a_command_there_for_root_and_for_nobody() -> None:
    assert json.loads(_says("hostpart", "topology", "--json"))["usable"] == "0-7"
    become = ("setpriv", "--reuid=65534", "--regid=65534", "--clear-groups")
    assert _says(*become, "hostpart", "run", "-n", "1", "--", "id", "-u") == "65534\n"


@pytest.mark.vm(kernels=("6.12",))
def test_what_cases_write_to_is_there() -> None:
    assert Path("/proc/sys/kernel/watchdog_cpumask").read_text() == "0-7\n"
    assert Path("/sys/class/net/lo/queues/rx-0/rps_cpus").exists()
    steered = 0
    for irq in Path("/proc/irq").glob("*/smp_affinity_list"):
        with contextlib.suppress(OSError):  # the timer's can't be
            irq.write_text("2")
            steered += irq.read_text() == "2\n"
    assert steered > 4


@pytest.mark.vm
def test_interrupts_of_devices_are_there(machine: tuple[str, str]) -> None:
    names = {path.name for path in Path("/proc/irq").glob("*/*") if path.is_dir()}
    assert {"virtio1-config", "virtio1-virtqueues"} <= names
    if machine[0] != "6.19":  # whose package of drivers the mirror lacks
        assert {f"eth1-rxtx-{queue}" for queue in range(8)} <= names
        assert {"virtio0-input.0", "virtio2-req.3"} <= names
        assert sorted(path.name for path in Path("/sys/class/net").iterdir()) == ["eth0", "eth1", "lo"]


def test_the_end_of_a_case_is_told_as_it_was() -> None:
    if why := lacking():
        pytest.skip(why)
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA", "--tb=short", "tests/vm/outcomes.py"]
    root = Path(__file__).parents[2]
    env = {**os.environ, "HOSTPART_VM_FULL": "1"}
    done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
    said = done.stdout
    told = {
        tuple(line) for line in re.findall(r"^(\w+) tests/vm/outcomes\.py::test_(\S+?)\[6\.12-v2", said, re.MULTILINE)
    }
    assert told == {
        ("PASSED", "passes"), ("FAILED", "fails"), ("XFAIL", "fails_as_expected"), ("ERROR", "has_a_broken_fixture"),
        ("FAILED", "is_killed"), ("FAILED", "brings_the_kernel_down"), ("FAILED", "never_ends"),
    }, said  # fmt: skip
    assert re.search(r"4 failed, 2 passed, 1 skipped, 1 xfailed, 1 error", said), said
    for words in (
        "AssertionError: a process among others", "said before it failed", "OSError: broken inside",
        ": skipped inside", "ended with status -9", "Kernel panic", "it took more than 5 s",
    ):  # fmt: skip
        assert words in said, said
