"""Checks that the components of a recipe fit together, by their declarations, before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.util import find_spec

from fmg.core.display import counted
from fmg.core.errors import CompositionError, MissingDependencyError, UsageError
from fmg.core.runtime import require
from fmg.core.specs import MapSpec, Requirements
from fmg.flow.grids import make_grid, needs_tokens
from fmg.recipe.sections import RecipeFields, RewardRef
from fmg.registry.catalog import registry_for
from fmg.registry.validation import Location, Problem
from fmg.version import install_line

_GRAPH_PACKAGES = ("onnx", "onnx_ir", "onnxscript", "onnxruntime")


def check_target_times(name: str, requires: Requirements, grid: Sequence[float]) -> None:
    """Refuses a grid with a stochastic transition to a time at which the stochasticizer `name` is not defined.

    `grid` decreases from 1 to 0; every time between its ends is the target of a stochastic transition. For grids that
    depend on the image size this is called when the model is composed, for all others with the recipe.

    Raises:
        CompositionError: naming the time and the bound.
    """
    for problem in _target_times(name, requires, grid):
        raise CompositionError(problem.what, problem.fix)


def check_backend(recipe: RecipeFields, device_type: str) -> None:
    """Refuses a backend of completions that does not run on a type of device, or whose packages are not installed.

    Raises:
        CompositionError: naming the backend.
        MissingDependencyError: naming the package.
    """
    for problem in _backend_problems(recipe, device_type):
        raise CompositionError(problem.what, problem.fix)
    if recipe.rollout.branch.backend == "onnxruntime":
        require("rollout.branch.backend=onnxruntime", *_GRAPH_PACKAGES, extra="onnx")


def check_trackers(recipe: RecipeFields) -> None:
    """Refuses a tracker whose package is not installed.

    Raises:
        MissingDependencyError: naming the package and the command that installs it.
    """
    for tracker in recipe.trackers:
        package, extra = tracker.config.package, tracker.config.extra
        found = find_spec(package) if package else None
        # a folder of that name (`wandb` makes one) would be found as a namespace
        if package and (found is None or found.origin is None):
            raise MissingDependencyError(
                f"The tracker '{tracker.name}' needs the package '{package}'",
                f"Run: {install_line(extra) if extra else f'pip install {package}'}",
            )


def problems(recipe: RecipeFields) -> Iterator[Problem]:
    """All misfits, the most basic first."""
    spec = recipe.model.config.spec()
    yield from _map_problems(recipe, spec)
    yield from _objective_problems(recipe, spec)
    yield from _sampler_problems(recipe)
    yield from _window_problems(recipe, spec)
    yield from _branch_problems(recipe)
    yield from _backend_problems(recipe, recipe.train.device.partition(":")[0])
    yield from _trainable_problems(recipe, spec)
    yield from _schedule_problems(recipe)
    yield from _reward_problems(("rewards",), recipe.rewards)
    yield from _gradient_problems(recipe)
    yield from _reward_problems(("eval", "rewards"), recipe.eval.rewards)
    yield from _tracker_problems(recipe)
    if all(reward.weight == 0 for reward in recipe.rewards):
        fix = "Give at least one reward a weight; rewards that are only measured belong in eval.rewards"
        yield Problem(("rewards",), "Every reward has weight 0, so there is nothing to maximise", fix)


def _map_problems(recipe: RecipeFields, spec: MapSpec) -> Iterator[Problem]:
    model, chosen = recipe.model.name, recipe.stochasticizer
    requires = chosen.config.requires()
    default = spec.default_stochasticizer[0]
    fix = f"Use the model's own stochasticizer, '{default}' (--stochasticizer auto), or another model"
    if requires.anchors == "any" and spec.anchors != "any":
        what = f"The stochasticizer '{chosen.name}' needs a two-time map, but '{model}' is {spec.map_name}"
        yield Problem(("stochasticizer", "name"), what, fix)
    if requires.path not in ("any", spec.path):
        what = f"The stochasticizer '{chosen.name}' needs the {requires.path} path, but '{model}' is on {spec.path}"
        yield Problem(("stochasticizer", "name"), what, fix)


def _objective_problems(recipe: RecipeFields, spec: MapSpec) -> Iterator[Problem]:
    objective, updates = recipe.objective, recipe.train.updates_per_iteration
    if (misfit := objective.config.misfit(spec)) is not None:
        yield Problem(("objective", "name"), f"The objective '{objective.name}' {misfit[0]}", misfit[1])
    if objective.config.on_policy and updates > 1:
        what = f"The objective '{objective.name}' is on-policy, but {updates} updates would share a rollout"
        yield Problem(("train", "updates_per_iteration"), what, "Set train.updates_per_iteration to 1, or use grpo")


def _sampler_problems(recipe: RecipeFields) -> Iterator[Problem]:
    rollout, objective = recipe.rollout, recipe.objective
    if objective.config.needs == "transitions" and rollout.steps < 2:
        what = f"The objective '{objective.name}' needs a stochastic transition, but a rollout of one step has none"
        yield Problem(("rollout", "steps"), what, "Set rollout.steps to 2 or more, or use an objective on samples")
    if objective.config.needs == "transitions" and recipe.lora.dropout > 0:
        what = (
            f"lora.dropout is {recipe.lora.dropout:g}, but the objective '{objective.name}' compares the densities of "
            "two passes through the network, and dropout alone would make them differ"
        )
        yield Problem(("lora", "dropout"), what, "Set lora.dropout to 0, or use an objective on samples")
    try:
        if (grid := _times(rollout.grid, rollout.steps)) is not None:
            yield from _target_times(recipe.stochasticizer.name, recipe.stochasticizer.config.requires(), grid)
    except UsageError as error:
        yield Problem(("rollout", "grid"), error.what, error.fix)
        return
    if recipe.eval.steps is not None:
        try:
            _times(rollout.grid, recipe.eval.steps)
        except UsageError as error:
            what = f"The evaluation cannot use the rollout's grid: {error.what}"
            yield Problem(("eval", "steps"), what, "Set eval.steps to null, which takes rollout.steps")


def _times(spec: str | Sequence[float], steps: int) -> tuple[float, ...] | None:
    """The times of a grid; None when they depend on the image size of the model."""
    return None if needs_tokens(spec) else make_grid(spec, steps)


def _window_problems(recipe: RecipeFields, spec: MapSpec) -> Iterator[Problem]:
    window, objective, stochastic = recipe.rollout.window, recipe.objective, recipe.rollout.steps - 1
    if window is None:
        return
    location = ("rollout", "window")
    everything = "Set rollout.window to null, which takes every step"
    if objective.config.needs != "transitions":
        what = f"The objective '{objective.name}' trains no transitions, so a window of stochastic steps has no effect"
        yield Problem(location, what, everything)
    elif window.start + window.size > stochastic:
        what = (
            f"A window of {window.size} from step {window.start} does not fit a rollout of {stochastic + 1} steps, "
            f"whose stochastic ones are 0 to {stochastic - 1}"
        )
        yield Problem(location, what, "Use a smaller window, an earlier start or more rollout.steps")
    elif spec.anchors == "endpoint" and window.size < stochastic:
        what = (
            f"A window of {window.size} of {stochastic} stochastic steps needs a two-time map for the other steps, "
            f"but '{recipe.model.name}' is {spec.map_name}"
        )
        yield Problem(location, what, everything)


def _branch_problems(recipe: RecipeFields) -> Iterator[Problem]:
    rollout, objective = recipe.rollout, recipe.objective
    if rollout.kind == "chain":
        return
    if not objective.config.branches:
        what = f"The objective '{objective.name}' does not support branched rollouts"
        fix = "Set rollout.kind to chain, or use an objective that does, such as grpo"
        yield Problem(("rollout", "kind"), what, fix)
    if rollout.window is not None:
        what = "rollout.window belongs to chains; rollout.branch.steps chooses the one stochastic step of a group"
        yield Problem(("rollout", "window"), what, "Set rollout.window to null, or rollout.kind to chain")
    if rollout.branch.antithetic and rollout.group_size % 2:
        what = f"Antithetic siblings come in pairs, but a group has {rollout.group_size}"
        fix = "Use an even rollout.group_size, or set rollout.branch.antithetic to false"
        yield Problem(("rollout", "group_size"), what, fix)


def _backend_problems(recipe: RecipeFields, device_type: str) -> Iterator[Problem]:
    """Misfits of the backend of completions on a type of device; `auto` is not known yet."""
    rollout, backend = recipe.rollout, recipe.rollout.branch.backend
    if backend == "torch":
        return
    location, torch = ("rollout", "branch", "backend"), "set rollout.branch.backend to torch"
    if rollout.kind == "chain":
        what = f"rollout.branch.backend={backend} runs the completions of branched rollouts, but a chain has none"
        yield Problem(location, what, f"Set rollout.kind to branch, or {torch}")
    if backend == "onnxruntime" and not recipe.model.config.exportable:
        what = f"The network of '{recipe.model.name}' cannot be traced as a graph"
        yield Problem(location, what, f"Use torch-compile, or {torch}")
    if backend == "onnxruntime" and recipe.train.dtype == "bf16" and device_type == "cpu":
        what = "ONNX Runtime cannot compute in bf16 on a CPU"
        yield Problem(location, what, f"Set train.dtype to fp32, use a GPU, or {torch}")


def _trainable_problems(recipe: RecipeFields, spec: MapSpec) -> Iterator[Problem]:
    if recipe.train.trainable == "lora+duration" and spec.map_name != "two-time":
        what = f"'{recipe.model.name}' is a {spec.map_name} map, which has no second-time embedder to train"
        yield Problem(("train", "trainable"), what, "Set train.trainable to lora or full, or use a two-time map")


def _schedule_problems(recipe: RecipeFields) -> Iterator[Problem]:
    train = recipe.train
    if train.lr_warmup_steps > train.updates:
        what = (
            f"The learning rate warms up for {counted(train.lr_warmup_steps, 'update')}, but the run has only"
            f" {train.updates} ({train.iterations} x {train.updates_per_iteration})"
        )
        yield Problem(("train", "lr_warmup_steps"), what, "Lower train.lr_warmup_steps, or raise train.iterations")


def _gradient_problems(recipe: RecipeFields) -> Iterator[Problem]:
    """Misfits of objectives that differentiate rewards."""
    objective, steps = recipe.objective, recipe.rollout.steps
    known = {reward.label: reward for reward in recipe.rewards}
    if objective.config.needs == "gradients":
        for index, reward in enumerate(recipe.rewards):
            if reward.weight and not reward.config.has_gradient:
                what = (
                    f"The objective '{objective.name}' differentiates its rewards, but '{reward.label}' has no gradient"
                )
                fix = f"Give it weight 0, which only measures it, or use another reward: {_differentiable()}"
                yield Problem(("rewards", index), what, fix)
        if recipe.train.shuffle_advantages:
            what = f"The objective '{objective.name}' uses no advantages, so train.shuffle_advantages has no effect"
            yield Problem(("train", "shuffle_advantages"), what, "Set it to false, or use another objective")
        if (jumps := objective.config.trained_calls(1)) > steps:
            what = f"Gradients through {jumps} jumps do not fit a rollout of {counted(steps, 'step')}"
            yield Problem(("objective", "jumps"), what, f"Set objective.jumps to {steps} or less")
    last_step, location = objective.config.last_step, ("objective", "last_step")
    if last_step is None:
        return
    if objective.config.needs == "gradients":
        what = f"The objective '{objective.name}' differentiates its rewards already"
        yield Problem(location, what, "Set objective.last_step to null, or use another objective")
    elif recipe.train.shuffle_advantages:
        what = (
            "objective.last_step follows the rewards themselves, so a run with train.shuffle_advantages is no control"
        )
        yield Problem(("train", "shuffle_advantages"), what, "Set it to false, or objective.last_step to null")
    for name in last_step.rewards or ():
        if name not in known:
            what = f"objective.last_step names '{name}', which is not among the recipe's rewards"
            yield Problem(location, what, f"Use some of: {', '.join(known)}; one with weight 0 is allowed")
        elif not known[name].config.has_gradient:
            what = f"objective.last_step differentiates its rewards, but '{name}' has no gradient"
            yield Problem(location, what, f"Use a reward with a gradient: {_differentiable()}")
    if last_step.rewards is None and not any(r.weight and r.config.has_gradient for r in recipe.rewards):
        what = "objective.last_step differentiates rewards, but none that is maximised has a gradient"
        yield Problem(
            location, what, f"Name rewards in objective.last_step.rewards, or use some of: {_differentiable()}"
        )


def _differentiable() -> str:
    rewards = registry_for("reward")
    return ", ".join(name for name in rewards.names() if rewards.config_class(name).differentiable)


def _tracker_problems(recipe: RecipeFields) -> Iterator[Problem]:
    names = [tracker.name for tracker in recipe.trackers]
    for index, name in enumerate(names):
        if name in names[:index]:
            yield Problem(("trackers", index), f"The tracker '{name}' is given twice", "Give it once")


def _target_times(name: str, requires: Requirements, grid: Sequence[float]) -> Iterator[Problem]:
    targets = [s for s in grid[1:-1] if s <= requires.min_target_time]
    if targets:
        what = (
            f"The stochasticizer '{name}' is defined for target times above {requires.min_target_time:g}, "
            f"but the grid has one at {max(targets):g}"
        )
        yield Problem(("rollout", "grid"), what, "Use fewer steps or another grid, or lower the stochasticizer's bound")


def _reward_problems(location: Location, rewards: Sequence[RewardRef]) -> Iterator[Problem]:
    counts = Counter(reward.label for reward in rewards)
    for index, reward in enumerate(rewards):
        if counts[reward.label] > 1:
            what = f"The reward '{reward.label}' is given {counts[reward.label]} times"
            yield Problem((*location, index), what, "Give it once, with the weight that it should have")
            return
