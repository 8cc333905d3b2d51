"""Runs and artifacts on the model hub as targets: `owner/name[@revision]`, or `hub:owner/name[@revision]`.

A target is fetched once per commit. Only files that `fmg push` writes are fetched, so never a pickle or code, and each
is compared with the digest that the repository states. Imports no torch.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmg.core.cache import cache_dir, required_cache
from fmg.core.errors import CheckpointError, HubError
from fmg.core.events import Notice, Observer
from fmg.core.files import PARTIAL, RECIPE, SUMS, check_sums, read_sums, with_name
from fmg.core.hub import HubSource, named_repository
from fmg.core.hub_transfer import Checkout, check_out
from fmg.data.run_folder import RUNS, RunFolder
from fmg.inference.artifact.layout import EXPORTED
from fmg.inference.artifact.manifest import MANIFEST
from fmg.inference.artifact.manifest_io import MAX_BYTES, from_json
from fmg.models.common.checkpoint_files import (
    ADAPTER_MANIFEST,
    CARD,
    READ,
    SAMPLES,
    TRANSFORMER_MANIFEST,
    is_checkpoint,
    matching,
)

_ARTIFACT_FILES = ("*.onnx", "*.safetensors", "tokenizer*/tokenizer.json")
_FIX = "Ask its owner to push it again, or name another revision."


@dataclass(frozen=True)
class Fetched:
    """A run or an artifact fetched from the hub.

    Attributes:
        label: `owner/name@commit`.
        kind: run or artifact.
        folder: its files: a checkpoint with its recipe, or an artifact.
    """

    label: str
    kind: Literal["run", "artifact"]
    folder: Path


def hub_source(text: str) -> HubSource | None:
    """The repository that a target names, or None. Errors as in `named_repository`."""
    return named_repository(text, (str(RUNS), f"{EXPORTED}s"))


def without_parents(target: str) -> str:
    """A target without the folders of this computer: its name, or for a checkpoint `RUN/checkpoints/NAME`.

    A repository on the hub keeps its name and revision.
    """
    if hub_source(target) is not None:
        return target
    path = with_name(Path(target))
    inside = path.parent == RunFolder(path.parent.parent).checkpoints
    return "/".join(path.parts[-3:]) if inside else path.name


def fetch_target(source: HubSource, observer: Observer) -> Fetched:
    """The run or artifact in a repository, fetched if it is not cached.

    Raises:
        HubError: the hub cannot be reached or refuses, or the repository holds neither.
        UsageError: the network is forbidden, or the disk is too small.
        CheckpointError: a file is not the one that was pushed.
    """
    found = check_out(source, (SUMS, MANIFEST))
    if found is None:
        raise HubError(
            f"'{source.repository}' holds neither a run nor an artifact that `fmg push` wrote",
            "Load another tool's LoRA with `FlowMapPipeline.load_lora_weights`; pickled weights are never read.",
        )
    observer(Notice("info", found.label))
    if found.has(SUMS):
        return Fetched(found.label, "run", _run(found, observer))
    return Fetched(found.label, "artifact", _artifact(found, observer))


def fetch_recipe(source: HubSource, observer: Observer) -> Path:
    """The recipe of a run in a repository, without its weights. Errors as in `fetch_target`."""
    found = check_out(source, (SUMS,))
    if found is None:
        raise HubError(f"'{source.repository}' holds no run that `fmg push` wrote", "Name a run, or a recipe file.")
    observer(Notice("info", found.label))
    found.fetch([RECIPE], observer)
    check_sums(found.folder, None, _FIX, names=(RECIPE,), only=(RECIPE,))
    return found.folder / RECIPE


def is_pushed_run(folder: Path) -> bool:
    """Whether a folder holds a checkpoint with its recipe, as `fmg push` uploads it."""
    return (folder / RECIPE).is_file() and is_checkpoint(folder)


def check_pushed_run(folder: Path) -> None:
    """Checks the files that fmg reads of a pushed run.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    check_sums(folder, None, _FIX, names=(RECIPE,), only=matching(read_sums(folder), (RECIPE, *READ)))


def _run(found: Checkout, observer: Observer) -> Path:
    stated = read_sums(found.folder)
    names = matching(stated, (RECIPE, *READ))
    if RECIPE not in names or not {ADAPTER_MANIFEST, TRANSFORMER_MANIFEST} & set(names):
        raise CheckpointError(f"'{found.label}' is not a run that `fmg push` wrote: {SUMS} names no recipe", _FIX)
    found.fetch(names, observer, optional=(CARD, SAMPLES))
    check_pushed_run(found.folder)
    return found.folder


def _artifact(found: Checkout, observer: Observer) -> Path:
    """A copy of the artifact without links: the hub's cache consists of links, and an artifact must not contain any."""
    folder = cache_dir() / "hub" / found.repository.replace("/", "--") / found.commit
    if (folder / MANIFEST).is_file():
        return folder
    file = found.folder / MANIFEST
    with file.open("rb") as opened:
        manifest = from_json(opened.read(MAX_BYTES + 1), Path(found.label) / MANIFEST)
    if strange := sorted(set(manifest.files) - set(matching(manifest.files, _ARTIFACT_FILES))):
        raise CheckpointError(f"'{found.label}' lists {strange[0]}, which no artifact has", _FIX)
    # neither hidden nor named after this process, so that an interrupted download continues
    partial = folder.with_name(f"{found.commit}.{PARTIAL}")
    with required_cache():
        partial.mkdir(parents=True, exist_ok=True)
        found.fetch([*manifest.files, MANIFEST], observer, into=partial)
        # what the client remembers about its downloads
        shutil.rmtree(partial / ".cache", ignore_errors=True)
        if not (folder / MANIFEST).is_file():
            partial.rename(folder)
    return folder
