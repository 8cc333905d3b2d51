"""`fmg bench`: latency by stage, backends side by side, and reward against latency."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.cli.options import (
    AsJson,
    Device,
    Grid,
    LoadedDtype,
    Offline,
    Seed,
    Threads,
    new_figure,
    panel,
    parse_steps,
    sampling_option,
)
from fmg.cli.output import print_json, print_timing, ratio_lines, stderr, stdout, table
from fmg.core.display import interval, number
from fmg.core.errors import UsageError
from fmg.core.events import StageProgress
from fmg.core.runtime import require
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fmg.export.frontier import Frontier, Point
    from fmg.inference.benchmark import BenchCase, Ratio, Timing

_SCHEMA = 1
_FIGURE = "frontier.png"
_PROMPT = "a red circle"
_timing_option, _frontier_option = map(panel, ("Timing", "Reward against latency"))


def bench(
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET",
            help="Models, runs or artifacts; also owner/name or owner/name@revision on the hub.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    compare: Annotated[
        str | None,
        _timing_option(
            metavar="B,...",
            help="Backends to time side by side, such as torch,onnxruntime,onnxruntime:int8; prints how fast"
            " each is relative to the first. torch times the run itself, the others its artifact.",
            show_default=False,
            autocompletion=completion.components("backend"),
        ),
    ] = None,
    frontier: Annotated[
        bool,
        _frontier_option(
            "--frontier", help="Also score the run's rewards, with and without its adapter, at each of --steps."
        ),
    ] = False,
    steps: Annotated[
        str | None,
        sampling_option(
            metavar="1,2,4",
            help="Sampling steps (NFE) per image; several with --frontier.",
            show_default="the target's",
        ),
    ] = None,
    grid: Grid = None,
    batch_size: Annotated[int, _timing_option("--batch-size", min=1, max=4096, metavar="N", help="Batch size.")] = 1,
    repeats: Annotated[int, _timing_option(min=1, max=100_000, metavar="N", help="Timed runs.")] = 20,
    warmup: Annotated[int, _timing_option(min=0, max=1000, metavar="N", help="Warm-up runs.")] = 2,
    prompt: Annotated[
        str, sampling_option(metavar="TEXT", help="Prompt to generate; --frontier uses the run's own prompts.")
    ] = _PROMPT,
    cached_text: Annotated[
        bool, _timing_option("--cached-text", help="Do not time the text encoders, as with cached prompts.")
    ] = False,
    num: Annotated[
        int, _frontier_option(min=2, max=1_000_000, metavar="N", help="Images scored at each point of --frontier.")
    ] = 500,
    out: Annotated[
        str | None,
        _frontier_option(
            metavar="F",
            help="Figure of --frontier, a .png, .svg or .pdf file; nothing is overwritten.",
            show_default=_FIGURE,
        ),
    ] = None,
    device: Device = "auto",
    dtype: LoadedDtype = None,
    threads: Threads = None,
    seed: Seed = 0,
    allow_code: Annotated[
        bool, _frontier_option("--allow-code", help="Allow the recipe of a run to name reward code and reward servers.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Measure latency by stage after a warm-up. Targets and backends take turns in each repeat."""
    counts = _counts(steps, frontier)
    figure = _figure(out, frontier, len(targets or ()))
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.core.machine import machine
        from fmg.inference.benchmark import (
            BenchOptions,
            Workload,
            bench_cases,
            measure,
            open_cases,
            parse_backends,
            ratios,
        )

        cases = bench_cases(targets or (), () if compare is None else parse_backends(compare), reporter)
        options = BenchOptions(None if frontier else batch_size, device, dtype, threads)
        found: Frontier | None = None
        if frontier:
            require("--frontier, which scores rewards,", "torch", instead=", or leave out --frontier")
            from fmg.export.frontier import FrontierPlan
            from fmg.export.frontier import frontier as frontier_of

            plan = FrontierPlan(counts, num, repeats, warmup, batch_size, grid, seed, not cached_text)
            where = machine()
            found = frontier_of(cases, options, plan, allow_code=allow_code, observer=reporter)
            timings, compared = found.timings, found.ratios
        else:
            where = machine()
            with ExitStack() as stack:
                measured = measure(
                    open_cases(cases, options, stack),
                    Workload.of([prompt], batch_size, steps=counts[0] if counts else None, grid=grid),
                    repeats=repeats,
                    warmup=warmup,
                    encode=not cached_text,
                    progress=lambda done, total: reporter(StageProgress("timing", done, total)),
                )
            timings, compared = tuple(measured.values()), ratios(measured)
        if found is not None and figure is not None:
            _plot(found, figure, cases[0])
    if as_json:
        print_json(_document(where, timings, compared, found, figure))
        return
    console = stdout()
    if found is None:
        for timing in timings:
            print_timing(console, timing)
    else:
        console.print(_points(found.points))
    lines = ratio_lines(compared)
    if lines:
        console.print()
    for line in lines:
        console.print(line, soft_wrap=True)
    if figure is not None:
        console.print(f"\nFigure: {figure}", soft_wrap=True)


def _counts(steps: str | None, frontier: bool) -> tuple[int, ...]:
    counts = () if steps is None else parse_steps(steps)
    if frontier and not counts:
        return (1, 2, 4)
    if len(counts) > 1 and not frontier:
        raise UsageError(f"--steps {steps} lists several numbers", "Give one, or add --frontier.")
    return counts


def _figure(out: str | None, frontier: bool, targets: int) -> Path | None:
    if not frontier:
        if out is not None:
            raise UsageError("--out names the figure of --frontier", "Add --frontier, or leave out --out.")
        return None
    if targets > 1:
        raise UsageError("--frontier takes one target", "Name one; --compare sets backends side by side.")
    return new_figure(out or _FIGURE, "--out")


def _plot(found: Frontier, figure: Path, case: BenchCase) -> None:
    from fmg.export.frontier import frontier_figure

    subject: Any = case.subject
    frontier_figure(found.points, figure, str(getattr(subject, "folder", None) or subject.label))


def _document(
    where: dict[str, Any],
    timings: Sequence[Timing],
    ratios: Sequence[Ratio],
    found: Frontier | None,
    figure: Path | None,
) -> dict[str, Any]:
    from dataclasses import asdict

    document: dict[str, Any] = {
        "schema": _SCHEMA,
        "machine": where,
        "timings": [timing.to_json() for timing in timings],
        "ratios": [asdict(ratio) for ratio in ratios],
    }
    if found is not None:
        document |= {"frontier": [point.to_json() for point in found.points], "picture": str(figure)}
    return document


def _points(points: Sequence[Point]) -> Table:
    columns = ["steps", "backend", "adapter", "reward", "mean", "95 % interval", "p50 ms", "p90 ms"]
    rows = [
        (
            str(point.steps),
            point.backend,
            "on" if point.adapter else "off",
            point.reward,
            number(point.mean),
            interval(point.ci95),
            f"{point.latency_ms.p50:.1f}",
            f"{point.latency_ms.p90:.1f}",
        )
        for point in points
    ]
    return table(columns, rows, right=["steps", *columns[4:]])
