"""The live view of a terminal: progress with rate and remaining time, the reward's course, the held-out scores."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from fmg.cli.metrics import signed, sparkline
from fmg.cli.observers import resumed_text
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import REWARD, headline

_SPARK_WIDTH = 30
# Iterations can take minutes; a shorter window would forget the rate between two of them.
_RATE_WINDOW_SECONDS = 1800.0


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


class LiveReporter:
    """Redraws a few lines in place while work goes on; what has to stay is printed above them.

    Args:
        console: an interactive console.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            _Rate(),
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=_RATE_WINDOW_SECONDS,
            expand=True,
        )
        self._console = console
        self._rewards: list[float] = []
        self._first_scores: dict[str, float] = {}
        self._scores: dict[str, float] = {}
        self._scored_at = 0
        self._iterations: TaskID | None = None
        self._stage: tuple[str, TaskID] | None = None
        self._live = Live(get_renderable=self.view, console=console, refresh_per_second=5)

    def __enter__(self) -> LiveReporter:
        self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()
        self._live.__exit__(kind, error, trace)

    def __call__(self, event: Event) -> None:
        """Updates the view."""
        if isinstance(event, Started):
            self._end_stage()
            self._console.print(Text(event.title, style="bold"), _facts(event))
            self._iterations = self._progress.add_task("iteration", total=event.total)
        elif isinstance(event, StageProgress):
            self._show_stage(event)
        elif isinstance(event, Resumed):
            self._console.print(Text(resumed_text(event)))
            if self._iterations is not None:
                self._progress.update(self._iterations, completed=event.iteration)
            for line in event.lines:
                self._keep(int(line["iteration"]), line)
        elif isinstance(event, IterationDone):
            self._end_stage()
            if self._iterations is not None:
                self._progress.update(self._iterations, completed=event.iteration, total=event.total)
            self._keep(event.iteration, event.metrics)
        elif isinstance(event, Evaluated):
            self._end_stage()
            self._keep(event.iteration, event.metrics)
        elif isinstance(event, Notice):
            self._console.print(Text(event.text, style="yellow" if event.level == "warning" else ""))

    def _keep(self, iteration: int, line: Mapping[str, float]) -> None:
        """Takes in one line of metrics, of a rollout or of an evaluation."""
        if REWARD in line:
            self._rewards.append(line[REWARD])
        elif scores := headline(line):
            self._scores, self._scored_at = scores, iteration
            self._first_scores = self._first_scores or scores

    def _show_stage(self, event: StageProgress) -> None:
        if self._stage is None or self._stage[0] != event.stage:
            self._end_stage()
            # without a total the bar pulses
            self._stage = (event.stage, self._progress.add_task(event.stage, total=None))
        self._progress.update(self._stage[1], completed=event.done, total=event.total or None)

    def _end_stage(self) -> None:
        if self._stage is not None:
            self._progress.remove_task(self._stage[1])
            self._stage = None

    def view(self) -> RenderableType:
        """The lines as they stand now."""
        rows = Table.grid(padding=(0, 2))
        if self._rewards:
            utf8 = self._console.encoding.startswith("utf")
            course = sparkline(self._rewards, _SPARK_WIDTH) if utf8 else ""
            rows.add_row("reward", *_change(self._rewards[-1], self._rewards[0]), Text(course, style="cyan"))
        for name, score in self._scores.items():
            at = f"held out, after iteration {self._scored_at}"
            rows.add_row(name, *_change(score, self._first_scores.get(name, score)), Text(at, style="dim"))
        return Group(self._progress.get_renderable(), rows)


def _change(value: float, first: float) -> tuple[Text, Text]:
    delta = value - first
    style = "green" if delta > 0.0005 else "red" if delta < -0.0005 else "dim"
    return Text(f"{value:.3f}"), Text(signed(delta), style=style)


def _facts(event: Started) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in event.facts.items():
        table.add_row(Text(f"  {name}", style="dim"), Text(value))
    return table
