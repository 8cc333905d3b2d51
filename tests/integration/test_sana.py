"""SANA-Sprint from end to end: load, evaluate, train, save, and the same image from the stock pipeline."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import SanaSprintPipeline

import fmg
from fmg.recipe import Recipe
from tests.support.first_noise import first_noise
from tests.tiny_sana import RESOLUTION, SEQUENCE, build_tiny_sana

pytestmark = pytest.mark.slow

PROMPT = "a left"


def test_sana_sprint_is_evaluated_trained_saved_and_sampled_by_its_pipeline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    folder = build_tiny_sana(tmp_path / "sana")
    recipe = Recipe.default(
        "sana-sprint",
        **{
            "model.folder": str(folder),
            "model.resolution": RESOLUTION,
            "model.max_sequence_length": SEQUENCE,
            "rewards": ["jpeg-incompressibility"],
            "optimizer.lr": 1e-3,
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "train.iterations": 3,
            "train.dtype": "fp32",
            "lora.rank": 4,
            "lora.alpha": 8,
            "eval.num": 4,
        },
    )
    assert recipe.stochasticizer.name == "asfmc-endpoint"
    result = fmg.train(recipe, tmp_path / "run")
    assert result.iterations == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/score" in line for line in lines)
    updates = [line for line in lines if "grad_norm" in line]
    assert len(updates) == 3
    assert all(line["grad_norm"] > 0 for line in updates)

    generator = fmg.load(tmp_path / "run", adapter=False)
    base = generator.generate([PROMPT], [7], steps=1)
    adapter = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    generator.backend.model.load_adapter(adapter)  # type: ignore[attr-defined]
    drawn = generator.generate([PROMPT], [7], steps=1)
    assert not torch.equal(drawn.images, base.images)

    card = (adapter / "README.md").read_text(encoding="utf-8")
    assert "on a `SanaSprintPipeline` of the base" in card
    assert "NSCL v2-custom" in card
    assert "fmg export" not in card

    pipeline = SanaSprintPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(adapter)
    picture = pipeline(
        PROMPT,
        num_inference_steps=1,
        max_timesteps=math.pi / 2,
        intermediate_timesteps=None,
        latents=first_noise(7, generator.backend.latent_shape),
        height=RESOLUTION,
        width=RESOLUTION,
        use_resolution_binning=False,
        max_sequence_length=SEQUENCE,
        output_type="pt",
    ).images
    assert torch.allclose(picture, drawn.images, atol=1e-5, rtol=0)
