"""Exports the LoRA of a run in the layout of kohya's sd-scripts, which Forge, ComfyUI and others read as well.

The layout uses the modules of the original FLUX code, where query, key and value (and the MLP of a single-stream block)
are one matrix. LoRAs of the parts become one LoRA of the sum of their ranks, A stacked and B on the diagonal, with the
same update.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from fmg.core.errors import UsageError, writing
from fmg.core.events import Observer, ignore
from fmg.core.files import write_atomic
from fmg.export.source import Delta, ExportSource, find_source
from fmg.inference.target import TargetLike, resolve_target, sum_label
from fmg.models.common.checkpoint_files import KOHYA_DIGEST

_PREFIX = "lora_unet_"
_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v")
_DOUBLE: Mapping[str, Sequence[str]] = {
    "img_attn_qkv": _ATTENTION,
    "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    "img_attn_proj": ("attn.to_out.0",),
    "txt_attn_proj": ("attn.to_add_out",),
    "img_mlp_0": ("ff.net.0.proj",),
    "img_mlp_2": ("ff.net.2",),
    "txt_mlp_0": ("ff_context.net.0.proj",),
    "txt_mlp_2": ("ff_context.net.2",),
    "img_mod_lin": ("norm1.linear",),
    "txt_mod_lin": ("norm1_context.linear",),
}
_SINGLE: Mapping[str, Sequence[str]] = {
    "linear1": (*_ATTENTION, "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm.linear",),
}
_BLOCKS = (("transformer_blocks", "double_blocks", _DOUBLE), ("single_transformer_blocks", "single_blocks", _SINGLE))
_OTHERS = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in_in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in_out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in_in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in_out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in_in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in_out_layer",
    "proj_out": "final_layer_linear",
    "norm_out.linear": "final_layer_adaLN_modulation_1",
}
_SWAPPED = "norm_out.linear"
"""In diffusers, shift and scale of its output are swapped."""


@dataclass(frozen=True)
class KohyaLora:
    """The file written, and how many modules of the original code it adapts."""

    file: Path
    modules: int


def export_kohya(target: TargetLike, out: Path, observer: Observer = ignore) -> KohyaLora:
    """Writes the LoRA of a run as one file.

    Args:
        target: a run folder, the sum of several adapters, or None for the newest run.
        out: the file to write.
        observer: receives the progress of a download.

    Raises:
        UsageError: there is no LoRA, it adapts a module that the layout lacks, or `out` exists.
        CheckpointError: the adapter is damaged or belongs to another base.
    """
    found = resolve_target(target, observer=observer)
    source = find_source(found)
    delta = source.delta
    if delta is None:
        raise UsageError(f"'{found.label}' has no LoRA", "Name the folder of a run that trained one; see `fmg runs`.")
    if delta.replaced:
        raise UsageError(
            f"'{found.label}' also trained the second-time embedder, which other tools' LoRA files cannot contain",
            "Export the merged model: fmg export --diffusers.",
        )
    if out.exists():
        raise UsageError(f"{out} exists already", "Name another file, or move that one away.")
    tensors = kohya_tensors(delta, {name: shape for name, (_, shape) in source.stored.items()})
    _write(tensors, source, delta, out)
    return KohyaLora(out, len(tensors) // 3)


def kohya_tensors(delta: Delta, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """`lora_down.weight`, `lora_up.weight` and `alpha` of each module by kohya's names.

    Args:
        delta: the LoRA.
        shapes: shapes of the base's weights by diffusers' names.

    Raises:
        UsageError: it adapts a module that the layout has no name for.
    """
    groups = _groups(shapes)
    named = {f"{part}.weight" for parts in groups.values() for part in parts}
    if unnamed := sorted(set(delta.lora) - named):
        raise UsageError(
            f"The LoRA adapts {unnamed[0].removesuffix('.weight')}, which kohya's layout has no name for",
            "Load the checkpoint in diffusers, or use fmg export --diffusers.",
        )
    tensors: dict[str, Tensor] = {}
    for name, parts in groups.items():
        down, up = _joined(delta, parts, shapes)
        if down is not None and up is not None:
            tensors[f"{_PREFIX}{name}.lora_down.weight"] = down
            tensors[f"{_PREFIX}{name}.lora_up.weight"] = up
            # the tools scale by alpha over the rank of the file
            tensors[f"{_PREFIX}{name}.alpha"] = torch.tensor(delta.adapter.scale * down.shape[0])
    return tensors


def _joined(
    delta: Delta, parts: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Tensor | None, Tensor | None]:
    """A and B of the matrix whose rows are `parts`, for those parts that are adapted."""
    adapted = [part for part in parts if f"{part}.weight" in delta.lora]
    if not adapted:
        return None, None
    factors = {part: delta.lora[f"{part}.weight"] for part in adapted}
    down = torch.cat([factors[part][0] for part in adapted])
    up = down.new_zeros(sum(shapes[f"{part}.weight"][0] for part in parts), down.shape[0])
    row = column = 0
    for part in parts:
        rows = shapes[f"{part}.weight"][0]
        if part in factors:
            b = factors[part][1]
            if part == _SWAPPED:
                b = torch.cat(list(reversed(b.chunk(2))))
            up[row : row + rows, column : column + b.shape[1]] = b
            column += b.shape[1]
        row += rows
    return down.contiguous(), up


def _groups(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Sequence[str]]:
    """Modules of diffusers by kohya's name of the matrix whose rows they are."""
    groups: dict[str, Sequence[str]] = {}
    for ours, theirs, block in _BLOCKS:
        count = len({name.split(".")[1] for name in shapes if name.startswith(f"{ours}.")})
        for index in range(count):
            for name, parts in block.items():
                groups[f"{theirs}_{index}_{name}"] = [f"{ours}.{index}.{part}" for part in parts]
    return groups | {theirs: [ours] for ours, theirs in _OTHERS.items()}


def _title(source: ExportSource) -> str:
    """The run, or the sum of runs, without folders of this computer."""
    parts = [replace(part, run=Path(part.run).name) for part in source.merged]
    return sum_label(parts) if parts else Path(source.label).name


def _write(tensors: Mapping[str, Tensor], source: ExportSource, delta: Delta, out: Path) -> None:
    ranks = {str(x.shape[0]) for name, x in tensors.items() if name.endswith("lora_down.weight")}
    metadata = {
        "format": "pt",
        "ss_network_module": "networks.lora_flux",
        "ss_network_dim": str(delta.adapter.rank) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(delta.adapter.alpha) if len(ranks) == 1 else "Dynamic",
        "ss_base_model_version": "flux1",
        "modelspec.title": _title(source),
        KOHYA_DIGEST: delta.adapter.digest,
    }
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(out, save(dict(tensors), metadata=metadata))
