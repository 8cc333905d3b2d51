"""Distributions with known flow maps, and exact moments of a transition under them."""

from __future__ import annotations

import torch
from torch import Tensor

from fmg.core.protocols import Stochasticizer
from fmg.core.types import Conditioning
from fmg.flow import AffinePath, GaussianMap, LinearPath, MixtureMap, TrigPath

PATHS: tuple[AffinePath, ...] = (LinearPath(), TrigPath())

STEPS = ((1.0, 0.75), (0.75, 0.5), (0.5, 0.25), (0.9, 0.35), (0.2875, 0.05))
"""Stochastic transitions of the uniform 4-step grid, an uneven one, and the last of the paper's 5-step grid."""

EXACT_KERNELS: tuple[tuple[str, dict[str, object]], ...] = (
    ("asfmc", {}),
    ("asfmc", {"gap": 0.0147}),
    ("asfmc", {"gap": 0.3}),
    ("asfmc", {"ratio": 0.0}),
    ("asfmc", {"ratio": 0.5}),
    ("asfmc", {"noise_share": 0.3}),
    ("asfmc", {"noise_share": 0.95}),
    ("asfmc", {"hold": 0.5}),
    ("asfmc", {"hold": 1.0}),
    ("asfmc-endpoint", {}),
)


def times(value: float, rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.full((rows,), value, dtype=dtype)


def unconditional(rows: int) -> Conditioning:
    return Conditioning(("",) * rows, {})


def gaussian_map(path: AffinePath) -> GaussianMap:
    mean = torch.tensor([0.8, -1.5], dtype=torch.float64)
    covariance = torch.tensor([[0.6, 0.25], [0.25, 0.3]], dtype=torch.float64)
    return GaussianMap(mean, covariance, path)


def mixture_map(path: AffinePath, substeps: int = 64) -> MixtureMap:
    weights = torch.tensor([0.35, 0.4, 0.25], dtype=torch.float64)
    means = torch.tensor([[-1.6, -0.8], [1.4, -0.6], [0.1, 1.7]], dtype=torch.float64)
    stds = torch.tensor([0.25, 0.35, 0.3], dtype=torch.float64)
    return MixtureMap(weights, means, stds, path, substeps)


def affine_transition(stochasticizer: Stochasticizer, flow_map: GaussianMap, t: float, s: float) -> tuple[Tensor, ...]:
    """`(A, b, std)` with `x_s = A x_t + b + std xi`: every transition of a Gaussian's exact map has this form."""
    probes = torch.cat([torch.zeros(1, 2), torch.eye(2)]).double()
    density = stochasticizer.transition(flow_map, probes, times(t, 3), times(s, 3), unconditional(3))
    offset = density.mean[0].double()
    return (density.mean[1:].double() - offset).T, offset, density.std[0].double()


def moment_error(stochasticizer: Stochasticizer, flow_map: GaussianMap, t: float, s: float) -> float:
    """Largest entry by which mean and covariance of `x_s` differ from those of `p_s`, for `x_t ~ p_t`. No sampling."""
    matrix, offset, std = affine_transition(stochasticizer, flow_map, t, s)
    mean_t, covariance_t = (x[0] for x in flow_map.marginal(times(t, 1)))
    mean_s, covariance_s = (x[0] for x in flow_map.marginal(times(s, 1)))
    mean = matrix @ mean_t + offset
    covariance = matrix @ covariance_t @ matrix.T + std.square() * torch.eye(2)
    return max(float((mean - mean_s).abs().max()), float((covariance - covariance_s).abs().max()))
