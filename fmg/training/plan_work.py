"""The work of an iteration and the trained tensors of a recipe, in numbers. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmg.core.specs import LinearModule, ModelGeometry, expand_targets, is_target
from fmg.recipe import Recipe
from fmg.training.launch import Sizes

Shape = tuple[int, ...]


def transitions_of(recipe: Recipe) -> int:
    """Stochastic transitions of one sample: all steps but the last, or those of the window; 0 if none is needed."""
    if recipe.objective.config.needs != "transitions":
        return 0
    if recipe.rollout.kind == "branch":
        return 1
    window = recipe.rollout.window
    return recipe.rollout.steps - 1 if window is None else window.size


def stochasticizer_of(recipe: Recipe) -> str:
    """The name of the stochasticizer, and whether it has no part in the run."""
    used = recipe.objective.config.needs == "transitions"
    return recipe.stochasticizer.name + ("" if used else f", not used by {recipe.objective.name}")


def rows_of(recipe: Recipe) -> int:
    """Rows that the updates of one iteration share: one per branched group, else as many as the objective needs."""
    if recipe.rollout.kind == "branch":
        return recipe.rollout.groups
    return recipe.rollout.samples * recipe.objective.config.rows_per_sample(transitions_of(recipe))


def rollout_nfe(recipe: Recipe, steps: Sequence[float] | None = None, fill: float = 1.0) -> float:
    """Network evaluations of one row in the rollout of one iteration.

    Args:
        recipe: the run.
        steps: step at which each group of a branched rollout branches. None takes the first, or the mean of all where
            steps are only known during the run.
        fill: rows computed for each row that siblings share, as in `filled_rows`.
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


def recomputes_jumps(recipe: Recipe) -> bool:
    """Whether the jumps that rewards are differentiated through are computed again in the backward pass."""
    objective = recipe.objective.config
    if objective.needs != "gradients" and objective.last_step is None:
        return False
    options = objective if objective.last_step is None else objective.last_step
    checkpointing: bool | None = getattr(options, "checkpointing", None)
    if checkpointing is not None:
        return checkpointing
    device = recipe.train.device
    return device.startswith("cuda") or (device == "auto" and recipe.model.config.spec().gpu_memory_gb > 0)


def filled_rows(recipe: Recipe, sizes: Sizes) -> float:
    """Rows computed for each row that the siblings of a group share: bf16 calls are padded to a micro-batch."""
    if recipe.rollout.kind == "chain" or recipe.train.dtype != "bf16":
        return 1.0
    return max(1.0, sizes.micro_batch / max(1, sizes.rollout_batch // recipe.rollout.group_size))


@dataclass(frozen=True)
class Work:
    """The work of an iteration, in the units that the times of its stages are proportional to."""

    images: int
    rollout_calls: float
    update_calls: int
    frozen_calls: float

    @classmethod
    def of(cls, recipe: Recipe) -> Work:
        """Counts one iteration: the updates replay the transition of every row once with gradients, and make the
        `frozen_calls` that the objective declares without, and those that checkpointing repeats."""
        calls = recipe.stochasticizer.config.requires().calls if transitions_of(recipe) else 1
        objective, rows = recipe.objective.config, rows_of(recipe)
        trained, last = objective.trained_calls(calls), objective.last_step is not None
        again = (1 if last else trained) if recomputes_jumps(recipe) else 0
        frozen = objective.frozen_calls(calls) + again
        return cls(recipe.rollout.samples, rollout_nfe(recipe), rows * (trained + last), rows * frozen)

    @property
    def row_nfe(self) -> float:
        """Network evaluations of one row in an iteration, a backward pass counted as two (docs/math.md, eq. 31)."""
        return self.rollout_calls + self.update_nfe

    @property
    def update_nfe(self) -> float:
        """The part of `row_nfe` that the updates have."""
        return 3 * self.update_calls + self.frozen_calls


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a run.

    Attributes:
        layers: linear layers with a LoRA.
        lora: shapes of the LoRA's tensors.
        unfrozen: shapes of the trained weights of the base.
        whole: whether these are all weights.
        words: a description.
    """

    layers: tuple[LinearModule, ...]
    lora: tuple[Shape, ...]
    unfrozen: tuple[Shape, ...]
    whole: bool
    words: str

    @property
    def parameters(self) -> int:
        return count_numbers(self.lora) + self.base_parameters

    @property
    def base_parameters(self) -> int:
        """The number of trained values that belong to the base."""
        return count_numbers(self.unfrozen)


def trained_by(recipe: Recipe, geometry: ModelGeometry) -> Trained:
    """What `train.trainable` and `lora` of a recipe train in a model of this geometry."""
    what, rank = recipe.train.trainable, recipe.lora.rank
    if what == "full":
        matrices = [(layer.outputs, layer.inputs) for layer in geometry.linears]
        rest = geometry.parameters - count_numbers(matrices)
        return Trained((), (), (*matrices, (rest,)), whole=True, words="every weight")
    layers = adapted_layers(geometry, recipe.lora.target_names())
    lora = [shape for layer in layers for shape in ((rank, layer.inputs), (layer.outputs, rank))]
    words = f"LoRA of rank {rank} on {len(layers)} modules"
    if what == "lora":
        return Trained(tuple(layers), tuple(lora), (), whole=False, words=words)
    embedder = [layer for layer in geometry.linears if layer.name.startswith(f"{geometry.second_embedder}.")]
    unfrozen: list[Shape] = [(layer.outputs, layer.inputs) for layer in embedder]
    unfrozen += [(layer.outputs,) for layer in embedder if layer.bias]
    words = f"{words} and the second-time embedder"
    return Trained(tuple(layers), tuple(lora), tuple(unfrozen), whole=False, words=words)


def adapted_layers(geometry: ModelGeometry, targets: Sequence[str]) -> list[LinearModule]:
    """The linear layers that a LoRA on `targets` (presets or ends of names) adapts."""
    suffixes = expand_targets(targets)
    return [layer for layer in geometry.linears if layer.tokens != "none" and is_target(layer.name, suffixes)]


def count_numbers(shapes: Sequence[Shape]) -> int:
    """The number of values in tensors of these shapes."""
    return sum(math.prod(shape) for shape in shapes)
