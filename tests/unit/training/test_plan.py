from __future__ import annotations

from pathlib import Path

import pytest

from fmg.data.run_folder import RunFolder
from fmg.registry.resolve import resolve
from fmg.training.plan import plan, size_text

SHAPE = [
    "eval.every=3",
    "eval.num=11",
    "rollout.groups=3",
    "rollout.group_size=5",
    "rollout.steps=4",
    "train.iterations=7",
]


def test_counts_of_a_run_with_transitions() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-endpoint"}, SHAPE)).facts
    assert facts["images an iteration"] == "15 (3 prompts x 5)"
    assert facts["transitions an image"] == "3"
    assert facts["network calls an iteration"] == "60 in the rollout, 45 in the updates"
    assert facts["images in all"] == "105 in 7 iterations"
    # iterations 0, 3, 6 and 7
    assert facts["evaluations"] == "4 x 11 images"


def test_a_stochasticizer_with_two_calls_doubles_its_transitions() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, SHAPE)).facts
    assert facts["network calls an iteration"] == "105 in the rollout, 90 in the updates"


def test_steps_outside_a_window_are_not_replayed_and_cost_one_call() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, [*SHAPE, "rollout.window={size: 1}"])).facts
    assert facts["transitions an image"] == "1"
    assert facts["network calls an iteration"] == "75 in the rollout, 30 in the updates"


def test_an_objective_on_samples_has_no_transitions_and_the_rows_that_it_draws() -> None:
    facts = plan(resolve(None, {"objective": "rwfm"}, [*SHAPE, "objective.draws=3"])).facts
    assert "transitions an image" not in facts
    assert facts["network calls an iteration"] == "60 in the rollout, 45 in the updates"
    assert facts["updates an iteration"].startswith("2, each on 23 rows")


def test_the_rollout_store_grows_with_the_rows_that_an_objective_makes() -> None:
    few, many = (plan(resolve(None, {"objective": "rwfm"}, [*SHAPE, f"objective.draws={n}"])) for n in (1, 5))
    assert few.memory is not None
    assert many.memory is not None
    # 60 rows and half of them, a part of an update, of 3 latents of 4 x 8 x 8 in fp32 each
    grown = many.memory.parts["rollout store"] - few.memory.parts["rollout store"]
    assert grown == 3 * (60 + 38 - 8) * 4 * 8 * 8 * 4


def test_sizes_of_the_embedded_model_by_name() -> None:
    planned = plan(resolve(None, {}, ["lora.rank=4"]))
    assert planned.facts["parameters"].startswith("1.75 M transformer, 102 k text encoders, 102 k autoencoder")
    # 8 + 4 x 3 attention projections of 128 features
    assert planned.facts["trainable"] == "20.5 k, LoRA of rank 4 on 20 modules"
    assert planned.memory is not None
    assert planned.memory.peak == sum(planned.memory.parts.values())
    assert planned.facts["memory at the peak"] == f"{size_text(planned.memory.peak)} a device"


def test_the_published_batch_on_fewer_devices_takes_as_many_updates_of_as_many_rows() -> None:
    sets = ["rollout.groups=48", "rollout.group_size=24", "rollout.steps=5", "train.micro_batch=16"]
    one, eight = (plan(resolve(None, {}, sets), devices=n).facts for n in (1, 8))
    assert one["updates an iteration"] == "2, each on 2304 rows: 1 x 144 passes of 16 rows, accumulated"
    assert eight["updates an iteration"] == "2, each on 2304 rows: 8 x 18 passes of 16 rows, accumulated"
    assert one["reference recipe"].endswith("on 8 GPUs, 8 times the work a GPU")
    assert eight["reference recipe"].startswith("the same batch")


def test_a_smaller_batch_is_told_from_the_published_one() -> None:
    fact = plan(resolve(None, {}, SHAPE)).facts["reference recipe"]
    assert fact.startswith("0.013 of the published batch")
    assert "rollout.groups=48 and rollout.group_size=24" in fact


@pytest.mark.parametrize(("world", "devices"), [("4", 4), ("", 1)])
def test_processes_of_a_launcher_are_devices(world: str, devices: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", world)
    assert f": {devices} x " in plan(resolve(None, {}, SHAPE)).facts["updates an iteration"]


def test_the_time_of_a_past_run_is_scaled_by_the_work(tmp_path: Path) -> None:
    assert plan(resolve(None, {}, SHAPE), runs=tmp_path).facts["time"].startswith("not known")
    run = RunFolder.create(tmp_path / "past", "meanflow-shapes")
    run.recipe.write_text(resolve(None, {}, SHAPE).to_yaml())
    times = {"rollout": 2.0, "decode": 0.5, "reward": 0.25, "update": 3.0}
    warm = {f"time/{stage}_s": 10 * spent for stage, spent in times.items()}
    for line in (warm, {f"time/{stage}_s": spent for stage, spent in times.items()}):
        run.append_metrics({**line, "time/iteration_s": sum(times.values())})
    twice = [*SHAPE, "rollout.groups=6"]
    assert plan(resolve(None, {}, SHAPE), runs=tmp_path).facts["time"].startswith("about 5.75 s an iteration")
    assert plan(resolve(None, {}, twice), runs=tmp_path).facts["time"].startswith("about 11.5 s an iteration")
    # a transition more: 5/4 of the rollout's calls, 4/3 of the updates'
    more = [*SHAPE, "rollout.steps=5"]
    assert plan(resolve(None, {}, more), runs=tmp_path).facts["time"].startswith("about 7.25 s an iteration")
    other = resolve(None, {"model": "scm-shapes"}, SHAPE)
    assert plan(other, runs=tmp_path).facts["time"].startswith("not known")
    smaller = resolve(None, {}, [*SHAPE, "train.micro_batch=16"])
    assert plan(smaller, runs=tmp_path).facts["time"].startswith("not known")


@pytest.mark.parametrize(("size", "text"), [(12, "12 B"), (20_500, "20.5 kB"), (16.35e9, "16.4 GB")])
def test_sizes_for_people(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("visible", "kind"), [("", "cpu"), ("-1", "cpu"), ("0", "cuda"), (None, "cuda")])
def test_a_hidden_gpu_is_none(visible: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.training.plan._NVIDIA_DRIVERS", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"planned as {kind}" in plan(resolve(None, {}, SHAPE)).facts["device"]
