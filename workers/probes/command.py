"""Any command, measured: how long it takes, or the figures that it prints, in the record that all probes write.

The command runs once, as a child on the probe's own pCPU, in a process group of its own, without a shell and with
nothing to read. Its time is that from just before it is spawned until the kernel says that it has ended. What it
writes is read as it comes, so it never waits for a full pipe; the last :data:`KEPT` bytes of each of its two outputs
are kept. When it ends, or SIGTERM ends the probe, the rest of its process group is ended too.

Its figures come from one or both of: a regular expression, and one of the readers of :mod:`workers.probes.tools`.
Standard output is searched first, standard error where that has nothing. A command that fails, or does not print what
it was said to print, has its record too, with what is not known as null; the probe's exit status is then 1.
"""

from __future__ import annotations

import json
import math
import os
import re
import select
import signal
import time

from . import measurement, tools
from .parameter import PREFIX, Parameter
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from typing import Any

    from .measurement import Measurement

    Reader = Callable[[str], tuple[dict[str, Any], ...]]

__all__ = ["KEPT", "PARSERS", "PROBE", "UNITS", "main"]

KEPT = 64 << 10  # bytes of each output
UNITS = ("ns", "ps", "us", "s", "1", "1/s", "B", "B/s", "%")  # that a record may have
_GRACE_S = 3.0  # from SIGTERM to SIGKILL: hostpart gives a guest five seconds, in which the record has to be written
_READS = 16  # of what may be left in a pipe at the end: 1 MiB, the largest that a user may make one
_SHOWN = 300  # characters of the last words that a message quotes


def _json(read: Reader) -> Reader:
    # cyclictest and oslat write JSON between lines of their own where it goes to /dev/stdout.
    def of(text: str) -> tuple[dict[str, Any], ...]:
        start, end = re.search(r"^\{$", text, re.MULTILINE), text.rfind("\n}")
        return read(text[start.start() : end + 2] if start and end > 0 else text)

    return of


def _rtla(text: str) -> tuple[dict[str, Any], ...]:
    return tools.rtla_hist(text[max(0, text.find("# RTLA")) :])


#: What ``--parse`` takes, and what reads it.
PARSERS: dict[str, Reader] = {
    "cyclictest": _json(tools.cyclictest),
    "oslat": _json(tools.oslat),
    "stress-ng": tools.stress_ng,
    "rtla-osnoise": _rtla,
    "rtla-timerlat": _rtla,
}
# What the command has to be told so that there is something to read.
_TELL = {
    "cyclictest": "cyclictest -q --json=/dev/stdout",
    "oslat": "oslat -q --json=/dev/stdout",
    "stress-ng": "stress-ng --metrics",
    "rtla-osnoise": "rtla osnoise hist",
    "rtla-timerlat": "rtla timerlat hist",
}


def main() -> int:
    """Run the probe in this process."""
    return measurement.run(PROBE)


def _measure(run: Measurement) -> None:
    argv = _argv(str(run.parameters["argv"]))
    run.parameters |= {"argv": argv, "exit_status": None}
    run.calibration = {"clock": "CLOCK_MONOTONIC", "ns_per_loop": None, "floor_ns": None, "threshold_ns": None}
    outputs = _Tail(), _Tail()
    try:
        wall_ns = _Child(run, argv, outputs).run()
    except OSError as error:
        # Whatever execve(2) says is why it does not run.
        wall_ns = None
        run.failure = Refused(
            f"{argv[0]!r} cannot be run: {error.strerror}",
            "give the path of a program that can be executed; there is no shell, so no '~', '|' or '$'",
        )
    run.metric("wall", wall_ns / 1e9 if wall_ns is not None else None, "s", "lower", primary=True)
    texts = [tail.text() for tail in outputs]
    status = run.parameters["exit_status"]
    if status and not run.cut_short:
        how = f"exit status {status}" if status > 0 else f"signal {-status}"
        words = " ".join((texts[1].strip() or texts[0].strip())[-_SHOWN:].split())
        run.failure = Refused(
            f"{argv[0]!r} failed, {how}{f': {words}' if words else ''}", "run it by itself to see all that it says"
        )
    _read(run, texts)


