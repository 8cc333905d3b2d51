"""What each engine of an artifact was built from: the JSON file beside its plan, and which plans fit this machine.

A plan is equivalent to a program: TensorRT deserialises it without a check, and no hash in the manifest covers it,
because engines are added to an artifact later and two builds differ. So the sha256 of every plan that is built here is
noted outside the artifact, in fmg's cache, where the sender of an artifact cannot write.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from fmg.core.cache import cache_dir, content_hash
from fmg.core.errors import CheckpointError, UsageError, reason
from fmg.core.json_io import read_json
from fmg.inference.artifact.decode import decode
from fmg.inference.artifact.layout import ENGINES, Artifact
from fmg.inference.artifact.manifest import HEIGHT, IMAGE, PACKED, TEXT, TEXT_ENCODER_2, WIDTH, Manifest, TensorSpec
from fmg.inference.tensorrt.flavours import ANY, Flavour, Gpu, has_fp8

KEY_LENGTH = 12
_SHA256 = re.compile(r"[0-9a-f]{64}")

Shape = tuple[int, ...]


@dataclass(frozen=True)
class ShapeRange:
    """Smallest, best-tuned and largest shape of one input."""

    minimum: Shape
    optimum: Shape
    maximum: Shape

    def admits(self, shape: Shape) -> bool:
        """Whether `shape` has the right rank and every axis lies between minimum and maximum."""
        return len(shape) == len(self.minimum) and all(
            low <= size <= high for low, size, high in zip(self.minimum, shape, self.maximum, strict=True)
        )


@dataclass(frozen=True)
class Profile:
    """An optimization profile: what it is for, such as `512px`, and the shapes of every input of the graph."""

    name: str
    shapes: Mapping[str, ShapeRange]


@dataclass(frozen=True)
class Ingredients:
    """Everything that determines an engine, except its bytes, which differ from build to build.

    Attributes:
        onnx: sha256 of the graph file.
        weights: sha256 of the weight file that the graph points into.
        profiles: in the order of their index.
        options: options of the builder, as plain JSON values.
        flavour: `tensorrt` or `rtx`.
        version: version of the TensorRT package.
        gpu, capability: the GPU that it was built on; `any` for an engine built ahead of time.
        driver: major version of the driver there; `any` as above.
        polygraphy: version of Polygraphy.
    """

    onnx: str
    weights: str
    profiles: tuple[Profile, ...]
    options: Mapping[str, object]
    flavour: str
    version: str
    gpu: str
    capability: str
    driver: str
    polygraphy: str

    def key(self) -> str:
        """Sha256 over all of them, hexadecimal."""
        text = json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class EngineHost:
    """What engines must match: the flavour of TensorRT, its version, and the GPU."""

    flavour: Flavour
    version: str
    gpu: Gpu | None


@dataclass(frozen=True)
class EngineRecord:
    """The sidecar `<graph>-<key>.json` of a plan.

    Attributes:
        schema: version of this layout.
        key: cache key, `ingredients.key()`.
        graph: name of the graph, such as `transformer`.
        plan: file name of the plan.
        size, sha256: of the plan, to notice a damaged file.
        ingredients: the inputs of its build.
        precision: precision of the graph in the artifact's manifest.
        layers: layers of the parsed network by kind and dtype, such as `{"MATRIX_MULTIPLY": {"BF16": 304}}`.
        seconds: how long the build took.
    """

    schema: Literal[1]
    key: str
    graph: str
    plan: str
    size: int
    sha256: str
    ingredients: Ingredients
    precision: str
    layers: Mapping[str, Mapping[str, int]]
    seconds: float

    @property
    def carries_code(self) -> bool:
        """Whether the plan contains its own runtime."""
        return bool(self.ingredients.options.get("version_compatible"))

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"

    def misfit(self, host: EngineHost) -> str:
        """Why the plan cannot run on this host; empty when nothing is known against it.

        The runtime has the last word: an engine that was built ahead of time names no GPU.
        """
        made = self.ingredients
        if made.flavour != host.flavour.name:
            return f"was built with {made.flavour}"
        if made.version != host.version and not made.options.get("version_compatible"):
            return f"was built with version {made.version}, but {host.version} is installed"
        if host.gpu is None:
            return "cannot run: there is no GPU here"
        if self.precision == "fp8" and not has_fp8(host.gpu):
            return f"is fp8, which {host.gpu.name} (compute capability {host.gpu.capability}) does not support"
        if not _same_hardware(made, host.gpu):
            return f"was built for {made.gpu} ({made.capability}), but this machine has {host.gpu.name}"
        return ""


def _same_hardware(made: Ingredients, gpu: Gpu) -> bool:
    if made.gpu == ANY:
        return True
    level = made.options.get("hardware", "none")
    if level == "ampere-plus":
        return float(gpu.capability) >= 8.0
    if level == "same-capability":
        return made.capability == gpu.capability
    return (made.gpu, made.capability) == (gpu.name, gpu.capability)


def engine_name(graph: str, key: str) -> str:
    """File name of a plan and its sidecar without the suffix."""
    return f"{graph}-{key[:KEY_LENGTH]}"


def read_record(path: Path) -> EngineRecord:
    """The sidecar at `path`.

    Raises:
        CheckpointError: it is damaged, has an unsupported schema, or names a plan outside its folder.
    """
    fix = "Delete it with its plan, and build the engine again: fmg export --trt."
    try:
        record = decode(EngineRecord, read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a record of an engine: {reason(error)}", fix) from None
    if record.plan != f"{path.stem}.plan" or record.key != record.ingredients.key():
        raise CheckpointError(f"{path} is inconsistent: its plan or key does not match its content", fix)
    return record


def read_records(artifact: Path) -> list[EngineRecord]:
    """Records of all engines of an artifact, sorted by name. Errors as `read_record`."""
    return [read_record(path) for path in sorted((artifact / ENGINES).glob("*.json"))]


def check_plan(folder: Path, record: EngineRecord) -> Path:
    """The plan of a record, after a check of its size and hash.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    path = folder / record.plan
    fix = "Build it again: fmg export --trt."
    if not path.is_file():
        raise CheckpointError(f"The engine {path} is missing", fix)
    if path.stat().st_size != record.size or content_hash(path) != record.sha256:
        raise CheckpointError(f"The engine {path} is damaged: its hash is not the one in its record", fix)
    return path


