"""How many samples go through the network at once: chosen by device when a recipe leaves it open. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fmg.registry.recipe import Recipe

# Measured with benchmarks/overhead.py on the embedded models: larger CPU batches fall out of the cache.
_CPU_BATCH = 96
_GPU_BATCH = 16
# A small model keeps a GPU waiting for launches: on an H200 an iteration of the embedded default takes 0.29 s with its
# whole rollout at once, and 2.2 s with 16 samples a call.
_GPU_BATCH_OF_SMALL = 512
_SMALL_PARAMETERS, _SMALL_PIXELS = 10_000_000, 64


@dataclass(frozen=True)
class Sizes:
    """Samples a rollout call and rows an update call."""

    rollout_batch: int
    micro_batch: int


def choose_sizes(recipe: Recipe, device_type: str, processes: int = 1) -> Sizes:
    """The recipe's sizes, or else those of the type of device and model; never more than there are samples.

    Args:
        recipe: states sizes, or leaves them open.
        device_type: `cpu` or `cuda`.
        processes: how many share the samples of an iteration by whole calls, so that a call is no more than a share.
    """
    samples = recipe.rollout.samples
    if device_type == "cpu":
        default = _CPU_BATCH
    elif _is_small(recipe):
        share = -(-samples // processes)
        # equal calls, since processes share whole ones
        default = -(-share // -(-share // _GPU_BATCH_OF_SMALL))
    else:
        default = _GPU_BATCH
    rollout_batch = min(samples, recipe.rollout.batch_size or default)
    return Sizes(rollout_batch, recipe.train.micro_batch or rollout_batch)


def _is_small(recipe: Recipe) -> bool:
    """Whether hundreds of rows fit any GPU, as far as it is known; bf16 calls are all padded to the update's rows."""
    model = recipe.model.config
    if recipe.train.dtype != "fp32" or model.spec().resolution > _SMALL_PIXELS:
        return False
    geometry = model.geometry()
    return geometry is not None and geometry.parameters <= _SMALL_PARAMETERS
