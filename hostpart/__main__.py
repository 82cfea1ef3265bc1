"""``hostpart`` and ``python -m hostpart``."""

from __future__ import annotations

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import NoReturn

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


def main() -> NoReturn:
    """Run the command line and end the process with its exit code."""
    _own_workers()
    from .cli import main as run

    try:
        code = run()
    except SystemExit as error:  # argparse's: usage, or --help
        code = int(error.code or 0)
    _leave(code)


def _leave(code: int) -> NoReturn:
    # Taking the interpreter apart, object by object, takes a third of the time of its start, and nothing here needs it:
    # what is written is flushed, and the kernel takes the rest.
    logging = sys.modules.get("logging")
    if logging:
        logging.shutdown()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # it is where its descriptor was closed before hostpart was started
                stream.flush()
    except OSError:
        code = code or 1  # a full disk, or nobody who reads
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
