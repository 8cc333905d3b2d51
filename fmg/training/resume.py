"""The full state of a run, from which it goes on as if it had never stopped.

RUN/state/iteration-N/{state.json, state.safetensors, SHA256SUMS}: the trained weights, the optimizer, the moving
average, how far the run and its gates are, and the global random generators. Noise, prompts and
partitions need nothing, because they are keyed by (seed, iteration). The newest state is the only one that stays, and a
finished run has none.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.files import SUMS, atomic_folder, refuse_links_out, remove_leftovers, write_atomic
from fmg.data.checkpoints import UNCHECKED, CheckpointIndex
from fmg.data.metrics_log import read_numbers
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
from fmg.registry.document import Plain
from fmg.registry.recipe import Recipe
from fmg.training.checkpoint import drop_unscored, scored_index
from fmg.training.ema import Ema
from fmg.training.state_files import read_state, restore_generators, write_state

SCHEMA = 4
# How much is computed at once changes rounding (and the masks of a dropout), and what ran out of memory has to go on.
_BATCHES = ("rollout.batch_size", "train.micro_batch", "eval.batch_size")
_KEYS = frozenset(("schema", "run", "progress", "trained", "optimizer", "ema", "ema_updates", "generators", "tripwire"))


@dataclass(frozen=True)
class Progress:
    """How far a run is, at the end of an iteration.

    Attributes:
        iteration: iterations done.
        touched: the last of them that changed the weights.
        lines: lines of `metrics.jsonl`.
        sizes: samples a rollout call and rows an update call, to which the gate's findings belong.
        gate_checked: rollouts that the replay gate has looked at.
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
class Live:
    """What a state is taken from and put back into."""

    trained: Sequence[tuple[str, Parameter]]
    optimizer: Optimizer
    ema: Ema | None
    device: torch.device
    prompts: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Digests of the prompt sets by their path in the recipe."""


@dataclass(frozen=True)
class SavedState:
    """A state on disk that fits its run."""

    progress: Progress
    content: Mapping[str, Any]
    folder: Path

    def check_newest(self, run: RunFolder, recipe: Recipe) -> None:
        """Whether the run still is where this state was read, now that no other process can go on with it.

        Raises:
            UsageError: another process went on with it since, as one that a cluster restarts too early does.
        """
        check_resumable(run.path)
        if newest_state(run.path) != self.folder:
            raise UsageError(
                f"Another process went on with the run '{run.path}' while this one was starting",
                f"Resume it again: `{resume_command(run.path, recipe)}`.",
            )

    def check_trained(self, trained: Iterable[tuple[str, Parameter]]) -> None:
        """Whether the state is of what the run trains.

        Raises:
            CheckpointError: it holds other tensors.
        """
        wanted = {name: tuple(p.shape) for name, p in trained}
        if wanted != {name: tuple(x.shape) for name, x in self.content["trained"].items()}:
            raise CheckpointError(
                "The saved state is of other tensors than the run trains",
                "Restore the model that the run was begun with.",
            )

    def restore(self, live: Live) -> None:
        """Puts weights, optimizer, average and generators back where they were, bit for bit.

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
        restore_generators(self.content["generators"], live.device)


@dataclass(frozen=True)
class RestingPoint:
    """Where a run can be resumed, apart from its weights: taken at the end of an iteration and after an evaluation."""

    progress: Progress
    generators: Mapping[str, Tensor]
    tripwire: Mapping[str, Any]
    sampling: Mapping[str, Any]


def save_state(run: RunFolder, recipe: Recipe, point: RestingPoint, live: Live) -> Path:
    """Writes the state of a run and removes the one before it; a crash leaves one or the other, never a part."""
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
        "generators": point.generators,
        "tripwire": point.tripwire,
        "sampling": point.sampling,
    }
    if not folder.exists():
        # else it was saved when the run was interrupted right here: an evaluation changes no weights
        with atomic_folder(folder) as partial:
            write_state(partial, content)
    drop_states(run.path, keep=folder)
    return folder


