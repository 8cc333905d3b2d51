"""The cost of a run, estimated from its recipe alone. Loads nothing and imports no torch."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from fmg.core import metric_keys as keys
from fmg.core.display import counted, size_text
from fmg.core.errors import FmgError
from fmg.core.specs import ModelGeometry
from fmg.data.run_folder import RUNS, list_runs
from fmg.data.run_metrics import read_metrics
from fmg.recipe import Recipe, ResolvedRecipe
from fmg.training.launch import Sizes, choose_engine, choose_sizes, world_size
from fmg.training.plan_memory import DTYPE_BYTES, Memory, disk_bytes, plan_memory
from fmg.training.plan_work import (
    Work,
    filled_rows,
    rollout_nfe,
    rows_of,
    stochasticizer_of,
    trained_by,
    transitions_of,
)

REFERENCE_GROUPS, REFERENCE_SIZE, REFERENCE_DEVICES = 48, 24, 8
"""Samples of an iteration and GPUs of the published recipe (Flow-Map GRPO, arXiv 2607.00535)."""

# The second is the Windows driver under WSL.
_NVIDIA_DRIVERS = (Path("/proc/driver/nvidia/version"), Path("/usr/lib/wsl/lib/libcuda.so.1"))
_STAGES = ("rollout", "decode", "reward", "update")

SHARE_OF_PEAK: Mapping[str, float] = {"rollout": 0.293, "update": 0.226}
"""Shares of an H200's peak that 8 B parameters reached at 512 px: benchmarks/results/gpu_check.json."""


