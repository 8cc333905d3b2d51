"""Rewards that declare a gradient have one: that of finite differences, at the scores that they give without it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fmg.core.errors import RewardError
from fmg.core.types import RewardOutput
from fmg.registry import rewards
from fmg.rewards.base import Checked, Mixture
from fmg.rewards.images import SMOOTH_TOLERANCE, pillow_bicubic, resize_and_crop
from tests import tiny_rewards as tiny

Options = dict[str, object]
PROMPTS = ["a red circle on the left", "a blue square in the center"]


def clip(folder: Path) -> Options:
    return {"weights": str(tiny.write_clip_folder(folder / "clip"))}


def with_tokenizer(folder: Path) -> Options:
    return clip(folder) | {"tokenizer": str(tiny.write_clip_tokenizer(folder / "tokenizer"))}


def hpsv2(folder: Path) -> Options:
    return with_tokenizer(folder) | {"weights": str(tiny.write_open_clip(folder / "hps").file)}


def aesthetic(folder: Path) -> Options:
    return clip(folder) | {"head": str(tiny.write_aesthetic_head(folder / "head").file)}


def imagereward(folder: Path) -> Options:
    written = tiny.write_image_reward(folder / "reward").folder
    return {"weights": str(written), "tokenizer": str(written / "tokenizer"), "vision_heads": 2}


def hpsv3(folder: Path) -> Options:
    written = tiny.write_hpsv3(folder / "hpsv3")
    places = {"base": str(written.folder / "base"), "instruction": str(written.folder / "instruction.py")}
    return {"weights": str(written.file), "dtype": "fp32", **places}


CASES: dict[str, Callable[[Path], Options]] = {
    "shapes-clip": lambda folder: {},
    "hpsv2": hpsv2,
    "pickscore": with_tokenizer,
    "clipscore": clip,
    "aesthetic": aesthetic,
    "imagereward": imagereward,
    "hpsv3": hpsv3,
}


def pictures(side: int, seed: int = 0) -> Tensor:
    """Smooth images away from the bounds, where clamping would hide a gradient."""
    coarse = torch.rand(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
    return 0.2 + 0.6 * F.interpolate(coarse, size=(side, side), mode="bilinear")


def test_every_differentiable_reward_is_a_case() -> None:
    assert {name for name in rewards.names() if rewards.config_class(name).differentiable} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_finite_differences(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    reward = Checked(name, rewards.build(name, CASES[name](tmp_path)))
    # not the size of any network, so that everything is resized
    images = pictures(32 if name == "shapes-clip" else 48).requires_grad_()
    scores = reward.differentiated(images, PROMPTS)
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    assert not [x for x in _parameters(reward.reward) if x.requires_grad or x.grad is not None]
    # rounding to 8 bits moves a score by less than its gradient over half a level of every pixel
    plain = reward(images.detach(), PROMPTS).total
    bound = 2 * SMOOTH_TOLERANCE * gradient.flatten(1).abs().sum(1)
    assert bool(((scores.detach() - plain).abs() <= bound + 1e-5).all())
    with torch.no_grad():
        assert torch.equal(reward.differentiated(images, PROMPTS), plain)
    direction = gradient / gradient.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    step = 0.05
    higher, lower = (
        reward.differentiated((images.detach() + sign * step * direction).requires_grad_(), PROMPTS).detach()
        for sign in (1, -1)
    )
    slope = gradient.flatten(1).norm(dim=1)
    assert float(slope.min()) > 0
    torch.testing.assert_close((higher - lower) / (2 * step), slope, rtol=0.02, atol=0)


def _parameters(reward: object) -> list[Tensor]:
    network = getattr(reward, "network", None)
    return list(network.parameters()) if isinstance(network, torch.nn.Module) else []


@pytest.mark.parametrize(("sizes", "side"), [((48, 64), 24), ((24, 37), 32), ((30, 30), 30)])
def test_the_smooth_resize_is_pillows_up_to_its_rounding(sizes: tuple[int, int], side: int) -> None:
    noise = torch.rand(2, 3, *sizes, generator=torch.Generator().manual_seed(1))
    for rounding in ("half-even", "down"):
        ours = resize_and_crop(noise.clone().requires_grad_(), side, rounding)  # type: ignore[arg-type]
        theirs = resize_and_crop(noise, side, rounding)  # type: ignore[arg-type]
        assert ours.requires_grad
        assert float((ours.detach() - theirs).abs().max()) <= SMOOTH_TOLERANCE
    stretched = pillow_bicubic(noise.clone().requires_grad_(), (40, 20))
    assert float((stretched.detach() - pillow_bicubic(noise, (40, 20))).abs().max()) <= SMOOTH_TOLERANCE


def test_a_mixture_weighs_gradients_and_leaves_out_what_has_no_weight() -> None:
    def bright(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(images.flatten(1).mean(1), {})

    def counted(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(len(prompt)) for prompt in prompts]), {})

    mixture = Mixture([("bright", bright, -2.0), ("counted", counted, 0.0)])
    images = pictures(8).requires_grad_()
    (gradient,) = torch.autograd.grad(mixture.differentiated(images, PROMPTS).sum(), images)
    torch.testing.assert_close(gradient, torch.full_like(images, -2 / (3 * 8 * 8)))
    with pytest.raises(RewardError, match="scores of the reward 'counted' have no gradient"):
        mixture.differentiated(images, PROMPTS, {"counted": 1.0})
    assert mixture.differentiated(images.detach(), PROMPTS, {"counted": 1.0}).tolist() == [24.0, 27.0]
