"""The page of several experiments: two hosts, or two dates. What differs of the hosts comes first, then the figures."""

from __future__ import annotations

import os

from ..experiment.results import by_key
from . import facts, figures, finding, hostmap, quantity
from .document import Section, page
from .markup import Html, element, join, table
from .page import alarms, facts_table, told_first

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Any

    from ..experiment.results import ConditionKey, Results

__all__ = ["compare"]

# Victim, its kind of core where the host has several, isolation: what is compared with the same alone runs. Not the
# pCPU: it may have another number on another host.
_Group = tuple[str, str, str]


class _One:
    # One experiment of those compared, by the letter that it has on the page.

    def __init__(self, letter: str, results: Results, analysis: Mapping[str, Any]) -> None:
        self.letter, self.results, self.analysis = letter, results, analysis
        self.session = results.sessions[0] if results.sessions else None
        self.conditions = by_key(analysis)

    @property
    def name(self) -> str:
        return os.path.basename(os.path.abspath(self.results.directory))

    @property
    def design(self) -> list[tuple[str, str]]:
        experiment = self.results.experiment
        design = experiment.get("design") or {}
        names = ("processes", "seconds", "warmup", "isolation")
        return [
            ("design", str(experiment.get("source"))),
            ("seed of the order", str(experiment.get("seed"))),
            *((name, _text(design.get(name))) for name in names),
            *((f"{what[:-1]} {one.get('name')}", _made(one)) for what in ("victims", "aggressors")
              for one in design.get(what) or ()),
        ]  # fmt: skip


def compare(experiments: Sequence[tuple[Results, Mapping[str, Any]]]) -> str:
    """Return the page that puts *experiments*, two or more, side by side, in their order; as HTML."""
    those = [_One(_letter(place), *one) for place, one in enumerate(experiments)]
    plots = _plots(those)
    sections = [
        Section("facts", "What differs", "Differences", *_differences(those)),
        Section("ratios", "What it cost, side by side", "Ratios", *_ratios(those, plots)),
        Section("alone", "The victims alone", "Alone", *_alone(those)),
        Section("maps", "The hosts", "Hosts", element("div", *map(_map, those), class_="pair")),
        Section("same", "Every fact", "Facts", facts_table(_letters(those), [_rows(one.session) for one in those])),
    ]
    title = " and ".join(one.name for one in those) if len({one.name for one in those}) > 1 else those[0].name
    about = [join([element("b", one.letter), f": {one.name} – {facts.short(one.session)}"]) for one in those]
    return page(f"{title} compared", about, _first(those), sections, pictures=any(plot for _, plot, _ in plots))


def _letter(place: int) -> str:
    return chr(ord("A") + place) if place < 26 else f"A{place}"


def _letters(those: Sequence[_One]) -> list[str]:
    return [one.letter for one in those]


def _first(those: Sequence[_One]) -> Html:
    told = [(one, text) for one in those for text in alarms(one.results, one.analysis)]
    if not told:
        return element("p", "Nothing speaks against these figures.", class_="good")
    return element(
        "aside",
        element("h2", "Read this first", id="first-title"),
        told_first([join([element("b", one.letter), f": {text}"]) for one, text in told]),
        class_="warning",
        aria_labelledby="first-title",
    )


def _rows(session: Mapping[str, Any] | None) -> list[tuple[str, str]]:
    return facts.rows(session)


def _differences(those: Sequence[_One]) -> list[Html]:
    columns = [dict(facts.rows(one.session)) for one in those]
    found = [
        (label, [one[label] for one in columns]) for label in columns[0] if len({one[label] for one in columns}) > 1
    ]
    found += _design_differences(those)
    if not found:
        return [element("p", "Nothing: the hosts' facts and the designs are the same.")]
    sides = [[(label, texts[place]) for label, texts in found] for place in range(len(those))]
    same = len(columns[0]) - sum(1 for label, _ in found if label in columns[0])
    return [
        facts_table(_letters(those), sides),
        element("p", f"{quantity.count(same, 'other fact')} of the hosts are the same.", class_="note"),
    ]


def _design_differences(those: Sequence[_One]) -> list[tuple[str, list[str]]]:
    columns = [dict(one.design) for one in those]
    labels = dict.fromkeys(label for one in columns for label in one)
    found = [(label, [one.get(label, "not there") for one in columns]) for label in labels]
    return [(label, texts) for label, texts in found if len(set(texts)) > 1]


def _groups(those: Sequence[_One]) -> dict[_Group, list[ConditionKey]]:
    found: dict[_Group, list[ConditionKey]] = {}
    for one in those:
        for key in one.conditions:
            keys = found.setdefault((key[0], finding.kind(key[3]), key[1]), [])
            if key not in keys:
                keys.append(key)
    return found


def _title(group: _Group) -> str:
    victim, kind, isolation = group
    return f"{victim} ({kind} core), {isolation}" if kind else f"{victim}, {isolation}"


