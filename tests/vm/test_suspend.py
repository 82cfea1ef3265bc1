"""The host is suspended and resumed while guests run: the kernel takes every CPU but the first offline and online.

A task whose mask has none but those loses it, interrupts likewise. Linux 6.12 leaves partitions and what is pinned in
them alone. Nothing of hostpart runs meanwhile; it sees by the clock that counts suspend what has happened.
"""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from hostpart.ledger import Ledger
from tests.vm.command import Started, sleeper, start, wait_until
from tests.vm.devices import unplug
from tests.vm.fingerprint import difference, fingerprint

pytestmark = pytest.mark.vm(kernels=("6.12", "6.19"), limit_s=400)

S = "4,6"
KEPT = {4, 5, 6, 7}  # their siblings stay idle
TREE = Path("/sys/fs/cgroup")


def suspend() -> float:
    """Suspend the machine to memory; return for how long, by the kernel's clocks, once it is awake again.

    Once only: QEMU wakes a machine by itself that has been asleep before.
    """
    assert "deep" in Path("/sys/power/mem_sleep").read_text()
    before = time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic()
    Path("/sys/power/state").write_text("mem")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - time.monotonic() - before


def launched(level: str, evidence: Path) -> Started:
    """Start two guests that sleep, and wait until they do."""
    started = start(
        "run", "--isolation", level, "--require", "--pcpus", S, "--name", "rt", "--evidence", str(evidence),
        "--on-drift", "repin", "--", "sleep", "1000",
    )  # fmt: skip
    assert wait_until(lambda: guests() or started.ended()), started.err
    assert not started.ended(), started.err
    return started


def guests() -> list[int]:
    """Return the vCPUs' processes, in order, once they run."""
    with Ledger() as ledger:
        row = next((row for row in ledger.vms() if row.name == "rt" and row.state == "RUNNING"), None)
        return [vcpu.pid for vcpu in ledger.vcpus(row.id)] if row else []


def allowed(pid: int) -> str:
    """Return a task's mask, offline CPUs too."""
    found = re.search(r"^Cpus_allowed_list:\s*(\S+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return found[1]


def off(pid: int) -> bool:
    """Whether a task of the host can't run on the guests' pCPUs."""
    return not os.sched_getaffinity(pid) & KEPT


@pytest.mark.parametrize("level", ["sweep", "cpuset", "full"])
def test_after_a_suspend_the_partition_is_put_right_and_said(level: str, tmp_path: Path) -> None:
    unplug()  # they give their interrupts back on the way down, and get others after it
    pid, pinned = sleeper(), sleeper(1)
    before = fingerprint()
    started = launched(level, tmp_path / "e.json")
    assert off(pid)
    running = guests()
    assert suspend() > 1.0
    assert wait_until(lambda: "the host was suspended for" in started.err), started.err
    assert wait_until(lambda: [allowed(guest) for guest in running] == ["4", "6"]), [allowed(one) for one in running]
    assert wait_until(lambda: off(pid) and off(1) and off(pinned)), started.err
    if level != "sweep":
        assert wait_until(lambda: (TREE / "cpuset.cpus.effective").read_text() == "0-3\n"), started.err
        assert (TREE / "cpuset.cpus.isolated").read_text() == "4-7\n"
    if level == "full":
        masks = [path for path in Path("/proc/irq").glob("*/smp_affinity_list") if re.search("[4-7]", path.read_text())]
        assert {path.parent.name for path in masks} <= {"0", "2"}
    # The suspend took its mask, with or without hostpart: it is compared with nobody.
    os.kill(pinned, signal.SIGKILL)
    os.waitpid(pinned, 0)
    started.kill()
    done = started.wait()
    document = json.loads((tmp_path / "e.json").read_text())
    assert any("the host was suspended for" in note for note in document["notes"]), document
    assert "could not be mended" not in done.err
    assert wait_until(lambda: not difference(before, fingerprint()), 5.0), difference(before, fingerprint())
