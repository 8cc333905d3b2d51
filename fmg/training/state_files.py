"""Nested values with tensors in them, such as an optimizer's state, as one safetensors file and one JSON file.

No pickle: tensors go into safetensors, everything around them into JSON that names them. Values are read back bit for
bit, including tuples and whole-number keys.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError, reason
from fmg.core.files import SUMS, check_sums, write_sums
from fmg.core.json_io import parse

TENSORS, STRUCTURE = "state.safetensors", "state.json"
_TENSOR, _TUPLE, _PAIRS = "$tensor", "$tuple", "$pairs"
_PLAIN = (bool, int, float, str)


def write_state(folder: Path, value: Mapping[str, object]) -> None:
    """Writes `state.safetensors`, `state.json` and their digests into a folder.

    Raises:
        TypeError: a value is not a tensor, number, text, None, or a list, tuple or dict of these.
    """
    tensors: dict[str, Tensor] = {}
    structure = _pack(value, "", tensors)
    save_file(tensors, folder / TENSORS)
    (folder / STRUCTURE).write_text(json.dumps(structure) + "\n", encoding="utf-8")
    write_sums(folder)
    for name in (TENSORS, STRUCTURE, SUMS):
        with (folder / name).open("rb") as file:
            os.fsync(file.fileno())


def read_state(folder: Path, fix: str = "Train again.") -> dict[str, Any]:
    """Reads what `write_state` wrote; tensors are on the CPU. States of older versions have no digests to check.

    Args:
        folder: folder of the state.
        fix: what to do about damage, for the error.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    try:
        check_sums(folder, None, fix, (TENSORS, STRUCTURE))
        tensors = load_file(folder / TENSORS)
        value: object = _unpack(parse((folder / STRUCTURE).read_bytes(), finite=False), tensors)
        if not isinstance(value, dict):
            raise TypeError("it is not a mapping")
    except CheckpointError as error:
        raise CheckpointError(f"The state in '{folder}' cannot be read: {error.what}", fix) from None
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"The state in '{folder}' cannot be read: {reason(error)}", fix) from None
    return value


def _pack(value: object, name: str, tensors: dict[str, Tensor]) -> object:
    if isinstance(value, Tensor):
        # a copy, since safetensors refuses tensors that share memory
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if value is None or isinstance(value, _PLAIN):
        return value
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{name}.{i}", tensors) for i, item in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if isinstance(value, Mapping):
        # pairs, since JSON would turn the whole-number keys of optimizers into text
        return {_PAIRS: [[key, _pack(item, f"{name}.{key}".lstrip("."), tensors)] for key, item in value.items()]}
    raise TypeError(f"a {type(value).__name__} cannot be saved")


def _unpack(value: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == _TENSOR:
        return tensors[content]
    if kind == _TUPLE:
        return tuple(_unpack(item, tensors) for item in content)
    if kind == _PAIRS:
        return {key: _unpack(item, tensors) for key, item in content}
    raise ValueError(f"'{kind}' is unknown")


def generator_states(device: torch.device) -> dict[str, Tensor]:
    """States of the global generators that a run on `device` may draw from (LoRA dropout is the only user)."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def restore_generators(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Restores the global generators."""
    torch.set_rng_state(states["cpu"])
    if device.type == "cuda" and "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
