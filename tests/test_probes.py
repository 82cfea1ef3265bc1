"""Probes: each one's real record against its schema and its laws, what ends them early, and what they refuse."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import mmap
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hostpart.cli.run import PROBES
from tests.conftest import Place, wait_until
from workers import probes
from workers.probes import handover, histogram, noise, parameter, record, seat
from workers.probes.handover import WAYS
from workers.probes.histogram import Histogram
from workers.probes.latency import sizes
from workers.probes.measurement import Measurement, Probe
from workers.probes.parameter import Parameter
from workers.probes.refusal import Refused

FOLDER = Path(str(probes.__file__)).parent
SCHEMA: dict[str, Any] = json.loads((FOLDER / "record.schema.json").read_text())
SHORT = {"seconds": "0.3", "warmup": "0.05", "slice_ms": "50", "json": "1"}
# Small buffers: what is tested is the record, and other tests run beside this one.
SMALL = {
    "memory": {"buffer_mib": "2"},
    "thrash": {"buffer_mib": "2"},
    "latency": {"buffer_kib": "256"},
    "noise": {"threshold_ns": "5000"},
}
needs_numba = pytest.mark.skipif(
    importlib.util.find_spec("numba") is None, reason="needs numba: pip install 'hostpart[probes]'"
)
BOTH = ["python", pytest.param("numba", marks=needs_numba)]
ALONE = [
    pytest.param(name, engine, id=f"{name}, {engine}", marks=[needs_numba] if engine == "numba" else [])
    for name in PROBES
    if name not in ("pingpong", "command")  # which have tests of their own
    for engine in importlib.import_module(f"workers.probes.{name}").PROBE.engines
]
USABLE = sorted(os.sched_getaffinity(0))


def environ(options: Mapping[str, str], **more: str) -> dict[str, str]:
    """Return an environment with these options for a probe, and without any other of hostpart's."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("HOSTPART_")}
    named = {f"HOSTPART_PROBE_{name.upper()}": value for name, value in options.items()}
    return {**clean, **named, **more}


def start(
    name: str, options: Mapping[str, str], cpu: int = USABLE[-1], short: Mapping[str, str] = SHORT, **more: str
) -> subprocess.Popen[str]:
    """Start a probe by itself, as a guest is called but in a process of its own, pinned to one pCPU."""
    code = (
        f"import os, sys; os.sched_setaffinity(0, {{{cpu}}}); from workers.probes.{name} import main; sys.exit(main())"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code],
        env=environ({**short, **SMALL.get(name, {}), **options}, **more),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=FOLDER.parent.parent,
    )


def measured(name: str, **options: str) -> dict[str, Any]:
    """Run a probe and return its record, which is all that it wrote."""
    process = start(name, options)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return checked(out)


def checked(line: str) -> dict[str, Any]:
    """Return the record in *line*, checked against the schema and against what holds for every record."""
    assert line.count("\n") == 1
    found: dict[str, Any] = json.loads(line)
    jsonschema.validate(found, SCHEMA)
    if found["primary"] is not None:
        assert found["primary"] in found["metrics"]
    for one in found["histograms"].values():
        assert sum(count for _, _, count in one["buckets"]) == one["count"]
        assert [low for low, _, _ in one["buckets"]] == sorted(low for low, _, _ in one["buckets"])
        if one["count"]:
            below = one["buckets"][-1][1]
            assert one["buckets"][0][0] <= one["min"] <= one["max"] < (math.inf if below is None else below)
    slices = found["slices"]
    assert len(slices["start_ns"]) == len(slices["length_ns"])
    for series in slices["series"].values():
        assert len(series["values"]) == len(slices["start_ns"])
    if found["started"] and found["ended"]:
        length = found["ended"]["monotonic_ns"] - found["started"]["monotonic_ns"]
        assert sum(slices["length_ns"]) <= length
        assert all(0 <= offset <= length for offset in slices["start_ns"])
    return found


def value(found: dict[str, Any], name: str) -> float:
    """Return one metric's value."""
    number = found["metrics"][name]["value"]
    assert isinstance(number, int | float)
    return number


# -- every probe ---------------------------------------------------------------------------------------


def test_the_command_line_knows_every_probe_there_is() -> None:
    modules = {path.stem for path in FOLDER.glob("*.py") if "\nPROBE = " in path.read_text()}
    assert set(PROBES) == modules
    for name in PROBES:
        probe = importlib.import_module(f"workers.probes.{name}").PROBE
        assert (probe.name, name in probe.help()) == (name, True)


