"""What a recipe trains, in numbers: tensors, optimizer state, copies, files. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fmg.core.geometry import LinearModule, ModelGeometry
from fmg.core.specs import expand_targets, is_target
from fmg.recipe import Recipe

FULL = 4
"""Bytes of a number in fp32: what is trained, optimizers, latents, images and log-probs always are."""

_SECOND_TIME = "timestep_embedder2."
# bitsandbytes keeps fp32 moments of smaller tensors, and one fp32 scale for each block of larger ones.
_SMALL, _BLOCK = 4096, 256
# A LoRA is written as a diffusers file and as a PEFT file.
_LORA_FILES = 2
# The newest checkpoint and the best one.
_CHECKPOINTS = 2

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """The trained tensors of a run.

    Attributes:
        layers: linear layers with a LoRA.
        lora: shapes of the LoRA's tensors.
        unfrozen: shapes of the weights of the base that are trained themselves.
        whole: whether these are all weights.
        words: for people.
    """

    layers: tuple[LinearModule, ...]
    lora: tuple[Shape, ...]
    unfrozen: tuple[Shape, ...]
    whole: bool
    words: str

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return _count(self.lora) + self.base_parameters

    @property
    def base_parameters(self) -> int:
        """How many of them are the base's own."""
        return _count(self.unfrozen)


def trained_by(recipe: Recipe, geometry: ModelGeometry) -> Trained:
    """What `train.trainable` and `lora` of a recipe come to in a model of this geometry."""
    what, rank = recipe.train.trainable, recipe.lora.rank
    if what == "full":
        matrices = [(layer.outputs, layer.inputs) for layer in geometry.linears]
        rest = geometry.parameters - _count(matrices)
        return Trained((), (), (*matrices, (rest,)), whole=True, words="every weight")
    layers = adapted_layers(geometry, recipe.lora.target_names())
    lora = [shape for layer in layers for shape in ((rank, layer.inputs), (layer.outputs, rank))]
    words = f"LoRA of rank {rank} on {len(layers)} modules"
    if what == "lora":
        return Trained(tuple(layers), tuple(lora), (), whole=False, words=words)
    embedder = [layer for layer in geometry.linears if layer.name.startswith(_SECOND_TIME)]
    unfrozen = [shape for layer in embedder for shape in ((layer.outputs, layer.inputs), (layer.outputs,))]
    words = f"{words} and the embedder of the second time"
    return Trained(tuple(layers), tuple(lora), tuple(unfrozen), whole=False, words=words)


def adapted_layers(geometry: ModelGeometry, targets: Sequence[str]) -> list[LinearModule]:
    """The linear layers that a LoRA on `targets` (presets or ends of names) adapts."""
    suffixes = expand_targets(targets)
    return [layer for layer in geometry.linears if is_target(layer.name, suffixes)]


def copies_bytes(recipe: Recipe, trained: Trained) -> int:
    """The trained weights in fp32, their gradients, and the copies that a run compares with."""
    asked = recipe.objective.config.compares_with
    # the weights, their gradient, and what the movement gate compares with before the first update is over
    copies = 3
    if trained.whole:
        return (copies + len(asked)) * FULL * trained.parameters
    # a frozen old policy of everything, and the base of what was unfrozen
    return FULL * ((copies + 1) * trained.parameters + trained.base_parameters)


def average_bytes(recipe: Recipe, trained: Trained) -> int:
    """The moving average."""
    return 0 if recipe.train.ema_decay is None else FULL * trained.parameters


def optimizer_bytes(name: str, shapes: Sequence[Shape]) -> int:
    """State of an optimizer over tensors of these shapes. An unknown optimizer is taken for one with two moments."""
    if name == "adafactor":
        # a row and a column of second moments for each matrix
        return FULL * sum(sum(shape) for shape in shapes)
    if name == "adamw8bit":
        return sum(_moments_8bit(math.prod(shape)) for shape in shapes)
    if name == "muon":
        return FULL * sum(math.prod(shape) * (1 if len(shape) == 2 else 2) for shape in shapes)
    return FULL * {"sgd": 1}.get(name, 2) * _count(shapes)


def disk_bytes(recipe: Recipe, trained: Trained, number: int) -> tuple[int, int]:
    """Bytes of the checkpoints that a run keeps, and of its state: two while the newer one is being written."""
    numbers = trained.parameters
    files = number * numbers if trained.whole else FULL * (_LORA_FILES * _count(trained.lora) + trained.base_parameters)
    averaged = recipe.train.ema_decay is not None
    checkpoints = files * (_CHECKPOINTS + averaged)
    if recipe.train.state_every is None:
        return checkpoints, 0
    state = FULL * numbers * (1 + averaged) + optimizer_bytes(recipe.optimizer.name, (*trained.lora, *trained.unfrozen))
    return checkpoints, 2 * state


def _moments_8bit(count: int) -> int:
    return 2 * FULL * count if count < _SMALL else 2 * (count + FULL * -(-count // _BLOCK))


def _count(shapes: Sequence[Shape]) -> int:
    return sum(math.prod(shape) for shape in shapes)
