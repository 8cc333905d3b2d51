from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers.utils import logging as diffusers_logging
from safetensors.torch import load_file, save_file
from transformers.utils import logging as transformers_logging

from fmg.core.errors import CheckpointError
from fmg.models.conventions import CONVENTIONS_FILE
from fmg.models.flux.loading import load_folder
from fmg.models.flux.model import FluxModel
from tests.tiny_flux import store_in

CPU = torch.device("cpu")
WEIGHTS = "diffusion_pytorch_model.safetensors"


def _edit(file: Path, **changes: object) -> None:
    content = json.loads(file.read_text())
    content = {key: value for key, value in {**content, **changes}.items() if value is not ...}
    file.write_text(json.dumps(content))


def _edit_weights(file: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def _truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _pickle_only(folder: Path) -> None:
    torch.save(load_file(folder / WEIGHTS), folder / "diffusion_pytorch_model.bin")
    (folder / WEIGHTS).unlink()


def _begin_with_mark(file: Path) -> None:
    file.write_text("\ufeff" + file.read_text())


def _variants_only(folder: Path, *variants: str) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).unlink()
    for variant in variants:
        (folder / WEIGHTS.replace(".safetensors", f".{variant}.safetensors")).write_bytes(whole)


def _dangle(file: Path) -> None:
    file.unlink()
    file.symlink_to("../blobs/0")


