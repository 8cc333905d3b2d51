"""The LoRA files under the published rules of the tools that read them, against what fmg merges.

ComfyUI (`comfy/lora.py`, `comfy/weight_adapter/lora.py`, `comfy/utils.py: flux_to_diffusers`) adds `alpha / rank B A`
for `X.alpha`, `X.lora_A.weight`, `X.lora_B.weight` and takes 1 for the scale where there is no `X.alpha`; a key X is
`transformer.` and the name in diffusers, which stands for some rows of a matrix of the original code. kohya's
`networks/flux_merge_lora.py` adds `alpha / rank up down` to the matrix whose name, with `_` for `.`, follows
`lora_unet_`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxPipeline
from safetensors.torch import load_file
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.data.checkpoints import chosen_checkpoint
from fmg.export.kohya import export_kohya
from fmg.export.source import ExportSource, find_source
from fmg.inference.target import resolve_target
from fmg.models.common.saved_weights import DIFFUSERS_FILE
from fmg.recipe import Recipe
from tests.support.artifact import make_run
from tests.support.cli import fmg
from tests.tiny_flux import build_tiny_flux

EVERYTHING = ["attention-mlp", "norm.linear", "norm1.linear", "norm1_context.linear", "norm_out.linear"]
EVERYTHING += ["x_embedder", "context_embedder", "linear_1", "linear_2", "proj_out"]
# some parts of a fused matrix only, so that the others' rows must stay
SOME = ["attn.to_q", "attn.to_v", "proj_mlp"]

_PARTS = {
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
}
_ROOT = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_QKV = ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")


def _place(module: str, width: int) -> tuple[str, int]:
    """The matrix of the original code, and the first of its rows that a module of diffusers is."""
    if module in _ROOT:
        return _ROOT[module], 0
    blocks, index, rest = module.split(".", 2)
    single = blocks.startswith("single")
    home = f"{'single' if single else 'double'}_blocks.{index}"
    last = rest.rpartition(".")[2]
    if rest == "proj_mlp":
        return f"{home}.linear1", 3 * width
    if last in _QKV:
        stream = "linear1" if single else f"{'txt' if 'add' in last else 'img'}_attn.qkv"
        return f"{home}.{stream}", _QKV.index(last) % 3 * width
    return f"{home}.{_PARTS[rest]}", 0


def _swap(weight: Tensor) -> Tensor:
    shift, scale = weight.chunk(2)
    return torch.cat([scale, shift])


def _original(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """The matrices of diffusers' weights as the original code has them."""
    rows: dict[str, list[tuple[int, Tensor]]] = {}
    for name, x in state.items():
        module = name.removesuffix(".weight")
        if x.ndim == 2 and name.endswith(".weight") and not module.startswith("timestep_embedder2"):
            home, start = _place(module, width)
            rows.setdefault(home, []).append((start, _swap(x) if module == "norm_out.linear" else x))
    return {home: torch.cat([x for _, x in sorted(parts, key=lambda part: part[0])]) for home, parts in rows.items()}


def _comfyui(file: Mapping[str, Tensor], weights: dict[str, Tensor], width: int) -> None:
    modules = {name.removesuffix(".lora_B.weight") for name in file if name.endswith(".lora_B.weight")}
    for key in modules:
        a, b, alpha = file[f"{key}.lora_A.weight"], file[f"{key}.lora_B.weight"], file.get(f"{key}.alpha")
        change = (1.0 if alpha is None else alpha.item() / a.shape[0]) * (b @ a)
        module = key.removeprefix("transformer.")
        home, start = _place(module, width)
        change = _swap(change) if module == "norm_out.linear" else change
        weights[home][start : start + change.shape[0]] += change
    assert {
        name for key in modules for name in (f"{key}.alpha", f"{key}.lora_A.weight", f"{key}.lora_B.weight")
    } == set(file)


def _kohya(file: Mapping[str, Tensor], weights: dict[str, Tensor], _: int) -> None:
    named = {f"lora_unet_{home.replace('.', '_')}": home for home in weights}
    for key in {name.partition(".")[0] for name in file}:
        down, up = file[f"{key}.lora_down.weight"], file[f"{key}.lora_up.weight"]
        weights[named[key]] += file[f"{key}.alpha"].item() / down.shape[0] * (up @ down)


