"""The page of one experiment, from its directory and its analysis."""

from __future__ import annotations

import os
import shlex

from ..experiment.intake import VERDICTS
from ..experiment.results import against
from . import facts, figures, finding, hostmap, quantity
from .document import Section, page
from .markup import Html, element, join, table

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from ..experiment.results import Results
    from .figures import Plot

__all__ = ["alarms", "facts_table", "report", "scale", "told_first"]

_REASONS = 3  # that are told of a condition: each run words its own
_VERDICTS = (*VERDICTS, "none")
_FOLDED = 5  # warnings


def report(results: Results, analysis: Mapping[str, Any]) -> str:
    """Return the page of one experiment as HTML; the same for the same input.

    :param analysis: what :func:`hostpart.experiment.analysis.analyse` says of *results*
    """
    return _Page(results, analysis).html()


def alarms(results: Results, analysis: Mapping[str, Any]) -> list[str]:
    """Return what speaks against the figures, a sentence each; empty if nothing does."""
    told = []
    verdicts = _verdicts(analysis, weighed=True)
    if bad := {name: verdicts[name] for name in ("broken", "tainted") if verdicts[name]}:
        words = " and ".join(f"{many} {name}" for name, many in bad.items())
        runs = quantity.count(sum(_verdicts(analysis).values()), "run")
        told.append(f"Of {runs}, the evidence calls {words}, not counting what was planned.")
    if verdicts["none"]:
        told.append(
            f"{quantity.count(verdicts['none'], 'run')} without a verdict: whether the partition held is not known."
        )
    if lacking := sum(max(int(one["planned"]) - int(one["done"]), 0) for one in analysis.get("missing") or ()):
        planned = sum(int(one.get("planned") or 0) for one in analysis["conditions"])
        told.append(f"{lacking} of {quantity.count(planned, 'planned run')} are missing or failed.")
    if not results.sessions:
        told.append("The host's facts are missing: no start was noted.")
    more = [str(one["warning"]) for one in analysis.get("drift") or () if one.get("warning")]
    more += map(str, analysis.get("warnings") or ())
    return [*told, *dict.fromkeys(_without_ids(text, analysis) for text in more)]


# A warning is led by the condition's id; its words are easier to read.
def _without_ids(text: str, analysis: Mapping[str, Any]) -> str:
    name, colon, rest = text.partition(": ")
    return f"{_id_words(analysis, name)}{colon}{rest}"


def told_first(told: Sequence[object]) -> Html:
    """Return what speaks against the figures as a list; of a long one, the end is folded."""
    items = [element("li", text) for text in told]
    shown = items if len(items) <= _FOLDED else items[: _FOLDED - 1]
    rest = items[len(shown) :]
    folded = element("details", element("summary", f"{len(rest)} more"), element("ul", *rest)) if rest else None
    return join([element("ul", *shown), folded])


def scale() -> Html:
    """Return the key to the heat maps' colours."""
    stops = ", ".join(figures.HEAT)
    return element(
        "p",
        "better by 3 times or more",
        element("i", style=f"background:linear-gradient(to right, {stops})", aria_hidden="true"),
        "worse by 3 times or more",
        class_="scale",
    )


def _verdicts(analysis: Mapping[str, Any], *, weighed: bool = False) -> dict[str, int]:
    # Weighed: what taints because the aggressor is on the victim's pCPU by design does not count.
    found = dict.fromkeys(_VERDICTS, 0)
    for one in analysis["conditions"]:
        for name, many in (one.get("verdicts") or {}).items():
            if not weighed or name != "tainted" or name in against(one):
                found[name] = found.get(name, 0) + int(many or 0)
    return found