def _plots(those: Sequence[_One]) -> list[tuple[_Group, figures.Plot | None, list[ConditionKey]]]:
    found = []
    for number, (group, keys) in enumerate(_groups(those).items()):
        beside = [key for key in keys if key[2] is not None]
        rows = [
            (
                {"aggressor": key[2], "placement": key[3]},
                [finding.ratio_of(_primary(one.conditions.get(key))) for one in those],
            )
            for key in beside
        ]
        plot = figures.compared(_title(group), rows, _letters(those), f"compared-{number}") if rows else None
        found.append((group, plot, beside))
    return found


def _ratios(
    those: Sequence[_One], plots: Sequence[tuple[_Group, figures.Plot | None, list[ConditionKey]]]
) -> list[Html]:
    parts = [
        element("p", _told(those, [key for _, _, keys in plots for key in keys]), class_="lead"),
        element(
            "p",
            "For each condition, the ratio to the same victim alone on the same host. Intervals that do not overlap "
            "show a difference between the hosts or the dates; those that do prove nothing.",
            class_="note",
        ),
    ]
    for group, plot, keys in plots:
        rows = [_ratio_row(those, key) for key in keys]
        headers = ["condition", *(f"{one.letter}: ratio [interval]" for one in those), "intervals"]
        metric = next((_metric(one.conditions[key]) for key in keys for one in those if key in one.conditions), "")
        parts += [
            element("h3", _title(group)),
            table(headers, rows, caption=f"{finding.metric_words(metric)} as a ratio to alone"),
            plot.html() if plot else element("p", "No ratio is known.", class_="missing"),
        ]
    return parts


def _told(those: Sequence[_One], keys: Sequence[ConditionKey]) -> str:
    every = [_apart([finding.ratio_of(_primary(one.conditions.get(key))) for one in those]) for key in keys]
    known = [word for word in every if word != "–"]
    if not known:
        return "No condition has an interval on more than one side."
    return f"Of {quantity.count(len(known), 'condition')} with intervals to compare, {known.count('apart')} differ."


def _ratio_row(those: Sequence[_One], key: ConditionKey) -> list[object]:
    ratios = [finding.ratio_of(_primary(one.conditions.get(key))) for one in those]
    cells = []
    for one, ratio in zip(those, ratios, strict=True):
        if key not in one.conditions:
            cells.append("not planned")
        elif ratio is None:
            cells.append("no data")
        else:
            cells.append(" ".join(quantity.ratio(ratio["value"], ratio.get("ci"))))
    return [f"{key[2]}, {key[3]}", *cells, _apart(ratios)]


def _apart(ratios: Sequence[Mapping[str, Any] | None]) -> str:
    bounds = [ratio.get("ci") for ratio in ratios if ratio]
    known = [(pair[0], pair[1]) for pair in bounds if pair and pair[0] is not None and pair[1] is not None]
    if len(known) < 2:
        return "–"
    return "apart" if max(low for low, _ in known) > min(high for _, high in known) else "overlap"


def _alone(those: Sequence[_One]) -> list[Html]:
    rows: list[list[object]] = []
    for group, keys in _groups(those).items():
        for key in keys:
            if key[2] is not None:
                continue
            metrics = [_primary(one.conditions.get(key)) for one in those]
            names = [_metric(one.conditions[key]) for one in those if key in one.conditions]
            cells = [
                "no data"
                if metric is None
                else f"{quantity.interval(metric['median'], metric.get('ci'), str(metric['unit']))}, n = {metric['n']}"
                for metric in metrics
            ]
            rows.append([_title(group), finding.metric_words(names[0] if names else None), *cells])
    if not rows:
        return [element("p", "No victim ran alone.", class_="missing")]
    return [table(["victim", "metric", *_letters(those)], rows, caption="Medians with their intervals")]


def _map(one: _One) -> Html:
    given = (one.session or {}).get("facts")
    known = given if isinstance(given, dict) else {}
    drawing = hostmap.draw(
        known.get("topology"), known.get("caches"), one.analysis["conditions"], f"map-{one.letter.lower()}"
    )
    return element("div", element("h3", f"{one.letter}: {one.name}"), drawing)


def _metric(condition: Mapping[str, Any]) -> str | None:
    name = condition.get("primary")
    return None if name is None else str(name)


def _primary(condition: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    return finding.primary(condition) if condition else None


def _text(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else facts.UNKNOWN if value is None else str(value)


def _made(one: Mapping[str, Any]) -> str:
    what = one.get("probe") or " ".join(map(str, one.get("command") or ())) or "?"
    options = " ".join(f"{name}={value}" for name, value in (one.get("options") or {}).items())
    many = f"{one['count']} × " if one.get("count") else ""
    where = " in a VM" if one.get("vm") else " in a guest under QEMU" if one.get("qemu") is not None else ""
    return f"{many}{what}{f' {options}' if options else ''}{where}"
