"""From a name on the command line to a sampler: finds the target, chooses a backend and opens it.

An artifact is opened without torch, pydantic and the packages that read a run's recipe: hence the imports in functions.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import UsageError, python_call
from fmg.core.runtime import beyond_runtime
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact.backend import checked_batch
from fmg.inference.artifact.layout import (
    Artifact,
    artifact_names,
    artifact_of,
    check_not_interrupted,
    is_artifact,
    open_artifact,
)
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.inference.hub_target import fetch_target, hub_source
from fmg.inference.openers import known_backends
from fmg.progress import log_notices, watching
from fmg.version import is_runtime

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.core.protocols import BackendSource
    from fmg.inference.artifact.manifest import Base
    from fmg.inference.target import Target, TargetLike

AUTO = "auto"
TORCH = "torch"
# a run of the hub at a commit, as artifacts that were made from it name it
_PINNED = re.compile(r"[\w.-]+/[\w.-]+@[0-9a-f]{40}")


def find(
    target: TargetLike | Artifact, *, allow_code: bool = True, observer: Observer = log_notices
) -> Target | Artifact:
    """What `target` is: an artifact, a run, a model by name, or (None) the newest run. One of the hub is fetched first.

    Args:
        target: the target as typed or passed to a Python call.
        allow_code: whether the recipe of a run may name the user's own code. Sampling runs no reward, so code that the
            recipe names is not executed.
        observer: receives the progress of a download.

    Raises:
        UsageError: it is none of these.
        HubError: the hub cannot be reached or refuses.
        CheckpointError: a folder that is damaged.
    """
    if isinstance(target, Artifact):
        return target
    if isinstance(target, (str, PathLike)) and (place := os.fspath(target)):
        if is_artifact(place):
            return open_artifact(place)
        check_not_interrupted(place)
        if (source := hub_source(place)) is not None:
            fetched = fetch_target(source, observer)
            if fetched.kind == "artifact":
                return open_artifact(fetched.folder)
            _check_models(f"'{fetched.label}' is a run, which")
            from fmg.inference.target import pushed_target

            return pushed_target(fetched.folder, fetched.label, allow_code=allow_code)
    _check_models(
        "No artifact is named; a run" if target is None else f"'{target}' is not an artifact; a model or a run"
    )
    from fmg.inference.target import resolve_target

    return resolve_target(target, allow_code=allow_code, other=artifact_names())


def _check_models(found: str) -> None:
    """Refuses a model or a run, which the runtime cannot load.

    Raises:
        MissingDependencyError: only the runtime is installed.
    """
    if is_runtime():
        raise beyond_runtime(found)


def find_artifact(named: str | PathLike[str], observer: Observer = log_notices) -> Path:
    """The folder of an artifact: the given one, that in a run, or one of the hub, which is fetched first.

    Raises:
        UsageError: a run that has not been exported.
        HubError: the hub cannot be reached, refuses, or has no artifact of that name.
    """
    folder = artifact_of(named)
    source = None if folder.exists() else hub_source(os.fspath(named))
    if source is None:
        return folder
    fetched = fetch_target(source, observer)
    if fetched.kind == "run":
        raise UsageError(f"'{fetched.label}' is a run, not an artifact", "Export it first: fmg export.")
    return fetched.folder


def made_from(
    artifact: Artifact,
    *,
    allow_code: bool = True,
    advice: str = "Give the run instead of the artifact.",
    observer: Observer = log_notices,
) -> Target:
    """The run or model that an artifact was exported from, as its manifest names it.

    Args:
        artifact: what was exported.
        allow_code: as `find`.
        advice: what to do when the run is gone.
        observer: receives the progress of a download.

    Raises:
        UsageError: the run no longer exists.
    """
    from fmg.data.run_folder import is_run
    from fmg.inference.target import merged_target, resolve_target, run_of_checkpoint

    adapter = artifact.manifest.adapter
    parts = () if adapter is None else adapter.parts
    runs = [] if adapter is None else [part.run for part in parts] or [adapter.run]
    for run in runs:
        if _PINNED.fullmatch(run) is None and not is_run(run_of_checkpoint(Path(run)) or Path(run)):
            if parts:
                advice = "Put it back: an artifact of several runs is compared with all of them."
            raise UsageError(f"The run '{run}' that the artifact was made from is not here", advice)
    if parts:
        found = [(resolve_target(part.run, allow_code=allow_code, observer=observer), part.weight) for part in parts]
        return merged_target(found, observer=observer)
    if adapter is None:
        return base_target(artifact.manifest.base, allow_code=allow_code, observer=observer)
    return resolve_target(adapter.run, allow_code=allow_code, observer=observer)


def base_target(base: Base, *, allow_code: bool = False, observer: Observer = log_notices) -> Target:
    """The model under an adapter, sampled as its default recipe says, or the run of a full fine-tune.

    Args:
        base: its entry in the manifest of an artifact.
        allow_code: as `find`.
        observer: receives the progress of a download.

    Raises:
        UsageError: the run no longer exists, or the model has no such options.
    """
    from fmg.inference.target import Target, resolve_target
    from fmg.recipe import Recipe
    from fmg.registry import models

    if base.name not in models.names():
        return resolve_target(base.name, allow_code=allow_code, observer=observer)
    options = {f"model.{name}": value for name, value in (base.options or {}).items()}
    return Target(base.name, Recipe.default(base.name, **options), None)


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
    fused: bool = True,
    allow_code: bool = False,
) -> Generator:
    """The sampler of a model, a run folder, an artifact or (None) the newest run, ready to generate.

    Args:
        target: model name, run folder or artifact, or what `train` or `export_artifact` returned.
        backend: a registered backend, or `auto`: torch for models and runs, compiled on a GPU; for artifacts an engine
            that fits this machine, else ONNX Runtime.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`, for a model or a run; None is fp32. An artifact has the precision it was exported in.
        batch_size: images per forward pass; None takes the default.
        adapter: False loads a run's base without its adapter.
        resolution: side of the square image in pixels, for an artifact; None is its own.
        threads: CPU threads per operator; None takes the runtime's default.
        int8: run the int8 transformer of an artifact, on a CPU.
        fused: False runs an artifact step by step, even where it has the whole sampler as one graph (ONNX Runtime).
        allow_code: run the code inside version-compatible TensorRT engines.

    Raises:
        UsageError: unknown target, backend or device, or an option that the target does not have.
        MissingDependencyError: a package is not installed.
        CheckpointError: files are missing or damaged.
    """
    if isinstance(target, (str, PathLike)):
        with watching(None, None) as told:
            subject = find(target, observer=told)
    else:
        subject = find(target)
    options = _options(
        subject,
        dtype=dtype,
        adapter=adapter,
        resolution=resolution,
        threads=threads,
        int8=int8,
        fused=fused,
        allow_code=allow_code,
    )
    if int8 and backend == AUTO:
        backend = ort.NAME
    source = pick_backend(subject, backend, device=device, options=options)
    if isinstance(subject, Artifact):
        sampling = subject.manifest.sampling
        size = checked_batch(subject, batch_size, DEFAULT_BATCH)
        return Generator(source.open(subject, device), sampling.grid, sampling.steps, size)
    rollout = subject.recipe.rollout
    return Generator(source.open(subject, device), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH)


def load_target(
    target: Target, *, backend: str = TORCH, device: str = AUTO, dtype: str = "fp32", batch_size: int | None = None
) -> Generator:
    """The sampler of a model or a run in torch, for evaluations: they report truncated prompts themselves.

    Raises:
        UsageError: the backend is unknown, or runs artifacts.
        MissingDependencyError: what it needs is not installed.
    """
    rollout = target.recipe.rollout
    source = pick_backend(target, backend, device=device, options={"dtype": dtype})
    return Generator(source.open(target, device), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH, tells=False)


def _options(
    subject: Target | Artifact,
    *,
    dtype: str | None,
    adapter: bool,
    resolution: int | None,
    threads: int | None,
    int8: bool,
    fused: bool,
    allow_code: bool,
) -> dict[str, object]:
    """The options for a backend of this subject; refuses those that do not apply."""
    common = {} if threads is None else {"threads": threads}
    if isinstance(subject, Artifact):
        if dtype is not None or not adapter:
            raise UsageError(
                "The precision and the adapter of an artifact are set when it is exported",
                "Leave the option out, or export again with --precision or --swap-weights.",
            )
        size = {} if resolution is None else {"resolution": resolution}
        flags = {name: True for name, given in (("int8", int8), ("allow_code", allow_code)) if given}
        loop = {} if fused else {"fused": False}
        return {**common, **size, **flags, **loop}
    if resolution is not None or int8 or not fused or allow_code:
        raise UsageError(
            f"'{subject.label}' is not an exported artifact; resolution, int8, fused and allow_code are options of"
            " artifacts",
            "Export it first: fmg export.",
        )
    return {**common, "dtype": dtype or "fp32", "adapter": adapter}


def pick_backend(
    subject: Target | Artifact, name: str = AUTO, *, device: str = AUTO, options: Mapping[str, object] | None = None
) -> BackendSource:
    """The backend called `name`, or for `auto` the preferred one that can run `subject` here.

    Args:
        subject: what images are generated from.
        name: a registered backend, or `auto`.
        device: where.
        options: options of its config; `auto` passes each backend the ones that it has.

    Raises:
        UsageError: the backend is unknown or cannot run such a subject.
        MissingDependencyError: what it needs is not installed.
    """
    options, backends = options or {}, known_backends()
    if name == AUTO:
        return _preferred(subject, device, options)
    if backends.build(name).opens != _kind(subject):
        raise UsageError(*_mismatch(name, subject))
    source = backends.build(name, options)
    source.check()
    return source


def _preferred(subject: Target | Artifact, device: str, options: Mapping[str, object]) -> BackendSource:
    best: BackendSource | None = None
    backends = known_backends()
    for name in backends.names():
        known = backends.option_names(name)
        source = backends.build(name, {key: value for key, value in options.items() if key in known})
        better = best is None or source.preference > best.preference
        if source.opens == _kind(subject) and better and source.suits(subject, device):
            best = source
    if best is not None:
        return best
    source = backends.build(ort.NAME if isinstance(subject, Artifact) else TORCH)
    source.check()
    return source


def _kind(subject: Target | Artifact) -> str:
    return "artifact" if isinstance(subject, Artifact) else "model"


def _mismatch(name: str, subject: Target | Artifact) -> tuple[str, str]:
    backends = known_backends()
    fitting = ", ".join(other for other in backends.names() if backends.build(other).opens == _kind(subject))
    if isinstance(subject, Artifact):
        return f"The backend '{name}' does not run exported artifacts", f"Use one of: {fitting}."
    return (
        f"The backend '{name}' runs exported artifacts, but '{subject.label}' is not one",
        f"Export it first, or use one of: {fitting}.",
    )
