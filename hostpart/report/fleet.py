"""The page of one experiment on many hosts: what makes them hard to compare, who stands out, all as one, each alone."""

from __future__ import annotations

import os
import shlex

from . import facts, figures, finding, hostmap, quantity
from .document import Section, page
from .markup import Html, element, join, table
from .page import alarms, scale, told_first

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from typing import Any

    from ..fleet.journal import Fleet, HostResults
    from .figures import Plot

__all__ = ["SKEW_S", "report"]

SKEW_S = 1.0  # of clocks: beyond it, times of two hosts don't say which was first
_OPEN = 3  # hosts whose results are not folded
_DRAWN = 12  # hosts up to which each has its own map, even if it is like another's
_NAMED = 5  # hosts that are named where more are meant
_ROWS = 12  # hosts in a table that is not folded
# What makes hosts incomparable, by the labels of `facts.rows`; and of the versions, those that measure.
_INCOMPARABLE = ("kernel", "microcode", "SMT", "governor", "hypervisor", "processor")
_VERSIONS = ("hostpart", "python", "numba")
# What is another on every host, and tells nothing.
_OWN = frozenset({"host", "started", "boot id", "load when it started", "time stolen since boot"})


def report(
    fleet: Fleet,
    analyses: Mapping[str, Mapping[str, Any]],
    pooled: Mapping[str, Any],
    unread: Mapping[str, str] | None = None,
) -> str:
    """Return the page of an experiment on many hosts as HTML; the same for the same input.

    :param fleet: what the directory holds; the hosts' runs are not needed
    :param analyses: of the hosts that have one, by name
    :param pooled: what :func:`hostpart.experiment.pooled.pool` says of *analyses*
    :param unread: why a host's results could not be analysed, by name
    """
    return _Page(fleet, analyses, pooled, unread or {}).html()


class _Host:
    # One host on the page.

    def __init__(self, number: int, host: HostResults, analysis: Mapping[str, Any] | None) -> None:
        self.number, self.host, self.analysis = number, host, analysis
        first = host.sessions[0] if host.sessions else {}
        self.session = {**first, "facts": host.facts or first.get("facts")}
        self.facts: Mapping[str, Any] = host.facts
        self.rows = facts.rows(self.session)

    @property
    def name(self) -> str:
        return self.host.name

    @property
    def id(self) -> str:
        return f"host-{self.number}"

    @property
    def done(self) -> int:
        return sum(int(one.get("done") or 0) for one in self.conditions)

    @property
    def planned(self) -> int:
        return sum(int(one.get("planned") or 0) for one in self.conditions)

    @property
    def conditions(self) -> Sequence[Mapping[str, Any]]:
        return self.analysis["conditions"] if self.analysis else ()

    @property
    def alarms(self) -> list[str]:
        if self.analysis is None or self.host.results is None:
            return []
        return alarms(self.host.results, self.analysis)


