"""What an experiment is to try: a TOML file to typed values, every fault at once and each led by its key.

Which placements the host has is for :mod:`hostpart.experiment.sharing` to say, in which order the runs come for
:mod:`hostpart.experiment.schedule`.
"""

from __future__ import annotations

import os

from workers.probes import find, parameter
from workers.probes.command import PARSERS, UNITS
from workers.probes.refusal import Refused

from ..errors import ConfigError
from ..isolation import LEVELS
from ..toml_table import (
    EXAMPLE_PREFIX,
    Faults,
    Table,
    names_in,
    one_of,
    read_argv,
    read_flag,
    read_named,
    read_number,
    read_text,
    read_toml,
    read_whole,
    shown,
)
from ..value import Value

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any

__all__ = ["DEGREES", "OWN_SCOPE", "Aggressor", "Design", "Victim", "example_names", "load", "parse", "text_of"]

# How much a victim and an aggressor share, from everything to nothing but the machine.
DEGREES = ("free", "same-pcpu", "sibling", "same-llc", "same-node", "other-node", "other-package", "elsewhere")
OWN_SCOPE = "experiment"  # isolation moves the experiment's own processes only
BETTER = ("lower", "higher")

_EXAMPLES = os.path.join(os.path.dirname(__file__), "examples")
_VICTIMS = ("integer", "latency", "memory", "noise", "syscalls", "wakeup")
_AGGRESSORS = (*_VICTIMS, "spin", "thrash")
_NAME = frozenset("abcdefghijklmnopqrstuvwxyz0123456789._-")


class Victim(Value):
    """What is measured: a fresh process of it per run, as the one vCPU of a VM.

    :ivar probe: a probe of hostpart's, or empty for a command
    :ivar command: program and arguments
    :ivar options: the probe's, by name, as text
    :ivar metric: which of the record's figures counts; for a command a regular expression with one group, whose last
        match in the output is the figure; empty: the probe's primary one, a command's wall time in s
    :ivar unit: of a command's figure
    :ivar better: of a command's figure: ``lower`` or ``higher``
    :ivar tool: what wrote a command's output, one of cyclictest, oslat, stress-ng, rtla-osnoise, rtla-timerlat;
        empty: none of them
    :ivar qemu: the machine that the probe runs in, as the built-in guest's command; None: it runs on the host
    """

    name: str
    probe: str = ""
    command: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    metric: str = ""
    unit: str = ""
    better: str = "lower"
    tool: str = ""
    qemu: tuple[tuple[str, object], ...] | None = None


class Aggressor(Value):
    """What runs beside a victim.

    :ivar count: how many processes of it
    :ivar vm: whether it is a VM of its own wherever its pCPUs can be leased; else it is host processes, each pinned to
        a pCPU of the placement
    """

    name: str
    probe: str = ""
    command: tuple[str, ...] = ()
    options: tuple[tuple[str, str], ...] = ()
    count: int = 1
    vm: bool = False


class Design(Value):
    """One experiment, as it was asked for.

    :ivar source: the file, for messages
    :ivar placements: of :data:`DEGREES`; empty: all that the host has
    :ivar isolation: the victims' levels, a factor
    :ivar scope: as a VM's, or :data:`OWN_SCOPE`; empty: the level's default
    :ivar processes: fresh processes of a victim per condition; of ``alone``, more
    :ivar seconds: how long each measures
    :ivar warmup: seconds before that, whose results are discarded
    :ivar settle: seconds that aggressors run before the victim starts
    :ivar timeout: seconds after which a command is given up
    :ivar seed: of the order of the runs
    :ivar victim_pcpu: where the victims run (Linux's number); None: where most degrees of sharing can be had
    """

    name: str
    source: str
    victims: tuple[Victim, ...]
    aggressors: tuple[Aggressor, ...] = ()
    placements: tuple[str, ...] = ()
    isolation: tuple[str, ...] = ("affinity",)
    scope: str = ""
    processes: int = 10
    seconds: float = 1.0
    warmup: float = 0.3
    settle: float = 0.3
    timeout: float = 600.0
    seed: int = 1
    victim_pcpu: int | None = None

    def to_json(self) -> dict[str, Any]:
        """Return it as ``experiment.json`` has it."""

        def program(one: Victim | Aggressor) -> dict[str, Any]:
            found = {**one.asdict(), "command": list(one.command), "options": dict(one.options)}
            if "qemu" in found:
                found["qemu"] = None if found["qemu"] is None else dict(found["qemu"])
            return found

        return {
            **self.asdict(),
            "victims": [program(one) for one in self.victims],
            "aggressors": [program(one) for one in self.aggressors],
            "placements": list(self.placements),
            "isolation": list(self.isolation),
        }


