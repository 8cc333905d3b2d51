from __future__ import annotations

from fmg.registry.resolve import resolve
from fmg.training.plan import plan

SHAPE = [
    "eval.every=3",
    "eval.num=11",
    "rollout.groups=3",
    "rollout.group_size=5",
    "rollout.steps=4",
    "train.iterations=7",
]


def test_counts_of_a_run_with_transitions() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-endpoint"}, SHAPE)).facts
    assert facts["images an iteration"] == "15 (3 prompts x 5)"
    assert facts["transitions an image"] == "3"
    assert facts["network calls an iteration"] == "60 in the rollout, 45 in the updates"
    assert facts["images in all"] == "105 in 7 iterations"
    # iterations 0, 3, 6 and 7
    assert facts["evaluations"] == "4 x 11 images"


def test_a_stochasticizer_with_two_calls_doubles_its_transitions() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, SHAPE)).facts
    assert facts["network calls an iteration"] == "105 in the rollout, 90 in the updates"


def test_steps_outside_a_window_are_not_replayed_and_cost_one_call() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, [*SHAPE, "rollout.window={size: 1}"])).facts
    assert facts["transitions an image"] == "1"
    assert facts["network calls an iteration"] == "75 in the rollout, 30 in the updates"


def test_an_objective_on_samples_has_no_transitions() -> None:
    facts = plan(resolve(None, {"objective": "rwfm"}, SHAPE)).facts
    assert "transitions an image" not in facts
    assert facts["network calls an iteration"] == "60 in the rollout"
