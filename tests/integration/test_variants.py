"""Every variant of the objective at once, in a real run of the embedded model that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fmg import Recipe, train
from fmg.core.types import TransitionRollout
from fmg.rl import rollout
from fmg.training import samples

pytestmark = pytest.mark.slow


def test_a_run_with_every_variant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[TransitionRollout] = []

    def spy(*args: object, **options: object) -> TransitionRollout:
        drawn.append(rollout(*args, **options))  # type: ignore[arg-type]
        return drawn[-1]

    monkeypatch.setattr(samples, "rollout", spy)
    recipe = Recipe.default(
        "meanflow-shapes",
        objective={
            "name": "grpo-guard",
            "clip_range_high": 3e-4,
            "noise_weighting": True,
            "target_kl": 1e-12,
            "reward_combination": "per-reward",
        },
        rewards=["shapes", {"name": "jpeg-compressibility", "weight": 0.5}],
        **{
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "rollout.kind": "chain",
            "rollout.same_initial_noise": True,
            "rollout.window": {"size": 2, "every": 1},
            "train.iterations": 3,
            "train.updates_per_iteration": 3,
            "eval.num": 4,
            "eval.every": 3,
        },
    )
    train(recipe, tmp_path / "run")
    assert [[step.index for step in result.transitions] for result in drawn] == [[0, 1], [1, 2], [1, 2]]
    starts = drawn[0].transitions[0].x_t
    assert torch.equal(starts[0], starts[3])
    assert not torch.equal(starts[0], starts[4])
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    updated = [line for line in lines if "skipped_updates" in line]
    # a KL above so small a target is certain after one update
    assert [line["skipped_updates"] for line in updated] == [2.0, 2.0, 2.0]
    assert all("update_0/approx_kl" in line and "update_1/approx_kl" not in line for line in updated)
