"""The probe that runs a command: what it takes from it, what it says when that fails, and that nothing is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Place, wait_until
from tests.test_probes import SCHEMA, catches, checked, environ, start, value
from tests.test_tools import TIMERLAT
from workers.probes import command, parameter
from workers.probes.refusal import Refused

RECORDED = Path(__file__).parent / "tools"


def begin(*argv: str, **options: str) -> subprocess.Popen[str]:
    """Start the probe with this command."""
    return start("command", {"argv": json.dumps(argv), **options}, short={"json": "1"})


def done(*argv: str, **options: str) -> tuple[int, dict[str, Any], str]:
    """Run the probe with this command; its exit status, record and what it said."""
    process = begin(*argv, **options)
    out, err = said(process, 60)
    return process.returncode, checked(out), err


def said(process: subprocess.Popen[str], timeout: float) -> tuple[str, str]:
    """Wait for the probe and return both its outputs; where it does not end, nothing of it stays."""
    try:
        return process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        for end in (process.terminate, process.kill):  # the first ends the command, too
            end()
            time.sleep(4)
        raise


def shell(script: str, **options: str) -> tuple[int, dict[str, Any], str]:
    """Run the probe with a shell's script."""
    return done("sh", "-c", script, **options)


# -- figures -------------------------------------------------------------------------------------------


def test_a_command_takes_as_long_as_it_takes() -> None:
    status, found, err = shell("sleep 0.3")
    assert (status, err) == (0, "")
    assert found["primary"] == "wall"
    assert found["metrics"]["wall"]["unit"] == "s"
    length = found["ended"]["monotonic_ns"] - found["started"]["monotonic_ns"]
    assert 0.3 <= value(found, "wall") <= length / 1e9
    assert found["parameters"]["argv"] == ["sh", "-c", "sleep 0.3"]
    assert (found["parameters"]["exit_status"], found["cut_short"]) == (0, False)
    assert len(found["slices"]["length_ns"]) == 1
    assert found["calibration"]["clock"] == "CLOCK_MONOTONIC"


def test_the_usage_is_the_commands_own() -> None:
    _, found, _ = shell("i=0; while [ $i -lt 200000 ]; do i=$((i+1)); done")
    # Of this process and not of the interpreter, which has used more by the time that it starts it.
    assert 0 < found["usage"]["user_ns"] + found["usage"]["system_ns"] <= value(found, "wall") * 1e9 + 20_000_000
    assert found["usage"]["user_ns"] > 10_000_000


def test_the_last_match_of_the_metric_counts() -> None:
    status, found, err = shell(
        "echo 'latency: 3.5 us'; echo 'latency: 42.25 us'; echo latency: none", metric="^latency: ([0-9.]+)", unit="us"
    )
    assert (status, err) == (0, "")
    assert (found["primary"], found["metrics"]["metric"]) == (
        "metric",
        {"value": 42.25, "unit": "us", "better": "lower"},
    )
    assert value(found, "wall") > 0


def test_the_metric_has_its_groups_name_and_may_be_on_standard_error() -> None:
    _, found, _ = shell("echo 'ops 7e3' >&2", metric="ops (?P<rate>.+)", unit="1/s", better="higher")
    assert (found["primary"], found["metrics"]["rate"]) == (
        "rate",
        {"value": 7000.0, "unit": "1/s", "better": "higher"},
    )


def test_standard_output_goes_before_standard_error() -> None:
    _, found, _ = shell("echo x=1; echo x=2 >&2", metric="x=(.*)")
    assert value(found, "metric") == 1


