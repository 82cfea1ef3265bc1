"""Guests under QEMU inside virtual machines: emulated in what is emulated, so that times mean nothing."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from hostpart.cpuset import CpuSet
from hostpart.ledger import Ledger, VcpuRow
from tests.evidence_file import about, document
from tests.vm.command import Started, run, start, wait_until
from tests.vm.fingerprint import fingerprint
from tests.vm.onlooker import Onlooker, Thread
from tests.vm.remains import remains
from tests.vm.sector import SAYS, sector
from tests.vm.seldom import SELDOM

pytestmark = pytest.mark.vm(cargo="qemu", topology="2x2x2-roomy", limit_s=300)

KEPT = {0}  # the service VM's, and QEMU's other threads'
ASIDE = 7  # where the test itself looks from
TRIFLE_NS = 100_000_000  # what a vCPU's thread may have run, emulated, before it is pinned: it sets itself up
# What hostpart takes by itself, less an instruction that the lab's processors lack and QEMU takes for given.
CPU = "max,vendor=GenuineIntel,-cx16"
QUIET = (
    "console=ttyS0 quiet panic=-1 mitigations=off tsc=reliable no_timer_check nokaslr audit=0 nowatchdog "
    "random.trust_cpu=on cryptomgr.notests rcupdate.rcu_expedited=1 lpj=4000000"
)


@pytest.fixture
def host() -> Iterator[dict[str, str]]:
    """The host as it is before anything; as such it is found again at the end, with an empty ledger."""
    before = fingerprint()
    yield before
    left: list[str] = []

    def same() -> bool:
        left[:] = [*remains(before), *(f"pid {pid} is left" for pid in qemus())]
        return not left

    assert wait_until(same, 20.0), "\n".join(left)


def qemus() -> list[int]:
    """Return the pids of what runs QEMU."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            stat = path.read_text(errors="replace")
        except OSError:
            continue
        if "(qemu-system" in stat and stat[stat.rindex(")") + 2] not in "ZX":
            found.append(int(path.parent.name))
    return found


def table(folder: Path, name: str, cpus: int, turns: int = 0) -> str:
    """Return ``[vm.qemu]``'s lines for a guest that says on the console file *name* that all its CPUs run.

    :param turns: see :func:`sector`
    """
    (folder / f"{name}.img").write_bytes(sector(cpus, turns))
    return (
        f'disks = [{{ path = "{folder}/{name}.img", format = "raw", readonly = true }}]\n'
        f'memory = "32M"\nconsole = "file:{folder}/{name}"\n'
    )


def machine_vm(folder: Path, name: str, pcpus: Sequence[int], *more: str, turns: int = 0) -> str:
    """Return a VM that is one such guest."""
    lines = [f'[[vm]]\nname = "{name}"\npcpus = {list(pcpus)}\nforeign_limit = 100', *more, "[vm.qemu]"]
    return "\n".join([*lines, table(folder, name, len(pcpus), turns)])


def launched(folder: Path, *vms: str, options: Sequence[str] = ()) -> Started:
    """Launch VMs in the foreground, their evidence in the folder ``evidence``."""
    (folder / "scenario.toml").write_text("\n".join(vms))
    return start("launch", "--results", str(folder / "evidence"), *options, str(folder / "scenario.toml"))


def said(folder: Path, name: str) -> str:
    """Return what a guest has said on its console."""
    try:
        return (folder / name).read_text(errors="replace")
    except OSError:
        return ""


def await_guest(folder: Path, front: Started, *names: str) -> None:
    """Wait until guests run on all their CPUs."""

    def ready() -> bool:
        return all(SAYS in said(folder, name) for name in names)

    assert wait_until(lambda: front.ended() or ready(), 120.0), (front.out, front.err)
    assert ready(), (front.out, front.err)


def vcpus(name: str) -> list[VcpuRow]:
    """Return a VM's vCPUs as the ledger has them."""
    with Ledger() as ledger:
        (vm,) = (row for row in ledger.vms() if row.name == name)
        return sorted(ledger.vcpus(vm.id), key=lambda row: row.vcpu)


def keeper(name: str) -> int:
    """Return the pid of a VM's keeper."""
    with Ledger() as ledger:
        return next(row.keeper_pid for row in ledger.vms() if row.name == name)


def taskset(tid: int, cpu: int | None = None) -> str:
    """Ask, or tell, as an operator does; return what it says of the mask now, or why it could not."""
    words = [] if cpu is None else [str(cpu)]
    done = subprocess.run(["taskset", "-cp", *words, str(tid)], capture_output=True, text=True, check=False)
    return done.stdout.strip().rpartition(": ")[2] if done.returncode == 0 else done.stderr.strip().rpartition(": ")[2]


