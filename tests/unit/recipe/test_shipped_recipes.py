"""Every shipped recipe resolves, and its values have the stated effect."""

from __future__ import annotations

from pathlib import Path

import pytest

import fmg
from fmg.core.errors import UsageError
from fmg.recipe import Recipe, config_path, configs_folder, recipe_names, resolve
from fmg.registry.catalog import ROWS


@pytest.mark.parametrize("name", recipe_names())
def test_it_resolves_round_trips_and_holds_out_its_evaluation(name: str, tmp_path: Path) -> None:
    resolved = resolve(name)
    recipe = resolved.recipe
    (tmp_path / "copy.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(tmp_path / "copy.yaml") == recipe
    assert recipe.prompts != recipe.eval.prompts
    assert len(recipe.measured_rewards) > len(recipe.rewards)


@pytest.mark.parametrize("name", recipe_names())
def test_it_explains_itself(name: str) -> None:
    assert config_path(name).read_text(encoding="utf-8").startswith("# ")


def test_every_built_in_model_has_a_default_recipe_that_names_it() -> None:
    for name in (row.name for row in ROWS if row.kind == "model"):
        recipe = Recipe.default(name)
        assert recipe.model.name == name
        assert resolve(recipe.model.config.spec().default_recipe).recipe.model.name == name


LARGE = (
    "meanflow-flux",
    "scm-flux",
    "flux2-klein",
    "flux3-klein",
    "sana-sprint",
    "sd35-meanflow",
    "z-image-turbo",
)
BRANCHED = [name for name in recipe_names() if "-branch" in name and name.startswith(LARGE)]


def test_every_large_model_has_chains_as_published_and_branches_beside_them() -> None:
    for name in recipe_names():
        if name.startswith(LARGE):
            assert resolve(name).recipe.rollout.kind == ("branch" if name in BRANCHED else "chain")
    assert {name.partition("-branch")[0] for name in BRANCHED} == set(LARGE)
    assert {name for name in BRANCHED if name.endswith("-1gpu")} == {
        "meanflow-flux-branch-1gpu",
        "scm-flux-branch-1gpu",
    }


@pytest.mark.parametrize("name", BRANCHED)
def test_a_branched_recipe_is_its_chain_but_for_the_rollout(name: str) -> None:
    branch, chain = resolve(name).recipe, resolve(name.partition("-branch")[0]).recipe
    same = ("model", "rewards", "objective", "lora", "prompts")
    assert [getattr(branch, part) for part in same] == [getattr(chain, part) for part in same]
    alike = ("groups", "group_size", "steps", "grid")
    assert [getattr(branch.rollout, key) for key in alike] == [getattr(chain.rollout, key) for key in alike]
    assert branch.rollout.branch.steps == "adaptive"
    # whole groups per call, and as many rows per update: no bf16 call is padded, and the ratio is 1
    assert branch.rollout.batch_size is not None
    assert branch.rollout.batch_size == branch.train.micro_batch * branch.rollout.group_size  # type: ignore[operator]


@pytest.mark.parametrize("name", [name for name in BRANCHED if name.endswith("-1gpu")])
def test_one_gpu_trains_what_eight_train(name: str) -> None:
    def but_for_sizes(recipe: Recipe) -> Recipe:
        freed = {"rollout.batch_size": None, "train.micro_batch": None}
        return recipe.with_({**freed, "eval.every": 10, "eval.batch_size": None})

    one, eight = resolve(name).recipe, resolve(name.removesuffix("-1gpu")).recipe
    assert but_for_sizes(one) == but_for_sizes(eight)


def test_the_embedded_default() -> None:
    recipe = resolve().recipe
    assert recipe == Recipe.default("meanflow-shapes") == Recipe.default()
    assert (recipe.rollout.groups, recipe.rollout.group_size, recipe.rollout.steps) == (48, 8, 4)
    assert recipe.rollout.grid == "uniform"
    assert recipe.objective.config.model_dump() == {
        "clip_range": 1e-3,
        "clip_range_high": None,
        "kl_beta": 0.0,
        "ratio_norm": False,
        "noise_weighting": False,
        "noise_power": 1.0,
        "target_kl": None,
        "kl_mask": None,
        "last_step": None,
        "adv_clip_max": 5.0,
        "global_std": True,
        "reward_combination": "sum",
    }
    assert (recipe.lora.rank, recipe.lora.alpha) == (8, 16.0)
    assert [r.name for r in recipe.eval.rewards] == ["shapes-quality"]


def test_recipes_are_found_in_a_checkout_and_in_an_installed_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert config_path("meanflow-shapes").parent == configs_folder()
    package = tmp_path / "site" / "fmg"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "mine.yaml").write_text("a: 1")
    # a folder named configs beside an installed package belongs to somebody else
    (tmp_path / "site" / "configs").mkdir()
    monkeypatch.setattr("fmg.recipe.recipe._PACKAGE", package)
    assert recipe_names() == ["mine"]
    (package / "configs" / "mine.yaml").unlink()
    (package / "configs").rmdir()
    with pytest.raises(UsageError, match="missing from this installation"):
        configs_folder()


def test_unknown_recipe_names_get_a_suggestion() -> None:
    with pytest.raises(UsageError, match="Did you mean 'meanflow-shapes'"):
        config_path("meanflow-shape")


def test_the_version_is_that_of_the_project_file() -> None:
    import tomllib

    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text())["project"]
    assert project["version"] == fmg.__version__
