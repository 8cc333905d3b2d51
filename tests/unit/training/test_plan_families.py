"""Plans of the families of models against measurements on tiny folders of their classes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.memory_meter import MemoryMeter
from fmg.recipe import Recipe
from fmg.training.compose import compose
from fmg.training.plan_memory import update_bytes
from fmg.training.plan_work import trained_by
from tests.support.families import PROMPTS, FamilyCase
from tests.support.plans import CPU, FACTOR, check_peak, geometry_of
from tests.tiny_flux2 import FLUX2_CASE
from tests.tiny_flux3 import FLUX3_CASE
from tests.tiny_sd35 import SD35_CASE
from tests.tiny_zimage import Z_IMAGE_CASE


@pytest.fixture(scope="module", params=[FLUX2_CASE, FLUX3_CASE, SD35_CASE, Z_IMAGE_CASE], ids=lambda case: case.model)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    case: FamilyCase = request.param
    options = case.build(tmp_path_factory.mktemp(case.model) / "folder")
    changes = {
        **{f"model.{key}": value for key, value in options.items()},
        "model.resolution": 128,
        "model.text_cache": False,
        "model.text_device": "model",
        "rewards": ["jpeg-incompressibility"],
        "rollout.groups": 2,
        "rollout.group_size": 4,
        "rollout.steps": 4,
        "rollout.batch_size": 8,
        "train.micro_batch": 8,
        "lora.rank": 4,
        "eval.num": 8,
    }
    return Recipe.default(case.model, **changes)


@pytest.mark.slow
def test_what_is_trained_is_counted_and_flops_are_those_of_torch(recipe: Recipe) -> None:
    geometry, composed = geometry_of(recipe), compose(recipe, CPU, torch.float32)
    planned = trained_by(recipe, geometry)
    trained = sum(p.numel() for _, p in composed.model.trainable())
    assert (planned.parameters, planned.words) == (trained, composed.trained)
    if geometry.second_embedder:
        both = recipe.with_({"train.trainable": "lora+duration"})
        counted = sum(p.numel() for _, p in compose(both, CPU, torch.float32).model.trainable())
        assert trained_by(both, geometry).parameters == counted > trained
    assert geometry.encoder_parameters == pytest.approx(
        sum(p.numel() for encoder in composed.model.components.text.encoders for p in encoder.parameters()),  # type: ignore[attr-defined]
        rel=0.01,
    )
    noise = torch.zeros(2, *composed.model.latent_shape)
    cond = composed.model.encode(list(PROMPTS))
    # the counter knows the products of attention, not the kernel of a CPU
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        composed.model.policies.reference.jump(noise, torch.ones(2), torch.zeros(2), cond)
    assert 2 * geometry.call_flops == pytest.approx(counter.get_total_flops(), rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_of_an_update_are_the_measured_ones(recipe: Recipe, checkpointing: bool) -> None:
    """Apart from the decoder, which is most of the peak of a tiny network."""
    changed = recipe.with_({"train.dtype": "bf16", "model.gradient_checkpointing": checkpointing})
    geometry, model = geometry_of(changed), compose(changed, CPU, torch.bfloat16).model
    trained, rows = trained_by(changed, geometry), 8
    noise, times = torch.zeros(rows, *model.latent_shape), torch.ones(rows)
    cond = model.encode([PROMPTS[0]] * rows)
    with MemoryMeter() as meter:
        model.policies.current.jump(noise, times, 0 * times, cond).sum().backward()
    gradients = 4 * trained.parameters
    planned = update_bytes(geometry, trained, changed.lora.rank, 2, rows)
    assert (meter.peak - gradients) / FACTOR < planned < meter.peak * FACTOR, (planned, meter.peak, gradients)


@pytest.mark.slow
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