def others_of(row: VcpuRow) -> list[int]:
    """Return the threads of a vCPU's process that are no vCPUs."""
    with Ledger() as ledger:
        known = {one.tid for vm in ledger.vms() for one in ledger.vcpus(vm.id)}
    return sorted(int(name) for name in os.listdir(f"/proc/{row.pid}/task") if int(name) not in known)


def assert_confined(seen: Sequence[Thread], pcpus: Sequence[int], kept: set[int] = KEPT) -> list[int]:
    """See that one QEMU's vCPU threads were on their pCPUs from the first instruction of the guest, and no other thread
    ever; return the vCPUs' threads."""
    own = sorted((thread for thread in seen if re.fullmatch(r"CPU \d+/TCG", thread.name)), key=lambda one: one.name)
    assert len(own) == len(pcpus), seen
    for thread, pcpu in zip(own, pcpus, strict=True):
        last = thread.sights[-1]
        assert (last.mask, last.processor) == (str(pcpu), pcpu), thread
        assert last.times > 5, thread
        assert last.last_ns > 5 * TRIFLE_NS, thread
        # Not a moment of the guest's before that, wherever it was put: into a cpuset, and then on one of its pCPUs.
        for sight in thread.sights[:-1]:
            mask = set(CpuSet.parse(sight.mask))
            assert mask <= kept or mask <= set(pcpus), thread
            assert sight.processor in kept | set(pcpus), thread
            assert sight.last_ns < TRIFLE_NS, thread
    for thread in seen:
        if thread not in own:
            for sight in thread.sights:
                assert set(CpuSet.parse(sight.mask)) <= kept, thread
                assert sight.processor in kept, thread
    return [thread.tid for thread in own]


def assert_shown(doc: dict[str, Any], tids: Sequence[int], pcpus: Sequence[int]) -> None:
    """See that the evidence has a record of each vCPU's thread, and that they were where they belong."""
    found = [(one["vcpu"], one["tid"], one["pcpu"], one["kind"], one["cpus_seen"]) for one in doc["vcpus"]]
    assert found == [
        (vcpu, tid, pcpu, "qemu", str(pcpu)) for vcpu, (tid, pcpu) in enumerate(zip(tids, pcpus, strict=True))
    ]
    assert [one["migrations"]["value"] for one in doc["vcpus"]] == [0] * len(pcpus)
    assert [one["affinity"] for one in doc["vcpus"]] == [{"start": str(pcpu), "end": str(pcpu)} for pcpu in pcpus]
    assert doc["verdict"] in ("held", "tainted"), doc["reasons"]
    (machine,) = doc["machines"]
    assert [one["tid"] for one in machine["vcpus"]] == list(tids)
    assert CpuSet.parse(machine["emulator_pcpus"]) == CpuSet.of(KEPT)


# -- where the threads are -----------------------------------------------------------------------------


def test_each_vcpu_thread_is_on_its_pcpu_from_the_first_instruction(host: dict[str, str], tmp_path: Path) -> None:
    onlooker = Onlooker(ASIDE)
    front = launched(tmp_path, machine_vm(tmp_path, "two", (2, 4), turns=300_000))
    await_guest(tmp_path, front, "two")
    rows = vcpus("two")
    assert [taskset(row.tid) for row in rows] == ["2", "4"]
    assert {taskset(tid) for tid in others_of(rows[0])} - {"No such process"} == {"0"}
    done = front.wait(120)
    tids = assert_confined(onlooker.seen(), (2, 4))
    assert tids == [row.tid for row in rows]
    doc = document(tmp_path / "evidence" / "two.json")
    assert_shown(doc, tids, (2, 4))
    assert doc["machines"][0]["end"] == "the guest powered off"
    assert done.code == 0, done.err


@pytest.mark.vm(limit_s=900, every=())  # some five minutes
def test_linux_sees_the_placement(host: dict[str, str], tmp_path: Path) -> None:
    # Two cores with two threads each, one core on either node, and the second core's threads in the other order.
    pcpus = (2, 3, 5, 4)
    onlooker = Onlooker(ASIDE, pause_s=0.2)  # it takes minutes, and less where less is looked at
    text = machine_vm(tmp_path, "linux", pcpus).partition("[vm.qemu]")[0]
    text += f'[vm.qemu]\nrun = "hostpart topology --json"\nappend = "{QUIET}"\nmemory = "160M"\ncpu = "{CPU}"\n'
    text += f'console = "file:{tmp_path}/linux"\n'
    front = launched(tmp_path, text)
    done = front.wait(850)
    console = said(tmp_path, "linux")
    assert done.code == 0, (done.err, console)
    tids = assert_confined(onlooker.seen(), pcpus)
    doc = document(tmp_path / "evidence" / "linux.json")
    assert_shown(doc, tids, pcpus)
    assert doc["machines"][0]["end"] == "the guest powered off"
    # What the hostpart in there has read of firmware and kernel.
    inside, _ = json.JSONDecoder().raw_decode(console[console.index("{") :])
    assert inside["source"]["madt"] is True, console
    named = [one["apic_id"] for one in doc["machines"][0]["vcpus"]]
    assert sorted(one["apic_id"] for one in inside["pcpus"]) == sorted(named)
    by_id = {one["apic_id"]: one for one in inside["pcpus"]}
    placed = [(by_id[apic_id]["package"], by_id[apic_id]["numa"]) for apic_id in named]
    assert placed == [(0, 0), (0, 0), (1, 1), (1, 1)]
    cores = [by_id[apic_id]["core"] for apic_id in named]
    assert cores[0] == cores[1] != cores[2] == cores[3]


