"""Time of an iteration: scaled from runs made on this computer, and for full-size models from rates measured on a GPU.

Imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from fmg.core import metric_keys as keys
from fmg.core.errors import FmgError
from fmg.core.geometry import ModelGeometry
from fmg.data.run_folder import RUNS, list_runs
from fmg.data.run_metrics import read_metrics
from fmg.recipe import Recipe
from fmg.training.launch import Sizes

_STAGES = ("rollout", "decode", "reward", "update")

SHARE_OF_PEAK: Mapping[str, float] = {"rollout": 0.293, "update": 0.226}
"""Shares of an H200's peak that 8 B parameters reached at 512 px: benchmarks/results/gpu_check.json."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that a full-size run is planned for.

    Attributes:
        name: the product.
        memory: bytes, as its data sheet states them.
        peak: floating-point operations a second of its data sheet, dense bf16 with fp32 accumulation.
    """

    name: str
    memory: float
    peak: float


GPUS = (
    Gpu("RTX 4090", 24e9, 165.2e12),
    Gpu("L40S", 48e9, 362.05e12),
    Gpu("H100 SXM", 80e9, 989.4e12),
    Gpu("H200", 141e9, 989.4e12),
)
"""One of each size; NVIDIA's data sheets."""


def transitions_of(recipe: Recipe) -> int:
    """Stochastic transitions of one sample: all steps but the last, or those of the window; 0 where none is needed."""
    if recipe.objective.config.needs == "samples":
        return 0
    if recipe.rollout.kind == "branch":
        return 1
    window = recipe.rollout.window
    return recipe.rollout.steps - 1 if window is None else window.size


def rows_of(recipe: Recipe) -> int:
    """Rows that the updates of one iteration share: one a branched group, else what the objective makes of a sample."""
    if recipe.rollout.kind == "branch":
        return recipe.rollout.groups
    return recipe.rollout.samples * recipe.objective.config.rows_per_sample(transitions_of(recipe))


def rollout_nfe(recipe: Recipe, steps: Sequence[float] | None = None, fill: float = 1.0) -> float:
    """Network evaluations of one row in the rollout of one iteration.

    Args:
        recipe: the run.
        steps: step at which each group of a branched rollout branches. None takes what is known before the run: the
            first, or the mean of all, since adaptive steps depend on rewards.
        fill: rows that are computed for each one that siblings share, as of `filled_rows`.
    """
    shape, transitions = recipe.rollout, transitions_of(recipe)
    if not transitions:
        return shape.samples * shape.steps
    calls = recipe.stochasticizer.config.requires().calls
    if shape.kind == "chain":
        return shape.samples * (transitions * calls + shape.steps - transitions)
    if steps is None:
        steps = [0.0 if shape.branch.steps == "first" else (shape.steps - 2) / 2] * shape.groups
    before = calls if shape.branch.prefix == "stochastic" else 1
    completed = [1.0 if shape.branch.completion == "jump" else shape.steps - 1 - k for k in steps]
    return sum((k * before + calls) * fill + shape.group_size * rest for k, rest in zip(steps, completed, strict=True))


def filled_rows(recipe: Recipe, sizes: Sizes) -> float:
    """Rows computed for each row that the siblings of a group share: a bf16 call is filled up to a micro-batch."""
    if recipe.rollout.kind == "chain" or recipe.train.dtype != "bf16":
        return 1.0
    return max(1.0, sizes.micro_batch / max(1, sizes.rollout_batch // recipe.rollout.group_size))


@dataclass(frozen=True)
class Work:
    """What an iteration does, in the units that its stages' times grow with."""

    images: int
    rollout_calls: float
    update_calls: int

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        """Counts of one iteration: the updates go once over every row, and replay the transition that it holds."""
        calls = recipe.stochasticizer.config.requires().calls if transitions_of(recipe) else 1
        return cls(recipe.rollout.samples, rollout_nfe(recipe), rows_of(recipe) * calls)

    @property
    def row_nfe(self) -> float:
        """Network evaluations of one row in an iteration, a backward pass counted as two (docs/math.md, eq. 31)."""
        return self.rollout_calls + 3 * self.update_calls


def seconds_on(gpu: Gpu, recipe: Recipe, sizes: Sizes, geometry: ModelGeometry) -> float:
    """Seconds that the network takes in one iteration on one GPU, at the shares of its peak measured on an H200.

    Decoding, rewards and evaluations come on top.
    """
    # the forward pass, again where blocks are recomputed, the gradient of activations, that of all weights
    passes = 2 + geometry.checkpointing + (recipe.train.trainable == "full")
    rollout = rollout_nfe(recipe, fill=filled_rows(recipe, sizes))
    flops = {"rollout": rollout, "update": passes * Work.of(recipe).update_calls}
    busy = sum(flops[stage] / share for stage, share in SHARE_OF_PEAK.items())
    return busy * geometry.call_flops / gpu.peak


@dataclass(frozen=True)
class Estimate:
    """Seconds of one iteration, and the run that they were scaled from."""

    seconds: float
    run: Path


def estimate_iteration(recipe: Recipe, root: Path = RUNS) -> Estimate | None:
    """Scales the times of the newest run under `root` with the same model, device, dtype, batch sizes and rewards; None
    without.

    Times of the first iteration, which warms up, are left out where there are others.
    """
    for run in reversed(list_runs(root)):
        try:
            past, lines = Recipe.of_run(run.recipe, allow_code=True), read_metrics(run.metrics)
        except FmgError:
            continue
        timed = [line for line in lines if keys.TIME_ITERATION in line]
        if timed and _alike(recipe, past):
            seconds = _scaled(Work.of(recipe), Work.of(past), timed[1:] or timed)
            return Estimate(seconds, run.path)
    return None


def _alike(recipe: Recipe, past: Recipe) -> bool:
    def traits(r: Recipe) -> tuple[object, ...]:
        rewards = tuple(sorted(reward.label for reward in r.rewards))
        # small calls of a small network cost what large ones do
        sizes = r.rollout.batch_size, r.train.micro_batch
        return r.model, r.objective.name, r.train.device, r.train.dtype, rewards, sizes

    return traits(recipe) == traits(past)


def _scaled(now: Work, past: Work, lines: list[dict[str, object]]) -> float:
    images = now.images / past.images
    scale: Mapping[str, float] = {
        "rollout": now.rollout_calls / past.rollout_calls,
        "decode": images,
        "reward": images,
        "update": now.update_calls / past.update_calls if past.update_calls else images,
    }
    return sum(scale[stage] * _median(lines, keys.time_of(stage)) for stage in _STAGES)


def _median(lines: list[dict[str, object]], key: str) -> float:
    values = [value for line in lines if isinstance(value := line.get(key), (int, float))]
    return float(median(values)) if values else 0.0
