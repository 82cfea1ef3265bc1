"""The verdict inside virtual machines, where a host can be ill-treated: storms, CPUs unplugged, load kept off."""

from __future__ import annotations

import glob
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import jsonschema
import pytest

from hostpart.cpuset import CpuSet
from hostpart.host import Host
from tests.evidence_file import SCHEMA, about, document
from tests.vm.command import Started, run, start, wait_until

pytestmark = pytest.mark.vm()

CPU = "/sys/devices/system/cpu"
PCPU = 4
# A kernel thread that an emulated CPU runs for a moment has run for as long as that one was itself kept waiting.
EMULATED = ("--foreign-limit", "12")


@pytest.fixture
def planted() -> Iterator[Callable[..., int]]:
    """Fork something of the host's: called with a function and CPUs to pin it to; it is killed afterwards."""
    pids: list[int] = []

    def plant(what: Callable[[], object], *cpus: int) -> int:
        pid = os.fork()
        if not pid:
            _forever(what, cpus)
        pids.append(pid)
        assert wait_until(lambda: not cpus or os.sched_getaffinity(pid) == set(cpus))
        return pid

    yield plant
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def _forever(what: Callable[[], object], cpus: tuple[int, ...]) -> NoReturn:
    try:
        if cpus:
            os.sched_setaffinity(0, cpus)
        while True:
            what()
    finally:
        os._exit(1)


def nothing() -> None:
    """Burn."""


def ran(evidence_file: Path, level: str, seconds: float, *more: str) -> dict[str, Any]:
    """Run a guest that burns on the pCPU, and return its evidence."""
    busy = f"import time\nend = time.monotonic() + {seconds}\nwhile time.monotonic() < end: pass"
    done = run(
        "run", "--isolation", level, "--require", "--pcpus", str(PCPU), *more, "--evidence", str(evidence_file), "--",
        "/usr/bin/python3", "-Sc", busy,
    )  # fmt: skip
    assert done.code == 0, done.err
    return document(evidence_file)


def but_late(doc: dict[str, Any]) -> list[str]:
    """Return the reasons, but for looks that come late because the processors are emulated, several on one."""
    return [reason for reason in doc["reasons"] if "was not looked at for" not in reason]


@pytest.mark.parametrize("level", ["cpuset", "full"])
def test_a_quiet_run_is_held_though_the_host_is_loaded(level: str, planted: Callable[..., int], tmp_path: Path) -> None:
    for _ in range(2):
        planted(nothing)
    doc = ran(tmp_path / "e.json", level, 3, *EMULATED)
    assert but_late(doc) == []
    (pcpu,) = doc["pcpus"]
    # What the kernel does on each CPU stays, and nothing else.
    assert [task for task in pcpu["foreign_tasks"] if not task["kernel"]] == []
    assert pcpu["tasks_ns"]["from"] == ("schedstat" if os.path.exists("/proc/schedstat") else "stat")
    assert pcpu["steal_ns"] == 0
    assert pcpu["events"] == []
    assert "leaves little to miss" in doc["unseen"]


def test_a_foreign_task_is_named_where_nothing_keeps_it_off(planted: Callable[..., int], tmp_path: Path) -> None:
    foreign = planted(nothing, PCPU)
    doc = ran(tmp_path / "e.json", "affinity", 3, *EMULATED)
    assert doc["verdict"] == "tainted"
    (reason,) = about(doc, "others ran", f"on pCPU {PCPU}")
    assert f"(pid {foreign})" in reason
    (pcpu,) = doc["pcpus"]
    assert pcpu["tasks_ns"]["value"] > 0.2 * pcpu["interval_s"] * 1e9
    assert pcpu["foreign_tasks"][0]["pid"] == foreign
    assert "'cpuset' does" in doc["unseen"]


def test_softirqs_that_another_cpu_hands_over_taint(planted: Callable[..., int], tmp_path: Path) -> None:
    # What one CPU sends to its own machine is received on the CPU that receive packet steering names.
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    steering = Path("/sys/class/net/lo/queues/rx-0/rps_cpus")
    steering.write_text(f"{1 << PCPU:x}")
    receiver, sender = (socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(2))
    receiver.bind(("127.0.0.1", 0))
    sender.connect(receiver.getsockname())
    packet = bytes(30_000)
    planted(lambda: sender.send(packet), 0)
    try:
        doc = ran(tmp_path / "e.json", "affinity", 4)
    finally:
        steering.write_text("0")
    assert doc["verdict"] == "tainted"
    assert about(doc, f"pCPU {PCPU}", "(softirq)") or about(doc, "others ran", f"'ksoftirqd/{PCPU}'"), doc
    assert doc["pcpus"][0]["softirq_ns"] > 30_000_000


