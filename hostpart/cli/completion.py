"""``hostpart completion``: scripts that let bash, zsh and fish complete hostpart's command line.

They are made from the commands' own argparse parsers, so an option cannot be forgotten here. What
an argument takes is read from its choices and its metavar (``VM``, ``FILE``, ``DIR``, ``USER``, ...).
The names of running VMs are asked for at the moment of completing, from ``hostpart ps --names``.
"""

from __future__ import annotations

import argparse

from ..config import SCHED_POLICIES, example_names
from ..toml_table import EXAMPLE_PREFIX
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SHELLS", "add", "run", "script"]

SHELLS = ("bash", "zsh", "fish")

_TOP_OPTIONS = ("--help", "--version")
_BY_METAVAR = {"VM": "vm", "DIR": "directory", "FILE": "file", "TOPOLOGY": "file", "USER": "user", "GROUP": "group"}
# Option values with a part that only the user knows after the colon.
_BY_DEST = {
    "sched": tuple(f"{policy}:" if policy in ("fifo", "rr") else policy for policy in SCHED_POLICIES),
    "scope": ("host", "user", "tree:", "cgroup:"),
}


class _Takes(Value):
    """What an argument takes: ``words``, ``scenario``, ``vm``, ``file``, ``directory``, ``user``, ``group``,
    ``command`` (a program and all that follows it) or ``any`` (only the user knows)."""

    kind: str
    words: tuple[str, ...] = ()


class _Option(Value):
    names: tuple[str, ...]
    help: str
    takes: _Takes | None  # None: a flag
    optional: bool  # its value follows "=", or is left out
    repeats: bool


class _Command(Value):
    name: str
    help: str
    options: tuple[_Option, ...]
    positionals: tuple[_Takes, ...]
    repeats: bool  # the last positional


