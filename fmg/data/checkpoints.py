"""The checkpoints of a run folder: which there are, which is best by the held-out score, which is the newest."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fmg.core.errors import CheckpointError, FmgWarning
from fmg.core.json_reader import parse_object
from fmg.data.run_folder import write_atomic

FOLDER = "checkpoints"
INDEX = "index.json"


@dataclass(frozen=True)
class Saved:
    """One saved adapter.

    Attributes:
        name: its folder.
        iteration: iterations that are in it.
        score_key: log key of `score`.
        score: the score on held-out prompts that it was judged by; None when it was never evaluated.
        sound: False where the tripwire found that a held-out reward or the diversity was lost for the trained reward.
    """

    name: str
    iteration: int
    score_key: str
    score: float | None
    sound: bool = True


@dataclass(frozen=True)
class CheckpointIndex:
    """`checkpoints/index.json`. `best` and `latest` name entries of `saved`."""

    saved: tuple[Saved, ...]
    best: str
    latest: str

    def entry(self, name: str) -> Saved:
        """The entry called `name`."""
        return next(s for s in self.saved if s.name == name)

    def to_json(self) -> str:
        """The text of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CheckpointIndex:
        """The index that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, StopIteration: for another text.
        """
        raw: Any = parse_object(text)
        index = cls(tuple(Saved(**entry) for entry in raw["saved"]), raw["best"], raw["latest"])
        for name in (index.best, index.latest):
            index.entry(name)
        return index


def read_index(run: Path) -> CheckpointIndex | None:
    """The index of a run, or None before its first checkpoint.

    The run stands for its best checkpoint, which has to be there. Of the others those that are gone are left out, with
    a warning.

    Raises:
        CheckpointError: when the file is damaged or the best checkpoint is gone.
    """
    path = run / FOLDER / INDEX
    if not path.is_file():
        return None
    try:
        index = CheckpointIndex.from_json(path.read_text(encoding="utf-8"))
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise CheckpointError(f"'{path}' is damaged ({error})", "Restore it from a copy, or train again.") from None
    there = tuple(saved for saved in index.saved if (run / FOLDER / saved.name).is_dir())
    if index.entry(index.best) not in there:
        raise CheckpointError(f"'{path}' names '{index.best}', which is gone", "Restore the folder, or train again.")
    gone = [saved.name for saved in index.saved if saved not in there]
    if not gone:
        return index
    warnings.warn(f"'{run}' is without {', '.join(gone)}, which '{path}' names", FmgWarning, stacklevel=2)
    latest = index.latest if index.latest not in gone else max(there, key=lambda saved: saved.iteration).name
    return replace(index, saved=there, latest=latest)


def existing_index(run: Path) -> CheckpointIndex:
    """The index of a run that has saved something.

    Raises:
        CheckpointError: there is none, or as for `read_index`.
    """
    index = read_index(run)
    if index is None:
        raise CheckpointError(f"'{run}' has no index of checkpoints", "Restore it, or train again.")
    return index


def write_index(run: Path, index: CheckpointIndex) -> None:
    """Replaces the index in one step, so that a crash leaves the old or the new one."""
    write_atomic(run / FOLDER / INDEX, index.to_json().encode())


def chosen_checkpoint(run: Path) -> Path | None:
    """The adapter folder that a run stands for: its best by held-out score."""
    index = read_index(run)
    return run / FOLDER / index.best if index else None