def test_two_threads_of_a_core_are_two_vcpus_and_a_guest_that_is_asked_to_stop_does(
    host: dict[str, str], tmp_path: Path
) -> None:
    onlooker = Onlooker(1)
    front = launched(tmp_path, machine_vm(tmp_path, "four", (2, 3, 6, 7)))
    await_guest(tmp_path, front, "four")
    assert [taskset(row.tid) for row in vcpus("four")] == ["2", "3", "6", "7"]
    done = run("stop", "four")
    assert done.code == 0, done.err
    front.wait(60)
    tids = assert_confined(onlooker.seen(), (2, 3, 6, 7))
    doc = document(tmp_path / "evidence" / "four.json")
    assert_shown(doc, tids, (2, 3, 6, 7))
    (machine,) = doc["machines"]
    assert machine["end"] == "the guest powered off"
    assert "cpus=4,maxcpus=4,sockets=2,dies=1,cores=1,threads=2" in machine["topology"]
    assert [one["apic_id"] for one in machine["vcpus"]] == [0, 1, 2, 3]


# -- isolation -----------------------------------------------------------------------------------------


def isolated(folder: Path, level: str) -> tuple[Started, list[VcpuRow]]:
    """Launch a guest on pCPU 2 and 4 at a level, see that it is kept apart, and return its front and its vCPUs."""
    front = launched(folder, machine_vm(folder, "os", (2, 4), f'isolation = "{level}"\nrequire = true'))
    await_guest(folder, front, "os")
    rows = vcpus("os")
    homes = [Path(f"/proc/{row.pid}/task/{row.tid}/cgroup").read_text().strip() for row in rows]
    assert len(set(homes)) == 1
    home = Path(f"/sys/fs/cgroup{homes[0].removeprefix('0::')}")
    assert home.parent.name == "hostpart-threads"
    assert (home / "cgroup.type").read_text() == "threaded\n"
    assert sorted((home / "cgroup.threads").read_text().split(), key=int) == sorted(
        (str(row.tid) for row in rows), key=int
    )
    assert (home / "cpuset.cpus.effective").read_text() == "2,4\n"
    assert Path("/sys/fs/cgroup/cpuset.cpus.effective").read_text() == "0-1,6-7\n"
    assert [taskset(row.tid) for row in rows] == ["2", "4"]
    # Neither side gets to the other.
    assert {taskset(tid, 4) for tid in (1, os.getpid(), rows[0].pid)} == {"Invalid argument"}
    assert {taskset(row.tid, 0) for row in rows} == {"Invalid argument"}
    assert [taskset(row.tid) for row in rows] == ["2", "4"]
    return front, rows


@pytest.mark.parametrize("level", [pytest.param("cpuset", marks=SELDOM), "full"])
def test_the_host_is_kept_off_until_the_guest_ends(host: dict[str, str], tmp_path: Path, level: str) -> None:
    onlooker = Onlooker(ASIDE)
    front, rows = isolated(tmp_path, level)
    done = run("stop", "os")
    assert done.code == 0, done.err
    front.wait(60)
    assert assert_confined(onlooker.seen(), (2, 4)) == [row.tid for row in rows]
    doc = document(tmp_path / "evidence" / "os.json")
    assert doc["isolation"]["reached"] == level
    assert_shown(doc, [row.tid for row in rows], (2, 4))


@pytest.mark.parametrize("who", [*(pytest.param(who, marks=SELDOM) for who in ("qemu", "keeper", "front")), "all"])
def test_nothing_is_left_of_what_is_killed(host: dict[str, str], tmp_path: Path, who: str) -> None:
    front, rows = isolated(tmp_path, "full")
    pids = {"qemu": rows[0].pid, "keeper": keeper("os"), "front": front.pid}
    for pid in pids.values() if who == "all" else [pids[who]]:
        os.kill(pid, signal.SIGKILL)
    front.wait(60)
    if who == "all":
        done = run("restore")
        assert done.code == 0, done.err
    if who == "qemu":
        doc = document(tmp_path / "evidence" / "os.json")
        assert doc["vcpus"][0]["exit"] == {"signal": 9}
        assert about_note(doc, "was killed by signal 9")
        assert about_note(doc, "unplugged") == about(doc, "unplugged") == []


