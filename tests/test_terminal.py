"""A guest on a terminal is a terminal program: job control, window size, editors and pagers, on a pseudo-terminal."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

import pytest

from tests.conftest import Place, wait_until

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
PROMPT = "READY> "


class Terminal:
    """An interactive bash on a terminal of its own, with ``hp`` for this place's hostpart."""

    def __init__(self, place: Place) -> None:
        self.seen = ""
        folder = place.runtime.parent / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "hp").write_text(f'#!/bin/sh\nexec {shlex.join(place.command)} "$@"\n')
        (folder / "hp").chmod(0o755)
        env = {**place.env, "PATH": f"{folder}:{os.environ['PATH']}"}
        env |= {"TERM": "xterm", "PS1": PROMPT, "LESS": "", "LC_ALL": "C.UTF-8", "HISTFILE": ""}
        self.pid, self.fd = pty.fork()
        if not self.pid:
            os.execvpe("bash", ["bash", "--norc", "--noprofile", "--noediting", "-i"], env)
        self.resize(24, 80)
        self.expect(PROMPT)

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size, as a window manager does."""
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def type(self, text: str) -> None:
        """Type *text* as it is."""
        os.write(self.fd, text.encode())

    def expect(self, pattern: str, timeout: float = 20.0) -> re.Match[str]:
        """Read until the regular expression *pattern* is there; what is read up to it is used up."""
        until = time.monotonic() + timeout
        while True:
            found = re.search(pattern, self.seen)
            if found:
                self.seen = self.seen[found.end() :]
                return found
            left = until - time.monotonic()
            if left <= 0 or not select.select([self.fd], [], [], left)[0]:
                pytest.fail(f"no {pattern!r} in {self.seen!r}")
            try:
                self.seen += os.read(self.fd, 65536).decode(errors="replace")
            except OSError:
                pytest.fail(f"the terminal is gone; no {pattern!r} in {self.seen!r}")

    def run(self, line: str) -> str:
        """Have the shell run *line* and return what is printed until its next prompt."""
        self.type(line + "\n")
        self.expect(re.escape(line) + "\r\n")
        return self.expect(f"(?s)(.*?){PROMPT}")[1]

    @property
    def foreground(self) -> int:
        """The process group that has the terminal."""
        return os.tcgetpgrp(self.fd)

    def close(self) -> None:
        """Hang up, as closing the window does."""
        os.close(self.fd)
        if not wait_until(lambda: os.waitpid(self.pid, os.WNOHANG)[0]):
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


@pytest.fixture
def terminal(place: Place) -> Iterator[Terminal]:
    """A terminal whose processes are gone afterwards."""
    here = Terminal(place)
    yield here
    here.close()
    assert wait_until(place.is_clean, 15)


def test_ctrl_c_reaches_the_guest_which_decides(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'trap \"echo caught; exit 5\" INT; echo going; while :; do sleep 0.05; done'\n")
    terminal.expect("going\r\n")
    terminal.type("\x03")
    terminal.expect("caught")
    terminal.expect(PROMPT)
    assert "status=5" in terminal.run("echo status=$?")


def test_ctrl_c_is_given_to_the_guest_once(terminal: Terminal) -> None:
    code = (
        "import signal, time; n = []; signal.signal(2, lambda *_: n.append(1)); print('going', flush=True)\n"
        "while not n: time.sleep(0.01)\n"
        "time.sleep(0.3); print('times', len(n))"
    )
    terminal.type(f"hp run -- {sys.executable} -S -c {shlex.quote(code)}\n")
    terminal.expect("going\r\n")
    terminal.type("\x03")
    assert terminal.expect(r"times (\d+)")[1] == "1"
    terminal.expect(PROMPT)


def test_ctrl_c_ends_a_guest_that_does_not_mind(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'echo going; exec sleep 60'\n")
    terminal.expect("going\r\n")
    terminal.type("\x03")
    terminal.expect(PROMPT)
    assert "status=130" in terminal.run("echo status=$?")


def test_ctrl_c_ends_a_launch(terminal: Terminal, place: Place) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two usable pCPUs")
    file = place.runtime.parent / "s.toml"
    file.write_text('[[vm]]\nname = "box"\nvcpus = 1\ncommand = ["sh", "-c", "echo going; exec sleep 60"]\n')
    terminal.type(f"hp launch {file}\n")
    terminal.expect("\ngoing\r\n")
    terminal.type("\x03")
    terminal.expect(PROMPT)
    assert "status=130" in terminal.run("echo status=$?")


def test_ctrl_z_stops_the_job_and_fg_lets_it_go_on(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'echo going; read line; echo got $line; exit 6'\n")
    terminal.expect("going\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect(PROMPT)
    terminal.type("fg\n")
    terminal.expect("hp run -- sh")
    terminal.type("hello\n")
    terminal.expect("got hello\r\n")
    terminal.expect(PROMPT)
    assert "status=6" in terminal.run("echo status=$?")


def test_ctrl_z_works_a_second_time(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'echo going; exec cat'\n")
    terminal.expect("going\r\n")
    for number in range(2):
        terminal.type("\x1a")
        terminal.expect("Stopped")
        terminal.expect(PROMPT)
        terminal.type("fg\n")
        terminal.expect("hp run -- sh")
        terminal.type(f"line {number}\n")
        terminal.expect(f"line {number}\r\nline {number}\r\n")
    terminal.type("\x04")
    terminal.expect(PROMPT)


def test_a_job_that_bg_moved_away_ends_without_taking_the_terminal_from_the_shell(
    terminal: Terminal, place: Place
) -> None:
    gate = place.runtime.parent / "gate"
    os.mkfifo(gate)
    # It forks nothing: a stop between vfork and exec would leave the shell waiting in the kernel, half stopped.
    terminal.type(f"hp run -- sh -c 'echo going; read line < {gate}'\n")
    terminal.expect("going\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect(PROMPT)
    terminal.run("bg")
    shell = terminal.foreground
    gate.write_text("go on\n")
    assert wait_until(lambda: "Running" not in terminal.run("jobs"))
    assert terminal.foreground == shell
    assert "still here" in terminal.run("echo still here")


def test_a_background_job_that_reads_the_terminal_stops_and_reads_in_the_foreground(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'read line; echo got $line' &\n")
    terminal.expect(PROMPT)
    assert wait_until(lambda: "Stopped" in terminal.run("jobs"))
    terminal.type("fg\n")
    terminal.type("hello\n")
    terminal.expect("got hello\r\n")
    terminal.expect(PROMPT)


def test_the_window_size_and_its_changes_reach_the_guest(terminal: Terminal) -> None:
    terminal.resize(31, 97)
    assert "31 97" in terminal.run("hp run -- stty size")
    code = (
        "import os, signal, time; seen = []\n"
        "signal.signal(signal.SIGWINCH, lambda *_: seen.append(os.get_terminal_size()))\n"
        "print('going', flush=True)\n"
        "while not seen: time.sleep(0.01)\n"
        "print('size', *seen[0])"
    )
    terminal.type(f"hp run -- {sys.executable} -S -c {shlex.quote(code)}\n")
    terminal.expect("going\r\n")
    terminal.resize(40, 100)
    terminal.expect("size 100 40")
    terminal.expect(PROMPT)


def test_an_interactive_python_works(terminal: Terminal) -> None:
    # The plain prompt: from 3.13 on Python draws one of its own, in colour and piecemeal.
    terminal.type(f"PYTHON_BASIC_REPL=1 hp run -- {sys.executable} -q\n")
    terminal.expect(">>> ")
    terminal.type("6 * 7\n")
    terminal.expect("\r\n42\r\n")
    terminal.type("import time; print('go' 'ing'); time.sleep(60)\n")
    terminal.expect("going\r\n")
    terminal.type("\x03")
    terminal.expect("KeyboardInterrupt")
    terminal.expect(">>> ")
    terminal.type("\x04")
    terminal.expect(PROMPT)


@pytest.mark.skipif(shutil.which("less") is None, reason="needs less")
def test_a_pager_works(terminal: Terminal) -> None:
    terminal.type("seq 1000 | hp run -- less\n")
    terminal.expect("23\r\n:")
    terminal.type("G")
    terminal.expect("1000\r\n")
    terminal.type("q")
    terminal.expect(PROMPT)
    assert "status=0" in terminal.run("echo status=$?")


def test_a_shell_as_guest_has_job_control_of_its_own(terminal: Terminal) -> None:
    terminal.type("PS1='IN''NER> ' hp run -- bash --norc --noediting -i\n")
    terminal.expect("INNER> ")
    terminal.type("sh -c 'echo go''ing; exec sleep 60'\n")
    terminal.expect("going\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect("INNER> ")
    shell = terminal.foreground
    terminal.type("fg\n")
    assert wait_until(lambda: terminal.foreground != shell)
    terminal.type("\x03")
    terminal.expect("INNER> ")
    terminal.type("exit 7\n")
    terminal.expect(PROMPT)
    assert "status=7" in terminal.run("echo status=$?")


def test_the_terminal_is_given_back_after_a_guest_shell_was_killed(terminal: Terminal, place: Place) -> None:
    # A script around it has no job control, and so does not take the terminal for itself.
    inner = "PS1='IN''NER> ' hp run --name box -- bash --norc --noediting -i"
    terminal.type(f"sh -c {shlex.quote(inner + '; echo status=$?; read line; echo got $line')}\n")
    terminal.expect("INNER> ")
    terminal.type("sh -c 'echo go''ing; exec sleep 60'\n")
    terminal.expect("going\r\n")
    assert place.run("stop", "-t", "0", "box").returncode == 0
    terminal.expect("status=137")
    terminal.type("hello\n")
    terminal.expect("got hello\r\n")
    terminal.expect(PROMPT)
    assert terminal.foreground == os.getpgid(terminal.pid)


def test_a_guest_shell_that_suspends_itself_gives_the_outer_shell_its_turn(terminal: Terminal) -> None:
    terminal.type("PS1='IN''NER> ' hp run -- bash --norc --noediting -i\n")
    terminal.expect("INNER> ")
    terminal.type("suspend\n")
    terminal.expect("Stopped")
    terminal.expect(PROMPT)
    terminal.type("fg\n")
    terminal.type("echo inside again; exit 3\n")
    terminal.expect("inside again\r\n")
    terminal.expect(PROMPT)
    assert "status=3" in terminal.run("echo status=$?")


@pytest.mark.parametrize("grace", ["0", "30"])
def test_a_suspended_job_can_be_ended_from_elsewhere(terminal: Terminal, place: Place, grace: str) -> None:
    terminal.type("hp run --name box -- sh -c 'echo going; exec sleep 60'\n")
    terminal.expect("going\r\n")
    terminal.type("\x1a")
    terminal.expect("Stopped")
    terminal.expect(PROMPT)
    assert place.run("stop", "-t", grace, "box", timeout=20).returncode == 0
    assert wait_until(lambda: "Stopped" not in terminal.run("jobs"))


def test_a_guest_that_does_not_mind_ctrl_z_goes_on_in_the_foreground(terminal: Terminal) -> None:
    terminal.type("hp run -- sh -c 'trap \"\" TSTP; echo going; read line; echo got $line'\n")
    terminal.expect("going\r\n")
    terminal.type("\x1a")
    terminal.type("hello\n")
    terminal.expect("got hello\r\n")
    terminal.expect(PROMPT)


def test_a_pause_leaves_the_shells_job_running(terminal: Terminal, place: Place) -> None:
    terminal.type("hp run --name box -- sh -c 'echo going; read line; echo got $line'\n")
    terminal.expect("going\r\n")
    assert place.run("pause", "box").returncode == 0
    terminal.type("hello\n")
    assert place.run("resume", "box").returncode == 0
    assert "Stopped" not in terminal.expect("(?s)(.*)got hello\r\n")[1]
    terminal.expect(PROMPT)


def test_hanging_up_ends_the_guest(place: Place) -> None:
    terminal = Terminal(place)
    terminal.type("hp run -- sh -c 'echo going; exec sleep 60'\n")
    terminal.expect("going\r\n")
    terminal.close()
    assert wait_until(place.is_clean, 15)


def test_colour_is_for_terminals_and_no_color_turns_it_off(terminal: Terminal, place: Place) -> None:
    assert "\x1b[1m" in terminal.run("hp plan -n 1")
    assert "\x1b" not in terminal.run("NO_COLOR=1 hp plan -n 1")
    assert "\x1b" not in terminal.run("TERM=dumb hp plan -n 1")
    assert "\x1b" not in place.run("plan", "-n", "1").stdout


def test_stdin_that_is_no_terminal_leaves_the_terminals_job_control_alone(terminal: Terminal) -> None:
    out = terminal.run("echo text | hp run -- cat | cat")
    assert "text" in out
    assert terminal.foreground == os.getpgid(terminal.pid)


def test_without_any_terminal_nothing_is_missed(place: Place) -> None:
    command = ["setsid", "--wait", *place.command, "run", "--", "sh", "-c", "cut -d ' ' -f 7 /proc/$$/stat; exit 4"]
    done = subprocess.run(
        command, env=place.env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout.strip(), done.stderr) == (4, "0", "")