@pytest.mark.parametrize(
    ("parser", "text", "primary"),
    [
        pytest.param("oslat", (RECORDED / "oslat.json").read_text(), "longest_gap", id="oslat"),
        pytest.param("cyclictest", (RECORDED / "cyclictest.json").read_text(), "0_latency_p99", id="two threads"),
        pytest.param("stress-ng", (RECORDED / "stress-ng.txt").read_text(), "cpu_operations", id="two stressors"),
        pytest.param("rtla-timerlat", TIMERLAT, "0_thread_max", id="two pCPUs"),
    ],
)
def test_a_tools_output_becomes_figures(parser: str, text: str, primary: str, tmp_path: Path) -> None:
    (tmp_path / "out").write_text(f"before\n{text}\nafter\n")
    status, found, err = done("cat", str(tmp_path / "out"), parse=parser)
    assert (status, err) == (0, "")
    assert found["primary"] == primary
    assert found["metrics"][primary]["value"] > 0
    assert value(found, "wall") < 10


def test_the_wall_time_is_the_commands_where_the_tool_has_one_too(tmp_path: Path) -> None:
    line = next(line for line in (RECORDED / "stress-ng.txt").read_text().splitlines() if " cpu " in line)
    (tmp_path / "out").write_text(line)
    _, found, _ = done("cat", str(tmp_path / "out"), parse="stress-ng")
    assert found["metrics"]["wall"]["unit"] == "s"
    assert found["primary"] == "operations"


def test_the_metric_goes_before_what_the_tool_has_as_primary() -> None:
    _, found, _ = done("cat", str(RECORDED / "oslat.json"), parse="oslat", metric='"freq": ([0-9]+)')
    assert (found["primary"], value(found, "metric")) == ("metric", 2597)
    assert value(found, "longest_gap") == 538_244_000
    assert found["histograms"]["gap"]["count"] > 0


# -- output, input, environment ------------------------------------------------------------------------


def test_of_much_output_the_end_is_kept_and_none_of_it_blocks() -> None:
    status, found, _ = shell(
        "echo n=1; head -c 3000000 /dev/zero | tr '\\0' a; head -c 3000000 /dev/zero | tr '\\0' b >&2; echo; echo m=2",
        metric="[nm]=(.)",
    )
    assert (status, value(found, "metric")) == (0, 2)
    status, _, err = shell("echo n=1; head -c 200000 /dev/zero | tr '\\0' a", metric="n=(.)")
    assert (status, "matches" in err) == (1, True)


def test_a_tail_holds_the_last_bytes_and_not_all() -> None:
    tail = command._Tail()
    for number in range(100):
        tail.add(bytes([number]) * 10_000)
        assert len(tail._bytes) <= 3 * command.KEPT
    assert tail.text().endswith("b" * 10_000 + "c" * 10_000)
    assert len(tail.text()) == command.KEPT