class _Page:
    def __init__(
        self,
        fleet: Fleet,
        analyses: Mapping[str, Mapping[str, Any]],
        pooled: Mapping[str, Any],
        unread: Mapping[str, str],
    ) -> None:
        self.fleet, self.pooled, self.unread = fleet, pooled, unread
        self.hosts = [_Host(number, one, analyses.get(one.name)) for number, one in enumerate(fleet.hosts)]
        self.analysed = [one for one in self.hosts if one.analysis is not None]
        self.groups = _groups(pooled)
        designs = [one.host.experiment["design"] for one in self.hosts if one.host.experiment]
        self.design: Mapping[str, Any] = designs[0] if designs else {}
        known = [dict(one.rows) for one in self.hosts if one.facts]
        labels = known[0] if known else {}
        self.usual = {label: _by_value([("", one[label]) for one in known])[0][0] for label in labels}
        self.pictures = 0
        self.maps: dict[str, str] = {}  # a drawing, and the host that it was drawn for

    def html(self) -> str:
        sections = [
            self.findings(),
            self.standing_out(),
            self.each(),
            self.missing(),
            self.machines(),
            self.method(),
        ]
        named = next((one.analysis.get("name") for one in self.hosts if one.analysis), None)
        title = self.fleet.document.get("name") or named or "experiment"
        return page(str(title), self.about(), self.first(), sections, pictures=bool(self.pictures))

    def about(self) -> list[str]:
        count = quantity.count(len(self.hosts), "host")
        most = max((len(one.conditions) for one in self.hosts), default=0)
        runs = sum(one.done for one in self.hosts)
        size = f"{quantity.count(most, 'condition')} on each, {quantity.count(runs, 'run')} in all"
        created = str(self.fleet.document.get("created") or "")[:10]
        return [f"{count}: {_listed([one.name for one in self.hosts])}", " · ".join(filter(None, (size, created)))]

    def plot(self, plot: Plot | None, caption: object = None) -> Html | None:
        if plot is None:
            return None
        self.pictures += 1
        return plot.html(caption)

    # -- first -------------------------------------------------------------------------------------------

    def first(self) -> Html:
        told: list[object] = [*self.outlying(), *self.skew(), *self.absent(), *self.pooled["warnings"]]
        told += [
            join([element("a", one.name, href=f"#{one.id}"), f": {text}"]) for one in self.hosts for text in one.alarms
        ]
        more, differences = None, self.differences()
        if told:
            heading = "Read this too" if differences.startswith("<aside") else "Read this first"
            more = element(
                "aside",
                element("h2", heading, id="first-title"),
                told_first(told),
                class_="warning",
                aria_labelledby="first-title",
            )
        return join([differences, more])

    def differences(self) -> Html:
        # Before all else: whoever reads a ratio of two hosts has to know that they are two.
        known = [one for one in self.hosts if one.facts]
        found = self.differing(known)
        mute = [one.name for one in self.hosts if not one.facts]
        if mute:
            found.append(join([element("b", "facts"), f": not known of {_listed(mute)}, so it cannot be compared"]))
        if not found:
            same = "kernel, microcode, SMT, governor, hypervisor, processor and versions"
            words = (
                "Only one host is here." if len(self.hosts) < 2 else f"These hosts can be compared: {same} are alike."
            )
            return element("p", words if self.hosts else "No host is here.", class_="good", id="differences")
        return element(
            "aside",
            element("h2", "These differences make the hosts hard to compare", id="differences-title"),
            element("ul", *(element("li", one) for one in found)),
            class_="warning",
            id="differences",
            aria_labelledby="differences-title",
        )

    def differing(self, known: Sequence[_Host]) -> list[Html]:
        columns = []
        for one in known:
            rows = dict(one.rows)
            versions = one.facts.get("versions")
            texts = versions if isinstance(versions, dict) else {}
            column = {label: rows[label] for label in _INCOMPARABLE}
            column |= {name: str(texts[name] or "not there") if name in texts else facts.UNKNOWN for name in _VERSIONS}
            if column["hostpart"] == facts.UNKNOWN and one.host.hello.get("version"):
                column["hostpart"] = str(one.host.hello["version"])
            columns.append(column)
        found = []
        for label in columns[0] if columns else ():
            values = _by_value([(one.name, column[label]) for one, column in zip(known, columns, strict=True)])
            if len(values) > 1:
                found.append(join([element("b", label), ": ", _values(values)]))
        designs = _by_value([(one.name, _design(one.host.experiment)) for one in self.hosts if one.host.experiment])
        if len(designs) > 1:
            others = [name for _, names in designs[1:] for name in names]
            found.append(
                join([element("b", "design"), f": that on {_listed(others)} is not that on {designs[0][1][0]}"])
            )
        return found

    def outlying(self) -> list[Html]:
        told = []
        for one in self.pooled["outliers"]:
            more = one["alone"] + one["ratios"] - 1
            rest = f"; and so in {quantity.count(more, 'more figure')}" if more else ""
            reason = str(one["reason"]).removeprefix(f"host {one['host']}: ")
            link = element("a", one["host"], href=f"#{self.id_of(one['host'])}")
            told.append(join(["Host ", element("b", link), f" stands out: {reason}{rest}."]))
        return told

    def skew(self) -> list[str]:
        known = sorted((one.host.skew_s, one.name) for one in self.hosts if one.host.skew_s is not None)
        if len(known) < 2 or known[-1][0] - known[0][0] <= SKEW_S:
            return []
        apart = quantity.number(known[-1][0] - known[0][0], 1)
        said = (
            f"The hosts' clocks are up to {apart} s apart: that of {known[-1][1]} is ahead of that of {known[0][1]}. "
            "Times of two hosts do not tell which was first; no figure here hangs on them."
        )
        return [said]

    def absent(self) -> list[str]:
        without = [one.name for one in self.hosts if not one.done]
        part = [one for one in self.hosts if 0 < one.done < one.planned]
        told = [f"Without any run: {_listed(without)}."] if without else []
        if part:
            words = [f"{one.name} ({one.done} of {one.planned})" for one in part]
            told.append(f"With only part of the runs: {_listed(words)}.")
        return told

    # -- sections ----------------------------------------------------------------------------------------

    def findings(self) -> Section:
        together = [one for one in self.pooled["conditions"] if one["pooled"]]
        if not together:
            words = (
                "One host alone cannot be pooled."
                if len(self.analysed) == 1
                else "No two hosts have a ratio in common."
            )
            return Section("findings", "All hosts together", "Together", element("p", words, class_="missing"))
        analysis = {"conditions": [one for group in self.groups for one in group.every]}
        parts: list[Html | None] = [element("p", finding.headline(analysis, self.design), class_="lead")]
        many = max(one["n"] for one in together)
        parts.append(element("p", _pooled_note(many), class_="note"))
        parts.append(scale())
        drawn = []
        for group in self.groups:
            plot = figures.matrix(group, f"matrix-{group.number}", f"of {many} hosts together")
            caption = join([finding.metric_words(group.metric), " as a ratio to alone, ", quantity.count(many, "host")])
            body = self.plot(plot, caption) if plot else element("p", "No ratio is known.", class_="missing")
            drawn.append(element("div", self.title(group), body))
        narrow = all(len(group.aggressors) <= 2 for group in self.groups)
        parts.append(element("div", *drawn, class_=f"pair{' narrow' * narrow}"))
        for group in self.groups:
            picture = self.plot(self.spread(group), join([self.named(group), ": each host's ratio to alone"]))
            parts.append(picture)
        parts.append(self.pooled_table())
        return Section("findings", "All hosts together", "Together", *parts)

    def title(self, group: finding.Group) -> Html:
        return element("h3", self.named(group))

    def named(self, group: finding.Group) -> str:
        several = len({one.isolation for one in self.groups}) > 1
        return f"{group.name}, {group.isolation}" if several else group.name

    def spread(self, group: finding.Group) -> Plot | None:
        rows = []
        for one in group.conditions:
            given = one["given"]
            points = [
                (name, float(each["ratio"]), each["ci"])
                for name, each in given["hosts"].items()
                if each["ratio"] is not None
            ]
            label = [finding.short(str(one["placement"])), str(one["aggressor"])]
            out = [each["host"] for each in given["outliers"]]
            rows.append(figures.Row(label, points, out, given["pooled"]))
        return figures.hosts(self.named(group), "ratio to alone", rows, f"hosts-{group.number}")

    def pooled_table(self) -> Html:
        rows = []
        for one in self.pooled["conditions"]:
            pooled = one["pooled"] or {}
            known = pooled.get("ratio") is not None
            prediction = pooled.get("prediction")
            rows.append(
                [
                    f"{one['victim']}, {one['isolation']}: {one['aggressor']}, {one['placement']}",
                    str(one["n"]),
                    " ".join(quantity.ratio(pooled["ratio"], pooled.get("ci"))) if known else "–",
                    quantity.ratio(pooled["ratio"], prediction)[1] if known and prediction else "–",
                    _tau(pooled.get("tau")),
                    f"{100 * pooled['i2']:.0f} %" if pooled else "–",
                    {"worse": "worse", "better": "better", "none": "no difference"}.get(
                        str(pooled.get("difference")), "–"
                    ),
                ]
            )
        headers = [
            "condition", "hosts", "ratio to alone [interval]", "one host more", "hosts differ by",
            "of it not by chance", "difference",
        ]  # fmt: skip
        body = table(headers, rows, caption="All hosts as one")
        return element("details", element("summary", "Every condition as a table"), body)

    def standing_out(self) -> Section:
        told = self.outlying()
        parts: list[Html | None] = []
        if told:
            parts.append(element("ul", *(element("li", one) for one in told), class_="found"))
        elif len(self.analysed) < 3:
            words = "Of fewer than three hosts, none can be said to be the one that is off."
            parts.append(element("p", words, class_="missing"))
        else:
            parts.append(element("p", "None: no host is off by more than hosts that are alike may be."))
        note = (
            "Each host's victims alone, beside the median of all hosts. A host is named where it is off by more than "
            f"{100 * self.pooled['method']['large']:g} % and by more than the others' spread makes likely."
        )
        parts.append(element("p", note, class_="note"))
        rows = []
        for one in self.pooled["alone"]:
            middle = one["median"]
            if not middle or middle <= 0:
                continue
            points = [
                (name, each["median"] / middle, [end / middle for end in each["ci"]] if each["ci"] else None)
                for name, each in one["hosts"].items()
                if each["median"] is not None
            ]
            label = [str(one["victim"]), ", ".join(filter(None, (finding.kind(one["placement"]), one["isolation"])))]
            rows.append(figures.Row(label, points, [each["host"] for each in one["outliers"]]))
        if rows and len(self.analysed) > 1:
            plot = figures.hosts("Victims alone", "ratio to the hosts' median", rows, "alone")
            parts.append(self.plot(plot, "alone, as a ratio to the hosts' median"))
        parts += [self.alone_table(), self.reasons()]
        return Section("outliers", "Hosts that stand out", "Hosts that stand out", *parts)

    def alone_table(self) -> Html | None:
        shown = self.pooled["alone"]
        if not shown or not self.analysed:
            return None
        rows = []
        for host in self.analysed:
            cells: list[object] = []
            for one in shown:
                each = one["hosts"].get(host.name) or {}
                out = any(other["host"] == host.name for other in one["outliers"])
                if each.get("median") is None:
                    cells.append(element("span", each.get("why") or "no data", class_="missing"))
                    continue
                words = f"{quantity.interval(each['median'], each['ci'], str(one['unit']))}, n = {each['n']}"
                cells.append(element("b", words, " – stands out") if out else words)
            rows.append([host.name, *cells])
        headers = [
            "host",
            *(
                f"{one['victim']}, {one['isolation']}{_kind(one)}: {finding.metric_words(one['metric'])}"
                for one in shown
            ),
        ]
        body = table(headers, rows, caption="Victims alone: medians with their intervals")
        return body if len(rows) <= _ROWS else element("details", element("summary", "Every host as a table"), body)

    def reasons(self) -> Html | None:
        every = [out for one in (*self.pooled["alone"], *self.pooled["conditions"]) for out in one["outliers"]]
        if len(every) <= len(self.pooled["outliers"]):
            return None
        rows = [[one["host"], one["reason"], _chance(one["p"])] for one in every]
        body = table(["host", "figure", "p"], rows, caption="Every figure in which a host stands out")
        return element("details", element("summary", f"All {len(every)} figures"), body)

    def each(self) -> Section:
        folded = len(self.hosts) > _OPEN
        parts = [self.one(host, folded=folded) for host in self.hosts]
        note = element(
            "p",
            "Each cell: the ratio to the same victim alone on the same host, and its interval. V marks the victim's "
            "pCPU, a letter those of the aggressors of a placement.",
            class_="note",
        )
        return Section("each", "Each host", "Each host", note, *parts)

    def one(self, host: _Host, *, folded: bool) -> Html:
        out = any(one["host"] == host.name for one in self.pooled["outliers"])
        state = self.state(host)
        words = [f"{state}{', stands out' if out else ''}"]
        body: list[Html | str | None] = [
            element("p", facts.short(host.session) or "Nothing is known of it.", class_="about")
        ]
        if host.alarms:
            body.append(told_first(host.alarms))
        if host.analysis is not None:
            grids = [self.heat(host, group) for group in finding.groups(host.analysis) if group.conditions]
            body.append(element("div", *grids, class_="pair"))
        body.append(self.map(host))
        body.append(self.facts(host))
        if folded:
            head = element("summary", element("b", host.name), f": {words[0]}")
            return element("details", head, *body, id=host.id, class_="host")
        return element("div", element("h3", host.name), element("p", f"{words[0]}."), *body, id=host.id, class_="host")

    # Of many hosts only what is special of each: the rest would be most of the page.
    def facts(self, host: _Host) -> Html | None:
        rows = [[label, text] for label, text in host.rows]
        summary = "This host's facts"
        if len(self.hosts) > _DRAWN:
            rows = [[label, text] for label, text in rows if label not in _OWN and text != self.usual.get(label)]
            summary = "Facts that are not those of most hosts"
        if not rows or not host.facts:
            return None
        body = _plain_table(["fact", "value"], rows, f"Facts of {host.name}")
        return element("details", element("summary", summary), body)

    def state(self, host: _Host) -> str:
        if host.name in self.unread:
            return "its results cannot be analysed"
        if not host.done:
            return "no run"
        return f"{host.done} of {quantity.count(host.planned, 'run')}"

    def heat(self, host: _Host, group: finding.Group) -> Html:
        levels = {one.get("isolation") for one in host.conditions}
        title = f"{group.name}, {group.isolation}" if len(levels) > 1 else group.name
        caption = f"{title}: {finding.metric_words(group.metric)} as a ratio to alone"
        metric = finding.primary(group.alone) if group.alone else None
        if metric is not None:
            caption += f"; alone {quantity.interval(metric['median'], metric.get('ci'), str(metric['unit']))}"
        head = element(
            "tr",
            element("th", "placement", scope="col"),
            *(element("th", one, scope="col") for one in group.aggressors),
        )
        rows = [
            element(
                "tr",
                element("th", placement, scope="row"),
                *(_cell(group.one(aggressor, placement)) for aggressor in group.aggressors),
            )
            for placement in group.placements
        ]
        grid = element("table", element("thead", head), element("tbody", *rows), class_="heat")
        return element(
            "div",
            element("p", caption, class_="note"),
            element("div", grid, class_="scroll", role="group", aria_label=f"{host.name}: {caption}"),
        )

    def map(self, host: _Host) -> Html:
        known = host.facts
        conditions = host.conditions
        name = f"map-{host.number}"
        drawing = hostmap.draw(known.get("topology"), known.get("caches"), conditions, name)
        same = str(drawing).replace(f'id="{name}"', "")
        if len(self.hosts) > _DRAWN and same in self.maps:
            other = self.maps[same]
            return element("p", "Its map is that of ", element("a", other, href=f"#{self.id_of(other)}"), ".")
        self.maps.setdefault(same, host.name)
        return drawing

    def id_of(self, name: str) -> str:
        return next(one.id for one in self.hosts if one.name == name)

    def missing(self) -> Section:
        rows = []
        for one in self.hosts:
            why = self.why(one)
            if why or one.done < one.planned or not one.done:
                planned = str(one.planned) if one.planned else "–"
                rows.append([one.name, planned, str(one.done), element("ul", *(element("li", text) for text in why))])
        parts: list[Html | None] = []
        if rows:
            parts.append(table(["host", "planned", "done", "why"], rows, caption="Hosts without all of their runs"))
        else:
            parts.append(element("p", "Nothing: every planned run was made on every host, and none failed."))
        unpooled = [
            [name, f"{_words(one)}", str(each["why"])]
            for one in self.pooled["conditions"]
            for name, each in one["hosts"].items()
            if each["why"]
        ]
        if unpooled:
            body = table(["host", "condition", "why"], unpooled, caption="Ratios that are not among those pooled")
            parts.append(element("details", element("summary", "What is not pooled"), body))
        if self.fleet.damaged:
            lines = quantity.count(self.fleet.damaged, "line")
            parts.append(element("p", f"{lines} could not be read: cut short, or not in the form that it should have."))
        return Section("missing", "What is missing", "Missing", *parts)

    def why(self, host: _Host) -> list[str]:
        told = [self.unread[host.name]] if host.name in self.unread else []
        if host.host.file is None:
            told.append("it was chosen and never said anything")
        elif host.host.experiment is None:
            told.append("it told of no experiment")
        for request, state in host.host.outcomes.items():
            error = state.get("error")
            if isinstance(error, dict):
                told.append(f"{request} {state.get('state')}: {error.get('problem')} ({error.get('remedy')})")
            elif state.get("state") not in ("ended", None) or state.get("status") not in (0, None):
                status = f" with status {state['status']}" if state.get("status") is not None else ""
                told.append(f"{request} {state.get('state')}{status}")
        for request, one in self.fleet.requests.items():
            if one["host"] == host.name and one["state"] not in ("asked", "placed", "held", "started", "ended"):
                told.append(f"{request}: {one['state']}")
        told += [
            f"{one['condition']}: {one['done']} of {one['planned']}; {'; '.join(map(str, one['why']))}"
            for one in (host.analysis or {}).get("missing") or ()
        ]
        if host.host.damaged:
            told.append(f"{quantity.count(host.host.damaged, 'line')} of it could not be read")
        return told

    def machines(self) -> Section:
        known = [one for one in self.hosts if one.facts]
        if not known:
            return Section("machines", "The hosts", "Facts", element("p", "Not known.", class_="missing"))
        labels = [label for label, _ in known[0].rows if label not in _OWN]
        columns = [dict(one.rows) for one in known]
        every = [
            (label, _by_value([(one.name, column[label]) for one, column in zip(known, columns, strict=True)]))
            for label in labels
        ]
        differ = [(label, values) for label, values in every if len(values) > 1]
        same = [(label, values) for label, values in every if len(values) == 1]
        parts: list[Html | None] = []
        if differ:
            rows = [
                [label if not place else "", _listed(names), text]
                for label, values in differ
                for place, (text, names) in enumerate(values)
            ]
            parts.append(_plain_table(["fact", "hosts", "value"], rows, "Facts that differ"))
        else:
            parts.append(element("p", "No fact differs between the hosts, but for their names, times and loads."))
        if same:
            rows = [[label, values[0][0]] for label, values in same]
            body = _plain_table(["fact", "value"], rows, "Facts that all hosts share")
            what = f"{quantity.count(len(same), 'fact')} that all {len(known)} share" if len(known) > 1 else "Its facts"
            parts.append(element("details", element("summary", what), body))
        clocks = [one for one in self.hosts if one.host.skew_s is not None]
        if clocks:
            rows = [
                [one.name, f"{one.host.skew_s:+.3f} s".replace("-", "−"), _milliseconds(one.host.rtt_s)]
                for one in clocks
            ]
            body = table(["host", "ahead of the client", "answers in"], rows, caption="Clocks")
            parts.append(element("details", element("summary", "The hosts' clocks"), body))
        return Section("machines", "The hosts", "Facts", *parts)

    def method(self) -> Section:
        argv = self.fleet.document.get("argv")
        parts: list[Html | None] = []
        if isinstance(argv, list) and argv:
            parts.append(element("pre", shlex.join(["hostpart", *map(str, argv)])))
        directory = os.path.abspath(self.fleet.directory)
        parts.append(element("p", "This page again: ", element("code", shlex.join(["hostpart", "report", directory]))))
        method = self.pooled["method"]
        rows = [
            ["fleet run", str(self.fleet.document.get("run") or facts.UNKNOWN)],
            ["hosts together", str(method["pooling"])],
            ["interval", f"{100 * method['confidence']:g} %"],
            ["hosts that stand out", str(method["outliers"])],
            ["standard errors", f"bootstrap of each median, {method['resamples']} resamples, seed {method['seed']}"],
        ]
        one = next((host.analysis["method"] for host in self.hosts if host.analysis), None)
        if one:
            rows += [["on each host: interval", str(one["interval"])], ["on each host: test", str(one["test"])]]
        parts += [element("h3", "How the figures were made"), _plain_table(["what", "how"], rows, "Method")]
        parts.append(
            element(
                "p", "A host that stands out is among those pooled: to leave it out would be to choose.", class_="note"
            )
        )
        return Section("repeat", "To repeat it", "Repeat", *parts)


