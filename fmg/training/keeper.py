"""What a run keeps of its weights: their moving average, checkpoints for use, and the state that it resumes from."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from torch.nn import Parameter
from torch.optim import Optimizer

from fmg.core import metric_keys as keys
from fmg.core.protocols import Shardable
from fmg.data.checkpoints import CheckpointIndex
from fmg.data.prompt_sets import prompts_digest
from fmg.data.run_folder import RunFolder
from fmg.training.checkpoint import save_checkpoint
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.ema import Ema, averaged_keys
from fmg.training.gates import replica_gate
from fmg.training.observe import Watcher
from fmg.training.resume import Live, Progress, RestingPoint, SavedState, rewind, save_state
from fmg.training.samples import Sampler
from fmg.training.state_files import generator_states


@dataclass
class Keeper:
    """Saves the trained weights of a run, raw and averaged, and its state.

    Attributes:
        composed: the live parts of the run.
        run: where to.
        ema: the moving average, where the recipe asks for one.
        live: what a state is made of.
        dist: those of the run; all of them make each call, and the first writes.
    """

    composed: Composed
    run: RunFolder
    ema: Ema | None
    live: Live
    dist: DistContext

    @classmethod
    def make(
        cls,
        composed: Composed,
        run: RunFolder,
        named: list[tuple[str, Parameter]],
        optimizer: Optimizer,
        dist: DistContext,
    ) -> Keeper:
        """The keeper of a run over these trained parameters."""
        decay = composed.recipe.train.ema_decay
        ema = None if decay is None else Ema([p for _, p in named], decay)
        prompts = {"prompts": composed.prompts, "eval.prompts": composed.eval_prompts}
        digests = {place: prompts_digest(found) for place, found in prompts.items()}
        return cls(composed, run, ema, Live(named, optimizer, ema, composed.model.device, digests), dist)

    def updated(self) -> None:
        """After an optimizer step: the average follows."""
        if self.ema is not None:
            self.ema.update()

    def evaluate(self, iteration: int, evaluate: Callable[[bool], dict[str, float]]) -> dict[str, float]:
        """`eval/...` of the weights and, where there is an average, `eval_ema/...` of it, on the same noise.

        `evaluate` is told whether it measures the average.
        """
        metrics = evaluate(False)
        if self.ema is None:
            return metrics
        if iteration == 0:
            # nothing has been averaged yet, so both are the untouched base
            return {**metrics, **averaged_keys(metrics)}
        with self.averaged():
            return {**metrics, **averaged_keys(evaluate(True))}

    def averaged(self) -> AbstractContextManager[None]:
        """A body that runs with the moving average in place of the weights, where there is one."""
        return nullcontext() if self.ema is None else self.ema.in_place()

    def checkpoint(self, iteration: int, metrics: Mapping[str, float], *, sound: bool = True) -> CheckpointIndex:
        """Saves the weights and their average; `metrics` has their scores, or nothing when they have none.

        What the tripwire finds of the weights (`sound`) holds for their average, which follows them.
        """
        replica_gate(self.dist, self.live.trained)
        index = self._saved(iteration, keys.SCORE, metrics.get(keys.SCORE), ema=False, sound=sound)
        if self.ema is None or iteration == 0:
            return index
        with self.averaged():
            return self._saved(iteration, keys.EMA_SCORE, metrics.get(keys.EMA_SCORE), ema=True, sound=sound)

    def _saved(self, iteration: int, key: str, score: float | None, *, ema: bool, sound: bool) -> CheckpointIndex:
        run, model = self.run.path, self.composed.model
        with model.gathered() if isinstance(model, Shardable) else nullcontext():
            text = self.dist.run_on_main(
                lambda: save_checkpoint(run, model, iteration, key, score, ema=ema, sound=sound).to_json()
            )
        return CheckpointIndex.from_json(text)

    def resting_point(self, progress: Progress, watcher: Watcher, sampler: Sampler) -> RestingPoint:
        """What a state of now needs beside the weights, for as long as these do not change."""
        return RestingPoint(progress, generator_states(self.live.device), watcher.tripwire.state(), sampler.state())

    def state(self, point: RestingPoint, watcher: Watcher, *, now: bool = False) -> None:
        """Saves the state when its turn has come: at the start, then every `train.state_every` iterations.

        `now` saves it whenever the recipe asks for states at all.
        """
        train, progress = self.composed.recipe.train, point.progress
        if train.state_every is None:
            return
        ended = progress.iteration == train.iterations
        if now or (progress.iteration % train.state_every == 0 and not ended):
            self.dist.run_on_main(lambda: str(save_state(self.run, self.composed.recipe, point, self.live)))

    def restore(
        self, saved: SavedState, watcher: Watcher, sampler: Sampler
    ) -> tuple[CheckpointIndex, list[dict[str, float]]]:
        """Puts a run back to `saved`: weights and files; returns its checkpoints and its metrics so far."""
        saved.restore(self.live)
        watcher.tripwire.restore(saved.content["tripwire"])
        # a run of before branched rollouts samples without learning
        if sampling := saved.content.get("sampling"):
            same = saved.content["run"]["prompts"]["prompts"] == self.live.prompts["prompts"]
            sampler.restore(sampling, same_prompts=same)

        def files() -> str:
            index, lines = rewind(self.run, saved.progress.lines)
            return json.dumps([index.to_json(), lines])

        index, lines = json.loads(self.dist.run_on_main(files))
        return CheckpointIndex.from_json(index), lines