def _read(run: Measurement, texts: list[str]) -> None:
    # A failure of the command is what is said, and not what it therefore didn't print.
    quiet = bool(run.failure) or run.cut_short
    problem = None
    if run.parameters["parse"] != "none":
        problem = _parse(run, str(run.parameters["parse"]), texts)
    if run.parameters["metric"]:
        problem = _search(run, str(run.parameters["metric"]), texts) or problem
    if problem and not quiet:
        run.failure = problem


def _parse(run: Measurement, parser: str, texts: list[str]) -> Refused | None:
    reason = ""
    for text in texts:
        try:
            records = PARSERS[parser](text)
        except (ValueError, KeyError, TypeError, IndexError) as error:
            # The readers check what they are given, but a tail may begin or a killed tool end anywhere.
            reason = reason or f"{error}"
            continue
        if records:
            # Of several, each one's figures are led by what it is of: the stressor, else its place in the output.
            names = [one["probe"].partition(":")[2] for one in records]
            if len(set(names)) < len(names) or not all(names):
                names = [str(number) for number in range(len(records))]
            prefixes = [f"{name}_" for name in names] if len(records) > 1 else [""]
            for prefix, one in zip(prefixes, records, strict=True):
                run.adopt(one, prefix)
            run.primary = prefixes[0] + records[0]["primary"]
            return None
    run.primary = None
    return Refused(
        f"no figures of {parser} in what {run.parameters['argv'][0]!r} wrote: {reason or 'nothing was measured'}",
        f"have it write them: {_TELL[parser]}; the last {KEPT >> 10} KiB are read",
    )


def _search(run: Measurement, pattern: str, texts: list[str]) -> Refused | None:
    regex = re.compile(pattern, re.MULTILINE)
    name = next(iter(regex.groupindex), "metric")
    value, problem = None, f"nothing that {run.parameters['argv'][0]!r} wrote matches {pattern!r}"
    for text in texts:
        found = [match[1] for match in regex.finditer(text)]
        if found:
            value = _number(found[-1])
            problem = f"what {pattern!r} found is no number: {found[-1]!r}"
            break
    run.metric(name, value, str(run.parameters["unit"]), str(run.parameters["better"]), primary=True)
    if value is not None:
        return None
    return Refused(problem, f"a --metric that finds a number in the last {KEPT >> 10} KiB of its output")


def _number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except ValueError:
        return None
    return number if math.isfinite(number) else None


