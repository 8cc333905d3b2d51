"""The files that a network of an evaluation reads: where they are, which are missing, how to get them.

Imports no torch. Scoring never touches the network: a file that is not on this computer is an error that names the
command which fetches it, and only `fetch` downloads. Hub files live in the hub's own cache, everything else under
`cache_dir()`.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal
from urllib.request import urlopen

from fmg.core.cache import cache_dir, content_hash
from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.files import atomic_file, from_home

CHUNK = 1 << 20
_TIMEOUT_S = 60
_HUB_ID = re.compile(r"^[\w][\w.-]*/[\w][\w.-]*(@[\w./-]+)?$")
_WEIGHT_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".py", ".txt")
_PACKAGE = "package:"
_SNAPSHOTS = "snapshots"


@dataclass(frozen=True)
class Asset:
    """Files that a reward reads from one place.

    Attributes:
        what: what they are, such as `checkpoint` or `tokenizer`; unique within a reward.
        option: the option of the reward that names the source.
        source: a local file or folder, `hub-id[@revision]`, an https URL of the one file, or `package:NAME==VERSION`
            for a data file of an installed Python package that is never imported.
        files: names of the files that are needed. `a|b` means the first of them that is there. When the source is a
            local file it stands for the first, and the others are looked for beside it.
        optional: names of files that are used when they are there.
        sha256: digest of the published first file; None for sources of the user's own and where none is known.
    """

    what: str
    option: str
    source: str
    files: tuple[str, ...]
    optional: tuple[str, ...] = ()
    sha256: str | None = None

    @property
    def kind(self) -> Literal["path", "hub", "url", "package"]:
        """What `source` is. An existing path wins over a hub id of the same spelling."""
        if self.source.startswith("https://"):
            return "url"
        if self.source.startswith(_PACKAGE):
            return "package"
        looks_local = self.source.startswith(("/", ".", "~")) or self.source.endswith(_WEIGHT_SUFFIXES)
        if looks_local or Path(self.source).exists() or not _HUB_ID.match(self.source):
            return "path"
        return "hub"


@dataclass(frozen=True)
class Located:
    """The files of an asset on this computer, by the name the asset gives them."""

    asset: Asset
    files: Mapping[str, Path]

    @property
    def first(self) -> Path:
        """The file that the asset names first."""
        return self.files[self.asset.files[0]]

    @property
    def folder(self) -> Path:
        """Where the first file lies."""
        return self.first.parent

    @property
    def pinned(self) -> str:
        """The source at the commit that is in the hub's cache; other sources as they are."""
        parts = self.first.parts
        if self.asset.kind != "hub" or _SNAPSHOTS not in parts:
            return self.asset.source
        return f"{self.asset.source.partition('@')[0]}@{parts[parts.index(_SNAPSHOTS) + 1]}"

    def get(self, name: str) -> Path | None:
        """The file of this name, if it is there."""
        return self.files.get(name)


def missing(asset: Asset) -> tuple[str, ...]:
    """Names of the needed files that are not on this computer."""
    found = dict(_present(asset))
    return tuple(name for name in asset.files if name not in found)


def locate(asset: Asset, name: str, kind: str = "reward") -> Located:
    """The files of `asset`, which the component `name` reads, looked for on this computer only.

    Raises:
        UsageError: a local source that does not exist or lacks a file.
        MissingDependencyError: a published file that has not been fetched; names the command that does.
    """
    located = Located(asset, dict(_present(asset)))
    absent = [file for file in asset.files if file not in located.files]
    if not absent:
        return located
    if asset.kind == "path":
        names = ", ".join(file.replace("|", " or ") for file in absent)
        path = from_home(asset.source)
        what = f"'{asset.source}' has no {names}" if path.exists() else f"There is no file or folder '{asset.source}'"
        raise UsageError(
            f"{what}, which the {kind} '{name}' needs as its {asset.what}",
            f"Set {asset.option} to a local file or folder, or to a hub id such as owner/name@revision.",
        )
    names = ", ".join(file.partition("|")[0] for file in absent)
    how = f"Fetch it with `fmg fetch {kind} {name}`"
    if asset.kind == "package":
        how = f"Install it with `pip install --no-deps {asset.source.removeprefix(_PACKAGE)}` (nothing of it is run)"
    raise MissingDependencyError(
        f"The {kind} '{name}' needs its {asset.what} ({names} of {asset.source}), which is not on this computer",
        f"{how}, or set {asset.option} to a local file or folder.",
    )


