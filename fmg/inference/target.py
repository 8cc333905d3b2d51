"""What a command points at: a model by name, or a run folder with its tuned adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmg.core.errors import CheckpointError, UsageError, suggestion
from fmg.data.checkpoints import chosen_checkpoint
from fmg.data.run_folder import RUNS, RunFolder, is_run, newest_run
from fmg.inference.backend import TorchBackend
from fmg.inference.devices import pick_device, pick_dtype
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.registry import models
from fmg.registry.recipe import Recipe


@dataclass(frozen=True)
class Target:
    """A model with an adapter (runs) or without one (models by name), and the recipe that says how to sample it."""

    label: str
    recipe: Recipe
    adapter: Path | None


def resolve_target(target: str | Path | None, runs: Path = RUNS) -> Target:
    """Finds out what `target` is without loading weights.

    Args:
        target: a registered model, a run folder, or None for the newest run under `runs`.
        runs: where runs are kept.

    Raises:
        UsageError: when it is neither, or there is no run yet.
        CheckpointError: when a run folder has no saved adapter.
    """
    if target is None:
        newest = newest_run(runs)
        if newest is None:
            raise UsageError(f"There is no run under '{runs}'", "Run `fmg train` first, or name a model.")
        return _run_target(RunFolder(newest))
    if Path(target).is_dir():
        return _run_target(RunFolder(Path(target)))
    name = str(target)
    if name not in models.names():
        raise UsageError(f"'{name}' is neither a model nor a run folder", suggestion(name, models.names()))
    return Target(name, Recipe.default(model=name), None)


def load_target(
    target: Target, *, device: str = "auto", dtype: str = "fp32", batch_size: int | None = None, adapter: bool = True
) -> Generator:
    """Loads the weights of `target` and returns its sampler."""
    recipe = target.recipe
    source = models.build_config(recipe.model.name, recipe.model.config)
    model = source.load(pick_device(device), pick_dtype(dtype))
    if adapter and target.adapter is not None:
        model.load_adapter(target.adapter)
    return Generator(TorchBackend(model), recipe.rollout.grid, recipe.rollout.steps, batch_size or DEFAULT_BATCH)


def load(
    target: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "fp32",
    batch_size: int | None = None,
    adapter: bool = True,
) -> Generator:
    """The sampler of a model, a run folder or (None) the newest run, ready to draw.

    Args:
        target: model name or run folder.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`.
        batch_size: images a network call; None takes the default.
        adapter: False loads a run's base without its adapter.
    """
    return load_target(resolve_target(target), device=device, dtype=dtype, batch_size=batch_size, adapter=adapter)


def _run_target(run: RunFolder) -> Target:
    if not is_run(run.path):
        raise UsageError(f"'{run.path}' is not a run folder", "Name one that `fmg train` made; `fmg runs` lists them.")
    checkpoint = chosen_checkpoint(run.path)
    if checkpoint is None:
        raise CheckpointError(
            f"The run '{run.path}' has no saved adapter", "Let it run until its first evaluation, or name another run."
        )
    # a run was composed with the user's consent to its code; reading its recipe again must not ask twice
    return Target(str(run.path), Recipe.from_yaml(run.recipe, allow_code=True), checkpoint)
