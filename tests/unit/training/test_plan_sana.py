"""Plans of SANA-Sprint against measurements on a tiny model of its classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fmg.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.plan_work import trained_by
from tests.support.plans import CPU, check_peak, geometry_of
from tests.tiny_sana import build_tiny_sana


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = build_tiny_sana(tmp_path_factory.mktemp("sana") / "sana")
    changes = {
        "model.folder": str(folder),
        "model.resolution": 256,
        "model.max_sequence_length": 6,
        "model.text_cache": False,
        "model.text_device": "model",
        "rewards": ["jpeg-incompressibility"],
        "rollout.groups": 2,
        "rollout.group_size": 4,
        "rollout.batch_size": 8,
        "train.micro_batch": 8,
        "lora.rank": 4,
    }
    return Recipe.default("sana-sprint", **changes)


def test_a_folder_is_counted_as_its_loaded_components(recipe: Recipe) -> None:
    geometry = geometry_of(recipe)
    composed = compose(recipe, CPU, torch.float32)
    parts = composed.model.components  # type: ignore[attr-defined]
    trained = sum(p.numel() for _, p in composed.model.trainable())
    assert geometry.origin == "its files"
    assert geometry.parameters == sum(p.numel() for p in parts.transformer.parameters()) - trained
    planned = trained_by(recipe, geometry)
    assert (planned.parameters, planned.words) == (trained, composed.trained)
    assert geometry.decoder_parameters == sum(p.numel() for p in parts.vae.parameters())
    assert geometry.encoder_parameters == sum(p.numel() for p in parts.text.text_encoder.parameters())
    assert geometry.latent == torch.Size(composed.model.latent_shape).numel()


def test_flops_of_a_call_are_those_counted_by_torch(recipe: Recipe) -> None:
    composed = compose(recipe, CPU, torch.float32)
    noise = torch.zeros(2, *composed.model.latent_shape)
    cond = composed.model.encode(["a red circle", "a blue square"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        composed.model.policies.reference.jump(noise, torch.ones(2), torch.zeros(2), cond)
    assert 2 * geometry_of(recipe).call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    "changes",
    [
        {"train.dtype": "fp32", "model.gradient_checkpointing": False},
        {"train.dtype": "bf16"},
    ],
    ids=str,
)
def test_the_planned_peak_is_the_measured_one_within_the_stated_factor(
    recipe: Recipe, changes: dict[str, object], tmp_path: Path
) -> None:
    check_peak(recipe.with_(changes), tmp_path)
