"""``hostpart launch``: the whole flow of a scenario file, for people and for programs."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart import evidence
from hostpart.cpuset import CpuSet
from tests.conftest import Place, wait_until

SCHEMA: dict[str, Any] = json.loads(Path(evidence.__file__).with_name("evidence.schema.json").read_text())
USABLE = sorted(os.sched_getaffinity(0))
Write = Callable[..., str]
pytestmark = pytest.mark.usefixtures("two_pcpus")


@pytest.fixture
def scenario(tmp_path: Path) -> Write:
    """Write a scenario of one VM, ``box``, from the lines given; return the file's name."""

    def write(*lines: str, name: str = "box") -> str:
        path = tmp_path / f"{name}.toml"
        path.write_text("\n".join(["[[vm]]", f'name = "{name}"', "vcpus = 1", *lines, ""]))
        return str(path)

    return write


def events(text: str) -> list[dict[str, Any]]:
    """Return the events of ``--json``."""
    return [json.loads(line) for line in text.splitlines()]


def names_of(place: Place) -> list[str]:
    """Return the VMs that ``ps --names`` lists."""
    return place.run("ps", "--names").stdout.split()


# -- the whole flow ------------------------------------------------------------------------------------


def test_the_first_example_boots_releases_creates_runs_and_shows(place: Place) -> None:
    done = place.run("launch", "example:first")
    assert done.returncode == 0
    out = done.stdout
    steps = [
        "service VM booted with",
        "read its pin back and ran there: yes",
        "service VM released pCPU",
        "user VM 'uos1' created",
    ]
    steps += ["uos1 vCPU 0 of ", "uos1: "]
    assert sorted(steps, key=out.index) == steps
    assert place.is_clean()


def test_the_pins_in_json_agree_with_the_kernel_while_the_guests_run(place: Place, scenario: Write) -> None:
    process = place.start("launch", "--json", scenario('command = ["sleep", "60"]'))
    assert process.stdout
    seen = []
    for line in process.stdout:
        seen.append(json.loads(line))
        if seen[-1]["event"] == "ready":
            break
    booted = next(event for event in seen if event["event"] == "booted")
    assert CpuSet.of(vcpu["pcpu"] for vcpu in booted["vcpus"]) == CpuSet.of(USABLE)
    assert [vcpu["ran_on"] for vcpu in booted["vcpus"]] == [vcpu["pcpu"] for vcpu in booted["vcpus"]]
    kept = CpuSet.parse(booted["kept"])
    [vcpu] = seen[-1]["vcpus"]
    assert os.sched_getaffinity(vcpu["pid"]) == {vcpu["pcpu"]}
    said = subprocess.run(["taskset", "-cp", str(vcpu["pid"])], capture_output=True, text=True, check=True).stdout
    assert said.rpartition(": ")[2].strip() == str(vcpu["pcpu"])
    # What was released is no vCPU of the service VM any more; what it keeps still is.
    for service in booted["vcpus"]:
        if service["pcpu"] in kept:
            assert os.sched_getaffinity(service["pid"]) == {service["pcpu"]}
        else:
            assert vcpu["pcpu"] != service["pcpu"] or not os.path.exists(f"/proc/{service['pid']}")
    assert vcpu["pcpu"] not in kept
    assert os.sched_getaffinity(process.pid) <= set(kept)
    process.terminate()
    rest = events(process.stdout.read())
    assert process.wait(20) == 128 + signal.SIGTERM
    [ended] = [event for event in rest if event["event"] == "ended"]
    jsonschema.Draft202012Validator(SCHEMA).validate(ended["evidence"])
    assert ended["evidence"]["vcpus"][0]["exit"] == {"signal": signal.SIGTERM}
    assert place.is_clean()


@pytest.mark.parametrize("command", [("launch", "example:first"), ("topology",)])
def test_output_that_has_no_room_is_an_error_and_nothing_is_left(place: Place, command: tuple[str, ...]) -> None:
    with open("/dev/full", "w") as full:
        process = place.start(*command, stdout=full)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 1
    assert "standard output can't be written: No space left on device\ntry: make room" in said
    assert "Traceback" not in said
    assert place.is_clean()


def test_with_json_stdout_is_json_lines_and_the_guests_write_to_stderr(place: Place, scenario: Write) -> None:
    done = place.run("launch", "--json", scenario('command = ["sh", "-c", "echo to stdout; echo to stderr >&2"]'))
    assert done.returncode == 0
    assert [event["event"] for event in events(done.stdout)] == ["booted", "released", "ready", "ended"]
    assert sorted(done.stderr.splitlines())[-2:] == ["to stderr", "to stdout"]