@pytest.mark.parametrize(("name", "engine"), ALONE)
def test_a_probe_writes_one_record_that_its_schema_describes(name: str, engine: str) -> None:
    found = measured(name, engine=engine)
    assert (found["probe"], found["engine"], found["fallback"]) == (name, engine, None)
    assert found["cut_short"] is False
    assert found["parameters"]["seconds"] == 0.3
    assert found["where"]["cpus_allowed"] == str(USABLE[-1])
    assert found["where"]["cpus_seen"] == [USABLE[-1]]
    assert found["where"]["vm"] is None
    assert found["metrics"][found["primary"]]["value"] is not None
    length = found["ended"]["monotonic_ns"] - found["started"]["monotonic_ns"]
    assert length >= 300_000_000
    assert found["slices"]["length_ns"]
    if found["calibration"]:
        assert found["calibration"]["floor_ns"] > 0
    assert found["calibration"] or name in ("spin", "thrash")  # which measure nothing


ORDER = """
import sys
from workers.probes import engine, measurement
from workers.probes.{name} import main

def told(function, name):
    def tell(*args, **more):
        sys.stderr.write(name + "\\n")
        return function(*args, **more)
    return tell

engine.compiled = told(engine.compiled, "compiled")
engine.calibrate = told(engine.calibrate, "calibrated")
measurement.Measurement.slices = told(measurement.Measurement.slices, "measured")
sys.exit(main())
"""


