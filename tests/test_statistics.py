"""Statistics against scipy's own and against known answers; how often intervals hold and tests are wrong."""

from __future__ import annotations

import math
import random
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction
from itertools import combinations
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("scipy", reason="needs scipy: pip install 'hostpart[experiment]'")

import numpy as np
from scipy import stats

from hostpart.experiment import statistics
from hostpart.experiment.statistics import holm, median, median_interval, rank_test, ratio, ratio_interval, trend

# Recorded: the integer probe for a second each on a busy 2-CPU virtual machine, Python 3.11; alone and with a spinner
# on its CPU, in turn. Thousands of rounds per second.
ALONE = [7116.1, 7365.9, 7165.1, 7371.4, 6617.3, 3565.5, 5595.9, 6910.1, 5119.4, 4663.2]
LOADED = [1608.3, 3721.8, 3539.3, 1443.2, 2971.1, 2082.3, 1395.5, 3630.1, 1867.3, 2515.0]
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SAMPLES = st.lists(st.floats(-1e9, 1e9), min_size=5, max_size=30)


# -- medians and their intervals -----------------------------------------------------------------------


@pytest.mark.parametrize("values", [ALONE, LOADED, [3.0, 1.0, 2.0, 9.0, 5.0]], ids=["alone", "loaded", "five"])
def test_an_interval_of_a_median_is_scipys_bootstrap_at_the_expanded_level(values: list[float]) -> None:
    level = 1 - 2 * statistics.tail(len(values))
    theirs = stats.bootstrap(
        (values,), np.median, n_resamples=99_999, confidence_level=level, method="percentile", rng=7
    ).confidence_interval
    ours = median_interval(values, resamples=99_999)
    # Both are drawn: what differs is how far out in the tail they happened to come.
    spread = max(values) - min(values)
    assert ours == pytest.approx((theirs.low, theirs.high), abs=spread * 0.03)


def test_an_interval_of_a_ratio_is_scipys_bootstrap_of_two_samples() -> None:
    def of_medians(above: Any, below: Any, axis: int = -1) -> Any:
        return np.median(above, axis=axis) / np.median(below, axis=axis)

    theirs = stats.bootstrap(
        (LOADED, ALONE), of_medians, n_resamples=99_999, method="percentile", rng=7
    ).confidence_interval
    ours = ratio_interval(LOADED, ALONE, resamples=99_999)
    assert ours == pytest.approx((theirs.low, theirs.high), rel=2e-3)


def test_the_level_is_expanded_as_published() -> None:
    # Hesterberg 2015, "expanded percentile interval": 2.5 % at each end become 0.86 % of 10 values, 1.6 % of 20.
    assert statistics.tail(10) == pytest.approx(0.0086, abs=1e-4)
    assert statistics.tail(20) == pytest.approx(0.0159, abs=1e-4)
    assert statistics.tail(100_000) == pytest.approx(0.025, abs=1e-5)


def _draws(kind: str, rng: np.random.Generator, shape: tuple[int, int]) -> tuple[Any, float]:
    # Values and their distribution's median.
    if kind == "normal":
        return rng.normal(1, 0.02, shape), 1.0
    if kind == "log-normal":
        return rng.lognormal(0, 0.5, shape), 1.0
    return 1 + 0.02 * rng.standard_t(3, shape), 1.0


def _no_fewer_than(hits: int, trials: int, rate: float) -> bool:
    # Whether so few could be chance, once in ten thousand tests, if the rate is as stated.
    return float(stats.binom.cdf(hits, trials, rate)) > 1e-4


def _no_more_than(hits: int, trials: int, rate: float) -> bool:
    return float(stats.binom.sf(hits - 1, trials, rate)) > 1e-4


@pytest.mark.parametrize("kind", ["normal", "log-normal", "heavy tails"])
@pytest.mark.parametrize(("count", "stated"), [(5, 0.9375), (10, 0.95), (15, 0.95)])
def test_an_interval_of_a_median_holds_it_as_often_as_it_says(kind: str, count: int, stated: float) -> None:
    values, truth = _draws(kind, np.random.default_rng([count, len(kind)]), (800, count))
    found = [median_interval(row, resamples=999) for row in values]
    assert _no_fewer_than(sum(one is not None and one[0] <= truth <= one[1] for one in found), len(found), stated)


