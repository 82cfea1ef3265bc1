"""``hostpart plan`` and the command line's own manners: help, unknown words, completion."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from hostpart.cli import COMMANDS
from hostpart.cpuset import CpuSet
from hostpart.host import Host
from hostpart.topology import read_topology
from tests.conftest import Place

USABLE = CpuSet.of(os.sched_getaffinity(0))
EXIT_WORDS = "Exit status: "


@pytest.fixture
def four(tmp_path: Path) -> str:
    """A host of four cores, as ``topology --json`` prints one: this one's first pCPU, four times."""
    document = read_topology(Host()).to_json()
    [first, *_] = document["pcpus"]
    document["pcpus"] = [{**first, "cpu": n, "core": n, "online": True, "apic_id": n, "acpi_uid": n} for n in range(4)]
    document["usable"] = "0-3"
    path = tmp_path / "four.json"
    path.write_text(json.dumps(document))
    return str(path)


# -- plan ----------------------------------------------------------------------------------------------


def test_a_plan_says_where_each_vcpu_would_go_and_why(place: Place, four: str) -> None:
    done = place.run("plan", "example:four-core", "--host", four, "--json")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    seats = [(seat["vm"], seat["vcpu"], seat["pcpu"]) for seat in document["placement"]]
    assert seats == [("uos1", 0, 1), ("uos2", 0, 2), ("uos3", 0, 3)]
    assert (document["schema"], document["cpus"], document["idle"]) == (1, "1-3", "")
    assert document["why"]


def test_people_get_a_table_and_what_the_service_vm_keeps(place: Place, four: str) -> None:
    out = place.run("plan", "example:four-core", "--host", four).stdout.splitlines()
    assert out[0].split()[:3] == ["VM", "vCPU", "pCPU"]
    assert [line.split()[:3] for line in out[1:4]] == [["uos1", "0", "1"], ["uos2", "0", "2"], ["uos3", "0", "3"]]
    assert "service VM  pCPU 0" in out


@pytest.mark.parametrize(
    ("options", "cpus"),
    [
        (["-n", "2"], "1-2"),
        (["--pcpus", "3,1"], "1,3"),
        (["-n", "1", "--reserve", "1-2"], "3"),
        (["-n", "2", "--free", "2-3"], "2-3"),
        (["-n", "1", "--policy", "first-fit", "--smt", "shared"], "1"),
    ],
    ids=" ".join,
)
def test_one_request_is_planned_from_options(place: Place, four: str, options: list[str], cpus: str) -> None:
    done = place.run("plan", "--host", four, "--json", *options)
    assert (done.returncode, json.loads(done.stdout)["cpus"]) == (0, cpus)


def test_the_order_of_an_explicit_list_is_the_order_of_the_vcpus(place: Place, four: str) -> None:
    placement = json.loads(place.run("plan", "--host", four, "--json", "--pcpus", "3,1").stdout)["placement"]
    assert [seat["pcpu"] for seat in placement] == [3, 1]


def test_what_does_not_fit_gives_3_and_says_what_would(place: Place, four: str) -> None:
    done = place.run("plan", "--host", four, "-n", "4")
    assert (done.returncode, done.stdout) == (3, "")
    assert "4 pCPUs wanted, 3 free" in done.stderr
    assert "try: ask for 3" in done.stderr


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["example:first", "-n", "2"],
        ["example:no-such"],
        ["/no/such/file.toml"],
        ["-n", "1", "--host", "/no/such/host"],
        ["-n", "1", "--bogus"],
        ["-n", "1", "--free", "1-"],
        ["-n", "-1"],
    ],
    ids=" ".join,
)
def test_what_cannot_be_meant_gives_2_and_a_way_on(place: Place, args: list[str]) -> None:
    done = place.run("plan", *args)
    assert (done.returncode, done.stdout) == (2, "")
    assert "\ntry: " in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(len(USABLE) < 2, reason="needs two usable pCPUs")
def test_a_plan_knows_what_is_leased_now_and_leases_nothing_itself(place: Place) -> None:
    before = json.loads(place.run("plan", "-n", str(len(USABLE) - 1), "--json").stdout)
    assert place.is_clean()
    holder = place.start(
        "run", "-n", str(len(USABLE) - 1), "--smp", "--name", "box", "--", "sh", "-c", "echo; sleep 60"
    )
    assert holder.stdout
    holder.stdout.readline()
    done = place.run("plan", "-n", "1")
    assert done.returncode == 3
    assert before["cpus"] in done.stderr


# -- the command line ----------------------------------------------------------------------------------


def test_help_lists_every_command_and_the_exit_statuses(place: Place) -> None:
    done = place.run("--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert [name for name in COMMANDS if f"  {name} " not in done.stdout] == []
    assert EXIT_WORDS in done.stdout
    assert place.run("-h").stdout == done.stdout


@pytest.mark.parametrize("columns", ["80", ""])
@pytest.mark.parametrize("command", COMMANDS)
def test_the_help_of_a_command_fits_a_terminal_and_names_its_exit_statuses(
    place: Place, command: str, columns: str
) -> None:
    place.env["COLUMNS"] = columns
    done = place.run(command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert EXIT_WORDS in done.stdout
    assert [line for line in done.stdout.splitlines() if len(line) > 80] == []


def test_the_overview_fits_a_terminal(place: Place) -> None:
    assert [line for line in place.run("--help").stdout.splitlines() if len(line) > 80] == []


def test_without_a_command_the_help_is_an_error(place: Place) -> None:
    done = place.run()
    assert (done.returncode, done.stdout) == (2, "")
    assert "hostpart COMMAND" in done.stderr


@pytest.mark.parametrize(("word", "hint"), [("lunch", "launch"), ("resum", "resume"), ("xyzzy", "--help")])
def test_an_unknown_command_gives_2_and_a_hint(place: Place, word: str, hint: str) -> None:
    done = place.run(word)
    assert (done.returncode, done.stdout) == (2, "")
    assert hint in done.stderr


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "run"])
def test_an_unknown_option_gives_2(place: Place, command: str) -> None:
    done = place.run(command, "--no-such-option")
    assert (done.returncode, done.stdout) == (2, "")
    assert f"try: hostpart {command} --help" in done.stderr


def test_the_version_is_said(place: Place) -> None:
    done = place.run("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("hostpart ")


def test_a_reader_that_has_enough_ends_the_output_without_a_word(place: Place) -> None:
    process = place.start("completion", "bash")
    assert process.stdout
    process.stdout.close()
    assert process.stderr
    assert process.stderr.read() == ""
    assert process.wait(20) in (0, 141)


def test_python_m_hostpart_is_the_same_command(place: Place, tmp_path: Path) -> None:
    python = place.command[0]
    command = [python, "-m", "hostpart", "run", "--", "sh", "-c", "exit 9"]
    assert subprocess.run(command, env=place.env, cwd=tmp_path, timeout=60, check=False).returncode == 9
