"""What was not the same of the host at each start of an experiment, in a sentence for each fact.

A resume on another kernel, with another governor or by another hostpart measures something else. Only what bears on the
figures is compared: the load and the time are never the same.
"""

from __future__ import annotations

import json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

__all__ = ["changes"]

_SAME = (
    "hostname",
    "kernel.release",
    "kernel.cmdline",
    "cpu.model",
    "cpu.microcode",
    "smt.active",
    "governor",
    "turbo",
    "isolated",
    "mitigations",
    "versions",
)
_SHOWN = 3  # of the parts of a fact that differ: a kernel may bring many other mitigations
_WHOLE, _LONGEST = 60, 120  # characters of a text that is shown from its beginning, and at most


def changes(starts: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return what differs: ``versions.hostpart was 0.2.0 and 0.3.0``.

    :param starts: the facts at each start, as a line of ``sessions.jsonl`` has them
    """
    found = []
    for name in _SAME:
        # By what they were: the governors of all pCPUs usually change together.
        alike: dict[tuple[str, ...], list[str]] = {}
        for path, values in _parts(name, [_fact(one, name) for one in starts]):
            distinct = list({json.dumps(value, sort_keys=True): value for value in values}.values())
            if len(distinct) > 1:
                alike.setdefault(tuple(_texts(distinct)), []).append(path)
        told = [f"{_names(paths)} was {' and '.join(texts)}" for texts, paths in alike.items()]
        if told:
            more = [f"{len(told) - _SHOWN} more of {name}"] if len(told) > _SHOWN else []
            found.append("; ".join(told[:_SHOWN] + more))
    return found


def _fact(facts: Mapping[str, Any], name: str) -> Any:
    found: Any = facts
    for part in name.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


# Each single value in a fact, with its path, and what it was at each start.
def _parts(path: str, values: Sequence[Any]) -> Iterator[tuple[str, Sequence[Any]]]:
    tables = [value for value in values if isinstance(value, dict)]
    if not tables:
        yield path, values
        return
    for key in dict.fromkeys(key for table in tables for key in table):
        yield from _parts(f"{path}.{key}", [value.get(key) if isinstance(value, dict) else value for value in values])


def _names(paths: Sequence[str]) -> str:
    first, *rest = paths
    return f"{first} and {len(rest)} {'other' if len(rest) == 1 else 'others'}" if rest else first


def _texts(values: Sequence[Any]) -> list[str]:
    words = [value.split() if isinstance(value, str) else [] for value in values]
    # Of long texts, such as a kernel's command line, what they begin and end with alike is left out but for a word.
    ahead = behind = 0
    texts = [those for those in words if those]
    if len(texts) > 1 and max(len(value) for value in values if isinstance(value, str)) > _WHOLE:
        ahead = max(_alike(texts) - 1, 0)
        behind = min(_alike([those[::-1] for those in texts]), min(map(len, texts)) - ahead - 1)
    return [_text(value, those, ahead, behind) for value, those in zip(values, words, strict=True)]


# How many of the first words all have.
def _alike(texts: Sequence[Sequence[str]]) -> int:
    count = 0
    for those in zip(*texts, strict=False):
        if len(set(those)) > 1:
            break
        count += 1
    return count


def _text(value: Any, words: Sequence[str], ahead: int, behind: int) -> str:
    if value is None:
        return "none"
    if not isinstance(value, str):
        return json.dumps(value)
    text = value
    if ahead or behind:
        kept = words[ahead : len(words) - behind]
        text = " ".join([*(["…"] if ahead else []), *kept, *(["…"] if behind else [])])
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    return f'"{text}"' if not text or any(one.isspace() for one in text) else text
