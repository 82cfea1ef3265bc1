"""What an experiment shows on several hosts: one ratio for all, how far hosts differ, and which of them stand out.

It reads the hosts' analyses (``analysis.py``) and decides; it measures nothing and renders nothing. What it returns
follows from them alone, and is plain JSON, which ``pooled.schema.json`` describes. All of it is of primary metrics.

**One ratio.** Hosts are a random effect: those at hand stand for others like them. What is pooled is the logarithm of
each host's ratio to alone, with the standard error of its bootstrap. The variance between hosts is Paule and Mandel's;
the interval is that of Hartung and Knapp, with Student's t of one degree of freedom less than there are hosts, and
never narrower than the weights allow. With Paule and Mandel's variance that is t times 1/sqrt(sum of weights). The
prediction interval is where the ratio of one more host lies, with t of two less than there are hosts (Higgins, Thompson
and Spiegelhalter), so that it takes three hosts. A host that stands out is pooled with the others: to leave it out
would be to choose. How often those of 95 % held the truth, in 2,000 trials each, of 6 values beside an aggressor and 12
alone, of processes whose logarithms spread by 2 % (standard deviation):

========  ======================  ==================  ==================
hosts     spread between hosts    interval            prediction
========  ======================  ==================  ==================
2         none                    100.0 %             none
2         2 %                     100.0 %             none
2         10 %                     98.3 %             none
3         none                    100.0 %             100.0 %
3         2 %                      98.9 %             100.0 %
3         10 %                     94.7 %              98.5 %
5         none                     99.7 %              99.8 %
5         2 %                      96.0 %              90.9 %
5         10 %                     94.7 %              96.0 %
12        none                     96.8 %              97.5 %
12        2 %                      94.0 %              91.2 %
12        10 %                     95.5 %              95.2 %
========  ======================  ==================  ==================

With two hosts the interval is honest and hardly ever of use: t is 12.7. The prediction of a few hosts that differ by
no more than their processes do is held a little less often than it says.

**Hosts that stand out.** From three hosts alone nobody can tell one: with t of one degree of freedom it must be some 30
times as far off as the other two are apart. What is added is that hosts which are meant to be alike spread by some
:data:`SPREAD` (standard deviation of the logarithm), and by half of what processes on a host do: a variance that counts
as much as :data:`WEIGHT` hosts more (Smyth's moderated t). The host that is farthest from the others is tested against
them (Bonferroni over the hosts), then the next of the rest, up to less than half of all, and those up to the last one
beyond chance are named (Rosner's procedure), so that two slow hosts don't hide each other. To be named a host has to be
:data:`LARGE` off as well. Of two hosts nobody can say which one is off. How often any host was named where none was
slowed, and how often the right one where one was slowed by 30 %; 1,500 trials each (375 of 100 hosts), 12 values:

=========  =====  ================  ================  ================
processes  hosts  hosts spread by
---------  -----  ----------------------------------------------------
spread by         2 %               5 %               10 %
=========  =====  ================  ================  ================
2 %        3       0.0 and  99.9 %   0.0 and  85.7 %   3.8 and  61.2 %
2 %        5       0.0 and 100.0 %   0.1 and  94.3 %   8.1 and  56.7 %
2 %        12      0.0 and 100.0 %   0.6 and  99.2 %   5.7 and  55.2 %
2 %        100     0.0 and 100.0 %   2.7 and 100.0 %   3.2 and  42.4 %
5 %        3       0.0 and  96.8 %   0.0 and  77.7 %   2.9 and  50.8 %
5 %        5       0.0 and 100.0 %   0.1 and  89.5 %   4.8 and  53.5 %
5 %        12      0.0 and 100.0 %   0.7 and  98.5 %   4.3 and  48.3 %
5 %        100     0.0 and 100.0 %   0.5 and  99.7 %   1.9 and  35.5 %
=========  =====  ================  ================  ================

Where somebody gets in the way of one process in five (2 % and 2 %), none is named falsely, and the right one of 3, 5
and 12 in 81.5, 89.7 and 92.7 %. These are rates of one figure; a report has one for each victim alone and one for each
condition. Hosts of different processors spread by more than is assumed, and are then named more often: that they differ
is told first.

Sources: R. C. Paule and J. Mandel, "Consensus Values and Weighting Factors", Journal of Research of the National Bureau
of Standards 87 (1982), 377-385. G. Knapp and J. Hartung, "Improved tests for a random effects meta-regression with a
single covariate", Statistics in Medicine 22 (2003), 2693-2710. J. P. T. Higgins, S. G. Thompson and
D. J. Spiegelhalter, "A re-evaluation of random-effects meta-analysis", Journal of the Royal Statistical Society A 172
(2009), 137-159. J. P. T. Higgins and S. G. Thompson, "Quantifying heterogeneity in a meta-analysis", Statistics in
Medicine 21 (2002), 1539-1558. G. K. Smyth, "Linear Models and Empirical Bayes Methods", Statistical Applications in
Genetics and Molecular Biology 3 (2004), article 3. B. Rosner, "Percentage Points for a Generalized ESD Many-Outlier
Procedure", Technometrics 25 (1983), 165-172.
"""

