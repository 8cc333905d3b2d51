from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

import fmg
from fmg import FlowMapPipeline
from pretraining.folder import Model, load_model, sample_images
from pretraining.signs import TextWorld

FOLDER = Path(fmg.__file__).parent / "assets" / "meanflow-text"
IMAGES = 120


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(FOLDER)


def test_the_base_writes_legibly_and_is_neither_perfect_nor_useless(model: Model) -> None:
    pytest.importorskip("rapidocr", reason="needs the packages of flow-map-grpo[ocr]")
    world = TextWorld()
    prompts = world.heldout_prompts()
    said = [prompts[i % len(prompts)] for i in range(IMAGES)]
    figures = world.measure(sample_images(model.net, model.autoencoder, model.tokenizers, said, 4, seed=5), said)
    assert 0.12 <= figures["exact"] <= 0.5
    assert figures["fidelity"] >= 0.7


def test_the_model_is_small_and_names_no_machine(model: Model) -> None:
    assert model.parameters <= 2_000_000
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 6e6
    assert not [path for path in FOLDER.rglob("*.json") if "_name_or_path" in path.read_text()]


def test_the_stock_pipeline_takes_its_parts_and_encodes_prompts_alike(model: Model) -> None:
    pipeline = FluxPipeline(scheduler=None, **FlowMapPipeline.from_pretrained(FOLDER).components)
    prompts = ['a sign that says "CAT"', 'the word "DOG"']
    with torch.no_grad():
        states, pooled, _ = pipeline.encode_prompt(
            prompts, prompts, max_sequence_length=model.tokenizers.t5.model_max_length
        )
        expected_pooled, expected_states = model.net.encoders(*model.tokenizers.ids(prompts))
    assert torch.equal(states, expected_states)
    assert torch.equal(pooled, expected_pooled)
