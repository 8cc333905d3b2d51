"""Recipes: descriptions of runs with the source of each value. Importing this package does not import torch."""

from __future__ import annotations

from fmg.recipe.document import leaves
from fmg.recipe.recipe import (
    DEFAULT_MODEL,
    Recipe,
    ResolvedRecipe,
    Row,
    config_path,
    configs_folder,
    override,
    recipe_names,
    recipe_of,
    recipe_summary,
    resolve,
    resolve_arguments,
    resolve_run,
)

__all__ = [
    "DEFAULT_MODEL",
    "Recipe",
    "ResolvedRecipe",
    "Row",
    "config_path",
    "configs_folder",
    "leaves",
    "override",
    "recipe_names",
    "recipe_of",
    "recipe_summary",
    "resolve",
    "resolve_arguments",
    "resolve_run",
]
