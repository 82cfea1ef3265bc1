"""Frozen values with the syntax of a dataclass and none of its import time.

``dataclasses`` costs as much to import as the whole of Python's start (it pulls in ``inspect``),
and ``hostpart run`` is measured against ``python3 -c pass``. Only what hostpart needs is here:
keyword and positional fields, defaults, equality, hash, ``repr`` and pickling.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self, dataclass_transform
else:

    def dataclass_transform(**_: object):
        return lambda cls: cls


__all__ = ["Value"]


@dataclass_transform(frozen_default=True)
class Value:
    """Base of every frozen value: annotate the fields, give defaults where there are any.

    :raises TypeError: for a missing, doubled or unknown field, and on assignment
    """

    _fields: tuple[str, ...] = ()

    def __init_subclass__(cls) -> None:
        own = tuple(name for name in cls.__dict__.get("__annotations__", None) or _annotations(cls) if name[0] != "_")
        cls._fields = (*(name for name in cls._fields if name not in own), *own)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        fields = self._fields
        if len(args) == len(fields) and not kwargs:  # as whoever makes thousands of them does
            self.__dict__.update(zip(fields, args, strict=True))
            return
        if len(args) > len(fields):
            raise TypeError(f"{type(self).__name__} takes {len(fields)} fields, got {len(args)}")
        state = dict(zip(fields, args, strict=False))
        for name, value in kwargs.items():
            if name in state or name not in fields:
                raise TypeError(f"{type(self).__name__}: {name!r} is {'given twice' if name in state else 'no field'}")
            state[name] = value
        for name in fields:
            if name not in state:
                try:
                    state[name] = getattr(type(self), name)
                except AttributeError:
                    raise TypeError(f"{type(self).__name__} needs {name!r}") from None
        self.__dict__.update(state)

    def __setattr__(self, name: str, value: object) -> None:
        raise TypeError(f"{type(self).__name__} is frozen")

    def __delattr__(self, name: str) -> None:
        raise TypeError(f"{type(self).__name__} is frozen")

    def replace(self, **changes: Any) -> Self:
        """Return a copy with *changes* made."""
        return type(self)(**{**self.asdict(), **changes})

    def asdict(self) -> dict[str, Any]:
        """Return the fields by name, in order of declaration (not recursive)."""
        return {name: self.__dict__[name] for name in self._fields}

    def _key(self) -> tuple[object, ...]:
        return tuple(self.__dict__[name] for name in self._fields)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash((type(self), self._key()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{n}={self.__dict__[n]!r}' for n in self._fields)})"

    def __reduce__(self) -> tuple[object, tuple[object, ...]]:
        return type(self), self._key()


def _annotations(cls: type) -> dict[str, object]:
    # From Python 3.14 a class holds a function that makes its annotations, and inherits none.
    return cls.__annotations__ if "__annotate_func__" in cls.__dict__ else {}
