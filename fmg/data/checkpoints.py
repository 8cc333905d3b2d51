"""The index of a run's checkpoints: which exist, which is best by the held-out score, which is the newest.

`SHA256SUMS` of a checkpoint has the digests of its files, and the index has the digest of that file and its own. So a
file of a run that has changed since it was written is never used unnoticed.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from fmg.core.errors import CheckpointError, FmgWarning
from fmg.core.files import check_sums, inside, write_atomic
from fmg.core.json_io import parse_object, sealed, unsealed

FOLDER = "checkpoints"
INDEX = "index.json"
FIX = "Restore it from a copy, or train again."
UNCHECKED = "was made by a version of fmg without digests, so damaged files would go unnoticed"
_COVERED = ("recipe.yaml", "metrics.jsonl")
# fields that the file has under an older name
_NAMES = {"eligible": "sound"}


@dataclass(frozen=True)
class SavedCheckpoint:
    """One saved checkpoint.

    Attributes:
        name: its folder.
        iteration: after how many iterations it was saved.
        score_key: log key of `score`.
        score: its score on held-out prompts; None when it was never evaluated.
        eligible: whether it may be the best one. False where the reward-hacking monitor found that a held-out reward or
            the diversity was lost for the trained reward. The file calls it `sound`.
        digest: digest of its `SHA256SUMS`; None in runs of older versions.
    """

    name: str
    iteration: int
    score_key: str
    score: float | None
    eligible: bool = True
    # two saves of equal tensors may order the metadata of their files differently
    digest: str | None = field(default=None, compare=False)

    def path(self, run: Path) -> Path:
        """Its folder.

        Raises:
            CheckpointError: its name leads out of the run.
        """
        return inside(inside(run, FOLDER), self.name, named_in=run / FOLDER / INDEX)

    def check(self, run: Path) -> bool:
        """Checks its files; False when there are no digests, as in runs of older versions.

        Raises:
            CheckpointError: naming a file that is missing or damaged.
        """
        return check_sums(self.path(run), self.digest, FIX)


@dataclass(frozen=True)
class CheckpointIndex:
    """`checkpoints/index.json`. `best` and `latest` name entries of `saved`.

    Attributes:
        saved: the checkpoints that were kept.
        best: the one that is used when the run is named.
        latest: the newest.
        files: size in bytes and digest of the recipe and the metrics when the index was written.
    """

    saved: tuple[SavedCheckpoint, ...]
    best: str
    latest: str
    files: Mapping[str, tuple[int, str]] = field(default_factory=lambda: MappingProxyType({}), compare=False)

    def entry(self, name: str) -> SavedCheckpoint:
        return next(s for s in self.saved if s.name == name)

    def to_json(self) -> str:
        saved = [{_NAMES.get(key, key): value for key, value in asdict(entry).items()} for entry in self.saved]
        content = {"saved": saved, "best": self.best, "latest": self.latest}
        return json.dumps(sealed({**content, "files": {k: list(v) for k, v in self.files.items()}}), indent=2) + "\n"

    @classmethod
    def from_json(cls, text: str) -> CheckpointIndex:
        """The index that `to_json` wrote.

        Raises:
            ValueError, KeyError, TypeError, StopIteration, AttributeError: for any other text.
        """
        raw: dict[str, Any] = unsealed(parse_object(text))
        files = {name: (int(size), str(digest)) for name, (size, digest) in raw.get("files", {}).items()}
        names = {written: name for name, written in _NAMES.items()}
        saved = (
            SavedCheckpoint(**{names.get(key, key): value for key, value in entry.items()}) for entry in raw["saved"]
        )
        index = cls(tuple(saved), raw["best"], raw["latest"], files)
        for name in (index.best, index.latest):
            index.entry(name)
        return index

    def changed_files(self, run: Path) -> list[str]:
        """The files among recipe and metrics that have changed since the index was written, other than by growing."""
        stated = [(name, *self.files[name]) for name in _COVERED if name in self.files]
        return [name for name, size, digest in stated if _beginning(run / name, size) != (size, digest)]


def read_index(run: Path) -> CheckpointIndex | None:
    """The index of a run, or None before its first checkpoint.

    The best checkpoint has to exist. Others that are missing are left out, with a warning.

    Raises:
        CheckpointError: the file is damaged, names something outside the run, or the best checkpoint is missing.
    """
    path = run / FOLDER / INDEX
    if not path.is_file():
        return None
    try:
        index = CheckpointIndex.from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration) as error:
        raise CheckpointError(f"'{path}' is damaged ({error!s:.200})", FIX) from None
    there = tuple(saved for saved in index.saved if saved.path(run).is_dir())
    if index.entry(index.best) not in there:
        raise CheckpointError(
            f"'{path}' names '{index.best}', which no longer exists", "Restore the folder, or train again."
        )
    gone = [saved.name for saved in index.saved if saved not in there]
    if not gone:
        return index
    warnings.warn(f"'{run}' lacks {', '.join(gone)}, which '{path}' names", FmgWarning, stacklevel=2)
    return _without(index, gone)


def checked(run: Path, index: CheckpointIndex) -> CheckpointIndex:
    """Checks all files of an index; damaged checkpoints other than the best are left out, with a warning.

    Raises:
        CheckpointError: a file of the best checkpoint is missing or damaged.
    """
    damaged: list[str] = []
    for saved in index.saved:
        try:
            saved.check(run)
        except CheckpointError as error:
            if saved.name == index.best:
                raise
            damaged.append(saved.name)
            warnings.warn(f"{error.what}; {saved.name} is skipped", FmgWarning, stacklevel=2)
    return _without(index, damaged) if damaged else index


def _without(index: CheckpointIndex, names: list[str]) -> CheckpointIndex:
    left = tuple(saved for saved in index.saved if saved.name not in names)
    latest = index.latest if index.latest not in names else max(left, key=lambda saved: saved.iteration).name
    return replace(index, saved=left, latest=latest)


def existing_index(run: Path) -> CheckpointIndex:
    """The index of a run that has saved a checkpoint.

    Raises:
        CheckpointError: there is none, or as for `read_index`.
    """
    index = read_index(run)
    if index is None:
        raise CheckpointError(f"'{run}' has no checkpoint index", "Restore it, or train again.")
    return index


def write_index(run: Path, index: CheckpointIndex, covered: tuple[str, ...] = _COVERED) -> CheckpointIndex:
    """Replaces the index in one step, so that a crash leaves the old or the new one.

    Args:
        run: the run folder.
        index: what to write.
        covered: files whose current digests it records.

    Returns:
        The index as it was written.
    """
    files = {name: _beginning(run / name, None) for name in covered}
    index = replace(index, files={name: found for name, found in files.items() if found is not None})
    write_atomic(run / FOLDER / INDEX, index.to_json().encode())
    return index


def _beginning(path: Path, size: int | None) -> tuple[int, str] | None:
    """Length and digest of the first `size` bytes of a file, or of all; None when it is missing."""
    try:
        data = path.read_bytes()[:size]
    except OSError:
        return None
    return len(data), hashlib.sha256(data).hexdigest()


def chosen_checkpoint(run: Path) -> Path | None:
    """The best checkpoint of a run by held-out score; None before the first."""
    index = read_index(run)
    return index.entry(index.best).path(run) if index else None
