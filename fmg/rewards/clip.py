"""CLIP, and the rewards that are CLIP: HPSv2, PickScore, CLIPScore and LAION's aesthetic score."""

from __future__ import annotations

import html
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from fmg.core.display import some
from fmg.core.errors import CheckpointError
from fmg.core.hub import Located
from fmg.core.runtime import require
from fmg.core.types import RewardOutput
from fmg.rewards.configs import AestheticConfig, ClipScoreConfig, Hpsv2Config, PickScoreConfig
from fmg.rewards.images import normalize, resize_and_crop, resize_and_crop_floats, resize_and_pad
from fmg.rewards.network import (
    Files,
    NetworkReward,
    Score,
    Tensors,
    affine_head,
    check_entries,
    load_module,
    load_pretrained,
    read_json,
    read_renamed,
    read_tensors,
)

Preprocess = Callable[[Float[Tensor, "b 3 h w"], int], Float[Tensor, "b 3 side side"]]
"""From images in [0, 1] and the side that the network takes, to squares in [0, 1]."""

_VISION = ("vision_model.", "visual_projection.")


class ImageEncoder:
    """Unit-length embeddings of images.

    Args:
        model: a CLIP model with a vision tower, without gradients.
        config: the config of the vision tower.
        preprocess: how images become squares.
    """

    def __init__(self, model: Any, config: Any, preprocess: Preprocess) -> None:
        self._model = model
        self._side = int(config.image_size)
        self._preprocess = preprocess

    def __call__(self, images: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b d"]:
        """Embeddings in fp32, on the device of the model."""
        squares = normalize(self._preprocess(images, self._side))
        features = self._features(squares.to(self._model.device, self._model.dtype))
        return F.normalize(features.float(), dim=-1)

    def _features(self, pixels: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b d"]:
        features: Tensor = self._model(pixel_values=pixels).image_embeds
        return features


class ClipEncoder(ImageEncoder):
    """Unit-length embeddings of images and texts.

    Args:
        model: a `CLIPModel` without gradients.
        tokenizer: a CLIP tokenizer; texts longer than the model reads are truncated, keeping the end-of-text token.
        preprocess: how images become squares.
        clean: what happens to a text before it is tokenised.
    """

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Preprocess, clean: Callable[[str], str] = lambda text: text
    ) -> None:
        super().__init__(model, model.config.vision_config, preprocess)
        self._tokenizer = tokenizer
        self._clean = clean

    @property
    def logit_scale(self) -> float:
        """`exp(logit_scale)`: 100 in OpenAI's weights."""
        return float(self._model.logit_scale.float().exp())

    def texts(self, texts: Sequence[str]) -> Float[Tensor, "b d"]:
        """Embeddings in fp32; each distinct text is encoded once."""
        distinct = list(dict.fromkeys(texts))
        rows = {text: row for row, text in enumerate(distinct)}
        tokens = self._tokenizer(
            [self._clean(text) for text in distinct],
            padding=True,
            truncation=True,
            max_length=self._model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self._model.device)
        features = self._model.get_text_features(
            input_ids=tokens.input_ids, attention_mask=tokens.attention_mask
        ).pooler_output
        embeddings = F.normalize(features.float(), dim=-1)
        return embeddings[[rows[text] for text in texts]]

    def cosine(self, images: Float[Tensor, "b 3 h w"], texts: Sequence[str]) -> Float[Tensor, " b"]:
        return (self(images) * self.texts(texts)).sum(-1)

    def _features(self, pixels: Float[Tensor, "b 3 side side"]) -> Float[Tensor, "b d"]:
        features: Tensor = self._model.get_image_features(pixel_values=pixels).pooler_output
        return features


def load_clip(model: Located, tokenizer: Located, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """A `CLIPModel` and its tokenizer.

    `model` is a folder of transformers (`config.json` beside the weights) or a checkpoint in OpenCLIP's layout, whose
    architecture is that of the `open_clip_config.json` beside it, or ViT-H-14.

    Raises:
        CheckpointError: weights that do not fit their architecture, or the tokenizer.
    """
    if "config.json" not in model.files:
        config = open_clip_config(model.files.get("open_clip_config.json"))
        tensors = read_renamed(model.path, LAYOUT, from_open_clip)
    else:
        config, tensors = _read_folder(model)
    clip = load_module(CLIPModel, config, tensors, model.path, device, dtype)
    loaded = load_pretrained(CLIPTokenizer.from_pretrained, tokenizer.folder, tokenizer.asset.what)
    fix = f"Set {tokenizer.asset.option} to the tokenizer that belongs to the model."
    check_entries(loaded, tokenizer.folder, clip.config.text_config.vocab_size, fix)
    return clip, loaded


def load_vision(model: Located, device: torch.device, dtype: torch.dtype) -> tuple[Any, Any]:
    """The vision tower with its projection of a transformers `CLIPModel` folder, and its config."""
    config, tensors = _read_folder(model)
    vision = config.vision_config
    vision.projection_dim = config.projection_dim
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(_VISION)}
    return load_module(CLIPVisionModelWithProjection, vision, kept, model.path, device, dtype), vision


def _read_folder(model: Located) -> tuple[Any, dict[str, Tensor]]:
    config = load_pretrained(CLIPConfig.from_pretrained, model.folder, "config")
    return config, read_renamed(model.path, "transformers", dict)


def open_clip_config(file: Path | None) -> Any:
    """The `CLIPConfig` of an `open_clip_config.json`; None: of ViT-H-14.

    Raises:
        CheckpointError: when it describes another architecture.
    """
    described = VIT_H_14 if file is None else read_json(file).get("model_cfg")
    try:
        return CLIPConfig(**_architecture(described))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{file} does not describe a CLIP of two transformers: {error!r}",
            "Give the open_clip_config.json that belongs to the weights.",
        ) from error


