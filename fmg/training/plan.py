"""What a run is going to cost, from its recipe alone: nothing is loaded and torch is not imported."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fmg.registry.recipe import Recipe
from fmg.registry.resolve import ResolvedRecipe


@dataclass(frozen=True)
class Plan:
    """Facts about a run, by name, in the order in which they are read."""

    facts: Mapping[str, str]


def plan(resolved: ResolvedRecipe) -> Plan:
    """Counts the work of a run.

    A network call is one image through the network once. A rollout of N steps takes N - 1 stochastic transitions, or as
    many as its window has, of one or more calls as the stochasticizer declares; its other steps are deterministic and
    take one. The updates together replay each transition once, with gradients. Evaluations, and a reference that an
    objective compares with, come on top.
    """
    recipe = resolved.recipe
    shape, loop, model = recipe.rollout, recipe.train, recipe.model.config.spec()
    images = shape.groups * shape.group_size
    evaluations = 1 + -(-loop.iterations // recipe.eval.every)
    facts = {
        "model": f"{recipe.model.name}, {'two' if model.anchors == 'any' else 'single'}-time map, {model.path} path, "
        f"{model.resolution} px",
        "stochasticizer": recipe.stochasticizer.name,
        "images an iteration": f"{images} ({shape.groups} prompts x {shape.group_size})",
        **_calls(recipe, images),
        "images in all": f"{images * loop.iterations} in {loop.iterations} iterations",
        "evaluations": f"{evaluations} x {recipe.eval.num} images",
        "device": f"{loop.device}, {loop.dtype}",
    }
    return Plan(facts)


def _calls(recipe: Recipe, images: int) -> dict[str, str]:
    steps = recipe.rollout.steps
    if recipe.objective.config.needs == "samples":
        return {"network calls an iteration": f"{images * steps} in the rollout"}
    window = recipe.rollout.window
    transitions = steps - 1 if window is None else window.size
    replayed = images * transitions * recipe.stochasticizer.config.requires().calls
    drawn = replayed + images * (steps - transitions)
    return {
        "transitions an image": str(transitions),
        "network calls an iteration": f"{drawn} in the rollout, {replayed} in the updates",
    }
