"""What an experiment does now: a live display on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time

from .table import plain

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from types import TracebackType
    from typing import Any, TextIO

    from rich.live import Live

    from ..experiment.schedule import Plan, Run

__all__ = ["Progress"]


class Progress:
    """Tells of each run.

    Nothing is drawn by a thread: whoever forks must have none, and a display that draws by itself would be one more
    thing that runs while the victim measures.

    :param done: the runs that were made before
    :param stream: where to; the display is for a terminal only
    """

    def __init__(self, plan: Plan, done: Collection[int], stream: TextIO | None) -> None:
        self.plan, self.made, self.failed = plan, len(done), 0
        self._stream = stream
        self._live: Live | None = _display_on(stream)
        self._left = sum(1 for one in plan.runs if one.number not in done)
        self._spent_s = 0.0
        self._new = 0
        self._last: dict[str, str] = {}
        self._now: Run | None = None
        self._begun = time.monotonic()

    def __enter__(self) -> Progress:
        self._on_terminal(lambda live: live.start())
        return self

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Take the display away; what was said stays."""
        self._on_terminal(lambda live: live.stop())
        self._live = None

    def hear(self, run: Run, document: dict[str, Any] | None) -> None:
        """Take what the runner says: *document* is None before a run, and while it lasts."""
        if document is None:
            if self._now is not run:
                self._now, self._begun = run, time.monotonic()
            self._on_terminal(lambda live: live.update(self._display(run), refresh=True))
            return
        self._now = None
        self._spent_s += time.monotonic() - self._begun
        self._new += 1
        self._left -= 1
        self.made += 1
        self.failed += document["error"] is not None
        self._last[run.condition.id] = plain(self._figure(document))
        if self._live is None and self._stream is not None:
            try:
                self._stream.write(
                    f"run {run.number + 1} of {len(self.plan.runs)}: {_where(run)}: {self._last[run.condition.id]}; "
                    f"{self._rest()} left\n"
                )
                self._stream.flush()
            except OSError:
                self._stream = None  # nobody reads it any more; the runs count

    def _on_terminal(self, draw: Callable[[Live], None]) -> None:
        if self._live is None:
            return
        try:
            draw(self._live)
        except OSError:
            self._live = self._stream = None  # the terminal is gone

    def _rest(self) -> str:
        each = self._spent_s / self._new if self._new else self.plan.seconds / max(1, len(self.plan.runs))
        ran = time.monotonic() - self._begun if self._now else 0.0
        minutes, seconds = divmod(round(max(0.0, each * self._left - min(ran, each))), 60)
        return f"{minutes} min {seconds:02} s"

    def _figure(self, document: dict[str, Any]) -> str:
        if document["error"] is not None:
            return f"failed: {document['error']['problem']}"
        metric = document["metrics"][document["primary"]]
        return f"{metric['value']:.4g} {metric['unit']}, {document['verdict']}"

    def _display(self, run: Run) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        grid = Table.grid(padding=(0, 2))
        total = len(self.plan.runs)
        head = Table.grid(padding=(0, 2))
        failed = f", {self.failed} failed" if self.failed else ""
        head.add_row(
            ProgressBar(total=total, completed=self.made, width=30),
            f"{self.made} of {total}{failed}",
            f"{self._rest()} left",
        )
        grid.add_row(head)
        grid.add_row(Text(f"now: {_where(run)}", style="bold"))
        shown = Table.grid(padding=(0, 2))
        for condition in self.plan.conditions:
            last = self._last.get(condition.id)
            if last is not None:
                mark = "›" if condition.id == run.condition.id else " "
                where = (
                    condition.placement
                    if condition.aggressor is None
                    else (f"{condition.aggressor} {condition.placement}")
                )
                shown.add_row(mark, Text(condition.victim), Text(where), Text(last))
        grid.add_row(shown)
        return grid


def _display_on(stream: TextIO | None) -> Live | None:
    if stream is None or not stream.isatty():
        return None
    try:
        from rich.console import Console
        from rich.live import Live
    except ImportError:
        return None  # who leaves the report out does not need the extra
    return Live(console=Console(file=stream), auto_refresh=False, transient=True)


def _where(run: Run) -> str:
    one = run.condition
    if one.aggressor is None:
        return f"{one.victim} alone on pCPU {one.victim_pcpu}, {one.isolation}"
    where = "anywhere" if one.degree == "free" else f"on pCPU {one.aggressor_pcpus} ({one.placement})"
    return f"{one.victim} on pCPU {one.victim_pcpu}, {one.aggressor} {where}, {one.isolation}"
