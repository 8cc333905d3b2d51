from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import fmg
from fmg import FlowMapPipeline
from pretraining.folder import Model, load_model, sample_images
from pretraining.shapes import ShapesWorld

ASSETS = Path(fmg.__file__).parent / "assets"
IMAGES = 200


@pytest.fixture(scope="module", params=["meanflow-shapes", "scm-shapes"])
def folder(request: pytest.FixtureRequest) -> Path:
    path: Path = ASSETS / request.param
    return path


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return load_model(folder)


@pytest.mark.slow
def test_the_base_generates_good_images_and_follows_half_of_the_prompts(model: Model) -> None:
    world = ShapesWorld()
    prompts = world.heldout_prompts()
    said = [prompts[i % len(prompts)] for i in range(IMAGES)]
    figures = world.measure(sample_images(model.net, model.autoencoder, model.tokenizers, said, 4, seed=5), said)
    # four standard errors of a share measured on 200 images are at most .14 around the card's figures
    assert figures["recognisable"] >= 0.9
    assert figures["shape"] >= 0.9
    assert 0.2 <= figures["strict"] <= 0.48
    assert all(0.38 <= figures[part] <= 0.77 for part in ("color", "position"))


def test_the_model_is_small_and_names_no_machine(model: Model, folder: Path) -> None:
    assert model.parameters <= 2_000_000
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) <= 12e6
    assert not [path for path in folder.rglob("*.json") if "_name_or_path" in path.read_text()]


def test_the_stock_pipeline_takes_its_parts_and_encodes_prompts_alike(model: Model, folder: Path) -> None:
    pipeline = FluxPipeline(scheduler=None, **FlowMapPipeline.from_pretrained(folder).components)
    prompts = ["a red circle on the left", "three green crosses"]
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, max_sequence_length=model.tokenizers.t5.model_max_length
        )
        expected_pooled, expected_states = model.net.encoders(*model.tokenizers.ids(prompts))
    assert torch.equal(states, expected_states)
    assert torch.equal(pooled, expected_pooled)
