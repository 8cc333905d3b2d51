"""Flow-Map GRPO, one iteration after the other: prompts, rollout, rewards, advantages, updates.

A flow map generates an image in a few steps along a time grid 1 = t_0 > ... > t_N = 0. Its own sampler is
deterministic, so a stochasticizer turns the map into a policy: each step but the last becomes a Gaussian whose
log-density can be evaluated again. One iteration (`Trainer.iterate`) is

    prompts     choose G prompts, encode them
    rollout     m images per prompt with the current weights, each transition with its log-prob
                (chain: m trajectories; branch: m siblings of one transition, completed by one jump)
    decode      latents to images
    reward      r = sum_k w_k r_k(image, prompt)
    advantages  A = (r - mean over the prompt) / (std + eps)
    update      U optimizer steps on disjoint random parts of the rows, each minimising
                -mean min(rho A, clip(rho, 1 - c, 1 + c) A) + beta KL to the base,
                rho = exp(logp_new - logp_old), log-probs averaged over latent coordinates
    log         one line of metrics.jsonl

Every `eval.every` iterations it evaluates held-out prompts on fixed noise, looks for reward hacking, and saves a
checkpoint; the best one by held-out score is the result.

Departures from the paper (arXiv 2607.00535):
  * time runs from noise (t = 1) to data (t = 0);
  * rollouts branch by default: a group shares its prefix and one trained row (docs/branching.md); `chain` is the
    paper's;
  * a LoRA is trained, the reference is the base with its adapter off, and the KL is off by default;
  * groups with equal rewards have no gradient and are left out; groups with an unscored image are dropped;
  * old log-probs are recomputed through the update path where bf16 makes rollout and update differ (`ReplayGate`);
  * noise, prompts and partitions are keyed by (seed, iteration), so a resumed or distributed run repeats the same
    numbers;
  * the run stops when it cannot learn: a ratio that is not 1 before the first update, a first update that moves
    nothing, gradients that are not finite, ten iterations without an update.

Every stage is a function of another module; this one calls them in order.
"""

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
from fmg.data.checkpoints import CheckpointIndex, SavedCheckpoint
from fmg.data.prompt_sets import overlap_warning
from fmg.data.resume_points import newest_state, resume_command
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome, headline, read_numbers
from fmg.data.run_report import RunRecord, run_picture
from fmg.rl.keyed_noise import sub_seed
from fmg.training.checkpointing import CheckpointManager, Progress, ResumePoint, SavedState
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext
from fmg.training.evaluator import Evaluator, averaged_keys, decline
from fmg.training.gates import LearningGate, ReplayGate, movement, movement_gate
from fmg.training.hacking_monitor import HackingVerdict
from fmg.training.launch import Sizes
from fmg.training.lr_schedule import LrSchedule
from fmg.training.plan_work import stochasticizer_of
from fmg.training.samples import Sampler, advantages, decode_samples, reward_metrics, score_samples
from fmg.training.state_files import generator_states
from fmg.training.update import Updater


@dataclass(frozen=True, repr=False)
class TrainResult:
    """What `train` returns. The result of a run is the checkpoint that it keeps, which need not be the last.

    Attributes:
        run: its folder.
        iterations: iterations done.
        initial: metrics of the base on held-out prompts.
        final: metrics of the last evaluation.
        best: the checkpoint that the run keeps.
        interrupted: whether it ended early.
        hacking: the first verdict of the reward-hacking monitor, or None.
        outcome: scores of the base, of the kept checkpoint and of the last evaluation.
        signal: the number of the signal that interrupted it, or None.

    It is accepted wherever the path of the run is: `fmg.load(result)`.
    """

    run: RunFolder
    iterations: int
    initial: Mapping[str, float]
    final: Mapping[str, float]
    best: SavedCheckpoint
    interrupted: bool
    hacking: HackingVerdict | None
    outcome: Outcome
    signal: int | None = None

    @classmethod
    def of(
        cls,
        run: RunFolder,
        iterations: int,
        evaluations: Sequence[Mapping[str, float]],
        best: SavedCheckpoint,
        hacking: HackingVerdict | None = None,
        signal: int | None = None,
    ) -> TrainResult:
        """The result of a run with these evaluations."""
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
        """The curves of the run as an image, drawn from its log.

        Raises:
            CheckpointError: a file of the run is missing or damaged.
        """
        return run_picture(RunRecord.read(self.run))


