"""mPLUG-Owl2 (Ye et al., arXiv 2311.04257): a LLaMA whose norms, keys and values have one set of weights for text and
another for images, behind a vision tower and an abstractor that turns an image into a few tokens.

The published models come with code that runs under transformers 4.36. The network is reimplemented here, for one image
between two fixed texts and without a cache; tensor names are those of the published files.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb

from fmg.core.model_folder import whole

States = Float[Tensor, "b n d"]


class Multiway(nn.Module):
    """A layer with one set of weights for text and another for the rows of `image`."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.multiway = nn.ModuleList([make(), make()])

    def forward(self, x: States, image: slice) -> States:
        text, picture = self.multiway
        return torch.cat([text(x[:, : image.start]), picture(x[:, image]), text(x[:, image.stop :])], 1)


class LanguageAttention(nn.Module):
    """Causal attention with rotary positions."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        width, heads = config.hidden_size, config.num_attention_heads
        kept = config.num_key_value_heads or heads
        self.side = width // heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = Multiway(lambda: nn.Linear(width, kept * self.side, bias=False))
        self.v_proj = Multiway(lambda: nn.Linear(width, kept * self.side, bias=False))
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, x: States, image: slice, rotation: tuple[Tensor, Tensor]) -> States:
        split = (*x.shape[:2], -1, self.side)
        q, k, v = (
            y.view(split).transpose(1, 2) for y in (self.q_proj(x), self.k_proj(x, image), self.v_proj(x, image))
        )
        q, k = apply_rotary_pos_emb(q, k, *rotation)
        seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        found: Tensor = self.o_proj(seen.transpose(1, 2).flatten(2))
        return found


class LanguageLayer(nn.Module):
    """A block of the language model."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.self_attn = LanguageAttention(config)
        mlp: Any = LlamaMLP
        self.mlp = mlp(config)
        self.input_layernorm = Multiway(lambda: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))
        self.post_attention_layernorm = Multiway(lambda: LlamaRMSNorm(config.hidden_size, config.rms_norm_eps))

    def forward(self, x: States, image: slice, rotation: tuple[Tensor, Tensor]) -> States:
        x = x + self.self_attn(self.input_layernorm(x, image), image, rotation)
        found: Tensor = x + self.mlp(self.post_attention_layernorm(x, image))
        return found


class VisionAttention(nn.Module):
    """Self-attention with one matrix that holds query, key and value of a head next to each other."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.dense = nn.Linear(width, width)

    def forward(self, x: States) -> States:
        q, k, v = self.query_key_value(x).unflatten(2, (self.heads, 3, -1)).permute(3, 0, 2, 1, 4)
        found: Tensor = self.dense(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return found


class VisionMlp(nn.Module):
    """Two linear layers around the quick approximation of GELU."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)

    def forward(self, x: States) -> States:
        x = self.fc1(x)
        found: Tensor = self.fc2(x * torch.sigmoid(1.702 * x))
        return found


class VisionLayer(nn.Module):
    """A block of the vision tower."""

    def __init__(self, config: Mapping[str, object], eps: float) -> None:
        super().__init__()
        width = whole(config, "hidden_size")
        self.self_attn = VisionAttention(width, whole(config, "num_attention_heads"))
        self.input_layernorm = nn.LayerNorm(width, eps)
        self.mlp = VisionMlp(width, whole(config, "intermediate_size"))
        self.post_attention_layernorm = nn.LayerNorm(width, eps)

    def forward(self, x: States) -> States:
        x = x + self.self_attn(self.input_layernorm(x))
        found: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return found


