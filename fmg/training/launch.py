"""The layout of a run: its processes as a launcher states them, their device and engine, their batch sizes.

Imports no torch.

`torchrun` and `accelerate launch` set `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`; so can a
shell script. Of Accelerate's own variables only the choice of the engine is read (docs/distributed.md).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.recipe import Recipe

Engine = Literal["ddp", "fsdp2"]

_LAUNCH = "Start with torchrun or accelerate launch, which set it, or unset WORLD_SIZE for one process."
_TRUE = ("1", "true", "yes", "y", "t", "on")

# Measured with benchmarks/overhead.py on the embedded models: larger CPU batches fall out of the cache.
_CPU_BATCH = 96
_GPU_BATCH = 16
# A small model keeps a GPU waiting for launches: on an H200 an iteration of the embedded default takes 0.29 s with its
# whole rollout at once, and 2.2 s with 16 samples a call.
_SMALL_MODEL_GPU_BATCH = 512
_SMALL_PARAMETERS, _SMALL_PIXELS = 10_000_000, 64


@dataclass(frozen=True)
class Launch:
    """This process among those of a run, and among those of its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether it is the one that writes and prints."""
        return self.rank == 0

    @property
    def is_distributed(self) -> bool:
        return self.world_size > 1


def world_size(environment: Mapping[str, str] | None = None) -> int:
    """The number of processes that the environment states, else 1.

    Raises:
        UsageError: `WORLD_SIZE` is not a number of processes.
    """
    return _number(os.environ if environment is None else environment, "WORLD_SIZE", 1, least=1)


def is_main_process(environment: Mapping[str, str] | None = None) -> bool:
    """Whether this process is the one that writes and prints; one without a stated rank is.

    Raises:
        UsageError: `WORLD_SIZE` is not a number of processes.
    """
    env = os.environ if environment is None else environment
    return world_size(env) == 1 or env.get("RANK", "").strip() in ("", "0")


def read_launch(environment: Mapping[str, str] | None = None) -> Launch:
    """This process as the environment describes it; a single one by default.

    Raises:
        UsageError: a variable is missing, not a number or out of range.
    """
    env = os.environ if environment is None else environment
    count = world_size(env)
    if count == 1:
        return Launch()
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        if not env.get(name):
            raise UsageError(f"WORLD_SIZE is {count}, but {name} is not set", _LAUNCH)
    rank = _number(env, "RANK", 0)
    if rank >= count:
        raise UsageError(f"RANK is {rank}, but there are {count} processes", "Count ranks from 0 to WORLD_SIZE - 1.")
    if not 0 < _number(env, "MASTER_PORT", 0) < 2**16:
        raise UsageError(f"MASTER_PORT is {env['MASTER_PORT']}, which is not a port", "Use a free one, such as 29500.")
    # a launcher always states it; a shell script for one machine may leave it out
    local_rank = _number(env, "LOCAL_RANK", rank)
    local_size = _number(env, "LOCAL_WORLD_SIZE", local_rank + 1 if env.get("LOCAL_RANK") else count)
    if local_rank >= local_size:
        raise UsageError(
            f"LOCAL_RANK is {local_rank}, but LOCAL_WORLD_SIZE is {local_size}",
            "Count local ranks from 0 to LOCAL_WORLD_SIZE - 1.",
        )
    return Launch(rank, count, local_rank, local_size)


def choose_engine(recipe: Recipe, environment: Mapping[str, str] | None = None) -> Engine:
    """How several processes share the model: as the recipe says, or with `auto` as Accelerate is configured.

    Raises:
        UsageError: Accelerate is configured for an unsupported engine, or the recipe contradicts it.
    """
    env = os.environ if environment is None else environment
    stated = recipe.train.parallel
    asked = _accelerate_engine(env)
    if asked is not None and stated not in ("auto", asked):
        raise UsageError(
            f"Accelerate is configured for {asked}, but the recipe says train.parallel={stated}",
            "Leave train.parallel at auto, or use the other configuration under configs/accelerate.",
        )
    return asked or ("ddp" if stated == "auto" else stated)


def check_shares(recipe: Recipe, world_size: int, engine: Engine) -> None:
    """Checks that `world_size` processes can share the work, and that each gets some.

    Raises:
        UsageError: there are more processes than samples in an iteration, no frozen base that FSDP2 could shard, or
            completions that need the whole network.
    """
    units, what = recipe.rollout.units, "groups" if recipe.rollout.kind == "branch" else "samples"
    if world_size > units:
        raise UsageError(
            f"{world_size} processes cannot share the {units} {what} of an iteration",
            "Start fewer, or raise rollout.groups or rollout.group_size.",
        )
    if world_size > 1 and engine == "fsdp2" and recipe.train.trainable == "full":
        raise UsageError(
            "FSDP2 shards the frozen base over the processes, but train.trainable=full leaves nothing frozen",
            "Train an adapter, or use DDP (train.parallel=ddp, configs/accelerate/ddp.yaml).",
        )
    backends = {"rollout.branch.backend": recipe.rollout.branch.backend, "eval.backend": recipe.eval.backend}
    for key, backend in backends.items():
        if world_size > 1 and engine == "fsdp2" and backend != "torch":
            raise UsageError(
                f"FSDP2 keeps a shard of the weights in each process, but {key}={backend} needs all of them",
                f"Set {key} to torch, or use DDP (train.parallel=ddp, configs/accelerate/ddp.yaml).",
            )


def device_of(recipe: Recipe, launch: Launch, gpus: int) -> str:
    """The name of this process's device; each of several processes takes the CUDA device of its local rank.

    Args:
        recipe: states a device, or `auto`.
        launch: this process.
        gpus: number of CUDA devices that torch sees here.

    Raises:
        UsageError: the recipe names one CUDA device for several processes, or there are fewer GPUs than processes.
    """
    stated = recipe.train.device
    if not launch.is_distributed or stated == "cpu" or (stated == "auto" and not gpus):
        return stated
    if stated not in ("auto", "cuda"):
        raise UsageError(
            f"The recipe names a single device, '{stated}', for {launch.world_size} processes",
            "Use --device cuda: each process then takes its own.",
        )
    if 0 < gpus < launch.local_world_size:
        raise UsageError(
            f"At least {launch.local_world_size} processes were started on this machine,"
            f" but torch sees {counted(gpus, 'GPU')}",
            "Start one for each GPU, and let each of them see all (SLURM: not --gpus-per-task); or use --device cpu.",
        )
    return f"cuda:{launch.local_rank}"


@dataclass(frozen=True)
class Sizes:
    """Samples per rollout call and rows per update call."""

    rollout_batch: int
    micro_batch: int


def choose_sizes(recipe: Recipe, device_type: str, world_size: int = 1) -> Sizes:
    """The recipe's sizes, or else those of the type of device and model; never more than there are samples.

    Args:
        recipe: states sizes, or leaves them open.
        device_type: `cpu` or `cuda`.
        world_size: how many processes share the samples of an iteration in whole calls; a call is at most one share.
    """
    samples = recipe.rollout.samples
    if device_type == "cpu":
        default = _CPU_BATCH
    elif _is_small(recipe):
        share = -(-samples // world_size)
        # equal calls, since processes share whole ones
        default = -(-share // -(-share // _SMALL_MODEL_GPU_BATCH))
    else:
        default = _GPU_BATCH
    rollout_batch = min(samples, recipe.rollout.batch_size or default)
    return Sizes(rollout_batch, recipe.train.micro_batch or rollout_batch)


def _is_small(recipe: Recipe) -> bool:
    """Whether hundreds of rows are known to fit any GPU; bf16 calls are all padded to the update's rows."""
    model = recipe.model.config
    if recipe.train.dtype != "fp32" or model.spec().resolution > _SMALL_PIXELS:
        return False
    geometry = model.geometry()
    return geometry is not None and geometry.parameters <= _SMALL_PARAMETERS


