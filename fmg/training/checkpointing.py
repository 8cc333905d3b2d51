"""The weights that a run writes to disk: checkpoints to use, and states to resume from.

`RUN/checkpoints/checkpoint-N[-ema]` contain adapters or fine-tuned weights. Of those with a score, the newest and the
best are kept.

`RUN/state/iteration-N/{state.json, state.safetensors, SHA256SUMS}` contains everything that a resumed run needs:
trained weights, optimizer, moving average, progress of the run and its gates, global random generators. Noise, prompts
and partitions need nothing, because they are keyed by (seed, iteration). Only the newest state is kept; a finished run
has none.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fmg.core import metric_keys as keys
from fmg.core.errors import CheckpointError, FmgWarning, UsageError, reason
from fmg.core.files import (
    SUMS,
    atomic_folder,
    inside,
    refuse_links_out,
    remove_leftovers,
    write_atomic,
    write_sums,
)
from fmg.core.protocols import Model, Shardable
from fmg.data.checkpoints import (
    FOLDER,
    UNCHECKED,
    CheckpointIndex,
    SavedCheckpoint,
    checked,
    existing_index,
    read_index,
    write_index,
)
from fmg.data.prompt_sets import prompts_digest
from fmg.data.resume_points import (
    check_prompts,
    check_resumable,
    drop_states,
    newest_state,
    repeat_command,
    resume_command,
    saved_states,
    state_folder,
)
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import read_numbers
from fmg.recipe import Recipe
from fmg.recipe.document import Plain
from fmg.trackers.following import identity_of
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.gates import replica_gate
from fmg.training.state_files import read_state, restore_generators, write_state
from fmg.training.update import Ema

EMA_SUFFIX = "-ema"
"""Suffix of the name of a checkpoint of the moving average of the weights."""
SCHEMA = 4

_NAME = re.compile(rf"checkpoint-\d+({EMA_SUFFIX})?")
# These change only rounding (and the masks of a dropout), and a run that ran out of memory must be resumable with
# smaller batches.
_BATCHES = ("rollout.batch_size", "train.micro_batch", "eval.batch_size")
_KEYS = frozenset(("schema", "run", "progress", "trained", "optimizer", "ema", "ema_updates", "generators", "tripwire"))


@dataclass(frozen=True)
class Progress:
    """The progress of a run at the end of an iteration.

    Attributes:
        iteration: iterations done.
        touched: the last of them that changed the weights.
        lines: lines of `metrics.jsonl`.
        sizes: samples of a rollout call and rows of an update call, for which the gate's findings are valid.
        gate_checked: rollouts that the replay gate has checked.
        gate_recompute: whether it decided to recompute old log-probs.
        moved: whether the movement gate has passed.
    """

    iteration: int
    touched: int
    lines: int
    sizes: tuple[int, int]
    gate_checked: int
    gate_recompute: bool
    moved: bool


@dataclass(frozen=True)
class TrainingState:
    """The live objects that a state is saved from and restored into."""

    trained: Sequence[tuple[str, Parameter]]
    optimizer: Optimizer
    ema: Ema | None
    device: torch.device
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Digests of the prompt sets by their path in the recipe."""
    old: Ema | None = None
    """The policy of the rollouts, where the objective asks for a moving average (`ObjectiveConfig.moving_old`)."""


@dataclass(frozen=True)
class ResumePoint:
    """Where a run can be resumed, apart from its weights: the end of an iteration, or of the evaluation after it."""

    progress: Progress
    generators: Mapping[str, Tensor]
    monitor: Mapping[str, Any]
    sampling: Mapping[str, Any]


