"""Room on the disk, looked at before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from fmg.core.errors import UsageError

SLACK = 64 * 10**6
"""Bytes for graphs, tokenizers and what the file system itself takes."""


def check_space(
    folder: Path,
    needed: int,
    what: str = "The export",
    fix: str = "Free some space, or name a folder on another disk.",
) -> None:
    """Whether the disk of a folder, which need not exist yet, has room for `needed` bytes.

    Args:
        folder: where the files go.
        needed: their size.
        what: takes the room, for people.
        fix: what to do about it.

    Raises:
        UsageError: it has not.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + SLACK:
        raise UsageError(
            f"{what} takes about {(needed + SLACK) / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free",
            fix,
        )
