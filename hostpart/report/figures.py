"""The pictures, drawn with plotly from an analysis: each with a sentence that says what it shows, and with a table.

Colours that depend on the reader's theme (text, grids) are left to ``style.css``. Those of the data are chosen here to
be legible on white and on black; a placement has one colour, one dash and one mark on the whole page, so that none of
the three is needed to tell it from another.
"""

from __future__ import annotations

import math
import re
from statistics import median

from ..experiment.intake import finite, take
from ..experiment.results import against
from . import quantity
from .finding import Group, cost, metric_words, primary, ratio_of, ratio_words, short
from .markup import Html, element, inline_json, plain, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

__all__ = [
    "ALONE",
    "COLOURS",
    "HEAT",
    "Plot",
    "Row",
    "Styles",
    "compared",
    "contrast",
    "distributions",
    "drift",
    "heat",
    "hosts",
    "matrix",
    "noise",
    "processes",
]

ALONE = "#727a86"
# Of about the same lightness, so that each has a contrast of 3 to 1 on white and on the dark page; told apart by dash
# and mark too.
COLOURS = ("#d55e00", "#b5649b", "#0a7bc2", "#0a9068", "#a67900", "#8464d8", "#c04a5a", "#4d8c2b")
_DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "triangle-down")
# From much better to much worse; blue and orange stay apart in every kind of colour blindness.
HEAT = ("#2166ac", "#92c5de", "#e9e8e4", "#f4b26f", "#b35806")
_HEAT_END = math.log2(3)  # where the colours end
_FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_PERCENTS = (50.0, 90.0, 99.0, 99.9, 99.99, 99.999, 99.9999, 99.99999)
_POINTS = 800  # of a series that is drawn; one that is longer is drawn by the least and the most of each part
_SHORT, _COLUMN, _LEGEND = 20, 12, 32  # characters of a name beside an axis, above a column, and in a legend


class Plot:
    """One picture.

    :ivar name: its element's id
    :ivar sentence: what it shows, for those who do not see it
    :ivar figure: plotly's, as JSON
    :ivar values: the table of what it shows; None: one stands beside it
    :ivar height: in CSS pixels
    :ivar least: the width below which it is scrolled and not made smaller, in CSS pixels
    :ivar most: the width that it has at most
    """

    def __init__(
        self,
        name: str,
        sentence: str,
        figure: Mapping[str, Any],
        values: Html | None,
        *,
        height: int,
        least: int = 0,
        most: int = 0,
        kind: str = "",
    ) -> None:
        self.name, self.sentence, self.figure, self.values = name, sentence, figure, values
        self.height, self.least, self.most, self.kind = height, least, most, kind

    def html(self, caption: object = None) -> Html:
        """Return the figure with its caption, its data and its table."""
        size = f"height:{self.height}px" + (f";min-width:{self.least}px" if self.least else "")
        picture = element(
            "div",
            class_=f"plot {self.kind}".strip(),
            id=self.name,
            role="img",
            aria_label=self.sentence,
            style=size,
        )
        return element(
            "figure",
            element(
                "div",
                element("figcaption", caption) if caption else None,
                element("div", picture, class_="scroll", role="group", aria_label="picture"),
                class_="picture",
            ),
            element("script", inline_json(self.figure), type="application/json", data_plot=self.name),
            element("details", element("summary", "These values as a table"), self.values) if self.values else None,
            style=f"max-width:{self.most}px" if self.most else None,
        )


class Styles:
    """Which colour, dash and mark a placement has; the same on the whole page, whatever the victim's kind of core.

    :param placements: in the plan's order
    """

    def __init__(self, placements: Sequence[str]) -> None:
        self._places = {name: place for place, name in enumerate(dict.fromkeys(map(short, placements)))}

    def colour(self, placement: str) -> str:
        """Return the colour of *placement*."""
        place = self._places.get(short(placement))
        return ALONE if place is None else COLOURS[place % len(COLOURS)]

    def line(self, placement: str) -> dict[str, Any]:
        """Return plotly's line."""
        place = self._places.get(short(placement))
        if place is None:
            return {"color": ALONE, "dash": "solid", "width": 3}
        return {"color": self.colour(placement), "dash": _DASHES[(place + 1) % len(_DASHES)], "width": 2}

    def symbol(self, placement: str) -> str:
        """Return plotly's mark."""
        place = self._places.get(short(placement))
        return _SYMBOLS[0 if place is None else (place + 1) % len(_SYMBOLS)]


