"""Exact flow maps of known distributions: ground truth for tests and documentation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.types import Conditioning
from fmg.flow.path import AffinePath, expand


@dataclass(frozen=True, eq=False)
class GaussianMap:
    """The exact two-time map for data `N(mean, covariance)` (docs/math.md, eq. 5).

    `p_t = N(alpha_t mean, M_t)` with `M_t = alpha_t^2 C + sigma_t^2 I`; all `M_t` share the eigenvectors of `C`, so
    `X_{t->s}(x) = alpha_s mean + M_s^{1/2} M_t^{-1/2} (x - alpha_t mean)` in closed form.

    Args:
        mean: `(d,)`.
        covariance: `(d, d)`, symmetric positive definite.
        path: the probability path.

    Raises:
        ValueError: when the covariance is not positive definite.
    """

    mean: Float[Tensor, " d"]
    covariance: Float[Tensor, "d d"]
    path: AffinePath

    def __post_init__(self) -> None:
        if not bool((torch.linalg.eigvalsh(self.covariance) > 0).all()):
            raise ValueError("the covariance has to be positive definite")

    anchors: ClassVar[Literal["any"]] = "any"

    def jump(
        self, x_t: Float[Tensor, "b d"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b d"]:
        """`X_{t->s}(x_t)`, exact in both directions of time."""
        centred, basis = self._centred(x_t, t)
        moved = centred * (self._variances(s) / self._variances(t)).sqrt()
        jumped: Tensor = expand(self.path.alpha(s), x_t) * self.mean + moved @ basis.T
        return jumped

    def velocity(self, x_t: Float[Tensor, "b d"], t: Float[Tensor, " b"], cond: Conditioning) -> Float[Tensor, "b d"]:
        """`v = alpha' mean + 1/2 M' M^{-1} (x - alpha mean)`."""
        alpha_rate, sigma_rate = self.path.rates(t)
        centred, basis = self._centred(x_t, t)
        eigenvalues = torch.linalg.eigvalsh(self.covariance)
        signal_rate, noise_rate = self.path.alpha(t) * alpha_rate, self.path.sigma(t) * sigma_rate
        half_rate = signal_rate[:, None] * eigenvalues + noise_rate[:, None]
        stretched = centred * half_rate / self._variances(t)
        velocity: Tensor = expand(alpha_rate, x_t) * self.mean + stretched @ basis.T
        return velocity

    def marginal(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b d d"]]:
        """Mean and covariance of `p_t`."""
        alpha, sigma = self.path.alpha(t), self.path.sigma(t)
        identity = torch.eye(self.mean.shape[0], dtype=self.mean.dtype)
        covariance = alpha.square()[:, None, None] * self.covariance + sigma.square()[:, None, None] * identity
        return alpha[:, None] * self.mean, covariance

    def _centred(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        basis = torch.linalg.eigh(self.covariance).eigenvectors
        rotated: Tensor = (x - expand(self.path.alpha(t), x) * self.mean) @ basis
        return rotated, basis

    def _variances(self, t: Tensor) -> Tensor:
        eigenvalues: Tensor = torch.linalg.eigvalsh(self.covariance)
        return self.path.alpha(t).square()[:, None] * eigenvalues + self.path.sigma(t).square()[:, None]


@dataclass(frozen=True, eq=False)
class MixtureMap:
    """The two-time map for data from a mixture of isotropic Gaussians, by integrating the exact velocity.

    Args:
        weights: `(k,)`, positive, summing to 1.
        means: `(k, d)`.
        stds: `(k,)`, positive.
        path: the probability path.
        substeps: Runge-Kutta (order 4) steps of one jump; 64 give an
            absolute error of about 1e-4 from noise to data when the modes are 10 stds apart.
    """

    weights: Float[Tensor, " k"]
    means: Float[Tensor, "k d"]
    stds: Float[Tensor, " k"]
    path: AffinePath
    substeps: int = 64

    anchors: ClassVar[Literal["any"]] = "any"

    def jump(
        self, x_t: Float[Tensor, "b d"], t: Float[Tensor, " b"], s: Float[Tensor, " b"], cond: Conditioning
    ) -> Float[Tensor, "b d"]:
        """`X_{t->s}(x_t)` up to the integration error."""
        x, dt = x_t, (s - t) / self.substeps
        h = expand(dt, x_t)
        for i in range(self.substeps):
            start, middle = t + i * dt, t + (i + 0.5) * dt
            end = s if i == self.substeps - 1 else t + (i + 1) * dt
            k1 = self.velocity(x, start, cond)
            k2 = self.velocity(x + h / 2 * k1, middle, cond)
            k3 = self.velocity(x + h / 2 * k2, middle, cond)
            k4 = self.velocity(x + h * k3, end, cond)
            x = x + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        return x

    def velocity(self, x_t: Float[Tensor, "b d"], t: Float[Tensor, " b"], cond: Conditioning) -> Float[Tensor, "b d"]:
        """`v = alpha' E[x_0 | x_t] + sigma' E[eps | x_t]` (eq. 4), both posterior means in closed form."""
        alpha, sigma = self.path.alpha(t)[:, None], self.path.sigma(t)[:, None]
        alpha_rate, sigma_rate = self.path.rates(t)
        variances = (alpha * self.stds).square() + sigma.square()
        offsets = x_t[:, None, :] - alpha[:, :, None] * self.means
        d = self.means.shape[1]
        log_weights = self.weights.log() - 0.5 * (offsets.square().sum(-1) / variances + d * variances.log())
        posterior = log_weights.softmax(dim=1)[:, :, None]
        whitened = offsets / variances[:, :, None]
        data = self.means + alpha[:, :, None] * self.stds.square()[:, None] * whitened
        noise = sigma[:, :, None] * whitened
        per_component = alpha_rate[:, None, None] * data + sigma_rate[:, None, None] * noise
        return (posterior * per_component).sum(dim=1)

    def draw(self, count: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """`count` exact samples of the data distribution."""
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], generator=generator, dtype=self.means.dtype)
        return self.means[component] + self.stds[component][:, None] * noise
