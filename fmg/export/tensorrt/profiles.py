"""Optimization profiles of each graph: one for each resolution, within the axis ranges that the manifest states."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmg.core.errors import UsageError
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    TEXT,
    TEXT_ENCODER_2,
    VAE_DECODER,
    WIDTH,
    AxisRange,
    Graph,
    Manifest,
)
from fmg.inference.tensorrt.records import Profile, Shape, ShapeRange

_SPATIAL = frozenset({IMAGE, HEIGHT, WIDTH})
# One image of 1024 x 1024, four of 512 x 512
_DECODER_PIXELS = 1024**2


@dataclass(frozen=True)
class Wanted:
    """What engines are asked to cover.

    Attributes:
        resolutions: sides of square images in pixels; each gets a profile with exactly its image tokens.
        batch: rows that the engine takes, and those to tune for.
    """

    resolutions: tuple[int, ...]
    batch: AxisRange


def wanted(manifest: Manifest, resolutions: Sequence[int] | None, batch: AxisRange | None) -> Wanted:
    """The request, completed from the manifest and checked against it.

    Raises:
        UsageError: a resolution or batch size is outside what the artifact was exported for.
    """
    sampling = manifest.sampling
    sides = tuple(sorted(set(resolutions or sampling.resolutions)))
    step = 2 * sampling.latent_scale
    for side in sides:
        if side <= 0 or side % step:
            raise UsageError(
                f"--resolutions: {side} is not a multiple of {step}, the side of an image token in pixels",
                f"The artifact was made for {_listed(sampling.resolutions)}.",
            )
        _, height, width = sampling.latent_shape(side)
        for axis, size in ((IMAGE, sampling.image_tokens(side)), (HEIGHT, height), (WIDTH, width)):
            _check_axis(manifest, axis, size, size, f"--resolutions: {side} px")
    chosen = batch or manifest.axes[BATCH]
    _check_axis(manifest, BATCH, chosen.minimum, chosen.maximum, "--batch")
    return Wanted(sides, chosen)


def profiles(name: str, graph: Graph, manifest: Manifest, request: Wanted) -> tuple[Profile, ...]:
    """The profiles of a graph: one for each resolution where its inputs depend on it, else one.

    The text axis has the one length that prompts are padded to: a range would let the builder choose another
    attention kernel by length, for lengths that never occur.
    """
    text = manifest.tokenizers[TEXT_ENCODER_2].length
    spatial = any(axis in _SPATIAL for spec in graph.inputs for axis in spec.shape)
    made = []
    for side in request.resolutions if spatial else request.resolutions[:1]:
        _, height, width = manifest.sampling.latent_shape(side)
        fixed = {IMAGE: manifest.sampling.image_tokens(side), HEIGHT: height, WIDTH: width, TEXT: text}
        batch = _decoder_batch(request.batch, side) if name == VAE_DECODER else request.batch
        ranges = {BATCH: batch, **{axis: AxisRange(size, size, size) for axis, size in fixed.items()}}
        shapes = {spec.name: _shapes(spec.shape, ranges) for spec in graph.inputs}
        made.append(Profile(f"{side}px" if spatial else name, shapes))
    return tuple(made)


def _decoder_batch(batch: AxisRange, side: int) -> AxisRange:
    """Fewer rows at high resolution, where the activations of the decoder are what takes the most memory of all."""
    most = max(1, min(batch.maximum, _DECODER_PIXELS // side**2))
    return AxisRange(1, 1, most)


def _shapes(shape: tuple[int | str, ...], ranges: Mapping[str, AxisRange]) -> ShapeRange:
    def at(end: str) -> Shape:
        return tuple(axis if isinstance(axis, int) else getattr(ranges[axis], end) for axis in shape)

    return ShapeRange(at("minimum"), at("optimum"), at("maximum"))


def _check_axis(manifest: Manifest, axis: str, low: int, high: int, what: str) -> None:
    allowed = manifest.axes.get(axis)
    if allowed is not None and not allowed.minimum <= low <= high <= allowed.maximum:
        asked = str(low) if low == high else f"{low} to {high}"
        raise UsageError(
            f"{what} takes the axis '{axis}' to {asked}, and the artifact was exported for {allowed.minimum} to"
            f" {allowed.maximum}",
            "Stay within, or export the artifact again with a wider range.",
        )


def _listed(sides: Sequence[int]) -> str:
    return ", ".join(f"{side} px" for side in sides)