@dataclass(frozen=True)
class SavedState:
    """A state on disk that fits its run."""

    progress: Progress
    content: Mapping[str, Any]
    folder: Path

    def check_newest(self, run: RunFolder, recipe: Recipe) -> None:
        """Checks that no other process has resumed the run since this state was read; from now on none can.

        Raises:
            UsageError: one has, for example because a cluster restarted a job too early.
        """
        check_resumable(run.path)
        if newest_state(run.path) != self.folder:
            raise UsageError(
                f"Another process resumed the run '{run.path}' while this one was starting",
                f"Resume it again: `{resume_command(run.path, recipe)}`.",
            )

    def check_trained(self, trained: Iterable[tuple[str, Parameter]]) -> None:
        """Checks that the state has the tensors that the run trains.

        Raises:
            CheckpointError: it has different ones.
        """
        wanted = {name: tuple(p.shape) for name, p in trained}
        if wanted != {name: tuple(x.shape) for name, x in self.content["trained"].items()}:
            raise CheckpointError(
                "The tensors of the saved state are not those that the run trains",
                "Restore the model that the run was started with.",
            )

    def restore(self, live: TrainingState) -> None:
        """Restores weights, optimizer, average and generators bit for bit.

        Raises:
            CheckpointError: as for `check_trained`.
        """
        self.check_trained(live.trained)
        trained: Mapping[str, Tensor] = self.content["trained"]
        with torch.no_grad():
            for name, parameter in live.trained:
                parameter.copy_(trained[name])
        live.optimizer.load_state_dict(self.content["optimizer"])
        if live.ema is not None:
            live.ema.restore(self.content["ema"], self.content["ema_updates"])
        if live.old is not None:
            live.old.restore(self.content["old"], self.content["old_updates"])
        restore_generators(self.content["generators"], live.device)


@dataclass
class CheckpointManager:
    """Saves the trained weights of a run, raw and averaged, and its state.

    Attributes:
        composed: the live parts of the run.
        run: where to save.
        live: what a state is saved from.
        dist: the processes of the run; all make every call, the main process writes.
    """

    composed: Composed
    run: RunFolder
    live: TrainingState
    dist: DistContext

    @classmethod
    def make(
        cls,
        composed: Composed,
        run: RunFolder,
        named: Sequence[tuple[str, Parameter]],
        optimizer: Optimizer,
        dist: DistContext,
    ) -> CheckpointManager:
        """The manager of a run that trains these parameters."""
        decay, moving_old = composed.recipe.train.ema_decay, composed.recipe.objective.config.moving_old
        ema, old = (None if d is None else Ema([p for _, p in named], d) for d in (decay, moving_old))
        prompts = {"prompts": composed.prompts, "eval.prompts": composed.eval_prompts}
        digests = {place: prompts_digest(found) for place, found in prompts.items()}
        return cls(composed, run, TrainingState(named, optimizer, ema, composed.model.device, digests, old), dist)

    def update_ema(self) -> None:
        """Moves the average after an optimizer step."""
        if self.live.ema is not None:
            self.live.ema.update()

    def ema_weights(self) -> AbstractContextManager[None]:
        """Runs its body with the moving average in place of the weights, if there is one."""
        return nullcontext() if self.live.ema is None else self.live.ema.in_place()

    def update_old(self) -> None:
        """Moves the policy of the rollouts after the updates of an iteration, if it is an average."""
        if self.live.old is not None:
            self.live.old.update()

    def old_weights(self) -> AbstractContextManager[None]:
        """Runs its body with the weights of the policy of the rollouts."""
        return nullcontext() if self.live.old is None else self.live.old.in_place()

    def checkpoint(self, iteration: int, metrics: Mapping[str, float], *, eligible: bool = True) -> CheckpointIndex:
        """Saves the weights and their average; `metrics` has their scores, or nothing when they have none.

        What the reward-hacking monitor finds about the weights (`eligible`) applies to their average as well.
        """
        replica_gate(self.dist, self.live.trained)
        index = self._save(iteration, keys.SCORE, metrics.get(keys.SCORE), ema=False, eligible=eligible)
        if self.live.ema is None or iteration == 0:
            return index
        with self.ema_weights():
            return self._save(iteration, keys.EMA_SCORE, metrics.get(keys.EMA_SCORE), ema=True, eligible=eligible)

    def _save(self, iteration: int, key: str, score: float | None, *, ema: bool, eligible: bool) -> CheckpointIndex:
        run, model = self.run.path, self.composed.model
        with model.gathered() if isinstance(model, Shardable) else nullcontext():
            text = self.dist.run_on_main(
                lambda: save_checkpoint(run, model, iteration, key, score, ema=ema, eligible=eligible).to_json()
            )
        return CheckpointIndex.from_json(text)

    def save_state(self, point: ResumePoint, *, now: bool = False) -> None:
        """Saves the state when it is due: at the start, then every `train.state_every` iterations.

        `now` saves it whenever the recipe asks for states at all.
        """
        train, done = self.composed.recipe.train, point.progress.iteration
        if train.state_every is None:
            return
        if now or (done % train.state_every == 0 and done != train.iterations):
            self.dist.run_on_main(lambda: str(save_state(self.run, self.composed.recipe, point, self.live)))

    def restore(self, saved: SavedState) -> tuple[CheckpointIndex, list[dict[str, float]]]:
        """Restores weights and files of a run to `saved`; returns its checkpoints and its metrics so far."""
        saved.restore(self.live)

        def files() -> str:
            index, lines = rewind(self.run, saved.progress.lines)
            return json.dumps([index.to_json(), lines])

        index, lines = json.loads(self.dist.run_on_main(files))
        return CheckpointIndex.from_json(index), lines


