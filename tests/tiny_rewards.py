"""Published reward checkpoints in miniature: random weights of a few hundred kilobytes in their authors' own layouts.

Names and shapes are written down here from the authors' code, not derived from the key maps under test.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import (
    BertTokenizer,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    GenerationConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLModel,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SIDE = 32
CONTEXT = 77
CLIP_WIDTH = 32
CLIP_HEADS = 2
CLIP_EMBEDDING = 24
BLIP_WIDTH = 128
BERT_WIDTH = 48
BERT_HEADS = 4
QWEN_WIDTH = 32
LAYERS = 2

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Tiny:
    """What was written: the folder, the checkpoint file in it, and the tensors under the authors' names."""

    folder: Path
    file: Path
    tensors: Tensors


def random_tensors(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> Tensors:
    """Normal numbers: matrices keep activations near 1, biases are small, scales of layer norms are near 1."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = torch.randn(shape, generator=generator)
        values = values / shape[-1] ** 0.5 if len(shape) > 1 else 0.1 * values
        tensors[name] = 1 + values if is_norm_weight(name) else values
    return tensors


def is_norm_weight(name: str) -> bool:
    """Whether a tensor is the scale of a layer norm."""
    words = ("ln_", "ffn_ln", "norm", "LayerNorm", "input_layernorm", "post_attention_layernorm", "pre_layernorm")
    words += ("post_layernorm",)
    return name.endswith("weight") and any(part.startswith(words) for part in name.split("."))


def clip_tokenizer() -> CLIPTokenizer:
    """CLIP's tokenizer with bytes only: the end of text has the highest id."""
    alphabet = sorted(ByteLevel.alphabet())
    entries = [*alphabet, *(f"{char}</w>" for char in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=[], model_max_length=CONTEXT)


def write_clip_folder(folder: Path, seed: int = 0, *, pickle: bool = False) -> Path:
    """A `CLIPModel` folder with its tokenizer; with `pickle` the weights are a `pytorch_model.bin`."""
    tokenizer = clip_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 2}
    config = CLIPConfig(
        projection_dim=CLIP_EMBEDDING,
        text_config={
            **sizes,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**sizes, "image_size": SIDE, "patch_size": 16},
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = CLIPModel(config)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.data = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))) * 0.2
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    if pickle:
        (folder / "model.safetensors").unlink()
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
    return folder


def open_clip_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of OpenCLIP's `CLIP` module."""
    width, vocabulary, patches = CLIP_WIDTH, len(clip_tokenizer()), (SIDE // 16) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "positional_embedding": (CONTEXT, width),
        "text_projection": (width, CLIP_EMBEDDING),
        "logit_scale": (),
        "visual.class_embedding": (width,),
        "visual.positional_embedding": (patches + 1, width),
        "visual.proj": (width, CLIP_EMBEDDING),
        "visual.conv1.weight": (width, 3, 16, 16),
        "token_embedding.weight": (vocabulary, width),
    }
    for norm in ("visual.ln_pre", "visual.ln_post", "ln_final"):
        shapes |= {f"{norm}.weight": (width,), f"{norm}.bias": (width,)}
    for tower in ("visual.", ""):
        for layer in range(LAYERS):
            block = f"{tower}transformer.resblocks.{layer}"
            shapes |= {
                f"{block}.ln_1.weight": (width,),
                f"{block}.ln_1.bias": (width,),
                f"{block}.attn.in_proj_weight": (3 * width, width),
                f"{block}.attn.in_proj_bias": (3 * width,),
                f"{block}.attn.out_proj.weight": (width, width),
                f"{block}.attn.out_proj.bias": (width,),
                f"{block}.ln_2.weight": (width,),
                f"{block}.ln_2.bias": (width,),
                f"{block}.mlp.c_fc.weight": (4 * width, width),
                f"{block}.mlp.c_fc.bias": (4 * width,),
                f"{block}.mlp.c_proj.weight": (width, 4 * width),
                f"{block}.mlp.c_proj.bias": (width,),
            }
    return shapes


