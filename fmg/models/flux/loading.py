"""The text encoders of FLUX: T5 token states and the pooled CLIP state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer

from fmg.core.errors import CheckpointError
from fmg.core.model_folder import read_config, whole, wholes
from fmg.core.profiling import TOKENISE, stage
from fmg.models.common.pipeline_parts import Family, check_guidance, check_same, load_tokenizer, quiet
from fmg.models.common.text import Tokenizer
from fmg.models.common.weights import (
    WeightFiles,
    empty_transformer,
    folder_weights,
    load_transformer,
    transformer_shapes,
)
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions, read_conventions
from fmg.models.flux.students import check_student, student_weights
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel


@dataclass(frozen=True)
class FluxText:
    """The two text encoders of FLUX with their tokenizers (`tokenizer`, `text_encoder`: CLIP; `_2`: T5).

    T5 gets no attention mask and sees its padding, CLIP gives the state at the end-of-text token; both cut what is
    longer than their length.
    """

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: Tokenizer
    text_encoder_2: T5EncoderModel

    @property
    def encoders(self) -> tuple[CLIPTextModel, T5EncoderModel]:
        """CLIP and T5."""
        return self.text_encoder, self.text_encoder_2

    def embed(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) of T5 and `pooled` (b, p) of CLIP, as `FluxPipeline.encode_prompt` makes them."""
        return {"tokens": self._tokens(prompts, length), "pooled": self._pooled(prompts)}

    def count(self, prompt: str) -> int:
        """Tokens of T5, its end included; CLIP only ever sees the beginning of a prompt."""
        return len(self.tokenizer_2.encode(prompt, verbose=False))

    def _tokens(self, prompts: list[str], length: int) -> Float[Tensor, "b l d"]:
        states: Tensor = self.text_encoder_2(_ids(self.tokenizer_2, prompts, length).to(self.text_encoder_2.device))[0]
        return states

    def _pooled(self, prompts: list[str]) -> Float[Tensor, "b p"]:
        ids = _ids(self.tokenizer, prompts, self.tokenizer.model_max_length).to(self.text_encoder.device)
        pooled: Tensor = self.text_encoder(ids).pooler_output
        return pooled


def _ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> Int[Tensor, "b l"]:
    with stage(TOKENISE):
        encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids


FLUX = Family(
    "FLUX",
    MappingProxyType(
        {
            "transformer": {
                "FlowMapFluxTransformer2DModel": FlowMapFluxTransformer2DModel,
                # the same weights, written by tools that know the stock class only; the conventions say the rest
                "FluxTransformer2DModel": FlowMapFluxTransformer2DModel,
            },
            "vae": {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny},
            "text_encoder": {"CLIPTextModel": CLIPTextModel},
            "text_encoder_2": {"T5EncoderModel": T5EncoderModel},
        }
    ),
)


_AXES = 3
# what diffusers takes where the config says nothing
_STOCK_AXES: Mapping[str, object] = MappingProxyType({"attention_head_dim": 128, "axes_dims_rope": [16, 56, 56]})


@dataclass(frozen=True)
class FluxComponents:
    """The parts of a loaded folder, in evaluation mode and without gradients."""

    folder: Path
    conventions: FlowMapConventions
    transformer: FlowMapFluxTransformer2DModel
    vae: AutoencoderKL | AutoencoderTiny
    text: FluxText
    weights: WeightFiles


@dataclass(frozen=True)
class TransformerSource:
    """A transformer before it is loaded: its diffusers config with the time convention, and its files."""

    config: Mapping[str, Any]
    weights: WeightFiles


def load_folder(folder: Path, device: torch.device, dtype: torch.dtype) -> FluxComponents:
    """Loads a pipeline folder with its `fmg_flow_map.json` to `device` in `dtype`, whatever dtype it is stored in.

    Raises:
        CheckpointError: a file is missing, damaged, of a class that is not known, or does not fit the others.
    """
    return load_parts(folder, read_conventions(folder), device, dtype)


