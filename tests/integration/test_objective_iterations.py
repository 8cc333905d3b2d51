"""Every objective trains tiny folders of the real classes, on two processes as on one; that of SD3.5 is sharded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmg import Recipe
from fmg.core.types import Batch
from fmg.registry import objectives
from fmg.rl.keyed_noise import NoiseKey
from fmg.rl.noised import shared_correction
from fmg.rl.rollouts import noise
from fmg.training.compose import compose
from fmg.training.distributed import DistContext
from tests.support import processes
from tests.support.objective_iterations import iterate
from tests.support.run_files import metrics
from tests.tiny_flux import student_options
from tests.tiny_sd35 import sd35_options

pytestmark = pytest.mark.slow

SHAPE = {
    "rewards": ["python:tests.support.user_rewards:redness"],
    "eval.rewards": [],
    "train.device": "cpu",
    "train.dtype": "fp32",
    "train.ema_decay": None,
    "lora.rank": 4,
    "lora.alpha": 8,
    "optimizer": {"name": "sgd", "lr": 1.0, "momentum": 0.0},
    # 15 samples: neither groups nor rows nor micro-batches divide by two
    "rollout.groups": 3,
    "rollout.group_size": 5,
    "rollout.steps": 3,
    "rollout.kind": "chain",
}
MODELS = ("meanflow-flux", "sd35-meanflow")
# the reward of the tiny folders has no gradient, and grpo and its guard are in tests/integration/test_processes.py
NAMES = sorted(set(objectives.names()) - {"grpo", "grpo-guard", "reward-gradient"})
OPTIONS = {
    "meanflow-nft": {"objective.derivative": "jvp"},
    "reinforce": {"train.updates_per_iteration": 1},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MODEL-OBJECTIVE of one process and MODEL-OBJECTIVE-two of two, all from one launch."""
    root = tmp_path_factory.mktemp("objectives")
    model = {
        "meanflow-flux": student_options(root, "duration"),
        "sd35-meanflow": {
            "train.parallel": "fsdp2",
            **{f"model.{key}": value for key, value in sd35_options(root / "sd35").items()},
        },
    }
    plan: list[tuple[str, str]] = []
    for name in MODELS:
        for objective in NAMES:
            options = {**SHAPE, **model[name], "objective": objective, **OPTIONS.get(objective, {})}
            file = root / f"{name}-{objective}.yaml"
            file.write_text(Recipe.default(name, **options).to_yaml(), encoding="utf-8")
            plan.append((str(root / f"{name}-{objective}"), str(file)))
    together = root / "plan.json"
    together.write_text(json.dumps([(f"{folder}-two", file) for folder, file in plan]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(root / "cache"))
        launched = processes.start(["-m", "tests.support.objective_iterations", str(together)], 2, root)
        iterate(plan, DistContext())
    ended = processes.finish(launched)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return root


@pytest.mark.parametrize("objective", NAMES)
@pytest.mark.parametrize("model", MODELS)
def test_two_processes_make_the_update_of_one(model: str, objective: str, root: Path) -> None:
    alone, together = root / f"{model}-{objective}", root / f"{model}-{objective}-two"
    first, second, one = (
        load_file(file)
        for file in (
            together / "weights-0.safetensors",
            together / "weights-1.safetensors",
            alone / "weights-0.safetensors",
        )
    )
    assert all(torch.equal(first[name], second[name]) for name in one)
    # a fresh LoRA has B = 0, so that what is in it was learned
    learned = [name for name in one if "lora_B" in name]
    moved = torch.cat([one[name].flatten() for name in learned])
    ours = torch.cat([first[name].flatten() for name in learned])
    assert float(moved.norm()) > 0
    torch.testing.assert_close(ours, moved, rtol=1e-3, atol=1e-5 * float(moved.abs().max()))
    (mine,), (other,) = metrics(together), metrics(alone)
    assert mine == pytest.approx(other, rel=1e-3, abs=1e-6)


# SD3.5 embeds times x 1000, of which random weights make more than a step of .005 resolves
@pytest.mark.parametrize(("model", "step"), [("meanflow-flux", 2e-3), ("sd35-meanflow", 2e-5)])
def test_both_derivatives_agree_on_the_networks(model: str, step: float, root: Path) -> None:
    recipe = Recipe.from_yaml(root / f"{model}-meanflow-nft.yaml", allow_code=True)
    loaded = compose(recipe, torch.device("cpu"), torch.float32).model
    with torch.no_grad():
        for _, parameter in loaded.trainable():
            parameter += 0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    loaded.snapshot()
    keys = [NoiseKey(3, 0, 0, member, 0) for member in range(4)]
    rows = {
        "x_t": noise(keys, loaded.latent_shape),
        "target": noise(keys, loaded.latent_shape, "other"),
        "t": torch.tensor([0.9, 0.6, 0.3, 0.7]),
        "s": torch.tensor([0.5, 0.0, 0.2, 0.7]),
    }
    batch = Batch(rows, loaded.encode(["a red circle"] * 4))
    exact = shared_correction(loaded.policies.old, batch, "jvp", 0.0)
    central = shared_correction(loaded.policies.old, batch, "central", step)
    assert exact[3].eq(0).all()
    assert float((central - exact).norm() / exact.norm()) < 0.01