def test_a_guest_that_fails_makes_the_launch_fail(place: Place, scenario: Write) -> None:
    done = place.run("launch", scenario('command = ["sh", "-c", "exit 7"]'))
    assert done.returncode == 1
    assert place.is_clean()


def test_a_guest_command_that_is_not_there_is_named_and_makes_the_launch_fail(place: Place, scenario: Write) -> None:
    done = place.run("launch", scenario('command = ["no-such-command-1"]'))
    assert done.returncode == 1
    assert "'box'" in done.stderr
    assert "No such file" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_guest_and_leaves_nothing(place: Place, scenario: Write, number: signal.Signals) -> None:
    process = place.start("launch", "--json", scenario('command = ["sh", "-c", "sleep 60 & wait"]'))
    assert process.stdout
    ready: dict[str, Any] = {}
    while ready.get("event") != "ready":
        ready = json.loads(process.stdout.readline())
    process.send_signal(number)
    assert process.wait(20) == 128 + number
    assert not os.path.exists(f"/proc/{ready['vcpus'][0]['pid']}")
    assert place.is_clean()


def test_an_interrupt_that_comes_together_with_the_guests_end_is_the_outcome(place: Place, scenario: Write) -> None:
    parent = "cut -d' ' -f4"
    script = f"kill -INT $({parent} /proc/$({parent} /proc/$$/stat)/stat); kill -INT $$"
    assert place.run("launch", scenario(f'command = ["sh", "-c", "{script}"]')).returncode == 128 + signal.SIGINT
    assert place.is_clean()


def test_a_signal_while_it_waits_for_pcpus_leaves_nothing_and_no_guest_has_run(place: Place, scenario: Write) -> None:
    holder = place.start("run", "-n", str(len(USABLE) - 1), "--smp", "--", "sh", "-c", "echo ready; sleep 60")
    assert holder.stdout
    holder.stdout.readline()
    process = place.start("launch", scenario('command = ["echo", "it ran"]'), "--wait")
    assert process.stderr
    assert "waits for pCPUs" in process.stderr.readline()
    process.terminate()
    out, _ = process.communicate(timeout=20)
    assert process.returncode == 128 + signal.SIGTERM
    assert "it ran" not in out
    holder.terminate()
    holder.wait(20)
    assert place.is_clean()


# -- what the guest is given ---------------------------------------------------------------------------