@pytest.fixture(scope="module", params=[EVERYTHING, SOME], ids=["everything", "some"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = build_tiny_flux(tmp_path_factory.mktemp("base") / "flux", second_time="none")
    overrides = {"model.folder": str(base), "lora.rank": 2, "lora.alpha": 6.0, "lora.targets": request.param}
    return make_run(tmp_path_factory.mktemp("run") / "run", Recipe.default("scm-shapes", **overrides), seed=4)


def _merged(source: ExportSource) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The base's weights and the tuned ones, as fmg merges them."""
    base = {name: source.reader.read(name) for name in source.stored}
    assert source.delta is not None
    return base, {name: source.delta.apply(name, x, torch.float32) for name, x in base.items()}


Rule = Callable[[Mapping[str, Tensor], dict[str, Tensor], int], None]


@pytest.mark.parametrize(("kohya", "rule"), [(False, _comfyui), (True, _kohya)], ids=["comfyui", "kohya"])
def test_the_rule_of_the_tool_gives_the_weights_that_fmg_merges(
    run: Path, kohya: bool, rule: Rule, tmp_path: Path
) -> None:
    source = find_source(resolve_target(run))
    base, tuned = _merged(source)
    config: Any = source.transformer.config
    width = config["num_attention_heads"] * config["attention_head_dim"]
    checkpoint = chosen_checkpoint(run)
    assert checkpoint is not None
    file = export_kohya(run, tmp_path / "lora.safetensors").file if kohya else checkpoint / DIFFUSERS_FILE
    weights, expected = _original(base, width), _original(tuned, width)
    changed = {home for home, x in expected.items() if not torch.equal(x, weights[home])}
    assert changed
    rule(load_file(file), weights, width)
    assert all(torch.allclose(weights[home], x, atol=1e-6, rtol=1e-5) for home, x in expected.items())


def test_diffusers_reads_kohyas_names_back(run: Path, tmp_path: Path) -> None:
    source = find_source(resolve_target(run))
    stored = load_file(export_kohya(run, tmp_path / "lora.safetensors").file)
    # its rule for single-stream blocks is for the width of FLUX.1 only
    known = {name: x for name, x in stored.items() if "double_blocks" in name}
    read = FluxPipeline.lora_state_dict(known)
    assert source.delta is not None
    modules = {name.removesuffix(".lora_A.weight") for name in read if name.endswith(".lora_A.weight")}
    for module in modules:
        change = read[f"{module}.lora_B.weight"] @ read[f"{module}.lora_A.weight"]
        factors = source.delta.lora.get(f"{module.removeprefix('transformer.')}.weight")
        expected = torch.zeros_like(change) if factors is None else source.delta.adapter.scale * factors[1] @ factors[0]
        assert torch.allclose(change, expected, atol=1e-6, rtol=1e-5), module
    adapted = {name.removesuffix(".weight") for name in source.delta.lora if name.startswith("transformer_blocks")}
    assert adapted <= {module.removeprefix("transformer.") for module in modules}


def test_what_the_layout_cannot_hold_is_refused(tmp_path: Path) -> None:
    base = build_tiny_flux(tmp_path / "flux")
    options = {"model.folder": str(base), "lora.rank": 2}
    beside = make_run(tmp_path / "beside", Recipe.default("meanflow-shapes", **options), seed=0, trained="duration")
    inside = Recipe.default("meanflow-shapes", **options, **{"lora.targets": ["timestep_embedder2.linear_1"]})
    unnamed = make_run(tmp_path / "inside", inside, seed=0)
    for run, message in ((beside, "also trained the second-time embedder"), (unnamed, "has no name for")):
        with pytest.raises(UsageError, match=message):
            export_kohya(run, tmp_path / "lora.safetensors")
    with pytest.raises(UsageError, match="has no LoRA"):
        export_kohya("meanflow-shapes", tmp_path / "lora.safetensors")
    assert not (tmp_path / "lora.safetensors").exists()


def test_the_command_writes_one_file_and_overwrites_none(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "lora.safetensors"
    done = fmg("export", "--kohya", str(run), str(out))
    assert done.code == 0, done.stderr
    assert "modules" in done.stdout
    before = out.read_bytes()
    again = fmg("export", "--kohya", str(run), str(out))
    assert again.code == 2
    assert "exists already" in again.stderr
    assert [file.name for file in out.parent.iterdir()] == [out.name]
    assert out.read_bytes() == before
    assert "cannot be used with --kohya" in fmg("export", "--kohya", str(run), "--precision", "fp16").stderr
