"""Layers and provenance: the model's own recipe < file < flags < `--set`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fmg.core.errors import UsageError
from fmg.recipe import Recipe, config_path, recipe_of, resolve, resolve_run
from fmg.registry import ObjectiveConfig
from tests.unit.recipe.components import TwoTimeConfig

Write = Callable[[str | bytes], Path]
TWO = {"model": "two-time"}


def sources(*args: object, **kwargs: object) -> dict[str, tuple[object, str, str]]:
    rows = resolve(*args, **kwargs).table()  # type: ignore[arg-type]
    return {row.path: (row.value, row.source.kind, row.source.text) for row in rows}


def test_each_layer_wins_over_the_ones_below_and_is_named(write: Write) -> None:
    path = write("model: two-time\ntrain:\n  iterations: 5\n  seed: 7\nlora: {rank: 2}\n")
    got = sources(path, {"seed": 8, "steps": 3, "lr": None}, ["rollout.steps=6", "eval.num=1e2"][:1])
    assert got["model.name"] == ("two-time", "file", "r.yaml:1")
    assert got["train.iterations"] == (5, "file", "r.yaml:3")
    assert got["lora.rank"] == (2, "file", "r.yaml:5")
    assert got["train.seed"] == (8, "flag", "--seed")
    assert got["rollout.steps"] == (6, "set", "--set rollout.steps=6")
    assert got["lora.alpha"][1:] == ("model", f"configs/meanflow-shapes.yaml:{_line('lora')}")
    assert got["train.micro_batch"] == (None, "built-in", "default")


def _line(section: str) -> int:
    lines = config_path("meanflow-shapes").read_text().splitlines()
    block = next(i for i, line in enumerate(lines) if line.startswith(f"{section}:"))
    return next(i for i in range(block, len(lines)) if "alpha" in lines[i]) + 1


def test_provenance_covers_every_value_of_the_recipe() -> None:
    resolved = resolve(None, TWO)
    rows = resolved.table()
    assert {row.path for row in rows} == set(resolved.provenance)
    assert len(rows) > 40


def test_the_named_model_brings_its_own_default_recipe(write: Write) -> None:
    for text, flags, sets in (
        (None, {"model": "single-time"}, []),
        (None, {}, ["model=single-time"]),
        (None, {}, ["model.name=single-time"]),
        ("model: {name: single-time}\n", {}, []),
        ("model: two-time\n", {"model": "single-time"}, []),
    ):
        resolved = resolve(text and write(text), flags, sets)
        assert resolved.recipe.model.name == "single-time"
        assert resolved.provenance["train.iterations"].text.startswith("configs/scm-shapes.yaml:")


def test_the_recipe_of_a_run_is_the_same_run_again(write: Write, tmp_path: Path) -> None:
    """The recipe of an older run has no `rollout.kind`, and the model's current recipe branches."""
    stated = resolve(None, TWO, ["rollout.kind=chain", "lora.rank=2"]).to_yaml()
    older = "".join(line for line in stated.splitlines(keepends=True) if "kind:" not in line)
    assert len(older) < len(stated)
    (tmp_path / "run.json").write_text("{}")
    file = tmp_path / "recipe.yaml"
    file.write_text(older)
    for again in (resolve(file, {"seed": 3}), resolve_run(file), recipe_of(file, {"seed": 3})):
        assert again.provenance["rollout.kind"].kind == "built-in"
        assert again.recipe.rollout.kind == "chain"
        assert again.recipe.lora.rank == 2
    # any other file is layered over the recipe of its model
    assert resolve(write(older)).recipe.rollout.kind == "branch"


def test_a_run_that_lost_its_model_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("stochasticizer: auto\n")
    with pytest.raises(UsageError, match="'model'"):
        resolve(tmp_path / "recipe.yaml")


def test_auto_becomes_the_default_of_the_model_and_records_it() -> None:
    resolved = resolve(None, {**TWO, "stochasticizer": "auto"})
    assert resolved.recipe.stochasticizer.name == "asfmc"
    assert resolved.recipe.stochasticizer.config.model_dump()["ratio"] == 0.5
    assert resolved.provenance["stochasticizer.name"].text == "auto: the default of two-time"
    assert resolved.provenance["stochasticizer.ratio"].text == "auto: the default of two-time"


def test_auto_takes_options_for_the_component_that_it_becomes() -> None:
    resolved = resolve(None, {**TWO, "stochasticizer": "auto"}, ["stochasticizer.ratio=0.25"])
    assert resolved.recipe.stochasticizer.config.model_dump()["ratio"] == 0.25
    assert resolved.provenance["stochasticizer.ratio"].kind == "set"


def test_another_name_drops_the_options_of_the_old_component(write: Write) -> None:
    path = write("model: two-time\noptimizer: {name: adamw, lr: 0.5, betas: [0.1, 0.2]}\n")
    sgd = resolve(path, {"optimizer": "sgd"}).recipe.optimizer
    assert sgd == resolve(None, {**TWO, "optimizer": "sgd"}).recipe.optimizer
    assert not hasattr(sgd.config, "betas")


