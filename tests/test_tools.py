"""Other tools' output becomes records: what was recorded on a machine, what documentation shows, and, where it is
installed, the tool itself."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.test_probes import SCHEMA, USABLE, value
from workers.probes import record
from workers.probes.tools import cyclictest, oslat, rtla_hist, stress_ng

RECORDED = Path(__file__).parent / "tools"


def checked(records: tuple[dict[str, Any], ...]) -> tuple[dict[str, Any], ...]:
    """Return the records, each checked against the schema and against what holds for every one."""
    for one in records:
        jsonschema.validate(one, SCHEMA)
        assert one["primary"] in one["metrics"]
        for histogram in one["histograms"].values():
            assert sum(count for _, _, count in histogram["buckets"]) == histogram["count"]
        assert record.text(one).startswith(f"{one['probe']}: ")
    return records


def test_cyclictest_tells_a_thread_at_a_time() -> None:
    first, second = checked(cyclictest((RECORDED / "cyclictest.json").read_text()))
    # As the tool's own summary had it: 222 in the histogram and 17 beyond, 289 and 11.
    assert (first["histograms"]["latency"]["count"], value(first, "wakeups")) == (239, 239)
    assert first["histograms"]["latency"]["buckets"][-1][1:] == [None, 17]
    assert second["histograms"]["latency"]["buckets"][-1][1:] == [None, 11]
    assert (first["histograms"]["latency"]["min"], value(first, "latency_max")) == (22_000, 53_261_000)
    assert value(second, "latency_max") == 4_502_000
    assert value(first, "latency_p99") == 53_261_000  # in the open bucket: all that is known is the maximum
    assert value(second, "latency_p50") % 1000 == 999
    assert first["started"] == {"monotonic_ns": None, "utc": "2026-11-25T18:45:02Z"}
    assert first["engine_version"] == "2.40"
    assert first["where"]["vm"] is None


def test_cyclictest_without_a_histogram_has_its_maximum_as_primary() -> None:
    top = json.loads((RECORDED / "cyclictest.json").read_text())
    top["resolution_in_ns"] = 1
    for thread in top["thread"].values():
        thread["histogram"] = {}
    first, _ = checked(cyclictest(json.dumps(top)))
    assert (first["primary"], value(first, "latency_max")) == ("latency_max", 53_261)
    assert first["metrics"]["latency_p99"]["value"] is None
    assert first["histograms"] == {}


def test_oslat_counts_gaps_and_not_its_own_loop() -> None:
    [one] = checked(oslat((RECORDED / "oslat.json").read_text()))
    assert one["where"]["cpus_allowed"] == "1"
    assert value(one, "longest_gap") == 538_244_000
    assert value(one, "events") == pytest.approx((14 + 18 + 2 + 8 + 38 + 2) / 1.992)
    assert one["histograms"]["gap"]["buckets"][0] == [0, 1000, 2_615_675]
    assert one["histograms"]["gap"]["buckets"][-1] == [31_000, None, 38]
    # Each gap with its bucket's middle, and what is beyond the last bucket from the average: it is told to 6 places.
    counted = 14 * 1.5 + 18 * 2.5 + 2 * 3.5 + sum(high - 0.5 for high in (5, 6, 9, 13, 16, 18, 19, 24, 26, 27))
    beyond = 1.640092 * 2_615_757 - (2_615_675 + 14 * 2 + 18 * 3 + 2 * 4 + 163 + 38 * 32)
    assert value(one, "lost") == pytest.approx(1000 * (counted + 38 * 31.5 + beyond), abs=2000)
    assert value(one, "time_lost") == pytest.approx(100 * value(one, "lost") / 1.992e9)


def test_oslat_without_gaps_beyond_its_buckets_lost_what_they_hold() -> None:
    top = json.loads((RECORDED / "oslat.json").read_text())
    top["thread"]["0"] |= {"avg": 1.00002, "max": 3, "histogram": {"1": 1_000_000, "2": 10, "3": 2}}
    [one] = checked(oslat(json.dumps(top)))
    assert value(one, "lost") == (10 * 1.5 + 2 * 2.5) * 1000


def test_stress_ng_tells_a_stressor_at_a_time() -> None:
    cpu, vm = checked(stress_ng((RECORDED / "stress-ng.txt").read_text()))
    assert (cpu["probe"], vm["probe"]) == ("stress-ng:cpu", "stress-ng:vm")
    assert (value(cpu, "operations"), value(cpu, "operations_done")) == (37.16, 76)
    assert (value(vm, "operations_per_cpu_second"), value(vm, "memory")) == (33770.95, 18508 * 1024)
    assert value(vm, "cpu_used") == 6.14


def test_stress_ng_before_it_told_more_columns_is_understood_too() -> None:
    [one] = checked(
        stress_ng("stress-ng: info:  [42] matrix-3d       10      1.00      0.90      0.05     10.00     10.53\n")
    )
    assert (one["probe"], value(one, "operations")) == ("stress-ng:matrix-3d", 10.0)
    assert one["metrics"]["cpu_used"]["value"] is None


# The shape that rtla's manual pages show; the figures are made up.
TIMERLAT = """\
# RTLA timerlat histogram
# Time unit is microseconds (us)
# Duration:   0 00:00:10
Index   IRQ-002   Thr-002   IRQ-003   Thr-003
0          9000         0      9990         0
1           900       100        10      9000
7            99      9899         0      1000
over:         1         1         0         0
count:    10000     10000     10000     10000
min:          0         1         0         1
avg:          0         6         0         1
max:        300       301         1         7
ALL:        IRQ       Thr
count:    20000     20000
"""


def test_rtla_timerlat_tells_a_pcpu_at_a_time() -> None:
    second, third = checked(rtla_hist(TIMERLAT))
    assert (second["probe"], second["where"]["cpus_allowed"], third["where"]["cpus_allowed"]) == (
        "rtla:timerlat",
        "2",
        "3",
    )
    assert second["primary"] == "thread_max"
    assert value(second, "thread_max") == 301_000
    assert [value(second, f"irq_{name}") for name in ("p50", "p99", "p99_9")] == [999, 1_999, 7_999]
    assert second["histograms"]["irq"]["buckets"] == [
        [0, 1000, 9000], [1000, 2000, 900], [7000, 8000, 99], [256_000, None, 1],
    ]  # fmt: skip
    assert third["histograms"]["thread"]["count"] == 10_000


def test_rtla_osnoise_has_the_buckets_that_it_was_asked_for() -> None:
    text = (
        "# RTLA osnoise histogram\n# Time unit is microseconds (us)\n# Duration:   0 00:01:00\nIndex   CPU-000\n"
        "0         42\n30         2\nover:      0\ncount:    44\nmin:       0\navg:       0\nmax:      30\n"
    )
    [one] = checked(rtla_hist(text, bucket=10, entries=25))
    assert one["probe"] == "rtla:osnoise"
    assert one["histograms"]["gap"]["buckets"] == [[0, 10_000, 42], [30_000, 40_000, 2]]
    assert (one["primary"], value(one, "gap_max")) == ("gap_max", 30_000)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        pytest.param(cyclictest, "T: 0 (1) P: 0", id="no JSON"),
        pytest.param(cyclictest, "[]", id="no object"),
        pytest.param(cyclictest, (RECORDED / "oslat.json").read_text(), id="another tool's"),
        pytest.param(oslat, (RECORDED / "cyclictest.json").read_text(), id="yet another's"),
        pytest.param(stress_ng, "stress-ng: info:  [1] dispatching hogs: 1 cpu\n", id="no table"),
        pytest.param(rtla_hist, "Index CPU-000\n", id="no title"),
        pytest.param(rtla_hist, TIMERLAT.replace("Index", "Indices"), id="no header"),
        pytest.param(rtla_hist, TIMERLAT.replace("Thr-003", "Foo-003"), id="an unknown column"),
        pytest.param(rtla_hist, TIMERLAT.replace("      9000\n", "\n"), id="a cell that is missing"),
    ],
)
def test_what_is_another_tools_output_is_refused(read: Any, text: str) -> None:
    with pytest.raises(ValueError, match="this is not "):
        read(text)


def tool(name: str, package: str) -> str:
    """Return the tool's path; skip where it isn't installed."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"needs {name}: apt install {package}")
    return path


