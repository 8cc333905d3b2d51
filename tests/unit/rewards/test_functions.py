from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from fmg import Recipe
from fmg.core.errors import UsageError, WrongTypeError
from fmg.core.types import RewardOutput
from fmg.recipe.sections import RewardRef
from fmg.rewards.base import build_rewards
from fmg.rewards.functions import function_name, measured_names, split_functions


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2))


class Judge:
    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        return RewardOutput(redness(images, prompts), {"half": redness(images, prompts) / 2})


@pytest.mark.parametrize(
    ("given", "plain"),
    [
        ("shapes", ["shapes"]),
        (redness, [{"name": "function", "function": "redness"}]),
        (["shapes", redness], ["shapes", {"name": "function", "function": "redness"}]),
        (
            {"shapes": 1.0, redness: 0.5},
            [{"name": "shapes", "weight": 1.0}, {"name": "function", "function": "redness", "weight": 0.5}],
        ),
        ({"name": "shapes", "weight": 2.0}, [{"name": "shapes", "weight": 2.0}]),
        ([{"name": "shapes", "weight": 2.0}], [{"name": "shapes", "weight": 2.0}]),
    ],
)
def test_what_a_recipe_records(given: Any, plain: object) -> None:
    values, functions = split_functions({"rewards": given, "lr": 1e-3})
    assert values == {"rewards": plain, "lr": 1e-3}
    assert set(functions.values()) <= {redness}


def test_names_of_functions_suit_log_keys() -> None:
    assert [function_name(f) for f in (redness, Judge(), lambda images, prompts: 0)] == ["redness", "Judge", "lambda"]


def test_two_functions_of_one_name_are_refused() -> None:
    with pytest.raises(UsageError, match="Two functions are called 'lambda'"):
        split_functions({"rewards": [lambda i, p: 0, lambda i, p: 1]})
    assert len(measured_names([redness, redness])[1]) == 1


@pytest.mark.parametrize("given", [3, [3], 1.5])
def test_another_type_is_a_type_error(given: Any) -> None:
    with pytest.raises(WrongTypeError, match="'rewards' is of type"):
        split_functions({"rewards": given})


@pytest.mark.parametrize(("reward", "parts"), [(redness, []), (Judge(), ["half"])])
def test_a_function_scores_under_its_name(reward: Any, parts: list[str]) -> None:
    names, functions = measured_names(reward)
    assert names is not None
    (entry,) = names
    ref = RewardRef.model_validate(entry)
    built = build_rewards([ref], functions)[function_name(reward)]
    output = built(torch.full((2, 3, 4, 4), 0.25), ["a", "b"])
    assert output.total.tolist() == [0.25, 0.25]
    assert list(output.parts) == parts


def test_a_recorded_function_that_is_not_passed_is_one_clear_line() -> None:
    recipe = Recipe.default(rewards=[{"name": "function", "function": "redness"}])
    assert recipe.rewards[0].label == "redness"
    with pytest.raises(UsageError, match=r"'redness' is a Python function,.*rewards=\[redness\]"):
        build_rewards(recipe.rewards)
