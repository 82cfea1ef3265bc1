"""TOML to typed values: tables whose keys are taken out one by one, every fault noted with its key.

What a file's keys mean is :mod:`hostpart.config`'s to say, and :mod:`hostpart.experiment.design`'s.
"""

from __future__ import annotations

import os

from .errors import ConfigError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TypeVar

    T = TypeVar("T")
    D = TypeVar("D")

__all__ = [
    "EXAMPLE_PREFIX",
    "MAX_BYTES",
    "Faults",
    "Table",
    "names_in",
    "one_of",
    "read_argv",
    "read_flag",
    "read_named",
    "read_number",
    "read_text",
    "read_toml",
    "read_whole",
    "shown",
]

EXAMPLE_PREFIX = "example:"
MAX_BYTES = 1 << 20  # of one file

_MAX_FAULTS = 100  # a file with more is none of ours, and a longer list helps nobody
_LOWER, _DIGITS = "abcdefghijklmnopqrstuvwxyz", "0123456789"


def names_in(folder: str) -> tuple[str, ...]:
    """Return the names of the examples in *folder*, sorted, without their prefix."""
    return tuple(sorted(file[:-5] for file in os.listdir(folder) if file.endswith(".toml")))


def read_named(name: str, examples: str, noun: str) -> bytes:
    """Return what a file holds, up to a byte more than :data:`MAX_BYTES`.

    :param name: its path, or ``example:NAME`` for one of those in the folder *examples*
    :param noun: what those are called in messages
    :raises ConfigError: where it cannot be read
    """
    path, known = name, names_in(examples)
    if name.startswith(EXAMPLE_PREFIX):
        path = name[len(EXAMPLE_PREFIX) :]
        if path not in known:
            raise ConfigError(name, [f"there is no such {noun}; there are {', '.join(known)}"])
        path = os.path.join(examples, f"{path}.toml")
    try:
        with open(path, "rb") as file:
            return file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        hint = f"; the example of that name is '{EXAMPLE_PREFIX}{name}'" if name in known else ""
        raise ConfigError(name, [f"there is no such file{hint}"]) from None
    except OSError as error:
        raise ConfigError(name, [f"cannot be read: {error.strerror or error}"]) from None
    except ValueError as error:  # a NUL or a lone surrogate: no file has such a name
        raise ConfigError(name, [f"is no file's name: {error}"]) from None


def read_toml(text: str | bytes, source: str) -> dict[str, object]:
    """Return the top table.

    :raises ConfigError: where *text* is no TOML, or larger than :data:`MAX_BYTES`
    """
    import tomllib

    try:
        raw = text if isinstance(text, bytes) else text.encode("utf-8")
        if len(raw) > MAX_BYTES:
            raise ConfigError(source, [f"is too large: more than {MAX_BYTES // 1024} KiB"])
        return tomllib.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(source, [f"is not text: byte {error.start}, in line {line}, is not UTF-8"]) from None
    except UnicodeEncodeError as error:
        raise ConfigError(source, [f"is not text: character {error.start} is a lone surrogate"]) from None
    except RecursionError:
        raise ConfigError(source, ["is nothing to read: its lists or tables are nested too deeply"]) from None
    except ValueError as error:  # TOMLDecodeError, with line and column; or a number of thousands of digits
        raise ConfigError(source, [f"is not TOML: {error}"]) from None