def _architecture(described: Any) -> dict[str, Any]:
    vision, text = described["vision_cfg"], described["text_cfg"]
    act = "quick_gelu" if described.get("quick_gelu") else "gelu"
    return {
        "projection_dim": described["embed_dim"],
        "vision_config": {
            "hidden_size": vision["width"],
            "intermediate_size": 4 * vision["width"],
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_act": act,
        },
        "text_config": {
            "hidden_size": text["width"],
            "intermediate_size": 4 * text["width"],
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "hidden_act": act,
            # OpenCLIP pools at the highest token id, which is the end of text; 2 would mean the same to transformers
            "bos_token_id": text["vocab_size"] - 2,
            "eos_token_id": text["vocab_size"] - 1,
            "pad_token_id": text["vocab_size"] - 1,
        },
    }


LAYOUT = "open-clip-1"

VIT_H_14: Mapping[str, Any] = MappingProxyType(
    {
        "embed_dim": 1024,
        "vision_cfg": {"image_size": 224, "layers": 32, "width": 1280, "head_width": 80, "patch_size": 14},
        "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 1024, "heads": 16, "layers": 24},
    }
)
"""OpenCLIP's description of ViT-H-14, the architecture of HPSv2 and PickScore (`model_cfg` of its JSON)."""

SAME: Mapping[str, str] = MappingProxyType(
    {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        # transformers spells it so
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
)
TRANSPOSED = MappingProxyType({"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"})
IN_BLOCK = MappingProxyType(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "attn.out_proj": "self_attn.out_proj",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
    }
)
QKV = ("q_proj", "k_proj", "v_proj")
_TOWERS = MappingProxyType({"visual.": "vision_model", "": "text_model"})
_BLOCK = re.compile(r"^(visual\.)?transformer\.resblocks\.(\d+)\.(.+)[._](weight|bias)$")


def from_open_clip(tensors: Tensors) -> dict[str, Tensor]:
    """The names of `transformers.CLIPModel` for a state dict of OpenCLIP; the causal mask is dropped.

    Raises:
        CheckpointError: naming the keys that a CLIP of two transformers does not have.
    """
    renamed: dict[str, Tensor] = {}
    unknown: list[str] = []
    for name, tensor in tensors.items():
        if name == "attn_mask":
            continue
        if name in SAME:
            renamed[SAME[name]] = tensor
        elif name in TRANSPOSED:
            renamed[TRANSPOSED[name]] = tensor.t()
        elif block := _block_from_open_clip(name, tensor):
            renamed.update(block)
        else:
            unknown.append(name)
    if unknown:
        raise CheckpointError(
            f"The checkpoint has keys that a CLIP in the layout of OpenCLIP does not have: {some(unknown)}",
            "Use the published checkpoint of this reward.",
        )
    return renamed


def _block_from_open_clip(name: str, tensor: Tensor) -> dict[str, Tensor]:
    match = _BLOCK.match(name)
    if match is None:
        return {}
    tower, layer, module, kind = match[1] or "", match[2], match[3], match[4]
    prefix = f"{_TOWERS[tower]}.encoder.layers.{layer}"
    if module == "attn.in_proj":
        parts = tensor.chunk(3)
        return {f"{prefix}.self_attn.{x}.{kind}": part for x, part in zip(QKV, parts, strict=True)}
    return {f"{prefix}.{IN_BLOCK[module]}.{kind}": tensor} if module in IN_BLOCK else {}


