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
import tempfile
import time

from ..cpuset import CpuSet
from ..errors import Failed
from . import load
from .design import OWN_SCOPE

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from typing import Any

    from .design import Aggressor, Design, Victim
    from .results import Journal
    from .schedule import Condition, Plan, Run

__all__ = ["Runner"]

_PROBE_WAIT_S = 120.0  # beyond what it measures: a loop may be compiled first
_GRACE_S = 10.0  # between SIGTERM and SIGKILL; a VM's front puts the host back meanwhile
_TROUBLE = 3  # runs of a victim in a row that failed: what is wrong will not mend itself
_OUTPUT = 64 << 10  # bytes of stderr that are looked at


class Runner:
    """Makes the runs of a plan that are not made yet.

    :param kept: pCPUs (Linux numbers) that the service VM keeps: this process stays there
    :param session: the number of this start
    :ivar given_up: victims whose runs failed one after the other
    :param hear: told ``(run, document)`` before each run, with None, and after it
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

    def run(self, done: Collection[int] = ()) -> int:
        """Make every run that is not in *done*; return how many failed.

        A victim of which run after run fails is given up; the others go on.

        :raises Failed: where the journal can't be written, or no victim is left
        """
        os.sched_setaffinity(0, self._kept)
        failed = 0
        in_a_row = dict.fromkeys(self._victims, 0)
        try:
            for run in self.plan.runs:
                victim = run.condition.victim
                if run.number in done or in_a_row[victim] == _TROUBLE:
                    continue
                self.hear(run, None)
                document = self._make(run)
                self.journal.append(document)
                self.hear(run, document)
                error = document["error"]
                failed += error is not None
                in_a_row[victim] = in_a_row[victim] + 1 if error else 0
                if in_a_row[victim] == _TROUBLE:
                    self.given_up.append(victim)
                    if len(self.given_up) == len(self._victims):
                        raise Failed(
                            f"{_TROUBLE} runs in a row failed, the last one thus: {error['problem']}", error["remedy"]
                        )
        finally:
            os.sched_setaffinity(0, self._usable)
        return failed

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
            "started": _utc(begun),
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
        folder = tempfile.mkdtemp(prefix="hostpart-experiment-")
        try:
            try:
                if condition.aggressor is not None:
                    self._start_aggressors(self._aggressors[condition.aggressor], condition, folder, beside)
                    time.sleep(self.design.settle)
                self._measure(victim, condition, folder, document)
            finally:
                alive = [one.alive() for one in beside]
                for one in beside:
                    one.tell()
                for one in beside:
                    one.end()
            document["aggressors"] = [one.to_json(living) for one, living in zip(beside, alive, strict=True)]
            dead = [one for one, living in zip(beside, alive, strict=True) if not living]
            if dead and document["error"] is None:
                first = dead[0]
                document["error"] = {
                    "problem": f"{first.name} ended before the victim (exit status {first.status}){first.last_words()}",
                    "remedy": "let it run until it is ended by SIGTERM",
                }
        except OSError as error:
            raise Failed(
                f"run {run.number} cannot be made: {error.strerror}{f': {error.filename}' if error.filename else ''}",
                "mend what it says, then give the same command again: it goes on where it stopped",
            ) from None
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        document["seconds"] = round(time.time() - begun, 3)
        return document

    # -- aggressors --------------------------------------------------------------------------------------

    def _start_aggressors(self, what: Aggressor, condition: Condition, folder: str, beside: list[_Process]) -> None:
        pcpus = condition.aggressor_pcpus or CpuSet()
        kind, words = ("probe", (what.probe,)) if what.probe else ("command", what.command)
        env = {
            **os.environ,
            **_variables({"json": "1", "seconds": "0", "warmup": "0", **dict(what.options)}, what.probe),
        }
        if condition.placed == "vm":
            options = ("--pcpus", str(pcpus), "--smt", "shared", "--name", f"aggressor-{os.getpid()}")
            guest = ("--probe", *words) if what.probe else ("--", *words)
            argv = load.argv(str(self._usable), "front", ("run", *options, *guest))
            beside.append(_Process(what.name, str(pcpus), "vm", argv, env, f"{folder}/aggressor0"))
            return
        for number in range(what.count):
            # Pinned one to each, from the first again where there are fewer; free ones may go anywhere.
            cpus = pcpus if condition.degree == "free" else CpuSet.of([list(pcpus)[number % len(pcpus)]])
            argv = load.argv(str(cpus), kind, tuple(words))
            beside.append(_Process(what.name, str(cpus), "host", argv, env, f"{folder}/aggressor{number}"))

    # -- the victim --------------------------------------------------------------------------------------

    def _measure(self, victim: Victim, condition: Condition, folder: str, document: dict[str, Any]) -> None:
        evidence = f"{folder}/evidence.json"
        scope = self.design.scope.replace(OWN_SCOPE, f"tree:{os.getpid()}")
        words = (
            *("run", "--name", f"victim-{os.getpid()}", "--pcpus", str(condition.victim_pcpu)),
            # A victim has its core for itself, but where the core's other thread is what it is to share.
            *("--smt", "shared" if condition.degree == "sibling" else "exclusive"),
            *("--isolation", condition.isolation, *(("--scope", scope) if scope else ())),
            *("--evidence", evidence, "--probe", victim.probe or "command", *_options(victim, self.design)),
        )
        process = _Process(
            victim.name, "", "", load.argv(str(self._usable), "front", words), dict(os.environ), f"{folder}/victim"
        )
        try:
            process.wait(
                self.design.timeout if victim.command else self.design.seconds + self.design.warmup + _PROBE_WAIT_S
            )
        except subprocess.TimeoutExpired:
            document["error"] = {
                "problem": f"{victim.name} did not end in time",
                "remedy": "see what it waits for; 'timeout' in the file is how long a command may take",
            }
        finally:
            process.tell()
            process.end()
        _take_evidence(evidence, document)
        if document["error"] is not None:
            return
        record = process.record()
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


class _Process:
    # A child of this process, in a session of its own: a terminal's Ctrl-C is this process's to pass on.
    def __init__(self, name: str, pcpus: str, placed: str, argv: list[str], env: dict[str, str], path: str) -> None:
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

    def wait(self, seconds: float) -> None:
        self._child.wait(seconds)

    def tell(self) -> None:
        if self.alive():
            self._child.terminate()

    def end(self) -> None:
        try:
            self._child.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._child.pid, signal.SIGKILL)
            self._child.wait()

    def record(self) -> dict[str, Any] | None:
        try:
            with open(f"{self.path}.out", encoding="utf-8", errors="replace") as file:
                lines = [line for line in file if line.startswith('{"schema"')]
            found = json.loads(lines[-1]) if lines else None
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) and "metrics" in found else None

    def last_words(self) -> str:
        try:
            with open(f"{self.path}.err", "rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - _OUTPUT))
                lines = file.read().decode("utf-8", "replace").strip().splitlines()
        except OSError:
            return ""
        said = [line.removeprefix("hostpart: ") for line in lines if not line.startswith("try: ")]
        return f": {' / '.join(said[-2:])}" if said else ""

    def to_json(self, alive: bool) -> dict[str, Any]:
        record = self.record() or {}
        name = record.get("primary")
        return {
            "name": self.name,
            "pid": self._child.pid,
            "pcpus": self.pcpus,
            "as": self.placed,
            "alive": alive,
            "exit": None if alive else self.status,
            "did": {"metric": name, **record["metrics"][name]} if name else None,
        }


def _options(victim: Victim, design: Design) -> tuple[str, ...]:
    options = {"json": "1", **dict(victim.options)}
    if victim.command:
        options |= {"argv": json.dumps(victim.command), "metric": victim.metric, "unit": victim.unit}
        options |= {"better": victim.better, "parse": victim.tool}
        options = {name: text for name, text in options.items() if text}
    else:
        options = {"seconds": str(design.seconds), "warmup": str(design.warmup), **options}
    return tuple(f"--{name.replace('_', '-')}={text}" for name, text in options.items())


def _variables(options: dict[str, str], probe: str) -> dict[str, str]:
    return {f"HOSTPART_PROBE_{name.upper()}": text for name, text in options.items()} if probe else {}


def _alone(victim: Victim, condition: Condition) -> str:
    import shlex

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


def _utc(at_s: float) -> str:
    return f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(at_s))}.{int(at_s % 1 * 1000):03d}Z"