def write_open_clip(folder: Path, seed: int = 0) -> Tiny:
    """HPSv2's layout: OpenCLIP's state dict under `state_dict` in a torch file, and `open_clip_config.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(open_clip_shapes(), seed)
    described = {
        "embed_dim": CLIP_EMBEDDING,
        "vision_cfg": {"image_size": SIDE, "layers": LAYERS, "width": CLIP_WIDTH, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "context_length": CONTEXT,
            "vocab_size": len(clip_tokenizer()),
            "width": CLIP_WIDTH,
            "heads": CLIP_HEADS,
            "layers": LAYERS,
        },
    }
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": described}), encoding="utf-8")
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"epoch": 1, "state_dict": {**tensors, "attn_mask": torch.zeros(CONTEXT, CONTEXT)}}, file)
    return Tiny(folder, file, tensors)


def write_clip_tokenizer(folder: Path) -> Path:
    """A folder with nothing but CLIP's tokenizer."""
    clip_tokenizer().save_pretrained(str(folder))
    return folder


def head_shapes(width: int, prefix: str = "layers.") -> dict[str, tuple[int, ...]]:
    """The five linear layers of the aesthetic and the ImageReward head."""
    sizes = (width, 16, 12, 8, 6, 1)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, (fan_in, fan_out) in zip((0, 2, 4, 6, 7), pairwise(sizes), strict=True):
        shapes |= {f"{prefix}{layer}.weight": (fan_out, fan_in), f"{prefix}{layer}.bias": (fan_out,)}
    return shapes


def write_aesthetic_head(folder: Path, seed: int = 0) -> Tiny:
    """LAION's file: a plain state dict."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(head_shapes(CLIP_EMBEDDING), seed)
    file = folder / "sac+logos+ava1-l14-linearMSE.pth"
    torch.save(tensors, file)
    return Tiny(folder, file, tensors)


def bert_tokenizer() -> BertTokenizer:
    """A lower-casing word-piece tokenizer of single characters, without the two tokens that ImageReward adds."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    entries = [*special, *letters, *(f"##{letter}" for letter in letters), ",", "."]
    return BertTokenizer(vocab={entry: i for i, entry in enumerate(entries)})


