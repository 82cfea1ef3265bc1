from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from hostpart.allocator import POLICIES
from hostpart.cli import fleet
from hostpart.cli.completion import SHELLS, add, run, script
from hostpart.config import ISOLATION_LEVELS, example_names
from hostpart.experiment import design

EXAMPLES = ("example:first", "example:four-core")
EXPERIMENTS = ("example:null",)


def demo_parsers() -> dict[str, argparse.ArgumentParser]:
    names = ("topology", "plan", "launch", "experiment", "run", "ps", "show", "stop", "fleet", "completion")
    parsers = {name: argparse.ArgumentParser(prog=f"hostpart {name}") for name in names}
    run = parsers["run"]
    run.description = "Run a command on pCPUs of its own: 100 %% isn't [more]; see below. And so on."
    run.add_argument(
        "-n", "--vcpus", type=int, metavar="N", help="how many: \\ 'one' \"per\" [vCPU], default %(default)s"
    )
    run.add_argument("--policy", choices=POLICIES, help="the policy")
    run.add_argument("--isolation", choices=ISOLATION_LEVELS)
    run.add_argument("--wait", nargs="?", const=0, metavar="SECONDS")
    run.add_argument("--sched")
    run.add_argument("--user", metavar="USER")
    run.add_argument("--evidence", metavar="FILE")
    run.add_argument("--secret", help=argparse.SUPPRESS)
    run.add_argument("-v", "--verbose", action="count")
    run.add_argument("command", nargs=argparse.REMAINDER, metavar="COMMAND", help=argparse.SUPPRESS)
    parsers["topology"].add_argument("--odd", choices=("it's", "$(id)"), help="a choice that isn't plain")
    parsers["launch"].add_argument("file", metavar="FILE")
    parsers["launch"].add_argument("--results", metavar="DIR")
    parsers["experiment"].add_argument("file", metavar="FILE")
    parsers["plan"].add_argument("file", nargs="?", metavar="FILE")
    parsers["plan"].add_argument("--host", metavar="TOPOLOGY.json|DIR|TARBALL")
    parsers["show"].add_argument("vm", metavar="VM")
    parsers["stop"].add_argument("vm", nargs="+", metavar="VM")
    add(parsers["completion"])
    parsers["fleet"].add_argument("--hosts", metavar="LIST")
    parsers["fleet"].add_argument("--insecure", action="store_true")
    parsers["fleet"].add_argument("action", choices=("ps", "stop"))
    parsers["fleet"].add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    return parsers