def example_names() -> tuple[str, ...]:
    """Return the names of the experiments that come with hostpart, sorted, without their prefix."""
    return names_in(_EXAMPLES)


def text_of(name: str) -> bytes:
    """Return the text of a design: a file's, or one of hostpart's own as ``example:NAME``.

    :raises ConfigError: where it cannot be read
    """
    return read_named(name, _EXAMPLES, "experiment")


def load(name: str) -> Design:
    """Read a design, or one of hostpart's own as ``example:NAME``.

    :raises ConfigError: where it cannot be read, or with all its faults
    """
    try:
        return parse(text_of(name), name)
    except DesignError:
        raise
    except ConfigError as error:
        raise DesignError(error.source, error.faults) from None


class DesignError(ConfigError):
    """An experiment's file has faults (exit code 2)."""

    @property
    def remedy(self) -> str:
        return (
            f"mend it and look at it with 'hostpart experiment --plan {self.source}'; "
            "'hostpart experiment --plan example:interference' is right"
        )


def parse(text: str | bytes, source: str) -> Design:
    """Return the design that *text* describes.

    :param source: where it came from, for messages
    :raises ConfigError: with every fault
    """
    faults = Faults(source)
    top = Table("", read_toml(text, source), faults)
    default = _name_of(source.removeprefix(EXAMPLE_PREFIX).removesuffix(".toml")) or "experiment"
    isolation = top.read("isolation", lambda value: _some(value, LEVELS), Design.isolation)
    design = Design(
        top.read("name", _name, default),
        source,
        tuple(_read_victim(table) for table in _tables(top, "victim")),
        tuple(_read_aggressor(table) for table in _tables(top, "aggressor")),
        top.read("placements", _placements, Design.placements),
        isolation,
        top.read("scope", _scope, Design.scope),
        top.read("processes", processes, Design.processes),
        top.read("seconds", seconds, Design.seconds),
        top.read("warmup", lambda value: read_number(value, 0, 3_600), Design.warmup),
        top.read("settle", lambda value: read_number(value, 0, 3_600), Design.settle),
        top.read("timeout", lambda value: read_number(value, 0.1, 86_400), Design.timeout),
        top.read("seed", seed, Design.seed),
        top.read("victim_pcpu", lambda value: read_whole(value, 0, 8191), None),
    )
    if not design.victims and "victim" not in top.rest:
        faults.note("victim: want at least one, under [[victim]]")
    for key, programs in (("victim", design.victims), ("aggressor", design.aggressors)):
        _check_names(key, [one.name for one in programs], faults)
    top.refuse_others()
    if faults.found:
        raise DesignError(source, faults.found)
    return design


def processes(value: object) -> int:
    """Return how many processes per condition *value* says.

    :raises ValueError: saying what is wanted; so for the two below
    """
    return read_whole(value, 1, 10_000)


def seconds(value: object) -> float:
    """Return how long each measures."""
    return read_number(value, 0.01, 86_400)


def seed(value: object) -> int:
    """Return the seed of the order."""
    return read_whole(value, 0, 2**63 - 1)


def _tables(top: Table, key: str) -> list[Table]:
    value = top.take(key)
    if value is None:
        return []
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        top.fault(key, f"want each under [[{key}]], got {shown(value)}")
        return []
    return [Table(f"{key}[{index}]", table, top.faults) for index, table in enumerate(value)]


def _read_victim(table: Table) -> Victim:
    probe, command, options = _read_program(table, _VICTIMS)
    metric = table.read("metric", read_text, Victim.metric)
    unit, better = table.read("unit", one_of(UNITS), ""), table.read("better", one_of(BETTER), Victim.better)
    tool = table.read("tool", one_of(tuple(PARSERS)), Victim.tool)
    for key, value in (("unit", unit), ("tool", tool)):
        if value and not command:
            table.fault(key, "is for a command; a probe says it itself")
    if command:
        _check_command(table, metric, tool)
    qemu = _read_machine(table, command) if "qemu" in table.rest else None
    table.known.append("qemu")
    # The same probe outside is what it is compared with.
    default = f"{probe}-in-guest" if qemu is not None else probe or _name_of(command[0] if command else "")
    name = table.read("name", _name, default or "command")
    table.refuse_others()
    return Victim(name, probe, command, options, metric, unit, better, tool, qemu)


