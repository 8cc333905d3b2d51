"""Two processes train like one (DDP and FSDP2, gloo on the CPU), and neither outlives the other."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fmg import Recipe
from fmg.data.checkpoints import read_index
from fmg.data.run_folder import RunFolder
from tests.support import processes, trackers
from tests.support.recorded_run import Planned, record, write_plan
from tests.support.run_files import adapter, distance, metrics
from tests.tiny_flux import student_options

pytestmark = pytest.mark.slow

ENGINES = ("ddp", "fsdp2")
REDNESS = "python:tests.support.user_rewards:redness"
# 15 samples and 45 rows, 23 and 22 of them in an update: neither groups, samples, rows nor micro-batches divide by two
UNEVEN = {
    "train.device": "cpu",
    "train.iterations": 5,
    "train.updates_per_iteration": 2,
    # network calls of one shape, whose rounding is the same in one process and in two
    "train.micro_batch": 4,
    "rollout.batch_size": 4,
    "train.state_every": 1,
    "rollout.kind": "chain",
    "rollout.groups": 3,
    "rollout.group_size": 5,
    "eval.num": 5,
    "eval.every": 5,
    "eval.steps": 1,
    "eval.rewards": [],
}
# groups are divided among processes: 5 of 3 siblings, one group per network call, so two processes have 3 and 2
BRANCHED = {
    **UNEVEN,
    "rollout.kind": "branch",
    "rollout.groups": 5,
    "rollout.group_size": 3,
    "rollout.branch.steps": "adaptive",
    "rollout.prompt_sampling": "dynamic",
    "train.micro_batch": 1,
}
VARIANT = {
    **UNEVEN,
    "train.iterations": 2,
    "train.trainable": "lora+duration",
    "train.ema_decay": 0.9,
    # any movement is more, so that each iteration stops after its first update
    "objective.target_kl": 1e-12,
    # updates that are skipped keep their place in the schedule
    "train.lr_schedule": "cosine",
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one process as NAME and of two as NAME-ENGINE, all from one launch."""
    root = tmp_path_factory.mktemp("processes")
    flux = {
        **UNEVEN,
        **student_options(root, "duration"),
        "rewards": [REDNESS],
        "train.dtype": "fp32",
        "lora.rank": 4,
        "lora.alpha": 8,
        # the fewest that its grid has
        "eval.steps": 3,
        "optimizer.lr": 1e-3,
    }
    fails = {**UNEVEN, "rewards": ["python:tests.support.user_rewards:fails_in_process_1"]}

    def planned(name: str, model: str | None, options: dict[str, object], cut: int | None = None) -> Planned:
        recipe = root / f"{name}.yaml"
        recipe.write_text(Recipe.default(model, **options).to_yaml(), encoding="utf-8")
        return Planned(str(root / name), str(recipe), cut)

    cases = {"shapes": (None, UNEVEN), "branched": (None, BRANCHED), "flux": ("meanflow-flux", flux)}
    together = [
        planned(f"{name}-{engine}", model, {**options, "train.parallel": engine})
        for name, (model, options) in cases.items()
        for engine in ENGINES
    ]
    together += [
        planned("shapes-cut", None, {**UNEVEN, "train.parallel": "fsdp2"}, cut=3),
        planned("branched-cut", None, {**BRANCHED, "train.parallel": "fsdp2"}, cut=3),
        planned("variant-fsdp2", None, {**VARIANT, "train.parallel": "fsdp2", "trackers": ["tensorboard"]}),
        planned("fails", None, fails),
    ]
    alone = [planned(name, model, options) for name, (model, options) in {**cases, "variant": (None, VARIANT)}.items()]
    arguments = ["-m", "tests.support.recorded_run", str(write_plan(root / "plan.json", together))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(root / "cache"))
        launched = processes.start(arguments, 2, root)
        record(alone)
    ended = processes.finish(launched)
    assert [code for code, _, _ in ended] == [0, 0], ended
    return root


