"""`fmg export`: a tuned model for other software and other machines, and the TensorRT engines of an artifact."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from fmg.cli import completion
from fmg.cli.options import (
    Adapters,
    AsJson,
    LoraScale,
    Offline,
    checked_folder,
    new_place,
    panel,
    whole_number,
)
from fmg.cli.output import print_json, stderr, stdout
from fmg.cli.verify import print_report
from fmg.core.display import counted
from fmg.core.errors import UsageError, suggestion
from fmg.core.events import Notice
from fmg.core.specs import MAX_ROWS, MAX_SIDE
from fmg.inference.artifact import is_artifact, open_artifact
from fmg.progress.reporters import LOADING, reporter_for

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.export.options import ExportPrecision
    from fmg.export.tensorrt.build import BuiltEngine, Hardware
    from fmg.export.triton import TritonOptions
    from fmg.inference.artifact import Artifact


_FP8: ExportPrecision = "fp8"
_PRECISIONS: Mapping[str, ExportPrecision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": _FP8}
_STORED = "stored"
_FOLDER_PRECISIONS = (_STORED, *(name for name in _PRECISIONS if name != _FP8))
_OFF = "off"
_LEVELS = ("quick", "full", _OFF)
_FLAVOURS = ("auto", "tensorrt", "rtx")
_HARDWARE = ("none", "same-capability", "ampere-plus")
_NOT_VERIFIED = 1
_TRITON_DEVICES = ("auto", "cpu", "gpu")
_output_option, _engine_option, _triton_option = map(panel, ("Output", "TensorRT engines", "Triton Inference Server"))


def export(
    ctx: typer.Context,
    target: Annotated[
        str | None,
        typer.Argument(
            metavar="TARGET",
            help="Run folder, model, or a run on the hub: owner/name or owner/name@revision.",
            show_default="the newest run",
            autocompletion=completion.targets,
        ),
    ] = None,
    place: Annotated[
        str | None, typer.Argument(metavar="OUT", help="Output folder (with --kohya: file); same as --out.")
    ] = None,
    onnx: Annotated[
        bool,
        _output_option("--onnx", help="An artifact: ONNX graphs, weights, tokenizers and a manifest (the default)."),
    ] = False,
    diffusers: Annotated[
        bool,
        _output_option("--diffusers", help="A complete diffusers folder with the adapter merged into the weights."),
    ] = False,
    kohya: Annotated[
        bool,
        _output_option("--kohya", help="The LoRA as one file in kohya's layout, for Forge, sd-scripts and ComfyUI."),
    ] = False,
    swap_weights: Annotated[
        str | None,
        _output_option(
            "--swap-weights",
            metavar="ARTIFACT",
            help="Replace the adapter of an existing artifact with that of TARGET; 'base' removes it.",
            autocompletion=completion.artifacts,
        ),
    ] = None,
    adapters: Adapters = None,
    lora_scale: LoraScale = None,
    precision: Annotated[
        str | None,
        _output_option(
            metavar="P",
            help="fp32 for CPUs, bf16 or fp16 for GPUs, fp8 for engines on Ada, Hopper and Blackwell GPUs;"
            " with --diffusers also stored (unchanged), but not fp8.",
            show_default="fp32; with --diffusers: stored",
            autocompletion=completion.one_of(*_PRECISIONS, _STORED),
        ),
    ] = None,
    int8: Annotated[
        bool, _output_option("--int8", help="Also write a transformer with 8-bit weights, for CPUs.")
    ] = False,
    fused: Annotated[
        bool,
        _output_option("--fused", help="Also write the whole sampler as one graph: all steps and the decoder."),
    ] = False,
    resolutions: Annotated[
        str | None,
        _output_option(metavar="N,...", help="Sides of the square images, in pixels.", show_default="the model's own"),
    ] = None,
    batch: Annotated[
        str | None,
        _output_option(
            metavar="MIN:OPT:MAX",
            help="Batch sizes: smallest, usual and largest.",
            show_default="chosen by the size of the model",
        ),
    ] = None,
    out: Annotated[
        str | None,
        _output_option(metavar="DIR", help="Output folder.", show_default="RUN/artifact or artifacts/MODEL"),
    ] = None,
    verify: Annotated[
        str,
        _output_option(
            metavar="LEVEL",
            help="Then verify that the artifact reproduces the images: quick, full or off; see `fmg verify`.",
            show_default="off; full for fp8",
            autocompletion=completion.one_of(*_LEVELS),
        ),
    ] = _OFF,
    trt: Annotated[
        bool, _engine_option("--trt", help="Also build TensorRT engines; for an existing artifact, build only those.")
    ] = False,
    flavour: Annotated[
        str | None,
        _engine_option(
            metavar="F",
            help="tensorrt (for this GPU), rtx (ahead of time, without a GPU), or auto.",
            show_default="auto",
            autocompletion=completion.one_of(*_FLAVOURS),
        ),
    ] = None,
    builder_level: Annotated[
        int | None,
        _engine_option(
            "--builder-level", min=0, max=5, metavar="N", help="Optimisation level of the builder.", show_default="3"
        ),
    ] = None,
    workspace: Annotated[
        float | None, _engine_option(metavar="GIB", help="Scratch memory per layer.", show_default="the builder's own")
    ] = None,
    hardware: Annotated[
        str | None,
        _engine_option(
            metavar="H",
            help="Other GPUs to run on: none, same-capability or ampere-plus (tensorrt only).",
            show_default="none",
            autocompletion=completion.one_of(*_HARDWARE),
        ),
    ] = None,
    version_compatible: Annotated[
        bool,
        _engine_option(
            "--version-compatible", help="Also run on other versions of TensorRT; embeds code (tensorrt only)."
        ),
    ] = False,
    weight_streaming: Annotated[
        bool, _engine_option("--weight-streaming", help="Stream weights from host memory if the GPU is too small.")
    ] = False,
    refittable: Annotated[
        bool,
        _engine_option(
            "--refittable", help="Allow new weights without a rebuild; checks that no bias is lost. Needs a GPU."
        ),
    ] = False,
    no_timing_cache: Annotated[
        bool, _engine_option("--no-timing-cache", help="Time every kernel again (tensorrt only).")
    ] = False,
    build_memory: Annotated[
        float | None,
        _engine_option(
            "--build-memory", metavar="GIB", help="Host memory for the build.", show_default="9/10 of what is free"
        ),
    ] = None,
    triton: Annotated[
        str | None,
        _triton_option(
            "--triton",
            metavar="DIR",
            help="Also write a model repository; for an existing artifact, write only that.",
        ),
    ] = None,
    triton_name: Annotated[
        str | None,
        _triton_option(
            "--triton-name",
            metavar="NAME",
            help="Name of the model on the server.",
            show_default="the exported model's",
        ),
    ] = None,
    triton_device: Annotated[
        str | None,
        _triton_option(
            "--triton-device",
            metavar="D",
            help="Where the graphs run: cpu, gpu, or auto (a GPU if the server has one).",
            show_default="auto",
            autocompletion=completion.one_of(*_TRITON_DEVICES),
        ),
    ] = None,
    triton_version: Annotated[
        int | None,
        _triton_option("--triton-version", min=1, metavar="N", help="Version of the models.", show_default="1"),
    ] = None,
    offline: Offline = False,
    as_json: AsJson = False,
) -> None:
    """Export a tuned model to ONNX and TensorRT, to a diffusers folder, or as a LoRA file for other software."""
    _check_combination(
        {"--onnx": onnx, "--diffusers": diffusers, "--kohya": kohya, "--swap-weights": swap_weights is not None},
        {
            "--int8": int8,
            "--fused": fused,
            "--resolutions": resolutions is not None,
            "--batch": batch is not None,
            "--trt": trt,
            "--triton": triton is not None,
        },
        {"--precision": precision is not None, "OUT": place is not None or out is not None},
    )
    other = "--diffusers" if diffusers else "--kohya" if kohya else None
    source = ctx.get_parameter_source("verify")
    if precision == _FP8 and other is None and (source is None or source.name == "DEFAULT"):
        # what fp8 loses differs from model to model
        verify = "full"
    level = _verify_level(verify, other)
    sides, rows, folder = _resolution_list(resolutions), _batch_range(batch), _one_place(place, out, file=kohya)
    kept = _folder_precision(precision) if diffusers else _precision(precision)
    engines = _Engines(
        flavour,
        builder_level,
        workspace,
        hardware,
        version_compatible,
        weight_streaming,
        refittable,
        no_timing_cache,
        build_memory,
    )
    engines.check(wanted=trt)
    repository = _triton_request(triton, triton_name, triton_device, triton_version)
    with reporter_for(stderr()) as reporter:
        reporter(LOADING)
        from fmg.inference.artifact.layout import EXPORTED
        from fmg.inference.target import TargetLike, chosen_target, export_folder

        chosen: TargetLike = target
        if adapters or lora_scale is not None:
            chosen = chosen_target(target, adapters or (), lora_scale, observer=reporter)
        if diffusers:
            from fmg.export.diffusers import export_diffusers

            merged = export_diffusers(chosen, folder or export_folder(chosen, "diffusers"), kept, observer=reporter)
            facts = {"folder": str(merged.folder), "changed": merged.changed, "tensors": merged.tensors}
            text = f"{merged.folder}: {merged.changed} of {merged.tensors} weights merged"
        elif kohya:
            from fmg.export.kohya import export_kohya
            from fmg.models.common.checkpoint_files import KOHYA_FILE

            lora = export_kohya(chosen, folder or export_folder(chosen, KOHYA_FILE), reporter)
            facts, text = {"file": str(lora.file), "modules": lora.modules}, f"{lora.file}: {lora.modules} modules"
        elif swap_weights is not None:
            from fmg.export.swap import swap_weights as swap

            artifact = swap(checked_folder(swap_weights, "--swap-weights"), chosen, observer=reporter)
            facts, text = _facts(artifact), _text(artifact)
        elif (trt or repository) and target is not None and is_artifact(target):
            new = {
                "--onnx": onnx,
                "--precision": precision,
                "OUT": place or out,
                "--fused": fused and not repository,
                "--int8": int8 and not repository,
            }
            sizes = {} if trt else {"--resolutions": sides, "--batch": rows}
            _check_existing("--trt" if trt else "--triton", {**new, **sizes})
            artifact = open_artifact(target)
            facts, text = {"folder": str(artifact.folder)}, ""
            if trt:
                facts, text = _build(engines, artifact, sides, rows, reporter)
        else:
            from fmg.export.artifact import export_artifact
            from fmg.export.options import ExportOptions

            options = ExportOptions(_precision(precision), int8, sides, rows, fused)
            folder = folder or export_folder(chosen, EXPORTED)
            if repository:
                computed = () if trt else (options.precision,)
                repository.check(folder, computed, int8=int8, fused=fused)
            artifact = export_artifact(chosen, folder, options, observer=reporter)
            facts, text = _facts(artifact), _text(artifact)
            if trt:
                reporter(Notice("info", text))
                built, text = _build(engines, artifact, None, None, reporter)
                facts |= built
        if repository:
            served, line = repository.write(artifact, reporter, int8=int8, fused=fused)
            facts |= {"triton": served}
            text = f"{text}\n{line}".lstrip()
        report = None
        if level is not None:
            from fmg.export.verify import verify as compare

            report = compare(open_artifact(artifact.folder), level=level, observer=reporter)
    if as_json:
        print_json(facts if report is None else {**facts, "verify": report.to_json()})
    else:
        stdout().print(text, soft_wrap=True)
        if report is not None:
            print_report(stdout(), report)
    if report is not None and not report.passed:
        raise typer.Exit(_NOT_VERIFIED)


@dataclass(frozen=True)
class _Engines:
    """The options of TensorRT engines; a field that is None or False was not given."""

    flavour: str | None
    builder_level: int | None
    workspace: float | None
    hardware: str | None
    version_compatible: bool
    weight_streaming: bool
    refittable: bool
    no_timing_cache: bool
    build_memory: float | None

    def check(self, *, wanted: bool) -> None:
        """Checks the values before anything is imported.

        Raises:
            UsageError: a value is impossible, or an option was given without `--trt`.
        """
        used = [name for name, value in vars(self).items() if value is not None and value is not False]
        if used and not wanted:
            flag = f"--{used[0].replace('_', '-')}"
            raise UsageError(f"{flag} is an option of TensorRT engines", "Add --trt, or leave it out.")
        for flag, value, known in (("--flavour", self.flavour, _FLAVOURS), ("--hardware", self.hardware, _HARDWARE)):
            if value is not None and value not in known:
                raise UsageError(f"{flag}: '{value}' is unknown", suggestion(value, known))
        for flag, size in (("--workspace", self.workspace), ("--build-memory", self.build_memory)):
            if size is not None and not 0 < size < 1e6:
                raise UsageError(f"{flag} {size:g} is not a size in GiB", "Give a positive number.")


@dataclass(frozen=True)
class _Triton:
    """A model repository to write; a field that is None was not given."""

    folder: Path
    name: str | None
    device: str | None
    version: int | None

    def check(self, artifact: Path, precisions: Collection[str], *, int8: bool, fused: bool) -> None:
        """As `fmg.export.triton.check_request`."""
        from fmg.export.triton import check_request

        check_request(self.folder, artifact, self._options(int8, fused), precisions)

    def write(
        self, artifact: Artifact, observer: Observer, *, int8: bool, fused: bool
    ) -> tuple[dict[str, object], str]:
        """Facts for `--json`, text for people."""
        from fmg.export.triton import export_triton

        made = export_triton(artifact, self.folder, self._options(int8, fused), observer=observer)
        facts = {
            "folder": str(made.folder),
            "model": made.model,
            "backends": dict(made.backends),
            "max_batch": made.max_batch,
        }
        most = f"up to {counted(made.max_batch, 'image')} per batch"
        return (
            facts,
            f"{made.folder}: model '{made.model}' for Triton, {counted(len(made.backends) - 1, 'graph')}, {most}",
        )

    def _options(self, int8: bool, fused: bool) -> TritonOptions:
        from fmg.export.triton import Device, TritonOptions

        return TritonOptions(self.name, cast("Device", self.device or "auto"), self.version or 1, int8, fused)


def _triton_request(folder: str | None, name: str | None, device: str | None, version: int | None) -> _Triton | None:
    """The repository that the options ask for.

    Raises:
        UsageError: a value is impossible, or an option was given without `--triton`.
    """
    given = {"--triton-name": name, "--triton-device": device, "--triton-version": version}
    used = [flag for flag, value in given.items() if value is not None]
    if folder is None:
        if used:
            raise UsageError(f"{used[0]} is an option of a repository for Triton", "Add --triton, or leave it out.")
        return None
    if device is not None and device not in _TRITON_DEVICES:
        raise UsageError(f"--triton-device: '{device}' is unknown", suggestion(device, _TRITON_DEVICES))
    place = new_place(folder, "--triton")
    assert place is not None
    return _Triton(place, name, device, version)


def _build(
    given: _Engines,
    artifact: Artifact,
    resolutions: tuple[int, ...] | None,
    batch: tuple[int, int, int] | None,
    observer: Observer,
) -> tuple[dict[str, object], str]:
    """Builds the engines of an artifact: facts for `--json`, text for people. Finished engines survive a failure."""
    from fmg.export.tensorrt.build import EngineOptions, build_engines
    from fmg.inference.artifact.manifest import AxisRange

    built = build_engines(
        artifact,
        flavour=given.flavour or "auto",
        resolutions=resolutions,
        batch=None if batch is None else AxisRange(*batch),
        options=EngineOptions(
            level=3 if given.builder_level is None else given.builder_level,
            workspace_gib=given.workspace,
            timing_cache=not given.no_timing_cache,
            hardware=cast("Hardware", given.hardware or "none"),
            version_compatible=given.version_compatible,
            weight_streaming=given.weight_streaming,
            refittable=given.refittable,
        ),
        memory_gib=given.build_memory,
        observer=observer,
    )
    facts: dict[str, object] = {"folder": str(artifact.folder), "engines": [_engine_facts(engine) for engine in built]}
    return facts, "\n".join([f"{artifact.folder}:", *map(_engine_text, built)])


def _engine_facts(engine: BuiltEngine) -> dict[str, object]:
    return {
        "graph": engine.record.graph,
        "plan": engine.record.plan,
        "flavour": engine.record.ingredients.flavour,
        "reused": engine.reused,
        "seconds": round(engine.record.seconds, 3),
        "bytes": engine.record.size,
        "profiles": [profile.name for profile in engine.record.ingredients.profiles],
    }


def _engine_text(engine: BuiltEngine) -> str:
    record = engine.record
    how = "reused" if engine.reused else f"built in {record.seconds:.1f} s"
    profiles = ", ".join(profile.name for profile in record.ingredients.profiles)
    return f"  {record.plan}: {record.size / 1e6:.1f} MB, {profiles}, {how}"


def _facts(artifact: Artifact) -> dict[str, object]:
    manifest = artifact.manifest
    parts = () if manifest.adapter is None else manifest.adapter.parts
    return {
        "folder": str(artifact.folder),
        "model": manifest.model.name,
        "adapter": None if manifest.adapter is None else manifest.adapter.run,
        **({"adapters": [asdict(part) for part in parts]} if parts else {}),
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


def _check_combination(forms: Mapping[str, bool], artifact: Mapping[str, bool], fresh: Mapping[str, bool]) -> None:
    """Checks that the options go together: at most one form, and only options that apply to it.

    Args:
        forms: what is to be made.
        artifact: options of a new artifact only.
        fresh: options of anything that is newly made.
    """
    asked = [name for name, given in forms.items() if given]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} cannot be used together", "Give one of them.")
    form = asked[0] if asked else "--onnx"
    taken = [] if form == "--onnx" else [name for name, given in artifact.items() if given]
    unfit = {"--swap-weights": tuple(fresh), "--kohya": ("--precision",)}.get(form, ())
    taken += [name for name in unfit if fresh[name]]
    if taken:
        raise UsageError(f"{taken[0]} cannot be used with {form}", "Leave out one of them.")


def _check_existing(form: str, fresh: Mapping[str, object]) -> None:
    """Refuses options of a new artifact where there is one already."""
    if given := [name for name, value in fresh.items() if value]:
        raise UsageError(
            f"{given[0]} cannot be used with {form} for an existing artifact",
            "Leave it out, or name the run or the model that it was made from.",
        )


def _precision(text: str | None) -> ExportPrecision:
    return "fp32" if text is None else _PRECISIONS[_known(text, _PRECISIONS)]


def _folder_precision(text: str | None) -> str:
    return _STORED if text is None else _known(text, _FOLDER_PRECISIONS)


def _known(text: str, names: Iterable[str]) -> str:
    if text not in tuple(names):
        raise UsageError(f"--precision: '{text}' is not a precision", suggestion(text, names))
    return text


def _verify_level(text: str, other: str | None) -> str | None:
    """How thoroughly to verify, or None for not at all; `other` is an option whose result cannot be verified."""
    if text not in _LEVELS:
        raise UsageError(f"--verify: '{text}' is not a level", suggestion(text, _LEVELS))
    if text == _OFF:
        return None
    if other is not None:
        raise UsageError(f"--verify cannot be used with {other}", "Leave out one of them.")
    return text


def _resolution_list(text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    return tuple(whole_number("--resolutions", text, part, MAX_SIDE, "512,1024") for part in text.split(","))


def _batch_range(text: str | None) -> tuple[int, int, int] | None:
    """Smallest, usual and largest batch size from `MIN:OPT:MAX`."""
    if text is None:
        return None
    numbers = [whole_number("--batch", text, part, MAX_ROWS, "1:4:16") for part in text.split(":")]
    if len(numbers) != 3 or sorted(numbers) != numbers:
        raise UsageError(f"--batch {text} is not three increasing numbers", "Write --batch 1:4:16.")
    smallest, usual, largest = numbers
    return smallest, usual, largest


def _one_place(place: str | None, out: str | None, *, file: bool) -> Path | None:
    """The folder (or file) to make, given as OUT or as --out."""
    if place is not None and out is not None:
        raise UsageError("OUT is given twice, as an argument and as --out", "Give it once.")
    from fmg.inference.target import absent_folder

    text = place if place is not None else out
    if text is None:
        return None
    return absent_folder(Path(text) if file else checked_folder(text, "OUT" if out is None else "--out"))