@pytest.mark.parametrize("kind", ["normal", "log-normal", "heavy tails"])
@pytest.mark.parametrize(("count", "base"), [(10, 60), (10, 10), (5, 20)])
def test_an_interval_of_a_ratio_holds_it_as_often_as_it_says(kind: str, count: int, base: int) -> None:
    rng = np.random.default_rng([count, base, len(kind)])
    loaded, truth = _draws(kind, rng, (600, count))
    alone, _ = _draws(kind, rng, (600, base))
    found = [ratio_interval(row * 0.66, below, resamples=999) for row, below in zip(loaded, alone, strict=True)]
    held = sum(one is not None and one[0] <= 0.66 * truth <= one[1] for one in found)
    assert _no_fewer_than(held, len(found), 0.95)


@settings(deadline=None)
@given(st.lists(FINITE, min_size=5, max_size=30), st.integers(0, 1 << 40))
def test_an_interval_lies_around_the_median_and_within_the_values(values: list[float], seed: int) -> None:
    found, middle = median_interval(values, seed=seed, resamples=199), median(values)
    assert found is not None
    assert middle is not None
    assert min(values) <= found[0] <= middle <= found[1] <= max(values)


@settings(deadline=None)
@given(SAMPLES, st.sampled_from([2.0, 0.5, 1024.0]))
def test_an_interval_scales_with_the_values_and_a_ratio_does_not(values: list[float], factor: float) -> None:
    scaled = [value * factor for value in values]
    found = median_interval(values, resamples=199)
    assert found is not None
    assert median_interval(scaled, resamples=199) == pytest.approx((found[0] * factor, found[1] * factor))
    positive = [abs(value) + 1 for value in values]
    before = ratio_interval(positive, positive, resamples=199)
    assert before is not None
    after = ratio_interval([value * factor for value in positive], [v * factor for v in positive], resamples=199)
    assert after == pytest.approx(before)


def test_the_same_seed_gives_the_same_interval_and_another_one_nearly_the_same() -> None:
    first = median_interval(ALONE, seed=1)
    assert first is not None
    assert first == median_interval(list(ALONE), seed=1)
    assert first == pytest.approx(median_interval(ALONE, seed=2), rel=0.05)
    assert median_interval(ALONE, seed=1, resamples=19) != median_interval(ALONE, seed=2, resamples=19)


@pytest.mark.parametrize("count", [8000, 7999], ids=["even", "odd"])
def test_an_interval_of_many_values_takes_little_memory_and_is_that_of_all_resamples(count: int) -> None:
    resamples = 1_500
    rng = random.Random(1)
    values = [rng.gauss(1, 0.1) for _ in range(count)]
    tracemalloc.start()
    try:
        found = median_interval(values, resamples=resamples)
        most = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert most < 32 << 20  # all at once: 92 MiB
    drawn = np.random.default_rng([0, 0, count]).integers(0, count, (resamples, count))
    medians = np.median(np.sort(values)[drawn], axis=1)
    share = statistics.tail(count)
    bounds = np.quantile(medians, share, method="lower"), np.quantile(medians, 1 - share, method="higher")
    assert found == pytest.approx(bounds, rel=1e-12)


def test_the_order_of_the_values_does_not_matter() -> None:
    mixed = random.Random(1).sample(ALONE, len(ALONE))
    assert median_interval(mixed) == median_interval(ALONE)
    assert ratio_interval(LOADED, mixed) == ratio_interval(LOADED, ALONE)


@pytest.mark.parametrize("values", [[], [1.0], [1.0, 2.0], [1.0, 2.0, 3.0, 4.0]], ids=len)
def test_fewer_than_five_values_have_no_interval(values: list[float]) -> None:
    assert median_interval(values) is None
    assert ratio_interval(values, ALONE) is None
    assert ratio_interval(ALONE, values) is None


def test_a_median_of_one_two_or_no_value() -> None:
    assert [median(values) for values in ([], [3.0], [1.0, 2.0])] == [None, 3.0, 1.5]


def test_equal_values_have_an_interval_without_width() -> None:
    assert median_interval([7.0] * 10) == (7.0, 7.0)
    assert ratio_interval([7.0] * 10, [7.0] * 10) == (1.0, 1.0)


@pytest.mark.parametrize(
    ("values", "base"),
    [([1.0] * 5, [0.0] * 5), ([0.0] * 5, [0.0] * 5), ([1.0] * 5, [-1.0] * 5), ([1.0] * 5, []), ([], [1.0] * 5)],
    ids=["to zero", "zero to zero", "to less than zero", "to nothing", "of nothing"],
)
def test_what_has_no_ratio_has_none(values: list[float], base: list[float]) -> None:
    assert ratio(values, base) is None
    assert ratio_interval(values, base) is None


