from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.data.resume_points import check_resumable, repeat_command, resume_command
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe

OWN_CODE = {"name": "python", "target": "my.module:function"}


@pytest.mark.parametrize(
    ("changes", "flags"),
    [
        ({}, []),
        ({"rewards": [OWN_CODE]}, ["--allow-code"]),
        ({"eval.rewards": [OWN_CODE]}, ["--allow-code"]),
        ({"eval.rewards": [{"name": "remote", "url": "http://127.0.0.1:1"}]}, ["--allow-code"]),
    ],
    ids=str,
)
def test_commands_for_resuming_give_the_consent_that_the_recipe_needs(
    changes: dict[str, object], flags: list[str], tmp_path: Path
) -> None:
    recipe = Recipe.default().with_(changes)
    folder = tmp_path / "my run"
    assert shlex.split(resume_command(folder, recipe)) == ["fmg", "train", "--resume", str(folder), *flags]
    run = RunFolder.create(folder, "meanflow-shapes")
    run.recipe.write_text(recipe.to_yaml())
    again = repeat_command(run.recipe, recipe)
    assert shlex.split(again) == ["fmg", "train", "--config", str(run.recipe), *flags]
    with pytest.raises(UsageError) as caught:
        check_resumable(folder)
    assert f"`{again}`" in caught.value.fix


def test_a_run_whose_recipe_is_missing_still_reports_what_is_wrong(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    run.set_state("finished")
    with pytest.raises(UsageError, match="is finished"):
        check_resumable(run.path)
