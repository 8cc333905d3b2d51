"""`python -m tests.support.recorded_run PLAN.json`: trains recipes one after the other, alone or as one of several.

The plan is a list of `Planned` values. A run leaves in its folder `run/` and, for each process, the gradients of the
first update, or the error that it ended with.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

import fmg
from fmg.core.errors import FmgError
from fmg.core.events import Event, IterationDone
from fmg.core.types import Batch
from fmg.recipe import Recipe
from fmg.training.api import resume
from fmg.training.update import Updater


@dataclass(frozen=True)
class Planned:
    """A run: its folder, its recipe file, and the iteration after which Ctrl-C interrupts it, to be resumed at once."""

    folder: str
    recipe: str
    cut: int | None = None


def record(plan: Sequence[Planned], rank: int = 0) -> None:
    """Trains all of them in this process, which has the given rank."""
    for planned in plan:
        folder = Path(planned.folder)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            gradients = _train(Recipe.from_yaml(Path(planned.recipe), allow_code=True), folder / "run", planned.cut)
        except FmgError as error:
            said = {"kind": type(error).__name__, "what": error.what, "reported": error.reported}
            (folder / f"error-{rank}.json").write_text(json.dumps(said), encoding="utf-8")
        else:
            save_file(gradients, folder / f"gradients-{rank}.safetensors")


def write_plan(file: Path, plan: Sequence[Planned]) -> Path:
    """The plan as a file for other processes."""
    file.write_text(json.dumps([asdict(planned) for planned in plan]), encoding="utf-8")
    return file


def _train(recipe: Recipe, run: Path, cut: int | None) -> dict[str, torch.Tensor]:
    recorded: list[dict[str, torch.Tensor]] = []
    update = Updater.update

    def recording(updater: Updater, batch: Batch) -> dict[str, float]:
        logged = update(updater, batch)
        if not recorded:
            found = {f"{i:04d}": p.grad for i, p in enumerate(updater.parameters) if p.grad is not None}
            recorded.append({name: x.detach().clone() for name, x in found.items()})
        return logged

    def stop(event: Event) -> None:
        # a signal, as from a terminal: only the first process receives events
        if isinstance(event, IterationDone) and event.iteration == cut:
            os.kill(os.getpid(), signal.SIGINT)

    Updater.update = recording  # type: ignore[method-assign]
    # a job in the background ignores it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        result = fmg.train(recipe, run, stop)
        assert result.interrupted == (cut is not None)
        if cut is not None:
            resume(run, allow_code=True)
    finally:
        signal.signal(signal.SIGINT, before)
        Updater.update = update  # type: ignore[method-assign]
    return recorded[0]


if __name__ == "__main__":
    file = Path(sys.argv[1])
    record([Planned(**row) for row in json.loads(file.read_text(encoding="utf-8"))], int(os.environ.get("RANK", "0")))
