"""Names for sets of modules that a LoRA adapts. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable
from types import MappingProxyType

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
_ATTENTION_ENDS = ("to_q", "to_k", "to_v", "to_out.0")
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")

LORA_PRESETS = MappingProxyType(
    {
        "attention": _ATTENTION,
        "attention-mlp": _ATTENTION + _FEED_FORWARD,
        "self-attention": tuple(f"attn1.{end}" for end in _ATTENTION_ENDS),
        "cross-attention": tuple(f"attn2.{end}" for end in _ATTENTION_ENDS),
    }
)
"""Preset name -> suffixes of module names. `attention` is what published RL fine-tunes of FLUX adapt: the image and
text projections of the double-stream blocks and, by the same suffixes, to_q/k/v of the single-stream blocks. On SANA it
is both attentions of a block, which the last two name one by one: the linear one among image tokens, and the one that
looks at the prompt."""


def expand_targets(targets: Iterable[str]) -> tuple[str, ...]:
    """Presets replaced by their suffixes, other entries kept; without repeats, in order."""
    expanded = (suffix for target in targets for suffix in LORA_PRESETS.get(target, (target,)))
    return tuple(dict.fromkeys(expanded))


def is_target(name: str, suffixes: Iterable[str]) -> bool:
    """Whether the name of a module is, or ends with a dot and, one of the suffixes."""
    return any(name == suffix or name.endswith(f".{suffix}") for suffix in suffixes)
