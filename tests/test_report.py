"""The report without a browser: what is on the page, that data stays data, and that half an experiment has one too."""

from __future__ import annotations

import copy
import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from hostpart.cli.analysis import summary
from hostpart.cli.report import write
from hostpart.errors import Failed
from hostpart.experiment import analysis
from hostpart.experiment.results import Results, read
from hostpart.report import facts, figures, finding, hostmap, markup, quantity
from hostpart.report.comparison import compare
from hostpart.report.page import report
from tests import experiments
from tests.conftest import Place

HOSTILE = "</script><img src=x onerror=alert(1)>'\"&<b>bold</b>%{x}$a$"
VOID = {"br", "img", "input", "link", "meta"}
STYLE = Path(figures.__file__).with_name("style.css").read_text(encoding="utf-8")


class Element:
    """A start tag, what is in it, and where it is."""

    def __init__(self, tag: str, attributes: dict[str, str], parent: Element | None) -> None:
        self.tag, self.attributes, self.parent = tag, attributes, parent
        self.children: list[Element | str] = []

    def walk(self) -> Iterator[Element]:
        """Yield this element and all inside it, in order."""
        yield self
        for child in self.children:
            if isinstance(child, Element):
                yield from child.walk()

    @property
    def text(self) -> str:
        """All text in it but that of scripts and style sheets."""
        if self.tag in ("script", "style"):
            return ""
        return " ".join(child if isinstance(child, str) else child.text for child in self.children)

    def all(self, tag: str, class_: str = "") -> list[Element]:
        """Return every *tag* inside, in order."""
        return [
            one
            for one in self.walk()
            if one.tag == tag and (not class_ or class_ in one.attributes.get("class", "").split())
        ]


