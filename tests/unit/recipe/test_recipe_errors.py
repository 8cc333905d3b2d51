"""An error in a recipe is one line: where it is, what is wrong, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from fmg.core.errors import CompositionError, UsageError
from fmg.recipe import Recipe, resolve

Write = Callable[[str | bytes], Path]


def refusal(config: str | Path | None, flags: Mapping[str, object], sets: Sequence[str] = ()) -> str:
    with pytest.raises(UsageError) as caught:
        resolve(config, {"model": "two-time", **flags}, sets)
    assert caught.value.exit_code == 2
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("trian: {seed: 1}", ["r.yaml:2: The recipe has no key 'trian'", "Did you mean 'train'?", "rollout"]),
        ("train:\n  sed: 1", ["r.yaml:3: The recipe has no key 'train.sed'", "Did you mean 'seed'?", "max_grad_norm"]),
        ("train: {seed: one}", ["r.yaml:2: ", "'train.seed' must be a valid integer (given: 'one')"]),
        ("train: {seed: '1'}", ["'train.seed' must be a valid integer (given: '1')"]),
        ("train: {iterations: true}", ["'train.iterations' must be a valid integer (given: True)"]),
        ("train: {iterations: 2.5}", ["'train.iterations' must be a valid integer (given: 2.5)"]),
        ("train: {iterations: 0}", ["'train.iterations' must be greater than or equal to 1 (given: 0)"]),
        ("train: {max_grad_norm: .nan}", ["'train.max_grad_norm' must be a finite number"]),
        ("train: {dtype: fp16}", ["'train.dtype' must be 'fp32' or 'bf16' (given: 'fp16')"]),
        ("train: {device: gpu}", ["'train.device'", "auto, cpu, cuda or cuda:INDEX"]),
        ("train:", ["r.yaml:2: ", "key 'train'", "(given: nothing)"]),
        ("train: [1]", ["r.yaml:2: ", "key 'train'"]),
        ("rollout: {group_size: 1}", ["'rollout.group_size' must be greater than or equal to 2 (given: 1)"]),
        ("rollout:\n  grid: unifrom", ["r.yaml:3: There is no grid named 'unifrom'", "Did you mean 'uniform'?"]),
        ("rollout: {grid: 3}", ["r.yaml:2: The grid must be a name or a list of finite times (given: 3)"]),
        ("rollout: {grid: [1, yes, 0]}", ["r.yaml:2: The grid must be a name or a list of finite times"]),
        ("lora: {targets: atention}", ["r.yaml:2: There is no preset of LoRA targets named 'atention'", "'attention'"]),
        ("lora: {targets: []}", ["r.yaml:2: The LoRA targets must be"]),
        ("objective:\n  name: gpro", ["r.yaml:3: There is no objective named 'gpro'", "Did you mean 'grpo'?", "rwfm"]),
        (
            "objective:\n  name: grpo\n  clip_rnage: 1",
            ["r.yaml:4: The objective 'grpo' has no option 'clip_rnage'", "Did you mean 'clip_range'?", "kl_beta"],
        ),
        ("objective: {clip_range: -1}", ["r.yaml:2: The objective 'grpo': option 'clip_range' must be greater than 0"]),
        ("objective: {clip_range: '1e-4'}", ["option 'clip_range' must be a valid number (given: '1e-4')"]),
        ("objective: {clip_range_high: 0}", ["option 'clip_range_high' must be greater than 0 (given: 0)"]),
        ("objective: {target_kl: -1}", ["option 'target_kl' must be greater than 0 (given: -1)"]),
        ("objective: {reward_combination: mean}", ["'reward_combination' must be 'sum' or 'per-reward'"]),
        (
            "objective: {name: grpo-guard, ratio_norm: false}",
            ["The objective 'grpo-guard'", "'ratio_norm' must be True"],
        ),
        ("rollout:\n  window: {mode: random}", ["r.yaml:3: The recipe needs the key 'rollout.window.size'"]),
        ("rollout:\n  window: {size: 0}", ["r.yaml:3: ", "'rollout.window.size' must be greater than or equal to 1"]),
        ("rollout:\n  window: {size: 1, mode: sliding}", ["r.yaml:3: ", "'fixed', 'random' or 'progressive'"]),
        ("rollout:\n  window: {size: 1, evry: 2}", ["r.yaml:3: ", "'rollout.window.evry'", "Did you mean 'every'?"]),
        ("rollout: {window: 2}", ["r.yaml:2: ", "'rollout.window'"]),
        ("objective: 3", ["r.yaml:2: The objective must be a name or a mapping"]),
        ("objective: {name: 3}", ["r.yaml:2: The objective has a name that is not text"]),
        ("optimizer: {config: 1}", ["r.yaml:2: The optimizer 'adamw' has no option 'config'"]),
        (
            "stochasticizer: {name: asfmc, gap: 0.1, ratio: 0.5}",
            ["r.yaml:2: The stochasticizer 'asfmc'", "only one of"],
        ),
        ("rewards: []", ["r.yaml:2: ", "'rewards'", "at least 1"]),
        ("rewards: 5", ["r.yaml:2: ", "'rewards'"]),
        ("rewards:\n  - shapes\n  - shpes", ["r.yaml:4: There is no reward named 'shpes'", "Did you mean 'shapes'?"]),
        ("rewards:\n  - name: shapes\n    weight: big", ["r.yaml:4: ", "'rewards.0.weight' must be a valid number"]),
        ("rewards: [{weight: 2}]", ["r.yaml:2: The name of the reward is missing"]),
        ("rewards: [{name: python}]", ["r.yaml:2: "]),
        ("rewards: [{name: python, target: x}]", ["r.yaml:2: "]),
        ("prompts: shapes-tran", ["r.yaml:2: There is no prompt-set named 'shapes-tran'", "'shapes-train'"]),
        ("eval: {prompts: nothing}", ["r.yaml:2: There is no prompt-set named 'nothing'"]),
        ("eval:\n  rewards:\n    - shapes\n    - jpg", ["r.yaml:5: There is no reward named 'jpg'"]),
        ("model: {name: two-time, size: big}", ["r.yaml:1: The model 'two-time': option 'size'"]),
        ("model: tow-time", ["r.yaml:1: There is no model named 'tow-time'", "Did you mean 'two-time'?"]),
    ],
)
def test_files(write: Write, text: str, parts: list[str]) -> None:
    path = write(text if text.startswith("model") else f"model: two-time\n{text}\n")
    with pytest.raises(UsageError) as caught:
        resolve(path)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("flags", "start"),
    [
        ({"model": "tow-time"}, "--model: There is no model named 'tow-time'. Did you mean 'two-time'?"),
        ({"objective": "gprp"}, "--objective: There is no objective named 'gprp'. Did you mean 'grpo'?"),
        ({"optimizer": "adam"}, "--optimizer: There is no optimizer named 'adam'. Did you mean 'adamw'?"),
        ({"stochasticizer": "asfcm"}, "--stochasticizer: There is no stochasticizer named 'asfcm'."),
        ({"reward": ["shape"]}, "--reward: There is no reward named 'shape'. Did you mean 'shapes'?"),
        ({"reward": ["shapes=heavy"]}, "--reward shapes=heavy: the weight 'heavy' is not a number."),
        ({"reward": ["shapes="]}, "--reward shapes=: the weight '' is not a number."),
        ({"reward": ["shapes=nan"]}, "--reward shapes=nan: the weight 'nan' is not a number."),
        ({"reward": ["shapes=0"]}, "--reward: Every reward has weight 0"),
        ({"reward": ["shapes", "shapes=2"]}, "--reward: The reward 'shapes' is given 2 times."),
        (
            {"reward": ["python:fn"]},
            "--reward: The reward 'python': option 'target' must have the right form (given: 'fn')",
        ),
        ({"lr": 0.0}, "--lr: The optimizer 'adamw': option 'lr' must be greater than 0 (given: 0.0)."),
        ({"lr": float("nan")}, "--lr: The optimizer 'adamw': option 'lr' must be"),
        ({"steps": 0}, "--steps: The recipe: key 'rollout.steps' must be greater than or equal to 1 (given: 0)."),
        ({"iterations": -1}, "--iterations: The recipe: key 'train.iterations'"),
        ({"seed": -1}, "--seed: The recipe: key 'train.seed'"),
        ({"device": "gpu"}, "--device: The recipe: key 'train.device'"),
        ({"dtype": "half"}, "--dtype: The recipe: key 'train.dtype' must be 'fp32' or 'bf16'"),
        ({"prompts": "shapes-test"}, "--prompts: There is no prompt-set named 'shapes-test'."),
        ({"learning_rate": 1}, "There is no flag '--learning_rate' that sets a recipe value."),
    ],
)
def test_flags(flags: dict[str, object], start: str) -> None:
    assert refusal(None, flags).startswith(start)


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("lora.rank", "'--set lora.rank' is not of the form PATH=VALUE."),
        ("=3", "'--set =3' is not of the form PATH=VALUE."),
        ("lora..rank=3", "'--set lora..rank=3' is not of the form PATH=VALUE."),
        ("lora.rnk=3", "--set lora.rnk=3: The recipe has no key 'lora.rnk'. Did you mean 'rank'?"),
        ("lorra.rank=3", "--set lorra.rank=3: The recipe has no key 'lorra'. Did you mean 'lora'?"),
        ("iterations=3", "--set iterations=3: The recipe has no key 'iterations'. Did you mean 'train.iterations'?"),
        ("seed=3", "--set seed=3: The recipe has no key 'seed'. Did you mean 'train.seed' or 'eval.seed'?"),
        (
            "rollout.antithetic=true",
            "--set rollout.antithetic=true: The recipe has no key 'rollout.antithetic'. Did you mean"
            " 'rollout.branch.antithetic'?",
        ),
        (
            "lora.rank=high",
            "--set lora.rank=high: The recipe: key 'lora.rank' must be a valid integer (given: 'high').",
        ),
        ("lora.rank=[1", "--set lora.rank=[1: this is not YAML: "),
        ("lora.rank=a: b: c", "--set lora.rank=a: b: c: this is not YAML: "),
        ("lora.rank.x=1", "--set lora.rank.x=1: The recipe: key 'lora.rank' must be a valid integer"),
        ("objective.clip=1", "--set objective.clip=1: The objective 'grpo' has no option 'clip'."),
        ("rewards.3.weight=1", "--set rewards.3.weight=1: there is no entry 3 in a list of 1."),
        ("rewards.x=1", "--set rewards.x=1: "),
        ("rewards={a: 1, a: 2}", "--set rewards={a: 1, a: 2}: the key 'a' is given twice."),
        ("optimizer=", "--set optimizer=: The optimizer must be a name or a mapping with a name (given: None)."),
    ],
)
def test_set(text: str, start: str) -> None:
    assert refusal(None, {}, [text]).startswith(start)


def test_config_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    assert refusal("nowhere.yaml", {}).startswith("There is no file nowhere.yaml.")
    assert refusal("a/b", {}).startswith("There is no file a/b.")
    assert refusal("folder", {}).startswith("folder is a folder.")
    unknown = refusal("meanflow-shape", {})
    assert unknown.startswith("There is no recipe file and no shipped recipe named 'meanflow-shape'. Did you mean")
    assert "scm-shapes" in unknown


@pytest.mark.parametrize(
    "text",
    [
        "rewards: [python:my.mod:fn]",
        "rewards:\n  [{name: python, target: 'my.mod:fn'}]",
        "rewards:\n  [{name: 'python:my.mod:fn', weight: 2}]",
        "rewards: python:my.mod:fn",
        "eval:\n  rewards: [python:my.mod:fn]",
    ],
)
def test_code_in_a_file_needs_permission(write: Write, text: str) -> None:
    path = write(f"model: two-time\n{text}\n")
    message = refusal(path, {})
    assert message.startswith("r.yaml:")
    assert "'my.mod:fn'" in message
    assert "--allow-code" in message
    with pytest.raises(UsageError, match="allow_code=True"):
        Recipe.from_yaml(path)
    assert any(r.label == "my.mod:fn" for r in Recipe.from_yaml(path, allow_code=True).measured_rewards)


@pytest.mark.parametrize(
    ("entry", "option"),
    [
        ("name: remote, url: 'http://10.0.0.1:1'", "url"),
        ("name: vlm-judge, model: m, url: 'http://10.0.0.1:1'", "url"),
    ],
)
@pytest.mark.parametrize("place", ["rewards: [{%s}]", "rewards: {%s}", "eval: {rewards: [{%s}]}"])
def test_an_address_in_a_file_needs_permission(write: Write, place: str, entry: str, option: str) -> None:
    path = write(f"model: two-time\n{place % entry}\n")
    message = refusal(path, {})
    assert message.startswith("r.yaml:2: the recipe sends images and prompts over the network: ")
    assert f"'{option}' of the reward" in message
    assert "--allow-code" in message
    assert Recipe.from_yaml(path, allow_code=True).measured_rewards


@pytest.mark.parametrize(("name", "option"), [("remote", "token_env"), ("vlm-judge", "api_key_env")])
def test_a_secret_that_a_file_names_needs_permission(write: Write, name: str, option: str) -> None:
    path = write(f"model: two-time\nrewards: [{{name: {name}, {option}: HOME}}]\n")
    message = refusal(path, {}, ["rewards.0.url=http://10.0.0.1:1"])
    assert message.startswith("r.yaml:2: the recipe sends the content of an environment variable")
    assert f"'{option}'" in message


def test_an_address_on_the_command_line_needs_no_permission() -> None:
    given = resolve(None, {"model": "two-time", "reward": ["remote"]}, ["rewards.0.url=http://127.0.0.1:1"])
    assert given.recipe.rewards[0].name == "remote"


@pytest.mark.parametrize(
    "text",
    [
        "rollout.groups=100001",
        "rollout.group_size=4097",
        "rollout.steps=1001",
        "train.updates_per_iteration=1001",
        "train.iterations=10000001",
        "lora.rank=4097",
        "eval.num=1000001",
    ],
)
def test_numbers_beyond_use_are_typing_errors(text: str) -> None:
    assert "less than or equal to" in refusal(None, {"model": "two-time"}, [text])


def test_a_device_is_one_of_those_that_there_are() -> None:
    assert "must be auto, cpu, cuda or cuda:INDEX (given: 'x')" in refusal(None, {"model": "two-time", "device": "x"})


def test_times_of_a_grid_are_finite_numbers() -> None:
    message = refusal(None, {"model": "two-time"}, ["rollout.grid=[1, .nan, 0.5, 0.2, 0]"])
    assert "The grid must be a name or a list of finite times" in message


def test_code_of_a_file_that_a_flag_replaces_needs_none(write: Write) -> None:
    path = write("model: two-time\nrewards: [python:my.mod:fn]\n")
    assert resolve(path, {"reward": ["shapes"]}).recipe.rewards[0].name == "shapes"
    # a weight from the command line does not make the file's code the user's own
    assert "--allow-code" in refusal(path, {}, ["rewards.0.weight=2"])


def test_a_default_recipe_must_state_every_section(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write("model: {name: two-time}\nrewards: [shapes]\n").resolve()
    monkeypatch.setattr("fmg.recipe.recipe.config_path", lambda name: path)
    with pytest.raises(UsageError, match="lacks the section 'stochasticizer'"):
        resolve(None, {"model": "two-time"})


def test_errors_of_python_calls_name_the_path() -> None:
    with pytest.raises(UsageError, match=r"^The recipe: key 'train.iterations' must be a valid integer"):
        Recipe.default(model="two-time", **{"train.iterations": "3"})
    with pytest.raises(UsageError, match=r"^The recipe has no key 'train.iteration'"):
        Recipe.default(model="two-time").with_({"train.iteration": 3})
    with pytest.raises(CompositionError):
        Recipe.default(model="single-time", stochasticizer="asfmc")