def test_directory_and_environment_are_the_vms_own(place: Place, scenario: Write, tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    file = scenario(
        'command = ["sh", "-c", "pwd; echo $GREETING $HOSTPART_VM $KEPT"]',
        f'cwd = "{tmp_path / "there"}"',
        'env = { GREETING = "hi" }',
    )
    place.env["KEPT"] = "kept"
    done = place.run("launch", "--json", file)
    assert done.stderr.splitlines()[-2:] == [str(tmp_path / "there"), "hi box kept"]


def test_a_directory_that_is_not_there_is_refused_before_any_guest_runs(place: Place, scenario: Write) -> None:
    done = place.run("launch", scenario('command = ["echo", "it ran"]', 'cwd = "/no/such/folder"'))
    assert done.returncode == 2
    assert "/no/such/folder" in done.stderr
    assert "it ran" not in done.stdout
    assert place.is_clean()


def test_an_smp_guest_is_one_process_over_the_vms_pcpus(place: Place, scenario: Write) -> None:
    done = place.run(
        "launch",
        "--json",
        scenario('smp = ["sh", "-c", "echo $OMP_PLACES; sed -n s/^Cpus_allowed_list:.//p /proc/self/status"]'),
    )
    ready = next(event for event in events(done.stdout) if event["event"] == "ready")
    pcpu = ready["vcpus"][0]["pcpu"]
    assert done.stderr.split()[-2:] == [f"{{{pcpu}}}", str(pcpu)]


def test_a_python_guest_is_the_users_even_where_a_package_is_called_workers(
    place: Place, scenario: Write, tmp_path: Path
) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise_if_imported_by_hostpart = True\n")
    (tmp_path / "workers" / "jobs.py").write_text(
        "import workers\n\ndef main():\n    print('mine:', workers.raise_if_imported_by_hostpart)\n"
    )
    command = [sys.executable, "-m", "hostpart", "launch", "--json", scenario('python = "workers.jobs:main"')]
    done = subprocess.run(command, cwd=tmp_path, env=place.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "mine: True"


def test_a_folder_called_workers_is_the_users_also_without_an_init_file(
    place: Place, scenario: Write, tmp_path: Path
) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "jobs.py").write_text("def main():\n    print('mine')\n")
    command = [sys.executable, "-m", "hostpart", "launch", "--json", scenario('python = "workers.jobs:main"')]
    done = subprocess.run(command, cwd=tmp_path, env=place.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "mine"


def test_a_shipped_python_guest_runs_also_from_a_folder_with_a_package_called_workers(
    place: Place, tmp_path: Path
) -> None:
    (tmp_path / "workers").mkdir()
    (tmp_path / "workers" / "__init__.py").write_text("raise RuntimeError('not this one')\n")
    command = [sys.executable, "-m", "hostpart", "launch", "example:first"]
    done = subprocess.run(command, cwd=tmp_path, env=place.env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr


# -- what does not fit ---------------------------------------------------------------------------------


def test_the_four_core_example_runs_or_says_what_would_fit(place: Place) -> None:
    done = place.run("launch", "example:four-core")
    if len(USABLE) >= 4:
        assert done.returncode == 0
        return
    assert (done.returncode, done.stdout) == (3, "")
    assert "3 pCPUs wanted" in done.stderr
    assert "launch only uos1" in done.stderr
    assert place.is_clean()


@pytest.mark.parametrize(
    "command", [["launch", "example:first"], ["plan", "example:first"], ["run", "--", "true"]], ids=lambda c: c[0]
)
def test_with_one_usable_pcpu_the_error_says_why_nothing_can_be_released(place: Place, command: list[str]) -> None:
    place.command = ["taskset", "-c", str(USABLE[0]), *place.command]
    done = place.run(*command)
    assert (done.returncode, done.stdout) == (125 if command[0] == "run" else 3, "")
    assert "only usable pCPU" in done.stderr
    assert "nothing can be released" in done.stderr
    assert "two or more usable pCPUs" in done.stderr


def test_a_required_isolation_that_is_out_of_reach_changes_nothing(place: Place, scenario: Write) -> None:
    done = place.run("launch", "--isolation", "full", "--require", scenario('command = ["echo", "it ran"]'))
    assert (done.returncode, done.stdout) == (4, "")
    assert place.is_clean()


def test_all_faults_of_a_file_are_said_at_once_and_nothing_runs(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "bad.toml"
    file.write_text('[[vm]]\nname = "BAD"\nvcpus = 0\ncolour = 1\ncommand = ["echo", "it ran"]\n')
    done = place.run("launch", str(file))
    assert (done.returncode, done.stdout) == (2, "")
    assert all(key in done.stderr for key in ("vm[0].name", "vm[0].vcpus", "vm[0].colour"))


def test_two_vms_of_one_name_cannot_run(place: Place, scenario: Write) -> None:
    file = scenario('command = ["sleep", "60"]')
    assert place.run("launch", "-d", file).returncode == 0
    again = place.run("run", "--name", "box", "--pcpus", str(USABLE[0]), "--", "echo", "it ran")
    place.run("stop", "-t", "0", "box")
    assert (again.returncode, again.stdout) == (125, "")


# -- only looking --------------------------------------------------------------------------------------


def test_a_dry_run_shows_the_placement_and_changes_nothing(place: Place, scenario: Write) -> None:
    file = scenario('command = ["sh", "-c", "echo it ran"]')
    done = place.run("launch", "--dry-run", "--json", file)
    assert done.returncode == 0
    [seat] = json.loads(done.stdout)["placement"]
    assert (seat["vm"], seat["vcpu"]) == ("box", 0)
    assert seat["pcpu"] in USABLE[1:]
    assert "it ran" not in done.stdout
    assert list(place.runtime.glob("*.sock")) == []
    assert place.is_clean()


# -- results -------------------------------------------------------------------------------------------


def test_results_are_a_file_of_evidence_per_vm(place: Place, scenario: Write, tmp_path: Path) -> None:
    done = place.run("launch", "--results", str(tmp_path / "out" / "here"), scenario('command = ["true"]'))
    assert done.returncode == 0
    document = json.loads((tmp_path / "out" / "here" / "box.json").read_text())
    jsonschema.Draft202012Validator(SCHEMA).validate(document)
    assert document["vm"] == "box"


def test_results_that_cannot_be_written_are_refused_before_any_guest_runs(place: Place, scenario: Write) -> None:
    done = place.run("launch", "--results", "/proc/nowhere", scenario('command = ["echo", "it ran"]'))
    assert done.returncode == 2
    assert "it ran" not in done.stdout


def test_strict_gives_5_where_a_guest_left_its_pcpu(place: Place, scenario: Write) -> None:
    code = "import os, time; os.sched_setaffinity(0, range(1024)); time.sleep(0.6)"
    file = scenario(f"command = {json.dumps([sys.executable, '-S', '-c', code])}")
    assert place.run("launch", file).returncode == 0
    assert place.run("launch", "--strict", file).returncode == 5


# -- in the background ---------------------------------------------------------------------------------


def test_detached_guests_go_on_and_are_managed_from_other_processes(place: Place, scenario: Write) -> None:
    file = scenario('command = ["sh", "-c", "echo to stdout; echo to stderr >&2; sleep 60"]')
    done = place.run("launch", "-d", "--json", file)  # returns, although a pipe has its stdout
    assert done.returncode == 0, done.stderr
    [ready] = events(done.stdout)
    pid = ready["vcpus"][0]["pid"]
    assert os.getsid(pid) not in (os.getsid(0), pid)
    assert names_of(place) == ["box"]
    log = Path(json.loads(place.run("ps", "--json").stdout)["vms"][-1]["log"])
    assert wait_until(lambda: log.read_text() == "to stdout\nto stderr\n")
    assert log.stat().st_mode & 0o077 == 0
    assert str(log) in place.run("show", "box").stdout
    stopped = place.run("stop", "box")
    assert stopped.returncode == 0
    assert not os.path.exists(f"/proc/{pid}")
    assert wait_until(place.is_clean)  # the service VM goes after its last guest
    assert '"verdict"' in log.read_text()


def test_a_second_launch_of_a_running_vm_leaves_its_output_alone(place: Place, scenario: Write) -> None:
    file = scenario('command = ["sh", "-c", "echo the first; sleep 60"]')
    assert place.run("launch", "-d", file).returncode == 0
    [log] = (place.runtime / "log").glob("*")
    assert wait_until(lambda: "the first\n" in log.read_text())
    before = log.read_text()
    again = place.run("launch", "-d", file)
    assert again.returncode != 0
    assert "try: " in again.stderr
    assert log.read_text() == before
    assert place.run("stop", "-t", "0", "box").returncode == 0
    assert wait_until(place.is_clean)
    assert place.run("launch", "-d", scenario('command = ["true"]')).returncode == 0
    assert wait_until(place.is_clean)
    assert "the first" not in log.read_text()


def test_a_detached_launch_that_fails_says_why_at_the_terminal(place: Place, tmp_path: Path) -> None:
    file = tmp_path / "s.toml"
    file.write_text(
        textwrap.dedent("""
        [[vm]]
        name = "box"
        vcpus = 1
        command = ["true"]
        cwd = "/no/such/folder"
    """)
    )
    done = place.run("launch", "-d", str(file))
    assert done.returncode == 2
    assert "/no/such/folder" in done.stderr
    assert wait_until(place.is_clean)


def test_an_unprivileged_user_can_launch_the_first_example(nobodys_place: Place) -> None:
    done = nobodys_place.run("launch", "example:first", cwd="/")
    assert done.returncode == 0, done.stderr
    assert "uos1 vCPU 0 of " in done.stdout


_FROM_PYTHON = """
import os, signal, sys, threading
import hostpart
before = os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, ())
ended = hostpart.launch(hostpart.parse_scenario(sys.argv[1], "here"))
assert (os.sched_getaffinity(0), signal.pthread_sigmask(signal.SIG_BLOCK, ())) == before
print(ended["rt"]["vcpus"][0]["cpus_seen"], ended["rt"]["vcpus"][0]["exit"])
stop = threading.Event()
thread = threading.Thread(target=stop.wait)
thread.start()
try:
    hostpart.launch(hostpart.parse_scenario(sys.argv[1], "here"))
except RuntimeError as error:
    print(error)
finally:
    stop.set()
"""


@pytest.mark.usefixtures("two_pcpus")
def test_a_scenario_is_launched_from_python_and_the_caller_is_as_before(place: Place) -> None:
    text = '[[vm]]\nname = "rt"\nvcpus = 1\ncommand = ["sh", "-c", "exit 3"]\n'
    done = subprocess.run(
        [sys.executable, "-c", _FROM_PYTHON, text], env=place.env, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    first, second = done.stdout.splitlines()
    assert re.fullmatch(r"\d+ {'code': 3}", first)
    assert "has threads" in second
    assert place.is_clean()
