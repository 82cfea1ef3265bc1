"""The one who makes the runs: aggressors up, a fresh VM for the victim, aggressors down, a line in the journal.

A victim is started as any user would, by ``hostpart run``, so it goes the way of every vCPU and its evidence is the
same. This process stays on the pCPUs that the service VM keeps. Whatever ends it, its children end with it, and those
put back what they changed.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time

from workers.probes.measurement import BEGUN
from workers.probes.parameter import PREFIX

from .. import procfs, recovery, tree
from ..cpuset import CpuSet
from ..errors import Failed
from ..evidence import utc
from . import load
from .design import OWN_SCOPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import FrameType
    from typing import Any

    from .design import Aggressor, Design, Victim
    from .results import Journal
    from .schedule import Condition, Plan, Run

__all__ = ["Runner"]

_PROBE_WAIT_S = 120.0  # beyond what it measures: a loop may be compiled first
_GRACE_S = 10.0  # between SIGTERM and SIGKILL; a VM's front puts the host back meanwhile
_LOOK_S = 0.25  # between two looks at a child, and at the display
_TROUBLE = 3  # runs of a victim in a row that failed: what is wrong will not mend itself
_OUTPUT = 1 << 20  # bytes of an output that are looked at
_ENDING = frozenset({signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGTSTP})


class _Suspended(BaseException):
    # The terminal's Ctrl-Z: nothing may run on meanwhile, and a run with a pause in it says nothing.
    pass


class Runner:
    """Makes the runs of a plan that are not made yet.

    :param kept: pCPUs (Linux numbers) that the service VM keeps: this process stays there
    :param session: the number of this start
    :param hear: told ``(run, document)`` before each run, and again and again while it lasts, with None, and after it
    :ivar given_up: victims whose runs failed one after the other
    """

    def __init__(
        self,
        design: Design,
        plan: Plan,
        journal: Journal,
        session: int,
        kept: CpuSet,
        hear: Callable[[Run, dict[str, Any] | None], None] = lambda *_: None,
    ) -> None:
        self.design, self.plan, self.journal, self.session, self.hear = design, plan, journal, session, hear
        self.given_up: list[str] = []
        self._victims = {one.name: one for one in design.victims}
        self._aggressors = {one.name: one for one in design.aggressors}
        self._usable = CpuSet.of(os.sched_getaffinity(0))
        self._kept = kept
        self._folder = os.path.abspath(os.path.join(journal.directory, "running"))

    def run(self, done: Collection[int] = ()) -> int:
        """Make every run that is not in *done*; return how many failed.

        A victim of which run after run fails is given up; the others go on.

        :raises Failed: where the journal can't be written, or no victim is left
        """
        tree.adopt()
        os.sched_setaffinity(0, self._kept)
        stop = signal.getsignal(signal.SIGTSTP)
        if stop == signal.SIG_DFL:
            signal.signal(signal.SIGTSTP, _suspend)
        failed = 0
        in_a_row = dict.fromkeys(self._victims, 0)
        try:
            for run in self.plan.runs:
                victim = run.condition.victim
                if run.number in done or in_a_row[victim] == _TROUBLE:
                    continue
                error = self._make_and_keep(run)["error"]
                failed += error is not None
                in_a_row[victim] = in_a_row[victim] + 1 if error else 0
                if in_a_row[victim] == _TROUBLE:
                    self.given_up.append(victim)
                    if len(self.given_up) == len(self._victims):
                        raise Failed(
                            f"{_TROUBLE} runs in a row failed, the last one thus: {error['problem']}", error["remedy"]
                        )
        finally:
            signal.signal(signal.SIGTSTP, stop)
            os.sched_setaffinity(0, self._usable)
            recovery.tidy()
        return failed

    def _make_and_keep(self, run: Run) -> dict[str, Any]:
        while True:
            try:
                self.hear(run, None)
                # From the moment that its processes are being ended, which no signal may cut short, until it is kept.
                document = self._make(run)
                self.journal.append(document)
                self.hear(run, document)
            except _Suspended:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
                os.kill(os.getpid(), signal.SIGSTOP)
                continue  # the run is made again
            finally:
                signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
            return document

    def _make(self, run: Run) -> dict[str, Any]:
        condition, begun = run.condition, time.time()
        victim = self._victims[condition.victim]
        document: dict[str, Any] = {
            "schema": 1,
            "run": run.number,
            "block": run.block,
            "session": self.session,
            "condition": condition.id,
            **{name: value for name, value in condition.to_json().items() if name != "id"},
            "started": utc(begun),
            "seconds": None,
            "metrics": {},
            "primary": None,
            "record": None,
            "aggressors": [],
            "evidence": None,
            "verdict": None,
            "reasons": [],
            "error": None,
        }
        beside: list[_Process] = []
        seen: list[tuple[bool, CpuSet | None]] = []
        try:
            shutil.rmtree(self._folder, ignore_errors=True)  # a killed one's
            os.mkdir(self._folder)
            try:
                if condition.aggressor is not None:
                    self._start_aggressors(run, self._aggressors[condition.aggressor], condition, beside)
                self._measure(run, victim, condition, document)
            finally:
                signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
                seen = [(one.alive(), one.allowed()) for one in beside]
                self._end(beside)
            found = zip(beside, seen, strict=True)
            told = [one.to_json(living, cpus) for one, (living, cpus) in found]
            document["aggressors"] = told
            document["error"] = document["error"] or self._wrong(condition, beside, told)
        except _NotBegun as error:
            document["error"] = {"problem": error.args[0], "remedy": error.args[1]}
        except OSError as error:
            raise Failed(
                f"run {run.number} cannot be made: {error.strerror}{f': {error.filename}' if error.filename else ''}",
                "mend what it says, then give the same command again: it goes on where it stopped",
            ) from None
        finally:
            shutil.rmtree(self._folder, ignore_errors=True)
        document["seconds"] = round(time.time() - begun, 3)
        return document

    def _end(self, beside: list[_Process]) -> None:
        for one in beside:
            one.tell()
        for one in beside:
            one.end()
        # What they have orphaned came here: a keeper without its front puts the host back, and has its time for that.
        until = time.monotonic() + _GRACE_S
        while tree.descendants(os.getpid()) and time.monotonic() < until:
            time.sleep(0.05)
        tree.end(os.getpid())

    # -- aggressors --------------------------------------------------------------------------------------

    def _start_aggressors(self, run: Run, what: Aggressor, condition: Condition, beside: list[_Process]) -> None:
        pcpus = condition.aggressor_pcpus or CpuSet()
        name, options = what.probe, dict(what.options)
        if what.command:
            name, options = "command", {"argv": json.dumps(what.command)}
        else:
            options |= {"seconds": "0", "warmup": "0"}
        variables = {f"{PREFIX}{key.upper()}": text for key, text in {"json": "1", **options}.items()}
        count = 1 if condition.placed == "vm" else what.count
        for number in range(count):
            path = f"{self._folder}/aggressor{number}"
            env = {**_environ(), **variables, BEGUN: f"{path}.begun"}
            if condition.placed == "vm":
                vm = ("run", "--pcpus", str(pcpus), "--smt", "shared", "--name", f"aggressor-{os.getpid()}")
                argv = load.argv(self._usable, "hostpart", *vm, "--probe", name)
                beside.append(_Process(what.name, pcpus, "vm", argv, env, path))
                continue
            # Pinned one to each, from the first again where there are fewer; free ones may go anywhere.
            order = condition.aggressor_order
            cpus = pcpus if condition.degree == "free" else CpuSet.of([order[number % len(order)]])
            beside.append(_Process(what.name, cpus, "host", load.argv(cpus, "probe", name), env, path))
        until = time.monotonic() + _PROBE_WAIT_S
        for one in beside:
            while not one.begun():
                if not one.alive() or time.monotonic() > until:
                    how = f"exit status {one.status}" if not one.alive() else f"it had {_PROBE_WAIT_S:g} s"
                    raise _NotBegun(
                        f"{one.name} did not begin ({how}){one.last_words()}", "run it alone, and see what it says"
                    )
                self._pause(run, 0.02)
        self._pause(run, self.design.settle)

    def _pause(self, run: Run, seconds: float) -> None:
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _LOOK_S))
            if left > _LOOK_S:
                self.hear(run, None)

    def _wrong(self, condition: Condition, beside: list[_Process], told: list[dict[str, Any]]) -> dict[str, str] | None:
        for one, what in zip(beside, told, strict=True):
            if not what["alive"]:
                return {
                    "problem": f"{one.name} ended before the victim (exit status {one.status}){one.last_words()}",
                    "remedy": "let it run until it is ended by SIGTERM",
                }
            # Above that level it may have been moved, which is what is measured.
            allowed = what["allowed"]
            if condition.isolation == "affinity" and allowed and not CpuSet.parse(allowed) <= one.pcpus:
                return {
                    "problem": f"{one.name} was to run on pCPU {one.pcpus} and may run on {allowed}",
                    "remedy": "let it leave its affinity alone",
                }
            if what["did"] is None:
                return {
                    "problem": f"{one.name} gave no record of what it did{one.last_words()}",
                    "remedy": "run it alone, and see what it says",
                }
        return None

    # -- the victim --------------------------------------------------------------------------------------

    def _measure(self, run: Run, victim: Victim, condition: Condition, document: dict[str, Any]) -> None:
        evidence = f"{self._folder}/evidence.json"
        scope = self.design.scope.replace(OWN_SCOPE, f"tree:{os.getpid()}")
        # A victim has its core for itself, but where the core's other thread is what it is to share.
        smt = "shared" if condition.degree == "sibling" else "exclusive"
        if victim.qemu is None:
            words = (
                *("run", "--name", f"victim-{os.getpid()}", "--pcpus", str(condition.victim_pcpu), "--smt", smt),
                *("--isolation", condition.isolation, "--require", *(("--scope", scope) if scope else ())),
                *("--evidence", evidence, "--probe", victim.probe or "command", *_options(victim, self.design)),
            )
        else:
            path, evidence = f"{self._folder}/victim.toml", f"{self._folder}/victim-{os.getpid()}.json"
            with open(path, "w", encoding="utf-8") as file:
                file.write(self._scenario(victim, condition, smt, scope))
            words = ("launch", path, "--results", self._folder)
        argv = load.argv(self._usable, "hostpart", *words)
        process = _Process(victim.name, CpuSet(), "", argv, _environ(), f"{self._folder}/victim")
        limit = self.design.timeout if victim.command else self.design.seconds + self.design.warmup + _PROBE_WAIT_S
        until = time.monotonic() + limit
        try:
            while not process.wait(_LOOK_S):
                self.hear(run, None)
                if time.monotonic() > until:
                    document["error"] = {
                        "problem": f"{victim.name} did not end within {limit:g} s",
                        "remedy": "see what it waits for; 'timeout' in the file is how long a command may take",
                    }
                    break
        finally:
            signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            process.tell()
            process.end()
        _take_evidence(evidence, document)
        if document["error"] is not None:
            return
        record = process.record("out" if victim.qemu is None else "record")
        if record is None or process.status:
            document["error"] = {
                "problem": f"{victim.name} gave no record (exit status {process.status}){process.last_words()}",
                "remedy": f"run it alone: {_alone(victim, condition)}",
            }
            return
        document.update(record=record, metrics=record["metrics"], primary=_primary(victim, record))
        if document["primary"] is None or record["metrics"][document["primary"]]["value"] is None:
            document["error"] = {
                "problem": f"{victim.name} did not measure {document['primary'] or victim.metric or 'anything'}",
                "remedy": f"take a metric that it has: {', '.join(record['metrics']) or 'it has none'}",
            }

    def _scenario(self, victim: Victim, condition: Condition, smt: str, scope: str) -> str:
        # Of a victim inside a guest operating system: the same VM, with a machine in it.
        vm = {
            "name": f"victim-{os.getpid()}",
            "pcpus": [condition.victim_pcpu],
            "smt": smt,
            "isolation": condition.isolation,
            "require": True,
            **({"scope": scope} if scope else {}),
        }
        machine = {
            **dict(victim.qemu or ()),
            "run": " ".join(("probe", victim.probe, *_options(victim, self.design))),
            "console": f"file:{self._folder}/victim.console",
            "output": f"{self._folder}/victim.record",
        }
        lines = ["[[vm]]", *(f"{key} = {_toml(value)}" for key, value in vm.items())]
        lines += ["[vm.qemu]", *(f"{key} = {_toml(value)}" for key, value in machine.items())]
        return "\n".join((*lines, ""))


def _toml(value: object) -> str:
    # What JSON writes of text, numbers and truth is TOML too; tables it writes with colons.
    if isinstance(value, dict):
        return f"{{ {', '.join(f'{_toml(key)} = {_toml(item)}' for key, item in value.items())} }}"
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return json.dumps(value)


class _NotBegun(Exception):
    # An aggressor; problem and remedy.
    pass


def _suspend(_number: int, _frame: FrameType | None) -> None:
    raise _Suspended


class _Process:
    # A child of this process, in a session of its own: a terminal's Ctrl-C is this process's to pass on.
    def __init__(self, name: str, pcpus: CpuSet, placed: str, argv: list[str], env: dict[str, str], path: str) -> None:
        self.name, self.pcpus, self.placed, self.path = name, pcpus, placed, path
        with open(f"{path}.out", "wb") as out, open(f"{path}.err", "wb") as err:
            self._child = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env, start_new_session=True
            )

    @property
    def status(self) -> int | None:
        return self._child.returncode

    def alive(self) -> bool:
        return self._child.poll() is None

    def begun(self) -> bool:
        return os.path.exists(f"{self.path}.begun")

    def allowed(self) -> CpuSet | None:
        """Return where it, and all that it has forked, may run; None for a VM, whose evidence says it."""
        if self.placed != "host":
            return None
        mask = 0
        for pid in (self._child.pid, *(member.pid for member in tree.descendants(self._child.pid))):
            for tid in procfs.threads(pid):
                try:
                    mask |= CpuSet.of(os.sched_getaffinity(tid)).mask
                except (ProcessLookupError, PermissionError):
                    continue
        return CpuSet(mask)

    def wait(self, seconds: float) -> bool:
        """Return whether it has ended within *seconds*."""
        try:
            self._child.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def tell(self) -> None:
        if self.alive():
            self._child.terminate()

    def end(self) -> None:
        if not self.wait(_GRACE_S):
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def record(self, kind: str = "out") -> dict[str, Any] | None:
        lines = [line for line in self._tail(kind).splitlines() if line.startswith('{"schema"')]
        try:
            found = json.loads(lines[-1]) if lines else None
            json.dumps(found, allow_nan=False)
        except (ValueError, RecursionError):
            return None
        metrics = found.get("metrics") if isinstance(found, dict) else None
        if found is None or not isinstance(metrics, dict) or found.get("primary") not in metrics:
            return None
        return dict(found)

    def last_words(self) -> str:
        lines = [line.removeprefix("hostpart: ") for line in self._said().strip().splitlines()]
        said = [line for line in lines if not line.startswith("try: ")]
        return f": {' / '.join(said[-2:])}" if said else ""

    def _said(self) -> str:
        return f"{self._tail('console')}\n{self._tail('err')}"

    def _tail(self, kind: str) -> str:
        try:
            with open(f"{self.path}.{kind}", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _OUTPUT))
                return file.read().decode("utf-8", "replace")
        except OSError:
            return ""

    def to_json(self, alive: bool, allowed: CpuSet | None) -> dict[str, Any]:
        record = self.record() or {}
        name = record.get("primary")
        return {
            "name": self.name,
            "pid": self._child.pid,
            "pcpus": str(self.pcpus),
            "allowed": None if allowed is None else str(allowed),
            "as": self.placed,
            "alive": alive,
            "exit": None if alive else self.status,
            "did": {"metric": name, **record["metrics"][name]} if name else None,
        }


def _environ() -> dict[str, str]:
    # What the user has set for probes of their own is no part of the design.
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def _options(victim: Victim, design: Design) -> tuple[str, ...]:
    options = {"json": "1", **dict(victim.options)}
    if victim.command:
        options |= {"argv": json.dumps(victim.command), "metric": victim.metric, "unit": victim.unit}
        options |= {"better": victim.better, "parse": victim.tool}
        options = {name: text for name, text in options.items() if text}
    else:
        options |= {"seconds": str(design.seconds), "warmup": str(design.warmup)}
    return tuple(f"--{name.replace('_', '-')}={text}" for name, text in options.items())


def _alone(victim: Victim, condition: Condition) -> str:
    import shlex

    if victim.qemu is not None:
        return "'hostpart launch' with the victim's keys under [vm.qemu], and run = \"probe " + f'{victim.probe}"'
    guest = ["--probe", victim.probe] if victim.probe else ["--", *victim.command]
    options = [f"--{name.replace('_', '-')}={text}" for name, text in victim.options]
    return shlex.join(["hostpart", "run", "--pcpus", str(condition.victim_pcpu), *guest, *options])


def _primary(victim: Victim, record: dict[str, Any]) -> str | None:
    name = victim.metric if victim.probe and victim.metric else record["primary"]
    return name if name in record["metrics"] else None


def _take_evidence(path: str, document: dict[str, Any]) -> None:
    try:
        with open(path, encoding="utf-8") as file:
            evidence = json.load(file)
    except (OSError, ValueError):
        return  # it was ended before there was any
    document["evidence"] = evidence
    document["verdict"], document["reasons"] = evidence.get("verdict"), evidence.get("reasons", [])
