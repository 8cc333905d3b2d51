"""Rewards that are networks: loaded at the first call, run in batches, scored in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from types import MappingProxyType
from typing import Generic, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.display import counted
from fmg.core.errors import UsageError
from fmg.core.hub import Located, check_digest, locate
from fmg.core.types import RewardOutput
from fmg.rewards.model_configs import NetworkConfig

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)

_CPU = torch.device("cpu")

Score = Callable[[Float[Tensor, "b 3 h w"], Sequence[str]], RewardOutput]
Files = Mapping[str, Located]
"""The files of a reward by what they are (`Asset.what`)."""

N = TypeVar("N")
Load = Callable[[Files, torch.device, torch.dtype], N]


class LazyNetwork(Generic[N]):
    """A network that is loaded when it is first needed, once whatever the number of threads.

    Args:
        kind: kind of the component that it belongs to.
        name: registered name of that component, for messages.
        config: which weights, device and dtype.
        load: makes what runs the network from the files of the component.
    """

    def __init__(self, kind: str, name: str, config: NetworkConfig, load: Load[N]) -> None:
        self._kind = kind
        self._name = name
        self._config = config
        self._load = load
        self._loaded: N | None = None
        self._lock = Lock()

    def get(self, device: torch.device) -> N:
        """What runs the network, on the configured device, else on `device`.

        Raises:
            MissingDependencyError: weights that have not been fetched.
            CheckpointError: weights that are damaged, of another model, or not the published ones.
            UsageError: a local source or a device that is not there.
        """
        with self._lock:
            if self._loaded is None:
                files = {a.what: locate(a, self._kind, self._name) for a in self._config.assets()}
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
        load: makes the scoring function from the files of the reward; it sees at most `batch_size` images a call.
    """

    def __init__(self, name: str, config: NetworkConfig, load: Load[Score]) -> None:
        self.name = name
        self.config = config
        self._network: LazyNetwork[Score] = LazyNetwork("reward", name, config, load)

    def load(self, device: torch.device = _CPU) -> None:
        """Loads the network, unless it is loaded already; `device` and errors as in `LazyNetwork.get`."""
        self._network.get(device)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1], fp32. The first call loads the network to the device of its images."""
        score, size = self._network.get(images.device), self.config.batch_size
        with torch.no_grad():
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
            f"The device '{name}' of the {owner} is not there",
            f"torch sees {counted(torch.cuda.device_count(), 'CUDA device')}; set device to cpu or one of them.",
        )
    return device
