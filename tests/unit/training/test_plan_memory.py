from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fmg.core.events import ignore
from fmg.core.geometry import ModelGeometry
from fmg.data.run_folder import RunFolder
from fmg.models.common.adapter import attach
from fmg.models.conventions import FlowMapConventions, read_conventions
from fmg.models.flux.size import FLUX_LITE, transformer_parameters
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.geometry import flux_geometry
from fmg.registry.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.memory_meter import MemoryMeter
from fmg.training.plan_memory import adapted_layers, adapter_parameters, plan_memory
from fmg.training.sizes import choose_sizes
from fmg.training.trainer import Trainer

CPU = torch.device("cpu")
FACTOR = 1.25
"""A planned peak lies within this factor of the measured one."""

FLUX = FlowMapConventions(
    schema=1,
    map="two-time",
    path="linear",
    time_scale=1.0,
    second_time="duration",
    resolution=512,
    max_sequence_length=256,
    default_steps=5,
    default_grid="paper",
    guidance=3.5,
)


def _geometry(recipe: Recipe) -> ModelGeometry:
    geometry = recipe.model.config.geometry()
    assert geometry is not None
    return geometry


@pytest.mark.parametrize("second_time", ["duration", "none"])
def test_flux_lite_is_counted_as_its_modules_on_the_meta_device(second_time: str) -> None:
    with torch.device("meta"):
        module = FlowMapFluxTransformer2DModel(time_scale=1.0, second_time=second_time, **_arguments())
        attach(module, 32, 64.0, ["attention-mlp"], 0.0, seed=0)
    conventions = FLUX.model_copy(
        update={"second_time": second_time, "map": "two-time" if second_time == "duration" else "single-time"}
    )
    geometry = flux_geometry(None, conventions)
    counts = {True: 0, False: 0}
    for name, parameter in module.named_parameters():
        counts["lora" in name] += parameter.numel()
    assert geometry.parameters == counts[False]
    assert geometry.parameters == transformer_parameters(FLUX_LITE, second_time=second_time == "duration")
    assert adapter_parameters(adapted_layers(geometry, ["attention-mlp"]), 32) == counts[True]
    assert (geometry.image_tokens, geometry.latent) == (1024, 16 * 64 * 64)
    assert geometry.origin == "the published config"


def _arguments() -> dict[str, object]:
    return {**FLUX_LITE}


def test_a_folder_is_counted_as_its_loaded_components() -> None:
    recipe = Recipe.default()
    geometry = _geometry(recipe)
    composed = compose(recipe, CPU, torch.float32)
    parts = composed.model.components  # type: ignore[attr-defined]
    trained = sum(p.numel() for _, p in composed.model.trainable())

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    assert geometry.parameters == count(parts.transformer) - trained
    layers = adapted_layers(geometry, recipe.lora.target_names())
    assert adapter_parameters(layers, recipe.lora.rank) == trained
    assert composed.trained == f"LoRA of rank {recipe.lora.rank} on {len(layers)} modules"
    assert geometry.decoder_parameters == count(parts.vae)
    # the files hold no position ids and no tied copies
    assert geometry.encoder_parameters == pytest.approx(
        count(parts.text.text_encoder, parts.text.text_encoder_2), rel=0.01
    )
    _, height, width = composed.model.latent_shape
    assert geometry.latent == 4 * height * width
    assert geometry.resolution == 32


def test_flops_of_a_call_are_those_that_torch_counts() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    recipe = Recipe.default()
    composed = compose(recipe, CPU, torch.float32)
    noise = torch.zeros(2, *composed.model.latent_shape)
    cond = composed.model.encode(["a red circle", "a blue square"])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        composed.model.policies.reference.jump(noise, torch.ones(2), torch.zeros(2), cond)
    assert 2 * _geometry(recipe).call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        ("meanflow-shapes", {"train.micro_batch": 5}),
        ("meanflow-shapes", {"lora.targets": "attention-mlp", "train.dtype": "bf16", "optimizer": "sgd"}),
        ("scm-shapes", {"rollout.steps": 3, "train.updates_per_iteration": 1}),
        ("meanflow-shapes", {"objective": "rwfm", "optimizer": "adafactor"}),
    ],
    ids=str,
)
def test_the_planned_peak_is_the_measured_one_within_the_stated_factor(
    model: str, changes: dict[str, object], tmp_path: Path
) -> None:
    small = {"rollout.groups": 4, "rollout.group_size": 4, "lora.rank": 4}
    recipe = Recipe.default(model).with_({**small, **changes})
    sizes = choose_sizes(recipe, "cpu")
    composed = compose(recipe, CPU, {"fp32": torch.float32, "bf16": torch.bfloat16}[recipe.train.dtype])
    parts = composed.model.components  # type: ignore[attr-defined]
    loaded = (parts.transformer, parts.vae, parts.text.text_encoder, parts.text.text_encoder_2)
    before = sum(p.nbytes for module in loaded for p in module.parameters())
    with MemoryMeter() as meter:
        trainer = Trainer(composed, RunFolder(tmp_path), sizes, ignore)
        trainer.iterate(0)
    measured = before + meter.peak
    planned = plan_memory(recipe, _geometry(recipe), sizes).peak
    assert measured / FACTOR < planned < measured * FACTOR


def test_a_full_size_plan_shares_the_samples_among_devices() -> None:
    recipe = Recipe.default().with_(
        {"rollout.groups": 48, "rollout.group_size": 24, "rollout.steps": 5, "train.dtype": "bf16"}
    )
    geometry = flux_geometry(None, FLUX, checkpointing=True, encoders_resident=False)
    sizes = choose_sizes(recipe, "cuda")
    one, eight = plan_memory(recipe, geometry, sizes), plan_memory(recipe, geometry, sizes, devices=8)
    assert one.parts["transformer"] == 2 * geometry.parameters == pytest.approx(16.35e9, rel=0.01)
    assert one.parts["text encoders"] == 0
    assert eight.parts["rollout store"] == pytest.approx(one.parts["rollout store"] / 8, rel=0.01)
    assert {k: v for k, v in one.parts.items() if k != "rollout store"} == {
        k: v for k, v in eight.parts.items() if k != "rollout store"
    }


def test_checkpointing_keeps_one_number_a_token_and_block() -> None:
    recipe = Recipe.default().with_({"train.dtype": "bf16", "train.micro_batch": 1, "rollout.batch_size": 1})
    sizes = choose_sizes(recipe, "cuda")
    whole, saved = (
        plan_memory(recipe, flux_geometry(None, FLUX, checkpointing=flag), sizes).parts["activations"]
        for flag in (False, True)
    )
    assert whole > 10 * saved


def test_a_folder_that_is_there_is_read() -> None:
    folder = Recipe.default().model.config.directory()  # type: ignore[attr-defined]
    assert flux_geometry(folder, read_conventions(folder)).origin == "its files"
