"""What the runs of an experiment show: medians, intervals, ratios to the alone runs, pooled histograms, warnings.

It reads what was kept and decides; it measures nothing and renders nothing. Everything it returns follows from the
results, the seed and the number of resamples, and is plain JSON, which ``analysis.schema.json`` describes.

A value is of one run, which is one process. A run that failed has none, whatever it got to measure. A run whose
partition did not hold has one like any other: to leave it out after the fact would be to choose the results, so it is
warned of instead.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter, defaultdict

from hdrh.histogram import HdrHistogram

from ..errors import Failed
from ..value import Value
from . import starts, statistics
from .intake import VERDICTS, finite, take
from .results import against, overlaps, replace
from .statistics import ALPHA, CONFIDENCE, FEWEST, RESAMPLES

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from .results import Results

__all__ = ["ANALYSIS", "SCHEMA", "analyse", "keep", "pool"]

ANALYSIS = "analysis.json"
SCHEMA = 1
_PERCENTILES = {"p50": 50.0, "p99": 99.0, "p99_9": 99.9}
_DIGITS = 2  # of HdrHistogram: the layout in which probes count, see workers/probes/histogram.py


class _Metric(Value):
    # One metric's values in one condition, in the order of the runs.
    unit: str
    better: str
    values: tuple[float, ...]
    runs: tuple[int, ...]


class _Comparison(Value):
    # A metric of a condition beside the same one of the alone runs; `shown` is its place in the analysis.
    primary: bool
    values: tuple[float, ...]
    base: tuple[float, ...]
    better: str
    p: float
    above: float
    shown: dict[str, Any]


def analyse(results: Results, *, seed: int = 0, resamples: int = RESAMPLES) -> dict[str, Any]:
    """Return the analysis of *results*.

    Each condition is compared with the alone runs of the same victim, isolation level and pCPU.

    :param seed: of the bootstrap
    :param resamples: of the bootstrap; 199 and more
    :raises ValueError: for fewer, of which no interval of 95 % can be read
    """
    if resamples < 199:
        raise ValueError(f"an interval needs 199 resamples or more, got {resamples}")
    return _Analysis(results, seed, resamples).document()


def keep(analysis: Mapping[str, Any], directory: str) -> str:
    """Write *analysis* to the experiment's directory, whole or not at all, and return the file's path.

    :raises Failed: where it can't be written
    """
    path = os.path.join(directory, ANALYSIS)
    try:
        replace(path, json.dumps(analysis, indent=1, allow_nan=False) + "\n")
    except OSError as error:
        raise Failed(
            f"the analysis cannot be written to {directory}: {error.strerror}", "make room or mend what it says"
        ) from None
    return path


def pool(histograms: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the sum of a record's histograms, all in one unit, with its percentiles.

    A probe's buckets are HdrHistogram's own, so nothing is lost. Another tool's count as their largest value, an open
    one as the largest of all. A percentile is a value that so many do not exceed, as a record has it.
    """
    given = list(histograms)
    parts = [
        (max(0, math.ceil(one["max"] if below is None else below - 1)), count)
        for one in given
        for _, below, count in one["buckets"]
    ]
    most = max((one["max"] for one in given if one["max"] is not None), default=None)
    hdr = HdrHistogram(1, 2 * max([1, *(value for value, _ in parts)]), _DIGITS)
    for value, count in parts:
        hdr.record_value(value, count)
    total = hdr.get_total_count()
    shown = {name: _percentile(hdr, total, percent, most) for name, percent in _PERCENTILES.items()}
    buckets = [
        [hdr.get_lowest_equivalent_value(value), value + 1, item.count_added_in_this_iter_step]
        for item in (hdr.get_recorded_iterator() if total else ())
        for value in [item.value_iterated_to]
    ]
    return {"unit": given[0]["unit"], "count": total, **shown, "max": most, "buckets": buckets}


def _percentile(hdr: HdrHistogram, total: int, percent: float, most: float | None) -> float | None:
    if not total:
        return None
    # It rounds to the nearest rank, a record's percentile to the next one: ask for the rank.
    rank = math.ceil(total * percent / 100)
    value: int = hdr.get_value_at_percentile(100 * rank / total)
    return value if most is None else min(value, most)


