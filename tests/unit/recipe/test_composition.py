"""Components that do not fit together are refused before any weight is read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fmg.core.errors import CompositionError, UsageError
from fmg.core.specs import Requirements
from fmg.recipe import resolve
from fmg.recipe.composition import check_target_times
from fmg.registry import stochasticizers

Write = Callable[[str | bytes], Path]
NEEDS_TWO_TIMES = ["asfmc", "asfmc-euler", "flow-sde", "dance-sde", "cps"]

CHAIN = ["rollout.kind=chain"]


@pytest.mark.parametrize("name", NEEDS_TWO_TIMES)
def test_single_time_maps_have_no_interior_anchor_and_no_velocity(name: str) -> None:
    with pytest.raises(CompositionError) as caught:
        resolve(None, {"model": "single-time", "stochasticizer": name})
    text = str(caught.value)
    assert text.startswith(f"--stochasticizer: The stochasticizer '{name}' needs a two-time map, but 'single-time' is")
    assert "'asfmc-endpoint' (--stochasticizer auto)" in text
    assert caught.value.exit_code == 2


@pytest.mark.parametrize("name", ["asfmc-euler", "flow-sde", "dance-sde", "cps"])
def test_linear_path_only(name: str) -> None:
    with pytest.raises(CompositionError, match=f"'{name}' needs the linear path, but 'trig' is on trig"):
        resolve(None, {"model": "trig", "stochasticizer": name})


def test_every_stochasticizer_fits_a_two_time_map_on_the_linear_path() -> None:
    for name in stochasticizers.names():
        assert resolve(None, {"model": "two-time", "stochasticizer": name}).recipe.stochasticizer.name == name


def test_exact_asfmc_and_the_endpoint_fit_the_trig_path() -> None:
    for name in ("asfmc", "asfmc-endpoint"):
        resolve(None, {"model": "trig", "stochasticizer": name})


def test_one_step_has_no_stochastic_transition() -> None:
    with pytest.raises(CompositionError, match=r"^--steps: The objective 'grpo' needs a stochastic transition"):
        resolve(None, {"model": "two-time", "steps": 1})
    assert resolve(None, {"model": "two-time", "steps": 1, "objective": "rwfm"}, CHAIN).recipe.rollout.steps == 1


@pytest.mark.parametrize(
    ("model", "objective", "what", "fix"),
    [
        ("single-time", "meanflow-nft", "needs a two-time map, but the model is a single-time map", "diffusion-nft"),
        ("single-time", "mean-flow-advantage", "needs a two-time map", "awm"),
        ("velocity", "meanflow-nft", "needs a two-time map, but the model is a velocity map", "diffusion-nft"),
        ("trig", "diffusion-nft", "has no velocity target on the path 'trig'", "Use a model on the linear path"),
        ("trig", "rwfm", "has no velocity target on the path 'trig'", "Use a model on the linear path"),
    ],
)
def test_an_objective_on_samples_is_refused_where_it_is_not_defined(
    model: str, objective: str, what: str, fix: str
) -> None:
    with pytest.raises(CompositionError) as caught:
        resolve(None, {"model": model, "objective": objective}, CHAIN)
    assert f"The objective '{objective}' {what}" in str(caught.value)
    assert fix in str(caught.value)


def test_objectives_on_samples_fit_every_map_that_they_are_defined_for() -> None:
    for model, names in {
        "two-time": ("meanflow-nft", "mean-flow-advantage", "diffusion-nft", "awm"),
        "single-time": ("diffusion-nft", "awm"),
        "velocity": ("diffusion-nft", "awm"),
    }.items():
        for name in names:
            resolve(None, {"model": model, "objective": name}, CHAIN)
    with pytest.raises(CompositionError, match="'awm' does not support branched rollouts"):
        resolve(None, {"model": "two-time", "objective": "awm"}, ["rollout.kind=branch"])


def test_reinforce_takes_one_update_of_a_rollout() -> None:
    with pytest.raises(CompositionError, match="on-policy, but 2 updates would share a rollout"):
        resolve(None, {"model": "two-time", "objective": "reinforce"}, ["train.updates_per_iteration=2"])
    resolve(None, {"model": "two-time", "objective": "reinforce"}, ["train.updates_per_iteration=1"])


def test_options_of_an_objective_have_to_fit_each_other() -> None:
    for name, options, says in (
        ("mean-flow-advantage", ["objective.adv_clip_max=2"], "adv_clip_max must be below old_weight"),
        ("meanflow-nft", ["objective.diagonal=0.8", "objective.to_data=0.3"], "their sum is at most 1"),
    ):
        with pytest.raises(UsageError, match=says):
            resolve(None, {"model": "two-time", "objective": name}, [*CHAIN, *options])


def test_a_warm_up_fits_into_the_run() -> None:
    sets = ["train.updates_per_iteration=2", "train.lr_warmup_steps=12"]
    assert resolve(None, {"iterations": 6}, sets).recipe.train.lr_warmup_steps == 12
    with pytest.raises(CompositionError) as caught:
        resolve(None, {"iterations": 5}, sets)
    assert "warms up for 12 updates, but the run has only 10 (5 x 2). Lower train.lr_warmup_steps" in str(caught.value)


def test_a_window_needs_a_two_time_map_unless_it_covers_all_steps() -> None:
    with pytest.raises(CompositionError) as caught:
        resolve(None, {"model": "single-time"}, [*CHAIN, "rollout.window={size: 2}"])
    text = str(caught.value)
    assert text.startswith("--set rollout.window={size: 2}: A window of 2 of 3 stochastic steps needs a two-time map")
    assert text.endswith("Set rollout.window to null, which takes every step.")
    assert (
        resolve(None, {"model": "single-time"}, [*CHAIN, "rollout.window={size: 3}"]).recipe.rollout.window is not None
    )
    assert resolve(None, {"model": "two-time"}, [*CHAIN, "rollout.window={size: 2}"]).recipe.rollout.window is not None


def test_a_window_has_to_fit_the_rollout_and_the_objective() -> None:
    for sets in (["rollout.window={size: 4}"], ["rollout.window={size: 2, start: 2}"]):
        with pytest.raises(
            CompositionError, match="does not fit a rollout of 4 steps, whose stochastic ones are 0 to 2"
        ):
            resolve(None, {"model": "two-time"}, [*CHAIN, *sets])
    with pytest.raises(CompositionError, match="'rwfm' trains no transitions"):
        resolve(None, {"model": "two-time", "objective": "rwfm"}, [*CHAIN, "rollout.window={size: 1}"])


def test_a_window_is_set_key_by_key_and_taken_away_again(write: Write) -> None:
    path = write("model: two-time\nrollout:\n  kind: chain\n  window: {size: 1, mode: random, every: 3}\n")
    window = resolve(path, sets=["rollout.window.start=1"]).recipe.rollout.window
    assert window is not None
    assert (window.size, window.mode, window.start, window.every) == (1, "random", 1, 3)
    assert resolve(path, sets=["rollout.window=null"]).recipe.rollout.window is None
    recipe = resolve(path).recipe
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert resolve(path).recipe == recipe


@pytest.mark.parametrize(
    ("sets", "message"),
    [
        (["rollout.grid=paper", "rollout.steps=2"], "'paper' needs 3 steps"),
        (["rollout.grid=[1, 0.5, 0]"], "4 steps"),
        (["rollout.grid=[1, 0.2, 0.5, 0.1, 0]"], "decrease strictly from 1 to 0"),
        (["rollout.grid=[0.9, 0.5, 0.2, 0.1, 0]"], "decrease strictly from 1 to 0"),
        (["rollout.grid=[1, 0.5, 0.2, 0.1, 0.05]"], "decrease strictly from 1 to 0"),
        (["rollout.grid=paper", "eval.steps=2"], "The evaluation cannot use the rollout's grid"),
        (["rollout.grid=[1, 0.7, 0.5, 0.2, 0]", "eval.steps=2"], "The evaluation cannot use the rollout's grid"),
    ],
)
def test_grids_that_do_not_exist(sets: list[str], message: str) -> None:
    with pytest.raises(CompositionError) as caught:
        resolve(None, {"model": "two-time"}, sets)
    assert message in str(caught.value)
    assert str(caught.value).startswith("--set ")


def test_a_grid_in_a_file_is_refused_with_its_line(write: Write) -> None:
    path = write("model: two-time\nrollout:\n  steps: 2\n  grid: paper\n")
    with pytest.raises(CompositionError, match=r"^r.yaml:4: The grid 'paper' needs 3 steps"):
        resolve(path)


def test_euler_form_needs_target_times_above_epsilon() -> None:
    euler = {"model": "two-time", "stochasticizer": "asfmc-euler"}
    assert resolve(None, euler, ["rollout.steps=33"]).recipe.rollout.steps == 33
    with pytest.raises(CompositionError, match=r"above 0.03, but the grid has one at 0.029"):
        resolve(None, euler, ["rollout.steps=34"])
    with pytest.raises(CompositionError, match=r"above 0.06, but the grid has one at 0.05"):
        resolve(None, euler, ["rollout.grid=paper", "stochasticizer.epsilon=0.06"])
    # the bound itself is outside: a = s - epsilon must stay above 0
    with pytest.raises(CompositionError, match=r"above 0\.25"):
        resolve(None, euler, ["stochasticizer.epsilon=0.25"])


def test_flux_shift_is_checked_when_the_image_size_is_known() -> None:
    sets = ["rollout.grid=flux-shift", "stochasticizer.epsilon=0.4"]
    recipe = resolve(None, {"model": "two-time", "stochasticizer": "asfmc-euler"}, sets).recipe
    requires = recipe.stochasticizer.config.requires()
    with pytest.raises(CompositionError, match=r"'asfmc-euler' is defined for target times above 0.4, .* at 0.385"):
        check_target_times("asfmc-euler", requires, (1.0, 0.849, 0.653, 0.385, 0.0))
    check_target_times("asfmc-euler", Requirements("any", "linear", 2, 0.38), (1.0, 0.849, 0.653, 0.385, 0.0))


def test_dropout_would_show_as_a_ratio() -> None:
    with pytest.raises(
        CompositionError, match=r"^--set lora.dropout=0.1: lora.dropout is 0.1, but the objective 'grpo'"
    ):
        resolve(None, {"model": "two-time"}, ["lora.dropout=0.1"])
    assert (
        resolve(None, {"model": "two-time", "objective": "rwfm"}, [*CHAIN, "lora.dropout=0.1"]).recipe.lora.dropout
        == 0.1
    )


@pytest.mark.parametrize(
    ("flags", "sets", "message"),
    [
        ({"objective": "rwfm"}, [], "The objective 'rwfm' does not support branched rollouts"),
        ({}, ["rollout.window={size: 1}"], "rollout.window belongs to chains"),
        ({}, ["rollout.branch.antithetic=true", "rollout.group_size=5"], "come in pairs, but a group has 5"),
        ({"steps": 1}, [], "needs a stochastic transition"),
        ({"model": "single-time", "stochasticizer": "asfmc"}, [], "needs a two-time map"),
    ],
)
def test_what_branched_rollouts_cannot_be(flags: dict[str, object], sets: list[str], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        resolve(None, {"model": "two-time", **flags}, ["rollout.kind=branch", *sets])


GRADIENT: dict[str, object] = {"model": "two-time", "objective": "reward-gradient"}


@pytest.mark.parametrize(
    ("rewards", "sets", "message"),
    [
        ("shapes-clip, shapes", [], r"'reward-gradient' differentiates its rewards, but 'shapes' has no gradient"),
        ("ocr", [], r"'ocr' has no gradient. Give it weight 0, .*: aesthetic, clipscore, .*, shapes-clip"),
        ("{name: python, target: 'm:f'}", [], "'m:f' has no gradient"),
        ("shapes-clip", ["objective.jumps=5"], "Gradients through 5 jumps do not fit a rollout of 4 steps"),
        ("shapes-clip", ["train.shuffle_advantages=true"], "uses no advantages"),
        ("shapes-clip", ["objective.global_std=false"], "global_std concerns advantages"),
        ("shapes-clip", ["objective.last_step={weight: 1}"], "differentiates its rewards already"),
        ("shapes-clip", ["rollout.kind=branch"], "does not support branched rollouts"),
    ],
)
def test_rewards_without_a_gradient_are_refused_by_name(rewards: str, sets: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(None, GRADIENT, [*CHAIN, f"rewards=[{rewards}]", *sets])


def test_what_has_no_weight_and_a_function_with_a_gradient_are_not_refused() -> None:
    rewards = "[shapes-clip, {name: shapes, weight: 0}, {name: python, target: 'm:f', gradient: true}]"
    assert len(resolve(None, GRADIENT, [*CHAIN, f"rewards={rewards}"]).recipe.rewards) == 3


@pytest.mark.parametrize(
    ("last_step", "message"),
    [
        ("{weight: 1}", "none that is maximised has a gradient"),
        ("{weight: 1, rewards: [hpsv2]}", "names 'hpsv2', which is not among the recipe's rewards"),
        ("{weight: 1, rewards: [shapes]}", "'shapes' has no gradient"),
    ],
)
def test_a_last_step_needs_a_reward_with_a_gradient(last_step: str, message: str) -> None:
    rewards = "rewards=[shapes, {name: shapes-clip, weight: 0}]"
    with pytest.raises(CompositionError, match=message):
        resolve(None, {"model": "two-time"}, [rewards, f"objective.last_step={last_step}"])
    last_step = "objective.last_step={weight: 1, rewards: [shapes-clip]}"
    given = resolve(None, {"model": "two-time"}, [rewards, last_step])
    assert given.recipe.objective.config.last_step is not None
    with pytest.raises(CompositionError, match="shuffle_advantages is no control"):
        resolve(None, {"model": "two-time"}, [rewards, last_step, "train.shuffle_advantages=true"])
