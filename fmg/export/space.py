"""Room on the disk, looked at before anything is written."""

from __future__ import annotations

import shutil
from pathlib import Path

from fmg.core.errors import UsageError

SLACK = 64 * 10**6
"""Bytes for graphs, tokenizers and what the file system itself takes."""


def check_space(folder: Path, needed: int) -> None:
    """Whether the disk of a folder, which need not exist yet, has room for `needed` bytes.

    Raises:
        UsageError: it has not.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + SLACK:
        raise UsageError(
            f"The export takes about {(needed + SLACK) / 1e9:.1f} GB, and {there} has {free / 1e9:.1f} GB free",
            "Free some space, or name a folder on another disk.",
        )
