"""Loads a FLUX-class flow map: a diffusers folder, and the published file of a student in place of its transformer.

Stock classes, local files and safetensors, nothing else. A student in a torch file is read once with
`weights_only=True`, memory-mapped, and converted to safetensors shards in the cache under the hash of its content.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from fmg.core.cache import content_hash
from fmg.core.model_folder import read_config
from fmg.models.common.converted import kept_weights, read_torch_file, write_shards
from fmg.models.common.pipeline_parts import (
    Components,
    Family,
    check_guidance,
    check_rotary,
    check_same,
    checked_times,
    load_components,
)
from fmg.models.common.stacked_adapters import merged_weights
from fmg.models.common.text import TokenisedText, Tokenizer, token_ids
from fmg.models.common.weights import (
    Shapes,
    WeightFiles,
    check_flow_map,
    empty_transformer,
    folder_weights,
    load_transformer,
    tensor_names,
    transformer_shapes,
    unreadable,
)
from fmg.models.conventions import FlowMapConventions, read_conventions
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.published import LocatedAdapter

PUBLISHED_KEY = "module"
"""Key of the state dict in the torch file of a student."""
DROPPED_PREFIX = "logvar_linear."
"""The one group of a published student that sampling does not need: the weighting head of sCM's training loss."""


def student_weights(source: Path, shapes: Shapes) -> WeightFiles:
    """The tensors of a published student: a `.pt` file, a safetensors file or a component folder.

    Args:
        source: a torch file is first converted into the cache, if it is not there yet.
        shapes: names and shapes that the transformer has; checked before anything is converted.

    Raises:
        CheckpointError: a file that cannot be read, contains anything but tensors, or does not fit the transformer.
        FmgError: the cache cannot be written.
    """
    if source.is_dir():
        return folder_weights(source)
    if source.suffix == ".safetensors":
        kept = [name for name in tensor_names(source) if not name.startswith(DROPPED_PREFIX)]
        return WeightFiles(source, dict.fromkeys(kept, source))
    try:
        key = content_hash(source)
    except OSError as error:
        raise unreadable(source, error) from error

    def make(partial: Path) -> None:
        given = read_torch_file(source, PUBLISHED_KEY)
        tensors = {name: x for name, x in given.items() if not name.startswith(DROPPED_PREFIX)}
        check_student(shapes, {name: tuple(x.shape) for name, x in tensors.items()}, source)
        write_shards(partial, tensors.items())

    return kept_weights(source, key, make)


def check_student(wanted: Shapes, given: Shapes, origin: Path) -> None:
    """`check_flow_map` with the names of the models that the file may belong to; errors as there."""
    check_flow_map(
        wanted,
        given,
        origin,
        second=FlowMapFluxTransformer2DModel.second_embedder,
        lacks="Give the MeanFlow student, or the file with the embedder in model.adapters; for a single-time student"
        " use the model 'scm-flux'.",
        has="Give the sCM student; for a two-time one use the model 'meanflow-flux'.",
    )


