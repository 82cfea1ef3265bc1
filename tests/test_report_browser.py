"""The report in a real browser: what is drawn, what hovering says, what fits, what a keyboard reaches, what is printed.

Debian's chromium, driven by playwright. A page is opened with the network off, and any request that it makes fails the
test, as does anything in the console.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from hostpart.cli.report import write_fleet
from hostpart.report.comparison import compare
from hostpart.report.page import report
from tests import experiments, fleet_results
from tests.test_report import HOSTILE, analysed, hostile
from tests.vm.host import missing

_LIMIT_MS = 60_000  # two slow cores may have other work


def _chromium() -> str | None:
    return shutil.which("chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A browser, one for all tests of this file."""
    if why := missing(lambda: [] if _chromium() else ["chromium"], "a browser"):
        if os.environ.get("HOSTPART_REQUIRE_VM") == "1":
            pytest.fail(f"{why} (HOSTPART_REQUIRE_VM=1 forbids to skip)")
        pytest.skip(why)
    # Root may not use chromium's sandbox; a container's /dev/shm may be too small for it.
    arguments = ["--disable-dev-shm-usage", *(["--no-sandbox"] if os.geteuid() == 0 else [])]
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=_chromium(), args=arguments)
        yield chromium
        chromium.close()


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages, by what is on them."""
    folder = tmp_path_factory.mktemp("pages")
    first = analysed(experiments.write(folder / "monday", _values(1)))
    second = analysed(experiments.write(folder / "friday", _values(2)))
    pages = {"one": report(*first), "two": compare([first, second]), "hostile": report(*hostile(*first))}
    found = {}
    for name, text in pages.items():
        found[name] = folder / f"{name}.html"
        found[name].write_text(text, encoding="utf-8")
    found["three"] = Path(write_fleet(str(fleet_results.three(folder / "three"))))
    many = {
        f"rack1-node-{number:02}": fleet_results.values(number, 0.7 if number == 7 else 1.0) for number in range(12)
    }
    found["twelve"] = Path(write_fleet(str(fleet_results.write(folder / "twelve", many))))
    return found


def _values(seed: int) -> dict[str, list[Any]]:
    # Small, so that it is quickly drawn, with every kind of picture: two victims, two aggressors.
    rng = random.Random(seed)
    kept = {"alone": 1.0, "spinner|same-pcpu": 0.5, "spinner|same-llc": 1.0, "thrash|same-llc": 0.8}
    found: dict[str, list[Any]] = {}
    for name, part in kept.items():
        count = 12 if name == "alone" else 6
        rates = [1.2e6 * part * rng.gauss(1, 0.01) for _ in range(count)]
        found[f"integer|affinity|{name}"] = [
            {"metrics": {"rate": rate}, "series": {"rate": ("1/s", [rate * rng.gauss(1, 0.02) for _ in range(10)])}}
            for rate in rates
        ]
        times = [experiments.latencies(rng, 400, 5_000 / part, 0.4) for _ in range(count)]
        found[f"wakeup|affinity|{name}"] = [
            {"metrics": {"latency_p99": sorted(those)[-4]}, "histograms": {"latency": those}} for those in times
        ]
    found["integer|affinity|spinner|same-pcpu"][0] |= {"verdict": "broken", "reasons": ["the pin was changed to 0-7"]}
    return found


class Opened:
    """A page that has drawn its pictures, and what it said meanwhile."""

    def __init__(self, browser: Browser, file: Path, width: int, **options: Any) -> None:
        self.said: list[str] = []
        self.context = browser.new_context(viewport={"width": width, "height": 800}, **options)
        self.context.set_offline(True)
        self.page: Page = self.context.new_page()
        self.page.set_default_timeout(_LIMIT_MS)
        self.page.on("console", lambda message: self.said.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.said.append(f"error: {error}"))
        self.page.on("dialog", self._dialog)
        self.page.on("request", self._request)
        self.file = file
        self.page.goto(file.as_uri())
        self.page.wait_for_selector("html[data-drawn]", state="attached")

    def _dialog(self, dialog: Any) -> None:
        self.said.append(f"dialog: {dialog.message}")
        dialog.dismiss()

    def _request(self, request: Any) -> None:
        # The pictures of the heat maps are made in the page.
        if request.url != self.file.as_uri() and not request.url.startswith(("data:", "blob:")):
            self.said.append(f"request: {request.url}")


@pytest.fixture
def opened(browser: Browser, files: dict[str, Path]) -> Iterator[Any]:
    """Opens a page; at the end nothing was said and nothing was asked of the network."""
    those: list[Opened] = []

    def one(name: str, width: int, **options: Any) -> Page:
        those.append(Opened(browser, files[name], width, **options))
        return those[-1].page

    yield one
    said = [text for each in those for text in each.said]
    for each in those:
        each.context.close()
    assert said == []


_PLOTS = """() => [...document.querySelectorAll(".plot")].map(plot => {
  const box = plot.getBoundingClientRect();
  const marks = plot.querySelectorAll(".scatterlayer path, .heatmaplayer image").length;
  const inside = plot.querySelector(".main-svg").getBoundingClientRect();
  return {id: plot.id, drawn: plot.classList.contains("js-plotly-plot"), width: box.width, height: box.height, marks,
          overflow: inside.width - box.width, bar: plot.querySelectorAll(".modebar-btn").length};
})"""
# What sticks out of the page, but for what is in a box that can be scrolled.
_STICKING_OUT = """() => [...document.querySelectorAll("body *")]
  .filter(one => !one.closest(".scroll *, .skip, script"))
  .filter(one => one.getBoundingClientRect().right > innerWidth + 0.5).map(one => one.outerHTML.slice(0, 100))"""
_SCROLLED = """() => [...document.querySelectorAll(".scroll")]
  .every(one => one.scrollWidth > one.clientWidth + 1 == (one.tabIndex == 0))"""
_FILL = "getComputedStyle(document.querySelector('.plot .ytick text')).fill"
# Text that is cut by the edge of its picture.
_CUT = """() => [...document.querySelectorAll(".plot")].flatMap(plot => {
  const box = plot.querySelector(".main-svg").getBoundingClientRect();
  return [...plot.querySelectorAll("text")].filter(one => one.textContent.trim() && !one.closest(".hoverlayer"))
    .map(one => [one.textContent, one.getBoundingClientRect()])
    .filter(([, at]) => at.width && (at.left < box.left - 1 || at.right > box.right + 1 || at.bottom > box.bottom + 1))
    .map(([text]) => `${plot.id}: ${text}`);
})"""


_PICTURES = {"one": 10, "two": 2, "three": 5, "twelve": 5}


@pytest.mark.parametrize(
    ("name", "width", "theme"),
    [
        ("one", 360, "light"),
        ("one", 768, "dark"),
        ("one", 1280, "light"),
        ("two", 360, "dark"),
        ("three", 360, "dark"),
        ("three", 768, "light"),
        ("three", 1280, "dark"),
        ("twelve", 360, "light"),
        ("twelve", 1280, "dark"),
    ],
    ids=str,
)
def test_every_picture_is_drawn_and_nothing_overflows(opened: Any, name: str, width: int, theme: str) -> None:
    page = opened(name, width, color_scheme=theme)
    plots = page.evaluate(_PLOTS)
    assert len(plots) == int(page.evaluate("document.documentElement.dataset.drawn")) >= _PICTURES[name]
    for plot in plots:
        assert plot["drawn"], plot
        assert plot["marks"], plot
        assert plot["width"] > 200, plot
        assert plot["height"] > 150, plot
        assert plot["overflow"] <= 1, plot
        assert plot["bar"] == 0, plot
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(_STICKING_OUT) == []
    assert page.evaluate(_CUT) == []
    # What can be scrolled can be reached, and what cannot does not stand in the way.
    assert page.evaluate(_SCROLLED)
    # The text of the pictures is the theme's, also where that changes while the page is open.
    fill = page.evaluate(_FILL)
    assert fill == page.evaluate("getComputedStyle(document.body).color")
    page.emulate_media(color_scheme="dark" if theme == "light" else "light")
    assert page.evaluate(_FILL) == page.evaluate("getComputedStyle(document.body).color") != fill


def test_hovering_tells_the_value(opened: Any) -> None:
    page = opened("one", 1280)
    for plot, words in (
        ("matrix", r"spinner, same-pcpu.*ratio 0\.\d+ \[0\.\d+, 0\.\d+\].*n = 6"),
        ("processes", r"median .*\[.*\] M/s, n = \d+"),
        ("distribution", r"take at most [\d.]+ [µm]s"),
        ("noise", r"at [\d.]+ s.*M/s"),
        ("drift", r"run \d+.*M/s"),
    ):
        text = _hovered(page, plot)
        assert re.search(words, text), text


def _hovered(page: Page, plot: str) -> str:
    place = page.locator(f".plot[id^={plot}-]").first
    place.scroll_into_view_if_needed()
    mark = {
        "matrix": ".heatmaplayer image",
        "processes": ".trace:nth-child(2) .point",
        "distribution": ".lines path",
    }.get(plot, ".points .point")
    box = place.locator(mark).first.bounding_box()
    assert box is not None
    x = box["x"] + box["width"] * (0.2 if plot == "matrix" else 0.5)
    # A line is met anywhere near it: go down until it answers.
    steps = {"matrix": [0.1], "distribution": [step / 20 for step in range(21)]}.get(plot, [0.5])
    heights = [box["y"] + box["height"] * step for step in steps]
    label = place.locator(".hoverlayer .hovertext")
    for y in heights:
        page.mouse.move(x, y - 1)
        page.mouse.move(x, y)
        page.wait_for_timeout(120)
        if label.count():
            break
    return label.first.text_content() or ""


def test_the_keyboard_reaches_everything(opened: Any) -> None:
    page = opened("one", 360)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    at = page.evaluate("document.activeElement.getBoundingClientRect().top")
    assert at >= 0  # it shows itself
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    met = []
    for _ in range(200):
        page.keyboard.press("Tab")
        met.append(
            page.evaluate("(one => one.tagName + ' ' + (one.getAttribute('href') || ''))(document.activeElement)")
        )
        if met[-1].startswith("BODY"):
            break
    links = page.evaluate("[...document.querySelectorAll('nav a')].map(one => 'A ' + one.getAttribute('href'))")
    assert met[: len(links)] == links  # in the order of the page
    folds = page.evaluate("document.querySelectorAll('details:not([open]) > summary').length")
    assert sum(one.startswith("SUMMARY") for one in met) == folds > 10
    first = page.locator("summary").first
    first.focus()
    page.keyboard.press("Enter")
    assert first.evaluate("one => one.parentElement.open")
    page.keyboard.press("Shift+Tab")
    page.locator(".skip").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"


def test_markup_in_the_data_is_shown_and_does_nothing(opened: Any) -> None:
    page = opened("hostile", 360)
    assert page.evaluate("document.querySelectorAll('body img, body iframe').length") == 0
    assert HOSTILE in page.locator("h1").inner_text()
    assert page.evaluate("document.querySelectorAll('.plot a, .plot b').length") == 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_without_script_the_tables_are_there(browser: Browser, files: dict[str, Path]) -> None:
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(files["one"].as_uri())
    assert page.locator("noscript").inner_text().startswith("The pictures need JavaScript")
    assert page.locator("table").count() > 15
    context.close()


def test_on_paper_the_tables_are_open_and_no_picture_is_cut(opened: Any) -> None:
    page = opened("one", 1280, color_scheme="dark")
    paper = page.pdf(format="A4")
    assert 5 <= _pages(paper) <= 40
    # A page of text and drawings is some ten thousand bytes of them; an empty one is a few.
    assert sum(len(part) for part in _streams(paper)) > 200_000
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.evaluate("[...document.querySelectorAll('details')].every(one => one.open)")
    assert page.evaluate("Math.max(...[...document.querySelectorAll('.main-svg')].map(one => one.clientWidth))") <= 680
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"
    page.evaluate("dispatchEvent(new Event('afterprint'))")
    assert page.evaluate("document.querySelectorAll('details[open]').length") == 0


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_the_slowed_host_is_named_where_it_is_seen(opened: Any, width: int) -> None:
    page = opened("three", width, reduced_motion="reduce")
    told = page.locator("aside.warning").inner_text()
    assert re.search(r"gamma stands out: integer alone \(affinity\) is 0\.\d\d of the others' median", told)
    assert page.locator("aside.warning").bounding_box()["y"] < page.locator("#findings").bounding_box()["y"]
    link = page.locator("aside.warning a").first
    link.click()
    box = page.locator("#host-2").bounding_box()
    assert -2 <= box["y"] <= 800
    label = page.locator("#alone")
    label.scroll_into_view_if_needed()
    assert "stands out" in label.inner_text()
    # A host's figures are beside its name, and nothing of them is folded where there are three.
    assert page.locator("#host-2 .heat").first.is_visible()
    assert page.locator("#map-2").is_visible()


def test_many_hosts_are_folded_and_unfold(opened: Any) -> None:
    page = opened("twelve", 360)
    fold = page.locator("#host-7")
    assert not fold.locator(".map").is_visible()
    assert "stands out" in fold.locator("summary").first.inner_text()
    # Whoever follows a link to a host sees it, not only its name.
    page.locator("aside.warning a", has_text="rack1-node-07").first.click()
    page.wait_for_function("document.querySelector('#host-7').open")
    assert fold.locator(".map").is_visible()
    for one in page.locator("details").all():
        one.evaluate("one => one.open = true")
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.evaluate(_STICKING_OUT) == []


def test_on_paper_every_host_is_there(opened: Any) -> None:
    page = opened("twelve", 1280, color_scheme="dark")
    assert 8 <= _pages(page.pdf(format="A4")) <= 60
    page.emulate_media(media="print")
    page.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert page.locator("details.host > summary").first.is_visible()
    assert page.locator("#map-11").is_visible()


def _pages(paper: bytes) -> int:
    return len(re.findall(rb"/Type\s*/Page\b", paper + b"".join(_streams(paper))))


def _streams(paper: bytes) -> list[bytes]:
    found = []
    for part in re.findall(rb"stream\r?\n(.*?)endstream", paper, re.DOTALL):
        try:
            found.append(zlib.decompress(part))
        except zlib.error:
            continue  # an image
    return found
