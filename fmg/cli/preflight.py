"""What can be refused before anything is loaded, besides the recipe itself. Imports no torch and runs no code."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmg.core.errors import MissingDependencyError

if TYPE_CHECKING:
    from fmg.registry.recipe import Recipe


def check_inputs(recipe: Recipe, *, planned: bool) -> list[str]:
    """Whether the files that a recipe names are there and can be read: model, weights of rewards, prompts, modules.

    Args:
        recipe: what is to be trained.
        planned: only to be planned, perhaps for another machine, so that published files may be fetched later.

    Returns:
        One line for each published file that has not been fetched and each missing package, when that is no error.

    Raises:
        UsageError: for the first that is missing or malformed.
        MissingDependencyError: published files that have not been fetched or a missing package, unless it is only
            planned.
        CheckpointError: local model files that are missing.
    """
    from fmg.core.hub import locate
    from fmg.data.prompt_sets import FilePromptsConfig, load_prompts
    from fmg.registry import models
    from fmg.registry.composition import check_backend
    from fmg.rewards.configs import PythonRewardConfig
    from fmg.rewards.python_module import check_module

    for prompts in (recipe.prompts, recipe.eval.prompts):
        if isinstance(prompts.config, FilePromptsConfig):
            load_prompts(prompts)
    lacking: list[MissingDependencyError] = []
    for reward in recipe.measured_rewards:
        if isinstance(reward.config, PythonRewardConfig):
            check_module(reward.config.target)
        for asset in reward.config.assets():
            try:
                locate(asset, "reward", reward.name)
            except MissingDependencyError as error:
                lacking.append(error)
    try:
        models.build_config(recipe.model.name, recipe.model.config).check()
    except MissingDependencyError as error:
        lacking.append(error)
    try:
        check_backend(recipe, "auto")
    except MissingDependencyError as error:
        lacking.append(error)
    if lacking and not planned:
        raise lacking[0]
    return [str(error) for error in lacking]
