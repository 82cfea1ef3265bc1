"""``hostpart report``: what an experiment found, as one file of HTML."""

from __future__ import annotations

import argparse
import os

from ..errors import Failed, UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from ..experiment.results import Results

__all__ = ["add", "run", "write"]

_EPILOG = """\
The file holds all that it shows and loads nothing: mail it, put it on a phone, print it. An experiment that was stopped
half-way has a report too; it says what is missing.

Exit status: 0 written, 1 it cannot be written, 2 DIR is no experiment's directory, or what the report needs is not
installed.

Examples:
  hostpart report results
  hostpart report monday friday --compare -o week.html
"""


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        "Write what 'hostpart experiment' found into one file of HTML: the host's map, what each aggressor cost\n"
        "at each distance, distributions, noise, evidence, the machine's facts, and the command to repeat it."
    )
    parser.epilog = _EPILOG
    parser.add_argument("directory", nargs="+", metavar="DIR", help="a directory that 'hostpart experiment' wrote")
    parser.add_argument("--compare", action="store_true", help="put two or more of them side by side in one file")
    parser.add_argument(
        "-o",
        "--out",
        metavar="FILE",
        help="the file to write (default: report.html in DIR; with --compare, report-compare.html here)",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report, and print the file's name.

    :raises HostpartError: where a directory is no experiment's, or the file cannot be written
    """
    from ..experiment.extra import need

    need()
    if args.compare and len(args.directory) < 2:
        raise UsageError("--compare needs two directories or more", "name another one, or leave --compare out")
    if args.out is not None and len(args.directory) > 1 and not args.compare:
        raise UsageError("-o names one file for several reports", "leave it out, or give --compare")
    from ..experiment.results import read
    from ..report.comparison import compare
    from ..report.page import report

    # All are read before the first is analysed: a name that is wrong is told at once.
    there = [read(directory) for directory in args.directory]
    experiments = [_analysed(results) for results in there]
    if args.compare:
        path = args.out or "report-compare.html"
        write(path, compare(experiments))
        print(path)
        return 0
    for directory, (results, analysis) in zip(args.directory, experiments, strict=True):
        path = args.out or os.path.join(directory, "report.html")
        write(path, report(results, analysis))
        print(path)
    return 0


def _analysed(results: Results) -> tuple[Results, Mapping[str, Any]]:
    from ..experiment.analysis import analyse

    return results, analyse(results)


def write(path: str, text: str) -> None:
    """Write a page, whole or not at all: a browser may be showing the one that is there.

    :raises Failed: where it can't be written
    """
    from ..experiment.results import replace

    try:
        replace(path, text)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror}", "make room, or name another -o FILE") from None
