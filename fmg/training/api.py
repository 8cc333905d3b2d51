"""`train` and `resume`: what `fmg train` does, as Python calls."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

import torch

from fmg.core import metric_keys as keys
from fmg.core.errors import (
    CheckpointError,
    ProcessError,
    StorageError,
    python_call,
    said_once,
    system_refusal,
)
from fmg.core.events import Event, Notice, Observer, StageProgress
from fmg.core.files import refuse_links_out, remove_leftovers, write_atomic
from fmg.core.machine import write_environment
from fmg.core.prompt import tell_of_cuts
from fmg.core.signals import Signals
from fmg.core.stdout_redirect import torch_as_new
from fmg.data.checkpoints import existing_index
from fmg.data.prompt_sets import file_values, untied
from fmg.data.resume_points import check_resumable, drop_states, ended_short, newest_state, resume_command
from fmg.data.run_folder import RunFolder, State
from fmg.data.run_metrics import read_numbers
from fmg.data.run_report import write_run_report
from fmg.inference.torch_backend import device_for, pick_dtype
from fmg.progress import watching
from fmg.recipe import Recipe, ResolvedRecipe, recipe_of
from fmg.rewards.functions import Functions, Rewards, split_functions
from fmg.trackers.following import followed
from fmg.training.card import write_cards
from fmg.training.checkpointing import SavedState, load_state
from fmg.training.compose import Composed, compose, finite_attention, shard_base
from fmg.training.distributed import DistContext, dist_context
from fmg.training.launch import check_shares, choose_engine, choose_sizes, device_of, read_launch
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
    """Trains as `recipe` describes and writes a run folder.

    If a launcher started several processes, each makes this call; together they train what one would, and the main
    process writes (docs/distributed.md).

    Args:
        recipe: a `Recipe`; the name of a model or of a shipped recipe; the path of a YAML file; a mapping of sections;
            None is the default recipe of the embedded two-time model.
        run: where to write; None makes a new folder under `runs/`. A finished or foreign folder is never overwritten.
        observer: receives events (`fmg.core.events`); in all but the main process only those of level `error`.
        rewards: replacing the recipe's: names, functions `fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`, or a
            mapping of either to their weights. The run records the names of functions; `resume` needs them again.
        progress: whether to show progress on stderr; None shows it in a terminal or a notebook, unless there is an
            observer.
        allow_code: whether a recipe file may name reward code to run, and servers to send images to.
        values: recipe values by dotted path or by the names of `fmg train`'s flags: `iterations=2`, `lr=1e-3`,
            `**{"lora.rank": 4}`.

    Returns:
        The run folder, the first and last evaluation, and the best checkpoint by held-out score.

    Raises:
        WrongTypeError: an argument has the wrong type.
        UsageError: parts do not fit, the device is not available, or the folder is taken.
        CheckpointError: weights are missing or damaged.
        GateError: a safety check of the run fails; what was saved before stays.
        ProcessError: another process of the run dies or cannot be reached.
    """
    if rewards is not None:
        values["rewards"] = rewards
    values, functions = split_functions(values)
    resolved = recipe_of(recipe, values, allow_code=allow_code)
    ties = file_values(resolved.recipe)
    resolved = resolved.with_(ties, "of the run") if ties else resolved
    # a recipe given as an object has no sources to state in its file
    written = resolved.recipe if isinstance(recipe, Recipe) and not values else resolved
    new = _NewRun(resolved.recipe, written.to_yaml(), None if run is None else Path(run))
    with watching(observer, progress) as told:
        return _run(new, functions, told)


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
    """Resumes an interrupted run from its newest state, with the same weights and metrics as without the interruption.

    A run that was killed after its last iteration, before its report was written, gets its report.

    Several processes resume as they started: each makes this call and reads the state.

    Args:
        run: the run folder; its own recipe is used.
        observer: receives events (`fmg.core.events`).
        rewards: the functions that the run was started with, under their names; its other rewards are in its recipe.
        progress: as in `train`.
        allow_code: whether the recipe of the run may name reward code and servers, as in `Recipe.from_yaml`.
        accept_changed_prompts: whether to use prompts that have changed since the run was started.

    Returns:
        As `train`.

    Raises:
        UsageError: it is not a run, has finished, has no state, is still being trained, or its recipe was changed.
        CheckpointError: its files are damaged, or weights are missing.
        GateError: a safety check of the run fails.
        ProcessError: another process of the run dies or cannot be reached.
    """
    folder = RunFolder(Path(run))
    if ended_short(folder.path):
        return _complete(folder, is_main_process=read_launch().is_main_process)
    check_resumable(folder.path)
    recipe = Recipe.of_run(folder.recipe, allow_code=allow_code)
    _, functions = split_functions({"rewards": rewards or ()})
    saved = load_state(folder, recipe, accept_changed_prompts=accept_changed_prompts)
    if accept_changed_prompts:
        recipe = recipe.with_(file_values(untied(recipe)))
    resumed = _ResumedRun(recipe, folder, saved, rewrites_recipe=accept_changed_prompts)
    with watching(observer, progress) as told:
        return _run(resumed, functions, told)


@dataclass(frozen=True)
class _NewRun:
    """A run to start: its folder is created once everything has loaded."""

    recipe: Recipe
    text: str
    name: Path | None
    saved: None = None

    def check(self) -> None:
        RunFolder.check_free(self.name)

    def open(self) -> RunFolder:
        folder = RunFolder.create(self.name, self.recipe.model.name)
        try:
            write_atomic(folder.recipe, self.text.encode())
            write_environment(folder.path)
        except BaseException:
            # the run has no content yet, and a folder that exists could not be used again
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return folder

    def locked(self) -> None:
        """Nothing to check: the folder is not known to anyone else yet."""


@dataclass(frozen=True)
class _ResumedRun:
    """A run to resume from a saved state."""

    recipe: Recipe
    folder: RunFolder
    saved: SavedState
    rewrites_recipe: bool

    def check(self) -> None:
        check_resumable(self.folder.path)

    def open(self) -> RunFolder:
        return self.folder

    def locked(self) -> None:
        """Checks again, now that no other process can resume the run."""
        self.saved.check_newest(self.folder, self.recipe)
        if self.rewrites_recipe:
            write_atomic(self.folder.recipe, self.recipe.to_yaml().encode())


@dataclass
class _RunStatus:
    """Records once how a run ended, whichever part notices first."""

    folder: RunFolder | None = None

    def close(self, state: State) -> None:
        folder, self.folder = self.folder, None
        # on a full disk the state cannot be written either, and the first error is the one that matters
        with contextlib.suppress(OSError, CheckpointError):
            if folder is not None and folder.state().state == "running":
                folder.set_state(state)


@torch_as_new()
def _run(run: _NewRun | _ResumedRun, functions: Functions, observer: Observer) -> TrainResult:
    """Connects the processes, loads the parts, opens the folder, trains, and finishes the folder."""
    launch, recipe = read_launch(), run.recipe
    with said_once(launch.is_main_process):
        engine = choose_engine(recipe)
        check_shares(recipe, launch.world_size, engine)
    # processes may see different devices, so each reports its own error
    name = device_of(recipe, launch, torch.cuda.device_count())
    device = device_for(name, recipe.model.name, recipe.model.config.spec())
    dtype = pick_dtype(recipe.train.dtype)
    observer = observer if launch.is_main_process else _errors_only(observer)
    signals, status = Signals(), _RunStatus()
    try:
        with (
            signals.caught(),
            finite_attention(),
            dist_context(launch, device, observer, on_abort=lambda: status.close("failed"), signals=signals) as dist,
        ):
            dist.run_on_main(run.check)
            observer(StageProgress("loading", 0, 0, recipe.model.name))
            composed = dist.main_process_first(lambda: compose(recipe, device, dtype, functions, dist.run_on_all))
            if dist.is_main_process:
                texts = [prompt.text for prompts in (composed.prompts, composed.eval_prompts) for prompt in prompts]
                tell_of_cuts(composed.model, texts, observer)
            if (saved := run.saved) is not None:
                dist.run_on_all(lambda: saved.check_trained(composed.model.trainable()))
            if dist.is_distributed and engine == "fsdp2":
                shard_base(composed)
            trackers = recipe.trackers if dist.is_main_process else ()
            tracked = None if saved is None else saved.content.get("tracker")
            with _opened(run, dist, status) as folder, followed(folder.path, trackers, tracked, observer) as told:
                sizes = choose_sizes(recipe, device.type, launch.world_size)
                result = Trainer(composed, folder, sizes, told, dist, saved).train()
                with signals.held():
                    _finish(composed, folder, result, dist, status)
                    # everything is done, whatever a signal asked for meanwhile
                    signals.asked = 0
    except ProcessError:
        # a survivor records how the run ended: the main process may be the one that died
        status.close("failed")
        raise
    return result


@contextlib.contextmanager
def _opened(run: _NewRun | _ResumedRun, dist: DistContext, status: _RunStatus) -> Iterator[RunFolder]:
    """The run folder, locked by the main process and left in the state in which the body ends."""
    with contextlib.ExitStack() as stack:

        def claim() -> str:
            claimed = run.open()
            stack.enter_context(claimed.lock())
            run.locked()
            claimed.set_state("running")
            return str(claimed.path)

        status.folder = folder = RunFolder(Path(dist.run_on_main(claim)))
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
                fix = f"Free some space, then resume with: {resume_command(folder.path, run.recipe)}"
            raise StorageError(f"Writing to '{folder.path}' failed: {reason}", fix, reason) from error
        finally:
            if dist.is_main_process:
                status.close(state)


def _finish(composed: Composed, folder: RunFolder, result: TrainResult, dist: DistContext, status: _RunStatus) -> None:
    """Writes model cards and report; if a kill interrupts this, `fmg train --resume` repeats it."""
    dist.run_on_main(lambda: write_cards(folder, composed.recipe, composed.prompts, composed.eval_prompts))
    if dist.is_main_process:
        status.close("interrupted" if result.interrupted else "finished")
    dist.run_on_main(lambda: _report(folder))


def _report(folder: RunFolder) -> None:
    write_run_report(folder)
    if folder.state().state == "finished":
        drop_states(folder.path)


def _complete(folder: RunFolder, *, is_main_process: bool) -> TrainResult:
    """Completes the last steps of a run that was killed right before them; returns the result of the run."""
    index = existing_index(folder.path)
    evaluations = [line for line in read_numbers(folder.metrics) if keys.SCORE in line]
    if is_main_process:
        with folder.lock():
            refuse_links_out(folder.path)
            remove_leftovers(folder.path)
            remove_leftovers(folder.checkpoints)
            _report(folder)
    return TrainResult.of(folder, int(evaluations[-1]["iteration"]), evaluations, index.entry(index.best))


def _errors_only(observer: Observer) -> Observer:
    def hear(event: Event) -> None:
        if isinstance(event, Notice) and event.level == "error":
            observer(event)

    return hear
