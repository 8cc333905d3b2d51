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


@dataclass(frozen=True)
class Sizes:
    """Samples a rollout call and rows an update call."""

    rollout_batch: int
    micro_batch: int


def choose_sizes(recipe: Recipe, device_type: str) -> Sizes:
    """The recipe's sizes, or else those of the type of device and model; never more than there are samples."""
    samples = recipe.rollout.groups * recipe.rollout.group_size
    on_gpu = _GPU_BATCH if recipe.model.config.spec().gpu_memory_gb else _GPU_BATCH_OF_SMALL
    default = _CPU_BATCH if device_type == "cpu" else on_gpu
    rollout_batch = min(samples, recipe.rollout.batch_size or default)
    return Sizes(rollout_batch, recipe.train.micro_batch or rollout_batch)
