"""Counts of whole numbers in buckets whose width grows with the number: fixed, so any two histograms can be added.

HdrHistogram's layout with two significant digits, so that its tools pool and read these counts without a loss: up to
255 each value has its own bucket, from there on each power of two has 128 of equal width. The layout is all that is
taken from it; a guest does not need the library.

Source: HdrHistogram.org, "HdrHistogram: A High Dynamic Range Histogram"; ``countsArrayIndex()`` of its Java sources.
The index of a bucket is the same as there, where the lowest value to tell from 0 is 1.
"""

from __future__ import annotations

from collections import Counter

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from typing import Any

__all__ = ["SUB_BUCKETS", "Histogram", "bounds", "bucket"]

SUB_BUCKETS = 128  # of each power of two: a bucket is at most a 128th of its lower bound wide
_BITS = 7


def bucket(value: int) -> int:
    """Return the index of the bucket that *value* (from 0) falls into."""
    shift = max(0, value.bit_length() - _BITS - 1)
    return (shift << _BITS) + (value >> shift)


def bounds(index: int) -> tuple[int, int]:
    """Return the first value of a bucket, and the first beyond it."""
    shift = max(0, (index >> _BITS) - 1)
    low = (index - (shift << _BITS)) << shift
    return low, low + (1 << shift)


class Histogram:
    """How often which value occurred.

    :ivar unit: the values' unit, such as ``ns``
    :ivar count: how many values
    :ivar least: the smallest of them, None where there is none
    :ivar most: the largest
    """

    __slots__ = ("_counts", "count", "least", "most", "unit")

    def __init__(self, unit: str) -> None:
        self.unit = unit
        self.clear()

    def clear(self) -> None:
        """Forget all values."""
        self._counts: dict[int, int] = {}
        self.count = 0
        self.least: int | None = None
        self.most: int | None = None

    def add(self, value: int, times: int = 1) -> None:
        """Count *value*; what is below 0 counts as 0."""
        value = max(0, value)
        index = bucket(value)
        self._counts[index] = self._counts.get(index, 0) + times
        self.count += times
        self.least = value if self.least is None else min(self.least, value)
        self.most = value if self.most is None else max(self.most, value)

    def update(self, values: Iterable[int]) -> None:
        """Count each of *values*."""
        # Most are equal to another one, and to count those first takes a tenth of the time.
        for value, times in Counter(values).items():
            self.add(value, times)

    def percentile(self, percent: float) -> int | None:
        """Return a value that *percent* of all do not exceed, exact to a bucket's width and never below the truth."""
        if self.most is None:
            return None
        wanted, seen = self.count * percent / 100, 0
        for _, below, count in self:
            seen += count
            if seen >= wanted:
                return min(below - 1, self.most)
        return self.most

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        for index in sorted(self._counts):
            yield (*bounds(index), self._counts[index])

    def to_json(self) -> dict[str, Any]:
        """Return what a record holds of it: ``[from, below, count]`` for each bucket that is not empty."""
        return {
            "unit": self.unit,
            "count": self.count,
            "min": self.least,
            "max": self.most,
            "buckets": [list(part) for part in self],
        }
