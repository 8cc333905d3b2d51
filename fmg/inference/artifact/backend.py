"""Samples an artifact: tokenizers, text encoders, few-step sampler and decoder on any runtime of its graphs.

`Array` is the runtime's own array type on its device: a numpy array or a torch CUDA tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmg.core.cache import ByteCache
from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError, reason, suggestion
from fmg.core.profiling import SAMPLER, TEXT_ENCODERS, TOKENISE, TRANSFORMER, VAE, StageClock, stage
from fmg.core.prompt import MASK, cut_prompts
from fmg.core.protocols import Drawn, NoiseSource
from fmg.core.specs import DECODE_PIXELS, MapKind
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    BATCH,
    PACKED,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    VAE_DECODER,
    TokenizerFacts,
)
from fmg.inference.artifact.manifest import SAMPLER as SAMPLER_GRAPH
from fmg.inference.artifact.manifest import TEXT_ENCODERS as TEXT_ENCODERS_GRAPH
from fmg.inference.artifact.manifest import TRANSFORMER as TRANSFORMER_GRAPH
from fmg.models.flux.latents import PATCH, image_ids, pack, unpack

CACHE_BYTES = 256 * 2**20
TEXT_BATCH = 32
"""Prompts per call of a text encoder; the same limit as in the torch model."""

TEXT_STATES = (TEXT_ENCODER_2, TEXT_ENCODER)
"""The graphs of token states and of the pooled state, in the order of `Encoded`."""

Array = TypeVar("Array", bound=Any)
TextStates = Mapping[str, NDArray[Any]]
"""The encoding of one prompt by graph, or by the name of the output."""


class GraphRuntime(Protocol[Array]):
    """Runs graphs by the names of `Manifest.graphs`: ONNX Runtime, TensorRT, or another package's runtime.

    Each graph is loaded when it is first run. The sampler needs `shape`, `reshape`, `swapaxes` and slices of `Array`,
    and arithmetic with its own type and with Python floats that stays fp32. Inputs and outputs are float32 or int64.
    """

    @property
    def name(self) -> str:
        """Registered name of the backend."""

    @property
    def detail(self) -> str:
        """How it runs, for people: execution provider, engine, threads."""

    @property
    def device(self) -> str:
        """The device: `cpu`, `cuda:0`."""

    def run(self, graph: str, inputs: Mapping[str, Array]) -> Array:
        """The single output of a graph.

        Raises:
            FmgError: the graph cannot be loaded, or the runtime failed; names the graph.
        """

    def outputs(self, graph: str, inputs: Mapping[str, Array]) -> Mapping[str, Array]:
        """All outputs of a graph by name, for the text encoders of schema 2 and the sampler; errors as `run`."""

    def free(self, graphs: Iterable[str]) -> None:
        """Frees the memory of these graphs; they are loaded again when they are next run."""

    def put(self, array: NDArray[Any]) -> Array:
        """A numpy array on the device."""

    def get(self, array: Array) -> NDArray[Any]:
        """An array of the device in numpy; waits for the work that computes it."""

    def clock(self) -> StageClock[Any]:
        """As `Backend.clock`."""

    def reset_peak_memory(self) -> None:
        """As `Backend.reset_peak_memory`."""

    def peak_memory(self) -> int:
        """As `Backend.peak_memory`."""

    def close(self) -> None:
        """Frees everything."""


@dataclass(frozen=True)
class Encoded(Generic[Array]):
    """T5 states (b, l, d) and pooled CLIP states (b, p) on the device, for `b` prompts."""

    tokens: Array
    pooled: Array


class ArtifactBackend(Generic[Array]):
    """An open artifact on one runtime. Implements `fmg.core.protocols.Backend`.

    Args:
        artifact: the artifact to sample.
        runtime: runs its graphs.
        resolution: side of the square image in pixels; None takes the artifact's own.
        transformer: which of its graphs is the transformer.
        fused: run the whole sampler as one graph, if the artifact has one for the number of steps and the resolution.

    Raises:
        UsageError: the artifact does not support the resolution.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: GraphRuntime[Array],
        *,
        resolution: int | None = None,
        transformer: str = TRANSFORMER_GRAPH,
        fused: bool = True,
    ) -> None:
        self.artifact = artifact
        self.runtime = runtime
        self._transformer = transformer
        self._sampling = artifact.manifest.sampling
        self._resolution = checked_resolution(artifact, resolution)
        self._fused = fused
        self.fused_steps = self._steps_of_sampler()
        """Steps that one graph makes; None: every step is a call of the transformer."""
        self._cache: ByteCache[TextStates] = ByteCache(CACHE_BYTES)
        self._caching = True

    @property
    def name(self) -> str:
        return self.runtime.name

    @property
    def detail(self) -> str:
        """Details of the runtime, the precision of the transformer, and whether the artifact's own steps are fused."""
        return self.detail_of(self._sampling.steps)

    def detail_of(self, steps: int) -> str:
        """`detail` of images with this number of steps: one graph makes them, or a loop."""
        fused = f", {steps} steps fused" if steps == self.fused_steps else ""
        return f"{self.runtime.detail}, {self.artifact.graph(self._transformer).precision}{fused}"

    @property
    def device(self) -> str:
        return self.runtime.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        return self._sampling.latent_shape(self._resolution)

    def at(self, resolution: int) -> ArtifactBackend[Array]:
        """The same graphs, already loaded, for images of another size; this backend frees them.

        Raises:
            UsageError: the artifact does not support the resolution.
        """
        other = type(self)(
            self.artifact, self.runtime, resolution=resolution, transformer=self._transformer, fused=self._fused
        )
        other._cache = self._cache
        return other

    def encode(self, prompts: Sequence[str]) -> Any:
        """Embeddings of the prompts, each computed once as long as it is cached."""
        known = {p: states for p in prompts if self._caching and (states := self._cache.get(p)) is not None}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(missing), TEXT_BATCH):
            chunk = missing[start : start + TEXT_BATCH]
            for prompt, states in zip(chunk, self._text_states(chunk), strict=True):
                known[prompt] = states
                if self._caching:
                    self._cache.put(prompt, states)
        with stage(TEXT_ENCODERS):
            rows = [known[prompt] for prompt in prompts]
            return self._conditioning({name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """The warning about prompts that the last tokenizer truncates, such as that of T5 beside CLIP."""
        with stage(TOKENISE):
            return list(self._tokenizers.values())[-1].cut_prompts(prompts)

    def draw(self, cond: Any, noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """One image for each row of `cond`."""
        if len(times) - 1 == self.fused_steps:
            return self._draw_fused(cond, noise, times)
        sampling = self._sampling

        def entered(step: int) -> Array:
            return self.runtime.put(np.ascontiguousarray(self._enter(noise(step))))

        def velocity(x: Array, t: float, s: float) -> Array:
            return self.runtime.run(self._transformer, self._inputs(x, t, s, cond))

        start = entered(0)
        with stage(TRANSFORMER):
            end = few_step(velocity, start, times, lambda k: entered(k + 1), kind=sampling.map, path=sampling.path)
            latents = self._leave(end)
        with stage(VAE):
            return Drawn(self._decode(latents), np.ascontiguousarray(self.runtime.get(latents)))

    def _draw_fused(self, cond: Any, noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """As `draw`, in one call of the sampler."""
        start = noise(0)
        rows = start.shape[0]
        given = {io_spec.NOISE: start, io_spec.TIMES: np.tile(np.asarray(times, np.float32), (rows, 1))}
        if io_spec.RENOISE in self._sampler_inputs:
            given[io_spec.RENOISE] = np.stack([noise(k + 1) for k in range(len(times) - 2)], axis=1)
        with stage(SAMPLER):
            inputs = {name: self.runtime.put(np.ascontiguousarray(array)) for name, array in given.items()}
            made = self.runtime.outputs(SAMPLER_GRAPH, {**inputs, **self._guidance(rows), **self._prompt_inputs(cond)})
            images, latents = (self.runtime.get(made[name]) for name in (io_spec.IMAGES, io_spec.LATENTS))
        return Drawn(images, latents)

    def _steps_of_sampler(self) -> int | None:
        """The number of steps that one graph makes for this transformer and resolution; None for no such graph."""
        graph = self.artifact.manifest.graphs.get(SAMPLER_GRAPH)
        fits = self._transformer == TRANSFORMER_GRAPH and self._resolution == self._sampling.resolution
        return io_spec.sampler_steps(graph) if graph is not None and self._fused and fits else None

    @cached_property
    def _sampler_inputs(self) -> frozenset[str]:
        return frozenset(spec.name for spec in self.artifact.graph(SAMPLER_GRAPH).inputs)

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Runs the body with the cache off: every prompt is encoded."""
        self._caching = False
        try:
            yield
        finally:
            self._caching = True

    def release_text(self) -> None:
        """Frees the text encoders; a new prompt loads them again."""
        self.runtime.free(self._text_graphs)

    def clock(self) -> StageClock[Any]:
        return self.runtime.clock()

    def reset_peak_memory(self) -> None:
        self.runtime.reset_peak_memory()

    def peak_memory(self) -> int:
        return self.runtime.peak_memory()

    def __enter__(self) -> ArtifactBackend[Array]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runtime.close()

    @cached_property
    def _tokenizers(self) -> Mapping[str, PromptTokenizer]:
        facts = self.artifact.manifest.tokenizers
        return {name: PromptTokenizer(self.artifact.path(entry.file), entry) for name, entry in facts.items()}

    _text_graphs: Sequence[str] = TEXT_STATES

    def _conditioning(self, states: TextStates) -> Any:
        return Encoded(*(self.runtime.put(states[name]) for name in TEXT_STATES))

    def _enter(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        """Noise as the transformer takes it."""
        return pack(latents)

    def _leave(self, tokens: Array) -> Array:
        """The transformer's output as latents."""
        return unpack(tokens, *self.latent_shape[1:])

    def _text_states(self, prompts: Sequence[str]) -> list[TextStates]:
        with stage(TOKENISE):
            ids = {name: self._tokenizers[name](prompts) for name in TEXT_STATES}
        with stage(TEXT_ENCODERS):
            states = {
                name: self.runtime.get(self.runtime.run(name, {io_spec.INPUT_IDS: self.runtime.put(rows)}))
                for name, rows in ids.items()
            }
        # copies, because a row that is a view would keep its whole batch alive in the cache
        return [{name: batch[i].copy() for name, batch in states.items()} for i in range(len(prompts))]

    def _inputs(self, x: Array, t: float, s: float, cond: Any) -> dict[str, Array]:
        return {
            io_spec.HIDDEN_STATES: x,
            **self._prompt_inputs(cond),
            io_spec.IMG_IDS: self._image_ids,
            io_spec.TXT_IDS: self.runtime.put(np.zeros((cond.tokens.shape[1], 3), np.float32)),
            **self._scalars(x.shape[0], t, s),
        }

    def _prompt_inputs(self, cond: Any) -> Mapping[str, Array]:
        """What conditions the transformer."""
        return {io_spec.ENCODER_HIDDEN_STATES: cond.tokens, io_spec.POOLED_PROJECTIONS: cond.pooled}

    def _scalars(self, rows: int, t: float, s: float) -> dict[str, Array]:
        """Times and guidance."""
        inputs = {io_spec.TIMESTEP: self._constant(rows, t), **self._guidance(rows)}
        if self._sampling.map == "two-time":
            inputs[io_spec.SECOND] = self._constant(rows, s)
        return inputs

    def _guidance(self, rows: int) -> dict[str, Array]:
        scale = self._sampling.guidance
        return {} if scale is None else {io_spec.GUIDANCE: self._constant(rows, scale)}

    def _constant(self, rows: int, value: float) -> Array:
        return self.runtime.put(np.full(rows, value, np.float32))

    @cached_property
    def _image_ids(self) -> Array:
        _, height, width = self.latent_shape
        return self.runtime.put(image_ids(height, width))

    def _decode(self, latents: Array) -> NDArray[np.float32]:
        rows = max(1, DECODE_PIXELS // self._resolution**2)
        parts = [
            self.runtime.get(self.runtime.run(VAE_DECODER, {io_spec.LATENTS: latents[start : start + rows]}))
            for start in range(0, latents.shape[0], rows)
        ]
        return np.concatenate(parts)


class LatentBackend(ArtifactBackend[Array]):
    """An open artifact of schema 2: one graph of all text encoders, and a transformer that takes latents."""

    _text_graphs: Sequence[str] = (TEXT_ENCODERS_GRAPH,)

    def _conditioning(self, states: TextStates) -> Mapping[str, Array]:
        return {name: self.runtime.put(rows) for name, rows in states.items()}

    def _enter(self, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        return latents

    def _leave(self, tokens: Array) -> Array:
        return tokens

    def _text_states(self, prompts: Sequence[str]) -> list[TextStates]:
        with stage(TOKENISE):
            ids = self.token_inputs(prompts)
        with stage(TEXT_ENCODERS):
            made = self.runtime.outputs(TEXT_ENCODERS_GRAPH, {name: self.runtime.put(x) for name, x in ids.items()})
            states = {name: self.runtime.get(batch) for name, batch in made.items()}
        return [{name: batch[i].copy() for name, batch in states.items()} for i in range(len(prompts))]

    def token_inputs(self, prompts: Sequence[str]) -> dict[str, NDArray[np.int64]]:
        """The inputs of the text encoders."""
        inputs = {}
        for spec in self.artifact.graph(TEXT_ENCODERS_GRAPH).inputs:
            name = spec.name.removesuffix(MASK)
            ids, mask = self._tokenizers[name].with_mask(prompts)
            inputs[spec.name] = ids if spec.name == name else mask
        return inputs

    def _inputs(self, x: Array, t: float, s: float, cond: Any) -> dict[str, Array]:
        return {io_spec.LATENTS: x, **cond, **self._scalars(x.shape[0], t, s)}

    def _prompt_inputs(self, cond: Any) -> Mapping[str, Array]:
        inputs: Mapping[str, Array] = cond
        return inputs


def artifact_backend(
    artifact: Artifact,
    runtime: GraphRuntime[Array],
    *,
    resolution: int | None = None,
    transformer: str = TRANSFORMER_GRAPH,
    fused: bool = True,
) -> ArtifactBackend[Array]:
    """The backend of an artifact by its schema. Arguments and errors as in `ArtifactBackend`."""
    cls = ArtifactBackend[Array] if artifact.manifest.schema == PACKED else LatentBackend[Array]
    return cls(artifact, runtime, resolution=resolution, transformer=transformer, fused=fused)


def checked_resolution(artifact: Artifact, resolution: int | None) -> int:
    """The side of the image in pixels.

    Raises:
        UsageError: the artifact does not support it.
    """
    sampling = artifact.manifest.sampling
    if resolution is None:
        return sampling.resolution
    smallest, largest = sampling.resolutions[0], sampling.resolutions[-1]
    token = sampling.latent_scale * PATCH
    if resolution % token or not smallest <= resolution <= largest:
        sides = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels in steps of {token}"
        raise UsageError(
            f"The artifact generates images of {sides}, not {resolution}",
            "Use one of these, or export with --resolutions for another.",
        )
    return resolution


def checked_batch(artifact: Artifact, batch_size: int | None, default: int) -> int:
    """Images per forward pass: the given number, or the default within the artifact's limits.

    Raises:
        UsageError: it is more than the artifact supports.
    """
    batch = artifact.manifest.axes[BATCH]
    if batch_size is not None and not batch.minimum <= batch_size <= batch.maximum:
        raise UsageError(
            f"The artifact takes {batch.minimum} to {batch.maximum} images per call, not {batch_size}",
            "Use a batch size in this range, or export with --batch for another.",
        )
    return batch_size or max(batch.minimum, min(default, batch.maximum))


# A second few-step sampler beside `fmg.flow.sampling`: an artifact is sampled where there is no torch, on velocities
# that a graph returns. The tests hold the two equal.
def few_step(
    velocity: Callable[[Array, float, float], Array],
    x_1: Array,
    times: Sequence[float],
    renoise: Callable[[int], Array],
    *,
    kind: MapKind,
    path: str,
) -> Array:
    """Samples `x_0` from the noise `x_1` along `times`, one NFE per interval (docs/math.md, eq. 2, 6, 7).

    A two-time map jumps from one grid time to the next, and a velocity map makes an Euler step. A single-time map does
    multistep consistency sampling (Song et al., arXiv 2303.01469, algorithm 1): jump to 0, then forward noise to the
    next grid time.

    Args:
        velocity: `(x_t, t, s) -> u`, the network; for a single-time map `s` is 0, and a velocity map ignores it.
        x_1: standard normal noise.
        times: strictly decreasing times, first 1, last 0.
        renoise: standard normal noise of interval `k`; only called for single-time maps.
        kind: the kind of map.
        path: `linear` or `trig`.
    """
    x: Any = x_1
    # times are rounded to fp32 before they are subtracted, as in the torch sampler
    for k, (t, s) in enumerate(pairwise([float(np.float32(time)) for time in times])):
        if kind != "single-time":
            x = x - _rounded(t - s) * velocity(x, t, s)
            continue
        x = _data(velocity, x, t, path)
        if s > 0:
            scale, std = kernel_from_data(path, s)
            x = scale * x + std * renoise(k)
    sample: Array = x
    return sample


def _data(velocity: Callable[[Array, float, float], Array], x: Any, t: float, path: str) -> Any:
    """A single-time map's prediction of the data; on the trig path the network is that of a rectified flow (eq. 8)."""
    if path != "trig":
        return x - t * velocity(x, t, 0.0)
    cosine, sine = kernel_from_data(path, t)
    time = _rounded(sine / (sine + cosine))
    z = x / _rounded(sine + cosine)
    return z - time * velocity(z, time, 0.0)


def kernel_from_data(path: str, s: float) -> tuple[float, float]:
    """Scale and std of `q(x_s | x_0)`: `1 - s` and `s`, or for TrigFlow cosine and sine of `s pi/2` (eq. 2).

    Raises:
        UsageError: for any other path.
    """
    if path == "linear":
        return _rounded(1 - s), s
    if path == "trig":
        return _rounded(math.sin((1 - s) * math.pi / 2)), _rounded(math.sin(s * math.pi / 2))
    raise UsageError(f"There is no probability path named '{path}'", suggestion(path, ("linear", "trig")))


def _rounded(value: float) -> float:
    return float(np.float32(value))


class PromptTokenizer:
    """One tokenizer of an artifact, using only the tokenizers library; gives the same ids as transformers.

    Puts the prompt into its form, pads and truncates to its length.

    Args:
        file: a `tokenizer.json`.
        facts: its length and padding.

    Raises:
        MissingDependencyError: tokenizers is not installed.
        CheckpointError: the file cannot be read, or adds as many special tokens as a prompt may have.
    """

    def __init__(self, file: Path, facts: TokenizerFacts) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingDependencyError("Reading prompts needs tokenizers", "Run: pip install tokenizers") from None
        try:
            self._whole = Tokenizer.from_file(str(file))
            self._cut = Tokenizer.from_file(str(file))
        except Exception as error:
            # the library raises Exception itself
            raise CheckpointError(f"{file} cannot be read: {reason(error)}", "Export the artifact again.") from None
        self._whole.no_truncation()
        self._whole.no_padding()
        # the library does not cut special tokens, so rows would be longer than the graph takes, or hold no word
        if (special := self._whole.num_special_tokens_to_add(False)) >= facts.length:
            raise CheckpointError(
                f"{file} adds {special} special tokens to a prompt, but the manifest allows {facts.length} in all",
                "Export the artifact again.",
            )
        self._cut.enable_truncation(facts.length)
        self._cut.enable_padding(
            direction=facts.side, length=facts.length, pad_id=facts.pad_id, pad_token=facts.pad_token
        )
        self._length = facts.length
        self._form = facts.form

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids (b, length)."""
        return self.with_mask(prompts)[0]

    def with_mask(self, prompts: Sequence[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Ids and mask, each (b, length); the mask is 1 for tokens and 0 for padding."""
        rows = self._cut.encode_batch([self._form(prompt) for prompt in prompts])
        return np.array([row.ids for row in rows], np.int64), np.array([row.attention_mask for row in rows], np.int64)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """The warning about prompts that are truncated (`fmg.core.prompt.cut_prompts`); empty for none."""
        texts = list(dict.fromkeys(prompts))
        counts = (len(row.ids) for row in self._whole.encode_batch([self._form(text) for text in texts]))
        return cut_prompts(dict(zip(texts, counts, strict=True)), self._length)
