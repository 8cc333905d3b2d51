"""Saving adapters during a run: the newest one and the best one by held-out score stay, the others are removed."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from fmg.core.protocols import Model
from fmg.data.checkpoints import FOLDER, CheckpointIndex, Saved, read_index, write_index


def save_checkpoint(run: Path, model: Model, iteration: int, score_key: str, score: float | None) -> CheckpointIndex:
    """Saves the adapter of `model` as `checkpoints/checkpoint-<iteration>` and brings the index up to date.

    The best checkpoint has the highest held-out score; of equal ones the earlier. One that was never evaluated (`score`
    None: the run was interrupted) is best only while nothing but the untouched base has been. A checkpoint that is
    neither best nor newest is removed after the index no longer names it.
    """
    name = f"checkpoint-{iteration}"
    before = read_index(run)
    known = before.saved if before else ()
    if not any(entry.name == name for entry in known):
        (run / FOLDER).mkdir(parents=True, exist_ok=True)
        model.save_adapter(run / FOLDER / name)
        known = (*known, Saved(name, iteration, score_key, score))
    best = _best(known)
    kept = tuple(entry for entry in known if entry.name in (best, name))
    index = CheckpointIndex(kept, best, name)
    write_index(run, index)
    for entry in known:
        if entry not in kept:
            shutil.rmtree(run / FOLDER / entry.name)
    return index


def _best(known: Sequence[Saved]) -> str:
    trained = [entry for entry in known if entry.iteration > 0]
    if trained and all(entry.score is None for entry in trained):
        return trained[-1].name
    scored = [(entry.score, -entry.iteration, entry.name) for entry in known if entry.score is not None]
    return max(scored)[2]
