"""``hostpart`` and ``python -m hostpart``."""

from __future__ import annotations

import os
import sys

__all__ = ["main"]


def _own_workers() -> None:
    # `workers` is a name that a user's folder may have too, and with `python -m` that folder comes first: bind
    # the package that lies beside this one before anything can import another.
    if "workers" in sys.modules:
        return
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    try:
        import workers  # noqa: F401
    finally:
        del sys.path[0]


def main() -> int:
    """Run the command line and return its exit code."""
    _own_workers()
    from .cli import main as run

    return run()


if __name__ == "__main__":
    sys.exit(main())
