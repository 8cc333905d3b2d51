"""What a dry run looks at besides the recipe itself: the files that it names. Imports no torch and runs no code."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fmg.registry.recipe import Recipe


def check_inputs(recipe: Recipe) -> None:
    """Whether prompt files exist and can be read, and the modules of the user's own rewards can be found.

    Raises:
        UsageError: for the first that is missing or malformed.
    """
    from fmg.data.configs import FilePromptsConfig
    from fmg.data.prompt_sets import load_prompts
    from fmg.rewards.configs import PythonRewardConfig
    from fmg.rewards.python_module import check_module

    for prompts in (recipe.prompts, recipe.eval.prompts):
        if isinstance(prompts.config, FilePromptsConfig):
            load_prompts(prompts)
    for reward in recipe.measured_rewards:
        if isinstance(reward.config, PythonRewardConfig):
            check_module(reward.config.target)
