"""The files of a run in a comparable form, and ways to interrupt a run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fmg.core.events import Event, IterationDone
from fmg.core.files import SUMS
from fmg.data.checkpoints import existing_index, write_index
from fmg.recipe import Recipe


def metrics(run: Path) -> list[dict[str, float]]:
    """The lines of `metrics.jsonl` without times, which differ from run to run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("time/")} for line in lines]


def adapter(run: Path, checkpoint: str) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, by file and name."""
    files = sorted((run / "checkpoints" / checkpoint).glob("*.safetensors"))
    return {f"{file.stem} {key}": x for file in files for key, x in load_file(file).items()}


def stop_after(iteration: int) -> Callable[[Event], None]:
    """An observer that interrupts the run when the iteration is over, as Ctrl-C does."""

    def hear(event: Event) -> None:
        if isinstance(event, IterationDone) and event.iteration == iteration:
            raise KeyboardInterrupt

    return hear


def change_recipe(run: Path, recipe: Recipe) -> None:
    """Gives a run another recipe, as if it had been started with it."""
    (run / "recipe.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    write_index(run, existing_index(run))


def flip_bit(file: Path) -> None:
    """Damages a file as a bad disk would: one bit in its middle."""
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


def without_digests(run: Path) -> None:
    """Turns a run into one of an older version of fmg, which wrote no digests."""
    for file in run.rglob(SUMS):
        file.unlink()
    for name in ("run.json", "checkpoints/index.json"):
        content = json.loads((run / name).read_text())
        content = {key: value for key, value in content.items() if key not in ("sha256", "files")}
        for entry in content.get("saved", ()):
            del entry["digest"]
        (run / name).write_text(json.dumps(content))
    for file in run.glob("state/*/state.json"):
        state = json.loads(file.read_text())
        identity = dict(state["$pairs"])["run"]["$pairs"]
        identity[:] = [[key, value] for key, value in identity if key in ("model", "created", "recipe")]
        file.write_text(json.dumps(state))


def distance(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Relative L2 distance of two sets of tensors."""
    assert ours.keys() == theirs.keys()
    moved = sum(float((ours[name].double() - theirs[name].double()).square().sum()) for name in ours)
    return (moved / sum(float(x.double().square().sum()) for x in theirs.values())) ** 0.5
