"""The weighted sum of several saved adapters of one base, as one saved adapter.

    sum_i w_i (alpha_i / r_i) B_i A_i = [w_1 (alpha_1 / r_1) B_1, ...] [A_1; ...]

is one LoRA whose rank is the sum of the ranks and whose scale is 1, so all code that reads an adapter can read the
sum. The factors are computed in fp64 and rounded once, in a fixed order: the same adapters and weights give the same
files on every computer, whatever their order. A second-time embedder is replaced as a whole by each adapter that
trained it. Its sum is therefore a mean, and the weights of those adapters have to add up to 1.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import cache_dir, made_once
from fmg.core.display import some
from fmg.core.errors import CheckpointError, UsageError
from fmg.core.specs import expand_targets, is_target
from fmg.models.common.checkpoint_files import ADAPTER_MANIFEST, DIFFUSERS_FILE, EXTRA_FILE, adapter_digest
from fmg.models.common.saved_weights import (
    DIFFUSERS_PREFIX,
    LORA_A,
    LORA_B,
    AdapterManifest,
    read_adapter_manifest,
    read_saved_tensors,
)

_FORMAT = 1
_ROUNDING = 1e-9


@dataclass(frozen=True)
class _Part:
    """One adapter of a sum, with its LoRA by module."""

    folder: Path
    weight: float
    manifest: AdapterManifest
    lora: Mapping[str, tuple[Tensor, Tensor]]
    extra: Mapping[str, Tensor]

    @property
    def scale(self) -> float:
        return self.weight * self.manifest.alpha / self.manifest.rank

    def adapts(self, module: str) -> bool:
        return is_target(module, expand_targets(self.manifest.targets))


def merged_adapter(adapters: Sequence[tuple[Path, float]]) -> Path:
    """The folder of the sum, in the cache, in the format of `save_adapter` without the folder for PEFT.

    Args:
        adapters: what `save_adapter` wrote, each with its weight.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapters were trained on different weights.
        UsageError: they cannot be added up.
        StorageError: the cache cannot be written.
    """
    ordered = sorted((-weight, adapter_digest(folder), folder) for folder, weight in adapters)
    facts = [_FORMAT, *((digest, -negative) for negative, digest, _ in ordered)]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()

    def make(out: Path) -> None:
        parts = [_read(folder, -negative) for negative, _, folder in ordered]
        _check_parts(parts)
        _write(out, parts)

    return made_once(cache_dir() / "adapters" / key, make)


def _read(folder: Path, weight: float) -> _Part:
    """An adapter whose tensors are complete and agree with its manifest; those of the base are compared on loading."""
    manifest, tensors = read_adapter_manifest(folder), read_saved_tensors(folder)
    extra = {name: tensors.pop(name) for name in manifest.extra if name in tensors}
    modules = {name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)}
    known = {module + side for module in modules for side in (LORA_A, LORA_B)}
    wrong = [f"lacks {name}" for name in sorted({*known, *manifest.extra} - {*tensors, *extra})]
    wrong += [f"has {name}" for name in sorted(tensors.keys() - known)]
    wrong += [f"has no finite {name}" for name, x in sorted({**tensors, **extra}.items()) if not _is_finite(x)]
    if not wrong:
        pairs = {module: (tensors[module + LORA_A], tensors[module + LORA_B]) for module in sorted(modules)}
        shapes = {module: (a.ndim, b.ndim, a.shape[0], b.shape[-1]) for module, (a, b) in pairs.items()}
        wrong = [f"has a different rank at {m}" for m, found in shapes.items() if found != (2, 2, *[manifest.rank] * 2)]
    if wrong or not modules:
        raise CheckpointError(
            f"The adapter in {folder} is damaged: it {wrong[0] if wrong else 'has no LoRA'}", "Restore it from a copy."
        )
    return _Part(folder, weight, manifest, pairs, extra)


def _is_finite(x: Tensor) -> bool:
    return bool(torch.isfinite(x).all())


def _check_parts(parts: Sequence[_Part]) -> None:
    first = parts[0]
    for part in parts[1:]:
        if part.manifest.base.digest != first.manifest.base.digest or part.manifest.map != first.manifest.map:
            raise CheckpointError(
                f"The adapters in {first.folder} and {part.folder} were trained on different weights",
                "Merge adapters of one model.",
            )
    trained = {name for part in parts for name in part.extra}
    for part in parts:
        if part.extra and part.extra.keys() != trained:
            raise UsageError("The adapters trained different parts of the base", "Leave one of them out.")
        if both := sorted(name for name in trained if name.removesuffix(".weight") in part.lora):
            raise UsageError(
                f"{part.folder} adapts {some(both)}, which another adapter trained as a whole", "Leave one of them out."
            )
    total = math.fsum(part.weight for part in parts if part.extra)
    if trained and abs(total - 1) > _ROUNDING:
        raise UsageError(
            f"The weights of the adapters that trained the second-time embedder add up to {total:g} instead of 1:"
            " embedders are averaged",
            "Choose weights that add up to 1 for those adapters.",
        )


def _write(out: Path, parts: Sequence[_Part]) -> None:
    tensors: dict[str, Tensor] = {}
    for module in sorted({module for part in parts for module in part.lora}):
        a, b = _stacked(module, parts)
        tensors |= {DIFFUSERS_PREFIX + module + LORA_A: a, DIFFUSERS_PREFIX + module + LORA_B: b}
    # neither alpha nor metadata: every reader then takes a scale of 1
    save_file(tensors, out / DIFFUSERS_FILE, metadata={"format": "pt"})
    first = parts[0].manifest
    rank = sum(part.manifest.rank for part in parts)
    trained = [part for part in parts if part.extra]
    if trained:
        mean = {
            name: torch.stack([part.weight * part.extra[name].double() for part in trained]).sum(0)
            for name in sorted(trained[0].extra)
        }
        stored = {DIFFUSERS_PREFIX + name: _rounded(x, name) for name, x in mean.items()}
        save_file(stored, out / EXTRA_FILE, metadata={"format": "pt"})
    manifest = AdapterManifest(
        base=first.base,
        map=first.map,
        rank=rank,
        alpha=rank,
        dropout=0.0,
        targets=tuple(sorted({target for part in parts for target in part.manifest.targets})),
        extra=tuple(sorted({name for part in parts for name in part.extra})),
    )
    (out / ADAPTER_MANIFEST).write_text(manifest.model_dump_json(indent=2, by_alias=True) + "\n", encoding="utf-8")


def _stacked(module: str, parts: Sequence[_Part]) -> tuple[Tensor, Tensor]:
    """A and B of the sum at one module: zero where an adapter does not adapt it."""
    present = [part.lora[module] for part in parts if module in part.lora]
    outputs, inputs = {b.shape[0] for _, b in present}, {a.shape[1] for a, _ in present}
    if len(outputs) > 1 or len(inputs) > 1:
        raise CheckpointError(f"The adapters have different shapes at {module}", "Merge adapters of one model.")
    (rows,), (columns,) = outputs, inputs
    downs, ups = [], []
    for part in parts:
        if module not in part.lora and part.adapts(module):
            raise CheckpointError(
                f"The adapter in {part.folder} is damaged: it lacks {module}", "Restore it from a copy."
            )
        rank = part.manifest.rank
        a, b = part.lora.get(module, (torch.zeros(rank, columns), torch.zeros(rows, rank)))
        downs.append(a.double())
        ups.append(part.scale * b.double())
    return _rounded(torch.cat(downs), module), _rounded(torch.cat(ups, dim=1), module)


def _rounded(x: Tensor, name: str) -> Tensor:
    rounded = x.float().contiguous()
    if not _is_finite(rounded):
        raise UsageError(f"{name} is not finite in the sum of the adapters", "Choose smaller weights.")
    return rounded
