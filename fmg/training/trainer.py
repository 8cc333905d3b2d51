"""The loop: prompts, rollout, rewards, advantages, updates. Every stage is a function; this file only orders them."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import astuple, dataclass, field
from pathlib import Path
from signal import SIGINT

import torch
from PIL.Image import Image

from fmg.core import metric_keys as keys
from fmg.core.display import counted, html_table
from fmg.core.errors import RewardError
from fmg.core.events import Evaluated, Event, Finished, IterationDone, Notice, Observer, Resumed, Started
from fmg.core.signals import signal_name, signal_of
from fmg.core.types import ScoredRollout
from fmg.data.checkpoints import CheckpointIndex, Saved
from fmg.data.metrics_log import read_numbers
from fmg.data.prompt_sets import overlap_warning
from fmg.data.resume_points import newest_state, resume_command
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome, headline
from fmg.data.run_report import RunRecord, run_picture
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.gates import LearningGate, ReplayGate, movement, movement_gate
from fmg.training.keeper import Keeper
from fmg.training.launch import Sizes
from fmg.training.metrics import advantages, decline, reward_metrics
from fmg.training.observe import Watcher
from fmg.training.resume import Progress, RestingPoint, SavedState
from fmg.training.samples import Sampler, decode_samples, score_samples
from fmg.training.tripwire import Verdict
from fmg.training.update import Updater


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What `train` returns. The result of a run is the checkpoint that it keeps, which need not be the last.

    Attributes:
        run: its folder.
        iterations: iterations done.
        initial: metrics of the base on held-out prompts.
        final: those of the last evaluation.
        best: the checkpoint that the run keeps.
        interrupted: whether it ended early.
        hacking: what the tripwire found first, or None.
        outcome: scores of the base, of the kept checkpoint and of the last evaluation.
        signal: the number of the signal that interrupted it, or None.

    It can be used wherever the path of the run can: `fmg.load(result)`.
    """

    run: RunFolder
    iterations: int
    initial: Mapping[str, float]
    final: Mapping[str, float]
    best: Saved
    interrupted: bool
    hacking: Verdict | None
    outcome: Outcome
    signal: int | None = None

    @classmethod
    def of(
        cls,
        run: RunFolder,
        iterations: int,
        evaluations: Sequence[Mapping[str, float]],
        best: Saved,
        hacking: Verdict | None = None,
        signal: int | None = None,
    ) -> TrainResult:
        """The result of a run with these lines of evaluations."""
        outcome, interrupted = Outcome.of(evaluations, best), signal is not None
        return cls(run, iterations, evaluations[0], evaluations[-1], best, interrupted, hacking, outcome, signal)

    def __fspath__(self) -> str:
        return str(self.run.path)

    def __repr__(self) -> str:
        state = "interrupted, " if self.interrupted else ""
        before, after = headline(self.outcome.base), headline(self.outcome.kept)
        scores = "".join(f", {name} {before.get(name, math.nan):.3f} -> {after[name]:.3f}" for name in list(after)[:1])
        iterations = counted(self.iterations, "iteration")
        return f"TrainResult('{self.run.path}', {state}{iterations}, keeps {self.outcome.title}{scores})"

    def _repr_html_(self) -> str:
        return html_table(repr(self), *self.outcome.table()) + self.run._repr_html_()

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of the run's `metrics.jsonl`, one for each iteration and each evaluation."""
        return read_numbers(self.run.metrics)

    def plot(self) -> Image:
        """The curves of the run as a picture, drawn anew from its log.

        Raises:
            CheckpointError: a file of the run is gone or damaged.
        """
        return run_picture(RunRecord.read(self.run))


