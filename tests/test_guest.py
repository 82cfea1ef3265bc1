"""What a worker becomes: a command found as a shell finds it, or a Python function that ends as a program does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import textwrap
from pathlib import Path
from typing import NoReturn

import pytest

from tests.conftest import Place
from workers.guest import Command, Python
from workers.vcpu import NOT_EXECUTABLE, NOT_FOUND, Order, settle_signals


def fork_guest(order: Order) -> tuple[int, str]:
    """Run the order's guest in a child, as a worker does after START; return its wait status and what it told."""
    read, write = os.pipe()
    order.status_fd = write
    pid = os.fork()
    if not pid:
        os.close(read)
        try:
            order.guest(order)
        finally:
            os._exit(99)
    os.close(write)
    _, status = os.waitpid(pid, 0)
    with open(read, encoding="ascii") as file:
        return status, file.read()


def order_of(*argv: str, environ: dict[str, str] | None = None) -> Order:
    """Return the order for a command."""
    environ = dict(os.environ) if environ is None else environ
    return Order("box", 0, frozenset({0}), Command(argv), environ=environ, status_fd=-1, start_fd=-1)


def make(path: Path, text: str, mode: int = 0o755) -> Path:
    """Write a script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(mode)
    return path


def test_a_command_is_looked_for_in_the_guests_path_not_in_hostparts(tmp_path: Path) -> None:
    make(tmp_path / "bin" / "tool-1", "#!/bin/sh\nexit 5\n")
    status, told = fork_guest(order_of("tool-1", environ={"PATH": f"/no/such:{tmp_path / 'bin'}"}))
    assert (os.waitstatus_to_exitcode(status), told) == (5, "")
    status, told = fork_guest(order_of("tool-1"))
    assert (os.waitstatus_to_exitcode(status), told) == (NOT_FOUND, "0 exec 2\n")


def test_a_file_that_cannot_be_executed_does_not_hide_one_that_can(tmp_path: Path) -> None:
    make(tmp_path / "a" / "tool-1", "#!/bin/sh\nexit 4\n", 0o644)
    make(tmp_path / "b" / "tool-1", "#!/bin/sh\nexit 5\n")
    status, _ = fork_guest(order_of("tool-1", environ={"PATH": f"{tmp_path / 'a'}:{tmp_path / 'b'}"}))
    assert os.waitstatus_to_exitcode(status) == 5


def test_where_only_one_that_cannot_be_executed_is_found_that_is_the_reason(tmp_path: Path) -> None:
    make(tmp_path / "a" / "tool-1", "#!/bin/sh\n", 0o644)
    status, told = fork_guest(order_of("tool-1", environ={"PATH": f"{tmp_path / 'a'}:/no/such"}))
    assert (os.waitstatus_to_exitcode(status), told) == (NOT_EXECUTABLE, "0 exec 13\n")


def test_a_script_with_a_missing_interpreter_is_not_found(tmp_path: Path) -> None:
    script = make(tmp_path / "bin" / "tool-1", "#!/no/such/interpreter\n")
    status, told = fork_guest(order_of(str(script)))
    assert (os.waitstatus_to_exitcode(status), told) == (NOT_FOUND, "0 exec 2\n")


def test_an_argument_list_that_is_too_long_is_not_executable() -> None:
    status, told = fork_guest(order_of("true", "x" * (4 << 20)))
    assert (os.waitstatus_to_exitcode(status), told) == (NOT_EXECUTABLE, "0 exec 7\n")


def test_signals_are_as_the_order_says_and_none_of_pythons_own_stay_ignored() -> None:
    def guest(order: Order) -> NoReturn:
        settle_signals(order)
        ignored = {int(number) for number in signal.valid_signals() if signal.getsignal(number) == signal.SIG_IGN}
        order.tell(
            "ignored",
            *sorted(ignored),
            "blocked",
            *sorted(int(n) for n in signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        )
        os._exit(0)

    order = order_of("true")
    order.guest, order.mask, order.ignored = guest, frozenset({signal.SIGUSR2}), frozenset({signal.SIGHUP})
    assert fork_guest(order) == (0, f"0 ignored {int(signal.SIGHUP)} blocked {int(signal.SIGUSR2)}\n")


# -- Python guests -------------------------------------------------------------------------------------


def launch(place: Place, folder: Path, code: str, target: str = "jobs:main") -> subprocess.CompletedProcess[str]:
    """Launch a Python guest of that code, with its output on stderr."""
    (folder / "jobs.py").write_text(textwrap.dedent(code))
    (folder / "s.toml").write_text(f'[[vm]]\nname = "box"\nvcpus = 1\npython = "{target}"\n')
    return place.run("launch", "--json", str(folder / "s.toml"), cwd=folder)


def exit_of(done: subprocess.CompletedProcess[str]) -> dict[str, int]:
    """Return how the only vCPU ended."""
    [ended] = [event for event in map(json.loads, done.stdout.splitlines()) if event["event"] == "ended"]
    found: dict[str, int] = ended["evidence"]["vcpus"][0]["exit"]
    return found


needs_two = pytest.mark.usefixtures("two_pcpus")


@needs_two
@pytest.mark.parametrize(
    ("body", "status"),
    [
        pytest.param("return None", 0, id="None"),
        pytest.param("return 0", 0, id="0"),
        pytest.param("return 7", 7, id="a number"),
        pytest.param("raise SystemExit", 0, id="exit"),
        pytest.param("raise SystemExit(6)", 6, id="exit with a number"),
        pytest.param("raise SystemExit('why')", 1, id="exit with a text"),
        pytest.param("raise ValueError('why')", 1, id="an error"),
    ],
)
def test_a_python_guest_ends_as_a_program_does(place: Place, tmp_path: Path, body: str, status: int) -> None:
    done = launch(place, tmp_path, f"def main():\n    {body}\n")
    assert exit_of(done) == {"code": status}
    assert done.returncode == (1 if status else 0)
    assert ("why" in done.stderr) == ("why" in body)


@needs_two
@pytest.mark.parametrize("target", ["jobs:missing", "no_such_module_1:main"])
def test_a_python_guest_that_is_not_there_fails_with_its_name(place: Place, tmp_path: Path, target: str) -> None:
    done = launch(place, tmp_path, "", target)
    assert exit_of(done) == {"code": 1}
    assert target.replace("jobs:", "").replace(":main", "") in done.stderr


@needs_two
def test_a_python_guest_dies_of_the_interrupt_that_it_does_not_catch(place: Place, tmp_path: Path) -> None:
    done = launch(
        place,
        tmp_path,
        "import os, signal, time\ndef main():\n    os.kill(os.getpid(), signal.SIGINT); time.sleep(9)\n",
    )
    assert exit_of(done) == {"signal": signal.SIGINT}


@needs_two
def test_what_a_python_guest_left_for_its_end_is_done(place: Place, tmp_path: Path) -> None:
    code = """
        import atexit, threading, time

        def late():
            time.sleep(0.2)
            print("the thread's word", end="!")

        def main():
            atexit.register(print, "the last word", flush=True)
            threading.Thread(target=late).start()
            print("not flushed by itself", end="!")
    """
    done = launch(place, tmp_path, code)
    assert "not flushed by itself!the thread's word!the last word" in done.stderr


@needs_two
def test_a_python_guest_has_its_seat_in_the_environment_and_no_descriptor_of_hostparts(
    place: Place, tmp_path: Path
) -> None:
    code = """
        import json, os, signal, sys

        def main():
            here = "/proc/self/fd"
            links = {fd: os.readlink(f"{here}/{fd}") for fd in os.listdir(here) if os.path.exists(f"{here}/{fd}")}
            seat = {name: value for name, value in os.environ.items() if name.startswith("HOSTPART_")}
            pipe = signal.getsignal(signal.SIGPIPE) == signal.SIG_DFL
            print("said", json.dumps([links, seat, sorted(os.sched_getaffinity(0)), pipe]), file=sys.stderr)
    """
    done = launch(place, tmp_path, code)
    [line] = [line for line in done.stderr.splitlines() if line.startswith("said ")]
    links, seat, mask, pipe = json.loads(line[5:])
    assert (seat["HOSTPART_VM"], seat["HOSTPART_VCPU"]) == ("box", "0")
    assert mask == [int(seat["HOSTPART_PCPU"])]
    assert pipe
    assert [link for fd, link in links.items() if int(fd) > 2 and not link.startswith(str(place.leases))] == []


@needs_two
def test_mlock_keeps_a_python_guests_memory_in_ram(place: Place, tmp_path: Path) -> None:
    if os.geteuid():
        pytest.skip("needs root")
    (tmp_path / "jobs.py").write_text("def main():\n    print(open('/proc/self/status').read())\n")
    (tmp_path / "s.toml").write_text('[[vm]]\nname = "box"\nvcpus = 1\npython = "jobs:main"\nmlock = true\n')
    done = place.run("launch", str(tmp_path / "s.toml"), cwd=tmp_path)
    locked = next(line.split()[1] for line in done.stdout.splitlines() if line.startswith("VmLck:"))
    assert int(locked) > 0


def test_python_is_an_order_that_does_not_exec_and_command_is_one_that_does() -> None:
    assert (Python.execs, Command.execs) == (False, True)
