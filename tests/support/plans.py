"""A plan of a run against what the run takes."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.memory_meter import MemoryMeter
from fmg.core.events import ignore
from fmg.core.specs import ModelGeometry
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.launch import choose_sizes
from fmg.training.plan_memory import plan_memory
from fmg.training.trainer import Trainer

CPU = torch.device("cpu")
FACTOR = 1.3
"""A planned peak lies within this factor of the measured one."""


def geometry_of(recipe: Recipe) -> ModelGeometry:
    """The geometry of a model that states one."""
    geometry = recipe.model.config.geometry()
    assert geometry is not None
    return geometry


def check_peak(recipe: Recipe, folder: Path) -> None:
    """Checks the planned peak of one iteration on the CPU, run in `folder`, against the measured one."""
    sizes = choose_sizes(recipe, "cpu")
    composed = compose(recipe, CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.dtype])
    parts = composed.model.components  # type: ignore[attr-defined]
    loaded = (parts.transformer, parts.vae, *parts.text.encoders)
    before = sum(p.nbytes for module in loaded for p in module.parameters())
    with MemoryMeter() as meter:
        Trainer(composed, RunFolder(folder), sizes, ignore).iterate(0)
    measured = before + meter.peak
    planned = plan_memory(recipe, geometry_of(recipe), sizes).peak
    assert measured / FACTOR < planned < measured * FACTOR, (planned, measured)