def test_there_is_nothing_to_read_and_no_option_of_the_probe_in_the_environment() -> None:
    script = 'read line && exit 9; test -z "$HOSTPART_PROBE_ARGV" || exit 8; test "$HOSTPART_VM" = x || exit 7'
    code = "import sys; from workers.probes.command import main; sys.exit(main())"
    options = environ({"argv": json.dumps(["sh", "-c", script]), "json": "1"}, HOSTPART_VM="x")
    ran = subprocess.run(
        [sys.executable, "-c", code], env=options, input="a line\n", capture_output=True, text=True, timeout=60,
        check=False, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (0, "")
    assert checked(ran.stdout)["parameters"]["exit_status"] == 0


def test_a_broken_pipe_ends_what_the_command_runs() -> None:
    # The interpreter ignores SIGPIPE, and what it starts would too.
    status, found, err = shell("(yes; echo $? >&2) | head -n 1 >/dev/null", metric="([0-9]+)", seconds="30")
    assert (status, err) == (0, "")
    assert value(found, "metric") == 128 + signal.SIGPIPE


# -- failures ------------------------------------------------------------------------------------------


def test_a_command_that_fails_has_its_record_and_says_how() -> None:
    status, found, err = shell("echo no such device >&2; exit 3", metric="x=(.)")
    assert status == 1
    assert found["parameters"]["exit_status"] == 3
    assert (found["primary"], found["metrics"]["metric"]["value"]) == ("metric", None)
    assert value(found, "wall") > 0
    assert err == (
        "hostpart: probe command: 'sh' failed, exit status 3: no such device\n"
        "try: run it by itself to see all that it says\n"
    )


def test_a_command_that_a_signal_ends_has_failed() -> None:
    status, found, err = shell("kill -9 $$")
    assert (status, found["parameters"]["exit_status"]) == (1, -9)
    assert "'sh' failed, signal 9\n" in err
    assert found["cut_short"] is False


@pytest.mark.parametrize(
    ("name", "why"),
    [pytest.param("no-such-command", "No such file", id="no file"), pytest.param("/", "Permission", id="no program")],
)
def test_what_cannot_be_run_has_a_record_too(name: str, why: str) -> None:
    status, found, err = done(name)
    assert (status, found["parameters"]["exit_status"]) == (1, None)
    assert (found["primary"], found["metrics"]["wall"]["value"], found["usage"]) == ("wall", None, None)
    assert f"hostpart: probe command: {name!r} cannot be run: {why}" in err
    assert "\ntry: " in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        pytest.param({"metric": "y=(.)"}, "nothing that 'echo' wrote matches 'y=(.)'", id="no match"),
        pytest.param({"metric": "x=(.*)"}, "is no number: 'nan'", id="no number"),
        pytest.param({"parse": "oslat"}, "no figures of oslat in what 'echo' wrote", id="no tool's"),
        pytest.param({"parse": "rtla-osnoise"}, "try: have it write them: rtla osnoise hist", id="what to do"),
    ],
)
def test_output_without_the_figures_is_a_failure(options: dict[str, str], problem: str) -> None:
    status, found, err = done("echo", "x=nan", **options)
    assert status == 1
    assert problem in err
    assert found["parameters"]["exit_status"] == 0
    assert found["primary"] is None or found["metrics"][found["primary"]]["value"] is None


# -- ends ----------------------------------------------------------------------------------------------


def gone(pids: list[int]) -> bool:
    """Whether none of the processes is there; one that has ended and that nobody waits for counts as gone."""
    for pid in pids:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z":
                return False
        except OSError:
            continue
    return True


@pytest.mark.parametrize("way", ["SIGTERM", "SIGTERM, which it ignores", "its time", "its own end"])
def test_nothing_is_left_of_the_commands_process_group(way: str, tmp_path: Path) -> None:
    trap = "trap '' TERM; " if "ignores" in way else ""
    last = "true" if way == "its own end" else "wait"
    seconds = {"seconds": "1"} if way == "its time" else {}
    script = f"{trap}sleep 600 & echo $! > {tmp_path}/pids.new; echo $$ >> {tmp_path}/pids.new; "
    process = begin("sh", "-c", f"{script} mv {tmp_path}/pids.new {tmp_path}/pids; {last}", **seconds)
    assert wait_until((tmp_path / "pids").exists, 60)
    pids = [int(word) for word in (tmp_path / "pids").read_text().split()]
    began = time.monotonic()
    if way.startswith("SIGTERM"):
        assert not gone(pids)
        process.terminate()
    out, err = said(process, 30)
    assert (process.returncode, err) == (0, "")
    assert time.monotonic() - began < 15
    assert wait_until(lambda: gone(pids))
    found = checked(out)
    assert found["cut_short"] is (way != "its own end")
    # How long it would have taken is not known.
    assert (found["metrics"]["wall"]["value"] is None) is (way != "its own end")
    killed = {"SIGTERM, which it ignores": -signal.SIGKILL, "its own end": 0}
    assert found["parameters"]["exit_status"] == killed.get(way, -signal.SIGTERM)


def test_what_it_printed_before_it_was_ended_counts() -> None:
    _, found, _ = shell("echo x=5; sleep 600", metric="x=(.)", seconds="1")
    assert (value(found, "metric"), found["cut_short"]) == (5, True)