def test_the_same_name_keeps_them(write: Write) -> None:
    path = write("model: two-time\noptimizer: {name: adamw, lr: 0.5, betas: [0.1, 0.2]}\n")
    adamw = resolve(path, {"optimizer": "adamw"}, ["optimizer.lr=0.25"]).recipe.optimizer
    assert adamw.config.model_dump()["lr"] == 0.25
    assert adamw.config.model_dump()["betas"] == (0.1, 0.2)


def test_options_set_after_the_name_reach_the_new_component() -> None:
    resolved = resolve(None, {**TWO, "stochasticizer": "asfmc"}, ["stochasticizer.gap=0.0147"])
    assert resolved.recipe.stochasticizer.config.model_dump() == {
        "gap": 0.0147,
        "ratio": None,
        "noise_share": None,
        "hold": None,
    }


def test_reward_flags_replace_the_list(write: Write) -> None:
    path = write("model: two-time\nrewards: [{name: shapes, weight: 3, score: strict}]\n")
    rewards = resolve(path, {"reward": ["jpeg-compressibility=0.5", "shapes"]}).recipe.rewards
    assert [(r.name, r.weight) for r in rewards] == [("jpeg-compressibility", 0.5), ("shapes", 1.0)]
    assert rewards[1].config.model_dump() == {"score": "soft"}
    assert resolve(path, {"reward": []}).recipe.rewards[0].weight == 3.0


@pytest.mark.parametrize("text", ["shapes", "[shapes]", "{name: shapes}", "[{name: shapes}]"])
def test_rewards_in_short(write: Write, text: str) -> None:
    (reward,) = resolve(write(f"model: two-time\nrewards: {text}\n")).recipe.rewards
    assert (reward.name, reward.weight) == ("shapes", 1.0)


def test_set_reaches_into_lists() -> None:
    sets = ["rewards=[shapes, jpeg-compressibility]", "rewards.1.weight=-2", "rewards.0.score=strict"]
    resolved = resolve(None, TWO, sets)
    assert [r.weight for r in resolved.recipe.rewards] == [1.0, -2.0]
    assert resolved.recipe.rewards[0].config.model_dump() == {"score": "strict"}
    assert resolved.provenance["rewards.1.weight"].text == "--set rewards.1.weight=-2"
    assert resolved.provenance["rewards.1.name"].text == "--set rewards=[shapes, jpeg-compressibility]"


def test_a_prompt_file_needs_no_name(write: Write) -> None:
    flag = resolve(None, {**TWO, "prompts": "my/words.txt"}).recipe
    file = resolve(write("model: two-time\nprompts: words.jsonl\neval: {prompts: heldout.txt}\n")).recipe
    assert flag.prompts.name == file.prompts.name == file.eval.prompts.name == "file"
    assert flag.prompts.config.model_dump()["path"] == "my/words.txt"
    assert file.eval.prompts.config.model_dump()["path"] == "heldout.txt"


def test_a_shipped_recipe_by_name() -> None:
    resolved = resolve("scm-shapes", TWO)
    assert resolved.recipe.model.name == "two-time"
    assert resolved.provenance["train.seed"].kind == "file"
    assert resolved.provenance["train.seed"].text.startswith("configs/scm-shapes.yaml:")


def test_own_reward_typed_on_the_command_line_runs_without_permission() -> None:
    for recipe in (
        resolve(None, {**TWO, "reward": ["python:my.mod:fn=2"]}).recipe,
        resolve(None, TWO, ["rewards=[{name: 'python:my.mod:fn', weight: 2}]"]).recipe,
        Recipe.default(model="two-time", rewards=[{"name": "python", "target": "my.mod:fn", "weight": 2}]),
    ):
        (reward,) = recipe.rewards
        assert (reward.name, reward.label, reward.weight) == ("python", "my.mod:fn", 2.0)


def test_measured_rewards_are_the_trained_and_the_held_out_ones_once() -> None:
    recipe = resolve(None, TWO, ["rewards=[shapes]", "eval.rewards=[jpeg-compressibility, shapes]"]).recipe
    assert [r.label for r in recipe.measured_rewards] == ["shapes", "jpeg-compressibility"]


def test_component_configs_are_typed() -> None:
    recipe = resolve(None, TWO).recipe
    assert isinstance(recipe.model.config, TwoTimeConfig)
    assert isinstance(recipe.objective.config, ObjectiveConfig)
    assert recipe.objective.config.needs == "transitions"


def test_the_order_of_flags_of_sets_and_of_arguments_drops_nothing() -> None:
    expected = resolve(None, {**TWO, "optimizer": "sgd", "lr": 0.125}).recipe
    assert resolve(None, {"lr": 0.125, "optimizer": "sgd", **TWO}).recipe == expected
    assert resolve(None, TWO, ["optimizer.lr=0.125", "optimizer.name=sgd"]).recipe == expected
    assert resolve(None, TWO, ["optimizer.lr=0.125", "optimizer=sgd"]).recipe == expected
    assert Recipe.default("two-time", **{"optimizer.lr": 0.125, "optimizer": "sgd"}) == expected
    assert resolve(None, TWO, ["optimizer.lr=1", "optimizer.lr=0.125", "optimizer=sgd"]).recipe == expected


