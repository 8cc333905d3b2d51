"""A folder with one model as diffusers and transformers write it: its `config.json`, and the file of its weights.

Standard library only. A folder can come from anyone: numbers that would fill the memory, names that lead out of the
folder, and files by which a library would silently read something else are refused before a library sees them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from fmg.core.errors import CheckpointError, reason
from fmg.core.files import inside
from fmg.core.json_io import JsonError, read_object

CONFIG = "config.json"
MAX_LAYERS = 1000
"""Maximum layers, and maximum entries of a list, in a `config.json`."""
MAX_NUMBER = 2**27
"""Largest integer in a `config.json`: tables of that size are allocated before a weight is read."""

RESTORE = "Restore the folder from where the model came from."
_INDEX = ".index.json"
_SUFFIX = ".safetensors"
_LAYERS = re.compile("layers|blocks|depth")
_ATTENTION = re.compile(r"_?attn_implementation(_internal)?")
_OWN_ATTENTION = ("eager", "sdpa", "flash_attention_2", "flex_attention")
# name.fp16.safetensors, name.safetensors.index.fp16.json, and both ways to name a shard of a variant
_VARIANT = re.compile(
    r"(?:\.(?P<one>[^.]+)|-\d+-of-\d+\.(?P<late>[^.]+)|\.(?P<early>[^.]+)-\d+-of-\d+)\.safetensors"
    r"|\.safetensors\.index\.(?P<index>[^.]+)\.json"
)


def read_config(folder: Path) -> dict[str, object]:
    """The `config.json` of a folder.

    Raises:
        CheckpointError: it is missing, is not a JSON object, has a number that is out of bounds, or makes a library
            read other weights or code.
    """
    file = folder / CONFIG
    try:
        config = read_object(file)
    except FileNotFoundError:
        raise CheckpointError(f"{file} {_missing(file)}", RESTORE) from None
    except (JsonError, OSError) as error:
        raise CheckpointError(f"{file} cannot be used: {reason(error)}", RESTORE) from None
    for key, value in config.items():
        _check_value(file, key, value)
    return config


def stated_config(folder: Path) -> dict[str, object] | None:
    """As `read_config`; None if there is no such file yet.

    Raises:
        CheckpointError: as `read_config`.
    """
    return read_config(folder) if (folder / CONFIG).is_file() else None


def whole(config: Mapping[str, object], key: str, least: int = 1) -> int:
    """The whole number under a key, which is at least `least`.

    Raises:
        CheckpointError: it is missing or something else.
    """
    value = config.get(key)
    if type(value) is not int or value < least:
        raise CheckpointError(
            f"The config of the model has {value!r:.60} for {key} instead of a whole number of {least} or more", RESTORE
        )
    return value


def wholes(config: Mapping[str, object], key: str) -> list[int] | None:
    """The list of positive whole numbers under a key, which is not empty; None where the key is missing or null.

    Raises:
        CheckpointError: it is something else.
    """
    value = config.get(key)
    if value is None:
        return None
    if not isinstance(value, list) or not value or any(type(entry) is not int or entry < 1 for entry in value):
        raise CheckpointError(
            f"The config of the model has {value!r:.60} for {key} instead of a list of whole numbers", RESTORE
        )
    return value


def main_weights(folder: Path) -> Path:
    """The file that a folder's weights are in, or the index of its shards, as its library would choose it.

    Text encoders, and folders whose config names `architectures`, come from transformers, which calls the weights
    `model` and prefers a single file; everything else comes from diffusers, which calls them
    `diffusion_pytorch_model` and prefers an index. Files of a variant, such as
    `diffusion_pytorch_model.fp16.safetensors`, are never read in place of the main one.

    Raises:
        CheckpointError: there is no such file; names the variants that exist.
    """
    for name in _main_names(folder):
        if (folder / name).is_file():
            return folder / name
    raise _no_weights(folder)


def absent_weights(folder: Path) -> list[str]:
    """Names of the weight files that a folder lacks, with what it contains instead; empty when it is complete.

    Raises:
        CheckpointError: an index cannot be used.
    """
    try:
        main = main_weights(folder)
    except CheckpointError:
        variants = _variants(folder)
        has = f" (it has the variant {', '.join(variants)})" if variants else ""
        return [f"{_single(folder)}{has}"]
    if not main.name.endswith(_INDEX):
        return []
    return sorted({file.name for file in weight_map(main).values() if not file.is_file()})


def weight_files(folder: Path) -> list[Path]:
    """The main file of a folder's weights, or its shards, in the order of their names.

    Raises:
        CheckpointError: as `main_weights` and `weight_map`.
    """
    main = main_weights(folder)
    return sorted(set(weight_map(main).values())) if main.name.endswith(_INDEX) else [main]


def weight_map(index: Path) -> dict[str, Path]:
    """The file of each tensor by the index of a sharded model.

    Raises:
        CheckpointError: the index is damaged, or names a file outside its folder.
    """
    try:
        shards = read_object(index).get("weight_map")
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{index} cannot be used: {reason(error)}", RESTORE) from None
    if not isinstance(shards, dict) or not shards:
        raise CheckpointError(f"{index} cannot be used: it has no weight_map", RESTORE)
    return {name: inside(index.parent, file, named_in=index, links=True) for name, file in shards.items()}


def check_no_adapter(folder: Path) -> None:
    """Whether transformers would read the folder itself, not the model that an adapter in it names.

    Raises:
        CheckpointError: the folder contains an adapter.
    """
    if (file := folder / "adapter_config.json").exists():
        raise CheckpointError(
            f"{file} marks this folder as an adapter for another model", "Merge the adapter, or remove its files."
        )


def _main_names(folder: Path) -> tuple[str, str]:
    single = _single(folder)
    return (single, single + _INDEX) if _of_transformers(folder) else (single + _INDEX, single)


def _single(folder: Path) -> str:
    return f"{'model' if _of_transformers(folder) else 'diffusion_pytorch_model'}{_SUFFIX}"


def _of_transformers(folder: Path) -> bool:
    if folder.name.startswith("text_encoder"):
        return True
    try:
        return "architectures" in read_object(folder / CONFIG)
    except (OSError, JsonError):
        return False


def _variants(folder: Path) -> list[str]:
    stem = _single(folder).removesuffix(_SUFFIX)
    found = set()
    for file in folder.glob(f"{stem}*"):
        if match := _VARIANT.fullmatch(file.name.removeprefix(stem)):
            found.add(next(variant for variant in match.groups() if variant is not None))
    return sorted(found)


def _no_weights(folder: Path) -> CheckpointError:
    name = _single(folder)
    if (folder / name).is_symlink():
        return CheckpointError(f"{folder / name} {_missing(folder / name)}", RESTORE)
    if variants := _variants(folder):
        return CheckpointError(
            f"{folder} has no {name}, only the variant {', '.join(variants)}",
            f"Choose a variant and link or rename its file to {name}; none is chosen automatically.",
        )
    if others := sorted(file.name for file in folder.glob(f"*{_SUFFIX}")):
        return CheckpointError(f"{folder} has no {name}; it has {', '.join(others[:5])}", f"Name the weights {name}.")
    return CheckpointError(
        f"{folder} has no {name}", f"Other formats are not read, because a pickle can run code. {RESTORE}"
    )


def _missing(file: Path) -> str:
    return f"is a link to {file.readlink()}, which does not exist" if file.is_symlink() else "is missing"


def _check_value(file: Path, key: str, value: object) -> None:
    if isinstance(value, int) and not isinstance(value, bool):
        most = MAX_LAYERS if _LAYERS.search(key) else MAX_NUMBER
        if abs(value) > most:
            raise CheckpointError(f"{file} has {value!s:.30} for {key}, but at most {most} is supported", RESTORE)
    elif isinstance(value, list) and len(value) > MAX_LAYERS:
        raise CheckpointError(
            f"{file} has {len(value)} entries in {key}, but at most {MAX_LAYERS} are supported", RESTORE
        )
    elif _ATTENTION.fullmatch(key) and value is not None and value not in _OWN_ATTENTION:
        # another name is a repository, whose code transformers would fetch and run
        raise CheckpointError(
            f"{file} sets {key} to {value!r:.60}, which would run code from elsewhere", "Remove the key."
        )
    elif key == "quantization_config":
        raise CheckpointError(f"{file} says that the weights are quantised", "Give weights in fp32, bf16 or fp16.")
    for inner, entry in value.items() if isinstance(value, dict) else ():
        _check_value(file, f"{key}.{inner}", entry)
    for entry in value if isinstance(value, list) else ():
        _check_value(file, key, entry)
