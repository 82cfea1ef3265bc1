"""What a host takes of a request: every part of it looked at, since it came from outside. Pure but for the look.

The request is the client's (:mod:`hostpart.fleet.request`); that it was well made there counts for nothing here.
"""

from __future__ import annotations

import json
import re

from ..errors import UsageError
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["KEPT_NAMES", "MAX_TEXT", "Order", "check_id", "check_run", "is_id", "object_of"]

MAX_TEXT = 32 << 20  # characters of a request as JSON
KEPT_NAMES = frozenset({
    "request.json", "events", "stdout", "stderr", "gate", "shim.json", "child.json", "outcome.json", "word", "stop",
    "lock", "begun", "shim.log", "results",
})  # fmt: skip
_RUN = re.compile(r"[0-9a-f]{12}", re.ASCII)
_ID = re.compile(r"[a-z0-9][a-z0-9.-]{0,100}", re.ASCII)
_FILE = re.compile(r"[A-Za-z0-9._-]{1,100}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,100}", re.ASCII)
# What says where hostpart keeps its leases and its books, and what it may do, is the host's to say.
_OWN_VARIABLES = frozenset({
    "HOSTPART_VM", "HOSTPART_LEASE_DIR", "HOSTPART_RUNTIME_DIR", "HOSTPART_FLEET_DIR", "HOSTPART_COMMAND",
    "HOSTPART_SCOPE", "HOSTPART_DIE_AT", "HOSTPART_POINTS", "HOSTPART_FLEET_HOLD_S",
})  # fmt: skip
_KEYS = {"schema", "id", "argv", "needs", "files", "cwd", "hold", "env", "kind"}
_MAX_WORDS, _MAX_WORD = 4096, 128 << 10  # MAX_ARG_STRLEN of the kernel: longer ones cannot be executed
_MAX_FILES, _MAX_BYTES = 64, 16 << 20
_MEND = "give the request as 'hostpart fleet' makes it"


class Order(Value):
    """A request that may be carried out here.

    :ivar id: the name of its directory
    :ivar argv: ``run`` or ``experiment``, and its words, ``{dir}`` still in them
    :ivar hold: ``vm``: it is begun at once and held before START; ``start``: it is begun with the word
    :ivar files: text by name, for its directory
    :ivar document: the request as it came
    """

    id: str
    kind: str
    argv: tuple[str, ...]
    hold: str
    cwd: str | None
    files: tuple[tuple[str, str], ...]
    env: tuple[tuple[str, str], ...]
    document: dict[str, Any]

    @classmethod
    def parse(cls, document: object) -> Order:
        """Read a request.

        :raises UsageError: naming the part that is wrong
        """
        if not isinstance(document, dict):
            raise _wrong("it is no object")
        if document.get("schema") != 1:
            raise _wrong(f"schema: want 1, got {document.get('schema')!r}")
        if unknown := sorted(str(key)[:40] for key in document.keys() - _KEYS):
            raise _wrong(f"{', '.join(unknown)}: unknown here; this host may have an older hostpart")
        one = check_id(document.get("id"))
        argv = _argv(document.get("argv"))
        if document.get("kind", argv[0]) != argv[0]:
            raise _wrong(f"kind: want {argv[0]!r} as argv[0], got {document.get('kind')!r}")
        hold = document.get("hold", "vm" if argv[0] == "run" else "start")
        if hold not in ("vm", "start") or (hold == "vm" and argv[0] != "run"):
            raise _wrong(f"hold: want 'start'{' or vm' if argv[0] == 'run' else ''}, got {hold!r}")
        cwd = document.get("cwd")
        if cwd is not None and not (_is_word(cwd) and cwd.startswith("/")):
            raise _wrong("cwd: want a path from the root, or null")
        files, env = _texts(document.get("files", {}), "files"), _texts(document.get("env", {}), "env")
        return cls(one, argv[0], argv, hold, cwd, _files(files), _environment(env), document)

    def words(self, directory: str) -> list[str]:
        """Return ``argv``; an experiment's with ``{dir}`` replaced, while a guest's words are the guest's."""
        if self.kind == "run":
            return list(self.argv)
        return [directory + word[5:] if word == "{dir}" or word.startswith("{dir}/") else word for word in self.argv]


