"""The live view: progress with rate and remaining time, the reward's course, the held-out scores.

A terminal redraws its lines in place; a notebook replaces the output of its cell.
"""

from __future__ import annotations

import importlib
import io
import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TimeRemainingColumn
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fmg.core import metric_keys as keys
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import headline
from fmg.progress.console import SafeConsole
from fmg.progress.figures import signed, sparkline

_SPARK_WIDTH = 30
# Iterations can take minutes; a shorter window would forget the rate between two of them.
_RATE_WINDOW_SECONDS = 1800.0
_NOTEBOOK_WIDTH = 100
# Seconds between two redrawings of a notebook's cell, each of which is stored and sent to the browser.
_NOTEBOOK_PAUSE = 0.2
_NOTEBOOK_FORMAT = '<pre style="line-height:normal;font-family:Menlo,Consolas,monospace">{code}</pre>'


class _Imports:
    """Names the package that is being imported: the newest one of the interpreter, while new ones arrive."""

    def __init__(self) -> None:
        self._count = 0

    def newest(self) -> str:
        """The package, or an empty text when nothing was imported since the last call."""
        names = list(sys.modules)
        grown, self._count = len(names) > self._count, len(names)
        return names[-1].partition(".")[0] if grown else ""


class _Title(ProgressColumn):
    """What is done; with a spinner where nobody knows how much there is, and the package that is being imported."""

    def __init__(self, *, utf8: bool) -> None:
        super().__init__()
        self._spinner = Spinner("dots" if utf8 else "line")
        self._imports = _Imports()
        self._package = ""

    def render(self, task: Task) -> Text:
        if task.total is not None:
            return Text(task.description)
        self._package = self._imports.newest() or self._package
        about = "" if task.fields.get("named") or not self._package else f" {self._package}"
        frame = self._spinner.render(task.get_time())
        return Text.assemble(frame if isinstance(frame, Text) else "", " ", task.description, about)


class _Count(ProgressColumn):
    """Units done of all, or the seconds since the stage began where nobody knows how many there are."""

    def render(self, task: Task) -> Text:
        if task.total is None:
            return Text(f"{task.elapsed or 0.0:.0f} s", style="progress.elapsed")
        return Text(f"{task.completed:.0f}/{task.total:.0f}", style="progress.download")


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        if not task.speed:
            return Text("")
        return Text(f"{task.speed:.1f}/s" if task.speed >= 1 else f"{1 / task.speed:.1f} s each")


class LiveReporter:
    """Redraws a few lines in place during the work; what has to stay is printed above them.

    Args:
        console: an interactive console.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            _Title(utf8=console.encoding.startswith("utf")),
            BarColumn(bar_width=None),
            _Count(),
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
            self._keep_above(Text(event.title, style="bold"), _facts(event))
            self._iterations = self._progress.add_task("iteration", total=event.total)
        elif isinstance(event, StageProgress):
            self._show_stage(event)
        elif isinstance(event, Resumed):
            self._keep_above(Text(event.text))
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
            self._keep_above(Text(event.text, style="yellow" if event.level == "warning" else ""))

    def _keep_above(self, *lines: RenderableType) -> None:
        """Prints what has to stay above the lines that are redrawn."""
        self._console.print(*lines)

    def _keep(self, iteration: int, line: Mapping[str, float]) -> None:
        """Takes in one line of metrics, of a rollout or of an evaluation."""
        if keys.REWARD in line:
            self._rewards.append(line[keys.REWARD])
        elif scores := headline(line):
            self._scores, self._scored_at = scores, iteration
            self._first_scores = self._first_scores or scores

    def _show_stage(self, event: StageProgress) -> None:
        if self._stage is None or self._stage[0] != event.stage:
            self._end_stage()
            # without a total the bar pulses
            self._stage = (event.stage, self._progress.add_task(event.title, total=None))
        self._progress.update(
            self._stage[1],
            description=event.title,
            completed=event.done,
            total=event.total or None,
            named=bool(event.what),
        )

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


class NotebookReporter(LiveReporter):
    """The live view as the output of a notebook's cell, whose HTML is replaced as the work goes on.

    (Rich's own view of notebooks needs ipywidgets.)
    """

    def __init__(self) -> None:
        super().__init__(_html_console())
        self._above: list[RenderableType] = []
        self._display: Any = importlib.import_module("IPython.display")
        self._handle: Any = None
        self._drawn = 0.0

    def __enter__(self) -> NotebookReporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_stage()
        self._draw()

    def __call__(self, event: Event) -> None:
        """Updates the view."""
        super().__call__(event)
        if not isinstance(event, StageProgress) or time.monotonic() - self._drawn >= _NOTEBOOK_PAUSE:
            self._draw()

    def _keep_above(self, *lines: RenderableType) -> None:
        self._above += lines

    def _draw(self) -> None:
        console = _html_console()
        console.print(Group(*self._above, self.view()))
        page = self._display.HTML(console.export_html(inline_styles=True, code_format=_NOTEBOOK_FORMAT))
        if self._handle is None:
            self._handle = self._display.display(page, display_id=True)
        else:
            self._handle.update(page)
        self._drawn = time.monotonic()


def _html_console() -> Console:
    return SafeConsole(
        file=io.StringIO(),
        record=True,
        width=_NOTEBOOK_WIDTH,
        force_terminal=True,
        force_jupyter=False,
        color_system="truecolor",
        markup=False,
        emoji=False,
        highlight=False,
    )


def _change(value: float, first: float) -> tuple[Text, Text]:
    delta = value - first
    style = "green" if delta > 0.0005 else "red" if delta < -0.0005 else "dim"
    return Text(f"{value:.3f}"), Text(signed(delta), style=style)


def _facts(event: Started) -> Table:
    table = Table.grid(padding=(0, 2))
    for name, value in event.facts.items():
        table.add_row(Text(f"  {name}", style="dim"), Text(value))
    return table
