"""SANA-Sprint from a local folder, in the form in which it is published."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import SanaSprintPipeline, SanaTransformer2DModel
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.flow import TrigPath
from fmg.inference.torch_backend import device_for
from fmg.models.common.text import TextEncoders
from fmg.models.sana.configs import SanaSprintConfig
from fmg.models.sana.model import SanaModel, published_instruction
from fmg.models.sana.size import SPRINT_06B, SPRINT_16B, SanaSize
from fmg.recipe import Recipe
from fmg.registry import models
from tests.tiny_sana import RESOLUTION, SEQUENCE, build_tiny_sana

CPU = torch.device("cpu")
PROMPTS = ["  A red CIRCLE left ", "blue", "a " * 40]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_sana(tmp_path_factory.mktemp("sana") / "sana")


@pytest.fixture
def scratch(folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(folder, tmp_path / "model"))


def load(folder: Path, dtype: torch.dtype = torch.float32, **options: object) -> SanaModel:
    given = {"folder": str(folder), "resolution": RESOLUTION, "max_sequence_length": SEQUENCE, **options}
    return models.build("sana-sprint", given).load(CPU, dtype)  # type: ignore[return-value]


def attach(model: SanaModel, targets: str = "attention") -> int:
    """An adapter with the values of a trained one."""
    adapted = model.attach_adapter(2, 6.0, [targets], 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return adapted


@torch.no_grad()
def jump(model: SanaModel) -> Tensor:
    x = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    return model.flow_map.jump(x, torch.tensor([1.0, 0.6]), torch.zeros(2), model.encode(["a red circle", "left"]))


@pytest.mark.parametrize("instruction", [True, False])
@pytest.mark.parametrize("length", [SEQUENCE, 40])
def test_prompts_are_encoded_as_the_pipeline_does(folder: Path, length: int, instruction: bool) -> None:
    model = load(folder, instruction=instruction, max_sequence_length=length)
    text = model.components.text
    pipeline = SanaSprintPipeline(text.tokenizer, text.text_encoder, None, model.components.transformer, None)
    lines = published_instruction().split("\n") if instruction else None
    with torch.no_grad():
        tokens, mask = pipeline.encode_prompt(PROMPTS, max_sequence_length=length, complex_human_instruction=lines)
    together = TextEncoders(text, length, CPU).encode(PROMPTS)
    assert torch.equal(together.tensors["tokens"], tokens)
    assert torch.equal(together.tensors["mask"], mask)
    assert tokens.shape[1] == length
    one_by_one = model.encode(PROMPTS).tensors
    assert torch.allclose(one_by_one["tokens"], tokens, atol=1e-5)
    assert torch.equal(one_by_one["mask"], mask)
    again = load(folder, instruction=instruction, max_sequence_length=length).encode(PROMPTS).tensors
    assert all(torch.equal(again[name], x) for name, x in one_by_one.items())


def test_the_instruction_decides_an_embedding_and_its_place_in_the_cache(folder: Path) -> None:
    plain = load(folder, instruction=False).encode(["blue"]).tensors["tokens"]
    instructed = load(folder).encode(["blue"]).tensors["tokens"]
    assert not torch.allclose(plain, instructed)


@pytest.mark.parametrize("instruction", [True, False])
def test_the_limit_of_a_prompt_is_where_it_is_truncated(folder: Path, instruction: bool) -> None:
    prompt = "a Red circle"
    whole = load(folder, instruction=instruction, max_sequence_length=64)
    count = whole.components.text.count(prompt)
    assert int(whole.encode([prompt]).tensors["mask"].sum()) == count
    fitting, short = (load(folder, instruction=instruction, max_sequence_length=n) for n in (count, count - 1))
    assert fitting.cut_prompts([prompt]) == ""
    assert f"'a Red circle' has {count}); the model reads the first {count - 1}." in short.cut_prompts(["a", prompt])


def test_padding_is_not_seen_by_the_transformer(folder: Path) -> None:
    model = load(folder, max_sequence_length=40, instruction=False)
    cond = model.encode(["blue"])
    padded = cond.tensors["mask"] == 0
    assert bool(padded.any())
    other = {**cond.tensors, "tokens": torch.where(padded[..., None], 5.0, cond.tensors["tokens"])}
    x, one, zero = torch.randn(1, *model.latent_shape), torch.ones(1), torch.zeros(1)
    with torch.no_grad():
        seen = model.flow_map.jump(x, one, zero, cond)
        assert torch.equal(seen, model.flow_map.jump(x, one, zero, type(cond)(cond.prompts, other)))


def test_it_is_a_single_time_map_on_the_trig_path(folder: Path) -> None:
    model = load(folder)
    assert model.latent_shape == (8, RESOLUTION // 32, RESOLUTION // 32)
    assert (model.spec.anchors, model.spec.path, model.spec.resolution) == ("endpoint", "trig", RESOLUTION)
    assert isinstance(model.flow_map.path, TrigPath)
    images = model.decode(jump(model))
    assert images.shape == (2, 3, RESOLUTION, RESOLUTION)
    assert 0 <= float(images.min()) < float(images.max()) <= 1


def test_guidance_changes_the_map(folder: Path) -> None:
    assert not torch.allclose(jump(load(folder, guidance=4.5)), jump(load(folder, guidance=1.0)))


def test_bf16_weights_get_fp32_times(folder: Path) -> None:
    model = load(folder, torch.bfloat16)
    seen: list[Mapping[str, Any]] = []
    model.components.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    assert jump(model).dtype == torch.float32
    assert seen[0]["hidden_states"].dtype == torch.bfloat16
    assert (seen[0]["timestep"].dtype, seen[0]["guidance"].dtype) == (torch.float32, torch.float32)
    assert seen[0]["guidance"][0] == pytest.approx(0.45)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_save_is_verified_and_read_back(folder: Path, dtype: torch.dtype, tmp_path: Path) -> None:
    model = load(folder, dtype)
    before = jump(model)
    digest = model.base_digest()
    # q, k, v and out of two attentions in two blocks
    assert attach(model) == 16
    trained = jump(model)
    assert not torch.allclose(trained, before)
    model.save_adapter(tmp_path / "adapter")
    fresh = load(folder, dtype)
    fresh.load_adapter(tmp_path / "adapter")
    assert torch.equal(jump(fresh), trained)
    with fresh.adapter_enabled(False):
        assert torch.equal(jump(fresh), before)
    assert fresh.base_digest() == digest
    names = load_file(tmp_path / "adapter" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.transformer_blocks.") for name in names)


@pytest.mark.parametrize(("targets", "adapted"), [("self-attention", 8), ("cross-attention", 8), ("attn2.to_v", 2)])
def test_one_kind_of_attention_can_be_adapted(folder: Path, targets: str, adapted: int) -> None:
    assert attach(load(folder), targets) == adapted


def test_a_save_that_generates_another_image_is_not_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(folder)
    attach(model)
    original = SanaSprintPipeline.load_lora_weights

    def halved(self: SanaSprintPipeline, *args: object, **named: object) -> None:
        original(self, *args, **named)
        self.transformer.set_adapters(["default"], [0.5])

    monkeypatch.setattr(SanaSprintPipeline, "load_lora_weights", halved)
    with pytest.raises(CheckpointError, match="generate a different image after diffusers loads them"):
        model.save_adapter(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_gradient_checkpointing_changes_no_gradient(folder: Path) -> None:
    def gradients(*, checkpointing: bool) -> list[Tensor]:
        model = load(folder, gradient_checkpointing=checkpointing)
        attach(model)
        x = torch.randn(1, *model.latent_shape, generator=torch.Generator().manual_seed(0))
        model.flow_map.jump(x, torch.tensor([0.6]), torch.zeros(1), model.encode(["left"])).square().sum().backward()
        return [parameter.grad for _, parameter in model.trainable() if parameter.grad is not None]

    plain, recomputed = gradients(checkpointing=False), gradients(checkpointing=True)
    assert len(plain) == len(recomputed) == 32
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(plain, recomputed, strict=True))


def _config(folder: Path, component: str, **changes: object) -> None:
    file = folder / component / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text(encoding="utf-8")), **changes}), encoding="utf-8")


def _without_guidance(folder: Path) -> None:
    transformer = SanaTransformer2DModel.from_pretrained(folder / "transformer")
    config = {**transformer.config, "guidance_embeds": False}
    SanaTransformer2DModel.from_config(config).save_pretrained(folder / "transformer")


def _left_over(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), "extra.weight": torch.zeros(2)}, file)


def _missing(folder: Path) -> None:
    file = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({n: x for n, x in load_file(file).items() if not n.startswith("caption_norm")}, file)


def _truncated(folder: Path) -> None:
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_without_guidance, "embeds no guidance scale, unlike every SANA-Sprint"),
        (_left_over, "have unexpected keys: extra.weight"),
        (_missing, "have missing keys: caption_norm.weight"),
        (_truncated, "cannot be loaded"),
        (
            lambda folder: _config(folder, "transformer", _class_name="FluxTransformer2DModel"),
            "not a transformer of SANA",
        ),
        (
            lambda folder: _config(folder, "text_encoder", architectures=["T5EncoderModel"]),
            "not a text_encoder of SANA",
        ),
        (lambda folder: _config(folder, "transformer", caption_channels=64), "has shape"),
        (lambda folder: (folder / "tokenizer" / "tokenizer.json").write_text("{"), "tokenizer cannot be loaded"),
        (lambda folder: shutil.rmtree(folder / "vae"), "lacks vae/config.json"),
    ],
)
def test_a_folder_that_does_not_fit_is_one_line(scratch: Path, damage: Any, message: str) -> None:
    damage(scratch)
    with pytest.raises(CheckpointError, match=message) as caught:
        load(scratch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("published", [SPRINT_06B, SPRINT_16B], ids=["0.6B", "1.6B"])
def test_sizes_are_those_of_the_class(published: Mapping[str, object]) -> None:
    with torch.device("meta"):
        transformer = SanaTransformer2DModel(**published)
    size = SanaSize(published)
    assert size.parameters == sum(parameter.numel() for parameter in transformer.parameters())
    linears = {n: m for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)}
    assert {layer.name: (layer.inputs, layer.outputs) for layer in size.linears()} == {
        name: (module.in_features, module.out_features) for name, module in linears.items()
    }


def test_a_machine_without_a_gpu_is_refused_before_anything_is_looked_for() -> None:
    spec = Recipe.default("sana-sprint").model.config.spec()
    assert spec.gpu_memory_gb > 0
    with pytest.raises(UsageError, match="needs a GPU"):
        device_for("auto", "sana-sprint", spec)


def test_the_larger_model_is_recognised_by_its_hub_id() -> None:
    small, large = (
        SanaSprintConfig(folder=f"Efficient-Large-Model/Sana_Sprint_{size}_1024px_diffusers")
        for size in ("0.6B", "1.6B")
    )
    assert (small.parameters() / 1e9, large.parameters() / 1e9) == (pytest.approx(0.6, 0.05), pytest.approx(1.6, 0.05))