def load_parts(
    folder: Path,
    conventions: FlowMapConventions,
    device: torch.device,
    dtype: torch.dtype,
    *,
    student: Path | None = None,
    text_device: torch.device | None = None,
) -> FluxComponents:
    """Loads a pipeline folder by stated conventions, with the weights of its transformer or those of a student.

    Args:
        folder: a diffusers pipeline folder.
        conventions: how the transformer's weights want to be sampled.
        device: where transformer and decoder go.
        dtype: of every weight.
        student: weights of the transformer in place of the folder's own (`fmg.models.flux.students.student_weights`).
        text_device: where the text encoders go; None: to `device`.

    Raises:
        CheckpointError: a file is missing, damaged, of a class that is not known, or does not fit the others.
    """
    with quiet():
        source = transformer_source(folder, conventions, student)
        transformer = load_transformer(
            FlowMapFluxTransformer2DModel, source.config, source.weights, device, dtype, check_student
        )
        vae = FLUX.module(folder / "vae", dtype)
        text_encoder = FLUX.module(folder / "text_encoder", dtype)
        text_encoder_2 = FLUX.module(folder / "text_encoder_2", dtype)
        tokenizer = load_tokenizer(folder / "tokenizer", CLIPTokenizer)
        tokenizer_2 = load_tokenizer(folder / "tokenizer_2", T5Tokenizer)
    for module in (transformer, vae, text_encoder, text_encoder_2):
        module.eval().requires_grad_(False)
    vae.to(device, memory_format=torch.channels_last)
    for module in (text_encoder, text_encoder_2):
        module.to(device if text_device is None else text_device)
    text = FluxText(tokenizer, text_encoder, tokenizer_2, text_encoder_2)
    components = FluxComponents(folder, conventions, transformer, vae, text, source.weights)
    _check_fit(components)
    return components


def transformer_source(folder: Path, conventions: FlowMapConventions, student: Path | None = None) -> TransformerSource:
    """Config and files of a transformer, without reading a weight. Arguments and errors as in `load_parts`."""
    own = folder / "transformer"
    config = _config(own) if student is None else _student_config(own, student)
    _check_conventions(own if student is None else student, config, conventions)
    config |= {"time_scale": conventions.time_scale, "second_time": conventions.second_time}
    if student is None:
        return TransformerSource(config, folder_weights(own))
    shapes = transformer_shapes(empty_transformer(FlowMapFluxTransformer2DModel, config, own))
    return TransformerSource(config, student_weights(student, shapes))


def _config(folder: Path) -> dict[str, Any]:
    FLUX.class_of(folder, "transformer")
    config = read_config(folder)
    known = {**_STOCK_AXES, **config}
    head, axes = whole(known, "attention_head_dim"), wholes(known, "axes_dims_rope")
    # the one value that no weight has the shape of: the first forward would be where it is noticed
    if axes is None or len(axes) != _AXES or sum(axes) != head or any(axis % 2 for axis in axes):
        stated = "says" if "axes_dims_rope" in config else "leaves out the key, which means"
        raise CheckpointError(
            f"{folder / 'config.json'} {stated} axes_dims_rope {axes}, and attention_head_dim is {head}",
            "Give three even numbers that add up to attention_head_dim, as the weights were trained with.",
        )
    return config


def _student_config(teacher: Path, student: Path) -> dict[str, Any]:
    """The architecture that a student's folder states, or else its teacher's; never the teacher's conventions."""
    if (student / "config.json").is_file():
        return _config(student)
    return {key: value for key, value in _config(teacher).items() if key not in ("time_scale", "second_time")}


def _check_conventions(folder: Path, config: Mapping[str, Any], conventions: FlowMapConventions) -> None:
    stated: dict[str, object] = {"time_scale": conventions.time_scale, "second_time": conventions.second_time}
    for key, value in stated.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{folder / 'config.json'} says {key} {config[key]!r} and {CONVENTIONS_FILE} says {value!r}",
                "Correct the one that is wrong: under the wrong convention the model draws noise.",
            )


def _check_fit(components: FluxComponents) -> None:
    """Components that load one by one may still come from different models."""
    transformer, conventions = components.transformer.config, components.conventions
    text, vae = components.text, components.vae
    check_same("vae", "latent_channels x 4", 4 * vae.config.latent_channels, "in_channels", transformer.in_channels)
    width = text.text_encoder_2.config.d_model
    check_same("text_encoder_2", "d_model", width, "joint_attention_dim", transformer.joint_attention_dim)
    width = text.text_encoder.config.hidden_size
    check_same("text_encoder", "hidden_size", width, "pooled_projection_dim", transformer.pooled_projection_dim)
    check_guidance(components.folder, conventions, embeds=transformer.guidance_embeds)
