"""What can be set about a probe: options on a command line, variables in the environment of a guest.

``--threshold-ns 2000`` and ``HOSTPART_PROBE_THRESHOLD_NS=2000`` mean the same. A name that the probe does not have
is an error in both, since a misspelt limit must not pass.
"""

from __future__ import annotations

from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    Value = bool | int | float | str

__all__ = ["PREFIX", "Parameter", "from_environment", "from_options", "table"]

PREFIX = "HOSTPART_PROBE_"
_FLAGS = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}


class Parameter:
    """One thing that can be set.

    :ivar name: such as ``threshold_ns``, with its unit where it has one
    :ivar default: its type is the parameter's: a flag (False), a whole number, a number, or text, which is one of
        *choices* where there are any
    :ivar says: what it means, for the help
    :ivar low: the smallest value, for numbers
    :ivar high: the largest
    :ivar check: for text: raises ValueError, saying what was wanted, where it is none that can be; or None
    :ivar required: whether it has to be given; the default then stands for nothing but the type
    :ivar example: a value as TOML, for the help
    """

    __slots__ = ("check", "choices", "default", "example", "high", "low", "name", "required", "says")

    def __init__(
        self,
        name: str,
        default: Value,
        says: str,
        *,
        low: float = 0,
        high: float = 1e9,
        choices: tuple[str, ...] = (),
        check: Callable[[str], object] | None = None,
        required: bool = False,
        example: str = '"1"',
    ) -> None:
        self.name, self.default, self.says = name, default, says
        self.low, self.high, self.choices = low, high, choices
        self.check, self.required, self.example = check, required, example

    @property
    def option(self) -> str:
        """Its name on a command line."""
        return f"--{self.name.replace('_', '-')}"

    @property
    def variable(self) -> str:
        """Its name in the environment."""
        return f"{PREFIX}{self.name.upper()}"

    def parse(self, text: str) -> Value:
        """Return the value that *text* means.

        :raises ValueError: saying what was wanted
        """
        if isinstance(self.default, bool):
            if text not in _FLAGS:
                raise ValueError(f"want 0 or 1, got {text!r}")
            return _FLAGS[text]
        if isinstance(self.default, str):
            if self.choices and text not in self.choices:
                raise ValueError(f"want one of {', '.join(self.choices)}, got {text!r}")
            if self.check:
                self.check(text)
            return text
        whole = isinstance(self.default, int)
        kind = "whole number" if whole else "number"
        try:
            number = (int if whole else float)(text) if text.isascii() else self.low - 1
        except ValueError:
            number = self.low - 1
        if not self.low <= number <= self.high:  # false for what is not a number, too
            raise ValueError(f"want a {kind} from {self.low:g} to {self.high:g}, got {text!r}")
        return number


def from_options(probe: str, parameters: Sequence[Parameter], words: Sequence[str]) -> dict[str, str]:
    """Return the variables that options on a command line stand for, each checked.

    :param words: ``--name value`` or ``--name=value``; a flag alone means yes
    :raises Refused: for an option that the probe does not have, and for a value that the option can't have
    """
    named = {parameter.option: parameter for parameter in parameters}
    found: dict[str, str] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        option, equals, text = word.partition("=")
        parameter = named.get(option)
        if parameter is None:
            raise _unknown(probe, f"option {word!r}", option, list(named))
        if not equals:
            if isinstance(parameter.default, bool):
                text = "1"
            elif rest:
                text = rest.pop(0)
            else:
                raise Refused(f"option {option} of probe {probe!r} wants a value", _help(probe))
        _checked(probe, parameter, text, option)
        found[parameter.variable] = text
    return found


def from_environment(probe: str, parameters: Sequence[Parameter], environ: Mapping[str, str]) -> dict[str, Value]:
    """Return every parameter's value, by name: what the environment says, else its default.

    :raises Refused: for a variable of :data:`PREFIX` that the probe does not have, for a value it can't have, and for
        one that is missing
    """
    named = {parameter.variable: parameter for parameter in parameters}
    for variable in environ:
        if variable.startswith(PREFIX) and variable not in named:
            raise _unknown(probe, f"variable {variable}", variable, list(named))
    values: dict[str, Value] = {}
    for variable, parameter in named.items():
        text = environ.get(variable)
        values[parameter.name] = parameter.default
        if text is not None:
            values[parameter.name] = _checked(probe, parameter, text, variable)
        elif parameter.required:
            raise Refused(f"probe {probe!r} wants {parameter.option}, or {variable}", _help(probe))
    return values


def table(parameters: Sequence[Parameter]) -> str:
    """Return the help on all parameters, a line or two each."""
    lines = []
    for parameter in parameters:
        default = parameter.default
        shown = "" if isinstance(default, bool) or default == "" else f" (default: {default})"
        choices = f": {', '.join(parameter.choices)}" if parameter.choices else ""
        lines.append(f"  {parameter.option:<16} {parameter.says}{choices}{shown}")
    return "\n".join(lines)


def _checked(probe: str, parameter: Parameter, text: str, where: str) -> Value:
    try:
        return parameter.parse(text)
    except ValueError as error:
        raise Refused(f"{where}: {error}", _help(probe)) from None


def _unknown(probe: str, what: str, name: str, known: list[str]) -> Refused:
    import difflib

    near = difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]}?" if near else f"; it has {', '.join(known)}"
    return Refused(f"probe {probe!r} has no {what}{hint}", _help(probe))


def _help(probe: str) -> str:
    return f"hostpart run --probe {probe} --help"
