"""Downloads what a model reads. The only place of the models that touches the network. Imports no torch."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fmg.core.errors import MissingDependencyError, UsageError
from fmg.models.sources import HubSource, Part, missing, parse_source

_TIMEOUT_S = 10
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Options of a download that loaders of the hub's libraries take."""
SNAPSHOTS = "snapshots"
"""Folder of the hub's cache whose subfolders are named after commits."""


@dataclass(frozen=True)
class Download:
    """What would be fetched for one part.

    Attributes:
        part: the files.
        source: where they come from.
        size_gb: their size in units of 10^9 bytes.
        licence: their terms.
        exact: whether size and licence come from the hub, not from the table that ships with the package.
    """

    part: Part
    source: HubSource
    size_gb: float
    licence: str
    exact: bool


def downloads(parts: Sequence[Part]) -> tuple[Download, ...]:
    """What is not on this computer and can be fetched, by the figures that ship with the package."""
    wanted = []
    for part in parts:
        source = parse_source(part.source)
        if isinstance(source, HubSource) and missing(part) is not None:
            wanted.append(Download(part, source, part.size_gb, part.licence, exact=False))
    return tuple(wanted)


def exact(download: Download) -> Download:
    """The download with size and licence as the hub states them now, or unchanged where it cannot be reached.

    Raises:
        MissingDependencyError: the repository has no such file; names those that it has.
    """
    from huggingface_hub import HfApi

    source = download.source
    try:
        info = HfApi().model_info(source.repository, revision=source.revision, files_metadata=True, timeout=_TIMEOUT_S)
    except Exception:
        # the client raises errors of its own, of its HTTP library and of the system; the fetch itself reports them
        return download
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    chosen = [name for name in sizes if download.part.wants(name)]
    if not chosen:
        weights = sorted(name for name in sizes if name.endswith((".pt", ".safetensors")))
        raise MissingDependencyError(
            f"'{source.repository}' has no file '{source.file}'; it has {', '.join(weights[:8]) or 'no weights'}",
            f"Set model.{download.part.option} to {source.repository}:FILE.",
        )
    stated = getattr(info.card_data, "license", None) if info.card_data is not None else None
    size = sum(sizes[name] for name in chosen) / 1e9
    return replace(download, size_gb=size, licence=stated or download.licence, exact=True)


def check_space(wanted: Sequence[Download]) -> None:
    """Compares the sizes with the free space of the hub's cache.

    Raises:
        UsageError: when they do not fit.
    """
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE)
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free, needed = shutil.disk_usage(existing).free / 1e9, sum(download.size_gb for download in wanted)
    if needed > free:
        raise UsageError(
            f"The files take about {needed:.1f} GB, and {existing} has {free:.1f} GB free",
            "Free some space, or set HF_HOME to a folder on another disk.",
        )


def fetch(download: Download) -> str:
    """Downloads one part into the hub's cache; files that are there already are not fetched again.

    Returns:
        The source as `parse_source` takes it, at the commit that was fetched: it means the same files for ever.

    Raises:
        MissingDependencyError: when the hub cannot be reached or refuses.
    """
    from huggingface_hub import hf_hub_download, snapshot_download

    source = download.source
    try:
        if source.file is not None:
            path = hf_hub_download(source.repository, source.file, revision=source.revision)
        else:
            path = snapshot_download(
                source.repository, revision=source.revision, allow_patterns=list(download.part.patterns)
            )
    except Exception as error:
        # as in `exact`
        reason = " ".join(str(error).split())[:200]
        raise MissingDependencyError(
            f"The {download.part.what} cannot be fetched from '{source.repository}': {reason}",
            "Check the connection, accept the model's terms on its page, and log in with `hf auth login`.",
        ) from error
    return pinned(source, Path(path))


def here(source: str | Path, patterns: Sequence[str], options: Mapping[str, object]) -> Path:
    """The folder `source`, or that of a hub id `owner/name[@revision]`, which is downloaded as libraries of the hub do.

    Args:
        source: a folder or a hub id.
        patterns: files that are wanted of a repository.
        options: some of `HUB_OPTIONS`, for `snapshot_download`.

    Raises:
        UsageError: there is no such folder.
        MissingDependencyError: the hub cannot be reached or refuses.
    """
    place = parse_source(str(source))
    if isinstance(place, Path):
        if not place.is_dir():
            raise UsageError(f"There is no folder '{source}'", "Give a folder, or a hub id such as owner/name.")
        return place
    from huggingface_hub import snapshot_download

    given: dict[str, Any] = {"revision": place.revision, **options}
    try:
        return Path(snapshot_download(place.repository, allow_patterns=list(patterns), **given))
    except Exception as error:
        # as in `exact`
        reason = " ".join(str(error).split())[:200]
        raise MissingDependencyError(
            f"'{source}' cannot be fetched: {reason}",
            "Check the name and the connection, accept the terms on its page, and log in with `hf auth login`.",
        ) from error


def pinned(source: HubSource, path: Path) -> str:
    """The source at the commit whose snapshot in the hub's cache `path` is, or lies in."""
    parts = path.parts
    commit = parts[parts.index(SNAPSHOTS) + 1] if SNAPSHOTS in parts else source.revision
    revision = "" if commit is None else f"@{commit}"
    return f"{source.repository}{revision}" + ("" if source.file is None else f":{source.file}")
