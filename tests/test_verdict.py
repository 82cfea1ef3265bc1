"""The verdict of real runs on real pCPUs, with something planted that must not be there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.conftest import Place, wait_until
from tests.evidence_file import SCHEMA, about, document

# On the machine that runs the tests others run everywhere. What they take is not what these tests are about.
ANY_LOAD = ("--foreign-limit", "100")


def python(code: str) -> list[str]:
    """Return a command that runs *code*."""
    return [sys.executable, "-c", code]


SPIN = "import os, time\nos.sched_setaffinity(0, {{{}}})\nprint(flush=True)\nwhile True: pass"


@pytest.fixture
def spinner(pcpu: int) -> Iterator[int]:
    """The pid of a process that spins on the test's pCPU and is no guest's."""
    process = subprocess.Popen(python(SPIN.format(pcpu)), stdout=subprocess.PIPE)
    assert process.stdout
    process.stdout.readline()
    yield process.pid
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_guest_that_stays_is_held_for_whoever_minds_no_load(place: Place, pcpu: int, tmp_path: Path) -> None:
    busy = "import time\nend = time.monotonic() + 1\nwhile time.monotonic() < end: pass"
    path = tmp_path / "e.json"
    done = place.run("run", "--strict", *ANY_LOAD, "--pcpus", str(pcpu), "--evidence", str(path), "--", *python(busy))
    doc = document(path)
    # Another program may be pinned to that pCPU alone just now; nothing else may be the matter.
    others = about(doc, "foreign processes may run on")
    assert doc["reasons"] == others
    assert done.returncode == (5 if others else 0), done.stderr
    assert doc["foreign_limit_percent"] == 100
    (own,) = doc["pcpus"]
    assert own["pcpu"] == pcpu
    assert own["other_ns"]["over"] == str(pcpu)
    assert 0 <= own["tasks_ns"]["value"] <= own["other_ns"]["value"] < own["interval_s"] * 1e9
    assert {line["source"] for line in own["interrupts"]} != set()
    assert doc["vcpus"][0]["mems"]["start"] == doc["vcpus"][0]["mems"]["end"]


def test_a_foreign_task_on_the_pcpu_taints_and_is_named(place: Place, pcpu: int, spinner: int, tmp_path: Path) -> None:
    busy = "import time\nend = time.monotonic() + 2\nwhile time.monotonic() < end: pass"
    path = tmp_path / "e.json"
    done = place.run("run", "--strict", "--pcpus", str(pcpu), "--evidence", str(path), "--", *python(busy))
    assert done.returncode == 5
    doc = document(path)
    assert doc["verdict"] == "tainted"
    (reason,) = about(doc, "others ran", f"on pCPU {pcpu}")
    (own,) = doc["pcpus"]
    tasks = {task["pid"]: task for task in own["foreign_tasks"]}
    assert spinner in tasks
    assert tasks[spinner]["run_ns"] > 50_000_000
    assert not tasks[spinner]["kernel"]
    # At least a fifth of what is left beside a guest that spins as well, whoever else wants the pCPU.
    assert own["other_ns"]["value"] > 100_000_000
    assert "(pid " in reason


def test_a_foreign_task_is_named_also_where_the_run_is_too_short_for_many_looks(
    place: Place, pcpu: int, spinner: int, tmp_path: Path
) -> None:
    path = tmp_path / "e.json"
    named = False
    for _ in range(5):  # where many share the pCPU, ten others may have had more of so short a time
        place.run("run", "--pcpus", str(pcpu), "--evidence", str(path), "--", "sleep", "0.2")
        doc = document(path)
        assert about(doc, "others ran", f"on pCPU {pcpu}")
        named = named or spinner in {task["pid"] for task in doc["pcpus"][0]["foreign_tasks"]}
    assert named


def test_the_guests_own_processes_are_never_foreign(place: Place, pcpu: int, tmp_path: Path) -> None:
    # A child that is waited for, one that outlives its parent, a thread: all burn, none is another's.
    burn = "def burn():\n    end = time.process_time() + 0.3\n    while time.process_time() < end: pass\n"
    code = (
        f"import os, threading, time\n{burn}"
        "first = os.fork()\n"
        "if not first: print(os.getpid(), flush=True); burn(); os._exit(0)\n"
        "os.waitpid(first, 0)\n"
        "middle = os.fork()\n"
        "if not middle:\n"
        "    if not os.fork(): print(os.getpid(), flush=True); burn(); os._exit(0)\n"
        "    os._exit(0)\n"
        "os.waitpid(middle, 0)\n"
        "one = threading.Thread(target=burn); one.start(); one.join()\n"
        "print(os.getpid(), flush=True); time.sleep(0.3)"
    )
    path = tmp_path / "e.json"
    done = place.run("run", "--pcpus", str(pcpu), "--evidence", str(path), "--", *python(code))
    doc = document(path)
    own = set(map(int, done.stdout.split()))
    assert len(own) == 3
    assert not own & {task["pid"] for task in doc["pcpus"][0]["foreign_tasks"]}


BURN = (
    "import os, signal, time\n"
    "def burn():\n    end = time.process_time() + 1\n    while time.process_time() < end: pass\n    os._exit(0)\n"
)


def test_an_orphans_time_is_the_guests_also_without_a_cgroup(nobodys_place: Place, pcpu: int) -> None:
    # Its parent has ended at once; the VM ends when the vCPU's process does, which waits for a sign of the orphan's.
    code = (
        f"{BURN}read, write = os.pipe()\n"
        "middle = os.fork()\n"
        "if not middle:\n    if not os.fork(): burn()\n    os._exit(0)\n"
        "os.waitpid(middle, 0); os.close(write); os.read(read, 1); time.sleep(0.1)"
    )
    path = nobodys_place.runtime / "e.json"
    done = nobodys_place.run(
        "run", "--pcpus", str(pcpu), "--evidence", str(path), "--", "/usr/bin/python3", "-c", code, cwd="/"
    )
    assert done.returncode == 0, done.stderr
    (own,) = document(path)["pcpus"]
    assert own["other_ns"]["guest_from"] == "tree"
    assert own["other_ns"]["value"] < (own["interval_s"] - 0.95) * 1e9


@pytest.mark.parametrize("who", ["place", "nobodys_place"])
def test_children_that_nobody_waits_for_are_never_taken_for_others(
    who: str, request: pytest.FixtureRequest, pcpu: int
) -> None:
    here: Place = request.getfixturevalue(who)
    code = (
        f"{BURN}signal.signal(signal.SIGCHLD, signal.SIG_IGN)\n"
        "for _ in range(2):\n"
        "    if not os.fork(): burn()\n"
        "try:\n    os.wait()\nexcept ChildProcessError: pass"  # returns when there is no child any more
    )
    path = here.runtime / "e.json"
    here.run("run", "--pcpus", str(pcpu), "--evidence", str(path), "--", "/usr/bin/python3", "-c", code, cwd="/")
    doc = document(path)
    (own,) = doc["pcpus"]
    if own["other_ns"]["guest_from"] == "tree":
        # The kernel has forgotten how long they ran: then others can't be ruled out, whoever was found.
        assert own["other_ns"]["value"] is None
        assert about(doc, "how long others ran", "is not known") or about(doc, "others ran up to")
    else:
        assert own["other_ns"]["value"] < (own["interval_s"] - 1.95) * 1e9


def test_an_auditor_that_was_stopped_is_found_out(place: Place, pcpu: int, tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    front = place.start(
        "run", *ANY_LOAD, "--name", "box", "--pcpus", str(pcpu), "--evidence", str(path), "--", "sleep", "4"
    )
    assert wait_until(lambda: _vm(place, "box").get("state") == "RUNNING")
    keeper = _vm(place, "box")["keeper"]
    os.kill(keeper, signal.SIGSTOP)
    time.sleep(2.2)
    os.kill(keeper, signal.SIGCONT)
    assert front.wait(30) == 0
    doc = document(path)
    assert doc["verdict"] == "tainted"
    assert about(doc, "vCPU 0 was not looked at for", "where a look every 0.25 s was meant")


@pytest.mark.usefixtures("two_pcpus")
def test_a_child_that_leaves_its_pcpu_for_longer_than_the_period_is_named(
    place: Place, pcpu: int, tmp_path: Path
) -> None:
    code = (
        "import os, time\n"
        "home = os.sched_getaffinity(0)\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    print(os.getpid(), flush=True)\n"
        "    os.sched_setaffinity(0, range(1024)); time.sleep(0.8); os.sched_setaffinity(0, home); os._exit(0)\n"
        "os.waitpid(child, 0)"
    )
    path = tmp_path / "e.json"
    done = place.run("run", "--strict", *ANY_LOAD, "--pcpus", str(pcpu), "--evidence", str(path), "--", *python(code))
    assert done.returncode == 5
    doc = document(path)
    assert doc["verdict"] == "broken"
    assert about(doc, f"(pid {int(done.stdout)})", "was allowed on CPUs")
    assert doc["sampling_period_s"] < 0.8


@pytest.mark.usefixtures("two_pcpus")
def test_a_guest_that_was_moved_and_put_back_between_two_looks_is_named(
    place: Place, pcpu: int, tmp_path: Path
) -> None:
    code = (
        "import os\n"
        "home = os.sched_getaffinity(0); away = set(range(1024)) - home\n"
        "os.sched_setaffinity(0, away); os.sched_setaffinity(0, home)"
    )
    path = tmp_path / "e.json"
    place.run("run", *ANY_LOAD, "--pcpus", str(pcpu), "--evidence", str(path), "--", *python(code))
    doc = document(path)
    if doc["vcpus"][0]["migrations"]["value"] is None:
        pytest.skip("needs /proc/PID/sched")
    assert doc["verdict"] == "broken"
    assert about(doc, "was moved to another CPU 2 times")


def test_an_audit_from_outside_names_a_foreign_task_and_stays_off_the_pcpu(
    place: Place, pcpu: int, spinner: int
) -> None:
    place.start("run", "--name", "box", "--pcpus", str(pcpu), "--", "sleep", "60")
    assert wait_until(lambda: _vm(place, "box").get("state") == "RUNNING")
    done = place.run("audit", "--strict", "--json", "--interval", "0.6")
    assert done.returncode == 5
    (doc,) = json.loads(done.stdout)["vms"]
    jsonschema.Draft202012Validator(SCHEMA).validate(doc)
    assert about(doc, "others ran", f"on pCPU {pcpu}")
    tasks = {task["pid"]: task for task in doc["pcpus"][0]["foreign_tasks"]}
    assert tasks[spinner]["run_ns"] > 0
    if len(os.sched_getaffinity(0)) > 1:
        assert str(pcpu) not in doc["auditor"]["ran_on"].split(",")
        assert str(pcpu) not in doc["auditor"]["allowed"].split(",")


@pytest.mark.usefixtures("two_pcpus")
def test_the_auditor_says_what_it_cost_and_was_never_on_the_guests_pcpu(
    place: Place, pcpu: int, tmp_path: Path
) -> None:
    path = tmp_path / "e.json"
    place.run("run", "--pcpus", str(pcpu), "--evidence", str(path), "--", "sleep", "1.2")
    auditor = document(path)["auditor"]
    assert auditor["looks"] >= 3
    assert auditor["cpu_ns"] > 0
    assert 0 < auditor["cpu_ns_per_s"] < 500_000_000
    assert not {str(pcpu)} & {auditor["ran_on"], auditor["allowed"]}


def test_show_tells_of_the_pcpus_while_the_vm_runs(place: Place, pcpu: int) -> None:
    place.start("run", "--name", "box", "--pcpus", str(pcpu), "--", "sleep", "60")
    assert wait_until(lambda: _vm(place, "box").get("state") == "RUNNING")
    (own,) = json.loads(place.run("show", "box", "--json").stdout)["evidence"]["pcpus"]
    assert (own["pcpu"], own["other_ns"]["over"]) == (pcpu, str(pcpu))
    assert "top task" in place.run("show", "box").stdout


@pytest.mark.parametrize("value", ["-1", "101", "nan", "many"])
def test_a_limit_that_is_no_share_is_refused(place: Place, value: str) -> None:
    done = place.run("audit", f"--foreign-limit={value}")
    assert done.returncode == 2
    assert "percent from 0 to 100" in done.stderr


@pytest.mark.parametrize(("options", "limit"), [([], 7.5), (["--foreign-limit", "100"], 100)], ids=["file", "option"])
def test_the_limit_of_a_scenario_is_its_vms_unless_an_option_says_otherwise(
    place: Place, tmp_path: Path, options: list[str], limit: float
) -> None:
    file = tmp_path / "one.toml"
    file.write_text('[[vm]]\nname = "one"\nvcpus = 1\nforeign_limit = 7.5\ncommand = ["true"]\n')
    done = place.run("launch", *options, "--results", str(tmp_path), str(file))
    assert done.returncode == 0, done.stderr
    assert document(tmp_path / "one.json")["foreign_limit_percent"] == limit


def _vm(place: Place, name: str) -> dict[str, Any]:
    vms = json.loads(place.run("ps", "--json").stdout)["vms"]
    return next((vm for vm in vms if vm["vm"] == name), {})
