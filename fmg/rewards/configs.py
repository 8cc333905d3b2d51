"""Options of the rewards. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fmg.core.hub import Asset
from fmg.registry.config import About, ComponentConfig
from fmg.rewards.published import (
    AESTHETIC_HEAD,
    BERT,
    CLIP_TERMS,
    CLIP_VIT_B_32,
    CLIP_VIT_H_14,
    CLIP_VIT_L_14,
    DEQA,
    DEQA_TERMS,
    GENEVAL2,
    HPSV2,
    HPSV3,
    HPSV3_PACKAGE,
    IMAGEREWARD,
    MASK2FORMER,
    PICKSCORE,
    PICKSCORE_TERMS,
    QWEN2_VL,
    QWEN3_VL,
    SHA256,
    UNIFIEDREWARD,
    UNIFIEDREWARD_WORDINGS,
    WEIGHT_FILES,
    clip_asset,
    qwen_vl_asset,
    tokenizer_asset,
)


class JpegConfig(ComponentConfig):
    """Size of an image as a JPEG file."""

    judges: ClassVar[bool] = False

    quality: int = Field(default=95, ge=1, le=100, description="JPEG quality")


class PythonRewardConfig(ComponentConfig):
    """A function of your own: `fn(images (b, 3, h, w) in [0, 1], prompts) -> (b,)`."""

    needs_consent: ClassVar[Mapping[str, str]] = {"target": "runs Python code"}

    target: str = Field(
        pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$",
        description="module:function, looked up in the working directory and the installed packages",
    )
    gradient: bool = Field(
        default=False,
        description="whether the scores have a gradient, because the function computes them from the images with torch"
        " alone; for the objective reward-gradient",
    )

    @property
    def has_gradient(self) -> bool:
        return self.gradient


class FunctionRewardConfig(ComponentConfig):
    """A function passed to a Python call: `fmg.train(..., rewards=[my_function])`. A recipe records its name."""

    function: str = Field(pattern=r"^\w+$", max_length=100, description="name of the function")


OnFailure = Literal["stop", "drop-group"]


class NetworkConfig(ComponentConfig, ABC):
    """Options that all networks share."""

    device: str | None = Field(
        default=None,
        pattern=r"^(cpu|cuda(:\d+)?)$",
        description="where the network runs: cpu, cuda or cuda:N; by default the device of the first images",
    )
    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="precision of the weights")
    batch_size: int = Field(default=16, ge=1, description="images per pass of the network")

    @abstractmethod
    def assets(self) -> tuple[Asset, ...]:
        """As in `ComponentConfig`; required for a network."""


class Hpsv2Config(NetworkConfig):
    """HPSv2: cosine of image and prompt under a CLIP tuned to human preferences (about 0.2 to 0.35)."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence="Apache-2.0 (code and weights)",
        citation="Wu et al., Human Preference Score v2, arXiv 2306.09341",
        weights=(f"{HPSV2}: HPS_v2.1_compressed.pt or HPS_v2_compressed.pt (4 GB)", f"{CLIP_VIT_H_14}: tokenizer"),
    )

    version: Literal["v2.1", "v2.0"] = Field(default="v2.1", description="which of the two published checkpoints")
    weights: str = Field(
        default=HPSV2,
        min_length=1,
        description="checkpoint in OpenCLIP's layout (with its open_clip_config.json if it is not ViT-H-14), or a "
        "CLIPModel folder: local path or hub id@revision",
    )
    tokenizer: str = Field(
        default=CLIP_VIT_H_14, min_length=1, description="CLIP tokenizer: local folder or hub id@revision"
    )

    def assets(self) -> tuple[Asset, ...]:
        name = "HPS_v2.1_compressed.pt" if self.version == "v2.1" else "HPS_v2_compressed.pt"
        files = (f"{name}|open_clip_model.safetensors|{WEIGHT_FILES}",)
        more = ("open_clip_config.json", "config.json")
        sha256 = SHA256.get((self.weights, name))
        return (
            Asset("checkpoint", "weights", self.weights, files, more, sha256=sha256, size_gb=3.9, licence="Apache-2.0"),
            tokenizer_asset(self.tokenizer),
        )


