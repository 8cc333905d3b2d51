"""Rewards that are functions of your own: named as `module:function`, or passed to a Python call."""

from __future__ import annotations

import importlib
import sys
import traceback
from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import FmgError, RewardError, UsageError, one_line, out_of_memory
from fmg.core.stdout_redirect import fenced
from fmg.core.types import RewardOutput
from fmg.rewards.configs import FunctionRewardConfig, PythonRewardConfig
from fmg.rewards.functions import SIGNATURE, RewardFunction, lacks_function, no_function, no_module


class PythonReward:
    """Calls `fn(images, prompts)` with images `(b, 3, h, w)` in [0, 1] and a list of prompts.

    The function returns one number for each image: a tensor or an array shaped (b,), or a list of numbers. The module
    is looked up in the working directory first, then among the installed packages.

    Raises:
        UsageError: when the module, or the function in it, is missing, cannot be imported or cannot be called.
    """

    def __init__(self, config: PythonRewardConfig) -> None:
        self._target = config.target
        self._function = _find(config.target)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """The function's numbers as fp32, or the `RewardOutput` that it returns.

        Raises:
            RewardError: when the function raises, with the line it failed at, or returns something other than numbers.
        """
        try:
            returned = self._function(images, list(prompts))
        except FmgError:
            raise
        except (Exception, SystemExit) as error:
            if out_of_memory(error) is not None:
                # not the function's mistake: the caller knows what to lower
                raise
            raise RewardError(
                f"The reward '{self._target}' failed{_place(error)}: {one_line(error)}", "Correct the function."
            ) from error
        return returned if isinstance(returned, RewardOutput) else RewardOutput(self._numbers(returned), {})

    def _numbers(self, returned: object) -> Float[Tensor, " b"]:
        if returned is None:
            # which NumPy would turn into NaN
            raise RewardError(
                f"The reward '{self._target}' returned nothing (None)",
                f"End it with `return` and one number for each image: {SIGNATURE}.",
            )
        if isinstance(returned, Tensor):
            return returned.float()
        try:
            return torch.from_numpy(np.asarray(returned, dtype=np.float32))
        except (TypeError, ValueError):
            raise RewardError(
                f"The reward '{self._target}' returned {type(returned).__name__}, which is not numbers",
                f"Return one number for each image: {SIGNATURE}.",
            ) from None


class FunctionReward(PythonReward):
    """Calls a function passed to a Python call, as `PythonReward` does.

    Raises:
        UsageError: the function was not passed.
    """

    def __init__(self, config: FunctionRewardConfig, function: RewardFunction | None = None) -> None:
        if function is None:
            raise no_function(config.function)
        self._target = config.function
        self._function = function


def _find(target: str) -> Callable[..., object]:
    module_name, _, attribute = target.partition(":")
    folder = str(Path.cwd())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        with fenced(f"The reward '{target}'"):
            module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name and (module_name == error.name or module_name.startswith(error.name + ".")):
            raise no_module(target) from None
        raise _import_failure(module_name, error) from error
    except (Exception, SystemExit) as error:
        raise _import_failure(module_name, error) from error
    try:
        function = reduce(getattr, attribute.split("."), module)
    except AttributeError:
        raise lacks_function(module_name, attribute) from None
    if not callable(function):
        raise UsageError(f"'{target}' is a {type(function).__name__}, not a function", f"Name a function {SIGNATURE}.")
    return function


def _import_failure(module_name: str, error: BaseException) -> UsageError:
    return UsageError(f"The module '{module_name}' cannot be imported{_place(error)}: {one_line(error)}", "Correct it.")


def _place(error: BaseException) -> str:
    """Where it went wrong, as ` at file:line`: the innermost frame outside installed packages."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not f.filename.startswith("<")]
    machinery = {__file__, importlib.__file__}
    own = [f for f in frames if "site-packages" not in f.filename and f.filename not in machinery]
    return f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