@dataclass(frozen=True)
class Gpu:
    """A GPU that a full-size run is planned for.

    Attributes:
        name: the product.
        memory: bytes, as its data sheet states them.
        peak: floating-point operations per second by its data sheet, dense bf16 with fp32 accumulation.
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

Kind = Literal["chain", "branch"]


@dataclass(frozen=True)
class OnGpu:
    """Time and memory of a run with one kind of rollout on one GPU, without decoding, rewards and evaluations.

    Attributes:
        gpu: the product.
        kind: kind of rollouts.
        seconds: time of one iteration.
        hours: time of all iterations.
        memory: planned peak in bytes.
        fits: whether that is within the GPU's memory.
    """

    gpu: str
    kind: Kind
    seconds: float
    hours: float
    memory: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """Work, memory and time of a run.

    Attributes:
        facts: facts by name, in reading order.
        memory: the peak, if the model states its geometry.
        gpus: time and memory on GPUs of several sizes, for full-size models in bf16.
    """

    facts: Mapping[str, str]
    memory: Memory | None
    gpus: tuple[OnGpu, ...] = ()


def plan(resolved: ResolvedRecipe, *, devices: int | None = None, runs: Path = RUNS) -> Plan:
    """Counts the work, the memory and the disk space of a run.

    A network call here is one evaluation of the network for one image (NFE). A rollout of N steps has N - 1 stochastic
    transitions, or those of its window, of one or more calls as the stochasticizer declares; the other steps are
    deterministic and take one. The updates together replay each transition once, with gradients; for an objective on
    finished samples they make one call per row of its batch. Calls of the old policy or the base, without gradients,
    are counted apart. Evaluations are not included.

    Args:
        resolved: the recipe.
        devices: equal devices that share an iteration's samples; None takes `WORLD_SIZE`, else one.
        runs: folder of earlier runs, to scale their times.

    Raises:
        UsageError: the launcher's environment is invalid.
    """
    recipe = resolved.recipe
    shape, loop, model = recipe.rollout, recipe.train, recipe.model.config.spec()
    images = shape.samples
    evaluations = 1 + -(-loop.iterations // recipe.eval.every)
    geometry = recipe.model.config.geometry()
    count = devices or world_size()
    engine = choose_engine(recipe)
    kind = _device_type(recipe)
    sizes = choose_sizes(recipe, kind, count)
    facts = {
        "model": f"{recipe.model.name}, {model.map_name} map, {model.path} path, {model.resolution} px",
        **({} if geometry is None else _size_facts(recipe, geometry)),
        "stochasticizer": stochasticizer_of(recipe),
        **({"completions": f"{shape.branch.completion}, by {shape.branch.backend}"} if shape.kind == "branch" else {}),
        "images an iteration": f"{images} ({counted(shape.groups, 'prompt')} x {shape.group_size})",
        **_calls(recipe),
        **_learning_rate(recipe),
        "images in all": f"{images * loop.iterations} in {counted(loop.iterations, 'iteration')}",
        "evaluations": f"{evaluations} x {counted(recipe.eval.num, 'image')}"
        + ("" if loop.ema_decay is None else ", of the weights and of their average"),
        "device": f"{loop.device if loop.device != 'auto' else f'auto (planned as {kind})'}, {loop.dtype}"
        + (f", {count} of them ({engine})" if count > 1 else ""),
        **_equivalence(recipe, sizes, count),
        **_time_facts(recipe, runs),
    }
    memory = None if geometry is None else plan_memory(recipe, geometry, sizes, count, sharded=engine == "fsdp2")
    if memory is not None:
        facts["memory at the peak"] = f"{size_text(memory.peak)} per device"
    return Plan(facts, memory, () if geometry is None else tuple(_on_gpus(recipe, geometry)))


def _size_facts(recipe: Recipe, geometry: ModelGeometry) -> dict[str, str]:
    trained = trained_by(recipe, geometry)
    checkpoints, state = disk_bytes(recipe, trained, DTYPE_BYTES[recipe.train.dtype])
    return {
        "parameters": f"{_count(geometry.parameters)} transformer, {_count(geometry.encoder_parameters)} text encoders,"
        f" {_count(geometry.decoder_parameters)} autoencoder (from {geometry.origin})",
        "trainable": f"{_count(trained.parameters)}, {trained.words}",
        "disk": f"{size_text(checkpoints)} of checkpoints and {size_text(state)} of state, besides images",
    }


def _calls(recipe: Recipe) -> dict[str, str]:
    work, transitions = Work.of(recipe), transitions_of(recipe)
    return {
        **({"transitions an image": str(transitions)} if transitions else {}),
        "network calls an iteration": f"{work.rollout_calls:g} in the rollout, {work.update_calls} in the updates"
        + (f" (plus {work.frozen_calls:g} without gradients)" if work.frozen_calls else ""),
        **_cost(recipe),
    }


def _learning_rate(recipe: Recipe) -> dict[str, str]:
    """The rate, its schedule, and the rate of the last update (`fmg.training.lr_schedule`, without torch)."""
    train, rate = recipe.train, getattr(recipe.optimizer.config, "lr", None)
    if rate is None:
        return {}
    text, warmup = f"{rate:g}", train.lr_warmup_steps
    if warmup:
        text += f" after a warm-up of {counted(warmup, 'update')}"
    if train.lr_schedule == "constant":
        return {"learning rate": f"{text}, constant"}
    left = train.updates + 1 - max(1, warmup)
    last = rate * (1 / left if train.lr_schedule == "linear" else math.sin(math.pi / (2 * left)) ** 2)
    return {"learning rate": f"{text}, {train.lr_schedule} to {last:.3g} at update {train.updates}, the last"}


def _cost(recipe: Recipe) -> dict[str, str]:
    """Row-NFE of this recipe, and of the other kind of rollout if the objective supports both."""
    kinds = _kinds(recipe)
    if len(kinds) < 2:
        return {}
    texts = []
    for kind, other in kinds.items():
        work = Work.of(other)
        mine = " (this recipe)" if kind == recipe.rollout.kind else ""
        texts.append(f"{kind} {work.row_nfe:g}, {work.row_nfe / work.images:.3g} per image{mine}")
    return {"row-NFE an iteration": f"{'; '.join(texts)}: network evaluations of one row, a backward pass counted as 2"}


def _on_gpus(recipe: Recipe, geometry: ModelGeometry) -> Iterator[OnGpu]:
    # small models are bound by launches, and the peaks are those of bf16
    if not recipe.model.config.spec().gpu_memory_gb or recipe.train.dtype != "bf16":
        return
    for gpu in GPUS:
        for kind, other in _kinds(recipe).items():
            sizes = choose_sizes(other, "cuda")
            seconds = seconds_on(gpu, other, sizes, geometry)
            hours = seconds * recipe.train.iterations / 3600
            memory = plan_memory(other, geometry, sizes).peak
            yield OnGpu(f"{gpu.name}, {size_text(gpu.memory)}", kind, seconds, hours, memory, memory <= gpu.memory)


def _kinds(recipe: Recipe) -> dict[Kind, Recipe]:
    """The recipe with each kind of rollout that its objective supports."""
    kinds: tuple[Kind, ...] = ("chain", "branch")
    if not recipe.objective.config.branches or recipe.rollout.steps < 2:
        kinds = (recipe.rollout.kind,)
    return {kind: _of_kind(recipe, kind) for kind in kinds}


def _of_kind(recipe: Recipe, kind: Kind) -> Recipe:
    if kind == recipe.rollout.kind:
        return recipe
    if kind == "chain":
        return recipe.model_copy(update={"rollout": recipe.rollout.model_copy(update={"kind": kind})})
    size, batch = recipe.rollout.group_size, recipe.rollout.batch_size
    rollout: dict[str, object] = {"kind": kind, "window": None}
    update: dict[str, object] = {}
    if batch is not None:
        # calls of whole groups, and as many rows in an update
        groups = max(1, batch // size)
        rollout["batch_size"] = groups * size
        update["train"] = recipe.train.model_copy(update={"micro_batch": groups})
    return recipe.model_copy(update={**update, "rollout": recipe.rollout.model_copy(update=rollout)})


def _equivalence(recipe: Recipe, sizes: Sizes, devices: int) -> dict[str, str]:
    """How an update is split over these devices, and how its batch compares with the published one."""
    shape, updates = recipe.rollout, recipe.train.updates_per_iteration
    images = shape.samples
    reference = REFERENCE_GROUPS * REFERENCE_SIZE
    rows = -(-rows_of(recipe) // updates)
    passes = -(-rows // (devices * sizes.micro_batch))
    published = f"{REFERENCE_GROUPS} prompts x {REFERENCE_SIZE} on {REFERENCE_DEVICES} GPUs"
    if (shape.groups, shape.group_size) == (REFERENCE_GROUPS, REFERENCE_SIZE):
        compared = (
            f"the same batch as the published {published}, {REFERENCE_DEVICES / devices:g} times the work per GPU"
        )
    else:
        compared = (
            f"{images / reference:.2g} of the published batch ({published}); to match it, set"
            f" rollout.groups={REFERENCE_GROUPS} and rollout.group_size={REFERENCE_SIZE}"
        )
    return {
        "updates an iteration": f"{updates}, each on {rows} rows: {devices} x {passes} passes of"
        f" {min(sizes.micro_batch, rows)} rows, accumulated",
        "reference recipe": compared,
    }


def _time_facts(recipe: Recipe, runs: Path) -> dict[str, str]:
    estimate = estimate_iteration(recipe, runs)
    if estimate is None:
        return {"time": "not known: no earlier run here has the same model, device, batch sizes and rewards"}
    total = estimate.seconds * recipe.train.iterations / 60
    each = f"{estimate.seconds:.3g} s per iteration, {total:.2g} minutes in total, without evaluations"
    return {"time": f"about {each} (scaled from {estimate.run})"}


def _device_type(recipe: Recipe) -> str:
    if recipe.train.device != "auto":
        return recipe.train.device.partition(":")[0]
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    seen = not hidden and any(driver.exists() for driver in _NVIDIA_DRIVERS)
    return "cuda" if recipe.model.config.spec().gpu_memory_gb or seen else "cpu"


def _count(number: int) -> str:
    for unit, power in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= power:
            return f"{number / power:.3g} {unit}"
    return str(number)


def seconds_on(gpu: Gpu, recipe: Recipe, sizes: Sizes, geometry: ModelGeometry) -> float:
    """Network seconds of one iteration on one GPU, at the shares of peak measured on an H200.

    Decoding, rewards and evaluations are not included.
    """
    # the forward pass, its recomputation under checkpointing, the gradients of activations and of all weights
    passes = 2 + geometry.checkpointing + (recipe.train.trainable == "full")
    rollout = rollout_nfe(recipe, fill=filled_rows(recipe, sizes))
    work = Work.of(recipe)
    flops = {"rollout": rollout, "update": passes * work.update_calls + work.frozen_calls}
    busy = sum(flops[stage] / share for stage, share in SHARE_OF_PEAK.items())
    return busy * geometry.call_flops / gpu.peak


@dataclass(frozen=True)
class Estimate:
    """Seconds of one iteration, and the run they are scaled from."""

    seconds: float
    run: Path


def estimate_iteration(recipe: Recipe, root: Path = RUNS) -> Estimate | None:
    """Scales the times of the newest run under `root` with the same model, device, dtype, batch sizes and rewards.

    Leaves out the first iteration, a warm-up, if there are others. None if there is no such run.
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
        # small calls of a small network take as long as large ones
        sizes = r.rollout.batch_size, r.train.micro_batch
        return r.model, r.objective.name, r.train.device, r.train.dtype, rewards, sizes

    return traits(recipe) == traits(past)


def _scaled(now: Work, past: Work, lines: list[dict[str, object]]) -> float:
    images = now.images / past.images
    scale: Mapping[str, float] = {
        "rollout": now.rollout_calls / past.rollout_calls,
        "decode": images,
        "reward": images,
        "update": now.update_nfe / past.update_nfe if past.update_nfe else images,
    }
    return sum(scale[stage] * _median(lines, keys.time_of(stage)) for stage in _STAGES)


def _median(lines: list[dict[str, object]], key: str) -> float:
    values = [value for line in lines if isinstance(value := line.get(key), (int, float))]
    return float(median(values)) if values else 0.0