class PickScoreConfig(NetworkConfig):
    """PickScore: `exp(logit_scale) cos(image, prompt)`, about 17 to 24, by default divided by 26."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence=PICKSCORE_TERMS,
        citation="Kirstain et al., Pick-a-Pic, arXiv 2305.01569",
        weights=(f"{PICKSCORE}: model.safetensors (4 GB)", f"{CLIP_VIT_H_14}: tokenizer"),
    )

    weights: str = Field(default=PICKSCORE, min_length=1, description="CLIPModel folder: local or hub id@revision")
    tokenizer: str = Field(
        default=CLIP_VIT_H_14, min_length=1, description="CLIP tokenizer: local folder or hub id@revision"
    )
    normalize: bool = Field(
        default=True, description="divide by 26, as Flow-GRPO and MeanFlowNFT do; false: PickScore as published"
    )

    def assets(self) -> tuple[Asset, ...]:
        return (clip_asset(self.weights), tokenizer_asset(self.tokenizer))


class ClipScoreConfig(NetworkConfig):
    """CLIPScore in one of the four ways the name is used."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence=CLIP_TERMS,
        citation="Hessel et al., CLIPScore, arXiv 2104.08718; Radford et al., CLIP, arXiv 2103.00020",
        weights=(f"{CLIP_VIT_L_14} (1.7 GB)", f"{CLIP_VIT_B_32} for the variant hessel (0.6 GB)"),
    )

    variant: Literal["cosine", "diffusion-nft", "hessel", "torchmetrics"] = Field(
        default="cosine",
        description="cosine: cos; diffusion-nft: logits / 100 after a bilinear resize, as there and in MeanFlowNFT; "
        "hessel: 2.5 max(cos, 0) with the prefix 'A photo depicts' and ViT-B/32; torchmetrics: max(100 cos, 0)",
    )
    weights: str | None = Field(
        default=None,
        min_length=1,
        description="CLIPModel folder with its tokenizer: local or hub id@revision; by default OpenAI's ViT-L/14, for "
        "hessel ViT-B/32",
    )
    scale: float = Field(default=1.0, description="factor on the score")

    def assets(self) -> tuple[Asset, ...]:
        source = self.weights or (CLIP_VIT_B_32 if self.variant == "hessel" else CLIP_VIT_L_14)
        return (clip_asset(source), tokenizer_asset(source, option="weights"))


class AestheticConfig(NetworkConfig):
    """LAION's aesthetic score (about 1 to 10): an affine function of the CLIP embedding; does not see the prompt."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence="Apache-2.0 (head); MIT (code of CLIP)",
        citation="Schuhmann, improved-aesthetic-predictor, 2022; Schuhmann et al., LAION-5B, arXiv 2210.08402",
        weights=("sac+logos+ava1-l14-linearMSE.pth (3.7 MB), pinned by its sha256", f"{CLIP_VIT_L_14} (1.7 GB)"),
    )

    weights: str = Field(default=CLIP_VIT_L_14, min_length=1, description="CLIPModel folder: local or hub id@revision")
    head: str = Field(default=AESTHETIC_HEAD, min_length=1, description="the five linear layers: local file or URL")

    def assets(self) -> tuple[Asset, ...]:
        name = "sac+logos+ava1-l14-linearMSE.pth"
        return (
            clip_asset(self.weights),
            Asset(
                "head",
                "head",
                self.head,
                (name,),
                sha256=SHA256.get((self.head, name)),
                size_gb=0.0037,
                licence="Apache-2.0",
            ),
        )


class ImageRewardConfig(NetworkConfig):
    """ImageReward: a BLIP that reads prompt and image together; mean 0 and std 1 on its authors' data."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence="Apache-2.0 (code and weights)",
        citation="Xu et al., ImageReward, arXiv 2304.05977",
        weights=(f"{IMAGEREWARD}: ImageReward.pt (1.8 GB), med_config.json", f"{BERT}: tokenizer"),
    )

    weights: str = Field(
        default=IMAGEREWARD,
        min_length=1,
        description="folder with ImageReward.pt and med_config.json, or the first with the second beside it: local or "
        "hub id@revision",
    )
    tokenizer: str = Field(
        default=BERT, min_length=1, description="tokenizer of bert-base-uncased: local folder or hub id@revision"
    )
    vision_heads: int | None = Field(
        default=None,
        ge=1,
        description="attention heads of the image encoder, which the weights do not show; null: those of BLIP's "
        "published sizes, 12 at a width of 768 and 16 at 1024",
    )

    def assets(self) -> tuple[Asset, ...]:
        return (
            Asset(
                "checkpoint",
                "weights",
                self.weights,
                ("ImageReward.pt", "med_config.json"),
                size_gb=1.8,
                licence="Apache-2.0",
            ),
            tokenizer_asset(self.tokenizer, licence="Apache-2.0"),
        )


