"""Files and folders: checked paths, atomic writes and their leftovers, a lock, digests."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PureWindowsPath

from fmg.core.errors import CheckpointError, UsageError, reason, writing

SUMS = "SHA256SUMS"
"""The digests of a folder's files, as `sha256sum -c` reads them."""
RECIPE = "recipe.yaml"
"""The recipe of a run, in its folder or beside its weights in a pushed repository."""
LOCK = ".lock"
"""The file in a folder that `lock` locks."""
PARTIAL = "partial"
"""Suffix of a folder that is being filled."""
OLD = "old"
"""Suffix of a folder that is being replaced."""
DRAFT = "tmp"
"""Suffix of a file that is being written."""
SLACK = 64 * 10**6
"""Bytes for small files and file system overhead, which `check_space` adds."""

_SUM = re.compile(r"([0-9a-f]{64})  (.+)")
# .NAME.PID.RANDOM.ENDING, and .NAME.PID.tmp as earlier versions wrote it
_LEFT = re.compile(rf"\..+?\.(?P<pid>\d+)\.(?:[0-9a-f]{{8}}\.(?:{PARTIAL}|{DRAFT})|{DRAFT})")
# A container starts every process with the same id, so by the id alone a leftover of another container would look like
# our own
_MADE: set[str] = set()


def inside(folder: Path, name: str, *, named_in: Path | None = None, links: bool = False) -> Path:
    """The path `folder / name` for a name that was read from a file, which may come from an untrusted source.

    Args:
        folder: what the path has to stay within; need not exist.
        name: a relative path such as `checkpoint-3` or `transformer/model.onnx`; need not exist.
        named_in: the file that the name was read from, for the error.
        links: whether links may lead out of the folder, as those of a hub cache do. Only for what is read alone, never
            for what is written or removed.

    Returns:
        `folder / name`, not resolved.

    Raises:
        CheckpointError: the name is not a text or is empty, is absolute on any system, has a `..`, contains what no
            file name can (NUL, a lone surrogate), or leads out of the folder through a link where `links` is false.
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
        f"{where} {str(name)[:200]!r}, which is not a path within '{folder}'",
        "Use an unchanged copy; nothing was read or written there.",
    )


def from_home(text: str | Path) -> Path:
    """A path with `~` and `~name` expanded; unchanged if there is no such home."""
    # unlike `Path.expanduser`, which raises a RuntimeError then
    return Path(os.path.expanduser(text))  # noqa: PTH111


def with_name(path: Path) -> Path:
    """The path, or the absolute one if its last part is no name, as of `.` and `run/..`."""
    return path.resolve() if path.name in ("", "..") else path


def check_place(path: Path, option: str) -> None:
    """Checks that a file or folder can be created at `path`, before the work whose result goes there.

    Args:
        path: what is to be made; the folders above it need not exist.
        option: names the place, for the error, such as `--out`.

    Raises:
        UsageError: a file is in the way, or the system refuses.
    """
    if (reason := refusal_of(path)) is not None:
        raise UsageError(f"{option} {path} cannot be written: {reason}", "Name another place.")


def refusal_of(path: Path) -> str | None:
    """Why no file or folder can be created at `path`, or in it if it is a folder; None if one can.

    Permissions prove nothing (root may write anywhere except to a read-only disk), so a folder is created where the
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
        return f"it is not a path ({error})"
    except OSError as error:
        return reason(error)


def check_space(
    folder: Path,
    needed: int,
    what: str = "The export",
    fix: str = "Free some space, or name a folder on another disk.",
) -> None:
    """Checks that the disk of a folder, which need not exist yet, has space for `needed` bytes.

    Args:
        folder: where the files go.
        needed: their size.
        what: what needs the space, for the error.
        fix: what to do about it, for the error.

    Raises:
        UsageError: it has too little space.
    """
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + SLACK:
        raise UsageError(
            f"{what} takes about {(needed + SLACK) / 1e9:.1f} GB, but {there} has {free / 1e9:.1f} GB free",
            fix,
        )


def refuse_links_out(folder: Path) -> None:
    """Checks that writing below `folder` cannot leave it through a link.

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
                        f"'{path}' is a link that leads outside '{folder}'",
                        "Replace it with its target; nothing was written.",
                    ) from None


@contextmanager
def atomic_file(path: Path, *, parents: bool = True) -> Iterator[Path]:
    """A hidden file to write beside `path`, which takes its place when the body ends without an error.

    Args:
        path: what is written or replaced.
        parents: whether to make the folders above it.

    Raises:
        StorageError: the system refused; the old contents stay.
    """
    draft = _hidden(path, DRAFT)
    with writing(path):
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield draft
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
            _MADE.discard(draft.stem)


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces a file in one step: after a crash it has the old or the new contents, never a mixture.

    Raises:
        StorageError: the system refused, or the folder does not exist; the old contents stay.
    """
    with atomic_file(path, parents=False) as draft, draft.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder to fill beside `folder`, which takes its name when the body ends without an error.

    Raises:
        UsageError: there is a file or folder of that name.
        StorageError: the system refused.
    """
    if folder.exists():
        raise UsageError(f"{folder} exists already", "Save to another folder, or move that one away.")
    folder = folder.resolve()
    with writing(folder), partial_folder(folder) as partial:
        yield partial
        partial.rename(folder)


@contextmanager
def replaced_folder(folder: Path) -> Iterator[Path]:
    """A copy of a folder made of hard links, which takes its place when the body ends without an error.

    A process that is killed between the two renames leaves the old folder under a hidden name: see `leftovers`.

    Raises:
        StorageError: the system refused.
    """
    with writing(folder):
        for left in leftovers(folder, OLD):
            shutil.rmtree(left, ignore_errors=True)
        with partial_folder(folder) as partial:
            old = partial.with_suffix(f".{OLD}")
            link_files(folder, partial)
            partial.chmod(folder.stat().st_mode)
            yield partial
            try:
                folder.rename(old)
                partial.rename(folder)
            except BaseException:
                if old.exists() and not folder.exists():
                    old.rename(folder)
                raise
            shutil.rmtree(old, ignore_errors=True)


def link_files(folder: Path, copy: Path) -> None:
    """A second name in `copy` for every file below `folder`."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            link_file(path, copy / path.relative_to(folder))


