"""Peak memory of a run by part, from counts alone: no weights, no torch.

What the blocks of a model hold is part of its geometry (tests/unit/training/test_plan_memory.py holds plans to measured
peaks). Kernels' own work space and
the allocator's fragments come on top, a few per cent.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmg.core.geometry import LinearModule, ModelGeometry
from fmg.models.lora_presets import expand_targets, is_target
from fmg.registry.recipe import Recipe
from fmg.training.plan_time import transitions_of
from fmg.training.sizes import Sizes

DTYPE_BYTES = {"fp32": 4, "bf16": 2}
FULL = 4
"""Bytes of a number in fp32: adapters, optimizers, latents, images and log-probs always are."""

_REWARD_PARAMETERS: Mapping[str, float] = {
    "hpsv2": 986e6,
    "pickscore": 986e6,
    "clipscore": 428e6,
    "aesthetic": 428e6,
    "imagereward": 448e6,
    "hpsv3": 8.29e9,
    "geneval": 497e6,
}
"""Parameters of the networks that rewards load; other rewards hold nothing on the device."""
_REWARD_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PLACE_OF_IMAGES = (None, "auto")

# Pixels of one decoder call, as in fmg.models.common.model, which imports torch.
DECODE_PIXELS = 2**18


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when the run needs most, by part. The parts add up to the peak."""

    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        """Their sum."""
        return sum(self.parts.values())


def adapted_layers(geometry: ModelGeometry, targets: Sequence[str]) -> list[LinearModule]:
    """The linear layers that a LoRA on `targets` (presets or ends of names) adapts."""
    suffixes = expand_targets(targets)
    return [layer for layer in geometry.linears if is_target(layer.name, suffixes)]


def adapter_parameters(layers: Sequence[LinearModule], rank: int) -> int:
    """Parameters of a LoRA of this rank: A is (rank, inputs), B is (outputs, rank)."""
    return sum(rank * (layer.inputs + layer.outputs) for layer in layers)


def plan_memory(recipe: Recipe, geometry: ModelGeometry, sizes: Sizes, devices: int = 1) -> Memory:
    """The peak of a training run on each of `devices` equal devices, which share the samples of an iteration.

    It is reached in an update: the largest of the activations of an update, of a rollout call and of a decoder call is
    counted beside what is there all the time.
    """
    number = DTYPE_BYTES[recipe.train.dtype]
    layers = adapted_layers(geometry, recipe.lora.target_names())
    trained = adapter_parameters(layers, recipe.lora.rank)
    encoders = geometry.encoder_parameters * number if geometry.encoders_resident else 0
    work = max(
        update_bytes(geometry, layers, recipe.lora.rank, number, sizes.micro_batch),
        forward_bytes(geometry, layers, number, sizes.rollout_batch),
        decode_bytes(geometry, number, sizes.rollout_batch),
    )
    return Memory(
        {
            "transformer": geometry.parameters * number,
            "text encoders": encoders,
            "autoencoder": geometry.decoder_parameters * number,
            # the adapter, its gradient, the frozen old policy, and the copy that the movement gate compares with
            "adapter and its copies": 4 * trained * FULL,
            "optimizer": optimizer_bytes(recipe.optimizer.name, layers, recipe.lora.rank),
            "rollout store": rollout_bytes(recipe, geometry, number, devices),
            "activations": work,
            "rewards": reward_bytes(recipe),
        }
    )


def update_bytes(
    geometry: ModelGeometry, layers: Sequence[LinearModule], rank: int, number: int, micro_batch: int
) -> int:
    """Activations of one forward and backward pass of `micro_batch` rows through the adapted transformer.

    Each block keeps what its kind says. A LoRA keeps its input in fp32: one for all layers that read it in fp32 runs, a
    copy for each in bf16 ones.
    """
    adapted = _adapter_inputs(geometry, layers, rank, number)
    # the backward pass begins in the last block
    extra = geometry.blocks[-1].backward.size(number)
    count = sum(kind.count for kind in geometry.blocks)
    if geometry.checkpointing:
        largest = max(kind.kept.size(number) for kind in geometry.blocks)
        return int(micro_batch * (geometry.unit * (count * number + largest + extra) + adapted // count))
    kept = sum(kind.count * kind.kept.size(number) for kind in geometry.blocks)
    return int(micro_batch * (geometry.unit * (kept + extra) + adapted))


def forward_bytes(geometry: ModelGeometry, layers: Sequence[LinearModule], number: int, rows: int) -> int:
    """The most that a forward pass of `rows` rows without gradients holds at once, inside its widest block."""
    kind = geometry.blocks[-1]
    wide = any(layer.outputs == 4 * geometry.width for layer in layers)
    added = (kind.forward_wide if number == FULL else kind.low_wide) if wide else 0
    return int(rows * geometry.unit * (kind.forward.size(number) + added))


def decode_bytes(geometry: ModelGeometry, number: int, rows: int) -> int:
    """The most that decoding holds at once; images go through the decoder a few at a time."""
    pixels = geometry.resolution**2
    return min(rows, max(1, DECODE_PIXELS // pixels)) * pixels * int(geometry.decoder.size(number))


def rollout_bytes(recipe: Recipe, geometry: ModelGeometry, number: int, devices: int = 1) -> int:
    """States, conditioning and images of one iteration: as the rollout, as the batch, and the part of one update."""
    images = -(-recipe.rollout.groups * recipe.rollout.group_size // devices)
    transitions = transitions_of(recipe)
    rows = images * max(1, transitions)
    part = -(-rows // recipe.train.updates_per_iteration)
    latents = images + 3 * (images * transitions + rows + part)
    conditioned = images + rows + part
    pixels = images * 3 * geometry.resolution**2
    return latents * geometry.latent * FULL + conditioned * geometry.conditioning * number + pixels * FULL


def optimizer_bytes(name: str, layers: Sequence[LinearModule], rank: int) -> int:
    """State of an optimizer over a LoRA, in fp32. An unknown optimizer is taken for one with two moments."""
    if name == "adafactor":
        # a row and a column of second moments for each matrix
        return FULL * sum(layer.inputs + layer.outputs + 2 * rank for layer in layers)
    moments = {"sgd": 1, "muon": 1}.get(name, 2)
    return FULL * moments * adapter_parameters(layers, rank)


def reward_bytes(recipe: Recipe) -> int:
    """Weights of the reward networks that run where the images are."""
    total = 0.0
    for reward in recipe.measured_rewards:
        options = reward.config.model_dump()
        if options.get("device") in _PLACE_OF_IMAGES:
            size = _REWARD_BYTES.get(str(options.get("dtype")), FULL)
            total += _REWARD_PARAMETERS.get(reward.name, 0) * size
    return int(total)


def _adapter_inputs(geometry: ModelGeometry, layers: Sequence[LinearModule], rank: int, number: int) -> int:
    tokens = geometry.tokens
    inner = sum(tokens[layer.tokens] * rank for layer in layers)
    if number < FULL:
        return FULL * (inner + sum(tokens[layer.tokens] * layer.inputs for layer in layers))
    shared = {layer.source: tokens[layer.tokens] * layer.inputs for layer in layers}
    return FULL * (inner + sum(shared.values()))
