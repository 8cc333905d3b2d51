"""`fmg init` writes an annotated recipe; `fmg list recipes`, `fmg show NAME`, and the suggestion for a mistyped run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg import Recipe
from fmg.recipe import recipe_names, recipe_summary, resolve
from tests.support.cli import fmg


@pytest.mark.parametrize("name", recipe_names())
def test_a_new_recipe_is_the_one_it_began_with_and_explains_every_value(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = fmg("init", name, "--out", "mine.yaml")
    assert done.code == 0, done.stderr
    begun = resolve(name).recipe
    assert Recipe.from_yaml("mine.yaml", allow_code=True) == begun
    assert {row.path for row in resolve(name).table()} <= begun.notes().keys()
    assert all(begun.notes().values())
    text = Path("mine.yaml").read_text()
    assert "groups: " in text
    assert "# prompts of one iteration; each is a group" in text


def test_nothing_is_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert fmg("init").code == 0
    before = Path("recipe.yaml").read_bytes()
    again = fmg("init")
    assert (again.code, again.stderr.count("\n")) == (2, 1)
    assert "recipe.yaml exists already" in again.stderr
    assert Path("recipe.yaml").read_bytes() == before
    assert "Did you mean 'meanflow-shapes'?" in fmg("init", "meanflow-shape", "--out", "x.yaml").stderr
    assert not Path("x.yaml").exists()


def test_recipes_are_listed_with_a_line_about_each() -> None:
    listed = json.loads(fmg("list", "recipes", "--json").stdout)
    assert [row["name"] for row in listed] == recipe_names()
    assert all(20 < len(row["summary"]) < 250 for row in listed)
    assert recipe_summary("meanflow-shapes").startswith("The default run of the embedded two-time model")


def test_the_kind_is_optional_in_show() -> None:
    assert fmg("show", "asfmc").stdout == fmg("show", "stochasticizer", "asfmc").stdout
    for words, says in {
        "asfm": "Did you mean 'asfmc'?",
        "models": "Add a name; `fmg list models` prints them.",
        "reward asfmc": "There is no reward named 'asfmc'",
    }.items():
        done = fmg("show", *words.split())
        assert done.code == 2
        assert says in done.stderr


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        ("eval runs/demo", "runs/demo-1"),
        ("generate x --from demo-1", "runs/demo-1"),
        ("generate x --from artifac", "runs/demo-1/artifact"),
        ("export demo", "runs/demo-1"),
        ("report demo", "runs/demo-1"),
        ("doctor run demo", "runs/demo-1"),
        ("train --resume demo", "runs/demo-1"),
        ("verify artifact", "runs/demo-1/artifact"),
    ],
)
def test_names_of_runs_and_artifacts_are_suggested(
    words: str, meant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    artifact = Path("runs/demo-1/artifact")
    artifact.mkdir(parents=True)
    (artifact / "manifest.json").touch()
    (artifact.parent / "run.json").touch()
    done = fmg(*words.split())
    assert done.code in (1, 2)
    assert f"Did you mean '{meant}'?" in done.stderr