def fetch(name: str, assets: Sequence[Asset], observer: Observer = ignore, kind: str = "reward") -> tuple[Located, ...]:
    """Downloads what is missing of `assets` and checks it against the published digests.

    Progress arrives as `StageProgress("fetch", done, total)`, counted in assets.

    Raises:
        MissingDependencyError: without a connection, and for what cannot be downloaded (Python packages).
        CheckpointError: when a file is not the published one.
    """
    located = []
    owner = f"{kind} '{name}'"
    for index, asset in enumerate(assets):
        observer(StageProgress("fetch", index, len(assets)))
        if asset.kind == "hub":
            _fetch_hub(asset, owner)
        elif asset.kind == "url" and missing(asset):
            _fetch_url(asset, owner)
        found = locate(asset, name, kind)
        check_digest(found)
        located.append(found)
    observer(StageProgress("fetch", len(assets), len(assets)))
    return tuple(located)


def check_digest(located: Located) -> None:
    """Compares the first file with the published digest, where there is one.

    Raises:
        CheckpointError: when they differ.
    """
    wanted = located.asset.sha256
    if wanted is not None and (got := content_hash(located.first)) != wanted:
        raise CheckpointError(
            f"{located.first} is not the published file: its sha256 is {got}, not {wanted}",
            "Remove it and fetch it again.",
        )


def _present(asset: Asset) -> Iterator[tuple[str, Path]]:
    for index, name in enumerate((*asset.files, *asset.optional)):
        for alternative in name.split("|"):
            path = _candidate(asset, alternative, first=index == 0)
            if path is not None and path.is_file():
                yield name, path
                break


def _candidate(asset: Asset, name: str, *, first: bool) -> Path | None:
    if asset.kind == "path":
        source = from_home(asset.source)
        if source.is_dir():
            return source / name
        return source if first else source.parent / name
    if asset.kind == "url":
        return _download_path(asset) if first else None
    if asset.kind == "package":
        package = asset.source.removeprefix(_PACKAGE).partition("==")[0]
        spec = find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        return Path(folders[0]).parent / name if folders else None
    from huggingface_hub import try_to_load_from_cache

    repository, _, revision = asset.source.partition("@")
    cached = try_to_load_from_cache(repository, name, revision=revision or None)
    return Path(cached) if isinstance(cached, str) else None


def _download_path(asset: Asset) -> Path:
    folder = hashlib.sha256(asset.source.encode()).hexdigest()[:16]
    return cache_dir() / "downloads" / folder / asset.files[0]


def _fetch_hub(asset: Asset, owner: str) -> None:
    from huggingface_hub import HfApi, hf_hub_download

    wanted = missing(asset)
    if not wanted:
        return
    repository, _, revision = asset.source.partition("@")
    try:
        listed = set(HfApi().list_repo_files(repository, revision=revision or None))
        for name in (*wanted, *asset.optional):
            there = next((alternative for alternative in name.split("|") if alternative in listed), None)
            if there is not None:
                hf_hub_download(repository, there, revision=revision or None)
    except Exception as error:
        # the client raises errors of its own, of its HTTP library and of the system
        raise _unreachable(asset, owner, error) from error


def _fetch_url(asset: Asset, owner: str) -> None:
    try:
        with (
            urlopen(asset.source, timeout=_TIMEOUT_S) as answer,
            atomic_file(_download_path(asset)) as partial,
            partial.open("wb") as file,
        ):
            shutil.copyfileobj(answer, file)
    except OSError as error:
        raise _unreachable(asset, owner, error) from error


def _unreachable(asset: Asset, owner: str, error: Exception) -> MissingDependencyError:
    reason = " ".join(str(error).split())[:200]
    return MissingDependencyError(
        f"The {asset.what} of the {owner} cannot be fetched from {asset.source}: {reason}",
        f"Check the connection and the source, or set {asset.option} to a local file or folder.",
    )
