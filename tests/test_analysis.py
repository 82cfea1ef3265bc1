"""Analyses of results with known answers: what they show, what they warn of, and how often they are wrong."""

from __future__ import annotations

import json
import math
import random
import resource
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs scipy: pip install 'hostpart[experiment]'")
pytest.importorskip("hdrh", reason="needs hdrhistogram: pip install 'hostpart[experiment]'")

import numpy as np
from scipy import stats

import hostpart.experiment
from hostpart.cli.analysis import summary
from hostpart.errors import Failed, UsageError
from hostpart.experiment import extra, starts
from hostpart.experiment.analysis import analyse, keep, pool
from hostpart.experiment.intake import take
from hostpart.experiment.results import Results, read
from tests import experiments
from tests.experiments import example, latencies, results, write
from workers.probes.histogram import Histogram
from workers.probes.tools import cyclictest, oslat, stress_ng

FOLDER = Path(hostpart.experiment.__file__ or "").parent
ALONE, LOADED = "integer|affinity|alone", "integer|affinity|spinner|sibling"
SCHEMAS = ("run", "experiment", "session", "analysis")
PLACEMENTS = ("free", "same-pcpu", "sibling", "same-llc", "other-package")


def schema(name: str) -> dict[str, Any]:
    """Return one of the schemas that come with the package."""
    found: dict[str, Any] = json.loads((FOLDER / f"{name}.schema.json").read_text())
    return found


# Made once: each new one would look at the schema itself, too.
VALIDATORS = {name: jsonschema.Draft202012Validator(schema(name)) for name in SCHEMAS}


def analysed(made: Results, resamples: int = 999) -> dict[str, Any]:
    """Return the analysis, checked against its schema and against what holds for every one."""
    found = analyse(made, resamples=resamples)
    VALIDATORS["analysis"].validate(found)
    json.dumps(found, allow_nan=False)
    for one in found["conditions"]:
        for metric in one["metrics"].values():
            assert metric["n"] == len(metric["values"])
            if metric["ci"]:
                assert metric["min"] <= metric["ci"][0] <= metric["median"] <= metric["ci"][1] <= metric["max"]
            ratio = metric["ratio"]
            if ratio:
                assert ratio["p"] <= ratio["p_holm"]
                assert ratio["difference"] == "none" or ratio["p_holm"] < 0.05
            if ratio and ratio["ci"]:
                assert ratio["ci"][0] <= ratio["value"] <= ratio["ci"][1]
        for histogram in one["histograms"].values():
            assert sum(count for _, _, count in histogram["buckets"]) == histogram["count"]
        assert sum(one["verdicts"].values()) == one["done"]
    assert summary(found)
    return found


def condition(found: dict[str, Any], name: str) -> dict[str, Any]:
    """Return the condition with that id."""
    [one] = [one for one in found["conditions"] if one["id"] == name]
    assert isinstance(one, dict)
    return one


def rates(seed: int, count: int, factor: float = 1.0, spread: float = 0.05) -> list[float]:
    """Return the integer probe's rates of *count* processes."""
    rng = random.Random(seed)
    return [1.2e6 * factor * rng.gauss(1, spread) for _ in range(count)]


def compared(loaded: Sequence[Any], alone: Sequence[Any]) -> dict[str, Any]:
    """Return the loaded condition's rate."""
    found = condition(analysed(results({ALONE: alone, LOADED: loaded})), LOADED)["metrics"]["rate"]
    assert isinstance(found, dict)
    return found


# -- documents -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Results:
    return read(str(example(tmp_path_factory.mktemp("results") / "interference", processes=5)))


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_property_of_a_schema_says_what_it_is(name: str) -> None:
    def undescribed(node: Any, path: str) -> list[str]:
        if isinstance(node, list):
            return [found for one in node for found in undescribed(one, path)]
        if not isinstance(node, dict):
            return []
        found = []
        for key, one in node.get("properties", {}).items():
            target = schema(name)["$defs"][one["$ref"].split("/")[-1]] if "$ref" in one else one
            found += [] if target.get("description") else [f"{path}.{key}"]
        return found + [more for key, one in node.items() for more in undescribed(one, f"{path}.{key}")]

    jsonschema.Draft202012Validator.check_schema(schema(name))
    assert undescribed(schema(name), name) == []