def matrix(group: Group, name: str, over: str = "") -> Plot | None:
    """Return the ratios of a group as a heat map: a row per placement, a column per aggressor; None: none is known.

    In the colours, worse is orange whether the metric is to be high or low.

    :param over: what the ratios are of, where that is more than one host: ``of 3 hosts together``
    """
    placements, aggressors = group.placements, group.aggressors
    costs: list[list[float | None]] = []
    hovers: list[list[str]] = []
    notes: list[dict[str, Any]] = []
    known = 0
    for placement in placements:
        line: list[float | None] = []
        hover_line: list[str] = []
        for aggressor in aggressors:
            one = group.one(aggressor, placement)
            size = cost(primary(one)) if one else None
            known += size is not None
            line.append(None if size is None else max(-_HEAT_END, min(_HEAT_END, size)))
            text, lines = _cell(one)
            notes.append(_note(len(hover_line), len(costs), lines, size))
            hover_line.append(text)
        costs.append(line)
        hovers.append(hover_line)
    if not known:
        return None
    rows = [
        [placement, *(_cell_words(group.one(aggressor, placement)) for aggressor in aggressors)]
        for placement in placements
    ]
    trace = {
        "type": "heatmap",
        "x": list(range(len(aggressors))),
        "y": list(range(len(placements))),
        "z": costs,
        "zmin": -_HEAT_END,
        "zmax": _HEAT_END,
        "colorscale": [[place / (len(HEAT) - 1), colour] for place, colour in enumerate(HEAT)],
        "showscale": False,
        "hoverinfo": "text",
        "hovertext": hovers,
        "hoverongaps": True,
        "xgap": 3,
        "ygap": 3,
    }
    axis = {"showgrid": False, "zeroline": False, "ticks": "", "ticklabelstandoff": 6}
    labels = [_broken(placement) for placement in placements]
    left = 20 + 7 * max(len(line) for lines in labels for line in lines)
    layout = {
        "xaxis": {
            **axis,
            **_names([_lines(aggressor) for aggressor in aggressors], safe=True),
            "side": "top",
            "tickangle": 0,
            "ticklabeloverflow": "allow",
            "range": [-0.5, len(aggressors) - 0.5],
        },
        "yaxis": {
            **axis,
            **_names(["<br>".join(map(_safe, lines)) for lines in labels], safe=True),
            "range": [len(placements) - 0.5, -0.5],
        },
        "annotations": notes,
        "margin": {"l": left, "r": 6, "t": 44, "b": 6},
    }
    best, worst = _extremes(group)
    sentence = (
        f"Heat map of the {metric_words(group.metric)} of {group.name} beside each aggressor at each placement, as a "
        f"ratio to what it is alone, at isolation {group.isolation}{f', {over}' if over else ''}. "
        f"The worst is {worst}, the best {best}."
    )
    words = f"{group.name}, {group.isolation}: {metric_words(group.metric)} as a ratio to alone"
    values = table(["placement", *aggressors], rows, caption=words)
    return Plot(
        name,
        sentence,
        _figure([trace], layout),
        values,
        height=50 + 66 * len(placements),
        least=left + 86 * len(aggressors),
        most=max(300, left + 190 * len(aggressors)),
        kind="own-colours",
    )


def _extremes(group: Group) -> tuple[str, str]:
    known = [(size, one) for one in group.conditions if (size := cost(primary(one))) is not None]
    known.sort(key=lambda one: one[0])
    told = []
    for _, one in (known[0], known[-1]):
        value, bounds = ratio_words(one)
        told.append(f"{value} {bounds} beside {one['aggressor']} at {one['placement']}")
    return told[0], told[1]


# What hovering says, and the lines in the cell.
def _cell(one: Mapping[str, Any] | None) -> tuple[str, list[str]]:
    if one is None:
        return "not planned", []
    head = f"<b>{_safe(one['aggressor'])}, {_safe(one['placement'])}</b>"
    metric = primary(one)
    if metric is None:
        return f"{head}<br>no run told it", ["no data"]
    absolute = metric.get("told") or (
        f"{quantity.interval(metric['median'], metric.get('ci'), metric['unit'])}, n = {metric['n']}"
    )
    ratio = ratio_of(metric)
    if ratio is None:
        return f"{head}<br>{_safe(absolute)}<br>no run alone to compare with", ["no ratio"]
    value, bounds = quantity.ratio(ratio["value"], ratio.get("ci"))
    difference = _difference(ratio)
    unheld = _unheld(one)
    hover = [head, f"ratio {value} {bounds}: {difference}", _safe(absolute)]
    hover += [_verdict_words(one)] if unheld else []
    return "<br>".join(hover), [f"<b>{value}</b>{' †' if unheld else ''}", bounds, difference]


def _cell_words(one: Mapping[str, Any] | None) -> str:
    return re.sub("<[^>]*>", "", " ".join(_cell(one)[1])) or "not planned"


def _difference(ratio: Mapping[str, Any]) -> str:
    return {"worse": "worse", "better": "better", "none": "no difference"}.get(str(ratio.get("difference")), "")


def _unheld(one: Mapping[str, Any]) -> int:
    verdicts = one.get("verdicts") or {}
    return sum(int(verdicts.get(name) or 0) for name in against(one))


def _verdict_words(one: Mapping[str, Any]) -> str:
    verdicts = one.get("verdicts") or {}
    return ", ".join(f"{many} {name}" for name, many in verdicts.items() if many)


def _note(column: int, row: int, lines: Sequence[str], size: float | None) -> dict[str, Any]:
    colour = heat(size)
    ink = "#000000" if contrast(colour, "#000000") >= contrast(colour, "#ffffff") else "#ffffff"
    first, *rest = lines or [""]
    small = "".join(f"<br><span style='font-size:11px'>{line}</span>" for line in rest)
    return {
        "x": column,
        "y": row,
        "text": first + small,
        "showarrow": False,
        # On a cell without a value there is the page, whose colours are the style sheet's.
        "font": {"size": 15, "color": ALONE if size is None else ink},
    }


