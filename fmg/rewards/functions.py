"""Rewards that a Python call is given as functions. A recipe records their names; the call carries them beside it.

Imports no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from fmg.core.errors import UsageError, WrongTypeError
from fmg.registry.references import FUNCTION_REWARD

RewardFunction = Callable[..., Any]
"""`fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`: one number for each image, or a `RewardOutput`."""
Reward = str | RewardFunction | Mapping[str, object]
Rewards = Reward | Iterable[Reward] | Mapping[Reward, float]
"""Rewards of a Python call: names, functions, entries of a recipe, or a mapping of names and functions to weights."""
Functions = Mapping[str, RewardFunction]
"""The functions of a Python call by the names that the recipe has for them."""
NO_FUNCTIONS: Functions = MappingProxyType({})

_LISTS = ("rewards", "reward", "eval.rewards")


def split_functions(values: Mapping[str, object]) -> tuple[dict[str, object], Functions]:
    """Values of a recipe in which functions are replaced by references to them, and the functions by name.

    Args:
        values: by dotted path; `rewards` and `eval.rewards` may hold functions.

    Raises:
        WrongTypeError: a reward is of another type.
        UsageError: two functions have one name.
    """
    functions: dict[str, RewardFunction] = {}
    plain = {path: _entries(value, functions) if path in _LISTS else value for path, value in values.items()}
    return plain, functions


def measured_names(rewards: Rewards | None) -> tuple[list[str | Mapping[str, object]] | None, Functions]:
    """Rewards to measure, as names and entries of a recipe, and the functions among them by name.

    Raises:
        WrongTypeError: a reward is of another type.
        UsageError: two functions have one name.
    """
    if not rewards and not callable(rewards):
        return None, NO_FUNCTIONS
    functions: dict[str, RewardFunction] = {}
    return _entries(rewards, functions), functions


def function_name(function: RewardFunction) -> str:
    """What a recipe and the log call a function: its own name, or that of its class, in letters, digits and `_`."""
    name = str(getattr(function, "__name__", type(function).__name__))
    return re.sub(r"\W+", "", name, flags=re.ASCII) or "function"


def no_function(name: str) -> UsageError:
    """The error for a reward that is a function which nobody passed."""
    return UsageError(
        f"The reward '{name}' is a Python function that the run was given, which only a Python program can give again",
        f"Call it from there: `fmg.resume(run, rewards=[{name}])`, and likewise train and evaluate.",
    )


def _entries(given: object, functions: dict[str, RewardFunction]) -> list[str | Mapping[str, object]]:
    if isinstance(given, Mapping) and "name" not in given:
        return [_entry(reward, functions, weight=weight) for reward, weight in given.items()]
    if isinstance(given, (str, Mapping)) or callable(given):
        return [_entry(given, functions)]
    if not isinstance(given, Iterable):
        raise _wrong(given)
    return [_entry(reward, functions) for reward in given]


def _entry(reward: object, functions: dict[str, RewardFunction], **more: object) -> str | Mapping[str, object]:
    if isinstance(reward, str):
        return {"name": reward, **more} if more else reward
    if isinstance(reward, Mapping):
        return reward
    if not callable(reward):
        raise _wrong(reward)
    name = function_name(reward)
    if functions.setdefault(name, reward) is not reward:
        raise UsageError(f"Two functions are called '{name}'", "Give one of them another name.")
    return {"name": FUNCTION_REWARD, "function": name, **more}


def _wrong(given: object) -> WrongTypeError:
    return WrongTypeError("rewards", given, "names of rewards, functions of images and prompts, or a list of them")