def load_state(run: RunFolder, recipe: Recipe, *, accept_changed_prompts: bool = False) -> SavedState:
    """The newest state of a run, when the run can go on from it: nothing is changed in finding out.

    Args:
        run: the run.
        recipe: its own.
        accept_changed_prompts: whether the prompts may be others than those that the run was begun with.

    Raises:
        UsageError: there is none, it belongs to another run, or the recipe or its prompts have been changed since.
        CheckpointError: it is damaged, or the checkpoints or the metrics that it goes on from are, or a link in the
            run leads out of it.
    """
    check_resumable(run.path)
    refuse_links_out(run.path)
    folder = newest_state(run.path)
    assert folder is not None
    content = read_state(folder, _instead(run, recipe))
    try:
        if content["schema"] != SCHEMA:
            raise CheckpointError(
                f"The state in '{folder}' has schema {content['schema']}, which this version does not know",
                "Use the version of fmg that made the run, or a newer one.",
            )
        if missing := sorted(_KEYS - content.keys()):
            raise KeyError(missing[0])
        progress = Progress(**content["progress"])
        saved = content["run"]
        if "metrics" in saved and not (folder / SUMS).is_file():
            raise CheckpointError(f"The state in '{folder}' lacks its {SUMS}", _instead(run, recipe))
        here = _identity(run, recipe, by_content="prompts" in saved)
        if (saved["model"], saved["created"]) != (here["model"], here["created"]):
            raise UsageError(f"The state in '{folder}' belongs to another run", "Restore the run's own folder `state`.")
        if saved["recipe"] != here["recipe"]:
            raise UsageError(
                f"'{run.recipe}' is not the recipe that the run was begun with, batch sizes aside",
                f"Restore it, or start a new run with `{repeat_command(run.recipe, recipe)}`.",
            )
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"The state in '{folder}' is damaged ({error})", "Train again.") from None
    if not accept_changed_prompts:
        check_prompts(run.path, recipe, saved.get("prompts", {}))
    index = scored_index(run.path)
    metrics_until(run, progress.lines)
    if saved.get("metrics") not in (None, _digest_of_lines(run, progress.lines)):
        raise CheckpointError(
            f"'{run.metrics}' was changed in its first {progress.lines} lines, which the run resumes from",
            f"Restore the file, or start a new run with `{repeat_command(run.recipe, recipe)}`.",
        )
    if not (folder / SUMS).is_file() or any(entry.digest is None for entry in index.saved):
        warnings.warn(f"The run '{run.path}' {UNCHECKED}", FmgWarning, stacklevel=2)
    return SavedState(progress, content, folder)


def _instead(run: RunFolder, recipe: Recipe) -> str:
    """What to do where the newest state is damaged."""
    _, *older = reversed(saved_states(run.path))
    if older:
        return f"Remove that folder; `{resume_command(run.path, recipe)}` then resumes from {older[0].name}."
    return (
        f"Restore it from a copy, or start a new run with `{repeat_command(run.recipe, recipe)}`; the checkpoints that"
        " the run saved can be used."
    )


def _digest_of_lines(run: RunFolder, lines: int) -> str:
    data = run.metrics.read_bytes() if run.metrics.is_file() else b""
    return hashlib.sha256(b"".join(data.splitlines(keepends=True)[:lines])).hexdigest()


def metrics_until(run: RunFolder, lines: int) -> list[dict[str, float]]:
    """The first `lines` lines of `metrics.jsonl`; null becomes NaN again.

    Raises:
        CheckpointError: there are fewer, or one is damaged.
    """
    kept = read_numbers(run.metrics)[:lines]
    if len(kept) < lines:
        raise CheckpointError(
            f"'{run.metrics}' has {len(kept)} lines, and the saved state follows line {lines}", "Restore the file."
        )
    return kept


def rewind(run: RunFolder, lines: int) -> tuple[CheckpointIndex, list[dict[str, float]]]:
    """Puts the files of a run back to where its metrics have `lines` lines; returns its checkpoints and these lines.

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


def _identity(run: RunFolder, recipe: Recipe, *, by_content: bool) -> dict[str, str]:
    """What a state belongs to. Of the recipe it counts what the run's own file states, so that a version with more
    options resumes what an older one began; where prompt files are does not count where their content does."""
    state, plain = run.state(), recipe.with_(dict.fromkeys(_BATCHES)).plain()
    for ref in (plain["prompts"], cast(dict[str, Plain], plain["eval"])["prompts"]):
        if isinstance(ref, dict) and ref["name"] == "file":
            if by_content:
                del ref["path"]
            elif (path := Path(str(ref["path"]))).is_relative_to(run.path):
                # as it was written
                ref["path"] = path.relative_to(run.path).as_posix()
            del ref["sha256"]
    text = json.dumps(_stated(plain, dict(run.values()) or plain), sort_keys=True)
    return {"model": state.model, "created": state.created, "recipe": hashlib.sha256(text.encode()).hexdigest()}


def _stated(value: Plain, stated: Plain) -> Plain:
    """The value without the keys that `stated` does not have."""
    if isinstance(value, dict) and isinstance(stated, Mapping):
        return {key: _stated(child, stated[key]) for key, child in value.items() if key in stated}
    if isinstance(value, list) and isinstance(stated, list) and len(value) == len(stated):
        return [_stated(*both) for both in zip(value, stated, strict=True)]
    return value
