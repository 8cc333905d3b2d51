"""The folder of an artifact: its files, and whether they match the manifest. Standard library only.

ARTIFACT/manifest.json
  transformer.onnx       transformer.safetensors       the graph's external data points into the safetensors file
  transformer_int8.onnx  transformer_int8.safetensors  optional, for a CPU
  text_encoder.onnx      text_encoder.safetensors      CLIP: input_ids (batch, 77) -> pooled (batch, p)
  text_encoder_2.onnx    text_encoder_2.safetensors    T5: input_ids (batch, text) -> tokens (batch, text, d)
  vae_decoder.onnx       vae_decoder.safetensors       latents (batch, c, height, width) -> images in [0, 1]
  sampler.onnx           (both of these weight files)  optional: all steps and the decoder, from noise to images
  tokenizer/tokenizer.json  tokenizer_2/tokenizer.json
or, in place of the text encoders, for a family whose transformer takes latents (schema 2):
  text_encoders.onnx     text_encoders.safetensors     ids of every tokenizer, masks -> conditioning of the transformer
  NAME/tokenizer.json                                  by the names of the inputs
and
  base.safetensors       the base's values of what the adapter changed
  calibration.json       of an fp8 transformer: the inputs that its scales were measured on
  engines/KEY.plan  engines/KEY.json                   TensorRT engines, added later, each with its own record
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path

from fmg.core.cache import content_hash
from fmg.core.errors import CheckpointError, UsageError, suggestion
from fmg.core.files import OLD, digest, leftovers, write_atomic
from fmg.data.run_folder import is_run
from fmg.inference.artifact.external_data import check_external
from fmg.inference.artifact.manifest import MANIFEST, Check, FileEntry, Graph, Manifest
from fmg.inference.artifact.manifest_io import MAX_BYTES, from_json, to_json

EXPORTED = "artifact"
"""Name of the artifact in the folder of its run."""
BASE_WEIGHTS = "base.safetensors"
ENGINES = "engines"
TOKENIZERS = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
TOKENIZER_FILE = "tokenizer.json"
# what `fmg push` and the hub add, and `hf download` brings
_OF_THE_HUB = ("README.md", ".gitattributes", ".cache")


def artifact_of(named: str | PathLike[str]) -> Path:
    """The given folder, or the artifact in the folder of a run.

    Raises:
        UsageError: a run that has not been exported.
    """
    folder = Path(named)
    if is_artifact(folder) or not is_run(folder):
        return folder
    if not is_artifact(folder / EXPORTED):
        run = shlex.quote(str(folder))
        raise UsageError(f"The run '{folder}' has no artifact", f"Export it first: fmg export {run}")
    return folder / EXPORTED


def graph_file(graph: str) -> str:
    """The ONNX file of a graph."""
    return f"{graph}.onnx"


def weights_file(graph: str) -> str:
    """The weight file of a graph."""
    return f"{graph}.safetensors"


@dataclass(frozen=True, repr=False)
class Artifact:
    """An artifact whose manifest has been read. It can be used wherever a path can."""

    folder: Path
    manifest: Manifest

    def __fspath__(self) -> str:
        return str(self.folder)

    def __repr__(self) -> str:
        facts = self.manifest
        adapter = "" if facts.adapter is None else f" with the adapter of {facts.adapter.run}"
        return f"Artifact('{self.folder}': {facts.model.name}{adapter}, {facts.precision})"

    def path(self, name: str) -> Path:
        """A listed file.

        Raises:
            CheckpointError: it is missing, a link, or leads out of the artifact.
        """
        path = self.folder / name
        inside = self.folder.resolve()
        steps = [path, *(parent for parent in path.parents if parent != self.folder and self.folder in parent.parents)]
        if any(step.is_symlink() for step in steps) or not path.resolve().is_relative_to(inside):
            raise CheckpointError(
                f"{path} is a link, which an artifact must not contain",
                f"Copy the files that the links point to, `cp -rL {self.folder} COPY`, or download with `--local-dir`.",
            )
        if not path.is_file():
            raise CheckpointError(f"{path} is missing", "Restore the artifact, or export it again.")
        return path

    def graph(self, name: str) -> Graph:
        """The graph called `name`.

        Raises:
            UsageError: the artifact has no such graph.
        """
        if name not in self.manifest.graphs:
            raise UsageError(
                f"The artifact {self.folder} has no graph '{name}'",
                f"It has {', '.join(self.manifest.graphs)}; export again for another.",
            )
        return self.manifest.graphs[name]

    def onnx(self, name: str) -> Path:
        """The ONNX file of a graph, after checking that its weight files exist and that it points into no other.

        Raises:
            UsageError: the artifact has no such graph.
            CheckpointError: a file is missing or a link, or the graph has weights elsewhere.
        """
        file, weights = self.path(self.graph(name).file), self.manifest.weight_files(name)
        for stored in weights:
            self.path(stored)
        check_external(file, *weights)
        return file

    @property
    def engines(self) -> Path:
        """Where engines are kept; need not exist."""
        return self.folder / ENGINES

    def check_sizes(self, names: Iterable[str] | None = None) -> None:
        """Checks that files exist with the manifest's sizes; None: all files.

        Raises:
            CheckpointError: naming the first that is missing, is a link, or has a different size.
        """
        for name, entry in self._entries(names):
            path = self.path(name)
            if (size := path.stat().st_size) != entry.size:
                raise CheckpointError(
                    f"{path} has {size} bytes, but the manifest says {entry.size}", "Copy or export the artifact again."
                )

    def check_hashes(self, names: Iterable[str] | None = None, *, afresh: bool = False) -> None:
        """Checks the contents of files against the manifest; None: all files.

        Args:
            names: which files.
            afresh: read every byte, even of a file whose hash is cached and that is unchanged according to the file
                system.

        Raises:
            CheckpointError: naming the first that is missing, is a link, or has different content.
        """
        self.check_sizes(names)
        for name, entry in self._entries(names):
            path = self.path(name)
            if (digest(path) if afresh else content_hash(path)) != entry.sha256:
                raise CheckpointError(
                    f"{path} is not the file that was exported: its sha256 differs from the manifest",
                    "Copy the artifact again from where it was made, or export it again.",
                )

    def check_listed(self) -> None:
        """Checks that the folder has no files besides the manifest, the files it lists, and engines.

        Raises:
            CheckpointError: naming the first other file.
        """
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            apart = (
                name.parts[0] in (ENGINES, *_OF_THE_HUB)
                or str(name) == MANIFEST
                or name.as_posix() in self.manifest.files
            )
            if not apart and (path.is_symlink() or not path.is_dir()):
                raise CheckpointError(
                    f"{path} is not in the manifest, which lists every file of the artifact",
                    "Move it away, or copy the artifact again from where it was made.",
                )

    def with_checks(self, checks: Iterable[Check]) -> Artifact:
        """Adds checks to the manifest, on disk as well, replacing older ones of the same name.

        Raises:
            CheckpointError: the artifact on disk has changed; nothing is written.
        """
        current = _read_manifest(self.folder)
        if replace(current, checks=()) != replace(self.manifest, checks=()):
            raise CheckpointError(f"{self.folder} changed while it was being verified", "Run fmg verify again.")
        added = tuple(checks)
        names = {check.name for check in added}
        kept = tuple(check for check in current.checks if check.name not in names)
        manifest = replace(current, checks=(*kept, *added))
        write_manifest(self.folder, manifest)
        return Artifact(self.folder, manifest)

    def _entries(self, names: Iterable[str] | None) -> list[tuple[str, FileEntry]]:
        files = self.manifest.files
        return list(files.items()) if names is None else [(name, files[name]) for name in names]


def is_artifact(folder: str | Path) -> bool:
    """Whether a folder looks like an artifact."""
    return (Path(folder) / MANIFEST).is_file()


def artifact_names() -> list[str]:
    """The artifacts at the default places of `fmg export`: in runs, and of models in `artifacts`."""
    places = [*sorted(Path("runs").glob("*/artifact")), *sorted(Path("artifacts").glob("*"))]
    return [str(place) for place in places if is_artifact(place)]


def open_artifact(folder: str | Path, *, hashes: bool = True) -> Artifact:
    """Reads the manifest and checks the files.

    Args:
        folder: what `fmg export` made.
        hashes: compare contents (cached for files that do not change), not only sizes.

    Raises:
        CheckpointError: it is not an artifact or has a newer schema; a file is missing, a link or not the exported one;
            or a killed swap left it under another name.
    """
    root = Path(folder)
    artifact = Artifact(root, _read_manifest(root))
    if hashes:
        artifact.check_hashes()
    else:
        artifact.check_sizes()
    return artifact


def check_not_interrupted(folder: str | Path) -> None:
    """Checks that no killed swap is the reason why a folder is missing.

    Raises:
        CheckpointError: naming the folder with the old contents.
    """
    place = Path(folder)
    if not place.exists() and (left := leftovers(place, OLD)):
        raise CheckpointError(
            f"{place} is missing: an interrupted swap left '{left[0].name}'",
            f"Rename it back to '{place.name}', or swap again.",
        )


def _read_manifest(folder: Path) -> Manifest:
    """The manifest on disk; errors as in `open_artifact`."""
    check_not_interrupted(folder)
    if not is_artifact(folder):
        known = artifact_names()
        fix = f"Name a folder that fmg export made. {suggestion(str(folder), known) if known else ''}"
        raise CheckpointError(f"{folder} is not an artifact: it has no {MANIFEST}", fix)
    with (folder / MANIFEST).open("rb") as file:
        return from_json(file.read(MAX_BYTES + 1), folder / MANIFEST)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` in one step."""
    write_atomic(folder / MANIFEST, to_json(manifest).encode())


def file_entry(path: Path) -> FileEntry:
    """The manifest's entry of a file."""
    return FileEntry(digest(path), path.stat().st_size)
