"""Publishes a run or an artifact on the model hub: which files are uploaded, and what they may not contain.

For a run, the chosen checkpoint is uploaded with its card, recipe and sample images, and nothing else: no log, no
prompts, no state, no local path. For an artifact, the files of its manifest are uploaded, but not its engines, because
each fits one kind of GPU and is code. `fmg.inference.hub_target` reads both back. Imports no torch.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from fmg.core.errors import FmgError, UsageError, python_call
from fmg.core.files import RECIPE, SUMS, digest, from_home, sums_text
from fmg.core.hub_transfer import MAIN, Remote, check_may_push, check_name, read_remote, read_text, send
from fmg.core.json_io import JsonError, parse_object, read_safetensors_header
from fmg.data.checkpoints import SavedCheckpoint, existing_index
from fmg.data.prompt_sets import load_prompts
from fmg.data.run_folder import RunFolder
from fmg.inference.artifact.layout import Artifact, is_artifact, open_artifact
from fmg.inference.artifact.manifest import MANIFEST, Manifest
from fmg.inference.artifact.manifest_io import to_json
from fmg.inference.hub_target import hub_source, without_parents
from fmg.inference.loading import made_from
from fmg.inference.target import (
    Target,
    TargetLike,
    resolve_target,
    run_of_checkpoint,
    target_text,
    without_folders,
)
from fmg.models.common.checkpoint_files import (
    ADAPTER_MANIFEST,
    CARD,
    KOHYA_DIGEST,
    KOHYA_FILE,
    SAMPLES,
    TRANSFORMER_MANIFEST,
    WRITTEN,
    adapter_digest,
    matching,
)
from fmg.recipe import Recipe, resolve
from fmg.recipe.sharing import changes, local_base, published, shareable
from fmg.registry import models
from fmg.training.card import artifact_card, checkpoint_card, hub_card, samples_of, seen_prompts
from fmg.version import __version__

BEFORE_AFTER = "before_after.png"
_KOHYA = f"kohya/{KOHYA_FILE}"
_ABOUT = {SAMPLES: "Samples at fixed prompts and seeds", BEFORE_AFTER: "Before and after training"}
_MARKS = {"run": (ADAPTER_MANIFEST, TRANSFORMER_MANIFEST), "artifact": (MANIFEST,)}
# what a repository may hold before the first push: the hub makes them
_FRESH = {CARD, ".gitattributes", "LICENSE", "LICENSE.md", "LICENSE.txt", ".gitignore"}
_TEXTS = (".json", ".md", ".yaml")


@dataclass(frozen=True)
class Parcel:
    """The contents of a push.

    Attributes:
        label: the run, checkpoint or artifact.
        kind: `run` or `artifact`.
        files: content, or the file with it, by name in the repository.
        notes: what was changed or left out, one line each.
        terms: licence terms of the base, as its authors state them.
        message: default commit message.
    """

    label: str
    kind: str
    files: Mapping[str, bytes | Path]
    notes: tuple[str, ...]
    terms: str
    message: str

    @property
    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        return {
            name: len(content) if isinstance(content, bytes) else content.stat().st_size
            for name, content in self.files.items()
        }


@dataclass(frozen=True)
class Pushed:
    """A finished push.

    Attributes:
        repository: its id.
        url: its page.
        commit: full hash.
        created: whether the repository is new.
        changed: False if it already had these files.
        deleted: files of an earlier push that are not part of this one.
        parcel: what was sent.
    """

    repository: str
    url: str
    commit: str
    created: bool
    changed: bool
    deleted: tuple[str, ...]
    parcel: Parcel

    def __repr__(self) -> str:
        return f"Pushed({self.parcel.label} to {self.repository}@{self.commit})"


@python_call
def push(
    target: TargetLike | Artifact,
    repository: str,
    *,
    private: bool = False,
    revision: str | None = None,
    message: str | None = None,
    values: Sequence[str] = (),
) -> Pushed:
    """Publishes a run or an artifact as one commit to a repository, which is created if it does not exist.

    Args:
        target: a run folder, one checkpoint of a run, an artifact, or None for the newest run.
        repository: `owner/name` on the hub.
        private: make a new repository private.
        revision: branch to commit to; created if it does not exist. None means `main`.
        message: the commit message.
        values: `path=value` texts that replace values of the published recipe, such as `model.student=owner/name`.

    Raises:
        UsageError: there is nothing to publish, its base is a local folder, the repository holds something else, or the
            token or network is missing.
        CheckpointError: a file is missing or damaged.
        HubError: the hub cannot be reached, or refuses.
    """
    return send_parcel(pack(target, repository, values=values), repository, private, revision, message)


def send_parcel(parcel: Parcel, repository: str, private: bool, revision: str | None, message: str | None) -> Pushed:
    """Uploads what `pack` has assembled. Arguments and errors as for `push`."""
    branch = revision or MAIN
    check_name(repository, branch)
    check_may_push()
    remote = read_remote(repository, branch)
    if remote is not None:
        _check_kind(remote, parcel, repository)
        if private and not remote.private:
            raise UsageError(
                f"'{repository}' exists already and is public",
                "Make it private on its settings page, leave out --private, or name another repository.",
            )
    obsolete = () if remote is None else tuple(sorted(_obsolete(remote, parcel, repository)))
    made = send(
        repository,
        parcel.files,
        remote=remote,
        branch=branch,
        message=message or parcel.message,
        private=private,
        obsolete=obsolete,
    )
    return Pushed(repository, made.url, made.commit, made.created, made.changed, obsolete, parcel)


def pack(target: TargetLike | Artifact, repository: str, *, values: Sequence[str] = ()) -> Parcel:
    """Assembles the contents of a push; needs no network.

    Raises:
        UsageError: there is nothing to publish, its base is a local folder, or a file contains a path on this computer.
        CheckpointError: a file is missing or damaged.
    """
    artifact = _artifact(target)
    if artifact is None:
        assert not isinstance(target, Artifact)
        parcel = _pack_run(target, repository, values)
    elif values:
        raise UsageError("--set changes the recipe of a run, which an artifact does not have", "Leave it out.")
    else:
        parcel = _pack_artifact(artifact, repository)
    _check_private(parcel)
    return parcel


def _artifact(target: TargetLike | Artifact) -> Artifact | None:
    """The artifact at a path, with its files checked; None for a run.

    Raises:
        UsageError: it is neither, or it is on the hub already.
    """
    if target is None or isinstance(target, (Artifact, Target)):
        return target if isinstance(target, Artifact) else None
    place = target_text(target) or ""
    if is_artifact(place):
        return open_artifact(place)
    if place in models.names() and not Path(place).exists():
        raise UsageError(f"'{place}' is a model that has not been trained", "Name a run or an artifact.")
    if hub_source(place) is not None:
        raise UsageError(f"There is no run or artifact '{place}' here", "Give a folder on this computer.")
    if (Path(place) / "model_index.json").is_file():
        raise UsageError(
            f"'{place}' is a diffusers folder", f"Upload it as it is: hf upload OWNER/NAME {shlex.quote(place)}"
        )
    return None


def _pack_run(target: TargetLike, repository: str, values: Sequence[str]) -> Parcel:
    found = resolve_target(target, allow_code=True)
    folder = found.adapter
    run = None if folder is None else run_of_checkpoint(folder)
    if folder is None or run is None:
        raise UsageError(f"'{found.label}' is not a run", "Name a folder that `fmg train` made, or an artifact.")
    recipe = resolve(RunFolder(run).recipe, sets=values, allow_code=True).recipe if values else found.recipe
    if (base := local_base(recipe)) is not None:
        option, value = base
        raise UsageError(
            f"The run was trained on a local base, {option}={value}, which nobody else can load",
            f"Publish that base first, and name it: --set {option}=owner/name.",
        )
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    files: dict[str, bytes | Path] = {name: folder / name for name in matching(names, WRITTEN)}
    index = existing_index(run)
    saved, kept = index.entry(folder.name), index.entry(index.best)
    pictures = {}
    if (samples := _samples(RunFolder(run), saved, folder)) is not None:
        pictures[SAMPLES] = samples
    if saved == kept and RunFolder(run).before_after.is_file():
        pictures[BEFORE_AFTER] = RunFolder(run).before_after
    notes = [f"{path}: {before} is sent as {after}" for path, (before, after) in changes(recipe).items()]
    if saved.iteration == 0:
        notes.append(f"{folder.name} was saved before the first update, so it is equivalent to the base")
    shared = published(recipe)
    kohya, why_not = _kohya(Path(found.label) / KOHYA_FILE, folder)
    if kohya is not None:
        files[_KOHYA] = kohya
    notes += why_not
    files[RECIPE] = shared.to_yaml().encode()
    # digests only of files that fmg reads: cards may be edited on the hub
    sums = {name: _digest(content) for name, content in files.items()}
    card = _card(RunFolder(run), recipe, saved, kept)
    text = hub_card(card, shared, repository, {name: _ABOUT[name] for name in pictures})
    files |= {**pictures, CARD: text.encode(), SUMS: sums_text(sums).encode()}
    message = f"{folder.name} of {recipe.model.name}, by fmg {__version__}"
    return Parcel(
        found.label, "run", dict(sorted(files.items())), tuple(notes), recipe.model.config.about.licence, message
    )


def _pack_artifact(artifact: Artifact, repository: str) -> Parcel:
    manifest = artifact.manifest
    shared = _shareable_manifest(manifest)
    recipe = _source_recipe(artifact)
    text = artifact_card(
        recipe,
        repository,
        tuned=manifest.adapter is not None or manifest.base.name not in models.names(),
        precision=manifest.precision,
        checks={check.name: check.passed for check in manifest.checks},
        merged=() if shared.adapter is None else shared.adapter.parts,
    )
    files: dict[str, bytes | Path] = {name: artifact.path(name) for name in manifest.files}
    files |= {MANIFEST: to_json(shared).encode(), CARD: text.encode()}
    notes = []
    if shared != manifest:
        notes.append(f"{MANIFEST}: folder names are cut to their last part")
    if artifact.engines.is_dir():
        notes.append("engines/ is not sent: an engine fits one kind of GPU, and loading one can run any code")
    message = f"Artifact of {manifest.model.name}, {manifest.precision}, by fmg {__version__}"
    terms = recipe.model.config.about.licence
    return Parcel(str(artifact.folder), "artifact", dict(sorted(files.items())), tuple(notes), terms, message)


def _shareable_manifest(manifest: Manifest) -> Manifest:
    adapter = manifest.adapter
    base = manifest.base
    return replace(
        manifest,
        adapter=None if adapter is None else without_folders(adapter),
        base=replace(
            base,
            name=base.name if base.name in models.names() else without_parents(base.name),
            options=shareable(base.options),
        ),
        rewards=tuple(shareable(manifest.rewards)),
        prompts=shareable(manifest.prompts),
    )


def _source_recipe(artifact: Artifact) -> Recipe:
    """The recipe of the run behind an artifact, or that of its model if the run is not on this computer."""
    try:
        return made_from(artifact).recipe
    except FmgError:
        return Recipe.default(model=artifact.manifest.model.name)


def _samples(run: RunFolder, saved: SavedCheckpoint, folder: Path) -> Path | None:
    return folder / SAMPLES if (folder / SAMPLES).is_file() else samples_of(run, saved)


def _card(run: RunFolder, recipe: Recipe, saved: SavedCheckpoint, kept: SavedCheckpoint) -> str:
    """The card beside the checkpoint, which its owner may have edited; a new one if a kill prevented its writing."""
    file = saved.path(run.path) / CARD
    if file.is_file():
        return file.read_text(encoding="utf-8")
    try:
        seen = seen_prompts(load_prompts(recipe.prompts), load_prompts(recipe.eval.prompts))
    except FmgError:
        seen = "of the recipe below"
    return checkpoint_card(run, recipe, saved, kept, seen)


def _kohya(file: Path, checkpoint: Path) -> tuple[Path | None, list[str]]:
    """The LoRA in kohya's layout if it was exported from this checkpoint; otherwise the reason why it is not sent."""
    if not file.is_file():
        return None, []
    try:
        facts = read_safetensors_header(file)[0].get("__metadata__")
    except (OSError, JsonError):
        facts = None
    if isinstance(facts, Mapping) and facts.get(KOHYA_DIGEST) == adapter_digest(checkpoint):
        return file, []
    return None, [f"{file.name} is not sent: it was made from another checkpoint, or by an older fmg; export it again"]