class Faults:
    """The faults found so far, in order."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.found: list[str] = []

    def note(self, fault: str) -> None:
        """Add one, led by its key.

        :raises ConfigError: where there are too many to be told
        """
        if len(self.found) == _MAX_FAULTS:
            raise ConfigError(self.source, [*self.found, f"and more than these {_MAX_FAULTS}"])
        self.found.append(fault)


class Table:
    """One TOML table being read: its keys are taken out by type, and what is left over is unknown."""

    def __init__(self, where: str, table: dict[str, object], faults: Faults) -> None:
        self.where, self.faults = where, faults
        self.rest = dict(table)
        self.known: list[str] = []

    def fault(self, key: str | None, problem: str) -> None:
        """Note what is wrong with a key, or with the table itself where that is ``None``."""
        path = [part for part in (self.where, None if key is None else _quoted_key(key)) if part]
        self.faults.note(f"{'.'.join(path)}: {problem}")

    def take(self, key: str) -> object:
        """Return the key's value, ``None`` where it is not there."""
        # None is what TOML has no word for, so it can say that the key is not there.
        self.known.append(key)
        return self.rest.pop(key, None)

    def read(self, key: str, reader: Callable[[object], T], default: D) -> T | D:
        """Return what *reader* makes of the key's value; its ValueError's arguments are faults."""
        value = self.take(key)
        if value is None:
            return default
        try:
            return reader(value)
        except ValueError as error:
            for problem in error.args:
                self.fault(key, problem)
            return default

    def table(self, key: str) -> Table:
        """Return the table of that key, empty where there is none."""
        value = self.take(key)
        if value is not None and not isinstance(value, dict):
            self.fault(key, f"want a table, got {shown(value)}")
        where = f"{self.where}.{key}" if self.where else key
        return Table(where, value if isinstance(value, dict) else {}, self.faults)

    def refuse_others(self) -> None:
        """Note every key that was not taken."""
        for key in self.rest:
            self.fault(key, f"is not a key here{_nearest(key, self.known)}")


# Readers of one value: what it means, or a ValueError with one argument for each fault.


def read_text(value: object) -> str:
    """Return text that is not empty."""
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError(f"want text{' without NUL' if isinstance(value, str) and value else ''}, got {shown(value)}")
    return value


def read_flag(value: object) -> bool:
    """Return true or false."""
    if not isinstance(value, bool):
        raise ValueError(f"want true or false, got {shown(value)}")
    return value


def read_whole(value: object, low: int, high: int) -> int:
    """Return a whole number."""
    # A bool is an int to Python, and never to an operator.
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"want a whole number from {low} to {high}, got {shown(value)}")
    return value


def read_number(value: object, low: float, high: float) -> float:
    """Return a number, whole or not."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise ValueError(f"want a number from {low:g} to {high:g}, got {shown(value)}")
    return float(value)


def one_of(choices: tuple[str, ...]) -> Callable[[object], str]:
    """Return a reader of one of *choices*."""

    def read(value: object) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(f"want one of {', '.join(choices)}, got {shown(value)}")
        return value

    return read


def read_argv(value: object) -> tuple[str, ...]:
    """Return program and arguments, from a list or from one line, which is split as a shell would."""
    if isinstance(value, str):
        import shlex

        try:
            words = shlex.split(value)
        except ValueError as error:
            raise ValueError(f"cannot be split into words: {str(error).lower()} in {shown(value)}") from None
    elif isinstance(value, list):
        wrong = [
            f"want words of text, got {shown(word)} in place {place}"
            for place, word in enumerate(value)
            if not isinstance(word, str)
        ]
        if wrong:
            raise ValueError(*wrong)
        words = value
    else:
        raise ValueError(f'want ["program", "argument"] or one line of text, got {shown(value)}')
    if not words or not words[0]:
        raise ValueError(f"want a program to run, got {shown(value)}")
    if any("\0" in word for word in words):
        raise ValueError("want words without NUL")
    return tuple(words)


def _nearest(key: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(key, known, 1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}" if known else ""


def _quoted_key(key: str) -> str:
    bare = 0 < len(key) <= 60 and not key.strip(_LOWER + _LOWER.upper() + _DIGITS + "_-")
    return key if bare else shown(key)


def shown(value: object) -> str:
    """Return a value as an operator would write it, in one short line without control characters."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        text = value if len(value) <= 60 else f"{value[:57]}..."
        return '"' + "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text) + '"'
    if isinstance(value, int):
        # Python refuses to print thousands of digits, which TOML's hexadecimal form can give.
        return str(value) if value.bit_length() <= 64 else f"a number of {value.bit_length()} bits"
    if isinstance(value, float):
        return str(value)
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"a list of {len(value)}" if value else "an empty list"
    return "a date or time"
