"""Encodes prompts, formatted as chats, with the hidden states of a Qwen decoder (FLUX.2 [klein], Z-Image, FLUX.3)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.core.prompt import MASK, PromptForm
from fmg.models.common.text import TokenisedText

_PROBE = "a red circle"


@dataclass(frozen=True)
class QwenText(TokenisedText):
    """A Qwen decoder with its tokenizer.

    Attributes:
        tokenizer: tokenizer with the chat template for prompts.
        text_encoder: the decoder, with or without its head, which is not run.
        layers: indices of the hidden states to use, concatenated along the channels; 0 means the embeddings.
        thinking: `enable_thinking` of the chat template; None leaves it out.
        padding_side: side of the padding; None: the tokenizer's own.
        padding_position: position of every padding token; None: its index in the sequence.
        masked: whether a row includes a token mask, for transformers that ignore the padding.
    """

    tokenizer: Any
    text_encoder: Any
    layers: tuple[int, ...]
    thinking: bool | None = None
    padding_side: Literal["left", "right"] | None = None
    padding_position: int | None = None
    masked: bool = False

    @property
    def encoders(self) -> tuple[Any]:
        """The decoder."""
        return (self.text_encoder,)

    @property
    def facts(self) -> tuple[str, ...]:
        """Settings that embeddings depend on besides the files: families use different states of one decoder."""
        taken = (self.layers, self.thinking, self.padding_side, self.padding_position, self.masked)
        return ("qwen", *map(str, taken))

    @property
    def width(self) -> int:
        """Channels of a token."""
        config = self.text_encoder.config
        hidden: int = getattr(config, "text_config", config).hidden_size
        return len(self.layers) * hidden

    @property
    def form(self) -> PromptForm:
        """The chat around a prompt.

        Raises:
            CheckpointError: the template changes the prompt itself.
        """
        prefix, _, suffix = self._chat(_PROBE).partition(_PROBE)
        form = PromptForm(prefix, suffix)
        if form(f" {_PROBE}\n") != self._chat(f" {_PROBE}\n"):
            raise CheckpointError(
                "The chat template does more than put text around a prompt",
                "Use the template that the model came with.",
            )
        return form

    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """Ids and mask of the chats."""
        side = {} if self.padding_side is None else {"padding_side": self.padding_side}
        encoded = self.tokenizer(
            [self._chat(prompt) for prompt in prompts],
            padding="max_length",
            max_length=length,
            truncation=True,
            return_tensors="pt",
            **side,
        )
        return {"tokenizer": encoded.input_ids, f"tokenizer{MASK}": encoded.attention_mask}

    def states(self, tokens: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) and, if `masked`, their `mask` (b, length), 1 for text and 0 for padding."""
        ids, mask = tokens["tokenizer"], tokens[f"tokenizer{MASK}"]
        # the head would compute a logit for every token and vocabulary entry
        states = self.text_encoder.base_model(
            input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False, **self._positions(mask)
        ).hidden_states
        chosen = torch.cat([states[layer] for layer in self.layers], dim=-1)
        return {"tokens": chosen, "mask": mask} if self.masked else {"tokens": chosen}

    def count(self, prompt: str) -> int:
        """Tokens of a prompt, including those of the chat template."""
        return len(self.tokenizer.encode(self._chat(prompt), verbose=False))

    def check_layers(self, folder: Path) -> None:
        """Checks that the decoder has all hidden states that are used.

        Raises:
            CheckpointError: it does not, or there is no chat template.
        """
        config = self.text_encoder.config
        depth = getattr(config, "text_config", config).num_hidden_layers
        if max(self.layers) > depth:
            raise CheckpointError(
                f"The text_encoder in {folder} has {depth} layers, but hidden states of layer {max(self.layers)} are"
                " needed",
                "Give a folder whose components belong together.",
            )
        if not self.tokenizer.chat_template:
            raise CheckpointError(
                f"The tokenizer in {folder} has no chat template", "Restore the folder from where the model came from."
            )

    def _chat(self, prompt: str) -> str:
        thinking = {} if self.thinking is None else {"enable_thinking": self.thinking}
        chat: str = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, **thinking
        )
        return chat

    def _positions(self, mask: Tensor) -> dict[str, Tensor]:
        if self.padding_position is None:
            return {}
        places = torch.arange(mask.shape[1], device=mask.device)[None]
        return {"position_ids": places.masked_fill(mask == 0, self.padding_position)}
