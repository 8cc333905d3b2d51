"""bf16 runs on a complete tiny FLUX folder: calls of one shape replay to ratio 1, others are recomputed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg import Recipe, train
from fmg.core.events import Event, Notice
from fmg.data.run_folder import RunFolder
from fmg.training.api import resume
from tests.support.run_files import stop_after
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_flux

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_flux(tmp_path_factory.mktemp("bf16") / "flux", time_scale=1.0)


def _recipe(folder: Path, rollout_batch: int) -> Recipe:
    return Recipe.default(
        "flux-fewstep",
        **{
            "model.folder": str(folder),
            "model.map": "two-time",
            "model.second_time": "duration",
            "model.time_scale": 1.0,
            "model.guidance": None,
            "model.resolution": RESOLUTION,
            "model.max_sequence_length": SEQUENCE,
            "stochasticizer": "auto",
            "rewards": ["jpeg-incompressibility"],
            "objective.clip_range": 1e-4,
            "rollout": {"groups": 2, "group_size": 5, "steps": 3, "grid": "uniform", "batch_size": rollout_batch},
            "train": {"iterations": 2, "dtype": "bf16", "micro_batch": 4, "trainable": "lora+duration", "seed": 0},
            "lora.rank": 2,
            "eval.num": 2,
            "eval.rewards": [],
        },
    )


@pytest.mark.parametrize("rollout_batch", [4, 10])
def test_a_bf16_run_passes_the_replay_gate(
    folder: Path, rollout_batch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    recipe = _recipe(folder, rollout_batch)
    heard: list[Event] = []
    train(recipe, tmp_path / "run", heard.append)
    gate = [event.text for event in heard if isinstance(event, Notice) and "Replay gate" in event.text]
    assert len(gate) == 1
    error = float(gate[0].split("<= ")[1].split(",")[0])
    assert error <= 0.1 * 1e-4
    if rollout_batch == 4:
        assert "taken from the rollout" in gate[0]
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["grad_norm"] > 0 for line in lines if "grad_norm" in line)


@pytest.mark.parametrize(("micro_batch", "looks_again"), [(4, False), (3, True)])
def test_a_run_resumed_with_other_calls_is_checked_again(
    folder: Path, micro_batch: int, looks_again: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    recipe = _recipe(folder, 4).with_({"train.iterations": 5, "train.state_every": 1})
    run = tmp_path / "run"
    assert train(recipe, run, stop_after(3)).interrupted
    file = RunFolder(run).recipe
    file.write_text(recipe.with_({"train.micro_batch": micro_batch}).to_yaml(), encoding="utf-8")
    heard: list[Event] = []
    resume(run, heard.append)
    gates = [event for event in heard if isinstance(event, Notice) and "Replay gate" in event.text]
    assert bool(gates) is looks_again
