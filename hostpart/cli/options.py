"""Options that several commands share, and what they are turned into."""

from __future__ import annotations

import argparse

from ..allocator import POLICIES, SMT_MODES
from ..config import PCPU_KINDS
from ..cpuset import CpuSet

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..allocator import Request

__all__ = [
    "add_request",
    "count",
    "cpu_list",
    "explicit_list",
    "percent",
    "request_of",
    "scope",
    "seconds",
    "wait_seconds",
]


def count(text: str) -> int:
    """Read a number of vCPUs."""
    if not (text.isascii() and text.isdigit() and 1 <= int(text) <= 8192):
        raise argparse.ArgumentTypeError(f"want a whole number from 1 to 8192, got {text!r}")
    return int(text)


def cpu_list(text: str) -> CpuSet:
    """Read a set of pCPUs in the kernel's list form."""
    try:
        return CpuSet.parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def explicit_list(text: str) -> tuple[int, ...]:
    """Read a list of pCPUs whose order counts: vCPU i on the i-th (``5,3`` or ``2-4``)."""
    pcpus: list[int] = []
    for part in text.split(","):
        if not part.strip():
            raise argparse.ArgumentTypeError(f"{text!r} has an empty part")
        pcpus += cpu_list(part)
    if len(set(pcpus)) != len(pcpus):
        raise argparse.ArgumentTypeError(f"{text!r} names a pCPU twice")
    return tuple(pcpus)


def scope(text: str) -> str:
    """Check whose tasks may be moved: ``host``, ``user``, ``tree:PID`` or ``cgroup:PATH``."""
    from ..isolation.scope import parse

    try:
        parse(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def seconds(text: str) -> float:
    """Read a time in seconds."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1e9:
        raise argparse.ArgumentTypeError(f"want a number of seconds from 0, got {text!r}")
    return value


def percent(text: str) -> float:
    """Read a share in percent."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 100:
        raise argparse.ArgumentTypeError(f"want a number of percent from 0 to 100, got {text!r}")
    return value


def wait_seconds(text: str) -> float:
    """Read ``--wait``'s time, which may be left out: what stands after the option is then taken for it."""
    try:
        return seconds(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no number of seconds; write --wait=SECONDS, or put '--' after a --wait without a number"
        ) from None


def add_request(parser: argparse.ArgumentParser) -> None:
    """Add ``-n``, ``--pcpus``, ``--policy``, ``--smt``, ``--kind`` and ``--reserve``."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument("-n", "--vcpus", type=count, metavar="N", help="how many vCPUs (default: 1)")
    which.add_argument(
        "--pcpus", type=explicit_list, metavar="LIST", help="these pCPUs, vCPU i on the i-th, such as 3,5 or 2-4"
    )
    parser.add_argument("--policy", choices=POLICIES, default="packed", help="how pCPUs are chosen (default: packed)")
    parser.add_argument(
        "--smt",
        choices=SMT_MODES,
        default="exclusive",
        help="exclusive: no other VM on the cores; whole: whole cores only; shared: any thread (default: exclusive)",
    )
    parser.add_argument("--kind", choices=PCPU_KINDS, help="only pCPUs of this kind (hybrid machines)")
    parser.add_argument(
        "--reserve", type=cpu_list, default=CpuSet(), metavar="LIST", help="pCPUs never given out, such as 0-1"
    )


def request_of(args: argparse.Namespace) -> Request:
    """Return the request that the options of :func:`add_request` make."""
    from ..allocator import Request

    pcpus = args.pcpus or ()
    return Request(len(pcpus) or args.vcpus or 1, pcpus, args.policy, args.smt, args.kind)
