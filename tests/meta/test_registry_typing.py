"""At the line of the decorator, mypy rejects a class that lacks a method of its Protocol or takes another config."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from fmg.registry.catalog import ROWS

ROOT = Path(__file__).resolve().parents[2]

CASES = """\
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fmg.core.protocols import Density, FlowMap, Reward
from fmg.core.types import Conditioning, RewardOutput
from fmg.registry import ComponentConfig, rewards, stochasticizers
from fmg.stochasticizers.configs import CpsConfig


class Options(ComponentConfig):
    size: int = 1


class OtherOptions(ComponentConfig):
    size: int = 2


@rewards.register("good-class", Options)
class Good:
    def __init__(self, config: Options) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> RewardOutput:
        raise NotImplementedError


@rewards.register("good-function", Options)
def good(config: Options) -> Good:
    return Good(config)


@rewards.register("good-for-any-config", Options)
def general(config: ComponentConfig) -> Reward:
    raise NotImplementedError


@rewards.register("no-call", Options)  # error: arg-type
class NoCall:
    def __init__(self, config: Options) -> None: ...


@rewards.register("wrong-return", Options)  # error: arg-type
class WrongReturn:
    def __init__(self, config: Options) -> None: ...

    def __call__(self, images: Tensor, prompts: Sequence[str]) -> float:
        raise NotImplementedError


@rewards.register("other-config", Options)  # error: arg-type
class OtherConfig(Good):
    def __init__(self, config: OtherOptions) -> None: ...


@rewards.register("other-config-function", Options)  # error: arg-type
def other_config(config: OtherOptions) -> Good:
    raise NotImplementedError


@rewards.register("not-a-reward", Options)  # error: arg-type
def not_a_reward(config: Options) -> int:
    raise NotImplementedError


@rewards.register("not-a-config", int)  # error: type-var
def not_a_config(config: int) -> Good:
    raise NotImplementedError


@stochasticizers.register("wrong-kind", Options)  # error: arg-type
def wrong_kind(config: Options) -> Good:
    raise NotImplementedError


@stochasticizers.register("missing-times", CpsConfig)  # error: arg-type
class MissingTimes:
    def __init__(self, config: CpsConfig) -> None: ...

    @property
    def path_preserving(self) -> bool:
        return True

    def transition(self, flow_map: FlowMap, x_t: Tensor, cond: Conditioning) -> Density:
        raise NotImplementedError
"""


def built_in() -> str:
    """A program that registers every built-in component, as its catalog row does without a type checker."""
    lines = ["from fmg.registry import catalog"]
    for number, row in enumerate(ROWS):
        (config_module, config), (module, factory) = row.config.split(":"), row.factory.split(":")
        registry = row.kind.replace("-", "_") + "s"
        lines += [f"from {config_module} import {config} as C{number}", f"from {module} import {factory} as F{number}"]
        lines += [f'catalog.{registry}.register("{row.name}", C{number})(F{number})']
    return "\n".join(lines) + "\n"


@pytest.mark.slow
def test_mypy_accepts_every_row_of_the_catalog(tmp_path: Path) -> None:
    file = tmp_path / "rows.py"
    file.write_text(built_in())
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-error-summary", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.stdout.strip() == ""
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_mypy_sees_each_mistake_at_the_decorator(tmp_path: Path) -> None:
    file = tmp_path / "components.py"
    file.write_text(CASES)
    command = [sys.executable, "-m", "mypy", "--config-file", "pyproject.toml", "--no-error-summary", str(file)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    found = {
        (int(line), code)
        for line, code in re.findall(r"components\.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout, re.MULTILINE)
    }
    wanted = {
        (number, line.split("# error: ")[1])
        for number, line in enumerate(CASES.splitlines(), start=1)
        if "# error: " in line
    }
    assert len(wanted) == 8
    assert found == wanted, done.stdout + done.stderr
