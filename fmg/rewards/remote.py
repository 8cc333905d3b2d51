"""The client of `fmg reward-server`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from jaxtyping import Float
from pydantic import Field, ValidationError
from torch import Tensor

from fmg.core.errors import RewardError, UsageError, suggestion
from fmg.core.types import RewardOutput
from fmg.rewards.base import weighted_sum
from fmg.rewards.calls import Caller, CallError, Chunk, Reply, Server
from fmg.rewards.configs import RemoteConfig
from fmg.rewards.service.wire import SAFETENSORS, ScoreRequest, decode_scores, encode_request, probe_image
from fmg.serving.access import secret_from


class _Served(Reply):
    probe_prompt: str


class _ServerLimits(Reply):
    max_images: int = Field(ge=1)


class _Info(Reply):
    rewards: dict[str, _Served]
    limits: _ServerLimits


class RemoteReward:
    """The weighted sum of rewards that a server computes; parts `<name>` and `<name>/<part>`, as in a mixture.

    Scoring changes nothing on the server, so a call whose answer was lost can be repeated. With the transport `tensor`
    the scores equal those of the reward in this process.

    Args:
        config: where the server is, and the limits on calls.

    Raises:
        UsageError: when the token in the environment cannot be sent.
    """

    def __init__(self, config: RemoteConfig) -> None:
        self._config = config
        self._server = Server(config.url, config.timeout, secret_from(config.token_env, required=False))
        advice = f"See the log of the server at {config.url}; the run's last checkpoint is intact."
        self._caller = Caller("remote", config, advice)
        self._weights: Mapping[str, float] | None = None
        self._batch_size = config.batch_size

    def connect(self) -> Mapping[str, float]:
        """Requests the server's list of rewards, and has each requested one score the bundled probe image.

        Returns:
            The weights of the rewards that will be requested.

        Raises:
            RewardError: it does not answer with scores.
            UsageError: it lacks a requested reward, or has several and none was chosen.
        """
        info = self._info()
        weights = self._chosen(info.rewards)
        for name in weights:
            request = ScoreRequest(probe_image(), (info.rewards[name].probe_prompt,), (name,))
            try:
                self._caller.once(partial(self._score, request, {name: 1.0}))
            except CallError as error:
                raise self._unusable(f"cannot score an image with '{name}': {error.reason}") from error
        self._weights, self._batch_size = weights, min(self._config.batch_size, info.limits.max_images)
        return weights

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]; a `PartialRewardOutput` only with `on_failure: drop-group`.

        The first call connects, if that has not been done.

        Raises:
            RewardError: when calls failed and the policy is to stop, or patience has run out.
        """
        weights = self._weights or self.connect()
        chunks: list[Chunk] = []
        for start in range(0, len(prompts), self._batch_size):
            rows = slice(start, min(start + self._batch_size, len(prompts)))
            request = ScoreRequest(images[rows], tuple(prompts[rows]), tuple(weights))
            chunks.append((rows, partial(self._score, request, weights)))
        return self._caller.gather(chunks, prompts)

    def _score(self, request: ScoreRequest, weights: Mapping[str, float]) -> RewardOutput:
        body = encode_request(request, exact=self._config.transport == "tensor")
        answer = self._server.post_json("/score", body, SAFETENSORS)
        try:
            scores = decode_scores(answer, request.rewards, len(request.prompts))
        except ValueError as error:
            raise CallError(f"an invalid answer: {error}", passing=True) from None
        return weighted_sum(scores, weights)

    def _info(self) -> _Info:
        try:
            return _Info.model_validate(self._caller.once(partial(self._server.get_json, "/info")))
        except CallError as error:
            raise self._unusable(f"does not answer: {error.reason}") from error
        except ValidationError:
            raise self._unusable("is not a reward server of fmg") from None

    def _chosen(self, served: Mapping[str, _Served]) -> Mapping[str, float]:
        for name in self._config.weights:
            if name not in served:
                raise UsageError(f"The server at {self._config.url} has no reward '{name}'", suggestion(name, served))
        if self._config.weights:
            return self._config.weights
        if len(served) != 1:
            raise UsageError(
                f"The server at {self._config.url} serves the rewards {', '.join(sorted(served)) or 'none'}",
                "Choose with the option 'weights' of the reward 'remote', such as {ocr: 1.0}.",
            )
        return dict.fromkeys(served, 1.0)

    def _unusable(self, what: str) -> RewardError:
        return RewardError(
            f"The reward server at {self._config.url} {what}",
            "Start it with `fmg reward-server --reward NAME`, and check address and token.",
        )


def remote(config: RemoteConfig) -> RemoteReward:
    """A client whose server has scored the probe image."""
    client = RemoteReward(config)
    client.connect()
    return client