@pytest.mark.parametrize(("name", "engine"), ALONE)
def test_a_probe_is_compiled_and_its_floor_measured_before_its_warm_up(name: str, engine: str) -> None:
    options = {**SHORT, **SMALL.get(name, {}), "engine": engine, "seconds": "0.05"}
    ran = subprocess.run(
        [sys.executable, "-c", ORDER.format(name=name)], env=environ(options), cwd=FOLDER.parent.parent,
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    order = ran.stderr.split()
    assert order[-1] == "measured"
    assert order.count("calibrated") == (name not in ("spin", "thrash"))
    assert ("compiled" in order) is (engine == "numba")


@pytest.mark.parametrize("engine", BOTH)
def test_noise_loses_no_more_time_than_there_was_and_counts_each_gap_once(engine: str) -> None:
    found = measured("noise", engine=engine, threshold_ns="2000")
    gaps, series = found["histograms"]["gap"], found["slices"]["series"]
    length = found["ended"]["monotonic_ns"] - found["started"]["monotonic_ns"]
    assert value(found, "lost") <= value(found, "observed") <= length
    assert value(found, "time_lost") == pytest.approx(100 * value(found, "lost") / value(found, "observed"))
    assert sum(series["events"]["values"]) == gaps["count"]
    assert sum(series["time_lost"]["values"]) == value(found, "lost")
    assert max(series["longest_gap"]["values"]) == value(found, "longest_gap") == (gaps["max"] or 0)
    assert found["calibration"]["threshold_ns"] == 2000
    assert gaps["min"] is None or gaps["min"] > 2000


def stop_again_and_again(process: subprocess.Popen[str]) -> None:
    """Stop it for 0.4 s at a time until it has ended: it takes a while to start, the longer the busier the machine."""
    while process.poll() is None:
        time.sleep(0.7)
        process.send_signal(signal.SIGSTOP)
        time.sleep(0.4)
        process.send_signal(signal.SIGCONT)


@pytest.mark.parametrize("engine", BOTH)
def test_noise_sees_that_its_process_was_stopped(engine: str) -> None:
    process = start("noise", {"engine": engine, "seconds": "2", "slice_ms": "100"})
    stop_again_and_again(process)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    found = checked(out)
    assert value(found, "longest_gap") >= 400_000_000
    assert value(found, "lost") >= 400_000_000
    assert found["histograms"]["gap"]["max"] >= 400_000_000


def test_noise_counts_a_gap_between_two_slices_unless_it_is_its_own_work(monkeypatch: pytest.MonkeyPatch) -> None:
    # First and last reading of four slices: 100 us of its own before the second, 5 ms of others' before the third.
    readings = iter([(0, 10_000_000), (10_100_000, 20_000_000), (25_000_000, 30_000_000), (30_900_000, 40_000_000)])
    run = bare(seconds=600.0, warmup=0.0, slice_ms=1, threshold_ns=1_000_000)

    def watch(_until_ns: int) -> tuple[int, int]:
        first, last = next(readings)
        if last == 40_000_000:
            run.leave(cut_short=False)
        return first, last

    monkeypatch.setattr(noise, "_interpreted", lambda _threshold_ns: (watch, list))
    noise.PROBE.measure(run)
    found = run.document()
    assert [value(found, name) for name in ("longest_gap", "lost", "observed")] == [5_000_000, 5_000_000, 39_000_000]
    assert found["slices"]["series"]["events"]["values"] == [0, 0, 1, 0]


def test_a_wakeup_is_never_early_and_each_one_counts() -> None:
    found = measured("wakeup", engine="python", interval_us="2000")
    latency = found["histograms"]["latency"]
    assert latency["count"] == value(found, "wakeups") == sum(found["slices"]["series"]["wakeups"]["values"]) > 0
    assert latency["min"] >= 0
    assert value(found, "latency_max") == latency["max"]
    assert value(found, "latency_p50") <= value(found, "latency_p99") <= value(found, "latency_p99_9") <= latency["max"]


def test_an_interval_may_be_longer_than_a_slice() -> None:
    found = measured("wakeup", engine="python", interval_us="150000", seconds="0.4", slice_ms="20")
    assert 1 <= value(found, "wakeups") <= 4
    assert len(found["slices"]["length_ns"]) == value(found, "wakeups")


@pytest.mark.parametrize("engine", BOTH)
def test_a_sleep_that_a_signal_ends_is_no_wakeup(engine: str) -> None:
    options = {"engine": engine, "seconds": "600", "warmup": "0", "interval_us": "10000000"}
    process = start("wakeup", options)
    assert wait_until(lambda: catches(process, signal.SIGTERM) and sleeps(process.pid), 120)
    process.terminate()
    out, err = process.communicate(timeout=5)
    assert (process.returncode, err) == (0, "")
    found = checked(out)
    assert (value(found, "wakeups"), found["histograms"]["latency"]["count"]) == (0, 0)
    assert found["cut_short"] is True


def sleeps(pid: int) -> bool:
    """Whether the process is in a sleep that lasts, which one that calibrates or compiles is not."""
    for _ in range(20):
        if Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "S":
            return False
        time.sleep(0.01)
    return True


def test_a_wakeup_sees_that_its_process_was_stopped() -> None:
    process = start("wakeup", {"engine": "python", "seconds": "2"})
    stop_again_and_again(process)
    out, _ = process.communicate()
    found = checked(out)
    assert value(found, "latency_max") >= 390_000_000
    assert value(found, "missed") >= 390  # of those that were due meanwhile, one a millisecond


@needs_numba
def test_latency_measures_the_level_that_was_asked_for() -> None:
    found = measured("latency", level="l1", buffer_kib="16", seconds="0.2")
    assert list(found["metrics"]) == ["load_l1"]
    assert found["primary"] == "load_l1"
    assert found["parameters"]["buffer_bytes"] == {"l1": 16384}


def test_latencys_buffers_fit_their_caches() -> None:
    kib = 1024
    found = sizes({"l1": 32 * kib, "l2": 1024 * kib, "llc": 32768 * kib, "line": 64})
    assert found == {"l1": 16 * kib, "l2": 512 * kib, "llc": 16384 * kib, "memory": 131072 * kib}
    assert sizes({"l1": 32 * kib, "l2": 512 * kib, "llc": 512 * kib, "line": 64})["llc"] is None
    assert sizes({"l1": None, "l2": None, "llc": None, "line": None})["l1"] is None


def test_syscalls_forks_leave_no_process_behind() -> None:
    found = measured("syscalls", what="forks")
    assert list(found["slices"]["series"]) == ["forks"]
    assert found["histograms"]["fork"]["count"] > 0
    assert found["primary"] == "forks"


# -- two vCPUs -----------------------------------------------------------------------------------------


def pair(token: str, **options: str) -> list[subprocess.Popen[str]]:
    """Start both sides of a ping-pong."""
    return [
        start(
            "pingpong", options, USABLE[-1 - vcpu % len(USABLE)], HOSTPART_VM="pair", HOSTPART_RUN=token,
            HOSTPART_VCPU=str(vcpu), HOSTPART_VCPUS="2", HOSTPART_PCPU=str(USABLE[-1 - vcpu % len(USABLE)]),
        )
        for vcpu in range(2)
    ]  # fmt: skip


@pytest.mark.usefixtures("two_pcpus")
@pytest.mark.parametrize(
    ("engine", "how"),
    [
        pytest.param(engine, how, id=f"{how}, {engine}", marks=[needs_numba] if engine == "numba" else [])
        for how in WAYS
        for engine in ("python", "numba")
        if (how, engine) != ("cas", "python")
    ],
)
def test_ping_pong_goes_to_and_fro_between_two_vcpus(engine: str, how: str, tmp_path: Path) -> None:
    # On a busy machine the two seldom run at the same time, and a round can take seconds.
    leads, follows = pair(str(tmp_path), engine=engine, how=how, seconds="5")
    outs = [side.communicate(timeout=180) for side in (leads, follows)]
    assert [(side.returncode, err) for side, (_, err) in zip((leads, follows), outs, strict=True)] == [(0, "")] * 2
    first, second = (checked(out) for out, _ in outs)
    assert (first["parameters"]["role"], second["parameters"]["role"]) == ("leads", "follows")
    assert first["cut_short"] is False
    assert second["cut_short"] is False
    done = value(first, "round_trips_done")
    assert first["histograms"]["round_trip"]["count"] == done > 0
    assert sum(first["slices"]["series"]["round_trips"]["values"]) == done
    assert value(first, "round_trips") > 0
    assert value(first, "hand_overs") == pytest.approx(2 * value(first, "round_trips"))
    assert 0 < value(first, "round_trip_p50") <= value(first, "round_trip_p99") <= value(first, "round_trip_max")
    assert value(second, "round_trips_done") > 0
    assert (second["histograms"], second["primary"]) == ({}, None)
    assert [one["parameters"]["how"] for one in (first, second)] == [how, how]
    assert all(one["calibration"]["floor_ns"] > 0 for one in (first, second))


@pytest.mark.parametrize("leads", [True, False], ids=["leads", "follows"])
@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("engine", BOTH)
def test_no_round_is_done_while_the_other_side_does_nothing(engine: str, how: str, leads: bool) -> None:
    if (how, engine) == ("cas", "python"):
        with pytest.raises(Refused, match="compare-and-swap takes a compiled loop"):
            handover.prepare(how, engine, leads=leads)
        return
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    handover.set_up(words)
    rounds = handover.prepare(how, engine, leads=leads)(words)
    since = 0
    for _ in range(3):
        done, since, times = rounds(1, since, time.monotonic_ns() + 5_000_000)
        assert (done, times) == (0, [])
    if leads:  # it waits since it handed over, and did that once; who follows has nothing out
        assert 0 < since < time.monotonic_ns()
        assert handover.prepare(how, engine, leads=False)(words)(1, 0, time.monotonic_ns() + 5_000_000)[0] == 1


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("engine", BOTH)
def test_a_side_that_waits_sees_that_it_is_over(engine: str, how: str) -> None:
    if (how, engine) == ("cas", "python"):
        pytest.skip("interpreted there is no compare-and-swap")
    words = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("q")
    handover.set_up(words)
    rounds = handover.prepare(how, engine, leads=False)(words)
    words[handover.PING] = handover.OVER
    handover.wake(words, handover.PING)
    began = time.monotonic_ns()
    assert rounds(1, 0, began + 60_000_000_000)[0] == 0
    assert time.monotonic_ns() - began < 30_000_000_000


COUNTING = """
import ctypes, mmap, os, sys
cpu, fd, turns = map(int, sys.argv[1:])
os.sched_setaffinity(0, {cpu})
from workers.probes import engine
load, swap = engine.load(), engine.compare_and_swap()

def add(counter, turns):
    for _ in range(turns):
        while True:
            seen = load(counter)
            if swap(counter, seen, seen + 1) == seen:
                break

add = engine.compiled(add, "void(int64, int64)")
page = mmap.mmap(fd, mmap.PAGESIZE)
word = ctypes.addressof(ctypes.c_int64.from_buffer(page))
print("ready", flush=True)
sys.stdin.readline()
add(word, turns)
"""


@needs_numba
@pytest.mark.usefixtures("two_pcpus")
def test_no_increment_by_compare_and_swap_is_lost() -> None:
    # Some ten million each, so that the two surely run at the same time for a while, on a busy machine too.
    turns = 10_000_000
    fd = os.memfd_create("counter")
    os.ftruncate(fd, mmap.PAGESIZE)
    sides = [
        subprocess.Popen(
            [sys.executable, "-c", COUNTING, str(cpu), str(fd), str(turns)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[fd], cwd=FOLDER.parent.parent,
        )
        for cpu in USABLE[-2:]
    ]  # fmt: skip
    for side in sides:
        assert side.stdout
        assert side.stdout.readline() == "ready\n"
    for side in sides:
        assert side.stdin
        side.stdin.write("go\n")
        side.stdin.flush()
    for side in sides:
        side.communicate(timeout=120)
    counter = int.from_bytes(os.pread(fd, 8, 0), sys.byteorder)
    os.close(fd)
    assert [side.returncode for side in sides] == [0, 0]
    assert counter == 2 * turns


@pytest.mark.usefixtures("two_pcpus")
def test_ping_pong_ends_with_its_record_when_the_other_side_is_killed(tmp_path: Path) -> None:
    leads, follows = pair(str(tmp_path), engine="python", seconds="60")
    # Both hold the memory from the moment they have met.
    assert wait_until(lambda: "hostpart-pingpong" in Path(f"/proc/{follows.pid}/maps").read_text(), 60)
    time.sleep(0.5)
    follows.kill()
    follows.communicate()
    out, err = leads.communicate(timeout=60)
    assert (leads.returncode, err) == (0, "")
    assert checked(out)["cut_short"] is True


@pytest.mark.parametrize("vcpus", ["1", "3"])
def test_ping_pong_refuses_a_vcpu_without_a_partner(vcpus: str) -> None:
    process = start("pingpong", {"engine": "python"}, HOSTPART_VM="x", HOSTPART_VCPU="0", HOSTPART_VCPUS=vcpus)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert f"this VM has {vcpus}" in err
    assert "try: hostpart run -n 2 --probe pingpong" in err


# -- ends ----------------------------------------------------------------------------------------------


def catches(process: subprocess.Popen[str], number: int) -> bool:
    """Whether the process has a handler for the signal by now."""
    for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
        if line.startswith("SigCgt:"):
            return bool(int(line.split()[1], 16) >> number - 1 & 1)
    return False


@pytest.mark.parametrize(
    ("name", "seconds", "cut_short"),
    [
        pytest.param("noise", "600", True, id="noise, before its time"),
        pytest.param("wakeup", "600", True, id="wakeup, in its sleep"),
        pytest.param("spin", "0", False, id="spin, which has no time"),
        pytest.param("thrash", "0", False, id="thrash, which has no time"),
    ],
)
def test_sigterm_ends_a_probe_with_its_record(name: str, seconds: str, cut_short: bool) -> None:
    process = start(name, {"engine": "python", "seconds": seconds, "warmup": "0"})
    assert wait_until(lambda: catches(process, signal.SIGTERM), 60)
    time.sleep(1.5)
    process.terminate()
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    assert checked(out)["cut_short"] is cut_short


def test_a_probe_dies_of_the_interrupt_but_writes_its_record_first() -> None:
    process = start("spin", {"seconds": "600"})
    assert wait_until(lambda: catches(process, signal.SIGTERM), 60)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT
    assert checked(out)["cut_short"] is True


def bare(**parameters: Any) -> Measurement:
    """Return a measurement of no probe in particular."""
    probe = Probe("bare", "nothing", lambda _: None)
    values = {one.name: one.default for one in probe.parameters}
    return Measurement(probe, {**values, **parameters}, "python", None)


def test_the_warm_up_is_discarded_and_garbage_is_not_collected_meanwhile() -> None:
    run = bare(seconds=0.05, warmup=0.01, slice_ms=10)
    assert gc.isenabled()
    seen = []
    for piece in run.slices():
        seen.append((piece.warm, gc.isenabled()))
        run.histogram("x", "ns").add(1 if piece.warm else 2)
        while time.monotonic_ns() < piece.until_ns:
            pass
    assert gc.isenabled()
    assert seen[0] == (True, False)
    assert set(seen[1:]) == {(False, False)}
    assert run.histogram("x", "ns").least == 2
    assert run.histogram("x", "ns").count == len(run.done) == len(seen) - 1


def test_what_comes_after_the_end_does_not_cut_it_short() -> None:
    run = bare(seconds=0.01, warmup=0.0, slice_ms=10)
    for _ in run.slices():
        pass
    run.end(signal.SIGTERM, None)
    assert run.document()["cut_short"] is False


def test_a_probe_that_never_came_to_measure_says_null_and_not_0() -> None:
    run = bare()
    run.end(signal.SIGTERM, None)
    assert list(run.slices()) == []
    run.metric("rate", run.per_second(0, 0), "1/s", "higher", primary=True)
    found = run.document()
    jsonschema.validate(found, SCHEMA)
    assert found["metrics"]["rate"]["value"] is None
    assert "not known" in record.text(found)


# -- without the extra ---------------------------------------------------------------------------------


@pytest.fixture
def without_numba(tmp_path: Path) -> str:
    """A directory for PYTHONPATH in which numba is not to be had."""
    (tmp_path / "numba.py").write_text("raise ModuleNotFoundError('No module named numba', name='numba')\n")
    return str(tmp_path)


@pytest.mark.parametrize("name", ["noise", "wakeup", "integer"])
def test_without_numba_a_probe_is_interpreted_and_says_so(name: str, without_numba: str) -> None:
    process = start(name, {}, PYTHONPATH=without_numba)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (0, "")
    found = checked(out)
    assert found["engine"] == "python"
    assert found["fallback"] == "numba is not installed; pip install 'hostpart[probes]'"
    assert "interpreted: numba is not installed" in record.text(found)


@pytest.mark.parametrize(
    ("name", "engine"), [pytest.param("latency", "auto", id="the only one"), pytest.param("noise", "numba", id="asked")]
)
def test_without_numba_what_needs_it_fails_with_the_remedy(name: str, engine: str, without_numba: str) -> None:
    process = start(name, {"engine": engine}, PYTHONPATH=without_numba)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert f"hostpart: probe {name}: " in err
    assert "numba is not installed\ntry: pip install 'hostpart[probes]'\n" in err


def test_noise_takes_a_threshold_of_itself_that_its_loop_can_tell() -> None:
    found = measured("noise", engine="python", threshold_ns="0")["calibration"]
    assert found["threshold_ns"] == max(1000, round(2 * found["ns_per_loop"]))


def test_a_threshold_that_the_loop_cannot_tell_is_refused() -> None:
    process = start("noise", {"engine": "python", "threshold_ns": "5"})
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert "a gap of 5 ns cannot be told from the loop itself" in err
    assert "try: --threshold-ns " in err


# -- what can be set -----------------------------------------------------------------------------------

SOME = (
    Parameter("seconds", 5.0, "time"),
    Parameter("count_ns", 7, "number", low=1, high=9),
    Parameter("json", False, "flag"),
    Parameter("way", "up", "direction", choices=("up", "down")),
    Parameter("text", "", "anything", check=int),
)


@pytest.mark.parametrize(
    ("words", "found"),
    [
        pytest.param([], {}, id="nothing"),
        pytest.param(["--seconds", "0.5"], {"HOSTPART_PROBE_SECONDS": "0.5"}, id="a number"),
        pytest.param(
            ["--count-ns=3", "--json"], {"HOSTPART_PROBE_COUNT_NS": "3", "HOSTPART_PROBE_JSON": "1"}, id="two"
        ),
        pytest.param(["--json=0"], {"HOSTPART_PROBE_JSON": "0"}, id="a flag that is off"),
        pytest.param(["--way", "down"], {"HOSTPART_PROBE_WAY": "down"}, id="a choice"),
        pytest.param(["--text", "-7"], {"HOSTPART_PROBE_TEXT": "-7"}, id="text"),
    ],
)
def test_options_are_variables(words: list[str], found: dict[str, str]) -> None:
    assert parameter.from_options("p", SOME, words) == found
    values = parameter.from_environment("p", SOME, {"PATH": "/bin", "HOSTPART_VM": "x", **found})
    assert set(values) == {"seconds", "count_ns", "json", "way", "text"}


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param(["--secnds", "1"], "did you mean --seconds?", id="misspelt"),
        pytest.param(["5"], "has no option '5'", id="no option"),
        pytest.param(["--seconds"], "wants a value", id="no value"),
        pytest.param(["--seconds", "nan"], "want a number from 0 to 1e+09, got 'nan'", id="not a number"),
        pytest.param(["--seconds", "-1"], "want a number", id="negative"),
        pytest.param(["--count-ns", "1.5"], "want a whole number from 1 to 9, got '1.5'", id="not whole"),
        pytest.param(["--count-ns", "10"], "want a whole number", id="too large"),
        pytest.param(["--count-ns", "٣"], "want a whole number", id="another script's digit"),
        pytest.param(["--way", "left"], "want one of up, down, got 'left'", id="no such choice"),
        pytest.param(["--json=maybe"], "want 0 or 1, got 'maybe'", id="no flag"),
        pytest.param(["--text", "seven"], "--text: invalid literal", id="text that cannot be"),
    ],
)
def test_what_an_option_cannot_be_is_refused(words: list[str], problem: str) -> None:
    with pytest.raises(Refused) as caught:
        parameter.from_options("p", SOME, words)
    assert problem in str(caught.value)
    assert caught.value.remedy