@dataclass(frozen=True)
class FluxText(TokenisedText):
    """The two text encoders of FLUX with their tokenizers (`tokenizer`, `text_encoder`: CLIP; `_2`: T5).

    T5 gets no attention mask and sees its padding; CLIP gives the state at the end-of-text token. Both truncate prompts
    that are too long.
    """

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: Tokenizer
    text_encoder_2: T5EncoderModel

    @property
    def encoders(self) -> tuple[CLIPTextModel, T5EncoderModel]:
        """CLIP and T5."""
        return self.text_encoder, self.text_encoder_2

    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """Ids for CLIP and T5."""
        return {
            "tokenizer": token_ids(self.tokenizer, prompts, self.tokenizer.model_max_length),
            "tokenizer_2": token_ids(self.tokenizer_2, prompts, length),
        }

    def states(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) of T5 and `pooled` (b, p) of CLIP, as `FluxPipeline.encode_prompt` makes them."""
        t5: Tensor = self.text_encoder_2(tokens["tokenizer_2"])[0]
        return {"tokens": t5, "pooled": self.text_encoder(tokens["tokenizer"]).pooler_output}

    def count(self, prompt: str) -> int:
        """Tokens of T5, its end token included; CLIP only ever sees the beginning of a prompt."""
        return len(self.tokenizer_2.encode(prompt, verbose=False))


FLUX = Family(
    "FLUX",
    MappingProxyType(
        {
            "transformer": {
                "FlowMapFluxTransformer2DModel": FlowMapFluxTransformer2DModel,
                # the same weights, written by tools that only know the stock class; the conventions complete them
                "FluxTransformer2DModel": FlowMapFluxTransformer2DModel,
            },
            "vae": {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny},
            "text_encoder": {"CLIPTextModel": CLIPTextModel},
            "text_encoder_2": {"T5EncoderModel": T5EncoderModel},
        }
    ),
    MappingProxyType({"tokenizer": CLIPTokenizer, "tokenizer_2": T5Tokenizer}),
)


# the defaults of diffusers
_STOCK_AXES: Mapping[str, object] = MappingProxyType({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]})


FluxComponents = Components[FluxText]


@dataclass(frozen=True)
class TransformerSource:
    """A transformer before it is loaded: its diffusers config with the time convention, and its files."""

    config: Mapping[str, Any]
    weights: WeightFiles


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> FluxComponents:
    """Loads a pipeline folder with its `fmg_flow_map.json` to `device` in `dtype`, whatever the stored dtype.

    Raises:
        CheckpointError: a file is missing, damaged, of an unknown class, or does not fit the others.
    """
    return load_parts(folder, read_conventions(folder), device, dtype)


def load_parts(
    folder: Path,
    conventions: FlowMapConventions,
    device: torch.device,
    dtype: torch.dtype,
    *,
    student: Path | None = None,
    adapters: Sequence[LocatedAdapter] = (),
    text_device: torch.device | None = None,
) -> FluxComponents:
    """Loads a pipeline folder with given conventions, with its own transformer weights or those of a student.

    Args:
        folder: a diffusers pipeline folder.
        conventions: how the transformer's weights are sampled.
        device: where transformer and decoder go.
        dtype: dtype of every weight.
        student: weights of the transformer in place of the folder's own (`fmg.models.flux.loading.student_weights`).
        adapters: published changes that are merged into the folder's own weights first.
        text_device: where the text encoders go; None: to `device`.

    Raises:
        CheckpointError: a file is missing, damaged, of an unknown class, or does not fit the others.
    """

    def transformer() -> tuple[FlowMapFluxTransformer2DModel, WeightFiles]:
        source = transformer_source(folder, conventions, student, adapters)
        cls = FlowMapFluxTransformer2DModel
        return load_transformer(cls, source.config, source.weights, device, dtype, check_student), source.weights

    components = load_components(FLUX, folder, conventions, transformer, FluxText, device, dtype, text_device)
    _check_fit(components)
    return components


def transformer_source(
    folder: Path,
    conventions: FlowMapConventions,
    student: Path | None = None,
    adapters: Sequence[LocatedAdapter] = (),
) -> TransformerSource:
    """Config and files of a transformer, without reading a weight. Arguments and errors as in `load_parts`."""
    own = folder / "transformer"
    config = _config(own) if student is None else _student_config(own, student)
    config |= checked_times(own if student is None else student, config, conventions)
    if student is None and not adapters:
        return TransformerSource(config, folder_weights(own))
    shapes = transformer_shapes(empty_transformer(FlowMapFluxTransformer2DModel, config, own))
    if student is not None:
        return TransformerSource(config, student_weights(student, shapes))
    second = FlowMapFluxTransformer2DModel.second_embedder if conventions.second_time else None
    return TransformerSource(config, merged_weights(folder_weights(own), adapters, shapes, second))


def _config(folder: Path) -> dict[str, Any]:
    FLUX.class_of(folder, "transformer")
    config = read_config(folder)
    check_rotary(folder, config, _STOCK_AXES)
    return config


def _student_config(teacher: Path, student: Path) -> dict[str, Any]:
    """The architecture that a student's folder states, or else its teacher's; never the teacher's conventions."""
    if (student / "config.json").is_file():
        return _config(student)
    return {key: value for key, value in _config(teacher).items() if key not in ("time_scale", "second_time")}


def _check_fit(components: FluxComponents) -> None:
    """Components that load individually may still come from different models."""
    transformer, conventions = components.transformer.config, components.conventions
    text, vae = components.text, components.vae
    check_same("vae", "latent_channels x 4", 4 * vae.config.latent_channels, "in_channels", transformer.in_channels)
    width = text.text_encoder_2.config.d_model
    check_same("text_encoder_2", "d_model", width, "joint_attention_dim", transformer.joint_attention_dim)
    width = text.text_encoder.config.hidden_size
    check_same("text_encoder", "hidden_size", width, "pooled_projection_dim", transformer.pooled_projection_dim)
    check_guidance(components.folder, conventions, embeds=transformer.guidance_embeds)
