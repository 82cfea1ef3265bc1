"""``-v``: every worker's records with VM, vCPU and pCPU, none lost at a normal end; no cost where not asked for."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import Place

USABLE = sorted(os.sched_getaffinity(0))
RECORDS = """
import logging

def main():
    log = logging.getLogger("jobs")
    for number in range(1000):
        log.info("record %d", number)
    log.debug("only in detail")
    return RETURNED
"""


def launch(place: Place, folder: Path, *options: str, returned: str = "0") -> subprocess.CompletedProcess[str]:
    """Launch a Python guest that logs a thousand records."""
    (folder / "jobs.py").write_text(RECORDS.replace("RETURNED", returned))
    (folder / "s.toml").write_text('[[vm]]\nname = "box"\nvcpus = 1\npython = "jobs:main"\n')
    return place.run("launch", *options, str(folder / "s.toml"), cwd=folder)


pytestmark = pytest.mark.usefixtures("two_pcpus")


def test_all_of_a_thousand_records_arrive_in_order_and_say_who_speaks(place: Place, tmp_path: Path) -> None:
    done = launch(place, tmp_path, "-v")
    assert done.returncode == 0
    found = re.findall(r"^\S+ INFO +(\S+) pCPU (\d+): record (\d+)$", done.stderr, re.MULTILINE)
    assert [int(number) for _, _, number in found] == list(range(1000))
    assert {who for who, _, _ in found} == {"box/vcpu0"}
    assert f"box     0     {found[0][1]}" in done.stdout
    assert "only in detail" not in done.stderr


def test_twice_verbose_shows_debug_records_too(place: Place, tmp_path: Path) -> None:
    assert launch(place, tmp_path, "-vv").stderr.count("only in detail") == 1


def test_no_record_is_lost_where_the_guest_fails(place: Place, tmp_path: Path) -> None:
    done = launch(place, tmp_path, "-v", returned="1 / 0")
    assert done.returncode == 1
    assert done.stderr.count(": record ") == 1000
    assert "ZeroDivisionError" in done.stderr


def test_without_v_records_below_warning_go_nowhere(place: Place, tmp_path: Path) -> None:
    done = launch(place, tmp_path)
    assert done.returncode == 0
    assert "record" not in done.stderr


def test_a_commands_worker_says_where_it_was_pinned_before_it_became_the_command(place: Place) -> None:
    done = place.run("run", "-v", "--name", "box", "--", "sh", "-c", "echo $HOSTPART_PCPU")
    pcpu = done.stdout.strip()
    assert done.returncode == 0
    lines = [line for line in done.stderr.splitlines() if f"box/vcpu0 pCPU {pcpu}: " in line]
    assert f"pinned to [{pcpu}], runs on pCPU {pcpu}" in lines[0]
    assert lines[-1].endswith("START")
    assert "box: " in done.stderr  # the verdict


@pytest.mark.skipif(len(USABLE) < 3, reason="needs three usable pCPUs")
def test_records_of_several_workers_all_arrive(place: Place) -> None:
    done = place.run("run", "-v", "-n", "2", "--name", "box", "--", "true")
    assert set(re.findall(r"box/vcpu(\d)", done.stderr)) == {"0", "1"}


HEAVY = (
    "logging",
    "multiprocessing",
    "multiprocessing_logging",
    "psutil",
    "socket",
    "subprocess",
    "json",
    "tomllib",
    "typing",
    "pathlib",
    "contextlib",
    "dataclasses",
    "inspect",
    "shutil",
)


def test_a_plain_run_imports_nothing_that_it_does_not_need(place: Place) -> None:
    main = "import sys; from hostpart.__main__ import main; sys.exit(main())"
    command = [sys.executable, "-X", "importtime", "-I", "-S", "-c", f"import sys; sys.path[:0] = {sys.path!r}; {main}"]
    done = subprocess.run(
        [*command, "run", "--", "true"], env=place.env, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "hostpart.keeper" in imported
    assert imported.intersection(HEAVY) == set()
