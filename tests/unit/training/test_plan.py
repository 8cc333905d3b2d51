from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.core.display import size_text
from fmg.data.run_folder import RunFolder
from fmg.recipe import resolve
from fmg.training.launch import Sizes
from fmg.training.plan import GPUS, SHARE_OF_PEAK, OnGpu, plan
from fmg.training.plan_work import filled_rows

SHAPE = [
    "rollout.kind=chain",
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


@pytest.mark.parametrize(
    ("sets", "rollout", "updates"),
    [
        # 3 groups of 5: one transition each, one call per completion, and the mean prefix of three steps
        (["rollout.branch.steps=first"], "18", "3"),
        (["rollout.branch.steps=adaptive"], "21", "3"),
        (["rollout.branch.completion=grid"], "48", "3"),
        (["stochasticizer=asfmc-euler", "rollout.branch.steps=cycle", "rollout.branch.prefix=stochastic"], "27", "6"),
    ],
)
def test_counts_of_a_branched_run(sets: list[str], rollout: str, updates: str) -> None:
    planned = plan(resolve(None, {}, [*SHAPE, "rollout.kind=branch", *sets])).facts
    assert planned["network calls an iteration"] == f"{rollout} in the rollout, {updates} in the updates"
    assert planned["transitions an image"] == "1"


def test_a_stochasticizer_with_two_calls_doubles_its_transitions() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, SHAPE)).facts
    assert facts["network calls an iteration"] == "105 in the rollout, 90 in the updates"


def test_steps_outside_a_window_are_not_replayed_and_cost_one_call() -> None:
    facts = plan(resolve(None, {"stochasticizer": "asfmc-euler"}, [*SHAPE, "rollout.window={size: 1}"])).facts
    assert facts["transitions an image"] == "1"
    assert facts["network calls an iteration"] == "75 in the rollout, 30 in the updates"


def test_an_objective_on_samples_has_no_transitions_and_the_rows_that_it_samples() -> None:
    facts = plan(resolve(None, {"objective": "rwfm"}, [*SHAPE, "objective.draws=3"])).facts
    assert "transitions an image" not in facts
    assert facts["network calls an iteration"] == "60 in the rollout, 45 in the updates"
    assert facts["updates an iteration"].startswith("2, each on 23 rows")
    assert facts["stochasticizer"] == "asfmc, not used by rwfm"
    assert plan(resolve(None, {}, SHAPE)).facts["stochasticizer"] == "asfmc"


@pytest.mark.parametrize(
    ("sets", "trained", "frozen"),
    [
        (["objective=reward-gradient", "objective.jumps=2"], 30, 0),
        # the jumps of the base, and those of the policy a second time
        (["objective=reward-gradient", "objective.jumps=2", "objective.l2_beta=0.1"], 30, 30),
        (["objective=reward-gradient", "objective.jumps=2", "objective.l2_beta=0.1", "train.device=cuda"], 30, 60),
        (["objective=reward-gradient", "objective.method=draft-lv", "objective.checkpointing=true"], 30, 30),
        # three transitions, each with a last step
        (["objective=grpo", "objective.last_step={weight: 1}"], 90, 0),
        (["objective=grpo", "objective.last_step={weight: 1, checkpointing: true}"], 90, 45),
        (["objective=awm", "objective.draws=2", "objective.last_step={weight: 1, checkpointing: true}"], 60, 90),
    ],
)
def test_calls_of_objectives_that_differentiate_rewards(sets: list[str], trained: int, frozen: int) -> None:
    facts = plan(resolve(None, {}, [*SHAPE, "rewards=[shapes-clip]", *sets])).facts
    without = f" (plus {frozen} without gradients)" if frozen else ""
    assert facts["network calls an iteration"] == f"60 in the rollout, {trained} in the updates{without}"


def test_the_rollout_store_grows_with_the_rows_that_an_objective_makes() -> None:
    few, many = (plan(resolve(None, {"objective": "rwfm"}, [*SHAPE, f"objective.draws={n}"])) for n in (1, 5))
    assert few.memory is not None
    assert many.memory is not None
    # 60 rows and half of them, a part of an update, of 3 latents of 4 x 8 x 8 in fp32 each
    grown = many.memory.parts["rollout store"] - few.memory.parts["rollout store"]
    assert grown == 3 * (60 + 38 - 8) * 4 * 8 * 8 * 4


