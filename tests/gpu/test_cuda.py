"""What depends on a CUDA device: images, training, resuming, timings and the error when memory runs out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import fmg
from fmg.core.events import Event, Notice
from fmg.inference.parity import check_same_images
from fmg.recipe import Recipe
from fmg.registry import rewards
from fmg.training.api import resume
from tests.support.cli import fmg as cli
from tests.support.run_files import adapter, metrics, stop_after
from tests.tiny_flux import student_options
from tests.tiny_rewards import write_clip_tokenizer, write_open_clip

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")]

LAST = "checkpoint-3"
PROMPTS = ["a red circle left", "a blue square right"]
SMALL: dict[str, object] = {
    "train.device": "cuda",
    "train.iterations": 3,
    "train.state_every": 1,
    "rollout.groups": 4,
    "rollout.group_size": 4,
    "eval.num": 8,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def _student(folder: Path, **overrides: object) -> Recipe:
    return Recipe.default(
        "meanflow-flux",
        **{
            **SMALL,
            **student_options(folder, "duration"),
            "rewards": ["jpeg-incompressibility"],
            "lora.rank": 4,
            "lora.alpha": 8,
            **overrides,
        },
    )


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("model", ["meanflow-shapes", "scm-shapes"])
def test_seeds_give_the_images_of_the_cpu(model: str, steps: int) -> None:
    ours, theirs = (
        fmg.load(model, device=device).generate(PROMPTS, [3, 4], steps=steps).images.cpu() for device in ("cuda", "cpu")
    )
    assert float((ours - theirs).abs().max()) <= 1 / 255


@pytest.mark.compile
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiled_images_are_those_of_torch_and_follow_the_weights(dtype: str, tmp_path: Path) -> None:
    fmg.train(_student(tmp_path, **{"train.iterations": 1, "optimizer.lr": 1e-2}), tmp_path / "run")
    ours, theirs = (
        fmg.load(tmp_path / "run", device="cuda", dtype=dtype, backend=backend)
        for backend in ("torch-compile", "torch")
    )
    model = ours.backend.model  # type: ignore[attr-defined]
    for rows, compilations in ((2, 1), (1, 2), (2, 2)):
        images = [generator.generate(PROMPTS[:rows], [3, 4][:rows]).image_array for generator in (ours, theirs)]
        check_same_images(*images, dtype, "Images", "Look into it.")  # type: ignore[arg-type]
        assert ours.backend.network.compilations == compilations  # type: ignore[attr-defined]
    # a recording reads the weights where they are
    for generator in (ours, theirs):
        with torch.no_grad():
            for _, parameter in generator.backend.model.trainable():  # type: ignore[attr-defined]
                parameter.mul_(-2)
    images = [generator.generate(PROMPTS, [3, 4]).image_array for generator in (ours, theirs)]
    check_same_images(*images, dtype, "Images", "Look into it.")  # type: ignore[arg-type]
    with model.adapter_enabled(False):
        base = ours.generate(PROMPTS, [3, 4]).image_array
    assert abs(base - images[0]).max() > 0
    assert fmg.load(tmp_path / "run", device="cuda").backend.name == "torch-compile"


def test_training_follows_the_cpu_and_its_run_is_used_on_both(tmp_path: Path) -> None:
    runs = {device: tmp_path / device for device in ("cuda", "cpu")}
    for device, run in runs.items():
        fmg.train(Recipe.default(None, **{**SMALL, "train.device": device}), run)
    ours, theirs = (metrics(run) for run in runs.values())
    assert [set(line) for line in ours] == [set(line) for line in theirs]
    first = next(i for i, line in enumerate(ours) if "reward/mean" in line)
    assert ours[first]["reward/mean"] == pytest.approx(theirs[first]["reward/mean"], abs=1e-3)
    assert ours[first]["grad_norm"] == pytest.approx(theirs[first]["grad_norm"], rel=1e-2)

    assert all(float(x.norm()) > 0 for key, x in adapter(runs["cuda"], LAST).items() if "lora_B" in key)
    here, there = (
        fmg.load(runs["cuda"], device=device).generate(PROMPTS, [3, 4]).images.cpu() for device in ("cuda", "cpu")
    )
    assert float((here - there).abs().max()) <= 1 / 255


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    recipe = Recipe.default(None, **SMALL)
    fmg.train(recipe, tmp_path / "whole")
    assert fmg.train(recipe, tmp_path / "cut", stop_after(2)).interrupted
    resume(tmp_path / "cut")
    ours, theirs = adapter(tmp_path / "cut", LAST), adapter(tmp_path / "whole", LAST)
    assert ours.keys() == theirs.keys()
    for name, x in ours.items():
        torch.testing.assert_close(x, theirs[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("dtype", "trainable"), [("fp32", "lora"), ("bf16", "lora"), ("bf16", "full")])
def test_a_student_trains_through_its_replay_gate(dtype: str, trainable: str, tmp_path: Path) -> None:
    heard: list[Event] = []

    def hear(event: Event) -> None:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        heard.append(event)

    fmg.train(_student(tmp_path, **{"train.dtype": dtype, "train.trainable": trainable}), tmp_path / "run", hear)
    gates = [event.text for event in heard if isinstance(event, Notice) and "Replay gate" in event.text]
    assert len(gates) == 1
    assert all(line["grad_norm"] > 0 for line in metrics(tmp_path / "run") if "grad_norm" in line)
    drawn = fmg.load(tmp_path / "run", device="cuda").generate(PROMPTS[:1], [0])
    assert torch.isfinite(drawn.images).all()


def test_adamw_with_8_bit_moments_trains(tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    recipe = _student(tmp_path, **{"optimizer": {"name": "adamw8bit", "lr": 1e-3}, "lora.rank": 64})
    fmg.train(recipe, tmp_path / "run")
    assert all(float(x.norm()) > 0 for key, x in adapter(tmp_path / "run", LAST).items() if "lora_B" in key)


def test_a_reward_network_scores_on_the_gpu_as_on_the_cpu(tmp_path: Path) -> None:
    weights, tokenizer = write_open_clip(tmp_path / "hpsv2").file, write_clip_tokenizer(tmp_path / "tokenizer")
    images = torch.rand(4, 3, 40, 56, generator=torch.Generator().manual_seed(0))
    scores = {}
    for device in ("cuda", "cpu"):
        reward = rewards.build("hpsv2", {"weights": str(weights), "tokenizer": str(tokenizer), "device": device})
        scores[device] = reward(images, PROMPTS * 2).total.cpu()
    torch.testing.assert_close(scores["cuda"], scores["cpu"], rtol=0, atol=1e-4)


def test_generation_is_timed_on_the_device(tmp_path: Path) -> None:
    done = cli("generate", *PROMPTS, "--from", "meanflow-shapes", "--device", "cuda", "--time", "--json")
    assert done.code == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    assert "cuda" in json.dumps(report)
    assert len(list((tmp_path / "images").glob("*.png"))) == len(PROMPTS)


def test_a_run_on_the_gpu_is_exported_and_verified(tmp_path: Path) -> None:
    fmg.train(Recipe.default(None, **SMALL), tmp_path / "run")
    exported = cli("export", "run", "--verify", "quick")
    assert exported.code == 0, exported.stderr


def test_the_doctor_names_the_gpu() -> None:
    done = cli("doctor", "--json")
    assert torch.cuda.get_device_name() in done.stdout


def test_memory_that_runs_out_is_one_line() -> None:
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        done = cli("train", "--device", "cuda", "--run", "run", "--set", "train.iterations=1")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert done.code == 1
    assert "Memory ran out" in done.stderr
    assert "Traceback" not in done.stderr
