"""The isolation ladder: which level was asked for, which was reached, and what stopped it there.

``affinity`` pins the guests and nothing else: what other tasks do on their pCPUs is reported, not prevented.
"""

from __future__ import annotations

from .errors import NotPermitted
from .value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

__all__ = ["LEVELS", "Isolation", "reach"]

LEVELS = ("affinity", "sweep", "cpuset", "full")


class Isolation(Value):
    """What became of a wish for isolation.

    :ivar stopped_by: why *reached* is below *asked*; empty where it is not
    :ivar remedy: what would raise it; empty likewise
    """

    asked: str
    reached: str
    stopped_by: str = ""
    remedy: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the fields for the evidence."""
        return self.asdict()


def reach(asked: str, require: bool) -> Isolation:
    """Say which level can be had.

    :raises NotPermitted: where *require* is set and it is not the one asked for; nothing has changed
    """
    if asked == "affinity":
        return Isolation(asked, asked)
    level = Isolation(
        asked,
        "affinity",
        f"this version of hostpart pins the guests and moves nothing else, so level {asked!r} is out of its reach",
        "move other work away yourself, or start the machine with isolcpus=, until a later version does it",
    )
    if require:
        raise NotPermitted(f"level {asked!r} is required and cannot be reached: {level.stopped_by}", level.remedy)
    return level
