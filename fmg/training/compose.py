"""From a recipe to live objects. Whatever can be refused without weights is refused before they are read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import (
    GradientObjective,
    Model,
    Objective,
    OptimizerFactory,
    PromptSet,
    Reward,
    ScoreFunction,
    Shardable,
    Stochasticizer,
)
from fmg.data.prompt_sets import load_prompts
from fmg.flow.grids import make_grid
from fmg.recipe import Recipe
from fmg.recipe.composition import check_backend, check_target_times, check_trackers
from fmg.registry import models, objectives, optimizers, stochasticizers
from fmg.rewards.base import Mixture, build_rewards, check_prompts
from fmg.rewards.functions import NO_FUNCTIONS, Functions
from fmg.rl.reward_gradient import LastStep, ScoredImages


@dataclass(frozen=True)
class Composed:
    """The live parts of a run."""

    recipe: Recipe
    model: Model
    stochasticizer: Stochasticizer
    objective: Objective
    reward: Mixture
    measured: Mapping[str, Reward]
    optimizer: OptimizerFactory
    prompts: PromptSet
    eval_prompts: PromptSet
    grid: tuple[float, ...]
    trained: str


RunScore = Callable[[Callable[[], Tensor]], Tensor]
"""Runs a function that computes scores and returns its result."""


def _run(score: Callable[[], Tensor]) -> Tensor:
    return score()


def compose(
    recipe: Recipe,
    device: torch.device,
    dtype: torch.dtype,
    functions: Functions = NO_FUNCTIONS,
    run_score: RunScore = _run,
) -> Composed:
    """Builds every component of `recipe` and loads the model, ready for training.

    Args:
        recipe: what to build.
        device: where the model computes.
        dtype: the dtype of its frozen weights.
        functions: the rewards passed to a Python call.
        run_score: runs each scoring of an update; several processes have to agree on its errors.

    Raises:
        UsageError: a component, prompt set or grid does not fit; raised before weights are read.
        CheckpointError: weights are missing or damaged.
    """
    samples = recipe.rollout.samples
    if recipe.train.updates_per_iteration > samples:
        raise CompositionError(
            f"{recipe.train.updates_per_iteration} updates do not fit a rollout of {samples} samples",
            "Lower train.updates_per_iteration, or use more groups or larger ones.",
        )
    check_backend(recipe, device.type)
    check_trackers(recipe)
    source = models.build_config(recipe.model.name, recipe.model.config)
    source.check()
    measured = build_rewards(recipe.measured_rewards, functions)
    mixture = Mixture([(ref.label, measured[ref.label], ref.weight) for ref in recipe.rewards])
    prompts, eval_prompts = load_prompts(recipe.prompts), load_prompts(recipe.eval.prompts)
    mixture.check_prompts([prompt.text for prompt in prompts])
    for name, reward in measured.items():
        check_prompts(name, reward, [prompt.text for prompt in eval_prompts])
    stochasticizer = stochasticizers.build_config(recipe.stochasticizer.name, recipe.stochasticizer.config)
    objective = objectives.build_config(recipe.objective.name, recipe.objective.config).bind(stochasticizer)
    optimizer = optimizers.build_config(recipe.optimizer.name, recipe.optimizer.config)
    model = source.load(device, dtype)
    trained = make_trainable(model, recipe)
    if isinstance(objective, GradientObjective):
        objective = objective.with_images(model.decode, _differentiated(mixture, run_score))
    if (last_step := recipe.objective.config.last_step) is not None:
        score = _differentiated(mixture, run_score, last_step_weights(recipe))
        objective = LastStep(objective, last_step.weight, ScoredImages(model.decode, score, last_step.checkpointing))
    _, height, width = model.latent_shape
    grid = make_grid(recipe.rollout.grid, recipe.rollout.steps, image_tokens=(height // 2) * (width // 2))
    check_target_times(recipe.stochasticizer.name, recipe.stochasticizer.config.requires(), grid)
    return Composed(
        recipe, model, stochasticizer, objective, mixture, measured, optimizer, prompts, eval_prompts, grid, trained
    )


def _differentiated(mixture: Mixture, run: RunScore, weights: Mapping[str, float] | None = None) -> ScoreFunction:
    return lambda images, prompts: run(lambda: mixture.differentiated(images, prompts, weights))


def last_step_weights(recipe: Recipe) -> dict[str, float]:
    """The weights of the rewards of `objective.last_step`: the recipe's, or 1 for a named one without a weight."""
    last_step = recipe.objective.config.last_step
    assert last_step is not None
    weights = {reward.label: reward.weight for reward in recipe.rewards if reward.config.has_gradient}
    if last_step.rewards is None:
        return weights
    return {name: weights[name] or 1.0 for name in last_step.rewards}


def make_trainable(model: Model, recipe: Recipe) -> str:
    """Attaches and unfreezes what the recipe trains; returns a description of it.

    Raises:
        UsageError: the LoRA fits no module, or the model has no second-time embedder.
    """
    lora, what = recipe.lora, recipe.train.trainable
    if what == "full":
        asked = recipe.objective.config.compares_with
        tensors = model.unfreeze("full", old="old" in asked, reference="reference" in asked)
        return f"every weight, {tensors} tensors"
    adapted = model.attach_adapter(lora.rank, lora.alpha, lora.target_names(), lora.dropout, recipe.train.seed)
    words = f"LoRA of rank {lora.rank} on {adapted} modules"
    if what == "lora+duration":
        model.unfreeze("duration")
        words += " and the second-time embedder"
    return words


def shard_base(composed: Composed) -> None:
    """Shards the frozen base over the processes (FSDP2).

    Raises:
        CompositionError: the model cannot be sharded.
    """
    if not isinstance(composed.model, Shardable):
        raise CompositionError(
            f"The model '{composed.recipe.model.name}' cannot be sharded over several processes",
            "Set train.parallel to ddp.",
        )
    composed.model.shard()


@contextmanager
def finite_attention() -> Iterator[None]:
    """Keeps `scaled_dot_product_attention` from using cuDNN's kernel in its body, since its gradients may be NaN.

    Since torch 2.11 cuDNN's is the first choice for bf16 on Hopper (docs/adr/0018-attention-kernels.md). Rollouts need
    this as much as updates: a ratio compares both, and checkpointed blocks are recomputed outside their call.
    """
    before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