class Reader(HTMLParser):
    """Reads a page that closes every element that it opens; anything else fails."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.root = self.here = Element("", {}, None)
        self.feed(text)
        self.close()
        assert self.here is self.root, f"{self.here.tag} is not closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        new = Element(tag, {name: value or "" for name, value in attrs}, self.here)
        self.here.children.append(new)
        if tag not in VOID:
            self.here = new

    def handle_endtag(self, tag: str) -> None:
        assert self.here.tag == tag, f"{tag} closes {self.here.tag}"
        assert self.here.parent is not None
        self.here = self.here.parent

    def handle_data(self, data: str) -> None:
        self.here.children.append(data)


def analysed(directory: Path) -> tuple[Results, dict[str, Any]]:
    """Return the results and a quick analysis of them."""
    results = read(str(directory))
    return results, analysis.analyse(results, resamples=199)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Any]]:
    """An experiment that has something of everything, and its analysis."""
    return analysed(experiments.example(tmp_path_factory.mktemp("report") / "monday", processes=6))


@pytest.fixture(scope="module")
def text(example: tuple[Results, dict[str, Any]]) -> str:
    """The page of the example."""
    return report(*example)


@pytest.fixture(scope="module")
def page(text: str) -> Element:
    """The same, read."""
    return Reader(text).root


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory, example: tuple[Results, dict[str, Any]]) -> Element:
    """The example and another one of another host, side by side."""
    results, found = analysed(experiments.example(tmp_path_factory.mktemp("other") / "friday", seed=2, processes=6))
    session = copy.deepcopy(results.sessions[0])
    session["facts"]["kernel"]["release"] = "6.1.0"
    session["facts"]["smt"] = None
    return Reader(compare([example, (results.replace(sessions=(session,)), found)])).root


# -- structure ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["page", "both"])
def test_a_page_has_its_landmarks_one_heading_and_no_level_left_out(name: str, request: pytest.FixtureRequest) -> None:
    root: Element = request.getfixturevalue(name)
    for tag in ("header", "nav", "main", "footer", "h1", "title"):
        assert len(root.all(tag)) == 1, tag
    assert root.all("html")[0].attributes["lang"] == "en"
    levels = [int(one.tag[1]) for one in root.walk() if re.fullmatch("h[1-6]", one.tag)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    first = next(one for one in root.all("body")[0].walk() if one.tag == "a")
    assert (first.attributes["class"], first.attributes["href"]) == ("skip", "#main")


@pytest.mark.parametrize("name", ["page", "both"])
def test_ids_are_unique_and_what_names_one_finds_it(name: str, request: pytest.FixtureRequest) -> None:
    root: Element = request.getfixturevalue(name)
    ids = [one.attributes["id"] for one in root.walk() if "id" in one.attributes]
    assert len(ids) == len(set(ids))
    named = [
        one.attributes[key] for one in root.walk() for key in ("aria-labelledby", "data-plot") if key in one.attributes
    ]
    named += [one.attributes["href"].removeprefix("#") for one in root.all("a")]
    assert set(named) <= set(ids)


@pytest.mark.parametrize("name", ["page", "both"])
def test_every_picture_has_a_sentence_its_data_and_a_table(name: str, request: pytest.FixtureRequest) -> None:
    root: Element = request.getfixturevalue(name)
    plots = root.all("div", "plot")
    assert len(plots) >= 6
    sentences = [plot.attributes["aria-label"] for plot in plots]
    assert all(plot.attributes["role"] == "img" for plot in plots)
    assert all(len(sentence) > 40 and sentence.endswith(".") for sentence in sentences)
    assert len(sentences) == len(set(sentences))
    data = {one.attributes["data-plot"]: one for one in root.all("script") if "data-plot" in one.attributes}
    assert set(data) == {plot.attributes["id"] for plot in plots}
    for script in data.values():
        assert json.loads("".join(map(str, script.children)))["data"]
        figure = script.parent
        assert figure is not None
        beside = figure.all("table") or (figure.parent and figure.parent.all("table"))
        assert beside


def test_every_table_names_its_columns_and_rows(page: Element, both: Element) -> None:
    for one in page.all("table") + both.all("table"):
        columns = one.all("thead")[0].all("th")
        assert all(cell.text.strip() for cell in columns)
        assert all(cell.attributes["scope"] == "col" for cell in columns)
        for row in one.all("tbody")[0].all("tr"):
            cells = [cell for cell in row.children if isinstance(cell, Element)]
            assert len(cells) == len(columns)
            assert (cells[0].tag, cells[0].attributes["scope"]) == ("th", "row")


def test_a_fold_says_what_is_in_it(page: Element) -> None:
    for one in page.all("details"):
        assert isinstance(one.children[0], Element)
        assert one.children[0].tag == "summary"
        assert one.children[0].text.strip()


def test_all_that_was_asked_for_is_on_the_page(page: Element) -> None:
    words = page.text
    for part in (
        "What was found", "Who was where", "Every process", "Latency distributions", "Noise over time",
        "Did the partition hold?", "Was the host steady?", "What is missing", "The machine", "To repeat it",
        "cd /home/someone && hostpart experiment synthetic.toml --out results",
        "6.12.90", "isolcpus=2", "performance", "turbo", "SMT", "tsc", "hypervisor", "time stolen", "numpy 2.4.6",
        "another task ran on pCPU 2 for 12 ms", "make: not found",
    ):  # fmt: skip
        assert part in words, part


def test_the_first_thing_said_is_what_speaks_against_the_figures(page: Element) -> None:
    main = page.all("main")[0]
    warning = main.all("aside", "warning")[0]
    others = [child for child in main.children if isinstance(child, Element) and child.tag != "noscript"]
    assert others[0] is warning
    assert "1 broken and 1 tainted" in warning.text
    assert "missing or failed" in warning.text
    assert "build, affinity, alone: wall changed" in warning.text


def test_a_clean_experiment_has_no_warning(tmp_path: Path) -> None:
    beside = [{"metrics": {"rate": 50.0 + n % 3}, "verdict": "tainted", "reasons": ["others ran"]} for n in range(6)]
    values: dict[str, Any] = {"integer|affinity|alone": [100.0 + n % 3 for n in range(12)],
                              "integer|affinity|spinner|same-pcpu": beside}  # fmt: skip
    root = Reader(report(*analysed(experiments.write(tmp_path / "clean", values)))).root
    assert root.all("aside", "warning") == []
    words = " ".join(root.text.split())
    assert "the partition held in 12 runs (in 6 the aggressor shared the victim's pCPU, as planned), the runs" in words


def test_the_headline_is_the_largest_cost_with_its_interval(page: Element) -> None:
    lead = page.all("p", "lead")[0].text
    assert re.search(
        r"Beside  ?spinner  on its own pCPU, the latency p99 of  wakeup  \(affinity\) was  [0-9.]+  "
        r"\[[0-9.]+, [0-9.]+\]  times what it is alone; with it ",
        lead,
    ), lead


def test_more_than_one_aggressor_is_told(tmp_path: Path) -> None:
    values = {"integer|affinity|alone": [100.0 + n % 3 for n in range(20)],
              "integer|affinity|spinner|same-pcpu": [34.0 + n % 3 for n in range(10)],
              "integer|affinity|spinner|same-llc": [100.0 + n % 3 for n in range(10)]}  # fmt: skip
    _, found = analysed(experiments.write(tmp_path / "two", values))
    lead = re.sub("<[^>]*>", "", finding.headline(found, {"aggressors": [{"name": "spinner", "count": 2}]}))
    assert lead.startswith("Beside 2 × spinner on its own pCPU, integer reached 0.3")
    assert "of the rate that it has alone; with them on another core of the same cache, 1.0" in lead


def test_of_a_share_of_time_the_share_is_told(tmp_path: Path) -> None:
    values = {"noise|affinity|alone": [0.5 + n % 3 / 10 for n in range(20)],
              "noise|affinity|spinner|free": [33.0 + n % 3 for n in range(10)],
              "noise|affinity|spinner|other-node": [0.5 + n % 3 / 10 for n in range(10)]}  # fmt: skip
    _, found = analysed(experiments.write(tmp_path / "share", values))
    lead = re.sub("<[^>]*>", "", finding.headline(found, {}))
    told = re.match(
        r"Beside spinner left free to run anywhere, the time lost of noise was (\S+) \[(\S+), \S+\] %; "
        r"with it in another NUMA node, 0\.\d+ \[\S+ \S+\] %; alone, 0\.\d+ \[\S+, (\S+)\] %\.",
        lead,
    )
    assert told, lead
    assert float(told[2]) > 30
    assert float(told[3]) < 1


def test_where_nothing_is_worse_the_headline_says_so(tmp_path: Path) -> None:
    values = {"integer|affinity|alone": [100.0 + n % 3 for n in range(12)],
              "integer|affinity|spinner|same-llc": [100.0 + n % 3 for n in range(6)]}  # fmt: skip
    _, found = analysed(experiments.write(tmp_path / "same", values))
    assert "none of 1 condition made its rate worse" in finding.headline(found, {})


# -- a victim on several pCPUs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Results, dict[str, Any]]:
    """An experiment on a host of two kinds of core and two distances, and its analysis."""
    return analysed(experiments.hybrid(tmp_path_factory.mktemp("report") / "hybrid"))


def test_each_kind_of_core_is_compared_with_its_own_alone_runs(mixed: tuple[Results, dict[str, Any]]) -> None:
    results, found = mixed
    groups = finding.groups(found)
    assert [group.name for group in groups] == [
        f"{victim} on {kind} pCPU {pcpu}"
        for victim in ("integer", "wakeup")
        for kind, pcpu in (("performance", 2), ("efficiency", 5))
    ]
    styles = figures.Styles([one["placement"] for one in found["conditions"] if one["aggressor"]])
    medians = []
    for group in groups[:2]:
        assert group.alone is not None
        assert group.alones == [group.alone]
        assert {one["victim_pcpu"] for one in group.every} == {group.alone["victim_pcpu"]}
        medians.append(group.alone["metrics"]["rate"]["median"])
        drawn = figures.processes(group, styles, "x")
        assert drawn is not None
        [line] = drawn[1].figure["layout"]["shapes"]
        assert line["x0"] == drawn[1].figure["data"][1]["x"][0]
        steady = figures.drift(group, results.runs, "x")
        assert steady is not None
        assert len(steady[1].figure["data"][0]["x"]) == group.alone["done"]
    assert medians[1] < 0.6 * medians[0]


def test_a_page_names_the_pcpu_where_a_victim_has_several(mixed: tuple[Results, dict[str, Any]]) -> None:
    root = Reader(report(*mixed)).root
    for section in ("findings", "processes", "drift"):
        [part] = [one for one in root.all("section") if one.attributes["id"] == section]
        assert [one.text for one in part.all("h3")] == [group.name for group in finding.groups(mixed[1])]
    findings = " ".join(root.text.split())
    assert "integer on performance pCPU 2 reached 0.5" in findings
    assert "integer on efficiency pCPU 5 reached 0.4" in findings
    [table] = [one for one in root.all("table") if one.text.strip().startswith("Runs alone over time")]
    rows = [[cell.text for cell in row.walk() if cell.tag in ("th", "td")] for row in table.all("tr")[1:]]
    assert [(row[0], row[-1]) for row in rows] == [
        ("integer on performance pCPU 2, affinity", "steady"),
        ("integer on efficiency pCPU 5, affinity", "changed"),
        ("wakeup on performance pCPU 2, affinity", "steady"),
        ("wakeup on efficiency pCPU 5, affinity", "steady"),
    ]
    sentences = [one.attributes["aria-label"] for one in root.all("div", "plot")]
    assert len(sentences) == len(set(sentences))
    assert all("pCPU 2" in one or "pCPU 5" in one for one in sentences)


def test_where_a_victim_has_one_pcpu_it_is_not_named(example: tuple[Results, dict[str, Any]]) -> None:
    assert {group.name for group in finding.groups(example[1])} == {"integer", "wakeup", "build"}


def test_without_kinds_the_pcpus_number_tells_the_groups_apart(example: tuple[Results, dict[str, Any]]) -> None:
    found = copy.deepcopy(example[1])
    for one in found["conditions"]:
        one["victim_pcpu"] = 3 if one["aggressor"] else 2
    names = [group.name for group in finding.groups(found) if group.victim == "build"]
    assert names == ["build on pCPU 2", "build on pCPU 3"] * 2


def test_placements_of_several_kinds_and_distances_have_names_that_differ(
    mixed: tuple[Results, dict[str, Any]],
) -> None:
    group = finding.groups(mixed[1])[0]
    matrix, drawn = figures.matrix(group, "x"), figures.processes(group, figures.Styles(group.placements), "x")
    assert matrix is not None
    assert drawn is not None
    for plot in (matrix, drawn[1]):
        names = plot.figure["layout"]["yaxis"]["ticktext"]
        assert len(set(names)) == len(names)
        assert not [name for name in names if "…" in name]
    wakeup = finding.groups(mixed[1])[2]
    [(_, plot)] = figures.distributions(wakeup, figures.Styles(wakeup.placements), "x")
    assert [trace["name"] for trace in plot.figure["data"]] == ["alone", *map(finding.short, wakeup.placements)]


def test_a_placement_looks_the_same_for_a_victim_on_either_kind_of_core() -> None:
    styles = figures.Styles(["performance/free", "performance/sibling", "efficiency/free", "efficiency/same-llc"])
    for look in (styles.colour, styles.symbol, lambda name: str(styles.line(name))):
        assert look("performance/free") == look("efficiency/free") != look("performance/alone")
        assert look("performance/alone") == look("alone")


@pytest.mark.parametrize(
    ("placement", "kind", "short", "words"),
    [
        ("same-llc", "", "same-llc", "on another core of the same cache"),
        ("performance/same-pcpu", "performance", "same-pcpu", "on its own pCPU"),
        (
            "efficiency/same-llc/performance",
            "efficiency",
            "same-llc/performance",
            "on another core of the same cache (same-llc/performance)",
        ),
        ("other-package-at-32", "", "other-package-at-32", "in another package (other-package-at-32)"),
        ("performance/alone", "performance", "alone", "at performance/alone"),
        ("odd/one", "", "odd/one", "at odd/one"),
    ],
    ids=str,
)
def test_a_placements_name_is_taken_apart(placement: str, kind: str, short: str, words: str) -> None:
    assert (finding.kind(placement), finding.short(placement), finding.where(placement)) == (kind, short, words)


def test_two_hybrid_hosts_are_compared_kind_by_kind(mixed: tuple[Results, dict[str, Any]]) -> None:
    root = Reader(compare([mixed, mixed])).root
    [ratios, alone] = [one for one in root.all("section") if one.attributes["id"] in ("ratios", "alone")]
    names = [
        f"{victim} ({kind} core), affinity"
        for victim in ("integer", "wakeup")
        for kind in ("performance", "efficiency")
    ]
    assert [one.text for one in ratios.all("h3")] == names
    assert [row.all("th")[0].text for row in alone.all("tbody")[0].all("tr")] == names
    assert len(ratios.all("div", "plot")) == 4


# -- data stays data ---------------------------------------------------------------------------------------


def _poisoned(value: Any) -> Any:
    if isinstance(value, str):
        return f"{value}{HOSTILE}"
    if isinstance(value, list):
        return [_poisoned(one) for one in value]
    return {key: _poisoned(one) for key, one in value.items()} if isinstance(value, dict) else value


def hostile(results: Results, found: dict[str, Any]) -> tuple[Results, dict[str, Any]]:
    """Return both with markup behind every name, reason and fact."""
    words = ("victim", "aggressor", "placement", "reasons", "isolation")
    found = copy.deepcopy(found)
    found["name"] += HOSTILE
    for one in found["conditions"]:
        one.update({name: _poisoned(one[name]) for name in words if one[name] is not None})
        metrics = {f"{name}{HOSTILE}": _poisoned(metric) for name, metric in one["metrics"].items()}
        for metric in metrics.values():
            metric["better"] = metric["better"].removesuffix(HOSTILE)
        one["metrics"], one["primary"] = metrics, _poisoned(one["primary"])
        for kind in ("histograms", "series"):
            one[kind] = {f"{name}{HOSTILE}": _poisoned(part) for name, part in one[kind].items()}
    found.update({name: _poisoned(found[name]) for name in ("warnings", "drift", "missing", "method")})
    session = _poisoned(results.sessions[0])
    session["facts"]["topology"] = results.sessions[0]["facts"]["topology"]
    session["facts"]["governor"] = {"0": HOSTILE}
    runs = tuple(
        {**run, "error": _poisoned(run["error"]), "started": _poisoned(run["started"])} for run in results.runs
    )
    return results.replace(sessions=(session,), runs=runs), found


def test_no_text_from_data_becomes_markup(example: tuple[Results, dict[str, Any]], text: str) -> None:
    root = Reader(report(*hostile(*example))).root
    tags = {one.tag for one in root.walk()}
    assert "img" not in tags
    assert len(root.all("script")) >= len(Reader(text).root.all("script")) - 6
    assert not [one for one in root.walk() if any(name.startswith("on") for name in one.attributes)]
    assert HOSTILE in root.text
    other = Reader(compare([hostile(*example), example])).root
    assert "img" not in {one.tag for one in other.walk()}


def test_plotly_is_given_no_markup_from_data(example: tuple[Results, dict[str, Any]]) -> None:
    # Of its own it has these only; and it decodes entities, so an escaped one is text.
    allowed = re.compile(r"</?b>|<br>|</?extra>|</?span( style='font-size:11px')?>")
    root = Reader(report(*hostile(*example))).root
    for script in root.all("script"):
        if "data-plot" in script.attributes:
            words = str(script.children[0]).replace("\\u003c", "<").replace("\\u003e", ">")
            assert "<" not in str(script.children[0])
            assert "<" not in allowed.sub("", words)
            assert "<b>bold" not in words


@pytest.mark.parametrize("text_", ["\x00\x1b[2J", "\u202eevil", "\ud800"], ids=["control", "direction", "surrogate"])
def test_what_cannot_be_seen_is_shown_as_an_escape(text_: str) -> None:
    made = markup.element("p", text_, title=text_)
    assert made.encode()
    assert text_ not in made


def test_the_same_input_gives_the_same_page(example: tuple[Results, dict[str, Any]], text: str) -> None:
    assert report(*copy.deepcopy(example)) == text


def test_a_page_is_one_file_of_bearable_size_that_loads_nothing(text: str, page: Element) -> None:
    assert len(text.encode()) < 6_000_000
    for one in page.walk():
        assert "src" not in one.attributes
        assert one.tag not in ("link", "iframe", "object", "embed", "base")
        assert one.attributes.get("href", "#").startswith("#")
    assert "url(" not in STYLE
    assert "@import" not in STYLE
    policy = next(one for one in page.all("meta") if "http-equiv" in one.attributes).attributes["content"]
    assert policy.startswith("default-src 'none';")
    assert len(re.findall("'sha256-", policy)) == 2
    assert "connect-src" not in policy


def test_a_page_without_pictures_has_no_script(tmp_path: Path) -> None:
    root = Reader(report(*analysed(experiments.write(tmp_path / "none", {"integer|affinity|alone": [None]})))).root
    assert root.all("script") == []


# -- half an experiment ------------------------------------------------------------------------------------


def test_an_experiment_that_has_only_begun_says_what_is_missing(tmp_path: Path) -> None:
    values: dict[str, list[Any]] = {
        "integer|affinity|alone": [1.0, None, None, None],
        "integer|affinity|spinner|sibling": [None, None],
    }
    directory = experiments.write(tmp_path / "killed", values)
    (directory / "sessions.jsonl").unlink()
    with (directory / "runs.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"schema":1,"run":')
    words = Reader(report(*analysed(directory))).root.text
    assert "Nothing can be compared yet" in words
    assert "5 of 6 planned runs are missing or failed" in words
    assert "no start was noted" in words
    assert "1 line could not be read" in words
    assert "no topology was kept" in words


@pytest.mark.parametrize("fact", experiments.FACTS)
def test_each_fact_may_be_unknown(fact: str) -> None:
    rows = dict(facts.rows({"facts": {**experiments.FACTS, fact: None}}))
    known = dict(facts.rows({"facts": experiments.FACTS}))
    assert list(rows) == list(known)
    changed = [rows[label] for label in rows if rows[label] != known[label]]
    assert set(changed) <= {facts.UNKNOWN, "none reported"}


@pytest.mark.parametrize("fact", ["all", "inside"])
def test_a_fact_that_is_not_known_is_said_to_be_so(example: tuple[Results, dict[str, Any]], fact: str) -> None:
    results, found = example
    session = copy.deepcopy(results.sessions[0])
    if fact == "all":
        session = {"schema": 1, "session": 0, "facts": dict.fromkeys(session["facts"])}
    else:
        session["facts"] = {
            name: dict.fromkeys(value) if isinstance(value, dict) else value for name, value in session["facts"].items()
        }
    root = Reader(report(results.replace(sessions=(session,)), found)).root
    assert facts.UNKNOWN in root.text or "none reported" in root.text or "no topology" in root.text


def test_a_command_without_record_has_its_wall_time(tmp_path: Path) -> None:
    values = {"build|affinity|alone": [3.0 + n / 100 for n in range(12)],
              "build|affinity|spinner|same-pcpu": [6.0 + n / 100 for n in range(6)]}  # fmt: skip
    words = Reader(report(*analysed(experiments.write(tmp_path / "wall", values)))).root.text
    assert "wall time of  build  was" in words
    assert "No histogram was kept of: build." in words
    assert "No time series was kept of: build." in words


def test_too_few_runs_have_no_interval_and_are_shown(tmp_path: Path) -> None:
    values = {"integer|affinity|alone": [100.0, 101.0], "integer|affinity|spinner|sibling": [60.0]}
    words = Reader(report(*analysed(experiments.write(tmp_path / "few", values)))).root.text
    assert "no interval" in words


def test_a_ratio_of_nothing_or_to_nothing_is_no_mistake(tmp_path: Path) -> None:
    for name, alone, beside in (("to", 0.0, 5.0), ("of", 5.0, 0.0)):
        values = {"integer|affinity|alone": [alone] * 12, "integer|affinity|spinner|sibling": [beside] * 6}
        root = Reader(report(*analysed(experiments.write(tmp_path / name, values)))).root
        assert len(root.all("h1")) == 1


@pytest.mark.parametrize("seed", range(6))
def test_whatever_is_not_known_the_page_stands(example: tuple[Results, dict[str, Any]], seed: int) -> None:
    rng = random.Random(seed)
    results, found = example
    found = copy.deepcopy(found)
    for one in found["conditions"]:
        for metric in one["metrics"].values():
            for name in ("ratio", "ci"):
                metric[name] = rng.choice([metric[name], None])
            if metric["ratio"]:
                name = rng.choice(["ci", "p", "p_holm", "value", "value"])
                metric["ratio"][name] = rng.choice([metric["ratio"][name], None, 0.0 if name == "value" else None])
            if rng.random() < 0.1:
                metric.update({"n": 0, "values": [], "median": None, "min": None, "max": None, "ci": None})
        for histogram in one["histograms"].values():
            histogram[rng.choice(["p50", "p99", "p99_9", "max"])] = None
            histogram["buckets"] = rng.choice([histogram["buckets"], []])
        for series in one["series"].values():
            series["values"] = [rng.choice([value, None]) for value in series["values"]]
        if rng.random() < 0.5:
            empty: dict[str, Any] = {"metrics": {}, "histograms": {}, "series": {}, "primary": None, "reasons": []}
            name = rng.choice(list(empty))
            one[name] = empty[name]
        one["aggressor_pcpus"] = rng.choice([one["aggressor_pcpus"], None])
    found["conditions"] = rng.sample(found["conditions"], rng.randrange(len(found["conditions"])))
    root = Reader(report(results, found)).root
    assert len(root.all("h1")) == 1
    assert Reader(compare([(results, found), example])).root.all("main")


ODD = [None, math.inf, -math.inf, math.nan, 10**400, "x", "", [], {}, True, -1, [1], {"a": 1}, 1e308, 0]


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    # Every place in a document that a value can be put into; of long lists, only the first ones.
    those = list(value.items()) if isinstance(value, dict) else list(enumerate(value[:3]))
    for key, one in those:
        yield value, key
        if isinstance(one, (dict, list)):
            yield from _places(one)


@pytest.mark.parametrize("kind", ["runs", "sessions"])
@pytest.mark.parametrize("seed", range(4))
def test_whatever_is_in_the_lines_the_page_stands(
    example: tuple[Results, dict[str, Any]], kind: str, seed: int
) -> None:
    rng = random.Random(seed)
    lines = copy.deepcopy(getattr(example[0], kind))
    for line in lines if kind == "sessions" else rng.sample(lines, 60):
        for top in rng.sample(sorted(set(line) - {"run"}), 3):
            inside = line[top]
            places = [(line, top), *(_places(inside) if isinstance(inside, (dict, list)) else [])]
            holder, key = rng.choice(places)
            holder[key] = rng.choice(ODD)
    results = example[0].replace(**{kind: lines})
    found = analysis.analyse(results, resamples=199)
    json.dumps(found, allow_nan=False)
    assert summary(found)
    root = Reader(report(results, found)).root
    assert len(root.all("h1")) == 1
    assert Reader(compare([(results, found), example])).root.all("main")


def test_a_number_that_is_not_finite_counts_as_not_known(tmp_path: Path, place: Place) -> None:
    values = {"integer|affinity|alone": [100.0 + n % 3 for n in range(12)],
              "integer|affinity|spinner|sibling": [60.0 + n % 3 for n in range(6)]}  # fmt: skip
    directory = experiments.write(tmp_path / "x", values)
    lines = (directory / "runs.jsonl").read_text().splitlines()
    for number, condition in ((0, "integer|affinity|alone"), (1, "integer|affinity|spinner|sibling")):
        where = [at for at, line in enumerate(lines) if json.loads(line)["condition"] == condition][number]
        lines[where] = re.sub(r'"rate": {"value": [0-9.]+', '"rate": {"value": 1e999', lines[where])
        assert json.loads(lines[where])["metrics"]["rate"]["value"] == math.inf
    (directory / "runs.jsonl").write_text("".join(f"{line}\n" for line in lines))
    facts = (directory / "sessions.jsonl").read_text().replace("68719476736", "1e999").replace("2400000", "1e999")
    (directory / "sessions.jsonl").write_text(
        facts.replace('"steal_percent_since_boot": 0.0', '"steal_percent_since_boot": NaN')
    )
    done = place.run("report", str(directory))
    assert (done.returncode, done.stderr) == (0, "")
    words = Reader((directory / "report.html").read_text(encoding="utf-8")).root.text
    assert "rate (1/s) is of 11 runs only: 1 have no finite number for it" in words
    assert "rate (1/s) is of 5 runs only: 1 have no finite number for it" in words
    assert "0.80 to not known GHz" in words
    assert "of unknown size" in words
    results, found = analysed(directory)
    drawn = figures.drift(finding.groups(found)[0], results.runs, "x")
    assert drawn is not None
    assert len(drawn[1].figure["data"][0]["y"]) == 11


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 10**400], ids=["inf", "-inf", "nan", "huge"])
def test_what_is_no_finite_number_is_told_as_not_known(value: float) -> None:
    assert quantity.number(value) == "not known"


def test_cores_of_any_number_are_on_the_map() -> None:
    host = topology(4)
    for one in host["pcpus"]:
        one["core"] += 10**400 * (one["cpu"] % 2)
    assert f"{10**400 + 1}" in hostmap.draw(host, None, [], "map")


# -- the host's map ----------------------------------------------------------------------------------------


def topology(pcpus: int, **fields: Any) -> dict[str, Any]:
    """Return a host of two threads a core, eight cores a cache, two caches a node, a node a package."""
    cores = max(pcpus // 2, 1)
    made = [
        {
            "cpu": cpu,
            "core": cpu % cores,
            "package": cpu % cores // 16,
            "die": None,
            "numa": cpu % cores // 16,
            "llc": cpu % cores // 8,
            "online": True,
            "apic_id": None,
            "acpi_uid": None,
            "kind": None,
            **fields,
        }
        for cpu in range(pcpus)
    ]
    return {"schema": 1, "source": {"root": "/", "madt": False}, "usable": f"0-{pcpus - 1}", "pcpus": made}


def _seat(placement: str, pcpus: str | None, victim: int = 0) -> dict[str, Any]:
    return {
        "victim_pcpu": victim,
        "aggressor": "spinner",
        "placement": placement,
        "aggressor_pcpus": pcpus,
        "as": "host",
    }


@pytest.mark.parametrize("pcpus", [1, 2, 8, 256])
def test_every_pcpu_is_on_the_map_once(pcpus: int) -> None:
    seats = [_seat("same-pcpu", "0"), _seat("other-package", f"{pcpus - 1}"), _seat("free", None)]
    root = Reader(hostmap.draw(topology(pcpus), None, seats, "map")).root
    cells = [int(one.text) for one in root.all("span", "pcpu")]
    assert sorted(cells) == list(range(pcpus))
    assert len(root.all("span", "seat")) == 1
    assert root.all("div", "map")[0].attributes["aria-label"].startswith(f"Map of the host: {pcpus} pCPU")


def test_what_is_not_known_has_no_box() -> None:
    unknown = topology(4, core=None, package=None, numa=None, llc=None)
    root = Reader(hostmap.draw(unknown, None, [], "map")).root
    assert len(root.all("div", "core")) == 4
    assert root.all("div", "package") == []


def test_offline_pcpus_are_in_a_box_of_their_own() -> None:
    host = topology(4)
    host["usable"] = "0-2"
    host["pcpus"][3].update({"online": False, "core": None, "package": None, "numa": None, "llc": None})
    root = Reader(hostmap.draw(host, None, [_seat("sibling", "2")], "map")).root
    assert [one.text for one in root.all("div", "offline")[0].all("span", "pcpu")] == ["3"]


def test_a_cache_is_named_by_level_and_size() -> None:
    caches = [{"level": 3, "type": "Unified", "size_bytes": 32 << 20, "cpus": "0-7"}]
    assert "L3 32 MiB" in hostmap.draw(topology(8), caches, [], "map")


def test_nodes_that_cross_packages_are_left_out_rather_than_drawn_wrong() -> None:
    host = topology(8)
    for one in host["pcpus"]:
        one.update({"package": one["cpu"] // 4, "numa": one["cpu"] % 2, "llc": None, "core": one["cpu"]})
    root = Reader(hostmap.draw(host, None, [], "map")).root
    assert sorted(int(one.text) for one in root.all("span", "pcpu")) == list(range(8))


@pytest.mark.parametrize("wrong", [None, {}, [], "x", {"schema": 1, "pcpus": [{}]}], ids=str)
def test_a_topology_that_is_none_is_said_to_be_missing(wrong: object) -> None:
    assert "no topology was kept" in hostmap.draw(wrong, "x", [], "map")


# -- colours -----------------------------------------------------------------------------------------------

TEXTS = [
    ("ink", "paper"), ("ink", "soft"), ("muted", "paper"), ("muted", "soft"), ("link", "paper"),
    ("warn-ink", "warn-paper"), ("good-ink", "good-paper"), ("victim-ink", "victim"), ("mark-ink", "mark"),
]  # fmt: skip


def themes() -> dict[str, dict[str, str]]:
    """Return the style sheet's colours by theme."""
    light, dark = re.findall(r":root \{([^}]*)\}", STYLE)
    found = {
        name: dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6});", part))
        for name, part in (("light", light), ("dark", dark))
    }
    return {"light": found["light"], "dark": found["light"] | found["dark"]}


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize(("ink", "paper"), TEXTS, ids=lambda name: name)
def test_text_can_be_read_in_both_themes(theme: str, ink: str, paper: str) -> None:
    colours = themes()[theme]
    assert figures.contrast(colours[ink], colours[paper]) >= 4.5


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("colour", [*figures.COLOURS, figures.ALONE])
def test_lines_and_marks_stand_out_in_both_themes(theme: str, colour: str) -> None:
    assert figures.contrast(colour, themes()[theme]["paper"]) >= 3


