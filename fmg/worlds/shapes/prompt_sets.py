"""The prompt sets of the shapes world; the held-out one shares no combination of attributes with training."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets
from fmg.worlds.configs import ShapesPromptsConfig
from fmg.worlds.shapes.prompts import PromptItem, hard_prompts, parse_prompt, prompt_set
from fmg.worlds.shapes.render import place, render


class ShapesPrompts(PromptList):
    """Prompts of the shapes world, which knows what they look like."""

    def true_images(self, prompts: Sequence[str], seed: int) -> Float[Tensor, "n 3 32 32"]:
        """One true picture of each prompt, in [0, 1]; positions and sizes are random.

        Raises:
            UsageError: for a prompt outside the grammar of the shapes world.
        """
        rng = np.random.default_rng(seed)
        return torch.from_numpy(render([place(parse_prompt(prompt), rng) for prompt in prompts]))


@prompt_sets.register("shapes-train", ShapesPromptsConfig)
def shapes_train(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Prompts that training draws from: one object with a colour, a kind and a position."""
    return _prompts("shapes-train", prompt_set("train"))


@prompt_sets.register("shapes-heldout", ShapesPromptsConfig)
def shapes_heldout(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Prompts of combinations that training never sees."""
    return _prompts("shapes-heldout", prompt_set("heldout"))


@prompt_sets.register("shapes-hard", ShapesPromptsConfig)
def shapes_hard(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Counts, two objects and relations: a fixed sample, evaluated only."""
    return _prompts("shapes-hard", prompt_set("hard"))


@prompt_sets.register("shapes-hard-train", ShapesPromptsConfig)
def shapes_hard_train(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Counts, two objects and relations that training draws from."""
    return _prompts("shapes-hard-train", hard_prompts(heldout=False))


@prompt_sets.register("shapes-hard-heldout", ShapesPromptsConfig)
def shapes_hard_heldout(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Counts, two objects and relations in combinations that training never sees."""
    return _prompts("shapes-hard-heldout", hard_prompts(heldout=True))


def _prompts(name: str, items: Sequence[PromptItem]) -> ShapesPrompts:
    return ShapesPrompts(name, [Prompt(i.prompt, i.scene.tag, i.scene.metadata(i.prompt)) for i in items])
