"""The wire format: requests as safetensors, answers as JSON.

A request is the tensor `images` (b, 3, h, w), floats in [0, 1] or bytes, and the metadata entry `request`, a JSON text
with `prompts` and `rewards`; `rewards` may be left out, which means all.

An answer is `{"scores": {"ocr": {"total": [...], "parts": {"exact": [...]}}}}`, one number for each image. Numbers are
fp32, written so that they are read back bit for bit.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.types import RewardOutput
from fmg.registry.validation import first_problem
from fmg.rewards.images import to_bytes

SAFETENSORS = "application/x-safetensors"
PROBE_SIZE = 32

_IMAGES, _REQUEST = "images", "request"
_HEADER_BYTES = 8
_MAX_PROMPT = 100_000


@dataclass(frozen=True)
class ScoreRequest:
    """What a client requests.

    Attributes:
        images: (b, 3, h, w) in [0, 1].
        prompts: one for each image.
        rewards: names of the rewards to compute; empty for all that the server has.
    """

    images: Float[Tensor, "b 3 h w"]
    prompts: tuple[str, ...]
    rewards: tuple[str, ...]


class _Envelope(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)
    prompts: list[Annotated[str, Field(max_length=_MAX_PROMPT)]] = Field(min_length=1)
    rewards: list[str] = Field(default_factory=list)


class _PartScores(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    total: list[float]
    parts: dict[str, list[float]] = Field(default_factory=dict)


class _Answer(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)
    scores: dict[str, _PartScores]


def encode_request(request: ScoreRequest, *, exact: bool = True) -> bytes:
    """A request as safetensors; its images keep every bit, or are rounded to 8 bits per channel if not `exact`."""
    envelope = json.dumps({"prompts": request.prompts, "rewards": request.rewards})
    images = request.images.detach().to("cpu", torch.float32)
    if not exact:
        images = torch.from_numpy(to_bytes(images)).permute(0, 3, 1, 2)
    return save_tensors({_IMAGES: images.contiguous()}, metadata={_REQUEST: envelope})


def decode_request(body: bytes, *, max_images: int, max_pixels: int) -> ScoreRequest:
    """The request in a safetensors body.

    Raises:
        UsageError: not such a request, too many images, or values outside [0, 1].
    """
    try:
        length = int.from_bytes(body[:_HEADER_BYTES], "little")
        metadata = from_json(body[_HEADER_BYTES : _HEADER_BYTES + length]).get("__metadata__", {})
        envelope = _envelope(metadata[_REQUEST].encode())
        tensors = load_tensors(body)
        images = tensors[_IMAGES]
    except UsageError:
        raise
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError, OverflowError):
        raise UsageError(
            "The body is not a request in safetensors",
            f"Send the tensor '{_IMAGES}' and the metadata entry '{_REQUEST}'.",
        ) from None
    if images.ndim != 4 or images.shape[1] != 3 or not (images.is_floating_point() or images.dtype == torch.uint8):
        raise UsageError(
            f"The images are {images.dtype} shaped {tuple(images.shape)}",
            "Send (b, 3, h, w), floats in [0, 1] or bytes.",
        )
    if len(images) != len(envelope.prompts):
        what = f"There are {len(images)} images for {len(envelope.prompts)} prompts"
        raise UsageError(what, "Send one prompt for each image.")
    if len(images) > max_images:
        raise UsageError(f"There are {len(images)} images in one request", f"Send at most {max_images}.")
    if not 0 < images.shape[2] * images.shape[3] <= max_pixels:
        raise UsageError(
            f"The images have {images.shape[3]} x {images.shape[2]} pixels", f"Send 1 to {max_pixels} pixels."
        )
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    # a NaN fails both comparisons
    if not bool(((images >= 0) & (images <= 1)).all()):
        raise UsageError("The images have values outside [0, 1]", "Send floats in [0, 1].")
    return ScoreRequest(images, tuple(envelope.prompts), tuple(envelope.rewards))


def encode_scores(scores: Mapping[str, RewardOutput]) -> dict[str, object]:
    """The answer as plain JSON values. Every score is finite: the server checks its rewards."""
    return {
        "scores": {
            name: {
                "total": output.total.tolist(),
                "parts": {part: values.tolist() for part, values in output.parts.items()},
            }
            for name, output in scores.items()
        }
    }


def decode_scores(answer: object, names: Sequence[str], count: int) -> dict[str, RewardOutput]:
    """Scores by reward from an answer.

    Args:
        answer: the parsed JSON.
        names: the requested rewards.
        count: how many images were sent.

    Raises:
        ValueError: anything but `count` finite numbers for the total and every part of each reward; says what.
    """
    try:
        parsed = _Answer.model_validate(answer)
    except ValidationError:
        raise ValueError("the answer contains no scores") from None
    scores = {}
    for name in names:
        if name not in parsed.scores:
            raise ValueError(f"the answer has no scores of '{name}'")
        entry = parsed.scores[name]
        for part, values in (("total", entry.total), *entry.parts.items()):
            if len(values) != count:
                raise ValueError(f"'{name}' has {len(values)} scores ({part}) for {count} images")
            bad = next((value for value in values if not math.isfinite(value)), None)
            if bad is not None:
                raise ValueError(f"'{name}' has the score {bad} ({part})")
        parts = {part: torch.tensor(values, dtype=torch.float32) for part, values in entry.parts.items()}
        scores[name] = RewardOutput(torch.tensor(entry.total, dtype=torch.float32), parts)
    return scores


def probe_image() -> Float[Tensor, "1 3 32 32"]:
    """The image that a client has scored before a run: gradients in red and green, a square in blue."""
    ramp = torch.linspace(0, 1, PROBE_SIZE)
    square = torch.zeros(PROBE_SIZE, PROBE_SIZE)
    square[8:24, 8:24] = 1
    return torch.stack([ramp.expand(PROBE_SIZE, -1), ramp[:, None].expand(-1, PROBE_SIZE), square])[None]


def _envelope(text: bytes) -> _Envelope:
    try:
        return _Envelope.model_validate_json(text)
    except ValidationError as error:
        problem = first_problem(error, _Envelope, "The request", noun="key")
        fix = problem.fix if problem.location else "Send one JSON object, as docs/reward-service.md shows."
        raise UsageError(problem.what, fix) from None
