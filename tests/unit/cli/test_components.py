"""`fmg list`, `show` and `init`, and the suggestion for a mistyped name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg import Recipe
from fmg.recipe import recipe_names, recipe_summary, resolve
from fmg.registry.catalog import REGISTRIES
from tests.support.cli import fmg


def test_list_names_every_component_of_every_kind() -> None:
    shown = fmg("list")
    assert shown.code == 0
    for registry in REGISTRIES:
        for name in registry.names():
            assert any(line.split()[:2] == [registry.kind, name] for line in shown.stdout.splitlines())


@pytest.mark.parametrize("kind", ["reward", "rewards", "prompt-set", "prompt_sets"])
def test_a_kind_may_be_singular_or_plural(kind: str) -> None:
    rows = json.loads(fmg("list", kind, "--json").stdout)
    assert {row["kind"] for row in rows} == {kind.rstrip("s").replace("_", "-")}


def test_show_states_type_default_range_and_meaning_of_every_option() -> None:
    shown = fmg("show", "objective", "grpo")
    line = next(line for line in shown.stdout.splitlines() if line.startswith("clip_range"))
    assert line.split()[:3] == ["clip_range", "float", "0.0001"]
    assert "> 0 and < 1" in line
    assert "half-width of the ratio clip" in line


def test_show_states_the_options_within_an_option() -> None:
    shown = fmg("show", "objective", "awm").stdout
    assert "fmg.registry" not in shown
    (line,) = (line for line in shown.splitlines() if line.startswith("last_step.weight"))
    assert line.split()[:5] == ["last_step.weight", "float", "required", ">", "0"]
    options = {option["name"]: option for option in json.loads(fmg("show", "awm", "--json").stdout)["options"]}
    assert options["last_step"]["default"] is None
    assert options["last_step.checkpointing"]["doc"]


def test_show_says_where_published_weights_come_from_and_on_which_terms() -> None:
    shown = fmg("show", "reward", "pickscore")
    assert "licence: MIT" in shown.stdout
    assert "citation: Kirstain et al." in shown.stdout
    assert "weights: yuvalkirstain/PickScore_v1@" in shown.stdout
    plain = json.loads(fmg("show", "reward", "pickscore", "--json").stdout)
    assert {"licence", "citation", "weights"} <= plain.keys()
    assert "licence:" not in fmg("show", "reward", "shapes").stdout


@pytest.mark.slow
def test_every_component_can_be_shown_as_json() -> None:
    for registry in REGISTRIES:
        for name in registry.names():
            shown = json.loads(fmg("show", registry.kind, name, "--json").stdout)
            assert shown["name"] == name
            assert shown["summary"]
            assert "\n    " not in shown["doc"]
            assert all(option["doc"] for option in shown["options"]), (registry.kind, name)


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


def test_recipes_are_shown_with_every_value_and_its_source(tmp_path: Path) -> None:
    shown = fmg("show", "recipe", "meanflow-text")
    assert shown.code == 0
    assert Recipe.model_validate(json.loads(fmg("show", "recipe", "meanflow-text", "--json").stdout)) == Recipe.default(
        "meanflow-text"
    )
    (line,) = [line for line in shown.stdout.splitlines() if line.startswith("  group_size:")]
    assert "# configs/meanflow-text.yaml:" in line
    again = tmp_path / "again.yaml"
    again.write_text(shown.stdout, encoding="utf-8")
    assert Recipe.from_yaml(again) == Recipe.default("meanflow-text")
    # the kind is needed only where a component has the name, too
    assert fmg("show", "study-sd35/null").stdout == fmg("show", "recipes", "study-sd35/null").stdout
    assert "Did you mean 'meanflow-text'?" in fmg("show", "recipe", "meanflow-tex").stderr
    assert "`fmg list recipes` prints them" in fmg("show", "recipes").stderr
    assert "NAME is empty" in fmg("show", "recipes", "").stderr


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
