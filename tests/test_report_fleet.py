"""The report of an experiment on many hosts: what is told first, who is named, what is missing, and how many fit."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from hostpart.cli.report import write_fleet
from hostpart.errors import UsageError
from hostpart.experiment import analysis, results
from hostpart.experiment.analysis import analyse
from hostpart.fleet.journal import Journal
from tests import experiments
from tests.conftest import Place
from tests.fleet_results import DOCUMENT, three, values, write

HOSTILE = "<img src=x onerror=alert(1)>\x1b[31m\u202e</script><b>"
_FOLDER = Path(analysis.__file__).parent


class _Text(HTMLParser):
    # What is read: no scripts, no styles.

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")
        self.ids += [value or "" for name, value in attrs if name == "id"]

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def _read(page: str) -> tuple[str, list[str]]:
    parser = _Text()
    parser.feed(page)
    return re.sub(r"\s+", " ", " ".join(parser.parts)).replace(" ,", ",").replace(" .", "."), parser.ids


def _page(directory: Path) -> str:
    return Path(write_fleet(str(directory))).read_text()


def _words(directory: Path) -> str:
    return _read(_page(directory))[0]


def _with(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {"facts": facts}


def _kernel(release: str) -> dict[str, Any]:
    return {"kernel": {**experiments.FACTS["kernel"], "release": release}}


@pytest.fixture(scope="module")
def slowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An experiment on three hosts of which one is slowed by 30 %."""
    return three(tmp_path_factory.mktemp("fleet") / "three")


def test_the_slowed_host_is_named_before_any_figure(slowed: Path) -> None:
    words = _words(slowed)
    named = re.search(
        r"Host gamma stands out: integer alone \(affinity\) is 0\.(69|70|71) of the others' median", words
    )
    assert named
    assert named.start() < words.index("All hosts together")
    assert "alpha stands out" not in words
    assert "beta stands out" not in words


def test_the_command_recognises_a_fleets_directory_and_keeps_the_analysis(slowed: Path, place: Place) -> None:
    done = place.run("report", str(slowed))
    assert (done.returncode, done.stdout) == (0, f"{slowed}/report.html\n"), done.stderr
    kept = json.loads((slowed / "analysis.json").read_text())
    assert list(kept) == ["schema", "hosts", "pooled"]
    assert list(kept["hosts"]) == ["alpha", "beta", "gamma"]
    for name, document in (("pooled", kept["pooled"]), *(("analysis", one) for one in kept["hosts"].values())):
        schema = json.loads((_FOLDER / f"{name}.schema.json").read_text())
        jsonschema.Draft202012Validator(schema).validate(document)
    assert [one["host"] for one in kept["pooled"]["outliers"]] == ["gamma"]


def test_another_file_can_be_named_and_a_comparison_is_refused(slowed: Path, tmp_path: Path, place: Place) -> None:
    done = place.run("report", str(slowed), "-o", str(tmp_path / "mine.html"))
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/mine.html\n"), done.stderr
    experiments.write(tmp_path / "one", values(1))
    done = place.run("report", str(slowed), str(tmp_path / "one"), "--compare")
    assert (done.returncode, done.stdout) == (2, "")
    assert "many hosts" in done.stderr
    done = place.run("report", str(slowed), str(tmp_path / "one"))
    assert done.stdout.splitlines() == [f"{slowed}/report.html", f"{tmp_path}/one/report.html"]


