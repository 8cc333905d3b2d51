"""`FlowMapPipeline`: a FLUX-class flow map as a pipeline of diffusers, with the LoRA methods of `FluxPipeline`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FluxLoraLoaderMixin
from diffusers.pipelines.flux.pipeline_output import FluxPipelineOutput
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError, suggestion
from fmg.core.files import SUMS, check_sums
from fmg.core.hub import HUB_OPTIONS, snapshot_folder
from fmg.core.specs import DECODE_PIXELS
from fmg.core.types import Conditioning
from fmg.flow.grids import GridSpec, make_grid
from fmg.flow.sampling import native_step
from fmg.inference.generator import seeded_noise, whole_seeds
from fmg.inference.target import Target, load_model
from fmg.inference.torch_backend import DTYPES
from fmg.models.common import adapter, checkpoint_files, saved_weights
from fmg.models.common.model import decode_latents, unscaled
from fmg.models.common.network import map_of
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions, as_conventions, read_conventions
from fmg.models.flux.configs import PIPELINE_FILES
from fmg.models.flux.latents import PATCH, unpack
from fmg.models.flux.loading import FluxComponents, FluxText, load_parts
from fmg.models.flux.model import FluxModel, FluxNetwork
from fmg.models.flux.pipeline_files import INDEX_FILE, check_index, check_transformer, write_pipeline_files
from fmg.recipe import Recipe

logger = logging.get_logger(__name__)

Callback = Callable[[Any, int, Tensor, dict[str, Tensor]], Mapping[str, Tensor]]
OUTPUTS = ("pil", "np", "pt", "latent")
"""Values of `output_type`."""
_TIMESTEPS = 1000
_FILES = (checkpoint_files.DIFFUSERS_FILE, checkpoint_files.EXTRA_FILE, checkpoint_files.ADAPTER_MANIFEST)
_FIX = "Restore it from a copy, or train again."


class _Extra:
    """Weights that were trained beside a LoRA, and the base's own while they are replaced."""

    def __init__(self, name: str, tensors: Mapping[str, Tensor], base: dict[str, Tensor]) -> None:
        self.name = name
        self.base = base
        self._tensors = tensors

    def place(self, transformer: Any, active: bool) -> None:
        """Copies the adapter's or the base's weights into the transformer."""
        if active == bool(self.base):
            return
        parameters = adapter.base_parameters(transformer)
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
        """Loads a LoRA: a checkpoint of fmg, or anything that `FluxPipeline.load_lora_weights` takes.

        A checkpoint of fmg is checked against the map, and weights that were trained beside the LoRA
        (`fmg_extra.safetensors`) replace those of the transformer while the adapter is active.

        Raises:
            UsageError: the checkpoint is a full transformer, or two adapters have such weights.
            CheckpointError: a file is missing or damaged, or the adapter belongs to another kind of map.
        """
        source = pretrained_model_name_or_path_or_dict
        if isinstance(source, dict) or Path(source).is_file() or "weight_name" in kwargs:
            super().load_lora_weights(source, adapter_name=adapter_name, **kwargs)
            return
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        folder = snapshot_folder(source, (*_FILES, SUMS), hub)
        # files that a copy lacks, such as peft/, are not needed here
        check_sums(folder, None, _FIX, only=_FILES)
        extra = self._checked_extra(folder)
        before = set(self._loaded())
        super().load_lora_weights(str(folder), adapter_name=adapter_name, **kwargs)
        if extra:
            (name,) = set(self._loaded()) - before
            self._extra = _Extra(name, extra, {})
        self._follow()

    def unload_lora_weights(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights trained beside an adapter are removed with it."""
        super().unload_lora_weights(*args, **kwargs)
        self._follow()

    def set_adapters(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights trained beside an adapter are in place while it is active, at full strength."""
        super().set_adapters(*args, **kwargs)
        self._follow()

    def disable_lora(self) -> None:
        """As in diffusers; weights trained beside an adapter are taken out."""
        super().disable_lora()
        self._follow()

    def enable_lora(self) -> None:
        """As in diffusers; weights trained beside an adapter are put back in place."""
        super().enable_lora()
        self._follow()

    def delete_adapters(self, adapter_names: list[str] | str) -> None:
        """As in diffusers; weights trained beside an adapter are removed with it."""
        super().delete_adapters(adapter_names)
        self._follow()

    def fuse_lora(self, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; weights trained beside an active adapter become permanent."""
        super().fuse_lora(*args, **kwargs)
        if self._extra is not None and self._extra.base:
            self._extra = None

    def _follow(self) -> None:
        """Puts the adapter's weights in place if it is active, and the base's if not."""
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
        """The weights beside a LoRA of fmg; empty if there are none, or for the LoRA of another tool."""
        if checkpoint_files.is_full(folder):
            raise UsageError(
                f"{folder} contains a whole transformer, not a LoRA",
                "Load it with FlowMapFluxTransformer2DModel.from_pretrained(FOLDER, subfolder='transformer'), and set"
                " pipe.transformer to it.",
            )
        ours = (folder / checkpoint_files.ADAPTER_MANIFEST, folder / checkpoint_files.EXTRA_FILE)
        if not any(file.is_file() for file in ours):
            return {}
        manifest = saved_weights.read_adapter_manifest(folder)
        for key in ("map", "path", "time_scale", "second_time"):
            own, theirs = self._conventions.plain()[key], manifest.map.plain()[key]
            if own != theirs:
                raise CheckpointError(
                    f"The adapter in {folder} was trained on a model whose {key} is {theirs!r}, but here it is {own!r}",
                    f"Load it into the model it was trained on, '{manifest.base.name}'.",
                )
        stored = {name: tuple(x.shape) for name, x in adapter.base_parameters(self.transformer).items()}
        tensors = saved_weights.read_adapter_on(self.transformer, folder, manifest, stored)
        if manifest.extra and self._extra is not None:
            raise UsageError(
                f"The adapter '{self._extra.name}' and {folder} both have weights beside their LoRA",
                "Unload the first one: pipe.unload_lora_weights().",
            )
        return {name: tensors[name] for name in manifest.extra}


def sampled_as(conventions: FlowMapConventions, recipe: Recipe) -> FlowMapConventions:
    """Conventions with the default steps and grid of a recipe, as `fmg generate` uses them."""
    grid = recipe.rollout.grid
    stated = grid if isinstance(grid, str) else list(grid)
    return conventions.model_copy(update={"default_steps": recipe.rollout.steps, "default_grid": stated})


class FlowMapPipeline(FlowMapLoraMixin, DiffusionPipeline):  # type: ignore[misc]
    """Generates images with a two-time or single-time flow map of FLUX, as `fmg generate` does.

    The folder states the default steps, time grid and guidance. Latents are images (b, c, h, w), not packed tokens.

    Args:
        vae: the autoencoder.
        text_encoder: CLIP.
        tokenizer: tokenizer of CLIP.
        text_encoder_2: T5.
        tokenizer_2: of T5.
        transformer: the flow map, which takes one or two times.
        conventions: the contents of `fmg_flow_map.json`.

    Raises:
        UsageError: there are no conventions, or the transformer is of the stock class.
        CheckpointError: conventions and transformer contradict each other.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")

    def __init__(
        self,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        text_encoder_2: Any,
        tokenizer_2: Any,
        transformer: Any,
        conventions: Any = None,
    ) -> None:
        super().__init__()
        self._conventions = as_conventions(conventions)
        check_transformer(transformer, self._conventions)
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            transformer=transformer,
        )
        self.register_to_config(conventions=self._conventions.plain())
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor * PATCH)
        self._guidance_scale: float | None = None
        self._num_timesteps = 0
        self._interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        dtype: torch.dtype | None = None,
        torch_dtype: torch.dtype | None = None,
        conventions: FlowMapConventions | Mapping[str, object] | None = None,
        **hub: Any,
    ) -> FlowMapPipeline:
        """Loads a folder, on the CPU. Every weight is checked against the config; no code of the folder is run.

        For options that only diffusers' loader has (`device_map`, `quantization_config`), use
        `DiffusionPipeline.from_pretrained(FOLDER, ...)` with `trust_remote_code`, which returns this class too.

        Args:
            pretrained_model_name_or_path: a pipeline folder, or a hub id `owner/name[@revision]`, which is downloaded.
            dtype: dtype of every weight, whatever dtype is stored; None: fp32.
            torch_dtype: the older name of `dtype`.
            conventions: how the map is sampled, if the folder has no `fmg_flow_map.json`.
            hub: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            UsageError: there is no such folder, or this loader has no such option.
            CheckpointError: a file is missing, damaged, or contradicts another.
        """
        if unknown := [key for key in hub if key not in HUB_OPTIONS]:
            raise UsageError(
                f"FlowMapPipeline.from_pretrained has no option '{unknown[0]}'",
                "For options of diffusers' own loader call DiffusionPipeline.from_pretrained with trust_remote_code,"
                " which returns a FlowMapPipeline too.",
            )
        folder = snapshot_folder(pretrained_model_name_or_path, (*PIPELINE_FILES, CONVENTIONS_FILE, INDEX_FILE), hub)
        if conventions is None:
            stated = read_conventions(folder)
            check_index(folder, stated)
        else:
            stated = as_conventions(conventions)
        parts = load_parts(folder, stated, torch.device("cpu"), dtype or torch_dtype or torch.float32)
        pipeline = cls._of(parts, stated)
        pipeline.register_to_config(_name_or_path=str(pretrained_model_name_or_path))
        return pipeline

    @classmethod
    def from_model(
        cls, name: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: object
    ) -> FlowMapPipeline:
        """Loads a model of fmg by name, such as `meanflow-shapes`, or `meanflow-flux` once it has been fetched.

        Args:
            name: as `fmg list models` shows it.
            dtype: fp32 or bf16.
            device: device of transformer and decoder.
            options: options of the model, as `fmg show model NAME` lists them.

        Raises:
            UsageError: there is no such model or option, or the model is not of the FLUX.1 family.
            MissingDependencyError: its weights have not been fetched.
        """
        recipe = Recipe.default(name, **{f"model.{key}": value for key, value in options.items()})
        named = {value: text for text, value in DTYPES.items()}.get(dtype, str(dtype))
        model = load_model(Target(name, recipe, None), device=device, dtype=named)
        if not isinstance(model, FluxModel):
            raise UsageError(
                f"The model '{name}' is not of the FLUX.1 family",
                f"Load its adapters with {recipe.model.config.in_diffusers or 'the pipeline of its family'}.",
            )
        return cls._of(model.components, sampled_as(model.components.conventions, recipe))

    @classmethod
    def _of(cls, parts: FluxComponents, conventions: FlowMapConventions) -> FlowMapPipeline:
        text = parts.text
        return cls(
            parts.vae,
            text.text_encoder,
            text.tokenizer,
            text.text_encoder_2,
            text.tokenizer_2,
            parts.transformer,
            conventions.plain(),
        )

    @property
    def guidance_scale(self) -> float | None:
        """The embedded guidance scale of the current call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Steps of the last call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has requested to stop, by `pipe._interrupt = True`."""
        return self._interrupt

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        grid: GridSpec | None = None,
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        seeds: int | Sequence[int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        pooled_prompt_embeds: Tensor | None = None,
        max_sequence_length: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Generates images.

        Args:
            prompt: one text or several.
            height: height in pixels; None: as the folder states.
            width: as `height`.
            num_inference_steps: sampling steps (NFE); None: as the folder states.
            grid: a time grid by name, or its times from 1 down to 0; None: as the folder states.
            guidance_scale: for weights that embed one; None: as the folder states.
            num_images_per_prompt: images per prompt, one after the other.
            seeds: noise as in `fmg generate --seed`: a number for each image, or the seed of the first image of each
                prompt, counting up. An image does not depend on the others in the batch.
            generator: noise as in `FluxPipeline`.
            latents: initial noise (b, c, h, w), or packed as `FluxPipeline` takes it.
            prompt_embeds: T5 states (b, length, d), instead of a prompt.
            pooled_prompt_embeds: CLIP state (b, p), with `prompt_embeds`.
            max_sequence_length: tokens of T5; None: as the folder states.
            output_type: `pil`, `np` or `pt`, or `latent` for latents (b, c, h, w).
            return_dict: False for a tuple.
            callback_on_step_end: called as `callback(pipe, step, time, tensors)` after each step, `time` from 1000 to
                0; tensors that it returns replace those of the call.
            callback_on_step_end_tensor_inputs: which tensors it gets: `latents`, `prompt_embeds`.

        Raises:
            UsageError: arguments cannot be used together, or a size, grid or seed is impossible.
        """
        count = self._check(
            prompt, prompt_embeds, pooled_prompt_embeds, seeds, generator, latents, callback_on_step_end_tensor_inputs
        )
        if num_images_per_prompt < 1:
            raise UsageError(
                f"The number of images per prompt is {num_images_per_prompt}",
                "Set num_images_per_prompt to at least 1.",
            )
        if output_type not in OUTPUTS:
            raise UsageError(f"There is no output_type '{output_type}'", suggestion(str(output_type), OUTPUTS))
        height, width = (self._conventions.resolution if side is None else side for side in (height, width))
        shape = self._latent_shape(height, width)
        steps = self._conventions.default_steps if num_inference_steps is None else num_inference_steps
        times = make_grid(
            self._conventions.default_grid if grid is None else grid,
            steps,
            image_tokens=shape[1] // PATCH * (shape[2] // PATCH),
        )
        self._guidance_scale, self._interrupt, self._num_timesteps = self._guidance(guidance_scale), False, steps
        if prompt_embeds is None or pooled_prompt_embeds is None:
            assert prompt is not None
            prompt_embeds, pooled_prompt_embeds = self.encode_prompt(prompt, max_sequence_length=max_sequence_length)
        device = self._execution_device
        tokens, pooled = (
            x.to(device).repeat_interleave(num_images_per_prompt, 0) for x in (prompt_embeds, pooled_prompt_embeds)
        )
        images = count * num_images_per_prompt
        noise = self._noise(seeds, generator, (images, *shape), num_images_per_prompt, tokens.dtype, device)
        if latents is None:
            x = noise(0)
        else:
            # tokens in the layout of `FluxPipeline` are accepted, too
            x = (unpack(latents, *shape[1:]) if latents.ndim == 3 else latents).to(device, torch.float32)
        if x.shape != (images, *shape):
            raise UsageError(
                f"The latents have shape {tuple(x.shape)}, but {images} images need {(images, *shape)}",
                "Give noise of this shape, or leave it out.",
            )
        network = FluxNetwork(self.transformer, self.transformer.dtype, self._guidance_scale)
        flow_map = map_of(network, self._conventions)
        with self.progress_bar(total=steps) as bar:
            for k, (t, s) in enumerate(pairwise(times)):
                if self._interrupt:
                    break
                cond = Conditioning(("",) * images, {"tokens": tokens, "pooled": pooled})
                x = native_step(flow_map, cond, x, t, s, partial(noise, k + 1))
                if callback_on_step_end is not None:
                    given = {"latents": x, "prompt_embeds": tokens}
                    chosen = {name: given[name] for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, k, torch.tensor(_TIMESTEPS * t), chosen) or {}
                    x, tokens = changed.get("latents", x), changed.get("prompt_embeds", tokens)
                bar.update()
        result: Any = x
        if output_type != "latent":
            pixels = decode_latents(self.vae, unscaled(self.vae, x), max(1, DECODE_PIXELS // (height * width)))
            result = self.image_processor.postprocess(pixels, output_type, do_denormalize=[False] * images)
        self.maybe_free_model_hooks()
        return FluxPipelineOutput(images=result) if return_dict else (result,)

    def encode_prompt(
        self, prompt: str | Sequence[str], *, max_sequence_length: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """The states of T5 (b, length, d) and of CLIP (b, p) for `prompt_embeds` and `pooled_prompt_embeds`.

        Prompts longer than `max_sequence_length` tokens are truncated, with a warning.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        length = self._conventions.max_sequence_length if max_sequence_length is None else max_sequence_length
        text = FluxText(self.tokenizer, self.text_encoder, self.tokenizer_2, self.text_encoder_2)
        for each in prompts:
            if (tokens := text.count(each)) > length:
                logger.warning(f"The prompt '{each:.60}' has {tokens} tokens, but only the first {length} are read.")
        with torch.no_grad():
            found = text.embed(prompts, length)
        return found["tokens"], found["pooled"]

    def save_config(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes `model_index.json` and the other files that mark the folder as one of this class."""
        super().save_config(save_directory, *args, **kwargs)
        write_pipeline_files(Path(save_directory), self._conventions)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As in diffusers; `from_pretrained` loads the folder.

        Raises:
            UsageError: an adapter is loaded, which would not be saved.
        """
        if adapter.tuner_layers(self.transformer):
            raise UsageError(
                "The pipeline has an adapter, which a pipeline folder cannot contain",
                "Merge it first: pipe.fuse_lora(); pipe.unload_lora_weights().",
            )
        super().save_pretrained(str(save_directory), *args, **kwargs)

    def _check(
        self,
        prompt: str | Sequence[str] | None,
        prompt_embeds: Tensor | None,
        pooled: Tensor | None,
        seeds: object,
        generator: object,
        latents: object,
        callback_inputs: Sequence[str],
    ) -> int:
        """The number of prompts."""
        if (prompt is None) == (prompt_embeds is None) or (prompt_embeds is None) != (pooled is None):
            raise UsageError(
                "There is no prompt, or more than one form of it",
                "Give either `prompt`, or `prompt_embeds` and `pooled_prompt_embeds`.",
            )
        if seeds is not None and (generator is not None or latents is not None):
            raise UsageError("The noise is given twice", "Give `seeds`, or `generator` and `latents`; not both.")
        if unknown := sorted(set(callback_inputs) - set(self._callback_tensor_inputs)):
            raise UsageError(
                f"A callback cannot receive '{unknown[0]}'",
                f"It can receive {', '.join(self._callback_tensor_inputs)}.",
            )
        count = len(prompt_embeds) if prompt is None else 1 if isinstance(prompt, str) else len(prompt)  # type: ignore[arg-type]
        if count == 0:
            raise UsageError("There is no prompt", "Give at least one.")
        return count

    def _latent_shape(self, height: int, width: int) -> tuple[int, int, int]:
        multiple = self.vae_scale_factor * PATCH
        if height < multiple or width < multiple or height % multiple or width % multiple:
            raise UsageError(
                f"Images of {width} x {height} pixels cannot be generated",
                f"Give sides that are multiples of {multiple}.",
            )
        channels: int = self.vae.config.latent_channels
        return channels, height // self.vae_scale_factor, width // self.vae_scale_factor

    def _guidance(self, scale: float | None) -> float | None:
        if not self.transformer.config.guidance_embeds:
            if scale:
                logger.warning(f"guidance_scale {scale:g} has no effect: the weights embed no guidance.")
            return None
        return self._conventions.guidance if scale is None else float(scale)

    def _noise(
        self,
        seeds: int | Sequence[int] | None,
        generator: torch.Generator | list[torch.Generator] | None,
        shape: tuple[int, ...],
        per_prompt: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Callable[[int], Tensor]:
        """Noise in fp32 by step: fmg's for seeds, otherwise diffusers' in the order of the steps."""
        if seeds is None:
            return lambda _: cast(Tensor, randn_tensor(shape, generator=generator, device=device, dtype=dtype)).float()
        whole = whole_seeds(seeds)
        chosen = [whole + i % per_prompt for i in range(shape[0])] if isinstance(whole, int) else whole
        if len(chosen) != shape[0]:
            raise UsageError(
                f"{shape[0]} images came with {len(chosen)} seeds", "Give one for each image, or the first one alone."
            )
        return lambda step: torch.from_numpy(seeded_noise(chosen, step, shape[1:])).to(device)
