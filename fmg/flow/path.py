"""Affine Gaussian probability paths and their forward kernels (docs/math.md, eq. 1-4).

Time runs from noise (t = 1) to data (t = 0). Times are `(b,)` float tensors in [0, 1]; coefficients come back as
`(b,)` in the same precision, but never below fp32. Only `expand` broadcasts a time to the rank of the data.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from fmg.core.errors import UsageError, suggestion
from fmg.core.protocols import ProbabilityPath

_HALF_PI = math.pi / 2


def expand(value: Float[Tensor, " b"], like: Shaped[Tensor, "b *shape"]) -> Float[Tensor, "b *ones"]:
    """A per-row value `(b,)` viewed as `(b, 1, ..., 1)` with the rank of `like`.

    Raises:
        ValueError: unless `value` is `(b,)` with the same `b` as `like`; broadcasting would otherwise silently pair
            rows with columns whenever `b` equals the width.
    """
    if value.ndim != 1 or like.ndim < 1 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"expected one value for each of the rows of data shaped {tuple(like.shape)}, got {tuple(value.shape)}"
        )
    return value.reshape(value.shape[0], *[1] * (like.ndim - 1))


class AffinePath(ABC):
    """`x_t = alpha_t x_0 + sigma_t eps` with `eps ~ N(0, I)` (eq. 1; Lipman et al. 2022, arXiv 2210.02747).

    Subclasses give the coefficients; the forward kernel follows from them.
    """

    name: ClassVar[str]

    @abstractmethod
    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Signal coefficient, falling from exactly 1 at t = 0 to exactly 0 at t = 1."""

    @abstractmethod
    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Noise coefficient, rising from exactly 0 at t = 0 to exactly 1 at t = 1."""

    @abstractmethod
    def rates(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Time derivatives of `alpha` and `sigma` (eq. 4)."""

    @abstractmethod
    def anchor(self, noise_share: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """The time `a <= s` whose noise share relative to `s` is the given one in [0, 1] (inverse of eq. 3)."""

    @abstractmethod
    def _variance(self, a: Tensor, s: Tensor, alpha_a: Tensor) -> Tensor:
        """`sigma_s^2 - (alpha_s / alpha_a)^2 sigma_a^2`, factored so that `a` close to `s` does not cancel."""

    def kernel(self, a: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """Scale and std of the forward kernel `q(x_s | x_a) = N(scale x_a, std^2 I)` (eq. 2).

        Args:
            a: start time, nearer to the data.
            s: end time, `0 <= a <= s <= 1`.

        Returns:
            `(alpha_s / alpha_a, std)`, each `(b,)`. At `a = s` exactly `(1, 0)`, at `a = s = 1` included.

        Raises:
            ValueError: times that are not `(b,)` floats in [0, 1], or `a > s`.
        """
        a, s = _ordered(a, s)
        same = a == s
        alpha_a = torch.where(same, 1.0, self.alpha(a))
        scale = torch.where(same, 1.0, self.alpha(s) / alpha_a)
        variance = torch.where(same, 0.0, self._variance(a, s, alpha_a))
        return scale, variance.sqrt()

    def noise_share(self, a: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`m = (sigma_a / alpha_a) / (sigma_s / alpha_s)`: the part of the noise at `s` already there at `a` (eq. 3).

        In [0, 1] for `a <= s`: 0 at `a = 0` or `s = 1`, exactly 1 at `a = s`. The kernel's std is
        `sigma_s sqrt(1 - m^2)`.
        """
        a, s = _ordered(a, s)
        same = a == s
        denominator = torch.where(same, 1.0, self.alpha(a) * self.sigma(s))
        return torch.where(same, 1.0, self.sigma(a) * self.alpha(s) / denominator)


@dataclass(frozen=True)
class LinearPath(AffinePath):
    """Rectified flow: `alpha = 1 - t`, `sigma = t` (Liu et al. 2022, arXiv 2209.03003)."""

    name: ClassVar[str] = "linear"

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return 1 - check_times(t)

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return check_times(t)

    def rates(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        one = torch.ones_like(check_times(t))
        return -one, one

    def anchor(self, noise_share: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`a = m s / (1 - s + m s)`; for `m = 0` it is 0, at `s = 1` too."""
        m, s = check_times(noise_share, "noise_share"), check_times(s)
        noise = m * s
        return torch.minimum(noise / torch.where(noise == 0, 1.0, 1 - s + noise), s)

    def _variance(self, a: Tensor, s: Tensor, alpha_a: Tensor) -> Tensor:
        return (s - a) * (s * (1 - a) + a * (1 - s)) / alpha_a.square()


@dataclass(frozen=True)
class TrigPath(AffinePath):
    """TrigFlow: `alpha = cos(t pi/2)`, `sigma = sin(t pi/2)` (Lu and Song 2024, arXiv 2410.11081)."""

    name: ClassVar[str] = "trig"

    def alpha(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`cos(t pi/2)`, written as a sine of `1 - t` so that it is exactly 0 at t = 1."""
        return torch.sin((1 - check_times(t)) * _HALF_PI)

    def sigma(self, t: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        return torch.sin(check_times(t) * _HALF_PI)

    def rates(self, t: Float[Tensor, " b"]) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
        """`(-pi/2 sigma, pi/2 alpha)`."""
        return -_HALF_PI * self.sigma(t), _HALF_PI * self.alpha(t)

    def anchor(self, noise_share: Float[Tensor, " b"], s: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """`tan(a pi/2) = m tan(s pi/2)`."""
        m, s = check_times(noise_share, "noise_share"), check_times(s)
        # at a share of nearly 1 the rounding of atan2 could pass s, and the kernel is not defined for a > s
        return torch.minimum(torch.atan2(m * self.sigma(s), self.alpha(s)) / _HALF_PI, s)

    def _variance(self, a: Tensor, s: Tensor, alpha_a: Tensor) -> Tensor:
        # sin(x) = sin(pi - x) keeps the second factor accurate, and never negative, when both times are near 1
        total = torch.where(a + s > 1, (1 - a) + (1 - s), a + s)
        return torch.sin((s - a) * _HALF_PI) * torch.sin(total * _HALF_PI) / alpha_a.square()


def path_by_name(name: str) -> AffinePath:
    """The path called `linear` or `trig`.

    Raises:
        UsageError: for any other name.
    """
    paths: dict[str, AffinePath] = {path.name: path for path in (LinearPath(), TrigPath())}
    if name not in paths:
        raise UsageError(f"There is no probability path named '{name}'", suggestion(name, paths))
    return paths[name]


def check_times(t: Float[Tensor, " b"], name: str = "t") -> Float[Tensor, " b"]:
    """`t` in fp32 or better, after checking that it is a `(b,)` float tensor in [0, 1].

    Values are not checked while a graph is traced.

    Raises:
        ValueError: for anything else, with the offending shape, dtype or range.
    """
    if not isinstance(t, Tensor) or t.ndim != 1 or not t.is_floating_point():
        got = f"{t.dtype} shaped {tuple(t.shape)}" if isinstance(t, Tensor) else repr(t)
        raise ValueError(f"times are float tensors shaped (b,); '{name}' is {got}")
    if not torch.compiler.is_compiling() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"times lie in [0, 1]; '{name}' has values from {t.min().item()} to {t.max().item()}")
    return t if t.dtype == torch.float64 else t.float()


def _ordered(a: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    a, s = check_times(a, "a"), check_times(s, "s")
    if a.shape != s.shape:
        raise ValueError(f"both times must have the same shape, got {tuple(a.shape)} and {tuple(s.shape)}")
    if not torch.compiler.is_compiling() and bool((a > s).any()):
        raise ValueError("the forward kernel goes from data to noise: it needs a <= s in every row")
    return a, s


def renoised(
    path: ProbabilityPath, x_0: Float[Tensor, "b *shape"], s: Float[Tensor, " b"], eps: Float[Tensor, "b *shape"]
) -> Float[Tensor, "b *shape"]:
    """A sample of `q(x_s | x_0)`: data noised up to the times `s` with standard normal `eps`."""
    scale, std = path.kernel(torch.zeros_like(s), s)
    return expand(scale, x_0) * x_0 + expand(std, x_0) * eps
