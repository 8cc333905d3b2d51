"""Components of a diffusers folder: stock classes that are known by name, local files, safetensors, nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from transformers.utils import logging as transformers_logging

from fmg.core.errors import CheckpointError, first_line, out_of_memory
from fmg.core.json_reader import JsonError, read_object
from fmg.models.common.weights import some
from fmg.models.conventions import CONVENTIONS_FILE, FlowMapConventions

_LIBRARIES: tuple[Any, ...] = (diffusers_logging, transformers_logging)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "spiece.model")
_RESTORE = "Restore the folder from where the model came from."


@dataclass(frozen=True)
class Family:
    """The classes that a folder of one family of models may name.

    Nothing else is ever constructed, so no code of a folder runs.

    Attributes:
        name: of the family, for people.
        classes: by component, then by the name that its `config.json` states.
    """

    name: str
    classes: Mapping[str, Mapping[str, Any]]

    def class_of(self, folder: Path, component: str) -> Any:
        """The class of the component in `folder`.

        Raises:
            CheckpointError: the folder has no `config.json`, or it names another class.
        """
        config = read_config(folder)
        known = self.classes[component]
        architectures = config.get("architectures") or [None]
        named = str(config.get("_class_name") or architectures[0])
        if named not in known:
            raise CheckpointError(
                f"{folder / 'config.json'} names the class {named!r}, which is not a {self.name} {component}",
                f"Give a folder whose {component} is one of: {', '.join(known)}.",
            )
        return known[named]

    def module(self, folder: Path, dtype: torch.dtype) -> Any:
        """The component that `folder` is named after, on the CPU in `dtype`, whatever dtype it is stored in.

        Raises:
            CheckpointError: it is missing, damaged, of a class that is not known, or its weights do not fit its config.
        """
        cls = self.class_of(folder, folder.name)
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
        except (OSError, ValueError, TypeError, KeyError, RuntimeError, SafetensorError) as error:
            if out_of_memory(error) is not None:
                raise
            raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}", _RESTORE) from error
        for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
            if names := sorted(str(name) for name in info[problem]):
                raise CheckpointError(
                    f"The weights in {folder} have {problem.replace('_', ' ')}: {some(names)}", _RESTORE
                )
        return module


def load_tokenizer(folder: Path, cls: Any) -> Any:
    """The tokenizer in `folder`.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise CheckpointError(f"{folder} has none of the files {', '.join(_TOKENIZER_FILES)}", _RESTORE)
    try:
        return cls.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exception on a damaged file
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}", _RESTORE) from error


def read_config(folder: Path) -> dict[str, Any]:
    """The `config.json` of a component.

    Raises:
        CheckpointError: it is missing or no JSON object.
    """
    file = folder / "config.json"
    try:
        return read_object(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} is missing", _RESTORE) from None
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{file} cannot be read: {first_line(error)}", _RESTORE) from None


def check_same(component: str, key: str, value: int, transformer_key: str, transformer_value: int) -> None:
    """Components that load one by one may still come from different models.

    Raises:
        CheckpointError: the two widths differ.
    """
    if value != transformer_value:
        raise CheckpointError(
            f"The {component} does not fit the transformer: {key} is {value}, {transformer_key} is {transformer_value}",
            "Give a folder whose components belong together.",
        )


def check_guidance(folder: Path, conventions: FlowMapConventions, *, embeds: bool) -> None:
    """Whether a guidance scale is stated exactly when the transformer embeds one.

    Raises:
        CheckpointError: it is not.
    """
    if embeds != (conventions.guidance is not None):
        wanted = "needs a guidance scale" if embeds else "takes no guidance scale"
        raise CheckpointError(
            f"The transformer {wanted}, and {CONVENTIONS_FILE} has guidance {conventions.guidance}",
            f"Set `guidance` in {folder / CONVENTIONS_FILE} accordingly.",
        )


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