def test_the_same_input_gives_the_same_page(slowed: Path) -> None:
    assert _page(slowed) == _page(slowed)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (_kernel("6.1.0-18"), "kernel : 6.12.90 on alpha and gamma; 6.1.0-18 on beta"),
        (
            {"cpu": {**experiments.FACTS["cpu"], "microcode": "0x2b"}},
            "microcode : 0xd0003a5 on alpha and gamma; 0x2b on",
        ),
        ({"smt": {"active": False, "control": "off"}}, "SMT : on (control: on) on alpha and gamma; off (control: off)"),
        ({"governor": {"0": "powersave"}}, "governor : performance on alpha and gamma; powersave on beta"),
        ({"hypervisor": "kvm"}, "hypervisor : none reported on alpha and gamma; kvm on beta"),
        (
            {"cpu": {**experiments.FACTS["cpu"], "model": "Other"}},
            "processor : Example CPU 2.40GHz on alpha and gamma;",
        ),
        (
            {"versions": {**experiments.FACTS["versions"], "hostpart": "0.1.0"}},
            "hostpart : 0.2.0 on alpha and gamma; 0.1.0",
        ),
        (
            {"versions": {**experiments.FACTS["versions"], "numba": "0.61"}},
            "numba : not there on alpha and gamma; 0.61",
        ),
    ],
    ids=["kernel", "microcode", "smt", "governor", "hypervisor", "processor", "hostpart", "numba"],
)
def test_what_makes_hosts_incomparable_is_told_before_all_else(
    tmp_path: Path, changes: Mapping[str, Any], said: str
) -> None:
    hosts = {"alpha": values(1), "beta": values(2), "gamma": values(3, 0.7)}
    words = _words(write(tmp_path / "one", hosts, about={"beta": _with(changes)}))
    told = words.index("These differences make the hosts hard to compare")
    assert said.replace(" :", ":") in words.replace(" :", ":").replace(" ;", ";")
    assert told < words.index("gamma stands out") < words.index("All hosts together")


def test_hosts_that_are_alike_are_said_to_be(slowed: Path) -> None:
    words = _words(slowed)
    assert "These hosts can be compared: kernel, microcode, SMT, governor, hypervisor, processor" in words
    assert "hard to compare" not in words


def test_another_design_is_told(tmp_path: Path) -> None:
    hosts = {name: values(seed) for seed, name in enumerate("abc")}
    del hosts["c"]["integer|affinity|thrash|same-llc"], hosts["c"]["compile|affinity|thrash|same-llc"]
    assert re.search("design ?: that on c is not that on a", _words(write(tmp_path / "one", hosts)))


@pytest.mark.parametrize(("skew", "told"), [(0.9, False), (-0.9, False), (1.2, True), (-3.0, True)])
def test_clocks_more_than_a_second_apart_are_told(tmp_path: Path, skew: float, told: bool) -> None:
    hosts = {name: values(seed) for seed, name in enumerate("ab")}
    words = _words(write(tmp_path / "one", hosts, about={"a": {"skew_s": 0.0}, "b": {"skew_s": skew}}))
    assert ("clocks are up to" in words) is told
    if told:
        ahead, behind = ("b", "a") if skew > 0 else ("a", "b")
        assert f"{abs(skew)} s apart: that of {ahead} is ahead of that of {behind}" in words


def test_a_host_without_runs_and_one_with_part_of_them_are_named(tmp_path: Path) -> None:
    part = {
        name: [value if place < 3 else None for place, value in enumerate(held)] for name, held in values(3).items()
    }
    hosts = {"alpha": values(1), "beta": values(2), "half": part, "lost": None}
    there = write(tmp_path / "one", hosts)
    words = _words(there)
    assert "Without any run: lost." in words
    assert "With only part of the runs: half (30 of 72)." in words
    missing = words[words.index("What is missing") :]
    assert "it was chosen and never said anything" in missing
    assert re.search(r"half 72 30 .*9 runs not made", missing)
    assert "lost : no run" in words
    assert "facts : not known of lost" in words


def test_why_a_host_has_no_runs_is_told(tmp_path: Path) -> None:
    there = write(tmp_path / "one", {"alpha": values(1), "beta": values(2)})
    journal = Journal(str(there))
    error = {"exit_code": 3, "problem": "2 pCPUs wanted, none free", "remedy": "wait"}
    journal.host("gamma", hello={"version": "0.2.0"}, skew_s=0.0)
    state = {"id": "x.9", "state": "refused", "host": "gamma", "status": 3, "error": error, "notes": []}
    journal.line("gamma", "outcome", request="x.9", state=state)
    journal.close()
    words = _words(there)
    assert "x.9 refused: 2 pCPUs wanted, none free (wait)" in words
    assert "it told of no experiment" in words


