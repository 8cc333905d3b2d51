"""Time grids by name: the times `1 = t_0 > ... > t_N = 0` that a sampler visits. Imports no torch.

`steps` N is the number of sampling steps, each one network evaluation of a one-call sampler (NFE). A grid has N + 1
times: N - 1 stochastic transitions and the deterministic last step.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Sequence

from fmg.core.errors import UsageError, suggestion, whole_number

GridSpec = str | Sequence[float]
"""A grid name, or the times themselves."""

EXPLICIT = "explicit"

MAX_STEPS = 1000
"""More steps than any few-step sampler takes; a larger number is a typing error."""
MIN_STRIDE = 1e-4
"""Smallest distance between two grid times: below it, fp32 keeps too few digits of the difference."""

_PAPER_LAST = 0.05
STATIC_SHIFT = r"shift-[0-9]+(\.[0-9]+)?"
"""The names of grids under a static shift, as a regular expression."""
MAX_SHIFT = 100.0
"""A larger shift crowds nearly all times at 1."""

_SHIFT = "shift-"
_FLUX_TOKENS = (256, 4096)
_FLUX_SHIFTS = (0.5, 1.15)
# slope in the image tokens and offset of FLUX.2's mu at 10 and at 200 steps, and the tokens from which the second is
# taken for any number of steps
_FLUX2_STEPS = (10, 200)
_FLUX2_MU = ((8.73809524e-05, 1.89833333), (0.00016927, 0.45666666))
_FLUX2_MANY_TOKENS = 4300
_SCM_TWO_STEP_ANGLE = 1.3


def make_grid(spec: GridSpec, steps: int, *, image_tokens: int | None = None) -> tuple[float, ...]:
    """The `steps + 1` times of a grid, strictly decreasing from exactly 1 to exactly 0.

    Args:
        spec: one of `grid_names()`, `shift-` and a number, or a list of times (an explicit grid).
        steps: number of sampling steps N, from 1 to 1000.
        image_tokens: tokens of one image; only `flux-shift` and `flux2-shift` need it (1024 for FLUX at 512 px).

    Grids:
        `uniform`: `linspace(1, 0, N + 1)`.
        `paper`: `linspace(1, 0.05, N)`, then 0; N >= 3 (Flow-Map GRPO, arXiv 2607.00535).
        `shift-3`, or any other number a: the uniform grid shifted by `a t / (1 + (a - 1) t)` (the static shift of
            diffusers' FlowMatchEulerDiscreteScheduler, on N equal steps that end at 0, as AnyFlow samples).
        `flux-shift`: the same with `a = e^mu`, and `mu` linear in the image tokens from 0.5 at 256 to 1.15 at 4096
            (diffusers' FlowMatchEulerDiscreteScheduler, dynamic shifting).
        `flux2-shift`: the same with the `mu` that was fitted for FLUX.2, which depends on the steps as well
            (`compute_empirical_mu` of diffusers' Flux2KleinPipeline).
        `scm`: TrigFlow angles `theta` mapped to rectified-flow times `sin / (sin + cos)`: pi/2, 1.3, 0 for two steps
            (1, 0.7827, 0), else `linspace(pi/2, 0, N + 1)` (SANA-Sprint, arXiv 2503.09641; diffusers' SCMScheduler).
        `scm-angle`: the same angles as times of the trig path, `theta / (pi/2)`: (1, 0.8276, 0) for two steps, else the
            uniform grid.

    Raises:
        WrongTypeError: `steps` is not an integer.
        UsageError: an unknown name, a grid that does not exist for `steps`, or times that do not decrease from 1 to 0
            in steps of at least 1e-4.
    """
    steps = whole_number("steps", steps)
    if not 1 <= steps <= MAX_STEPS:
        raise UsageError(f"A grid has at least one step and at most {MAX_STEPS}, got {steps}", f"Use 1 to {MAX_STEPS}.")
    times = _times(spec, steps, image_tokens)
    closest = min(earlier - later for earlier, later in itertools.pairwise(times))
    if closest < MIN_STRIDE:
        raise UsageError(
            f"Two times of the grid are only {closest:.2g} apart, too close for the precision of a step",
            f"Keep times {MIN_STRIDE:g} apart or more, or use fewer steps.",
        )
    return times


def grid_names() -> tuple[str, ...]:
    """The names that `make_grid` knows; `shift-3` is one of a family, and `explicit` means a list of times."""
    return (*_BY_STEPS, f"{_SHIFT}3", *_BY_TOKENS, EXPLICIT)


def needs_tokens(spec: GridSpec) -> bool:
    """Whether the times of a grid depend on the tokens of an image."""
    return isinstance(spec, str) and spec in _BY_TOKENS


def check_name(name: str) -> None:
    """Checks the name of a rule-based grid.

    Raises:
        UsageError: there is no such grid; a list of times has no name.
    """
    if _static_shift(name) is None and name not in named_grids():
        raise UsageError(f"There is no grid named '{name}'", suggestion(name, named_grids()))


def _times(spec: GridSpec, steps: int, image_tokens: int | None) -> tuple[float, ...]:
    if not isinstance(spec, str):
        return _explicit(spec, steps)
    if spec == EXPLICIT:
        raise UsageError("The grid 'explicit' needs a list of times", "Give the list of times instead of the name.")
    if spec in _BY_TOKENS:
        if image_tokens is None or image_tokens < 1:
            raise UsageError(
                f"The grid '{spec}' depends on the number of image tokens, which this model does not give",
                "Use another grid, or pass image_tokens (1024 for FLUX at 512 px).",
            )
        return _shifted(math.exp(_BY_TOKENS[spec](image_tokens, steps)), steps)
    shift = _static_shift(spec)
    if shift is not None:
        return _shifted(shift, steps)
    check_name(spec)
    return _BY_STEPS[spec](steps)


def _uniform(steps: int) -> tuple[float, ...]:
    return tuple(1 - i / steps for i in range(steps + 1))


def _paper(steps: int) -> tuple[float, ...]:
    if steps < 3:
        raise UsageError(
            f"The grid 'paper' needs 3 steps or more, got {steps}", "Use the grid 'uniform' or raise the steps."
        )
    stride = (1 - _PAPER_LAST) / (steps - 1)
    return (*(1 - i * stride for i in range(steps)), 0.0)


def _scm(steps: int) -> tuple[float, ...]:
    angles = [math.pi / 2 * time for time in _scm_angle(steps)]
    inner = (math.sin(angle) / (math.sin(angle) + math.cos(angle)) for angle in angles[1:-1])
    return (1.0, *inner, 0.0)


def _scm_angle(steps: int) -> tuple[float, ...]:
    return (1.0, _SCM_TWO_STEP_ANGLE / (math.pi / 2), 0.0) if steps == 2 else _uniform(steps)


def _flux_mu(tokens: int, steps: int) -> float:
    (low, high), (base, top) = _FLUX_TOKENS, _FLUX_SHIFTS
    return base + (top - base) * (tokens - low) / (high - low)


def _flux2_mu(tokens: int, steps: int) -> float:
    few, many = (slope * tokens + offset for slope, offset in _FLUX2_MU)
    if tokens > _FLUX2_MANY_TOKENS:
        return many
    low, high = _FLUX2_STEPS
    return many + (many - few) / (high - low) * (steps - high)


def _static_shift(name: str) -> float | None:
    """The number of `shift-<number>`; None for other names.

    Raises:
        UsageError: it is not a number between 0 and 100.
    """
    if not name.startswith(_SHIFT):
        return None
    shift = float(name.removeprefix(_SHIFT)) if re.fullmatch(STATIC_SHIFT, name) else 0.0
    if not 0 < shift <= MAX_SHIFT:
        raise UsageError(
            f"The grid '{name}' states no shift above 0 and up to {MAX_SHIFT:g}",
            "Write the number after the hyphen: shift-3 or shift-1.5.",
        )
    return shift


def _shifted(shift: float, steps: int) -> tuple[float, ...]:
    return tuple(shift * t / (shift * t + (1 - t)) for t in _uniform(steps))


def _explicit(given: Sequence[float], steps: int) -> tuple[float, ...]:
    times = tuple(float(t) for t in given)
    if len(times) != steps + 1:
        raise UsageError(
            f"An explicit grid for {steps} steps has {steps + 1} times, got {len(times)}",
            "Change the list or the number of steps.",
        )
    falling = all(later < earlier for earlier, later in itertools.pairwise(times))
    if times[0] != 1 or times[-1] != 0 or not falling:
        raise UsageError(
            f"The times of a grid must decrease strictly from 1 to 0, got {', '.join(f'{t:g}' for t in times)}",
            "Start the list at 1, end it at 0 and make every time smaller than the one before.",
        )
    return times


_BY_STEPS: dict[str, Callable[[int], tuple[float, ...]]] = {
    "uniform": _uniform,
    "paper": _paper,
    "scm": _scm,
    "scm-angle": _scm_angle,
}
_BY_TOKENS: dict[str, Callable[[int, int], float]] = {"flux-shift": _flux_mu, "flux2-shift": _flux2_mu}
"""Logarithm of the shift by the tokens of an image and the steps."""


def named_grids() -> tuple[str, ...]:
    """Names of the rule-based grids; a list of times needs no name."""
    return tuple(name for name in grid_names() if name != EXPLICIT)
