"""Tables for people: aligned columns, and nothing in a cell that a terminal would obey.

What goes into a table, and in which unit, is for the command to decide; scripts get JSON.
"""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from typing import TextIO

__all__ = ["colour_wanted", "plain", "table"]

_BOLD, _NORMAL = "\x1b[1m", "\x1b[0m"
_GAP = "  "


def table(headers: Sequence[str], rows: Iterable[Sequence[object]], *, colour: bool) -> str:
    """Return the rows under their headers, without a newline at the end.

    A column that holds numbers and ``None`` only stands to the right. ``None`` is shown as
    ``-``, true and false as ``yes`` and ``no``. Floats are shown as :class:`str` shows them.

    :param colour: whether the headers are bold
    :raises ValueError: for a row with more or fewer cells than there are headers
    """
    body = [tuple(row) for row in rows]
    columns = [_column(header, cells) for header, *cells in zip(headers, *body, strict=True)]
    lines = [_GAP.join(cells).rstrip() for cells in zip(*columns, strict=True)]
    if colour and lines:
        lines[0] = f"{_BOLD}{lines[0]}{_NORMAL}"
    return "\n".join(lines)


def plain(text: str) -> str:
    r"""Return *text* with what a terminal could obey, or not show, as an escape (``\x1b``, ``\n``, ``\u202e``)."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def colour_wanted(stream: TextIO | None) -> bool:
    """Whether *stream* is a terminal that shows colour, and the user has not asked for none.

    Source: no-color.org: ``NO_COLOR`` set, and not empty.
    """
    return (
        stream is not None and stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    )


def _column(header: str, cells: Sequence[object]) -> list[str]:
    texts = [plain(header), *(_cell(cell) for cell in cells)]
    widths = [_width(text) for text in texts]
    widest = max(widths)
    numbers = [cell for cell in cells if cell is not None]
    if numbers and all(isinstance(cell, (int, float)) and not isinstance(cell, bool) for cell in numbers):
        return [" " * (widest - width) + text for text, width in zip(texts, widths, strict=True)]
    return [text + " " * (widest - width) for text, width in zip(texts, widths, strict=True)]


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return plain(str(value))


def _width(text: str) -> int:
    # In terminal columns: two for East Asian wide characters, none for combining marks.
    if text.isascii():
        return len(text)
    import unicodedata

    return sum(
        0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in ("W", "F") else 1 for c in text
    )
