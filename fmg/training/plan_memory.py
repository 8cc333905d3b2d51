"""Peak memory of a run by part, and its files, from counts alone: no weights, no torch.

The memory of a model's blocks is part of its geometry; tests/unit/training/test_plan_memory.py compares plans with
measured peaks. Kernel workspaces and allocator fragmentation add a few per cent. Tracing an iteration with fake tensors
gives the same numbers a hundred times slower (docs/adr/0022-memory-from-counts.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fmg.core.specs import DECODE_PIXELS, LinearModule, ModelGeometry
from fmg.recipe import Recipe
from fmg.training.launch import Sizes
from fmg.training.plan_work import Shape, Trained, count_numbers, recomputes_jumps, rows_of, trained_by, transitions_of

FULL = 4
"""Bytes of a number in fp32: trained weights, optimizers, latents, images and log-probs always are."""
DTYPE_BYTES = {"fp32": 4, "bf16": 2}
_REWARD_PARAMETERS: Mapping[str, float] = {
    "hpsv2": 986e6,
    "pickscore": 986e6,
    "clipscore": 428e6,
    "aesthetic": 428e6,
    "imagereward": 448e6,
    "hpsv3": 8.29e9,
    "deqa": 8.2e9,
    "geneval": 497e6,
    "geneval2": 8.77e9,
    "unifiedreward": 8.77e9,
}
"""Parameters of the networks that rewards load; other rewards need no memory on the device."""
_REWARD_KEPT: Mapping[str, float] = {
    "hpsv2": 129e6,
    "pickscore": 129e6,
    "clipscore": 108e6,
    "aesthetic": 108e6,
    "imagereward": 65e6,
    "hpsv3": 2.1e9,
}
"""Numbers that a differentiated reward keeps of one image for its backward pass. Measured on networks of full size
without memory (the meta device); that of HPSv3 is an estimate from its layers."""
_DECODER_KEPT = 9.1
"""What decoding keeps for its backward pass, relative to its peak without: measured in the same way, 7.5 for
`AutoencoderKL` and 9.1 for DC-AE."""
_REWARD_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_PLACE_OF_IMAGES = (None, "auto")

# bitsandbytes keeps fp32 moments of smaller tensors, and one fp32 scale for each block of larger ones.
_SMALL, _BLOCK = 4096, 256
# A LoRA is written as a diffusers file and as a PEFT file.
_LORA_FILES = 2
# The newest checkpoint and the best one.
_CHECKPOINTS = 2


@dataclass(frozen=True)
class Memory:
    """Bytes on one device at the peak of the run, by part."""

    parts: Mapping[str, int]

    @property
    def peak(self) -> int:
        return sum(self.parts.values())


def plan_memory(
    recipe: Recipe, geometry: ModelGeometry, sizes: Sizes, devices: int = 1, *, sharded: bool = False
) -> Memory:
    """The peak of a training run on each of `devices` equal devices that share the work of an iteration.

    The largest of the activations of an update, a rollout call and a decoder call is counted in addition to what is
    always there. With `sharded` (FSDP2) the transformer is sharded over the devices; then saving, which gathers it to
    verify the file, may need more.
    """
    number = DTYPE_BYTES[recipe.train.dtype]
    trained = trained_by(recipe, geometry)
    generated = max(sizes.rollout_batch, min(recipe.eval.batch_size or 0, recipe.eval.num))
    encoders = geometry.encoder_parameters * number if geometry.encoders_resident else 0
    # an update may have fewer rows than a micro-batch, to which bf16 calls are padded all the same
    part = -(-rows_of(recipe) // (recipe.train.updates_per_iteration * devices))
    micro_batch = sizes.micro_batch if number < FULL else min(sizes.micro_batch, part)
    update = update_bytes(geometry, trained, recipe.lora.rank, number, micro_batch)
    update = gradient_bytes(recipe, geometry, number, micro_batch, update)
    if part <= sizes.micro_batch:
        # in a single pass the gradients take the place of the activations; they are counted with the weights
        update = max(update - FULL * trained.parameters, _cast_bytes(geometry, trained, number))
    work = max(
        update,
        forward_bytes(geometry, trained, number, generated),
        decode_bytes(geometry, number, generated),
        # a whole network that was saved is read back beside the trained one, to verify the file
        geometry.parameters * number if trained.whole else 0,
    )
    rows = max(micro_batch, generated) * geometry.conditioning * number
    whole = (geometry.parameters - trained.base_parameters) * number
    spread = sharded and devices > 1
    share = -(-whole // devices)
    # the block that computes, and the next one, which is being gathered
    gathered = 2 * whole // max(1, sum(kind.count for kind in geometry.blocks))
    training = Memory(
        {
            "transformer": (share + gathered if spread else whole) + geometry.tables * number,
            "text encoders": encoders,
            "autoencoder": geometry.decoder_parameters * number,
            "trained weights and copies": copies_bytes(recipe, trained),
            "moving average": _averages(recipe) * FULL * trained.parameters,
            "optimizer": optimizer_bytes(recipe.optimizer.name, (*trained.lora, *trained.unfrozen)),
            "rollout store": rollout_bytes(recipe, geometry, number, devices),
            "activations": work + rows,
            "rewards": reward_bytes(recipe),
        }
    )
    if not spread:
        return training
    picture = max(forward_bytes(geometry, trained, number, 1), decode_bytes(geometry, number, 1))
    saving = Memory(
        {
            **training.parts,
            "transformer": share + whole + geometry.tables * number,
            "rollout store": 0,
            "activations": picture,
        }
    )
    return max(training, saving, key=lambda memory: memory.peak)


def update_bytes(geometry: ModelGeometry, trained: Trained, rank: int, number: int, micro_batch: int) -> int:
    """Activations of one forward and backward pass of `micro_batch` rows through the trained transformer.

    Each block keeps as much as its kind states. A LoRA keeps its input in fp32: one for all layers that read it in fp32
    runs, a copy for each in bf16 ones. A trained weight keeps its input as the network computes it, and under autocast
    the network's copy of the weight as well.
    """
    adapted = FULL * rank * sum(geometry.tokens[layer.tokens] for layer in trained.layers)
    adapted += _input_bytes(geometry, trained.layers, number, FULL)
    if trained.whole:
        adapted += _input_bytes(geometry, geometry.linears, number, number)
    # the backward pass begins in the last block
    extra = geometry.blocks[-1].backward.size(number)
    count = sum(kind.count for kind in geometry.blocks)
    if geometry.checkpointing:
        largest = max(kind.kept.size(number) for kind in geometry.blocks)
        work = micro_batch * (geometry.unit * (count * number + largest + extra) + adapted // count)
        return int(work) + _cast_bytes(geometry, trained, number)
    kept = sum(kind.count * kind.kept.size(number) for kind in geometry.blocks)
    return int(micro_batch * (geometry.unit * (kept + extra) + adapted)) + _cast_bytes(geometry, trained, number)


def forward_bytes(geometry: ModelGeometry, trained: Trained, number: int, rows: int) -> int:
    """The peak of a forward pass of `rows` rows without gradients, inside its widest block."""
    kind = geometry.blocks[-1]
    wide = any(layer.outputs == 4 * geometry.width for layer in trained.layers)
    added = (kind.forward_wide if number == FULL else kind.low_wide) if wide else 0
    return int(rows * geometry.unit * (kind.forward.size(number) + added)) + _cast_bytes(geometry, trained, number)


def decode_bytes(geometry: ModelGeometry, number: int, rows: int) -> int:
    """The peak of decoding; images pass through the decoder a few at a time, or in tiles."""
    pixels = min(geometry.resolution, geometry.decoder_tile or geometry.resolution) ** 2
    chunk = min(rows, max(1, DECODE_PIXELS // pixels)) * pixels * int(geometry.decoder.size(number))
    # a chunk, or the copies made while images are joined and rescaled; the images themselves are in the rollout store
    return max(chunk, 2 * rows * 3 * geometry.resolution**2 * FULL)


def gradient_bytes(recipe: Recipe, geometry: ModelGeometry, number: int, micro_batch: int, jump: int) -> int:
    """Activations of an update that differentiates rewards, of which one jump needs `jump`.

    They are the largest of a jump's, the decoder's and the rewards', or without checkpointing their sum. A last step
    comes on top of the objective that it is added to.
    """
    objective = recipe.objective.config
    differentiates = objective.needs == "gradients"
    if not differentiates and objective.last_step is None:
        return jump
    pixels = geometry.resolution**2
    decoder = micro_batch * pixels * geometry.decoder.size(number) * _DECODER_KEPT
    rewards = micro_batch * sum(
        _REWARD_KEPT.get(reward.name, 0) * _REWARD_BYTES[reward.config.model_dump().get("dtype", "fp32")]
        for reward in recipe.rewards
        if reward.config.has_gradient
    )
    images = 3 * micro_batch * pixels * FULL
    jumps = objective.trained_calls(1) if differentiates else 1
    work = max(jump, decoder, rewards) if recomputes_jumps(recipe) else jumps * jump + decoder + rewards
    return int(images + work + (0 if differentiates else jump))


def rollout_bytes(recipe: Recipe, geometry: ModelGeometry, number: int, devices: int = 1) -> int:
    """States, conditioning and images of one iteration: the rollout, the batch, and the part of one update.

    Every device has the whole rollout, and the images of its own share.
    """
    images = recipe.rollout.samples
    transitions, rows = transitions_of(recipe), rows_of(recipe)
    part = -(-rows // recipe.train.updates_per_iteration)
    latents = images + 3 * (images * transitions + rows + part)
    if recipe.rollout.kind == "branch":
        # completions, then siblings, state and mean of the rollout, of the batch and of the part of one update
        share = part / rows
        latents = round(images + (images + 2 * rows) * (2 + share))
    if recipe.objective.config.last_step is not None:
        # the state that each row is paired with
        latents += rows + part
    # one row per prompt, shared by samples, rows and parts
    conditioned = recipe.rollout.groups
    pixels = -(-images // devices) * 3 * geometry.resolution**2
    return latents * geometry.latent * FULL + conditioned * geometry.conditioning * number + pixels * FULL


def reward_bytes(recipe: Recipe) -> int:
    """Weights of the reward networks that run on the device of the images."""
    total = 0.0
    for reward in recipe.measured_rewards:
        options = reward.config.model_dump()
        if options.get("device") in _PLACE_OF_IMAGES:
            size = _REWARD_BYTES.get(str(options.get("dtype")), FULL)
            total += _REWARD_PARAMETERS.get(reward.name, 0) * size
    return int(total)


def copies_bytes(recipe: Recipe, trained: Trained) -> int:
    """The trained weights in fp32, their gradients, and the copies that objectives and gates compare with."""
    asked = recipe.objective.config.compares_with
    # the weights, their gradient, and the copy of the movement gate until the first update
    copies = 3
    if trained.whole:
        return (copies + len(asked)) * FULL * trained.parameters
    # an old policy of all of them, and the base of those that were unfrozen
    return FULL * ((copies + 1) * trained.parameters + trained.base_parameters)


def optimizer_bytes(name: str, shapes: Sequence[Shape]) -> int:
    """State of an optimizer over tensors of these shapes; an unknown optimizer counts as one with two moments."""
    if name == "adafactor":
        # a row and a column of second moments per matrix
        return FULL * sum(sum(shape) for shape in shapes)
    if name == "adamw8bit":
        return sum(_moments_8bit(math.prod(shape)) for shape in shapes)
    if name == "muon":
        return FULL * sum(math.prod(shape) * (1 if len(shape) == 2 else 2) for shape in shapes)
    return FULL * {"sgd": 1}.get(name, 2) * count_numbers(shapes)


def disk_bytes(recipe: Recipe, trained: Trained, number: int) -> tuple[int, int]:
    """Bytes of the checkpoints that a run keeps, and of its state: two while the newer one is being written."""
    numbers = trained.parameters
    adapter = FULL * (_LORA_FILES * count_numbers(trained.lora) + trained.base_parameters)
    files = number * numbers if trained.whole else adapter
    averaged = recipe.train.ema_decay is not None
    checkpoints = files * (_CHECKPOINTS + averaged)
    if recipe.train.state_every is None:
        return checkpoints, 0
    state = FULL * numbers * (1 + _averages(recipe)) + optimizer_bytes(
        recipe.optimizer.name, (*trained.lora, *trained.unfrozen)
    )
    return checkpoints, 2 * state


def _averages(recipe: Recipe) -> int:
    """The moving averages: of the weights, and of the policy of the rollouts."""
    return (recipe.train.ema_decay is not None) + (recipe.objective.config.moving_old is not None)


def _moments_8bit(count: int) -> int:
    return 2 * FULL * count if count < _SMALL else 2 * (count + FULL * -(-count // _BLOCK))


def _input_bytes(geometry: ModelGeometry, layers: Sequence[LinearModule], number: int, kept: int) -> int:
    """The inputs of layers: one for all that read it in fp32 runs, else a copy for each, of `kept` bytes a number."""
    inputs = [(layer.source, geometry.tokens[layer.tokens] * layer.inputs) for layer in layers]
    if number < FULL:
        return kept * sum(size for _, size in inputs)
    return FULL * sum(dict(inputs).values())


def _cast_bytes(geometry: ModelGeometry, trained: Trained, number: int) -> int:
    """Copies of fp32 weights in the dtype of the computation, which autocast keeps during a pass."""
    return geometry.parameters * number if trained.whole and number < FULL else 0
