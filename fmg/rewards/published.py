"""The published files of the rewards: pinned sources, digests, sizes and terms. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from fmg.core.hub import Asset

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

SHA256: Mapping[tuple[str, str], str] = MappingProxyType(
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
"""Known digests of published files, by source and file."""

CLIP_TERMS = "MIT (code); the model card calls the weights a research output"
PICKSCORE_TERMS = "MIT (code); the weights' model card states no other terms"
DEQA_TERMS = "MIT (code and weights); derived from LLaMA 2, whose licence also applies"
_CLIP_MODELS: Mapping[str, tuple[float, str]] = MappingProxyType(
    {
        CLIP_VIT_L_14: (1.7, CLIP_TERMS),
        CLIP_VIT_B_32: (0.6, CLIP_TERMS),
        PICKSCORE: (3.9, PICKSCORE_TERMS),
    }
)
"""Size in GB and terms of the published CLIPModel folders."""

MASK2FORMER = "facebook/mask2former-swin-small-coco-instance"

WEIGHT_FILES = "model.safetensors|pytorch_model.bin"
_QWEN_VL_FILES = ("*.safetensors", "*.json", "merges.txt")
_TOKENIZER = "tokenizer.json|vocab.json|vocab.txt"
_TOKENIZER_MORE = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer_config.json", "special_tokens_map.json")


def qwen_vl_asset(source: str, licence: str) -> Asset:
    """A Qwen-VL of 8B parameters in bf16, with its tokenizer."""
    return Asset("weights", "weights", source, folders=(".",), patterns=_QWEN_VL_FILES, size_gb=17.5, licence=licence)


def clip_asset(source: str, option: str = "weights") -> Asset:
    """A CLIPModel folder."""
    size_gb, licence = _CLIP_MODELS.get(source, (0.0, ""))
    return Asset("model", option, source, (WEIGHT_FILES, "config.json"), size_gb=size_gb, licence=licence)


def tokenizer_asset(source: str, option: str = "tokenizer", licence: str = "MIT") -> Asset:
    """The files of a tokenizer, CLIP's by default."""
    return Asset("tokenizer", option, source, (_TOKENIZER,), _TOKENIZER_MORE, size_gb=0.004, licence=licence)
