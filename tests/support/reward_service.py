"""A reward server on a thread of the test, and small rewards for it."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.client import HTTPConnection
from urllib.parse import urlsplit

import torch

from fmg.core.errors import UsageError
from fmg.core.protocols import Reward
from fmg.core.types import RewardOutput
from fmg.rewards.base import checked
from fmg.rewards.service.batching import Limits
from fmg.rewards.service.server import RewardServer


class Brightness:
    """The mean of the pixels, plus the number in the prompt, if there is one."""

    def __init__(self) -> None:
        self.batches: list[int] = []
        self.gate = threading.Event()
        self.gate.set()

    def __call__(self, images: torch.Tensor, prompts: Sequence[str]) -> RewardOutput:
        """Refuses prompts that begin with `bad`, fails at those that begin with `break`."""
        self.gate.wait(30)
        self.batches.append(len(prompts))
        if any(prompt.startswith("bad") for prompt in prompts):
            raise UsageError("The prompt is bad", "Write a good one.")
        if any(prompt.startswith("break") for prompt in prompts):
            raise RuntimeError("out of order")
        numbers = torch.tensor([float(prompt) if prompt.isdigit() else 0.0 for prompt in prompts])
        means = images.mean((1, 2, 3))
        return RewardOutput(means + numbers, {"mean": means})


@contextmanager
def reward_service(
    rewards: Mapping[str, Reward], *, port: int = 0, token: str | None = None, **limits: float
) -> Iterator[RewardServer]:
    """A server of the given rewards that runs until the block ends."""
    info = {"rewards": {name: {"probe_prompt": "p"} for name in rewards}}
    server = RewardServer(
        {name: checked(name, reward) for name, reward in rewards.items()},
        info,
        host="127.0.0.1",
        port=port,
        limits=Limits(**limits),  # type: ignore[arg-type]
        token=token,
        device=torch.device("cpu"),
    )
    thread = threading.Thread(target=server.serve, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.stop()
        thread.join(30)


def call(
    url: str,
    method: str,
    path: str,
    body: bytes | Iterator[bytes] | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    try:
        connection.request(method, path, body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, {name.lower(): text for name, text in answer.getheaders()}, answer.read()
    finally:
        connection.close()
