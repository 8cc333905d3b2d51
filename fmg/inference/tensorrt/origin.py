"""Which engines were built on this computer.

A plan is as good as a program: TensorRT deserialises it without a check, and no hash in the manifest covers it, because
engines are added to an artifact later and two builds differ. So the sha256 of every plan that is built here is noted
outside the artifact, in fmg's cache, where nobody who sends an artifact can write.
"""

from __future__ import annotations

import re
from pathlib import Path

from fmg.core.cache import cache_dir

_SHA256 = re.compile(r"[0-9a-f]{64}")


def note_built(digest: str) -> None:
    """Notes that the plan with this sha256 was built here.

    Raises:
        OSError: the cache cannot be written.
    """
    note = _folder() / digest
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def built_here(digest: str) -> bool:
    """Whether the plan with this sha256 was built here, as far as the cache remembers."""
    # a digest comes from a record that anyone may have written, and becomes a path
    return _SHA256.fullmatch(digest) is not None and (_folder() / digest).is_file()


def _folder() -> Path:
    return cache_dir() / "tensorrt" / "built"
