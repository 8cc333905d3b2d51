"""What an engine was built from: its cache key, the JSON file beside the plan, and whether a plan fits a machine."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fmg.core.cache import content_hash
from fmg.core.errors import CheckpointError
from fmg.core.json_io import read_json
from fmg.inference.artifact.decode import decode, encode
from fmg.inference.artifact.layout import ENGINES
from fmg.inference.tensorrt.flavours import ANY, Flavour, Gpu

KEY_LENGTH = 12

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

    def admits(self, shapes: Mapping[str, Shape]) -> bool:
        """Whether inputs of these shapes lie in its ranges."""
        return shapes.keys() == self.shapes.keys() and all(
            self.shapes[name].admits(shape) for name, shape in shapes.items()
        )


@dataclass(frozen=True)
class Ingredients:
    """Everything that decides what an engine is. The engine's own bytes differ from build to build and are not in it.

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
        """sha256 over all of them, hexadecimal."""
        text = json.dumps(encode(self), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class EngineRecord:
    """The sidecar `<graph>-<key>.json` of a plan.

    Attributes:
        schema: version of this layout.
        key: cache key, `ingredients.key()`.
        graph: name of the graph, such as `transformer`.
        plan: file name of the plan.
        size, sha256: of the plan, to notice a damaged file.
        ingredients: what it was built from.
        precision: what the artifact's manifest says of the graph.
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
        """Whether the plan has a runtime of its own inside."""
        return bool(self.ingredients.options.get("version_compatible"))

    def to_json(self) -> str:
        """The text of the sidecar."""
        return json.dumps(encode(self), indent=2) + "\n"

    def fits(self, flavour: Flavour, version: str, gpu: Gpu | None) -> str:
        """Why the plan cannot run here; empty when nothing speaks against it.

        The runtime has the last word: an engine that was built ahead of time names no GPU.
        """
        made = self.ingredients
        if made.flavour != flavour.name:
            return f"built with {made.flavour}"
        if made.version != version and not made.options.get("version_compatible"):
            return f"built with version {made.version}, and {version} is here"
        if gpu is None:
            return "no GPU is here"
        return "" if _same_hardware(made, gpu) else f"built for {made.gpu} ({made.capability}), and {gpu.name} is here"


def engine_name(graph: str, key: str) -> str:
    """File name of a plan and its sidecar without the suffix."""
    return f"{graph}-{key[:KEY_LENGTH]}"


def read_record(path: Path) -> EngineRecord:
    """The sidecar at `path`.

    Raises:
        CheckpointError: it is damaged, of another schema, or names a plan outside its folder.
    """
    fix = "Delete it with its plan, and build the engine again: fmg export --trt."
    try:
        record = decode(EngineRecord, read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no record of an engine: {error}", fix) from None
    if record.plan != f"{path.stem}.plan" or record.key != record.ingredients.key():
        raise CheckpointError(f"{path} contradicts itself: its plan or key is not what its content gives", fix)
    return record


def read_records(artifact: Path) -> list[EngineRecord]:
    """Records of all engines of an artifact, in the order of their names.

    Raises:
        CheckpointError: as `read_record`.
    """
    return [read_record(path) for path in sorted((artifact / ENGINES).glob("*.json"))]


def check_plan(folder: Path, record: EngineRecord) -> Path:
    """The plan of a record, after its size and hash were compared.

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


def _same_hardware(made: Ingredients, gpu: Gpu) -> bool:
    if made.gpu == ANY:
        return True
    level = made.options.get("hardware", "none")
    if level == "ampere-plus":
        return float(gpu.capability) >= 8.0
    if level == "same-capability":
        return made.capability == gpu.capability
    return (made.gpu, made.capability) == (gpu.name, gpu.capability)
