"""What a run leaves behind as a test compares it, and how a test interrupts one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from fmg.core.events import Event, IterationDone


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