def test_the_rollout_store_has_a_state_beside_each_row_of_an_objective_with_a_last_step() -> None:
    def store(*sets: str) -> int:
        planned = plan(
            resolve(None, {}, [*SHAPE, "rewards=[shapes-clip]", "objective=awm", "objective.draws=2", *sets])
        )
        assert planned.memory is not None
        return planned.memory.parts["rollout store"]

    # 30 rows, half of them in an update, of a latent of 4 x 8 x 8 in fp32
    assert store("objective.last_step={weight: 1}") - store() == (30 + 15) * 4 * 8 * 8 * 4


def test_sizes_of_the_embedded_model_by_name() -> None:
    planned = plan(resolve(None, {}, ["lora.rank=4"]))
    assert planned.facts["parameters"].startswith("1.75 M transformer, 102 k text encoders, 102 k autoencoder")
    # 8 + 4 x 3 attention projections of 128 features
    assert planned.facts["trainable"] == "20.5 k, LoRA of rank 4 on 20 modules"
    assert planned.memory is not None
    assert planned.memory.peak == sum(planned.memory.parts.values())
    assert planned.facts["memory at the peak"] == f"{size_text(planned.memory.peak)} per device"


def test_the_published_batch_on_fewer_devices_takes_as_many_updates_of_as_many_rows() -> None:
    sets = ["rollout.kind=chain", "rollout.groups=48", "rollout.group_size=24", "rollout.steps=5"]
    sets += ["train.micro_batch=16"]
    one, eight = (plan(resolve(None, {}, sets), devices=n).facts for n in (1, 8))
    assert one["updates an iteration"] == "2, each on 2304 rows: 1 x 144 passes of 16 rows, accumulated"
    assert eight["updates an iteration"] == "2, each on 2304 rows: 8 x 18 passes of 16 rows, accumulated"
    assert one["reference recipe"].endswith("on 8 GPUs, 8 times the work per GPU")
    assert eight["reference recipe"].startswith("the same batch")


def test_a_smaller_batch_is_distinguished_from_the_published_one() -> None:
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
    assert plan(resolve(None, {}, SHAPE), runs=tmp_path).facts["time"].startswith("about 5.75 s per iteration")
    assert plan(resolve(None, {}, twice), runs=tmp_path).facts["time"].startswith("about 11.5 s per iteration")
    # a transition more: 5/4 of the rollout's calls, 4/3 of the updates'
    more = [*SHAPE, "rollout.steps=5"]
    assert plan(resolve(None, {}, more), runs=tmp_path).facts["time"].startswith("about 7.25 s per iteration")
    other = resolve(None, {"model": "scm-shapes"}, SHAPE)
    assert plan(other, runs=tmp_path).facts["time"].startswith("not known")
    smaller = resolve(None, {}, [*SHAPE, "train.micro_batch=16"])
    assert plan(smaller, runs=tmp_path).facts["time"].startswith("not known")


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (12, "12 B"),
        (20_500, "20.5 kB"),
        (1.124e9, "1.12 GB"),
        (16.35e9, "16.4 GB"),
        (24e9, "24 GB"),
        (839.9e6, "840 MB"),
        (999.9e6, "1000 MB"),
        (2345e9, "2345 GB"),
    ],
)
def test_sizes_for_people(size: float, text: str) -> None:
    assert size_text(size) == text