def test_the_documents_of_an_experiment_are_as_their_schemas_say(everything: Results) -> None:
    VALIDATORS["experiment"].validate(everything.experiment)
    folder = FOLDER.parent.parent / "workers" / "probes"
    records = jsonschema.Draft202012Validator(json.loads((folder / "record.schema.json").read_text()))
    for one in everything.sessions:
        VALIDATORS["session"].validate(one)
    for run in everything.runs:
        VALIDATORS["run"].validate(run)
        if run["record"]:
            records.validate(run["record"])


@pytest.mark.parametrize(
    "spoil",
    [
        lambda run: run.pop("metrics"),
        lambda run: run.update(verdict="fine"),
        lambda run: run.update(started="yesterday"),
        lambda run: run.update(surprise=1),
        lambda run: run["metrics"]["rate"].update(better="more"),
        lambda run: run.update(victim_pcpu=-1),
    ],
    ids=["no metrics", "verdict", "time", "unknown property", "direction", "pCPU"],
)
def test_a_run_that_is_not_as_the_schema_says_is_found(spoil: Callable[[dict[str, Any]], object]) -> None:
    run = results({ALONE: [1.0]}).runs[0]
    spoil(run)
    with pytest.raises(jsonschema.ValidationError):
        VALIDATORS["run"].validate(run)


def test_an_analysis_is_the_same_each_time_and_after_a_look_at_the_disk(everything: Results, tmp_path: Path) -> None:
    first = analysed(everything, 9999)
    again = read(everything.directory)
    assert analyse(again) == first
    assert analyse(again, seed=1) != first
    path = keep(first, str(tmp_path))
    assert json.loads(Path(path).read_text()) == first
    assert [one.name for one in tmp_path.iterdir()] == ["analysis.json"]


def test_an_analysis_leaves_the_results_as_they_were(everything: Results) -> None:
    before = json.dumps([everything.experiment, everything.runs])
    analyse(everything, resamples=199)
    assert json.dumps([everything.experiment, everything.runs]) == before


def test_where_the_directory_cannot_be_written_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(Failed, match="cannot be written to"):
        keep({}, str(tmp_path / "absent"))