def heat(size: float | None) -> str:
    """Return the colour of a cost (:func:`finding.cost`); None has none, and is given as white."""
    if size is None:
        return "#ffffff"
    place = (max(-_HEAT_END, min(_HEAT_END, size)) / _HEAT_END + 1) / 2 * (len(HEAT) - 1)
    below = min(int(place), len(HEAT) - 2)
    low, high = (_channels(HEAT[below + step]) for step in (0, 1))
    mixed = [round(a + (b - a) * (place - below)) for a, b in zip(low, high, strict=True)]
    return "#" + "".join(f"{channel:02x}" for channel in mixed)


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours such as ``#2166ac``, from 1 to 21.

    Source: Web Content Accessibility Guidelines 2.2, "contrast ratio".
    """
    bright, dark = sorted((_luminance(one), _luminance(other)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (channel / 255 for channel in _channels(colour))
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def processes(group: Group, styles: Styles, name: str) -> tuple[str, Plot] | None:
    """Return every process of a group as a dot, with median and interval: words for it, and the picture.

    None where no run told the primary metric.
    """
    shown = [(one, metric) for one in group.every if (metric := primary(one)) and metric.get("values")]
    if not shown:
        return None
    unit = str(shown[0][1]["unit"])
    every = [value for _, metric in shown for value in metric["values"]]
    scale = quantity.scale(every, unit)
    dots: dict[str, list[Any]] = {"x": [], "y": [], "text": [], "color": []}
    medians: dict[str, list[Any]] = {"x": [], "y": [], "text": [], "color": [], "symbol": [], "more": [], "less": []}
    rows = []
    for row, (one, metric) in enumerate(shown):
        placement, colour = str(one["placement"]), styles.colour(str(one["placement"]))
        label = _label(one)
        for place, value in enumerate(metric["values"]):
            dots["x"].append(value * scale.factor)
            # Side by side, so that equal ones are seen.
            dots["y"].append(row + 0.24 + 0.07 * (place % 3 - 1))
            dots["text"].append(f"{_safe(label)}, one process<br>{_span(value, unit)}")
            dots["color"].append(colour)
        low, high = metric.get("ci") or (None, None)
        middle = metric["median"]
        told = _safe(quantity.interval(middle, metric.get("ci"), unit))
        medians["x"].append(middle * scale.factor)
        medians["y"].append(row - 0.12)
        medians["more"].append(0 if high is None else (high - middle) * scale.factor)
        medians["less"].append(0 if low is None else (middle - low) * scale.factor)
        medians["text"].append(f"<b>{_safe(label)}</b><br>median {told}, n = {metric['n']}")
        medians["color"].append(colour)
        medians["symbol"].append(styles.symbol(placement))
        rows.append(_values_row(label, one))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "x": dots["x"],
            "y": dots["y"],
            "marker": {"size": 5, "opacity": 0.55, "color": dots["color"]},
            "hoverinfo": "text",
            "hovertext": dots["text"],
        },
        {
            "type": "scatter",
            "mode": "markers",
            "x": medians["x"],
            "y": medians["y"],
            "error_x": {
                "type": "data",
                "symmetric": False,
                "array": medians["more"],
                "arrayminus": medians["less"],
                "color": ALONE,
                "thickness": 2,
                "width": 5,
            },
            "marker": {"size": 10, "color": medians["color"], "symbol": medians["symbol"]},
            "hoverinfo": "text",
            "hovertext": medians["text"],
        },
    ]
    far = min(every) > 0 and max(every) / min(every) > 20
    words = metric_words(group.metric)
    better = {"higher": "higher is better", "lower": "lower is better"}.get(str(shown[0][1].get("better")), "")
    layout = {
        "xaxis": {"type": "log", "dtick": 1} if far else {},
        "yaxis": {
            **_names([_beside_axis(one) for one, _ in shown], safe=True),
            "range": [len(shown) - 0.5, -0.5],
            "zeroline": False,
            "showgrid": False,
        },
        "shapes": _alone_lines(shown, scale),
        "margin": {"l": _left([one for one, _ in shown]), "r": 10, "t": 8, "b": 26},
    }
    sentence = (
        f"{words.capitalize()} of each process of {group.name} at isolation {group.isolation}: a dot a process, "
        f"with the median and its interval, for {quantity.count(len(shown), 'condition')}; {better}."
    )
    values = table(_VALUE_HEADERS, rows, caption=f"{group.name}, {group.isolation}: {words}")
    high = 42 + _more([one for one, _ in shown])
    plot = Plot(name, sentence, _figure(traces, layout), values, height=38 + high * len(shown))
    return f"{words}{_in(scale)}; {better}", plot


# The median alone, for the eye to compare with.
def _alone_lines(shown: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], scale: quantity.Scale) -> list[Any]:
    found = []
    for one, metric in shown:
        if one.get("aggressor") is None:
            x = metric["median"] * scale.factor
            line = {"color": ALONE, "width": 1, "dash": "dot"}
            found.append({"type": "line", "x0": x, "x1": x, "y0": 0, "y1": 1, "yref": "paper", "line": line})
    return found if len(found) == 1 else []


def distributions(group: Group, styles: Styles, name: str) -> list[tuple[str, Plot]]:
    """Return the histograms of a group, a picture for each histogram and aggressor: words for it, and the picture."""
    found: list[tuple[str, Plot]] = []
    names = dict.fromkeys(histogram for one in group.every for histogram in one.get("histograms") or ())
    for histogram in names:
        for aggressor in _beside(group):
            shown = [
                (one, one["histograms"][histogram])
                for one in group.every
                if one.get("aggressor") in (None, aggressor)
                and histogram in (one.get("histograms") or ())
                and one["histograms"][histogram].get("count")
            ]
            if shown:
                words = metric_words(histogram)
                beside = f"{words} beside {aggressor}" if aggressor else f"{words} alone"
                plot = _distribution(group, styles, shown, beside, f"{name}-{len(found)}")
                found.append((beside, plot))
    return found


def _distribution(
    group: Group,
    styles: Styles,
    shown: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    words: str,
    name: str,
) -> Plot:
    unit = str(shown[0][1]["unit"])
    traces: list[dict[str, Any]] = []
    rows: list[list[str]] = []
    tops: list[float] = []
    bottoms: list[float] = []
    furthest = 2.0
    for one, histogram in shown:
        placement = str(one["placement"])
        points = _quantiles(histogram)
        # A scale of logarithms has no 0.
        values = [max(value, 0.5) for _, value in points]
        tops.append(values[-1])
        bottoms.append(values[0])
        furthest = max(furthest, points[-1][0])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": _safe(_legend(placement)),
                "x": [x for x, _ in points],
                "y": values,
                "line": {**styles.line(placement), "shape": "hv"},
                "text": [f"{_percent_at(x)} take at most {_span(value, unit)}" for x, value in points],
                "hovertemplate": f"<b>{_template(placement)}</b><br>%{{text}}<extra></extra>",
            }
        )
        told = [histogram.get(key) for key in ("p50", "p99", "p99_9", "max")]
        rows.append(
            [
                _label(one),
                f"{histogram['count']:,}",
                *("–" if value is None else quantity.span(value, unit) for value in told),
            ]
        )
    ticks = [percent for percent in _PERCENTS if 1 / (1 - percent / 100) <= furthest * 1.01]
    decades = range(math.floor(math.log10(min(bottoms))), math.ceil(math.log10(max(tops))) + 1)
    layout = {
        "xaxis": {
            "type": "log",
            "title": {"text": "percentile, %"},
            "tickangle": 0,
            "tickvals": [1 / (1 - percent / 100) for percent in ticks],
            "ticktext": [f"{percent:.7g}" for percent in ticks],
            "range": [0, math.log10(furthest) * 1.02],
        },
        "yaxis": {
            "type": "log",
            "tickvals": [10.0**power for power in decades],
            "ticktext": [_span(10.0**power, unit) for power in decades],
        },
        "showlegend": True,
        "legend": {
            "orientation": "h",
            "y": 1.02,
            "yanchor": "bottom",
            "x": 0,
            "xanchor": "left",
            "font": {"size": 11},
            # As wide as the longest name and no wider: two columns on a phone.
            "entrywidth": 6 * max(len(_legend(str(one["placement"]))) for one, _ in shown),
        },
        "margin": {"l": 62, "r": 14, "t": 10, "b": 46},  # the legend makes its own room
    }
    worst = max(shown, key=lambda one: one[1].get("p99") or 0)
    sentence = (
        f"Distribution of {words}, {group.name} at isolation {group.isolation}: a line for each of "
        f"{quantity.count(len(shown), 'placement')}, by percentile up to the longest."
    )
    if worst[1].get("p99") is not None:
        sentence += f" The highest 99th percentile is {quantity.span(worst[1]['p99'], unit)}, {_label(worst[0])}."
    return Plot(
        name,
        sentence,
        _figure(traces, layout),
        table(["condition", "count", "p50", "p99", "p99.9", "longest"], rows, caption=f"{group.name}: {words}"),
        height=400,
        most=760,
    )


# What the alone runs are shown with: each aggressor in its turn; or nothing, where there is none.
def _beside(group: Group) -> list[str | None]:
    return [*group.aggressors] or [None]


# For the buckets in order: 1 / (the share that is longer), and the value that the others do not exceed. The last is the
# longest one. Few points are needed where the axis has few percent: a twentieth of a decade is enough.
def _quantiles(histogram: Mapping[str, Any]) -> list[tuple[float, float]]:
    total, most = histogram["count"], histogram.get("max")
    points: list[tuple[float, float]] = []
    seen = 0
    for first, below, count in histogram.get("buckets") or ():
        if not points:
            points.append((1.0, first))
        seen += count
        longest = max(first, below - 1)
        value = longest if most is None else min(longest, most)
        # All but the last: as far as one in as many as there are can be told.
        x = total / max(total - seen, 1)
        if len(points) > 1 and x < points[-1][0] * 1.05 and value < points[-1][1] * 1.05:
            continue
        points.append((x, value))
    end = most if most is not None else points[-1][1] if points else 0
    return [*points, (float(max(total, 1)), end)] if points else [(1.0, end), (float(max(total, 1)), end)]


def _percent_at(x: float) -> str:
    share = 100 * (1 - 1 / x)
    decimals = max(0, math.ceil(math.log10(max(x, 1.0)) - 1))
    return f"{share:.{decimals}f} %"


def noise(group: Group, styles: Styles, name: str) -> list[tuple[str, Plot]]:
    """Return the time series of a group, a picture for each series and aggressor: words for it, and the picture.

    Each condition has a strip of its own; all have the same scale.
    """
    found: list[tuple[str, Plot]] = []
    names = dict.fromkeys(series for one in group.every for series in one.get("series") or ())
    for series in names:
        for aggressor in _beside(group):
            shown = [
                (one, one["series"][series])
                for one in group.every
                if one.get("aggressor") in (None, aggressor)
                and series in (one.get("series") or ())
                and any(value is not None for value in one["series"][series]["values"])
            ]
            if shown:
                words = metric_words(series)
                beside = f"{words} beside {aggressor}" if aggressor else f"{words} alone"
                found.append(_strips(group, styles, shown, beside, f"{name}-{len(found)}"))
    return found


def _strips(
    group: Group,
    styles: Styles,
    shown: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]],
    beside: str,
    name: str,
) -> tuple[str, Plot]:
    unit = str(shown[0][1]["unit"])
    every = [value for _, series in shown for value in series["values"] if value is not None]
    scale = quantity.scale(every, unit)
    least, most = min(every) * scale.factor, max(every) * scale.factor
    least = 0.0 if 0 <= least < most / 2 else least
    room = (most - least) * 0.06 or abs(most) * 0.1 or 1
    layout: dict[str, Any] = {
        "margin": {"l": 52, "r": 10, "t": 24, "b": 44},
        "annotations": [],
        "xaxis": {
            "title": {"text": "time, s"},
            "zeroline": False,
            "anchor": f"y{len(shown)}" if len(shown) > 1 else "y",
        },
    }
    traces, rows = [], []
    # Strips of one height, with room above each for its name.
    strip = 1 / (len(shown) + 0.4 * (len(shown) - 1))
    for row, (one, series) in enumerate(shown):
        placement = str(one["placement"])
        top = 1 - 1.4 * row * strip
        axis = "y" if row == 0 else f"y{row + 1}"
        layout[axis.replace("y", "yaxis")] = {
            "domain": [max(0.0, top - strip), top],
            "range": [least - room, most + room],
            "nticks": 3,
            "zeroline": False,
        }
        layout["annotations"].append(
            {
                "x": 0,
                "y": top,
                "xref": "paper",
                "yref": "paper",
                "xanchor": "left",
                "yanchor": "bottom",
                "showarrow": False,
                "text": _safe(short(placement)),
                "font": {"size": 12},
            }
        )
        times, drawn = _thinned(series["t_s"], series["values"])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines+markers" if len(drawn) <= 60 else "lines",
                "x": [_digits(time) for time in times],
                "y": [None if value is None else _digits(value * scale.factor) for value in drawn],
                "yaxis": axis,
                "line": {**styles.line(placement), "dash": "solid", "width": 1.5},
                "marker": {"size": 4, "symbol": styles.symbol(placement)},
                "hovertemplate": f"<b>{_template(placement)}</b>, at %{{x:.4g}} s<br>%{{y:.4g}}"
                f"{_template(scale.suffix)}<extra></extra>",
            }
        )
        known = sorted(value for value in series["values"] if value is not None)
        told = (known[0], known[len(known) // 2], known[-1])
        rows.append([_label(one), str(len(known)), *(quantity.span(value, unit) for value in told)])
    sentence = (
        f"Time series of {beside}, {group.name} at isolation {group.isolation}: one typical process of each of "
        f"{quantity.count(len(shown), 'condition')}, between {quantity.span(min(every), unit)} and "
        f"{quantity.span(max(every), unit)}."
    )
    values = table(["condition", "slices", "least", "median", "most"], rows, caption=f"{group.name}: {beside}")
    plot = Plot(name, sentence, _figure(traces, layout), values, height=70 + 84 * len(shown))
    return f"{beside}{_in(scale)}", plot


# A series of at most _POINTS values: the least and the most of each part, at their times, so that no spike is lost.
def _thinned(times: Sequence[float], values: Sequence[float | None]) -> tuple[list[float], list[float | None]]:
    if len(values) <= _POINTS:
        return list(times), list(values)
    width = -(-len(values) // (_POINTS // 2))
    kept: list[int] = []
    for start in range(0, len(values), width):
        part = [
            (value, start + place) for place, value in enumerate(values[start : start + width]) if value is not None
        ]
        kept += sorted({min(part)[1], max(part)[1]}) if part else [start]
    return [times[place] for place in kept], [values[place] for place in kept]


def drift(group: Group, runs: Sequence[Mapping[str, Any]], name: str) -> tuple[str, Plot] | None:
    """Return a group's runs alone in the order in which they were made: words for it, and the picture.

    None where there are fewer than two.

    :param runs: of the experiment, in order of the schedule
    """
    metric, alone = group.metric, {str(one["id"]) for one in group.alones}
    taken = [take(run)[0] for run in runs if str(run.get("condition")) in alone]
    found = [
        (run, told)
        for run in taken
        if not run["error"] and (told := run["metrics"].get(metric)) and finite(told.get("value"))
    ]
    if len(found) < 2:
        return None
    unit = str(found[0][1]["unit"])
    values = [float(told["value"]) for _, told in found]
    scale = quantity.scale(values, unit)
    words = metric_words(metric)
    trace = {
        "type": "scatter",
        "mode": "markers",
        "x": [run["run"] for run, _ in found],
        "y": [value * scale.factor for value in values],
        "marker": {"size": 6, "color": COLOURS[2], "opacity": 0.8},
        "hoverinfo": "text",
        "hovertext": [
            f"run {run['run']}, {_safe(run.get('started'))}<br>{_span(value, unit)}"
            for (run, _), value in zip(found, values, strict=True)
        ],
    }
    layout = {
        "xaxis": {"title": {"text": "number of the run in the schedule"}, "zeroline": False},
        "yaxis": {"zeroline": False},
        "margin": {"l": 64, "r": 10, "t": 8, "b": 46},
    }
    ends = (quantity.span(min(values), unit), quantity.span(max(values), unit))
    sentence = (
        f"{words.capitalize()} of {group.name} alone at isolation {group.isolation} in {len(found)} runs, in the "
        f"order in which they were made: between {ends[0]} and {ends[1]}."
    )
    # By the block: a line for each run would be the longest table of the page, and tell no more.
    blocks: dict[str, list[float]] = {}
    for (run, _), value in zip(found, values, strict=True):
        blocks.setdefault(str(run.get("block")), []).append(value)
    rows = [
        [block, str(len(those)), *(quantity.span(one, unit) for one in (min(those), median(those), max(those)))]
        for block, those in blocks.items()
    ]
    table_of = table(["block", "runs", "least", "median", "most"], rows, caption=f"{group.name} alone: {words}")
    return f"{words}{_in(scale)}", Plot(name, sentence, _figure([trace], layout), table_of, height=230)


def compared(
    title: str,
    rows: Sequence[tuple[Mapping[str, Any], Sequence[Mapping[str, Any] | None]]],
    letters: Sequence[str],
    name: str,
) -> Plot | None:
    """Return the ratios of several experiments side by side; None where none of them has any.

    :param title: of what
    :param rows: each condition, and its ratio in each experiment
    :param letters: the experiments' names
    """
    traces: list[dict[str, Any]] = []
    extremes: list[float] = []
    for place, letter in enumerate(letters):
        points = [(row, _label(one), ratios[place]) for row, (one, ratios) in enumerate(rows)]
        known = [(row, label, ratio) for row, label, ratio in points if ratio]
        if not known:
            continue
        offset = (place - (len(letters) - 1) / 2) * 0.6 / max(len(letters), 1)
        ends = [_ends(ratio) for _, _, ratio in known]
        extremes += [end for pair in ends for end in pair]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _safe(letter),
                "x": [ratio["value"] for _, _, ratio in known],
                "y": [row + offset for row, _, _ in known],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [high - ratio["value"] for (_, _, ratio), (_, high) in zip(known, ends, strict=True)],
                    "arrayminus": [ratio["value"] - low for (_, _, ratio), (low, _) in zip(known, ends, strict=True)],
                    "color": COLOURS[(2, 0, 3, 5)[place % 4]],
                    "thickness": 2,
                    "width": 4,
                },
                "marker": {
                    "size": 9,
                    "color": COLOURS[(2, 0, 3, 5)[place % 4]],
                    "symbol": _SYMBOLS[place % len(_SYMBOLS)],
                },
                "hoverinfo": "text",
                "hovertext": [
                    f"<b>{_safe(letter)}</b>: {_safe(label)}<br>ratio {_both(ratio)}" for _, label, ratio in known
                ],
            }
        )
    if not traces:
        return None
    far = min(extremes) > 0 and max(extremes) / min(extremes) > 4
    line = {"color": ALONE, "width": 1, "dash": "dot"}
    layout = {
        "xaxis": {
            "title": {"text": "ratio to alone"},
            "zeroline": False,
            **({"type": "log", "dtick": "D2"} if far else {}),
        },
        "yaxis": {
            **_names([_beside_axis(one) for one, _ in rows], safe=True),
            "range": [len(rows) - 0.5, -0.5],
            "zeroline": False,
            "showgrid": False,
        },
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line}],
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "margin": {"l": _left([one for one, _ in rows]), "r": 10, "t": 34, "b": 46},
    }
    sentence = (
        f"{title}: the ratio to alone with its interval for {quantity.count(len(rows), 'condition')}, in each of "
        f"{', '.join(letters)}."
    )
    high = 46 + _more([one for one, _ in rows])
    return Plot(name, sentence, _figure(traces, layout), None, height=90 + high * len(rows))


class Row:
    """A figure that hosts have, in a picture of how they lie to each other.

    :ivar label: the lines beside the axis
    :ivar points: each host's name, value and interval, in the hosts' order
    :ivar out: the hosts that stand out
    :ivar pooled: all hosts as one: ``ratio``, ``ci``, ``prediction`` of ``pooled.schema.json``; None: not pooled
    """

    def __init__(
        self,
        label: Sequence[str],
        points: Sequence[tuple[str, float, Sequence[float] | None]],
        out: Iterable[str],
        pooled: Mapping[str, Any] | None = None,
    ) -> None:
        self.label, self.points, self.out, self.pooled = label, points, frozenset(out), pooled


def hosts(title: str, axis: str, rows: Sequence[Row], name: str) -> Plot | None:
    """Return how hosts lie to each other, a row per figure and a mark per host; None where no figure is known.

    Some hosts have a colour and a mark each, and their intervals; many are alike, but for those that stand out.

    :param axis: what the values are, as words
    """
    every = list(dict.fromkeys(host for row in rows for host, _, _ in row.points))
    if not every:
        return None
    few = len(every) <= _FEW
    pooled = any(row.pooled and row.pooled.get("ratio") is not None for row in rows)
    traces = _each_host(rows, every) if few else _many_hosts(rows)
    ends = [end for trace in traces for end in trace.pop("ends")]
    if pooled:
        drawn = _pooled_marks(rows, len(every))
        ends += [end for trace in drawn for end in trace.pop("ends")]
        traces += drawn
    traces += _out_marks(rows, every, few=few)
    left = 14 + 7 * max(len(_shortened(line)) for row in rows for line in row.label)
    low, high = min([*ends, 1.0]), max([*ends, 1.0])
    far = low > 0 and high / low > 4
    # What is close together is shown close together: a picture of nothing but noise would look like a difference. A
    # prediction may be a hundred times as wide as all else: it is cut, and the rest not made small.
    room = max((high - low) * 0.12, 0.02)
    wide = [end for row in rows for end in (row.pooled or {}).get("prediction") or ()]
    low, high = (max(min([low, *wide]), low - 4 * room), min(max([high, *wide]), high + 4 * room))
    span = {"range": [low - room, high + room]} if not far else {"type": "log", "dtick": "D2"}
    line = {"color": ALONE, "width": 1, "dash": "dot"}
    layout = {
        "xaxis": {"title": {"text": axis}, "zeroline": False, "nticks": 6, **span},
        "yaxis": {
            **_names(["<br>".join(_safe(_shortened(line)) for line in row.label) for row in rows], safe=True),
            "range": [len(rows) - 0.5, -0.5],
            "zeroline": False,
            "showgrid": False,
        },
        "shapes": [{"type": "line", "x0": 1, "x1": 1, "y0": 0, "y1": 1, "yref": "paper", "line": line}],
        "showlegend": True,
        "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0, "xanchor": "left"},
        "margin": {"l": left, "r": 12, "t": 40 + 20 * (len(every) // 3 if few else 1), "b": 46},
    }
    outside = sorted({host for row in rows for host in row.out})
    told = f" These stand out: {', '.join(outside)}." if outside else " None stands out."
    sentence = f"{title}: {axis}, of {quantity.count(len(every), 'host')}.{told}"
    each = 46 + (7 * len(every) if few else 34) + 20 * pooled
    return Plot(
        name, sentence, _figure(traces, layout), None, height=110 + 20 * (len(every) // 3) * few + each * len(rows)
    )


_FEW = 8  # hosts that have a colour and a mark each
_OUT = "#d55e00"


def _each_host(rows: Sequence[Row], every: Sequence[str]) -> list[dict[str, Any]]:
    traces = []
    for place, host in enumerate(every):
        known = [(number, one) for number, row in enumerate(rows) for one in row.points if one[0] == host]
        ends = [_ends({"value": value, "ci": ci}) for _, (_, value, ci) in known]
        colour = COLOURS[(2, 3, 5, 1, 4, 7, 6, 0)[place % 8]]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": _safe(_shortened(host)),
                "x": [_digits(value) for _, (_, value, _) in known],
                "y": [number + _below(place, len(every)) for number, _ in known],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_digits(high - value) for (_, (_, value, _)), (_, high) in zip(known, ends, strict=True)],
                    "arrayminus": [
                        _digits(value - low) for (_, (_, value, _)), (low, _) in zip(known, ends, strict=True)
                    ],
                    "color": colour,
                    "thickness": 2,
                    "width": 3,
                },
                "marker": {"size": 8, "color": colour, "symbol": _SYMBOLS[place % len(_SYMBOLS)]},
                "hoverinfo": "text",
                "hovertext": [_point_words(rows[number], one) for number, one in known],
                "ends": [end for pair in ends for end in pair],
            }
        )
    return traces


def _many_hosts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    known = [(number, place, one) for number, row in enumerate(rows) for place, one in enumerate(row.points)]
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "a host each",
            "x": [_digits(value) for _, _, (_, value, _) in known],
            "y": [_digits(number + _scattered(place)) for number, place, _ in known],
            "marker": {"size": 6, "color": ALONE, "opacity": 0.6},
            "hoverinfo": "text",
            "hovertext": [_point_words(rows[number], one) for number, _, one in known],
            "ends": [value for _, _, (_, value, _) in known],
        }
    ]


def _pooled_marks(rows: Sequence[Row], many: int) -> list[dict[str, Any]]:
    known = [
        (number, row.pooled) for number, row in enumerate(rows) if row.pooled and row.pooled.get("ratio") is not None
    ]
    found = []
    for part, label, width, end in (("prediction", "one host more", 1, 6), ("ci", "all hosts", 3, 0)):
        shown = [(number, one) for number, one in known if part == "ci" or one.get(part)]
        if not shown:
            continue
        ends = [_ends({"value": one["ratio"], "ci": one.get(part)}) for _, one in shown]
        found.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": label,
                "x": [_digits(one["ratio"]) for _, one in shown],
                "y": [number + 0.38 for number, _ in shown],
                "error_x": {
                    "type": "data",
                    "symmetric": False,
                    "array": [_digits(high - one["ratio"]) for (_, one), (_, high) in zip(shown, ends, strict=True)],
                    "arrayminus": [_digits(one["ratio"] - low) for (_, one), (low, _) in zip(shown, ends, strict=True)],
                    "color": ALONE,
                    "thickness": width,
                    "width": end,
                },
                "marker": {"size": 11, "color": ALONE, "symbol": "diamond-wide"}
                if part == "ci"
                else {"size": 12, "color": ALONE, "symbol": "line-ew-open", "line": {"width": 1}},
                "hoverinfo": "text" if part == "ci" else "skip",
                "hovertext": [
                    f"<b>{many} hosts</b><br>ratio {_both({'value': one['ratio'], 'ci': one.get('ci')})}"
                    + (
                        f"<br>one host more: {quantity.ratio(one['ratio'], one['prediction'])[1]}"
                        if one.get("prediction")
                        else ""
                    )
                    for _, one in shown
                ],
                "ends": [end for pair in ends for end in pair] if part == "ci" and many > 2 else [],
            }
        )
    return found


def _out_marks(rows: Sequence[Row], every: Sequence[str], *, few: bool) -> list[dict[str, Any]]:
    known = [
        (number, (_below(every.index(one[0]), len(every)) if few else _scattered(place)), one)
        for number, row in enumerate(rows)
        for place, one in enumerate(row.points)
        if one[0] in row.out
    ]
    if not known:
        return []
    return [
        {
            "type": "scatter",
            "mode": "markers",
            "name": "stands out",
            "x": [_digits(value) for _, _, (_, value, _) in known],
            "y": [_digits(number + off) for number, off, _ in known],
            "marker": {"size": 17, "color": _OUT, "symbol": "circle-open", "line": {"width": 2}},
            "hoverinfo": "text",
            "hovertext": [f"{_point_words(rows[number], one)}<br>stands out" for number, _, one in known],
        }
    ]


# Where a host's mark is within its row: below each other, or where there are many, as if at random.
def _below(place: int, many: int) -> float:
    return (place - (many - 1) / 2) * 0.5 / max(many, 1)


def _scattered(place: int) -> float:
    return (place * 0.618034 % 1 - 0.5) * 0.44


def _point_words(row: Row, one: tuple[str, float, Sequence[float] | None]) -> str:
    host, value, ci = one
    return f"<b>{_safe(_shortened(host, 60))}</b>: {_safe(', '.join(row.label))}<br>{_both({'value': value, 'ci': ci})}"


def _both(ratio: Mapping[str, Any]) -> str:
    return " ".join(quantity.ratio(ratio["value"], ratio.get("ci")))


def _ends(ratio: Mapping[str, Any]) -> tuple[float, float]:
    low, high = ratio.get("ci") or (None, None)
    value = float(ratio["value"])
    return (value if low is None else float(low)), (value if high is None else float(high))


_VALUE_HEADERS = ("condition", "median [interval]", "n", "least", "most", "ratio to alone [interval]", "difference")


def _values_row(label: str, one: Mapping[str, Any]) -> list[str]:
    metric = primary(one)
    if metric is None:
        return [label, "no data", "0", "–", "–", "–", ""]
    unit = str(metric["unit"])
    ratio = ratio_of(metric)
    return [
        label,
        quantity.interval(metric["median"], metric.get("ci"), unit),
        str(metric["n"]),
        *("–" if metric.get(end) is None else quantity.span(metric[end], unit) for end in ("min", "max")),
        _both(ratio) if ratio else "–",
        _difference(ratio) if ratio else "",
    ]


def _label(one: Mapping[str, Any]) -> str:
    return "alone" if one.get("aggressor") is None else f"{one['aggressor']}, {one['placement']}"


# What stands beside an axis: the placement in one line or two, and the aggressor. The heading names the victim's kind.
def _lines_of(one: Mapping[str, Any]) -> list[str]:
    if one.get("aggressor") is None:
        return ["alone"]
    return [*_broken(str(one["placement"])), _shortened(one["aggressor"])]


def _beside_axis(one: Mapping[str, Any]) -> str:
    first, *rest = map(_safe, _lines_of(one))
    return first + "".join(f"<br><span style='font-size:11px'>{line}</span>" for line in rest)


# How much higher a row must be, where a name beside the axis has a third line.
def _more(those: Sequence[Mapping[str, Any]]) -> int:
    return 14 if any(len(_lines_of(one)) > 2 for one in those) else 0


# Cut at its end, other-package-at-32/performance would be one with other-package-at-32/efficiency.
def _broken(placement: str) -> list[str]:
    name = short(placement)
    return [_shortened(part) for part in (name.split("/", 1) if len(name) > _SHORT else [name])]


def _legend(placement: str) -> str:
    return _shortened(short(placement), _LEGEND)


# Above a column there is room for two lines of some letters.
def _lines(name: str) -> str:
    if len(name) <= _COLUMN:
        return _safe(name)
    rest = name[_COLUMN:]
    return f"{_safe(name[:_COLUMN])}<br>{_safe(rest if len(rest) <= _COLUMN else rest[: _COLUMN - 1] + '…')}"


def _left(those: Sequence[Mapping[str, Any]]) -> int:
    return 14 + 7 * max((len(line) for one in those for line in _lines_of(one)), default=0)


def _shortened(text: object, most: int = _SHORT) -> str:
    words = str(text)
    return words if len(words) <= most else f"{words[: most - 1]}…"


# Plotly reads some of HTML in its texts: what comes from data must not be any of it.
def _safe(text: object) -> str:
    return plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


# The same where the text is a template, in which a brace would begin a variable.
def _template(text: object) -> str:
    return _safe(text).replace("{", "&#123;").replace("}", "&#125;")


# Of a picture with thousands of points, more digits would be most of the file.
def _digits(value: float) -> float:
    return float(f"{value:.5g}")


# Units stand in the words above a picture, which can be broken where a narrow screen needs it.
def _in(scale: quantity.Scale) -> str:
    return f", in {scale.unit}" if scale.unit else ""


def _span(value: float, unit: str) -> str:
    return _safe(quantity.span(value, unit))


def _names(names: Sequence[str], *, safe: bool = False) -> dict[str, Any]:
    texts = list(names) if safe else [_safe(_shortened(name)) for name in names]
    return {"tickvals": list(range(len(names))), "ticktext": texts, "ticklabelstandoff": 6}


def _figure(traces: Sequence[Mapping[str, Any]], layout: Mapping[str, Any]) -> dict[str, Any]:
    # Made by plotly, which refuses what its JavaScript would silently not draw.
    from plotly import graph_objects

    figure = graph_objects.Figure(
        data=[{"showlegend": bool(layout.get("showlegend")), **trace} for trace in traces],
        layout={
            "template": {},
            "font": {"family": _FONT, "size": 12, "color": ALONE},
            "paper_bgcolor": "rgba(0,0,0,0)",
            "plot_bgcolor": "rgba(0,0,0,0)",
            "hoverlabel": {"bgcolor": "#1b1f24", "bordercolor": "#8b949e", "font": {"color": "#ffffff", "size": 13}},
            "hovermode": "closest",
            # A finger that moves the page must not be caught by a picture.
            "dragmode": False,
            "autosize": True,
            "showlegend": False,
            **layout,
        },
    )
    document: dict[str, Any] = figure.to_plotly_json()
    for key, axis in document["layout"].items():
        if key.startswith(("xaxis", "yaxis")):
            axis.update({"fixedrange": True, "automargin": False})
    return {"data": document["data"], "layout": document["layout"]}
