from __future__ import annotations

import importlib.util
import math

import numpy as np
import pytest
import torch

from fmg.core.errors import MissingDependencyError, RewardError
from fmg.registry import prompt_sets, rewards
from fmg.rewards.base import check_prompts, checked
from fmg.rewards.ocr import quoted_text, shipped_model
from fmg.worlds.text.fidelity import MARGIN
from fmg.worlds.text.prompts import LETTERS, SLOTS, WORDS, every_word, prompt_set, quoted, vocabulary
from fmg.worlds.text.render import BOARD_RGB, Sign, random_sign, render
from pretraining.networks import Tokenizers, build_tokenizers
from pretraining.settings import TEXT
from pretraining.signs import TextWorld, captioned_signs


@pytest.fixture(scope="module")
def words() -> list[str]:
    rng = np.random.default_rng(1)
    return [*WORDS, *("".join(rng.choice(list(LETTERS), SLOTS)) for _ in range(60))]


@pytest.fixture(scope="module")
def images(words: list[str]) -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(render([random_sign(word, rng) for word in words]))


@pytest.fixture(scope="module")
def tokenizers() -> Tokenizers:
    return build_tokenizers(TextWorld(), TEXT.text)


def test_no_word_is_in_both_splits_and_every_letter_is_in_training() -> None:
    train, heldout = ({quoted_text(prompt) for prompt in prompt_set(split)} for split in ("train", "heldout"))
    assert train | heldout == set(WORDS) <= set(every_word())
    assert not train & heldout
    assert 0.15 < len(heldout) / len(WORDS) < 0.35
    assert {letter for word in train for letter in word} == set(LETTERS)
    assert {letter for word in heldout for letter in word} == set(LETTERS)


def test_a_letter_of_a_caption_is_wrong_as_often_as_asked() -> None:
    signs = captioned_signs(3000, np.random.default_rng(0), wrong_share=0.35)
    right = np.array([[a == b for a, b in zip(s.sign.word, quoted_text(s.caption), strict=True)] for s in signs])
    expected = 0.65 + 0.35 / len(LETTERS)
    assert abs(right.mean() - expected) < 4 * math.sqrt(expected * (1 - expected) / right.size)
    assert abs(right.all(axis=1).mean() - expected**SLOTS) < 0.04


def test_each_letter_is_drawn_in_its_own_columns() -> None:
    def drawn(word: str) -> np.ndarray:
        return render([Sign(word, board=0)])[0]

    for slot in range(SLOTS):
        other = [*"AAA"]
        other[slot] = "T"
        columns = np.flatnonzero(np.abs(drawn("AAA") - drawn("".join(other))).sum((0, 1)))
        width = drawn("AAA").shape[-1] // SLOTS
        # anti-aliased feet may reach one pixel into the neighbour's columns
        assert slot * width - 1 <= columns.min() < columns.max() <= (slot + 1) * width


def test_the_support_is_every_picture_and_its_prior_is_how_captions_err() -> None:
    world = TextWorld(wrong_share=0.35)
    support = world.support()
    assert len(support.images) == len(LETTERS) ** SLOTS * len(BOARD_RGB)
    assert len({image.tobytes() for image in support.images}) == len(support.images)
    rng = np.random.default_rng(0)
    drawn = world.captioned(8, rng)
    for image in drawn.images:
        assert (np.abs(support.images - image).max((1, 2, 3)) == 0).sum() == 1
    # the posterior of a caption, summed over boards: .65 + .35 / 12 for each right letter
    posterior = np.exp(support.log_likelihood(['the word "TON"']).astype(np.float64))[0]
    posterior = (posterior / posterior.sum()).reshape(-1, len(BOARD_RGB)).sum(1)
    right = 0.65 + 0.35 / len(LETTERS)
    words = every_word()
    assert posterior[words.index("TON")] == pytest.approx(right**3, rel=1e-5)
    assert posterior[words.index("TOP")] == pytest.approx(right**2 * 0.35 / len(LETTERS), rel=1e-5)
    assert posterior[words.index("PEA")] == pytest.approx((0.35 / len(LETTERS)) ** 3, rel=1e-5)