class _Page:
    def __init__(self, results: Results, analysis: Mapping[str, Any]) -> None:
        self.results, self.analysis = results, analysis
        self.design: Mapping[str, Any] = results.experiment.get("design") or {}
        self.session = results.sessions[0] if results.sessions else None
        given = (self.session or {}).get("facts")
        self.facts: Mapping[str, Any] = given if isinstance(given, dict) else {}
        self.groups = finding.groups(analysis)
        placements = [str(one["placement"]) for one in analysis["conditions"] if one.get("aggressor") is not None]
        self.styles = figures.Styles(placements)
        self.pictures = 0

    def html(self) -> str:
        sections = [
            self.findings(),
            self.seats(),
            self.processes(),
            self.distributions(),
            self.noise(),
            self.evidence(),
            self.drift(),
            self.missing(),
            self.machine(),
            self.method(),
        ]
        name = self.analysis.get("name") or self.results.experiment.get("name") or "experiment"
        about = [facts.short(self.session), self.size()]
        return page(str(name), [line for line in about if line], self.first(), sections, pictures=bool(self.pictures))

    def size(self) -> str:
        told = sum(int(one.get("done") or 0) for one in self.analysis["conditions"])
        parts = [quantity.count(len(self.analysis["conditions"]), "condition"), quantity.count(told, "run")]
        if self.results.experiment.get("seed") is not None:
            parts.append(f"seed {self.results.experiment['seed']}")
        return ", ".join(parts)

    def first(self) -> Html:
        told = alarms(self.results, self.analysis)
        if not told:
            held = quantity.count(_verdicts(self.analysis)["held"], "run")
            shared = sum(_verdicts(self.analysis).values()) - _verdicts(self.analysis)["held"]
            planned = f" (in {shared} the aggressor shared the victim's pCPU, as planned)" if shared else ""
            text = (
                f"Nothing speaks against these figures: the partition held in {held}{planned}, the runs alone did not "
                "drift, and no run is missing."
            )
            return element("p", text, class_="good")
        links = [
            element("a", text, href=f"#{name}")
            for name, text in (("evidence", "evidence"), ("drift", "drift"), ("missing", "what is missing"))
        ]
        return element(
            "aside",
            element("h2", "Read this first", id="first-title"),
            told_first(told),
            element("p", "More: ", join(links, ", "), "."),
            class_="warning",
            aria_labelledby="first-title",
        )

    def plot(self, plot: Plot | None, caption: object = None) -> Html | None:
        if plot is None:
            return None
        self.pictures += 1
        return plot.html(caption)

    def title(self, group: finding.Group) -> Html:
        return element("h3", self.named(group))

    def named(self, group: finding.Group) -> str:
        levels = {one.isolation for one in self.groups}
        return f"{group.name}, {group.isolation}" if len(levels) > 1 else group.name

    def findings(self) -> Section:
        lead = element("p", finding.headline(self.analysis, self.design), class_="lead")
        others = finding.sentences(self.analysis, self.design)
        others = [text for text in others if text != lead[len('<p class="lead">') : -len("</p>")]]
        parts: list[Html | None] = [lead]
        if others:
            parts.append(element("ul", *(element("li", text) for text in others), class_="found"))
        drawn = []
        narrow = all(len(group.aggressors) <= 2 for group in self.groups)
        for group in self.groups:
            plot = figures.matrix(group, f"matrix-{group.number}")
            caption = join([finding.metric_words(group.metric), " as a ratio to alone", self.alone(group)])
            body = self.plot(plot, caption) if plot else element("p", "No ratio is known.", class_="missing")
            drawn.append(element("div", self.title(group), body))
        confidence = (self.analysis.get("method") or {}).get("confidence")
        known = f"{100 * confidence:g} % " if confidence else ""
        note = element(
            "p",
            f"Each cell: the ratio to the same victim alone, its {known}interval, and whether the difference can be "
            "told from chance. Orange is worse and blue is better, whatever the metric. † marks cells with runs in "
            "which the partition did not hold.",
            class_="note",
        )
        return Section(
            "findings",
            "What was found",
            "Findings",
            *parts,
            note,
            scale(),
            element("div", *drawn, class_=f"pair{' narrow' * narrow}"),
        )

    def alone(self, group: finding.Group) -> str:
        metric = finding.primary(group.alone) if group.alone else None
        if metric is None:
            return ""
        return (
            f"; alone {quantity.interval(metric['median'], metric.get('ci'), str(metric['unit']))}, n = {metric['n']}"
        )

    def seats(self) -> Section:
        conditions = self.analysis["conditions"]
        drawing = hostmap.draw(self.facts.get("topology"), self.facts.get("caches"), conditions, "map")
        placed = hostmap.seats(conditions) if any(one.get("aggressor") is not None for one in conditions) else None
        return Section("host-map", "Who was where", "Host map", drawing, placed)

    def processes(self) -> Section:
        parts = []
        for group in self.groups:
            drawn = figures.processes(group, self.styles, f"processes-{group.number}")
            body = (
                self.plot(drawn[1], drawn[0])
                if drawn
                else element("p", "No run of it told its metric.", class_="missing")
            )
            parts.append(element("div", self.title(group), body, self.metrics(group)))
        note = element(
            "p", "A small dot is one process. The larger mark is the median, with its interval; the dotted line is the "
            "median alone.", class_="note",
        )  # fmt: skip
        return Section("processes", "Every process", "Processes", note, element("div", *parts, class_="pair"))

    def metrics(self, group: finding.Group) -> Html | None:
        rows = []
        if {name for one in group.every for name in one.get("metrics") or ()} <= {group.metric}:
            return None  # the picture's own table has them
        for one in group.every:
            for name, metric in (one.get("metrics") or {}).items():
                if metric.get("median") is None:
                    continue
                ratio = finding.ratio_of(metric) or {}
                rows.append(
                    [
                        "alone" if one.get("aggressor") is None else f"{one['aggressor']}, {one['placement']}",
                        finding.metric_words(name),
                        quantity.interval(metric["median"], metric.get("ci"), str(metric["unit"])),
                        str(metric["n"]),
                        " ".join(quantity.ratio(ratio["value"], ratio.get("ci"))) if ratio else "–",
                        _chance(ratio.get("p_holm")),
                        "–" if ratio.get("apart") is None else "yes" if ratio["apart"] else "no",
                    ]
                )
        if not rows:
            return None
        headers = [
            "condition", "metric", "median [interval]", "n", "ratio to alone [interval]", "p (Holm)", "intervals apart",
        ]  # fmt: skip
        label = f"{group.name}, {group.isolation}: every metric"
        return element("details", element("summary", "Every metric as a table"), table(headers, rows, caption=label))

    def distributions(self) -> Section:
        body = self.per_group(figures.distributions, "distribution", "No histogram was kept of")
        note = element(
            "p",
            "All processes of a condition together. Left to right, an ever smaller share of all: at 99 %, one in a "
            "hundred took longer than the line's height. Both scales are logarithmic.",
            class_="note",
        )
        return Section("distributions", "Latency distributions", "Latencies", note, *body)

    def noise(self) -> Section:
        body = self.per_group(figures.noise, "noise", "No time series was kept of")
        note = element(
            "p", "One typical process of each condition: the one with the median of the primary metric.", class_="note"
        )
        return Section("noise", "Noise over time", "Noise", note, *body)

    def per_group(
        self,
        drawn: Callable[[finding.Group, figures.Styles, str], list[tuple[str, Plot]]],
        name: str,
        without: str,
    ) -> list[Html]:
        found, empty = [], []
        for group in self.groups:
            plots = drawn(group, self.styles, f"{name}-{group.number}")
            bodies = [self.plot(plot, words) for words, plot in plots]
            if bodies:
                found += [self.title(group), element("div", *bodies, class_="pair")]
            else:
                empty.append(self.named(group))
        if empty:
            found.append(element("p", f"{without}: {'; '.join(empty)}.", class_="missing"))
        return found

    def evidence(self) -> Section:
        verdicts = _verdicts(self.analysis)
        total = sum(verdicts.values())
        words = ", ".join(
            f"{many:,} {'without a verdict' if name == 'none' else name}" for name, many in verdicts.items() if many
        )
        lead = f"Of {quantity.count(total, 'run')}: {words}." if total else "No run has a verdict."
        rows = []
        for one in self.analysis["conditions"]:
            told = one.get("verdicts") or {}
            given = list(one.get("reasons") or ())
            reasons = [element("li", text, f" ({many} times)" if many != 1 else "") for text, many in given[:_REASONS]]
            if len(given) > _REASONS:
                reasons.append(element("li", f"and {quantity.count(len(given) - _REASONS, 'other reason')}"))
            rows.append(
                [
                    _names(one),
                    *(str(told.get(name) or 0) for name in _VERDICTS),
                    element("ul", *reasons) if reasons else "–",
                ]
            )
        headers = ["condition", "held", "tainted", "broken", "none", "why"]
        not_held = [row for row in rows if any(cell != "0" for cell in row[2:5]) or row[5] != "–"]
        label = "Verdicts that are not “held”" if len(not_held) < len(rows) else "Verdicts by condition"
        shown = table(headers, not_held, caption=label) if not_held else None
        every = None
        if len(not_held) < len(rows):
            body = table(headers, rows, caption="Verdicts by condition")
            every = element("details", element("summary", "Every condition as a table"), body)
        note = element(
            "p",
            "Held: the kernel's figures show that the victim was where it was put, and nothing foreign with it. "
            "Tainted: others were there too, or that could not be ruled out; where the aggressor may run on the "
            "victim's pCPU, that was planned. Broken: something was seen that must not be.",
            class_="note",
        )
        return Section("evidence", "Did the partition hold?", "Evidence", element("p", lead), note, shown, every)

    def drift(self) -> Section:
        names = {str(alone["id"]): group.name for group in self.groups for alone in group.alones}
        rows = [
            [
                f"{names.get(str(one.get('condition')), one['victim'])}, {one['isolation']}",
                finding.metric_words(one.get("metric")),
                str(one.get("n")),
                "–" if one.get("change_percent") is None else quantity.percent(one["change_percent"]),
                _chance(one.get("p")),
                "changed" if one.get("warning") else "steady",
            ]
            for one in self.analysis.get("drift") or ()
        ]
        headers = ["victim", "metric", "runs alone", "change from first to last", "p", "host"]
        told = table(headers, rows, caption="Runs alone over time") if rows else None
        plots = []
        for group in self.groups:
            drawn = figures.drift(group, self.results.runs, f"drift-{group.number}")
            if drawn:
                plots.append(element("div", self.title(group), self.plot(drawn[1], drawn[0])))
        note = element(
            "p",
            "The victim ran alone before, between and after the others. If those runs change in the course of the "
            "experiment, the host did, and the comparisons are worth less.",
            class_="note",
        )
        nothing = None if rows or plots else element("p", "There are too few runs alone to tell.", class_="missing")
        return Section(
            "drift", "Was the host steady?", "Drift", note, nothing, told, element("div", *plots, class_="pair")
        )

    def missing(self) -> Section:
        rows = [
            [
                _id_words(self.analysis, str(one["condition"])),
                str(one["planned"]),
                str(one["done"]),
                element("ul", *(element("li", text) for text in one.get("why") or ())) if one.get("why") else "–",
            ]
            for one in self.analysis.get("missing") or ()
        ]
        parts: list[Html | None] = []
        if rows:
            parts.append(
                table(["condition", "planned", "done", "why"], rows, caption="Runs that are missing or failed")
            )
        failed = [
            [
                str(run["run"]),
                _id_words(self.analysis, str(run.get("condition"))),
                str(error.get("problem") if isinstance(error, dict) else error),
                str((isinstance(error, dict) and error.get("remedy")) or "–"),
            ]
            for run in self.results.runs
            if (error := run.get("error"))
        ]
        if failed:
            body = table(["run", "condition", "what happened", "what to do"], failed, caption="Runs that failed")
            parts.append(element("details", element("summary", "Every run that failed"), body))
        if self.results.damaged:
            lines = quantity.count(self.results.damaged, "line")
            parts.append(element("p", f"{lines} could not be read: a kill or a full disk cut what was being written."))
        if not self.results.sessions:
            parts.append(element("p", "No start was noted, so neither the host nor the command is known."))
        if not parts:
            parts.append(element("p", "Nothing: every planned run was made, and none failed."))
        return Section("missing", "What is missing", "Missing", *parts)

    def machine(self) -> Section:
        if not self.results.sessions:
            return Section("machine", "The machine", "Machine", element("p", "Not known.", class_="missing"))
        parts = [facts_table([""], [facts.rows(self.session)])]
        sessions = self.results.sessions
        if len(sessions) > 1:
            names = [f"start {number + 1}" for number in range(len(sessions))]
            starts = ", ".join(str(one.get("started")) for one in sessions)
            changed = facts.changes(sessions)
            end = "These facts differ between the starts:" if changed else "The host's facts were the same each time."
            parts.append(element("p", f"It was started {len(sessions)} times: {starts}. {end}"))
            if changed:
                columns = [[(label, texts[place]) for label, texts in changed] for place in range(len(sessions))]
                parts.append(facts_table(names, columns))
        return Section("machine", "The machine", "Machine", *parts)

    def method(self) -> Section:
        method = self.analysis.get("method") or {}
        commands = list(
            dict.fromkeys(_command(one) for one in self.results.sessions if isinstance(one.get("command"), list))
        )
        parts: list[Html | None] = []
        if commands:
            parts += [element("pre", command) for command in commands]
            parts.append(
                element(
                    "p",
                    "Into the same directory it goes on where it stopped; to make every run again, name another one.",
                    class_="note",
                )
            )
        else:
            parts.append(element("p", "The command is not known: no start was noted.", class_="missing"))
        directory = os.path.abspath(self.results.directory)
        parts.append(element("p", "This page again: ", element("code", shlex.join(["hostpart", "report", directory]))))
        rows = [
            ("interval", _with_confidence(method)),
            ("resamples", _known(method.get("resamples"))),
            ("test", _known(method.get("test"))),
            ("called a difference below", f"p = {method['alpha']}" if method.get("alpha") else facts.UNKNOWN),
            ("processes per condition", _known(self.design.get("processes"))),
            ("measured in each, s", _known(self.design.get("seconds"))),
            ("warm-up in each, s", _known(self.design.get("warmup"))),
            ("design", _known(self.results.experiment.get("source"))),
            ("seed of the order", _known(self.results.experiment.get("seed"))),
            ("hostpart", _known(self.results.experiment.get("hostpart"))),
        ]
        parts += [element("h3", "How the figures were made"), facts_table([""], [rows])]
        return Section("repeat", "To repeat it", "Repeat", *parts)


