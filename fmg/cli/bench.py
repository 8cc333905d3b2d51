"""`fmg bench`: where the time of drawing goes, several backends in one run, and reward against latency."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.options import (
    AsJson,
    Device,
    Grid,
    LoadedDtype,
    Offline,
    Seed,
    Threads,
    check_grid,
    figure_format,
    given_text,
    parse_steps,
)
from fmg.cli.tables import interval, number, table
from fmg.cli.timings import print_timing, ratio_lines
from fmg.core.errors import MissingDependencyError, UsageError
from fmg.core.events import StageProgress
from fmg.core.files import check_place
from fmg.progress.reporters import LOADING, Reporter, reporter_for
from fmg.version import install_line

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fmg.export.frontier import Frontier, Point
    from fmg.inference.contest import Conditions, Entrant
    from fmg.inference.timing import Ratio, Timing

_SCHEMA = 1
_PICTURE = "frontier.png"
_PROMPT = "a red circle"


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TARGET...]",
            help="Models, runs or artifacts.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        typer.Option(
            metavar="B,...",
            help="Backends that take turns, such as torch,onnxruntime,onnxruntime:int8; prints how many times faster"
            " each is than the first. torch draws the run, the others its artifact.",
            show_default=False,
            rich_help_panel="What is timed",
            autocompletion=completion.components("backend"),
        ),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Also score the run's rewards, with and without its adapter, at each of --steps.",
            rich_help_panel="Reward against latency",
        ),
    ] = False,
    steps: Annotated[
        str | None,
        typer.Option(
            metavar="1,2,4",
            help="Network calls an image; several with --frontier.",
            show_default="the target's",
            rich_help_panel="Sampling",
        ),
    ] = None,
    grid: Grid = None,
    batch_size: Annotated[
        int,
        typer.Option(
            "--batch-size", min=1, max=4096, metavar="N", help="Images of one drawing.", rich_help_panel="What is timed"
        ),
    ] = 1,
    repeats: Annotated[
        int, typer.Option(min=1, max=100_000, metavar="N", help="Drawings to measure.", rich_help_panel="What is timed")
    ] = 20,
    warmup: Annotated[
        int, typer.Option(min=0, max=1000, metavar="N", help="Drawings before them.", rich_help_panel="What is timed")
    ] = 2,
    prompt: Annotated[
        str,
        typer.Option(
            metavar="TEXT", help="What is drawn; --frontier draws the run's own prompts.", rich_help_panel="Sampling"
        ),
    ] = _PROMPT,
    cached_text: Annotated[
        bool,
        typer.Option(
            "--cached-text",
            help="Leave out the text encoders, as for prompts that were seen before.",
            rich_help_panel="What is timed",
        ),
    ] = False,
    num: Annotated[
        int,
        typer.Option(
            min=2,
            max=1_000_000,
            metavar="N",
            help="Images scored at each point of --frontier.",
            rich_help_panel="Reward against latency",
        ),
    ] = 500,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="F",
            help="Figure of --frontier, a .png, .svg or .pdf file; nothing is overwritten.",
            show_default=_PICTURE,
            rich_help_panel="Reward against latency",
        ),
    ] = None,
    device: Device = "auto",
    dtype: LoadedDtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Let the recipe of a run name reward code and reward servers.",
            rich_help_panel="Reward against latency",
        ),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency by stage after a warm-up; every target and backend takes its turn in each repeat."""
    for target in targets or ():
        given_text(target, "TARGET")
    given_text(prompt, "--prompt")
    check_grid(grid)
    counts = _counts(steps, frontier)
    picture = _picture(out, frontier, len(targets or ()))
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.core.machine import machine
        from fmg.inference.contest import Conditions, entrants, parse_runtimes

        runtimes = () if compare is None else parse_runtimes(compare)
        entered = entrants(targets or (), runtimes)
        conditions = Conditions(None if frontier else batch_size, device, dtype, threads)
        found: Frontier | None = None
        if frontier:
            _needs_torch()
            from fmg.export.frontier import FrontierPlan
            from fmg.export.frontier import frontier as measured

            plan = FrontierPlan(counts, num, repeats, warmup, batch_size, grid, seed, not cached_text)
            where = machine()
            found = measured(entered, conditions, plan, allow_code=allow_code, observer=reporter)
            timings, ratios = found.timings, found.ratios
        else:
            where = machine()
            timings, ratios = _measured(
                entered,
                conditions,
                prompts=[prompt] * batch_size,
                steps=counts[0] if counts else None,
                grid=grid,
                repeats=repeats,
                warmup=warmup,
                encode=not cached_text,
                reporter=reporter,
            )
        if found is not None and picture is not None:
            _draw(found, picture, entered[0])
    if as_json:
        print_json(_document(where, timings, ratios, found, picture))
        return
    console = stdout()
    if found is None:
        for timing in timings:
            print_timing(console, timing)
    else:
        console.print(_points(found.points))
    lines = ratio_lines(ratios)
    if lines:
        console.print()
    for line in lines:
        console.print(line, soft_wrap=True)
    if picture is not None:
        console.print(f"\nPicture: {picture}", soft_wrap=True)


