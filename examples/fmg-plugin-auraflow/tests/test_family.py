"""The family against the pipeline of diffusers, on a folder of its classes with random weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, AutoencoderKL, FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import LlamaTokenizer, UMT5Config, UMT5EncoderModel

import fmg
from fmg.core.errors import CheckpointError
from fmg.export.options import ExportOptions
from fmg.export.swap import swap_weights
from fmg.flow import make_grid
from fmg.flow.sampling import native_sample
from fmg.inference import resolve_target
from fmg.recipe import Recipe
from fmg.registry import models

RESOLUTION, SEQUENCE, WIDTH = 32, 12, 32
PROMPTS = ["a red circle", "left"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder of about a megabyte."""
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    entries = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *(chr(i) for i in range(97, 123))]
    tokenizer = LlamaTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], pad_token="<pad>")
    torch.manual_seed(0)
    pipeline = AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=UMT5EncoderModel(
            UMT5Config(vocab_size=len(tokenizer), d_model=WIDTH, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
        ),
        vae=AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
        ),
        transformer=AuraFlowTransformer2DModel(
            sample_size=16,
            num_mmdit_layers=1,
            num_single_dit_layers=2,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=WIDTH,
            caption_projection_dim=WIDTH,
            pos_embed_max_size=256,
        ),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    place = tmp_path_factory.mktemp("auraflow") / "folder"
    pipeline.save_pretrained(str(place))
    return place


@pytest.fixture(scope="module", autouse=True)
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A working directory and a cache of this module's own."""
    place = tmp_path_factory.mktemp("workplace")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(place / "cache"))
        patch.chdir(place)
        yield place


def options(folder: Path) -> dict[str, object]:
    return {"folder": str(folder), "resolution": RESOLUTION, "max_sequence_length": SEQUENCE, "text_cache": False}


def drawn(pipeline: AuraFlowPipeline, noise: Tensor, steps: int) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    latents: Tensor = pipeline(
        PROMPTS,
        num_inference_steps=steps,
        sigmas=[1 - i / steps for i in range(steps)],
        guidance_scale=1.0,
        latents=noise.clone(),
        height=RESOLUTION,
        width=RESOLUTION,
        max_sequence_length=SEQUENCE,
        output_type="latent",
    ).images
    return latents


@pytest.mark.parametrize("steps", [1, 4])
def test_latents_are_those_of_the_pipeline(folder: Path, steps: int) -> None:
    model = models.build("auraflow", options(folder)).load(torch.device("cpu"), torch.float32)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = native_sample(model.flow_map, model.encode(PROMPTS), noise, make_grid("uniform", steps), torch.zeros)
    assert torch.allclose(ours, drawn(AuraFlowPipeline.from_pretrained(folder), noise, steps), atol=1e-5)


@pytest.fixture(scope="module", params=["chain", "branch"])
def run(folder: Path, workplace: Path, request: pytest.FixtureRequest) -> Path:
    """A finished run with one kind of rollout."""
    recipe = Recipe.default(
        "auraflow",
        **{
            **{f"model.{name}": value for name, value in options(folder).items()},
            "rewards": ["jpeg-incompressibility"],
            "optimizer.lr": 1e-3,
            "rollout.kind": request.param,
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "train.iterations": 2,
            "train.dtype": "fp32",
            "lora.rank": 4,
            "eval.num": 4,
        },
    )
    fmg.train(recipe, workplace / request.param)
    return workplace / request.param


def test_what_is_trained_is_read_by_the_pipeline(folder: Path, run: Path) -> None:
    adapter = run / "checkpoints" / "checkpoint-2"
    model = models.build("auraflow", options(folder)).load(torch.device("cpu"), torch.float32)
    model.load_adapter(adapter)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = native_sample(model.flow_map, model.encode(PROMPTS), noise, make_grid("uniform", 4), torch.zeros)
    pipeline = AuraFlowPipeline.from_pretrained(folder)
    plain = drawn(pipeline, noise, 4)
    pipeline.load_lora_weights(adapter)
    assert torch.allclose(ours, drawn(pipeline, noise, 4), atol=1e-5)
    assert not torch.allclose(ours, plain, atol=1e-5)


def test_the_network_is_compiled_as_one_graph(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmg.inference import compiled

    # the traced graph runs as it is, so no C++ compiler is needed
    monkeypatch.setattr(compiled, "COMPILER", "eager")
    model = models.build("auraflow", options(folder)).load(torch.device("cpu"), torch.float32)
    model.attach_adapter(2, 4.0, ["attention"], 0.0, seed=0)
    backend = compiled.TorchCompileBackend(model)
    noise = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours, theirs = (
            native_sample(flow_map, model.encode(PROMPTS), noise, make_grid("uniform", 4), torch.zeros)
            for flow_map in (backend.flow_map, model.flow_map)
        )
    assert torch.allclose(ours, theirs, atol=1e-5)
    assert backend.network.compilations == 1


@pytest.mark.parametrize("run", ["chain"], indirect=True)
def test_an_export_is_verified(run: Path, workplace: Path) -> None:
    artifact = fmg.export_artifact(run, workplace / "artifact", ExportOptions(int8=True))
    report = fmg.verify(artifact, num=4)
    assert report.passed, [check for check in report.checks if not check.passed]
    # no graph depends on the number of steps
    found = resolve_target(run)
    other = replace(found, recipe=found.recipe.with_({"model.default_steps": 2, "rollout.steps": 2}))
    assert fmg.verify(swap_weights(artifact.folder, other), other, num=4).passed


def test_a_folder_of_another_family_is_refused(folder: Path) -> None:
    config = folder / "transformer" / "config.json"
    text = config.read_text()
    config.write_text(text.replace("AuraFlowTransformer2DModel", "FluxTransformer2DModel"))
    try:
        with pytest.raises(CheckpointError, match="which is not a transformer of AuraFlow"):
            models.build("auraflow", options(folder)).load(torch.device("cpu"), torch.float32)
    finally:
        config.write_text(text)
