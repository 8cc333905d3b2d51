"""`python -m tests.support.recorded_run RECIPE OUT...`: trains recipes and keeps the gradients of the first update.

Alone or as one of several processes; each pair of arguments is a run of its own in the same process.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

import fmg
from fmg.core.types import Batch
from fmg.registry.recipe import Recipe
from fmg.training.update import Updater


def record(recipe: Recipe, folder: Path, rank: int = 0) -> None:
    """Trains into `folder/run` and writes `folder/gradients-RANK.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    recorded: list[dict[str, torch.Tensor]] = []
    update = Updater.update

    def recording(updater: Updater, batch: Batch) -> dict[str, float]:
        logged = update(updater, batch)
        if not recorded:
            found = {f"{i:04d}": p.grad for i, p in enumerate(updater.parameters) if p.grad is not None}
            recorded.append({name: x.detach().clone() for name, x in found.items()})
        return logged

    Updater.update = recording  # type: ignore[method-assign]
    try:
        fmg.train(recipe, folder / "run")
    finally:
        Updater.update = update  # type: ignore[method-assign]
    save_file(recorded[0], folder / f"gradients-{rank}.safetensors")


def main() -> None:
    import os

    rank = int(os.environ.get("RANK", "0"))
    for recipe, folder in zip(sys.argv[1::2], sys.argv[2::2], strict=True):
        record(Recipe.from_yaml(Path(recipe)), Path(folder), rank)


if __name__ == "__main__":
    main()
