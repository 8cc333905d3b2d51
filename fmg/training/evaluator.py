"""Held-out evaluations of a run: scores, sample grids, diversity, the learning curve and the before/after image."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.events import Notice, Observer, StageProgress
from fmg.core.protocols import Reward
from fmg.data.charts import write_figure
from fmg.data.checkpoints import SavedCheckpoint
from fmg.data.metrics_log import MetricsLog
from fmg.data.pictures import GridRow, sample_grid, write_picture
from fmg.data.prompt_sets import spread
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome
from fmg.data.run_report import kept_picture, run_figure
from fmg.eval.scoring import EvalSet, Scores, means, score_target, standard_error
from fmg.eval.set_metrics import within_groups
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.inference.parity import check_same_images
from fmg.inference.torch_backend import TorchBackend
from fmg.registry import feature_extractors
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.hacking_monitor import HackingMonitor, HackingVerdict

CHECKED_EVALUATIONS = 2
"""Evaluations whose first batch torch generates as well: at the first, a fresh LoRA still adds exactly nothing."""
GRID_PROMPTS = 6
GRID_SEEDS = 6
DECLINE_ERRORS = 3.0
"""A run causes a warning if its last held-out score is this many standard errors below the first."""

_USE_TORCH = "set eval.backend to torch"


@dataclass
class Evaluator:
    """Evaluates the model of a run on its held-out prompts and keeps its images up to date.

    Attributes:
        composed: the live parts of the run.
        run: the run folder.
        max_batch: images per forward pass that the run's memory is planned for.
        observer: receives the progress.
        dist: the processes that share each evaluation.
        monitor: looks for reward hacking.
    """

    composed: Composed
    run: Path
    max_batch: int
    observer: Observer
    dist: DistContext = field(default_factory=DistContext)
    monitor: HackingMonitor = field(init=False)
    _latest: Scores | None = field(default=None, init=False)
    _checks: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        recipe = self.composed.recipe
        batch = recipe.eval.batch_size or min(DEFAULT_BATCH, self.max_batch)
        self._generator = self._sampled_by(self._backend(), batch)
        self._checks = 0 if recipe.eval.backend == "torch" else CHECKED_EVALUATIONS
        self._steps = recipe.eval.steps
        self._pixels = feature_extractors.build("pixels")
        self.monitor = HackingMonitor(recipe.eval.hacking_tolerance, recipe.eval.min_diversity)
        self._set = EvalSet.make(self.composed.eval_prompts, recipe.eval.num, recipe.eval.seed, selection=True)

    def evaluate(self, averaged: bool = False) -> dict[str, float]:
        """Held-out means by log key; `eval/score` is the trained mixture, by which the best checkpoint is chosen.

        `averaged` says that the weights are a moving average, which the monitor does not judge.
        """

        if self._checks:
            self.dist.run_on_all(self._check_backend)
            self._checks -= 1

        def scored_together(reward: Reward) -> Reward:
            # a failure in one process stops all of them before the next forward pass
            return lambda images, prompts: self.dist.run_on_all(lambda: reward(images, prompts))

        local = score_target(
            self._generator,
            {name: scored_together(reward) for name, reward in self.composed.measured.items()},
            self.dist.shard(self._set),
            steps=self._steps,
            grid=None,
            progress=lambda done, total: self.observer(StageProgress("evaluation", done, total)),
        )
        scores = self._gathered(local)
        if not averaged:
            self._latest = scores
        total = self._totals(scores)
        return {**means(scores), keys.SCORE: float(total.mean()), keys.error_of(keys.SCORE): standard_error(total)}

    @property
    def held_out(self) -> tuple[str, ...]:
        """Rewards that are measured but not trained, and whose decrease is a loss."""
        judging = {reward.label for reward in self.composed.recipe.measured_rewards if reward.config.judges}
        trained = self.composed.reward.weights()
        return tuple(name for name in self.composed.measured if name in judging and name not in trained)

    def judge(self, iteration: int) -> HackingVerdict:
        """The monitor's verdict on the latest evaluation."""
        assert self._latest is not None
        held_out = {name: self._latest.parts[name, "total"] for name in self.held_out}
        return self.monitor.judge(iteration, self._totals(self._latest), held_out)

    def diversity(self, images: Float[Tensor, "k 3 h w"], groups: Int[Tensor, " n"], unit: int) -> dict[str, float]:
        """Mean squared distance of the images of a rollout group, at the resolution of the extractor `pixels`.

        Nothing for branched rollouts, whose siblings share a state: `draw` measures the diversity of those runs.

        Args:
            images: this process's share of the images.
            groups: the group of every image.
            unit: images of one forward pass, as in `DistContext.shard_of`.
        """
        if self.composed.recipe.rollout.kind == "branch":
            return {}
        # a group may be split between two processes
        return self._spread(self.dist.gather(self._pixels(images).maps, len(groups), unit), groups)

    def draw(self, iteration: int) -> tuple[Path, dict[str, float]]:
        """Writes the sample grid of an evaluation, at fixed prompts and seeds.

        All processes generate; the main one writes.

        Returns:
            The image, and for a run with branched rollouts the diversity of its images within prompts: siblings share
                a state, so their similarity says little about the generator.
        """
        rows = self._rows()
        diversity = {}
        if self.composed.recipe.rollout.kind == "branch":
            maps = self._pixels(torch.cat([torch.as_tensor(row.images) for row in rows])).maps
            diversity = self._spread(maps, torch.arange(len(rows)).repeat_interleave(GRID_SEEDS))
        return self._write_samples(rows, iteration, averaged=False), diversity

    def draw_averaged(self, iteration: int) -> None:
        """Writes the same for a moving average that currently replaces the weights."""
        self._write_samples(self._rows(), iteration, averaged=True)

    def show_result(self, lines: list[Mapping[str, float]], best: SavedCheckpoint) -> None:
        """Writes `before_after.png` of the checkpoint that the run keeps, and `curve.png` of the metrics so far."""
        if not self.dist.is_main_process:
            return
        run, outcome = RunFolder(self.run), Outcome.of(lines, best)
        picture = kept_picture(run, outcome)
        if picture is None:
            # that of a checkpoint which is no longer kept
            run.before_after.unlink(missing_ok=True)
        else:
            write_picture(picture, run.before_after)
        if len(lines) > 1:
            recipe = self.composed.recipe
            title = f"{recipe.model.name}, {recipe.stochasticizer.name}"
            write_figure(run_figure(MetricsLog.of(lines), outcome, title), run.curve)

    def _backend(self) -> TorchBackend:
        """The generator of the images, on the weights in training."""
        model = self.composed.model
        if self.composed.recipe.eval.backend == "torch":
            return TorchBackend(model)
        from fmg.inference.compiled import TorchCompileBackend, check_compiler

        check_compiler(model.device, _USE_TORCH)
        return TorchCompileBackend(model)

    def _sampled_by(self, backend: TorchBackend, batch: int) -> Generator:
        rollout = self.composed.recipe.rollout
        return Generator(backend, rollout.grid, rollout.steps, batch, tells=False)

    def _check_backend(self) -> None:
        """Generates the first batch of an evaluation with torch as well.

        Raises:
            GateError: the images differ.
        """
        recipe, batch = self.composed.recipe, self._generator.batch_size
        prompts, seeds = self._set.prompts[:batch], self._set.seeds[:batch]
        ours, torchs = (
            generator.generate(prompts, seeds, steps=self._steps, progress=False).image_array
            for generator in (self._generator, self._sampled_by(TorchBackend(self.composed.model), batch))
        )
        what = f"Images by {recipe.eval.backend}"
        error = check_same_images(ours, torchs, recipe.train.dtype, what, f"{_USE_TORCH.capitalize()}.")
        self.observer(Notice("info", f"{what} checked: within {error:.1e} of torch's."))

    def _spread(self, maps: Float[Tensor, "n m"], groups: Int[Tensor, " n"]) -> dict[str, float]:
        values = within_groups(maps.numpy(), groups.numpy())
        if not len(values):
            return {}
        self.monitor.add_rollout(float(len(values)), float(values.sum()), float(np.square(values).sum()))
        return {keys.DIVERSITY_WITHIN_GROUPS: float(values.mean())}

    def _gathered(self, local: Scores) -> Scores:
        """The scores of all images of the evaluation, of which each process generated its share."""
        if not self.dist.is_distributed:
            return local
        count = len(self._set)
        parts = {key: self.dist.gather(torch.from_numpy(x), count).numpy() for key, x in local.parts.items()}
        return Scores(parts, self._set.prompts, self._set.tags)

    def _totals(self, scores: Scores) -> NDArray[np.float64]:
        """The trained mixture of every image."""
        weighted = [weight * scores.parts[name, "total"] for name, weight in self.composed.reward.weights().items()]
        total: NDArray[np.float64] = np.sum(weighted, axis=0)
        return total

    def _rows(self) -> tuple[GridRow, ...]:
        prompts = spread(list(self.composed.eval_prompts), GRID_PROMPTS)
        texts = [p.text for p in prompts for _ in range(GRID_SEEDS)]
        seeds = [seed for _ in prompts for seed in range(GRID_SEEDS)]
        local = self.dist.shard_of(len(texts)).rows.tolist()
        generated = self._generator.generate(
            [texts[i] for i in local], [seeds[i] for i in local], steps=self._steps, progress=False
        ).images
        images = self.dist.gather(generated, len(texts))
        return tuple(
            GridRow(prompt.text, images[i * GRID_SEEDS : (i + 1) * GRID_SEEDS]) for i, prompt in enumerate(prompts)
        )

    def _write_samples(self, rows: Sequence[GridRow], iteration: int, *, averaged: bool) -> Path:
        path = RunFolder(self.run).sample(iteration, averaged=averaged)
        if self.dist.is_main_process:
            path.parent.mkdir(exist_ok=True)
            write_picture(sample_grid(rows, f"iteration {iteration}" + ", moving average" * averaged), path)
        return path


def decline(initial: Mapping[str, float], final: Mapping[str, float], key: str) -> str | None:
    """A warning when the held-out score `key` ended clearly below where it began, else None.

    A NaN standard error, as for a single image, gives no warning.
    """
    error = math.hypot(initial[keys.error_of(key)], final[keys.error_of(key)])
    if not final[key] - initial[key] < -DECLINE_ERRORS * error:
        return None
    return (
        f"The held-out score fell from {initial[key]:.3f} at iteration 0 to {final[key]:.3f}: lower the learning rate,"
        " use larger groups, or add a KL term (objective.kl_beta)."
    )


def averaged_keys(metrics: Mapping[str, float]) -> dict[str, float]:
    """Metrics of an evaluation of the average: `eval/...` becomes `eval_ema/...`."""
    return {
        keys.EVAL_EMA + key.removeprefix(keys.EVAL): value
        for key, value in metrics.items()
        if key.startswith(keys.EVAL)
    }
