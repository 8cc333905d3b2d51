"""`fmg doctor run`: what the log says is wrong with a run, and which value to change. Imports no torch.

Every rule reads `metrics.jsonl` and skips a log without its keys. Thresholds are in `LIMITS` and docs/doctor.md; those
of reward hacking are in the run's own recipe.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from fmg.core import metric_keys as keys
from fmg.core.display import counted
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.metrics_log import Lines, MetricsLog
from fmg.data.run_folder import RunFolder, is_run, no_run
from fmg.data.run_metrics import ERRORS, HackingLimits, hacked
from fmg.recipe.sections import EvalSection

Severity = Literal["problem", "note"]

LIMITS: Mapping[str, float] = {
    "kl still": 1e-6,
    "kl far": 1e-2,
    "clip idle": 0.001,
    "clip bound": 0.9,
    "equal groups": 0.5,
    "agreement": 0.5,
    "gradient": 10.0,
    "ratio": 1.5,
    "no score": 0.05,
    "skipped": 0.5,
    "late": 20,
}
"""Thresholds by rule; docs/doctor.md says what each is compared with."""


# of recipes that do not state their objective
_GRPO: Mapping[str, object] = {"name": "grpo", "kl_beta": 0.0, "target_kl": None}


@dataclass(frozen=True)
class Advice:
    """One finding.

    Attributes:
        severity: `problem`: the run does not achieve its goal. `note`: worth knowing.
        sign: what the log shows, with the number and its bound.
        knob: the recipe value, or the flag, to change.
        advice: what to do with it.
    """

    severity: Severity
    sign: str
    knob: str
    advice: str


@dataclass(frozen=True)
class Log:
    """The data that the rules read.

    Attributes:
        iterations, evaluations: the lines of the log.
        limits: the losses that its recipe tolerates.
        jumps: whether its branched rollouts are completed by one jump.
        steps: the rule for their branching steps; `adaptive` if there is only one step.
        objective: the options of its objective, since advice may only name those that it has.
    """

    iterations: Lines
    evaluations: Lines
    limits: HackingLimits
    jumps: bool = True
    steps: str = "first"
    objective: Mapping[str, object] = field(default_factory=lambda: _GRPO)

    @property
    def base_weight(self) -> str | None:
        """The option that weighs the distance to the base; None if the objective has none."""
        names = ("kl_beta", "l2_beta", "base_weight")
        return next((f"objective.{name}" for name in names if name in self.objective), None)

    def late(self, key: str) -> float | None:
        """Median over the second half of the iterations, or None where too few have a number."""
        _, values = self.iterations.columns(key)
        values = values[np.isfinite(values)]
        return float(np.median(values[len(values) // 2 :])) if len(values) else None

    def late_by_step(self, template: str) -> dict[int, float]:
        """`late` of the logged keys of a template, by branching step."""
        steps = {key: step for key in self.iterations.logged() if (step := keys.step_of(key, template)) is not None}
        found = {step: self.late(key) for key, step in steps.items()}
        return {step: value for step, value in sorted(found.items()) if value is not None}

    def change(self, key: str) -> tuple[float, float] | None:
        """Last evaluation minus the first, and its standard error for independent images; NaN for single images."""
        _, scores, errors = self.evaluations.columns(key, keys.error_of(key))
        if len(scores) < 2:
            return None
        return float(scores[-1] - scores[0]), math.hypot(errors[0], errors[-1])

    @property
    def risen(self) -> bool:
        """Whether the held-out score has risen by more than its error."""
        change = self.change(keys.SCORE)
        return change is not None and change[0] > ERRORS * change[1]


def examine_run(run: str | Path) -> list[Advice]:
    """The findings for a run folder; empty when nothing is wrong.

    Raises:
        UsageError: it is not a run folder, or its log is empty.
        CheckpointError: a line of the log, or the recipe, is damaged.
    """
    folder = RunFolder(Path(run))
    if not is_run(folder.path):
        raise no_run(folder.path)
    folder.state()
    metrics = MetricsLog.read(folder.metrics, strict=True)
    if not metrics.iterations and not metrics.evaluations:
        raise UsageError(f"'{folder.metrics}' has no lines yet", "Wait for the first evaluation of the run.")
    return examine_log(_log_of(folder, metrics))


def _log_of(run: RunFolder, metrics: MetricsLog) -> Log:
    values = run.values()

    def section(name: str) -> Mapping[str, object]:
        stated = values.get(name)
        return stated if isinstance(stated, dict) else {}

    def limit(name: str) -> float:
        value = section("eval").get(name, EvalSection.model_fields[name].default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise CheckpointError(f"'{run.recipe}' is damaged (eval.{name} is not a number)", "Restore it from a copy.")
        return float(value)

    branch = section("rollout").get("branch")
    options = branch if isinstance(branch, dict) else {}
    return Log(
        metrics.iterations,
        metrics.evaluations,
        HackingLimits(limit("hacking_tolerance"), limit("min_diversity")),
        jumps=options.get("completion", "jump") == "jump",
        steps="adaptive" if section("rollout").get("steps") == 2 else str(options.get("steps", "first")),
        objective=section("objective") or _GRPO,
    )


def examine_log(log: Log) -> list[Advice]:
    """The findings for a log, problems first."""
    found = [advice for rule in RULES for advice in rule(log)]
    return sorted(found, key=lambda advice: advice.severity != "problem")


def _numbers(log: Log) -> Iterator[Advice]:
    for kind, names in ((log.iterations, (keys.REWARD, keys.LOSS, keys.GRAD_NORM)), (log.evaluations, (keys.SCORE,))):
        broken = []
        for key in names:
            places, at, values = kind.columns("iteration", key)
            broken += [(places[i], key, at[i]) for i in np.flatnonzero(~np.isfinite(values))[:1]]
        if broken:
            _, key, iteration = min(broken, key=lambda one: one[0])
            sign = f"{key} is not a finite number in iteration {iteration:.0f}"
            text = "Lower optimizer.lr; in bf16 also try --dtype fp32. The best checkpoint is older and usable."
            yield Advice("problem", sign, "optimizer.lr", text)
            return


def _still(log: Log) -> Iterator[Advice]:
    kl, limit = log.late(keys.APPROX_KL), LIMITS["kl still"]
    if kl is not None and kl < limit and not log.risen:
        sign = f"The policy hardly moves: KL per update {kl:.1e}, below {limit:.0e}"
        text = "Raise optimizer.lr in steps of 3x until the KL is about 1e-4"
        text += "." if log.objective.get("name") == "reinforce" else ", or raise train.updates_per_iteration."
        yield Advice("problem", sign, "optimizer.lr", text)


def _far(log: Log) -> Iterator[Advice]:
    kl, limit = log.late(keys.APPROX_KL), LIMITS["kl far"]
    if kl is not None and kl > limit:
        sign = f"Every update moves the policy too far: KL {kl:.1e}, above {limit:.0e}"
        text = "Lower optimizer.lr"
        text += ", or skip updates past a KL with objective.target_kl." if "target_kl" in log.objective else "."
        yield Advice("problem", sign, "optimizer.lr", text)


def _clip(log: Log) -> Iterator[Advice]:
    clipped, kl = log.late(keys.CLIP_FRACTION), log.late(keys.APPROX_KL)
    if clipped is None:
        return
    if log.objective.get("kl_mask") is not None:
        # the share of masked rows then; none at all is how a run within its limit looks
        if clipped > LIMITS["clip bound"]:
            sign = f"Nearly everything is masked: {clipped:.0%} of the rows, above {LIMITS['clip bound']:.0%}"
            text = "Raise objective.kl_mask 3x to 10x, or lower optimizer.lr: most of the rollout teaches nothing."
            yield Advice("problem", sign, "objective.kl_mask", text)
    elif clipped > LIMITS["clip bound"]:
        sign = f"Nearly everything is clipped: {clipped:.0%} of the rows, above {LIMITS['clip bound']:.0%}"
        text = "Widen objective.clip_range 3x to 10x, or lower optimizer.lr: most of the rollout teaches nothing."
        yield Advice("problem", sign, "objective.clip_range", text)
    elif clipped < LIMITS["clip idle"] and kl is not None and kl >= LIMITS["kl still"]:
        sign = f"Clipping hardly ever happens: {clipped:.1%} of the rows, below {LIMITS['clip idle']:.1%}"
        yield Advice(
            "note", sign, "objective.clip_range", "Narrow objective.clip_range if runs with other seeds diverge."
        )


def _equal_groups(log: Log) -> Iterator[Advice]:
    share, limit = log.late(keys.ZERO_STD_RATIO), LIMITS["equal groups"]
    # the gradient of a reward needs no difference between images
    if share is not None and share > limit and log.objective.get("name") != "reward-gradient":
        sign = (
            f"{share:.0%} of the groups give no gradient, above {limit:.0%}: all of their images have the same reward"
        )
        by_step = log.late_by_step(keys.STEP_ZERO_STD_RATIO) if log.steps != "adaptive" else {}
        differs = bool(by_step) and min(by_step.values()) <= limit
        if differs or (by_step and log.steps == "first" and not log.risen):
            shares = ", ".join(f"{value:.0%} of those that branch at step {step}" for step, value in by_step.items())
            text = "siblings of later steps, which this run never tries, may differ."
            if differs:
                text = "groups then go to the steps whose siblings' rewards differ."
            severity: Severity = "note" if log.risen else "problem"
            yield Advice(
                severity, f"{sign} ({shares})", "rollout.branch.steps", f"Set rollout.branch.steps to adaptive: {text}"
            )
            return
        text = "Raise rollout.group_size, or use a reward with more values (soft, not strict) or easier prompts."
        if log.risen:
            text = "The task may be solved: use harder prompts, or stop."
        yield Advice("note" if log.risen else "problem", sign, "rollout.group_size", text)


def _agreement(log: Log) -> Iterator[Advice]:
    agreement, limit = log.late(keys.COMPLETION_AGREEMENT), LIMITS["agreement"]
    if log.jumps and agreement is not None and agreement < limit:
        sign = f"One jump ranks siblings differently from the full grid: correlation {agreement:.2f}, below {limit:g}"
        text = "Set rollout.branch.completion to grid, so that the rewarded images are those of the sampler."
        yield Advice("note" if log.risen else "problem", sign, "rollout.branch.completion", text)


def _gradient(log: Log) -> Iterator[Advice]:
    norm, limit = log.late(keys.GRAD_NORM), LIMITS["gradient"]
    if norm is not None and norm > limit:
        sign = f"Gradients are large: norm {norm:.3g} before clipping, above {limit:g}"
        yield Advice(
            "note",
            sign,
            "train.max_grad_norm",
            "Every update is clipped to this norm: tune it together with optimizer.lr.",
        )


def _ratio(log: Log) -> Iterator[Advice]:
    ratio, limit = log.late(keys.RATIO_MAX), LIMITS["ratio"]
    if ratio is not None and ratio > limit:
        sign = f"Some policy ratios explode: largest {ratio:.3g}, above {limit:g}"
        text = "Lower optimizer.lr; if the steps differ a lot in noise, try --objective grpo-guard."
        yield Advice("problem", sign, "optimizer.lr", text)


def _no_score(log: Log) -> Iterator[Advice]:
    # the key is there only where images were dropped
    shares, limit = log.iterations.columns(keys.REWARD_DROPPED)[1], LIMITS["no score"]
    dropped = float(shares.sum()) / max(1, len(log.iterations))
    if dropped > limit:
        sign = f"{dropped:.0%} of the images have no score, above {limit:.0%}"
        yield Advice("problem", sign, "rewards", "Check the reward service: `fmg doctor rewards NAME`.")


def _skipped(log: Log) -> Iterator[Advice]:
    skipped, limit = log.late(keys.SKIPPED_UPDATES), LIMITS["skipped"]
    if skipped is not None and skipped > limit:
        sign = f"Updates are skipped: {skipped:g} per iteration, above {limit:g}"
        if "target_kl" not in log.objective:
            yield Advice("note", sign, "rollout.group_size", "All groups had equal rewards. Use larger groups.")
            return
        text = "Raise objective.target_kl or lower optimizer.lr. If target_kl is not set, all groups had equal rewards."
        yield Advice("note", sign, "objective.target_kl", text)


def _decline(log: Log) -> Iterator[Advice]:
    change = log.change(keys.SCORE)
    if change is not None and change[0] < -ERRORS * change[1]:
        # equal scores of all images have no error
        size = f"which is {-change[0] / change[1]:.1f} standard errors" if change[1] else "equally for every image"
        sign = f"The held-out score fell by {-change[0]:.3f}, {size}"
        text = "Lower optimizer.lr, or raise rollout.groups."
        if log.base_weight is not None:
            text = f"Lower optimizer.lr, raise rollout.groups, or raise {log.base_weight}."
        yield Advice("problem", sign, "optimizer.lr", text)


def _flat(log: Log) -> Iterator[Advice]:
    change, kl = log.change(keys.SCORE), log.late(keys.APPROX_KL)
    moves = kl is None or kl >= LIMITS["kl still"]
    if change is None or not moves or len(log.iterations) < LIMITS["late"]:
        return
    if abs(change[0]) <= ERRORS * change[1]:
        sign = (
            f"After {counted(len(log.iterations), 'iteration')} the held-out score has not moved: {change[0]:+.3f}"
            f" with a standard error of {change[1]:.3f}, although the policy has"
        )
        text = (
            "Raise rollout.groups: advantages from few images are noisy. Check that the reward varies and that"
            " train.shuffle_advantages is off."
        )
        yield Advice("problem", sign, "rollout.groups", text)


def _gap(log: Log) -> Iterator[Advice]:
    """What the reward-hacking monitor found, by its own rule, in the first evaluation that shows it."""
    found = ((line, lost) for line in log.evaluations if (lost := list(hacked(line, log.limits))))
    line, lost = next(found, ({}, []))
    for name, loss in lost:
        what, unit = f"'{name}', which is not trained, fell", "standard deviations"
        if name == keys.DIVERSITY:
            what, unit = "The images of a prompt became too similar", "of their diversity"
        when = f"by iteration {line['iteration']:.0f} while the trained reward rose"
        sign = f"{what} {when}: by {loss.value:.2f} ± {loss.error:.2f} {unit}, limit {log.limits.of(name):g}"
        text = "The reward is being hacked: train with --stop-on-hacking, or add that reward with a weight"
        text += (
            "." if log.base_weight is None else f" or a term that keeps the policy near the base ({log.base_weight})."
        )
        yield Advice("problem", sign, log.base_weight or "eval.stop_on_hacking", text)


def _average(log: Log) -> Iterator[Advice]:
    if not log.evaluations or keys.EMA_SCORE not in log.evaluations[-1]:
        return
    last = log.evaluations[-1]
    behind = last[keys.SCORE] - last[keys.EMA_SCORE]
    if behind > ERRORS * math.hypot(
        last.get(keys.error_of(keys.SCORE), math.nan), last.get(keys.error_of(keys.EMA_SCORE), math.nan)
    ):
        sign = f"The moving average scores {behind:.3f} below the raw weights"
        yield Advice("note", sign, "train.ema_decay", "Lower train.ema_decay: the run is too short for this average.")


RULES: tuple[Callable[[Log], Iterator[Advice]], ...] = (
    _numbers,
    _still,
    _far,
    _clip,
    _equal_groups,
    _agreement,
    _ratio,
    _gradient,
    _no_score,
    _skipped,
    _decline,
    _flat,
    _gap,
    _average,
)
