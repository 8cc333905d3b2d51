"""Graph by graph: what a runtime computes against the torch modules that the graph was traced from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from fmg.export.graphs import ClipGraph, DecoderGraph, GraphModule, T5Graph, TransformerGraph
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.backend import PromptTokenizer
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    WIDTH,
    AxisRange,
    Precision,
)
from fmg.models.flux.latents import PATCH, image_ids

if TYPE_CHECKING:
    from fmg.inference.artifact.backend import GraphRuntime
    from fmg.models.flux.model import FluxModel

Tensors = Mapping[str, NDArray[Any]]

ALLOWED: Mapping[Precision, float] = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 1e-2, "int8": 1e-1}
"""Relative L2 error of one output against fp32 torch, by precision of the graph. The random inputs are hard on int8,
whose scales are those of the largest value: its pictures and rewards decide."""
DECODER_ALLOWED = 1e-4
"""The decoder's: its images are clamped to [0, 1] after a long chain of convolutions."""
# No size of a trace (fmg.export.onnx) is among them.
_BATCHES = (1, 3, 4, 7)
_SMALLEST_TIME = 0.05


@dataclass(frozen=True)
class GraphParity:
    """The worst of several shapes: relative L2 error, largest absolute error, and the shape it was found at."""

    graph: str
    relative_l2: float
    max_abs: float
    allowed: float
    shapes: int
    worst: str

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; an error that is no number is not."""
        return self.relative_l2 <= self.allowed


def reference_module(model: FluxModel, graph: str) -> GraphModule:
    """The torch module with the signature of a graph, over the live components of a model."""
    parts = model.components
    modules: Mapping[str, Callable[[], GraphModule]] = {
        TEXT_ENCODER: lambda: ClipGraph(parts.text.text_encoder),
        TEXT_ENCODER_2: lambda: T5Graph(parts.text.text_encoder_2),
        TRANSFORMER: lambda: TransformerGraph(parts.transformer),
        TRANSFORMER_INT8: lambda: TransformerGraph(parts.transformer),
        VAE_DECODER: lambda: DecoderGraph(parts.vae),
    }
    return modules[graph]().eval()


@torch.no_grad()
def run_reference(model: FluxModel, graph: str, inputs: Tensors) -> NDArray[np.float32]:
    """The output of the torch module of a graph, in fp32 on the CPU."""
    tensors = {name: torch.from_numpy(value).to(model.device) for name, value in inputs.items()}
    output: torch.Tensor = reference_module(model, graph)(**tensors)
    return output.float().cpu().numpy()


def parity(
    model: FluxModel, runtime: GraphRuntime[Any], artifact: Artifact, graph: str, prompts: Sequence[str], *, seed: int
) -> GraphParity:
    """Compares one graph at several shapes inside the artifact's ranges, none of which was traced.

    Args:
        model: the reference, in fp32.
        runtime: what runs the graph.
        artifact: what the graph belongs to.
        graph: its name.
        prompts: what the text encoders are given.
        seed: of the other inputs.
    """
    precision = artifact.graph(graph).precision
    allowed = DECODER_ALLOWED if graph == VAE_DECODER else ALLOWED[precision]
    errors: list[tuple[float, float, str]] = []
    for inputs in sample_inputs(artifact, graph, prompts, seed=seed):
        expected = run_reference(model, graph, inputs)
        output = runtime.get(runtime.run(graph, {name: runtime.put(value) for name, value in inputs.items()}))
        shape = " ".join("x".join(map(str, value.shape)) for value in inputs.values())
        errors.append((relative_l2(output, expected), float(np.abs(output - expected).max()), shape))
    # a NaN is worse than any number, which max() alone would not say
    worst = max(errors, key=lambda error: (not np.isfinite(error[0]), error[0]))
    largest = float(np.max([error[1] for error in errors]))
    return GraphParity(graph, worst[0], largest, allowed, len(errors), worst[2])


def relative_l2(output: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """`|output - expected| / |expected|` over all entries, in double precision; NaN when either is not finite."""
    difference = output.astype(np.float64) - expected
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(difference)) / scale if scale else float(np.linalg.norm(difference))


def sample_inputs(artifact: Artifact, graph: str, prompts: Sequence[str], *, seed: int) -> Iterator[Tensors]:
    """Inputs of a graph at different sizes of its axes, keyed by `seed`."""
    for number in range(len(_BATCHES)):
        yield _inputs(artifact, graph, prompts, number, np.random.default_rng((seed, number)))


def _inputs(artifact: Artifact, graph: str, prompts: Sequence[str], number: int, rng: np.random.Generator) -> Tensors:
    manifest = artifact.manifest
    sides = [pixels // manifest.sampling.latent_scale for pixels in manifest.sampling.resolutions]
    side = sides[number % len(sides)]
    batch = min(_BATCHES[number], manifest.axes[BATCH].maximum)
    sizes = {name: _within(axis, number) for name, axis in manifest.axes.items()}
    sizes |= {BATCH: batch, HEIGHT: side, WIDTH: side, IMAGE: (side // PATCH) ** 2}
    t = rng.uniform(_SMALLEST_TIME, 1.0, batch).astype(np.float32)
    known: dict[str, NDArray[Any]] = {
        io_spec.TIMESTEP: t,
        io_spec.SECOND: t * rng.uniform(0.0, 1.0, batch).astype(np.float32),
        io_spec.GUIDANCE: np.full(batch, manifest.sampling.guidance or 0.0, np.float32),
        io_spec.IMG_IDS: image_ids(side, side),
    }
    made: dict[str, NDArray[Any]] = {}
    for spec in manifest.graphs[graph].inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if spec.name == io_spec.INPUT_IDS:
            made[spec.name] = _token_ids(artifact, graph, prompts, number)[: shape[0], : shape[1]]
        elif spec.name == io_spec.TXT_IDS:
            made[spec.name] = np.zeros(shape, np.float32)
        else:
            made[spec.name] = known.get(spec.name, rng.standard_normal(shape, np.float32))
    return made


def _token_ids(artifact: Artifact, graph: str, prompts: Sequence[str], number: int) -> NDArray[np.int64]:
    """Ids of as many prompts as the largest batch, beginning with another one each time."""
    facts = artifact.manifest.tokenizers[graph]
    chosen = [prompts[(number + i) % len(prompts)] for i in range(max(_BATCHES))]
    return PromptTokenizer(artifact.path(facts.file), facts)(chosen)


def _within(axis: AxisRange, number: int) -> int:
    """Sizes from the least to the largest in turn."""
    return (axis.maximum, axis.minimum, (axis.minimum + axis.maximum) // 2)[number % 3]
