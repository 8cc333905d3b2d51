"""`python -m tests.support.objective_iterations PLAN.json`: one iteration of each recipe, alone or as one of several.

The plan is a list of [folder, recipe file]. Each process leaves the trained weights in FOLDER as `weights-RANK`, the
main one the line of metrics as well.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file

from fmg.core.events import ignore
from fmg.core.signals import Signals
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.training.compose import compose, shard_base
from fmg.training.distributed import DistContext, dist_context
from fmg.training.launch import Sizes, read_launch
from fmg.training.trainer import Trainer


def iterate(plan: Iterable[tuple[str, str]], dist: DistContext) -> None:
    """Runs the first iteration of each recipe, without evaluations and checkpoints."""
    for folder, file in plan:
        recipe = Recipe.from_yaml(Path(file), allow_code=True)
        composed = compose(recipe, torch.device("cpu"), torch.float32)
        if dist.is_distributed and recipe.train.parallel == "fsdp2":
            shard_base(composed)
        run = RunFolder(Path(folder))
        run.path.mkdir(parents=True, exist_ok=True)
        # calls of one shape, whose rounding is the same in one process and in two
        trainer = Trainer(composed, run, Sizes(4, 4), ignore, dist)
        trainer.iterate(0)
        weights = {name: p.detach().clone() for name, p in composed.model.trainable()}
        save_file(weights, run.path / f"weights-{dist.rank}.safetensors")


if __name__ == "__main__":
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    with dist_context(read_launch(), torch.device("cpu"), ignore, lambda: None, Signals()) as dist:
        iterate(plan, dist)