def test_a_ratio_whose_base_may_be_zero_has_no_interval() -> None:
    base = [0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0]
    assert ratio([2.0] * 7, base) == 2
    assert ratio_interval([2.0] * 7, base) is None


def test_a_ratio_whose_base_may_be_less_than_zero_has_no_interval() -> None:
    assert ratio_interval([2.0] * 7, [-1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0]) is None


@pytest.mark.parametrize("count", [9, 10])
def test_values_that_lie_alike_to_both_sides_have_an_interval_that_does(count: int) -> None:
    found = median_interval([float(number) for number in range(count)], resamples=49_999)
    assert found is not None
    assert sum(found) == pytest.approx(count - 1, abs=0.01)


def test_zero_and_less_can_be_compared_with_more() -> None:
    assert (ratio([0.0] * 5, [2.0] * 5), ratio_interval([0.0] * 5, [2.0] * 5)) == (0.0, (0.0, 0.0))
    assert (ratio([-1.0] * 5, [2.0] * 5), ratio_interval([-1.0] * 5, [2.0] * 5)) == (-0.5, (-0.5, -0.5))


def test_the_largest_and_smallest_numbers_are_no_infinite_ratio() -> None:
    assert ratio([1e308] * 5, [1e-308] * 5) is None
    assert ratio_interval([1e308] * 5, [1e-308] * 5) is None
    assert median_interval([1.7e308] * 6) == (1.7e308, 1.7e308)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_what_is_not_finite_is_refused(bad: float) -> None:
    values = [*ALONE, bad]
    for refused in (
        lambda: median(values),
        lambda: median_interval(values),
        lambda: ratio(ALONE, values),
        lambda: ratio_interval(values, ALONE),
        lambda: rank_test(ALONE, values),
        lambda: trend(range(len(values)), values),
    ):
        with pytest.raises(ValueError, match="not finite"):
            refused()


# -- the rank test -------------------------------------------------------------------------------------


def _p(values: Sequence[float], others: Sequence[float]) -> float:
    found = rank_test(values, others)
    assert found is not None
    return found.p


def test_the_rank_test_is_scipys() -> None:
    exact = stats.mannwhitneyu(LOADED, ALONE, alternative="two-sided", method="exact").pvalue
    assert _p(LOADED, ALONE) == _p(ALONE, LOADED) == exact
    rounded = [round(value, -3) for value in LOADED], [round(value, -3) for value in ALONE]
    corrected = stats.mannwhitneyu(*rounded, alternative="two-sided", method="asymptotic").pvalue
    assert _p(*rounded) == corrected


def _by_hand(values: Sequence[float], others: Sequence[float]) -> float:
    # Of all ways to deal the values out, the share of those at least as far from the middle.
    every, count = [*values, *others], len(values)
    middle = Fraction(count * len(others), 2)

    def above(chosen: Sequence[int]) -> Fraction:
        rest = [every[index] for index in range(len(every)) if index not in chosen]
        return Fraction(sum(every[index] > other for index in chosen for other in rest))

    found = abs(above(range(count)) - middle)
    ways = list(combinations(range(len(every)), count))
    return sum(abs(above(way) - middle) >= found for way in ways) / len(ways)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(-1000, 1000), min_size=2, max_size=8, unique=True), st.data())
def test_without_ties_the_rank_test_counts_all_orders(values: list[int], data: st.DataObject) -> None:
    cut = data.draw(st.integers(1, len(values) - 1))
    assert _p(values[:cut], values[cut:]) == pytest.approx(_by_hand(values[:cut], values[cut:]))


def test_samples_apart_have_the_least_p_there_is() -> None:
    alone = [10.0 + number for number in range(60)]
    loaded = [float(number) for number in range(10)]
    assert _p(loaded, alone) == pytest.approx(2 / math.comb(70, 10))


def test_the_rank_test_tells_which_sample_is_above() -> None:
    for above, samples in ((0.0, ([1.0, 2.0], [3.0, 4.0])), (1.0, ([3.0, 4.0], [1.0, 2.0])), (0.5, ([1.0], [1.0]))):
        found = rank_test(*samples)
        assert found is not None
        assert found.above == above


