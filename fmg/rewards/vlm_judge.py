"""A vision-language model as the judge, behind any endpoint compatible with OpenAI's chat completions.

`yes-probability`: P(yes) / (P(yes) + P(no)) of the first answer token (Lin et al., VQAScore, arXiv 2404.01291, eq. 1,
restricted to the two answers). `score`: a rating from 1 to 5 in the answer, divided by 5, the form of UnifiedReward
(Wang et al., arXiv 2503.05236).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Sequence
from functools import partial
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, ValidationError
from torch import Tensor

from fmg.core.cache import cache_dir, optional_cache
from fmg.core.display import data_uri
from fmg.core.files import atomic_file, from_home
from fmg.core.json_io import read_object
from fmg.core.types import RewardOutput
from fmg.rewards.calls import Caller, CallError, Chunk, Reply, Server
from fmg.rewards.configs import VlmJudgeConfig
from fmg.rewards.images import to_bytes
from fmg.serving.access import secret_from

_INSTRUCTIONS = {
    "yes-probability": 'Does this picture show "{prompt}"? Answer with one word, yes or no.',
    "score": (
        'Judge how well this picture fits the caption "{prompt}" and how well it is made: are all objects, counts, '
        "colours, places and texts of the caption right, and is the picture free of flaws? Explain briefly, then end "
        "with one line of the form\nFinal Score: X\nwhere X is a number from 1 (unusable) to 5 (perfect)."
    ),
}
_FINAL_SCORE = re.compile(r"Final Score:\s*\**\s*([1-5](?:\.\d+)?)(?!\d)")
BEST_RATING = 5.0
_TOP_LOGPROBS = 20
# Marks of a leading space in the vocabularies of byte-level BPE and SentencePiece.
_SPACE_MARKS = "Ġ▁ \n"


class _Candidate(Reply):
    token: str
    logprob: float


class _Token(Reply):
    top_logprobs: tuple[_Candidate, ...]


class _Logprobs(Reply):
    content: tuple[_Token, ...] = Field(min_length=1)


class _Message(Reply):
    content: str | None = None


class _Choice(Reply):
    message: _Message
    logprobs: _Logprobs | None = None


class _Completion(Reply):
    choices: tuple[_Choice, ...] = Field(min_length=1)


class VlmJudge:
    """The judge's score in [0, 1] of each image.

    Images are sent as square PNG files (bicubic). Answers are cached on disk by everything that determines them, so
    each image is paid for once. An answer without a verdict is a failure, not a score of 0 as in other projects.

    Raises:
        UsageError: when the environment variable with the API key is named but not set.
    """

    def __init__(self, config: VlmJudgeConfig) -> None:
        self._config = config
        self._server = Server(config.url, config.timeout, secret_from(config.api_key_env, required=True))
        advice = f"Check the endpoint {config.url} and its model '{config.model}'."
        self._caller = Caller("vlm-judge", config, advice)
        self._instruction = config.instruction or _INSTRUCTIONS[config.mode]
        self._cache = from_home(config.cache) if config.cache else cache_dir() / "vlm-judge"

    def __call__(self, images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
        """Scores of images in [0, 1]; a `PartialRewardOutput` only with `on_failure: drop-group`.

        Raises:
            RewardError: when a call failed and the policy is to stop, or patience has run out.
        """
        chunks: list[Chunk] = [
            (slice(row, row + 1), partial(self._judge, pixels, prompt))
            for row, (pixels, prompt) in enumerate(zip(to_bytes(images), prompts, strict=True))
        ]
        return self._caller.gather(chunks, prompts)

    def _judge(self, pixels: NDArray[np.uint8], prompt: str) -> RewardOutput:
        body = json.dumps(self._request(pixels, prompt), sort_keys=True).encode()
        path = self._cache / f"{hashlib.sha256(self._config.url.encode() + body).hexdigest()}.json"
        score = _cached(path)
        if score is None:
            answer = self._server.post_json("/chat/completions", body)
            score = yes_probability(answer) if self._config.mode == "yes-probability" else final_score(answer)
            with optional_cache(self._cache), atomic_file(path) as file:
                file.write_text(json.dumps({"score": score, "prompt": prompt, "model": self._config.model}))
        return RewardOutput(torch.tensor([score]), {})

    def _request(self, pixels: NDArray[np.uint8], prompt: str) -> dict[str, object]:
        side = self._config.image_size
        file = BytesIO()
        Image.fromarray(pixels).resize((side, side), Image.Resampling.BICUBIC).save(file, format="PNG")
        content = [
            {"type": "image_url", "image_url": {"url": data_uri("png", file.getvalue())}},
            {"type": "text", "text": self._instruction.replace("{prompt}", prompt)},
        ]
        request: dict[str, object] = {
            "model": self._config.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        if self._config.mode == "yes-probability":
            return {**request, "max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        return {**request, "max_tokens": self._config.max_tokens}


def yes_probability(answer: object) -> float:
    """`P(yes) / (P(yes) + P(no))` of the first token, summed over spellings that differ in case and leading space.

    Raises:
        CallError: when the answer has no log-probabilities, or neither word among the likeliest tokens.
    """
    logprobs = _choice(answer).logprobs
    if logprobs is None:
        raise CallError("the endpoint returns no log-probabilities (mode score needs none)", passing=False)
    mass = {"yes": 0.0, "no": 0.0}
    for candidate in logprobs.content[0].top_logprobs:
        word = candidate.token.strip(_SPACE_MARKS).lower()
        if word in mass:
            mass[word] += math.exp(min(candidate.logprob, 0.0))
    total = mass["yes"] + mass["no"]
    if not total > 0:
        raise CallError("the judge answered neither yes nor no", passing=True)
    return mass["yes"] / total


def final_score(answer: object) -> float:
    """The number after the last `Final Score:`, from 1 to 5, divided by 5.

    Raises:
        CallError: when there is none.
    """
    rating = stated_rating(_choice(answer).message.content or "")
    if rating is None:
        raise CallError("the judge's answer has no line 'Final Score: X' with X from 1 to 5", passing=True)
    return rating / BEST_RATING


def stated_rating(text: str) -> float | None:
    """The number after the last `Final Score:`, from 1 to 5; None when there is none."""
    found = _FINAL_SCORE.findall(text)
    return float(found[-1]) if found and float(found[-1]) <= BEST_RATING else None


def _choice(answer: object) -> _Choice:
    try:
        return _Completion.model_validate(answer).choices[0]
    except ValidationError:
        raise CallError("an answer that is not a chat completion", passing=True) from None


def _cached(path: Path) -> float | None:
    """The score in a cache file; None when there is none, or only a damaged one."""
    try:
        score = read_object(path)["score"]
    except (OSError, ValueError, KeyError):
        return None
    return float(score) if isinstance(score, int | float) and 0 <= score <= 1 else None