def _accelerate_engine(env: Mapping[str, str]) -> Engine | None:
    for name, engine in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM")):
        if _is_true(env.get(f"ACCELERATE_USE_{name}", "")):
            raise UsageError(
                f"Accelerate is configured for {engine}, which fmg does not support",
                "Use a configuration under configs/accelerate: ddp.yaml or fsdp2.yaml.",
            )
    if not _is_true(env.get("ACCELERATE_USE_FSDP", "")):
        return None
    if env.get("FSDP_VERSION", "1") != "2":
        raise UsageError(
            "Accelerate is configured for the first version of FSDP, which fmg does not support",
            "Set fsdp_version: 2, as configs/accelerate/fsdp2.yaml does.",
        )
    if _is_true(env.get("FSDP_OFFLOAD_PARAMS", "")):
        raise UsageError(
            "Accelerate is configured to offload parameters to the CPU, which fmg does not support",
            "Set fsdp_offload_params: false.",
        )
    return "fsdp2"


def _is_true(text: str) -> bool:
    return text.strip().lower() in _TRUE


def _number(env: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    text = env.get(name, "").strip()
    if not text:
        return default
    if not text.isascii() or not text.isdigit() or int(text) < least:
        raise UsageError(
            f"{name} is '{text}', which is not a whole number of at least {least}", "Correct it, or unset it."
        )
    return int(text)
