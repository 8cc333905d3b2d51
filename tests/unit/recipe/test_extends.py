"""A recipe file can extend another one: a shipped recipe, or a file beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.recipe import Recipe, recipe_names, resolve

ARMS = [name for name in recipe_names() if name.startswith("study-sd35/")]
PUBLISHED = "study-sd35/meanflow-nft"


def write(file: Path, text: str) -> Path:
    file.parent.mkdir(exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def test_each_file_goes_over_the_one_it_extends(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("a red circle\n")
    write(tmp_path / "below" / "first.yaml", "extends: scm-shapes\nprompts: ../mine.txt\noptimizer: {lr: 0.5}\n")
    write(tmp_path / "second.yaml", "extends: below/first.yaml\nlora: {rank: 3}\noptimizer: {lr: 0.25}\n")
    third = write(tmp_path / "third.yaml", "extends: second.yaml\nobjective: rwfm\nrollout: {kind: chain}\n")
    found = resolve(third, sets=["train.seed=7"])
    assert found.recipe == Recipe.default(
        "scm-shapes",
        prompts=str(tmp_path / "below" / ".." / "mine.txt"),
        objective="rwfm",
        seed=7,
        lr=0.25,
        **{"lora.rank": 3, "rollout.kind": "chain"},
    )
    said = {path: found.provenance[path].text for path in ("lora.rank", "optimizer.lr", "model.name", "train.seed")}
    assert said == {
        "lora.rank": f"{tmp_path}/second.yaml:2",
        "optimizer.lr": f"{tmp_path}/second.yaml:3",
        "model.name": resolve("scm-shapes").provenance["model.name"].text,
        "train.seed": "--set train.seed=7",
    }
    # what a run stores needs no other file
    write(tmp_path / "stored.yaml", found.to_yaml())
    assert Recipe.from_yaml(tmp_path / "stored.yaml") == found.recipe


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: scm-shape\n", "scm-shapes"),
        ("\nextends: gone.yaml\n", r"mine.yaml:2: there is no recipe file and no shipped recipe named 'gone.yaml'"),
        ("extends: [a]\n", r"mine.yaml:1: 'extends' is not the name or the file of a recipe"),
        ("extends: mine.yaml\n", r"mine.yaml:1: the recipe extends itself"),
        ("extends: other.yaml\n", r"other.yaml:1: the recipe extends itself"),
    ],
)
def test_a_wrong_reference_is_one_clear_line(text: str, said: str, tmp_path: Path) -> None:
    write(tmp_path / "other.yaml", "extends: mine.yaml\n")
    with pytest.raises(UsageError, match=said):
        resolve(write(tmp_path / "mine.yaml", text))


def test_code_in_a_recipe_below_needs_consent_too(tmp_path: Path) -> None:
    write(tmp_path / "below.yaml", "rewards: ['python:json:loads']\n")
    file = write(tmp_path / "mine.yaml", "extends: below.yaml\n")
    with pytest.raises(UsageError, match=r"below.yaml:1: .*--allow-code"):
        resolve(file)
    assert resolve(file, allow_code=True).recipe.rewards[0].name == "python"


def test_the_arms_of_the_study_differ_in_their_method_only() -> None:
    published = resolve(PUBLISHED).recipe
    assert len(ARMS) == 6
    for name in ARMS:
        recipe = resolve(name).recipe
        same = ("model", "rewards", "lora", "prompts", "eval")
        assert [getattr(recipe, part) for part in same] == [getattr(published, part) for part in same], name
        assert (recipe.rollout.groups, recipe.rollout.group_size, recipe.rollout.steps) == (48, 24, 4)
        assert (recipe.train.iterations, recipe.train.trainable, recipe.train.seed) == (300, "lora+duration", 42)
        assert recipe.train.shuffle_advantages == (name == "study-sd35/null")
    null, branch = resolve("study-sd35/null").recipe, resolve("study-sd35/grpo-branch").recipe
    assert null.with_({"train.shuffle_advantages": False}) == branch


def test_the_arms_on_transitions_are_the_shipped_recipes_of_the_model() -> None:
    for arm, shipped in (("grpo-chain", "sd35-meanflow"), ("grpo-branch", "sd35-meanflow-branch")):
        ours, theirs = resolve(f"study-sd35/{arm}").recipe, resolve(shipped).recipe
        same = ("stochasticizer", "objective", "optimizer", "rollout", "lora")
        assert [getattr(ours, part) for part in same] == [getattr(theirs, part) for part in same]
        assert ours.train.updates_per_iteration == theirs.train.updates_per_iteration
        assert ours.train.micro_batch == theirs.train.micro_batch
