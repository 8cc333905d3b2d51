"""OpenCLIP's cleaning of text, and prompts of every kind through the tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from fmg.core.errors import MissingDependencyError
from fmg.registry import rewards
from fmg.rewards.clip import clean
from tests.tiny_rewards import write_clip_tokenizer, write_open_clip


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("A Red  Cat", "a red cat"),
        ("“curly” ‘quotes’", "\"curly\" 'quotes'"),
        ("cats &amp; dogs", "cats & dogs"),
        ("cats &amp;amp; dogs", "cats & dogs"),
        ("<b> &amp;amp;amp;", "<b> &amp;"),
        ("schÃ¶n", "schön"),
        ("line\nbreak\tand\u00a0space ", "line break and space"),
        ("", ""),
        ("&nbsp;", ""),
        ("🦊 NAÏVE", "🦊 naïve"),
    ],
)
def test_clean(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


def test_without_ftfy_there_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr("fmg.rewards.clip.find_spec", lambda name: None if name == "ftfy" else find(name))
    with pytest.raises(MissingDependencyError) as caught:
        rewards.build("hpsv2")
    assert str(caught.value).count("\n") == 0
    assert "pip install 'flow-map-grpo[rewards]'" in str(caught.value)


def test_prompts_of_every_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    tiny, tokenizer = write_open_clip(tmp_path / "hps"), write_clip_tokenizer(tmp_path / "tokenizer")
    reward = rewards.build("hpsv2", {"weights": str(tiny.file), "tokenizer": str(tokenizer)})
    start = "a cat on a mat, " * 8
    prompts = [
        "",
        " ",
        "x" * 10_000,
        start,
        start + "y" * 10_000,
        "小さな猫 🐈 \u202e",
        "<|endoftext|> after",
        "\x00\x07",
    ]
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(len(prompts), -1, -1, -1)
    scores = reward(images, prompts).total
    assert scores.isfinite().all()
    assert torch.equal(scores[0], scores[1])
    # what comes after 77 tokens does not count
    torch.testing.assert_close(scores[3], scores[4], rtol=0, atol=1e-6)
    assert scores[3] != scores[2]
