"""Calibrates fp8: the largest input of each layer over a few images of training prompts.

The images are sampled in torch as the run samples them, in fp32, with fixed seeds. Evaluation prompts are left out, so
an export is judged on prompts that it has not seen. The record is a file of the artifact, and `fmg verify` repeats the
calibration.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from fmg.core.errors import CheckpointError, UsageError, reason
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.json_io import read_object, write_json
from fmg.data.prompt_sets import load_prompts
from fmg.export.fp8 import input_scales, scale_of, stored_scales
from fmg.inference import Generator
from fmg.inference.artifact.decode import decode
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import TRANSFORMER
from fmg.inference.torch_backend import TorchBackend
from fmg.models.common.model import AdaptedModel
from fmg.recipe import Recipe
from fmg.rl.keyed_noise import sub_seed

CALIBRATION = "calibration.json"
"""File of an artifact."""
IMAGES = 32
"""Images of each size."""
_BATCH = 8
_SEED = 8
_AGREES = 0.02
"""Relative difference of two calibrations on different devices."""


@dataclass(frozen=True)
class Calibration:
    """What was measured, and on which images.

    Attributes:
        schema: version of this layout.
        method: `max`, the largest magnitude.
        prompts: sha256 of the prompts in their order.
        images: number of images of each size.
        seed: of the noise.
        grid, steps: how they were sampled.
        resolutions: sides of the images in pixels.
        inputs: largest magnitude of the input of each layer, by its name in the transformer.
    """

    schema: int
    method: str
    prompts: str
    images: int
    seed: int
    grid: str | tuple[float, ...]
    steps: int
    resolutions: tuple[int, ...]
    inputs: Mapping[str, float]

    def write(self, file: Path) -> None:
        write_json(file, asdict(self))

    @classmethod
    def read(cls, file: Path) -> Calibration:
        """The record in a file.

        Raises:
            CheckpointError: it is damaged.
        """
        try:
            return decode(cls, read_object(file))
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{file} is not the record of a calibration: {reason(error)}", "Export the artifact again."
            ) from None

    def other(self, again: Calibration) -> str:
        """How a repeated calibration differs; empty if it does not."""
        ours, theirs = ({key: x for key, x in asdict(one).items() if key != "inputs"} for one in (self, again))
        for key, value in ours.items():
            if value != theirs[key]:
                return f"{key} is {value} in the record, but {theirs[key]} for the run"
        if self.inputs.keys() != again.inputs.keys():
            return "the record is for other layers"
        for name, largest in self.inputs.items():
            if abs(largest - again.inputs[name]) > _AGREES * again.inputs[name]:
                return f"the largest input of {name} is {largest:.4g} in the record, but {again.inputs[name]:.4g}"
        return ""


def calibration_prompts(recipe: Recipe) -> tuple[str, ...]:
    """Training prompts, spread evenly over their set, none of which is an evaluation prompt.

    Raises:
        UsageError: there is none.
    """
    held_out = {prompt.text for prompt in load_prompts(recipe.eval.prompts)}
    prompt_set = load_prompts(recipe.prompts)
    texts = (prompt_set[i].text for i in range(len(prompt_set)))
    known = [text for text in texts if text not in held_out]
    if not known:
        raise UsageError(
            "fp8 is calibrated on training prompts that are not evaluation prompts, and the recipe has none",
            "Give the recipe prompts or eval.prompts of its own, or export with --precision bf16.",
        )
    return tuple(known[i * len(known) // IMAGES if len(known) > IMAGES else i % len(known)] for i in range(IMAGES))


def calibrate(
    model: AdaptedModel[Any],
    recipe: Recipe,
    shapes: Mapping[int, tuple[int, int, int]],
    layers: Sequence[str],
    observer: Observer = ignore,
) -> Calibration:
    """Measures the largest input of some linear layers of the network.

    Args:
        model: with the adapter of the run, in fp32.
        recipe: prompts, grid and steps.
        shapes: shapes of a latent by the side of the image in pixels.
        layers: their names in the network, without those of an adapter.
        observer: receives the progress.

    Raises:
        UsageError: the recipe has no prompts for it.
    """
    prompts, rollout = calibration_prompts(recipe), recipe.rollout
    seeds = [sub_seed(_SEED, i) for i in range(len(prompts))]
    network: nn.Module = model.network
    with _largest_inputs(network, layers) as largest:
        for number, shape in enumerate(shapes.values()):
            observer(StageProgress("calibration", number, len(shapes)))
            backend = TorchBackend(model, latent_shape=shape)
            generator = Generator(backend, rollout.grid, rollout.steps, _BATCH, tells=False)
            generator.generate(prompts, seeds, progress=False)
        observer(StageProgress("calibration", len(shapes), len(shapes)))
    return Calibration(
        schema=1,
        method="max",
        prompts=hashlib.sha256(json.dumps(prompts).encode()).hexdigest(),
        images=len(prompts),
        seed=_SEED,
        grid=rollout.grid,
        steps=rollout.steps,
        resolutions=tuple(shapes),
        inputs={name: float(x) for name, x in largest.items()},
    )


def other_calibration(artifact: Artifact, model: AdaptedModel[Any], recipe: Recipe, observer: Observer) -> str:
    """How the calibration of an fp8 artifact differs from a new one; empty if it does not.

    Raises:
        CheckpointError: its record is missing or damaged.
        UsageError: the recipe has no prompts for it.
    """
    stated, sampling = Calibration.read(artifact.path(CALIBRATION)), artifact.manifest.sampling
    scales = input_scales(stored_scales(artifact.onnx(TRANSFORMER)))
    for name, scale in scales.items():
        # layers that read the same tensor share one scale, which the first of them names
        if name not in stated.inputs or scale != scale_of(stated.inputs[name]):
            return f"the graph's scale for the input of {name} is {scale:.4g}, not the one of the record"
    shapes = {side: sampling.latent_shape(side) for side in sampling.resolutions}
    return stated.other(calibrate(model, recipe, shapes, list(stated.inputs), observer))


@contextmanager
def _largest_inputs(network: nn.Module, layers: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Records the largest magnitude of each layer's input in the body."""
    largest: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            found = args[0].detach().float().abs().max()
            largest[name] = found if name not in largest else largest[name].maximum(found)

        return hook

    handles = [network.get_submodule(name).register_forward_pre_hook(keep(name)) for name in layers]
    try:
        yield largest
    finally:
        for handle in handles:
            handle.remove()