def about_note(doc: dict[str, Any], *words: str) -> list[str]:
    """Return the notes in which all *words* are."""
    return [note for note in doc["notes"] if all(word in note for word in words)]


# -- several kinds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", [pytest.param("affinity", marks=SELDOM), "cpuset"])
def test_machines_commands_and_functions_in_one_scenario(host: dict[str, str], tmp_path: Path, level: str) -> None:
    more = f'isolation = "{level}"\nrequire = true\nforeign_limit = 100\n'
    mixed = (
        f'[[vm]]\nname = "mixed"\npcpus = [2, 3]\n{more}'
        f"[[vm.guest]]\nvcpus = 1\n[vm.guest.qemu]\n{table(tmp_path, 'in-mixed', 1, 20_000)}"
        '[[vm.guest]]\nvcpus = 1\ncommand = ["sleep", "3"]\n'
    )
    noise = (
        f'[[vm]]\nname = "noise"\npcpus = [6]\nsmt = "shared"\n{more}python = "workers.probes.noise:main"\n'
        'env = { HOSTPART_PROBE_SECONDS = "2" }\n'
    )
    onlooker = Onlooker(1)
    front = launched(
        tmp_path,
        machine_vm(tmp_path, "os", (4,), f'isolation = "{level}"\nrequire = true', turns=20_000),
        f'[[vm]]\nname = "words"\npcpus = [7]\nsmt = "shared"\n{more}command = ["sh", "-c", "taskset -cp $$"]\n',
        noise,
        mixed,
    )
    done = front.wait(200)
    assert done.code == 0, done.err
    assert "current affinity list: 7" in done.out
    seen = onlooker.seen()
    docs = {name: document(tmp_path / "evidence" / f"{name}.json") for name in ("os", "words", "noise", "mixed")}
    found = {
        name: [(one["vcpu"], one["pcpu"], one["kind"], one["cpus_seen"]) for one in doc["vcpus"]]
        for name, doc in docs.items()
    }
    assert found == {
        "os": [(0, 4, "qemu", "4")],
        "words": [(0, 7, "command", "7")],
        "noise": [(0, 6, "python", "6")],
        "mixed": [(0, 2, "qemu", "2"), (1, 3, "command", "3")],
    }
    for name, pcpu in (("os", 4), ("mixed", 2)):
        record = docs[name]["vcpus"][0]
        own = [thread for thread in seen if thread.pid == record["pid"]]
        assert assert_confined(own, (pcpu,), set(CpuSet.parse(docs[name]["machines"][0]["emulator_pcpus"]))) == [
            record["tid"]
        ]
    assert {name: doc["isolation"]["reached"] for name, doc in docs.items()} == dict.fromkeys(docs, level)
    for doc in docs.values():
        assert doc["verdict"] in ("held", "tainted"), doc["reasons"]


# -- threads that are moved ----------------------------------------------------------------------------


def test_threads_that_are_moved_break_the_partition(host: dict[str, str], tmp_path: Path) -> None:
    front = launched(
        tmp_path,
        machine_vm(tmp_path, "warned", (2,)),
        machine_vm(tmp_path, "repinned", (4,), 'on_drift = "repin"'),
        machine_vm(tmp_path, "astray", (6,), 'on_drift = "repin"'),
    )
    await_guest(tmp_path, front, "warned", "repinned", "astray")
    (warned,), (repinned,), (astray,) = (vcpus(name) for name in ("warned", "repinned", "astray"))
    assert [taskset(tid, 1) for tid in (warned.tid, repinned.tid)] == ["1", "1"]
    assert taskset(astray.pid, 6) == "6"
    assert wait_until(lambda: os.sched_getaffinity(repinned.tid) == {4}, 20.0)
    assert wait_until(lambda: os.sched_getaffinity(astray.pid) == KEPT, 20.0)
    assert os.sched_getaffinity(warned.tid) == {1}
    for name in ("warned", "repinned", "astray"):
        done = run("stop", name)
        assert done.code == 0, done.err
    front.wait(60)
    for name, row, tid, cpu in (
        ("warned", warned, warned.tid, 1),
        ("repinned", repinned, repinned.tid, 1),
        ("astray", astray, astray.pid, 6),
    ):
        doc = document(tmp_path / "evidence" / f"{name}.json")
        assert doc["verdict"] == "broken"
        assert about(doc, f"(pid {row.pid}", "CPU", f" {cpu}"), doc["reasons"]
        assert about(doc, f"thread {tid}") or tid == row.pid, doc["reasons"]