class Hpsv3Config(NetworkConfig):
    """HPSv3: the mean of the preference score that a tuned Qwen2-VL-7B predicts; part `log_sigma`."""

    differentiable: ClassVar[bool] = True
    about: ClassVar[About] = About(
        licence="MIT (code); Apache-2.0 (weights and base model)",
        citation="Ma et al., HPSv3: Towards Wide-Spectrum Human Preference Score, arXiv 2508.03789",
        weights=(f"{HPSV3}: HPSv3.safetensors (17 GB)", f"{QWEN2_VL}: config and tokenizer, no weights"),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(
        default="bf16", description="precision of the weights; the head stays in fp32"
    )
    batch_size: int = Field(default=4, ge=1, description="images per pass of the network")
    weights: str = Field(default=HPSV3, min_length=1, description="HPSv3.safetensors: local path or hub id@revision")
    base: str = Field(
        default=QWEN2_VL,
        min_length=1,
        description="config.json and tokenizer of Qwen2-VL-7B-Instruct: local folder or hub id@revision",
    )
    instruction: str = Field(
        default=HPSV3_PACKAGE,
        min_length=1,
        description="source of the wording that the model was tuned with: the installed package hpsv3, whose "
        "code is not run, or a local copy of its data_collator_qwen.py",
    )

    def assets(self) -> tuple[Asset, ...]:
        more = ("tokenizer_config.json", "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json")
        return (
            Asset("checkpoint", "weights", self.weights, ("HPSv3.safetensors",), size_gb=17.0, licence="Apache-2.0"),
            Asset(
                "base",
                "base",
                self.base,
                ("config.json", "tokenizer.json|vocab.json"),
                more,
                size_gb=0.012,
                licence="Apache-2.0",
            ),
            Asset(
                "instruction",
                "instruction",
                self.instruction,
                ("hpsv3/dataset/data_collator_qwen.py",),
                licence="MIT",
            ),
        )


class DeqaConfig(NetworkConfig):
    """DeQA-Score: expected rating of an image's quality from 1 to 5, divided by 5; does not see the prompt."""

    about: ClassVar[About] = About(
        licence=DEQA_TERMS,
        citation="You et al., Teaching Large Language Models to Regress Accurate Image Quality Scores using Score "
        "Distribution, arXiv 2501.11561; Ye et al., mPLUG-Owl2, arXiv 2311.04257",
        weights=(f"{DEQA} (16 GB)",),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp16", description="precision of the weights")
    batch_size: int = Field(default=8, ge=1, description="images per pass of the network")
    weights: str = Field(
        default=DEQA, min_length=1, description="folder of a DeQA-Score (mPLUG-Owl2): local or hub id@revision"
    )

    def assets(self) -> tuple[Asset, ...]:
        return (
            Asset(
                "weights",
                "weights",
                self.weights,
                folders=(".",),
                patterns=("*.safetensors", "*.json"),
                size_gb=16.4,
                licence=DEQA_TERMS,
            ),
        )


class UnifiedRewardConfig(NetworkConfig):
    """UnifiedReward: a Qwen-VL tuned to rate images writes ratings from 1 to 5; the score is their mean over 5."""

    about: ClassVar[About] = About(
        licence="MIT (code and weights); Apache-2.0 (base model)",
        citation="Wang et al., Unified Reward Model for Multimodal Understanding and Generation, arXiv 2503.05236",
        weights=(f"{UNIFIEDREWARD} (18 GB)", "the wording: one script of the authors, which is not run"),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="bf16", description="precision of the weights")
    batch_size: int = Field(default=16, ge=1, description="images per pass of the network")
    form: Literal["axes", "final-score"] = Field(
        default="axes",
        description="what is asked for: alignment, coherence and style (UnifiedReward 2.0), or one final score after a "
        "list of what the image shows (every version)",
    )
    weights: str = Field(
        default=UNIFIEDREWARD,
        min_length=1,
        description="folder of a UnifiedReward on Qwen2.5-VL or Qwen3-VL: local or hub id@revision",
    )
    instruction: str | None = Field(
        default=None,
        min_length=1,
        description="source of the wording: a local copy of the authors' script, or a text file with {prompt} where "
        "the prompt goes; by default the authors' script for the form",
    )
    max_tokens: int = Field(default=512, ge=1, description="longest answer in tokens")
    on_failure: OnFailure = Field(
        default="stop",
        description="when an answer has no rating: stop the run, or drop the affected prompt groups",
    )
    patience: int = Field(
        default=3, ge=1, description="consecutive batches without any score after which drop-group stops as well"
    )

    def assets(self) -> tuple[Asset, ...]:
        wording = self.instruction or UNIFIEDREWARD_WORDINGS[self.form]
        name = UNIFIEDREWARD_WORDINGS[self.form].rpartition("/")[2]
        sha256 = SHA256.get((wording, name))
        return (
            qwen_vl_asset(self.weights, "MIT"),
            Asset("instruction", "instruction", wording, (name,), sha256=sha256, size_gb=0.000002, licence="MIT"),
        )


class GenEval2Config(NetworkConfig):
    """GenEval 2 by Soft-TIFA: the probability that a Qwen3-VL answers every question about the prompt as expected."""

    about: ClassVar[About] = About(
        licence="CC BY-NC 4.0 (questions: no commercial use); Apache-2.0 (Qwen3-VL)",
        citation="Kamath et al., GenEval 2: Addressing Benchmark Drift in Text-to-Image Evaluation, arXiv 2512.16853",
        weights=(f"{QWEN3_VL} (18 GB)", "geneval2_data.jsonl (0.4 MB), pinned by its sha256"),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="bf16", description="precision of the weights")
    batch_size: int = Field(default=16, ge=1, description="questions about an image per pass of the network")
    mean: Literal["geometric", "arithmetic"] = Field(
        default="geometric",
        description="over the questions about a prompt: geometric (Soft-TIFA GM, for prompts) or arithmetic (AM)",
    )
    weights: str = Field(
        default=QWEN3_VL, min_length=1, description="folder of a Qwen-VL that answers: local or hub id@revision"
    )
    questions: str = Field(
        default=GENEVAL2,
        min_length=1,
        description="prompts with their questions and answers, in the form of GenEval 2's .jsonl: local file or URL",
    )
    metadata: str | None = Field(
        default=None, description="a second .jsonl in this form, with questions about your own prompts"
    )

    def assets(self) -> tuple[Asset, ...]:
        name = "geneval2_data.jsonl"
        sha256 = SHA256.get((self.questions, name))
        return (
            qwen_vl_asset(self.weights, "Apache-2.0"),
            Asset(
                "questions", "questions", self.questions, (name,), sha256=sha256, size_gb=0.0004, licence="CC BY-NC 4.0"
            ),
        )


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
_SENDS_IMAGES = "sends images and prompts over the network"
_SENDS_SECRET = "sends the content of an environment variable over the network"
EnvironmentName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]


class GenEvalConfig(NetworkConfig):
    """GenEval: do the prompt's objects appear, in the right number, colours and places?"""

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
    threshold: float = Field(default=0.3, ge=0, le=1, description="keep only detections that score higher")
    counting_threshold: float = Field(
        default=0.9, ge=0, le=1, description="the same for prompts that give a number of objects"
    )
    position_threshold: float = Field(
        default=0.1,
        ge=0,
        description="how far apart centres must be for a relation to count, as a share of the two sizes",
    )
    max_objects: int = Field(default=16, ge=1, description="maximum number of objects kept per class")
    batch_size: int = Field(default=8, ge=1, description="images per pass of the detector")

    def assets(self) -> tuple[Asset, ...]:
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
    """All text in the image against the text that the prompt quotes, by edit distance."""

    about: ClassVar[About] = _PP_OCR

    limit_side_len: int | None = Field(
        default=None,
        ge=32,
        description="the detector enlarges images to this shortest side; by default 192 up to 256 px, else 736",
    )
    min_confidence: float = Field(default=0.5, ge=0, le=1, description="lines read with less confidence are left out")
    threads: int = Field(default=1, ge=1, description="CPU threads of the networks")


class OcrLogpConfig(ComponentConfig):
    """Log-probability that the recogniser reads the quoted text, per character; for strips with one line."""

    about: ClassVar[About] = _PP_OCR

    floor: float = Field(default=-20.0, lt=0, description="minimum score of a character, in nats")
    model: str | None = Field(
        default=None, description="recogniser (.onnx with its alphabet inside); by default the one that rapidocr ships"
    )
    batch_size: int = Field(default=32, ge=1, description="images per pass of the network")
    threads: int = Field(default=1, ge=1, description="CPU threads of the network")


class CallConfig(ComponentConfig):
    """Limits on calls over the network."""

    timeout: float = Field(default=60.0, gt=0, description="seconds that one attempt may take in total")
    retries: int = Field(default=4, ge=0, le=100, description="further attempts after a temporary failure")
    backoff: float = Field(default=0.5, ge=0, description="seconds before the second attempt; doubles every time")
    max_backoff: float = Field(default=30.0, ge=0, description="longest wait, even if the server asks for a longer one")
    concurrency: int = Field(default=4, ge=1, le=256, description="maximum number of concurrent calls")
    on_failure: OnFailure = Field(
        default="stop", description="after the last failed attempt: stop the run, or drop the affected prompt groups"
    )
    patience: int = Field(
        default=3, ge=1, description="consecutive batches without any score after which drop-group stops as well"
    )


class VlmJudgeConfig(CallConfig):
    """A vision-language model behind an OpenAI-compatible endpoint as the judge."""

    needs_consent: ClassVar[Mapping[str, str]] = {"url": _SENDS_IMAGES, "api_key_env": _SENDS_SECRET}

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
    image_size: int = Field(default=512, ge=16, le=4096, description="side of the square image that is sent")
    max_tokens: int = Field(default=512, ge=1, description="longest answer in tokens (mode score)")
    api_key_env: EnvironmentName | None = Field(
        default=None, description="environment variable with the API key; by default none is sent"
    )
    cache: str | None = Field(
        default=None, description="folder for answers, one JSON file each; by default below the cache folder of fmg"
    )


class RemoteConfig(CallConfig):
    """Rewards computed by `fmg reward-server`."""

    needs_consent: ClassVar[Mapping[str, str]] = {"url": _SENDS_IMAGES, "token_env": _SENDS_SECRET}

    url: HttpAddress = Field(description="address of the server, such as http://127.0.0.1:8765")
    weights: dict[str, float] = Field(
        default_factory=dict, description="weight of each reward of the server; empty: its only reward, with weight 1"
    )
    transport: Literal["tensor", "bytes", "png"] = Field(
        default="tensor",
        description="images are sent as exact floats, or with 8 bits per channel, a quarter of the size (bytes; png is "
        "its former name)",
    )
    batch_size: int = Field(default=16, ge=1, description="images per call")
    token_env: EnvironmentName = Field(
        default="FMG_REWARD_TOKEN", description="environment variable with the server's token, where it requires one"
    )
