"""A loaded flow map with an adapter: the view that the rest of the project has of a model of any family.

What a call of `policies.current.jump(x_t, t, s, cond)` passes through, from the outside in:

    PaddedBatches   fmg/flow/maps.py           repeats the last row of a short batch, so that kernels see one shape
    TwoTimeMap      fmg/flow/maps.py           x - (t - s) u; or SingleTimeMap, VelocityMap, TrigFlowMap
    FluxNetwork     flux/model.py              packs latents into tokens, keeps times in fp32; one for each family
      PolicyScopes  common/policy_weights.py   around the call: trained, snapshot or base weights, autocast, dropout
    transformer     flux/transformer.py        the diffusers module itself, or DDP or an exported graph in its place
      LoRA          common/adapter.py          inside it: PEFT's layers around the adapted linear modules

`policies.old` and `policies.reference` are the same stack in another scope: no second network is held in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal, Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError, reason
from fmg.core.protocols import FlowMap
from fmg.core.specs import DECODE_PIXELS, MapSpec
from fmg.core.types import Conditioning
from fmg.flow.maps import PaddedBatches
from fmg.models.common import adapter, roundtrip_check, saved_weights
from fmg.models.common.checkpoint_files import COMPONENT, is_full
from fmg.models.common.network import LatentNetwork, Network, map_of
from fmg.models.common.pipeline_parts import Components, Text, square_latent
from fmg.models.common.policy_weights import PolicyScopes, Scope, TrainableBase
from fmg.models.common.sharding import gathered, shard_frozen
from fmg.models.common.size import TOKEN
from fmg.models.common.text import TextEncoders, cached_encoders
from fmg.models.common.weights import live_digest
from fmg.models.published import DiffusersConfig, PublishedConfig


@dataclass(frozen=True)
class AdapterPolicies:
    """Three views of the same weights."""

    current: FlowMap
    old: FlowMap
    reference: FlowMap


def unscaled(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
    """Latents as an autoencoder with a scale, and perhaps a shift, decodes them."""
    shift = vae.config.get("shift_factor") or 0.0
    scaled: Tensor = latents / vae.config.scaling_factor + shift
    return scaled


def decode_latents(vae: Any, latents: Float[Tensor, "b c h w"], rows: int) -> Float[Tensor, "b 3 height width"]:
    """Images in [0, 1], fp32, of latents that a diffusers autoencoder takes unchanged, `rows` at a time."""
    latents = latents.to(vae.dtype)
    images = torch.cat([vae.decode(chunk, return_dict=False)[0].float() for chunk in torch.split(latents, rows)])
    return ((images + 1) / 2).clamp(0, 1)


class AdaptedModel(ABC, Generic[Text]):
    """Flow map, text encoders, decoder, and the trained parts of them. Implements `fmg.core.protocols.Model`.

    A family states how its folder is read, its network and the shape of its latents; everything about training and
    saving is here.
    Latents are images (c, h, w), so that a latent's noise belongs to a position in the image. Only a LoRA and unfrozen
    weights ever get gradients.

    Args:
        components: a loaded folder.
        name: registered name of the model, written into saved adapters.
        text: encoder of prompts; None takes the folder's own, beside the transformer.
    """

    pipeline: ClassVar[Any]
    """The diffusers class that runs the family, whose `load_lora_weights` must read what is saved."""
    alpha_tensors: ClassVar[bool] = False
    """Whether that method reads alpha from tensors, as ComfyUI does, or from the file's metadata."""
    second_embedder: ClassVar[str | None] = None
    """Path of the second-time embedder in the transformer, in families that have one."""
    unused: ClassVar[tuple[str, ...]] = ()
    """Modules of the transformer that no sample passes through: nothing of them is trained."""
    network_class: ClassVar[type[LatentNetwork]]
    """The transformer as a function of latents, times and conditioning."""
    text_folders: ClassVar[tuple[str, ...]]
    """Folders of the text encoders and tokenizers, whose files determine a cached embedding."""

    def __init__(self, components: Components[Text], name: str, *, text: TextEncoders | None = None) -> None:
        self._components = components
        self._name = name
        self._spec = components.conventions.spec(name)
        self._latent_shape = self.latent_shape_of(components)
        transformer = components.transformer
        self._latent_network = self.network_class(transformer, transformer.dtype, self.guidance_of(components))
        self._dtype: torch.dtype = transformer.dtype
        self._trainable_base: TrainableBase | None = None
        self._keep_old = True
        self._rows: int | None = None
        self._text = text or TextEncoders(
            components.text, components.conventions.max_sequence_length, transformer.device
        )
        self._after_change()

    @classmethod
    def from_config(cls, config: PublishedConfig, device: torch.device, dtype: torch.dtype) -> Self:
        """The model that `config` describes, from files on this computer; errors as `PublishedConfig.load`."""
        at_model = config.text_device == "model"
        components = cls.read(config, device, dtype, device if at_model else torch.device("cpu"))
        if config.gradient_checkpointing:
            components.transformer.enable_gradient_checkpointing()
        if isinstance(config, DiffusersConfig):
            _set_attention(components.transformer, config.attention)
            _set_decoding(components.vae, config)
        conventions = components.conventions
        text = cached_encoders(
            components.text,
            components.folder,
            cls.text_folders,
            conventions.max_sequence_length,
            device,
            place=config.text_device,
            cache=config.text_cache,
            facts=cls.text_facts(components),
        )
        return cls(components, config.registered_name, text=text)

    @classmethod
    @abstractmethod
    def read(cls, config: Any, device: torch.device, dtype: torch.dtype, text_device: torch.device) -> Components[Text]:
        """The parts that the family's `config` describes, from files on this computer.

        Raises:
            CheckpointError: a file is missing, damaged, of an unknown class, or does not fit the others.
        """

    @staticmethod
    def latent_shape_of(components: Components[Text]) -> tuple[int, int, int]:
        """(c, h, w) of one latent: of an `AutoencoderKL`, in tokens of 2 x 2, unless the family differs.

        Raises:
            CheckpointError: the resolution is not a whole number of tokens.
        """
        vae = components.vae.config
        return square_latent(components, vae.latent_channels, 2 ** (len(vae.block_out_channels) - 1), TOKEN)

    @staticmethod
    def guidance_of(components: Components[Text]) -> float | None:
        """The guidance scale as the transformer takes it; None for weights that embed none."""
        return components.conventions.embedded_guidance(components.transformer.config)

    @staticmethod
    def text_facts(components: Components[Text]) -> tuple[str, ...]:
        """The settings that determine an embedding besides the files of `text_folders`, for the cache."""
        return getattr(components.text, "facts", ())

    def _map(self, scope: Scope, network: Network | None = None) -> FlowMap:
        return map_of(self._latent_network.within(scope, network), self._components.conventions)

    def _with_transformer(self, transformer: Any) -> Self:
        return type(self)(replace(self._components, transformer=transformer), self._name)

    @property
    def spec(self) -> MapSpec:
        """What kind of map it is and its sampling conventions."""
        return self._spec

    @property
    def components(self) -> Components[Text]:
        """The modules themselves, for export and for tools from the diffusers ecosystem."""
        return self._components

    @property
    def flow_map(self) -> FlowMap:
        """The map with the adapter as it is set now."""
        return self._policies.current

    @property
    def network(self) -> nn.Module:
        """The transformer, with the adapter that is attached."""
        transformer: nn.Module = self._components.transformer
        return transformer

    def flow_map_through(self, network: Network) -> FlowMap:
        """The map with the adapter as it is set now, whose calls go to `network` in place of the transformer."""
        return self._map(self._scopes.current, network)

    @property
    def policies(self) -> AdapterPolicies:
        """Current, old (the last `snapshot`) and reference (adapter off); only the first ever has gradients."""
        return self._policies

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return self._latent_shape

    @property
    def device(self) -> torch.device:
        device: torch.device = self._components.transformer.device
        return device

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Prompt embeddings with the tensors of the family's text encoders, one row per prompt."""
        return self._text.encode(prompts)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """A warning about prompts that the model truncates; empty for none."""
        return self._text.cut_prompts(prompts)

    def text_uncached(self) -> AbstractContextManager[None]:
        """Runs the body with the prompt cache off, so that encoding can be timed."""
        return self._text.uncached()

    def release_text(self) -> None:
        """Frees the device memory of the text encoders."""
        self._text.release()

    def decode(self, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 height width"]:
        """Images in [0, 1], fp32: what the autoencoder decodes, mapped from [-1, 1] and clamped."""
        vae, rows = self._components.vae, max(1, DECODE_PIXELS // self._spec.resolution**2)
        return decode_latents(vae, self.vae_latents(vae, latents), rows)

    @staticmethod
    def vae_latents(vae: Any, latents: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k y x"]:
        """Latents as the autoencoder decodes them: `z / scaling_factor + shift_factor`, unless the family differs."""
        return unscaled(vae, latents)

    def attach_adapter(self, rank: int, alpha: float, targets: Sequence[str], dropout: float, seed: int) -> int:
        """Adds a trainable LoRA in fp32 (A gaussian from `seed`, B zero); returns the number of adapted modules.

        Args:
            rank: rank of the LoRA.
            alpha: its scale, divided by the rank.
            targets: presets of `fmg.core.specs` or ends of names of linear modules.
            dropout: probability of dropping an input of A, active in calls that record gradients.
            seed: seed of the initial values; the global generator is not touched.

        Raises:
            UsageError: a value is out of range, a target matches nothing, or there is already an adapter.
        """
        adapted = adapter.attach(self._components.transformer, rank, alpha, targets, dropout, seed, self.unused)
        self._after_change()
        return len(adapted)

    def unfreeze(self, what: Literal["duration", "full"], *, old: bool = True, reference: bool = True) -> int:
        """Trains weights of the base, in fp32; returns the number of tensors.

        A network that was loaded in bf16 and is unfrozen as a whole computes under bf16 autocast, so that its updates
        are not rounded away.

        Args:
            what: `duration`: the second-time embedder, beside a LoRA; `full`: every weight, without a LoRA.
            old: whether `snapshot` keeps a copy for `policies.old`; only used with `full`.
            reference: whether a copy of the base is kept for `policies.reference`; only used with `full`.

        Raises:
            UsageError: weights are already unfrozen, the map has no second time, or there is already an adapter.
        """
        transformer = self._components.transformer
        if self._trainable_base is not None:
            raise UsageError("The model's weights are already unfrozen", "Load the model again.")
        whole = what == "full"
        used = {n: p for n, p in transformer.named_parameters() if not adapter.is_under(n, self.unused)}
        chosen = used if whole else self._second_time_parameters()
        if any(adapter.is_adapter(name) or adapter.base_name(name) != name for name in chosen):
            raise UsageError(
                "The LoRA would adapt weights that are trained directly",
                "Unfreeze them before attaching the adapter, or adapt other modules.",
            )
        self._trainable_base = TrainableBase(chosen, keep_base=reference or not whole, whole=whole)
        self._keep_old = old or not whole
        self._after_change()
        return len(chosen)

    def fix_rows(self, rows: int | None) -> None:
        """Pads calls with fewer rows to `rows`, so that kernels see one shape; None stops padding."""
        self._rows = rows

    def trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the adapter, then the unfrozen ones, by the names they have in saved files."""
        yield from adapter.adapter_parameters(self._components.transformer).items()
        if self._trainable_base is not None:
            yield from self._trainable_base.parameters.items()

    def snapshot(self) -> None:
        """Freezes a copy of the trainable weights as `policies.old`, unless `unfreeze` was told that none is needed."""
        self._scopes.snapshot()

    @contextmanager
    def adapter_enabled(self, enabled: bool) -> Iterator[None]:
        """Runs the body with the trained weights of `flow_map`, or with the base."""
        with self._scopes.adapter(enabled=enabled):
            yield

    def base_digest(self) -> str:
        """Sha256 over the transformer's base weights in memory; training must not change it.

        After `shard` every process has to call it.

        Raises:
            CompositionError: every weight is trained and no copy of the base was kept.
        """
        base = {} if self._trainable_base is None else self._trainable_base.base_tensors()
        with self.gathered():
            return live_digest(self._components.transformer, base)

    def shard(self) -> None:
        """Keeps only this process's part of the frozen weights in memory (FSDP2); trained weights stay whole.

        Raises:
            CompositionError: nothing is frozen.
        """
        shard_frozen(self._components.transformer)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Runs the body with all weights in this process, as `save_adapter` needs them; all processes enter."""
        with gathered(self._components.transformer):
            yield

    def save_adapter(self, folder: Path) -> None:
        """Writes what is trained to a new folder, all or nothing.

        A LoRA is written as `pytorch_lora_weights.safetensors`, the PEFT folder `peft/` and `fmg_adapter.json`, with
        an embedder that was trained beside it as `fmg_extra.safetensors`; a network that was unfrozen as a whole as the
        component folder `transformer/`, in the dtype that the base was loaded in, and `fmg_transformer.json`.

        The files are verified first: stock diffusers loads them and must generate the same image.

        Raises:
            UsageError: there is nothing to save, or the folder exists.
            CheckpointError: the files do not reproduce the model; they are not kept.
        """
        parts, unfrozen = self._components, self._trainable_base
        if unfrozen is not None and unfrozen.whole:
            saved_weights.save_transformer(
                folder, parts.transformer, self._base, parts.conventions, self._dtype, self._verify_transformer
            )
            return
        extra = {} if unfrozen is None else unfrozen.parameters
        saved_weights.save_adapter(
            folder,
            parts.transformer,
            self.pipeline,
            self._base,
            parts.conventions,
            self._verify_adapter,
            extra,
            alpha_tensors=self.alpha_tensors,
        )

    def load_adapter(self, folder: Path) -> None:
        """Loads what `save_adapter` wrote; attaches and unfreezes what was saved if nothing is trained yet.

        Nothing changes when it fails.

        Raises:
            CheckpointError: a file is missing or damaged, it was trained on other weights, its tensors do not fit, or
                another adapter is attached.
        """
        if is_full(folder):
            self._load_component(folder)
            return
        manifest, tensors = self.read_adapter(folder)
        if self._scopes.layers:
            self._check_geometry(folder, manifest)
        else:
            self.attach_adapter(manifest.rank, manifest.alpha, manifest.targets, manifest.dropout, seed=0)
        if manifest.extra and self._trainable_base is None:
            self.unfreeze("duration")
        with torch.no_grad():
            for name, parameter in self.trainable():
                parameter.copy_(tensors[name])
        self.snapshot()

    def read_adapter(self, folder: Path) -> tuple[saved_weights.AdapterManifest, dict[str, Tensor]]:
        """The manifest and the tensors of a saved LoRA, by their names in files, after checking that they fit.

        Raises:
            CheckpointError: a file is missing or damaged, it was trained on other weights, or its tensors do not fit.
        """
        manifest = saved_weights.read_adapter_manifest(folder)
        self._check_base(folder, manifest.base)
        base = self._second_time_shapes()
        return manifest, saved_weights.read_adapter_on(self.network, folder, manifest, base, self.unused)

    def _load_component(self, folder: Path) -> None:
        self._check_base(folder, saved_weights.read_transformer_manifest(folder).base)
        unfrozen = self._trainable_base
        if self._scopes.layers or (unfrozen is not None and not unfrozen.whole):
            raise CheckpointError(
                f"{folder} contains a whole transformer, but this model has an adapter",
                "Load it into a model without one.",
            )
        saved_weights.load_transformer_weights(self._components.transformer, folder)
        self._scopes.base_lost = unfrozen is None
        self.snapshot()

    def _verify_adapter(self, folder: Path) -> None:
        transformer = self._components.transformer
        base = {} if self._trainable_base is None else self._trainable_base.base_tensors()
        fresh = roundtrip_check.reloaded(transformer, folder, self.pipeline, base)
        saved, read = adapter.adapter_parameters(transformer), adapter.adapter_parameters(fresh)
        roundtrip_check.check_tensors(saved, read, folder)
        if self._trainable_base is not None:
            # no loader of diffusers knows these weights: they are read as `load_adapter` reads them
            manifest, shapes = saved_weights.read_adapter_manifest(folder), self._trainable_base.shapes
            tensors = saved_weights.read_adapter_on(transformer, folder, manifest, shapes, self.unused)
            extra = {name: tensors[name] for name in manifest.extra}
            roundtrip_check.check_tensors(self._trainable_base.parameters, extra, folder)
            placed = {name: x.to(transformer.device) for name, x in extra.items()}
            fresh.load_state_dict(placed, strict=False, assign=True)
        self._verify_image(fresh, folder)

    def _verify_transformer(self, folder: Path) -> None:
        transformer = self._components.transformer
        stock = roundtrip_check.component(transformer, folder / COMPONENT, self._dtype)
        roundtrip_check.check_tensors(transformer.state_dict(), stock.state_dict(), folder)
        self._verify_image(stock, folder)

    def _verify_image(self, stock: Any, folder: Path) -> None:
        cond = self.encode([roundtrip_check.PROMPT])
        images = self._image(cond), self._with_transformer(stock)._image(cond)
        roundtrip_check.check_same(*images, self._dtype, folder)

    @torch.no_grad()
    def _image(self, cond: Conditioning) -> Float[Tensor, "1 3 height width"]:
        noise = roundtrip_check.image_noise(self.latent_shape, self.device)
        start, end = torch.ones(1, device=self.device), torch.zeros(1, device=self.device)
        return self.decode(self.flow_map.jump(noise, start, end, cond))

    @cached_property
    def _base(self) -> saved_weights.BaseReference:
        # hashed on first use: an 8 B model takes seconds, and generating never needs it
        return saved_weights.BaseReference.of(self._name, self._components.weights)

    def _check_base(self, folder: Path, base: saved_weights.BaseReference) -> None:
        if base.digest != self._base.digest:
            raise CheckpointError(
                f"The adapter in {folder} was trained on different weights of '{base.name}' than those of"
                f" '{self._name}' here",
                f"Load it into the model it was trained on (sha256 {base.digest[:12]}).",
            )

    def _second_time_parameters(self) -> dict[str, nn.Parameter]:
        name = self.second_embedder
        if name is None or not self._components.conventions.second_time:
            raise UsageError(f"'{self._name}' has no second-time embedder", "Train only a LoRA, or use a two-time map.")
        embedder = self._components.transformer.get_submodule(name)
        return {f"{name}.{rest}": parameter for rest, parameter in embedder.named_parameters()}

    def _second_time_shapes(self) -> dict[str, tuple[int, ...]]:
        if self.second_embedder is None or not self._components.conventions.second_time:
            return {}
        return {name: tuple(parameter.shape) for name, parameter in self._second_time_parameters().items()}

    def _check_geometry(self, folder: Path, manifest: saved_weights.AdapterManifest) -> None:
        config = self._components.transformer.peft_config[adapter.ADAPTER]
        attached = (config.r, float(config.lora_alpha), set(config.target_modules))
        saved = (manifest.rank, manifest.alpha, set(manifest.targets))
        trained = set() if self._trainable_base is None else set(self._trainable_base.parameters)
        if trained and trained != set(manifest.extra):
            raise CheckpointError(
                f"The adapter in {folder} lacks the second-time embedder, which this model trains",
                "Load it into a model that trains a LoRA alone.",
            )
        if attached != saved:
            raise CheckpointError(
                f"The adapter in {folder} has rank {saved[0]}, alpha {saved[1]:g} on {', '.join(sorted(saved[2]))}, but"
                f" the attached one has rank {attached[0]}, alpha {attached[1]:g} on {', '.join(sorted(attached[2]))}",
                "Attach an adapter with the saved values, or load into a model without one.",
            )

    def _after_change(self) -> None:
        trained = [parameter for _, parameter in self.trainable()]
        self._scopes = PolicyScopes(
            self._components.transformer, trained, self._trainable_base, self._dtype, keep_old=self._keep_old
        )
        self._policies = AdapterPolicies(
            current=self._view(self._scopes.current),
            old=self._view(self._scopes.old),
            reference=self._view(self._scopes.reference),
        )

    def _view(self, scope: Scope) -> FlowMap:
        return PaddedBatches(self._map(scope), lambda _: self._rows)


def _set_decoding(vae: Any, config: DiffusersConfig) -> None:
    if config.vae_slicing:
        vae.enable_slicing()
    if config.vae_tile is not None:
        vae.enable_tiling()
        # the class takes the size of its tiles from its training images, which are as large as those that it decodes
        vae.tile_sample_min_size = config.vae_tile
        vae.tile_latent_min_size = config.vae_tile // 2 ** (len(vae.config.block_out_channels) - 1)


def _set_attention(transformer: Any, backend: str) -> None:
    if backend == "native":
        return
    try:
        transformer.set_attention_backend(backend)
    except (RuntimeError, ImportError, ValueError) as error:
        raise MissingDependencyError(
            f"The attention backend '{backend}' cannot be used: {reason(error)}",
            "Install what it needs, or set model.attention to native.",
        ) from error