def is_id(text: object) -> bool:
    """Whether *text* may be an errand's name, and so a directory's."""
    return isinstance(text, str) and bool(_ID.fullmatch(text)) and ".." not in text


def object_of(text: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object that a text is; None where it is another, or nested without end."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def check_id(text: object) -> str:
    """Return *text* where it may be an errand's name.

    :raises UsageError: else
    """
    if not isinstance(text, str) or not is_id(text):
        raise _wrong(f"id: want small letters, digits, '.' and '-', got {str(text)[:120]!r}")
    return text


def check_run(text: object) -> str:
    """Return *text* where it is a run's 12 digits.

    :raises UsageError: else
    """
    if not isinstance(text, str) or not _RUN.fullmatch(text):
        raise _wrong(f"run: want 12 digits of 0-9a-f, got {str(text)[:40]!r}")
    return text


def _wrong(what: str) -> UsageError:
    return UsageError(f"the request cannot be carried out: {what}", _MEND)


def _is_word(text: object) -> bool:
    if not isinstance(text, str) or "\0" in text:
        return False
    try:
        return len(text.encode()) < _MAX_WORD
    except UnicodeEncodeError:
        return False


def _argv(argv: object) -> tuple[str, ...]:
    if not isinstance(argv, list) or not 1 <= len(argv) <= _MAX_WORDS or not all(map(_is_word, argv)):
        raise _wrong(f"argv: want a list of 1 to {_MAX_WORDS} words without a NUL")
    if argv[0] not in ("run", "experiment"):
        raise _wrong(f"argv: want 'run' or 'experiment' first, got {argv[0][:40]!r}")
    own = argv[: argv.index("--")] if "--" in argv else argv
    for word in own[1:]:
        if word.partition("=")[0] in ("--events", "--hold"):
            raise _wrong(f"argv: {word[:40]!r} is the host's to say; a command's own options come after '--'")
    for word in argv if argv[0] == "experiment" else ():
        if word.startswith("{dir}/") and ".." in word.split("/"):
            raise _wrong(f"argv: {word[:120]!r} leaves the directory")
    return tuple(argv)


def _texts(table: object, what: str) -> dict[str, str]:
    if table is None:
        return {}
    if not isinstance(table, dict) or not all(isinstance(one, str) for pair in table.items() for one in pair):
        raise _wrong(f"{what}: want an object of texts")
    return table


def _files(table: dict[str, str]) -> tuple[tuple[str, str], ...]:
    if len(table) > _MAX_FILES:
        raise _wrong(f"files: want {_MAX_FILES} at most, got {len(table)}")
    size = 0
    for name, text in table.items():
        if not _FILE.fullmatch(name) or name in (".", "..") or name in KEPT_NAMES:
            raise _wrong(f"files: {name[:120]!r} cannot be a file's name here")
        try:
            size += len(text.encode())
        except UnicodeEncodeError:
            raise _wrong(f"files: {name!r} is no text") from None
    if size > _MAX_BYTES:
        raise _wrong(f"files: want {_MAX_BYTES >> 20} MiB at most, got {size} bytes")
    return tuple(table.items())


def _environment(table: dict[str, str]) -> tuple[tuple[str, str], ...]:
    for name, value in table.items():
        if not _VARIABLE.fullmatch(name) or not _is_word(value):
            raise _wrong(f"env: {name[:120]!r} cannot be a variable")
        if name in _OWN_VARIABLES:
            raise _wrong(f"env: {name} is the host's to say")
    return tuple(table.items())