def test_the_numbers_in_a_heat_map_can_be_read_on_every_colour() -> None:
    for step in range(-40, 41):
        colour = figures.heat(step / 20)
        assert max(figures.contrast(colour, ink) for ink in ("#000000", "#ffffff")) >= 4.5


def test_black_and_white_have_the_contrast_of_the_standard() -> None:
    assert figures.contrast("#000000", "#ffffff") == pytest.approx(21)
    assert figures.contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


def test_placements_differ_without_their_colours() -> None:
    styles = figures.Styles([str(number) for number in range(6)])
    lines = {(styles.line(str(number))["dash"], styles.symbol(str(number))) for number in range(6)}
    assert len(lines) == 6


# -- figures -----------------------------------------------------------------------------------------------


def test_the_percentiles_drawn_are_those_of_the_histogram(example: tuple[Results, dict[str, Any]]) -> None:
    _, found = example
    group = next(one for one in finding.groups(found) if one.victim == "wakeup")
    [(_, plot)] = figures.distributions(group, figures.Styles(group.placements), "x")
    for trace, one in zip(plot.figure["data"], group.every, strict=True):
        histogram = one["histograms"]["latency"]
        assert trace["y"][-1] == histogram["max"]
        assert list(trace["x"]) == sorted(trace["x"])
        assert list(trace["y"]) == sorted(trace["y"])
        beyond = [y for x, y in zip(trace["x"], trace["y"], strict=True) if x >= 100]
        assert beyond[0] == pytest.approx(histogram["p99"], rel=0.08)