def fitting_engines(artifact: Artifact, host: EngineHost, resolution: int | None = None) -> Mapping[str, EngineRecord]:
    """An engine for every graph. One built from the artifact's present weights is preferred to a refittable one.

    Args:
        artifact: the artifact.
        host: where the engines will run.
        resolution: side of the image in pixels; None takes the artifact's own.

    Raises:
        UsageError: some graph has no engine that fits; says why.
        CheckpointError: a record is damaged.
    """
    records = read_records(artifact.folder)
    return {graph: _fitting(artifact, graph, records, host, resolution) for graph in artifact.manifest.required}


def needs_refit(artifact: Artifact, record: EngineRecord) -> bool:
    """Whether an engine was built from different weights than the artifact has now."""
    return record.ingredients.weights != artifact.manifest.weights_digest(record.graph)


def _fitting(
    artifact: Artifact, graph: str, records: list[EngineRecord], host: EngineHost, resolution: int | None
) -> EngineRecord:
    of_flavour = [r for r in records if r.graph == graph and r.ingredients.flavour == host.flavour.name]
    reasons = {record.plan: _misfit(artifact, record, host, resolution) for record in of_flavour}
    fitting = [record for record in of_flavour if not reasons[record.plan]]
    if fitting:
        return min(fitting, key=lambda record: needs_refit(artifact, record))
    why = "; ".join(f"{plan} {reason}" for plan, reason in reasons.items())
    raise UsageError(
        f"The artifact {artifact.folder} has no {host.flavour.backend} engine of '{graph}' that fits here"
        f"{f': {why}' if why else ''}",
        f"Build one: fmg export --trt --flavour {host.flavour.name}, or use --backend onnxruntime.",
    )


def _misfit(artifact: Artifact, record: EngineRecord, host: EngineHost, resolution: int | None) -> str:
    manifest = artifact.manifest
    entry = manifest.graphs[record.graph]
    made = record.ingredients
    if made.onnx != manifest.files[entry.file].sha256:
        return "was built from another graph"
    if needs_refit(artifact, record) and not made.options.get("refittable"):
        return "was built from other weights"
    if reason := record.misfit(host):
        return reason
    side = resolution or manifest.sampling.resolution
    covered = any(_covers(profile, entry.inputs, sizes_of(manifest, side)) for profile in made.profiles)
    return "" if covered else f"has no profile for {side} px"


def sizes_of(manifest: Manifest, side: int) -> dict[str, int]:
    """Sizes of the dynamic axes of graphs for square images of this side; empty for graphs of one size."""
    if manifest.schema != PACKED:
        return {}
    _, height, width = manifest.sampling.latent_shape(side)
    text = manifest.tokenizers[TEXT_ENCODER_2].length
    return {IMAGE: manifest.sampling.image_tokens(side), HEIGHT: height, WIDTH: width, TEXT: text}


def _covers(profile: Profile, inputs: tuple[TensorSpec, ...], fixed: Mapping[str, int]) -> bool:
    """Whether a profile has an engine's inputs with these sizes of named axes, at any batch size."""
    for spec in inputs:
        if spec.name not in profile.shapes:
            return False
        allowed = profile.shapes[spec.name]
        # an axis that is neither a number nor in `fixed` is the batch, which runtimes cut to what fits
        shape = tuple(
            axis if isinstance(axis, int) else fixed.get(axis, low)
            for axis, low in zip(spec.shape, allowed.minimum, strict=True)
        )
        if not allowed.admits(shape):
            return False
    return True


def note_built(digest: str) -> None:
    """Notes that the plan with this sha256 was built here.

    Raises:
        OSError: the cache cannot be written.
    """
    note = _notes() / digest
    note.parent.mkdir(parents=True, exist_ok=True)
    note.touch()


def built_here(digest: str) -> bool:
    """Whether the plan with this sha256 was built here, according to the cache."""
    # a digest comes from a record that anyone may have written, and becomes a path
    return _SHA256.fullmatch(digest) is not None and (_notes() / digest).is_file()


def _notes() -> Path:
    return cache_dir() / "tensorrt" / "built"
