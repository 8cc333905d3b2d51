"""Reward gradients on the tiny folders of FLUX and SD3.5 and on shapes: two processes are one, and runs resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmg import Recipe
from fmg.data.run_folder import RunFolder
from tests.support import processes
from tests.support.recorded_run import Planned, record, write_plan
from tests.support.run_files import adapter, distance, metrics
from tests.tiny_flux import student_options
from tests.tiny_sd35 import sd35_options

pytestmark = pytest.mark.slow

# 15 samples, which neither processes nor micro-batches divide evenly
SMALL: dict[str, object] = {
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.iterations": 1,
    "train.updates_per_iteration": 2,
    "train.micro_batch": 4,
    "train.state_every": 1,
    "rollout.kind": "chain",
    "rollout.batch_size": 4,
    "rollout.groups": 3,
    "rollout.group_size": 5,
    "eval.num": 4,
    "eval.rewards": [],
}
WARMTH = [{"name": "python", "target": "tests.support.user_rewards:warmth", "gradient": True}]
FAILING = [{**WARMTH[0], "target": "tests.support.user_rewards:cannot_be_differentiated_in_process_1"}]
FOLDERS = {"lora.rank": 4, "lora.alpha": 8, "optimizer.lr": 1e-3, "rewards": WARMTH}
RESUMED = {**SMALL, "train.iterations": 2, "eval.every": 2, "rewards": ["shapes-clip"]}
FSDP2 = {"train.parallel": "fsdp2"}
DRAFT = {"objective": {"name": "reward-gradient", "jumps": 2, "l2_beta": 0.1}}
REFL = {"objective": {"name": "reward-gradient", "method": "refl", "checkpointing": True}}
LAST_STEP = {
    "rewards": ["shapes", {"name": "shapes-clip", "weight": 0}],
    "objective.last_step": {"weight": 0.5, "rewards": ["shapes-clip"]},
    "rollout.kind": "branch",
    "train.micro_batch": 1,
}
CASES = ("flux", "sd35", "shapes", "last-step")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process as NAME and of two as NAME-2, and of one that was interrupted as NAME-cut."""
    root = tmp_path_factory.mktemp("objectives")
    (root / "folders").mkdir()
    cases: dict[str, tuple[str | None, dict[str, object]]] = {
        "flux": ("meanflow-flux", {**SMALL, **FOLDERS, **DRAFT, **student_options(root / "folders", "duration")}),
        "sd35": ("sd35-meanflow", {**SMALL, **FSDP2, **FOLDERS, **REFL, **_named(sd35_options(root / "sd35"))}),
        "shapes": (None, {**RESUMED, **REFL}),
        "last-step": (None, {**RESUMED, **FSDP2, **LAST_STEP}),
        "fails": (None, {**SMALL, **REFL, "rewards": FAILING}),
    }

    def planned(name: str, folder: str, cut: int | None = None) -> Planned:
        model, options = cases[name]
        recipe = root / f"{folder}.yaml"
        recipe.write_text(Recipe.default(model, **options).to_yaml(), encoding="utf-8")
        return Planned(str(root / folder), str(recipe), cut)

    plan = write_plan(root / "plan.json", [planned(name, f"{name}-2") for name in (*CASES, "fails")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(root / "cache"))
        launched = processes.start(["-m", "tests.support.recorded_run", str(plan)], 2, root)
        record([planned(name, name) for name in CASES])
        record([planned(name, f"{name}-cut", cut=1) for name in ("shapes", "last-step")])
    ended = processes.finish(launched)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return root


def _named(options: dict[str, object]) -> dict[str, object]:
    return {f"model.{name}": value for name, value in options.items()}


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(name: str, root: Path) -> None:
    one, two = root / name, root / f"{name}-2"
    first, second = (load_file(two / f"gradients-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(float(x.abs().max()) > 0 for x in first.values())
    assert distance(first, load_file(one / "gradients-0.safetensors")) <= 1e-5
    ours, theirs = metrics(two / "run"), metrics(one / "run")
    assert {"last_step_reward" if name == "last-step" else "gradient_reward"} <= {key for line in ours for key in line}
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-5)


def test_a_reward_that_fails_in_the_update_of_one_process_ends_all_with_one_message(root: Path) -> None:
    errors = [json.loads((root / "fails-2" / f"error-{rank}.json").read_text()) for rank in (0, 1)]
    assert [error["kind"] for error in errors] == ["RewardError", "RewardError"]
    assert "the scorer went away" in errors[0]["what"]
    assert [error["reported"] for error in errors] == [False, True]
    assert RunFolder(root / "fails-2" / "run").state().state == "failed"


@pytest.mark.parametrize("name", ["shapes", "last-step"])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(name: str, root: Path) -> None:
    cut, whole = root / f"{name}-cut" / "run", root / name / "run"
    ours, theirs = adapter(cut, "checkpoint-2"), adapter(whole, "checkpoint-2")
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert metrics(cut) == metrics(whole)
