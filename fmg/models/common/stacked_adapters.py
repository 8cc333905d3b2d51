"""A base merged from a transformer and the adapters that its authors published: LoRAs, and a second-time embedder.

Files may come from PEFT, from diffusers, or be the bare state dict of a trainer, as AnyFlow, MeanFlowNFT and
SimpleTuner write them. A file must fit the transformer completely: silently ignoring a part would give another model.
Weights are merged in fp64, rounded once to the dtype of the base, and cached under the hash of everything that they
depend on. In fp64 the products are exact, and the order of the sum hardly ever changes a rounded weight. This matters
because a trained adapter is bound to the digest of the merged weights, which must be the same on another computer.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from fmg.core.cache import content_hash
from fmg.core.display import some
from fmg.core.errors import CheckpointError
from fmg.core.json_io import JsonError, parse_object, read_object
from fmg.core.specs import is_target
from fmg.models.common.adapter import add_low_rank, base_name
from fmg.models.common.converted import kept_weights, read_torch_file, write_shards
from fmg.models.common.weights import (
    FLOATS,
    Shapes,
    T,
    TensorReader,
    WeightFiles,
    check_flow_map,
    check_names,
    empty_transformer,
    folder_weights,
    load_transformer,
    stored_shapes,
    transformer_shapes,
    unreadable,
)
from fmg.models.published import LocatedAdapter

_STATE_DICT = "state_dict"
_METADATA = "lora_adapter_metadata"
_COMPONENT = "transformer"
_LORA = re.compile(r"(?P<module>.+)\.lora_(?P<side>[AB])(\.[^.]+)?\.weight")
_ALPHA = re.compile(r"(?P<module>.+)\.(lora_)?alpha")
# What wrappers put before or into a name: DDP, torch.compile and FSDP, PEFT, the pipeline
_PREFIX = re.compile(r"^(module\.|_orig_mod\.|base_model\.model\.|transformer\.)+")
_WRAPPER = re.compile(r"(_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
# Where AnyFlow and SimpleTuner put the second-time embedder, in any class
_SECOND = re.compile(r"(.*\.)?(delta_embedder|delta_timestep_embedder|delta_time_embedder)\.")
_FORMAT = 2
# With these, PEFT also changes the weights of the base, which the file does not show
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


@dataclass(frozen=True)
class _Low:
    """The LoRA of one module."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class Adapter:
    """One adapter, with the transformer's names.

    Attributes:
        low: LoRA of each adapted module.
        second: tensors of the second-time embedder; empty if the file has none.
    """

    low: Mapping[str, _Low]
    second: Mapping[str, Tensor]


def merged_weights(
    base: WeightFiles, adapters: Sequence[LocatedAdapter], wanted: Shapes, second: str | None
) -> WeightFiles:
    """The weights of a base with adapters merged into it, in the cache.

    Args:
        base: the transformer without the adapters.
        adapters: in the order in which they were trained.
        wanted: names and shapes of the transformer's tensors.
        second: path of its second-time embedder; None for a map without one.

    Raises:
        CheckpointError: a file cannot be read or does not fit the transformer.
        FmgError: the cache cannot be written.
    """
    if not adapters:
        return base
    key = _key(base, adapters, second)

    def make(partial: Path) -> None:
        stored = stored_shapes(base)
        # the embedder alone may come from the adapters
        own = {name: shape for name, shape in wanted.items() if name in stored or not _below(second, name)}
        check_names(own, stored, base.origin)
        read = [read_adapter(adapter, wanted, second) for adapter in adapters]
        write_shards(partial, _merged(base, read))

    return kept_weights(base.origin, key, make)


