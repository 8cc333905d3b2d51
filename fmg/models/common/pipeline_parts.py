"""The parts of a diffusers pipeline folder of any family: known stock classes, loaded from local safetensors only."""

from __future__ import annotations

import inspect
import warnings
from codecs import BOM_UTF8
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Generic, TypeVar, Union, get_args, get_origin

import torch
from diffusers.utils import logging as diffusers_logging
from torch.func import functional_call
from transformers.utils import logging as transformers_logging

from fmg.core.display import some
from fmg.core.errors import CheckpointError, FmgWarning, out_of_memory, reason
from fmg.core.model_folder import CONFIG, RESTORE, check_no_adapter, read_config, whole, wholes
from fmg.core.stdout_redirect import quiet as quiet_libraries
from fmg.models.common.text import TextStack
from fmg.models.common.weights import FLOATS, WeightFiles, check_loaded, folder_weights, load_transformer, stored_shapes
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions

Text = TypeVar("Text", bound=TextStack)


@dataclass(frozen=True)
class Components(Generic[Text]):
    """The parts of a loaded pipeline folder, in evaluation mode and without gradients.

    Attributes:
        folder: the pipeline folder.
        conventions: how the transformer's weights are sampled.
        transformer: the module of diffusers.
        vae: the autoencoder.
        text: the text encoders with their tokenizers.
        weights: the files of the transformer.
    """

    folder: Path
    conventions: FlowMapConventions
    transformer: Any
    vae: Any
    text: Text
    weights: WeightFiles


quiet = partial(quiet_libraries, diffusers_logging, transformers_logging)
"""Silences progress bars and advice from the libraries while weights load."""
# the head of a whole T5's decoder; transformers itself ignores the rest of the decoder
_OF_A_DECODER = ("lm_head.weight",)
_PROBE = 4
_SCALARS: Mapping[object, tuple[type, ...]] = MappingProxyType(
    {int: (int,), float: (float, int), bool: (bool,), str: (str,)}
)
"""Types of JSON values for the plain types of a signature."""
# Beside weights, encoders have buffers of positions and masks
_STORED = frozenset({*FLOATS, "I64", "I32", "BOOL"})
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Family:
    """The classes that a folder of one family of models may name.

    Nothing else is ever constructed, so no code of a folder runs.

    Attributes:
        name: name of the family, for error messages.
        classes: classes by component, then by the name that its `config.json` states.
        tokenizers: class of each tokenizer, by its folder.
    """

    name: str
    classes: Mapping[str, Mapping[str, Any]]
    tokenizers: Mapping[str, Any]

    @property
    def text_folders(self) -> tuple[str, ...]:
        """The folders of the text encoders and their tokenizers."""
        return (*(name for name in self.classes if name not in ("transformer", "vae")), *self.tokenizers)

    def class_of(self, folder: Path, component: str) -> Any:
        """The class of the component in `folder`.

        Raises:
            CheckpointError: the folder has no `config.json`, or it names another class, or has a value of a type that
                the class does not take.
        """
        config = read_config(folder)
        known = self.classes[component]
        architectures = config.get("architectures")
        first = architectures[0] if isinstance(architectures, list) and architectures else None
        named = str(config.get("_class_name") or first)
        if named not in known:
            raise CheckpointError(
                f"{folder / CONFIG} names the class {named!r:.60}, which is not a {component} of {self.name}",
                f"Give a folder whose {component} is one of: {', '.join(known)}.",
            )
        _check_keys(known[named], folder / CONFIG, config)
        return known[named]

    def module(self, folder: Path, dtype: torch.dtype) -> Any:
        """The component that `folder` is named after, on the CPU in `dtype`, whatever the stored dtype.

        Raises:
            CheckpointError: it is missing, damaged or of an unknown class, or its weights do not fit its config.
        """
        cls = self.class_of(folder, folder.name)
        files = folder_weights(folder)
        check_no_adapter(folder)
        if (folder / CONFIG).read_bytes().startswith(BOM_UTF8):
            raise CheckpointError(
                f"{folder / CONFIG} begins with a byte order mark, which {cls.__name__} does not accept",
                "Save it as UTF-8 without one.",
            )
        try:
            stored_shapes(files, _STORED)
            module, info = cls.from_pretrained(
                str(folder),
                torch_dtype=dtype,
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
            )
        except CheckpointError:
            raise
        except Exception as error:
            # libraries raise anything on a config they do not expect
            if out_of_memory(error) is not None:
                raise
            raise CheckpointError(f"{folder} cannot be loaded: {reason(error)}", RESTORE) from error
        check_loaded(folder, info, _OF_A_DECODER)
        if folder.name.startswith("text_encoder"):
            _check_encodes(module, folder)
        return module


