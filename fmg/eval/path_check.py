"""Which samplers leave the marginal path of a learned map: their states compared with the model's own.

A stochastic rollout stays on the path when its state at a time `s` is distributed like a sample of the deterministic
sampler noised to `s`. The two are compared at every interior time of the grid: by their moments, and by the images that
the deterministic map generates from them. Prompts and initial noise are the same, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypedDict

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core.display import plot_label
from fmg.core.errors import CompositionError, UsageError
from fmg.core.events import Observer, StageProgress, ignore
from fmg.core.prompt import tell_of_cuts
from fmg.core.protocols import Model, Reward, Stochasticizer
from fmg.core.specs import MapSpec
from fmg.core.types import Conditioning
from fmg.data.charts import GREY, frame, new_figure, style, write_figure
from fmg.data.prompt_sets import load_prompts
from fmg.eval.intervals import bootstrap_mean
from fmg.eval.results import plain
from fmg.eval.scoring import EvalSet, prompt_clusters, score_images
from fmg.flow import expand
from fmg.flow.grids import make_grid
from fmg.inference.target import load_model, resolve_target
from fmg.recipe.composition import check_target_times
from fmg.registry import stochasticizers
from fmg.registry.config import StochasticizerConfig
from fmg.rewards.base import build_rewards, check_prompts
from fmg.rl import NoiseKey, rollout, sample_rollout
from fmg.rl.rollouts import noise

SCHEMA = 1
REFERENCE = "deterministic"
AGAIN = "deterministic, other noise"
"""The noise floor: the reference compared with itself, noised a second time."""
RMS, MEAN = "rms", "mean"
# Neither an iteration of a run nor that of generated images.
_ITERATION = -2
_CHUNK = 256
_STREAM = "path-check"
_FIGURE_COLUMNS = 2
# share of the distance between two times that the stochasticizers, side by side, take
_FIGURE_SPREAD = 0.55

Values = dict[tuple[float, str], NDArray[np.float64]]
"""One number per image, by time and quantity."""


@dataclass(frozen=True)
class PathRow:
    """One quantity of one stochasticizer at one time, with that of the reference.

    Attributes:
        stochasticizer: its name.
        time: time of the state, in (0, 1).
        quantity: `rms` and `mean` of the latents; otherwise a score of the images that the deterministic map generates
            from the states: `<reward>`, or `<reward>/recognisable`, the share with exactly one recognisable object.
        value, reference: means over images.
        difference: for moments, as a share of the reference's rms; for scores, absolute.
        ci95: its 95 % interval, from resampling prompts.
    """

    stochasticizer: str
    time: float
    quantity: str
    value: float
    reference: float
    difference: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class PathReport:
    """What `fmg eval --path-check` prints."""

    target: str
    prompts: str
    num: int
    seed: int
    grid: tuple[float, ...]
    rows: tuple[PathRow, ...]

    def to_json(self) -> dict[str, object]:
        """Plain JSON values; unbounded intervals are null."""
        return {"schema": SCHEMA, **asdict(self), "grid": list(self.grid), "rows": plain(self.rows)}

    def names(self) -> list[str]:
        return list(dict.fromkeys(row.stochasticizer for row in self.rows))

    def quantities(self) -> list[str]:
        return list(dict.fromkeys(row.quantity for row in self.rows))


def path_check(
    target: str | Path | None = None,
    *,
    prompts: str | None = None,
    rewards: Sequence[str] | None = None,
    steps: int | None = None,
    grid: str | None = None,
    num: int = 1000,
    seed: int = 0,
    device: str = "auto",
    dtype: str = "fp32",
    allow_code: bool = False,
    observer: Observer = ignore,
) -> PathReport:
    """Rolls out every registered stochasticizer that fits a model, with its default options, and compares its states.

    Args:
        target: model name or run folder; None is the newest run.
        prompts: prompt set by name or file; None takes the recipe's evaluation set.
        rewards: rewards by name; None takes the recipe's own and its evaluation rewards.
        steps: sampling steps (NFE), at least 2; None takes the recipe's.
        grid: time grid by name; None takes the recipe's.
        num: images for each stochasticizer and time.
        seed: seed of the noise.
        device: `auto`, `cpu`, `cuda`, ...
        dtype: `fp32` or `bf16`.
        allow_code: as in `evaluate`.
        observer: receives `StageProgress` and `Notice` events.

    Raises:
        UsageError: unknown target, reward or prompt set, or a grid without an interior time.
    """
    found = resolve_target(target, allow_code=allow_code or bool(rewards), observer=observer)
    shape = found.recipe.rollout
    scorers = build_rewards(list(rewards) if rewards else list(found.recipe.measured_rewards))
    eval_set = EvalSet.make(load_prompts(prompts or found.recipe.eval.prompts), num, seed)
    for name, reward in scorers.items():
        check_prompts(name, reward, eval_set.prompts)
    model = load_model(found, device=device, dtype=dtype)
    tell_of_cuts(model, eval_set.prompts, observer)
    _, height, width = model.latent_shape
    times = make_grid(grid or shape.grid, steps or shape.steps, image_tokens=(height // 2) * (width // 2))
    if len(times) < 3:
        raise UsageError("A grid of one step has no interior time", "Set --steps to 2 or more.")
    study = _Study(model, scorers, eval_set, times, seed)
    kernels = {name: stochasticizers.build(name) for name in fitting(model.spec, times)}
    values: dict[str, Values] = {}
    for count, name in enumerate((REFERENCE, AGAIN, *kernels)):
        observer(StageProgress(f"path check: {name}", count, len(kernels) + 2))
        values[name] = study.measure(name, kernels.get(name))
    clusters = prompt_clusters(eval_set.prompts)
    rows = [
        row for name, x in values.items() if name != REFERENCE for row in _rows(name, x, values[REFERENCE], clusters)
    ]
    set_name = prompts or found.recipe.eval.prompts.name
    return PathReport(found.label, set_name, num, seed, times, tuple(rows))


def fitting(spec: MapSpec, times: Sequence[float]) -> list[str]:
    """Names of the stochasticizers that fit a map and a grid with their default options."""
    return [name for name in stochasticizers.names() if _fits(name, spec, times)]


def _fits(name: str, spec: MapSpec, times: Sequence[float]) -> bool:
    if any(field.required for field in stochasticizers.describe(name).fields):
        return False
    config = stochasticizers.config(name)
    assert isinstance(config, StochasticizerConfig)
    requires = config.requires()
    try:
        check_target_times(name, requires, times)
    except CompositionError:
        return False
    return requires.path in ("any", spec.path) and (requires.anchors != "any" or spec.anchors == "any")


class _NoiseKeys(TypedDict):
    seed: int
    iteration: int
    latent_shape: tuple[int, ...]
    device: torch.device


@dataclass(frozen=True)
class _Study:
    model: Model
    rewards: Mapping[str, Reward]
    eval_set: EvalSet
    times: tuple[float, ...]
    seed: int

    @property
    def _noise_keys(self) -> _NoiseKeys:
        return {
            "seed": self.seed,
            "iteration": _ITERATION,
            "latent_shape": self.model.latent_shape,
            "device": self.model.device,
        }

    def measure(self, name: str, kernel: Stochasticizer | None) -> Values:
        """The values of every image at every interior time; without a kernel, those of the noised samples."""
        collected: dict[tuple[float, str], list[NDArray[np.float64]]] = {}
        for start in range(0, len(self.eval_set), _CHUNK):
            index = torch.arange(start, min(start + _CHUNK, len(self.eval_set)))
            texts = self.eval_set.prompts[start : start + len(index)]
            cond = self.model.encode(list(texts))
            states = self._noised(cond, index, name) if kernel is None else self._rolled(cond, index, kernel)
            for step, x in states:
                for key, value in self._numbers(cond, x, step, texts).items():
                    collected.setdefault((self.times[step], key), []).append(value)
        return {key: np.concatenate(parts) for key, parts in collected.items()}

    def _rolled(
        self, cond: Conditioning, index: Int[Tensor, " n"], kernel: Stochasticizer
    ) -> Iterator[tuple[int, Tensor]]:
        sampled = rollout(self.model.flow_map, kernel, cond, index, self.times, **self._noise_keys)
        return ((step.index + 1, step.x_s) for step in sampled.transitions)

    def _noised(self, cond: Conditioning, index: Int[Tensor, " n"], name: str) -> Iterator[tuple[int, Tensor]]:
        clean = sample_rollout(self.model.flow_map, cond, index, self.times, **self._noise_keys).x0
        path, draw = self.model.flow_map.path, 0 if name == REFERENCE else 1
        for step in range(1, len(self.times) - 1):
            keys = [NoiseKey(self.seed, _ITERATION, i, draw, step) for i in index.tolist()]
            fresh = noise(keys, self.model.latent_shape, _STREAM).to(clean.device)
            s = torch.full((len(index),), self.times[step], device=clean.device)
            yield step, expand(path.alpha(s), clean) * clean + expand(path.sigma(s), clean) * fresh

    @torch.no_grad()
    def _numbers(
        self, cond: Conditioning, x: Float[Tensor, "n *shape"], step: int, texts: Sequence[str]
    ) -> dict[str, NDArray[np.float64]]:
        flat = x.double().flatten(1).cpu().numpy()
        numbers: dict[str, NDArray[np.float64]] = {RMS: np.square(flat).mean(1), MEAN: flat.mean(1)}
        images = self.model.decode(self._finished(cond, x, step))
        for (reward, part), scores in score_images(self.rewards, images, texts).items():
            if part == "total":
                numbers[reward] = scores
            elif part == "recognisable":
                numbers[f"{reward}/{part}"] = scores
        return numbers

    def _finished(self, cond: Conditioning, x: Tensor, step: int) -> Tensor:
        """Completes states along the rest of the grid. A single-time map, which would add noise, jumps to the end."""
        flow_map = self.model.flow_map
        rest = self.times[step:] if flow_map.anchors == "any" else (self.times[step], 0.0)
        for t_value, s_value in pairwise(rest):
            t, s = (torch.full((len(x),), value, device=x.device) for value in (t_value, s_value))
            x = flow_map.jump(x, t, s, cond)
        return x


def _rows(name: str, ours: Values, reference: Values, clusters: NDArray[np.int64]) -> Iterator[PathRow]:
    for (time, quantity), values in ours.items():
        theirs = reference[time, quantity]
        scale, show = _scale(quantity, reference, time)
        paired = (values - theirs) * scale
        yield PathRow(
            name,
            time,
            quantity,
            show(float(values.mean())),
            show(float(theirs.mean())),
            float(paired.mean()),
            bootstrap_mean(paired, clusters),
        )


def _scale(quantity: str, reference: Values, time: float) -> tuple[float, Callable[[float], float]]:
    """The factor on a difference, and how a mean is shown."""
    energy = float(reference[time, RMS].mean())
    if quantity == RMS:
        # to first order, the relative change of a root is half of that of its square
        return 0.5 / energy, lambda value: float(np.sqrt(value))
    if quantity == MEAN:
        return 1 / float(np.sqrt(energy)), float
    return 1.0, float


def path_figure(report: PathReport, path: Path) -> None:
    """Writes a figure of a check: one panel per quantity, with the differences from the reference at each time.

    Stochasticizers are plotted side by side at each time, so that no interval hides another.
    """
    # the mean over all coordinates hardly moves; the table has it
    quantities = [quantity for quantity in report.quantities() if quantity != MEAN]
    rows = -(-len(quantities) // _FIGURE_COLUMNS)
    figure = new_figure(11, 3.4 * rows + 0.9)
    panels = figure.subplots(rows, _FIGURE_COLUMNS, squeeze=False).ravel()
    for panel in panels[len(quantities) :]:
        panel.set_visible(False)
    names, times = report.names(), sorted({row.time for row in report.rows}, reverse=True)
    for panel, quantity in zip(panels, quantities, strict=False):
        frame(
            panel,
            "rms of the latents" if quantity == "rms" else quantity,
            "time (1 noise, 0 data)",
            "relative difference" if quantity == "rms" else "difference of the mean score",
        )
        panel.axhline(0, color="#333", linewidth=0.8)
        for index, name in enumerate(names):
            picked = [r for r in report.rows if (r.stochasticizer, r.quantity) == (name, quantity)]
            shift = _FIGURE_SPREAD * ((index + 0.5) / len(names) - 0.5)
            at = np.asarray([times.index(r.time) + shift for r in picked])
            values = np.asarray([r.difference for r in picked], dtype=float)
            low, high = np.asarray([r.ci95 for r in picked], dtype=float).T
            look = style(index) | ({"color": GREY} if name == AGAIN else {}) | {"linestyle": "none"}
            panel.errorbar(at, values, [values - low, high - values], label=name, elinewidth=1.3, capsize=2, **look)
        panel.set_xticks(range(len(times)), [f"{time:.3g}" for time in times])
        for between in range(len(times) - 1):
            panel.axvline(between + 0.5, color="#dde2ea", linewidth=0.8)
        panel.grid(visible=False, axis="x")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.suptitle(
        f"{plot_label(report.target)}: states minus noised deterministic samples, {report.num} images (95 %)",
        fontsize=12,
    )
    write_figure(figure, path)
