"""HTML elements from values: whatever is not an element already is text, and is escaped.

Names, reasons and command lines come from files and from other programs. None of them may become markup, so there is
one way only to make an element, and it escapes.
"""

from __future__ import annotations

import html
import json
import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import Any

__all__ = ["Html", "element", "identifier", "inline_json", "join", "plain", "table"]

_VOID = frozenset({"br", "meta"})


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def plain(text: object) -> str:
    r"""Return *text* with what cannot be seen, or turns the direction of what follows, as an escape (``\x1b``)."""
    words = str(text)
    if words.isprintable():
        return words
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in words)


def element(name: str, /, *children: object, **attributes: object) -> Html:
    """Return ``<name attributes>children</name>``.

    :param children: :class:`Html` goes in as it is, None not at all, anything else as text
    :param attributes: an underscore stands for a hyphen and a last one for nothing (``class_``); None and False leave
        the attribute out, True gives it no value
    """
    parts = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        written = key.rstrip("_").replace("_", "-")
        parts.append(written if value is True else f'{written}="{html.escape(plain(value))}"')
    start = f"<{' '.join(parts)}>"
    return Html(start if name in _VOID else f"{start}{join(children)}</{name}>")


def join(children: Iterable[object], between: str = "") -> Html:
    """Return *children*, as :func:`element` takes them, one after the other."""
    return Html(
        between.join(
            child if isinstance(child, Html) else html.escape(plain(child), quote=False)
            for child in children
            if child is not None
        )
    )


def table(
    headers: Sequence[object], rows: Iterable[Sequence[object]], *, caption: object = None, label: str | None = None
) -> Html:
    """Return a table whose first column names its rows, in a box of its own that can be scrolled.

    Cells that begin with a digit, a sign or a bracket stand to the right.

    :param label: what it is, for a screen reader; by default the caption
    """
    head = element("tr", *(element("th", header, scope="col") for header in headers))
    body = [
        element(
            "tr",
            *(
                element("td", cell, class_="number" if _is_number(cell) else None)
                if column
                else element("th", cell, scope="row")
                for column, cell in enumerate(row)
            ),
        )
        for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption) if caption else None,
            element("thead", head),
            element("tbody", *body),
        ),
        class_="scroll",
        role="group",
        aria_label=label or (str(caption) if caption else "table"),
    )


def _is_number(cell: object) -> bool:
    return not isinstance(cell, Html) and bool(re.match(r"[-+−\[0-9]|no interval", str(cell)))


def identifier(*names: object) -> str:
    """Return an element's id made of *names*; different names may give the same."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(map(str, names)).lower()).strip("-") or "x"


def inline_json(document: Any) -> Html:
    """Return *document* as JSON that can stand inside a script element: no ``<`` is in it.

    :raises ValueError: for a number that JSON does not have
    """
    text = json.dumps(document, separators=(",", ":"), allow_nan=False, sort_keys=True)
    return Html(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))