def add(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments and help."""
    parser.description = "Print a script with which a shell completes hostpart's commands, options and VM names."
    parser.epilog = """\
where to put it, for yourself:
  hostpart completion bash > ~/.local/share/bash-completion/completions/hostpart
  hostpart completion zsh > ~/.zfunc/_hostpart
    (with fpath+=~/.zfunc before compinit in ~/.zshrc)
  hostpart completion fish > ~/.config/fish/completions/hostpart.fish
for this shell only:
  source <(hostpart completion bash)     hostpart completion fish | source

Exit status: 0 printed, 2 there is no such shell."""
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help="one of bash, zsh, fish")


def run(args: argparse.Namespace) -> int:
    """Print the script for ``args.shell``."""
    from ..experiment import design
    from . import fleet, parsers

    examples, experiments = (
        [f"{EXAMPLE_PREFIX}{name}" for name in names] for names in (example_names(), design.example_names())
    )
    actions = {f"fleet {action}": fleet.action_parser(action) for action in fleet.ACTIONS}
    print(script(args.shell, {**parsers(), **actions}, examples, experiments), end="")
    return 0


def script(
    shell: str,
    parsers: Mapping[str, argparse.ArgumentParser],
    examples: Sequence[str] = (),
    experiments: Sequence[str] = (),
) -> str:
    """Return the completion script.

    :param shell: one of :data:`SHELLS`
    :param parsers: each command's own parser, by the command's name, in the order to list them; after them those of
        their actions, by both names (``fleet stop``), which bash completes
    :param examples: scenarios to offer wherever a scenario file is wanted
    :param experiments: the same, where the file of an experiment is
    """
    commands = [
        _read(name, parser, experiments if name.endswith("experiment") else examples)
        for name, parser in parsers.items()
    ]
    if shell == "bash":
        return _bash(commands)
    return {"zsh": _zsh, "fish": _fish}[shell]([command for command in commands if " " not in command.name])


def _read(name: str, parser: argparse.ArgumentParser, examples: Sequence[str]) -> _Command:
    # argparse has no public way to ask a parser for its arguments.
    actions = parser._actions
    options = tuple(
        _Option(
            tuple(action.option_strings),
            _help(action.help, {**vars(action), "prog": parser.prog}),
            None if action.nargs == 0 else _takes(action, examples),
            action.nargs == "?",
            isinstance(action, argparse._AppendAction | argparse._CountAction),
        )
        for action in actions
        if action.option_strings and action.help != argparse.SUPPRESS
    )
    # A positional argument that the help does not list has to be typed all the same.
    positionals = [action for action in actions if not action.option_strings]
    return _Command(
        name,
        _help(parser.description, {"prog": parser.prog}),
        options,
        tuple(_takes(action, examples) for action in positionals),
        bool(positionals) and positionals[-1].nargs in ("*", "+"),
    )


def _help(text: str | None, facts: Mapping[str, object]) -> str:
    # The first sentence, in one line.
    words = " ".join((text % facts if text else "").split())
    return words.partition(". ")[0].partition("; ")[0].rstrip(".")


def _takes(action: argparse.Action, examples: Sequence[str]) -> _Takes:
    if action.choices is not None:
        return _Takes("words", tuple(str(choice) for choice in action.choices))
    if action.dest in _BY_DEST:
        return _Takes("words", _BY_DEST[action.dest])
    metavar = action.metavar if isinstance(action.metavar, str) else action.dest.upper()
    if not action.option_strings:
        if metavar.startswith("COMMAND"):
            return _Takes("command")
        if metavar == "FILE":
            return _Takes("scenario", tuple(examples))
    # "DIR|TARBALL" is a path too, and a directory is completed as files are.
    return _Takes("file" if "|" in metavar else _BY_METAVAR.get(metavar, "any"))


def _valued(command: _Command) -> str:
    # The options that take the word after them, so that a guest's program is told from their values.
    return " ".join(n for option in command.options if option.takes and not option.optional for n in option.names)


def _quoted(text: str) -> str:
    # For bash and zsh: one word, whatever it holds.
    return "'" + text.replace("'", "'\\''") + "'"


# bash

# What differs between hosts and commands stands in the two functions made in _bash(); the rest is this.
_BASH_ENGINE = r"""
_hostpart() {
    local program=${COMP_WORDS[0]} line=${COMP_LINE:0:COMP_POINT} words=() starts=() index piece takes options
    # bash breaks words at ':' and '=' too: put them together again as they were typed.
    COMPREPLY=()
    for ((index = 0; index <= COMP_CWORD; index++)); do
        piece=${COMP_WORDS[index]}
        if ((index == 0)) || [[ $line == [[:blank:]]* ]]; then
            words+=("")
            starts+=("$index")
        fi
        if ((index == COMP_CWORD)); then
            piece=${line#"${line%%[![:blank:]]*}"} # up to the cursor
        else
            line=${line#*"$piece"}
        fi
        words[-1]+=$piece
    done

    local current=${words[-1]} count=${#words[@]}
    if ((count <= 2)); then
        _hostpart_offer "" "$current" words @COMMANDS@
        return
    fi

    # Which positional argument is being typed, or the value of which option.
    local command=${words[1]} place=0 ended= pending= word
    for ((index = 2; index < count - 1; index++)); do
        word=${words[index]}
        if [[ $pending ]]; then
            pending=
        elif [[ ! $ended && $word == -- ]]; then
            ended=1
        elif [[ ! $ended && $word == -?* ]]; then
            if _hostpart_takes "$command" "$word" && [[ $takes != optional* ]]; then
                pending=$takes
            fi
        elif ((place == 0)) && _hostpart_options "$command $word"; then
            command+=" $word"
        else
            _hostpart_takes "$command" "$place"
            if [[ $takes == command ]]; then
                _hostpart_guest "${starts[index]}"
                return
            fi
            ((place++))
        fi
    done

    if [[ $pending ]]; then
        _hostpart_offer "" "$current" $pending
    elif [[ ! $ended && $current == --*=* ]]; then
        if _hostpart_takes "$command" "${current%%=*}"; then
            _hostpart_offer "${current%%=*}=" "${current#*=}" ${takes#optional }
        fi
    elif [[ ! $ended && $current == -* ]]; then
        _hostpart_options "$command"
        _hostpart_offer "" "$current" words $options
    elif _hostpart_takes "$command" "$place" || _hostpart_takes "$command" "*"; then
        if [[ $takes == command ]]; then
            _hostpart_guest "${starts[-1]}"
        else
            _hostpart_offer "" "$current" $takes
        fi
    fi
}

# Offer what may stand after $1 (an option and its '=', or nothing), $2 being typed already: $3 says what.
_hostpart_offer() {
    local before=$1 typed=$2 kind=$3 offers=() offer
    shift 3
    case $kind in
        words) offers=("$@") ;;
        vm) mapfile -t offers < <("$program" ps --names 2>/dev/null) ;;
        user) mapfile -t offers < <(compgen -u) ;;
        group) mapfile -t offers < <(compgen -g) ;;
        scenario) offers=("$@") ;;
        file) compopt -o default 2>/dev/null ;;
        directory) compopt -o dirnames 2>/dev/null ;;
    esac
    for offer in "${offers[@]}"; do
        [[ $offer == "$typed"* ]] && COMPREPLY+=("$before$offer")
    done
    if [[ $kind == scenario ]]; then
        if ((${#COMPREPLY[@]})); then
            while IFS= read -r offer; do
                [[ -d $offer ]] && offer+=/
                [[ -d $offer || $offer == *.toml ]] && COMPREPLY+=("$before$offer")
            done < <(compgen -f -- "$typed")
        else
            compopt -o default 2>/dev/null
        fi
    fi
    # readline replaces only what follows the last character at which it breaks words.
    local breaks= kept=$before$typed
    [[ $COMP_WORDBREAKS == *:* ]] && breaks+=:
    [[ $COMP_WORDBREAKS == *=* ]] && breaks+==
    [[ $breaks ]] && kept=${kept%"${kept##*[$breaks]}"} || kept=
    COMPREPLY=("${COMPREPLY[@]#"$kept"}")
    [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[:/] ]] && compopt -o nospace 2>/dev/null
}

# Complete the guest's own command line, which begins at word $1.
_hostpart_guest() {
    if declare -F _comp_command_offset >/dev/null; then
        _comp_command_offset "$1"
    elif declare -F _command_offset >/dev/null; then
        _command_offset "$1"
    elif (($1 == COMP_CWORD)) && [[ ${COMP_WORDS[COMP_CWORD]} != */* ]]; then
        mapfile -t COMPREPLY < <(compgen -c -- "${COMP_WORDS[COMP_CWORD]}" | sort -u)
    else
        compopt -o default 2>/dev/null
    fi
}

complete -F _hostpart hostpart
"""


def _bash(commands: Sequence[_Command]) -> str:
    takes, options = [], []
    for command in commands:
        for option in command.options:
            if option.takes:
                what = f"{'optional ' if option.optional else ''}{_bash_takes(option.takes)}"
                takes += [(f"{command.name} {name}", what) for name in option.names]
        takes += [(f"{command.name} {place}", _bash_takes(one)) for place, one in enumerate(command.positionals)]
        if command.repeats:
            takes.append((f"{command.name} *", _bash_takes(command.positionals[-1])))
        long = " ".join(name for option in command.options for name in option.names if name.startswith("--"))
        options.append(f"        {_quoted(command.name)}) options={_quoted(long)} ;;")
    names = [command.name for command in commands if " " not in command.name]
    engine = _BASH_ENGINE.replace("@COMMANDS@", " ".join([*names, *_TOP_OPTIONS]))
    return "\n".join(
        [
            "# bash completion for hostpart, printed by 'hostpart completion bash'",
            "",
            "# Set what the option $2, or the positional argument number $2, of command $1 takes; fail if nothing.",
            "_hostpart_takes() {",
            "    takes=",
            '    case "$1 $2" in',
            *(f"        {_quoted(key)}) takes={_quoted(what)} ;;" for key, what in takes),
            "        *) return 1 ;;",
            "    esac",
            "}",
            "",
            "# Set the long options of command, or command and action, $1; fail if there is none.",
            "_hostpart_options() {",
            "    case $1 in",
            *options,
            "        *)",
            "            options=",
            "            return 1",
            "            ;;",
            "    esac",
            "}",
            engine,
        ]
    )


def _bash_takes(takes: _Takes) -> str:
    return " ".join([takes.kind, *takes.words])


# zsh

_ZSH_SPECIAL = "[]:\\"  # in a description of _arguments

_ZSH_GUEST = r"""# Complete the guest's own command line, if it has begun; $@ are the options that take the next word.
_hostpart_guest() {
    local -i at=2
    local ended=
    while ((at < CURRENT)) && [[ ! $ended && $words[at] == -* ]]; do
        [[ $words[at] == -- ]] && ended=1
        ((at += $+argv[(re)$words[at]] ? 2 : 1))
    done
    [[ $ended || $words[at] != -* ]] && ((at <= CURRENT)) || return 1
    shift $((at - 1)) words
    ((CURRENT -= at - 1))
    if ((CURRENT == 1)); then
        _command_names -e
    else
        _normal
    fi
    return 0
}
"""


def _zsh(commands: Sequence[_Command]) -> str:
    cases: list[str] = []
    for command in commands:
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        guest = []
        for place, takes in enumerate(command.positionals):
            if takes.kind == "command":
                guest = [f"            _hostpart_guest {_valued(command)} && return"]
            else:
                last = place == len(command.positionals) - 1
                where = "*" if last and command.repeats else str(place + 1)
                specs.append(f"{where}:{takes.kind}:{_zsh_takes(takes)}")
        # -S: no options after "--".
        body = " \\\n                ".join(["_arguments -S", *map(_quoted, specs)])
        cases += [f"        {command.name})", *guest, f"            {body}", "            ;;"]
    summaries = [_quoted(f"{command.name}:{command.help}".rstrip(":")) for command in commands]
    return "\n".join(
        [
            "#compdef hostpart",
            "# zsh completion for hostpart, printed by 'hostpart completion zsh'",
            "",
            "_hostpart_vms() {",
            '    compadd -- ${(f)"$($hostpart_program ps --names 2>/dev/null)"}',
            "}",
            "",
            "_hostpart_scenarios() {",
            "    compadd -- $@",
            "    _files -g '*.toml'",
            "}",
            "",
            "# Words that end in a colon want more after it.",
            "_hostpart_words() {",
            "    compadd -S '' -- ${(M)@:#*:}",
            "    compadd -- ${@:#*:}",
            "}",
            "",
            _ZSH_GUEST,
            "_hostpart() {",
            "    local hostpart_program=${~words[1]} curcontext=$curcontext",
            "    local -a summaries=(",
            *(f"        {summary}" for summary in summaries),
            "    )",
            "    if ((CURRENT == 2)); then",
            "        _describe -t commands command summaries",
            f"        [[ $PREFIX == -* ]] && compadd -- {' '.join(_TOP_OPTIONS)}",
            "        return",
            "    fi",
            "    shift words",
            "    ((CURRENT--))",
            "    case $words[1] in",
            *cases,
            "    esac",
            "}",
            "",
            "# Autoloaded from fpath it is called; sourced it only makes itself known.",
            "if [[ $funcstack[1] == _hostpart ]]; then",
            '    _hostpart "$@"',
            "else",
            "    compdef _hostpart hostpart",
            "fi",
            "",
        ]
    )


def _zsh_option(option: _Option) -> list[str]:
    described = f"[{_escaped(option.help, _ZSH_SPECIAL)}]" if option.help else ""
    specs = []
    for name in option.names:
        rivals = "*" if option.repeats else f"({' '.join(option.names)})"
        if option.takes is None:
            specs.append(f"{rivals}{name}{described}")
            continue
        # "=-": the value only in the same word; "=": there or in the next; "+": likewise for one letter.
        joint = ("=-" if option.optional else "=") if name.startswith("--") else ("-" if option.optional else "+")
        colons = "::" if option.optional else ":"
        specs.append(f"{rivals}{name}{joint}{described}{colons}{option.takes.kind}:{_zsh_takes(option.takes)}")
    return specs


def _zsh_takes(takes: _Takes) -> str:
    # A leading blank keeps _arguments from adding options of its own to the call.
    words = " ".join(_literal(word).replace(":", "\\:") for word in takes.words)
    return {
        "words": f" _hostpart_words {words}",
        "scenario": f" _hostpart_scenarios {words}",
        "vm": " _hostpart_vms",
        "file": "_files",
        "directory": "_files -/",
        "user": "_users",
        "group": "_groups",
        "any": " ",
    }[takes.kind]


def _literal(word: str) -> str:
    # For zsh's actions and fish's -a, which are read as code once more.
    return "".join(c if c.isalnum() or c in "-_:./=+," else f"\\{c}" for c in word)


def _escaped(text: str, special: str) -> str:
    return "".join(f"\\{character}" if character in special else character for character in text)


# fish


def _fish(commands: Sequence[_Command]) -> str:
    lines = [
        "# fish completion for hostpart, printed by 'hostpart completion fish'",
        "",
        "function __hostpart_command -d 'Whether the command typed is this one, or none yet'",
        "    set -l words (commandline -opc)",
        '    test "$words[2]" = "$argv[1]"',
        "end",
        "",
        "function __hostpart_vms -d 'The names of running VMs'",
        "    set -l words (commandline -opc)",
        "    $words[1] ps --names 2>/dev/null",
        "end",
        "",
        "function __hostpart_guest -d 'Complete the command line that follows'",
        "    # Without '--', an option being typed is hostpart's own.",
        "    string match -q -- '-*' (commandline -ct); and not contains -- -- (commandline -opc); and return",
        "    __fish_complete_subcommand --fcs-skip=2 $argv",
        "end",
        "",
        "complete -c hostpart -f",
        *(_fish_line("", f"-l {name[2:]}") for name in _TOP_OPTIONS),
        *(_fish_line("", f"-a {_fish_quoted(command.name)}", command.help) for command in commands),
    ]
    for command in commands:
        lines.append("")
        valued = _valued(command)
        for option in command.options:
            names = " ".join(f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names)
            wants = f" {_fish_takes(option.takes, valued)}" if option.takes else ""
            required = " -r" if option.takes and not option.optional else ""
            only = " -f" if option.takes and option.takes.kind not in ("file", "scenario") else ""
            lines.append(_fish_line(command.name, f"{names}{required}{only}{wants}", option.help))
        lines += [_fish_line(command.name, _fish_takes(takes, valued)) for takes in command.positionals]
    return "\n".join([*lines, ""])


def _fish_line(command: str, what: str, described: str = "") -> str:
    condition = _fish_quoted(f"__hostpart_command {command}".rstrip())
    return f"complete -c hostpart -n {condition} {what}{f' -d {_fish_quoted(described)}' if described else ''}".rstrip()


def _fish_takes(takes: _Takes, valued: str) -> str:
    return {
        "words": f"-a {_fish_quoted(' '.join(map(_literal, takes.words)))}",
        "scenario": f"-F -a {_fish_quoted(' '.join(map(_literal, takes.words)))}",
        "vm": "-a '(__hostpart_vms)'",
        "file": "-F",
        "directory": "-a '(__fish_complete_directories)'",
        "user": "-a '(__fish_complete_users)'",
        "group": "-a '(__fish_complete_groups)'",
        "command": f"-a {_fish_quoted(f'(__hostpart_guest {valued})')}",
        "any": "",
    }[takes.kind]


def _fish_quoted(text: str) -> str:
    return "'" + _escaped(text, "\\'") + "'"
