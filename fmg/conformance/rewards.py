"""Rules of a reward, on synthetic images."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fmg.conformance.component_under_test import ComponentUnderTest
from fmg.conformance.rules import NotApplicable, Rule, Violation, require
from fmg.core.errors import RewardError, UsageError
from fmg.core.protocols import Reward
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.rewards.base import Checked, checked, probe_prompt

COUNT = 6
# The embedded worlds have pictures of one size.
SIDES = (32, 24, 64, 224)
# How far scores may differ, as a share of their spread over the pictures. Rounding depends on the batch size, most
# in bf16; a score that depends on its neighbours, or on chance, is off by about the spread itself.
AGAIN, ELSEWHERE = 1e-4, 1e-2
SMOOTH = 0.1
"""How far scores may differ under differentiable preprocessing, which does not round to 8 bits."""
ROUNDING = 1e-6
"""Rounding of fp32, relative to scores above 1."""
# Free text, GenEval's templates, quoted text, scenes of the shapes world; a reward is tested on those that it takes.
PROMPTS = (
    "a photo of a red apple",
    "a photo of two dogs",
    "a photo of a blue car",
    'a sign that says "HELLO"',
    'a sign that says "OPEN"',
    'a poster that says "MUSIC"',
    "a red circle",
    "a blue square",
    "a green triangle",
)


@dataclass(frozen=True)
class RewardCase:
    """A reward and what it is shown: different images of one size, with several prompts that it accepts."""

    component: ComponentUnderTest

    @cached_property
    def reward(self) -> Reward:
        built: Reward = self.component.build()
        return built

    @cached_property
    def checked(self) -> Checked:
        """The same behind the checks of a run."""
        return checked(self.component.name, self.reward)

    @cached_property
    def prompts(self) -> list[str]:
        """One for each image; neighbours have different ones where the reward takes more than one."""
        taken = [prompt for prompt in PROMPTS if self._takes(prompt)] or [probe_prompt(self.checked)]
        return [taken[i % len(taken)] for i in range(COUNT)]

    def _takes(self, prompt: str) -> bool:
        try:
            self.checked.check_prompts([prompt])
        except UsageError:
            return False
        return True

    @cached_property
    def side(self) -> int:
        """The first of `SIDES` that the reward does not refuse."""
        for side in SIDES:
            try:
                self.reward(pictures(side), self.prompts)
            except RewardError:
                continue
            return side
        return SIDES[0]

    def images(self) -> Float[Tensor, "b 3 h w"]:
        return pictures(self.side)

    @cached_property
    def output(self) -> RewardOutput:
        return self.reward(self.images(), self.prompts)


def pictures(side: int) -> Float[Tensor, "b 3 h w"]:
    """Smooth coloured images, all different."""
    coarse = torch.rand(COUNT, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    return F.interpolate(coarse, size=(side, side), mode="bilinear").clamp(0, 1)


def _scores(case: RewardCase) -> None:
    if isinstance(case.output, PartialRewardOutput):
        raise Violation("Images were left without a score; only a reward with the option `on_failure` may leave them.")
    # raises for a wrong type, shape or value
    case.checked(case.images(), case.prompts)


def _same(ours: RewardOutput, theirs: RewardOutput, tolerance: float, what: str) -> None:
    require(set(ours.parts) == set(theirs.parts), f"The reward reports different parts {what}.")
    pairs = {"total": (ours.total, theirs.total)}
    pairs |= {part: (ours.parts[part], theirs.parts[part]) for part in ours.parts}
    for part, (a, b) in pairs.items():
        a, b = a.detach().double().cpu(), b.detach().double().cpu()
        require(a.shape == b.shape, f"'{part}' has a different shape {what}.")
        gap = float((a - b).abs().max())
        spread = float(torch.cat((a, b)).max() - torch.cat((a, b)).min())
        bound = tolerance * spread + ROUNDING * max(1.0, float(a.abs().max()))
        require(gap <= bound, f"'{part}' differs by {gap:.3g} {what}.")


def _deterministic(case: RewardCase) -> None:
    _same(case.output, case.reward(case.images(), case.prompts), AGAIN, "when it scores the same images again")


def _alone(case: RewardCase) -> None:
    singles = [case.reward(case.images()[i : i + 1], case.prompts[i : i + 1]) for i in range(COUNT)]
    whole = RewardOutput(
        torch.cat([one.total for one in singles]),
        {part: torch.cat([one.parts[part] for one in singles]) for part in case.output.parts},
    )
    _same(case.output, whole, ELSEWHERE, "when the images come one by one: a score must not depend on its batch")


def _order(case: RewardCase) -> None:
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    shuffled = case.reward(case.images()[order], [case.prompts[i] for i in order.tolist()])
    expected = RewardOutput(
        case.output.total[order.to(case.output.total.device)],
        {part: values[order.to(values.device)] for part, values in case.output.parts.items()},
    )
    _same(expected, shuffled, ELSEWHERE, "when the images come in a different order, each with its prompt")


def _untouched(case: RewardCase) -> None:
    given, prompts = case.images(), list(case.prompts)
    case.reward(given, prompts)
    require(torch.equal(given, case.images()), "The reward modifies the images it is given; work on a copy.")
    require(prompts == case.prompts, "The reward modifies the list of prompts it is given; work on a copy.")


def _extremes(case: RewardCase) -> None:
    for name, value in (("black", 0.0), ("white", 1.0)):
        try:
            case.checked(torch.full((1, 3, case.side, case.side), value), case.prompts[:1])
        except RewardError as error:
            raise Violation(f"The reward fails on a {name} image: {error.what}") from None


def _non_finite(case: RewardCase) -> None:
    broken = case.images()
    broken[2] = torch.nan
    try:
        output = case.reward(broken, case.prompts)
    except Exception:
        return
    hidden = bool(output.total.detach().cpu()[2].isfinite())
    require(not hidden, "An image of NaN gets a finite score, which hides a broken model: raise, or return NaN.")


def _gradient(case: RewardCase) -> None:
    if not case.component.config.has_gradient:
        raise NotApplicable("The reward does not declare that it is differentiable.")
    images = case.images().requires_grad_()
    # raises for scores without a gradient
    scores = case.checked.differentiated(images, case.prompts)
    _same(case.output, RewardOutput(scores, case.output.parts), SMOOTH, "when images record gradients")
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    known = bool(gradient.isfinite().all()) and bool(gradient.flatten(1).abs().sum(1).all())
    require(known, "The gradient of a score with respect to its image is zero or not finite.")


RULES: tuple[Rule[RewardCase], ...] = (
    Rule("one finite score per image", _scores),
    Rule("deterministic", _deterministic),
    Rule("independent of the batch", _alone),
    Rule("follows the order of images", _order),
    Rule("leaves its inputs alone", _untouched),
    Rule("scores black and white", _extremes),
    Rule("hides no broken image", _non_finite),
    Rule("has the gradient that it declares", _gradient),
)
