"""Evidence: judging made-up looks, and looking at real processes pinned for the purpose."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jsonschema
import pytest

from hostpart import evidence, procfs, tree
from hostpart.auditor import Auditor
from hostpart.cli.evidence import summary
from hostpart.cpuset import CpuSet
from hostpart.evidence import Circumstances, Drift, Look, VcpuRecord
from hostpart.occupancy import Event, ForeignTask, Interrupts, Occupied

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

ALL = sorted(os.sched_getaffinity(0))
PIN, OTHER = ALL[0], ALL[-1]
SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())
TWO = pytest.mark.skipif(len(ALL) < 2, reason="needs two CPUs: one to pin to, one to drift to")


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait for *condition*, or fail."""
    stop = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < stop, "it never came"
        time.sleep(0.001)


def write_up(records: list[VcpuRecord], **changes: Any) -> dict[str, Any]:
    """Return the records' document, which has passed through JSON and agrees with the schema."""
    facts: dict[str, Any] = {
        "version": "0",
        "vm": "rt",
        "records": records,
        "isolation": {"asked": "affinity", "reached": "affinity"},
        "period_s": 0.25,
        "started_s": 1_700_000_000.25,
        "ended_s": 1_700_000_001.5,
        **changes,
    }
    doc: dict[str, Any] = json.loads(json.dumps(evidence.document(**facts), allow_nan=False))
    jsonschema.Draft202012Validator(SCHEMA).validate(doc)
    return doc


# Made-up looks


def a_look(mono_s: float = 0.0, cpus: str = "2", processor: int | None = 2, **figures: Any) -> Look:
    return Look(mono_s=mono_s, allowed=CpuSet.parse(cpus), processor=processor, migrations=7, **figures)


def ended(first: Look | None, last: Look | None, pin: str = "2", kind: str = "command") -> VcpuRecord:
    """Return the record of a vCPU that ran between two looks."""
    record = VcpuRecord("rt", 0, CpuSet.parse(pin), 4_000_000, kind)
    if first is not None:
        record.start(first)
    if last is not None:
        record.end(last, None, 0)
    return record


BUSY = Occupied(
    2,
    CpuSet.parse("2"),
    2_000_000_000,
    other_ns=500_000_000,
    tasks_ns=400_000_000,
    irq_ns=0,
    softirq_ns=20_000_000,
    interrupts=tuple(Interrupts(str(n), f"dev{n}", {2: 100 - n}) for n in range(12)),
    tasks=tuple(ForeignTask(2, 70 + n, 70 + n, f"cc{n}", kernel=False, seen=1, run_ns=12 - n) for n in range(12)),
    khz=(800_000, 3_500_000),
    events=(Event(1_700_000_000.5, 2, online=False),),
)