def load_components(
    family: Family,
    folder: Path,
    conventions: FlowMapConventions,
    transformer: Callable[[], tuple[Any, WeightFiles]] | None,
    text: Callable[..., Text],
    device: torch.device,
    dtype: torch.dtype,
    text_device: torch.device | None = None,
) -> Components[Text]:
    """Loads a pipeline folder with given conventions.

    Args:
        family: the classes that it may name.
        folder: a diffusers pipeline folder.
        conventions: how the transformer's weights are sampled.
        transformer: loads the transformer to `device`, and names its files; called first. None: the folder's own.
        text: takes the encoders and tokenizers by the names of their folders.
        device: where transformer and decoder go.
        dtype: dtype of every weight.
        text_device: where the text encoders go; None: to `device`.

    Raises:
        CheckpointError: a file is missing, damaged or of an unknown class.
    """
    with quiet():
        network, weights = (transformer or partial(_own_transformer, family, folder, device, dtype))()
        vae = family.module(folder / "vae", dtype)
        names = [name for name in family.text_folders if name not in family.tokenizers]
        encoders = {name: family.module(folder / name, dtype) for name in names}
        tokenizers = {name: load_tokenizer(folder / name, cls) for name, cls in family.tokenizers.items()}
    for module in (network, vae, *encoders.values()):
        module.eval().requires_grad_(False)
    vae.to(device, memory_format=torch.channels_last)
    for module in encoders.values():
        module.to(device if text_device is None else text_device)
    return Components(folder, conventions, network, vae, text(**encoders, **tokenizers), weights)


def _own_transformer(family: Family, folder: Path, device: torch.device, dtype: torch.dtype) -> tuple[Any, WeightFiles]:
    own = folder / "transformer"
    cls, weights = family.class_of(own, own.name), folder_weights(own)
    return load_transformer(cls, read_config(own), weights, device, dtype), weights


def _check_keys(cls: Any, file: Path, config: Mapping[str, object]) -> None:
    """Compares a config with the signature of a diffusers class; transformers compares its own.

    Raises:
        CheckpointError: a value has the wrong type, which would only show in a forward pass.
    """
    if not hasattr(cls, "from_config"):
        return
    parameters = inspect.signature(cls.__init__).parameters
    unknown = [key for key in config if key not in parameters and not key.startswith("_")]
    if unknown:
        text = f"{file} has keys that {cls.__name__} does not know and ignores: {some(sorted(unknown))}"
        warnings.warn(text, FmgWarning, stacklevel=2)
    for key, parameter in parameters.items():
        stated = parameter.annotation
        options = get_args(stated) if get_origin(stated) in (Union, UnionType) else (stated,)
        if key not in config or not {*_SCALARS, NoneType}.issuperset(options):
            continue
        value = config[key]
        if value is None and (NoneType in options or parameter.default is None):
            continue
        if not any(type(value) in _SCALARS.get(option, ()) for option in options):
            wanted = " or ".join(option.__name__ for option in options if option is not NoneType)
            raise CheckpointError(f"{file} has {value!r:.60} for {key} instead of {wanted}", RESTORE)


