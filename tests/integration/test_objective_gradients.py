"""Every objective on a tiny SD3.5 folder: bf16, checkpointing and small micro-batches keep the update's direction."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmg import Recipe
from fmg.core.types import Batch, ScoredRollout
from fmg.rl import refresh_old, replay_ratio
from fmg.training.compose import Composed, compose
from fmg.training.distributed import DistContext
from fmg.training.launch import Sizes
from fmg.training.samples import Sampler, advantages, decode_samples, score_samples
from fmg.training.update import Updater
from tests.tiny_sd35 import sd35_options

pytestmark = pytest.mark.slow

SHAPE: dict[str, object] = {
    "rewards": [{"name": "python", "target": "tests.support.user_rewards:warmth", "gradient": True}],
    "eval.rewards": [],
    "lora.rank": 4,
    "lora.alpha": 8,
    # 8 samples, and 16 rows where a sample has two transitions: neither is a multiple of a micro-batch
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 3,
    "rollout.kind": "chain",
    "train.updates_per_iteration": 1,
}
SIZES = Sizes(rollout_batch=4, micro_batch=3)
OBJECTIVES: dict[str, dict[str, object]] = {
    "meanflow-nft": {"derivative": "jvp", "draws": 1, "last_step": {"weight": 0.5}},
    "mean-flow-advantage": {"derivative": "jvp", "draws": 1},
    "diffusion-nft": {"draws": 1},
    "awm": {"draws": 1},
    "reinforce": {},
    # wide enough that no row is clipped
    "grpo": {"clip_range": 0.9, "kl_beta": 0.1, "last_step": {"weight": 0.5, "checkpointing": True}},
    "reward-gradient": {"jumps": 2, "l2_beta": 0.1},
}


@dataclass
class Lab:
    """A loaded recipe, its weights moved away from the base by the same noise in each dtype."""

    composed: Composed

    def __post_init__(self) -> None:
        self.model = self.composed.model
        self.model.fix_rows(SIZES.micro_batch if self.composed.recipe.train.dtype == "bf16" else None)
        self.parameters = [p for _, p in self.model.trainable()]
        self.move(seed=1, size=0.05)
        self.model.snapshot()

    @torch.no_grad()
    def move(self, seed: int, size: float) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.parameters:
            parameter += size * torch.randn(parameter.shape, generator=generator)

    def scored(self) -> ScoredRollout:
        composed, dist = self.composed, DistContext()
        sampler = Sampler(composed, SIZES, dist)
        local, rollout = sampler.sample(0)
        images = decode_samples(composed, SIZES, local)
        rewards = score_samples(composed, dist, local, images, len(rollout.groups), sampler.unit)
        return ScoredRollout(rollout, rewards, advantages(rewards, rollout.groups, composed.recipe, 0))

    def batch(self, scored: ScoredRollout) -> Batch:
        """The rows of an update, which replay exactly at the policy of the rollout."""
        composed, policies = self.composed, self.model.policies
        batch = composed.objective.prepare(scored, policies, 7)
        if composed.objective.clip_range is not None:
            batch = refresh_old(composed.stochasticizer, policies, batch, SIZES.micro_batch)
            assert replay_ratio(composed.stochasticizer, policies, batch, SIZES.micro_batch) == 0
        # with gradients, as in an update; the old policy never has any
        parts = composed.objective.loss(policies, batch.select(torch.arange(SIZES.micro_batch))).parts
        assert float(parts.get("old_distance", 0)) == 0
        return batch

    def gradient(self, batch: Batch, micro_batch: int) -> Tensor:
        before = [p.detach().clone() for p in self.parameters]
        optimizer = torch.optim.SGD(self.parameters, lr=0.0)
        objective, policies = self.composed.objective, self.model.policies
        updater = Updater(objective, policies, optimizer, self.parameters, math.inf, micro_batch)
        logged = updater.update(batch)
        assert all(math.isfinite(value) for value in logged.values())
        assert logged.get("old_distance", 1) > 0
        # those of the old policy and of the base, which took their place, have left
        assert all(torch.equal(p, value) for p, value in zip(self.parameters, before, strict=True))
        return torch.cat([p.grad.flatten() for p in self.parameters if p.grad is not None])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    options = sd35_options(tmp_path_factory.mktemp("gradients") / "sd35")
    return {f"model.{key}": value for key, value in options.items()}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_update_keeps_its_direction(
    objective: str, model: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path))
    recipe = Recipe.default(
        "sd35-meanflow", **{**SHAPE, **model, "objective": {"name": objective, **OBJECTIVES[objective]}}
    )
    fp32, bf16 = (
        Lab(compose(recipe.with_({"train.dtype": name}), torch.device("cpu"), dtype))
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    )
    scored = fp32.scored()
    batches = [lab.batch(scored) for lab in (fp32, bf16)]
    for lab in (fp32, bf16):
        lab.move(seed=2, size=0.02)
    whole = fp32.gradient(batches[0], micro_batch=64)
    for lab in (fp32, bf16):
        lab.composed.model.network.enable_gradient_checkpointing()  # type: ignore[attr-defined]
    parts, coarse = (lab.gradient(batch, 3) for lab, batch in zip((fp32, bf16), batches, strict=True))
    assert float((parts - whole).norm() / whole.norm()) <= 1e-5
    assert float(torch.cosine_similarity(coarse, whole, dim=0)) >= 0.999
