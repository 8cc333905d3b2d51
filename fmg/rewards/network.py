"""Rewards that are networks: reading checkpoints, loading at the first call, scoring in batches in fp32."""

from __future__ import annotations

import ast
import pickle
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from fmg.core.cache import cache_dir, content_hash, made_once, optional_cache
from fmg.core.display import counted, some
from fmg.core.errors import CheckpointError, UsageError, out_of_memory, reason
from fmg.core.hub import Located, check_digest, locate
from fmg.core.json_io import JsonError, read_object
from fmg.core.model_folder import check_no_adapter
from fmg.core.stdout_redirect import quiet
from fmg.core.types import RewardOutput
from fmg.rewards.configs import NetworkConfig
from fmg.rewards.images import check_finite, records_gradients

Tensors = Mapping[str, Tensor]

_RESTORE = "Restore the file from where it came from."
_CONVERTED = "tensors.safetensors"
_WRAPPERS = ("state_dict", "model")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.safetensors` file, or of a torch file (possibly under `state_dict` or `model`), on the CPU.

    Torch files are read with `weights_only=True`, memory-mapped where their format allows it.

    Raises:
        CheckpointError: a file that is missing, damaged, or contains anything but tensors.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", mmap=zipfile.is_zipfile(path), weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} is damaged or contains objects other than tensors, which are not loaded because they can run code",
            "Use a file of plain tensors, preferably .safetensors.",
        ) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}", _RESTORE) from error
    inner = next((loaded[key] for key in _WRAPPERS if isinstance(loaded, Mapping) and key in loaded), loaded)
    if not isinstance(inner, Mapping) or not all(isinstance(value, Tensor) for value in inner.values()):
        raise CheckpointError(f"{path} is not a mapping of names to tensors", "Use the published checkpoint file.")
    return {str(name): tensor for name, tensor in inner.items()}


def with_prefixes(
    tensors: Tensors, prefixes: Mapping[str, str], unused: tuple[str, ...], published: str
) -> dict[str, Tensor]:
    """The tensors of the published file with new prefixes for old ones, without those that start with `unused`.

    Raises:
        CheckpointError: naming the keys with another prefix.
    """
    renamed: dict[str, Tensor] = {}
    unknown = []
    for name, tensor in tensors.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if old is not None:
            renamed[prefixes[old] + name.removeprefix(old)] = tensor
        elif not name.startswith(unused):
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"The checkpoint has keys that {published} does not have: {some(unknown)}",
            f"Use the published {published}.",
        )
    return renamed


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    return {name.removeprefix(prefix): x for name, x in tensors.items() if name.startswith(prefix)}


def read_renamed(path: Path, layout: str, rename: Callable[[Tensors], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of a checkpoint under the names of `rename`.

    A torch file is converted once, into safetensors in the cache under the hash of its content and `layout`, the name
    of the renaming; if the cache cannot be written, it is converted at every read. A safetensors file is renamed while
    it is read.
    """
    if path.suffix == ".safetensors":
        return rename(read_tensors(path))
    try:
        folder = cache_dir() / "rewards" / f"{content_hash(path)}-{layout}"
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}", _RESTORE) from error

    def convert() -> dict[str, Tensor]:
        return {name: tensor.contiguous() for name, tensor in rename(read_tensors(path)).items()}

    def make(partial: Path) -> None:
        save_file(convert(), partial / _CONVERTED, metadata={"format": "pt"})

    kept: list[dict[str, Tensor]] = []
    with optional_cache():
        kept.append(read_tensors(made_once(folder, make) / _CONVERTED))
    return kept[0] if kept else convert()


def load_module(
    cls: Any,
    config: Any,
    tensors: Tensors,
    origin: Path,
    device: torch.device,
    dtype: torch.dtype,
    arguments: Mapping[str, bool] = MappingProxyType({}),
) -> Any:
    """An instance of the transformers class `cls` with exactly these tensors, in evaluation mode without gradients.

    Args:
        cls: a `PreTrainedModel` class.
        config: its config.
        tensors: tensors by their names in its state dict; `...position_ids`, which older versions stored, are ignored.
        origin: the file the tensors came from, for messages.
        device: where the module goes.
        dtype: dtype that floating-point tensors are converted to.
        arguments: further arguments of the class.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors.
    """
    wanted = {name: tensor for name, tensor in tensors.items() if not name.endswith("position_ids")}
    with quiet(transformers_logging):
        # before anything is allocated: the wrong file for a large model should not fill the memory first
        with torch.device("meta"):
            shapes = {name: tensor.shape for name, tensor in cls(config, **arguments).state_dict().items()}
        _check_same(shapes, {name: tensor.shape for name, tensor in wanted.items()}, origin)
        try:
            module, info = cls.from_pretrained(
                None, config=config, state_dict=wanted, dtype=dtype, output_loading_info=True, **arguments
            )
        except (OSError, ValueError, TypeError, KeyError, RuntimeError) as error:
            if out_of_memory(error) is not None:
                raise
            raise CheckpointError(f"{origin} does not fit its model: {reason(error)}", _RESTORE) from error
    assert not any(info[problem] for problem in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    frozen: nn.Module = module.eval().requires_grad_(False)
    return frozen.to(device)


def load_plain_module(
    make: Callable[[], Any], tensors: Tensors, origin: Path, device: torch.device, dtype: torch.dtype
) -> Any:
    """As `load_module`, for a module of ours that `make` builds.

    Raises:
        CheckpointError: missing, unexpected or wrongly shaped tensors.
    """
    with torch.device("meta"):
        module: nn.Module = make()
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    _check_same(shapes, {name: tensor.shape for name, tensor in tensors.items()}, origin)
    module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in tensors.items()}, assign=True)
    return module.eval().requires_grad_(False)


def load_pretrained(load: Callable[..., Any], folder: Path, what: str) -> Any:
    """`load(folder)` of a transformers `from_pretrained` on local files only.

    Raises:
        CheckpointError: when it cannot be loaded.
    """
    with quiet(transformers_logging):
        try:
            return load(str(folder), local_files_only=True)
        except Exception as error:
            # the tokenizers library raises bare Exception on a damaged file
            raise CheckpointError(f"The {what} in {folder} cannot be loaded: {reason(error)}", _RESTORE) from error


def check_entries(tokenizer: Any, folder: Path, rows: int, fix: str) -> None:
    """Raises a `CheckpointError` when a tokenizer has more entries than its model has embeddings."""
    if len(tokenizer) > rows:
        raise CheckpointError(f"The tokenizer in {folder} has {len(tokenizer)} entries, but the model has {rows}", fix)


def load_folder(
    cls: Any, folder: Path, what: str, config: Any, dtype: torch.dtype, *, not_used: Sequence[str] = ()
) -> Any:
    """An instance of the transformers class `cls` from a folder, in evaluation mode without gradients.

    For classes whose tensors were renamed over the years: transformers maps the names itself and reports what did not
    fit, which is checked.

    Args:
        cls: a `PreTrainedModel` class.
        folder: folder with `config.json` and weights.
        what: a name for it in messages.
        config: its config.
        dtype: dtype that floating-point tensors are converted to.
        not_used: parts of names whose absence or presence does not matter.

    Raises:
        CheckpointError: when it cannot be loaded, or tensors are missing, unexpected or wrongly shaped.
    """
    check_no_adapter(folder)
    load = partial(cls.from_pretrained, config=config, dtype=dtype, output_loading_info=True)
    model, info = load_pretrained(load, folder, what)
    for problem in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        names = [str(name) for name in info[problem] if not any(word in str(name) for word in not_used)]
        if names:
            raise CheckpointError(
                f"The {what} in {folder} has {problem.replace('_', ' ')}: {some(names)}",
                f"Use a {cls.__name__} in the layout of transformers.",
            )
    return model.eval().requires_grad_(False)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        CheckpointError: it does not contain one.
    """
    try:
        return read_object(path)
    except (OSError, JsonError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}", _RESTORE) from error


def read_python(path: Path, fix: str) -> ast.Module:
    """The syntax tree of a Python file, which is parsed and never run.

    Raises:
        CheckpointError: when it is not one; `fix` says what to do.
    """
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {reason(error)}", fix) from error


def _check_same(wanted: Mapping[str, torch.Size], given: Mapping[str, torch.Size], origin: Path) -> None:
    known = {name for name in wanted if not name.endswith("position_ids")}
    problems = {
        "lacks": known - set(given),
        "has tensors that the model does not have:": set(given) - known,
        "has tensors with different shapes than the model:": {n for n in known & set(given) if given[n] != wanted[n]},
    }
    for problem, names in problems.items():
        if names:
            raise CheckpointError(
                f"{origin} {problem} {some(names)}", "Use the checkpoint that belongs to this reward and model."
            )


HEAD_LAYERS = (0, 2, 4, 6, 7)
"""Positions of the linear layers; between them are only dropouts, so the head is affine."""


@dataclass(frozen=True)
class AffineHead:
    """`score = w . e + b`."""

    weight: Float[Tensor, " d"]
    bias: float

    def __call__(self, features: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        return features @ self.weight.to(features.device) + self.bias


def affine_head(tensors: Tensors) -> AffineHead:
    """The five linear layers `layers.N.{weight,bias}` as one affine map, multiplied in double precision.

    Raises:
        CheckpointError: other keys, or shapes that do not fit each other.
    """
    wanted = {f"layers.{layer}.{kind}" for layer in HEAD_LAYERS for kind in ("weight", "bias")}
    if wrong := wanted ^ set(tensors):
        raise CheckpointError(
            f"The head has missing or unexpected tensors: {some(wrong)}",
            "Use the published file: five linear layers called layers.0, .2, .4, .6 and .7.",
        )
    weight = torch.eye(tensors["layers.0.weight"].shape[-1], dtype=torch.float64)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    try:
        for layer in HEAD_LAYERS:
            matrix = tensors[f"layers.{layer}.weight"].double()
            weight, bias = matrix @ weight, matrix @ bias + tensors[f"layers.{layer}.bias"].double()
        return AffineHead(weight.reshape(len(tensors["layers.0.weight"][0])).float(), float(bias))
    except RuntimeError as error:
        raise CheckpointError(
            f"The layers of the head do not fit each other: {error}", "Use an undamaged file."
        ) from error


DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)

_CPU = torch.device("cpu")

Score = Callable[[Float[Tensor, "b 3 h w"], Sequence[str]], RewardOutput]
Files = Mapping[str, Located]
"""The files of a reward by `Asset.what`."""

N = TypeVar("N")
Load = Callable[[Files, torch.device, torch.dtype], N]


class LazyNetwork(Generic[N]):
    """A network that is loaded when it is first needed, once, whatever the number of threads.

    Args:
        kind: kind of the component that it belongs to.
        name: registered name of that component, for messages.
        config: which weights, device and dtype.
        load: builds the runner of the network from the files of the component.
    """

    def __init__(self, kind: str, name: str, config: NetworkConfig, load: Load[N]) -> None:
        self._kind = kind
        self._name = name
        self._config = config
        self._load = load
        self._loaded: N | None = None
        self._lock = Lock()

    def get(self, device: torch.device) -> N:
        """The runner of the network, on the configured device, else on `device`.

        Raises:
            MissingDependencyError: weights that have not been fetched.
            CheckpointError: weights that are damaged, belong to another model, or are not the published ones.
            UsageError: a local source or a device does not exist.
        """
        with self._lock:
            if self._loaded is None:
                options = self._config.source_options
                files = {a.what: locate(a, self._kind, self._name, options) for a in self._config.assets()}
                for located in files.values():
                    check_digest(located)
                configured = self._config.device
                wanted = device if configured is None else _device(configured, f"{self._kind} '{self._name}'")
                self._loaded = self._load(files, wanted, DTYPES[self._config.dtype])
            return self._loaded


class NetworkReward:
    """A reward whose network is loaded when it is first needed.

    Args:
        name: registered name, for messages.
        config: which weights, device, dtype and batch size.
        load: makes the scoring function from the files of the reward; it gets at most `batch_size` images per call.
    """

    def __init__(self, name: str, config: NetworkConfig, load: Load[Score]) -> None:
        self.name = name
        self.config = config
        self._network: LazyNetwork[Score] = LazyNetwork("reward", name, config, load)

    def load(self, device: torch.device = _CPU) -> None:
        """Loads the network unless it is loaded already; `device` and errors as in `LazyNetwork.get`."""
        self._network.get(device)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1], fp32. The first call loads the network to the device of its images.

        Scores of images that record gradients record them too, where the network is `differentiable`.
        """
        check_finite(self.name, images)
        score, size = self._network.get(images.device), self.config.batch_size
        with torch.set_grad_enabled(records_gradients(images)):
            outputs = [
                score(images[start : start + size], prompts[start : start + size])
                for start in range(0, len(prompts), size)
            ]
        if not outputs:
            return RewardOutput(torch.zeros(0), {})
        parts = {part: torch.cat([output.parts[part] for output in outputs]) for part in outputs[0].parts}
        return RewardOutput(torch.cat([output.total for output in outputs]), parts)


def _device(name: str, owner: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"The device '{name}' of the {owner} does not exist",
            f"torch sees {counted(torch.cuda.device_count(), 'CUDA device')}; set device to cpu or one of them.",
        )
    return device