def test_the_recogniser_reads_true_renders_and_not_those_of_other_words(images: torch.Tensor, words: list[str]) -> None:
    pytest.importorskip("rapidocr", reason="needs the packages of flow-map-grpo[ocr]")
    reward = rewards.build("ocr-logp")
    said = [quoted(word)[i % len(quoted(word))] for i, word in enumerate(words)]
    output = reward(images, said)
    assert output.parts["exact"][: len(WORDS)].mean() >= 0.99
    assert output.parts["exact"].mean() >= 0.97
    assert reward(images[:40], said[7:47]).parts["exact"].mean() <= 0.02


@pytest.mark.parametrize("missing", ["rapidocr", "onnxruntime"])
def test_without_the_recogniser_the_error_says_what_to_install(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "fmg.core.runtime.find_spec", lambda name: None if name == missing else importlib.util.find_spec(name)
    )
    with pytest.raises(MissingDependencyError, match=rf"^The reward 'ocr-logp' needs the package '{missing}'") as error:
        rewards.build("ocr-logp")
    assert "pip install 'flow-map-grpo[ocr]'" in error.value.fix
    with pytest.raises(MissingDependencyError, match="fmg pretrain text"):
        shipped_model("fmg pretrain text")


def test_a_token_says_which_letter_and_which_place(tokenizers: Tokenizers) -> None:
    for word in every_word()[::37]:
        first, middle, last = word
        for prompt in quoted(word):
            pieces = tokenizers.t5.tokenize(prompt)
            start = pieces.index(f'▁"{first}')
            assert pieces[start : start + SLOTS] == [f'▁"{first}', middle, f'{last}"']
            others = [*pieces[:start], *pieces[start + SLOTS :]]
            assert all(piece[1:] in vocabulary() for piece in others)
    prompts = [prompt for word in every_word()[::5] for prompt in quoted(word)]
    clip, t5 = tokenizers.ids(prompts)
    assert len(clip.unique(dim=0)) == len(t5.unique(dim=0)) == len(prompts)
    # nothing was cut off
    assert (t5 == tokenizers.t5.eos_token_id).any(1).all()
    assert (clip == tokenizers.clip.eos_token_id).any(1).all()


def test_prompt_sets_suit_the_reward() -> None:
    train, heldout = (prompt_sets.build(f"text-{split}") for split in ("train", "heldout"))
    assert not {p.text for p in train} & {p.text for p in heldout}
    pytest.importorskip("rapidocr", reason="needs the packages of flow-map-grpo[ocr]")
    for prompts in (train, heldout):
        check_prompts("ocr-logp", rewards.build("ocr-logp"), [p.text for p in prompts])


def test_fidelity_is_one_on_renders_and_falls_with_each_damage(images: torch.Tensor, words: list[str]) -> None:
    reward = checked("text-fidelity", rewards.build("text-fidelity"))
    clean = reward(images, words)
    assert torch.equal(clean.total, reward(images, words[::-1]).total)
    assert float(clean.total.min()) > 0.98
    board = images.amax(dim=(2, 3), keepdim=True)
    faint = reward(board + 0.3 * (images - board), words)
    assert float(faint.parts["contrast"].max()) < 0.45
    tinted = reward(images * torch.tensor([1.0, 0.4, 0.4])[:, None, None], words)
    assert float(tinted.parts["palette"].mean()) < 0.3
    smeared = images.clone()
    smeared[:, :, :MARGIN, ::2] = 0.1
    assert float(reward(smeared, words).parts["margin"].max()) < 0.1
    for damaged in (faint, tinted, reward(smeared, words)):
        assert float(damaged.total.mean()) < 0.5


def test_fidelity_refuses_other_pictures() -> None:
    with pytest.raises(RewardError, match="24 x 24"):
        rewards.build("text-fidelity")(torch.zeros(1, 3, 32, 32), ["x"])