def image_reward_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `ImageReward` with its `BLIP_Pretrain`."""
    image, text, vocabulary = BLIP_WIDTH, BERT_WIDTH, len(bert_tokenizer()) + 2
    shapes: dict[str, tuple[int, ...]] = {
        "blip.visual_encoder.cls_token": (1, 1, image),
        "blip.visual_encoder.pos_embed": (1, (SIDE // 16) ** 2 + 1, image),
        "blip.visual_encoder.patch_embed.proj.weight": (image, 3, 16, 16),
        "blip.visual_encoder.patch_embed.proj.bias": (image,),
        "blip.visual_encoder.norm.weight": (image,),
        "blip.visual_encoder.norm.bias": (image,),
        "blip.text_encoder.embeddings.word_embeddings.weight": (vocabulary, text),
        "blip.text_encoder.embeddings.position_embeddings.weight": (64, text),
        "blip.text_encoder.embeddings.LayerNorm.weight": (text,),
        "blip.text_encoder.embeddings.LayerNorm.bias": (text,),
        "blip.vision_proj.weight": (8, image),
        "blip.vision_proj.bias": (8,),
        "blip.text_proj.weight": (8, text),
        "blip.text_proj.bias": (8,),
    }
    linear: dict[str, tuple[int, int]] = {}
    norms: dict[str, int] = {}
    for layer in range(LAYERS):
        block = f"blip.visual_encoder.blocks.{layer}"
        norms |= {f"{block}.norm1": image, f"{block}.norm2": image}
        linear |= {
            f"{block}.attn.qkv": (3 * image, image),
            f"{block}.attn.proj": (image, image),
            f"{block}.mlp.fc1": (2 * image, image),
            f"{block}.mlp.fc2": (image, 2 * image),
        }
        block = f"blip.text_encoder.encoder.layer.{layer}"
        for attention, source in (("attention", text), ("crossattention", image)):
            linear |= {
                f"{block}.{attention}.self.query": (text, text),
                f"{block}.{attention}.self.key": (text, source),
                f"{block}.{attention}.self.value": (text, source),
                f"{block}.{attention}.output.dense": (text, text),
            }
            norms[f"{block}.{attention}.output.LayerNorm"] = text
        linear |= {f"{block}.intermediate.dense": (2 * text, text), f"{block}.output.dense": (text, 2 * text)}
        norms[f"{block}.output.LayerNorm"] = text
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes | head_shapes(text, "mlp.layers.")


def write_image_reward(folder: Path, seed: int = 0) -> Tiny:
    """`ImageReward.pt` (a plain state dict) beside `med_config.json`, and the tokenizer under `tokenizer/`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = random_tensors(image_reward_shapes(), seed)
    stored = {**tensors, "blip.text_encoder.embeddings.position_ids": torch.arange(64).expand(1, -1)}
    torch.save(stored, folder / "ImageReward.pt")
    med_config = {
        "architectures": ["BertModel"],
        "hidden_act": "gelu",
        "hidden_size": BERT_WIDTH,
        "intermediate_size": 2 * BERT_WIDTH,
        "layer_norm_eps": 1e-12,
        "max_position_embeddings": 64,
        "model_type": "bert",
        "num_attention_heads": BERT_HEADS,
        "num_hidden_layers": LAYERS,
        "pad_token_id": 0,
        "vocab_size": len(bert_tokenizer()) + 2,
        "encoder_width": 768,
        "add_cross_attention": True,
    }
    (folder / "med_config.json").write_text(json.dumps(med_config), encoding="utf-8")
    bert_tokenizer().save_pretrained(str(folder / "tokenizer"))
    return Tiny(folder, folder / "ImageReward.pt", tensors)


QWEN_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Qwen2's byte-level tokenizer without merges."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Qwen2Tokenizer(vocab={char: i for i, char in enumerate(alphabet)}, merges=[])
    tokenizer.add_tokens(list(QWEN_TOKENS), special_tokens=True)
    return tokenizer


