"""How many samples go through the network at once: chosen by device when a recipe leaves it open. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from fmg.registry.recipe import Recipe

# Measured with benchmarks/overhead.py on the embedded models: larger CPU batches fall out of the cache.
_CPU_BATCH = 96
_GPU_BATCH = 16


@dataclass(frozen=True)
class Sizes:
    """Samples a rollout call and rows an update call."""

    rollout_batch: int
    micro_batch: int


def choose_sizes(recipe: Recipe, device_type: str) -> Sizes:
    """The recipe's sizes, or else those of the type of device; never more than there are samples."""
    samples = recipe.rollout.groups * recipe.rollout.group_size
    default = _CPU_BATCH if device_type == "cpu" else _GPU_BATCH
    rollout_batch = min(samples, recipe.rollout.batch_size or default)
    return Sizes(rollout_batch, recipe.train.micro_batch or rollout_batch)