class _Child:
    # The command, from its start until nothing of its process group is left.
    def __init__(self, run: Measurement, argv: list[str], outputs: tuple[_Tail, _Tail]) -> None:
        self._run, self._argv = run, argv
        self._tails: dict[int, _Tail] = {}
        self._outputs = outputs
        seconds = float(run.parameters["seconds"])
        self._until = time.monotonic() + seconds if seconds else math.inf
        self._killing = False

    def run(self) -> int | None:
        """Return how long it took in ns, None where it did not end by itself.

        :raises OSError: as execve(2): it cannot be executed
        """
        woken, wake = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        # A signal's handler runs, and then poll(2) goes on waiting: this has it return.
        before = signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
        try:
            return self._spawn_and_wait(woken) if not self._run.ended else None
        finally:
            signal.set_wakeup_fd(before)
            for fd in (woken, wake, *self._tails):
                os.close(fd)

    def _spawn_and_wait(self, woken: int) -> int | None:
        ends = []
        for tail in self._outputs:
            reads, writes = os.pipe2(os.O_CLOEXEC)
            os.set_blocking(reads, False)
            self._tails[reads] = tail
            ends.append(writes)
        environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
        # What is told to this process's own interpreter to ignore is nothing to the command.
        defaults = [number for number in (signal.SIGPIPE, signal.SIGXFSZ) if signal.getsignal(number) == signal.SIG_IGN]
        actions = [
            (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
            (os.POSIX_SPAWN_DUP2, ends[0], 1),
            (os.POSIX_SPAWN_DUP2, ends[1], 2),
        ]
        try:
            for piece in self._run.whole_run():
                start = time.monotonic_ns()
                pid = os.posix_spawnp(
                    self._argv[0], self._argv, environ, file_actions=actions, setpgroup=0, setsigdef=defaults
                )
                while ends:
                    os.close(ends.pop())
                end = self._wait(pid, woken)
                piece.until_ns = end
        finally:
            for fd in ends:
                os.close(fd)
        # Nothing of its group may go on beside what is measured next. Before the pid is reaped, and can be another's.
        _kill(pid, signal.SIGKILL)
        self._drain(self._tails, _READS)
        _, status, usage = os.wait4(pid, 0)
        self._run.used(usage)
        self._run.parameters["exit_status"] = os.waitstatus_to_exitcode(status)
        return None if self._run.cut_short else end - start

    def _wait(self, pid: int, woken: int) -> int:
        # Until it ends, which is when the kernel says so and not when its outputs are closed: others may hold them.
        pidfd = os.pidfd_open(pid)
        poll = select.poll()
        for fd in (pidfd, woken, *self._tails):
            poll.register(fd, select.POLLIN)
        try:
            while True:
                left = max(0.0, self._until - time.monotonic())
                ready = dict(poll.poll(None if math.isinf(left) else math.ceil(left * 1000)))
                now = time.monotonic_ns()
                for fd in self._drain(ready.keys() & self._tails.keys()):
                    poll.unregister(fd)
                if pidfd in ready:
                    return now
                if woken in ready:
                    os.read(woken, 4096)
                self._end_if_due(pid)
        finally:
            os.close(pidfd)

    def _end_if_due(self, pid: int) -> None:
        over = time.monotonic() >= self._until
        if self._killing:
            if over:
                _kill(pid, signal.SIGKILL)
                self._until = math.inf
        elif over or self._run.ended:
            self._killing = True
            self._run.leave(cut_short=True)
            self._until = time.monotonic() + _GRACE_S
            _kill(pid, signal.SIGTERM)

    def _drain(self, fds: Iterable[int], reads: int = 1) -> list[int]:
        # Read what is there, but not for ever from one who always writes; return those at their end.
        ended = []
        for fd in fds:
            try:
                for _ in range(reads):
                    part = os.read(fd, KEPT)
                    self._tails[fd].add(part)
                    if not part:
                        ended.append(fd)
                        break
            except BlockingIOError:
                pass
        return ended


class _Tail:
    # The end of what was written.
    def __init__(self) -> None:
        self._bytes = bytearray()

    def add(self, part: bytes) -> None:
        self._bytes += part
        if len(self._bytes) > 2 * KEPT:
            del self._bytes[:-KEPT]

    def text(self) -> str:
        return self._bytes[-KEPT:].decode(errors="replace")


def _kill(pgid: int, number: int) -> None:
    try:
        os.killpg(pgid, number)
    except ProcessLookupError:
        pass
    except PermissionError:
        pass  # all that is left of it has become another user


def _argv(text: str) -> list[str]:
    try:
        words = json.loads(text)
        # UnicodeEncodeError, a ValueError, for half of a character.
        usable = words and isinstance(words, list) and not any(b"\0" in os.fsencode(word) for word in words)
    except (ValueError, TypeError):
        usable = False
    if not usable or not all(isinstance(word, str) for word in words):
        raise ValueError(f"""want a JSON list of strings, such as '["./bench", "--fast"]', got {text!r}""")
    if not words[0]:
        raise ValueError(f"want a command as the first of the list, got {text!r}")
    return list(words)


def _check_metric(text: str) -> None:
    try:
        regex = re.compile(text, re.MULTILINE)
    except re.error as error:
        raise ValueError(f"want a regular expression: {error}, got {text!r}") from None
    name = next(iter(regex.groupindex), "metric")
    if regex.groups != 1 or name == "wall":
        raise ValueError(f"want a regular expression with one group, a number, which is not named 'wall', got {text!r}")


PROBE = measurement.Probe(
    "command",
    "any command, once: how long it takes, or the figures that it prints",
    _measure,
    Parameter(
        "argv", "", "the command and its arguments: a JSON list of strings", check=_argv, required=True,
        example="""'["./bench", "--fast"]'""",
    ),
    Parameter(
        "metric", "", "a regular expression with one group, a number; its last match in the output is the primary "
        "metric, named as the group or 'metric'", check=_check_metric,
    ),
    Parameter("unit", "1", "of that number", choices=UNITS),
    Parameter("better", "lower", "which of two such numbers is", choices=("lower", "higher")),
    Parameter("parse", "none", "read its output as this tool's", choices=("none", *PARSERS)),
    Parameter("seconds", 0.0, "end it after so long; 0: when it ends by itself"),
    loops=False,
)  # fmt: skip
