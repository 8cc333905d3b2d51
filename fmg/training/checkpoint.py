"""Saving what is trained during a run: the newest and the best by held-out score stay, the others are removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from fmg.core.errors import CheckpointError
from fmg.core.protocols import Model
from fmg.data.checkpoints import FOLDER, CheckpointIndex, Saved, read_index, write_index

EMA_SUFFIX = "-ema"
"""End of the name of a checkpoint that holds the moving average of the weights."""


def save_checkpoint(
    run: Path,
    model: Model,
    iteration: int,
    score_key: str,
    score: float | None,
    *,
    ema: bool = False,
    sound: bool = True,
) -> CheckpointIndex:
    """Saves the weights as they are in `model` as `checkpoints/checkpoint-<iteration>` and updates the index.

    The best checkpoint is the sound one with the highest held-out score; of equal ones the earlier, and the raw weights
    before their average. One that was never evaluated (`score` None: the run was interrupted) is best only while
    nothing but the untouched base has been, and replaces none that was. A checkpoint that is neither best nor newest is
    removed after the index no longer names it.

    Args:
        run: the run folder.
        model: the weights to save; for an average they have taken their place.
        iteration: updates of how many rollouts are in them.
        score_key: log key of the score.
        score: by which the best is chosen.
        ema: whether the weights are the moving average, saved beside the raw ones as `checkpoint-<iteration>-ema`.
        sound: whether it may be the best one (`fmg.training.tripwire`).
    """
    newest = f"checkpoint-{iteration}"
    name = newest + EMA_SUFFIX * ema
    before = read_index(run)
    known = before.saved if before else ()
    if not any(entry.name == name for entry in known):
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        model.save_adapter(run / FOLDER / name)
        known = (*known, Saved(name, iteration, score_key, score, sound))
    best = _best(known)
    kept = tuple(entry for entry in known if score is None or entry.name == best or entry.iteration == iteration)
    index = CheckpointIndex(kept, best, newest)
    write_index(run, index)
    _remove(run, [entry for entry in known if entry not in kept])
    return index


def drop_unscored(run: Path) -> CheckpointIndex:
    """Removes what an interrupted run saved in the middle of an iteration; a resumed run makes it again, whole.

    Raises:
        CheckpointError: the run has no index of checkpoints.
    """
    index = read_index(run)
    if index is None:
        raise CheckpointError(f"'{run}' has no index of checkpoints", "Restore it, or train again.")
    kept = tuple(entry for entry in index.saved if entry.score is not None)
    if kept and kept != index.saved:
        newest = max(entry.iteration for entry in kept)
        write_index(run, replace(index, saved=kept, best=_best(kept), latest=f"checkpoint-{newest}"))
        _remove(run, [entry for entry in index.saved if entry not in kept])
    return read_index(run) or index


def _remove(run: Path, entries: Sequence[Saved]) -> None:
    for entry in entries:
        shutil.rmtree(run / FOLDER / entry.name)


def _best(known: Sequence[Saved]) -> str:
    trained = [entry for entry in known if entry.iteration > 0]
    if trained and all(entry.score is None for entry in trained):
        return max(trained, key=lambda entry: (entry.iteration, not _is_ema(entry))).name
    scored = [(e.score, -e.iteration, not _is_ema(e), e.name) for e in known if e.score is not None and e.sound]
    return max(scored)[3]


def _is_ema(entry: Saved) -> bool:
    return entry.name.endswith(EMA_SUFFIX)