# What is pooled in the form in which one host's analysis is, for what draws and words these.
def _groups(pooled: Mapping[str, Any]) -> list[finding.Group]:
    shown = []
    for one in pooled["conditions"]:
        together = one["pooled"]
        metrics = {}
        if together and together["ratio"] is not None:
            more = together["prediction"]
            told = quantity.count(one["n"], "host")
            told += f"; one host more: {quantity.ratio(together['ratio'], more)[1]}" if more else ""
            ratio = {"value": together["ratio"], "ci": together["ci"], "difference": together["difference"]}
            metric = {"median": together["ratio"], "ci": together["ci"], "unit": "1", "n": one["n"], "told": told}
            metrics[one["metric"]] = {**metric, "better": one["better"], "ratio": ratio}
        shown.append(
            {
                **{name: one[name] for name in ("victim", "isolation", "aggressor", "placement")},
                "place": f"{kind} cores" if (kind := finding.kind(str(one["placement"]))) else "",
                "primary": one["metric"],
                "metrics": metrics,
                "given": one,
            }
        )
    return finding.groups({"conditions": shown})


def _cell(one: Mapping[str, Any] | None) -> Html:
    if one is None:
        return element("td", "not planned", class_="missing")
    size = finding.cost(finding.primary(one))
    value, bounds = finding.ratio_words(one)
    if size is None:
        return element("td", "no data" if value == "–" else value, class_="missing")
    colour = figures.heat(size)
    ink = max(("#000000", "#ffffff"), key=lambda one: figures.contrast(colour, one))
    return element(
        "td",
        element("b", value),
        element("br"),
        element("span", bounds, class_="whole"),
        style=f"background:{colour};color:{ink}",
    )