def test_a_model_of_another_package_brings_its_recipe_as_a_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(config_path("scm-shapes").read_text().replace("scm-shapes", "two-time")).resolve()
    spec = dataclasses.replace(TwoTimeConfig().spec(), default_recipe=str(path))
    monkeypatch.setattr(TwoTimeConfig, "spec", lambda self: spec)
    resolved = resolve(None, TWO)
    assert resolved.provenance["lora.rank"].text.startswith(f"{path}:")


def test_python_overrides_and_their_order() -> None:
    recipe = Recipe.default(model="two-time", **{"train.iterations": 3, "optimizer": "sgd", "optimizer.lr": 0.125})
    assert recipe.train.iterations == 3
    assert (recipe.optimizer.name, recipe.optimizer.config.model_dump()["lr"]) == ("sgd", 0.125)
    changed = recipe.with_({"optimizer.lr": 0.25, "lora.targets": ("to_q",)})
    assert changed.optimizer.config.model_dump()["lr"] == 0.25
    assert changed.lora.target_names() == ("to_q",)
    assert changed.with_({"optimizer.lr": 0.125, "lora.targets": "attention"}) == recipe


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"stochasticizer": "asfmc-euler", "rollout.grid": [1, 0.7, 1 / 3, 0], "rollout.steps": 3},
        {"rewards": [{"name": "python", "target": "a.b:c", "weight": 0.1}, "jpeg-compressibility"]},
        {"prompts": '/it\'s "odd" # not a comment: ü.txt', "eval.rewards": [], "train.micro_batch": 999},
        {"optimizer.lr": 1e-5, "lora.targets": ["to_q", "to_out.0"], "train.device": "cuda:1", "train.dtype": "bf16"},
    ],
)
def test_yaml_round_trip_is_exact(tmp_path: Path, values: dict[str, object]) -> None:
    resolved = resolve(None, {**TWO, "stochasticizer": "auto"})
    recipe = resolved.recipe.with_(values)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(file, allow_code=True) == recipe
    again = resolve(file, allow_code=True)
    file.write_text(again.to_yaml(), encoding="utf-8")
    assert Recipe.from_yaml(file, allow_code=True) == recipe
    assert {source.kind for source in again.provenance.values()} == {"file"}


@given(lr=st.floats(1e-300, 1e300), alpha=st.floats(5e-324, 1e6), seed=st.integers(0, 2**63 - 1))
@settings(max_examples=25, deadline=None)
def test_numbers_survive_the_round_trip(lr: float, alpha: float, seed: int) -> None:
    recipe = Recipe.default(model="two-time", **{"optimizer.lr": lr, "lora.alpha": alpha, "train.seed": seed})
    text = recipe.to_yaml()
    assert Recipe.model_validate(_read(text)) == recipe


def _read(text: str) -> object:
    from ruamel.yaml import YAML

    return YAML(typ="safe", pure=True).load(text)


def test_the_stored_recipe_names_the_source_of_each_value() -> None:
    text = resolve(None, {**TWO, "lr": 0.25}, ["lora.rank=4", "eval.rewards=[\n  shapes]"]).to_yaml()
    lines = {line.split("#")[0].strip(): line.split("#")[1].strip() for line in text.splitlines() if "#" in line}
    assert lines["lr: 0.25"] == "--lr"
    assert lines["rank: 4"] == "--set lora.rank=4"
    assert lines["dropout: 0.0"] == "default"
    assert all("#" in line for line in text.splitlines() if not line.endswith(":"))


@pytest.mark.parametrize("written", ["mine.txt", "{name: file, path: mine.txt}"])
def test_prompt_files_of_a_recipe_are_found_beside_it_and_those_of_flags_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, written: str
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "recipes"
    folder.mkdir()
    (folder / "mine.yaml").write_text(f"prompts: {written}\neval: {{prompts: {written}}}\n")
    recipe = Recipe.from_yaml(Path("recipes/mine.yaml"))
    assert recipe.prompts.config == recipe.eval.prompts.config
    assert recipe.prompts.config.path == str(Path("recipes") / "mine.txt")  # type: ignore[attr-defined]
    given = resolve(Path("recipes/mine.yaml"), {"prompts": "mine.txt"}).recipe
    assert given.prompts.config.path == "mine.txt"  # type: ignore[attr-defined]


@pytest.mark.parametrize("rule", ["gap", "noise_share", "hold"])
def test_another_anchor_rule_replaces_the_default_one(rule: str) -> None:
    expected = {"gap": None, "ratio": None, "noise_share": None, "hold": None, rule: 0.5}
    by_set = resolve(None, {}, [f"stochasticizer.{rule}=0.5"]).recipe
    again = Recipe.default().with_({"stochasticizer": {"name": "asfmc", rule: 0.5}})
    for recipe in (by_set, again):
        assert recipe.stochasticizer.config.model_dump() == expected
    with pytest.raises(UsageError, match="give only one of"):
        resolve(None, {}, [f"stochasticizer={{name: asfmc, ratio: 0.5, {rule}: 0.5}}"])