def load_merged(
    cls: type[T],
    config: Mapping[str, Any],
    folder: Path,
    adapters: Sequence[LocatedAdapter],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[T, WeightFiles]:
    """A flow-map transformer from a component folder with adapters merged into it, and its files.

    Args:
        cls: a class with `TwoTimeMixin`.
        config: its config, including how it takes times.
        folder: folder of the base.
        adapters: as in `merged_weights`.
        device: device of the transformer.
        dtype: dtype of its weights.

    Raises:
        CheckpointError: the files cannot be read or do not fit the transformer.
        FmgError: the cache cannot be written.
    """
    second: str = cls.second_embedder  # type: ignore[attr-defined]
    shapes = transformer_shapes(empty_transformer(cls, config, folder))
    weights = merged_weights(folder_weights(folder), adapters, shapes, second)
    check = partial(check_flow_map, second=second)
    return load_transformer(cls, config, weights, device, dtype, check), weights


def read_adapter(adapter: LocatedAdapter, wanted: Shapes, second: str | None) -> Adapter:
    """Reads the files of one adapter and checks them against the transformer. Arguments and errors as above."""
    origin, tensors = adapter.files[0], _named(adapter, second)
    pairs: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, float] = {}
    embedder: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        found = _LORA.fullmatch(name) or _ALPHA.fullmatch(name)
        _check_tensor(origin, name, tensor)
        if found and "side" in found.re.groupindex:
            pair = pairs.setdefault(found["module"], {})
            if found["side"] in pair:
                raise _misfit(origin, f"has lora_{found['side']} of {found['module']} twice, from two adapters")
            pair[found["side"]] = tensor
        elif found:
            if tensor.numel() != 1:
                raise _misfit(origin, f"has {name} with shape {tuple(tensor.shape)} instead of one number")
            alphas[found["module"]] = float(tensor)
        elif _below(second, name):
            embedder[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        what = "neither a LoRA nor the second-time embedder of this model"
        raise _misfit(origin, f"has tensors that are {what}: {some(sorted(unknown))}")
    if not pairs and not embedder:
        raise _misfit(origin, "has no LoRA")
    _check_pairs(origin, pairs, wanted)
    _check_embedder(origin, embedder, {name: shape for name, shape in wanted.items() if _below(second, name)})
    if lost := sorted(alphas.keys() - pairs.keys()):
        raise _misfit(origin, f"has an alpha but no LoRA for {some(lost)}")
    facts = _facts(adapter)
    _check_targets(origin, facts, pairs, wanted)
    scales = {module: _scale(adapter, facts, alphas.get(module), pair["A"].shape[0]) for module, pair in pairs.items()}
    return Adapter({module: _Low(pair["A"], pair["B"], scales[module]) for module, pair in pairs.items()}, embedder)


def _named(adapter: LocatedAdapter, second: str | None) -> dict[str, Tensor]:
    """The tensors of the files of an adapter, by the names that the transformer gives them."""
    tensors: dict[str, Tensor] = {}
    for file in adapter.files:
        for stated, tensor in _read(file).items():
            name = base_name(_WRAPPER.sub("", _PREFIX.sub("", stated)))
            if second is not None and (found := _SECOND.match(name)):
                name = f"{second}.{name[found.end() :]}"
            if name in tensors:
                raise _misfit(file, f"has {name} twice")
            tensors[name] = tensor
    return tensors


def _read(file: Path) -> Mapping[str, Tensor]:
    if file.suffix != ".safetensors":
        return read_torch_file(file, _STATE_DICT)
    try:
        tensors: dict[str, Tensor] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise unreadable(file, error) from error
    return tensors


def _check_tensor(origin: Path, name: str, tensor: Tensor) -> None:
    """Refuses anything but a plain tensor of finite numbers, which a torch file may contain."""
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or (tensor.dtype not in FLOATS.values() and not _ALPHA.fullmatch(name)):
        kind = str(tensor.dtype if plain else f"{tensor.layout} on {tensor.device}").replace("torch.", "")
        raise _misfit(origin, f"has {name} as {kind} instead of floating-point numbers")
    # 8-bit numbers have no such check of their own
    if not bool(torch.isfinite(tensor.float()).all()):
        raise _misfit(origin, f"has values that are not finite in {name}")


def _check_pairs(origin: Path, pairs: Mapping[str, Mapping[str, Tensor]], wanted: Shapes) -> None:
    absent = sorted(module for module in pairs if f"{module}.weight" not in wanted)
    if absent:
        raise _misfit(origin, f"adapts modules that this model does not have: {some(absent)}")
    for module in sorted(pairs):
        pair = pairs[module]
        if len(pair) != len("AB"):
            raise _misfit(origin, f"has only lora_{next(iter(pair))} of {module}")
        a, b = (tuple(pair[side].shape) for side in "AB")
        shape = wanted[f"{module}.weight"]
        if len(a) != len(b) or len(a) != len(shape) or len(shape) != len("AB"):
            raise _misfit(origin, f"has a LoRA on {module} that is not for a linear layer")
        if not a[0]:
            raise _misfit(origin, f"has a LoRA of rank 0 on {module}")
        if a[0] != b[1]:
            raise _misfit(origin, f"has rank {a[0]} in lora_A and {b[1]} in lora_B of {module}")
        if (b[0], a[1]) != shape:
            raise _misfit(origin, f"adapts a matrix {b[0]} x {a[1]} at {module}, which is {shape[0]} x {shape[1]}")


def _check_embedder(origin: Path, given: Mapping[str, Tensor], wanted: Shapes) -> None:
    if not given:
        return
    if absent := sorted(wanted.keys() - given.keys()):
        raise _misfit(origin, f"has an incomplete second-time embedder, without {some(absent)}")
    if extra := sorted(given.keys() - wanted.keys()):
        raise _misfit(origin, f"has tensors of a second-time embedder that this model does not have: {some(extra)}")
    for name, tensor in given.items():
        if tuple(tensor.shape) != wanted[name]:
            raise _misfit(origin, f"has {name} with shape {tuple(tensor.shape)} instead of {wanted[name]}")


def _facts(adapter: LocatedAdapter) -> Mapping[str, object]:
    """The LoRA settings from a PEFT config beside the file, or from the file's own metadata."""
    file = adapter.files[0]
    try:
        if adapter.config is not None:
            return read_object(adapter.config)
        if file.suffix != ".safetensors":
            return {}
        with safe_open(str(file), framework="pt") as opened:
            stated = (opened.metadata() or {}).get(_METADATA)
        whole = {} if stated is None else parse_object(stated)
    except (JsonError, OSError, SafetensorError) as error:
        raise unreadable(adapter.config or file, error) from error
    return {key.removeprefix(f"{_COMPONENT}."): value for key, value in whole.items()}


def _check_targets(origin: Path, facts: Mapping[str, object], pairs: Mapping[str, object], wanted: Shapes) -> None:
    """Refuses LoRA variants that are not a plain sum, and a file that lacks modules named in its config."""
    for key in ("use_dora", "rank_pattern", "alpha_pattern"):
        if facts.get(key):
            raise _misfit(origin, f"has a LoRA with {key}, which cannot be merged here")
    start = str(facts.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise _misfit(origin, f"has a LoRA that began with {start:.20}, which also changed its base")
    targets = facts.get("target_modules")
    if isinstance(targets, list):
        modules = (name.removesuffix(".weight") for name, shape in wanted.items() if len(shape) == len("AB"))
        if lost := sorted(name for name in modules if is_target(name, map(str, targets)) and name not in pairs):
            raise _misfit(origin, f"lacks the LoRA of {some(lost)}, which its config names")


def _scale(adapter: LocatedAdapter, facts: Mapping[str, object], alpha: float | None, rank: int) -> float:
    """alpha / rank of one module, times the factor of the recipe."""
    own = facts.get("lora_alpha") if alpha is None else alpha
    stated = adapter.stated.alpha
    if own is None:
        own = stated
    if own is not None and (isinstance(own, bool) or not isinstance(own, int | float) or own <= 0):
        raise _misfit(adapter.files[0], f"states alpha {own!r:.40}, which is not a positive number")
    if facts.get("r", rank) != rank:
        raise _misfit(adapter.files[0], f"has a LoRA of rank {rank}, but its config says {facts['r']!r:.40}")
    if own is None:
        raise CheckpointError(
            f"{adapter.files[0]} does not state the alpha of its LoRA, of rank {rank}",
            f"State its authors' value: model.adapters=[{{source: {adapter.stated.source}, alpha: ALPHA}}].",
        )
    if stated is not None and own != stated:
        raise CheckpointError(
            f"{adapter.files[0]} states alpha {own:g}, but model.adapters says {stated:g}", "Correct the wrong one."
        )
    return adapter.stated.scale * own / (math.sqrt(rank) if facts.get("use_rslora") else rank)


def _merged(base: WeightFiles, adapters: Sequence[Adapter]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the base with the adapters merged, one at a time."""
    reader = TensorReader(base.files)
    second: Mapping[str, Tensor] = {}
    low: dict[str, list[_Low]] = {}
    for adapter in adapters:
        if adapter.second:
            second = adapter.second
            # what earlier stages added to the embedder is part of it, as it was trained further
            low = {module: terms for module, terms in low.items() if f"{module}.weight" not in second}
        for module, term in adapter.low.items():
            low.setdefault(module, []).append(term)
    for name in sorted(base.files.keys() | second.keys()):
        tensor = second[name] if name in second else reader.read(name)
        terms = low.get(name.removesuffix(".weight")) if name.endswith(".weight") else None
        merged = tensor if terms is None else _sum(tensor, terms)
        if terms is not None and not bool(torch.isfinite(merged).all()):
            raise CheckpointError(
                f"{name} is not finite with model.adapters added to it", "Check their alpha, scale and files."
            )
        yield name, merged


def _sum(tensor: Tensor, terms: Sequence[_Low]) -> Tensor:
    # rounded to 8 bits, most of what was added would be lost
    dtype = torch.bfloat16 if tensor.dtype.itemsize == 1 else tensor.dtype
    a = torch.cat([term.a.double() for term in terms])
    b = torch.cat([term.scale * term.b.double() for term in terms], dim=1)
    return add_low_rank(tensor, a, b, 1.0, dtype, torch.float64)


def _key(base: WeightFiles, adapters: Sequence[LocatedAdapter], second: str | None) -> str:
    """Hash of everything that the merged weights depend on.

    Raises:
        CheckpointError: a file cannot be read, or one is named twice.
    """
    try:
        stacked = [[content_hash(file) for file in adapter.files] for adapter in adapters]
        configs = [None if adapter.config is None else content_hash(adapter.config) for adapter in adapters]
        whole = {file: content_hash(file) for file in set(base.files.values())}
    except OSError as error:
        raise unreadable(base.origin, error) from error
    if len({tuple(hashes) for hashes in stacked}) < len(stacked):
        raise CheckpointError(
            "Two of model.adapters are the same file, so its LoRA would be added twice", "Name each file once."
        )
    factors = [(adapter.stated.alpha, adapter.stated.scale) for adapter in adapters]
    files = [(name, whole[file]) for name, file in sorted(base.files.items())]
    facts = [_FORMAT, files, stacked, configs, factors, second]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _below(second: str | None, name: str) -> bool:
    return second is not None and name.startswith(f"{second}.")


def _misfit(file: Path, what: str) -> CheckpointError:
    return CheckpointError(f"The adapter {file} {what}", "Give the complete file that belongs to this model.")