def test_a_variable_that_the_probe_does_not_have_is_refused() -> None:
    with pytest.raises(Refused, match="HOSTPART_PROBE_SECNDS; did you mean HOSTPART_PROBE_SECONDS"):
        parameter.from_environment("p", SOME, {"HOSTPART_PROBE_SECNDS": "1"})


def test_what_is_required_has_to_be_given() -> None:
    needed = (Parameter("what", "", "it", required=True),)
    assert parameter.from_environment("p", needed, {"HOSTPART_PROBE_WHAT": "x"}) == {"what": "x"}
    with pytest.raises(Refused, match="'p' wants --what, or HOSTPART_PROBE_WHAT"):
        parameter.from_environment("p", needed, {})


# -- histograms, caches, output ------------------------------------------------------------------------


@given(st.integers(0, 1 << 70))
def test_a_value_lies_in_its_bucket_which_is_less_than_a_hundredth_wide(number: int) -> None:
    low, below = histogram.bounds(histogram.bucket(number))
    assert low <= number < below
    assert below - low <= max(1, low // 128)
    assert below - low == 1 or below - low < low / 100


@given(st.integers(0, 5000))
def test_buckets_follow_each_other_without_a_hole(index: int) -> None:
    assert histogram.bounds(index)[1] == histogram.bounds(index + 1)[0]


@given(st.lists(st.integers(0, 10**12), min_size=1), st.sampled_from([1.0, 50.0, 99.0, 99.9, 100.0]))
def test_a_percentile_is_not_below_the_truth_and_at_most_a_bucket_above(values: list[int], percent: float) -> None:
    counts = Histogram("ns")
    counts.update(values)
    truth = sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
    found = counts.percentile(percent)
    assert found is not None
    assert truth <= found <= truth + truth // 128
    assert sum(count for _, _, count in counts) == counts.count == len(values)
    assert (counts.least, counts.most) == (min(values), max(values))


def _both(values: list[int]) -> tuple[Histogram, Any]:
    hdrh = pytest.importorskip("hdrh.histogram", reason="needs hdrhistogram: pip install 'hostpart[experiment]'")
    ours, theirs = Histogram("ns"), hdrh.HdrHistogram(1, 10**12, 2)
    ours.update(values)
    for value in values:
        assert theirs.record_value(value)
    return ours, theirs


# As many small values as large ones: the layout changes at 256, and then at each power of two.
_ANY_SIZE = st.integers(0, 40).flatmap(lambda bits: st.integers(0, min(10**12, 1 << bits)))


@given(st.lists(_ANY_SIZE, min_size=1))
def test_the_buckets_are_those_of_hdrhistogram_one_by_one(values: list[int]) -> None:
    ours, theirs = _both(values)
    assert list(ours) == [
        (theirs.get_lowest_equivalent_value(value), value + 1, item.count_added_in_this_iter_step)
        for item in theirs.get_recorded_iterator()
        for value in [item.value_iterated_to]
    ]


@pytest.mark.parametrize("value", sorted({(1 << bits) + step for bits in range(1, 40) for step in (-1, 0, 1)}))
def test_a_bucket_at_a_power_of_two_has_the_index_and_the_bounds_that_hdrhistogram_gives_it(value: int) -> None:
    _, theirs = _both([value])
    index = histogram.bucket(value)
    assert theirs.get_count_at_index(index) == 1
    low, below = histogram.bounds(index)
    assert low == theirs.get_lowest_equivalent_value(value)
    assert below - 1 == theirs.get_highest_equivalent_value(value)


@given(st.lists(_ANY_SIZE, min_size=1), st.sampled_from([1.0, 50.0, 90.0, 99.0, 99.9, 100.0]))
def test_a_percentile_is_hdrhistograms_up_to_the_largest_value(values: list[int], percent: float) -> None:
    ours, theirs = _both(values)
    # It rounds the rank to the nearest one, and a probe rounds it up: ask for the rank.
    rank = max(1, math.ceil(len(values) * percent / 100))
    assert ours.percentile(percent) == min(theirs.get_value_at_percentile(100 * rank / len(values)), max(values))


def test_caches_are_read_as_the_kernel_describes_them(tmp_path: Path) -> None:
    for index, (kind, level, size) in enumerate(
        [("Data", "1", "48K"), ("Instruction", "1", "32K"), ("Unified", "2", "2048K"), ("Unified", "3", "36M")]
    ):
        here = tmp_path / "cpu3" / "cache" / f"index{index}"
        here.mkdir(parents=True)
        for name, text in (("type", kind), ("level", level), ("size", size), ("coherency_line_size", "64")):
            (here / name).write_text(f"{text}\n")
    found = seat.caches(3, str(tmp_path))
    assert found == {"l1": 48 << 10, "l2": 2 << 20, "llc": 36 << 20, "line": 64}
    assert set(seat.caches(4, str(tmp_path)).values()) == {None}


def test_records_of_several_processes_do_not_mix_on_one_pipe() -> None:
    code = (
        "import os\n"
        "from workers.probes import record\n"
        "pids = []\n"
        "for number in range(6):\n"
        "    pid = os.fork()\n"
        "    if not pid:\n"
        "        record.write(record.document('x', str(number), parameters={'long': 'y' * 300_000}), as_json=True)\n"
        "        os._exit(0)\n"
        "    pids.append(pid)\n"
        "for pid in pids:\n"
        "    os.waitpid(pid, 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert sorted(json.loads(line)["engine"] for line in done.stdout.splitlines()) == list("012345")


@pytest.mark.parametrize(
    ("number", "unit", "shown"),
    [
        (12, "ns", "12 ns"),
        (1500, "ns", "1.5 µs"),
        (2_500_000_000, "ns", "2.5 s"),
        (12.3456, "%", "12.35 %"),
        (7, "1", "7"),
        (950.5, "1/s", "950.5/s"),
        (1_234_567, "1/s", "1.235 M/s"),
        (9_400_000_000, "B/s", "9.4 GB/s"),
        (None, "ns", "not known"),
    ],
)
def test_a_figure_is_shown_in_a_unit_that_fits(number: float | None, unit: str, shown: str) -> None:
    found = record.document("x", "y", metrics={"it": record.metric(number, unit, "lower")}, primary="it")
    assert record.text(found) == f"x: engine y\n  it  {shown}\n"


def test_a_record_takes_no_fact_that_the_schema_does_not_have() -> None:
    with pytest.raises(ValueError, match="mistake"):
        record.document("x", "y", mistake=1)
    assert set(record.document("x", "y")) == set(SCHEMA["properties"]) == set(SCHEMA["required"])


# -- in a partition ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("two_pcpus")
def test_run_runs_a_probe_on_the_pcpu_that_it_takes(place: Place) -> None:
    done = place.run("run", "--probe", "spin", "--seconds", "0.2", "--warmup", "0", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = checked(done.stdout)
    where = found["where"]
    assert (where["vcpu"], where["vcpus"]) == (0, 1)
    assert where["vm"].startswith("run-")
    assert where["pcpu"] == where["cpus_allowed"] == str(where["cpus_seen"][0])
    assert found["parameters"]["seconds"] == 0.2
    assert place.is_clean()


@pytest.mark.usefixtures("two_pcpus")
def test_run_shows_people_a_few_lines(place: Place) -> None:
    done = place.run("run", "--probe", "spin", "--seconds", "0.2", "--warmup=0")
    assert (done.returncode, done.stderr) == (0, "")
    head, metric = done.stdout.splitlines()
    assert head.startswith("spin: run-")
    assert metric.startswith("  loops  ")


def test_run_lets_two_vcpus_play_ping_pong(place: Place) -> None:
    if len(USABLE) < 3:
        pytest.skip("needs three usable pCPUs")
    done = place.run("run", "-n", "2", "--probe", "pingpong", "--engine", "python", "--seconds", "0.3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    found = sorted(
        (checked(line) for line in done.stdout.splitlines(keepends=True)), key=lambda one: one["where"]["vcpu"]
    )
    assert [one["parameters"]["role"] for one in found] == ["leads", "follows"]
    assert [one["cut_short"] for one in found] == [False, False]
    assert found[0]["histograms"]["round_trip"]["count"] > 0


@pytest.mark.usefixtures("two_pcpus")
def test_a_scenario_sets_a_probe_by_its_environment(place: Place, tmp_path: Path) -> None:
    (tmp_path / "s.toml").write_text(
        '[[vm]]\nname = "victim"\nvcpus = 1\npython = "workers.probes.noise:main"\n'
        'env = { HOSTPART_PROBE_SECONDS = "0.2", HOSTPART_PROBE_WARMUP = "0", HOSTPART_PROBE_JSON = "1", '
        'HOSTPART_PROBE_ENGINE = "python" }\n'
    )
    done = place.run("launch", str(tmp_path / "s.toml"))
    assert done.returncode == 0
    [line] = [line for line in done.stdout.splitlines(keepends=True) if line.startswith('{"schema"')]
    found = checked(line)
    assert (found["where"]["vm"], found["probe"], found["parameters"]["seconds"]) == ("victim", "noise", 0.2)


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        pytest.param(["--probe"], "--probe wants a name", id="no name"),
        pytest.param(["--probe", "nois"], "there is no probe 'nois'", id="no such probe"),
        pytest.param(["--probe", "hello"], "there is no probe 'hello'", id="a guest that is none"),
        pytest.param(["--probe", "noise", "--second", "1"], "did you mean --seconds?", id="no such option"),
        pytest.param(["--probe", "noise", "--seconds", "soon"], "want a number", id="no number"),
        pytest.param(["--smp", "--probe", "noise"], "--smp", id="smp"),
    ],
)
def test_run_refuses_a_probe_that_cannot_be_before_anything_is_made(
    place: Place, words: list[str], problem: str
) -> None:
    done = place.run("run", *words)
    assert (done.returncode, done.stdout) == (125, "")
    assert problem in done.stderr
    assert "try: " in done.stderr
    assert list(place.runtime.iterdir()) == []


def test_a_probes_own_help_teaches(place: Place) -> None:
    done = place.run("run", "--probe", "noise", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert "--threshold-ns" in done.stdout
    assert 'python = "workers.probes.noise:main"' in done.stdout


@pytest.mark.parametrize("name", PROBES)
def test_a_probe_imports_no_extra_before_it_runs(name: str) -> None:
    code = f"import sys, workers.probes.{name}; print({{'numba', 'numpy', 'llvmlite'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "set()\n"