def write_hpsv3(folder: Path, seed: int = 0) -> Tiny:
    """`HPSv3.safetensors` as transformers 4.45 names it, `base/` with config and tokenizer, and `instruction.py`."""
    (folder / "base").mkdir(parents=True, exist_ok=True)
    tokenizer = qwen_tokenizer()
    tokenizer.save_pretrained(str(folder / "base"))
    config = qwen_config(tokenizer)
    (folder / "base" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    # the reward token is not in the base's tokenizer, and has an embedding in the checkpoint
    model = Qwen2VLModel(Qwen2VLConfig(**config | {"vocab_size": len(tokenizer) + 1}))
    tensors = random_tensors({name: tuple(x.shape) for name, x in model.state_dict().items()}, seed)
    tensors = {name.replace("language_model.", "model."): x for name, x in tensors.items()}
    tensors["lm_head.weight"] = torch.zeros(len(tokenizer) + 1, QWEN_WIDTH)
    head = {"rm_head.0": (24, QWEN_WIDTH), "rm_head.3": (16, 24), "rm_head.5": (2, 16)}
    tensors |= random_tensors({f"{name}.weight": shape for name, shape in head.items()}, seed + 1)
    tensors |= random_tensors({f"{name}.bias": shape[:1] for name, shape in head.items()}, seed + 2)
    save_file(tensors, folder / "HPSv3.safetensors")
    (folder / "instruction.py").write_text(
        'import does_not_exist\n\nINSTRUCTION = """\nRate it.\nTextual prompt - {text_prompt}\n"""\n\n'
        'prompt_with_special_token = """\nRatings: <|Reward|>\n\nEND\n"""\n',
        encoding="utf-8",
    )
    return Tiny(folder, folder / "HPSv3.safetensors", tensors)


def qwen_config(tokenizer: Qwen2Tokenizer) -> dict[str, Any]:
    """A `config.json` as Qwen2-VL-7B-Instruct has it, with the text options at the top level."""
    return {
        "architectures": ["Qwen2VLForConditionalGeneration"],
        "model_type": "qwen2_vl",
        "hidden_act": "silu",
        "hidden_size": QWEN_WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": False,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "vision_start_token_id": tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        "vision_end_token_id": tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        "image_token_id": tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        "video_token_id": tokenizer.convert_tokens_to_ids("<|video_pad|>"),
        "vision_config": {
            "depth": LAYERS,
            "embed_dim": 32,
            "hidden_size": QWEN_WIDTH,
            "num_heads": 2,
            "mlp_ratio": 2,
            "in_chans": 3,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
        },
    }


def merged_tokenizer(words: Sequence[str]) -> Qwen2Tokenizer:
    """Qwen2's byte-level tokenizer with as many merges as make each word, with and without a space, one token."""
    alphabet = sorted(ByteLevel.alphabet())
    entries, merges = list(alphabet), []
    for word in words:
        for whole in (f"Ġ{word}", word):
            for end in range(2, len(whole) + 1):
                if whole[:end] not in entries:
                    entries.append(whole[:end])
                    merges.append((whole[: end - 1], whole[end - 1]))
    tokenizer = Qwen2Tokenizer(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges)
    tokenizer.add_tokens(list(QWEN_TOKENS), special_tokens=True)
    return tokenizer


def write_qwen_vl(folder: Path, kind: str = "qwen3_vl", seed: int = 0, words: Sequence[str] = ()) -> Path:
    """A folder of `Qwen3VLForConditionalGeneration`, or of the class for `qwen2_5_vl`, with random weights.

    It has what the published folders have: sharded weights, the tokenizer, the image processor's config, and settings
    of generation that sample.
    """
    tokenizer = merged_tokenizer(words)
    common = qwen_config(tokenizer)
    text = {
        key: common[key]
        for key in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    } | {"num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None}
    tokens = {key: common[key] for key in common if key.endswith("_token_id") and key not in ("bos_token_id",)}
    if kind == "qwen3_vl":
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3], "mrope_interleaved": True}
        vision = {"depth": LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 16}
        vision |= {"out_hidden_size": QWEN_WIDTH, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
        config: Any = Qwen3VLConfig(
            text_config=text | {"head_dim": 16, "rope_parameters": rope}, vision_config=vision, **tokens
        )
        model: Any = Qwen3VLForConditionalGeneration(config)
        mean, std = [0.5] * 3, [0.5] * 3
    else:
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
        vision = {"depth": LAYERS, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 14}
        vision |= {"out_hidden_size": QWEN_WIDTH, "fullatt_block_indexes": [1], "window_size": 56}
        config = Qwen2_5_VLConfig(text_config=text | {"rope_parameters": rope}, vision_config=vision, **tokens)
        model = Qwen2_5_VLForConditionalGeneration(config)
        mean = [0.48145466, 0.4578275, 0.40821073]
        std = [0.26862954, 0.26130258, 0.27577711]
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    model.load_state_dict(random_tensors(shapes, seed))
    model.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_p=0.8, repetition_penalty=1.5)
    model.save_pretrained(str(folder), max_shard_size="100KB")
    tokenizer.save_pretrained(str(folder))
    preprocessor = {"size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}, "image_mean": mean, "image_std": std}
    preprocessor |= {"patch_size": vision["patch_size"], "merge_size": 2, "temporal_patch_size": 2}
    (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor), encoding="utf-8")
    return folder


