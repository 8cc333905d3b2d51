"""Common to all rewards: checks of images and scores, weighted sums, and missing scores."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fmg.core.errors import FmgError, RewardError, UsageError, one_line, out_of_memory
from fmg.core.hub import locate
from fmg.core.protocols import Reward
from fmg.core.stdout_redirect import fenced
from fmg.core.types import PartialRewardOutput, RewardOutput
from fmg.recipe.sections import FUNCTION_REWARD, PYTHON_REWARD, RewardRef
from fmg.registry import rewards
from fmg.rewards.configs import FunctionRewardConfig
from fmg.rewards.functions import NO_FUNCTIONS, Functions
from fmg.rewards.images import records_gradients
from fmg.rewards.python import FunctionReward

NO_OPTIONS: Mapping[str, Mapping[str, object]] = MappingProxyType({})


@runtime_checkable
class ReadsPrompts(Protocol):
    """A reward that cannot score every prompt. `check_prompts` calls it when a prompt set is loaded."""

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raises a `UsageError` that names the first prompt it cannot score."""


@runtime_checkable
class HasExample(Protocol):
    """A reward that accepts none of `PROBE_PROMPTS`."""

    def example_prompt(self) -> str:
        """A prompt that it can score."""


class Checked:
    """A reward whose images and scores are checked; its scores are fp32 on the CPU.

    It gets a copy of the images, since other rewards score them and they are shown and saved afterwards.

    Raises:
        RewardError: when the images are not floats `(b, 3, h, w)` in [0, 1]; when the reward fails, or returns anything
            but one finite number for each image, in `total` and in every part. Names the reward and the prompt.
    """

    def __init__(self, name: str, reward: Reward) -> None:
        self.name = name
        self.reward = reward

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        output = self.score(images, prompts)
        if isinstance(output, PartialRewardOutput):
            row = int((~output.scored).nonzero()[0])
            raise RewardError(
                f"The reward '{self.name}' has no score for the prompt '{prompts[row]}'",
                "Score every image: only training rollouts may have missing scores.",
            )
        return output

    def score(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of the images; a `PartialRewardOutput` where the reward is allowed to leave some images out."""
        _check_images(self.name, images, prompts)
        output = self._output(images, prompts)
        scored = torch.ones(len(prompts), dtype=torch.bool)
        if isinstance(output, PartialRewardOutput):
            scored = output.scored.to("cpu", torch.bool)
        total = self._scores("total", output.total, prompts, scored)
        parts = {part: self._scores(part, x, prompts, scored) for part, x in output.parts.items()}
        return RewardOutput(total, parts) if bool(scored.all()) else PartialRewardOutput(total, parts, scored)

    def differentiated(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> Float[Tensor, " b"]:
        """The total, with a gradient if the images record one.

        Raises:
            RewardError: as for scores, and when they have no gradient.
        """
        _check_images(self.name, images.detach(), prompts)
        output = self._output(images, prompts)
        self._scores("total", output.total, prompts, torch.ones(len(prompts), dtype=torch.bool))
        if records_gradients(images) and not output.total.requires_grad:
            raise RewardError(
                f"The scores of the reward '{self.name}' have no gradient, although it is declared differentiable",
                "Compute them from the images with torch alone, or use another objective.",
            )
        return output.total

    def check_prompts(self, prompts: Sequence[str]) -> None:
        check_prompts(self.name, self.reward, prompts)

    def _output(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        try:
            # writing to a NumPy view changes a tensor unnoticed, so only a copy is safe
            with fenced(f"The reward '{self.name}'"):
                output: object = self.reward(images.clone(), list(prompts))
        except FmgError:
            raise
        except Exception as error:
            if (said := out_of_memory(error)) is not None:
                raise RewardError(
                    f"Memory ran out in the reward '{self.name}': {said}",
                    "Give it a smaller batch_size, if it has one, or another device.",
                ) from error
            raise RewardError(
                f"The reward '{self.name}' failed: {one_line(error)}", "Correct the reward, or leave it out."
            ) from error
        if not isinstance(output, RewardOutput):
            raise RewardError(
                f"The reward '{self.name}' returned {type(output).__name__} instead of a RewardOutput",
                "Return RewardOutput(total, parts).",
            )
        return output

    def _scores(
        self, part: str, scores: object, prompts: Sequence[str], scored: Bool[Tensor, " b"]
    ) -> Float[Tensor, " b"]:
        subject = f"The reward '{self.name}'" if part == "total" else f"The part '{part}' of the reward '{self.name}'"
        fix = f"Return one finite number for each of the {len(prompts)} images, shaped ({len(prompts)},)."
        if not isinstance(scores, Tensor):
            raise RewardError(f"{subject} is of type {type(scores).__name__} instead of a tensor", fix)
        if scores.shape != (len(prompts),) or scores.is_complex():
            raise RewardError(f"{subject} is {scores.dtype} shaped {tuple(scores.shape)}", fix)
        values = scores.detach().to("cpu", torch.float32)
        bad = (~values.isfinite() & scored).nonzero()
        if len(bad):
            row = int(bad[0])
            raise RewardError(f"{subject} is {float(values[row])} for the prompt '{prompts[row]}'", fix)
        return values.masked_fill(~scored, math.nan)


def checked(name: str, reward: Reward) -> Checked:
    """`reward` with its inputs and outputs checked under the name `name`."""
    return reward if isinstance(reward, Checked) else Checked(name, reward)


def weighted_sum(outputs: Mapping[str, RewardOutput], weights: Mapping[str, float]) -> RewardOutput:
    """`sum_i weight_i total_i`, with the parts `<name>` and `<name>/<part>`; partial when one of `outputs` is."""
    total, scored = torch.zeros(()), torch.tensor(True)
    parts: dict[str, Tensor] = {}
    for name, output in outputs.items():
        if isinstance(output, PartialRewardOutput):
            scored = scored & output.scored
        total = total + weights[name] * output.total
        parts[name] = output.total
        parts.update({f"{name}/{part}": values for part, values in output.parts.items()})
    return RewardOutput(total, parts) if bool(scored.all()) else PartialRewardOutput(total, parts, scored)


class Mixture:
    """The weighted sum of several rewards; itself a reward.

    Its parts are `<name>`, the unweighted total of each reward, and `<name>/<part>`.

    Args:
        terms: (name, reward, weight); each reward is checked under its name.

    Raises:
        UsageError: there is no term, or two have the same name.
    """

    def __init__(self, terms: Sequence[tuple[str, Reward, float]]) -> None:
        names = [name for name, _, _ in terms]
        if not names:
            raise UsageError("There is no reward", "Give at least one, such as --reward shapes.")
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"The reward '{twice}' is given twice", "Give each reward once, with its whole weight.")
        self._terms = {name: (checked(name, reward), weight) for name, reward, weight in terms}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._terms)

    def named(self) -> Iterator[tuple[str, Checked]]:
        for name, (reward, _) in self._terms.items():
            yield name, reward

    def weights(self) -> dict[str, float]:
        return {name: weight for name, (_, weight) in self._terms.items()}

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """`total = sum_i weight_i total_i`; partial when a reward could not score every image."""
        return weighted_sum({name: reward.score(images, prompts) for name, reward in self.named()}, self.weights())

    def differentiated(
        self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str], weights: Mapping[str, float] | None = None
    ) -> Float[Tensor, " b"]:
        """The weighted sum of the rewards that have a weight, with a gradient if the images record one.

        Args:
            images: in [0, 1].
            prompts: one for each image.
            weights: by name, in place of those of the mixture.

        Raises:
            RewardError: as `Checked.differentiated`.
        """
        weights = self.weights() if weights is None else weights
        terms = [
            weights[name] * reward.differentiated(images, prompts).to(images.device)
            for name, reward in self.named()
            if weights.get(name)
        ]
        return torch.stack(terms).sum(0)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        for name, reward in self.named():
            check_prompts(name, reward, prompts)


def check_prompts(name: str, reward: Reward, prompts: Sequence[str]) -> None:
    """Lets a reward refuse prompts that it cannot score, before anything is generated.

    Raises:
        UsageError: names the reward and the first prompt it refuses.
    """
    if not isinstance(reward, ReadsPrompts):
        return
    try:
        reward.check_prompts(prompts)
    except FmgError as error:
        if error.what.startswith("The reward '"):
            raise
        raise UsageError(f"The reward '{name}' cannot score every prompt: {error.what}", error.fix) from None


# Each built-in reward accepts one of them, or is a `HasExample`: free text, GenEval's templates, quoted text, scenes of
# the shapes world.
PROBE_PROMPTS = ("a photo of a red apple", 'a sign that says "HELLO"', "a red circle")


def probe_prompt(reward: Checked) -> str:
    """The first of `PROBE_PROMPTS` that the reward accepts, or its own example.

    Raises:
        UsageError: when it accepts none.
    """
    refusal: FmgError | None = None
    for prompt in PROBE_PROMPTS:
        try:
            reward.check_prompts([prompt])
        except UsageError as error:
            refusal = error
        else:
            return prompt
    if isinstance(reward.reward, HasExample):
        return reward.reward.example_prompt()
    assert refusal is not None
    raise UsageError(f"The reward '{reward.name}' accepts none of the probe prompts: {refusal.what}", refusal.fix)


def reward_refs(
    entries: Sequence[str | Mapping[str, object]], options: Mapping[str, Mapping[str, object]] = NO_OPTIONS
) -> list[RewardRef]:
    """References to rewards by name, by `python:module:function`, or as entries of a recipe, with options by name.

    Raises:
        UsageError: for an unknown name or option.
    """
    found = []
    for entry in entries:
        own = dict(entry) if isinstance(entry, Mapping) else {"name": entry}
        name = str(own.pop("name"))
        component, _, target = name.partition(":") if name.startswith(f"{PYTHON_REWARD}:") else (name, "", "")
        given = {**options.get(name, {}), **own, **({"target": target} if target else {})}
        found.append(RewardRef(name=component, config=rewards.config(component, given)))
    return found


def build_rewards(references: Sequence[str | RewardRef], functions: Functions = NO_FUNCTIONS) -> dict[str, Checked]:
    """Checked rewards by label, in order.

    Args:
        references: registered names, `python:module:function`, or references of a recipe, which carry options.
        functions: those passed to a Python call, by name.

    Raises:
        UsageError: for an unknown name, one given twice, or a function that was not passed.
        MissingDependencyError: for weights that have not been fetched. Networks load when they first score, so this is
            checked here, before a run begins.
        CheckpointError: for local weights that do not exist.
    """
    refs = [reward_refs([ref])[0] if isinstance(ref, str) else ref for ref in references]
    built: dict[str, Checked] = {}
    for ref in refs:
        if ref.label in built:
            raise UsageError(f"The reward '{ref.label}' is given twice", "Give each reward once.")
        for asset in ref.config.assets():
            locate(asset, "reward", ref.name, ref.config.source_options)
        if ref.name == FUNCTION_REWARD and ref.label in functions:
            reward: Reward = FunctionReward(cast(FunctionRewardConfig, ref.config), functions[ref.label])
        else:
            reward = rewards.build_config(ref.name, ref.config)
        built[ref.label] = checked(ref.label, reward)
    return built


def _check_images(name: str, images: object, prompts: Sequence[str]) -> None:
    fix = "Decode latents to floats in [0, 1] shaped (b, 3, h, w), one image for each prompt."
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4 or images.shape[1] != 3:
        got = f"{images.dtype} shaped {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise RewardError(f"The reward '{name}' got images that are {got}", fix)
    if len(images) != len(prompts):
        raise RewardError(f"The reward '{name}' got {len(images)} images for {len(prompts)} prompts", fix)
    # a NaN fails both comparisons
    inside = ((images >= 0) & (images <= 1)).flatten(1).all(1)
    if not bool(inside.all()):
        row = int((~inside).nonzero()[0])
        what = "outside [0, 1]" if bool(images[row].isfinite().all()) else "that are not finite"
        raise RewardError(f"The image for the prompt '{prompts[row]}' has values {what}", fix)


def complete_groups(output: RewardOutput, groups: Int[Tensor, " b"]) -> Bool[Tensor, " b"]:
    """True for images of groups in which every image was scored.

    A group advantage compares the images of one prompt, and a group with missing scores is a different sample. The
    images of incomplete groups are in no update: their advantage is 0.
    """
    if not isinstance(output, PartialRewardOutput):
        return torch.ones(len(groups), dtype=torch.bool)
    return ~torch.isin(groups.cpu(), groups.cpu()[~output.scored])


def select_rows(output: RewardOutput, rows: Bool[Tensor, " b"] | slice) -> RewardOutput:
    """The scores of some of the images, all of which must have been scored."""
    if isinstance(output, PartialRewardOutput) and not bool(output.scored[rows].all()):
        raise ValueError("select_rows got a row without a score")
    return RewardOutput(output.total[rows], {part: values[rows] for part, values in output.parts.items()})