@pytest.mark.parametrize("many", [0, 1, 2, 3, 12, 100])
def test_any_number_of_hosts_has_a_page(tmp_path: Path, many: int) -> None:
    hosts = {f"node-{number:03}": values(number % 7, 0.7 if number == 2 else 1.0) for number in range(many)}
    page = _page(write(tmp_path / "one", hosts))
    words, ids = _read(page)
    assert len(ids) == len(set(ids))
    assert [one for one in ids if re.fullmatch(r"host-\d+", one)] == [f"host-{number}" for number in range(many)]
    assert ("node-002 stands out" in words) == (many > 2)
    assert len(re.findall(r'<details[^>]*class="host"', page)) == (many if many > 3 else 0)
    # Each has its map; of many that are the same, it is there once.
    maps = [one for one in ids if one.startswith("map-")]
    assert len(maps) == (many if many <= 12 else 1)
    assert len(page) < 12_000_000
    for one in re.findall(r'href="#([^"]+)"', page):
        assert one in ids


def test_two_hosts_are_pooled_with_the_warning_that_they_are_two(tmp_path: Path) -> None:
    words = _words(write(tmp_path / "one", {"a": values(1), "b": values(2)}))
    assert "Two hosts say next to nothing of others" in words
    assert "Of fewer than three hosts, none can be said to be the one that is off" in words


def test_markup_and_control_characters_are_shown_and_do_nothing(tmp_path: Path) -> None:
    cpu = {**experiments.FACTS["cpu"], "model": HOSTILE, "microcode": ["\ud800", {"x": HOSTILE}]}
    hosts = {"alpha": values(1), HOSTILE: values(2), "c": {}}
    held = {name.replace("integer", HOSTILE.replace("|", "")): those for name, those in values(3).items()}
    hosts["c"] = held
    page = _page(write(tmp_path / "one", hosts, about={HOSTILE: _with({"cpu": cpu, "hostname": HOSTILE})}))
    assert "<img" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert page.count("</script>") == page.count("<script")
    assert "&lt;img src=x" in page


def test_a_host_whose_results_cannot_be_analysed_costs_its_own_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = write(tmp_path / "one", {name: values(seed) for seed, name in enumerate("abcd")})

    def strange(given: results.Results, **options: Any) -> dict[str, Any]:
        if given.directory.endswith("/c"):
            raise KeyError("a form that nobody thought of")
        return analyse(given, **options)

    monkeypatch.setattr(analysis, "analyse", strange)
    words = _words(there)
    assert "its results cannot be analysed: KeyError" in words
    assert list(json.loads((there / "analysis.json").read_text())["hosts"]) == ["a", "b", "d"]


def test_a_run_that_was_no_experiment_has_no_report(tmp_path: Path) -> None:
    Journal(str(tmp_path / "one"), {**DOCUMENT, "kind": "run"}).close()
    with pytest.raises(UsageError, match="not an experiment"):
        write_fleet(str(tmp_path / "one"))
    assert not (tmp_path / "one/report.html").exists()


def test_damaged_lines_are_told(slowed: Path, tmp_path: Path) -> None:
    shutil.copytree(slowed, tmp_path / "one")
    with (tmp_path / "one/hosts/beta.jsonl").open("a") as file:
        file.write('{"kind":"run","requ')
    words = _words(tmp_path / "one")
    assert "1 line could not be read" in words
    assert "1 line of the results could not be read" in words


def test_the_page_loads_nothing(slowed: Path) -> None:
    page = _page(slowed)
    outside = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    assert not re.search(r'(src|href)="(?!#)', outside)
    assert "default-src &#x27;none&#x27;" in page
