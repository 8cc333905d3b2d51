"""CLIP as the rewards use it: one encoder for HPSv2, PickScore, CLIPScore and the LAION aesthetic score.

Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", arXiv 2103.00020.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, CLIPVisionModelWithProjection

from fmg.core.errors import CheckpointError
from fmg.core.hub import Located
from fmg.rewards.checkpoints import load_module, load_pretrained, read_json, read_renamed
from fmg.rewards.clip_layout import LAYOUT, VIT_H_14, from_open_clip
from fmg.rewards.images import normalize

Preprocess = Callable[[Float[Tensor, "b 3 h w"], int], Float[Tensor, "b 3 side side"]]
"""Images in [0, 1] and the side the network takes to squares in [0, 1]."""

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
        tokenizer: a CLIP tokenizer; texts longer than the model reads are cut, keeping the end-of-text token.
        preprocess: how images become squares.
        clean: what happens to a text before it is tokenized.
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
        """Embeddings in fp32; a text that occurs more than once is encoded once."""
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
        """Cosine of each image and its text."""
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
    rows = clip.config.text_config.vocab_size
    if len(loaded) > rows:
        raise CheckpointError(
            f"The tokenizer in {tokenizer.folder} has {len(loaded)} entries and the model has {rows}",
            f"Set {tokenizer.asset.option} to the tokenizer that belongs to the model.",
        )
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