def test_a_process_that_left_the_group_and_holds_the_output_is_not_waited_for() -> None:
    status, found, err = shell("setsid sleep 90 & echo pid=$!", metric="pid=(.*)")
    assert (status, err) == (0, "")
    os.kill(round(value(found, "metric")), signal.SIGKILL)


def test_an_interrupt_ends_the_command_and_then_the_probe() -> None:
    process = begin("sleep", "600")
    assert wait_until(lambda: catches(process, signal.SIGTERM), 60)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = said(process, 30)
    assert process.returncode == -signal.SIGINT
    assert checked(out)["cut_short"] is True


# -- options -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param(["--argv", "./bench"], "--argv: want a JSON list of strings", id="no JSON"),
        pytest.param(["--argv", "[]"], "want a JSON list", id="empty"),
        pytest.param(["--argv", '["a", 1]'], "want a JSON list of strings", id="a number"),
        pytest.param(["--argv", '"ab"'], "want a JSON list", id="one string"),
        pytest.param(["--argv", '["a\\u0000b"]'], "want a JSON list", id="NUL"),
        pytest.param(["--argv", '["\\ud800"]'], "want a JSON list", id="half a character"),
        pytest.param(["--argv", '[""]'], "want a command as the first", id="no name"),
        pytest.param(["--metric", "x("], "--metric: want a regular expression: ", id="no regular expression"),
        pytest.param(["--metric", "x"], "with one group", id="no group"),
        pytest.param(["--metric", "(x)(y)"], "with one group", id="two groups"),
        pytest.param(["--metric", "(?P<wall>x)"], "not named 'wall'", id="a name that is taken"),
        pytest.param(["--unit", "furlong"], "want one of ns, ps", id="unit"),
        pytest.param(["--parse", "sysbench"], "want one of none, cyclictest", id="parser"),
        pytest.param(["--warmup", "1"], "has no option '--warmup'", id="what only a loop has"),
    ],
)
def test_what_an_option_cannot_be_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(Refused) as caught:
        parameter.from_options("command", command.PROBE.parameters, words)
    assert problem in str(caught.value)


def test_without_a_command_there_is_nothing_to_run() -> None:
    with pytest.raises(Refused, match="wants --argv, or HOSTPART_PROBE_ARGV"):
        parameter.from_environment("command", command.PROBE.parameters, {})


def test_units_are_those_that_a_record_may_have() -> None:
    assert list(command.UNITS) == SCHEMA["$defs"]["unit"]["enum"]


def test_the_help_shows_how_a_scenario_names_the_command() -> None:
    assert """env = { HOSTPART_PROBE_ARGV = '["./bench", "--fast"]' }""" in command.PROBE.help()


# -- in a partition ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_pcpus")
def test_run_measures_a_command_on_the_pcpu_that_it_takes(place: Place) -> None:
    argv = json.dumps(["sh", "-c", "grep Cpus_allowed_list /proc/self/status"])
    options = ("--argv", argv, "--metric", r"list:\s*([0-9]+)$", "--json")
    ran = place.run("run", "--probe", "command", *options)
    assert (ran.returncode, ran.stderr) == (0, "")
    found = checked(ran.stdout)
    assert found["where"]["pcpu"] == str(round(value(found, "metric")))
    assert place.is_clean()


@pytest.mark.usefixtures("two_pcpus")
def test_runs_exit_status_is_1_where_the_command_fails(place: Place) -> None:
    ran = place.run("run", "--probe", "command", "--argv", '["false"]', "--json")
    assert ran.returncode == 1
    assert checked(ran.stdout)["parameters"]["exit_status"] == 1
    assert "'false' failed, exit status 1" in ran.stderr
    assert place.is_clean()


def test_run_wants_the_command_before_anything_is_made(place: Place) -> None:
    ran = place.run("run", "--probe", "command")
    assert (ran.returncode, ran.stdout) == (125, "")
    assert "wants --argv" in ran.stderr
    assert list(place.runtime.iterdir()) == []
