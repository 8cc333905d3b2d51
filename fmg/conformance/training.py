"""Rules of objectives and optimizers, on a network of twelve parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from fmg.conformance.component_under_test import ComponentUnderTest
from fmg.conformance.rules import NotApplicable, Rule, Violation, require
from fmg.conformance.toys import GROUPS, RolloutKind, policies, scored_rollout, toy_images, toy_scores
from fmg.core.protocols import GradientObjective, Objective, OptimizerFactory
from fmg.core.types import Batch
from fmg.registry import stochasticizers
from fmg.registry.config import ObjectiveConfig

_SEED = 3


@dataclass(frozen=True)
class ObjectiveCase:
    """An objective, bound to the stochasticizer that samples the rollouts of the kit.

    Attributes:
        component: the component.
        branched: whether its rollouts are.
    """

    component: ComponentUnderTest
    branched: bool = False

    @property
    def config(self) -> ObjectiveConfig:
        config = self.component.config
        assert isinstance(config, ObjectiveConfig)
        return config

    @cached_property
    def objective(self) -> Objective:
        built: Objective = self.component.build()
        if isinstance(built, GradientObjective):
            built = built.with_images(toy_images, toy_scores)
        return built.bind(stochasticizers.build("asfmc", {"ratio": 0.5}))

    def prepared(self, *, equal_rewards: bool = False) -> Batch:
        """A batch of a rollout by the policy that is trained."""
        _, views = policies()
        kind: RolloutKind = "states" if self.objective.needs == "gradients" else "chain"
        if self.branched:
            kind = "branch"
        scored = scored_rollout(views.current, kind, equal_rewards=equal_rewards)
        return self.objective.prepare(scored, views, _SEED)


def _needs(case: ObjectiveCase) -> None:
    config, objective = case.config, case.objective
    require(objective.needs == config.needs, "The objective and its config disagree about `needs`.")
    takes = config.needs != "gradients" or isinstance(objective, GradientObjective)
    require(takes, "An objective that needs gradients has to have the methods `with_images` and `starts`.")
    width = case.objective.clip_range
    require(width is None or width > 0, "clip_range has to be positive, or None for an objective without a ratio.")


def _loss(case: ObjectiveCase) -> None:
    network, views = policies()
    batch = case.prepared()
    require(len(batch) > 0, "prepare() gives no rows for a rollout whose rewards differ within every group.")
    loss = case.objective.loss(views, batch)
    require(loss.total.shape == () and bool(loss.total.isfinite()), "The loss is not one finite number.")
    attached = [name for name, value in loss.parts.items() if value.requires_grad]
    require(not attached, f"Parts of the loss carry gradients: {', '.join(attached)}. Detach what is only logged.")
    gradients = torch.autograd.grad(loss.total, list(network.parameters()), allow_unused=True)
    moved = [g for g in gradients if g is not None and bool(g.isfinite().all()) and float(g.abs().sum()) > 0]
    require(bool(moved), "No gradient reaches the trained policy, or it is not finite.")


def _micro_batches(case: ObjectiveCase) -> None:
    _, views = policies()
    batch = case.prepared()
    whole = case.objective.loss(views, batch).total.detach()
    # several of unequal length
    size = min(7, max(1, len(batch) - 1))
    parts = [(len(part), case.objective.loss(views, part).total.detach()) for part in batch.split(size)]
    mean = torch.stack([size * value for size, value in parts]).sum() / len(batch)
    same = torch.allclose(whole, mean, rtol=1e-4, atol=1e-5)
    require(same, "The loss of a batch is not the mean over its rows, so it depends on the micro-batch.")


def _keyed(case: ObjectiveCase) -> None:
    one, two = case.prepared(), case.prepared()
    same = one.rows.keys() == two.rows.keys() and all(torch.equal(one.rows[k], two.rows[k]) for k in one.rows)
    require(same, "prepare() gives different rows for the same seed: key all noise by `seed`.")


def _nothing_to_learn(case: ObjectiveCase) -> None:
    if case.objective.needs != "transitions":
        raise NotApplicable("An objective on samples may imitate all of them equally.")
    network, views = policies()
    batch = case.prepared(equal_rewards=True)
    if not len(batch):
        return
    total = case.objective.loss(views, batch).total
    gradients = torch.autograd.grad(total, list(network.parameters()), allow_unused=True)
    still = all(g is None or not g.abs().sum() for g in gradients)
    require(still, "Groups whose rewards are all equal still give a gradient.")


def _star_rows(case: ObjectiveCase) -> None:
    require(case.objective.needs == "transitions", "The objective declares `branches`, but needs only samples.")
    rows = len(case.prepared())
    require(
        rows == GROUPS,
        f"prepare() makes {rows} rows of {GROUPS} branched groups, but the siblings of a group share one.",
    )


def _branched(check: Callable[[ObjectiveCase], None]) -> Callable[[ObjectiveCase], None]:
    """The check on a branched rollout, for an objective that takes them."""

    def on_branches(case: ObjectiveCase) -> None:
        if not case.config.branches:
            raise NotApplicable(
                "The objective does not declare `branches`, so recipes with rollout.kind: branch refuse it."
            )
        check(replace(case, branched=True))

    return on_branches


OBJECTIVE_RULES: tuple[Rule[ObjectiveCase], ...] = (
    Rule("needs as declared", _needs),
    Rule("a finite loss with a gradient", _loss),
    Rule("micro-batches add up", _micro_batches),
    Rule("noise is keyed", _keyed),
    Rule("equal rewards teach nothing", _nothing_to_learn),
    Rule("branched: one row per group", _branched(_star_rows)),
    Rule("branched: a finite loss with a gradient", _branched(_loss)),
    Rule("branched: micro-batches add up", _branched(_micro_batches)),
    Rule("branched: noise is keyed", _branched(_keyed)),
    Rule("branched: equal rewards teach nothing", _branched(_nothing_to_learn)),
)


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer factory."""

    component: ComponentUnderTest

    @cached_property
    def factory(self) -> OptimizerFactory:
        built: OptimizerFactory = self.component.build()
        return built

    def trained(self, steps: int) -> tuple[torch.optim.Optimizer, torch.nn.Linear, list[float]]:
        """An optimizer, what it trained, and the losses on a regression."""
        torch.manual_seed(0)
        module = torch.nn.Linear(8, 4)
        optimizer = self.factory(list(module.named_parameters()))
        return optimizer, module, [_regression_step(optimizer, module) for _ in range(steps)]


