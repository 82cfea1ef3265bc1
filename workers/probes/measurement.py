"""What all probes have in common: options, engine, warm-up, slices of time, signals, and the record at the end.

A probe is a :class:`Probe`, whose function is handed a :class:`Measurement`. It prepares, works through
:meth:`Measurement.slices`, and leaves its figures there; :func:`run` does the rest.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import time

from . import engine, parameter, record, seat
from .histogram import Histogram
from .parameter import Parameter
from .refusal import Refused

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import FrameType
    from typing import Any

    from .parameter import Value

__all__ = ["BEGUN", "Measurement", "Probe", "Slice", "run"]

BEGUN = "HOSTPART_BEGUN"  # in the environment: a file that is made when the measurement begins
_MAX_SLICES = 100_000  # a series as long as this says no more than a shorter one of longer slices


class Probe:
    """One kind of probe.

    :ivar name: its module's name
    :ivar says: what it measures or does, for the help
    :ivar measure: does it
    :ivar parameters: what can be set, with what all probes have
    :ivar engines: which of :data:`workers.probes.engine.ENGINES` it can run on
    :ivar loops: whether it has a loop that is timed in slices; if not, it has none of the options on that
    """

    def __init__(
        self,
        name: str,
        says: str,
        measure: Callable[[Measurement], None],
        *parameters: Parameter,
        engines: tuple[str, ...] = ("python",),
        seconds: float = 5.0,
        loops: bool = True,
    ) -> None:
        self.name, self.says, self.measure, self.engines, self.loops = name, says, measure, engines, loops
        loop = (
            Parameter("seconds", seconds, "how long to measure; 0: until SIGTERM ends it"),
            Parameter("warmup", 0.5, "seconds before that, whose results are discarded"),
            Parameter("slice_ms", 100, "length of the slices in the record's series", low=1, high=3_600_000),
            Parameter("engine", "auto", "what runs the loop", choices=("auto", *engines)),
        )
        json = Parameter("json", False, "write the record as one line of JSON")
        self.parameters = (*loop, json, *parameters) if loops else (*parameters, json)

    def help(self) -> str:
        """Return the help on this probe."""
        example = next((one for one in self.parameters if one.required), self.parameters[0])
        return (
            f"usage: hostpart run [options] --probe {self.name} [probe's options]\n\n"
            f"{self.name}: {self.says}\n\n{parameter.table(self.parameters)}\n\n"
            f'In a scenario: python = "workers.probes.{self.name}:main" and, say, '
            f"env = {{ {example.variable} = {example.example} }}"
        )


class Slice:
    """A piece of a measurement's time, CLOCK_MONOTONIC in ns.

    :ivar until_ns: when the probe is to come back
    :ivar end_ns: when it came back
    :ivar values: what the probe says of it, by name; for the series
    """

    __slots__ = ("end_ns", "start_ns", "until_ns", "values", "warm")

    def __init__(self, start_ns: int, until_ns: int, warm: bool) -> None:
        self.start_ns, self.until_ns, self.warm = start_ns, until_ns, warm
        self.end_ns = start_ns
        self.values: dict[str, float | None] = {}

    @property
    def length_ns(self) -> int:
        """How long it really was."""
        return self.end_ns - self.start_ns


class Measurement:
    """One run of a probe, from its options to its record.

    :ivar parameters: every parameter's value; a probe may replace one by what it came to be
    :ivar engine: what the loop runs on
    :ivar ended: whether the end was asked for: by a signal, or by the probe itself
    :ivar calibration: as :func:`workers.probes.engine.calibrate` returns it, or None
    :ivar failure: what went wrong all the same, with its remedy: it is said once the record is written; or None
    """

    def __init__(self, probe: Probe, parameters: dict[str, Value], engine_name: str, fallback: str | None) -> None:
        self.probe, self.engine, self.fallback = probe, engine_name, fallback
        self.parameters: dict[str, Any] = dict(parameters)
        self.calibration: dict[str, Any] | None = None
        self.ended = self.cut_short = self.interrupted = False
        self.failure: Refused | None = None
        self._over = False
        self.primary: str | None = None
        self.metrics: dict[str, dict[str, Any]] = {}
        self.done: list[Slice] = []
        self.dropped = 0
        self.where = seat.describe(os.environ)
        self._histograms: dict[str, Histogram] = {}
        self._read: dict[str, Any] = {}
        self._units: dict[str, str] = {}
        self._usage: list[resource.struct_rusage] = []
        self._times: list[dict[str, Any]] = []

    # -- for the probe -------------------------------------------------------------------------------------

    def whole(self, name: str) -> int:
        """Return a parameter that is a whole number."""
        return int(self.parameters[name])

    def slices(self, *, endless: bool = False) -> Iterator[Slice]:
        """Yield the warm-up, then slice after slice, until the time is over or the end was asked for.

        The probe works until each one's ``until_ns``. Garbage collection is off; what the warm-up left in histograms
        is gone before the first slice. The caller goes on to the end: it calls :meth:`leave` where it has had enough.

        :param endless: whether it is not for the time to end it
        """
        seconds, warmup = (round(float(self.parameters[name]) * 1e9) for name in ("seconds", "warmup"))
        length = self.whole("slice_ms") * 1_000_000
        gc.collect()
        gc.disable()
        try:
            if warmup and not self.ended:
                yield from self._slice(warmup, warm=True)
                for histogram in self._histograms.values():
                    histogram.clear()
            self._note_time()
            end = time.monotonic_ns() + seconds if seconds and not endless else None
            while not self.ended:
                left = length if end is None else end - time.monotonic_ns()
                if left <= 0:
                    break
                yield from self._slice(min(left, length), warm=False)
                self._see_cpu()
        finally:
            gc.enable()
        self._over = True
        self._note_time()

    def whole_run(self) -> Iterator[Slice]:
        """Yield one slice, which is all there is: of what ends by itself."""
        self._note_time()
        yield from self._slice(0, warm=False)
        self._see_cpu()
        self._over = True
        self._note_time()

    def leave(self, *, cut_short: bool) -> None:
        """End with the slice that runs now.

        :param cut_short: whether that is before its time
        """
        self.ended = True
        self.cut_short |= cut_short

    def _slice(self, length_ns: int, *, warm: bool) -> Iterator[Slice]:
        start = time.monotonic_ns()
        one = Slice(start, start + length_ns, warm)
        yield one
        one.end_ns = time.monotonic_ns()
        if warm:
            return
        if len(self.done) < _MAX_SLICES:
            self.done.append(one)
        else:
            self.dropped += 1

    def histogram(self, name: str, unit: str) -> Histogram:
        """Return the record's histogram of that name, made when it is first asked for."""
        return self._histograms.setdefault(name, Histogram(unit))

    def adopt(self, record: Mapping[str, Any], prefix: str = "") -> None:
        """Take over the metrics and histograms of another record, their names led by *prefix*; what is there stays."""
        self.metrics = {prefix + name: one for name, one in record["metrics"].items()} | self.metrics
        self._read |= {prefix + name: one for name, one in record["histograms"].items()}

    def used(self, usage: resource.struct_rusage) -> None:
        """Say what the record is to have for the usage, instead of this process's own."""
        self._usage = [resource.struct_rusage([0] * len(usage)), usage]

    def series(self, name: str, unit: str) -> None:
        """Say what unit the slices' value *name* has; it is then in the record."""
        self._units[name] = unit

    def metric(self, name: str, value: float | None, unit: str, better: str, *, primary: bool = False) -> None:
        """Add one figure to the record."""
        self.metrics[name] = record.metric(value, unit, better)
        if primary:
            self.primary = name

    def percentiles(self, name: str, histogram: str, *, primary: str | None = None) -> None:
        """Add the figures that a histogram of times in ns tells, one of which, such as ``p99``, may be the primary."""
        self.metrics |= record.percentiles(self.histogram(histogram, "ns"), "ns", name)
        if primary:
            self.primary = f"{name}_{primary}"

    def per_second(self, total: float, over_ns: float) -> float | None:
        """Return *total* per second, None where no time has passed."""
        return total * 1e9 / over_ns if over_ns > 0 else None

    # -- for run() -----------------------------------------------------------------------------------------

    def end(self, number: int, _frame: FrameType | None) -> None:
        """Ask for the end: a signal came."""
        if not self._over:
            self.leave(cut_short=bool(self.parameters["seconds"]) or not self.probe.loops)
        self.interrupted |= number == signal.SIGINT

    def _see_cpu(self) -> None:
        cpu = seat.current_cpu()
        if cpu not in self.where["cpus_seen"]:
            self.where["cpus_seen"].append(cpu)

    def _note_time(self) -> None:
        if not self._times:
            _tell_begun()
        now = time.time()
        fraction = int(now % 1 * 1e6)
        utc = f"{time.strftime('%Y-%m-%dT%H:%M:%S', time.gmtime(now))}.{fraction:06}Z"
        self._times.append({"monotonic_ns": time.monotonic_ns(), "utc": utc})
        self._usage.append(resource.getrusage(resource.RUSAGE_SELF))

    def document(self) -> dict[str, Any]:
        """Return the record."""
        started, ended = (*self._times, None, None)[:2]
        first = started["monotonic_ns"] if started else 0
        return record.document(
            self.probe.name,
            self.engine,
            engine_version=_version(self.engine),
            fallback=self.fallback,
            parameters={name: value for name, value in self.parameters.items() if name != "json"},
            started=started,
            ended=ended,
            cut_short=self.cut_short,
            where=self.where,
            calibration=self.calibration,
            primary=self.primary,
            metrics=self.metrics,
            histograms={**{name: one.to_json() for name, one in self._histograms.items()}, **self._read},
            slices={
                "start_ns": [one.start_ns - first for one in self.done],
                "length_ns": [one.length_ns for one in self.done],
                "dropped": self.dropped,
                "series": {
                    name: {"unit": unit, "values": [one.values.get(name) for one in self.done]}
                    for name, unit in self._units.items()
                },
            },
            usage=_used(*self._usage) if len(self._usage) == 2 else None,
        )


