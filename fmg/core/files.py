"""Names that are read from a file and must stay within its folder, and digests of what is read back.

Standard library only.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from fmg.core.errors import CheckpointError, UsageError

SUMS = "SHA256SUMS"
"""The digests of a folder's files, as `sha256sum -c` reads them."""
_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
_SEAL = "sha256"


def inside(folder: Path, name: str, *, named_in: Path | None = None, links: bool = False) -> Path:
    """The path `folder / name` for a name that was read from a file, which may have been written by a stranger.

    Args:
        folder: what the path has to stay within; need not exist.
        name: a relative path such as `checkpoint-3` or `transformer/model.onnx`; need not exist.
        named_in: the file that the name was read from, for the error.
        links: whether links may lead out of the folder, as those of a hub cache do. Only for what is read alone, never
            for what is written or removed.

    Returns:
        `folder / name`, not resolved.

    Raises:
        CheckpointError: the name is not a text or empty, is absolute on any system, has a `..`, holds what no file
            name can (NUL, a lone surrogate), or leads out of the folder through a link
            where `links` is false.
    """
    if isinstance(name, str):
        # reads / and \ alike, and drives, so that a name is judged alike on every system
        parts = PureWindowsPath(name)
        if parts.parts and not parts.anchor and ".." not in parts.parts:
            path = folder / name
            try:
                # before Python 3.13 a loop of links is a RuntimeError; what no file name can hold is a ValueError
                if os.fsencode(path) and (links or path.resolve().is_relative_to(folder.resolve())):
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


def check_place(path: Path, option: str) -> None:
    """Whether a file or folder can be made at `path`, found out before the work whose result goes there.

    Args:
        path: what is to be made; the folders above it need not exist.
        option: names the place, for the error, such as `--out`.

    Raises:
        UsageError: a file is in the way, or the system refuses.
    """
    if (reason := refusal_of(path)) is not None:
        raise UsageError(f"{option} {path} cannot be written: {reason}", "Name another place.")


def refusal_of(path: Path) -> str | None:
    """Why no file or folder can be made at `path`, or in it where it is a folder; None when one can.

    Permissions do not tell (root may write everywhere, but not to a read-only disk), so a folder is made where the
    first new one would be, and removed again.
    """
    try:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            # a name that is too long, or a loop of links
            path.stat()
        there = next((place for place in (path, *path.parents) if place.exists()), Path())
        if there != path and not there.is_dir():
            return f"'{there}' is a file"
        with tempfile.TemporaryDirectory(dir=there if there.is_dir() else there.parent, prefix=".fmg-"):
            return None
    except ValueError as error:
        return f"it is no path ({error})"
    except OSError as error:
        return error.strerror or str(error)


def digest(path: Path) -> str:
    """Sha256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_links_out(folder: Path) -> None:
    """Makes sure that what is written below `folder` stays there, whatever its links are.

    Raises:
        CheckpointError: naming the first link that leads out.
    """
    for place, folders, files in os.walk(folder):
        for path in sorted(Path(place, name) for name in (*folders, *files)):
            if path.is_symlink():
                try:
                    inside(folder, str(path.relative_to(folder)))
                except CheckpointError:
                    raise CheckpointError(
                        f"'{path}' is a link that leads out of '{folder}'",
                        "Replace it by what it leads to; nothing was written.",
                    ) from None


def write_sums(folder: Path) -> str:
    """Writes the digests of all files below `folder` to its `SHA256SUMS`; returns the digest of that file."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{digest(folder / name)}  {name}\n" for name in names if name != SUMS)
    (folder / SUMS).write_text(text, encoding="utf-8")
    return digest(folder / SUMS)


def check_sums(
    folder: Path,
    expected: str | None,
    fix: str,
    names: Collection[str] = (),
    *,
    only: Collection[str] | None = None,
) -> bool:
    """Checks the files of a folder against its `SHA256SUMS`. Files that it does not name are not looked at.

    Args:
        folder: of which `write_sums` wrote the digests.
        expected: what `write_sums` returned; None where nobody kept it.
        fix: what to do about a damaged file, for the error.
        names: files that it has to name.
        only: the files to check, of those that it names; None: all.

    Returns:
        False when there is nothing to check against, as in folders of older versions.

    Raises:
        CheckpointError: naming the first file that is missing or damaged.
    """
    file = folder / SUMS
    if not file.exists() and expected is None:
        return False
    named = {file: expected} if expected is not None else {}
    try:
        # judged before it is parsed
        lines = _sums(file, names) if expected is None or digest(file) == expected else {}
        named |= {
            inside(folder, name, named_in=file, links=True): stated
            for name, stated in lines.items()
            if only is None or name in only
        }
        for path, stated in named.items():
            if not path.is_file():
                raise CheckpointError(f"'{path}' is missing", fix)
            if digest(path) != stated:
                raise CheckpointError(f"'{path}' is damaged: its digest is not the one it was saved with", fix)
    except FileNotFoundError:
        raise CheckpointError(f"'{file}' is missing", fix) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{folder}' cannot be checked ({error})", fix) from None
    return True


def _sums(file: Path, names: Collection[str]) -> dict[str, str]:
    found = [_SUM.fullmatch(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = {match[2]: match[1] for match in found if match}
    if len(lines) < len(found) or not lines.keys() >= set(names):
        raise ValueError(f"{file.name} is damaged")
    return lines


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest in it, so that a reader notices damage; `unsealed` takes it out again."""
    return {**content, _SEAL: _object_digest(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object that was sealed. One without a seal, as older versions wrote it, is taken as it is.

    Raises:
        ValueError: it was changed after it was sealed.
    """
    plain = {key: value for key, value in content.items() if key != _SEAL}
    if _SEAL in content and content[_SEAL] != _object_digest(plain):
        raise ValueError("it was changed after it was written")
    return plain


def _object_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
