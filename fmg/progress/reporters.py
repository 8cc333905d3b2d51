"""Events as text for people: plain lines for a pipe, and a live view for a terminal or a notebook.

A terminal redraws its lines in place; a notebook replaces the output of its cell.
"""

from __future__ import annotations

import importlib
import io
import itertools
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol, Self

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TimeRemainingColumn
from rich.segment import Segment
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from fmg.core import metric_keys as keys
from fmg.core.display import counted, signed, visible
from fmg.core.events import Evaluated, Event, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import headline

LOADING = StageProgress("loading", 0, 0)
"""The stage reported while torch is being imported, which takes an unknown time."""

# Seconds without a line after which plain output says how far a long stage has come
_HEARTBEAT = 10.0
_SPARK_WIDTH = 30
_BARS = "▁▂▃▄▅▆▇█"
# Iterations can take minutes; a shorter window would forget the rate between two of them.
_RATE_WINDOW_SECONDS = 1800.0
_NOTEBOOK_WIDTH = 100
# Seconds between two redraws of a notebook's cell, each of which is stored and sent to the browser.
_NOTEBOOK_PAUSE = 0.2
_NOTEBOOK_FORMAT = '<pre style="line-height:normal;font-family:Menlo,Consolas,monospace">{code}</pre>'


class SafeConsole(Console):
    """A console for untrusted text: nothing in it moves the cursor or sets the title of the terminal."""

    def render_str(self, text: str, **options: Any) -> Text:
        """A string as it will be shown, so that tables reserve enough space."""
        return super().render_str(visible(text, lines=True), **options)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """The same for other text; Rich's own control codes stay."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, lines=True), style, control)


class Reporter(Protocol):
    """An observer with a beginning and an end."""

    def __call__(self, event: Event) -> None: ...

    def __enter__(self) -> Reporter: ...

    def __exit__(self, *error: Any) -> None: ...


class Stateless:
    """A reporter with nothing to close."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        return None


class PlainReporter(Stateless):
    """One line for each iteration, evaluation and notice; a heartbeat inside long stages.

    Args:
        console: where the lines go.
        clock: returns seconds; a test passes its own.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._last_line = clock()
        self._iteration_began = self._last_line
        self._first: dict[str, float] = {}

    def __call__(self, event: Event) -> None:
        if isinstance(event, Started):
            facts = "".join(f"\n  {name}: {value}" for name, value in event.facts.items())
            self._line(f"{event.title}, {counted(event.total, 'iteration')}{facts}")
            self._iteration_began = self._clock()
        elif isinstance(event, Resumed):
            for line in event.lines:
                self._first = {**_watched(line), **self._first}
            self._line(event.text)
        elif isinstance(event, StageProgress):
            if self._clock() - self._last_line >= _HEARTBEAT:
                self._line(f"{event.title}: {event.done}/{event.total}" if event.total else f"{event.title} ...")
        elif isinstance(event, IterationDone):
            took = self._clock() - self._iteration_began
            self._iteration_began = self._clock()
            scores = self._changes(_watched(event.metrics))
            self._line(f"iteration {event.iteration}/{event.total}  {scores}  {took:.1f} s")
        elif isinstance(event, Evaluated):
            self._line(f"held out, after iteration {event.iteration}  {self._changes(_watched(event.metrics))}")
            self._iteration_began = self._clock()
        elif isinstance(event, Notice):
            self._line(f"{event.level}: {event.text}" if event.level != "info" else event.text)

    def _changes(self, scores: Mapping[str, float]) -> str:
        """Values with their difference from the first value of the run."""
        parts = []
        for name, value in scores.items():
            change = f" ({signed(value - self._first[name])})" if name in self._first else ""
            self._first.setdefault(name, value)
            parts.append(f"{name} {value:.3f}{change}")
        return "  ".join(parts)

    def _line(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)
        self._last_line = self._clock()


def _watched(metrics: Mapping[str, float]) -> dict[str, float]:
    """The values of a line to show: the reward of a rollout, the headline scores of an evaluation."""
    return {"reward": metrics[keys.REWARD]} if keys.REWARD in metrics else headline(metrics)


class _Imports:
    """The package being imported: the newest in the interpreter, as long as new ones appear."""

    def __init__(self) -> None:
        self._count = 0

    def newest(self) -> str:
        """The package, or an empty text when nothing was imported since the last call."""
        names = list(sys.modules)
        grown, self._count = len(names) > self._count, len(names)
        return names[-1].partition(".")[0] if grown else ""


class _Title(ProgressColumn):
    """The current stage, with a spinner and the package being imported if the total is unknown."""

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
    """Units done and in total, or the seconds since the stage began if the total is unknown."""

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
    """Redraws a few lines in place; permanent lines are printed above them.

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

    def __exit__(self, *error: Any) -> None:
        self._end_stage()
        self._live.__exit__(*error)

    def __call__(self, event: Event) -> None:
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
        """Prints permanent lines above the ones that are redrawn."""
        self._console.print(*lines)

    def _keep(self, iteration: int, line: Mapping[str, float]) -> None:
        """Adds one line of metrics, of a rollout or of an evaluation."""
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
    """The live view as the output of a notebook cell, whose HTML is replaced as the work progresses.

    Rich's own notebook view needs ipywidgets.
    """

    def __init__(self) -> None:
        super().__init__(_html_console())
        self._above: list[RenderableType] = []
        self._display: Any = importlib.import_module("IPython.display")
        self._handle: Any = None
        self._drawn = 0.0

    def __enter__(self) -> NotebookReporter:
        return self

    def __exit__(self, *error: Any) -> None:
        self._end_stage()
        if self._handle is not None:
            self._draw()

    def __call__(self, event: Event) -> None:
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


def is_interactive(console: Console) -> bool:
    """Whether the output is a terminal that can redraw lines, or a notebook."""
    return console.is_jupyter or (console.is_terminal and not console.is_dumb_terminal)


def reporter_for(console: Console) -> Reporter:
    """The live view in a terminal or a notebook, else plain lines."""
    if not is_interactive(console):
        return PlainReporter(console)
    return NotebookReporter() if console.is_jupyter else LiveReporter(console)


def sparkline(values: Sequence[float], width: int) -> str:
    """A curve of `values` in at most `width` block characters, scaled from the lowest to the highest."""
    if not values:
        return ""
    buckets = min(width, len(values))
    edges = [round(i * len(values) / buckets) for i in range(buckets + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)