class Strayed(Auditor):
    """An auditor that was on CPU 2."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = self.allowed = CpuSet.parse("2")


DRIFT = Drift(0.0, 5, 6, 1, "sh", CpuSet.parse("2"), "ran", CpuSet.parse("3"))


@pytest.mark.parametrize(
    ("record", "circumstances", "word", "reason"),
    [
        pytest.param(ended(a_look(), a_look(0.1)), {}, "held", None, id="as it should be"),
        pytest.param(ended(a_look(), a_look(0.1)), {"foreign": {2: []}}, "held", None, id="no foreigner"),
        pytest.param(
            ended(a_look(), Look(mono_s=0.1, allowed=CpuSet.parse("2"))),
            {},
            "held",
            None,
            id="the kernel counts no moves",
        ),
        pytest.param(
            ended(a_look(cpus="2-3"), a_look(cpus="3", processor=3), "2-3", "smp"),
            {},
            "held",
            None,
            id="smp binds itself",
        ),
        pytest.param(
            ended(a_look(cpus="2-3"), a_look(cpus="2-3").replace(migrations=50), "2-3", "smp"),
            {},
            "held",
            None,
            id="smp moves about",
        ),
        pytest.param(
            ended(a_look(cpus="2"), a_look(cpus="2"), "2-3", "smp"),
            {},
            "broken",
            "CPUs 2 at its start",
            id="smp too narrow",
        ),
        pytest.param(
            ended(a_look(), a_look().replace(migrations=8)), {}, "broken", "moved to another CPU once", id="moved"
        ),
        pytest.param(ended(a_look(cpus="1-2"), a_look()), {}, "broken", "allowed on CPUs 1-2", id="wide at the start"),
        pytest.param(ended(a_look(), a_look(cpus="0-7")), {}, "broken", "allowed on CPUs 0-7", id="wide at the end"),
        pytest.param(ended(a_look(), a_look(processor=5)), {}, "broken", "ran on CPU 5", id="elsewhere at the end"),
        pytest.param(
            ended(a_look(), a_look()), {"lost": CpuSet.parse("2")}, "broken", "lease on pCPU 2", id="lease lost"
        ),
        pytest.param(
            ended(a_look(), a_look()), {"offline": CpuSet.parse("2")}, "broken", "2 went offline", id="offline"
        ),
        pytest.param(
            ended(a_look(), a_look()),
            {"drifts": (DRIFT,)},
            "broken",
            "'sh' (pid 5, thread 6) ran on CPU 3",
            id="orphan",
        ),
        pytest.param(ended(None, a_look()), {}, "tainted", "looked at at its start", id="no look at the start"),
        pytest.param(ended(a_look(), None), {}, "tainted", "looked at at its end", id="no look at the end"),
        pytest.param(ended(a_look(), Look(mono_s=0.1)), {}, "tainted", "looked at at its end", id="gone at the end"),
        pytest.param(
            ended(a_look(0), a_look(1.76)),
            {},
            "tainted",
            "not looked at for 1.8 s, where a look every 0.25 s",
            id="late",
        ),
        pytest.param(ended(a_look(0), a_look(1.74)), {}, "held", None, id="not late yet"),
        pytest.param(
            ended(a_look(), a_look()), {"foreign": {2: [70, 71]}}, "tainted", "pCPU 2 only: pid 70, 71", id="foreign"
        ),
        pytest.param(
            ended(a_look(), a_look()),
            {"occupied": (BUSY,)},
            "tainted",
            "others ran 0.40 s (20%) on pCPU 2: 'cc0' (pid 70)",
            id="others",
        ),
        pytest.param(
            ended(a_look(), a_look()), {"occupied": (BUSY,), "foreign_limit": 25.0}, "held", None, id="as many as may"
        ),
        pytest.param(
            ended(a_look(), a_look()),
            {"occupied": (BUSY,), "foreign_limit": 100.0, "auditor": Strayed()},
            "tainted",
            "the auditor itself ran on pCPU 2",
            id="the auditor",
        ),
        pytest.param(
            ended(a_look(), a_look()), {"leftovers": 2}, "tainted", "2 processes of the guest outlived", id="leftovers"
        ),
        pytest.param(
            ended(a_look(), a_look()),
            {"shares_core": CpuSet.parse("2")},
            "tainted",
            "a core with the host",
            id="shared core",
        ),
    ],
)
def test_a_verdict_follows_from_what_was_seen(
    record: VcpuRecord, circumstances: dict[str, Any], word: str, reason: str | None
) -> None:
    found = evidence.verdict([record], 0.25, Circumstances(**circumstances))
    assert found.word == word
    if reason is None:
        assert found.reasons == ()
    else:
        assert len(found.reasons) == 1
        assert reason in found.reasons[0]


def test_the_weightiest_reason_comes_first() -> None:
    records = [ended(a_look(), None), ended(a_look(), a_look().replace(migrations=9))]
    found = evidence.verdict(records, 0.25, Circumstances(lost=CpuSet.parse("2"), leftovers=1))
    assert found.word == "broken"
    for expected, reason in zip(("the lease on", "was moved", "at its end", "outlived"), found.reasons, strict=True):
        assert expected in reason


def test_a_vm_that_still_runs_need_not_have_ended() -> None:
    record = ended(a_look(), None)
    assert evidence.verdict([record], 0.25, Circumstances(), live=True).word == "held"
    doc = write_up([record], ended_s=None)
    assert (doc["ended"], doc["verdict"], doc["vcpus"][0]["exit"]) == (None, "held", None)


def test_what_the_kernel_does_not_tell_is_null() -> None:
    bare = Look(mono_s=0.0, allowed=CpuSet.parse("2"), processor=2)
    doc = write_up([ended(bare, bare)])
    (vcpu,) = doc["vcpus"]
    names = ("migrations", "voluntary_switches", "run_ns", "wait_ns", "user_s", "major_faults")
    assert {name: vcpu[name]["value"] for name in names} == dict.fromkeys(names)
    assert doc["cpu_us"]["value"] is None
    assert "kernel's count" not in doc["unseen"]
    assert doc["verdict"] == "held"


def test_figures_count_from_the_start_and_say_what_they_cover() -> None:
    first = a_look(run_ns=100, wait_ns=10, voluntary=3, involuntary=1, user_s=1.0, minor_faults=8)
    last = a_look(1.0, run_ns=350, wait_ns=10, voluntary=5, involuntary=1, user_s=1.5, minor_faults=9)
    (vcpu,) = write_up([ended(first, last)])["vcpus"]
    assert vcpu["run_ns"] == {"value": 250, "covers": "thread"}
    assert vcpu["wait_ns"] == {"value": 0, "covers": "thread"}
    assert vcpu["voluntary_switches"] == {"value": 2, "covers": "thread"}
    assert vcpu["user_s"] == {"value": 1.5, "covers": "process"}
    assert (vcpu["pcpu"], vcpu["pcpus"], vcpu["affinity"]) == (2, "2", {"start": "2", "end": "2"})
    assert (vcpu["looks"], vcpu["longest_gap_s"]) == (2, 1.0)


def test_what_a_pcpu_did_is_told_with_its_weightiest_parts() -> None:
    doc = write_up([ended(a_look(), a_look())], circumstances=Circumstances(occupied=(BUSY,), auditor=Strayed()))
    (pcpu,) = doc["pcpus"]
    assert (pcpu["pcpu"], pcpu["interval_s"], pcpu["irq_ns"], pcpu["steal_ns"]) == (2, 2.0, 0, None)
    assert pcpu["other_ns"] == {
        "value": 500_000_000,
        "over": "2",
        "resolution_ns": 10_000_000,
        "guest_from": "tree",
    }
    assert pcpu["tasks_ns"]["from"] == "stat"
    assert [task["comm"] for task in pcpu["foreign_tasks"]] == [f"cc{n}" for n in range(10)]
    assert pcpu["interrupts"][0] == {"source": "0", "name": "dev0", "count": 100}
    assert (len(pcpu["interrupts"]), pcpu["interrupts_more"], pcpu["foreign_tasks_more"]) == (10, 2, 2)
    assert pcpu["khz"] == {"min": 800_000, "max": 3_500_000}
    assert pcpu["events"] == [{"at": "2023-11-14T22:13:20.500Z", "online": False}]
    assert (doc["foreign_limit_percent"], doc["auditor"]["ran_on"], doc["auditor"]["looks"]) == (1.0, "2", 0)


@pytest.mark.parametrize("level", ["affinity", "sweep", "cpuset", "full"])
def test_what_cannot_be_seen_is_said_with_the_level_that_prevents_it(level: str) -> None:
    unseen = write_up([], isolation={"asked": level, "reached": level})["unseen"]
    assert "changed and changed back between two looks is not seen" in unseen
    assert ("nothing prevents that: 'cpuset' does" in unseen) == (level in ("affinity", "sweep"))


def test_an_auditor_counts_its_looks_and_what_they_cost() -> None:
    auditor = Auditor()
    assert auditor.to_json() | {"cpu_ns_per_s": 0} == {
        "allowed": None, "ran_on": None, "looks": 0, "cpu_ns": 0, "cpu_ns_per_s": 0,
    }  # fmt: skip
    for _ in range(2):
        with auditor:
            end = time.thread_time() + 0.05
            while time.thread_time() < end:
                pass
    told = auditor.to_json()
    assert told["looks"] == 2
    assert 100_000_000 <= told["cpu_ns"] < 1_000_000_000
    assert 0 < told["cpu_ns_per_s"] <= 1_000_000_000
    assert CpuSet.parse(told["ran_on"]) <= CpuSet.parse(told["allowed"]) <= CpuSet.of(ALL)


def test_a_run_that_never_began_has_an_error_and_no_verdict() -> None:
    doc = write_up([], error={"exit_code": 3, "message": "4 pCPUs wanted, 1 free"})
    assert (doc["verdict"], doc["vcpus"], doc["error"]["exit_code"]) == (None, [], 3)


def test_times_are_utc_and_the_host_is_named() -> None:
    doc = write_up([ended(a_look(), a_look())], cpu_us=12, notes=["it was paused"])
    assert (doc["started"], doc["ended"]) == ("2023-11-14T22:13:20.250Z", "2023-11-14T22:13:21.500Z")
    assert doc["boot_id"] == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert doc["kernel"] == os.uname().release
    assert doc["cpu_us"] == {"value": 12, "covers": "tree"}
    assert doc["notes"] == ["it was paused"]
    assert "0.25 s apart" in doc["unseen"]
    assert "at the start and end only" in write_up([], period_s=None)["unseen"]


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda doc: doc.update(extra=1), id="unknown key"),
        pytest.param(lambda doc: doc.pop("unseen"), id="missing key"),
        pytest.param(lambda doc: doc.update(verdict="fine"), id="another verdict"),
        pytest.param(lambda doc: doc["vcpus"][0].update(run_ns=5), id="a figure that does not say what it covers"),
        pytest.param(lambda doc: doc["vcpus"][0].update(pcpus=""), id="no pCPU"),
        pytest.param(lambda doc: doc.update(started="today"), id="no time"),
    ],
)
def test_the_schema_refuses_what_is_not_evidence(spoil: Callable[[dict[str, Any]], object]) -> None:
    doc = write_up([ended(a_look(), a_look())])
    spoil(doc)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(SCHEMA).validate(doc)


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


def test_the_summary_shows_each_vcpu_and_the_verdict_with_its_reasons() -> None:
    first = a_look(run_ns=0, wait_ns=0)
    killed = ended(first, None)
    killed.end(a_look(run_ns=1_250_000_000, wait_ns=2_000_000), None, int(signal.SIGKILL))
    doc = write_up([killed, ended(first, a_look())], circumstances=Circumstances(leftovers=1))
    lines = summary(doc).splitlines()
    assert lines[0].split()[:2] == ["vCPU", "pCPU"]
    assert lines[1].split()[-4:] == ["1.25", "2.0", "signal", "9"]
    assert lines[2].split()[-3:] == ["-", "-", "0"]
    assert lines[3] == "rt: tainted"
    assert lines[4].strip() == "1 process of the guest outlived its vCPUs and had to be ended"
    assert "\x1b" not in summary(doc)
    doc = write_up([killed], circumstances=Circumstances(occupied=(BUSY, BUSY.replace(pcpu=3, interrupts=None))))
    lines = summary(doc).splitlines()
    assert lines[2].split()[:3] == ["pCPU", "others", "s"]
    assert lines[3].split() == ["2", "0.5", "0", "20", "-", "100", "dev0", "cc0", "(70)"]
    assert lines[4].split() == ["3", "0.5", "on", "2", "0", "20", "-", "-", "cc0", "(70)"]
    assert "\x1b" in summary(doc, colour=True)


# Real processes


class Guest:
    """A pinned process that does one line of Python after the other, as it is told."""

    def __init__(self) -> None:
        source = "import os, sys, threading, time\nfor line in sys.stdin:\n    exec(line)\n    print(flush=True)"
        self.process = subprocess.Popen(
            [sys.executable, "-uc", f"import os\nos.sched_setaffinity(0, {{{PIN}}})\nprint()\n{source}"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pid = self.process.pid
        self.hear()
        self.record = VcpuRecord("rt", 0, CpuSet.of([PIN]), self.pid)
        self.record.start(evidence.look(self.pid))

    def hear(self) -> str:
        """Wait until it has done what it was told."""
        assert self.process.stdout
        return self.process.stdout.readline()

    def does(self, line: str) -> None:
        """Have it run *line*."""
        assert self.process.stdin
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        self.hear()

    def sample(self) -> None:
        """Look at it and at all below it."""
        self.record.sample(tree.descendants(self.pid))

    def end(self, number: int = 0) -> None:
        """End it as the keeper does: a look at the zombie, then wait4."""
        assert self.process.stdin
        if number:
            self.process.send_signal(number)
        else:
            self.process.stdin.close()
        os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        last = evidence.look(self.pid)
        _, status, usage = os.wait4(self.pid, 0)
        self.record.end(last, usage, status)
        self.process.returncode = os.waitstatus_to_exitcode(status)

    def verdict(self) -> evidence.Verdict:
        """Judge what was seen of it so far."""
        return evidence.verdict([self.record], None, Circumstances(), live=not self.record.ended)


@pytest.fixture
def guest() -> Iterator[Guest]:
    made = Guest()
    try:
        yield made
    finally:
        if made.process.returncode is None:
            tree.kill(tree.descendants(made.pid))
            made.process.kill()
            made.process.wait()
        assert made.process.stdin
        assert made.process.stdout
        made.process.stdout.close()


SPIN = "end = time.process_time() + {}\nwhile time.process_time() < end: pass"


def test_a_guest_that_stays_is_held_with_its_figures(guest: Guest) -> None:
    guest.does(f"exec({SPIN.format(0.1)!r})")
    guest.does(f"import subprocess; subprocess.run([sys.executable, '-c', {'import time;' + SPIN.format(0.1)!r}])")
    guest.sample()
    guest.end()
    doc = write_up([guest.record])
    (vcpu,) = doc["vcpus"]
    assert (doc["verdict"], doc["reasons"]) == ("held", [])
    assert (vcpu["pcpu"], vcpu["cpus_seen"], vcpu["looks"], vcpu["exit"]) == (PIN, str(PIN), 3, {"code": 0})
    assert vcpu["affinity"] == {"start": str(PIN), "end": str(PIN)}
    status = Path("/proc/self/status").read_text()
    nodes = status.partition("\nMems_allowed_list:\t")[2].partition("\n")[0] or None
    assert vcpu["mems"] == {"start": nodes, "end": nodes, "pages": None}
    assert vcpu["migrations"]["value"] in (0, None)
    if vcpu["run_ns"]["value"] is not None:
        assert 0.1 <= vcpu["run_ns"]["value"] / 1e9 < vcpu["user_s"]["value"] + vcpu["system_s"]["value"]
    assert guest.record.rusage
    assert vcpu["user_s"] == {"value": pytest.approx(guest.record.rusage.ru_utime, abs=1e-6), "covers": "tree"}
    assert vcpu["user_s"]["value"] + vcpu["system_s"]["value"] >= 0.2


def test_the_signal_that_ended_it_is_told(guest: Guest) -> None:
    guest.end(signal.SIGTERM)
    assert write_up([guest.record])["vcpus"][0]["exit"] == {"signal": int(signal.SIGTERM)}


@TWO
def test_a_guest_that_moves_itself_is_seen_while_it_is_away(guest: Guest) -> None:
    guest.does(f"os.sched_setaffinity(0, {{{OTHER}}})")
    guest.sample()
    (drift,) = guest.record.new_drifts()
    assert (drift.pid, drift.tid, drift.what, drift.cpus) == (guest.pid, guest.pid, "allowed", CpuSet.of([OTHER]))
    assert CpuSet.of([OTHER]) <= guest.record.seen
    assert guest.verdict().word == "broken"
    assert write_up([guest.record])["vcpus"][0]["drift"]["what"] == "allowed"


@TWO
def test_a_guest_that_was_away_and_came_back_is_told_by_the_kernels_count(guest: Guest) -> None:
    guest.does(f"os.sched_setaffinity(0, {{{OTHER}}}); os.sched_setaffinity(0, {{{PIN}}})")
    guest.end()
    if guest.record.migrations is None:
        pytest.skip("needs /proc/PID/sched")
    assert guest.record.drift is None
    assert guest.record.migrations == 2
    assert guest.verdict().reasons == ("vCPU 0 was moved to another CPU 2 times",)


@TWO
def test_a_thread_that_moves_is_seen_though_the_main_one_stays(guest: Guest) -> None:
    guest.does("stop = threading.Event(); went = threading.Event()")
    guest.does(f"go = lambda: (os.sched_setaffinity(0, {{{OTHER}}}), went.set(), stop.wait())")
    guest.does("threading.Thread(target=go).start(); went.wait()")
    guest.sample()
    (drift,) = guest.record.new_drifts()
    assert drift.pid == guest.pid != drift.tid
    assert guest.record.tasks == 2
    guest.does("stop.set()")


@TWO
def test_a_child_that_moves_is_seen_once_and_can_be_put_back(guest: Guest) -> None:
    guest.does("import subprocess; child = subprocess.Popen(['sleep', '30'])")
    guest.does(f"os.sched_setaffinity(child.pid, {{{PIN}, {OTHER}}})")
    guest.sample()
    (drift,) = guest.record.new_drifts()
    assert drift.cpus == CpuSet.of([PIN, OTHER])
    guest.sample()
    assert guest.record.new_drifts() == []

    assert drift.repin()
    assert os.sched_getaffinity(drift.pid) == {PIN}
    assert not drift.replace(start=drift.start - 1).repin()
    guest.sample()
    assert guest.record.new_drifts() == []
    assert guest.verdict().word == "broken"  # back in place, but it did happen

    guest.does(f"os.sched_setaffinity(child.pid, {{{OTHER}}})")
    guest.sample()
    assert len(guest.record.new_drifts()) == 1
    guest.does("child.kill(); child.wait()")
    assert not drift.repin()


@TWO
def test_a_task_whose_mask_is_right_again_but_has_not_run_since_is_seen(guest: Guest) -> None:
    # A sleeping task keeps the CPU it ran on last.
    guest.does("import subprocess; child = subprocess.Popen(['sleep', '30'])")
    source = f"import os, time; os.sched_setaffinity(0, {{{OTHER}}}); time.sleep(30)"
    for _ in range(20):
        guest.does(f"child.kill(); child.wait(); child = subprocess.Popen([sys.executable, '-c', {source!r}])")
        (member,) = tree.descendants(guest.pid)
        pid = member.pid
        until(lambda: os.sched_getaffinity(pid) == {OTHER})  # noqa: B023 - called before the next round
        until(lambda: tree.descendants(guest.pid)[0].state == "S")
        os.sched_setaffinity(member.pid, {PIN})
        stat = procfs.read_stat(member.pid)
        # On a busy CPU a sleeper may still be queued (the scheduler's delayed dequeue) and is moved with its mask.
        if stat is not None and stat.processor == OTHER:
            break
    (drift,) = evidence.find_drifts(tree.descendants(guest.pid), CpuSet.of([PIN]))
    assert (drift.what, drift.cpus) == ("ran", CpuSet.of([OTHER]))
    guest.does("child.kill(); child.wait()")


def test_a_process_that_is_gone_gives_an_empty_look(guest: Guest) -> None:
    guest.end()
    gone = evidence.look(guest.pid)
    assert gone == Look(mono_s=gone.mono_s)
    assert guest.record._figures()["user_s"]["covers"] == "tree"
    assert isinstance(guest.record.rusage, resource.struct_rusage)