from __future__ import annotations

import math
from collections import Counter

from scipy import special

from ..value import Value
from . import statistics
from .intake import finite
from .results import by_key
from .statistics import CONFIDENCE, FEWEST

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from .results import ConditionKey

__all__ = ["ALPHA", "LARGE", "SCHEMA", "SPREAD", "WEIGHT", "Estimate", "Pooled", "combine", "pool", "standing_out"]

SCHEMA = 1
ALPHA = 0.02  # of one figure; what it comes to is said above
LARGE = 0.05  # of the others' median: what is nearer is not worth a name
SPREAD = 0.05  # of hosts that are meant to be alike
WEIGHT = 4  # hosts that this knowledge counts as
_RESAMPLES = 1999  # of a standard error: an interval needs more
_LEAST_ERROR = 1e-6  # equal values have no spread, and would outweigh everything
_FEWEST_TO_TELL = 3  # hosts
_FARTHEST = 300.0  # of a logarithm, so that two of them can be divided


class Estimate(Value):
    """One host's figure.

    :ivar host: its name
    :ivar value: the logarithm
    :ivar error: the standard error of that
    :ivar spread: of the processes on that host: the median deviation of their logarithms, as a standard deviation
    """

    host: str
    value: float
    error: float
    spread: float


class Pooled(Value):
    """Several hosts' figure as one; all but *i2* are logarithms.

    :ivar value: the hosts' mean, weighted
    :ivar interval: of that
    :ivar tau: standard deviation between hosts
    :ivar i2: the share of the variance that is between hosts, from 0 to 1
    :ivar prediction: where one more host's is; None of fewer than three
    """

    value: float
    interval: tuple[float, float]
    tau: float
    i2: float
    prediction: tuple[float, float] | None


def combine(estimates: Sequence[Estimate], confidence: float = CONFIDENCE) -> Pooled | None:
    """Return the hosts' common value, with the host as a random effect; None of fewer than two."""
    if len(estimates) < 2:
        return None
    values = [one.value for one in estimates]
    variances = [max(one.error, _LEAST_ERROR) ** 2 for one in estimates]
    degrees = len(values) - 1
    tau2 = _paule_mandel(values, variances)
    weights = [1 / (variance + tau2) for variance in variances]
    mean = _mean(values, weights)
    error = math.sqrt(1 / sum(weights))
    reach = _student(confidence, degrees) * error
    prediction = None
    if degrees > 1:
        far = _student(confidence, degrees - 1) * math.hypot(math.sqrt(tau2), error)
        prediction = (mean - far, mean + far)
    fixed = [1 / variance for variance in variances]
    excess = _excess(values, fixed)
    i2 = max(0.0, 1 - degrees / excess) if excess > 0 else 0.0
    return Pooled(mean, (mean - reach, mean + reach), math.sqrt(tau2), i2, prediction)


def _student(confidence: float, degrees: float) -> float:
    return float(special.stdtrit(degrees, (1 + confidence) / 2))


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)


def _excess(values: Sequence[float], weights: Sequence[float]) -> float:
    mean = _mean(values, weights)
    return math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, values, strict=True))


