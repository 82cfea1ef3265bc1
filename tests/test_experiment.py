"""Experiments on this machine's cores: runs, files, interruptions."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart import procfs
from hostpart.errors import ConfigError, Failed, UsageError
from hostpart.experiment import design, results

from . import guest_os
from .conftest import Place, wait_until

ROOT = Path(__file__).resolve().parent.parent
needs_two = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two usable pCPUs")

QUICK = """
processes = 1
seconds = 0.1
warmup = 0.05
settle = 0.1
placements = ["same-pcpu"]
scope = "experiment"
[[victim]]
probe = "noise"
options = { engine = "python" }
[[aggressor]]
name = "spinners"
probe = "spin"
count = 2
"""


def _file(folder: Path, text: str = QUICK, name: str = "quick.toml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def _runs(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "runs.jsonl").read_text().splitlines()]


def _check(kind: str, document: object) -> None:
    path = Path(results.__file__).with_name(f"{kind}.schema.json")
    jsonschema.Draft202012Validator(json.loads(path.read_text())).validate(document)


# -- the file ------------------------------------------------------------------------------------------------


def test_the_example_is_right() -> None:
    for name in design.example_names():
        assert design.load(f"example:{name}").victims


def test_all_faults_are_told_at_once() -> None:
    text = """
    processes = 0
    placments = "all"
    isolation = ["affinity", "affinity"]
    scope = "everything"
    [[victim]]
    probe = "noisy"
    [[victim]]
    command = ["x"]
    probe = "noise"
    [[victim]]
    command = ["x"]
    metric = "no group"
    options = { a = 1 }
    tool = "oslat"
    unit = "furlong"
    [[victim]]
    probe = "noise"
    name = "x"
    unit = "s"
    options = { json = true, threshold_ns = -1, seconds = 3 }
    [[victim]]
    command = ["x"]
    name = "y"
    qemu = { run = "true", memry = "1G" }
    [[aggressor]]
    probe = "spin"
    options = { secnds = 3 }
    count = 0
    """
    with pytest.raises(ConfigError) as caught:
        design.parse(text, "mine.toml")
    told = "\n".join(caught.value.faults)
    for part in (
        "processes: want a whole number from 1",
        "placments: is not a key here; did you mean placements?",
        "isolation: want one or more of affinity, sweep, cpuset, full, each once",
        "scope: ",
        "victim[0].probe: want one of",
        "victim[1]: want probe =",
        "victim[2].metric: want a regular expression with one group",
        "victim[2].unit: want one of ns,",
        "victim[2].options: are a probe's",
        "victim[3].unit: is for a command",
        "victim[3].options.json: is the experiment's to say",
        "victim[3].options.seconds: is the experiment's to say: seconds at the top",
        "victim[3].options.threshold_ns: ",
        "victim[4].qemu: is for a probe",
        "victim[4].qemu.run: is not for this place",
        "victim[4].qemu.memry: is not a key here; did you mean memory?",
        "aggressor[0].options.secnds: probe 'spin' has no option",
        "aggressor[0].count: want a whole number from 1",
    ):
        assert part in told
    assert "hostpart experiment --plan mine.toml" in caught.value.remedy


def test_names_are_given_and_unique() -> None:
    text = '[[victim]]\nprobe = "noise"\n[[victim]]\ncommand = ["/usr/bin/Time|it", "x"]\n[[victim]]\ncommand = ["/"]'
    found = design.parse(text, "a/Some File.toml")
    assert (found.name, [one.name for one in found.victims]) == ("some-file", ["noise", "time-it", "command"])
    with pytest.raises(ConfigError, match=r"victim\[1\].name: 'noise' is victim\[0\]'s name already"):
        design.parse('[[victim]]\nprobe = "noise"\n[[victim]]\nprobe = "noise"', "x.toml")
    with pytest.raises(ConfigError, match="victim: want at least one"):
        design.parse("", "x.toml")


# -- the directory -------------------------------------------------------------------------------------------

EXPERIMENT: dict[str, Any] = {"schema": 1, "name": "x", "design": {"a": 1}, "plan": {"conditions": [], "runs": []}}


def _run(number: int, **more: object) -> dict[str, Any]:
    return {
        "schema": 1, "run": number, "block": 0, "session": 0, "condition": "c", "victim_pcpu": 1,
        "aggressor_pcpus": None, "metrics": {}, "primary": None, "record": None, "verdict": None, "reasons": [],
        "error": None, **more,
    }  # fmt: skip


def test_a_line_that_was_cut_short_is_taken_away(tmp_path: Path) -> None:
    here = tmp_path / "out"
    journal = results.Journal(str(here), EXPERIMENT)
    journal.append(_run(0))
    journal.append(_run(1))
    journal.close()
    whole = (here / "runs.jsonl").read_bytes()
    for cut in range(1, 12):
        (here / "runs.jsonl").write_bytes(whole[:-cut])
        # Without its newline alone, it is whole.
        left = [0, 1] if cut == 1 else [0]
        found = results.read(str(here))
        assert ([run["run"] for run in found.runs], found.damaged) == (left, len(left) % 2)
        journal = results.Journal(str(here), EXPERIMENT)
        journal.append(_run(2))
        journal.close()
        assert [run["run"] for run in results.read(str(here)).runs] == [*left, 2]
        assert results.read(str(here)).damaged == 0


@pytest.mark.parametrize(
    "line", ["5", "null", "[]", '{"foo": 1}', '{"run": 1, "error": null}', "[" * 200_000, '"', "\0\0", "{"]
)
def test_lines_that_are_none_are_counted_and_passed_over(tmp_path: Path, line: str) -> None:
    journal = results.Journal(str(tmp_path), EXPERIMENT)
    journal.append(_run(0))
    for name in ("runs.jsonl", "sessions.jsonl"):
        with (tmp_path / name).open("a") as file:
            file.write(line + "\n")
    journal.append(_run(1))
    journal.close()
    found = results.read(str(tmp_path))
    assert [run["run"] for run in found.runs] == [0, 1]
    assert (found.sessions, found.damaged) == ((), 2)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 1, "plan": {}}', '{"schema": 2}', "[" * 200_000])
def test_a_directory_that_is_none_is_told(tmp_path: Path, text: str) -> None:
    (tmp_path / "experiment.json").write_text(text)
    with pytest.raises(UsageError, match=r"experiment\.json"):
        results.read(str(tmp_path))


def test_the_last_line_of_a_run_counts_and_a_failed_one_is_not_done(tmp_path: Path) -> None:
    journal = results.Journal(str(tmp_path), EXPERIMENT)
    journal.append(_run(1, error={"problem": "p", "remedy": "r"}))
    journal.append(_run(0, error={"problem": "p", "remedy": "r"}))
    journal.append(_run(1, value=2))
    journal.close()
    found = results.read(str(tmp_path))
    assert [run["run"] for run in found.runs] == [0, 1]
    assert found.runs[1]["value"] == 2
    assert found.done == {1}


def test_a_directory_is_one_experiments_and_one_processs(tmp_path: Path) -> None:
    here = str(tmp_path / "out")
    journal = results.Journal(here, EXPERIMENT)
    with pytest.raises(UsageError, match="another process"):
        results.Journal(here, EXPERIMENT)
    journal.close()
    later: dict[str, Any] = {"hostpart": "later", "design": {"a": 1, "source": "elsewhere.toml"}}
    results.Journal(here, {**EXPERIMENT, **later, "plan": {**EXPERIMENT["plan"], "seconds": 3}}).close()
    with pytest.raises(UsageError, match="its design differs in a, b"):
        results.Journal(here, {**EXPERIMENT, "design": {"a": 2, "b": 1}})
    with pytest.raises(UsageError, match="its plan differs in runs, as on a host"):
        results.Journal(here, {**EXPERIMENT, "plan": {"conditions": [], "runs": [1]}})
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "experiment.json.new").touch()  # of one that was killed as it began
    results.Journal(str(tmp_path / "cut"), EXPERIMENT).close()
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "thesis.txt").touch()
    with pytest.raises(UsageError, match="not empty"):
        results.Journal(str(tmp_path / "else"), EXPERIMENT)
    with pytest.raises(UsageError, match="No such file"):
        results.read(str(tmp_path / "else"))


FULL = """
import sys
from hostpart.experiment import results
from hostpart.errors import Failed
journal = results.Journal(sys.argv[1], {"schema": 1, "name": "", "design": {}, "plan": {"conditions": [], "runs": []}})
made = 0
try:
    while True:
        journal.append({"schema": 1, "run": made, "error": None, "filling": "x" * 1000})
        made += 1
