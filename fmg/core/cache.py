"""The cache on this computer: where it is, file digests and converted files kept there; and a cache in memory.

Nothing there is trusted by its name alone: a hash is remembered for one state of one file, and what was converted once
is compared with its own digests. A cache that cannot be written costs time, but the work continues.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import tempfile
import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Generic, TypeVar

from fmg.core.errors import CheckpointError, FmgWarning, StorageError, UsageError, writing
from fmg.core.files import atomic_file, digest, from_home, inside, partial_folder
from fmg.core.json_io import JsonError, read_object

Row = TypeVar("Row", bound=Mapping[str, Any])

DIGESTS = "sha256.json"
"""The file of a folder from `made_once` that lists the others, with the sha256 of each."""

# The coarsest clock of a file system in use (FAT) ticks every two seconds: a file may change twice within a tick and
# look the same, so that only the hash of an older one is remembered.
_TICK_NS = 2 * 10**9
_SHA256 = re.compile(r"[0-9a-f]{64}")


def cache_dir() -> Path:
    """Where converted weights and embeddings are kept: `$FMG_CACHE`, else `~/.cache/fmg`.

    A user without a home folder, as in containers, gets a private folder among the temporary files, with a warning.

    Raises:
        UsageError: that folder is open to others.
    """
    if named := os.environ.get("FMG_CACHE"):
        return from_home(named)
    folder = from_home("~/.cache/fmg")
    return folder if folder.is_absolute() else _without_home()


@cache
def _without_home() -> Path:
    folder = Path(tempfile.gettempdir()) / f"fmg-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    facts = folder.lstat()
    if facts.st_uid != os.getuid() or not stat.S_ISDIR(facts.st_mode) or facts.st_mode & 0o077:
        raise UsageError(
            f"There is no home folder, and '{folder}' is open to others",
            "Set FMG_CACHE to a folder that only you can write to.",
        )
    warnings.warn(f"There is no home folder: the cache is '{folder}'. Set HOME or FMG_CACHE", FmgWarning, stacklevel=3)
    return folder


def content_hash(path: Path) -> str:
    """Sha256 of a file, 64 hexadecimal digits, computed once while the file stays unchanged.

    A file counts as unchanged while its device, inode, size, change time and modification time are the same. A program
    that changes a file can reset its modification time, but not its change time.

    Raises:
        OSError: the file cannot be read.
    """
    began, state = time.time_ns(), _state(path)
    note = cache_dir() / "hashes" / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    known = _remembered(note, state)
    if known is not None:
        return known
    found = digest(path)
    if path.stat().st_ctime_ns + _TICK_NS < began and _state(path) == state:
        with optional_cache(), atomic_file(note) as partial:
            partial.write_text(f"{state} {found}", encoding="ascii")
    return found


def made_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder of files in the cache, made if it is missing or damaged.

    Args:
        folder: where it is kept.
        make: fills an empty folder, always with the same content for the same `folder`.

    Returns:
        `folder`, whose files all have the content that `make` gave them.

    Raises:
        StorageError: the cache cannot be written; see `required_cache` and `optional_cache`.
    """
    if _is_whole(folder):
        return folder
    with writing(folder), partial_folder(folder) as partial:
        make(partial)
        names = sorted(file.name for file in partial.iterdir())
        digests = {name: digest(partial / name) for name in names}
        (partial / DIGESTS).write_text(json.dumps(digests, indent=2), encoding="utf-8")
        folder.mkdir(exist_ok=True)
        # one file at a time over what is there: another process that reads it finds every file at any moment
        for name in (*names, DIGESTS):
            (partial / name).replace(folder / name)
    return folder


@contextmanager
def optional_cache(folder: Path | None = None) -> Iterator[None]:
    """For a body that only writes to the cache: a failure becomes a warning, and the work continues.

    Args:
        folder: the cache, if it is not `cache_dir()`.
    """
    place = folder or cache_dir()
    try:
        with writing(place):
            yield
    except StorageError as error:
        advice = "Name a writable folder; FMG_CACHE sets fmg's own."
        what = f"The cache {place} cannot be written ({error.strerror}), so nothing is kept there"
        warnings.warn(f"{what}. {advice}", FmgWarning, stacklevel=1)


@contextmanager
def required_cache() -> Iterator[None]:
    """For a body that writes to the cache something the work needs.

    Raises:
        StorageError: it cannot be written.
    """
    try:
        with writing(cache_dir()):
            yield
    except StorageError as error:
        what = f"The cache {cache_dir()} cannot be written ({error.strerror})"
        fix = "Free some space there, or set FMG_CACHE to a writable folder."
        raise StorageError(what, fix, str(error.strerror)) from error


def _state(path: Path) -> str:
    stat = path.stat()
    return f"{stat.st_dev} {stat.st_ino} {stat.st_size} {stat.st_ctime_ns} {stat.st_mtime_ns}"


def _remembered(note: Path, state: str) -> str | None:
    """The recorded hash for this state of the file."""
    try:
        known, _, found = note.read_text(encoding="ascii").rpartition(" ")
    except (OSError, ValueError):
        return None
    return found if known == state and _SHA256.fullmatch(found) else None


def _is_whole(folder: Path) -> bool:
    """Whether a folder of `made_once` has all its files unchanged."""
    try:
        digests = read_object(folder / DIGESTS).items()
        return all(content_hash(inside(folder, name)) == found for name, found in digests)
    except (OSError, JsonError, CheckpointError):
        return False


class ByteCache(Generic[Row]):
    """Least-recently-used store of rows: mappings of numpy arrays or torch tensors, which have `nbytes`.

    Args:
        capacity: bytes that the arrays of all rows may take together.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, name: str) -> Row | None:
        """The row called `name`, which becomes the most recently used one."""
        if name in self._rows:
            self._rows.move_to_end(name)
        return self._rows.get(name)

    def put(self, name: str, row: Row) -> None:
        """Keeps a new row and drops the least recently used ones until everything fits."""
        self._rows[name] = row
        self._size += _size(row)
        while self._size > self._capacity:
            _, dropped = self._rows.popitem(last=False)
            self._size -= _size(dropped)

    def clear(self) -> None:
        """Forgets every row."""
        self._rows.clear()
        self._size = 0


def _size(row: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in row.values())
