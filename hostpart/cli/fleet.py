"""``hostpart fleet``: which hosts, how they are reached, and what to do there.

Each action is a module of its own (``fleet_ACTION``), with a parser of its own.
"""

from __future__ import annotations

import argparse

from . import options

TYPE_CHECKING = False
if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["ACTIONS", "action_parser", "add", "run"]

ACTIONS = {
    "topology": "a line per host: its pCPUs, cores and caches, and what is free",
    "plan": "which host could take a VM now, and on which pCPUs",
    "run": "run a command where its pCPUs are free",
    "experiment": "the same experiment on every host, with hosts as a factor",
    "ps": "list the VMs of all hosts",
    "stop": "end a VM, on whichever host it is",
}


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.usage = "hostpart fleet [options] ACTION [its options]"
    parser.description = (
        "Do the same on many hosts, which a cluster of Dask connects. Each of them runs\n"
        "'dask worker ADDRESS --nthreads 1 --preload hostpart.fleet.agent'. Actions:\n\n"
        + "\n".join(f"  {name:<10}  {text}" for name, text in ACTIONS.items())
        + "\n\n'hostpart fleet ACTION --help' has the options of one."
    )
    parser.epilog = (
        "examples:\n"
        "  hostpart fleet --local 2 topology              try it on this host\n"
        "  hostpart fleet --scheduler scheduler.json ps   what its --scheduler-file wrote\n"
        "  hostpart fleet --scheduler tls://head:8786 --tls-ca ca.pem --tls-cert me.pem\n"
        "      --tls-key me.key plan -n 4\n\n"
        "Whoever reaches a Dask scheduler can run commands as you on its hosts: plain text is taken on the\n"
        "loopback interface only, unless --insecure is given.\n\n"
        "Exit status: 0 done, 1 a host did not answer, 2 usage, 3 does not fit; 'run' has its own."
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--scheduler",
        default="",
        metavar="ADDRESS|FILE",
        help="a scheduler, as tls://HOST:PORT, or what its --scheduler-file wrote (default: Dask's configuration)",
    )
    which.add_argument(
        "--ssh",
        default="",
        metavar="FILE",
        help="start a scheduler on the first and a worker on each of the hosts of FILE, one per line, for this command",
    )
    which.add_argument(
        "--local", type=options.count, default=0, metavar="N", help="start N workers on this host for this command"
    )
    for name, text in (("ca", "the CA's certificate"), ("cert", "your certificate"), ("key", "its key")):
        parser.add_argument(
            f"--tls-{name}", default="", metavar="FILE", help=f"{text}, PEM (default: Dask's configuration)"
        )
    parser.add_argument("--insecure", action="store_true", help="let plain text leave this host, with a warning")
    parser.add_argument(
        "--hosts", type=_names, default=(), metavar="LIST", help="these hosts only, such as node1,node3 (default: all)"
    )
    parser.add_argument("action", choices=ACTIONS, metavar="ACTION", help=f"one of {', '.join(ACTIONS)}")
    parser.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)


def run(args: argparse.Namespace) -> int:
    """Do the action. Its module finds ``args.where``, ``args.hosts`` and its own options.

    :raises HostpartError: as its module does
    """
    from ..fleet.cluster import Where

    module = _module(args.action)
    args.where = Where(args.scheduler, args.ssh, args.local, args.tls_ca, args.tls_cert, args.tls_key, args.insecure)
    own = action_parser(args.action).parse_args(args.rest)
    return int(module.run(argparse.Namespace(**{**vars(args), **vars(own)})))


def action_parser(action: str) -> argparse.ArgumentParser:
    """Return the parser of one of :data:`ACTIONS`, for what follows its name."""
    from . import make_parser

    return make_parser(f"hostpart fleet {action}", _module(action))


def _module(action: str) -> ModuleType:
    return __import__(f"{__package__}.fleet_{action}", fromlist=["run"])


def _names(text: str) -> tuple[str, ...]:
    names = tuple(name.strip() for name in text.split(","))
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty part")
    return tuple(dict.fromkeys(names))