def _paule_mandel(values: Sequence[float], variances: Sequence[float]) -> float:
    # The variance between hosts with which the weighted squares sum up to what is expected of them. They fall with it.
    degrees = len(values) - 1

    def above(tau2: float) -> bool:
        return _excess(values, [1 / (variance + tau2) for variance in variances]) > degrees

    if not above(0.0):
        return 0.0
    low, high = 0.0, 1e-9
    while above(high):
        low, high = high, 4 * high
    for _ in range(100):
        middle = (low + high) / 2
        if above(middle):
            low = middle
        else:
            high = middle
    return (low + high) / 2


def standing_out(estimates: Sequence[Estimate]) -> dict[str, float]:
    """Return the hosts that stand out, the farthest first, each with its p among those that were left; see above."""
    left, found, named = list(estimates), [], 0
    known = sorted(one.spread for one in estimates)
    prior = SPREAD**2 + ((known[len(known) // 2] / 2) ** 2 if known else 0.0)
    for _ in range((len(estimates) - 1) // 2):
        farthest, distance = _farthest(left, prior)
        p = min(1.0, len(left) * 2 * float(special.stdtr(WEIGHT + len(left) - 2, -distance)))
        found.append((left.pop(farthest), p))
        if p < ALPHA:
            named = len(found)
    middle = statistics.median([one.value for one in estimates]) or 0.0
    off = {one.host: p for one, p in found[:named] if abs(_exp(one.value - middle) - 1) >= LARGE}
    return dict(sorted(off.items(), key=lambda one: one[1]))


def _farthest(left: Sequence[Estimate], prior: float) -> tuple[int, float]:
    # Which one is farthest from the others, in standard errors, and how far.
    count = len(left) - 1
    mean = math.fsum(one.value for one in left) / (count + 1)
    squares = math.fsum((one.value - mean) ** 2 for one in left)
    distances = []
    for one in left:
        # What the others' mean and squares are without it.
        off = (one.value - mean) * (count + 1) / count
        rest = max(0.0, squares - (one.value - mean) * off)
        variance = (WEIGHT * prior + rest) / (WEIGHT + count - 1)
        # Its own error is in the others' spread already if it is like theirs; a noisy host is not to be named for that.
        distances.append(abs(off) / math.sqrt(variance * (1 + 1 / count) + one.error**2))
    farthest = max(range(len(left)), key=distances.__getitem__)
    return farthest, distances[farthest]


# -- the document ----------------------------------------------------------------------------------------


def pool(hosts: Mapping[str, Mapping[str, Any]], seed: int = 0) -> dict[str, Any]:
    """Return what the *hosts'* analyses show together; the same for the same, in whatever order they are given.

    :param hosts: each host's analysis by its name
    :param seed: of the bootstrap that the standard errors are from
    """
    return _Document(hosts, seed).document()


class _Document:
    def __init__(self, hosts: Mapping[str, Mapping[str, Any]], seed: int) -> None:
        self.hosts = {name: hosts[name] for name in sorted(hosts)}
        self.seed = seed
        self.conditions = {name: by_key(one) for name, one in self.hosts.items()}
        # In the plan's order, of the first host that has it.
        self.keys = list(dict.fromkeys(key for those in self.conditions.values() for key in those))
        self.warnings: list[str] = []

    def document(self) -> dict[str, Any]:
        alone = [self._alone(key) for key in self.keys if key[2] is None]
        conditions = [self._ratio(key) for key in self.keys if key[2] is not None]
        if len(self.hosts) < _FEWEST_TO_TELL:
            self.warnings.append(
                f"of {len(self.hosts)} {'host' if len(self.hosts) == 1 else 'hosts'}, none can be said to stand out: "
                f"that takes {_FEWEST_TO_TELL}"
            )
        return {
            "schema": SCHEMA,
            "method": {
                "confidence": CONFIDENCE,
                "alpha": ALPHA,
                "seed": self.seed,
                "resamples": _RESAMPLES,
                "large": LARGE,
                "spread": SPREAD,
                "pooling": "logarithms of the ratios to alone, the host as a random effect: variance between hosts "
                "after Paule and Mandel, interval after Hartung and Knapp (Student's t with one degree of freedom "
                "less than hosts), prediction interval after Higgins, Thompson and Spiegelhalter",
                "outliers": "each host against the others: moderated t (a spread between hosts of "
                f"{SPREAD:.0%} and half of that of processes counts as {WEIGHT} hosts more), Bonferroni over the "
                f"hosts, Rosner's procedure; named below p = {ALPHA} and from {LARGE:.0%} on",
            },
            "hosts": list(self.hosts),
            "alone": alone,
            "conditions": conditions,
            "outliers": _by_host([*alone, *conditions]),
            "warnings": self.warnings,
        }

    def _about(self, key: ConditionKey) -> tuple[dict[str, Any], dict[str, Mapping[str, Any]], dict[str, str]]:
        # What is compared, the metric of each host that can be compared, and why the others can't.
        found: dict[str, Mapping[str, Any]] = {}
        why: dict[str, str] = {}
        for name, those in self.conditions.items():
            one = those.get(key)
            metric = _primary(one)
            if one is None:
                why[name] = "not planned there"
            elif metric is None:
                why[name] = "no run of it told its metric" if one.get("done") else "no run of it was made"
            else:
                found[name] = {**metric, "name": one["primary"]}
        kinds = Counter((str(one["name"]), str(one["unit"]), str(one["better"])) for one in found.values())
        shown: dict[str, Any] = dict(
            zip(("metric", "unit", "better"), max(kinds, key=kinds.__getitem__) if kinds else (None,) * 3, strict=True)
        )
        for name in list(found):
            if (found[name]["name"], found[name]["unit"], found[name]["better"]) != tuple(shown.values()):
                why[name] = f"it told {found[name]['name']} in {found[name]['unit']}"
                del found[name]
        names = dict(zip(("victim", "isolation", "aggressor", "placement"), key, strict=True))
        return {**names, **shown}, found, why

    def _alone(self, key: ConditionKey) -> dict[str, Any]:
        about, metrics, why = self._about(key)
        estimates = []
        hosts: dict[str, Any] = {}
        for name in self.hosts:
            metric = metrics.get(name)
            hosts[name] = {
                "n": metric["n"] if metric else 0,
                "median": metric["median"] if metric else None,
                "ci": metric["ci"] if metric else None,
                "why": why.get(name),
            }
            if metric is None:
                continue
            estimate = _estimate(name, [metric["values"]], self.seed)
            if isinstance(estimate, str):
                hosts[name]["why"] = estimate
            else:
                estimates.append(estimate)
        medians = [one["median"] for one in hosts.values() if one["median"] is not None]
        out = []
        for name, p in standing_out(estimates).items():
            share = _beside_others(name, estimates)
            said = f"host {name}: {about['victim']} alone ({about['isolation']}) is {share:.2f} of the others' median"
            out.append({"host": name, "share": share, "p": p, "reason": f"{said}{_judged(share, about['better'])}"})
        return {
            **about,
            "hosts": hosts,
            "n": len(medians),
            "median": statistics.median(medians),
            "most_to_least": _ratio(math.log(max(medians)) - math.log(min(medians)))
            if medians and min(medians) > 0
            else None,
            "outliers": out,
        }

    def _ratio(self, key: ConditionKey) -> dict[str, Any]:
        about, metrics, why = self._about(key)
        estimates = []
        hosts: dict[str, Any] = {}
        for name in self.hosts:
            metric = metrics.get(name)
            ratio = (metric or {}).get("ratio") or {}
            hosts[name] = {
                "n": metric["n"] if metric else 0,
                "ratio": ratio.get("value"),
                "ci": ratio.get("ci"),
                "difference": ratio.get("difference"),
                "why": why.get(name),
            }
            if metric is None:
                continue
            base = self._base(name, key)
            if base is None or ratio.get("value") is None:
                hosts[name]["why"] = "no run alone to compare it with" if base is None else "it has no ratio"
                continue
            estimate = _estimate(name, [metric["values"], base["values"]], self.seed)
            if isinstance(estimate, str):
                hosts[name]["why"] = estimate
            else:
                estimates.append(estimate)
        pooled = combine(estimates)
        out = []
        for name, p in standing_out(estimates).items():
            share = _beside_others(name, estimates)
            mine = _exp(next(one.value for one in estimates if one.host == name))
            words = f"host {name}: {about['victim']} beside {about['aggressor']} at {about['placement']} "
            said = f"{words}({about['isolation']}) is {mine:.2f} of alone, elsewhere {mine / share:.2f}"
            out.append({"host": name, "share": share, "p": p, "reason": f"{said}{_judged(share, about['better'])}"})
        return {
            **about,
            "hosts": hosts,
            "n": len(estimates),
            "pooled": None if pooled is None else _shown(pooled, str(about["better"])),
            "outliers": out,
        }

    def _base(self, name: str, key: ConditionKey) -> Mapping[str, Any] | None:
        those = self.conditions[name]
        one = those[key]
        same = [
            other
            for (victim, isolation, aggressor, _), other in those.items()
            if (victim, isolation, aggressor) == (key[0], key[1], None)
            and other.get("victim_pcpu") == one.get("victim_pcpu")
        ]
        metric = _primary(same[0]) if same else None
        return metric if same and same[0]["primary"] == one["primary"] else None


def _primary(condition: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    metric = ((condition or {}).get("metrics") or {}).get((condition or {}).get("primary"))
    return metric if metric and metric.get("median") is not None else None


def _estimate(host: str, samples: Sequence[Sequence[float]], seed: int) -> Estimate | str:
    # Of a median, or of the ratio of two; or why there is none.
    if min(map(len, samples)) < FEWEST:
        return f"fewer than {FEWEST} runs"
    if any(value <= 0 for values in samples for value in values):
        return "a value is not above 0, so that it has no logarithm"
    logs = [[math.log(value) for value in values] for values in samples]
    medians = [statistics.median(values) or 0.0 for values in logs]
    error = math.hypot(*(statistics.error(values, seed=seed, resamples=_RESAMPLES) for values in logs))
    spread = math.hypot(*(_deviation(values) for values in logs))
    value = medians[0] - medians[1] if len(medians) > 1 else medians[0]
    return Estimate(host, value, error, spread)


def _deviation(values: Sequence[float]) -> float:
    # Of the middle of them: a few processes that somebody got in the way of must not make a slow host look usual. As a
    # standard deviation, which 1.4826 makes of it where the values are normal.
    middle = statistics.median(values) or 0.0
    return 1.4826 * (statistics.median([abs(value - middle) for value in values]) or 0.0)


def _beside_others(host: str, estimates: Sequence[Estimate]) -> float:
    own = next(one.value for one in estimates if one.host == host)
    others = statistics.median([one.value for one in estimates if one.host != host]) or 0.0
    return _exp(own - others)


# What stands out is told, however far it does: a share of 1e130 is as good as one beyond what a float holds.
def _exp(log: float) -> float:
    return math.exp(max(-_FARTHEST, min(_FARTHEST, log)))


def _judged(share: float, better: str | None) -> str:
    good = {"higher": share > 1, "lower": share < 1}.get(str(better))
    return "" if good is None else " (better)" if good else " (worse)"


def _shown(pooled: Pooled, better: str) -> dict[str, Any]:
    low, high = pooled.interval
    difference = "none" if low <= 0 <= high else "better" if (low > 0) is (better == "higher") else "worse"
    return {
        "ratio": _ratio(pooled.value),
        "ci": _bounds(pooled.interval),
        "prediction": None if pooled.prediction is None else _bounds(pooled.prediction),
        "tau": pooled.tau,
        "i2": pooled.i2,
        "difference": difference,
    }


# A ratio beyond what a float holds is not known.
def _ratio(log: float) -> float | None:
    try:
        found = math.exp(log)
    except OverflowError:
        return None
    return found if finite(found) else None


def _bounds(pair: tuple[float, float]) -> list[float] | None:
    low, high = map(_ratio, pair)
    return None if low is None or high is None else [low, high]


def _by_host(figures: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    # Each host that stands out anywhere: the figure in which it does so most, and in how many; the worst first.
    found: dict[str, list[Mapping[str, Any]]] = {}
    for one in figures:
        for out in one["outliers"]:
            found.setdefault(out["host"], []).append({**out, "alone": one["aggressor"] is None})
    listed = [
        {
            "host": host,
            # That a host is slow alone explains more than a ratio does.
            "reason": min(those, key=lambda one: (not one["alone"], -abs(math.log(one["share"]))))["reason"],
            "alone": sum(1 for one in those if one["alone"]),
            "ratios": sum(1 for one in those if not one["alone"]),
        }
        for host, those in found.items()
    ]
    return sorted(listed, key=lambda one: (-one["alone"], -one["ratios"], one["host"]))