class _Analysis:
    def __init__(self, results: Results, seed: int, resamples: int) -> None:
        self.results, self.drawn = results, {"seed": seed, "resamples": resamples}
        plan = results.experiment["plan"]
        self.conditions: dict[str, dict[str, Any]] = {one["id"]: one for one in plan["conditions"]}
        self.planned = Counter(run["condition"] for run in plan["runs"])
        self.runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.conditions}
        self.few: list[str] = []  # conditions with too few runs for an interval
        self.warnings: list[str] = []
        self.comparisons: list[_Comparison] = []
        self.unread = Counter[str]()  # runs whose record can't be read, or not all of it, by condition
        strange = 0
        for run in results.runs:
            name = run.get("condition")
            if not isinstance(name, str) or name not in self.runs:
                strange += 1
                continue
            taken, whole = take(run)
            self.runs[name].append(taken)
            self.unread[name] += not whole
        if strange:
            self.warnings.append(f"{_runs(strange)} of a condition that the plan does not have: left out")
        self.done = {name: [run for run in runs if run["error"] is None] for name, runs in self.runs.items()}

    def document(self) -> dict[str, Any]:
        self._say_what_was_read()
        units, primaries = self._units(), self._primaries()
        metrics = {
            name: {metric: self._metric(name, metric, *about) for metric, about in units[one["victim"]].items()}
            for name, one in self.conditions.items()
        }
        shown = [self._condition(name, primaries, metrics) for name in self.conditions]
        families = self._judge()
        if self.few:
            many = f"{len(self.few)} of {len(shown)} conditions"
            self.warnings.append(f"{many} have figures without an interval, which needs {FEWEST} runs")
        self._say_what_held(shown)
        drift = self._drift(primaries, metrics)
        return {
            "schema": SCHEMA,
            "name": self.results.experiment["name"],
            "method": {
                "confidence": CONFIDENCE,
                "alpha": ALPHA,
                **self.drawn,
                "interval": "of a median: expanded percentiles of its bootstrap; of a ratio of medians: percentiles of "
                "the bootstrap of both; the resampled values are those of whole processes. Fewer than "
                f"{FEWEST} values have no interval; that of {FEWEST} is their range, which holds a median in 93.75 %",
                "test": f"Mann-Whitney U, two-sided, Holm over the {families[0]} comparisons of primary metrics and, "
                f"apart from them, over the {families[1]} of all others",
                "drift": "Kendall's tau and the Theil-Sen line of the alone runs; warned of below "
                f"p = {statistics.DRIFT_ALPHA} and from {statistics.DRIFT_PERCENT:g} % on",
            },
            "conditions": shown,
            "drift": drift,
            "warnings": self.warnings,
            "missing": [one for name in self.conditions for one in self._missing(name)],
        }

    # -- values ------------------------------------------------------------------------------------------

    def _of_victim(self) -> dict[str, list[dict[str, Any]]]:
        found: dict[str, list[dict[str, Any]]] = {one["victim"]: [] for one in self.conditions.values()}
        for name, one in self.conditions.items():
            found[one["victim"]] += self.done[name]
        return found

    def _units(self) -> dict[str, dict[str, tuple[str, str]]]:
        # Each metric's unit and direction, by victim: what most of the victim's runs say, whatever the condition.
        units: dict[str, dict[str, tuple[str, str]]] = {}
        for victim, runs in self._of_victim().items():
            said: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
            for run in runs:
                for metric, one in run["metrics"].items():
                    said[metric][one["unit"], one["better"]] += 1
            units[victim] = {metric: counts.most_common(1)[0][0] for metric, counts in said.items()}
        return units

    def _primaries(self) -> dict[str, str | None]:
        primaries: dict[str, str | None] = {}
        for victim, runs in self._of_victim().items():
            said = Counter(run["primary"] for run in runs if run["primary"] is not None)
            primaries[victim] = said.most_common(1)[0][0] if said else None
            if len(said) > 1:
                self.warnings.append(f"{victim}: its runs name different primary metrics: {', '.join(sorted(said))}")
        return primaries

    def _metric(self, name: str, metric: str, unit: str, better: str) -> _Metric:
        values, runs, lost = [], [], Counter[str]()
        for run in self.done[name]:
            one = run["metrics"].get(metric)
            if one is None:
                lost["do not have it"] += 1
            elif (one["unit"], one["better"]) != (unit, better):
                lost[f"have it in {one['unit']} ({one['better']} is better)"] += 1
            elif one.get("value") is None:
                lost["do not know it"] += 1
            elif not finite(one["value"]):
                lost["have no finite number for it"] += 1
            else:
                values.append(float(one["value"]))
                runs.append(run["run"])
        # What no run of a condition knows is not known there: nothing went wrong.
        if lost and (values or set(lost) - {"do not know it", "do not have it"}):
            why = ", ".join(f"{count} {words}" for words, count in lost.items())
            self.warnings.append(f"{name}: {metric} ({unit}) is of {len(values)} runs only: {why}")
        return _Metric(unit, better, tuple(values), tuple(runs))

    # -- conditions --------------------------------------------------------------------------------------

    def _condition(
        self, name: str, primaries: Mapping[str, str | None], metrics: Mapping[str, Mapping[str, _Metric]]
    ) -> dict[str, Any]:
        about, done = self.conditions[name], self.done[name]
        primary, base = primaries[about["victim"]], self._base(about)
        shown = {}
        for metric, one in metrics[name].items():
            if any(metric in run["metrics"] for run in done):
                under = metrics[base][metric] if base is not None else None
                shown[metric] = self._show(one, under, primary=metric == primary)
        few = [metric for metric, one in shown.items() if 0 < one["n"] < FEWEST]
        if few:
            self.few.append(name)
        verdicts = Counter(run["verdict"] for run in done)
        reasons = Counter(reason for run in done for reason in run["reasons"])
        return {
            **about,
            "overlaps": overlaps(about),
            "planned": self.planned[name],
            "done": len(done),
            "failed": len(self.runs[name]) - len(done),
            "primary": primary,
            "metrics": shown,
            "histograms": self._histograms(name),
            "series": _series(done, metrics[name].get(primary or "")),
            "verdicts": {**{verdict: verdicts[verdict] for verdict in VERDICTS}, "none": verdicts[None]},
            "reasons": [[reason, count] for reason, count in reasons.most_common()],
        }

    def _base(self, about: Mapping[str, Any]) -> str | None:
        # The alone condition that this one is compared with.
        if about["aggressor"] is None:
            return None
        same = [
            name
            for name, one in self.conditions.items()
            if one["aggressor"] is None
            and all(one[key] == about[key] for key in ("victim", "isolation", "victim_pcpu"))
        ]
        if not same or not self.done[same[0]]:
            self.warnings.append(f"{about['id']}: there is no alone run to compare it with")
        return same[0] if same else None

    def _show(self, one: _Metric, under: _Metric | None, *, primary: bool) -> dict[str, Any]:
        interval = statistics.median_interval(one.values, **self.drawn)
        ranks = statistics.rank_test(one.values, under.values) if under is not None else None
        shown: dict[str, Any] = {
            "unit": one.unit,
            "better": one.better,
            "n": len(one.values),
            "values": list(one.values),
            "median": statistics.median(one.values),
            "min": min(one.values, default=None),
            "max": max(one.values, default=None),
            "ci": _listed(interval),
            "ratio": None,
        }
        if under is not None and ranks is not None:
            beside = statistics.median_interval(under.values, **self.drawn)
            shown["ratio"] = {
                "value": statistics.ratio(one.values, under.values),
                "ci": _listed(statistics.ratio_interval(one.values, under.values, **self.drawn)),
                "p": ranks.p,
                "p_holm": None,
                "difference": "none",
                "apart": bool(interval and beside and (interval[0] > beside[1] or interval[1] < beside[0])),
            }
            self.comparisons.append(
                _Comparison(primary, one.values, under.values, one.better, ranks.p, ranks.above, shown["ratio"])
            )
        return shown

    def _judge(self) -> tuple[int, int]:
        # Two families: what the experiment is for, and what was measured along with it.
        counts = []
        for primary in (True, False):
            family = [one for one in self.comparisons if one.primary is primary]
            for one, p in zip(family, statistics.holm([one.p for one in family]), strict=True):
                one.shown["p_holm"] = p
                if p < ALPHA:
                    one.shown["difference"] = _direction(one)
            counts.append(len(family))
        return counts[0], counts[1]

    def _histograms(self, name: str) -> dict[str, Any]:
        found: dict[str, list[dict[str, Any]]] = {}
        for run in self.done[name]:
            for key, one in (run["record"] or {"histograms": {}})["histograms"].items():
                found.setdefault(key, []).append(one)
        shown = {}
        for key, given in found.items():
            [(unit, _)] = Counter(one["unit"] for one in given).most_common(1)
            same = [one for one in given if one["unit"] == unit]
            if len(same) < len(given):
                self.warnings.append(
                    f"{name}: {_runs(len(given) - len(same))} whose {key} is not in {unit}: not pooled"
                )
            shown[key] = pool(same)
        return shown

    # -- warnings ----------------------------------------------------------------------------------------

    def _say_what_was_read(self) -> None:
        if self.results.damaged:
            count = self.results.damaged
            self.warnings.append(
                f"{count} {'line' if count == 1 else 'lines'} of the results could not be read: cut short, or damaged"
            )
        for name, count in self.unread.items():
            if count:
                self.warnings.append(
                    f"{name}: {_runs(count)} whose record is not a probe's, or is damaged: what cannot be read is "
                    "left out"
                )
        with_runs = [run.get("session") for run in self.results.runs]
        kept = [one.get("facts") for one in self.results.sessions if one.get("session") in with_runs]
        facts = [one for one in kept if isinstance(one, dict)]
        self.warnings += [f"the host was not the same at each start: {change}" for change in starts.changes(facts)]
        for victim, runs in self._of_victim().items():
            engines = {run["record"]["engine"] for run in runs if run["record"]}
            if len(engines) > 1:
                self.warnings.append(
                    f"{victim}: its runs do not compare: the engines were {', '.join(sorted(engines))}"
                )

    def _say_what_held(self, shown: Sequence[Mapping[str, Any]]) -> None:
        for one in shown:
            bad = [f"{one['verdicts'][verdict]} {verdict}" for verdict in against(one) if one["verdicts"][verdict]]
            if bad:
                why = f": {one['reasons'][0][0]}" if one["reasons"] else ""
                self.warnings.append(f"{one['id']}: of {_runs(one['done'])}, {' and '.join(bad)}{why}")

    def _drift(
        self, primaries: Mapping[str, str | None], metrics: Mapping[str, Mapping[str, _Metric]]
    ) -> list[dict[str, Any]]:
        found = []
        for name, about in self.conditions.items():
            metric = primaries[about["victim"]]
            if about["aggressor"] is not None or metric is None or metric not in metrics[name]:
                continue
            one = metrics[name][metric]
            trend = statistics.trend(one.runs, one.values)
            if trend is None:
                continue
            warning = None
            if trend.matters and trend.change_percent is not None:
                warning = (
                    f"{name}: {metric} changed by {trend.change_percent:+.1f} % from the first alone run to the last "
                    f"(p = {trend.p:.2g}): something changed on the host meanwhile"
                )
                self.warnings.append(warning)
            found.append(
                {
                    "condition": name,
                    "victim": about["victim"],
                    "isolation": about["isolation"],
                    "metric": metric,
                    "n": len(one.values),
                    "change_percent": trend.change_percent,
                    "p": trend.p,
                    "warning": warning,
                }
            )
        return found

    def _missing(self, name: str) -> list[dict[str, Any]]:
        planned, done = self.planned[name], len(self.done[name])
        if done >= planned:
            return []
        problems = Counter(run["error"]["problem"] for run in self.runs[name] if run["error"] is not None)
        why = [f"{_runs(count)} failed: {problem}" for problem, count in problems.most_common()]
        absent = planned - len(self.runs[name])
        if absent > 0:
            why.append(f"{_runs(absent)} not made")
        return [{"condition": name, "planned": planned, "done": done, "why": why}]


def _direction(one: _Comparison) -> str:
    # As the medians say, which are what is shown; where they are equal, as the ranks do.
    values, base = statistics.median(one.values), statistics.median(one.base)
    more = values > base if values != base and values is not None and base is not None else one.above > 0.5
    return "better" if more is (one.better == "higher") else "worse"


def _series(done: Sequence[Mapping[str, Any]], primary: _Metric | None) -> dict[str, Any]:
    # Of the process that is nearest to the median, the first of several.
    if primary is None or not primary.values:
        return {}
    middle = statistics.median(primary.values) or 0.0
    nearest = min(zip(primary.values, primary.runs, strict=True), key=lambda one: abs(one[0] - middle))[1]
    record = next(run["record"] for run in done if run["run"] == nearest)
    slices = record["slices"] if record else None
    if not slices:
        return {}
    times = [start / 1e9 for start in slices["start_ns"]]
    return {
        name: {"unit": one["unit"], "t_s": times, "values": one["values"]} for name, one in slices["series"].items()
    }


def _listed(interval: tuple[float, float] | None) -> list[float] | None:
    return None if interval is None else list(interval)


def _runs(count: int) -> str:
    return f"{count} run" if count == 1 else f"{count} runs"
