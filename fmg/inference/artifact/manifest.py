"""`manifest.json` of an artifact: what its files are and how its graphs want to be sampled. Standard library only.

Tensors of every graph are float32 or int64 at its borders, whatever the precision inside: numpy has no bfloat16, and
one border serves every runtime. Times and guidance enter unscaled; the graph multiplies them by `time_scale`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from fmg.core.errors import CheckpointError
from fmg.inference.artifact.decode import DecodeError, decode, encode

SCHEMA = 1
MANIFEST = "manifest.json"

TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
TRANSFORMER = "transformer"
TRANSFORMER_INT8 = "transformer_int8"
VAE_DECODER = "vae_decoder"
GRAPHS = (TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER)
"""The graphs that every artifact has; `transformer_int8` is optional and takes the place of `transformer` on a CPU."""

BATCH, IMAGE, TEXT, HEIGHT, WIDTH, PIXEL_HEIGHT, PIXEL_WIDTH = (
    "batch",
    "image",
    "text",
    "height",
    "width",
    "pixel_height",
    "pixel_width",
)
"""Names of dynamic axes: rows, packed image tokens, T5 tokens, latent rows and columns, image rows and columns."""

Precision = Literal["fp32", "bf16", "fp16", "int8"]


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: hexadecimal sha256 and bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class AxisRange:
    """Sizes that a dynamic axis may have, both ends included, and the one to optimise for."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"the range {self.minimum}:{self.optimum}:{self.maximum} does not rise from 1")


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. `shape` has a number for a fixed axis, a name of `Manifest.axes` for another."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """One ONNX graph.

    Attributes:
        file: the ONNX file.
        weights: the safetensors file that its external data points into.
        precision: of its weights and of the arithmetic inside.
        inputs, outputs: in the order of the graph.
    """

    file: str
    weights: str
    precision: Precision
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class TokenizerFacts:
    """How prompts become the `input_ids` of a text encoder.

    Attributes:
        file: a `tokenizer.json` of the tokenizers library, with special tokens and without padding or truncation.
        length: tokens that are padded and cut to.
        pad_id: id that fills up on the right.
        pad_token: its text.
    """

    file: str
    length: int
    pad_id: int
    pad_token: str


@dataclass(frozen=True)
class ModelFacts:
    """The model: its registered name, and the diffusers configs of transformer and autoencoder."""

    name: str
    transformer: Mapping[str, object]
    vae: Mapping[str, object]


@dataclass(frozen=True)
class Sampling:
    """How the transformer wants to be sampled.

    Attributes:
        map: whether the transformer takes a target time.
        path: probability path of the latents.
        time_scale: factor on times and guidance before their sinusoids, applied inside the graph.
        second_time: what the graph makes of `t` and `second`; for information, `second` is always the target time.
        guidance: embedded guidance scale, or None for a graph without that input.
        latent_channels: channels of a latent; its sides are those of the image divided by `latent_scale`.
        latent_scale: image pixels along the side of one latent pixel.
        resolution: side of the square image in pixels when nothing else is asked for.
        resolutions: sides that the artifact was made for, smallest first.
        grid: name of the time grid, or its times from 1 to 0.
        steps: network calls when nothing else is asked for.
    """

    map: Literal["two-time", "single-time"]
    path: Literal["linear", "trig"]
    time_scale: float
    second_time: Literal["none", "duration", "target"]
    guidance: float | None
    latent_channels: int
    latent_scale: int
    resolution: int
    resolutions: tuple[int, ...]
    grid: str | tuple[float, ...]
    steps: int

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of one latent of a square image; None: of the default resolution."""
        side = (resolution or self.resolution) // self.latent_scale
        return self.latent_channels, side, side

    def image_tokens(self, resolution: int | None = None) -> int:
        """Packed tokens of one square image: latents are packed two by two."""
        _, height, width = self.latent_shape(resolution)
        return (height // 2) * (width // 2)


@dataclass(frozen=True)
class Base:
    """The weights under the adapter.

    Attributes:
        name: registered name of the model.
        digest: sha256 of its stored transformer, whatever the shards.
        dtypes: that its transformer is stored in, by torch's names, sorted.
        weights: the file that keeps what the adapter changed, as the base stores it, so that `fmg export
            --swap-weights` needs nothing but the artifact; None when nothing was changed.
    """

    name: str
    digest: str
    dtypes: tuple[str, ...]
    weights: str | None


@dataclass(frozen=True)
class Adapter:
    """What was merged: sha256 of the adapter's files, its geometry, and the run that it came from.

    `scale` is what multiplies B A, `alpha / rank`.
    """

    digest: str
    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    run: str


@dataclass(frozen=True)
class Check:
    """One proof that was made: its name, whether it held, what was measured and allowed, and on which weights.

    `weights` is the sha256 of the weight file of the graph that it is about; of a check of whole pictures,
    `Manifest.drawing_digest` at that time.
    """

    name: str
    passed: bool
    values: Mapping[str, float]
    note: str
    weights: str


@dataclass(frozen=True)
class Manifest:
    """All of `manifest.json`.

    Attributes:
        schema: version of this layout.
        files: every file of the artifact except this one and `engines/`, by its path with forward slashes.
        model: what was exported.
        sampling: how to sample it.
        precision: what was asked for; each graph states its own.
        opset: of the default ONNX domain.
        axes: ranges of the dynamic axes by name.
        graphs: by the names of `GRAPHS`.
        tokenizers: by the name of the text encoder that they feed.
        base: the weights under the adapter.
        adapter: what was merged into them; None for the base itself.
        rewards: the recipe's rewards, each with its name, weight and options, to repeat the proof of equal reward.
        prompts: the recipe's prompt sets, by their role.
        libraries: versions that wrote the artifact.
        checks: proofs, the newest of each name.
    """

    schema: Literal[1]
    files: Mapping[str, FileEntry]
    model: ModelFacts
    sampling: Sampling
    precision: Precision
    opset: int
    axes: Mapping[str, AxisRange]
    graphs: Mapping[str, Graph]
    tokenizers: Mapping[str, TokenizerFacts]
    base: Base
    adapter: Adapter | None
    rewards: tuple[Mapping[str, object], ...]
    prompts: Mapping[str, object]
    libraries: Mapping[str, str]
    checks: tuple[Check, ...]

    def weights_digest(self, graph: str = TRANSFORMER) -> str:
        """Sha256 of the weight file of a graph."""
        return self.files[self.graphs[graph].weights].sha256

    def drawing_digest(self) -> str:
        """Sha256 of everything that a picture depends on: all files, and how they are sampled."""
        text = json.dumps([encode(self.files), encode(self.sampling), encode(self.tokenizers)], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`."""
    return json.dumps(encode(manifest), indent=2) + "\n"


def from_json(text: str | bytes, origin: Path) -> Manifest:
    """A manifest from its text; `origin` is the file that error messages name.

    Raises:
        CheckpointError: it is no JSON, of a newer schema, lacks a key or has an unknown one, names a path outside the
            artifact, or refers to a file, graph or axis that it does not list.
    """
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise _unusable(origin, f"it is not JSON ({error})") from None
    if not isinstance(raw, dict) or type(raw.get("schema")) is not int:
        raise _unusable(origin, "it does not state its schema")
    if raw["schema"] > SCHEMA:
        raise CheckpointError(
            f"{origin} has schema {raw['schema']}, and this fmg reads up to {SCHEMA}",
            "Export the artifact again with this one, or upgrade fmg.",
        )
    try:
        manifest = decode(Manifest, raw)
        _check_paths(manifest)
        _check_references(manifest)
    except DecodeError as error:
        raise _unusable(origin, str(error)) from None
    return manifest


def _check_paths(manifest: Manifest) -> None:
    for name in manifest.files:
        path = PurePosixPath(name)
        unusual = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name or "\0" in name
        if unusual or name != str(path) or name in (MANIFEST, "."):
            raise DecodeError(f"files has the path {name!r}, which is not inside the artifact")


def _check_references(manifest: Manifest) -> None:
    if absent := [name for name in GRAPHS if name not in manifest.graphs]:
        raise DecodeError(f"graphs.{absent[0]} is missing")
    if absent := [name for name in (TEXT_ENCODER, TEXT_ENCODER_2) if name not in manifest.tokenizers]:
        raise DecodeError(f"tokenizers.{absent[0]} is missing")
    named = [graph.file for graph in manifest.graphs.values()]
    named += [graph.weights for graph in manifest.graphs.values()]
    named += [tokenizer.file for tokenizer in manifest.tokenizers.values()]
    named += [] if manifest.base.weights is None else [manifest.base.weights]
    if absent := [name for name in named if name not in manifest.files]:
        raise DecodeError(f"files does not list {absent[0]!r}")
    for name, graph in manifest.graphs.items():
        axes = {axis for spec in (*graph.inputs, *graph.outputs) for axis in spec.shape if isinstance(axis, str)}
        if unknown := sorted(axes - manifest.axes.keys()):
            raise DecodeError(f"axes.{unknown[0]} is missing, which graphs.{name} has")


def _unusable(origin: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{origin} cannot be used: {reason}", "Restore the artifact, or export it again.")
