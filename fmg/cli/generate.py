"""`fmg generate`: images from prompts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli.options import (
    Adapters,
    AsJson,
    Backend,
    BatchSize,
    Device,
    Grid,
    Int8,
    LoadedDtype,
    LoraScale,
    Offline,
    Resolution,
    Threads,
    checked_folder,
    checked_prompts,
    file_option,
    hardware_option,
    sampling_option,
)
from fmg.cli.output import print_json, print_timing, stderr, stdout
from fmg.core.errors import UsageError
from fmg.core.events import Notice, StageProgress
from fmg.progress.reporters import LOADING, Reporter, reporter_for

if TYPE_CHECKING:
    from fmg.inference import Generator, Target
    from fmg.inference.artifact import Artifact
    from fmg.inference.benchmark import Timing


def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT", help="One or more prompts, each in quotes.")],
    source: Annotated[
        str | None,
        sampling_option(
            "--from",
            metavar="TARGET",
            help="A model, a run folder, an artifact, or owner/name or owner/name@revision on the hub.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        sampling_option(
            min=1, max=1000, metavar="N", help="Sampling steps (NFE) per image.", show_default="the target's"
        ),
    ] = None,
    grid: Grid = None,
    seed: Annotated[int, sampling_option(min=0, metavar="N", help="Seed of the first image of each prompt.")] = 0,
    num: Annotated[
        int, sampling_option(min=1, max=100_000, metavar="N", help="Images per prompt, with consecutive seeds.")
    ] = 1,
    adapters: Adapters = None,
    lora_scale: LoraScale = None,
    out: Annotated[str, file_option(metavar="DIR", help="Where to write; nothing is overwritten.")] = "images",
    sheet: Annotated[bool, file_option("--sheet", help="Also write one sheet with all images.")] = False,
    backend: Backend = "auto",
    device: Device = "auto",
    dtype: LoadedDtype = None,
    resolution: Resolution = None,
    int8: Int8 = False,
    threads: Threads = None,
    batch_size: BatchSize = None,
    release_text: Annotated[
        bool, hardware_option("--release-text", help="Free the text encoders before sampling starts.")
    ] = False,
    timed: Annotated[
        bool, typer.Option("--time", help="Repeat the first batch five times and print the time of each stage.")
    ] = False,
    allow_code: Annotated[
        bool, hardware_option("--allow-code", help="Run the code inside version-compatible TensorRT engines.")
    ] = False,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Generate images from prompts and write them as PNG files."""
    texts = checked_prompts(prompts)
    folder = checked_folder(out, "--out")
    if timed and release_text:
        raise UsageError("--release-text frees the text encoders, which --time needs again", "Leave out one of them.")

    requests = [(text, seed + i) for text in texts for i in range(num)]
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.data.pictures import GridRow, sample_grid, save_pictures, to_pil
        from fmg.inference.loading import find, load

        subject: Target | Artifact
        if adapters or lora_scale is not None:
            from fmg.inference.target import chosen_target

            subject = chosen_target(source, adapters or (), lora_scale, observer=reporter)
        else:
            subject = find(source, observer=reporter)
        with load(
            subject,
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
            generated = generator.generate(
                [text for text, _ in requests],
                [key for _, key in requests],
                steps=steps,
                grid=grid,
                release_text=release_text,
                progress=lambda done, total: reporter(StageProgress("images", done, total)),
            ).check_finite()
            timing = _timing(generator, requests, steps, grid, reporter) if timed else None
    pictures = [(to_pil(image), text) for image, (text, _) in zip(generated.image_array, requests, strict=True)]
    if sheet:
        rows = [GridRow(text, generated.image_array[i * num : (i + 1) * num]) for i, text in enumerate(texts)]
        pictures.append((sample_grid(rows, source or "newest run"), "sheet"))
    files = save_pictures(pictures, folder, called="--out ")
    if as_json:
        images = [
            {"path": str(file), "prompt": text, "seed": key} for file, (text, key) in zip(files, requests, strict=False)
        ]
        document = {"images": images, "backend": runtime.name, "timings_ms": dict(generated.timings_ms)}
        print_json(document if timing is None else {**document, "timing": timing.to_json()})
        return
    console = stdout()
    for file in files:
        console.print(str(file), soft_wrap=True)
    if timing is not None:
        print_timing(console, timing)


def _timing(
    generator: Generator, requests: Sequence[tuple[str, int]], steps: int | None, grid: str | None, reporter: Reporter
) -> Timing:
    """Latency of the first batch, which has just been generated, so that all but the text encoders are warm."""
    from fmg.inference.benchmark import Workload, measure

    batch = requests[: generator.batch_size]
    work = Workload(tuple(text for text, _ in batch), tuple(key for _, key in batch), steps, grid)
    label = "this"
    timings = measure(
        {label: generator}, work, progress=lambda done, total: reporter(StageProgress("timing", done, total))
    )
    return timings[label]
