"""``hostpart launch`` of isolated VMs, inside virtual machines: several at a time, of one file and of two."""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest

from hostpart.ledger import Ledger
from tests.vm.command import run, wait_until
from tests.vm.fingerprint import difference, fingerprint
from tests.vm.seldom import SELDOM

pytestmark = pytest.mark.vm(limit_s=400)

TREE = Path("/sys/fs/cgroup")
# By level: the VM's name, its pCPUs (whole cores) and its level.
VMS = {"sweep": ("light", "2-3"), "cpuset": ("rt", "4-5"), "full": ("heavy", "6-7")}


def scenario(path: Path, *levels: str, release: str = "") -> str:
    """Write a scenario with a VM of each level; return its name."""
    lines = [f'[service]\nrelease = "{release}"\n'] if release else []
    for level in levels:
        name, pcpus = VMS[level]
        lines.append(
            f'[[vm]]\nname = "{name}"\npcpus = "{pcpus}"\nisolation = "{level}"\nrequire = true\n'
            'command = ["sleep", "1000"]\n'
        )
    path.write_text("\n".join(lines))
    return str(path)


def running() -> set[str]:
    """Return the names of the user VMs whose guests run."""
    with Ledger() as ledger:
        return {row.name for row in ledger.vms() if row.state == "RUNNING" and not row.service}


def kept_off(*levels: str) -> bool:
    """Whether the host is off the pCPUs of just the VMs of these levels, as far as each level goes."""
    inside = {cpu for level in levels if level != "sweep" for cpu in _cpus(VMS[level][1])}
    swept = inside | {cpu for level in levels for cpu in _cpus(VMS[level][1])}
    init = re.search(r"^Cpus_allowed_list:\s*(\S+)$", Path("/proc/1/status").read_text(), re.MULTILINE)
    assert init
    steered = _cpus(Path("/proc/irq/10/smp_affinity_list").read_text().strip())
    return (
        _cpus((TREE / "cpuset.cpus.effective").read_text().strip()) == set(range(8)) - inside
        and _cpus(init[1]) == set(range(8)) - swept
        and steered == set(range(8)) - (_cpus(VMS["full"][1]) if "full" in levels else set())
    )


def _cpus(text: str) -> set[int]:
    spans = (span.partition("-") for span in text.split(",") if span)
    return {cpu for low, _, high in spans for cpu in range(int(low), int(high or low) + 1)}


def same(before: dict[str, str]) -> list[str]:
    """Return what is not as before; waits for what the kernel gives back late."""
    # 6.1's kernel rewrites the masks of its own bound threads, and lets nobody write them.
    left: list[str] = []
    bound = not os.uname().release.startswith("6.1.")

    def is_same() -> bool:
        left[:] = difference(before, fingerprint(), bound=bound)
        return not left

    wait_until(is_same, 5.0)
    return left


def stopped(name: str) -> None:
    """Stop a VM, and wait until the host knows."""
    done = run("stop", name)
    assert done.code == 0, done.err
    assert wait_until(lambda: name not in running())


@pytest.mark.parametrize(
    "order",
    [
        pytest.param(order, id="-".join(order), marks=() if order[0] == "cpuset" else SELDOM)
        for order in itertools.permutations(("sweep", "cpuset", "full"))
    ],
)
def test_vms_of_one_file_stop_in_any_order_and_leave_the_host_as_it_was(tmp_path: Path, order: tuple[str, ...]) -> None:
    before = fingerprint()
    done = run("launch", "-d", scenario(tmp_path / "all.toml", "full", "sweep", "cpuset"))
    assert done.code == 0, done.err
    for name, pcpus in VMS.values():
        rows = re.findall(rf"^{name} +\d +(\d) +\d+ +/\S+$", done.out, re.MULTILINE)
        assert {int(cpu) for cpu in rows} == _cpus(pcpus), done.out
    left = list(order)
    assert kept_off(*left)
    for level in order:
        stopped(VMS[level][0])
        left.remove(level)
        assert wait_until(lambda: kept_off(*left), 20.0), (level, left)
    assert wait_until(lambda: not _all_vms())
    assert same(before) == []
    with Ledger() as ledger:
        assert not ledger.remembers()
        logs = [path.read_text() for path in Path(ledger.directory, "log").iterdir()]
    # While one comes or goes the others' partitions hold, and are not said to have been broken.
    said = "\n".join(logs)
    assert all(f"\n{name}: " in said for name, _ in VMS.values()), said
    assert not [word for word in ("broken", "should have", "foreign") if word in said], said


def _all_vms() -> list[str]:
    with Ledger() as ledger:
        return [row.name for row in ledger.vms()]


@pytest.mark.parametrize("first", [0, pytest.param(1, marks=SELDOM)])
@pytest.mark.parametrize(
    "started",
    [
        pytest.param(("sweep", "full"), id="sweep-full", marks=SELDOM),
        pytest.param(("full", "cpuset"), id="full-cpuset"),
        pytest.param(("cpuset", "sweep"), id="cpuset-sweep", marks=SELDOM),
    ],
)
def test_vms_of_two_files_stop_in_either_order_and_leave_the_host_as_it_was(
    tmp_path: Path, started: tuple[str, str], first: int
) -> None:
    before = fingerprint()
    for number, level in enumerate(started):
        done = run("launch", "-d", scenario(tmp_path / f"{level}.toml", level))
        assert done.code == 0, done.err
        assert kept_off(*started[: number + 1])
    other = started[1 - first]
    stopped(VMS[started[first]][0])
    assert wait_until(lambda: kept_off(other), 20.0)
    stopped(VMS[other][0])
    assert wait_until(lambda: not _all_vms())
    assert same(before) == []


@pytest.mark.parametrize("level", ["sweep", "cpuset", "full"])
def test_released_by_hotplug_each_cpu_goes_offline_once_and_the_host_is_as_it_was(tmp_path: Path, level: str) -> None:
    before = fingerprint()
    log = Path("/dev/kmsg")
    log.write_text("here it begins\n")
    done = run("launch", "-d", "--json", scenario(tmp_path / "one.toml", level, release="hotplug"))
    assert done.code == 0, done.err
    (event,) = (json.loads(line) for line in done.out.splitlines())
    assert (event["event"], event["isolation"]["reached"]) == ("ready", level)
    assert kept_off(level)
    assert _offline_since("here it begins") == sorted(_cpus(VMS[level][1]))
    stopped(VMS[level][0])
    assert wait_until(lambda: not _all_vms())
    assert _offline_since("here it begins") == sorted(_cpus(VMS[level][1]))
    assert same(before) == []


def _offline_since(mark: str) -> list[int]:
    said = subprocess.run(["dmesg"], capture_output=True, text=True, check=True).stdout.rpartition(mark)[2]
    return sorted(map(int, re.findall(r"CPU (\d+) is now offline", said)))