def facts_table(names: Sequence[str], columns: Sequence[Sequence[tuple[str, str]]]) -> Html:
    """Return facts as a table that becomes a list on a narrow screen.

    :param names: of the columns
    :param columns: in each the same labels, with their texts
    """
    head = element(
        "tr", element("th", "fact", scope="col"), *(element("th", one or "value", scope="col") for one in names)
    )
    body = [
        element(
            "tr",
            element("th", cells[0][0], scope="row"),
            *(
                element("td", text, class_="missing" if text == facts.UNKNOWN else None, data_name=name or None)
                for name, (_, text) in zip(names, cells, strict=True)
            ),
        )
        for cells in zip(*columns, strict=True)
    ]
    return element("table", element("thead", head), element("tbody", *body), class_="facts")


def _command(session: Mapping[str, Any]) -> str:
    command = shlex.join(map(str, session["command"]))
    return f"cd {shlex.quote(str(session['cwd']))} && {command}" if session.get("cwd") else command


def _names(one: Mapping[str, Any]) -> str:
    return ", ".join(str(one[name]) for name in ("victim", "isolation", "aggressor", "placement") if one.get(name))


def _id_words(analysis: Mapping[str, Any], condition: str) -> str:
    return next((_names(one) for one in analysis["conditions"] if one["id"] == condition), condition)


def _known(value: object) -> str:
    return facts.UNKNOWN if value is None else str(value)


def _with_confidence(method: Mapping[str, Any]) -> str:
    if not method.get("interval"):
        return facts.UNKNOWN
    confidence = f"{100 * method['confidence']:g} %, " if method.get("confidence") else ""
    return f"{confidence}{method['interval']}"


def _chance(value: float | None) -> str:
    if value is None:
        return "–"
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
