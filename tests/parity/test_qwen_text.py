"""Prompts as the pipelines of diffusers encode them with Qwen: the same numbers, bit for bit."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import Flux2KleinPipeline, ZImagePipeline
from diffusers.modular_pipelines.flux3.encoders import Flux3TextEncoderStep
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.models.common.qwen import QwenText
from tests.tiny_qwen import qwen3, qwen3_vl, qwen_tokenizer

PROMPT = "A red circle, left of Zürich"
LENGTH = 80
FLUX2_LAYERS, FLUX3_LAYERS = (9, 18, 27), (4, 8, 12, 16, 20, 24, 28, 32)


@pytest.fixture(scope="module", autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@torch.no_grad()
def _embed(text: QwenText, prompt: str = PROMPT, length: int = LENGTH) -> Tensor:
    return text.embed([prompt], length)["tokens"]


@torch.no_grad()
@pytest.mark.parametrize("length", [LENGTH, 24])
def test_flux2_stacks_three_layers_and_does_not_think(length: int) -> None:
    tokenizer, encoder = qwen_tokenizer(), qwen3()
    theirs = Flux2KleinPipeline._get_qwen3_prompt_embeds(
        encoder, tokenizer, PROMPT, max_sequence_length=length, hidden_states_layers=FLUX2_LAYERS
    )
    ours = QwenText(tokenizer, encoder, FLUX2_LAYERS, thinking=False)
    assert torch.equal(_embed(ours, length=length), theirs)
    assert theirs.shape[-1] == ours.width
    thinks = QwenText(tokenizer, encoder, FLUX2_LAYERS, thinking=True)
    # two marks and four line breaks
    assert ours.count(PROMPT) == thinks.count(PROMPT) + 6


@torch.no_grad()
def test_z_image_takes_one_layer_without_the_padding() -> None:
    tokenizer, encoder = qwen_tokenizer(), qwen3(3)
    pipeline = SimpleNamespace(tokenizer=tokenizer, text_encoder=encoder, _execution_device=torch.device("cpu"))
    theirs = ZImagePipeline._encode_prompt(pipeline, PROMPT, max_sequence_length=LENGTH)
    # the decoder alone is the class of the published text encoder
    ours = QwenText(tokenizer, encoder.model, (-2,), thinking=True, masked=True).embed([PROMPT], LENGTH)
    assert torch.equal(ours["tokens"][ours["mask"].bool()], theirs[0])
    assert int(ours["mask"].sum()) == len(theirs[0]) < LENGTH


@torch.no_grad()
@pytest.mark.parametrize("prompt", [PROMPT, "A" + " very" * 15 + " long prompt"])
def test_flux3_stacks_eight_layers_and_numbers_the_padding(prompt: str) -> None:
    tokenizer, encoder = qwen_tokenizer(), qwen3_vl()
    processor = SimpleNamespace(tokenizer=tokenizer, apply_chat_template=tokenizer.apply_chat_template)
    theirs = Flux3TextEncoderStep._get_qwen3_vl_prompt_embeds(
        encoder, processor, prompt, pad_multiple=80, hidden_states_layers=FLUX3_LAYERS
    )
    ours = QwenText(tokenizer, encoder, FLUX3_LAYERS, padding_side="right", padding_position=1)
    assert torch.equal(_embed(ours, prompt, theirs.shape[1]), theirs)
    assert theirs.shape[-1] == ours.width


def test_a_decoder_without_the_states_or_the_template_is_refused(tmp_path: Path) -> None:
    tokenizer, encoder = qwen_tokenizer(), qwen3(3)
    QwenText(tokenizer, encoder, (3,)).check_layers(tmp_path)
    with pytest.raises(CheckpointError, match="has 3 layers, but hidden states of layer 9 are needed"):
        QwenText(tokenizer, encoder, (3, 9)).check_layers(tmp_path)
    tokenizer.chat_template = None
    with pytest.raises(CheckpointError, match="has no chat template"):
        QwenText(tokenizer, encoder, (3,)).check_layers(tmp_path)
