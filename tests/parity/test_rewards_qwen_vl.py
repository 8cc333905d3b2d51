"""`unifiedreward` and `geneval2` against transformers' classes: one image and one question at a time, no cache."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from fmg.core.hub import locate
from fmg.registry import rewards
from fmg.rewards.images import to_bytes
from fmg.rewards.published import qwen_vl_asset
from fmg.rewards.qwen_vl import load_qwen_vl
from tests.tiny_rewards import write_qwen_vl

KINDS = ("qwen3_vl", "qwen2_5_vl")
SYSTEM = {"qwen3_vl": "", "qwen2_5_vl": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"}
WORDS = ("Yes", "yes", "two", "Two", "three", "Three")
VQA = {
    "two metal toys": [["How many toys are in the image?", "two"], ["Are the toys metal?", "Yes"]],
    "a long one": [
        ["How many very small unknown dogs are in the image?", "three"],
        ["Is it?", "Yes"],
        ["Are there any dogs in the image?", "Yes"],
    ],
}


class Reference:
    """The published inference code: the processor's pixels, the chat template's text, and one forward per token."""

    def __init__(self, folder: Path, kind: str) -> None:
        name = "Qwen3VLForConditionalGeneration" if kind == "qwen3_vl" else "Qwen2_5_VLForConditionalGeneration"
        self.model: Any = getattr(transformers, name).from_pretrained(folder).eval()
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.processor = Qwen2VLImageProcessorPil.from_pretrained(folder)
        self.system = SYSTEM[kind]

    def logits(self, image: Tensor, text: str, written: list[int]) -> Tensor:
        pictures = [Image.fromarray(to_bytes(image[None])[0])]
        pixels = self.processor(images=pictures, return_tensors="pt")
        slots = int(pixels.image_grid_thw.prod()) // 4
        chat = (
            f"{self.system}<|im_start|>user\n<|vision_start|>{'<|image_pad|>' * slots}<|vision_end|>{text}"
            "<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = torch.tensor([self.tokenizer(chat).input_ids + written])
        kinds = (ids == self.model.config.image_token_id).int()
        with torch.no_grad():
            return self.model(input_ids=ids, mm_token_type_ids=kinds, use_cache=False, **pixels).logits[0, -1]

    def answer(self, image: Tensor, text: str, limit: int) -> list[int]:
        written: list[int] = []
        while len(written) < limit:
            written.append(int(self.logits(image, text, written).argmax()))
        return written


def images(count: int, height: int, width: int) -> Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(height))


@pytest.mark.parametrize("kind", KINDS)
def test_geneval2(tmp_path: Path, kind: str) -> None:
    """`soft_tifa` of GenEval 2's evaluation.py; images that are resized and one that is not square."""
    folder = write_qwen_vl(tmp_path / "model", kind, words=WORDS)
    questions = tmp_path / "questions.jsonl"
    questions.write_text("".join(json.dumps({"prompt": p, "vqa_list": v}) + "\n" for p, v in VQA.items()))
    # with two questions for one pass, the long prompt takes two passes
    options = {"weights": str(folder), "questions": str(questions), "dtype": "fp32", "batch_size": 2}
    shown, prompts = images(2, 50, 90), list(VQA)
    output = rewards.build("geneval2", options)(shown, prompts)
    reference = Reference(folder, kind)
    digit = {"two": "2", "three": "3"}
    for row, prompt in enumerate(prompts):
        scores = []
        for question, answer in VQA[prompt]:
            spellings = ["Yes", "yes", " yes", " Yes"]
            if question.startswith("How many"):
                number = digit[answer]
                spellings = [answer, answer.capitalize(), f" {answer}", f" {answer.capitalize()}", number, f" {number}"]
            probabilities = reference.logits(shown[row], f"{question} Answer in one word.", []).softmax(-1)
            scores.append(sum(float(probabilities[reference.tokenizer.encode(s)[0]]) for s in spellings))
        assert float(output.parts["arithmetic"][row]) == pytest.approx(sum(scores) / len(scores), rel=1e-5)
        geometric = math.prod(scores) ** (1 / len(scores))
        assert float(output.parts["geometric"][row]) == pytest.approx(geometric, rel=1e-5)
    assert torch.equal(output.total, output.parts["geometric"])
    assert abs(float(output.total[0] - output.total[1])) > 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_answers(tmp_path: Path, kind: str) -> None:
    """Greedy decoding in a batch of texts of different length, whatever the folder says about sampling."""
    folder = write_qwen_vl(tmp_path / "model", kind)
    model = load_qwen_vl(
        locate(qwen_vl_asset(str(folder), "MIT"), "reward", "test"), torch.device("cpu"), torch.float32
    )
    reference = Reference(folder, kind)
    shown, texts = images(3, 64, 96), ["Rate it.", "A longer text about the picture: ein Bär 🐻", ""]
    with torch.no_grad():
        answers = model.answers(shown, texts, 5)
    for image, text, answer in zip(shown, texts, answers, strict=True):
        written = reference.answer(image, text, 5)
        ends = [i for i, token in enumerate(written) if token in model._ends]
        assert answer.ended == bool(ends)
        assert answer.text == reference.tokenizer.decode(written[: ends[0]] if ends else written)
    assert len({answer.text for answer in answers}) > 1