def _shard_outside(folder: Path) -> None:
    index = {"weight_map": {"decoder.conv_in.weight": f"../transformer/{WEIGHTS}"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no component": (lambda f: shutil.rmtree(f / "vae"), "vae/config.json is missing"),
    "config is not JSON": (lambda f: (f / "vae/config.json").write_text("{"), "vae/config.json .*: not JSON"),
    "config is a list": (lambda f: (f / "vae/config.json").write_text("[]"), "not a JSON object"),
    "foreign class": (
        lambda f: _edit(f / "transformer/config.json", _class_name="SD3Transformer2DModel"),
        "names the class 'SD3Transformer2DModel', which is not a transformer of FLUX",
    ),
    "foreign text encoder": (
        lambda f: _edit(f / "text_encoder_2/config.json", architectures=["EvilModel"]),
        "names the class 'EvilModel'",
    ),
    "no weights": (
        lambda f: (f / "transformer" / WEIGHTS).unlink(),
        "transformer has no diffusion_pytorch_model.safetensors",
    ),
    "byte order mark": (lambda f: _begin_with_mark(f / "vae/config.json"), "vae/config.json begins with a byte order"),
    "only variants": (
        lambda f: _variants_only(f / "transformer", "fp16", "non_ema"),
        "no diffusion_pytorch_model.safetensors, only the variant fp16, non_ema",
    ),
    "only variants of a text encoder": (
        lambda f: (f / "text_encoder/model.safetensors").rename(f / "text_encoder/model.fp16.safetensors"),
        "no model.safetensors, only the variant fp16",
    ),
    "other name": (
        lambda f: (f / "transformer" / WEIGHTS).rename(f / "transformer/flux.safetensors"),
        "no diffusion_pytorch_model.safetensors; it has flux.safetensors",
    ),
    "dangling link": (lambda f: _dangle(f / "vae" / WEIGHTS), "is a link to ../blobs/0, which does not exist"),
    "shard outside": (lambda f: _shard_outside(f / "vae"), "'../transformer/.*', which is not a path within"),
    "adapter in its place": (
        lambda f: (f / "text_encoder/adapter_config.json").write_text("{}"),
        "an adapter for another model",
    ),
    "rope axes missing": (lambda f: _edit(f / "transformer/config.json", axes_dims_rope=...), "leaves out the key"),
    "rope axes": (lambda f: _edit(f / "transformer/config.json", axes_dims_rope=[8, 8, 8]), r"\[8, 8, 8\], but"),
    "layers": (lambda f: _edit(f / "text_encoder_2/config.json", num_layers=10**6), "at most 1000 is supported"),
    "positions": (
        lambda f: _edit(f / "text_encoder/config.json", max_position_embeddings=10**12),
        "1000000000000 for max_position_embeddings, but at most",
    ),
    "code of a kernel": (
        lambda f: _edit(f / "text_encoder/config.json", attn_implementation="someone/kernel"),
        "code from elsewhere",
    ),
    "end of text": (
        lambda f: _edit(f / "text_encoder/config.json", eos_token_id=[1]),
        "text_encoder/config.json cannot be used",
    ),
    "number as text": (lambda f: _edit(f / "vae/config.json", scaling_factor=""), "'' for scaling_factor instead of"),
    "quantised": (lambda f: _edit(f / "text_encoder/config.json", quantization_config={}), "weights are quantised"),
    "pickle": (lambda f: _pickle_only(f / "transformer"), "a pickle can run code"),
    "truncated": (lambda f: _truncate(f / "transformer" / WEIGHTS), f"transformer/{WEIGHTS} cannot be loaded"),
    "truncated text encoder": (
        lambda f: _truncate(f / "text_encoder/model.safetensors"),
        "text_encoder/model.safetensors cannot be loaded",
    ),
    "missing key": (
        lambda f: _edit_weights(f / "transformer" / WEIGHTS, lambda t: t.pop("timestep_embedder2.linear_1.weight")),
        "missing keys: timestep_embedder2.linear_1.weight",
    ),
    "missing text key": (
        lambda f: _edit_weights(
            f / "text_encoder_2/model.safetensors", lambda t: t.pop("encoder.final_layer_norm.weight")
        ),
        "missing keys: encoder.final_layer_norm.weight",
    ),
    "left-over key": (
        lambda f: _edit_weights(f / "transformer" / WEIGHTS, lambda t: t.update(logvar_linear=torch.zeros(1))),
        "unexpected keys: logvar_linear",
    ),
    "wrong shape": (
        lambda f: _edit_weights(f / "transformer" / WEIGHTS, lambda t: t.update({"proj_out.bias": torch.zeros(3)})),
        "transformer cannot be loaded: .*proj_out.bias",
    ),
    "no tokenizer": (
        lambda f: [p.unlink() for p in (f / "tokenizer_2").iterdir()],
        "tokenizer_2 has none of the files",
    ),
    "damaged tokenizer": (lambda f: (f / "tokenizer/tokenizer.json").write_text("{"), "tokenizer cannot be loaded"),
    "time scale": (
        lambda f: _edit(f / CONVENTIONS_FILE, time_scale=1.0),
        "config.json says time_scale 1000.0, but fmg_flow_map.json says 1.0",
    ),
    "second time": (lambda f: _edit(f / CONVENTIONS_FILE, second_time="target"), "says second_time 'duration'"),
    "guidance": (lambda f: _edit(f / CONVENTIONS_FILE, guidance=3.5), "takes no guidance scale"),
    "resolution": (lambda f: _edit(f / CONVENTIONS_FILE, resolution=40), "not a multiple of 16"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_folder_is_one_clear_error(scratch_folder: Path, damage: str) -> None:
    apply, expected = DAMAGES[damage]
    apply(scratch_folder)
    with pytest.raises(CheckpointError, match=expected) as caught:
        FluxModel.from_folder(scratch_folder, CPU, torch.float32, name="tiny")
    assert len(str(caught.value).splitlines()) == 1


def test_components_of_different_models_are_refused(scratch_folder: Path) -> None:
    file = scratch_folder / "text_encoder_2"
    _edit(file / "config.json", d_model=16, num_heads=1)
    _edit_weights(file / "model.safetensors", _halve_t5)
    with pytest.raises(CheckpointError, match="text_encoder_2 does not fit the transformer: d_model is 16"):
        load_folder(scratch_folder, CPU, torch.float32)


def _halve_t5(tensors: dict[str, torch.Tensor]) -> None:
    """The weights of the same encoder at width 16 with one head of 16."""
    for name, tensor in tensors.items():
        if name.endswith((".q.weight", ".k.weight", ".v.weight")) or name == "encoder.embed_tokens.weight":
            rows = tensor.shape[0] if "embed_tokens" in name else 16
            tensors[name] = tensor[:rows, :16].contiguous()
        elif name.endswith(".o.weight"):
            tensors[name] = tensor[:16, :16].contiguous()
        elif name.endswith(("wi_0.weight", "wi_1.weight")) or name == "shared.weight":
            tensors[name] = tensor[:, :16].contiguous()
        elif name.endswith(("wo.weight", "layer_norm.weight")):
            tensors[name] = tensor[:16].contiguous()
        elif name.endswith("relative_attention_bias.weight"):
            tensors[name] = tensor[:, :1].contiguous()


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
@pytest.mark.parametrize("asked", [torch.float32, torch.bfloat16])
def test_any_stored_dtype_loads_in_the_requested_one(
    scratch_folder: Path, stored: torch.dtype, asked: torch.dtype
) -> None:
    store_in(scratch_folder, stored)
    components = load_folder(scratch_folder, CPU, asked)
    text = components.text
    for module in (components.transformer, components.vae, text.text_encoder, text.text_encoder_2):
        assert {p.dtype for p in module.parameters()} == {asked}
        assert not module.training
        assert not any(p.requires_grad for p in module.parameters())
    file = load_file(scratch_folder / "transformer" / WEIGHTS)
    assert torch.equal(components.transformer.proj_out.weight, file["proj_out.weight"].to(asked))


@pytest.mark.parametrize(
    ("component", "stored", "name"),
    [
        ("transformer", torch.int8, "I8"),
        ("transformer", torch.uint8, "U8"),
        ("transformer", torch.int64, "I64"),
        ("transformer", torch.bool, "BOOL"),
        ("text_encoder_2", torch.int8, "I8"),
        ("vae", torch.uint8, "U8"),
    ],
)
def test_weights_of_another_type_are_refused_by_name(
    scratch_folder: Path, component: str, stored: torch.dtype, name: str
) -> None:
    (file,) = (scratch_folder / component).glob("*.safetensors")
    _edit_weights(file, lambda tensors: tensors.update({key: x.to(stored) for key, x in tensors.items()}))
    with pytest.raises(CheckpointError, match=rf"is stored as {name}, .* F8_E4M3, .* not quantised") as caught:
        load_folder(scratch_folder, CPU, torch.float32)
    assert "\n" not in str(caught.value)


def test_a_folder_that_names_the_stock_class_loads_by_its_conventions(scratch_folder: Path) -> None:
    expected = load_folder(scratch_folder, CPU, torch.float32).transformer
    changes = {"_class_name": "FluxTransformer2DModel", "time_scale": ..., "second_time": ...}
    _edit(scratch_folder / "transformer/config.json", **changes)
    transformer = load_folder(scratch_folder, CPU, torch.float32).transformer
    assert (transformer.config.time_scale, transformer.config.second_time) == (1000.0, "duration")
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), expected.parameters(), strict=True))


