"""Qwen text encoders of a few hundred kilobytes with random weights, for folders of the families that have one."""

from __future__ import annotations

from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

WIDTH = 16
# written for these tests: a turn between marks, and an empty thought where thinking is turned off
_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def qwen_tokenizer() -> Qwen2Tokenizer:
    """Single bytes, with the special tokens and a chat template of the form of Qwen's."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    entries = [*special, *sorted(ByteLevel.alphabet())]
    tokenizer = Qwen2Tokenizer(
        vocab={entry: index for index, entry in enumerate(entries)},
        merges=[],
        additional_special_tokens=special[1:],
        padding_side="right",
    )
    tokenizer.chat_template = _TEMPLATE
    return tokenizer


def qwen3(layers: int = 28) -> Qwen3ForCausalLM:
    """A Qwen3 whose embeddings are its head, as in the sizes below 8 B."""
    return Qwen3ForCausalLM(Qwen3Config(**_sizes(layers), tie_word_embeddings=True)).eval()


def qwen3_vl(layers: int = 33) -> Qwen3VLForConditionalGeneration:
    """A Qwen3-VL with a vision tower that text never reaches."""
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 10000.0}
    vision = {
        "depth": 1,
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 2,
        "out_hidden_size": WIDTH,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    }
    text = {**_sizes(layers), "rope_parameters": rope}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return Qwen3VLForConditionalGeneration(config).eval()


def _sizes(layers: int) -> dict[str, object]:
    return {
        "vocab_size": 5 + 256,
        "hidden_size": WIDTH,
        "intermediate_size": 2 * WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": 0,
    }
