"""Options of the rewards, and the published files of those that are networks. Imports no torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, ClassVar, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from fmg.core.hub import Asset
from fmg.registry.config import About, ComponentConfig


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


class FunctionRewardConfig(ComponentConfig):
    """A function passed to a Python call: `fmg.train(..., rewards=[my_function])`. A recipe records its name."""

    function: str = Field(pattern=r"^\w+$", max_length=100, description="name of the function")


CLIP_VIT_L_14 = "openai/clip-vit-large-patch14@32bd64288804d66eefd0ccbe215aa642df71cc41"
CLIP_VIT_B_32 = "openai/clip-vit-base-patch32@3d74acf9a28c67741b2f4f2ea7635f0aaf6f0268"
CLIP_VIT_H_14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K@1c2b8495b28150b8a4922ee1c8edee224c284c0c"
HPSV2 = "xswu/HPSv2@697403c78157020a1ae59d23f111aa58ced35b0a"
PICKSCORE = "yuvalkirstain/PickScore_v1@a4e4367c6dfa7288a00c550414478f865b875800"
IMAGEREWARD = "zai-org/ImageReward@5736be03b2652728fb87788c9797b0570450ab72"
BERT = "google-bert/bert-base-uncased@86b5e0934494bd15c9632b12f734a8a67f723594"
HPSV3 = "MizzenAI/HPSv3@4f81e3e09edd82fe3c5f636444c721b592a735ca"
QWEN2_VL = "Qwen/Qwen2-VL-7B-Instruct@eed13092ef92e448dd6875b2a00151bd3f7db0ac"
HPSV3_PACKAGE = "package:hpsv3==1.0.0"
DEQA = "zhiyuanyou/DeQA-Score-Mix3@246e219b7e3bc9b5dff5269c1a8564087aefca3f"
QWEN3_VL = "Qwen/Qwen3-VL-8B-Instruct@0c351dd01ed87e9c1b53cbc748cba10e6187ff3b"
UNIFIEDREWARD = "CodeGoat24/UnifiedReward-2.0-qwen3vl-8b@4175e6b78d62f639282797d05ccea35d3be823cf"
_UNIFIEDREWARD_CODE = "https://github.com/CodeGoat24/UnifiedReward/raw/ff6f520247a2d36e2aff7b2ba53a935afd437f66/"
UNIFIEDREWARD_WORDINGS: Mapping[str, str] = MappingProxyType(
    {
        "axes": _UNIFIEDREWARD_CODE + "inference_qwen/UnifiedReward-2.0-inference/point_score_ACS_image_generation.py",
        "final-score": _UNIFIEDREWARD_CODE + "inference_qwen/image_generation/qwen_point_score_image_generation.py",
    }
)
"""The authors' scripts for one image, by the form of the answer that they ask for."""
GENEVAL2 = (
    "https://github.com/facebookresearch/GenEval2/raw/a6e82d2289e8d418f27f0adee77908b07060eea3/geneval2_data.jsonl"
)
AESTHETIC_HEAD = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/"
    "6934dd81792f086e613a121dbce43082cb8be85e/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)

_SHA256: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        (HPSV2, "HPS_v2.1_compressed.pt"): "c57a38fb4a2f7e7c15bf00da2ea377cdf165448b4dd1052a484c215a998c9837",
        (AESTHETIC_HEAD, "sac+logos+ava1-l14-linearMSE.pth"): (
            "21dd590f3ccdc646f0d53120778b296013b096a035a2718c9cb0d511bff0f1e0"
        ),
        (UNIFIEDREWARD_WORDINGS["axes"], "point_score_ACS_image_generation.py"): (
            "fa67c436c6742084b43581d17bf3c98fa53aad5816ccd5ec39717c27c2a1dfa3"
        ),
        (UNIFIEDREWARD_WORDINGS["final-score"], "qwen_point_score_image_generation.py"): (
            "5c8c2efcb7f07283a3a4b3685043e2da0ee909c876829a9edbe4938a4881971c"
        ),
        (GENEVAL2, "geneval2_data.jsonl"): "09233adbc9f877fba205f1a20efa4a8640e7e62a91dfd55893562bed8a928e43",
    }
)
"""Digests of published files that are known, by source and file."""

