"""Targets of commands: a model by name, or a run folder with its trained adapter. Imports no torch."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import CheckpointError, FmgWarning, UsageError, WrongTypeError, suggestion
from fmg.core.files import RECIPE, check_place, with_name
from fmg.data.checkpoints import FOLDER, UNCHECKED, chosen_checkpoint, read_index
from fmg.data.run_folder import RUNS, RunFolder, is_run, list_runs, no_run, run_names
from fmg.inference.artifact import is_artifact
from fmg.inference.artifact.manifest import Adapter, AdapterPart
from fmg.inference.hub_target import check_pushed_run, fetch_target, hub_source, is_pushed_run, without_parents
from fmg.models.common.checkpoint_files import adapter_digest, is_full
from fmg.progress import log_notices
from fmg.recipe import Recipe
from fmg.registry import models

if TYPE_CHECKING:
    from fmg.core.events import Observer
    from fmg.core.protocols import Model


@dataclass(frozen=True)
class Target:
    """A model with an adapter (runs) or without one (models by name), and the recipe that states how to sample it.

    Attributes:
        label: the name that the user gave.
        recipe: how it is sampled and scored.
        adapter: folder of what was trained, or None.
        merged: what that adapter was added up from; empty for the adapter of one run.
    """

    label: str
    recipe: Recipe
    adapter: Path | None
    merged: tuple[AdapterPart, ...] = ()

    @property
    def shown(self) -> str:
        """The label for others, without the names of folders on this computer."""
        return sum_label(_named_parts(self.merged)) if self.merged else without_parents(self.label)

    def base(self) -> Target:
        """The same model without the adapter."""
        return replace(self, label=f"base of {self.label}", adapter=None, merged=())


TargetLike = str | PathLike[str] | Target | None
"""What Python calls accept as a target: a model or a folder by name, a path, anything with a folder of its own (the
result of `fmg.train`, a `RunFolder`), a `Target`, or None for the newest run."""


def target_text(target: TargetLike) -> str | None:
    """The name or path of a target; None for the newest run.

    Raises:
        WrongTypeError: it is neither a text nor a path.
    """
    if target is None:
        return None
    if isinstance(target, Target):
        return target.label
    if not isinstance(target, (str, PathLike)):
        raise WrongTypeError("target", target, "the name of a model, the path of a run, or what fmg.train returned")
    return os.fspath(target)


def resolve_target(
    target: TargetLike,
    runs: Path = RUNS,
    *,
    allow_code: bool = False,
    other: Sequence[str] = (),
    observer: Observer = log_notices,
) -> Target:
    """Resolves `target` without loading weights. A run of the hub is fetched first.

    Args:
        target: a registered model, a run folder, one checkpoint of a run (`RUN/checkpoints/checkpoint-20`), a run that
            was pushed to the hub (`owner/name[@revision]`) or a downloaded copy of it, or None for the newest run under
            `runs` that has ended and has a saved adapter.
        runs: where runs are kept.
        allow_code: whether the recipe of a run may name the user's own code; a run folder can come from anyone.
        other: names that the caller accepts as well, for the suggestion of an error.
        observer: receives the progress of a download.

    Raises:
        WrongTypeError: it is neither a text nor a path.
        UsageError: it is none of these (an artifact, for instance), there is no run yet, or its recipe names code.
        HubError: the hub cannot be reached or refuses.
        CheckpointError: a run folder has no saved adapter, or a file of it is missing or damaged.
    """
    if isinstance(target, Target):
        return target
    name = target_text(target)
    if name is None:
        return _run_target(_newest_usable(runs), allow_code)
    if name and Path(name).is_dir():
        # what names the target later, such as a manifest, is read in other folders
        name = str(with_name(Path(name)))
        run = run_of_checkpoint(Path(name))
        if run is not None:
            return _run_target(RunFolder(run), allow_code, Path(name).name, name)
        if is_pushed_run(Path(name)):
            check_pushed_run(Path(name))
            return pushed_target(Path(name), name, allow_code=allow_code)
        if is_artifact(name):
            raise _artifact_error(name)
        return _run_target(RunFolder(Path(name)), allow_code)
    if name not in models.names() and (source := hub_source(name)) is not None:
        fetched = fetch_target(source, observer)
        if fetched.kind == "artifact":
            raise _artifact_error(name)
        return pushed_target(fetched.folder, fetched.label, allow_code=allow_code)
    if name not in models.names():
        known = [*models.names(), *run_names(runs), *other]
        raise UsageError(f"'{name}' is neither a model nor a run folder", suggestion(name, known))
    return Target(name, Recipe.default(model=name), None)


def _artifact_error(name: str) -> UsageError:
    return UsageError(f"'{name}' is an exported artifact", "Name the run or the model that it was made from.")


def weighted_run(text: str) -> tuple[str, float]:
    """The run and the weight in a text such as `runs/a=0.7`; without a weight, 1.

    Raises:
        UsageError: the weight is zero or not finite.
    """
    run, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return text, 1.0
    try:
        weight = float(number)
    except ValueError:
        return text, 1.0
    if not run or not math.isfinite(weight) or not weight:
        raise UsageError(f"'{text}' has no valid weight", "Write RUN=WEIGHT, for example runs/a=0.7.")
    return run, weight


def merged_target(
    adapters: Sequence[tuple[TargetLike, float]], model: str | None = None, *, observer: Observer = log_notices
) -> Target:
    """The weighted sum of the adapters of several runs, on the base that all of them were trained on.

    It is sampled and scored as the run with the largest weight; the order of the adapters does not matter. One adapter
    with weight 1 is the run itself.

    Args:
        adapters: runs, each with its weight.
        model: name of their base; None takes it from the runs.
        observer: receives the progress of downloads.

    Raises:
        UsageError: a run has no LoRA, is named twice or belongs to another model, or the adapters cannot be added up.
        CheckpointError: a file is missing or damaged, or the adapters were trained on different weights.
        HubError: the hub cannot be reached or refuses.
    """
    found = []
    for run, weight in adapters:
        target = resolve_target(run, observer=observer)
        if target.adapter is None or target.merged or is_full(target.adapter):
            raise UsageError(f"'{target.label}' has no LoRA to merge", "Name the folder of a run that trained one.")
        found.append((weight, AdapterPart(target.label, adapter_digest(target.adapter), weight), target))
    found.sort(key=lambda entry: (-entry[0], entry[1].digest))
    digests = [part.digest for _, part, _ in found]
    if len(set(digests)) < len(digests):
        raise UsageError("Two of the adapters are the same, so one would be added twice", "Name each run once.")
    names = {target.recipe.model.name for _, _, target in found}
    if len(names | {model or ""} - {""}) > 1:
        raise UsageError(
            f"The adapters belong to {', '.join(sorted(names))}, not to {model or 'one model'}",
            "Merge adapters of one model, and name that model as the base.",
        )
    first = found[0][2]
    if len(found) == 1 and found[0][0] == 1:
        return first
    from fmg.models.common.merged_adapters import merged_adapter

    folder = merged_adapter([(target.adapter, weight) for weight, _, target in found if target.adapter is not None])
    parts = tuple(part for _, part, _ in found)
    return Target(sum_label(parts), first.recipe, folder, parts)


def sum_label(parts: Sequence[AdapterPart]) -> str:
    """A weighted sum of adapters as text: `0.7 runs/a + 0.3 runs/b`."""
    return " + ".join(f"{part.weight:g} {part.run}" for part in parts)


def without_folders(adapter: Adapter) -> Adapter:
    """The facts of an adapter for others, without the names of folders on this computer."""
    parts = _named_parts(adapter.parts)
    return replace(adapter, run=sum_label(parts) if parts else without_parents(adapter.run), parts=parts)


def _named_parts(parts: Sequence[AdapterPart]) -> tuple[AdapterPart, ...]:
    return tuple(replace(part, run=without_parents(part.run)) for part in parts)


def chosen_target(
    target: str | None, adapters: Sequence[str], scale: float | None, *, observer: Observer = log_notices
) -> Target:
    """The target of a command with `--adapter RUN[=WEIGHT]` or `--lora-scale`.

    Args:
        target: with adapters, the name of their base or None; with a scale, a run or None for the newest one.
        adapters: texts as in `weighted_run`.
        scale: factor on the adapter of one run.
        observer: receives the progress of downloads.

    Raises:
        UsageError: both are given, or as `merged_target`.
    """
    if scale is None:
        return merged_target([weighted_run(text) for text in adapters], target, observer=observer)
    if adapters:
        raise UsageError("--lora-scale cannot be used with --adapter", "Write the factors there: --adapter RUN=WEIGHT.")
    if not math.isfinite(scale) or not scale:
        raise UsageError(f"--lora-scale {scale:g} is not a valid factor", "Give a number other than 0, such as 0.8.")
    return merged_target([(target, scale)], observer=observer)


def pushed_target(folder: Path, label: str, *, allow_code: bool = False) -> Target:
    """A checkpoint with its recipe, as `fmg push` sends it. Errors as for a run folder."""
    return Target(label, Recipe.of_run(folder / RECIPE, allow_code=allow_code), folder)


def export_folder(target: TargetLike, name: str) -> Path:
    """The default folder (or file) of an export: in its run, or beside other exports.

    Args:
        target: what is exported.
        name: what it is called in a run: `artifact`, `diffusers`, or the name of a file.

    Raises:
        UsageError: it exists, or there is no run yet.
    """
    if isinstance(target, Target) and target.merged:
        label = f"{target.recipe.model.name}-merged"
    else:
        label = target_text(target) or resolve_target(None).label
        if (source := hub_source(label)) is not None:
            label = source.repository.partition("/")[2]
        elif Path(label).is_dir():
            return absent_folder(Path(label) / name)
    if suffix := Path(name).suffix:
        return absent_folder(Path(label + suffix))
    return absent_folder(Path(name if name.endswith("s") else f"{name}s") / label)


def absent_folder(folder: Path) -> Path:
    """The folder that an export will create.

    Raises:
        UsageError: it exists, or cannot be created.
    """
    if folder.exists():
        itself = ", or name the artifact itself for --trt and --triton" if is_artifact(folder) else ""
        raise UsageError(f"{folder} exists already", f"Export to another folder, or move that one away{itself}.")
    check_place(folder, "--out")
    return folder


def load_model(target: Target, *, device: str = "auto", dtype: str = "fp32", adapter: bool = True) -> Model:
    """Loads the weights of `target` in torch, with its adapter unless told otherwise."""
    from fmg.inference.torch_backend import device_for, pick_dtype

    recipe = target.recipe
    source = models.build_config(recipe.model.name, recipe.model.config)
    model = source.load(device_for(device, recipe.model.name, source.spec), pick_dtype(dtype))
    if adapter and target.adapter is not None:
        model.load_adapter(target.adapter)
    return model


def run_of_checkpoint(folder: Path) -> Path | None:
    """The run that the checkpoint folder belongs to, or None."""
    place = folder.parent
    return place.parent if place.name == FOLDER and is_run(place.parent) else None


def _newest_usable(runs: Path) -> RunFolder:
    """The newest run that has ended, or the newest if none has; warns about newer ones that are skipped."""
    known = list_runs(runs)
    why = {run.path: reason for run in known if (reason := _unusable(run))}
    usable = [run for run in known if run.path not in why]
    if ended := [run for run in usable if run.state().state != "running"]:
        why |= {run.path: "is running, or was killed" for run in usable if run not in ended}
    if not usable:
        raise UsageError(
            f"There is no run with a saved adapter under '{runs}'",
            "Run `fmg train` first, or name a model or a run folder.",
        )
    chosen = (ended or usable)[-1]
    newer = [f"'{run.path}' {why[run.path]}" for run in known[known.index(chosen) + 1 :]]
    if newer:
        what = f"Using the run '{chosen.path}', which is not the newest: {'; '.join(newer)}"
        warnings.warn(f"{what}. Name a run to choose another.", FmgWarning, stacklevel=2)
    return chosen


def _unusable(run: RunFolder) -> str | None:
    try:
        return None if chosen_checkpoint(run.path) else "has no saved adapter"
    except CheckpointError as error:
        return f"is damaged ({error.what})"


def _run_target(run: RunFolder, allow_code: bool, checkpoint: str | None = None, label: str | None = None) -> Target:
    """A run with its best checkpoint, or with the given one; the checkpoint's files are checked."""
    if not run.exists():
        raise no_run(run.path)
    index = read_index(run.path)
    if index is None:
        raise CheckpointError(
            f"The run '{run.path}' has no saved adapter", "Let it run until its first evaluation, or name another run."
        )
    names = [saved.name for saved in index.saved]
    if checkpoint is not None and checkpoint not in names:
        raise UsageError(f"The run '{run.path}' did not keep '{checkpoint}'", suggestion(checkpoint, names))
    saved = index.entry(checkpoint or index.best)
    if not saved.check(run.path):
        warnings.warn(f"The run '{run.path}' {UNCHECKED}", FmgWarning, stacklevel=2)
    if "recipe.yaml" in index.changed_files(run.path):
        text = f"'{run.recipe}' was changed after the run began; the changed recipe is used"
        warnings.warn(text, FmgWarning, stacklevel=2)
    recipe = Recipe.of_run(run.recipe, allow_code=allow_code)
    return Target(label or str(run.path), recipe, saved.path(run.path))
