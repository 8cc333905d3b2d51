"""Several saved adapters of one loaded model, one of which is active at a time: for serving, not for training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmg.core.cache import content_hash
from fmg.core.errors import CheckpointError, UsageError, suggestion
from fmg.models.common import adapter, saved_weights
from fmg.models.common.checkpoint_files import DIFFUSERS_FILE, is_full
from fmg.models.common.model import AdaptedModel


@dataclass(frozen=True)
class ReadAdapter:
    """A saved adapter that was read and fits the model.

    Attributes:
        manifest: the manifest with its geometry.
        tensors: tensors by their names in files, on the CPU.
        digest: sha256 of its LoRA file.
    """

    manifest: saved_weights.AdapterManifest
    tensors: Mapping[str, Tensor]
    digest: str


@dataclass(frozen=True)
class _Held:
    slot: str
    digest: str
    extra: Mapping[str, Tensor]


class HeldAdapters:
    """The adapters of a model that was loaded without one. Ranks and target modules may differ.

    Switching sets a flag in each adapted layer, and copies the second-time embedder if an adapter has its own. All
    methods but `read` belong on the thread that samples the model.

    Args:
        model: the model, without an adapter.
    """

    def __init__(self, model: AdaptedModel[Any]) -> None:
        self._model = model
        self._held: dict[str, _Held] = {}
        self._slots = count()
        # the base's values of the tensors that an adapter replaces
        self._base: dict[str, Tensor] = {}
        self._active: str | None = None

    def read(self, folder: Path) -> ReadAdapter:
        """Reads a checkpoint of a run. Changes nothing.

        Raises:
            CheckpointError: a file is missing or damaged, it was trained on other weights, or it is not an adapter.
        """
        if is_full(folder):
            raise CheckpointError(
                f"{folder} is a whole transformer, not an adapter", "Serve its run as a separate model."
            )
        manifest, tensors = self._model.read_adapter(folder)
        return ReadAdapter(manifest, tensors, content_hash(folder / DIFFUSERS_FILE))

    def put(self, name: str, read: ReadAdapter) -> None:
        """Adds an adapter, or replaces the one of this name."""
        transformer = self._model.components.transformer
        manifest, before = read.manifest, self._held.get(name)
        slot = f"held{next(self._slots)}"
        with torch.no_grad():
            unused = self._model.unused
            places = adapter.hold(transformer, slot, manifest.rank, manifest.alpha, manifest.targets, unused)
            for key, parameter in places.items():
                parameter.copy_(read.tensors[key])
        self._held[name] = _Held(slot, read.digest, {key: read.tensors[key] for key in manifest.extra})
        if before is not None:
            transformer.delete_adapters(before.slot)
        # attaching has activated the new one
        self._select(self._active if self._active in self._held else None)

    def use(self, name: str | None) -> str | None:
        """Activates an adapter, or with None the base; returns its digest.

        Raises:
            UsageError: there is no such adapter.
        """
        if name is not None and name not in self._held:
            raise UsageError(f"There is no adapter '{name}'", suggestion(name, self._held))
        if name != self._active:
            self._select(name)
        return self.digest(name)

    def digest(self, name: str | None) -> str | None:
        """Sha256 of an adapter's LoRA; None for the base."""
        return None if name is None else self._held[name].digest

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, name: object) -> bool:
        return name in self._held

    @torch.no_grad()
    def _select(self, name: str | None) -> None:
        held = None if name is None else self._held[name]
        adapter.select(adapter.tuner_layers(self._model.components.transformer), None if held is None else held.slot)
        wanted = self._base | dict({} if held is None else held.extra)
        if wanted:
            places = adapter.base_parameters(self._model.network)
            for key, value in wanted.items():
                if key not in self._base:
                    self._base[key] = places[key].detach().clone()
                places[key].copy_(value)
        self._active = name