def demo_actions() -> dict[str, argparse.ArgumentParser]:
    actions = {f"fleet {name}": argparse.ArgumentParser(prog=f"hostpart fleet {name}") for name in ("ps", "stop")}
    actions["fleet ps"].add_argument("--json", action="store_true")
    actions["fleet stop"].add_argument("vm", metavar="VM")
    actions["fleet stop"].add_argument("--evidence", metavar="FILE")
    return actions


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A directory with a hostpart that knows two VMs, a scenario, and a file that is none."""
    program = tmp_path / "bin" / "hostpart"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\n[ "$*" = "ps --names" ] && printf "rt\\nuos1\\n"\n')
    program.chmod(0o755)
    (tmp_path / "example-mine.toml").touch()
    (tmp_path / "other.txt").touch()
    return tmp_path


def bash_offers(home: Path, line: str, more: str = "") -> list[str]:
    """Complete the end of *line* as bash would: COMP_WORDS broken at COMP_WORDBREAKS, COMPREPLY out."""
    lexer = shlex.shlex(line, punctuation_chars=":=")
    lexer.whitespace_split = True
    words = list(lexer)
    if line.endswith((" ", ":", "=")):
        # After a blank a new word begins; after ':' or '=' bash takes that character for the word.
        words += [""] if line.endswith(" ") else []
    code = script("bash", {**demo_parsers(), **demo_actions()}, EXAMPLES, EXPERIMENTS) + (
        f"{more}\n"
        'COMP_LINE=$1; COMP_POINT=${#1}; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1))\n'
        '_hostpart hostpart; ((${#COMPREPLY[@]} == 0)) || printf "%s\\n" "${COMPREPLY[@]}"'
    )
    done = subprocess.run(
        ["bash", "--norc", "-c", code, "bash", line, *words],
        cwd=home,
        env={"PATH": f"{home / 'bin'}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("hostpart ", [*demo_parsers(), "--help", "--version"]),
        ("hostpart s", ["show", "stop"]),
        ("hostpart --v", ["--version"]),
        ("hostpart run --p", ["--policy"]),
        ("hostpart run --s", ["--sched"]),
        ("hostpart run --policy ", list(POLICIES)),
        ("hostpart run --policy  n", ["numa-spread"]),
        ("hostpart run --policy=", list(POLICIES)),
        ("hostpart run --policy=n", ["numa-spread"]),
        ("hostpart run -n 2 --isolation c", ["cpuset"]),
        ("hostpart run --wait --isolation=c", ["cpuset"]),
        ("hostpart run --sched r", ["rr:"]),
        ("hostpart run -n ", []),
        ("hostpart run --user roo", ["root"]),
        ("hostpart show ", ["rt", "uos1"]),
        ("hostpart show r", ["rt"]),
        ("hostpart show rt ", []),
        ("hostpart stop rt u", ["uos1"]),
        ("hostpart launch ex", ["example:first", "example:four-core", "example-mine.toml"]),
        ("hostpart launch example:", ["first", "four-core"]),
        ("hostpart launch example:fo", ["four-core"]),
        ("hostpart experiment example:", ["null"]),
        ("hostpart plan --host other.txt example:fi", ["first"]),
        ("hostpart launch ", ["example:first", "example:four-core", "bin/", "example-mine.toml"]),
        ("hostpart topology --odd ", ["it's", "$(id)"]),
        ("hostpart completion ", ["bash", "zsh", "fish"]),
        ("hostpart nonsense ", []),
        ("hostpart fleet ", ["ps", "stop"]),
        ("hostpart fleet --i", ["--insecure"]),
        ("hostpart fleet --hosts stop --insecure s", ["stop"]),
        ("hostpart fleet --hosts a ps --", ["--help", "--json"]),
        ("hostpart fleet stop --", ["--help", "--evidence"]),
        ("hostpart fleet stop r", ["rt"]),
        ("hostpart fleet stop --evidence x u", ["uos1"]),
        ("hostpart fleet nonsense ", []),
        ("hostpart run -- hostpar", ["hostpart"]),
        ("hostpart run --policy packed hostpar", ["hostpart"]),
        ("hostpart run -- cat --p", []),
        ("bin/hostpart show r", ["rt"]),
    ],
)
def test_bash_offers(home: Path, line: str, offers: list[str]) -> None:
    assert sorted(bash_offers(home, line)) == sorted(offers)


def test_bash_offers_every_option_that_is_not_hidden(home: Path) -> None:
    assert bash_offers(home, "hostpart run -") == [
        "--help", "--vcpus", "--policy", "--isolation", "--wait", "--sched", "--user", "--evidence", "--verbose",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("hostpart run cat --n", 2),
        ("hostpart run --policy=packed -n 2 cat --n", 7),
        ("hostpart run -v -- cat a b", 4),
        ("hostpart run -v -- ca", 4),
    ],
)
def test_bash_leaves_the_guests_command_line_to_the_guests_own_completion(home: Path, line: str, word: int) -> None:
    assert bash_offers(home, line, '_command_offset() { COMPREPLY=("from word $1"); }') == [f"from word {word}"]


def test_bash_completes_the_command_by_that_function(home: Path) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", f"{script('bash', demo_parsers())}\ncomplete -p hostpart"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "complete -F _hostpart hostpart\n"


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_itself_can_read_the_script(shell: str, tmp_path: Path) -> None:
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"{shell} is not installed")
    file = tmp_path / "script"
    file.write_text(script(shell, demo_parsers(), EXAMPLES, EXPERIMENTS))
    done = subprocess.run([program, "-n", file], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("line", "offers"),
    [
        ("hostpart s", {"show", "stop"}),
        ("hostpart run --policy n", {"numa-spread"}),
        ("hostpart run --policy=n", {"--policy=numa-spread"}),
        ("hostpart run --se", set()),
        ("hostpart topology --odd ", {"it's", "$(id)"}),
        ("hostpart show ", {"rt", "uos1"}),
        ("hostpart launch example:f", {"example:first", "example:four-core"}),
        ("hostpart run --policy packed -- hostpar", {"hostpart"}),
    ],
)
def test_fish_offers(home: Path, line: str, offers: set[str]) -> None:
    if shutil.which("fish") is None:
        pytest.skip("fish is not installed")
    done = subprocess.run(
        [
            "fish",
            "--no-config",
            "-c",
            f"{script('fish', demo_parsers(), EXAMPLES, EXPERIMENTS)}\ncomplete -C {shlex.quote(line)}",
        ],
        cwd=home,
        env={"PATH": f"{home / 'bin'}:/usr/bin:/bin", "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    # fish shows a description after a tab.
    assert {offer.partition("\t")[0] for offer in done.stdout.splitlines()} == offers


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_the_same_every_time_and_shows_nothing_hidden(shell: str) -> None:
    text = script(shell, demo_parsers(), EXAMPLES, EXPERIMENTS)
    assert text == script(shell, demo_parsers(), EXAMPLES, EXPERIMENTS)
    assert text.endswith("\n")
    assert "secret" not in text
    assert "%(" not in text


def test_the_command_prints_the_script_with_the_examples_that_come_with_hostpart(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("hostpart.cli.parsers", demo_parsers, raising=False)
    args = demo_parsers()["completion"].parse_args(["bash"])
    assert run(args) == 0
    names = [[f"example:{name}" for name in names] for names in (example_names(), design.example_names())]
    actions = {f"fleet {action}": fleet.action_parser(action) for action in fleet.ACTIONS}
    assert capsys.readouterr().out == script("bash", {**demo_parsers(), **actions}, *names)