def save_checkpoint(
    run: Path,
    model: Model,
    iteration: int,
    score_key: str,
    score: float | None,
    *,
    ema: bool = False,
    eligible: bool = True,
) -> CheckpointIndex:
    """Saves the weights as they are in `model` as `checkpoints/checkpoint-<iteration>` and updates the index.

    The best checkpoint is the eligible one with the highest held-out score; among equals, the earlier one, and raw
    weights before their average. One without a score (the run was interrupted) is best only while nothing but the
    untouched base has one, and replaces none that has. A checkpoint that is neither best nor newest is removed once the
    index no longer names it.

    Args:
        run: the run folder.
        model: the weights to save; for an average they have taken their place.
        iteration: number of rollouts whose updates are in them.
        score_key: log key of the score.
        score: by which the best is chosen.
        ema: whether the weights are the moving average, saved beside the raw ones as `checkpoint-<iteration>-ema`.
        eligible: whether it may be the best one (`fmg.training.hacking_monitor`).
    """
    newest = f"checkpoint-{iteration}"
    name = newest + EMA_SUFFIX * ema
    before = read_index(run)
    known = before.saved if before else ()
    if not any(entry.name == name for entry in known):
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        # a killed process may have saved it without naming it in the index
        _remove(run, [name])
        model.save_adapter(run / FOLDER / name)
        known = (*known, SavedCheckpoint(name, iteration, score_key, score, eligible, write_sums(run / FOLDER / name)))
    best = _best(known)
    kept = tuple(entry for entry in known if score is None or entry.name == best or entry.iteration == iteration)
    index = write_index(run, CheckpointIndex(kept, best, newest))
    _remove(run, [entry.name for entry in known if entry not in kept])
    return index


def scored_index(run: Path) -> CheckpointIndex:
    """The checkpoints that a resumed run starts with, checked: without those that were saved in mid-iteration.

    Raises:
        CheckpointError: the run has no checkpoint index, or as for `read_index` and `checked`.
    """
    index = existing_index(run)
    kept = tuple(entry for entry in index.saved if entry.score is not None)
    if kept and kept != index.saved:
        newest = max(kept, key=lambda entry: entry.iteration)
        index = replace(index, saved=kept, best=_best(kept), latest=newest.name)
    return checked(run, index)


def drop_unscored(run: Path) -> CheckpointIndex:
    """Removes checkpoints that were saved in mid-iteration, and folders that a killed process left out of the index.

    A resumed run makes them again.

    Raises:
        CheckpointError: as for `scored_index`; nothing was removed.
    """
    index = scored_index(run)
    # the metrics are about to be cut
    index = write_index(run, index, covered=("recipe.yaml",))
    named = {entry.name for entry in index.saved}
    there = [path.name for path in (run / FOLDER).iterdir() if _NAME.fullmatch(path.name)]
    _remove(run, [name for name in there if name not in named])
    remove_leftovers(run / FOLDER)
    return index


