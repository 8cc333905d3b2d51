"""A loaded FLUX-class flow map: what the rest of the project sees of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.protocols import FlowMap
from fmg.core.specs import MapSpec
from fmg.core.types import Conditioning
from fmg.flow import SingleTimeMap, TwoTimeMap, path_by_name
from fmg.models.flux import adapter, adapter_files, prove
from fmg.models.flux.adapter import WeightSnapshot
from fmg.models.flux.digest import live_digest, stored_digest
from fmg.models.flux.latents import PATCH
from fmg.models.flux.loading import FluxComponents, load_folder
from fmg.models.flux.network import FluxNetwork
from fmg.models.flux.text import TextEncoders

DECODE_PIXELS = 2**18
"""Image pixels that one decoder call may make: one FLUX image of 512 px, or as many small ones as a CPU cache likes."""


@dataclass(frozen=True)
class FluxPolicies:
    """Three views of the same weights."""

    current: FlowMap
    old: FlowMap
    reference: FlowMap


class FluxModel:
    """Flow map, text encoders, decoder and one LoRA adapter. Implements `fmg.core.protocols.Model`.

    Latents are unpacked images (c, h, w); packing into tokens happens inside, so that a latent's noise belongs to
    a place in the picture. The base weights never get a gradient.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    def __init__(self, components: FluxComponents, name: str, *, text: TextEncoders | None = None) -> None:
        self._components = components
        self._name = name
        self._spec = components.conventions.spec(name)
        self._latent_shape = _latent_shape(components)
        transformer = components.transformer
        self._text = text or TextEncoders(
            components.text, components.conventions.max_sequence_length, transformer.device
        )
        self._network = FluxNetwork(transformer, transformer.dtype, components.conventions.guidance)
        self._after_adapter_change()

    @classmethod
    def from_folder(cls, folder: Path, device: torch.device, dtype: torch.dtype, name: str) -> FluxModel:
        """Loads a diffusers folder with its `fmg_flow_map.json`.

        Raises:
            CheckpointError: a file of the folder is missing, damaged or of another kind.
        """
        return cls(load_folder(folder, device, dtype), name)

    @property
    def spec(self) -> MapSpec:
        """What kind of map it is and its sampling conventions."""
        return self._spec

    @property
    def components(self) -> FluxComponents:
        """The modules themselves, for export and for tools of the diffusers ecosystem."""
        return self._components

    @property
    def flow_map(self) -> FlowMap:
        """The map with the adapter as it is set now."""
        return self._policies.current

    @property
    def policies(self) -> FluxPolicies:
        """Current, old (the last `snapshot`) and reference (adapter off); only the first ever has gradients."""
        return self._policies

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(c, h, w) of one latent."""
        return self._latent_shape

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        device: torch.device = self._components.transformer.device
        return device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """`tokens` (b, l, d) of T5 and `pooled` (b, p) of CLIP, as `FluxPipeline.encode_prompt` makes them."""
        return self._text.encode(prompts)

    def text_uncached(self) -> AbstractContextManager[None]:
        """Inside, every prompt is encoded, so that its time can be measured."""
        return self._text.uncached()

    def release_text(self) -> None:
        """Frees the memory that the text encoders take of the device."""
        self._text.release()

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], fp32: `vae.decode(z / scaling_factor + shift_factor)` mapped from [-1, 1] and clamped."""
        vae, rows = self._components.vae, max(1, DECODE_PIXELS // self._spec.resolution**2)
        scaled = (latents / vae.config.scaling_factor + vae.config.shift_factor).to(vae.dtype)
        images = torch.cat([vae.decode(chunk, return_dict=False)[0].float() for chunk in scaled.split(rows)])
        return ((images + 1) / 2).clamp(0, 1)

    def attach_adapter(self, rank: int, alpha: float, targets: Sequence[str], dropout: float, seed: int) -> int:
        """Adds a trainable LoRA in fp32 (A gaussian from `seed`, B zero); returns the number of adapted modules.

        Args:
            rank: rank of the LoRA.
            alpha: its scale, divided by the rank.
            targets: presets of `fmg.models.lora_presets` or ends of names of linear modules.
            dropout: probability of dropping an input of A, active in calls that record gradients.
            seed: of the initial values; the global generator is not touched.

        Raises:
            UsageError: a value is out of range, a target matches nothing, or there is an adapter already.
        """
        adapted = adapter.attach(self._components.transformer, rank, alpha, targets, dropout, seed)
        self._after_adapter_change()
        return len(adapted)

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the adapter, by the names they have in saved files."""
        return iter(adapter.adapter_parameters(self._components.transformer).items())

    def snapshot(self) -> None:
        """Freezes a copy of the trainable weights as `policies.old`."""
        self._old = WeightSnapshot([parameter for _, parameter in self.trainable()])

    @contextmanager
    def adapter_enabled(self, enabled: bool) -> Iterator[None]:
        """Runs the body with the adapter of `flow_map` on or off."""
        with adapter.adapter_switched(self._layers, enabled):
            yield

    def base_digest(self) -> str:
        """Sha256 over the transformer's base weights in memory; training an adapter must not change it."""
        return live_digest(self._components.transformer)

    def save_adapter(self, folder: Path) -> None:
        """Writes `pytorch_lora_weights.safetensors`, the PEFT folder `peft/` and `fmg_adapter.json`, all or nothing.

        What is written is proven first: stock diffusers reads it back and draws the same picture.

        Raises:
            UsageError: there is no adapter, or the folder exists.
            CheckpointError: the files do not give the model back; they are not kept.
        """
        parts = self._components
        adapter_files.save(folder, parts.transformer, self._base, parts.conventions, self._prove)

    def load_adapter(self, folder: Path) -> None:
        """Reads what `save_adapter` wrote, into the adapter that is attached or a new one of the saved geometry.

        Nothing changes when it fails.

        Raises:
            CheckpointError: a file is missing or damaged, the adapter was trained on other weights, its tensors do not
                fit, or another adapter is attached.
        """
        manifest = adapter_files.read_manifest(folder)
        self._check_base(folder, manifest)
        tensors = adapter_files.read_tensors(folder, self._shapes(folder, manifest))
        if self._layers:
            self._check_geometry(folder, manifest)
        else:
            self.attach_adapter(manifest.rank, manifest.alpha, manifest.targets, manifest.dropout, seed=0)
        with torch.no_grad():
            for name, parameter in self.trainable():
                parameter.copy_(tensors[name])
        self.snapshot()

    def _prove(self, folder: Path) -> None:
        transformer = self._components.transformer
        fresh = prove.reloaded(transformer, folder)
        prove.check_adapter(transformer, fresh, folder)
        stock = FluxModel(replace(self._components, transformer=fresh), self._name)
        cond = self.encode([prove.PROMPT])
        prove.check_same(self._picture(cond), stock._picture(cond), transformer.dtype, folder)

    @torch.no_grad()
    def _picture(self, cond: Conditioning) -> Float[Tensor, "1 3 height width"]:
        noise = prove.picture_noise(self.latent_shape, self.device)
        start, end = torch.ones(1, device=self.device), torch.zeros(1, device=self.device)
        return self.decode(self.flow_map.jump(noise, start, end, cond))

    @cached_property
    def _base(self) -> adapter_files.BaseReference:
        # hashed when first asked for: an 8 B model takes seconds, and generating never needs it
        digest = stored_digest(self._components.weights)
        return adapter_files.BaseReference(name=self._name, digest=digest)

    def _check_base(self, folder: Path, manifest: adapter_files.AdapterManifest) -> None:
        if manifest.base.digest != self._base.digest:
            raise CheckpointError(
                f"The adapter in {folder} was trained on other weights of '{manifest.base.name}' than those of"
                f" '{self._name}' here",
                f"Load it into the model it was trained on (sha256 {manifest.base.digest[:12]}).",
            )

    def _shapes(self, folder: Path, manifest: adapter_files.AdapterManifest) -> dict[str, tuple[int, ...]]:
        try:
            return adapter.adapter_shapes(self._components.transformer, manifest.targets, manifest.rank)
        except UsageError as error:
            raise CheckpointError(
                f"The adapter in {folder} does not fit the model: {error.what}",
                "Load it into the model it was trained on.",
            ) from None

    def _check_geometry(self, folder: Path, manifest: adapter_files.AdapterManifest) -> None:
        config = self._components.transformer.peft_config[adapter.ADAPTER]
        attached = (config.r, float(config.lora_alpha), set(config.target_modules))
        saved = (manifest.rank, manifest.alpha, set(manifest.targets))
        if attached != saved:
            raise CheckpointError(
                f"The adapter in {folder} has rank {saved[0]}, alpha {saved[1]:g} on {', '.join(sorted(saved[2]))}, and"
                f" the attached one has rank {attached[0]}, alpha {attached[1]:g} on {', '.join(sorted(attached[2]))}",
                "Attach an adapter with the saved values, or load into a model without one.",
            )

    def _after_adapter_change(self) -> None:
        transformer = self._components.transformer
        self._layers = adapter.tuner_layers(transformer)
        self._dropouts = adapter.dropout_modules(transformer)
        self._policies = FluxPolicies(
            current=self._view(self._current_scope),
            old=self._view(self._old_scope),
            reference=self._view(self._reference_scope),
        )
        self.snapshot()

    def _view(self, scope: Callable[[], AbstractContextManager[None]]) -> FlowMap:
        network, path = self._network.within(scope), path_by_name(self._spec.path)
        if self._components.conventions.map == "two-time":
            return TwoTimeMap(network.two_time, path)
        return SingleTimeMap(network.single_time, path)

    def _current_scope(self) -> AbstractContextManager[None]:
        return nullcontext() if torch.is_grad_enabled() else adapter.dropout_off(self._dropouts)

    @contextmanager
    def _old_scope(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            stack.enter_context(adapter.dropout_off(self._dropouts))
            stack.enter_context(adapter.adapter_switched(self._layers, enabled=True))
            stack.enter_context(self._old.in_place())
            yield

    @contextmanager
    def _reference_scope(self) -> Iterator[None]:
        with torch.no_grad(), adapter.adapter_switched(self._layers, enabled=False):
            yield


def _latent_shape(components: FluxComponents) -> tuple[int, int, int]:
    # the rule by which FluxPipeline finds the latent size
    scale = 2 ** (len(components.vae.config.block_out_channels) - 1)
    resolution = components.conventions.resolution
    if resolution % (scale * PATCH):
        raise CheckpointError(
            f"The resolution {resolution} is not a multiple of {scale * PATCH}, the side of a token in pixels",
            "Use a resolution that is.",
        )
    return components.vae.config.latent_channels, resolution // scale, resolution // scale