except Failed as error:
    print(made, error, error.remedy, sep="\\n")
"""


def test_a_full_disk_costs_nothing_that_was_written(tmp_path: Path) -> None:
    """On a file system of 64 KiB, mounted in namespaces of the test's own."""
    source = str(Path(results.__file__).parents[2])
    script = (
        f'mount -t tmpfs -o size=64k none "$1" && cd "$1" && PYTHONPATH={source} "$2" -c "$3" out && cat out/runs.jsonl'
    )
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script, "sh", str(tmp_path), sys.executable, FULL],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode and ("unshare" in done.stderr or "mount" in done.stderr):
        pytest.skip(f"needs a mount namespace: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    made, problem, remedy, *lines = done.stdout.splitlines()
    assert "No space left on device" in problem
    assert "goes on where it stopped" in remedy
    assert [json.loads(line)["run"] for line in lines] == list(range(int(made)))
    assert int(made) > 10


def test_a_limit_on_files_is_met_likewise(tmp_path: Path) -> None:
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (5000, {resource.RLIM_INFINITY}))\n{FULL}"
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "o")], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[0] == "4"
    assert len((tmp_path / "o" / "runs.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_written_is_an_error_with_a_remedy() -> None:
    with pytest.raises(Failed, match="cannot be written to /proc/nowhere"):
        results.Journal("/proc/nowhere", EXPERIMENT)


# -- runs ----------------------------------------------------------------------------------------------------


@needs_two
def test_an_experiment_from_its_plan_to_its_runs(place: Place, tmp_path: Path) -> None:
    file, out = _file(tmp_path), tmp_path / "out"
    planned = place.run("experiment", "--plan", file, "--json", "--out", str(out))
    assert planned.returncode == 0, planned.stderr
    document = json.loads(planned.stdout)
    assert not out.exists()
    done = place.run("experiment", file, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert json.loads((out / "experiment.json").read_text()) == document
    runs = _runs(out)
    assert [run["run"] for run in runs] == [one["run"] for one in document["plan"]["runs"]]
    assert [run["condition"] for run in runs] == [one["condition"] for one in document["plan"]["runs"]]
    victim = runs[0]["victim_pcpu"]
    assert all(run["record"]["where"]["cpus_allowed"] == str(victim) for run in runs)
    assert all(run["evidence"]["vcpus"][0]["pcpu"] == victim for run in runs)
    assert [run["metrics"] == run["record"]["metrics"] and run["primary"] for run in runs] == ["time_lost"] * 3
    alone, beside, _ = (run["metrics"]["time_lost"]["value"] for run in runs)
    assert [len(run["aggressors"]) for run in runs] == [0, 2, 0]
    for one in runs[1]["aggressors"]:
        assert (one["alive"], one["as"], one["pcpus"]) == (True, "host", str(victim))
        assert procfs.read_stat(one["pid"]) is None
    # Two spinners on the victim's own pCPU take two thirds of it; what else runs here takes some of the rest.
    assert beside > max(alone, 40)
    (session,) = (json.loads(line) for line in (out / "sessions.jsonl").read_text().splitlines())
    assert session["facts"]["kernel"]["release"] == os.uname().release
    assert session["command"][1:] == ["experiment", file, "--out", str(out)]
    _check("experiment", document)
    _check("session", session)
    _check("analysis", json.loads((out / "analysis.json").read_text()))
    for run in runs:
        _check("run", run)
    assert "noise on pCPU" in done.stdout
    assert place.is_clean()
    again = place.run("experiment", file, "--out", str(out))
    assert "all 3 runs are made already" in again.stderr
    assert len(_runs(out)) == 3


@pytest.mark.skipif(bool(guest_os.lacks()), reason=guest_os.lacks() or "-")
def test_a_victim_inside_a_guest_and_its_aggressor_outside(place: Place, tmp_path: Path) -> None:
    machine = f'\nqemu = {{ kernel = "{guest_os.kernel()}", append = "{guest_os.QUIET}", accelerator = "tcg" }}\n'
    file, out = _file(tmp_path, QUICK.replace("\n[[aggressor]]", f"{machine}[[aggressor]]")), tmp_path / "out"
    done = place.run("experiment", file, "--out", str(out), timeout=200)
    assert done.returncode == 0, done.stderr
    document = json.loads((out / "experiment.json").read_text())
    assert document["design"]["victims"][0]["qemu"]["accelerator"] == "tcg"
    _check("experiment", document)
    runs = _runs(out)
    assert [run["victim"] for run in runs] == ["noise-in-guest"] * 3
    for run in runs:
        _check("run", run)
        # It ran inside, where there is one CPU, and its VM's evidence is of the thread that was this CPU.
        assert run["record"]["where"]["cpus_allowed"] == "0"
        (vcpu,) = run["evidence"]["vcpus"]
        assert (vcpu["kind"], vcpu["pcpu"]) == ("qemu", run["victim_pcpu"])
        assert run["metrics"]["time_lost"]["value"] > 0
    assert [len(run["aggressors"]) for run in runs] == [0, 2, 0]
    assert place.is_clean()


@needs_two
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_experiment_that_was_ended_goes_on(place: Place, tmp_path: Path, number: signal.Signals) -> None:
    file, out = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 0.6")), tmp_path / "out"
    process = place.start("experiment", "--no-report", file, "--out", str(out))
    assert wait_until(lambda: (out / "runs.jsonl").exists() and len(_runs(out)) == 1, 30)
    # The second run has aggressors: it is ended in the middle of that one.
    assert wait_until(lambda: len(place.processes()) >= 5, 30)
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    # Of what it started nothing is left, also where it had no time to end it.
    assert wait_until(place.is_clean, 30), place.processes()
    assert len(_runs(out)) == 1
    if number != signal.SIGKILL:
        assert "stopped with 1 of 3 runs made; the same command goes on: hostpart experiment" in told
    done = place.run("experiment", "--no-report", file, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert "1 of 3 runs are made already" in done.stderr
    assert [(run["run"], run["session"]) for run in _runs(out)] == [(0, 0), (1, 1), (2, 1)]


@needs_two
def test_an_aggressor_that_dies_early_is_said(place: Place, tmp_path: Path) -> None:
    text = QUICK.replace('probe = "spin"', 'command = ["sh", "-c", "exec sleep 0.05"]').replace("count = 2", "")
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 1
    assert "spinners ended before the victim (exit status 0)" in done.stderr
    (failed,) = (run for run in _runs(tmp_path / "a") if run["error"])
    assert failed["condition"].endswith("same-pcpu")
    assert failed["aggressors"][0]["alive"] is False
    # Made again, it is the failed run that is made anew.
    again = place.run("experiment", "--no-report", str(tmp_path / "quick.toml"), "--out", str(tmp_path / "a"))
    assert "2 of 3 runs are made already" in again.stderr
    assert [run["run"] for run in _runs(tmp_path / "a")] == [0, 1, 2, 1]
    assert place.is_clean()


@needs_two
def test_commands_are_victims_and_one_that_crashes_does_not_stop_the_others(place: Place, tmp_path: Path) -> None:
    text = """
    processes = 3
    placements = ["same-pcpu"]
    settle = 0
    [[victim]]
    name = "crashes"
    command = ["sh", "-c", "echo boo >&2; exit 3"]
    [[victim]]
    name = "figure"
    command = ["sh", "-c", "echo took 4.5 us"]
    metric = 'took ([0-9.]+) us'
    unit = "us"
    """
    done = place.run("experiment", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 1
    runs = _runs(tmp_path / "a")
    assert [run["victim"] for run in runs if run["error"]] == ["crashes"] * 3  # and is then given up
    assert "given up, since run after run failed: crashes; the same command tries again" in done.stderr
    figures = [run["metrics"][run["primary"]] for run in runs if run["victim"] == "figure"]
    assert figures == [{"value": 4.5, "unit": "us", "better": "lower"}] * 3
    assert all(run["metrics"]["wall"]["value"] > 0 for run in runs if run["victim"] == "figure")
    assert "exit status 3: boo" in done.stderr
    assert "missing: crashes|affinity|alone: 0 of 3 runs: 3 runs failed" in done.stdout
    assert "crashes" in (tmp_path / "a" / "report.html").read_text()
    assert place.is_clean()


@needs_two
def test_what_an_aggressor_has_started_ends_with_it(place: Place, tmp_path: Path) -> None:
    script = f"sleep 1000 & setsid sleep 1000 & echo $! > {tmp_path}/pid; sleep 1000"
    text = QUICK.replace('probe = "spin"', f"command = ['sh', '-c', '{script}']").replace("count = 2", "")
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert procfs.read_stat(int((tmp_path / "pid").read_text())) is None
    assert place.is_clean()


@needs_two
def test_levels_are_a_factor_and_an_aggressor_can_be_a_vm(place: Place, tmp_path: Path) -> None:
    text = QUICK.replace("placements", 'isolation = ["affinity", "sweep"]\nplacements')
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    levels = {run["isolation"]: run["evidence"]["isolation"]["reached"] for run in _runs(tmp_path / "a")}
    assert levels == {"affinity": "affinity", "sweep": "sweep"}


def test_a_taken_pcpu_is_refused_before_anything_is_made(place: Place, tmp_path: Path) -> None:
    count = len(os.sched_getaffinity(0)) - 1
    if not count:
        pytest.skip("needs two usable pCPUs")
    process = place.start("run", "-n", str(count), "--", "sleep", "60")
    assert wait_until(lambda: len(place.free()) == 1)
    done = place.run("experiment", _file(tmp_path), "--out", str(tmp_path / "a"))
    assert done.returncode == 3
    assert "the plan takes pCPU" in done.stderr
    assert "of which a VM has" in done.stderr
    assert not (tmp_path / "a" / "runs.jsonl").read_text()
    process.terminate()
    process.wait(30)


def test_progress_on_a_terminal_and_elsewhere(place: Place, tmp_path: Path) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two usable pCPUs")
    file = _file(tmp_path)
    master, slave = os.openpty()
    process = place.start(
        "experiment", "--no-report", file, "--out", str(tmp_path / "a"), stderr=slave, stdout=subprocess.DEVNULL
    )
    os.close(slave)
    shown = b""
    while process.poll() is None:
        try:
            shown += os.read(master, 65536)
        except OSError:
            break
        time.sleep(0.01)
    os.close(master)
    assert process.wait(30) == 0
    text = shown.decode("utf-8", "replace")
    assert "now: noise alone on pCPU" in text
    assert "of 3" in text
    assert "left" in text
    plain = place.run("experiment", "--no-report", file, "--out", str(tmp_path / "b"))
    lines = plain.stderr.splitlines()
    assert [line.split(":")[0] for line in lines if line.startswith("run ")] == [f"run {n} of 3" for n in (1, 2, 3)]
    assert "\x1b" not in plain.stderr


def _open_terminal(place: Place, *args: str) -> tuple[subprocess.Popen[str], int]:
    # A command with a terminal of its own, which is its controlling one.
    master, slave = os.openpty()
    process = place.start(*args, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    return process, master


@needs_two
def test_a_terminal_that_is_closed_costs_no_run(place: Place, tmp_path: Path) -> None:
    file, out = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 0.5")), tmp_path / "out"
    process, master = _open_terminal(place, "experiment", "--no-report", file, "--out", str(out))
    assert wait_until(lambda: (out / "runs.jsonl").exists() and len(_runs(out)) == 1, 30)
    os.close(master)
    # There is no job control here, so nobody sends SIGHUP: it goes on, and says nothing.
    assert process.wait(60) == 0
    assert len(_runs(out)) == 3
    assert wait_until(place.is_clean)


@needs_two
def test_nohup_is_minded(place: Place, tmp_path: Path) -> None:
    file, out = _file(tmp_path), tmp_path / "out"
    process = place.start(
        "experiment", "--no-report", file, "--out", str(out),
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN),
    )  # fmt: skip
    assert wait_until(lambda: (out / "runs.jsonl").exists() and len(_runs(out)) == 1, 30)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(_runs(out)) == 3


@needs_two
def test_a_suspended_experiment_leaves_nothing_running_and_makes_the_run_again(place: Place, tmp_path: Path) -> None:
    file, out = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 1.5")), tmp_path / "out"
    process = place.start("experiment", "--no-report", file, "--out", str(out))
    assert wait_until(lambda: (out / "runs.jsonl").exists() and len(_runs(out)) == 1, 30)
    assert wait_until(lambda: len(place.processes()) >= 5, 30)
    process.send_signal(signal.SIGTSTP)
    stopped = wait_until(lambda: (stat := procfs.read_stat(process.pid)) is not None and stat.state == "T", 30)
    assert stopped
    assert wait_until(lambda: place.processes() == [process.pid]), place.processes()
    process.send_signal(signal.SIGCONT)
    assert process.wait(60) == 0
    assert [(run["run"], run["error"]) for run in _runs(out)] == [(0, None), (1, None), (2, None)]
    assert place.is_clean()


@needs_two
def test_signals_in_a_row_leave_nothing(place: Place, tmp_path: Path) -> None:
    file, out = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 5")), tmp_path / "out"
    process = place.start("experiment", file, "--out", str(out))
    assert wait_until(lambda: len(place.processes()) >= 3, 30)
    for _ in range(5):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in told
    assert wait_until(place.is_clean), place.processes()
    assert not (out / "running").exists()


@needs_two
def test_an_aggressor_is_at_work_before_the_victim_is(place: Place, tmp_path: Path) -> None:
    """Its loop is compiled first, which takes longer than the victim's whole run."""
    text = QUICK.replace('probe = "spin"', 'probe = "integer"').replace("count = 2", "")
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    one = _runs(tmp_path / "a")[1]
    assert one["aggressors"][0]["did"]["value"] > 0
    assert one["record"]["metrics"]["time_lost"]["value"] > 20


@needs_two
def test_an_aggressor_that_goes_elsewhere_is_said(place: Place, tmp_path: Path) -> None:
    script = "taskset -pc 0-8191 $$ > /dev/null; while :; do :; done"
    text = QUICK.replace('probe = "spin"', f"command = ['sh', '-c', '{script}']").replace("count = 2", "")
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 1
    assert "spinners was to run on pCPU" in done.stderr
    assert place.is_clean()


@needs_two
def test_what_an_aggressor_writes_is_not_kept(place: Place, tmp_path: Path) -> None:
    lines = '{"schema":1,"metrics":{"x":{"value":NaN}},"primary":"x"}'
    script = f"yes {json.dumps(lines)} | head -c 50000000; exec sleep 100"
    text = QUICK.replace('probe = "spin"', f"command = ['sh', '-c', {json.dumps(script)}]").replace("count = 2", "")
    done = place.run("experiment", "--no-report", _file(tmp_path, text), "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a" / "runs.jsonl").stat().st_size < 200_000


@needs_two
def test_a_users_own_settings_for_probes_are_no_part_of_it(place: Place, tmp_path: Path) -> None:
    place.env |= {"HOSTPART_PROBE_SLICE_MS": "1", "HOSTPART_PROBE_THRESHOLD_NS": "5000000"}
    done = place.run("experiment", "--no-report", _file(tmp_path), "--out", str(tmp_path / "a"))
    assert done.returncode == 0, done.stderr
    assert {run["record"]["parameters"]["slice_ms"] for run in _runs(tmp_path / "a")} == {100}


@needs_two
def test_one_experiment_at_a_time(place: Place, tmp_path: Path) -> None:
    file = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 30"))
    process = place.start("experiment", "--no-report", file, "--out", str(tmp_path / "a"))
    assert wait_until(lambda: len(place.processes()) >= 3, 30)
    second = place.run("experiment", "--no-report", file, "--out", str(tmp_path / "b"))
    assert (second.returncode, "another experiment runs on this host" in second.stderr) == (2, True)
    same = place.run("experiment", "--no-report", file, "--out", str(tmp_path / "a"))
    assert (same.returncode, "another process is writing" in same.stderr) == (2, True)
    process.terminate()
    assert process.wait(60) == 128 + signal.SIGTERM


def test_a_level_that_cannot_be_reached_is_refused_before_anything_is_made(nobodys_place: Place) -> None:
    folder = nobodys_place.leases.parent
    file = _file(folder, QUICK.replace("processes", 'isolation = ["affinity", "cpuset"]\nprocesses'))
    out = folder / "run" / "out"
    done = nobodys_place.run("experiment", "--no-report", file, "--out", str(out))
    assert done.returncode == 4, done.stderr
    assert "level 'cpuset' is required and cannot be reached" in done.stderr
    assert not (out / "runs.jsonl").read_text()


@needs_two
def test_strict_weighs_what_was_not_planned(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "a"
    assert place.run("experiment", "--no-report", _file(tmp_path), "--out", str(out)).returncode == 0
    made = _runs(out)

    def judged(**verdicts: str) -> int:
        for run in made:
            run["verdict"] = verdicts["alone" if run["aggressor"] is None else "beside"]
        (out / "runs.jsonl").write_text("".join(json.dumps(run) + "\n" for run in made))
        return place.run(
            "experiment", "--no-report", "--strict", str(tmp_path / "quick.toml"), "--out", str(out)
        ).returncode

    assert judged(alone="held", beside="tainted") == 0
    assert judged(alone="tainted", beside="tainted") == 5
    assert judged(alone="held", beside="broken") == 5


def test_placements_that_the_host_lacks_are_told(place: Place, tmp_path: Path) -> None:
    lacking = _file(tmp_path, QUICK.replace('"same-pcpu"', '"other-package"'), "a.toml")
    some = _file(tmp_path, QUICK.replace('"same-pcpu"', '"same-pcpu", "other-package"'), "b.toml")
    one = place.run("experiment", "--plan", lacking, "--host", "tests/machines/2c-firecracker", cwd=ROOT)
    assert (one.returncode, "this host has none of the placements other-package" in one.stderr) == (2, True)
    two = place.run("experiment", "--plan", some, "--host", "tests/machines/2c-firecracker", cwd=ROOT)
    assert (two.returncode, two.stderr) == (0, "hostpart: this host has no other-package: left out\n")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--seconds", "0"), ("--seconds", "1e8"), ("--seconds", "nan"), ("--seed", "-1"), ("--seed", "9" * 23),
     ("--processes", "0"), ("--processes", "10001"), ("--processes", "x")],
)  # fmt: skip
def test_options_take_what_the_file_takes(place: Place, option: str, value: str) -> None:
    done = place.run("experiment", "--plan", "example:interference", option, value)
    assert done.returncode == 2
    assert f"argument {option}: want a " in done.stderr


@needs_two
def test_without_the_extra_runs_are_made_where_no_page_is_wanted(place: Place, tmp_path: Path) -> None:
    (tmp_path / "rich").mkdir()
    (tmp_path / "rich" / "__init__.py").write_text("raise ImportError('not installed')")
    place.env["PYTHONPATH"] = str(tmp_path)
    process, master = _open_terminal(place, "experiment", "--no-report", _file(tmp_path), "--out", str(tmp_path / "a"))
    assert process.wait(60) == 0
    os.close(master)
    closed = place.run("experiment", "--no-report", _file(tmp_path), "--out", str(tmp_path / "b"))
    assert closed.returncode == 0


# -- events ---------------------------------------------------------------------------------------------------


def _events(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@needs_two
def test_events_tell_what_the_journal_keeps_and_make_no_report(place: Place, tmp_path: Path) -> None:
    file, out, told = _file(tmp_path), tmp_path / "out", tmp_path / "events"
    done = place.run("experiment", file, "--out", str(out), "--events", str(told))
    assert done.returncode == 0, done.stderr
    events = _events(told)
    assert [event["event"] for event in events] == ["experiment", "session", *["run"] * (len(events) - 3), "over"]
    assert events[0]["document"] == json.loads((out / "experiment.json").read_text())
    assert events[1]["session"] == json.loads((out / "sessions.jsonl").read_text())
    assert [event["run"] for event in events[2:-1]] == _runs(out)
    assert events[-1] == {"event": "over", "exit_code": 0}
    assert not (out / "report.html").exists()
    # The same again, elsewhere: what was made is told of, and nothing is made.
    again = tmp_path / "again"
    assert place.run("experiment", file, "--out", str(out), "--events", str(again)).returncode == 0
    assert [event["run"] for event in _events(again)[1:-1]] == _runs(out)


@needs_two
def test_a_resumed_experiment_tells_first_of_what_was_made(place: Place, tmp_path: Path) -> None:
    file, out, told = _file(tmp_path, QUICK.replace("seconds = 0.1", "seconds = 0.5")), tmp_path / "out", tmp_path / "e"
    process = place.start("experiment", file, "--out", str(out), "--events", str(told))
    assert wait_until(lambda: told.exists() and '"event":"run"' in told.read_text(), 30)
    process.terminate()
    assert process.wait(30) == 143
    first = _events(told)
    assert first[-1] == {"event": "over", "exit_code": 143}
    made = [event["run"] for event in first if event["event"] == "run"]
    done = place.run("experiment", file, "--out", str(out), "--events", str(told))
    assert done.returncode == 0, done.stderr
    then = _events(told)[len(first) :]
    assert [event["event"] for event in then[: 2 + len(made)]] == ["experiment", "session", *["run"] * len(made)]
    assert [event["run"] for event in then[2 : 2 + len(made)]] == made
    assert [event["run"] for event in then[2:-1]] == _runs(out)


def test_an_error_is_an_event_too(place: Place, tmp_path: Path) -> None:
    told = tmp_path / "events"
    for words in (("no-such.toml",), (_file(tmp_path), "--plan"), (_file(tmp_path), "--json")):
        done = place.run("experiment", *words, "--events", str(told))
        assert done.returncode == 2
        error, over = _events(told)[-2:]
        assert (error["event"], error["exit_code"]) == ("error", 2)
        assert error["problem"] in done.stderr
        assert over == {"event": "over", "exit_code": 2}
