"""Names that are read from a file and must stay within its folder, and digests of what is read back.

Standard library only.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PureWindowsPath

from fmg.core.errors import CheckpointError


def inside(folder: Path, name: str, *, named_in: Path | None = None) -> Path:
    """The path `folder / name` for a name that was read from a file, which may have been written by a stranger.

    Args:
        folder: what the path has to stay within; need not exist.
        name: a relative path such as `checkpoint-3` or `transformer/model.onnx`; need not exist.
        named_in: the file that the name was read from, for the error.

    Returns:
        `folder / name`, not resolved.

    Raises:
        CheckpointError: the name is not a text or empty, is absolute on any system, has a `..`, holds what no file
            name can (NUL, a lone surrogate), or leads out of the folder through a link.
    """
    if isinstance(name, str):
        # reads / and \ alike, and drives, so that a name is judged alike on every system
        parts = PureWindowsPath(name)
        if parts.parts and not parts.anchor and ".." not in parts.parts:
            path = folder / name
            try:
                # before Python 3.13 a loop of links is a RuntimeError; what no file name can hold is a ValueError
                if path.resolve().is_relative_to(folder.resolve()):
                    return path
            except (OSError, RuntimeError, ValueError):
                pass
    where = f"'{named_in}' names" if named_in else "There is"
    raise CheckpointError(
        f"{where} {str(name)[:200]!r}, which is no path within '{folder}'",
        "Use an unchanged copy; nothing was read or written there.",
    )


def from_home(text: str | Path) -> Path:
    """A path in which `~` and `~name` are replaced; where nobody knows that home, it stays as it is."""
    # unlike `Path.expanduser`, which raises a RuntimeError then
    return Path(os.path.expanduser(text))  # noqa: PTH111


def digest(path: Path) -> str:
    """Sha256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