@dataclass
class Trainer:
    """Runs a composed recipe in a run folder and reports to an observer.

    With several processes each has a trainer; the first writes and reports.
    """

    composed: Composed
    run: RunFolder
    sizes: Sizes
    observer: Observer
    dist: DistContext = field(default_factory=DistContext)
    resumed: SavedState | None = None
    _lines: list[dict[str, float]] = field(default_factory=list, init=False)
    _times: dict[str, float] = field(default_factory=dict, init=False)
    _touched: int = field(default=0, init=False)
    _rest: RestingPoint | None = field(default=None, init=False)
    """Where the weights belong to; None while they are updated."""
    _ended_by: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        recipe, model = self.composed.recipe, self.composed.model
        # fp32 rounds far below any clip range, bf16 does not
        model.fix_rows(self.sizes.micro_batch if recipe.train.dtype == "bf16" else None)
        named = list(model.trainable())
        optimizer = self.composed.optimizer(named)
        self._keeper = Keeper.make(self.composed, self.run, named, optimizer, self.dist)
        self._updater = Updater(
            self.composed.objective,
            model.policies,
            optimizer,
            [p for _, p in named],
            recipe.train.max_grad_norm,
            self.sizes.micro_batch,
            self.dist,
        )
        self._sampler = Sampler(self.composed, self.sizes, self.dist, self.observer)
        self._watcher = Watcher(self.composed, self.run.path, self.sizes.rollout_batch, self.observer, self.dist)
        self._gate = ReplayGate(
            self.composed.stochasticizer,
            model.policies,
            clip_range=self.composed.objective.clip_range,
            micro_batch=self.sizes.micro_batch,
            always_recompute=recipe.train.recompute_old == "always",
            observer=self.observer,
            dist=self.dist,
        )
        self._learning = LearningGate(self.observer)
        self._start = {name: p.detach().clone() for name, p in named}

    def train(self) -> TrainResult:
        """All iterations. Ctrl-C and other signals (`fmg.core.signals`) end the run early with everything saved.

        The updates of an iteration are finished first, so that the run can be resumed from right there.

        Raises:
            GateError: when a safety check fails; what was saved before stays.
        """
        recipe = self.composed.recipe
        self._tell(Started(recipe.model.name, recipe.train.iterations, self._facts()))
        if overlap := overlap_warning(self.composed.prompts, self.composed.eval_prompts):
            self._tell(Notice("warning", overlap))
        if recipe.eval.stop_on_hacking and not self._watcher.held_out:
            text = "No reward is held out, so that only the diversity of samples is watched: name some in eval.rewards."
            self._tell(Notice("warning", text))
        index, done = self._begin()
        try:
            if self._evaluation_is_due(done):
                # the run was interrupted between the iteration and its evaluation
                index = self._evaluate(done)
            for iteration in range(done, recipe.train.iterations):
                if recipe.eval.stop_on_hacking and self._watcher.tripwire.found is not None:
                    self._tell(Notice("warning", f"Stopped after iteration {done}, as --stop-on-hacking asks."))
                    break
                self.iterate(iteration)
                done = iteration + 1
                if self._evaluation_is_due(done):
                    index = self._evaluate(done)
                with self.dist.signals.held():
                    self._keeper.state(self._resting(done), self._watcher)
                self._learning.iteration(done, self._touched, last=done == recipe.train.iterations)
        except RewardError:
            # a reward service that went away must not cost the hours before it
            self._save_as_it_is()
            self._tell(
                Notice("info", f"The weights as they were are saved in {self.run.checkpoints}.{self._how_to_go_on()}")
            )
            raise
        except KeyboardInterrupt as error:
            self._ended_by = signal_of(error)
            with self.dist.signals.held():
                index = self._save_as_it_is()
            if self._rest is not None:
                done = self._rest.progress.iteration
            how = "Interrupted" if self._ended_by == SIGINT else f"Ended by {signal_name(self._ended_by)}"
            text = f"{how} in iteration {done + 1}: the weights as they were are saved in {self.run.checkpoints}."
            self._tell(Notice("warning", f"{text}{self._how_to_go_on()}"))
        return self._finish(index, done)

    def _save_as_it_is(self) -> CheckpointIndex:
        """A checkpoint of the weights and, unless they are amid their updates, the state to resume from."""
        index = self._keeper.checkpoint(self._touched, {})
        if self._rest is not None:
            self._keeper.state(self._rest, self._watcher, now=True)
        self._watcher.show_result(list(self._lines), index.entry(index.best))
        return index

    def _evaluation_is_due(self, done: int) -> bool:
        last = self._lines[-1]
        if last[keys.ITERATION] == done and keys.SCORE in last:
            return False
        return done % self.composed.recipe.eval.every == 0 or done == self.composed.recipe.train.iterations

    def _how_to_go_on(self) -> str:
        if newest_state(self.run.path) is None:
            return ""
        return f" Go on with: {resume_command(self.run.path, self.composed.recipe)}"

    def _begin(self) -> tuple[CheckpointIndex, int]:
        """The evaluation of the untouched model, or what an earlier process left; and the iterations done."""
        if self.resumed is None:
            recipe = self.composed.recipe
            if recipe.lora.dropout > 0:
                # the only draw of a run that is not keyed
                torch.manual_seed(recipe.train.seed + self.dist.rank)
            index = self._evaluate(0)
            self._keeper.state(self._resting(0), self._watcher)
            return index, 0
        progress = self.resumed.progress
        index, self._lines = self._keeper.restore(self.resumed, self._watcher, self._sampler)
        self._touched = progress.touched
        # calls of other shapes round otherwise, so they are checked anew
        same = tuple(progress.sizes) == astuple(self.sizes)
        self._gate.resume(progress.gate_checked if same else 0, progress.gate_recompute)
        self._start = {} if progress.moved else self._start
        self._resting(progress.iteration)
        self._tell(Resumed(progress.iteration, tuple(self._lines)))
        return index, progress.iteration

    def _resting(self, done: int) -> RestingPoint:
        """The point after `done` iterations, from which the run can be resumed until the next update."""
        sizes, moved = astuple(self.sizes), not self._start
        progress = Progress(done, self._touched, len(self._lines), sizes, *self._gate.findings, moved=moved)
        self._rest = self._keeper.resting_point(progress, self._watcher, self._sampler)
        return self._rest

    def iterate(self, iteration: int) -> None:
        """One iteration: rollout, rewards, updates, one line of metrics."""
        started = time.perf_counter()
        self._times = {}
        with self._clock("rollout"):
            own, drawn = self._sampler.sample(iteration)
        with self._clock("decode"):
            images = decode_samples(self.composed, self.sizes, own)
        measured = self._watcher.diversity(images, drawn.groups, self._sampler.unit)
        with self._clock("reward"):
            rewards = score_samples(self.composed, self.dist, own, images, len(drawn.groups), self._sampler.unit)
        if self._sampler.compares_completions(iteration):
            with self._clock("agreement"):
                measured |= self._sampler.completion_agreement(iteration, rewards)
        scored = ScoredRollout(drawn, rewards, advantages(rewards, drawn.groups, self.composed.recipe, iteration))
        with self.dist.signals.held():
            self._finish_iteration(scored, measured, iteration, started)

    def _finish_iteration(
        self, scored: ScoredRollout, measured: dict[str, float], iteration: int, started: float
    ) -> None:
        with self._clock("update"):
            self._rest = None
            updates = self._update(scored, iteration)
        drawn, rewards = scored.rollout, scored.rewards
        metrics: dict[str, float] = {keys.ITERATION: iteration + 1, **reward_metrics(rewards, drawn.groups), **updates}
        metrics |= measured | self._sampler.learn(drawn, rewards)
        metrics |= {keys.time_of(stage): spent for stage, spent in self._times.items()}
        metrics[keys.TIME_ITERATION] = time.perf_counter() - started
        self._record(metrics)
        self._resting(iteration + 1)
        self._tell(IterationDone(iteration + 1, self.composed.recipe.train.iterations, metrics))

    def _update(self, scored: ScoredRollout, iteration: int) -> dict[str, float]:
        recipe, policies = self.composed.recipe, self.composed.model.policies
        self.composed.model.snapshot()
        batch = self.composed.objective.prepare(scored, policies, recipe.train.seed * 1_000_003 + iteration)
        if not len(batch):
            return {keys.SKIPPED_UPDATES: float(recipe.train.updates_per_iteration), keys.TRAINED_ROWS: 0.0}
        batch = self._gate.admit(batch)
        wanted, kl_limit = recipe.train.updates_per_iteration, recipe.objective.config.kl_limit
        done: list[dict[str, float]] = []
        for logged in self._updater.updates(batch, wanted, recipe.train.seed + iteration, kl_limit):
            self._touched = iteration + 1
            self._keeper.updated()
            done.append(logged)
            self._check_movement()
        trained = sum(logged.pop("rows") for logged in done)
        by_update = {f"update_{i}/{key}": value for i, logged in enumerate(done) for key, value in logged.items()}
        skipped = float(wanted - len(done))
        return {**by_update, **done[-1], keys.SKIPPED_UPDATES: skipped, keys.TRAINED_ROWS: trained}

    def _check_movement(self) -> None:
        if self._start:
            movement_gate(movement(self._start, list(self.composed.model.trainable())))
            self._start = {}

    def _evaluate(self, iteration: int) -> CheckpointIndex:
        with self._clock("eval"):
            metrics = self._keeper.evaluate(iteration, self._watcher.evaluate)
            grid, diversity = self._watcher.draw(iteration)
        with self.dist.signals.held():
            return self._finish_evaluation(iteration, {**metrics, **diversity}, grid)

    def _finish_evaluation(self, iteration: int, metrics: Mapping[str, float], grid: Path) -> CheckpointIndex:
        verdict = self._watcher.judge(iteration)
        line = {keys.ITERATION: iteration, **metrics, **verdict.metrics(), keys.TIME_EVAL: self._times["eval"]}
        self._record(line)
        index = self._keeper.checkpoint(iteration, metrics, sound=verdict.sound)
        self._resting(iteration)
        best = index.entry(index.best)
        if best.iteration == iteration > 0 and best.score_key == keys.EMA_SCORE:
            with self._keeper.averaged():
                self._watcher.draw_averaged(iteration)
        self._watcher.show_result(list(self._lines), best)
        self._tell(Evaluated(iteration, line, grid))
        if verdict is self._watcher.tripwire.found:
            self._tell(Notice("warning", verdict.text()))
        return index

    def _finish(self, index: CheckpointIndex, done: int) -> TrainResult:
        evaluations, best = [line for line in self._lines if keys.SCORE in line], index.entry(index.best)
        result = TrainResult.of(self.run, done, evaluations, best, self._watcher.tripwire.found, self._ended_by)
        if warning := decline(result.initial, result.final, keys.SCORE):
            self._tell(Notice("warning", warning))
        summary = {keys.BEST_ITERATION: float(best.iteration)}
        if best.score is not None:
            summary[keys.BEST_SCORE] = best.score
        self._tell(Finished(self.run.path, result.interrupted, summary))
        return result

    def _facts(self) -> dict[str, str]:
        recipe, shape = self.composed.recipe, self.composed.recipe.rollout
        return {
            "stochasticizer": recipe.stochasticizer.name,
            "objective": recipe.objective.name,
            "reward": " + ".join(f"{weight:g} {name}" for name, weight in self.composed.reward.weights().items()),
            "trained": self.composed.trained,
            "rollout": f"{counted(shape.groups, 'prompt')} x {shape.group_size} images, {counted(shape.steps, 'step')}",
            **({} if shape.branch.backend == "torch" else {"completions": f"by {shape.branch.backend}"}),
            **({"processes": str(self.dist.world_size)} if self.dist.is_distributed else {}),
            "run": str(self.run.path),
        }

    def _record(self, line: dict[str, float]) -> None:
        self._lines.append(line)
        if self.dist.is_main_process:
            self.run.append_metrics(line)

    def _tell(self, event: Event) -> None:
        # the terminal may be what went away
        with suppress(OSError) if self._ended_by else nullcontext():
            self.observer(event)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        self.dist.check_stop()
        started = time.perf_counter()
        yield
        if self.composed.model.device.type == "cuda":
            torch.cuda.synchronize(self.composed.model.device)
        self._times[stage] = time.perf_counter() - started