@torch.no_grad()
def _check_encodes(encoder: Any, folder: Path) -> None:
    """Runs a text encoder on the meta device, without memory: some wrong values only show in a forward pass.

    Raises:
        CheckpointError: it cannot run.
    """
    state = {name: x.to("meta") for name, x in (*encoder.named_parameters(), *encoder.named_buffers())}
    try:
        functional_call(encoder, state, (torch.zeros(1, _PROBE, dtype=torch.int64, device="meta"),))
    except Exception as error:
        raise CheckpointError(f"{folder / CONFIG} cannot be used: {reason(error)}", RESTORE) from error


def load_tokenizer(folder: Path, cls: Any) -> Any:
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has none of the files {', '.join(_TOKENIZER_FILES)}", RESTORE)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder} cannot be loaded: {reason(error)}", RESTORE) from error


def check_rotary(folder: Path, config: Mapping[str, object], stock: Mapping[str, object]) -> None:
    """Checks the axes of rotary positions, which no shape of a weight reveals.

    Args:
        folder: folder of the transformer.
        config: its `config.json`.
        stock: `attention_head_dim` and `axes_dims_rope` of the class if the file omits them.

    Raises:
        CheckpointError: their number is wrong, or they do not fit the heads.
    """
    known = {**stock, **config}
    head, axes, usual = whole(known, "attention_head_dim"), wholes(known, "axes_dims_rope"), stock["axes_dims_rope"]
    assert isinstance(usual, list)
    if axes is None or len(axes) != len(usual) or sum(axes) != head or any(axis % 2 for axis in axes):
        stated = "says" if "axes_dims_rope" in config else "leaves out the key, which means"
        raise CheckpointError(
            f"{folder / CONFIG} {stated} axes_dims_rope {axes}, but attention_head_dim is {head}",
            f"Give {len(usual)} even numbers that add up to attention_head_dim, as the weights were trained with.",
        )


def check_same(component: str, key: str, value: int, transformer_key: str, transformer_value: int) -> None:
    """Refuses components that load individually but come from different models.

    Raises:
        CheckpointError: the two widths differ.
    """
    if value != transformer_value:
        raise CheckpointError(
            f"The {component} does not fit the transformer: {key} is {value}, {transformer_key} is {transformer_value}",
            "Give a folder whose components belong together.",
        )


def square_latent(components: Components[Any], channels: int, scale: int, token: int) -> tuple[int, int, int]:
    """(c, h, w) of the latent of a square image.

    Args:
        components: a loaded folder.
        channels: channels of a latent.
        scale: image pixels along the side of one latent pixel.
        token: latent pixels along the side of one token.

    Raises:
        CheckpointError: the resolution is not a whole number of tokens.
    """
    resolution = components.conventions.resolution
    if resolution % (scale * token):
        raise CheckpointError(
            f"The resolution {resolution} is not a multiple of {scale * token}, the side of a token in pixels",
            f"Use a multiple of {scale * token}.",
        )
    return channels, resolution // scale, resolution // scale


def check_guidance(folder: Path, conventions: FlowMapConventions, *, embeds: bool) -> None:
    """Checks that a guidance scale is given if and only if the transformer embeds one.

    Raises:
        CheckpointError: it is not.
    """
    if embeds != (conventions.guidance is not None):
        wanted = "needs a guidance scale" if embeds else "takes no guidance scale"
        raise CheckpointError(
            f"The transformer {wanted}, but {CONVENTIONS_FILE} has guidance {conventions.guidance}",
            f"Set `guidance` in {folder / CONVENTIONS_FILE} accordingly.",
        )


def checked_times(folder: Path, config: Mapping[str, object], conventions: FlowMapConventions) -> dict[str, object]:
    """Checks what the config of a transformer in `folder` states about its times.

    Raises:
        CheckpointError: it says something else.
    """
    stated: dict[str, object] = {"time_scale": conventions.time_scale, "second_time": conventions.second_time.plain()}
    for key, value in stated.items():
        if config.get(key, value) != value:
            raise CheckpointError(
                f"{folder / CONFIG} says {key} {config[key]!r}, but {CONVENTIONS_FILE} says {value!r}",
                "Correct the wrong one, or the model generates noise.",
            )
    return stated
