"""`train` and `resume`: what `fmg train` does, as Python calls."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from os import PathLike
from pathlib import Path

import torch

from fmg.core import metric_keys as keys
from fmg.core.backends import tell_of_cuts
from fmg.core.errors import (
    CheckpointError,
    CompositionError,
    ProcessError,
    StorageError,
    python_call,
    said_once,
    system_refusal,
)
from fmg.core.events import Event, Notice, Observer, StageProgress
from fmg.core.files import refuse_links_out, remove_leftovers, write_atomic
from fmg.core.machine import write_environment
from fmg.core.protocols import Shardable
from fmg.core.signals import Signals
from fmg.core.stdout_redirect import torch_as_new
from fmg.data.checkpoints import existing_index
from fmg.data.metrics_log import read_numbers
from fmg.data.prompt_sets import file_values, untied
from fmg.data.resume_points import check_resumable, drop_states, ended_short, newest_state, resume_command
from fmg.data.run_folder import RunFolder, State
from fmg.data.run_report import write_run_report
from fmg.inference.devices import device_for, pick_dtype
from fmg.progress import watching
from fmg.registry.recipe import Recipe
from fmg.registry.resolve import ResolvedRecipe, recipe_of
from fmg.rewards.functions import Functions, Rewards, split_functions
from fmg.training.attention import finite_attention
from fmg.training.card import write_cards
from fmg.training.compose import Composed, compose
from fmg.training.distributed import DistContext, dist_context
from fmg.training.launch import check_shares, choose_engine, choose_sizes, device_of, read_launch
from fmg.training.resume import SavedState, load_state
from fmg.training.trainer import Trainer, TrainResult


@python_call
def train(
    recipe: str | PathLike[str] | Mapping[str, object] | Recipe | ResolvedRecipe | None = None,
    run: str | PathLike[str] | None = None,
    observer: Observer | None = None,
    *,
    rewards: Rewards | None = None,
    progress: bool | None = None,
    allow_code: bool = False,
    **values: object,
) -> TrainResult:
    """Trains what `recipe` describes and writes a run folder.

    Where a launcher started several processes, each makes this call; together they train what one would, and the first
    writes (docs/distributed.md).

    Args:
        recipe: a `Recipe`; the name of a model or of a shipped recipe; the path of a YAML file; a mapping of sections;
            None is the default recipe of the embedded two-time model.
        run: where to write; None makes a new folder under `runs/`. A finished or foreign folder is never overwritten.
        observer: receives events (`fmg.core.events`); in other processes than the first only those of level `error`.
        rewards: in place of the recipe's: names, functions `fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`, or a
            mapping of either to their weights. The run records the names of functions; `resume` needs them again.
        progress: whether progress is shown on stderr; None shows it in a terminal or a notebook, unless there is an
            observer.
        allow_code: whether a recipe file may name reward code to run, and servers to send images to.
        values: of the recipe, by dotted path or as the flags of `fmg train` are called: `iterations=2`, `lr=1e-3`,
            `**{"lora.rank": 4}`.

    Returns:
        The run folder, the first and last evaluation, and the best checkpoint by held-out score.

    Raises:
        WrongTypeError: an argument has a wrong type.
        UsageError: for parts that do not fit, a device that is not there, or a folder that is taken.
        CheckpointError: when weights are missing or damaged.
        GateError: when a safety check of the run fails; what was saved before stays.
        ProcessError: when another process of the run ends or cannot be reached.
    """
    if rewards is not None:
        values["rewards"] = rewards
    values, functions = split_functions(values)
    resolved = recipe_of(recipe, values, allow_code=allow_code)
    ties = file_values(resolved.recipe)
    resolved = resolved.with_(ties, "of the run") if ties else resolved
    plain = resolved.recipe
    # a recipe as it was given has no sources to tell
    written = plain if isinstance(recipe, Recipe) and not values else resolved
    folder_name = None if run is None else Path(run)

    def begin() -> RunFolder:
        folder = RunFolder.create(folder_name, plain.model.name)
        try:
            write_atomic(folder.recipe, written.to_yaml().encode())
            write_environment(folder.path)
        except BaseException:
            # it holds nothing yet, and a taken folder could not be named again
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return folder

    with watching(observer, progress) as told:
        return _train(plain, functions, told, lambda: RunFolder.check_free(folder_name), begin)


@python_call
def resume(
    run: str | PathLike[str],
    observer: Observer | None = None,
    *,
    rewards: Rewards | None = None,
    progress: bool | None = None,
    allow_code: bool = False,
    accept_changed_prompts: bool = False,
) -> TrainResult:
    """Goes on with an interrupted run from its newest state, to the weights and metrics that it would have had.

    A run that finished and was killed before its report was written gets it.

    Several processes go on as several began; each reads the state.

    Args:
        run: the run folder; its own recipe says what is done.
        observer: receives events (`fmg.core.events`).
        rewards: the functions that the run was begun with, under their names; its other rewards are in its recipe.
        progress: as in `train`.
        allow_code: whether the recipe of the run may name reward code and servers, as in `Recipe.from_yaml`.
        accept_changed_prompts: whether prompts that were changed since the run was begun are trained and evaluated on.

    Returns:
        As `train`.

    Raises:
        UsageError: it is no run, is finished, has no state, is still being trained, or its recipe was changed.
        CheckpointError: its files are damaged, or weights are missing.
        GateError: when a safety check of the run fails.
        ProcessError: when another process of the run ends or cannot be reached.
    """
    folder = RunFolder(Path(run))
    if ended_short(folder.path):
        return _completed(folder, first=read_launch().is_main_process)
    check_resumable(folder.path)
    recipe = Recipe.of_run(folder.recipe, allow_code=allow_code)
    _, functions = split_functions({"rewards": rewards or ()})
    saved = load_state(folder, recipe, accept_changed_prompts=accept_changed_prompts)
    if accept_changed_prompts:
        recipe = recipe.with_(file_values(untied(recipe)))

    def opened() -> None:
        saved.check_newest(folder, recipe)
        if accept_changed_prompts:
            write_atomic(folder.recipe, recipe.to_yaml().encode())

    with watching(observer, progress) as told:
        return _train(recipe, functions, told, lambda: check_resumable(folder.path), lambda: folder, saved, opened)


@torch_as_new()
def _train(
    recipe: Recipe,
    functions: Functions,
    observer: Observer,
    check: Callable[[], None],
    begin: Callable[[], RunFolder],
    saved: SavedState | None = None,
    opened: Callable[[], None] = lambda: None,
) -> TrainResult:
    """Trains in the folder that `begin` gives, from `saved` on where there is one.

    `check` comes before anything, `opened` when no other process can train in the folder.
    """
    launch = read_launch()
    with said_once(launch.is_main_process):
        engine = choose_engine(recipe)
        check_shares(recipe, launch.world_size, engine)
    # other machines and processes may see other devices, so each speaks for itself
    named = device_of(recipe, launch, torch.cuda.device_count())
    device = device_for(named, recipe.model.name, recipe.model.config.spec())
    dtype = pick_dtype(recipe.train.dtype)
    heard = observer if launch.is_main_process else _errors_only(observer)
    open_run: list[RunFolder] = []
    signals = Signals()
    try:
        with (
            signals.caught(),
            finite_attention(),
            dist_context(launch, device, heard, on_abort=lambda: _close(open_run, "failed"), signals=signals) as dist,
        ):
            dist.run_on_main(check)
            heard(StageProgress("loading", 0, 0, recipe.model.name))
            composed = dist.main_process_first(lambda: compose(recipe, device, dtype, functions))
            if launch.is_main_process:
                texts = [prompt.text for prompts in (composed.prompts, composed.eval_prompts) for prompt in prompts]
                tell_of_cuts(composed.model, texts, heard)
            if saved is not None:
                # before the folder is said to be running
                fits = saved.check_trained
                dist.run_on_all(lambda: fits(composed.model.trainable()))
            if dist.is_distributed and engine == "fsdp2":
                _shard(composed)
            with _run_folder(dist, begin, opened, recipe, open_run) as folder:
                sizes = choose_sizes(recipe, device.type, launch.world_size)
                result = Trainer(composed, folder, sizes, heard, dist, saved).train()
                with signals.held():
                    dist.run_on_main(lambda: write_cards(folder, recipe, composed.prompts, composed.eval_prompts))
                    if dist.is_main_process:
                        _close(open_run, "interrupted" if result.interrupted else "finished")
                    dist.run_on_main(lambda: _leave(folder))
                    # the last thing to do is done, whatever was asked meanwhile
                    signals.asked = 0
    except ProcessError:
        # whoever is left says how the run ended: the first process may be the one that is gone
        _close(open_run, "failed")
        raise
    return result


@contextlib.contextmanager
def _run_folder(
    dist: DistContext,
    begin: Callable[[], RunFolder],
    opened: Callable[[], None],
    recipe: Recipe,
    open_run: list[RunFolder],
) -> Iterator[RunFolder]:
    """The run folder, which all processes name alike and the first holds and leaves in the state it ended in."""
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            claimed = begin()
            stack.enter_context(claimed.lock())
            opened()
            claimed.set_state("running")
            return str(claimed.path)

        folder = RunFolder(Path(dist.run_on_main(claim)))
        yield from _held(dist, folder, recipe, open_run)


def _held(dist: DistContext, folder: RunFolder, recipe: Recipe, open_run: list[RunFolder]) -> Iterator[RunFolder]:
    open_run.append(folder)
    state: State = "failed"
    try:
        yield folder
        state = "finished"
    except KeyboardInterrupt:
        state = "interrupted"
        raise
    except Exception as error:
        reason = system_refusal(error) or (str(error) if isinstance(error, OSError) else None)
        if reason is None:
            raise
        fix = "Free some space, or choose another --run."
        if newest_state(folder.path) is not None:
            fix = f"Free some space, then resume with: {resume_command(folder.path, recipe)}"
        raise StorageError(f"Writing to '{folder.path}' failed: {reason}", fix, reason) from error
    finally:
        if dist.is_main_process:
            _close(open_run, state)


def _leave(folder: RunFolder) -> None:
    """The last steps of a run that has ended; `--resume` makes up for them where they were cut short."""
    write_run_report(folder)
    if folder.state().state == "finished":
        drop_states(folder.path)


def _completed(folder: RunFolder, *, first: bool) -> TrainResult:
    """Takes the last steps of a run that finished and was killed before them; what they would have returned."""
    index = existing_index(folder.path)
    evaluations = [line for line in read_numbers(folder.metrics) if keys.SCORE in line]
    if first:
        with folder.lock():
            refuse_links_out(folder.path)
            remove_leftovers(folder.path)
            remove_leftovers(folder.checkpoints)
            _leave(folder)
    return TrainResult.of(folder, int(evaluations[-1]["iteration"]), evaluations, index.entry(index.best))


def _close(open_run: list[RunFolder], state: State) -> None:
    """Sets the state that a run ended in, once."""
    while open_run:
        run = open_run.pop()
        # on a full disk the state cannot be written either, and the first error is the one that matters
        with contextlib.suppress(OSError, CheckpointError):
            if run.state().state == "running":
                run.set_state(state)


def _shard(composed: Composed) -> None:
    if not isinstance(composed.model, Shardable):
        raise CompositionError(
            f"The model '{composed.recipe.model.name}' cannot be spread over several processes", "Use ddp."
        )
    composed.model.shard()


def _errors_only(observer: Observer) -> Observer:
    def hear(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "error":
            observer(event)

    return hear
