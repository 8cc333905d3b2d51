"""Adapters of `FlowMapPipeline`: what diffusers does for FLUX, and weights that were trained beside a LoRA."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from diffusers.loaders import FluxLoraLoaderMixin
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.files import SUMS, check_sums
from fmg.core.hub import HUB_OPTIONS, snapshot_folder
from fmg.models.common import adapter, saved_weights
from fmg.models.conventions import FlowMapConventions

_FILES = (saved_weights.DIFFUSERS_FILE, saved_weights.EXTRA_FILE, saved_weights.ADAPTER_MANIFEST)
_FIX = "Restore it from a copy, or train again."


class _Extra:
    """Weights that an adapter brings besides its LoRA, and those of the base while they are replaced."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], base: dict[str, Tensor]) -> None:
        self.name = name
        self.base = base
        self._tensors = tensors

    def place(self, transformer: Any, active: bool) -> None:
        """Puts the adapter's or the base's weights into the transformer."""
        if active == bool(self.base):
            return
        parameters = {adapter.base_name(name): parameter for name, parameter in transformer.named_parameters()}
        values, kept = (self._tensors, True) if active else (self.base, False)
        before = {name: parameters[name].detach().clone() for name in values}
        with torch.no_grad():
            for name, value in values.items():
                parameters[name].copy_(value)
        self.base = before if kept else {}


class FlowMapLoraMixin(FluxLoraLoaderMixin):  # type: ignore[misc]
    """The LoRA methods of `FluxPipeline`, checked against the map and with `fmg_extra.safetensors`."""

    transformer: Any
    _conventions: FlowMapConventions
    _extra: _Extra | None = None

    def load_lora_weights(
        self,
        pretrained_model_name_or_path_or_dict: str | Path | dict[str, Tensor],
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Loads a LoRA: a checkpoint of fmg, or what `FluxPipeline.load_lora_weights` takes.

        A checkpoint of fmg is checked against the map, and weights that were trained beside the LoRA
        (`fmg_extra.safetensors`) take the place of the transformer's while the adapter is active.

        Raises:
            UsageError: the checkpoint is a whole transformer, or two adapters bring weights of their own.
            CheckpointError: a file is missing or damaged, or the adapter belongs to another kind of map.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, dict) or Path(source).is_file() or "weight_name" in kwargs:
            super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)
            return
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        folder = snapshot_folder(source, (*_FILES, SUMS), hub)
        # what was left out of a copy, such as peft/, does not matter here
        check_sums(folder, None, _FIX, only=_FILES)
        extra = self._checked_extra(folder)
        before = set(self._loaded())
        super().load_lora_weights(str(folder), adapter_name=adapter_name, **kwargs)
        if extra:
            (name,) = set(self._loaded()) - before
            self._extra = _Extra(name, extra, {})
        self._follow()

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights that an adapter brought go with it."""
        with self._following():
            super().unload_lora_weights(*args, **kwargs)

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights that an adapter brought are in place while it is active, at full strength."""
        with self._following():
            super().set_adapters(*args, **kwargs)

    def disable_lora(self) -> None:
        """As in diffusers; weights that an adapter brought are taken out."""
        with self._following():
            super().disable_lora()

    def enable_lora(self) -> None:
        """As in diffusers; weights that an adapter brought are put in place again."""
        with self._following():
            super().enable_lora()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; weights that an adapter brought go with it."""
        with self._following():
            super().delete_adapters(adapter_names)

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights that an active adapter brought stay for good."""
        super().fuse_lora(*args, **kwargs)
        if self._extra is not None and self._extra.base:
            self._extra = None

    @contextmanager
    def _following(self) -> Iterator[None]:
        yield
        self._follow()

    def _follow(self) -> None:
        """Puts the weights of an adapter in place when it is active, and the base's when it is not."""
        if self._extra is None:
            return
        layers = adapter.tuner_layers(self.transformer)
        active = any(self._extra.name in layer.active_adapters and not layer.disable_adapters for layer in layers)
        self._extra.place(self.transformer, active)
        if self._extra.name not in self._loaded():
            self._extra = None

    def _loaded(self) -> Mapping[str, object]:
        return getattr(self.transformer, "peft_config", None) or {}

    def _checked_extra(self, folder: Path) -> dict[str, Tensor]:
        """The weights beside a LoRA of fmg; empty for one that has none or is of another tool."""
        if saved_weights.is_full(folder):
            raise UsageError(
                f"{folder} holds a whole transformer, which is no LoRA",
                "Load it with FlowMapFluxTransformer2DModel.from_pretrained(FOLDER, subfolder='transformer'), and set"
                " pipe.transformer to it.",
            )
        ours = (folder / saved_weights.ADAPTER_MANIFEST, folder / saved_weights.EXTRA_FILE)
        if not any(file.is_file() for file in ours):
            return {}
        manifest = saved_weights.read_adapter_manifest(folder)
        for key in ("map", "path", "time_scale", "second_time"):
            own, theirs = getattr(self._conventions, key), getattr(manifest.map, key)
            if own != theirs:
                raise CheckpointError(
                    f"The adapter in {folder} was trained on a model whose {key} is {theirs!r}, and here it is {own!r}",
                    f"Load it into the model it was trained on, '{manifest.base.name}'.",
                )
        stored = {adapter.base_name(name): tuple(x.shape) for name, x in self.transformer.named_parameters()}
        extra = saved_weights.extra_shapes(folder, manifest, stored)
        try:
            lora = adapter.adapter_shapes(self.transformer, manifest.targets, manifest.rank)
        except UsageError as error:
            raise CheckpointError(
                f"The adapter in {folder} does not fit the model: {error.what}",
                "Load it into the model it was trained on.",
            ) from None
        tensors = saved_weights.read_adapter_tensors(folder, lora | extra)
        if extra and self._extra is not None:
            raise UsageError(
                f"The adapter '{self._extra.name}' and {folder} both bring weights of their own",
                "Unload the first one: pipe.unload_lora_weights().",
            )
        return {name: tensors[name] for name in extra}
