"""What a run changed in the weights of its base: low-rank terms, and tensors that it trained whole."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.files import digest
from fmg.core.specs import expand_targets, is_target
from fmg.inference.artifact.manifest import Adapter
from fmg.models.common.adapter import add_low_rank
from fmg.models.common.saved_weights import (
    DIFFUSERS_FILE,
    LORA_A,
    LORA_B,
    AdapterManifest,
    extra_shapes,
    read_adapter_manifest,
    read_adapter_tensors,
)

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Delta:
    """The changes by the names of the weights.

    Attributes:
        lora: A (rank, inputs) and B (outputs, rank) for a matrix (outputs, inputs).
        replaced: tensors that take the place of the base's.
        adapter: what the manifest says of it.
        base_name: registered name of the model that it belongs to.
        base_digest: sha256 of that model's stored weights.
    """

    lora: Mapping[str, tuple[Tensor, Tensor]]
    replaced: Mapping[str, Tensor]
    adapter: Adapter
    base_name: str
    base_digest: str

    @property
    def changed(self) -> frozenset[str]:
        """Names of the weights that are not the base's any more."""
        return frozenset(self.lora) | frozenset(self.replaced)

    def apply(self, name: str, base: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight called `name` in `dtype`: W + scale B A (`add_low_rank`)."""
        if name in self.replaced:
            return self.replaced[name].to(dtype)
        if name not in self.lora:
            return base.to(dtype)
        return add_low_rank(base, *self.lora[name], self.adapter.scale, dtype)


def read_delta(folder: Path, shapes: Shapes, run: str) -> Delta:
    """The changes of a saved adapter.

    Args:
        folder: what `save_adapter` wrote.
        shapes: of the base's weights by name.
        run: what the manifest calls the origin.

    Raises:
        CheckpointError: the folder is damaged or does not fit weights of these names and shapes.
    """
    manifest = read_adapter_manifest(folder)
    extra = extra_shapes(folder, manifest, shapes)
    tensors = read_adapter_tensors(folder, {**_adapter_shapes(shapes, manifest), **extra})
    modules = [name.removesuffix(LORA_A) for name in tensors if name.endswith(LORA_A)]
    lora = {f"{module}.weight": (tensors[module + LORA_A], tensors[module + LORA_B]) for module in sorted(modules)}
    facts = Adapter(
        digest=_digest(folder),
        rank=manifest.rank,
        alpha=manifest.alpha,
        scale=manifest.alpha / manifest.rank,
        targets=manifest.targets,
        run=run,
    )
    replaced = {name: tensors[name] for name in extra}
    return Delta(lora, replaced, facts, manifest.base.name, manifest.base.digest)


def check_base(delta: Delta, digest: str, where: str) -> None:
    """Whether the changes belong to weights with this digest.

    Raises:
        CheckpointError: they were trained on others.
    """
    if delta.base_digest != digest:
        raise CheckpointError(
            f"The adapter of {delta.adapter.run} was trained on other weights of '{delta.base_name}' than those in"
            f" {where}",
            f"Give the folder it was trained on (sha256 {delta.base_digest[:12]}).",
        )


def _adapter_shapes(shapes: Shapes, manifest: AdapterManifest) -> dict[str, tuple[int, ...]]:
    """Names and shapes that the tensors of the adapter must have on these weights."""
    suffixes = expand_targets(manifest.targets)
    expected: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        module = name.removesuffix(".weight")
        if len(shape) == 2 and module != name and is_target(module, suffixes):
            outputs, inputs = shape
            expected[module + LORA_A] = (manifest.rank, inputs)
            expected[module + LORA_B] = (outputs, manifest.rank)
    return expected


def _digest(folder: Path) -> str:
    """Sha256 over the weight files of an adapter, each under its name."""
    files = sorted(folder.glob("*.safetensors"), key=lambda file: (file.name != DIFFUSERS_FILE, file.name))
    text = "".join(f"{digest(file)} {file.name}\n" for file in files)
    return hashlib.sha256(text.encode()).hexdigest()
