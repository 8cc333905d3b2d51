"""The text encoder of SANA: hidden states of Gemma 2 under the authors' instruction."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusers import SanaSprintPipeline
from torch import Tensor
from transformers import Gemma2Model


@dataclass(frozen=True)
class SanaText:
    """Gemma 2 with its tokenizer, which pads on the right.

    Attributes:
        tokenizer: of Gemma.
        text_encoder: the decoder without its head.
        instruction: text before each prompt; empty for none.
    """

    tokenizer: Any
    text_encoder: Gemma2Model
    instruction: str

    @property
    def encoders(self) -> tuple[Gemma2Model]:
        """Gemma."""
        return (self.text_encoder,)

    def embed(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) and their `mask` (b, length), 1 for text and 0 for padding.

        As `SanaSprintPipeline.encode_prompt`: the prompt in lower case after the instruction, and of all states the
        first and the last `length - 1`, so that the instruction shapes the states without being seen itself.
        """
        texts = [self._instructed(prompt) for prompt in prompts]
        total = length + self._extra()
        encoded = self.tokenizer(
            texts, padding="max_length", max_length=total, truncation=True, return_tensors="pt"
        ).to(self.text_encoder.device)
        states: Tensor = self.text_encoder(encoded.input_ids, attention_mask=encoded.attention_mask)[0]
        chosen = [0, *range(1 - length, 0)]
        return {"tokens": states[:, chosen], "mask": encoded.attention_mask[:, chosen]}

    def count(self, prompt: str) -> int:
        """Tokens of Gemma without those of the instruction."""
        return len(self.tokenizer.encode(self._instructed(prompt), verbose=False)) - self._extra()

    def _instructed(self, prompt: str) -> str:
        return self.instruction + prompt.lower().strip()

    def _extra(self) -> int:
        """Tokens that the instruction adds to a prompt, as `SanaSprintPipeline` counts them."""
        return len(self.tokenizer.encode(self.instruction)) - 2 if self.instruction else 0


def published_instruction() -> str:
    """The instruction that the installed `SanaSprintPipeline` puts before a prompt when nobody says otherwise."""
    lines = inspect.signature(SanaSprintPipeline.__call__).parameters["complex_human_instruction"].default
    return "\n".join(lines)