class VisionEmbeddings(nn.Module):
    """Patches and a class token, with learned positions."""

    def __init__(self, config: Mapping[str, object], eps: float) -> None:
        super().__init__()
        width, patch = whole(config, "hidden_size"), whole(config, "patch_size")
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.position_embedding = nn.Parameter(torch.empty(1, (whole(config, "image_size") // patch) ** 2 + 1, width))
        self.pre_layernorm = nn.LayerNorm(width, eps)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> States:
        patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
        whole_image = torch.cat([self.cls_token.expand(len(pixels), -1, -1), patches], 1)
        found: Tensor = self.pre_layernorm(whole_image + self.position_embedding)
        return found


class Layers(nn.Module):
    """A list of blocks under the name that the published files have for it."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)


class VisionModel(nn.Module):
    """A CLIP ViT that was trained further."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        eps = _epsilon(config)
        self.embeddings = VisionEmbeddings(config, eps)
        self.encoder = Layers([VisionLayer(config, eps) for _ in range(whole(config, "num_hidden_layers"))])
        self.post_layernorm = nn.LayerNorm(whole(config, "hidden_size"), eps)

    def forward(self, pixels: Float[Tensor, "b 3 h w"]) -> States:
        x = self.embeddings(pixels)
        for layer in self.encoder.layers:
            x = layer(x)
        found: Tensor = self.post_layernorm(x)
        return found


class AbstractorMlp(nn.Module):
    """A gated network with a norm inside."""

    def __init__(self, width: int, inner: int, eps: float) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, inner)
        self.w2 = nn.Linear(inner, width)
        self.w3 = nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, eps)

    def forward(self, x: States) -> States:
        found: Tensor = self.w2(self.ffn_ln(F.silu(self.w1(x)) * self.w3(x)))
        return found


class AbstractorAttention(nn.Module):
    """Queries attend to themselves and to the image, both with fixed positions."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        width, seen = whole(config, "hidden_size"), whole(config, "encoder_hidden_size")
        self.heads = whole(config, "num_attention_heads")
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(seen, width)
        self.value = nn.Linear(seen, width)
        self.register_buffer("q_pos_embed", torch.empty(whole(config, "num_learnable_queries"), width))
        self.register_buffer("k_pos_embed", torch.empty(whole(config, "grid_size") ** 2 + 1, width))
        self.q_pos_embed: Tensor
        self.k_pos_embed: Tensor

    def forward(self, queries: States, image: States) -> States:
        both = torch.cat([queries, image], 1)
        places = torch.cat([self.q_pos_embed, self.k_pos_embed])
        q, k, v = (
            y.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for y in (self.query(queries + self.q_pos_embed), self.key(both + places), self.value(both))
        )
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class AbstractorOutput(nn.Module):
    """The term that a layer adds to its queries."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        width = whole(config, "hidden_size")
        self.out_proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = AbstractorMlp(width, whole(config, "intermediate_size"), _epsilon(config))

    def forward(self, seen: States, queries: States) -> States:
        queries = queries + self.out_proj(seen)
        found: Tensor = queries + self.mlp(self.norm2(queries))
        return found


class CrossAttention(nn.Module):
    """Attention, output and the norms before them; the residual path carries normed queries, as published."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.attention = AbstractorAttention(config)
        self.output = AbstractorOutput(config)
        self.norm1 = nn.LayerNorm(whole(config, "hidden_size"))
        self.normk = nn.LayerNorm(whole(config, "encoder_hidden_size"))

    def forward(self, queries: States, image: States) -> States:
        queries = self.norm1(queries)
        found: Tensor = self.output(self.attention(queries, self.normk(image)), queries)
        return found


class AbstractorLayer(nn.Module):
    """A block of the abstractor, under its published name."""

    def __init__(self, config: Mapping[str, object]) -> None:
        super().__init__()
        self.crossattention = CrossAttention(config)

    def forward(self, queries: States, image: States) -> States:
        found: Tensor = self.crossattention(queries, image)
        return found


class Abstractor(nn.Module):
    """An image as a fixed number of tokens of the language model, and a token that ends it."""

    def __init__(self, config: Mapping[str, object], language_width: int) -> None:
        super().__init__()
        width = whole(config, "hidden_size")
        self.encoder = Layers([AbstractorLayer(config) for _ in range(whole(config, "num_hidden_layers"))])
        self.visual_fc = nn.Linear(width, language_width)
        self.query_embeds = nn.Parameter(torch.empty(1, whole(config, "num_learnable_queries"), width))
        self.vit_eos = nn.Parameter(torch.empty(1, 1, language_width))

    def forward(self, image: States) -> States:
        queries = self.query_embeds.expand(len(image), -1, -1)
        for layer in self.encoder.layers:
            queries = layer(queries, image)
        return torch.cat([self.visual_fc(queries), self.vit_eos.expand(len(image), -1, -1)], 1)


class Body(nn.Module):
    """The language model without its output weights, and the modules that read images."""

    def __init__(self, config: LlamaConfig, vision: Mapping[str, object], abstractor: Mapping[str, object]) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList([LanguageLayer(config) for _ in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.vision_model = VisionModel(vision)
        self.visual_abstractor = Abstractor(abstractor, config.hidden_size)


class MplugOwl2(nn.Module):
    """Logits of the token after a text, an image and another text.

    Args:
        config: config of the language model.
        vision: `visual_config.visual_model` of the published config.
        abstractor: `visual_config.visual_abstractor`.

    Raises:
        CheckpointError: a size is missing.
    """

    def __init__(self, config: LlamaConfig, vision: Mapping[str, object], abstractor: Mapping[str, object]) -> None:
        super().__init__()
        self.model = Body(config, vision, abstractor)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        rope: Any = config.rope_parameters
        self.theta = float(rope["rope_theta"])
        self.side = config.hidden_size // config.num_attention_heads

    def forward(
        self, before: Int[Tensor, " n"], pixels: Float[Tensor, "b 3 h w"], after: Int[Tensor, " m"]
    ) -> Float[Tensor, "b vocabulary"]:
        seen = self.model.visual_abstractor(self.model.vision_model(pixels))
        first, last = (self.model.embed_tokens(ids).expand(len(pixels), -1, -1) for ids in (before, after))
        x = torch.cat([first, seen, last], 1)
        image, rotation = slice(len(before), len(before) + seen.shape[1]), self._rotation(x)
        for layer in self.model.layers:
            x = layer(x, image, rotation)
        found: Tensor = self.lm_head(self.model.norm(x[:, -1]))
        return found

    def _rotation(self, x: States) -> tuple[Tensor, Tensor]:
        frequencies = self.theta ** -(torch.arange(0, self.side, 2, device=x.device).float() / self.side)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), frequencies).repeat(1, 2)[None]
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def number(config: Mapping[str, object], key: str, default: float) -> float:
    """The number under a key of a config, or the default if there is none."""
    value = config.get(key)
    return float(value) if isinstance(value, float | int) else default


def _epsilon(config: Mapping[str, object]) -> float:
    return number(config, "layer_norm_eps", 1e-6)
