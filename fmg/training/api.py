"""`train`: what `fmg train` does, as a Python call."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fmg.core.errors import CheckpointError
from fmg.core.events import Observer, ignore
from fmg.data.environment import write_environment
from fmg.data.run_folder import RunFolder, State
from fmg.data.run_report import write_run_report
from fmg.inference.devices import device_for, pick_dtype
from fmg.registry.recipe import Recipe
from fmg.registry.resolve import ResolvedRecipe
from fmg.training.card import write_cards
from fmg.training.compose import compose
from fmg.training.sizes import choose_sizes
from fmg.training.trainer import Trainer, TrainResult


def train(recipe: Recipe | ResolvedRecipe, run: str | Path | None = None, observer: Observer = ignore) -> TrainResult:
    """Trains the adapter that `recipe` describes and writes a run folder.

    Args:
        recipe: a recipe, or a resolved one whose provenance is stored with it.
        run: where to write; None makes a new folder under `runs/`. A finished or foreign folder is never overwritten.
        observer: receives events (`fmg.core.events`).

    Returns:
        The run folder, the first and last evaluation, and the best checkpoint by held-out score.

    Raises:
        UsageError: for parts that do not fit, a device that is not there, or a folder that is taken.
        CheckpointError: when weights are missing or damaged.
        GateError: when a safety check of the run fails; what was saved before stays.
    """
    plain = recipe.recipe if isinstance(recipe, ResolvedRecipe) else recipe
    device = device_for(plain.train.device, plain.model.name, plain.model.config.spec())
    dtype = pick_dtype(plain.train.dtype)
    RunFolder.check_free(run)
    composed = compose(plain, device, dtype)
    folder = RunFolder.create(run, plain.model.name)
    state: State = "failed"
    try:
        folder.recipe.write_text(recipe.to_yaml(), encoding="utf-8")
        write_environment(folder.path)
        result = Trainer(composed, folder, choose_sizes(plain, device.type), observer).train()
        write_cards(folder, plain)
        state = "interrupted" if result.interrupted else "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except OSError as error:
        raise CheckpointError(
            f"Writing to '{folder.path}' failed: {error.strerror or error}", "Free some space, or choose another --run."
        ) from error
    finally:
        # on a full disk the state cannot be written either, and the first error is the one that matters
        with contextlib.suppress(OSError, CheckpointError):
            folder.set_state(state)
    write_run_report(folder)
    return result