def test_a_long_series_keeps_its_spikes() -> None:
    values: list[float | None] = [1.0] * 50_000
    values[31_337], values[40_000] = 99.0, None
    times, drawn = figures._thinned([float(n) for n in range(50_000)], values)
    assert len(drawn) <= 800
    assert (31_337.0, 99.0) in list(zip(times, drawn, strict=True))
    assert times == sorted(times)


def test_a_heat_map_has_a_cell_for_each_planned_condition(example: tuple[Results, dict[str, Any]]) -> None:
    group = finding.groups(example[1])[0]
    plot = figures.matrix(group, "x")
    assert plot is not None
    assert len(plot.figure["layout"]["annotations"]) == len(group.conditions)
    assert all("[" in note["text"] for note in plot.figure["layout"]["annotations"])


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (1_210_000, "1/s", "1.21 M/s"), (12_800, "ns", "12.8 µs"), (3.1, "s", "3.1 s"), (0.0312, "s", "31.2 ms"),
        (0, "ns", "0 s"), (12_300_000_000, "B/s", "12.3 GB/s"), (7, "1", "7"), (1.5, "%", "1.5 %"),
        (123_456, "widgets", "123,456 widgets"), (-2, "s", "−2 s"), (90, "s", "90 s"),
    ],
)  # fmt: skip
def test_a_value_is_told_in_a_unit_that_suits_it(value: float, unit: str, expected: str) -> None:
    assert quantity.span(value, unit) == expected


