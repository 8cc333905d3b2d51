"""`python -m tests.support.recorded_run PLAN.json`: trains recipes one after the other, alone or as one of several.

The plan maps the folder of each run to its recipe file and, for a run that is cut by Ctrl-C and resumed, to the
iteration after which that happens (`[recipe, iteration]`, with null for a run that goes through).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

import fmg
from fmg.core.events import Event, IterationDone
from fmg.core.types import Batch
from fmg.registry.recipe import Recipe
from fmg.training.api import resume
from fmg.training.update import Updater

Plan = Mapping[str, tuple[str, int | None]]


def record(plan: Plan, rank: int = 0) -> None:
    """Trains each recipe into `FOLDER/run` and keeps the first update's gradients in `FOLDER/gradients-RANK`."""
    for folder, (recipe, cut) in plan.items():
        target = Path(folder)
        target.mkdir(parents=True, exist_ok=True)
        gradients = _train(Recipe.from_yaml(Path(recipe), allow_code=True), target / "run", cut)
        save_file(gradients, target / f"gradients-{rank}.safetensors")


def _train(recipe: Recipe, run: Path, cut: int | None) -> dict[str, torch.Tensor]:
    recorded: list[dict[str, torch.Tensor]] = []
    update = Updater.update

    def recording(updater: Updater, batch: Batch) -> dict[str, float]:
        # the norm is far above any gradient here, so that what is kept has not been scaled
        logged = update(updater, batch)
        if not recorded:
            found = {f"{i:04d}": p.grad for i, p in enumerate(updater.parameters) if p.grad is not None}
            recorded.append({name: x.detach().clone() for name, x in found.items()})
        return logged

    def stop(event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration == cut:
            os.kill(os.getpid(), signal.SIGINT)

    Updater.update = recording  # type: ignore[method-assign]
    try:
        result = fmg.train(recipe, run, stop)
        assert result.interrupted == (cut is not None)
        if cut is not None:
            resume(run, allow_code=True)
    finally:
        Updater.update = update  # type: ignore[method-assign]
    return recorded[0]


if __name__ == "__main__":
    record(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), int(os.environ.get("RANK", "0")))
