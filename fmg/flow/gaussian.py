"""Isotropic Gaussians over latents, in fp32, with dimension-averaged densities (docs/math.md, eq. 9-10)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.flow.path import expand

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Gaussian:
    """`N(mean, std^2 I)`, one row per sample.

    Log-densities and divergences are averaged, not summed, over all but the batch dimension, as in Flow-GRPO
    (arXiv 2505.05470) and all code that followed it: the clip ranges of the objective assume it.

    Args:
        mean: `(b, *shape)`; converted to fp32. Gradients pass through the conversion.
        std: `(b,)`, positive; converted to fp32.

    Raises:
        ValueError: when a std is not positive and finite, or the shapes do not match. A deterministic step has no
            density and is never a Gaussian.
    """

    mean: Float[Tensor, "b *shape"]
    std: Float[Tensor, " b"]

    def __post_init__(self) -> None:
        if self.std.ndim != 1 or self.mean.ndim < 1 or self.std.shape[0] != self.mean.shape[0]:
            raise ValueError(
                f"a Gaussian needs one std per row, got mean {tuple(self.mean.shape)} and std {tuple(self.std.shape)}"
            )
        object.__setattr__(self, "mean", self.mean.float())
        object.__setattr__(self, "std", self.std.float())
        if not torch.compiler.is_compiling() and not bool(((self.std > 0) & self.std.isfinite()).all()):
            raise ValueError(
                f"a Gaussian needs positive finite stds, got {self.std.min().item()} to {self.std.max().item()}; "
                "a deterministic step has no density"
            )

    def sample(self, generator: torch.Generator) -> Float[Tensor, "b *shape"]:
        """A sample; its noise is generated on the generator's device, then moved to the mean's."""
        noise = torch.randn(self.mean.shape, generator=generator, device=generator.device)
        return self.push(noise.to(self.mean.device))

    def push(self, noise: Float[Tensor, "b *shape"]) -> Float[Tensor, "b *shape"]:
        """`mean + std * noise`, fp32."""
        return self.mean + expand(self.std, self.mean) * noise.float()

    def log_prob(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
        """Log-density of `x` averaged over coordinates (eq. 9), fp32."""
        return -0.5 * _row_mean(self._standardised(x).square()) - self.std.log() - _HALF_LOG_2PI

    def kl(self, other: Gaussian) -> Float[Tensor, " b"]:
        """`KL(self || other)` averaged over coordinates (eq. 10), fp32, never negative.

        With equal stds it is `mean ||mean - other.mean||^2 / (2 std^2)`.
        """
        ratio = (self.std / other.std).square()
        return 0.5 * (_row_mean(other._standardised(self.mean).square()) + ratio - 1 - ratio.log())

    def _standardised(self, x: Tensor) -> Tensor:
        if x.shape != self.mean.shape:
            raise ValueError(f"expected a value shaped {tuple(self.mean.shape)}, got {tuple(x.shape)}")
        return (x.float() - self.mean) / expand(self.std, self.mean)


@dataclass(frozen=True, eq=False)
class UnscaledGaussian(Gaussian):
    """A Gaussian whose log-density leaves out the variance and every constant: `-mean (x - mean)^2`.

    The published code of Flow-CPS (arXiv 2509.05952) trains on it. Samples and divergences are those of the Gaussian.
    """

    def log_prob(self, x: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
        """`-mean (x - mean)^2`, fp32: not a density, but its differences weight all steps equally."""
        return -_row_mean((self._standardised(x) * expand(self.std, self.mean)).square())


def _row_mean(x: Tensor) -> Tensor:
    return x.reshape(x.shape[0], math.prod(x.shape[1:])).mean(dim=1)
