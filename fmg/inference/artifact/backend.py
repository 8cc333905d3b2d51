"""Draws an artifact: tokenizers, text encoders, few-step sampler and decoder over whatever runs its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from fmg.core.backends import Drawn, NoiseSource
from fmg.core.cache import ByteCache
from fmg.core.errors import UsageError
from fmg.core.profiling import TEXT_ENCODERS, TOKENISE, TRANSFORMER, VAE, StageClock, stage
from fmg.inference.artifact import borders
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import BATCH, TEXT_ENCODER, TEXT_ENCODER_2, VAE_DECODER
from fmg.inference.artifact.manifest import TRANSFORMER as TRANSFORMER_GRAPH
from fmg.inference.artifact.packing import PATCH, image_ids, pack, unpack
from fmg.inference.artifact.runtime import GraphRuntime
from fmg.inference.artifact.sampler import few_step
from fmg.inference.artifact.tokens import PromptTokenizer

DECODE_PIXELS = 2**18
"""Image pixels that one decoder call may make; the torch model takes as many."""
CACHE_BYTES = 256 * 2**20
TEXT_BATCH = 32
"""Prompts for one call of a text encoder; the torch model takes as many."""

TEXT_STATES = (TEXT_ENCODER_2, TEXT_ENCODER)
"""The graphs of token states and of the pooled state, in the order of `Encoded`."""

Array = TypeVar("Array", bound=Any)
Row = Mapping[str, NDArray[np.float32]]
"""What the text encoders make of one prompt, by graph."""


@dataclass(frozen=True)
class Encoded(Generic[Array]):
    """T5 states (b, l, d) and pooled CLIP states (b, p) on the device, for `b` prompts."""

    tokens: Array
    pooled: Array


class ArtifactBackend(Generic[Array]):
    """An open artifact on one runtime. Implements `fmg.core.backends.Backend`.

    Args:
        artifact: what to draw.
        runtime: what runs its graphs.
        resolution: side of the square image in pixels; None takes the artifact's own.
        transformer: which of its graphs is the transformer.

    Raises:
        UsageError: the artifact was not made for the resolution.
    """

    def __init__(
        self,
        artifact: Artifact,
        runtime: GraphRuntime[Array],
        *,
        resolution: int | None = None,
        transformer: str = TRANSFORMER_GRAPH,
    ) -> None:
        self.artifact = artifact
        self.runtime = runtime
        self._transformer = transformer
        self._sampling = artifact.manifest.sampling
        self._resolution = checked_resolution(artifact, resolution)
        self._known: ByteCache[Row] = ByteCache(CACHE_BYTES)
        self._remember = True

    @property
    def name(self) -> str:
        """Registered name of the runtime."""
        return self.runtime.name

    @property
    def detail(self) -> str:
        """How the runtime runs, and the precision of the transformer."""
        return f"{self.runtime.detail}, {self.artifact.graph(self._transformer).precision}"

    @property
    def device(self) -> str:
        """Where the graphs run."""
        return self.runtime.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        return self._sampling.latent_shape(self._resolution)

    def encode(self, prompts: Sequence[str]) -> Encoded[Array]:
        """Embeddings of the prompts, each computed once as long as it is remembered."""
        known = {prompt: row for prompt in prompts if (row := self._recall(prompt)) is not None}
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in known]
        for start in range(0, len(missing), TEXT_BATCH):
            chunk = missing[start : start + TEXT_BATCH]
            for prompt, row in zip(chunk, self._rows(chunk), strict=True):
                known[prompt] = row
                if self._remember:
                    self._known.put(prompt, row)
        with stage(TEXT_ENCODERS):
            rows = [known[prompt] for prompt in prompts]
            return Encoded(*(self.runtime.put(np.stack([row[name] for row in rows])) for name in TEXT_STATES))

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """What to say of prompts that T5 does not read to their end; CLIP only ever sees the beginning of one."""
        with stage(TOKENISE):
            return self._tokenizers[TEXT_ENCODER_2].cut_prompts(prompts)

    def draw(self, cond: Encoded[Array], noise: NoiseSource, times: Sequence[float]) -> Drawn:
        """One image for each row of `cond`."""
        sampling, (_, height, width) = self._sampling, self.latent_shape

        def packed(step: int) -> Array:
            return self.runtime.put(np.ascontiguousarray(pack(noise(step))))

        def velocity(x: Array, t: float, s: float) -> Array:
            return self.runtime.run(self._transformer, self._inputs(x, t, s, cond))

        start = packed(0)
        with stage(TRANSFORMER):
            tokens = few_step(velocity, start, times, lambda k: packed(k + 1), kind=sampling.map, path=sampling.path)
            latents = unpack(tokens, height, width)
        with stage(VAE):
            return Drawn(self._decode(latents), np.ascontiguousarray(self.runtime.get(latents)))

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Inside, every prompt is encoded."""
        self._remember = False
        try:
            yield
        finally:
            self._remember = True

    def release_text(self) -> None:
        """Frees the text encoders; a new prompt loads them again."""
        self.runtime.free(TEXT_STATES)

    def clock(self) -> StageClock[Any]:
        """The runtime's clock."""
        return self.runtime.clock()

    def reset_peak_memory(self) -> None:
        """Begins a new measurement."""
        self.runtime.reset_peak_memory()

    def peak_memory(self) -> int:
        """Most bytes held since the last reset."""
        return self.runtime.peak_memory()

    def __enter__(self) -> ArtifactBackend[Array]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.runtime.close()

    def _recall(self, prompt: str) -> Row | None:
        return self._known.get(prompt) if self._remember else None

    @cached_property
    def _tokenizers(self) -> Mapping[str, PromptTokenizer]:
        facts = self.artifact.manifest.tokenizers
        return {name: PromptTokenizer(self.artifact.path(entry.file), entry) for name, entry in facts.items()}

    def _rows(self, prompts: Sequence[str]) -> list[Row]:
        with stage(TOKENISE):
            ids = {name: self._tokenizers[name](prompts) for name in TEXT_STATES}
        with stage(TEXT_ENCODERS):
            states = {name: self._states(name, rows) for name, rows in ids.items()}
        # copies, because a row that is a view would keep its whole batch alive in the cache
        return [{name: batch[i].copy() for name, batch in states.items()} for i in range(len(prompts))]

    def _states(self, graph: str, ids: NDArray[np.int64]) -> NDArray[np.float32]:
        return self.runtime.get(self.runtime.run(graph, {borders.INPUT_IDS: self.runtime.put(ids)}))

    def _inputs(self, x: Array, t: float, s: float, cond: Encoded[Array]) -> dict[str, Array]:
        rows = x.shape[0]
        inputs = {
            borders.HIDDEN_STATES: x,
            borders.ENCODER_HIDDEN_STATES: cond.tokens,
            borders.POOLED_PROJECTIONS: cond.pooled,
            borders.TIMESTEP: self._constant(rows, t),
            borders.IMG_IDS: self._image_ids,
            borders.TXT_IDS: self._text_ids(cond.tokens.shape[1]),
        }
        if self._sampling.map == "two-time":
            inputs[borders.SECOND] = self._constant(rows, s)
        if self._sampling.guidance is not None:
            inputs[borders.GUIDANCE] = self._constant(rows, self._sampling.guidance)
        return inputs

    def _constant(self, rows: int, value: float) -> Array:
        return self.runtime.put(np.full(rows, value, np.float32))

    @cached_property
    def _image_ids(self) -> Array:
        _, height, width = self.latent_shape
        return self.runtime.put(image_ids(height, width))

    def _text_ids(self, length: int) -> Array:
        return self.runtime.put(np.zeros((length, 3), np.float32))

    def _decode(self, latents: Array) -> NDArray[np.float32]:
        rows = max(1, DECODE_PIXELS // self._resolution**2)
        parts = [
            self.runtime.get(self.runtime.run(VAE_DECODER, {borders.LATENTS: latents[start : start + rows]}))
            for start in range(0, latents.shape[0], rows)
        ]
        return np.concatenate(parts)


def checked_resolution(artifact: Artifact, resolution: int | None) -> int:
    """The side of the image in pixels.

    Raises:
        UsageError: it is not one that the artifact was made for.
    """
    sampling = artifact.manifest.sampling
    if resolution is None:
        return sampling.resolution
    smallest, largest = sampling.resolutions[0], sampling.resolutions[-1]
    token = sampling.latent_scale * PATCH
    if resolution % token or not smallest <= resolution <= largest:
        sides = f"{smallest} pixels" if smallest == largest else f"{smallest} to {largest} pixels in steps of {token}"
        raise UsageError(
            f"The artifact draws {sides}, not {resolution}",
            "Use such a resolution, or export with --resolutions for another.",
        )
    return resolution


def checked_batch(artifact: Artifact, batch_size: int | None, default: int) -> int:
    """Images a network call: the given number, or the default as far as the artifact allows.

    Raises:
        UsageError: it is more than the artifact was made for.
    """
    batch = artifact.manifest.axes[BATCH]
    if batch_size is not None and not batch.minimum <= batch_size <= batch.maximum:
        raise UsageError(
            f"The artifact takes {batch.minimum} to {batch.maximum} images a call, not {batch_size}",
            "Use such a batch size, or export with --batch for another.",
        )
    return batch_size or max(batch.minimum, min(default, batch.maximum))
