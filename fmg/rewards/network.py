"""Rewards that are networks: loaded at the first call, run in batches, scored in fp32."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.types import RewardOutput
from fmg.rewards.model_configs import NetworkRewardConfig
from fmg.rewards.weights import Located, check_digest, locate

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
)

_CPU = torch.device("cpu")

Score = Callable[[Float[Tensor, "b 3 h w"], Sequence[str]], RewardOutput]
Files = Mapping[str, Located]
"""The files of a reward by what they are (`Asset.what`)."""

Load = Callable[[Files, torch.device, torch.dtype], Score]


class NetworkReward:
    """A reward whose network is loaded when it is first needed.

    Args:
        name: registered name, for messages.
        config: which weights, device, dtype and batch size.
        load: makes the scoring function from the files of the reward; it sees at most `batch_size` images a call.
    """

    def __init__(self, name: str, config: NetworkRewardConfig, load: Load) -> None:
        self.name = name
        self.config = config
        self._load = load
        self._score: Score | None = None
        self._lock = Lock()

    def load(self, device: torch.device = _CPU) -> None:
        """Loads the network, unless it is loaded already: to the configured device, else to `device`.

        Raises:
            MissingDependencyError: weights that have not been fetched.
            CheckpointError: weights that are damaged, of another model, or not the published ones.
            UsageError: a local source or a device that is not there.
        """
        self._loaded(device)

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1], fp32. The first call loads the network to the device of its images."""
        score, size = self._loaded(images.device), self.config.batch_size
        with torch.no_grad():
            outputs = [
                score(images[start : start + size], prompts[start : start + size])
                for start in range(0, len(prompts), size)
            ]
        if not outputs:
            return RewardOutput(torch.zeros(0), {})
        parts = {part: torch.cat([output.parts[part] for output in outputs]) for part in outputs[0].parts}
        return RewardOutput(torch.cat([output.total for output in outputs]), parts)

    def _loaded(self, device: torch.device) -> Score:
        with self._lock:
            if self._score is None:
                files = {asset.what: locate(asset, self.name) for asset in self.config.assets()}
                for located in files.values():
                    check_digest(located)
                wanted = device if self.config.device is None else _device(self.config.device, self.name)
                self._score = self._load(files, wanted, DTYPES[self.config.dtype])
            return self._score


def _device(name: str, reward: str) -> torch.device:
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"The device '{name}' of the reward '{reward}' is not there",
            f"torch sees {torch.cuda.device_count()} CUDA device(s); set device to cpu or one of them.",
        )
    return device
