"""Several hosts as one, and those that stand out: known results, stated rates, and what must not change a figure."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart.experiment import analysis, pooled
from hostpart.experiment.analysis import analyse
from hostpart.experiment.pooled import Estimate, combine, pool, standing_out
from tests import experiments
from tests.fleet_results import values

_SCHEMA: dict[str, Any] = json.loads(Path(analysis.__file__).with_name("pooled.schema.json").read_text())


def _analysed(held: dict[str, list[Any]]) -> dict[str, Any]:
    return analyse(experiments.results(held), resamples=199)


def _pooled(speeds: dict[str, float], **options: Any) -> dict[str, Any]:
    hosts = {name: _analysed(values(seed, speed, **options)) for seed, (name, speed) in enumerate(speeds.items())}
    found = pool(hosts)
    jsonschema.Draft202012Validator(_SCHEMA).validate(found)
    return found


def _estimates(those: list[float], error: float = 0.005, spread: float = 0.02) -> list[Estimate]:
    return [Estimate(f"h{number}", value, error, spread) for number, value in enumerate(those)]


def test_the_schema_is_one() -> None:
    jsonschema.Draft202012Validator.check_schema(_SCHEMA)


def test_a_known_analysis_comes_out() -> None:
    # The thirteen trials of the BCG vaccine (Colditz et al. 1994), and what metafor's rma(yi, vi, method="PM") gives.
    cases = [
        (4, 119, 11, 128), (6, 300, 29, 274), (3, 228, 11, 209), (62, 13536, 248, 12619), (33, 5036, 47, 5761),
        (180, 1361, 372, 1079), (8, 2537, 10, 619), (505, 87886, 499, 87892), (29, 7470, 45, 7232),
        (17, 1699, 65, 1600), (186, 50448, 141, 27197), (5, 2493, 3, 2338), (27, 16886, 29, 17825),
    ]  # fmt: skip
    trials = [
        Estimate(
            str(number),
            math.log((a / (a + b)) / (c / (c + d))),
            math.sqrt(1 / a - 1 / (a + b) + 1 / c - 1 / (c + d)),
            0.0,
        )
        for number, (a, b, c, d) in enumerate(cases)
    ]
    found = combine(trials)
    assert found is not None
    assert found.tau**2 == pytest.approx(0.3181, abs=0.0005)
    assert found.value == pytest.approx(-0.7150, abs=0.0005)
    # Q = 152.23 of 12 degrees of freedom.
    assert found.i2 == pytest.approx(1 - 12 / 152.23, abs=0.0005)
    # Paule and Mandel's variance makes the generalised Q 12, so that Knapp and Hartung's factor is 1.
    weights = sum(1 / (one.error**2 + found.tau**2) for one in trials)
    reach = 2.17881 / math.sqrt(weights)
    assert found.interval == pytest.approx((found.value - reach, found.value + reach), abs=1e-5)


def test_hosts_that_agree_have_no_spread_and_those_that_do_not_have_a_wide_interval() -> None:
    same, apart = combine(_estimates([0.1, 0.1, 0.1])), combine(_estimates([-0.3, 0.1, 0.5]))
    assert same is not None
    assert apart is not None
    assert (same.tau, same.i2) == (0.0, 0.0)
    assert apart.tau == pytest.approx(0.4, abs=0.001)
    assert apart.i2 > 0.99
    assert apart.value == pytest.approx(0.1)
    assert apart.prediction is not None
    assert apart.prediction[0] < apart.interval[0] < same.interval[0]


def test_two_hosts_have_an_interval_of_one_degree_of_freedom_and_no_prediction() -> None:
    found = combine(_estimates([0.0, 0.1]))
    assert found is not None
    assert found.prediction is None
    # Both weigh the same: t is that of two values.
    assert found.interval[1] - found.value == pytest.approx(12.7062 * math.sqrt(0.005 / 2), rel=1e-3)
    assert combine(_estimates([0.1])) is None
    assert combine([]) is None


def test_equal_values_without_any_error_do_not_divide_by_nothing() -> None:
    found = combine(_estimates([0.0, 0.0, 0.2], error=0.0))
    assert found is not None
    assert found.tau > 0.1
    assert standing_out(_estimates([0.0, 0.0, 0.0], error=0.0, spread=0.0)) == {}


@pytest.mark.parametrize("slowed", ["alpha", "beta", "gamma"])
def test_of_three_hosts_the_one_slowed_by_30_percent_is_named(slowed: str) -> None:
    speeds = {name: 0.7 if name == slowed else 1.0 for name in ("alpha", "beta", "gamma")}
    found = _pooled(speeds)
    assert [one["host"] for one in found["outliers"]] == [slowed]
    assert found["outliers"][0]["alone"] == 2  # victims
    assert found["outliers"][0]["ratios"] == 0  # all of it is slower, beside an aggressor and alone
    [rate] = [one for one in found["alone"] if one["victim"] == "integer"]
    [out] = rate["outliers"]
    assert out["share"] == pytest.approx(0.7, abs=0.02)
    assert (
        out["reason"] == f"host {slowed}: integer alone (affinity) is {out['share']:.2f} of the others' median (worse)"
    )
    [wall] = [one for one in found["alone"] if one["victim"] == "compile"]
    assert wall["outliers"][0]["share"] == pytest.approx(1 / 0.7, abs=0.03)
    assert "(worse)" in wall["outliers"][0]["reason"]


def test_a_fast_host_is_named_as_better() -> None:
    found = _pooled({"a": 1.0, "b": 1.4, "c": 1.0})
    assert [(one["host"], "(better)" in one["reason"]) for one in found["outliers"]] == [("b", True)]


def test_hosts_that_are_alike_are_not_named() -> None:
    assert _pooled({"a": 1.0, "b": 1.02, "c": 0.98, "d": 1.01})["outliers"] == []


def test_a_host_where_an_aggressor_costs_more_is_named_by_its_ratio() -> None:
    hosts = {name: values(seed) for seed, name in enumerate("abcd")}
    hosts["d"]["integer|affinity|thrash|same-llc"] = [
        0.5 * one for one in hosts["d"]["integer|affinity|thrash|same-llc"]
    ]
    found = pool({name: _analysed(held) for name, held in hosts.items()})
    [out] = found["outliers"]
    assert (out["host"], out["alone"], out["ratios"]) == ("d", 0, 1)
    assert out["reason"].startswith("host d: integer beside thrash at same-llc (affinity) is 0.4")
    assert "elsewhere 0.8" in out["reason"]


def test_two_slow_hosts_of_twelve_do_not_hide_each_other() -> None:
    those = [0.01 * (number % 3) for number in range(10)] + [-0.36, -0.36]
    assert set(standing_out(_estimates(those))) == {"h10", "h11"}


def test_of_two_hosts_none_is_named_and_it_is_said() -> None:
    found = _pooled({"a": 1.0, "b": 0.5})
    assert found["outliers"] == []
    assert "that takes 3" in found["warnings"][0]
    [rate] = [one for one in found["alone"] if one["victim"] == "integer"]
    assert rate["most_to_least"] == pytest.approx(2.0, rel=0.02)


def test_a_noisy_host_is_not_named_for_its_noise() -> None:
    quiet = _estimates([0.0, 0.01, -0.01, -0.3])
    noisy = [*quiet[:3], Estimate("h3", -0.3, 0.2, 0.6)]
    assert set(standing_out(quiet)) == {"h3"}
    assert standing_out(noisy) == {}


def test_what_is_beyond_chance_and_small_is_not_named() -> None:
    # So many that what is added counts for nothing.
    those = [0.00001 * number for number in range(400)]
    assert set(standing_out(_estimates([*those, -0.06], 0.0001, 0.0001))) == {"h400"}
    assert standing_out(_estimates([*those, -0.04], 0.0001, 0.0001)) == {}


# The docstring's rates, with fewer trials: what is asserted is some standard errors away.
def _named(hosts: int, spread: float, trials: int, noise: float = 0.02) -> tuple[float, float]:
    rng = random.Random(hosts)
    falsely = rightly = 0
    for _ in range(trials):
        error = 1.25 * noise / math.sqrt(12)
        those = _estimates([rng.gauss(0, spread) + rng.gauss(0, error) for _ in range(hosts)], error, noise)
        falsely += bool(standing_out(those))
        slowed = [those[0].replace(value=those[0].value + math.log(0.7)), *those[1:]]
        rightly += "h0" in standing_out(slowed)
    return falsely / trials, rightly / trials


@pytest.mark.parametrize(
    ("hosts", "spread", "falsely", "rightly"),
    [
        (3, 0.02, 0.003, 0.98),
        (3, 0.05, 0.01, 0.8),
        (12, 0.02, 0.003, 0.99),
        (12, 0.05, 0.02, 0.97),
        (12, 0.1, 0.12, 0.4),
    ],
)
def test_hosts_are_named_as_often_as_is_said(hosts: int, spread: float, falsely: float, rightly: float) -> None:
    wrong, right = _named(hosts, spread, 600)
    assert wrong <= falsely
    assert right >= rightly


@pytest.mark.parametrize(("hosts", "spread"), [(3, 0.1), (5, 0.05), (12, 0.05)])
def test_the_interval_holds_the_truth_as_often_as_it_says(hosts: int, spread: float) -> None:
    rng = random.Random(hosts)
    held = 0
    for _ in range(600):
        found = combine(_estimates([rng.gauss(0.3, spread) + rng.gauss(0, 0.01) for _ in range(hosts)], 0.01))
        assert found is not None
        held += found.interval[0] <= 0.3 <= found.interval[1]
    assert 0.92 <= held / 600 <= 0.98


def test_neither_the_order_of_hosts_nor_a_second_time_changes_anything() -> None:
    hosts = {name: _analysed(values(seed)) for seed, name in enumerate("abc")}
    found = json.dumps(pool(hosts))
    assert json.dumps(pool(dict(reversed(hosts.items())))) == found == json.dumps(pool(hosts))


def test_another_host_does_not_change_what_a_host_has() -> None:
    hosts = {name: _analysed(values(seed)) for seed, name in enumerate("abc")}
    one, other = pool(hosts), pool({name: hosts[name] for name in "ab"})
    assert other["conditions"][0]["hosts"]["a"] == one["conditions"][0]["hosts"]["a"]


def test_the_ratio_of_each_host_is_its_analysis_and_the_pooled_one_lies_between() -> None:
    hosts = {name: _analysed(values(seed)) for seed, name in enumerate("abc")}
    found = pool(hosts)
    one = next(one for one in found["conditions"] if (one["victim"], one["placement"]) == ("integer", "same-pcpu"))
    ratios = []
    for name, analysed in hosts.items():
        of = next(each for each in analysed["conditions"] if each["id"] == "integer|affinity|spinner|same-pcpu")
        ratios.append(of["metrics"]["rate"]["ratio"]["value"])
        assert one["hosts"][name]["ratio"] == ratios[-1]
    assert min(ratios) <= one["pooled"]["ratio"] <= max(ratios)
    assert one["pooled"]["difference"] == "worse"
    steady = next(
        one for one in found["conditions"] if one["placement"] == "same-llc" and one["aggressor"] == "spinner"
    )
    assert steady["pooled"]["difference"] == "none"


def test_a_host_with_few_runs_is_shown_and_not_pooled() -> None:
    hosts = {name: _analysed(values(seed)) for seed, name in enumerate("abc")}
    hosts["c"] = _analysed({name: held[:3] for name, held in values(2).items()})
    found = pool(hosts)
    jsonschema.Draft202012Validator(_SCHEMA).validate(found)
    one = found["conditions"][0]
    assert one["n"] == 2
    assert one["hosts"]["c"]["why"] == "fewer than 5 runs"
    assert one["hosts"]["c"]["ratio"] is not None


def test_hosts_with_other_conditions_metrics_and_units_are_told_apart() -> None:
    hosts = {name: _analysed(values(seed)) for seed, name in enumerate("abc")}
    held = values(3)
    del held["integer|affinity|spinner|sibling"]
    slow = [
        {"metrics": {"rate": {"value": one, "unit": "B/s", "better": "higher"}}}
        for one in held["integer|affinity|alone"]
    ]
    held["integer|affinity|alone"] = slow
    hosts["d"] = _analysed(held)
    found = pool(hosts)
    jsonschema.Draft202012Validator(_SCHEMA).validate(found)
    sibling = next(one for one in found["conditions"] if (one["victim"], one["placement"]) == ("integer", "sibling"))
    assert (sibling["n"], sibling["hosts"]["d"]["why"]) == (3, "not planned there")
    assert sum(1 for one in found["alone"] if one["victim"] == "integer") == 1


def test_values_that_have_no_logarithm_are_shown_and_not_pooled() -> None:
    held = {"noise|affinity|alone": [0.0, 0.1, 0.1, 0.2, 0.1, 0.1], "noise|affinity|spinner|same-llc": [0.5] * 6}
    hosts = {name: _analysed(dict(held)) for name in "abc"}
    found = pool(hosts)
    jsonschema.Draft202012Validator(_SCHEMA).validate(found)
    [one] = found["conditions"]
    assert (one["n"], one["pooled"]) == (0, None)
    assert "no logarithm" in one["hosts"]["a"]["why"]


def test_extreme_numbers_are_no_failure() -> None:
    held = {"integer|affinity|alone": [1e-300] * 6, "integer|affinity|spinner|same-llc": [1e300, 1e-300] * 3}
    hosts = {"a": _analysed(held), "b": _analysed({name: [1 / one for one in those] for name, those in held.items()})}
    found = pool(hosts)
    json.dumps(found, allow_nan=False)
    jsonschema.Draft202012Validator(_SCHEMA).validate(found)


def test_no_host_and_one_host_have_a_document_too() -> None:
    for hosts in ({}, {"a": _analysed(values(1))}):
        found = pool(hosts)
        jsonschema.Draft202012Validator(_SCHEMA).validate(found)
        assert all(one["pooled"] is None for one in found["conditions"])


def test_a_hybrid_hosts_kinds_are_told_apart() -> None:
    hosts = {}
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        rng = random.Random(seed)
        held = {
            f"integer|affinity|{kind}/{rest}" if rest == "alone" else f"integer|affinity|spinner|{kind}/{rest}": [
                speed * (0.5 if rest == "same-pcpu" else 1) * rng.gauss(1, 0.01) for _ in range(6)
            ]
            for kind, speed in (("performance", 2e6), ("efficiency", 1e6))
            for rest in ("alone", "same-pcpu")
        }
        hosts[name] = _analysed(held)
    found = pool(hosts)
    assert [one["placement"] for one in found["alone"]] == ["performance/alone", "efficiency/alone"]
    assert [one["n"] for one in found["conditions"]] == [3, 3]
    assert found["outliers"] == []


def test_a_hundred_hosts_take_seconds_not_minutes() -> None:
    one = _analysed(values(1))
    found = pool({f"h{number}": one for number in range(100)})
    assert found["conditions"][0]["n"] == 100
    assert found["schema"] == pooled.SCHEMA


def test_a_few_processes_that_were_disturbed_do_not_hide_a_slow_host() -> None:
    named: list[str] = []
    for seed in range(20):
        rng = random.Random(seed)
        those = []
        for name, slowed in (("a", 1.0), ("b", 1.0), ("c", 1.5)):
            taken = [slowed * rng.gauss(100, 1) * (1.8 if place % 6 == 0 else 1.0) for place in range(12)]
            found = pooled._estimate(name, [taken], seed)
            assert isinstance(found, Estimate)
            those.append(found)
        named += standing_out(those)
    assert set(named) == {"c"}
    assert len(named) >= 15
