"""What a run shows while it goes: held-out scores, sample grids, the curve and the picture of before and after."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from fmg.core import metric_keys as keys
from fmg.core.events import Observer, StageProgress
from fmg.core.protocols import Reward
from fmg.data.charts import write_figure
from fmg.data.checkpoints import Saved
from fmg.data.metrics_log import MetricsLog
from fmg.data.pictures import GridRow, sample_grid, write_picture
from fmg.data.prompt_sets import spread
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome
from fmg.data.run_report import kept_picture, run_figure
from fmg.eval.scoring import EvalSet, Scores, means, score_target, standard_error
from fmg.eval.set_metrics import within_groups
from fmg.inference.backend import TorchBackend
from fmg.inference.generator import DEFAULT_BATCH, Generator
from fmg.registry import feature_extractors
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.tripwire import Tripwire, Verdict

GRID_PROMPTS = 6
GRID_SEEDS = 6


@dataclass
class Watcher:
    """Evaluates the model of a run on its held-out prompts and keeps its pictures up to date."""

    composed: Composed
    run: Path
    most: int
    """Images that the run's memory is planned for in one network call; an evaluation takes no more by itself."""
    observer: Observer
    dist: DistContext = field(default_factory=DistContext)
    tripwire: Tripwire = field(init=False)
    _judged: Scores | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        recipe = self.composed.recipe
        batch = recipe.eval.batch_size or min(DEFAULT_BATCH, self.most)
        backend, rollout = TorchBackend(self.composed.model), recipe.rollout
        self._generator = Generator(backend, rollout.grid, rollout.steps, batch, tells=False)
        self._steps = recipe.eval.steps
        self._pixels = feature_extractors.build("pixels")
        self.tripwire = Tripwire(recipe.eval.hacking_tolerance, recipe.eval.min_diversity)
        self._set = EvalSet.make(self.composed.eval_prompts, recipe.eval.num, recipe.eval.seed, selection=True)

    def evaluate(self, averaged: bool = False) -> dict[str, float]:
        """Held-out means by log key; `eval/score` is the trained mixture, by which the best checkpoint is chosen.

        `averaged` says that the weights are a moving average, which the tripwire does not judge.
        """
        own = score_target(
            self._generator,
            {name: self._agreed(reward) for name, reward in self.composed.measured.items()},
            self.dist.shard(self._set),
            steps=self._steps,
            grid=None,
            progress=lambda done, total: self.observer(StageProgress("evaluation", done, total)),
        )
        scores = self._gathered(own)
        if not averaged:
            self._judged = scores
        total = self._totals(scores)
        return {**means(scores), keys.SCORE: float(total.mean()), keys.error_of(keys.SCORE): standard_error(total)}

    @property
    def held_out(self) -> tuple[str, ...]:
        """Rewards that are measured and not trained, and of which less is worse."""
        judging = {reward.label for reward in self.composed.recipe.measured_rewards if reward.config.judges}
        trained = self.composed.reward.weights()
        return tuple(name for name in self.composed.measured if name in judging and name not in trained)

    def judge(self, iteration: int) -> Verdict:
        """What the tripwire says of the evaluation that was made last."""
        assert self._judged is not None
        held_out = {name: self._judged.parts[name, "total"] for name in self.held_out}
        return self.tripwire.evaluation(iteration, self._totals(self._judged), held_out)

    def diversity(self, images: Float[Tensor, "k 3 h w"], groups: Int[Tensor, " n"], unit: int) -> dict[str, float]:
        """Mean squared distance of the images of a rollout group, at the resolution of the extractor `pixels`.

        Nothing for branched rollouts, whose siblings share a state: `draw` measures the diversity of those runs.

        Args:
            images: this process's share of the images.
            groups: the group of every image.
            unit: images of one network call, as in `DistContext.shard_of`.
        """
        if self.composed.recipe.rollout.kind == "branch":
            return {}
        # a group may be cut between two processes
        return self._spread(self.dist.gather(self._pixels(images).maps, len(groups), unit), groups)

    def _spread(self, maps: Float[Tensor, "n m"], groups: Int[Tensor, " n"]) -> dict[str, float]:
        values = within_groups(maps.numpy(), groups.numpy())
        if not len(values):
            return {}
        self.tripwire.rollout(float(len(values)), float(values.sum()), float(np.square(values).sum()))
        return {keys.DIVERSITY_WITHIN_GROUPS: float(values.mean())}

    def _agreed(self, reward: Reward) -> Reward:
        """The reward, whose failure in one process stops all of them before the next network call."""
        return lambda images, prompts: self.dist.run_on_all(lambda: reward(images, prompts))

    def _gathered(self, own: Scores) -> Scores:
        """The scores of all images of the evaluation, of which each process drew its share."""
        if not self.dist.is_distributed:
            return own
        count = len(self._set)
        parts = {key: self.dist.gather(torch.from_numpy(x), count).numpy() for key, x in own.parts.items()}
        return Scores(parts, self._set.prompts, self._set.tags)

    def _totals(self, scores: Scores) -> NDArray[np.float64]:
        """The trained mixture of every image."""
        weighted = [weight * scores.parts[name, "total"] for name, weight in self.composed.reward.weights().items()]
        total: NDArray[np.float64] = np.sum(weighted, axis=0)
        return total

    def draw(self, iteration: int) -> tuple[Path, dict[str, float]]:
        """Writes the sample grid of an evaluation, at fixed prompts and seeds.

        All processes generate; the first writes.

        Returns:
            The picture, and for a run with branched rollouts the diversity of its images within prompts: siblings share
            a state, so what they have in common says little of the generator.
        """
        rows = self._rows()
        diversity = {}
        if self.composed.recipe.rollout.kind == "branch":
            maps = self._pixels(torch.cat([torch.as_tensor(row.images) for row in rows])).maps
            diversity = self._spread(maps, torch.arange(len(rows)).repeat_interleave(GRID_SEEDS))
        return self._write_samples(rows, iteration, averaged=False), diversity

    def draw_averaged(self, iteration: int) -> None:
        """Writes the same of a moving average, which is in place of the weights."""
        self._write_samples(self._rows(), iteration, averaged=True)

    def _write_samples(self, rows: Sequence[GridRow], iteration: int, *, averaged: bool) -> Path:
        path = RunFolder(self.run).sample(iteration, averaged=averaged)
        if self.dist.is_main_process:
            path.parent.mkdir(exist_ok=True)
            write_picture(sample_grid(rows, f"iteration {iteration}" + ", moving average" * averaged), path)
        return path

    def show_result(self, lines: list[Mapping[str, float]], best: Saved) -> None:
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

    def _rows(self) -> tuple[GridRow, ...]:
        prompts = spread(list(self.composed.eval_prompts), GRID_PROMPTS)
        texts = [p.text for p in prompts for _ in range(GRID_SEEDS)]
        seeds = [seed for _ in prompts for seed in range(GRID_SEEDS)]
        own = self.dist.shard_of(len(texts)).rows.tolist()
        drawn = self._generator.generate(
            [texts[i] for i in own], [seeds[i] for i in own], steps=self._steps, progress=False
        ).images
        images = self.dist.gather(drawn, len(texts))
        return tuple(
            GridRow(prompt.text, images[i * GRID_SEEDS : (i + 1) * GRID_SEEDS]) for i, prompt in enumerate(prompts)
        )
