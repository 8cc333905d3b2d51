"""`fmg export`: a tuned model for other software and other machines."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from fmg.cli import completion
from fmg.cli import export_engines as engines
from fmg.cli.console import print_json, stderr, stdout
from fmg.cli.export_options import (
    batch_range,
    check_artifact_only,
    check_combination,
    folder_precision,
    one_place,
    precision_of,
    resolution_list,
    verify_level,
)
from fmg.cli.options import AsJson, Offline, checked_folder, given_text
from fmg.cli.verify import print_report
from fmg.core.display import counted
from fmg.core.events import Notice
from fmg.inference.artifact import is_artifact, open_artifact
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.export.diffusers import Merged
    from fmg.inference.alone import VerifyReport
    from fmg.inference.artifact import Artifact

_NOT_PROVEN = 1


def export(
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Run folder or model.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    place: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Folder to make (--kohya: file), as --out.")
    ] = None,
    onnx: Annotated[
        bool,
        typer.Option(
            "--onnx",
            help="An artifact: ONNX graphs, weights, tokenizers and a manifest (the default).",
            rich_help_panel="What is written",
        ),
    ] = False,
    diffusers: Annotated[
        bool,
        typer.Option(
            "--diffusers",
            help="A complete diffusers folder, the adapter merged into its weights.",
            rich_help_panel="What is written",
        ),
    ] = False,
    kohya: Annotated[
        bool,
        typer.Option("--kohya", help="The LoRA as one file in kohya's layout, for Forge, sd-scripts and ComfyUI."),
    ] = False,
    swap_weights: Annotated[
        str | None,
        typer.Option(
            "--swap-weights",
            metavar="ARTIFACT",
            help="Put the adapter of TARGET, or none when TARGET is 'base', into an artifact that is there.",
            rich_help_panel="What is written",
            autocompletion=completion.artifacts,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="P",
            help="fp32 for a CPU, bf16 or fp16 for a GPU; a diffusers folder may also keep the stored one.",
            show_default="fp32; of --diffusers: stored",
            rich_help_panel="What is written",
            autocompletion=completion.one_of("fp32", "bf16", "fp16", "stored"),
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="Also write a transformer with 8-bit weights, for a CPU.", rich_help_panel="What is written"
        ),
    ] = False,
    resolutions: Annotated[
        str | None,
        typer.Option(
            metavar="N,...",
            help="Sides of the square images in pixels.",
            show_default="the model's own",
            rich_help_panel="What is written",
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(
            metavar="MIN:OPT:MAX",
            help="Images of one call.",
            show_default="by the size of the model",
            rich_help_panel="What is written",
        ),
    ] = None,
    out: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help="Folder to make.",
            show_default="RUN/artifact or artifacts/MODEL",
            rich_help_panel="What is written",
        ),
    ] = None,
    verify: Annotated[
        str,
        typer.Option(
            metavar="LEVEL",
            help="Prove afterwards that the artifact draws what its run draws: quick, full or off; see fmg verify.",
            rich_help_panel="What is written",
            autocompletion=completion.one_of("quick", "full", "off"),
        ),
    ] = "off",
    trt: engines.Trt = False,
    flavour: engines.FlavourName = None,
    builder_level: engines.Level = None,
    workspace: engines.Workspace = None,
    hardware: engines.Hardware = None,
    version_compatible: engines.VersionCompatible = False,
    weight_streaming: engines.WeightStreaming = False,
    refittable: engines.Refittable = False,
    no_timing_cache: engines.NoTimingCache = False,
    build_memory: engines.BuildMemory = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Write a tuned model in a form that runs without fmg's training stack, or that other software reads."""
    check_combination(
        {"--onnx": onnx, "--diffusers": diffusers, "--kohya": kohya, "--swap-weights": swap_weights is not None},
        {"--int8": int8, "--resolutions": resolutions is not None, "--batch": batch is not None, "--trt": trt},
        {"--precision": precision is not None, "OUT": place is not None or out is not None},
    )
    other = "--diffusers" if diffusers else "--kohya" if kohya else None
    target, level = given_text(target, "TARGET"), verify_level(verify, other)
    sides, rows, folder = resolution_list(resolutions), batch_range(batch), one_place(place, out, file=kohya)
    kept = folder_precision(precision) if diffusers else precision_of(precision)
    request = engines.engine_request(
        trt,
        flavour=flavour,
        level=builder_level,
        workspace=workspace,
        hardware=hardware,
        version_compatible=version_compatible,
        weight_streaming=weight_streaming,
        refittable=refittable,
        no_timing_cache=no_timing_cache,
        build_memory=build_memory,
    )
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.inference.artifact.layout import EXPORTED
        from fmg.inference.target import export_folder

        if diffusers:
            from fmg.export.diffusers import export_diffusers

            merged = export_diffusers(target, folder or export_folder(target, "diffusers"), kept, observer=reporter)
            facts, text = _folder_facts(merged), f"{merged.folder}: {merged.changed} of {merged.tensors} weights merged"
        elif kohya:
            from fmg.export.kohya import FILE, export_kohya

            lora = export_kohya(target, folder or export_folder(target, FILE))
            facts, text = {"file": str(lora.file), "modules": lora.modules}, f"{lora.file}: {lora.modules} modules"
        elif swap_weights is not None:
            from fmg.export.swap import swap_weights as swap

            artifact = swap(checked_folder(swap_weights, "--swap-weights"), target, observer=reporter)
            facts, text = _facts(artifact), _text(artifact)
        elif request is not None and target is not None and is_artifact(target):
            check_artifact_only({"--onnx": onnx, "--int8": int8, "--precision": precision, "OUT": place or out})
            artifact = open_artifact(target)
            facts, text = engines.added(request, artifact, sides, rows, reporter)
        else:
            from fmg.export.artifact import ExportOptions, export_artifact

            options = ExportOptions(precision_of(precision), int8, sides, rows)
            folder = folder or export_folder(target, EXPORTED)
            artifact = export_artifact(target, folder, options, observer=reporter)
            facts, text = _facts(artifact), _text(artifact)
            if request is not None:
                reporter(Notice("info", text))
                built, text = engines.added(request, artifact, None, None, reporter)
                facts |= built
        report = None if level is None else _proof(open_artifact(artifact.folder), level, reporter)
    if as_json:
        print_json(facts if report is None else {**facts, "verify": report.to_json()})
    else:
        stdout().print(text, soft_wrap=True)
        if report is not None:
            print_report(stdout(), report)
    if report is not None and not report.passed:
        raise typer.Exit(_NOT_PROVEN)


def _proof(artifact: Artifact, level: str, observer: Observer) -> VerifyReport:
    from fmg.export.verify import verify

    return verify(artifact, level=level, observer=observer)


def _folder_facts(merged: Merged) -> dict[str, object]:
    return {"folder": str(merged.folder), "changed": merged.changed, "tensors": merged.tensors}


def _facts(artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    return {
        "folder": str(artifact.folder),
        "model": manifest.model.name,
        "adapter": None if manifest.adapter is None else manifest.adapter.run,
        "precision": manifest.precision,
        "graphs": {name: graph.file for name, graph in manifest.graphs.items()},
        "resolutions": list(manifest.sampling.resolutions),
        "bytes": sum(entry.size for entry in manifest.files.values()),
    }


def _text(artifact: Artifact) -> str:
    manifest = artifact.manifest
    size = sum(entry.size for entry in manifest.files.values()) / 1e6
    adapter = "no adapter" if manifest.adapter is None else f"adapter of {manifest.adapter.run}"
    return (
        f"{artifact.folder}: {manifest.model.name}, {adapter}, {counted(len(manifest.graphs), 'graph')},"
        f" {manifest.precision}, {size:.1f} MB"
    )
