"""The text encoders of FLUX: T5 token states and the pooled CLIP state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from fmg.core.profiling import TOKENISE, stage
from fmg.models.common.text import Tokenizer


@dataclass(frozen=True)
class FluxText:
    """The two text encoders of FLUX with their tokenizers (`tokenizer`, `text_encoder`: CLIP; `_2`: T5).

    T5 gets no attention mask and sees its padding, CLIP gives the state at the end-of-text token; both cut what is
    longer than their length.
    """

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: Tokenizer
    text_encoder_2: T5EncoderModel

    @property
    def encoders(self) -> tuple[CLIPTextModel, T5EncoderModel]:
        """CLIP and T5."""
        return self.text_encoder, self.text_encoder_2

    def embed(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """`tokens` (b, length, d) of T5 and `pooled` (b, p) of CLIP, as `FluxPipeline.encode_prompt` makes them."""
        return {"tokens": self._tokens(prompts, length), "pooled": self._pooled(prompts)}

    def count(self, prompt: str) -> int:
        """Tokens of T5, its end included; CLIP only ever sees the beginning of a prompt."""
        return len(self.tokenizer_2.encode(prompt, verbose=False))

    def _tokens(self, prompts: list[str], length: int) -> Float[Tensor, "b l d"]:
        states: Tensor = self.text_encoder_2(_ids(self.tokenizer_2, prompts, length).to(self.text_encoder_2.device))[0]
        return states

    def _pooled(self, prompts: list[str]) -> Float[Tensor, "b p"]:
        ids = _ids(self.tokenizer, prompts, self.tokenizer.model_max_length).to(self.text_encoder.device)
        pooled: Tensor = self.text_encoder(ids).pooler_output
        return pooled


def _ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> Int[Tensor, "b l"]:
    with stage(TOKENISE):
        encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids
