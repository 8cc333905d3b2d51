"""From a word on the command line to a sampler: what it names, which backend draws it, and the backend opened.

Imports no torch; an artifact is opened without it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import UsageError, python_call
from fmg.inference.artifact.backend import checked_batch
from fmg.inference.artifact.layout import Artifact, artifact_names, check_not_interrupted, is_artifact, open_artifact
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.registry import backends

if TYPE_CHECKING:
    from fmg.core.backends import BackendSource
    from fmg.inference.target import Target, TargetLike

AUTO = "auto"
TORCH = "torch"


def find(target: TargetLike | Artifact, *, allow_code: bool = True) -> Target | Artifact:
    """What `target` is: an artifact, a run, a model by name, or (None) the newest run.

    Args:
        target: what was typed, or passed to a Python call.
        allow_code: whether the recipe of a run may name code of the user's own. Drawing runs no reward, so code that
            the recipe names stays unused.

    Raises:
        UsageError: it is none of them.
        CheckpointError: a folder that is damaged.
    """
    if isinstance(target, Artifact):
        return target
    if isinstance(target, (str, PathLike)) and (place := os.fspath(target)):
        if is_artifact(place):
            return open_artifact(place)
        check_not_interrupted(place)
    from fmg.inference.target import resolve_target

    return resolve_target(target, allow_code=allow_code, other=artifact_names())


def made_from(
    artifact: Artifact, *, allow_code: bool = True, advice: str = "Name the run in place of the artifact."
) -> Target:
    """The run or model that an artifact was made from, as its manifest names it.

    Args:
        artifact: what was exported.
        allow_code: as `find`.
        advice: what to do when the run is gone.

    Raises:
        UsageError: the run is not here any more.
    """
    from fmg.data.run_folder import is_run
    from fmg.inference.target import resolve_target, run_of_checkpoint

    adapter = artifact.manifest.adapter
    if adapter is not None and not is_run(run_of_checkpoint(Path(adapter.run)) or Path(adapter.run)):
        raise UsageError(f"The run '{adapter.run}' that the artifact was made from is not here", advice)
    return resolve_target(artifact.manifest.base.name if adapter is None else adapter.run, allow_code=allow_code)


def pick_backend(
    subject: Target | Artifact, name: str = AUTO, *, device: str = AUTO, options: Mapping[str, object] | None = None
) -> BackendSource:
    """The backend called `name`, or for `auto` the preferred one of those that can draw `subject` here.

    Args:
        subject: what is drawn.
        name: a registered backend, or `auto`.
        device: where.
        options: those of its config; `auto` gives each backend those that it has.

    Raises:
        UsageError: the backend is unknown or does not draw such a thing.
        MissingDependencyError: what it needs is not installed.
    """
    options = options or {}
    if name == AUTO:
        return _preferred(subject, device, options)
    if backends.build(name).opens != _kind(subject):
        raise UsageError(*_mismatch(name, subject))
    source = backends.build(name, options)
    source.check()
    return source


@python_call
def load(
    target: TargetLike | Artifact = None,
    *,
    backend: str = AUTO,
    device: str = AUTO,
    dtype: str | None = None,
    batch_size: int | None = None,
    adapter: bool = True,
    resolution: int | None = None,
    threads: int | None = None,
    int8: bool = False,
    allow_code: bool = False,
) -> Generator:
    """The sampler of a model, a run folder, an artifact or (None) the newest run, ready to draw.

    Args:
        target: model name, run folder or artifact, or what `train` or `export_artifact` returned.
        backend: a registered backend, or `auto`: torch for models and runs; for artifacts an engine that fits this
            machine, else ONNX Runtime.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`, for a model or a run; None is fp32. An artifact has the precision it was exported in.
        batch_size: images a network call; None takes the default.
        adapter: False loads a run's base without its adapter.
        resolution: side of the square image in pixels, for an artifact; None is its own.
        threads: CPU threads of one operator; None takes the runtime's default.
        int8: run the int8 transformer of an artifact, on a CPU.
        allow_code: run the code inside version-compatible TensorRT engines.

    Raises:
        UsageError: unknown target, backend or device, or an option that the target does not have.
        MissingDependencyError: a package is not installed.
        CheckpointError: files are missing or damaged.
    """
    subject = find(target)
    options = _options(
        subject, dtype=dtype, adapter=adapter, resolution=resolution, threads=threads, int8=int8, allow_code=allow_code
    )
    if int8 and backend == AUTO:
        backend = "onnxruntime"
    source = pick_backend(subject, backend, device=device, options=options)
    if isinstance(subject, Artifact):
        sampling = subject.manifest.sampling
        size = checked_batch(subject, batch_size, DEFAULT_BATCH)
        return Generator(source.open(subject, device), sampling.grid, sampling.steps, size)
    rollout = subject.recipe.rollout
    return Generator(source.open(subject, device), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH)


def _options(
    subject: Target | Artifact,
    *,
    dtype: str | None,
    adapter: bool,
    resolution: int | None,
    threads: int | None,
    int8: bool,
    allow_code: bool,
) -> dict[str, object]:
    """The options of a backend of this subject; what it cannot have is refused."""
    common = {} if threads is None else {"threads": threads}
    if isinstance(subject, Artifact):
        if dtype is not None or not adapter:
            raise UsageError(
                "The precision and the adapter of an artifact are set when it is exported",
                "Leave the option out, or export again with --precision or --swap-weights.",
            )
        size = {} if resolution is None else {"resolution": resolution}
        flags = {name: True for name, given in (("int8", int8), ("allow_code", allow_code)) if given}
        return {**common, **size, **flags}
    if resolution is not None or int8 or allow_code:
        raise UsageError(
            f"'{subject.label}' is not an exported artifact, which resolution, int8 and allow_code are options of",
            "Export it first: fmg export.",
        )
    return {**common, "dtype": dtype or "fp32", "adapter": adapter}


def _preferred(subject: Target | Artifact, device: str, options: Mapping[str, object]) -> BackendSource:
    best: BackendSource | None = None
    for name in backends.names():
        known = backends.config_class(name).model_fields.keys()
        source = backends.build(name, {key: value for key, value in options.items() if key in known})
        better = best is None or source.preference > best.preference
        if source.opens == _kind(subject) and better and source.suits(subject, device):
            best = source
    if best is not None:
        return best
    fallback = "onnxruntime" if isinstance(subject, Artifact) else TORCH
    source = backends.build(fallback)
    source.check()
    return source


def _kind(subject: Target | Artifact) -> str:
    return "artifact" if isinstance(subject, Artifact) else "model"


def _mismatch(name: str, subject: Target | Artifact) -> tuple[str, str]:
    fitting = [other for other in backends.names() if backends.build(other).opens == _kind(subject)]
    if isinstance(subject, Artifact):
        return f"The backend '{name}' does not draw an exported artifact", f"Use one of: {', '.join(fitting)}."
    return (
        f"The backend '{name}' draws an exported artifact, and '{subject.label}' is not one",
        f"Export it first, or use one of: {', '.join(fitting)}.",
    )