@dataclass
class Trainer:
    """Runs a composed recipe in a run folder and reports to an observer.

    With several processes each has a trainer; the main process writes and reports.
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
    _resume_point: ResumePoint | None = field(default=None, init=False)
    """Where the current weights can be resumed; None while they are updated."""
    _signal: int | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        composed, recipe, model = self.composed, self.composed.recipe, self.composed.model
        # fp32 rounds far below any clip range, bf16 does not
        model.fix_rows(self.sizes.micro_batch if recipe.train.dtype == "bf16" else None)
        named = list(model.trainable())
        optimizer = composed.optimizer(named)
        self._checkpoints = CheckpointManager.make(composed, self.run, named, optimizer, self.dist)
        self._schedule = LrSchedule(optimizer, recipe.train)
        self._updater = Updater(
            composed.objective,
            model.policies,
            optimizer,
            [p for _, p in named],
            recipe.train.max_grad_norm,
            self.sizes.micro_batch,
            self.dist,
            self._schedule,
        )
        self._sampler = Sampler(composed, self.sizes, self.dist, self.observer)
        self._evaluator = Evaluator(composed, self.run.path, self.sizes.rollout_batch, self.observer, self.dist)
        self._replay_gate = ReplayGate(
            composed.stochasticizer,
            model.policies,
            clip_range=composed.objective.clip_range,
            micro_batch=self.sizes.micro_batch,
            always_recompute=recipe.train.recompute_old == "always",
            observer=self.observer,
            dist=self.dist,
        )
        self._learning_gate = LearningGate(self.observer)
        self._start = {name: p.detach().clone() for name, p in named}

    def train(self) -> TrainResult:
        """Runs all iterations. Ctrl-C and other signals (`fmg.core.signals`) end the run early with everything saved.

        The updates of an iteration are finished first, so that the run can be resumed from there.

        Raises:
            GateError: a safety check fails; what was saved before stays.
        """
        recipe = self.composed.recipe
        self._emit(Started(recipe.model.name, recipe.train.iterations, self._facts()))
        if overlap := overlap_warning(self.composed.prompts, self.composed.eval_prompts):
            self._emit(Notice("warning", overlap))
        if recipe.eval.stop_on_hacking and not self._evaluator.held_out:
            text = "No reward is held out, so only the diversity of samples is monitored: name some in eval.rewards."
            self._emit(Notice("warning", text))
        index, done = self._begin()
        try:
            if self._evaluation_is_due(done):
                # the run was interrupted between the iteration and its evaluation
                index = self._evaluate(done)
            for iteration in range(done, recipe.train.iterations):
                if recipe.eval.stop_on_hacking and self._evaluator.monitor.found is not None:
                    self._emit(Notice("warning", f"Stopped after iteration {done} because of --stop-on-hacking."))
                    break
                self.iterate(iteration)
                done = iteration + 1
                if self._evaluation_is_due(done):
                    index = self._evaluate(done)
                with self.dist.signals.held():
                    self._checkpoints.save_state(self._mark_resume_point(done))
                self._learning_gate.iteration(done, self._touched, last=done == recipe.train.iterations)
        except RewardError:
            # an unreachable reward service must not cost the hours before it
            self._save_early()
            text = f"The current weights are saved in {self.run.checkpoints}.{self._how_to_resume()}"
            self._emit(Notice("info", text))
            raise
        except KeyboardInterrupt as error:
            self._signal = signal_of(error)
            with self.dist.signals.held():
                index = self._save_early()
            if self._resume_point is not None:
                done = self._resume_point.progress.iteration
            how = "Interrupted" if self._signal == SIGINT else f"Ended by {signal_name(self._signal)}"
            text = f"{how} in iteration {done + 1}: the current weights are saved in {self.run.checkpoints}."
            self._emit(Notice("warning", f"{text}{self._how_to_resume()}"))
        return self._finish(index, done)

    def iterate(self, iteration: int) -> None:
        """One iteration: rollout, rewards, updates, one line of metrics."""
        started = time.perf_counter()
        self._times = {}
        with self._clock("rollout"), self._checkpoints.old_weights():
            local, rollout = self._sampler.sample(iteration)
        with self._clock("decode"):
            images = decode_samples(self.composed, self.sizes, local)
        measured = self._evaluator.diversity(images, rollout.groups, self._sampler.unit)
        with self._clock("reward"):
            total, unit = len(rollout.groups), self._sampler.unit
            rewards = score_samples(self.composed, self.dist, local, images, total, unit)
        if self._sampler.compares_completions(iteration):
            with self._clock("agreement"):
                measured |= self._sampler.completion_agreement(iteration, rewards)
        scored = ScoredRollout(rollout, rewards, advantages(rewards, rollout.groups, self.composed.recipe, iteration))
        with self.dist.signals.held():
            with self._clock("update"):
                self._resume_point = None
                updates = self._update(scored, iteration)
                self._checkpoints.update_old()
            self._finish_iteration(scored, measured, updates, iteration, started)

    def _update(self, scored: ScoredRollout, iteration: int) -> dict[str, float]:
        recipe, policies = self.composed.recipe, self.composed.model.policies
        with self._checkpoints.old_weights():
            self.composed.model.snapshot()
        batch = self.composed.objective.prepare(scored, policies, sub_seed(recipe.train.seed, iteration))
        if not len(batch):
            return {keys.SKIPPED_UPDATES: float(recipe.train.updates_per_iteration), keys.TRAINED_ROWS: 0.0}
        batch = self._replay_gate.admit(batch)
        wanted, kl_limit = recipe.train.updates_per_iteration, recipe.objective.config.kl_limit
        done: list[dict[str, float]] = []
        seed, first = recipe.train.seed + iteration, iteration * wanted
        for logged in self._updater.updates(batch, wanted, seed, kl_limit, first):
            self._touched = iteration + 1
            self._checkpoints.update_ema()
            done.append(logged)
            if self._start:
                movement_gate(movement(self._start, list(self.composed.model.trainable())))
                self._start = {}
        trained = sum(logged.pop("rows") for logged in done)
        by_update = {f"update_{i}/{key}": value for i, logged in enumerate(done) for key, value in logged.items()}
        skipped = float(wanted - len(done))
        return {**by_update, **done[-1], keys.SKIPPED_UPDATES: skipped, keys.TRAINED_ROWS: trained}

    def _finish_iteration(
        self,
        scored: ScoredRollout,
        measured: Mapping[str, float],
        updates: Mapping[str, float],
        iteration: int,
        started: float,
    ) -> None:
        rollout, rewards = scored.rollout, scored.rewards
        metrics: dict[str, float] = {
            keys.ITERATION: iteration + 1,
            **reward_metrics(rewards, rollout.groups),
            **updates,
        }
        rate = self._schedule.rate((iteration + 1) * self.composed.recipe.train.updates_per_iteration - 1)
        if rate is not None:
            metrics[keys.LR] = rate
        metrics |= {**measured, **self._sampler.learn(rollout, rewards)}
        metrics |= {keys.time_of(stage): spent for stage, spent in self._times.items()}
        metrics[keys.TIME_ITERATION] = time.perf_counter() - started
        self._record(metrics)
        self._mark_resume_point(iteration + 1)
        self._emit(IterationDone(iteration + 1, self.composed.recipe.train.iterations, metrics))

    def _begin(self) -> tuple[CheckpointIndex, int]:
        """Evaluates the untouched model, or restores a run; returns its checkpoints and the iterations done."""
        if self.resumed is None:
            recipe = self.composed.recipe
            if recipe.lora.dropout > 0:
                # the only random draw of a run that is not keyed
                torch.manual_seed(recipe.train.seed + self.dist.rank)
            index = self._evaluate(0)
            self._checkpoints.save_state(self._mark_resume_point(0))
            return index, 0
        progress, content = self.resumed.progress, self.resumed.content
        index, self._lines = self._checkpoints.restore(self.resumed)
        self._evaluator.monitor.restore(content["tripwire"])
        # states of versions without branched rollouts have nothing to restore here
        if sampling := content.get("sampling"):
            same = content["run"]["prompts"]["prompts"] == self._checkpoints.live.prompts["prompts"]
            self._sampler.restore(sampling, same_prompts=same)
        self._touched = progress.touched
        # calls of other shapes round differently, so they are checked again
        same_sizes = tuple(progress.sizes) == astuple(self.sizes)
        self._replay_gate.resume(progress.gate_checked if same_sizes else 0, progress.gate_recompute)
        self._start = {} if progress.moved else self._start
        self._mark_resume_point(progress.iteration)
        self._emit(Resumed(progress.iteration, tuple(self._lines)))
        return index, progress.iteration

    def _mark_resume_point(self, done: int) -> ResumePoint:
        """The point after `done` iterations, from which the run can be resumed until the next update."""
        sizes, moved = astuple(self.sizes), not self._start
        progress = Progress(done, self._touched, len(self._lines), sizes, *self._replay_gate.findings, moved=moved)
        monitor, sampling = self._evaluator.monitor.state(), self._sampler.state()
        generators = generator_states(self._checkpoints.live.device)
        self._resume_point = ResumePoint(progress, generators, monitor, sampling)
        return self._resume_point

    def _save_early(self) -> CheckpointIndex:
        """Saves a checkpoint of the current weights and, unless updates are in progress, the state."""
        index = self._checkpoints.checkpoint(self._touched, {})
        if self._resume_point is not None:
            self._checkpoints.save_state(self._resume_point, now=True)
        self._evaluator.show_result(list(self._lines), index.entry(index.best))
        return index

    def _how_to_resume(self) -> str:
        if newest_state(self.run.path) is None:
            return ""
        return f" Resume with: {resume_command(self.run.path, self.composed.recipe)}"

    def _evaluation_is_due(self, done: int) -> bool:
        last = self._lines[-1]
        if last[keys.ITERATION] == done and keys.SCORE in last:
            return False
        return done % self.composed.recipe.eval.every == 0 or done == self.composed.recipe.train.iterations

    def _evaluate(self, iteration: int) -> CheckpointIndex:
        with self._clock("eval"):
            metrics = averaged = self._evaluator.evaluate()
            if self._checkpoints.live.ema is not None:
                # before the first update the average is the untouched base as well
                if iteration > 0:
                    with self._checkpoints.ema_weights():
                        averaged = self._evaluator.evaluate(averaged=True)
                metrics = {**metrics, **averaged_keys(averaged)}
            grid, diversity = self._evaluator.draw(iteration)
        with self.dist.signals.held():
            return self._finish_evaluation(iteration, {**metrics, **diversity}, grid)

    def _finish_evaluation(self, iteration: int, metrics: Mapping[str, float], grid: Path) -> CheckpointIndex:
        verdict = self._evaluator.judge(iteration)
        line = {keys.ITERATION: iteration, **metrics, **verdict.metrics(), keys.TIME_EVAL: self._times["eval"]}
        self._record(line)
        index = self._checkpoints.checkpoint(iteration, metrics, eligible=verdict.eligible)
        self._mark_resume_point(iteration)
        best = index.entry(index.best)
        if best.iteration == iteration > 0 and best.score_key == keys.EMA_SCORE:
            with self._checkpoints.ema_weights():
                self._evaluator.draw_averaged(iteration)
        self._evaluator.show_result(list(self._lines), best)
        self._emit(Evaluated(iteration, line, grid))
        if verdict is self._evaluator.monitor.found:
            self._emit(Notice("warning", verdict.text()))
        return index

    def _finish(self, index: CheckpointIndex, done: int) -> TrainResult:
        evaluations, best = [line for line in self._lines if keys.SCORE in line], index.entry(index.best)
        result = TrainResult.of(self.run, done, evaluations, best, self._evaluator.monitor.found, self._signal)
        if warning := decline(result.initial, result.final, keys.SCORE):
            self._emit(Notice("warning", warning))
        summary = {keys.BEST_ITERATION: float(best.iteration)}
        if best.score is not None:
            summary[keys.BEST_SCORE] = best.score
        self._emit(Finished(self.run.path, result.interrupted, summary))
        return result

    def _facts(self) -> dict[str, str]:
        recipe, shape = self.composed.recipe, self.composed.recipe.rollout
        return {
            "stochasticizer": stochasticizer_of(recipe),
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

    def _emit(self, event: Event) -> None:
        # the terminal itself may have gone away
        with suppress(OSError) if self._signal else nullcontext():
            self.observer(event)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        self.dist.check_stop()
        started = time.perf_counter()
        yield
        if self.composed.model.device.type == "cuda":
            torch.cuda.synchronize(self.composed.model.device)
        self._times[stage] = time.perf_counter() - started
