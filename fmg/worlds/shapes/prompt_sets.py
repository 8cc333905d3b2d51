"""The prompt sets of the shapes world; the held-out one shares no combination of attributes with training."""

from __future__ import annotations

from fmg.core.types import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets
from fmg.worlds.configs import ShapesPromptsConfig
from fmg.worlds.shapes.prompts import Split, prompt_set


@prompt_sets.register("shapes-train", ShapesPromptsConfig)
def shapes_train(config: ShapesPromptsConfig) -> PromptList:
    """Prompts that training draws from: one object with a colour, a kind and a position."""
    return _prompts("shapes-train", "train")


@prompt_sets.register("shapes-heldout", ShapesPromptsConfig)
def shapes_heldout(config: ShapesPromptsConfig) -> PromptList:
    """Prompts of combinations that training never sees."""
    return _prompts("shapes-heldout", "heldout")


@prompt_sets.register("shapes-hard", ShapesPromptsConfig)
def shapes_hard(config: ShapesPromptsConfig) -> PromptList:
    """Counts, two objects and relations: evaluated only."""
    return _prompts("shapes-hard", "hard")


def _prompts(name: str, split: Split) -> PromptList:
    items = prompt_set(split)
    return PromptList(name, [Prompt(i.prompt, i.scene.tag, i.scene.metadata(i.prompt)) for i in items])