@pytest.mark.parametrize(("visible", "kind"), [("", "cpu"), ("-1", "cpu"), ("0", "cuda"), (None, "cuda")])
def test_a_hidden_gpu_is_none(visible: str | None, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fmg.training.plan._NVIDIA_DRIVERS", (tmp_path,))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert f"planned as {kind}" in plan(resolve(None, {}, SHAPE)).facts["device"]


MEASURED = Path(__file__).parents[3] / "benchmarks" / "results" / "gpu_check.json"


def on_gpus(name: str, sets: tuple[str, ...] = (), model: str = "meanflow-flux") -> dict[tuple[str, str], OnGpu]:
    planned = plan(resolve(name, {"model": model}, ["rewards=[jpeg-incompressibility]", *sets]))
    return {(on.gpu.partition(",")[0], on.kind): on for on in planned.gpus}


def test_the_rates_are_those_that_were_measured() -> None:
    measured = json.loads(MEASURED.read_text())
    for stage, share in SHARE_OF_PEAK.items():
        assert share == pytest.approx(measured[stage]["share_of_data_sheet_peak"], abs=5e-4)
    # this reproduces the measured seconds: 49 ms per call, 192 ms per trained row
    found = on_gpus("meanflow-flux-1gpu", ("rollout.groups=2", "rollout.group_size=8"))[("H200", "chain")]
    assert found.seconds == pytest.approx(measured["rollout"]["seconds"] + measured["update"]["seconds"], rel=0.01)


def test_the_published_batch_takes_a_sixteenth_of_the_time_in_branches() -> None:
    resolved = resolve("meanflow-flux-branch-1gpu", {"model": "meanflow-flux"}, ["rewards=[jpeg-incompressibility]"])
    cost = plan(resolved).facts["row-NFE an iteration"]
    assert cost.startswith("chain 19584, 17 per image; branch 1416, 1.23 per image (this recipe)")
    found = on_gpus("meanflow-flux-branch-1gpu")
    assert len(found) == 2 * len(GPUS)
    chain, branch = found[("H200", "chain")], found[("H200", "branch")]
    assert chain.seconds == pytest.approx(1170, rel=0.01)
    assert branch.seconds == pytest.approx(72, rel=0.01)
    assert (chain.hours, branch.hours) == (pytest.approx(97.4, rel=0.01), pytest.approx(6.0, rel=0.01))
    # the same share of the peak
    slower = found[("L40S", "branch")].seconds / branch.seconds
    assert slower == pytest.approx(989.4 / 362.05)
    assert [on.fits for on in found.values() if on.kind == "branch"] == [False, True, True, True]
    small = ("rollout.groups=24", "rollout.batch_size=24", "train.micro_batch=1", "eval.batch_size=8")
    assert on_gpus("meanflow-flux-branch-1gpu", small)[("RTX 4090", "branch")].fits


def test_time_grows_with_the_operations_of_a_pass() -> None:
    usual, larger = (
        on_gpus("meanflow-flux-1gpu", (f"model.resolution={side}",))[("H200", "branch")].seconds for side in (512, 1024)
    )
    assert 3.5 < larger / usual < 6
    kept = on_gpus("meanflow-flux-1gpu", ("model.gradient_checkpointing=false",))[("H200", "chain")].seconds
    # two of three passes of an update
    assert kept == pytest.approx(1168 - 885 / 3, rel=0.01)


def test_a_call_of_fewer_groups_than_an_update_has_rows_is_filled_up() -> None:
    sets = ["rollout.kind=branch", "rollout.group_size=24", "train.dtype=bf16"]
    recipe = resolve(None, {}, sets).recipe
    assert filled_rows(recipe, Sizes(48, 2)) == filled_rows(recipe, Sizes(96, 2)) == 1
    assert filled_rows(recipe, Sizes(12, 12)) == 12
    assert filled_rows(recipe.with_({"train.dtype": "fp32"}), Sizes(12, 12)) == 1
    assert filled_rows(recipe.with_({"rollout.kind": "chain"}), Sizes(12, 12)) == 1
    # a prefix of 1.5 calls on average and a density, for each of 48 groups, in 12 rows instead of one
    other = on_gpus("meanflow-flux-branch", ("rollout.batch_size=12", "train.micro_batch=12"))[("H200", "branch")]
    more = other.seconds - on_gpus("meanflow-flux-branch")[("H200", "branch")].seconds
    assert more == pytest.approx(48 * 2.5 * 11 * 0.0492, rel=0.01)


def test_small_models_and_other_precisions_are_not_planned_for_gpus() -> None:
    assert not plan(resolve(None, {}, SHAPE)).gpus
    assert not on_gpus("meanflow-flux-1gpu", ("train.dtype=fp32",))


def test_an_objective_that_takes_no_branches_is_planned_in_chains() -> None:
    assert {kind for _, kind in on_gpus("meanflow-flux-1gpu", ("objective={name: rwfm}",))} == {"chain"}
