"""`manifest.json` of an artifact: what its files are and how its graphs are sampled. Standard library only.

Inputs and outputs of every graph are float32 or int64, whatever the precision inside: numpy has no bfloat16, and so
one signature serves every runtime. Times and guidance enter unscaled; the graph multiplies them by `time_scale`.

A manifest can come from anyone: every class refuses unusable values with a ValueError.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Literal

from fmg.core.prompt import PromptForm
from fmg.core.specs import MAX_ROWS, MAX_SIDE, MapKind
from fmg.flow.grids import MAX_STEPS

PACKED: Literal[1] = 1
LATENT: Literal[2] = 2
"""Schemas: FLUX, whose sampler packs latents into tokens and knows both text encoders; and every other family, whose
graphs take latents, and the outputs of one graph of all its text encoders."""
SCHEMA = 2
MANIFEST = "manifest.json"

TEXT_ENCODER = "text_encoder"
TEXT_ENCODER_2 = "text_encoder_2"
TRANSFORMER = "transformer"
TRANSFORMER_INT8 = "transformer_int8"
VAE_DECODER = "vae_decoder"
TEXT_ENCODERS = "text_encoders"
SAMPLER = "sampler"
GRAPHS = (TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, VAE_DECODER)
"""The graphs of every artifact of FLUX."""
LATENT_GRAPHS = (TEXT_ENCODERS, TRANSFORMER, VAE_DECODER)
"""The graphs of every other artifact."""
OPTIONAL_GRAPHS = (TRANSFORMER_INT8, SAMPLER)
"""In any artifact: `transformer_int8` takes the place of `transformer` on a CPU, and `sampler` is all steps of the
transformer and the decoder in one graph.
"""

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

Precision = Literal["fp32", "bf16", "fp16", "fp8", "int8"]

MAX_LENGTH = 4096
"""Maximum tokens of a prompt."""
MAX_FILES = 1000
"""Maximum number of files that a manifest lists."""
_MAX_CHANNELS = 1024
_MAX_SCALE = 64
# 256 MB: sixteen channels at the largest side and FLUX's scale of eight
_MAX_LATENT = 2**26
_MAX_AXES = {BATCH: MAX_ROWS, TEXT: MAX_LENGTH} | dict.fromkeys((HEIGHT, WIDTH, PIXEL_HEIGHT, PIXEL_WIDTH), MAX_SIDE)
_MAX_SIZE = 2**31 - 1
_MAX_GUIDANCE = 1e6
_MAX_TIME_SCALE = 1e6
# latents are packed two by two
_PACKED = 2


@dataclass(frozen=True)
class FileEntry:
    """A file of the artifact: sha256 in hexadecimal, and size in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class AxisRange:
    """Sizes that a dynamic axis may have, inclusive, and the size to optimise for."""

    minimum: int
    optimum: int
    maximum: int

    def __post_init__(self) -> None:
        if not 1 <= self.minimum <= self.optimum <= self.maximum:
            raise ValueError(f"the range {self.minimum}:{self.optimum}:{self.maximum} does not increase from 1 or more")
        _check_within("maximum", self.maximum, 1, _MAX_SIZE)


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of a graph. `shape` has a number for a fixed axis and a name of `Manifest.axes` for others."""

    name: str
    dtype: Literal["float32", "int64"]
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        for size in self.shape:
            if isinstance(size, int):
                _check_within("an axis", size, 1, _MAX_SIZE)


@dataclass(frozen=True)
class Graph:
    """One ONNX graph.

    Attributes:
        file: the ONNX file.
        weights: the safetensors file that its external data points into; the sampler also points into the decoder's.
        precision: precision of its weights and of the arithmetic inside.
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
        length: tokens that prompts are padded and truncated to.
        pad_id: id of the padding, which is on the right.
        pad_token: its text.
    """

    file: str
    length: int
    pad_id: int
    pad_token: str

    def __post_init__(self) -> None:
        _check_within("length", self.length, 1, MAX_LENGTH)
        _check_within("pad_id", self.pad_id, 0, _MAX_SIZE)

    @property
    def form(self) -> PromptForm:
        """The text that is read for a prompt."""
        return PromptForm()

    @property
    def side(self) -> Literal["left", "right"]:
        """Where the padding goes."""
        return "right"


@dataclass(frozen=True)
class FormedTokenizerFacts(TokenizerFacts):
    """A tokenizer of schema 2.

    Attributes:
        prefix, suffix, lower, strip: as in `PromptForm`.
        padding: where the padding goes.
        mask: whether the graph also takes the mask of the tokens.
    """

    prefix: str
    suffix: str
    lower: bool
    strip: bool
    padding: Literal["left", "right"]
    mask: bool

    @property
    def form(self) -> PromptForm:
        return PromptForm(self.prefix, self.suffix, self.lower, self.strip)

    @property
    def side(self) -> Literal["left", "right"]:
        return self.padding


@dataclass(frozen=True)
class ModelFacts:
    """The model: its registered name, and the diffusers configs of transformer and autoencoder.

    `options` are those of the recipe's model that the graphs depend on, so that only adapters of the same can be
    swapped in. Schema 1 has none: its transformer and its sampling say it all; earlier versions wrote none.
    """

    name: str
    transformer: Mapping[str, object]
    vae: Mapping[str, object]
    options: Mapping[str, object] | None = None


@dataclass(frozen=True)
class Sampling:
    """How the transformer is sampled.

    Attributes:
        map: what the transformer predicts; a two-time map takes a target time.
        path: probability path of the latents.
        time_scale: factor on times and guidance before their sinusoids, applied inside the graph.
        second_time: what the graph computes from `t` and `second`; for information, as `second` is always the target.
        guidance: embedded guidance scale, or None for a graph without that input.
        latent_channels: channels of a latent; its sides are those of the image divided by `latent_scale`.
        latent_scale: image pixels along the side of one latent pixel.
        resolution: default side of the square image in pixels.
        resolutions: supported sides, smallest first.
        grid: name of the time grid, or its times from 1 to 0.
        steps: default number of sampling steps (NFE).
    """

    map: MapKind
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

    def __post_init__(self) -> None:
        _check_within("time_scale", self.time_scale, 1 / _MAX_TIME_SCALE, _MAX_TIME_SCALE)
        if self.guidance is not None:
            _check_within("guidance", self.guidance, 0, _MAX_GUIDANCE)
        if (self.map == "two-time") != (self.second_time != "none"):
            raise ValueError(f"a {self.map} map cannot have second_time '{self.second_time}'")
        _check_within("latent_channels", self.latent_channels, 1, _MAX_CHANNELS)
        _check_within("latent_scale", self.latent_scale, 1, _MAX_SCALE)
        _check_within("steps", self.steps, 1, MAX_STEPS)
        self._check_resolutions()
        if not isinstance(self.grid, str):
            _check_times(self.grid)

    def _check_resolutions(self) -> None:
        if not self.resolutions or any(small >= large for small, large in pairwise(self.resolutions)):
            raise ValueError(f"the resolutions {_listed(self.resolutions)} do not increase")
        token = self.latent_scale * _PACKED
        for side in self.resolutions:
            _check_within("a resolution", side, token, MAX_SIDE)
            if side % token:
                raise ValueError(f"the resolution {side!s:.30} is not a multiple of {token}, the side of a token")
        if self.resolution not in self.resolutions:
            raise ValueError(f"the resolution {self.resolution!s:.30} is not one of {_listed(self.resolutions)}")
        channels, height, width = self.latent_shape(self.resolutions[-1])
        _check_within("a latent", channels * height * width, 1, _MAX_LATENT)

    def latent_shape(self, resolution: int | None = None) -> tuple[int, int, int]:
        """(c, h, w) of one latent of a square image; None: of the default resolution."""
        side = (resolution or self.resolution) // self.latent_scale
        return self.latent_channels, side, side

    def image_tokens(self, resolution: int | None = None) -> int:
        """Packed tokens of one square image: latents are packed two by two."""
        _, height, width = self.latent_shape(resolution)
        return (height // _PACKED) * (width // _PACKED)


@dataclass(frozen=True)
class Base:
    """The weights under the adapter.

    Attributes:
        name: registered name of the model.
        digest: sha256 of its stored transformer, whatever the shards.
        dtypes: dtypes in which its transformer is stored, by torch's names, sorted.
        weights: the file with the base's values of what the adapter changed, so that `fmg export --swap-weights`
            needs nothing but the artifact; None when nothing was changed.
        options: options of the model, such as a folder, that differ from those of its default recipe; None for none.
    """

    name: str
    digest: str
    dtypes: tuple[str, ...]
    weights: str | None
    options: Mapping[str, object] | None = None


@dataclass(frozen=True)
class AdapterPart:
    """One of several adapters that were added up: its run, sha256 of its files, and the factor on what it changes."""

    run: str
    digest: str
    weight: float


@dataclass(frozen=True)
class Adapter:
    """What was merged: sha256 of the adapter's files, its geometry, and the run that it came from.

    `scale` is what multiplies B A, `alpha / rank`. `parts` are the adapters that this one is the weighted sum of; empty
    for the adapter of one run, and then not in the file.
    """

    digest: str
    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    run: str
    parts: tuple[AdapterPart, ...] = ()


@dataclass(frozen=True)
class Check:
    """One check that was made: its name, whether it passed, what was measured and allowed, and on which weights.

    `weights` is the sha256 of the weight file of the graph that was checked; for a check of whole images,
    `Manifest.sampling_digest` at that time.
    """

    name: str
    passed: bool
    values: Mapping[str, float]
    note: str
    weights: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        schema: version of this layout.
        files: every file of the artifact except this one and `engines/`, by its path with forward slashes.
        model: what was exported.
        sampling: how to sample it.
        precision: as requested; each graph states its own.
        opset: opset of the default ONNX domain.
        axes: ranges of the dynamic axes by name.
        graphs: by the names of `GRAPHS` or `LATENT_GRAPHS`.
        tokenizers: by the name of the text encoder that they feed; in schema 2, of the input that their ids are.
        base: the weights under the adapter.
        adapter: what was merged into them; None for the base itself.
        rewards: the recipe's rewards, each with its name, weight and options, to verify equal rewards again.
        prompts: the recipe's prompt sets, by their role.
        libraries: versions of the libraries that wrote the artifact.
        checks: results of `fmg verify`, the newest for each name.
    """

    schema: Literal[1, 2]
    files: Mapping[str, FileEntry]
    model: ModelFacts
    sampling: Sampling
    precision: Precision
    opset: int
    axes: Mapping[str, AxisRange]
    graphs: Mapping[str, Graph]
    tokenizers: Mapping[str, TokenizerFacts | FormedTokenizerFacts]
    base: Base
    adapter: Adapter | None
    rewards: tuple[Mapping[str, object], ...]
    prompts: Mapping[str, object]
    libraries: Mapping[str, str]
    checks: tuple[Check, ...]

    def __post_init__(self) -> None:
        _check_within("the number of files", len(self.files), 0, MAX_FILES)
        for name, axis in self.axes.items():
            _check_within(f"the maximum of axes.{name}", axis.maximum, 1, _MAX_AXES.get(name, _MAX_SIZE))
        rows = self.axes[BATCH].minimum if BATCH in self.axes else 1
        channels, height, width = self.sampling.latent_shape(self.sampling.resolutions[-1])
        _check_within("the smallest batch of latents", rows * channels * height * width, 1, _MAX_LATENT)

    @property
    def required(self) -> tuple[str, ...]:
        """The graphs that an artifact of this schema has."""
        return GRAPHS if self.schema == PACKED else LATENT_GRAPHS

    def weight_files(self, graph: str) -> tuple[str, ...]:
        """The files that the external data of a graph point into."""
        parts = (TRANSFORMER, VAE_DECODER) if graph == SAMPLER else (graph,)
        return tuple(self.graphs[part].weights for part in parts)

    def weights_digest(self, graph: str = TRANSFORMER) -> str:
        """Sha256 of the weight file of a graph; of the sampler, that of the transformer."""
        return self.files[self.graphs[graph].weights].sha256

    def sampling_digest(self) -> str:
        """Sha256 of everything that an image depends on: all files, and how they are sampled."""
        facts = asdict(self)
        text = json.dumps([facts[name] for name in ("files", "sampling", "tokenizers")], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def _check_within(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value!s:.30}, which is not between {least} and {most}")


def _check_times(times: tuple[float, ...]) -> None:
    falls = all(earlier > later for earlier, later in pairwise(times))
    if not 1 < len(times) <= MAX_STEPS + 1 or (times[0], times[-1]) != (1, 0) or not falls:
        raise ValueError(f"the grid {_listed(times)} does not decrease from 1 to 0")


def _listed(values: tuple[float, ...]) -> str:
    shown = ", ".join(f"{value!s:.30}" for value in values[:4])
    return f"[{shown}{', …' if len(values) > 4 else ''}]"
