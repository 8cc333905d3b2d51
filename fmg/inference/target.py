"""What a command points at: a model by name, or a run folder with its tuned adapter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fmg.core.errors import CheckpointError, UsageError, suggestion
from fmg.data.checkpoints import chosen_checkpoint
from fmg.data.run_folder import RUNS, RunFolder, is_run, list_runs
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.registry import models
from fmg.registry.recipe import Recipe

if TYPE_CHECKING:
    from fmg.core.protocols import Model


@dataclass(frozen=True)
class Target:
    """A model with an adapter (runs) or without one (models by name), and the recipe that says how to sample it."""

    label: str
    recipe: Recipe
    adapter: Path | None

    def base(self) -> Target:
        """The same model without the adapter."""
        return replace(self, label=f"base of {self.label}", adapter=None)


def resolve_target(target: str | Path | None, runs: Path = RUNS, *, allow_code: bool = False) -> Target:
    """Finds out what `target` is without loading weights.

    Args:
        target: a registered model, a run folder, or None for the newest run under `runs` that has a saved adapter.
        runs: where runs are kept.
        allow_code: whether the recipe of a run may name code of the user's own; a run folder can come from anyone.

    Raises:
        UsageError: when it is neither, there is no run yet, or its recipe names code.
        CheckpointError: when a run folder has no saved adapter.
    """
    if target is None:
        return _run_target(_newest_usable(runs), allow_code)
    name = str(target)
    if name and Path(target).is_dir():
        return _run_target(RunFolder(Path(target)), allow_code)
    if name not in models.names():
        raise UsageError(f"'{name}' is neither a model nor a run folder", suggestion(name, models.names()))
    return Target(name, Recipe.default(model=name), None)


def load_model(target: Target, *, device: str = "auto", dtype: str = "fp32", adapter: bool = True) -> Model:
    """Loads the weights of `target` in torch, with its adapter unless told otherwise."""
    from fmg.inference.devices import device_for, pick_dtype

    recipe = target.recipe
    source = models.build_config(recipe.model.name, recipe.model.config)
    model = source.load(device_for(device, recipe.model.name, source.spec), pick_dtype(dtype))
    if adapter and target.adapter is not None:
        model.load_adapter(target.adapter)
    return model


def load_target(
    target: Target, *, device: str = "auto", dtype: str = "fp32", batch_size: int | None = None, adapter: bool = True
) -> Generator:
    """The sampler of `target` in torch."""
    from fmg.inference.backend import TorchBackend

    rollout = target.recipe.rollout
    model = load_model(target, device=device, dtype=dtype, adapter=adapter)
    return Generator(TorchBackend(model), rollout.grid, rollout.steps, batch_size or DEFAULT_BATCH)


def _newest_usable(runs: Path) -> RunFolder:
    """The run that began last among those that ended; one that is still going only when there is no other."""
    usable = [run for run in list_runs(runs) if chosen_checkpoint(run.path) is not None]
    ended = [run for run in usable if run.state().state != "running"]
    for run in reversed(ended or usable):
        return run
    raise UsageError(
        f"There is no run with a saved adapter under '{runs}'",
        "Run `fmg train` first, or name a model or a run folder.",
    )


def _run_target(run: RunFolder, allow_code: bool) -> Target:
    if not is_run(run.path):
        raise UsageError(f"'{run.path}' is not a run folder", "Name one that `fmg train` made; `fmg runs` lists them.")
    checkpoint = chosen_checkpoint(run.path)
    if checkpoint is None:
        raise CheckpointError(
            f"The run '{run.path}' has no saved adapter", "Let it run until its first evaluation, or name another run."
        )
    return Target(str(run.path), Recipe.from_yaml(run.recipe, allow_code=allow_code), checkpoint)
