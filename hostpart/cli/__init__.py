"""The command line: finds the command, imports only what it needs, prints errors, chooses the exit code."""

from __future__ import annotations

import errno
import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

__all__ = ["COMMANDS", "columns", "main", "make_parser", "parsers"]

# In the order of the help: look, run, manage, mend.
COMMANDS = {
    "topology": "show the host's pCPUs and who holds them",
    "plan": "show which pCPUs each VM would get; change nothing",
    "run": "run a command on pCPUs of its own",
    "launch": "boot the service VM and launch the user VMs of a scenario file",
    "attach": "put running processes on pCPUs of their own for a while",
    "ps": "list the VMs and who holds which pCPU",
    "show": "show one VM: where its vCPUs are, and what the kernel says",
    "pause": "stop every process of a VM until it is resumed",
    "resume": "let a paused VM run again",
    "stop": "end a VM and free its pCPUs",
    "experiment": "measure what sharing pCPUs costs on this host",
    "fleet": "look at, run and experiment on many hosts at once",
    "audit": "check from outside that every VM is where it should be",
    "report": "write an experiment's results into one file of HTML",
    "restore": "end what killed hostpart left behind; put the host back",
    "systemd-unit": "print the unit that launches a scenario at boot",
    "completion": "print a shell's completion script",
}
_EXITS = (
    "Exit status: 0 done, 1 failed, 2 usage or configuration, 3 does not fit, 4 not permitted, 5 did not hold\n"
    "(--strict); 'run' has the command's own, and 125 where hostpart itself failed."
)


def _module(command: str) -> ModuleType:
    # importlib's function of that purpose would be the one thing here that needs importlib.
    return __import__(f"{__name__}.{command.replace('-', '_')}", fromlist=["run"])


def _parser(command: str) -> argparse.ArgumentParser:
    return make_parser(f"hostpart {command}", _module(command))


def make_parser(prog: str, module: ModuleType) -> argparse.ArgumentParser:
    """Return the parser of a command, with the arguments that its module's ``add`` says.

    :param prog: what the user has typed to come there
    :param module: its ``FAILED``, where there is one, is the exit status of a usage error
    """
    import argparse

    from ..errors import UsageError

    # The help is in one language. To look for another, argparse imports locale and tries eighty names of files.
    argparse._ = str  # type: ignore[attr-defined]
    # Without a width, the formatter imports shutil, with all its compressors, to ask for it.
    width = columns() - 2

    class Formatter(argparse.HelpFormatter):
        def __init__(self, prog: str) -> None:
            super().__init__(prog, width=width)

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return _filled(text, width, indent)

    class Parser(argparse.ArgumentParser):
        def error(self, message: str) -> NoReturn:
            self.print_usage(sys.stderr)
            # `run` has the command's own statuses, so its own failures are all of one kind.
            status = getattr(module, "FAILED", UsageError.exit_code)
            self.exit(status, f"{self.prog}: {message}\ntry: {self.prog} --help\n")

    parser = Parser(prog=prog, allow_abbrev=False, formatter_class=Formatter)
    module.add(parser)
    return parser


def _filled(text: str, width: int, indent: str) -> str:
    # Paragraphs are filled; what is indented (an example) and what is blank stay as they are.
    import textwrap

    lines: list[str] = []
    paragraph: list[str] = []
    for line in [*text.splitlines(), ""]:
        if line and line[0] != " ":
            paragraph.append(line)
            continue
        lines += [*textwrap.wrap(" ".join(paragraph), width), line]
        paragraph.clear()
    return textwrap.indent("\n".join(lines).rstrip(), indent)


def columns() -> int:
    """Return the width of the terminal: ``COLUMNS``, else what the kernel says of stdout, else 80."""
    asked = os.environ.get("COLUMNS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    try:
        return os.get_terminal_size(1).columns or 80
    except OSError:
        return 80


def parsers() -> dict[str, argparse.ArgumentParser]:
    """Return every command's parser, by name."""
    return {command: _parser(command) for command in COMMANDS}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code.

    :param argv: the arguments, by default the process's
    """
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        print(_help(), file=sys.stdout if args else sys.stderr)
        return 0 if args else 2
    if args[0] == "--version":
        from .. import __version__

        print(f"hostpart {__version__}")
        return 0
    command = args[0]
    if command not in COMMANDS:
        import difflib

        alike = [name for name in COMMANDS if name.startswith(command[:2])]
        near = difflib.get_close_matches(command, COMMANDS, 2) or alike
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        print(f"hostpart: there is no command {command!r}{hint}\ntry: hostpart --help", file=sys.stderr)
        return 2
    from ..errors import Failed, HostpartError, worded

    try:
        try:
            return int(_module(command).run(_parser(command).parse_args(args[1:])))
        finally:
            if sys.stdout is not None:  # it is where descriptor 1 was closed before hostpart was started
                sys.stdout.flush()
    except HostpartError as error:
        print(f"hostpart: {error}\ntry: {error.remedy}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        # Whoever read stdout has enough; there is nobody left to tell.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 128 + 13
    except OSError as error:
        # The caller's limits can be met at any step, and so can the end of the disk that the output goes to; anything
        # else is a mistake of this program's, and keeps its traceback.
        full = error.errno in (errno.ENOSPC, errno.EDQUOT) and error.filename is None
        if not full and error.errno not in (errno.EMFILE, errno.ENFILE, errno.EAGAIN):
            raise
        reason: HostpartError = worded(error)
        if full:
            reason = Failed(f"standard output can't be written: {error.strerror}", "make room where it goes: see 'df'")
        print(f"hostpart: {reason}\ntry: {reason.remedy}", file=sys.stderr)
        return int(getattr(sys.modules.get(f"{__name__}.{command}"), "FAILED", reason.exit_code))
    except KeyboardInterrupt:
        return 128 + 2


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [
        "usage: hostpart COMMAND [options]",
        "",
        "Give every virtual CPU a physical CPU of its own, keep it there, and prove it.",
        "",
        *(f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()),
        "",
        "Start with:  hostpart launch example:first",
        "Then:        hostpart run -- COMMAND      hostpart COMMAND --help",
        "",
        _filled(_EXITS, 78, ""),
    ]
    return "\n".join(lines)