@pytest.mark.parametrize(
    ("value", "ci", "expected"),
    [
        (0.34, [0.33, 0.35], ("0.34", "[0.33, 0.35]")), (1.0, [0.99, 1.01], ("1.00", "[0.99, 1.01]")),
        (1.0, [0.9987, 1.0012], ("1.000", "[0.999, 1.001]")), (28.24, [23.0, 33.3], ("28.2", "[23.0, 33.3]")),
        (0.34, None, ("0.34", "no interval")), (1.0, [1.0, 1.0], ("1.00", "[1.00, 1.00]")),
        (412.3, [390.0, 430.0], ("412", "[390, 430]")), (0.021, [0.020, 0.022], ("0.021", "[0.020, 0.022]")),
    ],
)  # fmt: skip
def test_a_ratio_has_the_digits_that_its_interval_allows(
    value: float, ci: list[float] | None, expected: tuple[str, str]
) -> None:
    assert quantity.ratio(value, ci) == expected


# -- side by side ------------------------------------------------------------------------------------------


def test_what_differs_comes_first_and_only_that(both: Element) -> None:
    first = both.all("section")[0]
    labels = [row.all("th")[0].text for row in first.all("tbody")[0].all("tr")]
    assert labels == ["kernel", "SMT", "seed of the order"]
    assert "6.12.90" in first.text
    assert "6.1.0" in first.text


