"""The cache on this computer: where it is, content hashes that are computed once, files that appear whole or not."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_CHUNK = 1 << 20


def cache_dir() -> Path:
    """Where converted weights and embeddings are kept: `$FMG_CACHE`, else `~/.cache/fmg`."""
    return Path(os.environ.get("FMG_CACHE") or "~/.cache/fmg").expanduser()


def content_hash(path: Path) -> str:
    """Sha256 of a file. It is computed once for a file that does not change (path, size and time of change)."""
    stat = path.stat()
    key = hashlib.sha256(f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}".encode()).hexdigest()
    note = cache_dir() / "hashes" / key
    if note.is_file():
        return note.read_text(encoding="ascii")
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_CHUNK):
            digest.update(block)
    with replacing_file(note) as partial:
        partial.write_text(digest.hexdigest(), encoding="ascii")
    return digest.hexdigest()


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file to write beside `path`, which takes its place when the body ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill beside `path`, which becomes `path` when the body ends without an error.

    Where another process was faster, its folder stays: both were made from the same content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=path.parent, suffix=".partial"))
    try:
        yield partial
        if not path.is_dir():
            partial.rename(path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
