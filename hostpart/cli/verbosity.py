"""``-v``: log records of front, keepers and workers, on stderr."""

from __future__ import annotations

import logging
import sys

__all__ = ["enable"]


def enable(level: int) -> None:
    """Show records of all processes from now on.

    :param level: 1 for INFO, 2 and more for DEBUG
    """
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        logging.Formatter(
            "%(asctime)s %(levelname)-5s %(where)s: %(message)s", "%H:%M:%S", defaults={"where": "hostpart"}
        )
    )
    root = logging.getLogger()
    root.addHandler(handler)
    root.setLevel(logging.DEBUG if level > 1 else logging.INFO)