def _read_machine(table: Table, command: tuple[str, ...]) -> tuple[tuple[str, object], ...]:
    from ..qemu import config

    if command:
        table.fault("qemu", "is for a probe: the built-in guest has no other programs")
    keys = table.table("qemu")
    given = tuple(keys.rest.items())
    config.read_machine(keys, "true", "record")
    return given


def _read_aggressor(table: Table) -> Aggressor:
    probe, command, options = _read_program(table, _AGGRESSORS)
    name = table.read("name", _name, probe or _name_of(command[0] if command else "") or "command")
    count = table.read("count", lambda value: read_whole(value, 1, 8192), Aggressor.count)
    vm = table.read("vm", read_flag, Aggressor.vm)
    table.refuse_others()
    return Aggressor(name, probe, command, options, count, vm)


def _read_program(table: Table, probes: Sequence[str]) -> tuple[str, tuple[str, ...], tuple[tuple[str, str], ...]]:
    given = [key for key in ("probe", "command") if key in table.rest]
    if len(given) != 1:
        table.fault(None, f'want probe = "NAME" or command = ["program", ...], got {" and ".join(given) or "neither"}')
    probe = table.read("probe", one_of(tuple(probes)), "")
    command = table.read("command", read_argv, ())
    options = table.table("options")
    if command and options.rest:
        table.fault("options", "are a probe's; a command has its own arguments")
    found: list[tuple[str, str]] = []
    for key in tuple(options.rest):
        text = options.read(key, _option, "")
        found.append((key, text))
    if probe and found:
        _check_options(options, probe, found)
    return probe, command, tuple(found)


def _option(value: object) -> str:
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, int | float):
        return str(value)
    return read_text(value)


def _check_options(table: Table, probe: str, options: list[tuple[str, str]]) -> None:
    for key, text in options:
        if key in ("json", "seconds", "warmup"):
            table.fault(
                key, "is the experiment's to say" + ("" if key == "json" else f": {key} at the top of the file")
            )
            continue
        try:
            parameter.from_options(probe, find(probe).parameters, [f"--{key.replace('_', '-')}={text}"])
        except Refused as refusal:
            table.fault(key, refusal.problem)


def _check_command(table: Table, metric: str, tool: str) -> None:
    # By the probe that will run it.
    for key, option, text in (("metric", "--metric", metric), ("tool", "--parse", tool)):
        if text:
            try:
                parameter.from_options("command", find("command").parameters, [f"{option}={text}"])
            except Refused as refusal:
                table.fault(key, refusal.problem.removeprefix(f"{option}: "))


def _check_names(key: str, names: list[str], faults: Faults) -> None:
    for index, name in enumerate(names):
        if name and name in names[:index]:
            faults.note(f"{key}[{index}].name: {name!r} is {key}[{names.index(name)}]'s name already")


def _name(value: object) -> str:
    text = read_text(value)
    if len(text) > 40 or not set(text) <= _NAME or text[0] in "._-":
        raise ValueError(
            f"a name has 1 to 40 of a-z, 0-9, '.', '_', '-', and starts with a letter or digit, got {shown(text)}"
        )
    return text


def _name_of(path: str) -> str:
    # A name like that of the file at *path*, in the letters that a name may have.
    text = os.path.basename(path.rstrip("/")).lower()
    return "".join(c if c in _NAME else "-" for c in text).strip("._-")[:40].strip("._-")


def _some(value: object, choices: tuple[str, ...]) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    read: Callable[[object], str] = one_of(choices)
    found = tuple(read(one) for one in values)
    if not found or len(set(found)) != len(found):
        raise ValueError(f"want one or more of {', '.join(choices)}, each once, got {shown(value)}")
    return found


def _placements(value: object) -> tuple[str, ...]:
    return () if value == "all" else _some(value, DEGREES)


def _scope(value: object) -> str:
    from ..isolation.scope import parse as check

    text = read_text(value)
    if text != OWN_SCOPE:
        check(text)
    return text
