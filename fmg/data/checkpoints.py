"""The checkpoints of a run folder: which there are, which is best by the held-out score, which is the newest."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from fmg.core.errors import CheckpointError
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
        raw = json.loads(text)
        index = cls(tuple(Saved(**entry) for entry in raw["saved"]), raw["best"], raw["latest"])
        for name in (index.best, index.latest):
            index.entry(name)
        return index


def read_index(run: Path) -> CheckpointIndex | None:
    """The index of a run, or None before its first checkpoint.

    Raises:
        CheckpointError: when the file is damaged or names a folder that is gone.
    """
    path = run / FOLDER / INDEX
    if not path.is_file():
        return None
    try:
        index = CheckpointIndex.from_json(path.read_text(encoding="utf-8"))
        missing = [s.name for s in index.saved if not (run / FOLDER / s.name).is_dir()]
    except (ValueError, KeyError, TypeError, StopIteration) as error:
        raise CheckpointError(f"'{path}' is damaged ({error})", "Restore it from a copy, or train again.") from None
    if missing:
        raise CheckpointError(f"'{path}' names '{missing[0]}', which is gone", "Restore the folder, or train again.")
    return index


def write_index(run: Path, index: CheckpointIndex) -> None:
    """Replaces the index in one step, so that a crash leaves the old or the new one."""
    write_atomic(run / FOLDER / INDEX, index.to_json().encode())


def chosen_checkpoint(run: Path) -> Path | None:
    """The adapter folder that a run stands for: its best by held-out score."""
    index = read_index(run)
    return run / FOLDER / index.best if index else None
