"""The prompt sets of the text world; the held-out one quotes no word of training."""

from __future__ import annotations

from fmg.core.types import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets
from fmg.worlds.configs import TextPromptsConfig
from fmg.worlds.text.words import Split, prompt_set


@prompt_sets.register("text-train", TextPromptsConfig)
def text_train(config: TextPromptsConfig) -> PromptList:
    """Prompts that training draws from: signs that quote a word of three letters."""
    return _prompts("text-train", "train")


@prompt_sets.register("text-heldout", TextPromptsConfig)
def text_heldout(config: TextPromptsConfig) -> PromptList:
    """Prompts that quote words which training never sees."""
    return _prompts("text-heldout", "heldout")


def _prompts(name: str, split: Split) -> PromptList:
    return PromptList(name, [Prompt(prompt, "text", {"prompt": prompt}) for prompt in prompt_set(split)])