DEQA_CONFIG: dict[str, Any] = {
    "architectures": ["MPLUGOwl2LlamaForCausalLM"],
    "model_type": "mplug_owl2",
    "auto_map": {"AutoModelForCausalLM": "modeling_mplug_owl2_huggingface.MPLUGOwl2LlamaForCausalLM"},
    "vocab_size": 32_000,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-05,
    "max_position_embeddings": 2048,
    "visual_config": {
        "visual_model": {
            "hidden_size": 16,
            "intermediate_size": 40,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "image_size": 56,
            "patch_size": 14,
            "layer_norm_eps": 1e-06,
        },
        "visual_abstractor": {
            "num_learnable_queries": 6,
            "hidden_size": 16,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "intermediate_size": 24,
            "encoder_hidden_size": 16,
            "layer_norm_eps": 1e-06,
            "grid_size": 4,
        },
    },
}


def deqa_shapes() -> dict[str, tuple[int, ...]]:
    """Names and shapes of `MPLUGOwl2LlamaForCausalLM`."""
    width, inner, image, vocabulary = 32, 48, 16, 32_000
    shapes: dict[str, tuple[int, ...]] = {
        "lm_head.weight": (vocabulary, width),
        "model.embed_tokens.weight": (vocabulary, width),
        "model.norm.weight": (width,),
    }
    linear: dict[str, tuple[int, int]] = {"model.visual_abstractor.visual_fc": (width, image)}
    norms: dict[str, int] = {"model.vision_model.post_layernorm": image}
    for layer in range(LAYERS):
        block = f"model.layers.{layer}"
        for way in (0, 1):
            shapes |= {f"{block}.self_attn.{x}_proj.multiway.{way}.weight": (width, width) for x in "kv"}
            shapes |= {f"{block}.{x}_layernorm.multiway.{way}.weight": (width,) for x in ("input", "post_attention")}
        shapes |= {f"{block}.self_attn.{x}_proj.weight": (width, width) for x in "qo"}
        shapes |= {f"{block}.mlp.{x}_proj.weight": (inner, width) for x in ("gate", "up")}
        shapes |= {f"{block}.mlp.down_proj.weight": (width, inner)}
        block = f"model.vision_model.encoder.layers.{layer}"
        linear |= {f"{block}.self_attn.query_key_value": (3 * image, image), f"{block}.self_attn.dense": (image, image)}
        linear |= {f"{block}.mlp.fc1": (40, image), f"{block}.mlp.fc2": (image, 40)}
        norms |= {f"{block}.input_layernorm": image, f"{block}.post_attention_layernorm": image}
        block = f"model.visual_abstractor.encoder.layers.{layer}.crossattention"
        linear |= {f"{block}.attention.{x}": (image, image) for x in ("query", "key", "value")}
        linear |= {f"{block}.output.out_proj": (image, image), f"{block}.output.mlp.w2": (image, 24)}
        linear |= {f"{block}.output.mlp.w1": (24, image), f"{block}.output.mlp.w3": (24, image)}
        norms |= {f"{block}.norm1": image, f"{block}.normk": image, f"{block}.output.norm2": image}
        norms[f"{block}.output.mlp.ffn_ln"] = 24
        shapes |= {f"{block}.attention.q_pos_embed": (6, image), f"{block}.attention.k_pos_embed": (17, image)}
    embeddings = "model.vision_model.embeddings"
    norms[f"{embeddings}.pre_layernorm"] = image
    shapes |= {
        f"{embeddings}.cls_token": (1, 1, image),
        f"{embeddings}.patch_embed.weight": (image, 3, 14, 14),
        f"{embeddings}.position_embedding": (1, 17, image),
        "model.visual_abstractor.query_embeds": (1, 6, image),
        "model.visual_abstractor.vit_eos": (1, 1, width),
    }
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name, size in norms.items():
        shapes |= {f"{name}.weight": (size,), f"{name}.bias": (size,)}
    return shapes


def write_deqa(folder: Path, seed: int = 2) -> Tiny:
    """`config.json` and two shards, as the authors' code writes them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(DEQA_CONFIG), encoding="utf-8")
    tensors = random_tensors(dict(sorted(deqa_shapes().items())), seed)
    names = list(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:40], "model-00002-of-00002.safetensors": names[40:]}
    for file, held in shards.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": {name: file for file, held in shards.items() for name in held}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return Tiny(folder, folder / "model.safetensors.index.json", tensors)