def _remove(run: Path, names: Sequence[str]) -> None:
    for name in names:
        if (folder := inside(inside(run, FOLDER), name)).is_dir():
            shutil.rmtree(folder)


def _best(known: Sequence[SavedCheckpoint]) -> str:
    trained = [entry for entry in known if entry.iteration > 0]
    scored = [(e.score, -e.iteration, not _is_ema(e), e.name) for e in known if e.score is not None and e.eligible]
    if trained and (not scored or all(entry.score is None for entry in trained)):
        return max(trained, key=lambda entry: (entry.iteration, not _is_ema(entry))).name
    return max(scored)[3]


def _is_ema(entry: SavedCheckpoint) -> bool:
    return entry.name.endswith(EMA_SUFFIX)


def save_state(run: RunFolder, recipe: Recipe, point: ResumePoint, live: TrainingState) -> Path:
    """Writes the state of a run and removes the one before it; a crash leaves one or the other, never a partial one."""
    progress = point.progress
    folder = state_folder(run.path, progress.iteration)
    content = {
        "schema": SCHEMA,
        "run": {
            **_identity(run, recipe, by_content=True),
            "prompts": dict(live.prompts),
            "metrics": _digest_of_lines(run, progress.lines),
        },
        "progress": asdict(progress),
        "trained": dict(live.trained),
        "optimizer": live.optimizer.state_dict(),
        "ema": None if live.ema is None else list(live.ema.values),
        "ema_updates": 0 if live.ema is None else live.ema.updates,
        **({} if live.old is None else {"old": list(live.old.values), "old_updates": live.old.updates}),
        "generators": point.generators,
        "tripwire": point.monitor,
        "sampling": point.sampling,
        "tracker": None if (tracked := identity_of(run.path)) is None else asdict(tracked),
    }
    if not folder.exists():
        # else the run was interrupted right here and saved it: an evaluation changes no weights
        with atomic_folder(folder) as partial:
            write_state(partial, content)
    drop_states(run.path, keep=folder)
    return folder


def load_state(run: RunFolder, recipe: Recipe, *, accept_changed_prompts: bool = False) -> SavedState:
    """The newest state of a run, checked against the run. Changes nothing.

    Args:
        run: the run.
        recipe: its own.
        accept_changed_prompts: whether the prompts may differ from those that the run was started with.

    Raises:
        UsageError: there is none, it belongs to another run, or the recipe or its prompts have been changed since.
        CheckpointError: it is damaged, or the checkpoints or the metrics that it continues are, or a link in the run
            leads out of it.
    """
    check_resumable(run.path)
    refuse_links_out(run.path)
    folder = newest_state(run.path)
    assert folder is not None
    content = read_state(folder, _instead(run, recipe))
    try:
        if content["schema"] != SCHEMA:
            raise CheckpointError(
                f"The state in '{folder}' has schema {content['schema']}, which this version cannot read",
                "Use the version of fmg that made the run, or a newer one.",
            )
        wanted = _KEYS if recipe.objective.config.moving_old is None else _KEYS | {"old", "old_updates"}
        if missing := sorted(wanted - content.keys()):
            raise KeyError(missing[0])
        progress = Progress(**content["progress"])
        saved = content["run"]
        if "metrics" in saved and not (folder / SUMS).is_file():
            raise CheckpointError(f"The state in '{folder}' lacks its {SUMS}", _instead(run, recipe))
        here = _identity(run, recipe, by_content="prompts" in saved)
        if (saved["model"], saved["created"]) != (here["model"], here["created"]):
            raise UsageError(f"The state in '{folder}' belongs to another run", "Restore the run's own `state` folder.")
        if saved["recipe"] != here["recipe"]:
            raise UsageError(
                f"'{run.recipe}' is not the recipe that the run was started with, batch sizes aside",
                f"Restore it, or start a new run with `{repeat_command(run.recipe, recipe)}`.",
            )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"The state in '{folder}' is damaged ({reason(error)})", _instead(run, recipe)) from None
    if not accept_changed_prompts:
        check_prompts(run.path, recipe, saved.get("prompts", {}))
    index = scored_index(run.path)
    metrics_until(run, progress.lines)
    if saved.get("metrics") not in (None, _digest_of_lines(run, progress.lines)):
        raise CheckpointError(
            f"The first {progress.lines} lines of '{run.metrics}', from which the run resumes, have changed",
            f"Restore the file, or start a new run with `{repeat_command(run.recipe, recipe)}`.",
        )
    if not (folder / SUMS).is_file() or any(entry.digest is None for entry in index.saved):
        warnings.warn(f"The run '{run.path}' {UNCHECKED}", FmgWarning, stacklevel=2)
    return SavedState(progress, content, folder)