def test_half_an_analysis_is_not_left_behind(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limits[1]))
    try:
        with pytest.raises(Failed, match="File too large"):
            keep({"name": "x" * 100_000}, str(tmp_path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == []


def test_an_analysis_that_is_interrupted_leaves_the_one_that_is_there(tmp_path: Path) -> None:
    class Interrupted(dict[str, Any]):
        def items(self) -> Any:
            raise KeyboardInterrupt

    keep({"name": "first"}, str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        keep({"name": "second", "method": Interrupted(a=1)}, str(tmp_path))
    assert [one.name for one in tmp_path.iterdir()] == ["analysis.json"]
    assert json.loads((tmp_path / "analysis.json").read_text()) == {"name": "first"}


def test_too_few_resamples_are_refused() -> None:
    with pytest.raises(ValueError, match="got 20"):
        analyse(results({ALONE: [1.0]}), resamples=20)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    extra.need()
    monkeypatch.setattr(extra, "find_spec", lambda name: None if name in ("hdrh", "scipy") else object())
    with pytest.raises(UsageError, match="experiments need hdrhistogram, scipy, which are not") as caught:
        extra.need()
    assert caught.value.remedy == "pip install 'hostpart[experiment]'"


# -- medians, ratios, tests ----------------------------------------------------------------------------


def test_a_victim_that_loses_a_third_is_found_with_intervals_apart() -> None:
    for seed in range(10):
        made = results({ALONE: rates(seed, 20), LOADED: rates(1000 + seed, 10, 2 / 3)})
        ratio = condition(analysed(made), LOADED)["metrics"]["rate"]["ratio"]
        assert (ratio["difference"], ratio["apart"]) == ("worse", True)
        assert ratio["value"] == pytest.approx(2 / 3, rel=0.1)
        assert ratio["ci"][1] < 0.8


def test_a_comparison_is_scipys() -> None:
    loaded, alone = rates(1, 10, 0.97), rates(2, 20)
    found = compared(loaded, alone)
    assert found["values"] == loaded
    assert found["median"] == np.median(loaded)
    ratio = found["ratio"]
    assert ratio["value"] == np.median(loaded) / np.median(alone)
    assert ratio["p"] == stats.mannwhitneyu(loaded, alone, method="exact").pvalue
    bootstrapped = stats.bootstrap(
        (loaded, alone),
        lambda above, below, axis: np.median(above, axis=axis) / np.median(below, axis=axis),
        n_resamples=9999,
        method="percentile",
        rng=3,
    ).confidence_interval
    assert ratio["ci"] == pytest.approx(list(bootstrapped), rel=0.01)


@pytest.mark.parametrize(("victim", "difference"), [("integer", "better"), ("wakeup", "worse"), ("build", "worse")])
def test_which_way_is_better_is_the_metrics_own(victim: str, difference: str) -> None:
    alone, loaded = f"{victim}|full|alone", f"{victim}|full|spinner|free"
    found = analysed(results({alone: rates(1, 20), loaded: rates(2, 10, 1.5)}))
    [metric] = condition(found, loaded)["metrics"].values()
    assert metric["ratio"]["difference"] == difference


def test_each_condition_is_compared_with_the_alone_runs_of_its_own_victim_and_level() -> None:
    values: dict[str, list[float]] = {}
    for victim, factor in (("integer", 1.0), ("memory", 10.0)):
        for level, more in (("affinity", 1.0), ("full", 3.0)):
            values[f"{victim}|{level}|alone"] = [factor * more * value for value in rates(1, 10)]
            values[f"{victim}|{level}|spinner|free"] = [factor * more / 2 * value for value in rates(1, 10)]
    for one in analysed(results(values))["conditions"]:
        [metric] = one["metrics"].values()
        if one["aggressor"]:
            assert metric["ratio"]["value"] == 0.5
        else:
            assert metric["ratio"] is None


def test_primary_metrics_and_all_others_are_adjusted_apart() -> None:
    rng = random.Random(1)

    def entry(factor: float) -> dict[str, Any]:
        others = {f"other_{number}": rng.gauss(1, 0.1) for number in range(20)}
        return {"metrics": {"rate": rng.gauss(factor, 0.1), **others}}

    values = {ALONE: [entry(1) for _ in range(12)]}
    for placement in PLACEMENTS:
        values[f"integer|affinity|spinner|{placement}"] = [entry(0.8) for _ in range(4)]
    found = analysed(results(values))
    loaded = [one["metrics"] for one in found["conditions"] if one["aggressor"]]
    ps = sorted(metrics["rate"]["ratio"]["p"] for metrics in loaded)
    assert min(metrics["rate"]["ratio"]["p_holm"] for metrics in loaded) == pytest.approx(5 * ps[0])
    others = [m["ratio"] for metrics in loaded for name, m in metrics.items() if name != "rate"]
    assert min(one["p_holm"] for one in others) == pytest.approx(min(1, 100 * min(one["p"] for one in others)))
    assert (
        "Holm over the 5 comparisons of primary metrics and, apart from them, over the 100" in found["method"]["test"]
    )


def test_a_ratio_to_zero_is_none_and_the_difference_is_shown_all_the_same() -> None:
    found = compared([1.0 + number for number in range(10)], [0.0] * 20)
    assert (found["ratio"]["value"], found["ratio"]["ci"]) == (None, None)
    assert (found["ratio"]["difference"], found["ratio"]["apart"]) == ("better", True)


def test_equal_medians_of_different_values_differ_as_their_ranks_do() -> None:
    # Events that most runs do not see at all.
    found = compared([0.0] * 11 + [float(number) for number in range(1, 10)], [0.0] * 60)
    assert found["median"] == 0
    assert found["ratio"]["difference"] == "better"


@pytest.mark.parametrize(
    ("loaded", "alone", "n", "interval"),
    [([5.0], [5.0], 1, None), ([5.0, 6.0], [5.0], 2, None), ([5.0] * 10, [5.0] * 20, 10, [5.0, 5.0]),
     ([-3.0] * 5, [-2.0] * 5, 5, [-3.0, -3.0]), ([0.0] * 5, [0.0] * 5, 5, [0.0, 0.0])],
    ids=["one", "two", "all equal", "negative", "zeros"],
)  # fmt: skip
def test_few_and_equal_and_negative_values(
    loaded: list[float], alone: list[float], n: int, interval: list[float] | None
) -> None:
    found = compared(loaded, alone)
    assert (found["n"], found["ci"]) == (n, interval)
    if loaded[0] <= 0:
        assert found["ratio"]["value"] is None


def test_few_values_have_no_interval_and_that_is_said() -> None:
    found = analysed(results({ALONE: rates(1, 8), LOADED: rates(2, 4)}))
    assert found["warnings"] == ["1 of 2 conditions have figures without an interval, which needs 5 runs"]


# -- what is not there ---------------------------------------------------------------------------------


def test_runs_that_failed_or_were_not_made_have_no_values_and_are_told_of() -> None:
    problem = {"problem": "the aggressor ended early", "remedy": "look"}
    failed = {"metrics": {"rate": 1.0}, "error": problem}
    loaded = [*rates(1, 6), failed, failed, {"error": {**problem, "problem": "no such file"}}, None]
    found = analysed(results({ALONE: rates(2, 10), LOADED: loaded}))
    one = condition(found, LOADED)
    assert (one["planned"], one["done"], one["failed"]) == (10, 6, 3)
    assert one["metrics"]["rate"]["values"] == loaded[:6]
    why = ["2 runs failed: the aggressor ended early", "1 run failed: no such file", "1 run not made"]
    assert found["missing"] == [{"condition": LOADED, "planned": 10, "done": 6, "why": why}]


def test_an_experiment_of_which_no_run_was_made_has_an_analysis() -> None:
    found = analysed(results({ALONE: [None] * 4, LOADED: [None] * 4}))
    assert [one["metrics"] for one in found["conditions"]] == [{}, {}]
    assert [one["primary"] for one in found["conditions"]] == [None, None]
    assert found["warnings"] == [f"{LOADED}: there is no alone run to compare it with"]
    assert "nothing was measured" in summary(found)


def test_a_condition_without_its_alone_runs_has_no_ratio_and_that_is_said() -> None:
    made = results({ALONE: rates(1, 5), LOADED: rates(2, 5)})
    plan = made.experiment["plan"]
    plan["conditions"][0]["victim_pcpu"] = 7
    found = analysed(made)
    assert condition(found, LOADED)["metrics"]["rate"]["ratio"] is None
    assert f"{LOADED}: there is no alone run to compare it with" in found["warnings"]


@pytest.mark.parametrize(
    ("metric", "words"),
    [
        ({"value": math.nan, "unit": "1/s", "better": "higher"}, "1 have no finite number for it"),
        ({"value": math.inf, "unit": "1/s", "better": "higher"}, "1 have no finite number for it"),
        ({"value": 10**400, "unit": "1/s", "better": "higher"}, "1 have no finite number for it"),
        ({"value": True, "unit": "1/s", "better": "higher"}, "1 have no finite number for it"),
        ({"value": None, "unit": "1/s", "better": "higher"}, "1 do not know it"),
        ({"value": 5.0, "unit": "ns", "better": "higher"}, "1 have it in ns (higher is better)"),
        ({"value": 5.0, "unit": "1/s", "better": "lower"}, "1 have it in 1/s (lower is better)"),
        (None, "1 do not have it"),
    ],
    ids=["NaN", "infinite", "huge", "true", "null", "another unit", "another direction", "absent"],
)
def test_a_value_that_does_not_compare_is_left_out_with_a_word(metric: Any, words: str) -> None:
    odd = {"metrics": {"rate": metric} if metric else {}}
    found = analysed(results({ALONE: rates(1, 10), LOADED: [*rates(2, 9), odd]}))
    assert condition(found, LOADED)["metrics"]["rate"]["values"] == rates(2, 9)
    assert f"{LOADED}: rate (1/s) is of 9 runs only: {words}" in found["warnings"]


def test_a_metric_that_no_run_knows_is_shown_as_not_known_without_a_warning() -> None:
    unknown = {"value": None, "unit": "%", "better": "lower"}
    found = analysed(results({ALONE: [{"metrics": {"rate": 1.0 + n, "lost": unknown}} for n in (3, 1, 4, 6, 5, 2)]}))
    lost = condition(found, ALONE)["metrics"]["lost"]
    assert (lost["n"], lost["median"], lost["ci"], lost["min"]) == (0, None, None, None)
    assert found["warnings"] == []


# -- warnings ------------------------------------------------------------------------------------------


def test_runs_whose_partition_did_not_hold_count_and_are_warned_of() -> None:
    values = rates(1, 10)
    loaded: list[Any] = [{"metrics": {"rate": value}} for value in values]
    loaded[0] |= {"verdict": "tainted", "reasons": ["kworker ran"]}
    loaded[1] |= {"verdict": "tainted", "reasons": ["kworker ran", "an interrupt"]}
    loaded[2] |= {"verdict": "broken", "reasons": ["the pin was changed"]}
    loaded[3] |= {"verdict": None}
    found = analysed(results({ALONE: rates(2, 10), LOADED: loaded}))
    one = condition(found, LOADED)
    assert one["verdicts"] == {"held": 6, "tainted": 2, "broken": 1, "none": 1}
    assert one["reasons"] == [["kworker ran", 2], ["an interrupt", 1], ["the pin was changed", 1]]
    assert one["metrics"]["rate"]["values"] == values
    assert found["warnings"] == [f"{LOADED}: of 10 runs, 2 tainted and 1 broken: kworker ran"]


def test_a_host_that_grows_slower_is_warned_of_and_one_that_hardly_does_is_not() -> None:
    for percent, warned in ((10, True), (0.5, False)):
        alone = [1e6 * (1 - percent / 100 * at / 59) * (1 + 1e-5 * (at % 7)) for at in range(60)]
        found = analysed(results({ALONE: alone}))
        [drift] = found["drift"]
        assert drift["p"] < 1e-6
        assert drift["change_percent"] == pytest.approx(-percent, rel=0.1)
        assert [drift["warning"]] == (found["warnings"] if warned else [None])
        assert bool(found["warnings"]) is warned


def test_damaged_lines_and_runs_of_no_condition_are_told_of(tmp_path: Path) -> None:
    directory = write(tmp_path / "x", {ALONE: rates(1, 5)})
    stranger = {**read(str(directory)).runs[0], "run": 99, "condition": "other"}
    with (directory / "runs.jsonl").open("a") as file:
        file.write(json.dumps(stranger) + "\n" + '{"schema":1,"ru')
    assert analysed(read(str(directory)))["warnings"] == [
        "1 run of a condition that the plan does not have: left out",
        "1 line of the results could not be read: cut short, or damaged",
    ]


def _resumed(**facts: Any) -> list[str]:
    # The warnings where these facts are others at the second start; a mapping replaces parts of one.
    made = results({ALONE: rates(1, 10)}, again_after=5)
    assert analysed(made)["warnings"] == []
    given = {name: {**experiments.FACTS[name], **one} if isinstance(one, dict) else one for name, one in facts.items()}
    made.sessions[1]["facts"] = {**experiments.FACTS, **given}
    warnings: list[str] = analysed(made)["warnings"]
    head = "the host was not the same at each start: "
    assert all(one.startswith(head) for one in warnings)
    return [one.removeprefix(head) for one in warnings]


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        ({"kernel": {"release": "7.0.1"}}, "kernel.release was 6.12.90 and 7.0.1"),
        ({"versions": {"hostpart": "0.3.0"}}, "versions.hostpart was 0.2.0 and 0.3.0"),
        (
            {"versions": {"python": "3.12.1", "numba": "0.61.0"}},
            "versions.python was 3.11.7 and 3.12.1; versions.numba was none and 0.61.0",
        ),
        (
            {"kernel": {"cmdline": "root=/dev/sda1 isolcpus=3"}},
            'kernel.cmdline was "root=/dev/sda1 isolcpus=2" and "root=/dev/sda1 isolcpus=3"',
        ),
        (
            {"mitigations": {"mds": "Vulnerable"}},
            'mitigations.mds was "Mitigation: Clear CPU buffers; SMT vulnerable" and Vulnerable',
        ),
        ({"smt": {"active": None}}, "smt.active was true and none"),
        ({"governor": None}, "governor.0 and 7 others was performance and none"),
        ({"turbo": True}, "turbo was false and true"),
        (
            {"versions": {name: f"1{name}" for name in "abcde"}},
            "; ".join([*(f"versions.{name} was none and 1{name}" for name in "abc"), "2 more of versions"]),
        ),
    ],
    ids=["kernel", "hostpart", "two versions", "command line", "mitigation", "SMT", "governors", "turbo", "many"],
)
def test_a_host_that_was_another_one_at_the_second_start_is_warned_of(facts: dict[str, Any], words: str) -> None:
    assert _resumed(**facts) == [words]


def test_of_long_texts_only_what_differs_is_told() -> None:
    before = {"kernel": {"cmdline": f"{'a=1 ' * 50}quiet isolcpus=2 {'b=2 ' * 50}"}}
    assert starts.changes([before, {"kernel": {"cmdline": f"{'a=1 ' * 50}quiet isolcpus=3 {'b=2 ' * 50}"}}]) == [
        'kernel.cmdline was "… quiet isolcpus=2 …" and "… quiet isolcpus=3 …"'
    ]
    assert starts.changes([before, {"kernel": {"cmdline": f"{'a=1 ' * 50}quiet {'b=2 ' * 50}"}}]) == [
        'kernel.cmdline was "… quiet isolcpus=2 …" and "… quiet …"'
    ]
    assert starts.changes([before, {}]) == [f'kernel.cmdline was "{"a=1 " * 29}a=1…" and none']
    assert starts.changes([{"hostname": "x" * 999}, {"hostname": "y"}]) == [f"hostname was {'x' * 119}… and y"]


@settings(deadline=None)
@given(st.lists(st.recursive(st.none() | st.booleans() | st.text(max_size=90), st.lists, max_leaves=3), min_size=1))
def test_whatever_a_start_says_the_same_is_no_change_and_another_is_one(values: list[Any]) -> None:
    told = starts.changes([{"turbo": value} for value in values])
    assert len(told) == (len({json.dumps(value) for value in values}) > 1)
    assert starts.changes([{"turbo": values[0]}] * 3) == []


def test_runs_on_different_engines_are_warned_of() -> None:
    made = results({ALONE: rates(1, 10)})
    made.runs[3]["record"]["engine"] = "numba"
    assert analysed(made)["warnings"] == ["integer: its runs do not compare: the engines were numba, python"]


@pytest.mark.parametrize(
    "record",
    [
        "a text", 7, [], {}, {"engine": "python"}, {"engine": ["python"], "histograms": {}, "slices": None},
        {"engine": "python", "histograms": [], "slices": None},
        {"engine": "python", "histograms": {"latency": {"unit": "ns"}}, "slices": None},
        {"engine": "python", "histograms": {"latency": {"unit": "ns", "max": math.inf, "buckets": []}}, "slices": None},
        {"engine": "python", "histograms": {"latency": {"unit": "ns", "max": 1, "buckets": [[0, 1]]}}, "slices": None},
        {"engine": "python", "histograms": {"latency": {"unit": "ns", "max": None, "buckets": [[0, None, 1]]}}},
        {"engine": "python", "histograms": {"latency": {"unit": "ns", "max": 1, "buckets": [[0, 2, 1e9]]}}},
        {"engine": "python", "histograms": {}, "slices": {}},
        {"engine": "python", "histograms": {}, "slices": {"start_ns": [0], "series": {"rate": {"unit": "1/s"}}}},
        {"engine": "python", "histograms": {}, "slices": {"start_ns": [math.nan], "series": {}}},
    ],
    ids=repr,
)  # fmt: skip
def test_a_record_that_is_none_of_a_probes_is_left_out_with_a_word(record: Any) -> None:
    made = results({ALONE: rates(1, 10)})
    made.runs[3]["record"] = record
    found = analysed(made)
    assert condition(found, ALONE)["metrics"]["rate"]["values"] == rates(1, 10)
    assert found["warnings"] == [
        f"{ALONE}: 1 run whose record is not a probe's, or is damaged: what cannot be read is left out"
    ]


def test_the_records_of_other_tools_are_read_whole() -> None:
    folder = Path(__file__).parent / "tools"
    for tool, name in ((cyclictest, "cyclictest.json"), (oslat, "oslat.json"), (stress_ng, "stress-ng.txt")):
        for record in tool((folder / name).read_text()):
            taken, whole = take({"record": record})
            assert whole
            assert list(taken["record"]["histograms"]) == list(record["histograms"])


def test_a_damaged_histogram_leaves_the_others_to_be_pooled() -> None:
    entries = [{"metrics": {"rate": 1.0 + n}, "histograms": {"a": [1, 2], "b": [3]}} for n in range(3)]
    made = results({ALONE: entries})
    made.runs[0]["record"]["histograms"]["a"]["buckets"][0][2] = "many"
    found = condition(analysed(made), ALONE)["histograms"]
    assert (found["a"]["count"], found["b"]["count"]) == (4, 3)


def test_a_slice_that_is_not_finite_is_not_known() -> None:
    entry = {"metrics": {"rate": 1.0}, "series": {"rate": ("1/s", [1.0, math.inf, 10**400, math.nan])}}
    found = condition(analysed(results({ALONE: [entry]})), ALONE)["series"]["rate"]
    assert found["values"] == [1.0, None, None, None]


def test_a_metric_without_a_unit_or_a_direction_is_as_if_it_were_not_there() -> None:
    odd = [{"metrics": {"rate": one}} for one in ({"value": 1.0}, {"value": 1.0, "unit": "1/s", "better": []})]
    found = analysed(results({ALONE: [*rates(1, 8), *odd]}))
    assert f"{ALONE}: rate (1/s) is of 8 runs only: 2 do not have it" in found["warnings"]


# -- histograms and series -----------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 10**13), max_size=40), min_size=1, max_size=5))
def test_to_pool_histograms_is_to_count_all_values_in_one(samples: list[list[int]]) -> None:
    whole, parts = Histogram("ns"), []
    for values in samples:
        part = Histogram("ns")
        part.update(values)
        whole.update(values)
        parts.append(part.to_json())
    pooled = pool(parts)
    assert pooled["buckets"] == whole.to_json()["buckets"]
    assert (pooled["count"], pooled["max"]) == (whole.count, whole.most)
    for name, percent in (("p50", 50.0), ("p99", 99.0), ("p99_9", 99.9)):
        assert pooled[name] == whole.percentile(percent)


def test_a_pooled_percentile_is_not_below_the_truth() -> None:
    # 59.4 of 60 values: the 59th is exceeded by more than one in a hundred.
    values = Histogram("ns")
    values.update(range(1, 61))
    assert pool([values.to_json()])["p99"] == 60 == values.percentile(99)


def test_another_tools_buckets_are_counted_as_their_largest_value() -> None:
    pooled = pool([{"unit": "ns", "count": 4, "min": 1, "max": 70_000, "buckets": [[0, 1000, 3], [50_000, None, 1]]}])
    assert (pooled["count"], pooled["max"]) == (4, 70_000)
    assert pooled["p50"] == 999
    assert pooled["p99"] == 70_000


def test_histograms_are_pooled_over_processes_and_percentiles_are_of_all_samples() -> None:
    rng = random.Random(5)
    times = [latencies(rng, 500, 4000, 0.5) for _ in range(6)]
    alone = "wakeup|affinity|alone"
    entries = [{"metrics": {"latency_p99": max(one)}, "histograms": {"latency": one}} for one in times]
    found = condition(analysed(results({alone: entries})), alone)["histograms"]["latency"]
    every = sorted(value for one in times for value in one)
    assert (found["count"], found["max"]) == (3000, every[-1])
    assert every[2969] <= found["p99"] <= every[2969] * 129 / 128


def test_the_series_is_that_of_the_process_nearest_to_the_median() -> None:
    entries = [
        {"metrics": {"rate": rate}, "series": {"rate": ("1/s", [rate, None, rate])}}
        for rate in (9.0, 1.0, 5.0, 4.0, 2.0)
    ]
    found = condition(analysed(results({ALONE: entries})), ALONE)["series"]
    assert found == {"rate": {"unit": "1/s", "t_s": [0.0, 0.1, 0.2], "values": [4.0, None, 4.0]}}


# -- how often it is wrong -----------------------------------------------------------------------------


def _same(seed: int, drift: float) -> dict[str, list[float]]:
    # One distribution for all; the host changes by `drift` from the first block to the last.
    rng = random.Random(seed)
    values = {ALONE: [1e6 * (1 + drift * at / 60) * rng.lognormvariate(0, 0.05) for at in range(60)]}
    for placement in PLACEMENTS:
        name = f"integer|affinity|spinner|{placement}"
        values[name] = [1e6 * (1 + drift * (at + 0.5) / 10) * rng.lognormvariate(0, 0.05) for at in range(10)]
    return values


@pytest.mark.parametrize("drift", [0.0, 0.2], ids=["steady", "a host that changes by a fifth"])
def test_where_nothing_differs_no_more_is_found_than_the_stated_rate(drift: float) -> None:
    experiments_with_one, comparisons, false = 0, 0, 0
    trials = 60
    for seed in range(trials):
        found = analyse(results(_same(seed, drift)), resamples=199)
        ratios = [one["metrics"]["rate"]["ratio"] for one in found["conditions"] if one["aggressor"]]
        experiments_with_one += any(one["difference"] != "none" for one in ratios)
        comparisons += len(ratios)
        false += sum(one["p"] < 0.05 for one in ratios)
    # So many by chance once in a thousand tests, if the rates are as stated: 5 % of experiments, 5 % of comparisons.
    assert stats.binom.sf(experiments_with_one - 1, trials, 0.05) > 1e-3
    assert stats.binom.sf(false - 1, comparisons, 0.05) > 1e-3


def _coloured(value: Any) -> Any:
    # The same, with what turns a terminal red behind each text and instead of each number of a pCPU.
    if isinstance(value, str):
        return f"{value}\x1b[31m\r\u202e"
    if isinstance(value, list):
        return [_coloured(one) for one in value]
    if not isinstance(value, dict):
        return value
    found = {_coloured(key) if key == "rate" else key: _coloured(one) for key, one in value.items()}
    return found | ({"victim_pcpu": _coloured("2")} if "victim_pcpu" in value else {})


def test_no_text_from_a_file_is_obeyed_by_a_terminal(everything: Results) -> None:
    shown = summary(_coloured(analyse(everything, resamples=199)))
    assert all(character.isprintable() or character == "\n" for character in shown)
    assert "\\x1b[31m" in shown
    assert "rate\\x1b[31m\\r\\u202e, higher\\x1b[31m\\r\\u202e is better" in shown
    assert len(shown.splitlines()) == len(summary(analyse(everything, resamples=199)).splitlines())


def test_a_summary_names_every_condition(everything: Results) -> None:
    found = analyse(everything, resamples=199)
    text = summary(found)
    for one in found["conditions"]:
        assert one["placement"] in text
    assert text.count("warning: ") == len(found["warnings"]) > 0
    assert text.count("missing: ") == len(found["missing"]) == 3
    assert "3 held, 1 tainted, 1 broken" in text
    assert "4 of 5" in text
    assert summary(found, colour=True).startswith(
        "integer on pCPU 2, isolation affinity: rate, higher is better\n\x1b[1m"
    )


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [(1_234_567.0, "1/s", "1.235 M/s"), (12_799.0, "ns", "12.80 µs"), (1_500.0, "ns", "1.500 µs"),
     (0.0, "ns", "0.000 ns"), (3.134, "s", "3.134 s"),
     (55.0, "%", "55.00 %"), (2.5e9, "B/s", "2.500 GB/s"), (1e-5, "s", "1.000e-05 s"), (12.0, "1", "12.00")],
)  # fmt: skip
def test_numbers_have_four_digits_and_a_unit_of_their_size(value: float, unit: str, shown: str) -> None:
    metric = {"value": value, "unit": unit, "better": "higher"}
    found = analysed(results({ALONE: [{"metrics": {"rate": metric}}] * 5}))
    assert f" {shown} " in summary(found)


@pytest.mark.parametrize(
    ("placement", "verdict", "warned"),
    [("same-pcpu", "tainted", False), ("same-pcpu", "broken", True), ("sibling", "tainted", True)],
)
def test_what_an_aggressor_taints_by_design_is_no_warning(placement: str, verdict: str, warned: bool) -> None:
    name = f"integer|affinity|spinner|{placement}"
    runs = [{"metrics": {"rate": value}, "verdict": verdict, "reasons": ["others ran"]} for value in rates(2, 8)]
    found = analysed(results({ALONE: rates(1, 8), name: runs}))
    assert found["conditions"][1]["overlaps"] is (placement == "same-pcpu")
    assert found["conditions"][1]["verdicts"][verdict] == 8
    assert bool([text for text in found["warnings"] if verdict in text]) is warned
