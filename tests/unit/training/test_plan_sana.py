"""Plans of SANA-Sprint against measurements on a tiny model of its classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_meter import MemoryMeter
from fmg.core.events import ignore
from fmg.core.specs import ModelGeometry
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.launch import choose_sizes
from fmg.training.plan_memory import plan_memory
from fmg.training.plan_work import trained_by
from fmg.training.trainer import Trainer
from tests.tiny_sana import build_tiny_sana

CPU = torch.device("cpu")
FACTOR = 1.3
"""A planned peak lies within this factor of the measured one."""


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


def _geometry(recipe: Recipe) -> ModelGeometry:
    geometry = recipe.model.config.geometry()
    assert geometry is not None
    return geometry


def test_a_folder_is_counted_as_its_loaded_components(recipe: Recipe) -> None:
    geometry = _geometry(recipe)
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
    assert 2 * _geometry(recipe).call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


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
    changed = recipe.with_(changes)
    sizes = choose_sizes(changed, "cpu")
    composed = compose(changed, CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}[changed.train.dtype])
    parts = composed.model.components  # type: ignore[attr-defined]
    loaded = (parts.transformer, parts.vae, *parts.text.encoders)
    before = sum(p.nbytes for module in loaded for p in module.parameters())
    with MemoryMeter() as meter:
        Trainer(composed, RunFolder(tmp_path), sizes, ignore).iterate(0)
    measured = before + meter.peak
    planned = plan_memory(changed, _geometry(changed), sizes).peak
    assert measured / FACTOR < planned < measured * FACTOR, (planned, measured)
