"""Prompt embeddings as FLUX takes them: T5 token states and the pooled CLIP state."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import CLIPTextModel, T5EncoderModel

from fmg.core.stages import TOKENISE, stage
from fmg.core.types import Conditioning
from fmg.models.text_cache import TextCache


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that encoding needs."""

    model_max_length: int

    def __call__(
        self, text: list[str], *, padding: str, max_length: int, truncation: bool, return_tensors: str
    ) -> TokenizedText:
        """Token ids of a batch of texts, padded to `max_length`."""


@runtime_checkable
class TokenizedText(Protocol):
    """What a tokenizer returns."""

    @property
    def input_ids(self) -> Int[Tensor, "b l"]:
        """Token ids."""


@dataclass(frozen=True)
class TextStack:
    """The two text encoders of FLUX with their tokenizers (`tokenizer`, `text_encoder`: CLIP; `_2`: T5)."""

    tokenizer: Tokenizer
    text_encoder: CLIPTextModel
    tokenizer_2: Tokenizer
    text_encoder_2: T5EncoderModel


class TextEncoders:
    """Encodes prompts exactly as `FluxPipeline.encode_prompt`, once for each distinct prompt.

    T5 gets no attention mask and sees its padding, CLIP gives the state at the end-of-text token; both cut what is
    longer than their length. The embeddings of recent prompts are kept, the least recently used go first.

    Args:
        stack: encoders and tokenizers.
        max_sequence_length: length that T5 tokens are padded and cut to.
        device: where the embeddings go.
        batch_size: prompts for one encoder call.
        cache_bytes: bound on the memory of kept embeddings.
        offload: whether the encoders compute on `device` and go back to where they were after each call.
        disk: embeddings of earlier runs. A row is read back bit for bit; that it also equals what another batch would
            have given takes `batch_size` 1.
    """

    def __init__(
        self,
        stack: TextStack,
        max_sequence_length: int,
        device: torch.device,
        batch_size: int = 32,
        cache_bytes: int = 256 * 2**20,
        *,
        offload: bool = False,
        disk: TextCache | None = None,
    ) -> None:
        self._stack = stack
        self._length = max_sequence_length
        self._device = device
        self._batch_size = batch_size
        self._cache: EmbeddingCache = EmbeddingCache(cache_bytes)
        self._remember = True
        self._offload = offload
        self._disk = disk

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with `tokens` (b, l, d) and `pooled` (b, p), in the encoders' dtype.

        Raises:
            ValueError: no prompt was given.
        """
        if not prompts:
            raise ValueError("no prompts to encode")
        distinct = tuple(dict.fromkeys(prompts))
        found = {prompt: row for prompt in distinct if (row := self._known(prompt)) is not None}
        missing = [prompt for prompt in distinct if prompt not in found]
        with self._at_work(bool(missing)):
            for start in range(0, len(missing), self._batch_size):
                chunk = missing[start : start + self._batch_size]
                for prompt, row in zip(chunk, self._rows(chunk), strict=True):
                    found[prompt] = row
                    if self._remember:
                        self._cache.put(prompt, row)
                    if self._remember and self._disk is not None:
                        self._disk.put(prompt, row)
        rows = [found[prompt] for prompt in prompts]
        tensors = {"tokens": torch.stack([row[0] for row in rows]), "pooled": torch.stack([row[1] for row in rows])}
        return Conditioning(tuple(prompts), tensors)

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Inside, every prompt is encoded, and none is remembered."""
        self._remember = False
        try:
            yield
        finally:
            self._remember = True

    def release(self) -> None:
        """Moves the encoders to the CPU, where a prompt that comes later is encoded."""
        encoders: list[Any] = [self._stack.text_encoder, self._stack.text_encoder_2]
        for encoder in encoders:
            encoder.to("cpu")

    def _known(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        if not self._remember:
            return None
        row = self._cache.get(prompt)
        stored = self._disk.get(prompt) if row is None and self._disk is not None else None
        if stored is None:
            return row
        row = (stored[0].to(self._device), stored[1].to(self._device))
        self._cache.put(prompt, row)
        return row

    @contextmanager
    def _at_work(self, needed: bool) -> Iterator[None]:
        """Runs the body with offloaded encoders on the device."""
        encoders: list[Any] = [self._stack.text_encoder, self._stack.text_encoder_2] if needed and self._offload else []
        rest = [encoder.device for encoder in encoders]
        for encoder in encoders:
            encoder.to(self._device)
        try:
            yield
        finally:
            for encoder, device in zip(encoders, rest, strict=True):
                encoder.to(device)

    def _rows(self, prompts: list[str]) -> Iterator[tuple[Tensor, Tensor]]:
        # clones, because a row that is a view would keep its whole batch alive in the cache
        tokens, pooled = self._tokens(prompts), self._pooled(prompts)
        return ((tokens[i].clone(), pooled[i].clone()) for i in range(len(prompts)))

    @torch.no_grad()
    def _tokens(self, prompts: list[str]) -> Float[Tensor, "b l d"]:
        encoder = self._stack.text_encoder_2
        ids = _token_ids(self._stack.tokenizer_2, prompts, self._length).to(encoder.device)
        states: Tensor = encoder(ids)[0]
        return states.to(self._device)

    @torch.no_grad()
    def _pooled(self, prompts: list[str]) -> Float[Tensor, "b p"]:
        encoder, tokenizer = self._stack.text_encoder, self._stack.tokenizer
        ids = _token_ids(tokenizer, prompts, tokenizer.model_max_length).to(encoder.device)
        pooled: Tensor = encoder(ids).pooler_output
        return pooled.to(self._device)


class EmbeddingCache:
    """Least-recently-used store of (tokens, pooled) rows, bounded by the bytes of its tensors."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._rows: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, prompt: str) -> tuple[Tensor, Tensor] | None:
        """The row of `prompt`, which becomes the most recently used one."""
        if prompt in self._rows:
            self._rows.move_to_end(prompt)
        return self._rows.get(prompt)

    def put(self, prompt: str, row: tuple[Tensor, Tensor]) -> None:
        """Keeps a new row and drops the least recently used ones until everything fits."""
        self._rows[prompt] = row
        self._size += _bytes(row)
        while self._size > self._capacity:
            _, dropped = self._rows.popitem(last=False)
            self._size -= _bytes(dropped)


def _bytes(row: tuple[Tensor, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in row)


def _token_ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> Int[Tensor, "b l"]:
    with stage(TOKENISE):
        encoded = tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return encoded.input_ids
