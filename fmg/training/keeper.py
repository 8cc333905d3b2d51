"""What a run keeps of its weights: their moving average, checkpoints for use, and the state that it resumes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch.nn import Parameter
from torch.optim import Optimizer

from fmg.data.checkpoints import CheckpointIndex
from fmg.data.run_folder import RunFolder
from fmg.training.checkpoint import drop_unscored, save_checkpoint
from fmg.training.compose import Composed
from fmg.training.ema import Ema, averaged_keys
from fmg.training.keys import EMA_SCORE_KEY, SCORE_KEY
from fmg.training.observe import Watcher
from fmg.training.resume import Live, Progress, SavedState, rewind_metrics, save_state


@dataclass
class Keeper:
    """Saves the trained weights of a run, raw and averaged, and its state.

    Attributes:
        composed: the live parts of the run.
        run: where to.
        ema: the moving average, where the recipe asks for one.
        live: what a state is made of.
    """

    composed: Composed
    run: RunFolder
    ema: Ema | None
    live: Live

    @classmethod
    def make(
        cls, composed: Composed, run: RunFolder, named: list[tuple[str, Parameter]], optimizer: Optimizer
    ) -> Keeper:
        """The keeper of a run over these trained parameters."""
        decay = composed.recipe.train.ema_decay
        ema = None if decay is None else Ema([p for _, p in named], decay)
        return cls(composed, run, ema, Live(named, optimizer, ema, composed.model.device))

    def updated(self) -> None:
        """After an optimizer step: the average follows."""
        if self.ema is not None:
            self.ema.update()

    def evaluate(self, iteration: int, evaluate: Callable[[], dict[str, float]]) -> dict[str, float]:
        """`eval/...` of the weights and, where there is an average, `eval_ema/...` of it, on the same noise."""
        metrics = evaluate()
        if self.ema is None:
            return metrics
        if iteration == 0:
            # nothing has been averaged yet, so both are the untouched base
            return {**metrics, **averaged_keys(metrics)}
        with self.ema.in_place():
            return {**metrics, **averaged_keys(evaluate())}

    def checkpoint(self, iteration: int, metrics: Mapping[str, float]) -> CheckpointIndex:
        """Saves the weights and their average; `metrics` has their scores, or nothing when they have none."""
        run, model = self.run.path, self.composed.model
        index = save_checkpoint(run, model, iteration, SCORE_KEY, metrics.get(SCORE_KEY))
        if self.ema is None or iteration == 0:
            return index
        with self.ema.in_place():
            return save_checkpoint(run, model, iteration, EMA_SCORE_KEY, metrics.get(EMA_SCORE_KEY), ema=True)

    def state(self, progress: Progress, watcher: Watcher) -> None:
        """Saves the state when its turn has come: at the start, then every `train.state_every` iterations."""
        train = self.composed.recipe.train
        ended = progress.iteration == train.iterations
        if train.state_every is not None and progress.iteration % train.state_every == 0 and not ended:
            save_state(self.run, self.composed.recipe, progress, self.live, watcher.first)

    def restore(self, saved: SavedState, watcher: Watcher) -> tuple[CheckpointIndex, list[dict[str, float]]]:
        """Puts a run back to `saved`: weights, files and pictures; returns its checkpoints and its metrics so far."""
        lines = rewind_metrics(self.run, saved.progress.lines)
        saved.restore(self.live)
        watcher.first = saved.pictures()
        return drop_unscored(self.run.path), lines
