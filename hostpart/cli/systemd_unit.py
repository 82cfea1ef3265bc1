"""``hostpart systemd-unit``: print the unit that launches a scenario at boot and restores the host when it stops."""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from ..config import check_name
from ..errors import UsageError
from ..systemd import CONFIG_DIRECTORY, unit

__all__ = ["add", "run"]


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.description = (
        f"Print a systemd unit that launches {CONFIG_DIRECTORY}/NAME.toml at boot, is ready when its guests run, and\n"
        "puts the host back when it stops, however it stops. Without NAME: a template for all of them."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart systemd-unit > /etc/systemd/system/hostpart@.service\n"
        "  systemctl daemon-reload\n"
        "  systemctl enable --now hostpart@rt          launches /etc/hostpart/rt.toml\n"
        "  hostpart systemd-unit rt > /etc/systemd/system/hostpart-rt.service\n\n"
        "Exit status: 0, or 2 where NAME cannot be one."
    )
    parser.add_argument("name", nargs="?", metavar="NAME", help="the scenario's name (default: a template)")


def run(args: argparse.Namespace) -> int:
    """Print the unit."""
    if args.name is not None:
        try:
            check_name(args.name)
        except ValueError as error:
            raise UsageError(
                str(error), f"name the file, as in {CONFIG_DIRECTORY}/rt.toml: hostpart systemd-unit rt"
            ) from None
    print(unit(_command(), args.name or "%i"), end="")
    return 0


def _command() -> str:
    # A unit needs an absolute path: this very command's, where it was started by one, else what PATH has.
    started = sys.argv[0]
    if os.path.basename(started) != "hostpart" or not os.path.exists(started):
        started = shutil.which("hostpart") or os.path.join(os.path.dirname(sys.executable), "hostpart")
    return os.path.abspath(started)