def rewind(run: RunFolder, lines: int) -> tuple[CheckpointIndex, list[dict[str, float]]]:
    """Restores a run's files to the point where its metrics had `lines` lines; returns its checkpoints and the lines.

    Raises:
        CheckpointError: the metrics or the index of checkpoints are damaged; nothing was changed.
    """
    kept = metrics_until(run, lines)
    index = drop_unscored(run.path)
    drop_states(run.path, keep=newest_state(run.path))
    for folder in (run.path, run.samples, *(saved.path(run.path) for saved in index.saved)):
        remove_leftovers(folder)
    write_atomic(run.metrics, b"".join(run.metrics.read_bytes().splitlines(keepends=True)[:lines]))
    return index, kept


def metrics_until(run: RunFolder, lines: int) -> list[dict[str, float]]:
    """The first `lines` lines of `metrics.jsonl`; null becomes NaN again.

    Raises:
        CheckpointError: there are fewer, or one is damaged.
    """
    kept = read_numbers(run.metrics)[:lines]
    if len(kept) < lines:
        raise CheckpointError(
            f"'{run.metrics}' has {len(kept)} lines, but the saved state follows line {lines}", "Restore the file."
        )
    return kept


def _instead(run: RunFolder, recipe: Recipe) -> str:
    """What to do when the newest state is damaged."""
    _, *older = reversed(saved_states(run.path))
    if older:
        return f"Remove that folder; `{resume_command(run.path, recipe)}` then resumes from {older[0].name}."
    return (
        f"Restore it from a copy, or start a new run with `{repeat_command(run.recipe, recipe)}`; the checkpoints that"
        " the run saved remain usable."
    )


def _digest_of_lines(run: RunFolder, lines: int) -> str:
    data = run.metrics.read_bytes() if run.metrics.is_file() else b""
    return hashlib.sha256(b"".join(data.splitlines(keepends=True)[:lines])).hexdigest()


def _identity(run: RunFolder, recipe: Recipe, *, by_content: bool) -> dict[str, str]:
    """Identifies the run that a state belongs to.

    Of the recipe, only what the run's own file states counts, so that a version with more options resumes what an older
    one started; the content of prompt files counts, not where they are.
    """
    state, plain = run.state(), recipe.with_(dict.fromkeys(_BATCHES)).plain()
    for ref in (plain["prompts"], cast(dict[str, Plain], plain["eval"])["prompts"]):
        if isinstance(ref, dict) and ref["name"] == "file":
            if by_content:
                del ref["path"]
            elif (path := Path(str(ref["path"]))).is_relative_to(run.path):
                # as it was written
                ref["path"] = path.relative_to(run.path).as_posix()
            del ref["sha256"]
    # what follows a run does not change it
    del plain["trackers"]
    text = json.dumps(_stated(plain, dict(run.values()) or plain), sort_keys=True)
    return {"model": state.model, "created": state.created, "recipe": hashlib.sha256(text.encode()).hexdigest()}


def _stated(value: Plain, stated: Plain) -> Plain:
    """The value without the keys that `stated` does not have."""
    if isinstance(value, dict) and isinstance(stated, Mapping):
        return {key: _stated(child, stated[key]) for key, child in value.items() if key in stated}
    if isinstance(value, list) and isinstance(stated, list) and len(value) == len(stated):
        return [_stated(*both) for both in zip(value, stated, strict=True)]
    return value
