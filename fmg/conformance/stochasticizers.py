"""Rules of a stochasticizer, on maps whose marginals are known (docs/math.md)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fmg.conformance.component_under_test import ComponentUnderTest
from fmg.conformance.rules import NotApplicable, Rule, Violation, require
from fmg.conformance.toys import PATHS, gaussian_map, network_map, states, unconditional
from fmg.core.errors import CompositionError
from fmg.core.protocols import Density, FlowMap, Stochasticizer
from fmg.core.specs import Requirements
from fmg.registry.config import StochasticizerConfig

STEPS = ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.9, 0.35))
ROWS = 5
DRAWS = 20_000
# Bound on the largest of 80 deviations: by chance, 5 standard errors are exceeded once in about 20,000 checks.
ERRORS = 5.0


@dataclass(frozen=True)
class StochasticizerCase:
    """A stochasticizer and what it declares."""

    component: ComponentUnderTest

    @cached_property
    def stochasticizer(self) -> Stochasticizer:
        built: Stochasticizer = self.component.build()
        return built

    @cached_property
    def requires(self) -> Requirements:
        config = self.component.config
        assert isinstance(config, StochasticizerConfig)
        return config.requires()

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(PATHS) if self.requires.path == "any" else (self.requires.path,)

    @property
    def steps(self) -> Iterator[tuple[float, float]]:
        """Transitions to times that it is defined for."""
        return ((t, s) for t, s in STEPS if s > self.requires.min_target_time)

    def transition(self, flow_map: FlowMap, x: Tensor, t: float, s: float) -> Density:
        t_rows, s_rows = (torch.full((len(x),), value, dtype=torch.float64) for value in (t, s))
        return self.stochasticizer.transition(flow_map, x, t_rows, s_rows, unconditional(len(x)))


def _declares(case: StochasticizerCase) -> None:
    requires = case.requires
    require(requires.calls >= 1, "requires().calls must count the network evaluations (NFE) of one transition.")
    require(any(True for _ in case.steps), "requires().min_target_time leaves no transition of a usual grid.")
    require(isinstance(case.stochasticizer.path_preserving, bool), "path_preserving must be True or False.")


def _density(case: StochasticizerCase) -> None:
    x, noise = states(ROWS), states(ROWS, 1)
    for path in case.paths:
        _, flow_map = network_map(case.requires.anchors, path)
        for t, s in case.steps:
            density = case.transition(flow_map, x, t, s)
            here = f"at t = {t:g}, s = {s:g} on the {path} path"
            require(density.mean.shape == x.shape, f"The mean is shaped {tuple(density.mean.shape)} {here}.")
            require(density.std.shape == (ROWS,), f"The std is shaped {tuple(density.std.shape)}, not (b,), {here}.")
            fine = density.mean.dtype == density.std.dtype == torch.float32
            require(fine, f"Mean and std must be fp32 {here}.")
            require(bool((density.std > 0).all()), f"The std is not positive {here}.")
            pushed = density.mean + density.std[:, None, None] * noise
            same = torch.allclose(density.push(noise), pushed, atol=1e-5)
            require(same, f"push(noise) is not mean + std * noise {here}.")
            require(density.log_prob(pushed).shape == (ROWS,), f"log_prob gives no number for each row {here}.")


def _log_prob(case: StochasticizerCase) -> None:
    _, flow_map = network_map(case.requires.anchors, case.paths[0])
    (t, s), noise = next(case.steps), states(ROWS, 1)
    density = case.transition(flow_map, states(ROWS), t, s)
    found = density.log_prob(density.push(noise))
    expected = -0.5 * noise.square().flatten(1).mean(1) - density.std.log() - 0.5 * math.log(2 * math.pi)
    require(
        torch.allclose(found, expected, atol=1e-4),
        "log_prob is not the Gaussian log-density averaged over coordinates, which clip ranges assume.",
    )


def _parameters(case: StochasticizerCase) -> None:
    for path in case.paths:
        network, flow_map = network_map(case.requires.anchors, path)
        density = case.transition(flow_map, states(ROWS), *next(case.steps))
        require(not density.std.requires_grad, "The std depends on parameters; it must be a function of time alone.")
        require(density.mean.requires_grad, "No gradient reaches the network through the mean.")
        (gradient,) = torch.autograd.grad(density.mean.sum(), [network.scale])
        require(bool(gradient.abs().sum() > 0), "The mean's gradient with respect to the network is zero.")


def _replay(case: StochasticizerCase) -> None:
    _, flow_map = network_map(case.requires.anchors, case.paths[0])
    x = states(ROWS)
    for t, s in case.steps:
        with torch.no_grad():
            density = case.transition(flow_map, x, t, s)
            x_s = density.push(states(ROWS, 2))
            old = density.log_prob(x_s)
        again = case.transition(flow_map, x, t, s).log_prob(x_s).detach()
        off = float(torch.expm1(again - old).abs().max())
        require(
            off <= 1e-6,
            f"Replaying a transition gives a ratio off by {off:.2g}: it must sample no noise and keep no state.",
        )


def _rows(case: StochasticizerCase) -> None:
    _, flow_map = network_map(case.requires.anchors, case.paths[0])
    x, (t, s) = states(ROWS), next(case.steps)
    whole, part = case.transition(flow_map, x, t, s), case.transition(flow_map, x[1:3], t, s)
    same = torch.allclose(whole.mean[1:3], part.mean, atol=1e-5) and torch.allclose(whole.std[1:3], part.std)
    require(same, "The density of a row depends on the other rows of its batch.")


def _times(case: StochasticizerCase) -> None:
    """Groups of a branched rollout that branch at different steps share a call (docs/branching.md)."""
    steps = list(case.steps)
    if len(steps) < 2:
        raise NotApplicable("The stochasticizer is defined for one transition of a usual grid.")
    x = states(len(steps))
    t, s = torch.tensor(steps, dtype=torch.float64).unbind(1)
    for path in case.paths:
        _, flow_map = network_map(case.requires.anchors, path)
        mixed = case.stochasticizer.transition(flow_map, x, t, s, unconditional(len(steps)))
        for row, step in enumerate(steps):
            alone = case.transition(flow_map, x[row : row + 1], *step)
            same = torch.allclose(mixed.mean[row], alone.mean[0], atol=1e-5)
            require(
                same and torch.allclose(mixed.std[row], alone.std[0], atol=1e-6),
                f"A row from t = {step[0]:g} to s = {step[1]:g} on the {path} path has a different density beside rows"
                " of other times: t and s have one value per row.",
            )


def _calls(case: StochasticizerCase) -> None:
    network, flow_map = network_map(case.requires.anchors, case.paths[0])
    case.transition(flow_map, states(ROWS), *next(case.steps))
    declared = case.requires.calls
    require(
        network.calls == declared,
        f"A transition takes {network.calls} network evaluations; requires() says {declared}.",
    )


def _refuses(case: StochasticizerCase) -> None:
    wrong = []
    if case.requires.anchors == "any":
        wrong.append(("endpoint", case.paths[0], "a single-time map, although requires() asks for a two-time map"))
    others = [path for path in PATHS if path not in case.paths]
    wrong += [(case.requires.anchors, path, f"a map on the {path} path, which requires() rules out") for path in others]
    if not wrong:
        raise NotApplicable("The stochasticizer fits every map.")
    for anchors, path, what in wrong:
        _, flow_map = network_map("any" if anchors == "any" else "endpoint", path)
        try:
            case.transition(flow_map, states(ROWS), *next(case.steps))
        except CompositionError:
            continue
        raise Violation(f"The stochasticizer accepts {what}: raise a CompositionError.")


def _marginals(case: StochasticizerCase) -> None:
    if not case.stochasticizer.path_preserving:
        raise NotApplicable("path_preserving is not declared.")
    for path in case.paths:
        for t, s in case.steps:
            off = standard_errors_off(case, path, t, s)
            require(
                off <= ERRORS,
                f"path_preserving is declared, but from t = {t:g} to s = {s:g} on the {path} path the moments of x_s"
                f" are {off:.0f} standard errors off those of the path.",
            )


def standard_errors_off(case: StochasticizerCase, path: str, t: float, s: float) -> float:
    """How far mean and covariance of `x_s` are from those of `p_s`, for `x_t ~ p_t` under the exact map of a Gaussian.

    In standard errors of `DRAWS` draws, the largest over all entries (docs/math.md, eq. 5).
    """
    flow_map, generator = gaussian_map(path), torch.Generator().manual_seed(11)
    mean_t, covariance_t = (moment[0] for moment in flow_map.marginal(torch.tensor([t], dtype=torch.float64)))
    factor = torch.linalg.cholesky(covariance_t)
    x_t = mean_t + torch.randn(DRAWS, 2, generator=generator, dtype=torch.float64) @ factor.T
    x_s = case.transition(flow_map, x_t, t, s).push(torch.randn(DRAWS, 2, generator=generator)).double()
    mean, covariance = (moment[0] for moment in flow_map.marginal(torch.tensor([s], dtype=torch.float64)))
    variances = covariance.diagonal()
    mean_errors = (x_s.mean(0) - mean).abs() / (variances / DRAWS).sqrt()
    # Var of a sample covariance of Gaussians: (C_ii C_jj + C_ij^2) / n
    spread = ((variances[:, None] * variances + covariance.square()) / DRAWS).sqrt()
    covariance_errors = (x_s.T.cov() - covariance).abs() / spread
    return max(float(mean_errors.max()), float(covariance_errors.max()))


RULES: tuple[Rule[StochasticizerCase], ...] = (
    Rule("declares what it needs", _declares),
    Rule("a density for every row", _density),
    Rule("log-density averaged over coordinates", _log_prob),
    Rule("parameters in the mean alone", _parameters),
    Rule("replay gives ratio 1", _replay),
    Rule("rows are independent", _rows),
    Rule("rows of one call may have different times", _times),
    Rule("network evaluations as declared", _calls),
    Rule("refuses what it does not fit", _refuses),
    Rule("marginals as declared", _marginals),
)
