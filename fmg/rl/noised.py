"""Finished samples with new noise: the rows, targets and errors of the objectives that need no density.

A sample `x_0` becomes `x_t = alpha_t x_0 + sigma_t eps`, where a policy predicts the velocity `eps - x_0` if it maps to
any time, and `x_0` itself if it maps to 0. Objectives differ in how they use the errors. Nothing here depends on
the number of processes or on the micro-batch: noise is keyed by sample and draw, and every error belongs to one row.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from fmg.core.errors import CompositionError, reason
from fmg.core.protocols import FlowMap
from fmg.core.types import Batch, ScoredRollout
from fmg.flow.maps import mean_flow
from fmg.flow.path import expand
from fmg.rl.advantages import informative
from fmg.rl.configs import Noising
from fmg.rl.keyed_noise import OBJECTIVE, NoiseKey
from fmg.rl.rollouts import noise, uniform


def noised(scored: ScoredRollout, flow_map: FlowMap, how: Noising, seed: int, objective: str) -> Batch:
    """Noises the samples whose group has unequal rewards, `how.draws` times each; no rows if there is no such group.

    Rows, draw-major: `x_t`, `target`: (rows, *shape); `t`, `advantage`: (rows,), and `s` unless every `s` is `t`.

    Args:
        scored: the samples.
        flow_map: the map whose predictions are compared with `target`.
        how: number of rows and distribution of their times.
        seed: keys the noise, with the index of the sample and of the draw.
        objective: name, for errors.

    Raises:
        CompositionError: a map to any time is not on the linear path, so that `eps - x_0` is not its velocity; or a map
            to 0 would need intervals.
    """
    path = flow_map.path
    if flow_map.anchors == "any" and path.name != "linear":
        raise CompositionError(
            f"The objective '{objective}' has no velocity target on the path '{path.name}'",
            "Use a model on the linear path.",
        )
    if flow_map.anchors == "endpoint" and how.diagonal < 1:
        raise CompositionError(
            f"The objective '{objective}' needs a two-time map, but the map jumps to 0 only",
            "Use a two-time model, or diffusion-nft or awm, which need no average velocity.",
        )
    rollout = scored.rollout
    keep = informative(scored.advantages, rollout.groups).cpu().nonzero().squeeze(1)
    index = keep.repeat(how.draws)
    drawn = [NoiseKey(seed, 0, sample, draw, 0) for draw in range(how.draws) for sample in keep.tolist()]
    x_0 = rollout.x0[index.to(rollout.x0.device)]

    def level(step: int) -> Float[Tensor, " rows"]:
        """Uniform in (0, 1]."""
        return 1.0 - uniform([key._replace(step=step) for key in drawn], OBJECTIVE).to(x_0.device)

    def shifted(t: Float[Tensor, " rows"]) -> Float[Tensor, " rows"]:
        return how.time_shift * t / (1 + (how.time_shift - 1) * t)

    eps = noise(drawn, x_0.shape[1:], OBJECTIVE).to(x_0.device)
    first, second = level(1), level(3)
    if how.ordered:
        first, second = torch.maximum(first, second), torch.minimum(first, second)
    t = shifted(how.min_time + (1 - how.min_time) * first)
    rows = {
        "x_t": expand(path.alpha(t), x_0) * x_0 + expand(path.sigma(t), x_0) * eps,
        "t": t,
        "target": eps - x_0 if flow_map.anchors == "any" else x_0,
        "advantage": scored.advantages.to(x_0.device, torch.float32)[index.to(x_0.device)],
    }
    if how.diagonal < 1:
        kind, within = level(2), shifted(second).minimum(t) if how.ordered else t * (1 - second)
        to_data = kind <= how.diagonal + how.to_data
        rows["s"] = torch.where(kind <= how.diagonal, t, torch.where(to_data, 0.0, within))
    return Batch(rows, rollout.cond.select(index))


def predicted(flow_map: FlowMap, batch: Batch) -> Float[Tensor, "b *shape"]:
    """A map's prediction of `target`, in one network call: `u(x_t, t, s)`, by default on the diagonal; or `x_0`."""
    rows = batch.rows
    if flow_map.anchors == "endpoint":
        return flow_map.jump(rows["x_t"], rows["t"], torch.zeros_like(rows["t"]), batch.cond).float()
    if "s" in rows:
        return mean_flow(flow_map).average_velocity(rows["x_t"], rows["t"], rows["s"], batch.cond).float()
    return flow_map.velocity(rows["x_t"], rows["t"], batch.cond).float()