def run(probe: Probe) -> int:
    """Run the probe as the environment says and write its record; return the exit status.

    0: the record is written, 1: it can't measure here, or the command that it ran failed, 2: an option is wrong;
    standard error says why. SIGTERM ends it early, with its record; SIGINT too, of which it then dies.
    """
    try:
        values = parameter.from_environment(probe.name, probe.parameters, os.environ)
    except Refused as refusal:
        return _say(probe, refusal, 2)
    as_json = bool(values["json"])
    try:
        name, fallback = engine.choose(probe.name, str(values.get("engine", "auto")), probe.engines)
        measurement = Measurement(probe, {**values, "engine": name} if probe.loops else values, name, fallback)
        before = {number: signal.signal(number, measurement.end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            probe.measure(measurement)
            record.write(measurement.document(), as_json=as_json)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    except Refused as refusal:
        return _say(probe, refusal, 1)
    if measurement.interrupted:
        raise KeyboardInterrupt
    if measurement.failure:
        return _say(probe, measurement.failure, 1)
    return 0


def _tell_begun() -> None:
    # Whoever started this may want to know when it is at work: a loop may take seconds to be compiled.
    path = os.environ.pop(BEGUN, "")
    if path:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644))


def _say(probe: Probe, refusal: Refused, status: int) -> int:
    sys.stderr.write(f"hostpart: probe {probe.name}: {refusal.problem}\ntry: {refusal.remedy}\n")
    return status


def _version(name: str) -> str | None:
    if name == "numba":
        return str(sys.modules["numba"].__version__)
    return ".".join(map(str, sys.version_info[:3]))


def _used(before: resource.struct_rusage, after: resource.struct_rusage) -> dict[str, int]:
    # Source: getrusage(2); of the whole process, all its threads.
    return {
        "user_ns": round((after.ru_utime - before.ru_utime) * 1e9),
        "system_ns": round((after.ru_stime - before.ru_stime) * 1e9),
        "voluntary_switches": after.ru_nvcsw - before.ru_nvcsw,
        "involuntary_switches": after.ru_nivcsw - before.ru_nivcsw,
        "minor_faults": after.ru_minflt - before.ru_minflt,
        "major_faults": after.ru_majflt - before.ru_majflt,
    }
