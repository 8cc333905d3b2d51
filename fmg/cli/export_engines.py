"""The part of `fmg export` that builds TensorRT engines: its options, and what it prints."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmg.cli import completion
from fmg.core.errors import UsageError, suggestion

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.export.tensorrt.build import Engine
    from fmg.inference.artifact import Artifact

_FLAVOURS = ("auto", "tensorrt", "rtx")
_HARDWARE = ("none", "same-capability", "ampere-plus")

Trt = Annotated[
    bool,
    typer.Option(
        "--trt",
        help="Also build TensorRT engines; of an artifact that is there, only those.",
        rich_help_panel="TensorRT engines",
    ),
]
FlavourName = Annotated[
    str | None,
    typer.Option(
        "--flavour",
        metavar="F",
        help="tensorrt (for this GPU), rtx (ahead of time, without a GPU), or auto.",
        show_default="auto",
        rich_help_panel="TensorRT engines",
        autocompletion=completion.one_of(*_FLAVOURS),
    ),
]
Level = Annotated[
    int | None,
    typer.Option(
        "--builder-level",
        min=0,
        max=5,
        metavar="N",
        help="Effort of the builder.",
        show_default="3",
        rich_help_panel="TensorRT engines",
    ),
]
Workspace = Annotated[
    float | None,
    typer.Option(
        "--workspace",
        metavar="GIB",
        help="Scratch memory of a layer.",
        show_default="the builder's own",
        rich_help_panel="TensorRT engines",
    ),
]
Hardware = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="H",
        help="Other GPUs to run on: none, same-capability or ampere-plus (tensorrt).",
        show_default="none",
        rich_help_panel="TensorRT engines",
        autocompletion=completion.one_of(*_HARDWARE),
    ),
]
VersionCompatible = Annotated[
    bool,
    typer.Option(
        "--version-compatible",
        help="For other versions of TensorRT too; carries code (tensorrt).",
        rich_help_panel="TensorRT engines",
    ),
]
WeightStreaming = Annotated[
    bool,
    typer.Option(
        "--weight-streaming",
        help="Weights may stay on the host where the GPU is small.",
        rich_help_panel="TensorRT engines",
    ),
]
Refittable = Annotated[
    bool,
    typer.Option(
        "--refittable",
        help="New weights need no new build; checks that no bias is lost. Needs a GPU.",
        rich_help_panel="TensorRT engines",
    ),
]
NoTimingCache = Annotated[
    bool,
    typer.Option(
        "--no-timing-cache", help="Measure every kernel again (tensorrt).", rich_help_panel="TensorRT engines"
    ),
]
BuildMemory = Annotated[
    float | None,
    typer.Option(
        "--build-memory",
        metavar="GIB",
        help="Host memory of a build.",
        show_default="9/10 of what is free",
        rich_help_panel="TensorRT engines",
    ),
]


@dataclass(frozen=True)
class EngineRequest:
    """What was asked of the builder, its values checked."""

    flavour: str
    options: dict[str, Any]
    memory_gib: float | None


def engine_request(
    trt: bool,
    *,
    flavour: str | None,
    level: int | None,
    workspace: float | None,
    hardware: str | None,
    version_compatible: bool,
    weight_streaming: bool,
    refittable: bool,
    no_timing_cache: bool,
    build_memory: float | None,
) -> EngineRequest | None:
    """The request, or None without `--trt`. Imports nothing: the command has not begun yet.

    Raises:
        UsageError: a value is impossible, or an option of engines came without `--trt`.
    """
    given = {
        "--flavour": flavour is not None,
        "--builder-level": level is not None,
        "--workspace": workspace is not None,
        "--hardware": hardware is not None,
        "--version-compatible": version_compatible,
        "--weight-streaming": weight_streaming,
        "--refittable": refittable,
        "--no-timing-cache": no_timing_cache,
        "--build-memory": build_memory is not None,
    }
    if not trt:
        if used := [flag for flag, is_given in given.items() if is_given]:
            raise UsageError(f"{used[0]} is an option of TensorRT engines", "Add --trt, or leave it out.")
        return None
    for flag, value, known in (("--flavour", flavour, _FLAVOURS), ("--hardware", hardware, _HARDWARE)):
        if value is not None and value not in known:
            raise UsageError(f"{flag}: '{value}' is unknown", suggestion(value, known))
    for flag, size in (("--workspace", workspace), ("--build-memory", build_memory)):
        if size is not None and not 0 < size < 1e6:
            raise UsageError(f"{flag} {size:g} is not a size in GiB", "Give a positive number.")
    options: dict[str, Any] = {
        "level": 3 if level is None else level,
        "workspace_gib": workspace,
        "timing_cache": not no_timing_cache,
        "hardware": hardware or "none",
        "version_compatible": version_compatible,
        "weight_streaming": weight_streaming,
        "refittable": refittable,
    }
    return EngineRequest(flavour or "auto", options, build_memory)


def added(
    request: EngineRequest,
    artifact: Artifact,
    resolutions: tuple[int, ...] | None,
    batch: tuple[int, int, int] | None,
    observer: Observer,
) -> tuple[dict[str, object], str]:
    """Builds the engines of an artifact: facts for `--json`, text for people. What is complete stays when it fails."""
    from fmg.export.tensorrt.build import build_engines
    from fmg.export.tensorrt.options import EngineOptions
    from fmg.inference.artifact.manifest import AxisRange

    built = build_engines(
        artifact,
        flavour=request.flavour,
        resolutions=resolutions,
        batch=None if batch is None else AxisRange(*batch),
        options=EngineOptions(**request.options),
        memory_gib=request.memory_gib,
        observer=observer,
    )
    return {"folder": str(artifact.folder), "engines": _facts(built)}, f"{artifact.folder}:\n{_text(built)}"


def _facts(engines: list[Engine]) -> list[dict[str, object]]:
    return [
        {
            "graph": engine.record.graph,
            "plan": engine.record.plan,
            "flavour": engine.record.ingredients.flavour,
            "reused": engine.reused,
            "seconds": round(engine.record.seconds, 3),
            "bytes": engine.record.size,
            "profiles": [profile.name for profile in engine.record.ingredients.profiles],
        }
        for engine in engines
    ]


def _text(engines: list[Engine]) -> str:
    lines = []
    for engine in engines:
        record = engine.record
        how = "was there already" if engine.reused else f"built in {record.seconds:.1f} s"
        profiles = ", ".join(profile.name for profile in record.ingredients.profiles)
        lines.append(f"  {record.plan}: {record.size / 1e6:.1f} MB, {profiles}, {how}")
    return "\n".join(lines)