def velocity_error(flow_map: FlowMap, batch: Batch) -> Float[Tensor, "b *shape"]:
    """`v(x_t, t) - (eps - x_0)`, one network call; with `s` in the rows `u(x_t, t, s) - (eps - x_0)`.

    A map to 0 has the velocity of its prediction of the sample, so that its error is `(x_0 - X_{t->0}(x_t)) / sigma_t`.
    """
    error = predicted(flow_map, batch) - batch.rows["target"]
    if flow_map.anchors == "any":
        return error
    return -error / expand(flow_map.path.sigma(batch.rows["t"]), error)


def shared_correction(
    old: FlowMap, batch: Batch, method: Literal["central", "jvp"], step: float
) -> Float[Tensor, "b *shape"]:
    """`(t - s) D`: what turns an average velocity into the velocity at t, by the MeanFlow identity.

    D is the derivative of `u_old(x_t, t, s)` along `(eps - x_0, 1)` with s fixed, by a central difference or by
    forward-mode differentiation, without gradients. All policies share it, so it cancels between them. Rows on the
    diagonal need none; the others of a micro-batch are evaluated together.

    A central difference is shortened on the side where it would leave `s <= t - h` or `t + h <= 1`.

    Raises:
        CompositionError: the map is not a two-time map, or its network has no forward-mode derivative.
    """
    t, s = batch.rows["t"], batch.rows["s"]
    # one row at least, since processes that share a network have to make the same calls
    index = (s < t).nonzero().squeeze(1) if bool((s < t).any()) else torch.zeros(1, dtype=torch.int64, device=t.device)
    part = batch.select(index)
    x_t, t, s, direction = (part.rows[name] for name in ("x_t", "t", "s", "target"))
    u = mean_flow(old).average_velocity

    def moved(h: Float[Tensor, " k"]) -> Float[Tensor, "k *shape"]:
        # rounding must not carry a time out of [s, 1]
        return u(x_t + expand(h, x_t) * direction, (t + h).clamp(max=1.0).maximum(s), s, part.cond).float()

    with torch.no_grad():
        if method == "jvp":
            derivative = _forward_mode(lambda x, time: u(x, time, s, part.cond).float(), (x_t, t), direction)
        else:
            ahead, behind = (1 - t).clamp(max=step), (t - s).clamp(max=step)
            span = (ahead + behind).clamp(min=torch.finfo(t.dtype).tiny)
            derivative = (moved(ahead) - moved(-behind)) / expand(span, x_t)
        correction = torch.zeros_like(batch.rows["target"])
        correction[index] = expand(t - s, x_t) * derivative
    return correction


def _forward_mode(function: Callable[[Tensor, Tensor], Tensor], at: tuple[Tensor, Tensor], along: Tensor) -> Tensor:
    try:
        # the fused kernels of attention have no forward-mode derivative
        with sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings(), forward_ad.dual_level():
            # torch itself compiles the rules of some derivatives when it first needs one
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=DeprecationWarning)
            # not torch.func.jvp, which does not allow the weights of the old policy to be swapped in within the call
            x, t = (_dual(value, v) for value, v in zip(at, (along, torch.ones_like(at[1])), strict=True))
            derivative: Tensor | None = forward_ad.unpack_dual(function(x, t)).tangent  # type: ignore[no-untyped-call]
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise CompositionError(
            f"The network has no forward-mode derivative: {reason(error)}", "Set objective.derivative to central."
        ) from error
    return torch.zeros_like(at[0]) if derivative is None else derivative


def _dual(value: Tensor, along: Tensor) -> Tensor:
    dual: Tensor = forward_ad.make_dual(value, along)  # type: ignore[no-untyped-call]
    return dual


def mean_square(values: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
    """The mean over coordinates of each row's squares."""
    return values.square().flatten(1).mean(1)


def scaled_square(values: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
    """`mean_square` divided by the detached mean of absolute values (DiffusionNFT's adaptive weight)."""
    return mean_square(values) / error_scale(values)


def error_scale(values: Float[Tensor, "b *shape"]) -> Float[Tensor, " b"]:
    """The mean absolute value of each row, at least 1e-5, detached."""
    return values.detach().abs().flatten(1).mean(1).clamp(min=1e-5)