def link_file(path: Path, linked: Path) -> None:
    """A second name for a file, or a copy if the file system has no hard links."""
    linked.parent.mkdir(parents=True, exist_ok=True)
    try:
        linked.hardlink_to(path)
    except OSError:
        shutil.copyfile(path, linked)


@contextmanager
def partial_folder(folder: Path) -> Iterator[Path]:
    """A hidden folder beside `folder` for the length of the body; those of dead processes are removed first."""
    for left in leftovers(folder, PARTIAL):
        shutil.rmtree(left, ignore_errors=True)
    partial = _hidden(folder, PARTIAL)
    partial.mkdir(parents=True)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        _MADE.discard(partial.stem)


def leftovers(folder: Path, kind: str) -> list[Path]:
    """Folders that dead processes of this computer left beside `folder`, sorted.

    Args:
        folder: the folder they were to become or to make room for; need not exist.
        kind: `PARTIAL` or `OLD`.
    """
    named = re.compile(rf"\.{re.escape(folder.name)}\.(\d+)\.[0-9a-f]+\.{kind}")
    try:
        beside = sorted(folder.parent.iterdir())
    except OSError:
        # missing, or not readable
        return []
    found = [(path, named.fullmatch(path.name)) for path in beside]
    return [path for path, match in found if match and not _alive(int(match[1]), path.stem)]


def remove_leftovers(folder: Path) -> None:
    """Removes the unfinished files and folders that dead processes left directly in `folder`."""
    try:
        found = [(path, _LEFT.fullmatch(path.name)) for path in sorted(folder.iterdir())]
    except OSError:
        return
    for path, match in found:
        if match and not _alive(int(match["pid"]), path.stem):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _hidden(path: Path, kind: str) -> Path:
    hidden = path.parent / f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.{kind}"
    _MADE.add(hidden.stem)
    return hidden


def _alive(pid: int, stem: str) -> bool:
    """Whether the process that made a file or folder still runs; true if unknown."""
    if pid == os.getpid():
        return stem in _MADE
    if os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        # the process of another user
        return True
    return True


@contextmanager
def lock(folder: Path, what: str) -> Iterator[None]:
    """Locks a folder for the length of the body, so that one process at a time works in it.

    The lock ends with the process, however it ends. Where the system or the file system has no locks, nothing is
    locked.

    Args:
        folder: where the file `.lock` is made.
        what: one sentence for the error, such as `The run 'x' is being trained by another process`.

    Raises:
        UsageError: another process has locked it.
    """
    # imported here, so that commands that only read start without it
    from filelock import FileLock, Timeout

    # filelock would write a marker instead, which outlives a process that another machine killed
    held = FileLock(folder / LOCK, blocking=False, fallback_to_soft=False)
    try:
        held.acquire()
    except Timeout:
        raise UsageError(what, "Wait until that process ends, or stop it.") from None
    except (OSError, NotImplementedError):
        pass
    try:
        yield
    finally:
        held.release()


def digest(path: Path) -> str:
    """Sha256 of a file, 64 hexadecimal digits.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_sums(folder: Path) -> str:
    """Writes the digests of all files below `folder` to its `SHA256SUMS`; returns the digest of that file."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = sums_text({name: digest(folder / name) for name in names if name != SUMS})
    (folder / SUMS).write_text(text, encoding="utf-8")
    return digest(folder / SUMS)


def sums_text(digests: Mapping[str, str]) -> str:
    """The content of `SHA256SUMS` for digests by file name."""
    return "".join(f"{found}  {name}\n" for name, found in sorted(digests.items()))


def read_sums(folder: Path) -> dict[str, str]:
    """The digests that `SHA256SUMS` of a folder states, by the names of the files.

    Raises:
        CheckpointError: it is missing, damaged, or names what is not in the folder.
    """
    file = folder / SUMS
    try:
        found = _sums(file, ())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{file}' cannot be read ({reason(error)})", "Restore the file from a copy.") from None
    for name in found:
        inside(folder, name, named_in=file, links=True)
    return found


def check_sums(
    folder: Path,
    expected: str | None,
    fix: str,
    names: Collection[str] = (),
    *,
    only: Collection[str] | None = None,
) -> bool:
    """Checks the files of a folder against its `SHA256SUMS`; other files are ignored.

    Args:
        folder: a folder whose digests `write_sums` wrote.
        expected: what `write_sums` returned; None if it was not kept.
        fix: what to do about a damaged file, for the error.
        names: files that it must list.
        only: the files to check among those that it lists; None: all.

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
                raise CheckpointError(
                    f"'{path}' is damaged: its digest differs from the one recorded when it was saved", fix
                )
    except FileNotFoundError:
        raise CheckpointError(f"'{file}' is missing", fix) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"'{folder}' cannot be checked ({reason(error)})", fix) from None
    return True


def _sums(file: Path, names: Collection[str]) -> dict[str, str]:
    found = [_SUM.fullmatch(line) for line in file.read_text(encoding="utf-8").splitlines()]
    lines = {match[2]: match[1] for match in found if match}
    if len(lines) < len(found) or not lines.keys() >= set(names):
        raise ValueError(f"{file.name} is damaged")
    return lines