def _adapter(folder: Path, name: str = "checkpoint-5") -> dict[str, Tensor]:
    return adapter(folder / "run", name)


def _metrics(folder: Path) -> list[dict[str, float]]:
    return metrics(folder / "run")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("model", ["shapes", "branched", "flux"])
def test_two_processes_train_like_one(model: str, engine: str, root: Path) -> None:
    one, two = root / model, root / f"{model}-{engine}"
    first, second = (load_file(two / f"gradients-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert distance(first, load_file(one / "gradients-0.safetensors")) <= 1e-6
    # 10 updates
    assert distance(_adapter(two), _adapter(one)) <= 1e-5
    for ours, theirs in zip(_metrics(two), _metrics(one), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-6)


def test_embedder_average_and_an_early_stop_are_those_of_one_process(root: Path) -> None:
    ours, theirs = _metrics(root / "variant-fsdp2"), _metrics(root / "variant")
    assert [line["skipped_updates"] for line in ours if "skipped_updates" in line] == [1.0, 1.0]
    for mine, other in zip(ours, theirs, strict=True):
        assert mine == pytest.approx(other, rel=1e-4, abs=1e-6)
    index = read_index(root / "variant" / "run")
    assert index is not None
    for entry in index.saved:
        assert distance(_adapter(root / "variant-fsdp2", entry.name), _adapter(root / "variant", entry.name)) <= 1e-5


@pytest.mark.parametrize("name", ["shapes", "branched"])
def test_two_processes_resume_a_run_bit_for_bit(name: str, root: Path) -> None:
    cut, whole = root / f"{name}-cut", root / f"{name}-fsdp2"
    ours, theirs = _adapter(cut), _adapter(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert _metrics(cut) == _metrics(whole)
    assert read_index(cut / "run") == read_index(whole / "run")


def test_only_the_main_process_has_trackers(root: Path) -> None:
    run = root / "variant-fsdp2" / "run"
    # one event file: a second process would have written another
    assert len(list((run / "trackers" / "tensorboard").iterdir())) == 1
    rows, images, _ = trackers.tensorboard(run)
    trackers.assert_same(rows, trackers.logged(run), rel=2e-7)
    assert images == [0, 2]


def test_a_reward_that_fails_in_one_process_ends_all_with_one_message(root: Path) -> None:
    errors = [json.loads((root / "fails" / f"error-{rank}.json").read_text()) for rank in (0, 1)]
    assert [error["kind"] for error in errors] == ["RewardError", "RewardError"]
    assert "the scorer went away" in errors[0]["what"]
    assert [error["reported"] for error in errors] == [False, True]
    assert RunFolder(root / "fails" / "run").state().state == "failed"


LONG = ["train", "--iterations", "1000", "--set", "eval.every=1000", "--set", "eval.num=4", "--set", "eval.steps=1"]
SMALL = ["--device", "cpu", "--set", "rollout.groups=2", "--set", "rollout.group_size=4", "--run", "run"]


def _wait_for_updates(run: Path, seconds: float = 400) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        file = run / "metrics.jsonl"
        if file.is_file() and file.read_text().count("grad_norm") >= 2:
            return
        time.sleep(0.2)
    raise AssertionError("the run does not train")


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_process_ends_the_other_with_one_message(killed: int, tmp_path: Path) -> None:
    pair = processes.start(["-m", "fmg", *LONG, *SMALL], 2, tmp_path)
    try:
        _wait_for_updates(tmp_path / "run")
        os.kill(pair[killed].pid, signal.SIGKILL)
    finally:
        ended = processes.finish(pair, timeout=200)
    code, _, err = ended[1 - killed]
    assert (ended[killed][0], code) == (-signal.SIGKILL, 1)
    said = [line for line in err.splitlines() if not line.startswith("[transformers]")]
    assert len(said) == 1, err
    assert f"Process {killed} of 2 (counted from 0) died without reporting an error." in said[0]
    assert RunFolder(tmp_path / "run").state().state == "failed"