def _disk_queue() -> tuple[str, str, int, int] | None:
    # An interrupt of the disk's, its name, the CPU that gets it, and another CPU whose requests it is for.
    for folder in glob.glob("/proc/irq/*/"):
        for handler in glob.glob(f"{folder}virtio*-req.*"):
            served = CpuSet.parse(Path(folder, "smp_affinity_list").read_text())
            gets = CpuSet.parse(Path(folder, "effective_affinity_list").read_text()).lowest
            others = served - CpuSet.of([gets, 0])
            if others and gets:
                return os.path.basename(folder[:-1]), os.path.basename(handler), gets, others.lowest
    return None


def test_a_storm_of_a_devices_interrupts_taints_and_names_the_device(
    planted: Callable[..., int], tmp_path: Path
) -> None:
    found = _disk_queue()
    disks = glob.glob("/dev/vd?")
    if found is None or not disks:
        pytest.skip("needs the virtual disk's driver")
    number, name, gets, sends = found
    fd = os.open(disks[0], os.O_RDONLY | os.O_DIRECT)
    block = mmap.mmap(-1, 4096)
    planted(lambda: os.preadv(fd, [block], 0), sends)
    path = tmp_path / "e.json"
    done = run(
        "run", "--pcpus", str(gets), "--foreign-limit", "0.5", "--evidence", str(path), "--", "sleep", "4",
    )  # fmt: skip
    assert done.code == 0, done.err
    doc = document(path)
    line = next(one for one in doc["pcpus"][0]["interrupts"] if one["source"] == number)
    assert line["name"] == name
    assert doc["verdict"] == "tainted", line
    assert about(doc, f"interrupt {number} ({name}) came to pCPU {gets}"), (doc["reasons"], line)


def _started(level: str, path: Path) -> Started:
    started = start(
        "run", "--isolation", level, "--require", "--pcpus", str(PCPU), "--name", "rt", "--evidence", str(path), "--",
        "sleep", "1000",
    )  # fmt: skip
    assert wait_until(lambda: f'"{PCPU}"' in run("ps", "--json").out or "RUNNING" in run("ps").out), started.err
    return started


@pytest.mark.parametrize("away_s", [0.0, 1.0], ids=["between two looks", "for longer than a look"])
def test_a_cpu_that_was_unplugged_and_came_back_is_named(away_s: float, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    started = _started("affinity", path)
    (vm,) = [vm for vm in json.loads(run("ps", "--json").out)["vms"] if vm["vm"] == "rt"]
    if not away_s:
        os.kill(vm["keeper"], signal.SIGSTOP)  # an emulated CPU takes longer to go than a look is away
    Path(f"{CPU}/cpu{PCPU}/online").write_text("0")
    time.sleep(away_s)
    Path(f"{CPU}/cpu{PCPU}/online").write_text("1")
    os.kill(vm["keeper"], signal.SIGCONT)
    time.sleep(1.0)
    started.kill()
    started.wait()
    doc = document(path)
    assert doc["verdict"] == "broken"
    assert about(doc, f"pCPU {PCPU} went offline"), doc["reasons"]
    (pcpu,) = doc["pcpus"]
    assert [event["online"] for event in pcpu["events"]] == [False, True]
    assert (pcpu["other_ns"]["value"], pcpu["tasks_ns"]["value"]) == (None, None)


def test_a_vcpu_that_root_moved_away_and_back_is_named(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    started = _started("affinity", path)
    (vm,) = [vm for vm in json.loads(run("ps", "--json").out)["vms"] if vm["vm"] == "rt"]
    pid = vm["vcpus"][0]["pid"]
    Host().set_affinity(pid, CpuSet.of([1]))
    time.sleep(1.5)
    Host().set_affinity(pid, CpuSet.of([PCPU]))
    started.kill()
    started.wait()
    doc = document(path)
    assert doc["verdict"] == "broken"
    assert about(doc, f"(pid {pid})", "CPU"), doc["reasons"]


def test_memory_nodes_are_told_and_pages_where_audit_asks(tmp_path: Path) -> None:
    started = start(
        "run", "--pcpus", str(PCPU), "--name", "rt", "--mems", "1", "--evidence", str(tmp_path / "e.json"), "--",
        sys.executable, "-Sc", "import time; held = bytearray(8 << 20); time.sleep(1000)",
    )  # fmt: skip
    assert wait_until(lambda: "RUNNING" in run("ps").out), started.err
    time.sleep(2)
    (doc,) = json.loads(run("audit", "--json").out)["vms"]
    jsonschema.Draft202012Validator(SCHEMA).validate(doc)
    mems = doc["vcpus"][0]["mems"]
    assert (mems["start"], mems["end"]) == ("0-1", "0-1")
    assert mems["pages"]["1"] >= 2048
    started.kill()
    started.wait()
    assert document(tmp_path / "e.json")["vcpus"][0]["mems"] == {"start": "0-1", "end": "0-1", "pages": None}