def _digest(content: bytes | Path) -> str:
    return hashlib.sha256(content).hexdigest() if isinstance(content, bytes) else digest(content)


def _check_kind(remote: Remote, parcel: Parcel, repository: str) -> None:
    """Refuses a repository that holds anything but an earlier push of the same kind.

    Raises:
        UsageError: it does.
    """
    for kind, marks in _MARKS.items():
        if remote.files & set(marks):
            if kind == parcel.kind:
                return
            raise UsageError(
                f"'{repository}' holds {'an artifact' if kind == 'artifact' else 'a run'}, and"
                f" '{parcel.label}' is {'an artifact' if parcel.kind == 'artifact' else 'a run'}",
                "Name another repository, or another branch: --revision.",
            )
    if others := sorted(remote.files - _FRESH):
        raise UsageError(
            f"'{repository}' contains files that fmg did not push, such as {others[0]}",
            "Name another repository, or another branch: --revision.",
        )


def _obsolete(remote: Remote, parcel: Parcel, repository: str) -> set[str]:
    """Files of an earlier push that are not part of this one. Other files are not listed there, and are kept."""
    listing = SUMS if parcel.kind == "run" else MANIFEST
    if remote.commit is None or listing not in remote.files:
        return set()
    text = read_text(repository, listing, remote.commit)
    if parcel.kind == "run":
        listed = {line.partition("  ")[2] for line in text.splitlines()} | set(_ABOUT)
    else:
        try:
            entries = parse_object(text).get("files")
        except JsonError:
            entries = None
        listed = set(entries) if isinstance(entries, dict) else set()
    return (listed & remote.files) - set(parcel.files)