def _regression_step(optimizer: torch.optim.Optimizer, module: torch.nn.Linear) -> float:
    x = torch.linspace(-1, 1, 16 * 8).reshape(16, 8).cos()
    optimizer.zero_grad()
    loss: Tensor = (module(x) - x[:, :4]).square().mean()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return float(loss.detach())


def _descends(case: OptimizerCase) -> None:
    optimizer, module, losses = case.trained(20)
    require(isinstance(optimizer, torch.optim.Optimizer), "The factory does not build a torch.optim.Optimizer.")
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    missing = [name for name, p in module.named_parameters() if id(p) not in held]
    require(not missing, f"The optimizer omits parameters: {', '.join(missing)}.")
    require(
        losses[-1] < losses[0],
        f"The optimizer does not descend: a regression went from {losses[0]:.4g} to {losses[-1]:.4g}.",
    )


def _rate(case: OptimizerCase) -> None:
    require("lr" in type(case.component.config).model_fields, "There is no option `lr`, which `fmg train --lr` sets.")


def _resumes(case: OptimizerCase) -> None:
    optimizer, module, _ = case.trained(3)
    twin = copy.deepcopy(module)
    other = case.factory(list(twin.named_parameters()))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        _regression_step(optimizer, module)
        _regression_step(other, twin)
    same = all(torch.equal(a, b) for a, b in zip(module.parameters(), twin.parameters(), strict=True))
    if not same:
        raise Violation("After load_state_dict the optimizer continues differently, so a resumed run would differ.")


OPTIMIZER_RULES: tuple[Rule[OptimizerCase], ...] = (
    Rule("descends on all parameters", _descends),
    Rule("has a learning rate", _rate),
    Rule("resumes", _resumes),
)
