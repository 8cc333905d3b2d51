"""A published student from end to end: load, evaluate, train, save, and the same image from stock diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from torch import Tensor

import fmg
from fmg.models.flux.latents import pack, unpack
from fmg.models.flux.loading import FluxComponents
from fmg.recipe import Recipe
from tests.support.cli import fmg as cli
from tests.support.first_noise import first_noise
from tests.support.pages import self_contained
from tests.tiny_flux import SEQUENCE, student_options
from tests.tiny_rewards import write_clip_folder, write_clip_tokenizer, write_open_clip

pytestmark = pytest.mark.slow

PROMPT = "a red circle left"
STUDENTS: dict[str, Literal["none", "duration"]] = {"meanflow-flux": "duration", "scm-flux": "none"}


@pytest.fixture(scope="module", params=STUDENTS)
def recipe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    folder = tmp_path_factory.mktemp("student")
    name: str = request.param
    return Recipe.default(
        name,
        **{
            **student_options(folder, STUDENTS[name]),
            "rewards": ["jpeg-incompressibility"],
            "optimizer.lr": 1e-3,
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "train.iterations": 3,
            "train.dtype": "fp32",
            "lora.rank": 4,
            "lora.alpha": 8,
            "eval.num": 4,
        },
    )


def test_a_student_is_evaluated_trained_saved_and_sampled_by_stock_diffusers(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = fmg.train(recipe, tmp_path / "run")
    assert result.iterations == 3
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("eval/score" in line for line in lines)
    updates = [line for line in lines if "grad_norm" in line]
    assert len(updates) == 3
    assert all(line["grad_norm"] > 0 for line in updates)

    generator = fmg.load(tmp_path / "run", adapter=False)
    base = generator.generate([PROMPT], [7], steps=1, grid="uniform")
    adapter = tmp_path / "run" / "checkpoints" / "checkpoint-3"
    generator.backend.model.load_adapter(adapter)  # type: ignore[attr-defined]
    drawn = generator.generate([PROMPT], [7], steps=1, grid="uniform")
    assert not torch.equal(drawn.images, base.images)

    parts = generator.backend.model.components  # type: ignore[attr-defined]
    noise = first_noise(7, generator.backend.latent_shape)
    picture = _stock_picture(parts, adapter, noise, two_time=generator.backend.spec.anchors == "any")
    assert torch.allclose(picture, drawn.images, atol=1e-5, rtol=0)


@torch.no_grad()
def _stock_picture(parts: FluxComponents, adapter: Path, noise: Tensor, *, two_time: bool) -> Tensor:
    """One step from noise by stock diffusers: its pipeline, its LoRA loader and, for one time, its transformer."""
    cls = type(parts.transformer) if two_time else FluxTransformer2DModel
    config = {k: v for k, v in parts.transformer.config.items() if two_time or k not in ("time_scale", "second_time")}
    transformer = cls.from_config(config).eval()
    weights = {n.replace(".base_layer.", "."): x for n, x in parts.transformer.state_dict().items() if "lora_" not in n}
    transformer.load_state_dict(weights)
    pipeline = FluxPipeline(
        scheduler=None,
        vae=parts.vae,
        text_encoder=parts.text.text_encoder,
        tokenizer=parts.text.tokenizer,
        text_encoder_2=parts.text.text_encoder_2,
        tokenizer_2=parts.text.tokenizer_2,
        transformer=transformer,
    )
    pipeline.load_lora_weights(str(adapter))
    tokens, pooled, text_ids = pipeline.encode_prompt(PROMPT, None, max_sequence_length=SEQUENCE)
    # the stock forward multiplies both by 1000, which the students do not expect
    unit, scale = torch.ones(1), 1.0 if two_time else 1e-3
    inputs: dict[str, Any] = {"timestep": scale * unit, "guidance": scale * 3.5 * unit}
    if two_time:
        inputs["second"] = torch.zeros(1)
    height, width = noise.shape[-2:]
    velocity = transformer(
        hidden_states=pack(noise),
        encoder_hidden_states=tokens,
        pooled_projections=pooled,
        img_ids=FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, noise.device, torch.float32),
        txt_ids=text_ids,
        return_dict=False,
        **inputs,
    )[0]
    latents = noise - unpack(velocity, height, width)
    scaled = latents / parts.vae.config.scaling_factor + parts.vae.config.shift_factor
    images: Tensor = pipeline.image_processor.postprocess(parts.vae.decode(scaled, return_dict=False)[0], "pt")
    return images


def test_a_shipped_reward_recipe_trains_on_tiny_folders_of_student_and_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`configs/meanflow-flux-hpsv2.yaml` as a user runs it, with only paths and sizes replaced."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    weights, tokenizer = write_open_clip(tmp_path / "hpsv2").file, write_clip_tokenizer(tmp_path / "tokenizer")
    sets = {
        **student_options(tmp_path, "duration"),
        "rewards": f"[{{name: hpsv2, weights: {weights}, tokenizer: {tokenizer}}}]",
        "rollout.groups": 2,
        "rollout.group_size": 3,
        "train.iterations": 1,
        "train.dtype": "fp32",
        "train.device": "cpu",
        "eval.num": 4,
    }
    words = [word for path, value in sets.items() for word in ("--set", f"{path}={value}")]
    done = cli("train", "--config", "meanflow-flux-hpsv2", "--run", "run", "--json", *words)
    assert done.code == 0, done.stderr
    first, update, last, _ = map(json.loads, done.stdout.splitlines())
    assert update["reward/std"] > 0
    assert update["grad_norm"] > 0
    assert first["eval/hpsv2_mean"] != last["eval/hpsv2_mean"]
    scored = cli(
        "eval", "run", "--against", "base", "--num", "4", "--features", "clip", "--json", "--device", "cpu",
        "--set", f"clip.weights={write_clip_folder(tmp_path / 'clip')}",
    )  # fmt: skip
    assert scored.code == 0, scored.stderr
    report = json.loads(scored.stdout)
    assert {row["reward"] for row in report["differences"]} == {"hpsv2", "jpeg-incompressibility"}
    assert "cosine_diversity" in {row["metric"] for row in report["metric_differences"]}
    page = self_contained((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))
    assert "hpsv2" in page.words