def test_loading_is_silent_and_leaves_the_libraries_as_they_were(
    two_time_folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    libraries = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    load_folder(two_time_folder, CPU, torch.float32)
    assert [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries] == before
    assert capfd.readouterr() == ("", "")


def test_a_variant_beside_the_main_file_is_never_read(scratch_folder: Path) -> None:
    expected = FluxModel.from_folder(scratch_folder, CPU, torch.float32, name="tiny")
    for name in (f"transformer/{WEIGHTS}", f"vae/{WEIGHTS}", "text_encoder/model.safetensors"):
        file = scratch_folder / name
        zeros = {key: torch.zeros_like(x) for key, x in load_file(file).items()}
        for variant in ("ema", "fp16", "non_ema"):
            save_file(zeros, file.with_name(file.name.replace(".safetensors", f".{variant}.safetensors")))
        index = {"weight_map": dict.fromkeys(zeros, file.name.replace(".safetensors", ".fp16.safetensors"))}
        file.with_name(f"{file.name}.index.fp16.json").write_text(json.dumps(index))
    model = FluxModel.from_folder(scratch_folder, CPU, torch.float32, name="tiny")
    for part in ("transformer", "vae"):
        pairs = zip(
            getattr(model.components, part).parameters(), getattr(expected.components, part).parameters(), strict=True
        )
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_whole_t5_and_byte_order_marks_are_read(scratch_folder: Path) -> None:
    _edit_weights(
        scratch_folder / "text_encoder_2/model.safetensors",
        lambda t: t.update({"lm_head.weight": torch.zeros(4, 4), "decoder.final_layer_norm.weight": torch.zeros(4)}),
    )
    for name in ("transformer/config.json", CONVENTIONS_FILE):
        _begin_with_mark(scratch_folder / name)
    FluxModel.from_folder(scratch_folder, CPU, torch.float32, name="tiny")
