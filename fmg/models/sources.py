"""Where a model's files are: on this computer, or in the Hugging Face cache under a hub id. Imports no torch.

Loading never touches the network. What is not on this computer is an error that names the command which fetches it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.core.files import from_home
from fmg.core.model_folder import CONFIG, absent_weights

_HUB = re.compile(
    r"(?P<repository>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[\w./-]+))?(:(?P<file>[\w./-]+))?"
)
_WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


@dataclass(frozen=True)
class HubSource:
    """A repository of the hub, at a revision (None: its main branch), and a file in it where one is meant."""

    repository: str
    revision: str | None
    file: str | None


def parse_source(text: str) -> Path | HubSource:
    """`owner/name[@revision][:file]`, or a path. What exists on this computer is a path, whatever it looks like."""
    path = from_home(text)
    match = _HUB.fullmatch(text)
    looks_local = text.startswith(("/", ".", "~")) or ("@" not in text and ":" not in text and _is_weight_name(text))
    if match is None or looks_local or path.exists():
        return path
    return HubSource(match["repository"], match["revision"], match["file"])


@dataclass(frozen=True)
class Part:
    """Files that a model reads from one place.

    Attributes:
        what: what they are, such as `student` or `teacher`.
        option: the option of the model that names the source.
        source: as `parse_source` takes it.
        components: component folders whose weights are needed; none for a single file.
        patterns: files to fetch when the source is a repository without `:file`.
        size_gb: size of the published files, about, in units of 10^9 bytes.
        licence: terms of the published files, as their authors state them.
    """

    what: str
    option: str
    source: str
    components: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()
    size_gb: float = 0.0
    licence: str = ""

    def wants(self, file: str) -> bool:
        """Whether a file of the repository is one of those that are needed."""
        source = parse_source(self.source)
        if isinstance(source, HubSource) and source.file is not None:
            return file == source.file
        return any(fnmatchcase(file, pattern) for pattern in self.patterns)


def missing(part: Part) -> str | None:
    """What of `part` is not on this computer, in a few words; None when everything is there."""
    source = parse_source(part.source)
    path = _path(source, part)
    if path is None or not path.exists():
        if isinstance(source, Path):
            return f"there is no file or folder '{part.source}'"
        return f"'{part.source}' has not been fetched"
    absent = _absent(path, part) if path.is_dir() else []
    return f"'{part.source}' lacks {', '.join(absent[:3])}" if absent else None


def locate(part: Part, model: str) -> Path:
    """The file or folder of `part` on this computer.

    Raises:
        MissingDependencyError: published files that have not been fetched; names the command that does.
        CheckpointError: a local source that does not exist or is not complete.
    """
    problem = missing(part)
    path = _path(parse_source(part.source), part)
    if problem is None and path is not None:
        return path
    what = f"The model '{model}' needs its {part.what}, and {problem}"
    if isinstance(parse_source(part.source), HubSource):
        raise MissingDependencyError(
            what, f"Fetch it with `fmg fetch {model}`, or set model.{part.option} to a local file or folder."
        )
    raise CheckpointError(what, f"Correct model.{part.option}, or give a hub id such as owner/name@revision.")


def _path(source: Path | HubSource, part: Part) -> Path | None:
    if isinstance(source, Path):
        return source
    from huggingface_hub import try_to_load_from_cache

    anchor = source.file or f"{(*part.components, 'vae')[0]}/config.json"
    cached = try_to_load_from_cache(source.repository, anchor, revision=source.revision)
    if not isinstance(cached, str):
        return None
    return Path(cached) if source.file is not None else Path(cached).parents[1]


def _absent(folder: Path, part: Part) -> list[str]:
    absent = []
    for name in part.components:
        if not (folder / name / CONFIG).is_file():
            absent.append(f"{name}/{CONFIG}")
        absent += [f"{name}/{file}" for file in absent_weights(folder / name)]
    # a cache that was pruned or moved keeps links to files that are gone
    dangling = (path for path in folder.rglob("*") if path.is_symlink() and not path.exists())
    names = sorted(path.relative_to(folder).as_posix() for path in dangling)
    return absent + [name for name in names if part.wants(name) and name not in absent]


def _is_weight_name(text: str) -> bool:
    return text.endswith(_WEIGHT_SUFFIXES)
