"""`fmg generate`: pictures from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.options import (
    AsJson,
    Backend,
    BatchSize,
    Device,
    Grid,
    Int8,
    LoadedDtype,
    Offline,
    Resolution,
    Threads,
    check_grid,
    checked_folder,
    checked_prompts,
    given_text,
)
from fmg.cli.timings import print_timing
from fmg.core.errors import UsageError
from fmg.core.events import Notice, StageProgress
from fmg.progress.reporters import LOADING, Reporter, reporter_for

if TYPE_CHECKING:
    from fmg.inference import Generator
    from fmg.inference.timing import Timing


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more prompts, each in quotes.")],
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="TARGET",
            help="A model, a run folder or an artifact.",
            show_default="the newest run",
            rich_help_panel="Sampling",
            autocompletion=completion.targets,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            metavar="N",
            help="Network calls an image.",
            show_default="the target's",
            rich_help_panel="Sampling",
        ),
    ] = None,
    grid: Grid = None,
    seed: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="Seed of the first image of each prompt.", rich_help_panel="Sampling"),
    ] = 0,
    num: Annotated[
        int,
        typer.Option(
            min=1, max=100_000, metavar="N", help="Images a prompt, with consecutive seeds.", rich_help_panel="Sampling"
        ),
    ] = 1,
    out: Annotated[
        str, typer.Option(metavar="DIR", help="Where to write; nothing is overwritten.", rich_help_panel="Files")
    ] = "images",
    sheet: Annotated[
        bool, typer.Option("--sheet", help="Write one more picture with all images on it.", rich_help_panel="Files")
    ] = False,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: LoadedDtype = None,
    resolution: Resolution = None,
    int8: Int8 = False,
    threads: Threads = None,
    batch_size: BatchSize = None,
    release_text: Annotated[
        bool,
        typer.Option(
            "--release-text",
            help="Free the text encoders before the first image is drawn.",
            rich_help_panel="Where it runs",
        ),
    ] = False,
    timed: Annotated[
        bool, typer.Option("--time", help="Draw the first batch again, five times, and print where the time goes.")
    ] = False,
    allow_code: Annotated[
        bool,
        typer.Option(
            "--allow-code",
            help="Run the code inside version-compatible TensorRT engines.",
            rich_help_panel="Where it runs",
        ),
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Draw pictures from prompts and write them as PNG files."""
    texts = checked_prompts(prompts)
    given_text(source, "--from")
    check_grid(grid)
    folder = checked_folder(out, "--out")
    if timed and release_text:
        raise UsageError("--release-text frees the text encoders, which --time runs again", "Leave one of them out.")

    orders = [(text, seed + i) for text in texts for i in range(num)]
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.data.pictures import GridRow, sample_grid, save_pictures, to_pil
        from fmg.inference import load

        with load(
            source,
            backend=backend,
            device=device,
            dtype=dtype,
            resolution=resolution,
            int8=int8,
            threads=threads,
            batch_size=batch_size,
            allow_code=allow_code,
        ) as generator:
            runtime = generator.backend
            reporter(Notice("info", f"backend {runtime.name}: {runtime.detail}, on {runtime.device}"))
            drawn = generator.generate(
                [text for text, _ in orders],
                [key for _, key in orders],
                steps=steps,
                grid=grid,
                release_text=release_text,
                progress=lambda done, total: reporter(StageProgress("images", done, total)),
            ).check_finite()
            timing = _timing(generator, orders, steps, grid, reporter) if timed else None
    pictures = [(to_pil(image), text) for image, (text, _) in zip(drawn.image_array, orders, strict=True)]
    if sheet:
        rows = [GridRow(text, drawn.image_array[i * num : (i + 1) * num]) for i, text in enumerate(texts)]
        pictures.append((sample_grid(rows, source or "newest run"), "sheet"))
    files = save_pictures(pictures, folder, called="--out ")
    if as_json:
        images = [
            {"path": str(file), "prompt": text, "seed": key} for file, (text, key) in zip(files, orders, strict=False)
        ]
        document = {"images": images, "backend": runtime.name, "timings_ms": dict(drawn.timings_ms)}
        print_json(document if timing is None else {**document, "timing": timing.to_json()})
        return
    console = stdout()
    for file in files:
        console.print(str(file), soft_wrap=True)
    if timing is not None:
        print_timing(console, timing)


def _timing(
    generator: Generator, orders: Sequence[tuple[str, int]], steps: int | None, grid: str | None, reporter: Reporter
) -> Timing:
    """Latency of the first batch; it has just been drawn, which warms everything but the text encoders up."""
    from fmg.inference.timing import Workload, measure

    batch = orders[: generator.batch_size]
    work = Workload(tuple(text for text, _ in batch), tuple(key for _, key in batch), steps, grid)
    label = "this"
    timings = measure(
        {label: generator}, work, progress=lambda done, total: reporter(StageProgress("timing", done, total))
    )
    return timings[label]