def _counts(steps: str | None, frontier: bool) -> tuple[int, ...]:
    counts = () if steps is None else parse_steps(steps)
    if frontier and not counts:
        return (1, 2, 4)
    if len(counts) > 1 and not frontier:
        raise UsageError(f"--steps {steps} names several numbers", "Give one, or add --frontier.")
    return counts


def _picture(out: str | None, frontier: bool, targets: int) -> Path | None:
    """The file of the figure, which must not exist."""
    given_text(out, "--out")
    if not frontier:
        if out is not None:
            raise UsageError("--out is the figure of --frontier", "Add --frontier, or leave --out out.")
        return None
    if targets > 1:
        raise UsageError("--frontier is of one target", "Name one; --compare sets backends side by side.")
    path = Path(out or _PICTURE)
    figure_format(path, "--out")
    if path.exists():
        raise UsageError(f"{path} exists already", "Name another file with --out; nothing is overwritten.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"The folder of --out {path} does not exist", "Make it, or name another.")
    check_place(path, "--out")
    return path


def _needs_torch() -> None:
    from importlib.util import find_spec

    if find_spec("torch") is None:
        raise MissingDependencyError(
            "--frontier scores rewards, which needs torch", f"Run: {install_line()}, or leave it out."
        )


def _measured(
    entered: Sequence[Entrant],
    conditions: Conditions,
    *,
    prompts: Sequence[str],
    steps: int | None,
    grid: str | None,
    repeats: int,
    warmup: int,
    encode: bool,
    reporter: Reporter,
) -> tuple[tuple[Timing, ...], tuple[Ratio, ...]]:
    from fmg.inference.contest import open_entrants
    from fmg.inference.timing import Workload, measure, ratios

    with ExitStack() as stack:
        generators = open_entrants(entered, conditions, stack)
        timings = measure(
            generators,
            Workload.of(prompts, len(prompts), steps=steps, grid=grid),
            repeats=repeats,
            warmup=warmup,
            encode=encode,
            progress=lambda done, total: reporter(StageProgress("timing", done, total)),
        )
        return tuple(timings.values()), ratios(timings)


def _draw(found: Frontier, picture: Path, entrant: Entrant) -> None:
    from fmg.export.frontier import frontier_figure

    subject: Any = entrant.subject
    frontier_figure(found.points, picture, str(getattr(subject, "folder", None) or subject.label))


def _document(
    where: dict[str, Any],
    timings: Sequence[Timing],
    ratios: Sequence[Ratio],
    found: Frontier | None,
    picture: Path | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "machine": where,
        "timings": [timing.to_json() for timing in timings],
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    if found is not None:
        document |= {"frontier": [point.to_json() for point in found.points], "picture": str(picture)}
    return document


def _points(points: Sequence[Point]) -> Table:
    columns = ["steps", "backend", "adapter", "reward", "mean", "95 % interval", "p50 ms", "p90 ms"]
    return table(columns, _rows(points), right=["steps", "mean", "95 % interval", "p50 ms", "p90 ms"])


def _rows(points: Sequence[Point]) -> Iterator[tuple[str, ...]]:
    for point in points:
        yield (
            str(point.steps),
            point.backend,
            "on" if point.adapter else "off",
            point.reward,
            number(point.mean),
            interval(point.ci95),
            f"{point.latency_ms.p50:.1f}",
            f"{point.latency_ms.p90:.1f}",
        )