def clean(text: str) -> str:
    """`ftfy.fix_text`, HTML entities resolved twice, runs of white space to one space, lower case.

    The cleaning of OpenAI's CLIP tokenizer, which OpenCLIP and HPSv2 use. Needs the package `ftfy`.
    """
    import ftfy

    repaired: str = ftfy.fix_text(text)
    return " ".join(html.unescape(html.unescape(repaired)).split()).lower()


def hpsv2(config: Hpsv2Config) -> NetworkReward:
    """`cos(image, prompt)`, raw; the published benchmark prints it times 100.

    Images are not rounded to 8 bits; see `resize_and_pad` for the resize, and `clean` for the text. The authors run
    it under fp16 autocast on a GPU, which changes the fourth digit of a score; here it runs in fp32 by default.

    Raises:
        MissingDependencyError: without the package ftfy.
    """
    require("The reward 'hpsv2'", "ftfy", extra="rewards")

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        model, tokenizer = load_clip(files["checkpoint"], files["tokenizer"], device, dtype)
        encoder = ClipEncoder(model, tokenizer, resize_and_pad, clean)
        return lambda images, prompts: RewardOutput(encoder.cosine(images, prompts), {})

    return NetworkReward("hpsv2", config, load)


PICKSCORE_NORMALIZER = 26.0


def pickscore(config: PickScoreConfig) -> NetworkReward:
    """`exp(logit_scale) cos(image, prompt)`, divided by 26 when normalized; part `raw` is not divided.

    Images are rounded to 8 bits, resized by Pillow and cropped as the image processor of transformers does.
    """

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        model, tokenizer = load_clip(files["model"], files["tokenizer"], device, dtype)
        encoder = ClipEncoder(model, tokenizer, partial(resize_and_crop, rounding="down"))
        divisor = PICKSCORE_NORMALIZER if config.normalize else 1.0

        def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
            raw = encoder.logit_scale * encoder.cosine(images, prompts)
            return RewardOutput(raw / divisor, {"raw": raw})

        return score

    return NetworkReward("pickscore", config, load)


@dataclass(frozen=True)
class Variant:
    """One published form.

    Attributes:
        preprocess: how images become squares.
        prefix: text put before the prompt.
        value: score from the cosine (b,) and `exp(logit_scale)`.
    """

    preprocess: Preprocess
    prefix: str
    value: Callable[[Float[Tensor, " b"], float], Float[Tensor, " b"]]


_AS_TRANSFORMERS = partial(resize_and_crop, rounding="down")

VARIANTS: Mapping[str, Variant] = MappingProxyType(
    {
        "cosine": Variant(_AS_TRANSFORMERS, "", lambda cosine, _: cosine),
        "diffusion-nft": Variant(resize_and_crop_floats, "", lambda cosine, logit_scale: logit_scale * cosine / 100),
        "hessel": Variant(resize_and_crop, "A photo depicts ", lambda cosine, _: 2.5 * cosine.clamp(min=0)),
        "torchmetrics": Variant(_AS_TRANSFORMERS, "", lambda cosine, _: (100 * cosine).clamp(min=0)),
    }
)


def clipscore(config: ClipScoreConfig) -> NetworkReward:
    """`scale` times the variant's score; part `cosine` is the plain cosine."""
    variant = VARIANTS[config.variant]

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        encoder = ClipEncoder(*load_clip(files["model"], files["tokenizer"], device, dtype), variant.preprocess)

        def score(images: Float[Tensor, "b 3 h w"], prompts: Sequence[str]) -> RewardOutput:
            cosine = encoder.cosine(images, [variant.prefix + prompt for prompt in prompts])
            return RewardOutput(config.scale * variant.value(cosine, encoder.logit_scale), {"cosine": cosine})

        return score

    return NetworkReward("clipscore", config, load)


def aesthetic(config: AestheticConfig) -> NetworkReward:
    """The head on the unit-length image embedding; prompts do not matter.

    Images are rounded to 8 bits, resized by Pillow and cropped as OpenAI's CLIP does.
    """

    def load(files: Files, device: torch.device, dtype: torch.dtype) -> Score:
        head = affine_head(read_tensors(files["head"].path))
        model, vision = load_vision(files["model"], device, dtype)
        if len(head.weight) != vision.projection_dim:
            raise CheckpointError(
                f"The aesthetic head takes {len(head.weight)} numbers, but the model gives {vision.projection_dim}",
                "Set weights and head to files that belong together.",
            )
        encoder = ImageEncoder(model, vision, resize_and_crop)
        return lambda images, prompts: RewardOutput(head(encoder(images)), {})

    return NetworkReward("aesthetic", config, load)
