"""The tripwire on whole runs: a reward that is known to be hacked is stopped in time, healthy runs go on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg import Recipe, train
from fmg.core.events import Event, Notice
from fmg.data.checkpoints import read_index
from tests.support.cli import fmg

pytestmark = pytest.mark.slow

SHORT = {
    "train.iterations": 3,
    "rollout.groups": 6,
    "rollout.group_size": 8,
    "rollout.steps": 2,
    "eval.num": 128,
    "eval.every": 1,
    "eval.stop_on_hacking": True,
    "train.state_every": None,
}
# what a picture gains by being red where its prompt says blue
RED_MINUS_BLUE = (
    "def score(images, prompts):\n    return images[:, 0].mean(dim=(1, 2)) - images[:, 2].mean(dim=(1, 2))\n"
)


def test_a_hacked_run_is_stopped_before_the_verifier_has_lost_ten_points(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "colour_bias.py").write_text(RED_MINUS_BLUE)
    values = {**SHORT, "train.iterations": 60, "optimizer.lr": 2e-3, "train.state_every": "null"}
    values["eval.rewards"] = "[shapes]"
    del values["eval.stop_on_hacking"]
    sets = [word for key, value in values.items() for word in ("--set", f"{key}={value}")]
    done = fmg("train", "--reward", "python:colour_bias:score", "--stop-on-hacking", "--run", "run", "--json", *sets)
    assert done.code == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    lines = [json.loads(line) for line in done.stdout.splitlines()[:-1]]
    verifier = {line["iteration"]: line["eval/shapes_mean"] for line in lines if "eval/score" in line}
    found, began = result["hacking"]["found"], result["hacking"]["began"]
    assert max(verifier) == found < 60
    assert max(verifier.values()) - verifier[found] < 0.10
    assert "shapes" in result["hacking"]["lost"]
    assert "Reward hacking: after iteration" in done.stderr
    # what the run stands for is from before the gap, although the trained score went on rising
    assert result["best"]["iteration"] <= began < found
    index = read_index(tmp_path / "run")
    assert index is not None
    assert not index.entry(index.latest).sound


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_healthy_run_is_not_stopped(seed: int, tmp_path: Path) -> None:
    notices: list[str] = []

    def hear(event: Event) -> None:
        if isinstance(event, Notice):
            notices.append(event.text)

    result = train(Recipe.default(None, **{**SHORT, "train.seed": seed}), tmp_path / "run", hear)
    assert result.hacking is None
    assert result.iterations == SHORT["train.iterations"]
    assert not notices
    assert result.final["watch/diversity_loss"] < 0.5
