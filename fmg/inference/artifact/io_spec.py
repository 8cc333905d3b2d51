"""Names and shapes of the inputs and outputs of every graph, which backends rely on. Standard library only."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping, Sequence

from fmg.core.prompt import MASK
from fmg.inference.artifact.decode import DecodeError
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PACKED,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    SAMPLER,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODERS,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    WIDTH,
    FormedTokenizerFacts,
    Graph,
    Manifest,
    Sampling,
    TensorSpec,
)

HIDDEN_STATES = "hidden_states"
ENCODER_HIDDEN_STATES = "encoder_hidden_states"
POOLED_PROJECTIONS = "pooled_projections"
TIMESTEP = "timestep"
SECOND = "second"
GUIDANCE = "guidance"
IMG_IDS = "img_ids"
TXT_IDS = "txt_ids"
VELOCITY = "velocity"
INPUT_IDS = "input_ids"
POOLED = "pooled"
TOKENS = "tokens"
LATENTS = "latents"
IMAGES = "images"
NOISE = "noise"
RENOISE = "renoise"
TIMES = "times"

Shape = tuple[int | str | None, ...]
"""The axes of a tensor: a size, a name of `Manifest.axes`, or None for a size that the weights decide."""

# two by two entries of a latent make one token
_ENTRIES = 4


def check_io(manifest: Manifest) -> None:
    """Whether every graph has exactly the inputs and outputs that its name and the sampling require.

    Raises:
        DecodeError: naming the graph and what is missing, unexpected or has the wrong shape.
    """
    if manifest.schema != PACKED:
        _check_latent_io(manifest)
        return
    for graph, entry in manifest.graphs.items():
        if graph == SAMPLER:
            text = manifest.tokenizers[TEXT_ENCODER_2].length
            _check_sampler(manifest, {ENCODER_HIDDEN_STATES: (BATCH, text, None), POOLED_PROJECTIONS: (BATCH, None)})
            continue
        inputs, outputs = _expected(graph, manifest)
        _check(f"graphs.{graph}.inputs", entry.inputs, inputs)
        _check(f"graphs.{graph}.outputs", entry.outputs, outputs)


def _check_latent_io(manifest: Manifest) -> None:
    """As `check_io`, where the graph of the text encoders decides what conditions the transformer."""
    sampling, text = manifest.sampling, manifest.graphs[TEXT_ENCODERS]
    side = sampling.resolution
    latents = {LATENTS: (BATCH, *sampling.latent_shape())}
    ids: dict[str, Shape] = {}
    for name, facts in manifest.tokenizers.items():
        ids[name] = (BATCH, facts.length)
        if isinstance(facts, FormedTokenizerFacts) and facts.mask:
            ids[name + MASK] = (BATCH, facts.length)
    taken = {LATENTS, VELOCITY, IMAGES, NOISE, RENOISE, TIMES, *(name for name, _ in _scalars(sampling))}
    made: dict[str, Shape] = {spec.name: (BATCH, *(None for _ in spec.shape[1:])) for spec in text.outputs}
    if twice := sorted(taken & made.keys()):
        raise DecodeError(f"graphs.{TEXT_ENCODERS}.outputs has {twice[0]!r}, which is the name of another tensor")
    _check(f"graphs.{TEXT_ENCODERS}.inputs", text.inputs, ids, whole=ids)
    whole = [spec.name for spec in text.outputs if spec.dtype == "int64"]
    _check(f"graphs.{TEXT_ENCODERS}.outputs", text.outputs, made, whole=whole)
    conditioning = {spec.name: spec.shape for spec in text.outputs}
    decoder, wanted = manifest.graphs[VAE_DECODER], {**latents, **dict(_scalars(sampling)), **conditioning}
    for name in (TRANSFORMER, TRANSFORMER_INT8):
        if (network := manifest.graphs.get(name)) is not None:
            _check(f"graphs.{name}.inputs", network.inputs, wanted, whole=whole)
            _check(f"graphs.{name}.outputs", network.outputs, {VELOCITY: latents[LATENTS]})
    _check(f"graphs.{VAE_DECODER}.inputs", decoder.inputs, latents)
    _check(f"graphs.{VAE_DECODER}.outputs", decoder.outputs, {IMAGES: (BATCH, 3, side, side)})
    if SAMPLER in manifest.graphs:
        _check_sampler(manifest, conditioning, whole)


def sampler_inputs(sampling: Sampling, steps: int) -> Mapping[str, Shape]:
    """Inputs of the sampler by name, without those of the prompts; the first axis of each is the batch.

    Every row has its own times, so requests with different grids fit into one batch.
    """
    shape = sampling.latent_shape()
    inputs: dict[str, Shape] = {NOISE: (BATCH, *shape)}
    if sampling.map == "single-time" and steps > 1:
        inputs[RENOISE] = (BATCH, steps - 1, *shape)
    inputs[TIMES] = (BATCH, steps + 1)
    return inputs | ({GUIDANCE: (BATCH,)} if sampling.guidance is not None else {})


def sampler_steps(graph: Graph) -> int:
    """Sampling steps (NFE) of a graph of the sampler.

    Raises:
        DecodeError: its inputs do not state them.
    """
    shapes = [spec.shape for spec in graph.inputs if spec.name == TIMES]
    if len(shapes) != 1 or len(shapes[0]) != 2 or not isinstance(times := shapes[0][1], int) or times < 2:
        raise DecodeError(f"graphs.{SAMPLER}.inputs does not state the times of its steps")
    return times - 1


def _check_sampler(manifest: Manifest, conditioning: Mapping[str, Shape], whole: Container[str] = ()) -> None:
    sampling, graph = manifest.sampling, manifest.graphs[SAMPLER]
    expected = {**sampler_inputs(sampling, sampler_steps(graph)), **conditioning}
    _check(f"graphs.{SAMPLER}.inputs", graph.inputs, expected, whole=whole)
    side = sampling.resolution
    images = {LATENTS: (BATCH, *sampling.latent_shape()), IMAGES: (BATCH, 3, side, side)}
    _check(f"graphs.{SAMPLER}.outputs", graph.outputs, images)


def _check(
    where: str, specs: Sequence[TensorSpec], expected: Mapping[str, Shape], *, whole: Container[str] = (INPUT_IDS,)
) -> None:
    names = [spec.name for spec in specs]
    if absent := [name for name in expected if name not in names]:
        raise DecodeError(f"{where} lacks {absent[0]!r}, which the sampling requires")
    for spec in specs:
        if spec.name not in expected or names.count(spec.name) > 1:
            raise DecodeError(f"{where} has {spec.name!r}, which the sampling does not use")
        dtype, shape = "int64" if spec.name in whole else "float32", expected[spec.name]
        fits = len(spec.shape) == len(shape) and all(map(_fits, spec.shape, shape))
        if spec.dtype != dtype or not fits:
            stated = ", ".join(map(str, spec.shape))
            asked = ", ".join("any" if axis is None else str(axis) for axis in shape)
            raise DecodeError(f"{where} has {spec.name!r} as {spec.dtype} ({stated}) instead of {dtype} ({asked})")


def _fits(axis: int | str, expected: int | str | None) -> bool:
    return isinstance(axis, int) if expected is None else axis == expected


def _expected(graph: str, manifest: Manifest) -> tuple[Mapping[str, Shape], Mapping[str, Shape]]:
    """Inputs and outputs of a graph by name."""
    sampling = manifest.sampling
    if graph in (TRANSFORMER, TRANSFORMER_INT8):
        tokens = (BATCH, IMAGE, _ENTRIES * sampling.latent_channels)
        return dict(_transformer_inputs(sampling, tokens)), {VELOCITY: tokens}
    if graph == TEXT_ENCODER:
        return {INPUT_IDS: (BATCH, manifest.tokenizers[graph].length)}, {POOLED: (BATCH, None)}
    if graph == TEXT_ENCODER_2:
        return {INPUT_IDS: (BATCH, TEXT)}, {TOKENS: (BATCH, TEXT, None)}
    if graph == VAE_DECODER:
        return (
            {LATENTS: (BATCH, sampling.latent_channels, HEIGHT, WIDTH)},
            {IMAGES: (BATCH, 3, PIXEL_HEIGHT, PIXEL_WIDTH)},
        )
    raise DecodeError(f"graphs.{graph} is not a known graph")


def _transformer_inputs(sampling: Sampling, tokens: Shape) -> Iterator[tuple[str, Shape]]:
    yield HIDDEN_STATES, tokens
    yield ENCODER_HIDDEN_STATES, (BATCH, TEXT, None)
    yield POOLED_PROJECTIONS, (BATCH, None)
    yield from _scalars(sampling)
    yield IMG_IDS, (IMAGE, 3)
    yield TXT_IDS, (TEXT, 3)


def _scalars(sampling: Sampling) -> Iterator[tuple[str, Shape]]:
    """What a row of any network takes besides latents and conditioning."""
    yield TIMESTEP, (BATCH,)
    if sampling.map == "two-time":
        yield SECOND, (BATCH,)
    if sampling.guidance is not None:
        yield GUIDANCE, (BATCH,)
