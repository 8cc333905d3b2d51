"""Options of the rewards that read text, detect objects, or ask another process. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fmg.core.hub import Asset
from fmg.registry.config import About, ComponentConfig
from fmg.rewards.model_configs import (
    CLIP_VIT_L_14,
    WEIGHT_FILES,
    NetworkConfig,
    clip_asset,
    tokenizer_asset,
)

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"

OnFailure = Literal["stop", "drop-group"]


def _http_address(value: str) -> str:
    parts = urlsplit(value)
    try:
        port = parts.port
    except ValueError:
        raise ValueError("must have a port between 0 and 65535") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError("must be an address such as http://127.0.0.1:8765")
    if parts.username or parts.query or parts.fragment:
        raise ValueError("must have neither user, query nor fragment; secrets belong in an environment variable")
    return value.rstrip("/")


HttpAddress = Annotated[str, AfterValidator(_http_address)]
_SENDS_PICTURES = "sends pictures and prompts over the network"
_SENDS_SECRET = "sends the content of an environment variable over the network"
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class GenEvalConfig(NetworkConfig):
    """GenEval: are the objects of the prompt there, as many, in their colours, at their places?"""

    about: ClassVar[About] = About(
        licence="MIT (rules); MIT (Mask2Former); MIT (code of CLIP)",
        citation="Ghosh et al., GenEval, arXiv 2310.11513; Cheng et al., Mask2Former, arXiv 2112.01527",
        weights=(f"{MASK2FORMER} (275 MB)", f"{CLIP_VIT_L_14} (1.7 GB)"),
    )

    score: Literal["dense", "strict", "correct"] = Field(
        default="dense",
        description="the total: dense partial credit, strict (exact counts), or correct, the benchmark's own verdict",
    )
    metadata: str | None = Field(
        default=None,
        description="GenEval metadata .jsonl that says what each prompt asks for; by default the prompt is parsed",
    )
    detector: str = Field(
        default=MASK2FORMER,
        min_length=1,
        description="Mask2Former for instances of the 80 COCO classes: local folder or hub id@revision",
    )
    clip: str = Field(
        default=CLIP_VIT_L_14,
        min_length=1,
        description="CLIPModel folder with its tokenizer, which names colours: local or hub id@revision",
    )
    threshold: float = Field(default=0.3, ge=0, le=1, description="detections must score above this")
    counting_threshold: float = Field(default=0.9, ge=0, le=1, description="the same for prompts that count")
    position_threshold: float = Field(
        default=0.1, ge=0, description="share of the two sizes by which centres must be apart to stand in a relation"
    )
    max_objects: int = Field(default=16, ge=1, description="objects kept of each class")
    batch_size: int = Field(default=8, ge=1, description="images for one pass of the detector")

    def assets(self) -> tuple[Asset, ...]:
        """Detector, CLIP and its tokenizer."""
        detector = (WEIGHT_FILES, "config.json", "preprocessor_config.json")
        return (
            Asset("detector", "detector", self.detector, detector, size_gb=0.275, licence="MIT"),
            clip_asset(self.clip, option="clip"),
            tokenizer_asset(self.clip, option="clip"),
        )


_PP_OCR = About(
    licence="Apache-2.0 (rapidocr and the PP-OCR networks in it)",
    citation="Cui et al., PaddleOCR 3.0, arXiv 2507.05595; rule: Liu et al., Flow-GRPO, arXiv 2505.05470",
    weights=("in the wheel of rapidocr (32 MB); nothing is downloaded",),
)


class OcrConfig(ComponentConfig):
    """Text of the whole picture against the text that the prompt quotes, by edit distance."""

    about: ClassVar[About] = _PP_OCR

    limit_side_len: int | None = Field(
        default=None,
        ge=32,
        description="the detector enlarges pictures to this shortest side; by default 192 up to 256 px, else 736",
    )
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="lines read with less are left out")
    threads: int = Field(default=1, ge=1, description="CPU threads of the networks")


class OcrLogpConfig(ComponentConfig):
    """Log-probability that the recogniser reads the quoted text, per character; for strips that hold one line."""

    about: ClassVar[About] = _PP_OCR

    floor: float = Field(default=-20.0, lt=0, description="least score of a character, in nats")
    model: str | None = Field(
        default=None, description="recogniser (.onnx with its alphabet inside); by default the one that rapidocr ships"
    )
    batch_size: int = Field(default=32, ge=1, description="pictures a forward pass")
    threads: int = Field(default=1, ge=1, description="CPU threads of the network")


class CallConfig(ComponentConfig):
    """How calls over a network are bounded."""

    timeout: float = Field(default=60.0, gt=0, description="seconds that one attempt may take, all in all")
    retries: int = Field(default=4, ge=0, le=100, description="further attempts after a failure that may pass")
    backoff: float = Field(default=0.5, ge=0, description="seconds before the second attempt; doubles every time")
    max_backoff: float = Field(default=30.0, ge=0, description="longest wait, also when the server asks for more")
    concurrency: int = Field(default=4, ge=1, le=256, description="calls at a time")
    on_failure: OnFailure = Field(
        default="stop", description="when every attempt failed: stop the run, or drop the prompt groups concerned"
    )
    patience: int = Field(
        default=3, ge=1, description="batches in a row without a single score after which drop-group stops as well"
    )


class VlmJudgeConfig(CallConfig):
    """A vision-language model behind an OpenAI-compatible endpoint as the judge."""

    needs_consent: ClassVar[Mapping[str, str]] = {"url": _SENDS_PICTURES, "api_key_env": _SENDS_SECRET}

    url: HttpAddress = Field(description="address of the API, such as http://127.0.0.1:8000/v1")
    model: str = Field(min_length=1, description="name of the model at that endpoint")
    mode: Literal["yes-probability", "score"] = Field(
        default="yes-probability",
        description="P(yes) / (P(yes) + P(no)) of the first token, or a rating of 1 to 5 divided by 5",
    )
    instruction: str | None = Field(
        default=None,
        pattern=r"\{prompt\}",
        description="the question, with {prompt} where the prompt goes; by default the mode's own",
    )
    image_size: int = Field(default=512, ge=16, le=4096, description="side of the square picture that is sent")
    max_tokens: int = Field(default=512, ge=1, description="longest answer in tokens (mode score)")
    api_key_env: EnvironmentName | None = Field(
        default=None, description="environment variable that holds the API key; by default none is sent"
    )
    cache: str | None = Field(
        default=None, description="folder for answers, one JSON file each; by default below the cache folder of fmg"
    )


class RemoteConfig(CallConfig):
    """Rewards computed by `fmg reward-server`."""

    needs_consent: ClassVar[Mapping[str, str]] = {"url": _SENDS_PICTURES, "token_env": _SENDS_SECRET}

    url: HttpAddress = Field(description="address of the server, such as http://127.0.0.1:8765")
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of each reward of the server; empty: the only one it has, once"
    )
    transport: Literal["tensor", "png"] = Field(
        default="tensor", description="pictures go as exact floats, or as 8-bit PNG, which is smaller"
    )
    batch_size: int = Field(default=16, ge=1, description="images a call")
    token_env: EnvironmentName = Field(
        default="FMG_REWARD_TOKEN", description="environment variable that holds the server's token, if it asks for one"
    )
