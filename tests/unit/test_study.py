"""The head-to-head study of `benchmarks/study.py`: its search, its resumption and what its tables say."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import scipy.stats

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("study")


@pytest.fixture
def report(study: ModuleType) -> ModuleType:
    return importlib.import_module("study_report")


def entry(study: ModuleType, arm: str, kind: str, seed: int, lr: float, scores: list[float]) -> dict[str, Any]:
    points = [
        {"iteration": 2.0 * i, "nfe": 100.0 * i, "seconds": 1.0 * i, "score": s, "quality": 1 - s, "diversity": s / 10}
        for i, s in enumerate(scores)
    ]
    return {
        "world": "shapes", "arm": arm, "kind": kind, "seed": seed, "lr": lr, "values": study.values_of("shapes", arm),
        "images": 384, "stopped": None, "kept": {}, "points": points, "iteration_s": [0.5] * (2 * len(scores) - 2),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("scores", "fourth"),
    [((0.3, 0.9, 0.8), 5.5e-3), ((0.8, 0.9, 0.3), 1.7e-3), ((0.9, 0.8, 0.3), 3e-4), ((0.3, 0.8, 0.9), 3e-2)],
)
def test_the_fourth_trial_is_beside_the_best(study: ModuleType, scores: tuple[float, ...], fourth: float) -> None:
    assert study.fourth_rate(dict(zip(study.RATES, scores, strict=True))) == pytest.approx(fourth)


def test_an_arm_runs_with_the_rate_its_search_found_and_the_null_with_that_of_its_arm(
    study: ModuleType, tmp_path: Path
) -> None:
    out = tmp_path / "study.json"
    rates = [*study.RATES, 5.5e-3]
    scores = [0.3, 0.8, 0.7, 0.9]
    trials = [
        entry(study, "branch", "trial", study.SEARCH_SEED, r, [0.3, s]) for r, s in zip(rates, scores, strict=True)
    ]
    study.store(out, [*trials[:3], entry(study, "branch", "run", 0, 5.5e-3, [0.3, 0.9])])
    pairs = [("shapes", "branch"), ("shapes", "null")]
    schedule = study.Schedule(pairs, [0, 1], study.finished(out))
    assert list(schedule.ready()) == [("shapes", "branch", "trial", study.SEARCH_SEED, 5.5e-3)]
    schedule.done[study.key_of(trials[3])] = trials[3]
    assert [key[1:] for key in schedule.ready()] == [
        ("null", "run", 0, 5.5e-3), ("branch", "run", 1, 5.5e-3), ("null", "run", 1, 5.5e-3),
    ]  # fmt: skip


def test_units_of_an_arm_that_has_changed_are_done_again(study: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "study.json"
    kept, changed = (entry(study, "branch", "run", seed, 1e-3, [0.3, 0.9]) for seed in (0, 1))
    study.store(out, [kept, {**changed, "values": {"rollout.kind": "chain"}}])
    assert [key[3] for key in study.finished(out)] == [0]


def test_every_arm_exists_in_a_world_or_is_refused_with_a_reason(study: ModuleType) -> None:
    refused = {arm: study.refusal("scm", arm) for arm in study.ARMS}
    assert refused["branch"] is None
    assert "needs a two-time map" in refused["branch-flow-sde"]
    assert refused["branch-endpoint"] == "the same recipe as 'branch'"
    assert not any(study.refusal("shapes", arm) for arm in study.ARMS)


def test_intervals_are_those_of_students_t(report: ModuleType) -> None:
    values = [0.91, 0.95, 0.88, 0.97, 0.9]
    low, high = scipy.stats.t.interval(0.95, 4, loc=scipy.stats.tmean(values), scale=scipy.stats.sem(values))
    centre, half = report.interval(values)
    assert (centre - half, centre + half) == (pytest.approx(low, rel=1e-3), pytest.approx(high, rel=1e-3))
    # more seeds than the table has
    many = [*values, *values, *values]
    _, exact = scipy.stats.t.interval(0.95, 14, loc=0, scale=scipy.stats.sem(many))
    assert exact <= report.interval(many)[1] <= 1.1 * exact


def test_the_winner_of_a_budget_is_told_apart_only_where_the_seeds_do(study: ModuleType, report: ModuleType) -> None:
    runs = {
        "branch": [[0.3, 0.8, 0.9], [0.3, 0.82, 0.92], [0.3, 0.81, 0.91]],
        "chain": [[0.3, 0.5, 0.9], [0.3, 0.52, 0.89], [0.3, 0.51, 0.93]],
        "null": [[0.3, 0.3, 0.3], [0.3, 0.31, 0.29], [0.3, 0.29, 0.31]],
    }
    entries = [
        entry(study, arm, "run", seed, 1e-3, scores) for arm, seeds in runs.items() for seed, scores in enumerate(seeds)
    ]
    rows = [line.split(" | ") for line in report.winners_table(report.curves_of(entries, "shapes")).splitlines()[2:]]
    half_way, end = rows[3], rows[4]
    assert half_way[1:] == ["`branch`", "0.810 ± 0.025", "none |"]
    assert end[3] in ("`branch` |", "`chain` |")


def test_runs_that_a_gate_stopped_are_counted_beside_the_means_of_the_others(
    study: ModuleType, report: ModuleType
) -> None:
    whole = [entry(study, "branch", "run", seed, 1e-2, [0.3, 0.9]) for seed in (0, 1)]
    entries = [*whole, {**entry(study, "branch", "run", 2, 1e-2, [0.3]), "stopped": "The loss is nan"}]
    (row,) = report.end_table(entries, "shapes", report.curves_of(entries, "shapes")).splitlines()[2:]
    assert row.split(" | ")[1:3] == ["2 (1 stopped)", "0.900 ± 0.000"]


def test_a_slow_judge_scores_the_kept_checkpoint_alone(study: ModuleType, report: ModuleType) -> None:
    assert study.values_of("text", "branch")["eval.rewards"] == []
    kept = {f"ocr-logp_exact@{steps}": 0.9 for steps in study.KEPT_STEPS}
    kept |= {"ocr_exact@4": 0.875, "diversity_within_prompts@4": 0.01}
    run = {**entry(study, "branch", "run", 0, 1e-2, [0.3, 0.9]), "world": "text", "kept": kept}
    head, _, row = (
        line.strip("| ").split(" | ")
        for line in report.end_table([run], "text", report.curves_of([run], "text")).splitlines()
    )
    assert row[head.index("kept, `ocr` exact")] == "0.875"


def test_quality_is_compared_where_the_curves_cross_a_score(study: ModuleType, report: ModuleType) -> None:
    entries = [
        entry(study, "branch", "run", 0, 1e-3, [0.3, 0.6, 0.8]),
        entry(study, "null", "run", 0, 1e-3, [0.3, 0.3, 0.3]),
    ]
    first, second = report.equal_reward_table(report.curves_of(entries, "shapes")).splitlines()[2:]
    assert first.split(" | ")[1:5] == ["1", "0.150", "0.300", "2.333"]
    assert second.split(" | ")[1:5] == ["0", "-", "-", "-"]
