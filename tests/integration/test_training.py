"""Whole runs on the embedded model: what is saved, what is used afterwards, and that the base is unchanged."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fmg import Recipe, evaluate, load, train
from fmg.core.errors import CompositionError, RewardError, UsageError
from fmg.core.events import Evaluated, Event, Notice
from fmg.data.checkpoints import chosen_checkpoint, read_index
from fmg.data.run_folder import RunFolder
from fmg.data.run_report import kept_picture
from fmg.inference.torch_backend import TorchBackend
from fmg.models.flux.model import FluxModel
from fmg.registry import models
from fmg.training.compose import compose
from fmg.training.evaluator import Evaluator
from fmg.training.launch import choose_sizes
from fmg.training.trainer import Trainer
from tests.support.run_files import change_recipe, stop_after

pytestmark = pytest.mark.slow

PROMPTS = ["a red circle on the left", "a blue square at the top"]
TINY = {
    "train.iterations": 2,
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "eval.num": 8,
    "eval.every": 1,
}


def tiny(**changes: object) -> Recipe:
    return Recipe.default(None, **{**TINY, **changes})


def pictures(model: object, seed: int = 3) -> Tensor:
    from fmg.inference import Generator

    assert isinstance(model, FluxModel)
    return Generator(TorchBackend(model), "uniform", 4).generate(PROMPTS, [seed, seed + 1]).images


def test_training_leaves_the_base_as_it_was(tmp_path: Path) -> None:
    source = models.build("meanflow-shapes")
    untouched = source.load(torch.device("cpu"), torch.float32)
    before = pictures(untouched)
    composed = compose(tiny(), torch.device("cpu"), torch.float32)
    assert isinstance(composed.model, FluxModel)
    digest = composed.model.base_digest()
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    Trainer(composed, run, choose_sizes(composed.recipe, "cpu"), lambda event: None).train()
    assert composed.model.base_digest() == digest
    assert not torch.equal(pictures(composed.model), before)
    with composed.model.adapter_enabled(False):
        assert torch.equal(pictures(composed.model), before)


def test_the_same_seed_gives_the_same_run(tmp_path: Path) -> None:
    lines = []
    for name in ("a", "b"):
        result = train(tiny(), tmp_path / name)
        entries = [json.loads(line) for line in result.run.metrics.read_text().splitlines()]
        lines.append([{k: v for k, v in entry.items() if not k.startswith("time/")} for entry in entries])
    assert lines[0] == lines[1]


# updates of 12 and of 5 rows, so that each of them is whole with one batch and in parts with the other
@pytest.mark.parametrize(("kind", "groups"), [("chain", 2), ("branch", 10)])
def test_the_micro_batch_and_the_rollout_batch_do_not_change_the_result(kind: str, groups: int, tmp_path: Path) -> None:
    weights = []
    for name, batch in (("whole", 12), ("split", 3)):
        batches = {"rollout.batch_size": batch, "train.micro_batch": batch}
        result = train(tiny(**{"rollout.kind": kind, "rollout.groups": groups, **batches}), tmp_path / name)
        path = next((result.run.checkpoints / "checkpoint-2").rglob("adapter_model.safetensors"))
        from safetensors.torch import load_file

        weights.append(torch.cat([x.flatten() for _, x in sorted(load_file(path).items())]))
    assert float((weights[0] - weights[1]).norm() / weights[0].norm()) < 1e-3


def test_ctrl_c_keeps_and_uses_what_was_trained(tmp_path: Path) -> None:
    result = train(tiny(**{"eval.every": 100, "train.iterations": 5}), tmp_path / "run", stop_after(1))
    assert result.interrupted
    assert result.run.state().state == "interrupted"
    index = read_index(result.run.path)
    assert index is not None
    assert index.entry(index.best).iteration > 0
    assert index.entry(index.best).score is None
    chosen = chosen_checkpoint(result.run.path)
    assert chosen is not None
    tuned, base = load(result.run.path), load(result.run.path, adapter=False)
    drawn = [g.generate(PROMPTS, [0, 1]).images for g in (tuned, base)]
    assert not torch.equal(drawn[0], drawn[1])


def test_ctrl_c_in_the_first_evaluation_is_not_a_failure(tmp_path: Path) -> None:
    def stop(event: Event) -> None:
        if isinstance(event, Evaluated):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(tiny(), tmp_path / "run", stop)
    assert RunFolder(tmp_path / "run").state().state == "interrupted"


def test_a_reward_that_fails_in_mid_run_costs_nothing_that_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dying.py").write_text(
        "calls = 0\n"
        "def reward(images, prompts):\n"
        "    global calls\n"
        "    calls += 1\n"
        "    if calls == 5:\n"
        "        raise RuntimeError('gone')\n"
        "    return images.mean((1, 2, 3))\n"
    )
    recipe = tiny(
        **{"rewards": [{"name": "python", "target": "dying:reward"}], "eval.rewards": [], "eval.every": 100},
        **{"train.iterations": 9},
    )
    heard: list[Event] = []
    with pytest.raises(RewardError, match="gone"):
        train(recipe, tmp_path / "run", heard.append)
    (saved,) = (event.text for event in heard if isinstance(event, Notice) and "Resume with" in event.text)
    # the reward is code, which resuming has to be allowed to run
    assert saved.endswith(f"fmg train --resume {tmp_path / 'run'} --allow-code")
    assert RunFolder(tmp_path / "run").state().state == "failed"
    index = read_index(tmp_path / "run")
    assert index is not None
    assert index.entry(index.latest).iteration > 0


def test_a_foreign_run_does_not_run_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = train(tiny(), tmp_path / "run").run
    recipe = Recipe.from_yaml(run.recipe).with_({"rewards": [{"name": "python", "target": "evil:f"}]})
    change_recipe(run.path, recipe)
    (tmp_path / "evil.py").write_text(
        "from pathlib import Path\nPath('PWNED').touch()\ndef f(images, prompts):\n    return images.mean((1, 2, 3))\n"
    )
    with pytest.raises(UsageError, match="give allow_code=True"):
        evaluate(run.path, num=2)
    assert not (tmp_path / "PWNED").exists()
    load(run.path).generate(PROMPTS, [0, 1])
    assert not (tmp_path / "PWNED").exists()
    evaluate(run.path, num=2, allow_code=True)
    assert (tmp_path / "PWNED").exists()


def test_two_targets_are_compared_on_one_grid_and_with_the_runs_own_base(tmp_path: Path) -> None:
    result = train(tiny(**{"rollout.grid": [1.0, 0.7, 0.3, 0.0], "rollout.steps": 3}), tmp_path / "run")
    against_base = evaluate(result.run.path, against="base", num=8)
    against_name = evaluate(result.run.path, against="meanflow-shapes", num=8)
    assert against_base.against[0].results == against_name.against[0].results
    assert against_base.against[0].grid == against_base.grid == "explicit"


def test_everything_shows_the_checkpoint_that_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is the moving average of iteration 1, while the last evaluation is of iteration 2."""
    planned = iter([0.1, 0.2, 0.9, 0.3, 0.4])
    evaluate = Evaluator.evaluate

    def scored(watcher: Evaluator, averaged: bool = False) -> dict[str, float]:
        return {**evaluate(watcher, averaged), "eval/score": next(planned)}

    monkeypatch.setattr(Evaluator, "evaluate", scored)
    values = {"train.iterations": 2, "train.ema_decay": 0.9, "eval.every": 1, "eval.min_diversity": 0.0}
    result = train(tiny(**values), tmp_path / "run")
    outcome = result.outcome
    assert (outcome.title, outcome.kept["eval/score"], outcome.last["eval/score"]) == (
        "iteration 1, moving average",
        0.9,
        0.4,
    )
    assert sorted(path.name for path in result.run.samples.iterdir()) == [
        "iteration-0000.png",
        "iteration-0001-ema.png",
        "iteration-0001.png",
        "iteration-0002.png",
    ]
    picture = kept_picture(result.run, outcome)
    assert picture is not None
    assert np.array_equal(np.asarray(picture), np.asarray(Image.open(result.run.before_after)))
    assert "iteration 1, moving average" in (result.run.path / "report.html").read_text(encoding="utf-8")
    cards = {path.parent.name: path.read_text(encoding="utf-8") for path in result.run.checkpoints.glob("*/README.md")}
    assert "its result" in cards["checkpoint-1-ema"]
    assert "the run keeps `checkpoint-1-ema`" in cards["checkpoint-2"]
    assert (result.run.checkpoints / "checkpoint-1-ema" / "samples.png").is_file()


def test_a_checkpoint_is_not_chosen_on_the_noise_it_is_judged_on(tmp_path: Path) -> None:
    result = train(tiny(**{"train.iterations": 1}), tmp_path / "run")
    judged = evaluate("meanflow-shapes", num=8, seed=0).result("shapes-quality", "total", 4).mean
    assert result.initial["eval/shapes-quality_mean"] != pytest.approx(judged, abs=1e-6)


def test_a_grid_that_the_stochasticizer_cannot_use_is_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    recipe = tiny(**{"rollout.grid": "flux-shift", "stochasticizer": {"name": "asfmc-euler", "epsilon": 0.6}})
    with pytest.raises(CompositionError, match="asfmc-euler"):
        train(recipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_more_updates_than_samples_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CompositionError, match="do not fit"):
        train(tiny(**{"train.updates_per_iteration": 9}), tmp_path / "run")


def test_single_time_maps_and_sample_objectives_train_too(tmp_path: Path) -> None:
    single_time = Recipe.default("scm-shapes", **TINY, **{"train.seed": 1})
    for name, recipe in (("scm", single_time), ("rwfm", tiny(objective="rwfm", **{"rollout.kind": "chain"}))):
        assert train(recipe, tmp_path / name).iterations == 2
