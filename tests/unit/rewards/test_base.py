from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from fmg.core.errors import RewardError, UsageError
from fmg.core.protocols import Reward
from fmg.core.types import RewardOutput
from fmg.rewards.base import Mixture, build_rewards, check_prompts, checked

IMAGES = torch.linspace(0, 1, 3 * 3 * 4 * 4).reshape(3, 3, 4, 4)
PROMPTS = ("one", "two", "three")


class Returns:
    """A reward that returns given values."""

    def __init__(self, total: object, parts: dict[str, object] | None = None) -> None:
        self.output = RewardOutput(total, parts or {})  # type: ignore[arg-type]

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return self.output


class Refuses:
    """A reward that accepts one prompt."""

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(torch.ones(len(prompts)), {})

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for prompt in prompts:
            if prompt != "one":
                raise UsageError(f"There is no target in '{prompt}'", "Quote the target.")


def black_pictures(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
    return RewardOutput(images.zero_().mean((1, 2, 3)), {})


def brightened_through_numpy(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
    pixels = images.numpy()
    pixels[:] = 1
    return RewardOutput(torch.from_numpy(pixels.mean((1, 2, 3))), {})


def sorted_prompts(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
    assert isinstance(prompts, list)
    prompts.sort()
    return RewardOutput(torch.ones(len(prompts)), {})


@pytest.mark.parametrize("reward", [black_pictures, brightened_through_numpy, sorted_prompts])
def test_a_reward_that_works_in_place_changes_nothing_for_those_after_it(reward: Reward) -> None:
    given, prompts = IMAGES.clone(), list(PROMPTS)
    after = checked("after", lambda images, prompts: RewardOutput(images.mean((1, 2, 3)), {}))
    mixture = Mixture([("before", reward, 1.0), ("after", after, 1.0)])
    assert torch.equal(mixture(given, prompts).parts["after"], IMAGES.mean((1, 2, 3)))
    assert torch.equal(given, IMAGES)
    assert prompts == list(PROMPTS)


NAN = torch.tensor([0.0, float("nan"), 1.0])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (Returns(NAN), r"reward 'mine' is nan for the prompt 'two'"),
        (Returns(torch.tensor([0.0, 1.0, float("inf")])), r"is inf for the prompt 'three'"),
        (Returns(torch.ones(3), {"sharp": NAN}), r"part 'sharp' of the reward 'mine' is nan for the prompt 'two'"),
        (Returns(torch.ones(2)), r"shaped \(2,\)"),
        (Returns(torch.ones(3, 1)), r"shaped \(3, 1\)"),
        (Returns(torch.tensor(1.0)), r"shaped \(\)"),
        (Returns(torch.ones(3, dtype=torch.complex64)), "complex64"),
        (Returns([1.0, 2.0, 3.0]), "of type list instead of a tensor"),
        (Returns(torch.ones(3), {"sharp": 1.0}), "of type float instead of a tensor"),
        (lambda images, prompts: torch.ones(3), "returned Tensor instead of a RewardOutput"),
        (lambda images, prompts: 1 / 0, "failed: ZeroDivisionError: division by zero"),
    ],
)
def test_bad_scores_name_the_reward(reward: Returns, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked("mine", reward)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (IMAGES[:2], "2 images for 3 prompts"),
        (IMAGES[0], r"shaped \(3, 4, 4\)"),
        (IMAGES[:, :1], r"shaped \(3, 1, 4, 4\)"),
        ((IMAGES * 255).byte(), "uint8"),
        (IMAGES * 1.01, "prompt 'three' has values outside"),
        (IMAGES - 0.01, "prompt 'one' has values outside"),
        (IMAGES.where(~IMAGES.eq(IMAGES[1, 0, 0, 0]), torch.nan), "prompt 'two' has values that are not finite"),
        (None, "NoneType"),
    ],
)
def test_bad_images_are_refused(images: Tensor, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        checked("mine", Returns(torch.ones(3)))(images, PROMPTS)


def test_scores_come_back_detached_in_fp32() -> None:
    total = torch.tensor([1, 2, 3], dtype=torch.float64, requires_grad=True)
    output = checked("mine", Returns(total, {"whole": torch.tensor([1, 0, 1])}))(IMAGES, PROMPTS)
    assert output.total.tolist() == [1.0, 2.0, 3.0]
    assert not output.total.requires_grad
    assert {output.total.dtype, output.parts["whole"].dtype} == {torch.float32}


def test_errors_of_our_own_pass_unchanged() -> None:
    def unreadable(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        raise UsageError("The prompt cannot be read", "Rewrite it.")

    with pytest.raises(UsageError, match="cannot be read"):
        checked("mine", unreadable)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory. Tried"), RuntimeError("DefaultCPUAllocator: no"), MemoryError()],
)
def test_memory_that_runs_out_in_a_reward_names_it_and_its_batches(error: Exception) -> None:
    def hungry(images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        raise error

    with pytest.raises(RewardError, match=r"Memory ran out in the reward 'hungry': .*smaller batch_size"):
        checked("hungry", hungry)(IMAGES, PROMPTS)


def test_mixture_is_the_weighted_sum_and_reports_every_part() -> None:
    first = Returns(torch.tensor([1.0, 2.0, 3.0]), {"soft": torch.tensor([0.1, 0.2, 0.3])})
    mixture = Mixture([("a", first, 2.0), ("b", Returns(torch.tensor([1.0, 0.0, -1.0])), -0.5)])
    output = mixture(IMAGES, PROMPTS)
    torch.testing.assert_close(output.total, torch.tensor([1.5, 4.0, 6.5]))
    assert list(output.parts) == ["a", "a/soft", "b"]
    torch.testing.assert_close(output.parts["a/soft"], torch.tensor([0.1, 0.2, 0.3]))
    assert (mixture.names, mixture.weights()) == (("a", "b"), {"a": 2.0, "b": -0.5})
    nested = Mixture([("sum", mixture, 1.0)])(IMAGES, PROMPTS)
    torch.testing.assert_close(nested.total, output.total)
    assert "sum/a/soft" in nested.parts


def test_mixture_checks_its_rewards() -> None:
    with pytest.raises(RewardError, match="'b' is nan"):
        Mixture([("a", Returns(torch.ones(3)), 1.0), ("b", Returns(NAN), 0.0)])(IMAGES, PROMPTS)
    with pytest.raises(UsageError, match="no reward"):
        Mixture([])
    with pytest.raises(UsageError, match="'a' is given twice"):
        Mixture([("a", Returns(torch.ones(3)), 1.0), ("a", Returns(torch.ones(3)), 1.0)])


def test_preconditions_on_prompts_pass_through_every_wrapper() -> None:
    wrapped = Mixture([("plain", Returns(torch.ones(3)), 1.0), ("picky", checked("picky", Refuses()), 1.0)])
    check_prompts("sum", wrapped, ["one"])
    with pytest.raises(UsageError, match=r"^The reward 'picky' cannot score every prompt: There is no target in 'two'"):
        check_prompts("sum", wrapped, PROMPTS)
    check_prompts("plain", Returns(torch.ones(3)), PROMPTS)


def test_build_rewards() -> None:
    built = build_rewards(["jpeg-compressibility", "python:math:hypot"])
    assert list(built) == ["jpeg-compressibility", "math:hypot"]
    with pytest.raises(UsageError, match="given twice"):
        build_rewards(["jpeg-compressibility", "jpeg-compressibility"])
    with pytest.raises(UsageError, match="Did you mean 'jpeg-compressibility'"):
        build_rewards(["jpeg-compresibility"])
