"""Reads a diffusers folder of a FLUX-class flow map: stock classes, local files, safetensors, nothing else."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.utils import logging as transformers_logging

from fmg.core.errors import CheckpointError
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions, read_conventions
from fmg.models.flux.text import TextStack
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.models.flux.weights import (
    WeightFiles,
    empty_transformer,
    folder_weights,
    load_transformer,
    some,
    student_weights,
    transformer_shapes,
)

_CLASSES: Mapping[str, Mapping[str, Any]] = MappingProxyType(
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
)
"""Classes that a folder may name, by component. Nothing else is ever constructed, so no code of a folder runs."""

_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")

_RESTORE = "Restore the folder from where the model came from."


@dataclass(frozen=True)
class FluxComponents:
    """The parts of a loaded folder, in evaluation mode and without gradients."""

    folder: Path
    conventions: FlowMapConventions
    transformer: FlowMapFluxTransformer2DModel
    vae: AutoencoderKL | AutoencoderTiny
    text: TextStack
    weights: WeightFiles


@dataclass(frozen=True)
class TransformerSource:
    """A transformer before it is loaded: its diffusers config, its conventions as options, and its files."""

    config: Mapping[str, Any]
    options: Mapping[str, object]
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
        student: weights of the transformer in place of the folder's own (`fmg.models.flux.weights.student_weights`).
        text_device: where the text encoders go; None: to `device`.

    Raises:
        CheckpointError: a file is missing, damaged, of a class that is not known, or does not fit the others.
    """
    with quiet():
        source = transformer_source(folder, conventions, student)
        transformer = load_transformer(source.config, source.options, source.weights, device, dtype)
        vae = load_module(folder / "vae", dtype)
        text_encoder = load_module(folder / "text_encoder", dtype)
        text_encoder_2 = load_module(folder / "text_encoder_2", dtype)
        tokenizer = load_tokenizer(folder / "tokenizer", CLIPTokenizer)
        tokenizer_2 = load_tokenizer(folder / "tokenizer_2", T5Tokenizer)
    for module in (transformer, vae, text_encoder, text_encoder_2):
        module.eval().requires_grad_(False)
    vae.to(device, memory_format=torch.channels_last)
    for module in (text_encoder, text_encoder_2):
        module.to(device if text_device is None else text_device)
    text = TextStack(tokenizer, text_encoder, tokenizer_2, text_encoder_2)
    components = FluxComponents(folder, conventions, transformer, vae, text, source.weights)
    _check_fit(components)
    return components


def transformer_source(folder: Path, conventions: FlowMapConventions, student: Path | None = None) -> TransformerSource:
    """Config and files of a transformer, without reading a weight. Arguments and errors as in `load_parts`."""
    own = folder / "transformer"
    config = _config(own) if student is None else _student_config(own, student)
    _check_conventions(own if student is None else student, config, conventions)
    options: dict[str, object] = {"time_scale": conventions.time_scale, "second_time": conventions.second_time}
    if student is None:
        return TransformerSource(config, options, folder_weights(own))
    shapes = transformer_shapes(empty_transformer(config, options, own))
    return TransformerSource(config, options, student_weights(student, shapes))


def _config(folder: Path) -> dict[str, Any]:
    component_class(folder, "transformer")
    return read_config(folder)


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


def load_module(folder: Path, dtype: torch.dtype) -> Any:
    """A component other than the transformer, of a known class, with exactly the weights of its folder.

    Raises:
        CheckpointError: a file is missing, damaged, of a class that is not known, or does not fit its config.
    """
    cls = component_class(folder, folder.name)
    if not any(folder.glob("*.safetensors")):
        raise CheckpointError(
            f"{folder} has no .safetensors file",
            f"Other formats are not read, because a pickle can run code. {_RESTORE}",
        )
    try:
        module, info = cls.from_pretrained(
            str(folder),
            torch_dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}", _RESTORE) from error
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in info[problem]):
            raise CheckpointError(f"The weights in {folder} have {problem.replace('_', ' ')}: {some(names)}", _RESTORE)
    return module


def component_class(folder: Path, component: str) -> Any:
    """The class that a component folder names, one of those that are known.

    Raises:
        CheckpointError: the config is missing or damaged, or names another class.
    """
    config = read_config(folder)
    known = _CLASSES[component]
    architectures = config.get("architectures") or [None]
    named = str(config.get("_class_name") or architectures[0])
    if named not in known:
        raise CheckpointError(
            f"{folder / 'config.json'} names the class {named!r}, which is not a FLUX {component}",
            f"Give a folder whose {component} is one of: {', '.join(known)}.",
        )
    return known[named]


def load_tokenizer(folder: Path, cls: Any) -> Any:
    """The tokenizer of a folder.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has none of the files {', '.join(_TOKENIZER_FILES)}", _RESTORE)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder} cannot be loaded: {_first_line(error)}", _RESTORE) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a component folder.

    Raises:
        CheckpointError: it is missing or is no JSON object.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", _RESTORE) from None
    except ValueError as error:
        raise CheckpointError(f"{file} is not JSON: {error}", _RESTORE) from None
    if not isinstance(config, dict):
        raise CheckpointError(f"{file} is not a JSON object", _RESTORE)
    return config


def _check_fit(components: FluxComponents) -> None:
    """Components that load one by one may still come from different models."""
    transformer, conventions = components.transformer.config, components.conventions
    text, vae = components.text, components.vae
    _same("vae", "latent_channels x 4", 4 * vae.config.latent_channels, "in_channels", transformer.in_channels)
    width = text.text_encoder_2.config.d_model
    _same("text_encoder_2", "d_model", width, "joint_attention_dim", transformer.joint_attention_dim)
    width = text.text_encoder.config.hidden_size
    _same("text_encoder", "hidden_size", width, "pooled_projection_dim", transformer.pooled_projection_dim)
    if transformer.guidance_embeds != (conventions.guidance is not None):
        wanted = "needs a guidance scale" if transformer.guidance_embeds else "takes no guidance scale"
        raise CheckpointError(
            f"The transformer {wanted}, and {CONVENTIONS_FILE} has guidance {conventions.guidance}",
            f"Set `guidance` in {components.folder / CONVENTIONS_FILE} accordingly.",
        )


def _same(component: str, key: str, value: int, transformer_key: str, transformer_value: int) -> None:
    if value != transformer_value:
        raise CheckpointError(
            f"The {component} does not fit the transformer: {key} is {value}, {transformer_key} is {transformer_value}",
            "Give a folder whose components belong together.",
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries while weights load; their settings are restored."""
    before = [(library, library.get_verbosity(), library.is_progress_bar_enabled()) for library in _LIBRARIES]
    for library in _LIBRARIES:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, verbosity, bar in before:
            library.set_verbosity(verbosity)
            if bar:
                library.enable_progress_bar()


_LIBRARIES: tuple[Any, ...] = (diffusers_logging, transformers_logging)