def test_both_ratios_stand_side_by_side_with_their_intervals(both: Element) -> None:
    rows = both.all("section")[1].all("tbody")[0].all("tr")
    for row in rows:
        cells = [cell.text for cell in row.all("td")]
        assert all(re.fullmatch(r"[0-9.]+ \[[0-9.]+, [0-9.]+\]", cell) for cell in cells[:2])
        assert cells[2] in ("overlap", "apart")


def test_three_that_have_not_the_same_conditions_can_be_compared(tmp_path: Path) -> None:
    plans: list[dict[str, Any]] = [
        {"integer|affinity|alone": [100.0 + n % 3 for n in range(12)],
         "integer|affinity|spinner|sibling": [60.0 + n % 3 for n in range(6)]},
        {"integer|affinity|alone": [100.0 + n % 3 for n in range(12)],
         "integer|affinity|thrash|sibling": [30.0 + n % 3 for n in range(6)]},
        {"memory|affinity|alone": [None]},
    ]  # fmt: skip
    those = [analysed(experiments.write(tmp_path / f"{place}", plan)) for place, plan in enumerate(plans)]
    words = Reader(compare(those)).root.text
    assert "not planned" in words
    assert "thrash, sibling" in words


# -- the command -------------------------------------------------------------------------------------------


def test_the_command_writes_the_page_and_prints_its_name(tmp_path: Path, place: Place) -> None:
    for name in ("a", "b"):
        values = {"integer|affinity|alone": [100.0] * 6, "integer|affinity|spinner|sibling": [60.0] * 6}
        experiments.write(tmp_path / name, values)
    done = place.run("report", str(tmp_path / "a"), str(tmp_path / "b"))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [str(tmp_path / name / "report.html") for name in ("a", "b")]
    assert (tmp_path / "a/report.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    out = tmp_path / "both.html"
    done = place.run("report", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), "-o", str(out))
    assert (done.returncode, done.stdout) == (0, f"{out}\n")
    assert "compared" in out.read_text(encoding="utf-8")
    done = place.run("report", "--compare", str(tmp_path / "a"), str(tmp_path / "b"), cwd=str(tmp_path))
    assert done.stdout == "report-compare.html\n"
    assert not list(tmp_path.rglob("*.new"))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{here}/none"], "name a directory that 'hostpart experiment' wrote"),
        (["{here}/a", "--compare"], "--compare needs two directories"),
        (["{here}/a", "{here}/a", "-o", "x"], "one file for several reports"),
    ],
    ids=["no experiment", "one to compare", "one file for two"],
)
def test_what_cannot_be_meant_is_refused(tmp_path: Path, place: Place, arguments: list[str], words: str) -> None:
    experiments.write(tmp_path / "a", {"integer|affinity|alone": [100.0]})
    done = place.run("report", *(one.replace("{here}", str(tmp_path)) for one in arguments))
    assert (done.returncode, done.stdout) == (2, "")
    assert words in done.stderr


def test_a_file_that_cannot_be_written_is_a_failure(tmp_path: Path, place: Place) -> None:
    experiments.write(tmp_path / "a", {"integer|affinity|alone": [100.0]})
    done = place.run("report", str(tmp_path / "a"), "-o", str(tmp_path / "not/there.html"))
    assert (done.returncode, done.stdout) == (1, "")
    assert "cannot be written" in done.stderr


def test_half_a_page_is_not_left_behind(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    write(str(path), "first")
    with pytest.raises(UnicodeEncodeError):
        write(str(path), f"{'second' * 9999}\ud800")
    (tmp_path / "directory").mkdir()
    with pytest.raises(Failed, match="cannot be written: Is a directory"):
        write(str(tmp_path / "directory"), "third")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["directory", "report.html"]
    assert path.read_text() == "first"


def test_the_command_line_needs_none_of_the_extra() -> None:
    code = (
        "import sys; import hostpart.cli.report, hostpart.report.page, hostpart.report.comparison; "
        "print([name for name in ('numpy', 'plotly', 'scipy', 'hdrh', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