def test_the_rank_test_of_few_and_of_equal_values() -> None:
    assert rank_test([], ALONE) is None
    assert rank_test(ALONE, []) is None
    assert _p([1.0], [2.0]) == 1.0
    assert _p([1.0] * 10, [1.0] * 60) == 1.0
    assert _p([0.0] * 9 + [1.0], [0.0] * 10) == pytest.approx(0.37, abs=0.1)


@pytest.mark.parametrize("digits", [6, 0], ids=["no ties", "mostly ties"])
@pytest.mark.parametrize(("count", "base"), [(10, 60), (10, 10), (5, 5)])
def test_of_equal_samples_one_in_twenty_at_most_differs(digits: int, count: int, base: int) -> None:
    rng = np.random.default_rng([digits, count, base])
    trials = 500
    found = [
        _p(np.round(rng.normal(0, 1, count), digits), np.round(rng.normal(0, 1, base), digits)) for _ in range(trials)
    ]
    assert _no_more_than(sum(p < 0.05 for p in found), trials, 0.05)


# -- many tests ----------------------------------------------------------------------------------------


def test_holms_own_example() -> None:
    # Four tests; computed by R's p.adjust(c(0.01, 0.04, 0.03, 0.005), "holm").
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []
    assert holm([0.2]) == [0.2]


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_holm_keeps_the_order_and_is_between_the_plain_p_and_bonferronis(ps: list[float]) -> None:
    adjusted = holm(ps)
    assert all(p <= q <= min(1.0, p * len(ps)) or q <= 1.0 for p, q in zip(ps, adjusted, strict=True))
    assert all(q >= p for p, q in zip(ps, adjusted, strict=True))
    assert min(adjusted) == min(1.0, min(ps) * len(ps))
    order = sorted(range(len(ps)), key=ps.__getitem__)
    assert [adjusted[index] for index in order] == sorted(adjusted)


# -- trends --------------------------------------------------------------------------------------------


def _drifting(seed: int, percent: float, noise: float, count: int = 60) -> list[float]:
    rng = random.Random(seed)
    return [1e6 * (1 + percent / 100 * at / (count - 1)) * rng.gauss(1, noise) for at in range(count)]


@pytest.mark.parametrize("percent", [10.0, -10.0])
def test_a_large_trend_is_found_with_its_size(percent: float) -> None:
    found = trend(range(60), _drifting(1, percent, 0.01))
    assert found is not None
    assert found.matters
    assert found.change_percent == pytest.approx(percent, rel=0.15)


def test_a_tiny_trend_is_beyond_chance_and_does_not_matter() -> None:
    found = trend(range(60), _drifting(1, 0.5, 0.0005))
    assert found is not None
    assert found.p < 1e-6
    assert found.change_percent == pytest.approx(0.5, rel=0.1)
    assert not found.matters


def test_a_large_change_that_may_be_chance_does_not_matter() -> None:
    found = trend(range(4), [1.0, 1.1, 1.2, 1.3])
    assert found is not None
    assert found.change_percent is not None
    assert found.change_percent > 20
    assert not found.matters


def test_values_that_only_scatter_have_a_trend_that_matters_in_one_of_a_hundred_cases_at_most() -> None:
    found = [trend(range(30), _drifting(seed, 0.0, 0.05, 30)) for seed in range(250)]
    assert _no_more_than(sum(one is not None and one.matters for one in found), len(found), 0.01)


def test_a_trend_is_kendalls_and_theils() -> None:
    found = trend(range(len(ALONE)), ALONE)
    assert found is not None
    assert found.p == stats.kendalltau(range(len(ALONE)), ALONE).pvalue
    slope = stats.theilslopes(ALONE).slope
    assert found.change_percent == pytest.approx(100 * slope * (len(ALONE) - 1) / np.median(ALONE))


def test_a_trend_of_few_of_equal_and_of_zero_values() -> None:
    assert trend([], []) is None
    assert trend([0, 1], [1.0, 2.0]) is None
    assert trend([0, 0, 0], [1.0, 2.0, 3.0]) is None
    assert trend(range(10), [5.0] * 10) == statistics.Trend(0.0, 1.0)
    assert trend(range(10), [0.0] * 10) == statistics.Trend(None, 1.0)
    below = trend(range(5), [-5.0, -4.0, -3.0, -2.0, -1.0])
    assert below is not None
    assert below.change_percent == pytest.approx(100 * 4 / 3)
    with pytest.raises(ValueError, match="3 times and 2 values"):
        trend([0, 1, 2], [1.0, 2.0])
