"""`train` and `resume`: what `fmg train` does, as Python calls."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fmg.core.errors import CheckpointError, RewardError
from fmg.core.events import Notice, Observer, ignore
from fmg.data.run_folder import RunFolder, State
from fmg.data.run_lock import run_lock
from fmg.data.states import check_resumable, drop_states, newest_state, resume_command
from fmg.inference.devices import device_for, pick_dtype
from fmg.registry.recipe import Recipe
from fmg.registry.resolve import ResolvedRecipe
from fmg.training.card import write_cards
from fmg.training.compose import Composed, compose
from fmg.training.resume import SavedState, load_state
from fmg.training.sizes import choose_sizes
from fmg.training.trainer import Trainer, TrainResult


def train(recipe: Recipe | ResolvedRecipe, run: str | Path | None = None, observer: Observer = ignore) -> TrainResult:
    """Trains what `recipe` describes and writes a run folder.

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
    with run_lock(folder.path):
        return _run(composed, folder, observer, recipe_text=recipe.to_yaml())


def resume(run: str | Path, observer: Observer = ignore, *, allow_code: bool = False) -> TrainResult:
    """Goes on with an interrupted run from its newest state, to the weights and metrics that it would have had.

    Args:
        run: the run folder; its own recipe says what is done.
        observer: receives events (`fmg.core.events`).
        allow_code: whether the recipe of the run may name reward code and servers, as in `Recipe.from_yaml`.

    Returns:
        As `train`.

    Raises:
        UsageError: it is no run, is finished, has no state, is still being trained, or its recipe was changed.
        CheckpointError: its files are damaged, or weights are missing.
        GateError: when a safety check of the run fails.
    """
    folder = RunFolder(Path(run))
    check_resumable(folder.path)
    recipe = Recipe.from_yaml(folder.recipe, allow_code=allow_code)
    device = device_for(recipe.train.device, recipe.model.name, recipe.model.config.spec())
    with run_lock(folder.path):
        saved = load_state(folder, recipe)
        composed = compose(recipe, device, pick_dtype(recipe.train.dtype))
        folder.set_state("running")
        return _run(composed, folder, observer, saved=saved)


def _run(
    composed: Composed,
    folder: RunFolder,
    observer: Observer,
    *,
    recipe_text: str | None = None,
    saved: SavedState | None = None,
) -> TrainResult:
    """Trains in a folder, from `saved` on where there is one; the folder's state says in the end what happened."""
    recipe = composed.recipe
    state: State = "failed"
    try:
        if recipe_text is not None:
            folder.recipe.write_text(recipe_text, encoding="utf-8")
        sizes = choose_sizes(recipe, composed.model.device.type)
        result = Trainer(composed, folder, sizes, observer, saved).train()
        write_cards(folder, recipe)
        state = "interrupted" if result.interrupted else "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except RewardError:
        if newest_state(folder.path):
            observer(Notice("info", f"When the reward works again, go on with: {resume_command(folder.path)}"))
        raise
    except OSError as error:
        raise CheckpointError(
            f"Writing to '{folder.path}' failed: {error.strerror or error}", "Free some space, or choose another --run."
        ) from error
    finally:
        # on a full disk the state cannot be written either, and the first error is the one that matters
        with contextlib.suppress(OSError, CheckpointError):
            folder.set_state(state)
    if state == "finished":
        drop_states(folder.path)
    return result
