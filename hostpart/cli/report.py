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
    from ..fleet.journal import HostResults

__all__ = ["add", "run", "write", "write_fleet"]

_EPILOG = """\
The file holds all that it shows and loads nothing: mail it, put it on a phone, print it. An experiment that was stopped
half-way has a report too; it says what is missing. A directory of 'hostpart fleet experiment' has a report of all its
hosts, with the hosts as a factor; what was found on each and on all is in DIR/analysis.json then.

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
    parser.add_argument(
        "directory",
        nargs="+",
        metavar="DIR",
        help="a directory that 'hostpart experiment' or 'hostpart fleet experiment' wrote",
    )
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
    from ..fleet.journal import is_fleet
    from ..report.comparison import compare
    from ..report.page import report

    fleets = [directory for directory in args.directory if is_fleet(directory)]
    if fleets and args.compare:
        raise UsageError(
            f"--compare puts single hosts' experiments side by side, and {fleets[0]} is of many hosts",
            "leave --compare out: its report has the hosts beside each other",
        )
    # All are read before the first is analysed: a name that is wrong is told at once.
    there = [read(directory) for directory in args.directory if directory not in fleets]
    for directory in fleets:
        print(write_fleet(directory, args.out))
    experiments = [_analysed(results) for results in there]
    if args.compare:
        path = args.out or "report-compare.html"
        write(path, compare(experiments))
        print(path)
        return 0
    for results, analysis in experiments:
        path = args.out or os.path.join(results.directory, "report.html")
        write(path, report(results, analysis))
        print(path)
    return 0


def _analysed(results: Results) -> tuple[Results, Mapping[str, Any]]:
    from ..experiment.analysis import analyse

    return results, analyse(results)


def write_fleet(directory: str, out: str | None = None) -> str:
    """Write the report of an experiment on many hosts, and beside it ``analysis.json``; return the report's file.

    :param directory: what 'hostpart fleet experiment' wrote, whole or not
    :param out: the report's file; by default ``report.html`` in *directory*
    :raises UsageError: where it is no fleet run's, or of one that was no experiment
    :raises Failed: where a file can't be written
    """
    from ..experiment.analysis import analyse, keep
    from ..experiment.pooled import pool
    from ..fleet.journal import read
    from ..report.fleet import report

    analyses: dict[str, dict[str, Any]] = {}
    unread: dict[str, str] = {}

    def one(host: HostResults) -> HostResults:
        if host.results is None:
            return host
        try:
            analyses[host.name] = analyse(host.results)
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            # A host may say anything. What it said in a form that nobody thought of costs its own results only.
            unread[host.name] = f"its results cannot be analysed: {type(error).__name__}: {error}"[:500]
        # The runs are by far the most of it, and their figures are in the analysis: one host's are held at a time.
        return host.replace(runs=(), results=host.results.replace(runs=()))

    fleet = read(directory, one)
    if fleet.document["kind"] != "experiment":
        raise UsageError(
            f"{directory} holds what guests said, not an experiment: there is nothing to report",
            "name a directory that 'hostpart fleet experiment' wrote",
        )
    pooled = pool(analyses)
    keep({"schema": 1, "hosts": analyses, "pooled": pooled}, directory)
    path = out or os.path.join(directory, "report.html")
    write(path, report(fleet, analyses, pooled, unread))
    return path


def write(path: str, text: str) -> None:
    """Write a page, whole or not at all: a browser may be showing the one that is there.

    :raises Failed: where it can't be written
    """
    from ..experiment.results import replace

    try:
        replace(path, text)
    except OSError as error:
        raise Failed(f"{path} cannot be written: {error.strerror}", "make room, or name another -o FILE") from None
