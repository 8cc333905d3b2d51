"""The parts of a diffusers pipeline folder of any family: known stock classes, loaded from local safetensors only."""

from __future__ import annotations

import inspect
import warnings
from codecs import BOM_UTF8
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType, NoneType, UnionType
from typing import Any, Protocol, TypeVar, Union, get_args, get_origin

import torch
from diffusers.utils import logging as diffusers_logging
from torch.func import functional_call
from transformers.utils import logging as transformers_logging

from fmg.core.display import some
from fmg.core.errors import CheckpointError, FmgWarning, out_of_memory, reason
from fmg.core.model_folder import CONFIG, RESTORE, check_no_adapter, read_config
from fmg.core.stdout_redirect import quiet as quiet_libraries
from fmg.models.common.text import TextStack
from fmg.models.common.weights import FLOATS, WeightFiles, folder_weights, stored_shapes
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions


class Components(Protocol):
    """The parts of a loaded pipeline folder, in evaluation mode and without gradients."""

    @property
    def folder(self) -> Path: ...

    @property
    def conventions(self) -> FlowMapConventions: ...

    @property
    def transformer(self) -> Any: ...

    @property
    def vae(self) -> Any: ...

    @property
    def text(self) -> TextStack: ...

    @property
    def weights(self) -> WeightFiles:
        """The files of the transformer."""


C = TypeVar("C", bound=Components)

quiet = partial(quiet_libraries, diffusers_logging, transformers_logging)
"""Silences progress bars and advice from the libraries while weights load."""
# head of the decoder in a whole T5, whose decoder itself transformers ignores
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
        name: of the family, for error messages.
        classes: by component, then by the name that its `config.json` states.
    """

    name: str
    classes: Mapping[str, Mapping[str, Any]]

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
                f"{folder / CONFIG} names the class {named!r:.60}, which is not a {self.name} {component}",
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
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            names = sorted(str(name) for name in info[problem] if name not in _OF_A_DECODER)
            if names:
                raise CheckpointError(
                    f"The weights in {folder} have {problem.replace('_', ' ')}: {some(names)}", RESTORE
                )
        if folder.name.startswith("text_encoder"):
            _check_encodes(module, folder)
        return module


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


def check_same(component: str, key: str, value: int, transformer_key: str, transformer_value: int) -> None:
    """Refuses components that load one by one but come from different models.

    Raises:
        CheckpointError: the two widths differ.
    """
    if value != transformer_value:
        raise CheckpointError(
            f"The {component} does not fit the transformer: {key} is {value}, {transformer_key} is {transformer_value}",
            "Give a folder whose components belong together.",
        )


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
