"""Numbers as people read them: with units, with their intervals, and with no more digits than these allow."""

from __future__ import annotations

import math

from ..experiment.intake import finite

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["Scale", "count", "interval", "number", "percent", "ratio", "scale", "span"]

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_TIMES = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_PREFIXED = ("B", "B/s", "1/s")
_FEWEST, _MOST = 2, 3  # decimals of a ratio near 1


class Scale:
    """A unit that suits some values, and the factor that brings them to it.

    :ivar factor: what the values are multiplied with
    :ivar unit: such as ``µs`` or ``M/s``; empty for a plain number
    """

    def __init__(self, factor: float, unit: str) -> None:
        self.factor, self.unit = factor, unit

    def text(self, value: float, decimals: int | None = None) -> str:
        """Return *value* in this unit, without its name."""
        return number(value * self.factor, decimals)

    @property
    def suffix(self) -> str:
        """The unit as it follows a number."""
        return f" {self.unit}" if self.unit else ""


def scale(values: Sequence[float], unit: str) -> Scale:
    """Return the unit that the largest of *values*, which are in *unit*, reads best in."""
    largest = max(map(abs, values), default=0.0)
    if unit in _SECONDS:
        seconds = largest * _SECONDS[unit]
        # 90 s stay seconds: minutes do not go by tens.
        size, name = next((step for step in _TIMES if seconds >= step[0]), _TIMES[-1] if seconds else (1.0, "s"))
        return Scale(_SECONDS[unit] / size, name)
    if unit in _PREFIXED:
        size, prefix = next((step for step in _PREFIXES if largest >= step[0]), (1.0, ""))
        # A rate of what is counted is a number per second: 1.2 M/s.
        return Scale(1 / size, f"{prefix}{unit.removeprefix('1')}")
    return Scale(1.0, "" if unit == "1" else unit)


def number(value: float, decimals: int | None = None) -> str:
    """Return *value* with *decimals*, by default with four digits that count."""
    if not finite(value):
        return "not known"  # JSON's numbers have no end: 1e999 is infinite
    if decimals is None:
        decimals = 0 if value == 0 else max(0, 3 - math.floor(math.log10(abs(value))))
        decimals = min(decimals, 9)
        text = f"{value:,.{decimals}f}"
        return (text.rstrip("0").rstrip(".") if "." in text else text).replace("-", "−")
    return f"{value:,.{decimals}f}".replace("-", "−")


def span(value: float, unit: str) -> str:
    """Return one value with its unit: ``1.21 M/s``."""
    one = scale([value], unit)
    return f"{one.text(value)}{one.suffix}"


def interval(value: float | None, ci: Sequence[float | None] | None, unit: str) -> str:
    """Return a value with its interval and unit: ``1.21 [1.20, 1.22] M/s``."""
    if value is None:
        return "not known"
    bounds = _bounds(ci)
    if bounds is None:
        return f"{span(value, unit)}, no interval"
    one = scale([value], unit)
    decimals = _decimals(*(bound * one.factor for bound in bounds), least=0, most=4)
    if decimals is None:
        decimals = max(0, 2 - math.floor(math.log10(abs(value * one.factor)))) if value else 0
    low, high = (one.text(bound, decimals) for bound in bounds)
    return f"{one.text(value, decimals)} [{low}, {high}]{one.suffix}"


def ratio(value: float, ci: Sequence[float | None] | None) -> tuple[str, str]:
    """Return a ratio and its interval, each as text: ``0.34`` and ``[0.33, 0.35]``."""
    size = abs(value)
    fewest = _FEWEST + (0 < size < 0.1) - (size >= 10) - (size >= 100)
    bounds = _bounds(ci)
    if bounds is None:
        return number(value, fewest), "no interval"
    decimals = _decimals(*bounds, least=fewest, most=max(_MOST - (size >= 10) - (size >= 100), fewest))
    decimals = fewest if decimals is None else decimals
    low, high = (number(bound, decimals) for bound in bounds)
    return number(value, decimals), f"[{low}, {high}]"


# As many decimals as show that the bounds differ; None where they do not.
def _decimals(low: float, high: float, *, least: int, most: int) -> int | None:
    width = abs(high - low)
    if not width:
        return None
    # 0.35 - 0.33 is a little less than 0.02.
    return min(max(-math.floor(math.log10(width / 2) + 1e-6), least), most)


def _bounds(ci: Sequence[float | None] | None) -> tuple[float, float] | None:
    if ci is None or len(ci) != 2 or ci[0] is None or ci[1] is None:
        return None
    return ci[0], ci[1]


def percent(value: float) -> str:
    """Return a change in percent, with its sign and one decimal: ``+1.2 %``."""
    return f"{value:+.1f} %".replace("-", "−")


def count(number: int, noun: str) -> str:
    """Return ``1 run``, ``2 runs``."""
    many = f"{noun[:-1]}ies" if noun.endswith("y") and noun[-2] not in "aeiou" else f"{noun}s"
    return f"{number:,} {noun if number == 1 else many}"
