"""FLUX.3 [klein] beyond what every family owes (test_families.py): its two times, its sizes and what it leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel

from fmg.core.errors import CheckpointError, UsageError
from fmg.flow import make_grid
from fmg.models.common.adapter import adapter_parameters, is_under
from fmg.models.common.sharding import _members
from fmg.models.flux3.size import FLUX3, UNUSED, Flux3Size
from tests.support.families import PROMPTS, attach, jump, load, noise
from tests.tiny_flux3 import FLUX3_CASE


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**FLUX3_CASE.build(tmp_path_factory.mktemp("flux3") / "folder"), "text_cache": False}


def test_sizes_are_those_of_the_class() -> None:
    with torch.device("meta"):
        transformer = Flux3Transformer2DModel(**FLUX3)
    size = Flux3Size(FLUX3)
    assert size.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer.name: (layer.inputs, layer.outputs) for layer in size.linears()} == {
        name: (module.in_features, module.out_features) for name, module in linears.items()
    }
    assert {layer.name for layer in size.linears() if layer.tokens == "none"} == {
        name for name in linears if is_under(name, UNUSED)
    }
    # every block is a unit of its own when the base is sharded
    blocks = [block for child in transformer.children() for block in _members(child)]
    assert len(blocks) == 3 * 5 + 28


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_the_grid_is_that_of_its_scheduler(steps: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=6.93)
    scheduler.set_timesteps(sigmas=torch.linspace(1, 1 / steps, steps).tolist())
    assert make_grid("shift-6.93", steps) == pytest.approx(scheduler.sigmas.tolist(), abs=1e-6)


def test_the_target_time_reaches_the_network(options: dict[str, object]) -> None:
    model = load(FLUX3_CASE, options)
    seen: list[dict[str, Any]] = []
    model.network.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    cond, x = model.encode(list(PROMPTS)), noise(model)
    t, s = torch.tensor([1.0, 0.6]), torch.tensor([0.5, 0.6])
    with torch.no_grad():
        far, near = (model.flow_map.jump(x, t, target, cond) for target in (s, torch.zeros(2)))
        velocity = model.flow_map.velocity(x, t, cond)
    assert torch.equal(seen[0]["target_timestep"], s)
    assert torch.equal(seen[2]["target_timestep"], seen[2]["timestep"])
    assert not torch.allclose(far, near)
    # the map is x - (t - s) u, so nothing moves where s = t
    assert torch.equal(far[1], x[1])
    assert not torch.allclose(velocity[0], (x - near)[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_second_time_is_trained_beside_a_lora(
    options: dict[str, object], dtype: torch.dtype, tmp_path: Path
) -> None:
    model = load(FLUX3_CASE, options, dtype)
    before = jump(model)
    assert model.unfreeze("duration") == 2
    assert all(parameter.dtype == torch.float32 for _, parameter in model.trainable())
    assert torch.allclose(jump(model), before, atol=1e-5 if dtype == torch.float32 else 2e-2)
    attach(model)
    after = jump(model)
    model.save_adapter(tmp_path / "adapter")
    fresh = load(FLUX3_CASE, options, dtype)
    fresh.load_adapter(tmp_path / "adapter")
    assert torch.equal(jump(fresh), after)


@pytest.mark.slow
def test_modules_of_reference_images_are_not_trained(options: dict[str, object]) -> None:
    model = load(FLUX3_CASE, options)
    attach(model, "attention-mlp")
    assert not any(is_under(name, UNUSED) for name in adapter_parameters(model.network))
    whole = load(FLUX3_CASE, options)
    trained = whole.unfreeze("full")
    assert trained == sum(not is_under(name, UNUSED) for name, _ in whole.network.named_parameters())
    with pytest.raises(UsageError, match="match no linear module"):
        load(FLUX3_CASE, options).attach_adapter(2, 4.0, ["mode_blocks.image_cond.0.attn.to_q"], 0.0, 0)


def test_norms_stay_in_fp32_as_the_class_keeps_them(options: dict[str, object], tmp_path: Path) -> None:
    model = load(FLUX3_CASE, options, torch.bfloat16)
    stock = Flux3Transformer2DModel.from_pretrained(Path(str(options["folder"])) / "transformer", dtype=torch.bfloat16)
    ours, theirs = model.network.state_dict(), stock.state_dict()
    assert {name: x.dtype for name, x in ours.items()} == {name: x.dtype for name, x in theirs.items()}
    assert {x.dtype for x in ours.values()} == {torch.float32, torch.bfloat16}
    model.unfreeze("full")
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.01)
    model.save_adapter(tmp_path / "whole")


def test_a_base_model_is_refused(options: dict[str, object], tmp_path: Path) -> None:
    given = FLUX3_CASE.build(tmp_path / "folder")
    own = tmp_path / "folder" / "transformer"
    Flux3Transformer2DModel.from_config(
        {**Flux3Transformer2DModel.load_config(own), "flow_map": False}
    ).save_pretrained(own)
    with pytest.raises(CheckpointError, match="is not a flow map but a base model for 50 steps"):
        load(FLUX3_CASE, given)
