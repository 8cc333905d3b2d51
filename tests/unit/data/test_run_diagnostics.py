"""`fmg doctor run` on synthetic logs: each sign leads to its option, and a healthy log to no finding."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError
from fmg.data.metrics_log import MetricsLog
from fmg.data.run_diagnostics import LIMITS, RULES, Advice, Log, examine_log, examine_run
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import HackingLimits
from fmg.recipe import Recipe
from fmg.training.checkpointing import metrics_until
from tests.support.cli import fmg

Lines = list[dict[str, object]]

LIMITS_OF_RECIPE = HackingLimits(tolerance=0.15, min_diversity=0.1)
HEALTHY: dict[str, object] = {
    "approx_kl": 2e-4,
    "clip_frac": 0.3,
    "zero_std_ratio": 0.05,
    "grad_norm": 0.4,
    "ratio_max": 1.01,
    "loss": 0.0,
    "skipped_updates": 0.0,
}


def log(iterations: int = 30, scores: tuple[float, float] = (0.5, 0.7), **changes: object) -> Lines:
    """A run with two evaluations; `changes` replace values of every iteration, `last_...` of the last evaluation."""
    final = {key.removeprefix("last_"): value for key, value in changes.items() if key.startswith("last_")}
    values = HEALTHY | {key: value for key, value in changes.items() if not key.startswith("last_")}
    first, last = ({"eval/score": score, "eval/score_se": 0.01} for score in scores)
    lines: Lines = [{"iteration": 0, **first}]
    lines += [{"iteration": i + 1, "reward/mean": 0.5 + 0.005 * i, **values} for i in range(iterations)]
    lines.append({"iteration": iterations, **last, **{key.replace("__", "/"): value for key, value in final.items()}})
    return lines


def signs(lines: Lines) -> list[tuple[str, str]]:
    return [(advice.severity, advice.knob) for advice in found(lines)]


def found(lines: Lines) -> list[Advice]:
    """As read from a file, where null is NaN."""
    numbers = [{key: math.nan if value is None else float(str(value)) for key, value in x.items()} for x in lines]
    metrics = MetricsLog.of(numbers)
    return examine_log(Log(metrics.iterations, metrics.evaluations, LIMITS_OF_RECIPE))


HACKED = {
    "last_watch__trained_gain": 2.0,
    "last_watch__trained_gain_se": 0.05,
    "last_watch__shapes-quality_loss": 0.3,
    "last_watch__shapes-quality_loss_se": 0.04,
    "last_watch__diversity_loss": 0.6,
    "last_watch__diversity_loss_se": 0.01,
}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (log(), []),
        (log(scores=(0.5, 0.5), approx_kl=1e-7), [("problem", "optimizer.lr")]),
        # such a small KL is not a fault in a run that learns
        (log(approx_kl=1e-7), []),
        (log(approx_kl=0.05), [("problem", "optimizer.lr")]),
        (log(clip_frac=0.97), [("problem", "objective.clip_range")]),
        (log(clip_frac=0.0), [("note", "objective.clip_range")]),
        (log(scores=(0.5, 0.5), zero_std_ratio=0.8, iterations=5), [("problem", "rollout.group_size")]),
        # solved
        (log(scores=(0.5, 0.99), zero_std_ratio=0.8), [("note", "rollout.group_size")]),
        (log(ratio_max=3.0), [("problem", "optimizer.lr")]),
        (log(grad_norm=50.0), [("note", "train.max_grad_norm")]),
        (log(**{"reward/dropped": 0.2}), [("problem", "rewards")]),
        (log(skipped_updates=1.0), [("note", "objective.target_kl")]),
        (log(scores=(0.7, 0.6)), [("problem", "optimizer.lr")]),
        (log(scores=(0.5, 0.51)), [("problem", "rollout.groups")]),
        # too early to say
        (log(scores=(0.5, 0.51), iterations=8), []),
        (log(**HACKED), [("problem", "objective.kl_beta")]),
        (log(**{**HACKED, "last_watch__shapes-quality_loss_se": 0.2}), []),
        # beyond nothing, and within the tolerance of the recipe
        (log(**{**HACKED, "last_watch__shapes-quality_loss": 0.12, "last_watch__shapes-quality_loss_se": 0.02}), []),
        # both fell: a decline, not hacking
        (
            log(
                **HACKED, **{"last_watch__shapes-quality_trained": -0.4, "last_watch__shapes-quality_trained_se": 0.05}
            ),
            [],
        ),
        (log(**{**HACKED, "last_watch__diversity_loss": 0.95}), [("problem", "objective.kl_beta")] * 2),
        (log(**{**HACKED, "last_watch__trained_gain": 0.1}), []),
        (log(**{"last_eval_ema__score": 0.6, "last_eval_ema__score_se": 0.01}), [("note", "train.ema_decay")]),
        (log(loss=None, grad_norm=None), []),
        (log(**{"last_eval__score": None}), [("problem", "optimizer.lr")]),
    ],
)
def test_a_sign_leads_to_its_option(lines: Lines, expected: list[tuple[str, str]]) -> None:
    if lines[5].get("loss", 0.0) is None:
        expected = [("problem", "optimizer.lr")]
    assert signs(lines) == expected


BRANCHED = {
    "rollout.kind": "branch",
    "rollout.steps": 4,
    "rollout.branch.steps": "first",
    "rollout.branch.completion": "jump",
}
SATURATED = {"zero_std_ratio": 0.8, "branch/zero_std_ratio_0": 0.9}


@pytest.mark.parametrize(
    ("lines", "knob"),
    [
        # steps with varying rewards are distinguished from the one without
        (log(scores=(0.5, 0.5), iterations=5, **SATURATED, **{"branch/zero_std_ratio_2": 0.1}), "rollout.branch.steps"),
        (log(**SATURATED), "rollout.group_size"),
        # no step varies
        (log(**SATURATED, **{"branch/zero_std_ratio_1": 0.9}), "rollout.group_size"),
        # equal groups at later steps alone are not a fault
        (log(zero_std_ratio=0.3, **{"branch/zero_std_ratio_0": 0.1, "branch/zero_std_ratio_1": 1.0}), None),
        (log(**{"branch/completion_agreement": 0.3}), "rollout.branch.completion"),
        (log(**{"branch/completion_agreement": 0.8}), None),
    ],
)
def test_signs_of_branched_runs(lines: Lines, knob: str | None) -> None:
    assert [name for _, name in signs(lines)] == ([knob] if knob else [])


def test_shares_of_equal_groups_are_shown_by_step() -> None:
    (advice,) = found(log(**SATURATED, **{"branch/zero_std_ratio_2": 0.1}))
    assert advice.severity == "note"
    assert advice.sign.endswith("(90% of those that branch at step 0, 10% of those that branch at step 2)")


@pytest.mark.parametrize(
    ("options", "scores", "change", "knobs"),
    [
        ({}, (0.5, 0.7), {"branch/completion_agreement": 0.3}, ["rollout.branch.completion"]),
        ({"rollout.branch.completion": "grid"}, (0.5, 0.7), {"branch/completion_agreement": 0.3}, []),
        # only the first step was tried
        ({}, (0.5, 0.5), SATURATED, ["rollout.branch.steps"]),
        ({"rollout.branch.steps": "adaptive"}, (0.5, 0.5), SATURATED, ["rollout.group_size"]),
        # adaptive groups stay at a step for its floor
        (
            {"rollout.branch.steps": "adaptive"},
            (0.5, 0.5),
            {**SATURATED, "branch/zero_std_ratio_2": 0.1},
            ["rollout.group_size"],
        ),
        (
            {"rollout.branch.steps": "cycle"},
            (0.5, 0.5),
            {**SATURATED, "branch/zero_std_ratio_2": 0.1},
            ["rollout.branch.steps"],
        ),
        ({"rollout.steps": 2}, (0.5, 0.5), SATURATED, ["rollout.group_size"]),
    ],
)
def test_what_a_branched_run_could_change_is_read_from_its_recipe(
    options: dict[str, object],
    scores: tuple[float, float],
    change: dict[str, object],
    knobs: list[str],
    tmp_path: Path,
) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    run.recipe.write_text(Recipe.default(**{**BRANCHED, **options}).to_yaml())
    for line in log(iterations=5, scores=scores, **change):
        run.append_metrics(line)
    assert [advice.knob for advice in examine_run(run.path)] == knobs


@pytest.mark.parametrize(
    ("objective", "change", "knobs", "advice"),
    [
        ({"name": "grpo", "kl_mask": 1e-6}, {"clip_frac": 0.97}, ["objective.kl_mask"], "Raise objective.kl_mask"),
        # within the limit nothing is masked
        ({"name": "grpo", "kl_mask": 1e-6}, {"clip_frac": 0.0}, [], ""),
        ({"name": "grpo-guard"}, {"clip_frac": 0.97}, ["objective.clip_range"], "Widen"),
        ({"name": "reward-gradient"}, {"zero_std_ratio": 0.8}, [], ""),
        ({"name": "reward-gradient"}, HACKED, ["objective.l2_beta"], "objective.l2_beta"),
        ({"name": "mean-flow-advantage"}, {"scores": (0.7, 0.6)}, ["optimizer.lr"], "objective.base_weight"),
        ({"name": "awm"}, {"skipped_updates": 1.0}, ["rollout.group_size"], "equal rewards"),
        ({"name": "reinforce"}, HACKED, ["eval.stop_on_hacking"], "--stop-on-hacking"),
        ({"name": "reinforce"}, {"approx_kl": 0.05}, ["optimizer.lr"], "Lower optimizer.lr."),
    ],
)
def test_advice_names_only_options_that_the_objective_has(
    objective: dict[str, object], change: dict[str, object], knobs: list[str], advice: str, tmp_path: Path
) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    kind = "branch" if str(objective["name"]) in ("grpo", "grpo-guard", "reinforce") else "chain"
    fits = {"rollout.kind": kind, "train.updates_per_iteration": 1, "rewards": ["shapes-clip"]}
    recipe = Recipe.default(None, **{"objective": objective, **fits})
    run.recipe.write_text(recipe.to_yaml())
    for line in log(**change):  # type: ignore[arg-type]
        run.append_metrics(line)
    found = examine_run(run.path)
    assert [one.knob for one in found] == knobs
    assert all(advice in one.advice for one in found)
    for one in found:
        options = [word for word in one.advice.replace("(", " ").split() if word.startswith("objective.")]
        assert {word.strip(".,:)").removeprefix("objective.") for word in options} <= dict(
            recipe.objective.config
        ).keys()


def test_scores_that_are_equal_for_all_images_have_no_error_to_divide_by() -> None:
    lines = log(scores=(0.7, 0.6))
    lines[0]["eval/score_se"] = lines[-1]["eval/score_se"] = 0.0
    (advice,) = found(lines)
    assert advice.sign == "The held-out score fell by 0.100, equally for every image"
    assert signs(log(scores=(0.7, 0.7), iterations=5)) == []


def test_a_score_whose_error_is_unknown_is_not_judged() -> None:
    averaged = log(scores=(0.7, 0.6), **{"last_eval_ema__score": 0.1})
    averaged[0]["eval/score_se"] = averaged[-1]["eval/score_se"] = None
    assert signs(averaged) == []


@pytest.mark.parametrize("damage", ['{"iteration": 1, "loss": "NaN?"}', '{"iteration": [1]}', '{"loss": 1.0}'])
def test_a_line_that_is_not_numbers_is_named(tmp_path: Path, damage: str) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    run.metrics.write_text('{"iteration": 0, "eval/score": null}\n' + damage + "\n")
    for reads in (lambda: examine_run(run.path), lambda: metrics_until(run, 2)):
        with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: the line is damaged"):
            reads()
    run.metrics.write_text('{"iteration": 0, "loss": null}\n')
    (line,) = metrics_until(run, 1)
    assert math.isnan(line["loss"])


def test_hacking_is_reported_where_the_monitor_found_it() -> None:
    lines = log(**HACKED)
    lines.append({**lines[0], "iteration": 40, "eval/score": 0.7})
    (advice,) = found(lines)
    assert "by iteration 30" in advice.sign
    assert "0.30 ± 0.04 standard deviations, limit 0.15" in advice.sign


def test_the_limits_are_those_of_the_run(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in log(**HACKED)))
    for stated, problems in (
        ("train: {seed: 1}", 1),
        ("eval: {hacking_tolerance: 0.5}", 0),
        ("eval: {min_diversity: 0.5}", 2),
    ):
        run.recipe.write_text(stated)
        assert len(examine_run(run.path)) == problems, stated
    for damaged in ("eval: {hacking_tolerance: much}", "eval: [", "- 1"):
        run.recipe.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"recipe.yaml' is damaged"):
            examine_run(run.path)


def test_problems_come_first() -> None:
    severities = [severity for severity, _ in signs(log(grad_norm=50.0, clip_frac=0.97, skipped_updates=1.0))]
    assert severities == ["problem", "note", "note"]


def test_an_empty_and_a_young_log_say_nothing() -> None:
    assert signs([]) == []
    assert signs(log()[:1]) == []
    assert signs(log()[1:3]) == []


def test_the_page_states_every_threshold() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "doctor.md").read_text(encoding="utf-8")
    for name, limit in LIMITS.items():
        shown = f"{limit:.0e}".replace("e-0", "e-") if limit < 1e-3 else f"{limit:g}"
        assert f"| {name} | {shown} |" in page
    assert len(RULES) >= 10


def test_the_command(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in log(clip_frac=0.97)))
    shown = fmg("doctor", "run", str(run.path))
    assert shown.code == 1
    assert "objective.clip_range" in shown.stdout
    (advice,) = json.loads(fmg("doctor", "run", str(run.path), "--json").stdout)
    assert advice["severity"] == "problem"
    run.metrics.write_text("".join(json.dumps(line) + "\n" for line in log()))
    assert fmg("doctor", "run", str(run.path)).stdout == "The log shows no problem.\n"