def run(*command: str) -> str:
    """Run a tool and return what it wrote to both its outputs; skip where the kernel doesn't let it measure."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False)
    if done.returncode:
        pytest.skip(f"{command[0]} cannot run here: {done.stdout.strip()}")
    return done.stdout


def test_the_cyclictest_of_this_machine_is_understood(tmp_path: Path) -> None:
    run(tool("cyclictest", "rt-tests"), "-q", "-l", "50", "-i", "1000", "-h", "100", f"--json={tmp_path / 'it.json'}")
    [one] = checked(cyclictest((tmp_path / "it.json").read_text()))
    assert value(one, "wakeups") == 50


def test_the_oslat_of_this_machine_is_understood(tmp_path: Path) -> None:
    cpu = str(USABLE[-1])
    run(tool("oslat", "rt-tests"), "-D", "1", "-c", cpu, f"--json={tmp_path / 'it.json'}")
    [one] = checked(oslat((tmp_path / "it.json").read_text()))
    assert one["where"]["cpus_allowed"] == cpu


def test_the_stress_ng_of_this_machine_is_understood(tmp_path: Path) -> None:
    text = run(
        tool("stress-ng", "stress-ng"), "--cpu", "1", "-t", "1", "--metrics", "--temp-path", str(tmp_path)
    )  # fmt: skip
    [one] = checked(stress_ng(text))
    assert one["probe"] == "stress-ng:cpu"
