"""Hidden files and folders that are filled before they take their place, and what a killed process left of them.

Standard library only.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fmg.core.errors import UsageError, writing

PARTIAL = "partial"
"""Ending of a folder that is being filled."""
OLD = "old"
"""Ending of a folder that is being replaced."""
DRAFT = "tmp"
"""Ending of a file that is being written."""
_LEFT = re.compile(rf"\..+\.(?:(\d+)\.[0-9a-f]{{8}}\.{PARTIAL}|(\d+)\.{DRAFT})")

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


def remove_leftovers(folder: Path) -> None:
    """Removes what killed processes left directly in `folder` of files and folders that were to take another name."""
    try:
        found = [(path, _LEFT.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    except OSError:
        return
    for path, match in found:
        if match and not _alive(int(match[1] or match[2]), path.stem):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder under another name that takes its own when the body has finished, and is removed when it fails.

    Raises:
        UsageError: there is a file or folder of that name.
        StorageError: the system refused.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already", "Save to another folder, or move that one away.")
    folder = folder.resolve()
    with writing(folder):
        partial = partial_folder(folder)
        try:
            yield partial
            partial.rename(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file in one step: after a crash it holds the old or the new contents, never a part.

    Raises:
        StorageError: the system refused; the old contents stay.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.{DRAFT}")
    _MADE.add(draft.stem)
    with writing(path):
        try:
            with draft.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
            _MADE.discard(draft.stem)


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
