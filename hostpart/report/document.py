"""What every page has around its contents: the head, the landmarks, the style sheet and the scripts.

The page loads nothing. A policy in its head says so to the browser, and which two scripts may run: by their hashes, so
that nothing that comes from data could, were it ever taken for a script.
"""

from __future__ import annotations

import base64
import hashlib
import os

from .. import __version__
from .markup import Html, element

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Section", "page"]


class Section:
    """A part of a page.

    :ivar name: its element's id
    :ivar title: its heading
    :ivar link: what the list of contents calls it
    :ivar body: what is in it
    """

    def __init__(self, name: str, title: str, link: str, *body: Html | str | None) -> None:
        self.name, self.title, self.link, self.body = name, title, link, body

    def html(self) -> Html:
        """Return the section."""
        heading = element("h2", self.title, id=f"{self.name}-title")
        return element("section", heading, *self.body, id=self.name, aria_labelledby=f"{self.name}-title")


def page(title: str, about: Sequence[object], first: Html, sections: Sequence[Section], *, pictures: bool) -> str:
    """Return a whole page.

    :param title: its heading
    :param about: lines under it
    :param first: what is above the sections
    :param pictures: whether there are any, so that what draws them is needed
    """
    scripts = [_plotly(), _read("page.js")] if pictures else []
    hashes = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    # Plotly writes rules of style as it goes, and its heat maps are images that it makes.
    allowed = hashes or "'none'"
    policy = (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("meta", name="generator", content=f"hostpart {__version__}"),
        element("title", f"{title} – hostpart"),
        element("style", Html(_read("style.css"))),
    )
    links = [element("li", element("a", one.link, href=f"#{one.name}")) for one in sections]
    blind = element("p", "The pictures need JavaScript. The tables under them hold the same figures.")
    body = element(
        "body",
        element("a", "Skip to the contents", class_="skip", href="#main"),
        element("header", element("h1", title), *(element("p", line, class_="about") for line in about)),
        element("nav", element("ul", *links), aria_label="Contents"),
        element(
            "main",
            element("noscript", blind) if pictures else None,
            first,
            *(one.html() for one in sections),
            id="main",
            tabindex="-1",
        ),
        element("footer", f"Written by hostpart {__version__}. This file is complete: it loads nothing."),
        *(element("script", Html(script)) for script in scripts),
    )
    return f"<!doctype html>\n{element('html', head, Html(chr(10)), body, lang='en')}\n"


def _read(name: str) -> str:
    with open(os.path.join(os.path.dirname(__file__), name), encoding="utf-8") as file:
        return file.read()


def _plotly() -> str:
    from plotly.offline import get_plotlyjs

    # A carriage return would be read as a line feed, and the hash would be another one.
    return str(get_plotlyjs()).replace("\r\n", "\n").replace("\r", "\n")
