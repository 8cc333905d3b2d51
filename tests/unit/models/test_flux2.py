"""FLUX.2 [klein] beyond what every family owes (test_families.py): its times, its sizes and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import Flux2KleinPipeline, Flux2Transformer2DModel
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.specs import expand_targets
from fmg.models.common.adapter import adapter_parameters, adapter_shapes, attach
from fmg.models.flux2.configs import Flux2KleinConfig
from fmg.models.flux2.size import KLEIN_4B, KLEIN_9B, Flux2Size
from fmg.registry import models
from tests.support import families
from tests.support.families import PROMPTS, edit_config, load, noise
from tests.tiny_flux2 import FLUX2_CASE, RESOLUTION, SEQUENCE

KLEIN = "black-forest-labs/FLUX.2-klein-{}"


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    return {**FLUX2_CASE.build(tmp_path_factory.mktemp("flux2") / "folder"), "text_cache": False}


def _times_seen(transformer: Any) -> list[Tensor]:
    seen: list[Tensor] = []
    transformer.time_guidance_embed.register_forward_pre_hook(lambda _, given: seen.append(given[0][:1]))
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_times_are_rounded_as_the_pipeline_rounds_them(options: dict[str, object], dtype: torch.dtype) -> None:
    model = load(FLUX2_CASE, options, dtype)
    pipeline = Flux2KleinPipeline.from_pretrained(str(options["folder"]), dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    ours, theirs = _times_seen(model.network), _times_seen(pipeline.transformer)
    for steps in (2, 4, 8):
        families.sampled(model, list(PROMPTS), noise(model), steps)
        sides = {"height": RESOLUTION, "width": RESOLUTION, "max_sequence_length": SEQUENCE}
        pipeline(prompt=PROMPTS[0], num_inference_steps=steps, guidance_scale=1.0, output_type="latent", **sides)
    assert len(ours) == len(theirs) == 14
    assert all(x.dtype == y.dtype == dtype for x, y in zip(ours, theirs, strict=True))
    # the scheduler keeps its times in fp32, where products of a thousandth and a thousand may differ in the last digit
    assert torch.allclose(torch.cat(ours), torch.cat(theirs), rtol=3e-7 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("published", [KLEIN_4B, KLEIN_9B], ids=["4B", "9B"])
def test_sizes_and_adapted_layers_are_those_of_the_class(published: Mapping[str, object]) -> None:
    with torch.device("meta"):
        transformer = Flux2Transformer2DModel(**published)
    size = Flux2Size(published)
    assert size.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    shapes = adapter_shapes(transformer, ["attention"], 32)
    with torch.device("meta"):
        adapted = attach(transformer, 32, 64.0, ["attention"], 0.0, seed=0)
    # eight of attention in a double-stream block; in a single-stream block both fused matrices
    assert len(adapted) == 8 * size.number("num_layers") + 2 * size.number("num_single_layers")
    assert {name: tuple(x.shape) for name, x in adapter_parameters(transformer).items()} == shapes
    # PEFT shortens a long list of names; read back, they select the same layers
    again = sorted(transformer.peft_config["default"].target_modules)
    with torch.device("meta"):
        assert adapter_shapes(Flux2Transformer2DModel(**published), again, 32) == shapes
    assert expand_targets(["attention"]) != again


def test_the_larger_model_is_recognised_by_its_hub_id() -> None:
    small, large = (Flux2KleinConfig(folder=KLEIN.format(size)) for size in ("4B", "9B@main"))
    assert (small.parameters() / 1e9, large.parameters() / 1e9) == (
        pytest.approx(3.88, 0.01),
        pytest.approx(9.08, 0.01),
    )
    assert (small.architecture().licence, large.architecture().licence) == ("Apache-2.0", "FLUX Non-Commercial License")
    assert (small.architecture().size_gb, large.architecture().size_gb) == (
        pytest.approx(16, 0.1),
        pytest.approx(35, 0.1),
    )
    assert small.card_facts()["license"] == "apache-2.0"
    assert large.card_facts()["license"] == "other"


@pytest.mark.parametrize(
    ("component", "changes", "message"),
    [
        ("vae", {"patch_size": [1, 4]}, r"normalises patches of \(1, 4\) latent pixels"),
        (
            "transformer",
            {"axes_dims_rope": [8, 8, 4]},
            r"says axes_dims_rope \[8, 8, 4\], but attention_head_dim is 16",
        ),
    ],
)
def test_parts_that_do_not_fit_are_one_line(
    tmp_path: Path, component: str, changes: Mapping[str, object], message: str
) -> None:
    given = FLUX2_CASE.build(tmp_path / "folder")
    edit_config(tmp_path / "folder", component, **changes)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(FLUX2_CASE, given)
    assert "\n" not in str(caught.value)


def test_other_models_of_the_class_are_refused(tmp_path: Path) -> None:
    given = FLUX2_CASE.build(tmp_path / "folder")
    index = tmp_path / "folder" / "model_index.json"
    stated = json.loads(index.read_text(encoding="utf-8"))
    index.write_text(json.dumps({**stated, "is_distilled": False}), encoding="utf-8")
    with pytest.raises(CheckpointError, match="is not distilled: it takes 50 steps and classifier-free guidance"):
        load(FLUX2_CASE, given)
    index.unlink()
    own = tmp_path / "folder" / "transformer"
    guided = Flux2Transformer2DModel.from_config({**Flux2Transformer2DModel.load_config(own), "guidance_embeds": True})
    guided.save_pretrained(own)
    with pytest.raises(CheckpointError, match=r"embeds a guidance scale, as that of FLUX\.2 \[dev\] does"):
        load(FLUX2_CASE, given)


def test_its_resolution_is_a_whole_number_of_tokens() -> None:
    with pytest.raises(Exception, match="multiple of 16"):
        models.build("flux2-klein", {"folder": KLEIN.format("4B"), "resolution": 1000})
