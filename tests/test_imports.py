"""What the way of `hostpart run` imports, and what it must not: import time is most of what a short command costs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

# Each takes as long to import as several of hostpart's own modules, or brings in others that do.
COSTLY = [
    "contextlib",
    "ctypes",
    "dataclasses",
    "datetime",
    "inspect",
    "json",
    "locale",
    "logging",
    "multiprocessing",
    "multiprocessing_logging",
    "pathlib",
    "psutil",
    "shutil",
    "socket",
    "sqlite3",
    "subprocess",
    "threading",
    "tomllib",
    "traceback",
    "typing",
]


@pytest.fixture(scope="module")
def imported_by_run(tmp_path_factory: pytest.TempPathFactory) -> frozenset[str]:
    """Every module that any process of `hostpart run -- true` imports, as the interpreter itself reports it."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "leases").mkdir()
    (folder / "run").mkdir(mode=0o700)
    # Without site: what the .pth files of an installation import is not hostpart's doing.
    main = "from hostpart.__main__ import main; main()"
    command = [sys.executable, "-S", "-X", "importtime", "-c", main, "run", "--", "true"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPART_")}
    environment |= {
        "HOSTPART_LEASE_DIR": str(folder / "leases"),
        "HOSTPART_RUNTIME_DIR": str(folder / "run"),
        "PYTHONPATH": os.path.dirname(os.path.dirname(os.path.abspath(__file__))),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    return frozenset(line.rpartition("|")[2].strip() for line in lines)


@pytest.mark.parametrize("module", COSTLY)
def test_run_does_not_import(module: str, imported_by_run: frozenset[str]) -> None:
    assert module not in imported_by_run


def test_the_whole_way_of_run_was_seen(imported_by_run: frozenset[str]) -> None:
    # Of the front, of its keeper and of the worker: else the tests above would pass for want of a look.
    assert {"hostpart.cli.run", "hostpart.front", "hostpart.keeper", "workers.vcpu", "resource"} <= imported_by_run


def test_nothing_of_a_command_that_is_not_run_is_imported(imported_by_run: frozenset[str]) -> None:
    commands = {name for name in imported_by_run if name.startswith("hostpart.cli.")}
    assert commands == {"hostpart.cli.run", "hostpart.cli.options"}


def test_no_probe_is_imported_for_a_command(imported_by_run: frozenset[str]) -> None:
    assert {name for name in imported_by_run if name.startswith("workers.probes")} == set()


@pytest.mark.parametrize(
    "module",
    [
        "workers", "workers.vcpu", "workers.guest", "workers.log", "workers.probes.hello", "workers.probes.measurement",
        "workers.probes.tools",
    ],
)  # fmt: skip
def test_workers_import_nothing_of_hostpart(module: str) -> None:
    code = f"import sys, {module}; print(*(name for name in sys.modules if name.partition('.')[0] == 'hostpart'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.split()) == (0, []), done.stderr
