"""A command line that was valid in an earlier revision is still valid and means the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.text import Text

from fmg.recipe.layers import FLAGS
from tests.support.commands import Commands, commands

RECORDED: Commands = json.loads((Path(__file__).parents[1] / "fixtures/0.1.0/commands.json").read_text("utf-8"))
PRESENT = commands()


@pytest.mark.parametrize("command", RECORDED)
def test_no_parameter_is_removed_or_changes_its_meaning(command: str) -> None:
    present = PRESENT[command]
    for name, before in RECORDED[command].items():
        now = present[name]
        assert set(before["names"]) <= set(now["names"]), name
        assert before["required"] or not now["required"], name
        for key in ("kind", "type", "flag", "many", "default"):
            assert now[key] == before[key], (name, key)
        for least_or_most, one, other in zip((min, max), before["range"], now["range"], strict=True):
            assert other is None or (one is not None and least_or_most(one, other) == other), name


@pytest.mark.parametrize("command", RECORDED)
def test_new_parameters_are_optional(command: str) -> None:
    for name in PRESENT[command].keys() - RECORDED[command].keys():
        assert not PRESENT[command][name]["required"], name


@pytest.mark.parametrize("command", PRESENT)
def test_help_is_shown_as_it_is_written(command: str) -> None:
    # Rich takes `[@revision]` for markup and leaves it out
    for name, parameter in PRESENT[command].items():
        assert Text.from_markup(parameter["help"]).plain == parameter["help"], name


def test_arguments_keep_their_order() -> None:
    def arguments(command: dict[str, dict[str, object]]) -> list[str]:
        return [name for name, parameter in command.items() if parameter["kind"] == "argument"]

    for command, before in RECORDED.items():
        known = arguments(before)
        assert arguments(PRESENT[command])[: len(known)] == known


def test_every_flag_of_a_recipe_value_is_an_option_of_train() -> None:
    options = {name for parameter in PRESENT["fmg train"].values() for name in parameter["names"]}
    assert {f"--{flag}" for flag in FLAGS} <= options