def _pooled_note(many: int) -> str:
    told = (
        f"The ratio to alone over {many} hosts, with the host as a random effect: the interval is where the mean of "
        "hosts like these lies. Orange is worse and blue is better, whatever the metric."
    )
    if many == 2:
        return f"{told} Two hosts say next to nothing of others: the intervals are as wide as that."
    more = " Three are few for it." if many == 3 else ""
    return f"{told} “One host more” is where the ratio of another such host lies.{more}"


def _by_value(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    # What most have first.
    found: dict[str, list[str]] = {}
    for name, text in pairs:
        found.setdefault(text, []).append(name)
    return sorted(found.items(), key=lambda one: -len(one[1]))


def _values(values: Sequence[tuple[str, Sequence[str]]]) -> Html:
    shown = values if len(values) <= _NAMED else values[: _NAMED - 1]
    parts: list[object] = []
    for place, (text, names) in enumerate(shown):
        parts += ["; " if place else "", element("b", text), f" on {_listed(names)}"]
    if len(shown) < len(values):
        parts.append(f"; and {len(values) - len(shown)} others")
    return join(parts)


def _listed(names: Sequence[str]) -> str:
    if len(names) <= _NAMED:
        return ", ".join(names[:-1]) + (" and " if len(names) > 1 else "") + (names[-1] if names else "none")
    return f"{', '.join(names[: _NAMED - 1])} and {len(names) - _NAMED + 1} more"


def _design(experiment: Mapping[str, Any]) -> str:
    design = {name: value for name, value in experiment["design"].items() if name != "source"}
    return repr((sorted(design.items(), key=lambda one: one[0]), experiment.get("seed")))


def _words(one: Mapping[str, Any]) -> str:
    return ", ".join(str(one[name]) for name in ("victim", "isolation", "aggressor", "placement") if one.get(name))


def _kind(one: Mapping[str, Any]) -> str:
    kind = finding.kind(str(one["placement"]))
    return f", {kind} core" if kind else ""


# A table of texts that wrap and never stand to the right.
def _plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]], caption: str) -> Html:
    head = element("tr", *(element("th", one, scope="col") for one in headers))
    body = [
        element("tr", element("th", row[0], scope="row"), *(element("td", text) for text in row[1:])) for row in rows
    ]
    return element(
        "div",
        element(
            "table", element("caption", caption), element("thead", head), element("tbody", *body), class_="wrapped"
        ),
        class_="scroll",
        role="group",
        aria_label=caption,
    )


def _tau(tau: float | None) -> str:
    return "–" if tau is None else f"{100 * tau:.1f} %"


def _milliseconds(seconds: float | None) -> str:
    return "–" if seconds is None else f"{quantity.number(1000 * seconds, 1)} ms"


def _chance(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"