def _check_private(parcel: Parcel) -> None:
    """Refuses files that contain a path on this computer.

    Raises:
        UsageError: naming the first file, and what was found in it.
    """
    run = Path(parcel.label).resolve()
    # a short path may be found in any text
    places = {place for place in (Path.cwd(), run, run.parent, Path(sys.prefix)) if len(place.parts) > 2}
    home = from_home("~")
    known = [f"{place}/".encode() for place in (*places, *([home] if len(home.parts) > 1 else []))]
    known += [f"/{folder}/{_user()}/".encode() for folder in ("home", "Users")]
    # as JSON and YAML write other characters than ASCII
    known += [json.dumps(place.decode())[1:-1].encode() for place in known]
    for name, content in parcel.files.items():
        data = _searched(name, content)
        if found := next((place for place in sorted(known) if place in data), None):
            raise UsageError(
                f"{name} contains a path on this computer: '{found.decode(errors='replace')}'",
                "Remove it from that file, or write the file again with this version of fmg.",
            )


def _searched(name: str, content: bytes | Path) -> bytes:
    """The part of a file that can contain a path: texts, graphs, and the headers of weights."""
    if isinstance(content, bytes):
        return content
    if name.endswith(".safetensors"):
        header, _ = read_safetensors_header(content)
        return json.dumps(header.get("__metadata__"), ensure_ascii=False).encode()
    return content.read_bytes() if name.endswith((*_TEXTS, ".onnx")) else b""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return "user"