_CLIP_TERMS = "MIT (code); the model card calls the weights a research output"
_PICKSCORE_TERMS = "MIT (code); the weights' model card states no other terms"
_DEQA_TERMS = "MIT (code and weights); derived from LLaMA 2, whose licence also applies"
_CLIP_MODELS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        CLIP_VIT_L_14: (1.7, _CLIP_TERMS),
        CLIP_VIT_B_32: (0.6, _CLIP_TERMS),
        PICKSCORE: (3.9, _PICKSCORE_TERMS),
    }
)
"""Size in GB and terms of the published CLIPModel folders."""

WEIGHT_FILES = "model.safetensors|pytorch_model.bin"
_QWEN_VL_FILES = ("*.safetensors", "*.json", "merges.txt")
_TOKENIZER = "tokenizer.json|vocab.json|vocab.txt"
_TOKENIZER_MORE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


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
        sha256 = _SHA256.get((self.weights, name))
        return (
            Asset("checkpoint", "weights", self.weights, files, more, sha256=sha256, size_gb=3.9, licence="Apache-2.0"),
            tokenizer_asset(self.tokenizer),
        )


class PickScoreConfig(NetworkConfig):
    """PickScore: `exp(logit_scale) cos(image, prompt)`, about 17 to 24, by default divided by 26."""

    about: ClassVar[About] = About(
        licence=_PICKSCORE_TERMS,
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

    about: ClassVar[About] = About(
        licence=_CLIP_TERMS,
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
                sha256=_SHA256.get((self.head, name)),
                size_gb=0.0037,
                licence="Apache-2.0",
            ),
        )


class ImageRewardConfig(NetworkConfig):
    """ImageReward: a BLIP that reads prompt and image together; mean 0 and std 1 on its authors' data."""

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
    """DeQA-Score: expected rating of an image's quality from 1 to 5, over 5; does not see the prompt."""

    about: ClassVar[About] = About(
        licence=_DEQA_TERMS,
        citation="You et al., Teaching Large Language Models to Regress Accurate Image Quality Scores using Score "
        "Distribution, arXiv 2501.11561; Ye et al., mPLUG-Owl2, arXiv 2311.04257",
        weights=(f"{DEQA} (16 GB)",),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="fp16", description="precision of the weights")
    batch_size: int = Field(default=8, ge=1, description="images for one pass of the network")
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
                licence=_DEQA_TERMS,
            ),
        )


class UnifiedRewardConfig(NetworkConfig):
    """UnifiedReward: a Qwen-VL tuned to rate images writes its ratings from 1 to 5; the score is their mean over 5."""

    about: ClassVar[About] = About(
        licence="MIT (code and weights); Apache-2.0 (base model)",
        citation="Wang et al., Unified Reward Model for Multimodal Understanding and Generation, arXiv 2503.05236",
        weights=(f"{UNIFIEDREWARD} (18 GB)", "the wording: one script of the authors, which is not run"),
    )

    dtype: Literal["fp32", "bf16", "fp16"] = Field(default="bf16", description="precision of the weights")
    batch_size: int = Field(default=16, ge=1, description="images for one pass of the network")
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
        sha256 = _SHA256.get((wording, name))
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
    batch_size: int = Field(default=16, ge=1, description="questions about an image for one pass of the network")
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
        default=None, description="a second such .jsonl, with the questions about prompts of your own"
    )

    def assets(self) -> tuple[Asset, ...]:
        name = "geneval2_data.jsonl"
        sha256 = _SHA256.get((self.questions, name))
        return (
            qwen_vl_asset(self.weights, "Apache-2.0"),
            Asset(
                "questions", "questions", self.questions, (name,), sha256=sha256, size_gb=0.0004, licence="CC BY-NC 4.0"
            ),
        )


def qwen_vl_asset(source: str, licence: str) -> Asset:
    """A Qwen-VL of 8B parameters in bf16, with its tokenizer."""
    return Asset("weights", "weights", source, folders=(".",), patterns=_QWEN_VL_FILES, size_gb=17.5, licence=licence)


def clip_asset(source: str, option: str = "weights") -> Asset:
    """A CLIPModel folder."""
    size_gb, licence = _CLIP_MODELS.get(source, (0.0, ""))
    return Asset("model", option, source, (WEIGHT_FILES, "config.json"), size_gb=size_gb, licence=licence)


def tokenizer_asset(source: str, option: str = "tokenizer", licence: str = "MIT") -> Asset:
    """The files of a tokenizer, by default of CLIP."""
    return Asset("tokenizer", option, source, (_TOKENIZER,), _TOKENIZER_MORE, size_gb=0.004, licence=licence)


MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"


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
