"""The reward-hacking monitor in whole runs, with scripted rewards; `benchmarks/tripwire.py` is the real case."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.data.checkpoints import read_index
from tests.support.cli import Invocation, fmg

pytestmark = pytest.mark.slow

# A score that differs between images, and a part that moves from evaluation to evaluation; rollouts have 8 images.
SCRIPTED = """
import torch
EVALUATED = 64
calls = {"trained": 0, "held": 0}

def _score(name, images, rates):
    count = calls[name]
    calls[name] += len(images) == EVALUATED
    return images.mean(dim=(1, 2, 3)) + rates[min(count, len(rates) - 1)]

def trained(images, prompts):
    return _score("trained", images, [0.0, 1.0, 2.0, 3.0])

def held(images, prompts):
    return _score("held", images, [0.0, 0.0, -1.0, -2.0])

def steady(images, prompts):
    return images.mean(dim=(1, 2, 3))
"""


def run(folder: Path, held_out: str, monkeypatch: pytest.MonkeyPatch, module: str, *more: str) -> Invocation:
    monkeypatch.chdir(folder)
    (folder / f"{module}.py").write_text(SCRIPTED)
    values = ["rollout.groups=2", "rollout.group_size=4", "rollout.steps=2", "eval.num=64", "eval.every=1"]
    sets = [word for value in values for word in ("--set", value)]
    held = ("--set", f"eval.rewards=[{{name: python, target: '{module}:{held_out}'}}]")
    reward = f"python:{module}:trained"
    return fmg("train", "--reward", reward, "--iterations", "4", "--run", "run", "--json", *sets, *held, *more)


def test_a_hacked_run_is_stopped_and_keeps_an_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = run(tmp_path, "held", monkeypatch, "scripted_hack", "--stop-on-hacking")
    assert done.code == 0, done.stderr
    *lines, result = (json.loads(line) for line in done.stdout.splitlines())
    assert result["hacking"] == {"began": 1, "found": 2, "lost": ["scripted_hack:held"]}
    assert not result["interrupted"]
    # the trained score continued to rise, but a checkpoint inside the gap is not kept
    assert result["best"]["iteration"] == 1
    assert max(line["iteration"] for line in lines) == 2
    assert "Reward hacking: after iteration 1 a gap opened" in done.stderr
    assert "Stopped after iteration 2" in done.stderr
    index = read_index(tmp_path / "run")
    assert index is not None
    assert (index.entry(index.best).eligible, index.entry(index.latest).eligible) == (True, False)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"
    shown = fmg("doctor", "run", "run")
    assert shown.code == 1
    assert "--stop-on-hacking" in shown.stdout


def test_a_stopped_run_whose_ending_failed_does_not_continue_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr("fmg.training.api.write_cards", fail)
        failed = run(tmp_path, "held", monkeypatch, "scripted_end", "--stop-on-hacking", "--set", "train.state_every=1")
    assert failed.code == 1
    assert "no space left" in failed.stderr
    resumed = fmg("train", "--resume", "run", "--allow-code", "--json")
    assert resumed.code == 0, resumed.stderr
    (result,) = (json.loads(line) for line in resumed.stdout.splitlines())
    assert result["hacking"] == {"began": 1, "found": 2, "lost": ["scripted_end:held"]}
    assert result["best"]["iteration"] == 1
    assert "Stopped after iteration 2" in resumed.stderr
    # it was reported when it was found
    assert "Reward hacking" not in resumed.stderr
    assert json.loads((tmp_path / "run" / "run.json").read_text())["state"] == "finished"


def test_without_the_flag_it_is_reported_once_and_a_healthy_run_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reported = run(tmp_path, "held", monkeypatch, "scripted_report")
    *lines, result = (json.loads(line) for line in reported.stdout.splitlines())
    assert reported.stderr.count("Reward hacking") == 1
    assert max(line["iteration"] for line in lines) == 4
    assert (result["hacking"]["found"], result["best"]["iteration"]) == (2, 1)
    (tmp_path / "healthy").mkdir()
    healthy = run(tmp_path / "healthy", "steady", monkeypatch, "scripted_health", "--stop-on-hacking")
    *lines, result = (json.loads(line) for line in healthy.stdout.splitlines())
    assert result["hacking"] is None
    assert "Reward hacking" not in healthy.stderr
    assert max(line["iteration"] for line in lines) == 4
    assert {"watch/trained_gain", "watch/diversity_loss"} <= lines[-1].keys()
