"""Hidden folders that are filled before they take their place, and what a killed process left of them.

Standard library only.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from pathlib import Path

PARTIAL = "partial"
"""Ending of a folder that is being filled."""
OLD = "old"
"""Ending of a folder that is being replaced."""

# A container starts every process with the same id, so that the id alone would take a leftover for one of our own
_MADE: set[str] = set()


def partial_folder(folder: Path) -> Path:
    """Makes a hidden folder beside `folder`, `.NAME.PID.RANDOM.partial`; those of dead processes are removed."""
    for left in leftovers(folder, PARTIAL):
        shutil.rmtree(left, ignore_errors=True)
    partial = folder.parent / f".{folder.name}.{os.getpid()}.{secrets.token_hex(4)}.{PARTIAL}"
    _MADE.add(partial.stem)
    partial.mkdir(parents=True)
    return partial


def leftovers(folder: Path, kind: str) -> list[Path]:
    """Folders that processes of this computer which are gone left beside `folder`, sorted.

    Args:
        folder: what they were to become, or to make room for; need not exist.
        kind: `PARTIAL` or `OLD`.
    """
    named = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.[0-9a-f]+\.{kind}")
    try:
        beside = sorted(folder.parent.iterdir())
    except OSError:
        # not there, or not to be listed
        return []
    found = [(path, named.fullmatch(path.name)) for path in beside]
    return [path for path, match in found if match and not _alive(int(match[1]), path.stem)]


def _alive(pid: int, stem: str) -> bool:
    """Whether the process still runs that made a folder; where nobody can tell, it does."""
    if pid == os.getpid():
        return stem in _MADE
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # somebody else's
        return True
    return True
