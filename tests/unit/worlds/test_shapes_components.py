from __future__ import annotations

import numpy as np
import pytest
import torch

from fmg.core.errors import RewardError, UsageError
from fmg.registry import prompt_sets, rewards
from fmg.rewards.base import check_prompts, checked
from fmg.worlds.shapes.prompts import prompt_set
from fmg.worlds.shapes.scene import place, render
from fmg.worlds.shapes.verifier import verify

ITEMS = prompt_set("train")[::23]
PROMPTS = [item.prompt for item in ITEMS]


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    rng = np.random.default_rng(0)
    return torch.from_numpy(render([place(item.scene, rng) for item in ITEMS])).float().clamp(0, 1)


def test_parts_are_the_verdict_and_total_is_the_chosen_score(images: torch.Tensor) -> None:
    captions = PROMPTS[1:] + PROMPTS[:1]
    scenes = [item.scene for item in (*ITEMS[1:], ITEMS[0])]
    verdict = verify(images.numpy(), scenes)
    for score in ("soft", "strict"):
        output = checked("shapes", rewards.build("shapes", {"score": score}))(images, captions)
        assert list(output.parts) == ["color", "shape", "position", "count", "soft", "strict"]
        for name, values in output.parts.items():
            assert values.tolist() == pytest.approx(getattr(verdict, name).tolist())
        assert torch.equal(output.total, output.parts[score])


def test_true_renders_score_high_and_shuffled_captions_low(images: torch.Tensor) -> None:
    reward = rewards.build("shapes", {"score": "strict"})
    assert float(reward(images, PROMPTS).total.mean()) >= 0.95
    assert float(reward(images, PROMPTS[7:] + PROMPTS[:7]).total.mean()) <= 0.1
    assert float(rewards.build("shapes")(images, PROMPTS).total.mean()) > 0.97


def test_quality_ignores_the_prompt_and_falls_with_damage(images: torch.Tensor) -> None:
    quality = checked("shapes-quality", rewards.build("shapes-quality"))
    clean = quality(images, PROMPTS)
    assert list(clean.parts) == ["recognisable", "sharpness", "palette"]
    assert torch.equal(clean.total, quality(images, PROMPTS[::-1]).total)
    assert float(clean.total.mean()) > 0.8
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    noisy = quality((images + 0.15 * noise).clamp(0, 1), PROMPTS)
    assert float(noisy.total.mean()) < 0.7 * float(clean.total.mean())


def test_other_pictures_and_prompts_are_refused(images: torch.Tensor) -> None:
    reward = rewards.build("shapes")
    with pytest.raises(RewardError, match="32 x 32"):
        reward(torch.zeros(1, 3, 64, 64), PROMPTS[:1])
    with pytest.raises(UsageError, match="'a photo of a dog'"):
        reward(images[:1], ["a photo of a dog"])
    with pytest.raises(UsageError, match=r"The reward 'shapes' cannot score every prompt: .*'a photo of a dog'"):
        check_prompts("shapes", reward, [*PROMPTS, "a photo of a dog"])


def test_prompt_sets_have_scenes_and_do_not_overlap() -> None:
    train, heldout, hard = (prompt_sets.build(f"shapes-{name}") for name in ("train", "heldout", "hard"))
    assert {p.tag for p in train} == {p.tag for p in heldout} == {"single_object"}
    assert {p.tag for p in hard} == {"counting", "two_object", "position"}
    texts = [{p.text for p in prompts} for prompts in (train, heldout, hard)]
    assert len(set.union(*texts)) == sum(map(len, texts))
    first = train[0]
    assert first.metadata["prompt"] == first.text
    for prompts in (train, heldout, hard):
        check_prompts("shapes", rewards.build("shapes"), [p.text for p in prompts])
