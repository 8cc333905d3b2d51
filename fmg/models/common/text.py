"""Prompt embeddings: computed once for each prompt, kept in memory and on disk."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import ByteCache, cache_dir, content_hash, optional_cache
from fmg.core.files import atomic_file
from fmg.core.profiling import TOKENISE, stage
from fmg.core.prompt import PromptForm, cut_prompts
from fmg.core.types import Conditioning
from fmg.models.common.weights import tensors_digest


@runtime_checkable
class Tokenizer(Protocol):
    """The part of a transformers tokenizer that encoding uses."""

    model_max_length: int

    def __call__(
        self, text: list[str], *, padding: str, max_length: int, truncation: bool, return_tensors: str
    ) -> TokenizedText:
        """Token ids of a batch of texts, padded to `max_length`."""

    def encode(self, text: str, *, verbose: bool = True) -> list[int]:
        """Token ids of one text, all of them; `verbose=False` suppresses the warning about long ones."""


@runtime_checkable
class TokenizedText(Protocol):
    """What a tokenizer returns."""

    @property
    def input_ids(self) -> Int[Tensor, "b l"]:
        """Token ids."""


@runtime_checkable
class TextStack(Protocol):
    """The text encoders of a family of models, with their tokenizers."""

    @property
    def encoders(self) -> tuple[Any, ...]:
        """The encoder modules."""

    def embed(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """The tensors of `Conditioning` by name, one row per prompt, on the device of the encoders.

        Args:
            prompts: what to encode.
            length: length to which tokens are padded or truncated.
        """

    def count(self, prompt: str) -> int:
        """Tokens of a prompt; `embed` truncates at its `length`."""


class TokenisedText(ABC):
    """A `TextStack` in two parts: tokens of prompts, and states of tokens. The second can be traced as a graph.

    It is a dataclass whose fields are named after the folders of encoders and tokenizers.
    """

    @property
    @abstractmethod
    def encoders(self) -> tuple[Any, ...]:
        """The encoder modules."""

    @property
    def form(self) -> PromptForm:
        """The text that the tokenizers read for a prompt."""
        return PromptForm()

    @abstractmethod
    def tokenise(self, prompts: list[str], length: int) -> Mapping[str, Int[Tensor, "b l"]]:
        """Ids by the names of the tokenizers, the one that reads most of a prompt last; masks as name + `MASK`."""

    @abstractmethod
    def states(self, tokens: Mapping[str, Int[Tensor, "b l"]]) -> Mapping[str, Tensor]:
        """The tensors of `Conditioning` by name; no value of a token decides a shape."""

    def embed(self, prompts: list[str], length: int) -> Mapping[str, Tensor]:
        """As `TextStack.embed`."""
        with stage(TOKENISE):
            tokens = self.tokenise(prompts, length)
        device = self.encoders[0].device
        return self.states({name: x.to(device) for name, x in tokens.items()})


def token_ids(tokenizer: Tokenizer, prompts: list[str], length: int) -> Int[Tensor, "b l"]:
    """Token ids of prompts, padded and truncated to `length`."""
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


class TextEncoders:
    """Encodes prompts by a family's `TextStack`, once for each distinct prompt.

    The embeddings of recent prompts are kept; the least recently used are dropped first.

    Args:
        stack: encoders and tokenizers.
        max_sequence_length: length to which tokens are padded or truncated.
        device: where the embeddings go.
        batch_size: prompts per encoder call.
        cache_bytes: bound on the memory of kept embeddings.
        offload: whether the encoders compute on `device` and go back to where they were after each call.
        disk: embeddings of earlier runs, read back bit for bit; only with `batch_size` 1 do they not depend on
            the batch.
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
        self._cache: ByteCache[Row] = ByteCache(cache_bytes)
        self._remember = True
        self._offload = offload
        self._disk = disk

    def encode(self, prompts: Sequence[str]) -> Conditioning:
        """Conditioning with the tensors of the stack, one row per prompt, in the encoders' dtype.

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
        rows = [found[prompt] for prompt in distinct]
        encoded = Conditioning(distinct, {name: torch.stack([row[name] for row in rows]) for name in rows[0]})
        if distinct == tuple(prompts):
            return encoded
        place = {prompt: index for index, prompt in enumerate(distinct)}
        return encoded.select(torch.tensor([place[prompt] for prompt in prompts]))

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """A warning about prompts that `encode` truncates; empty for none."""
        with stage(TOKENISE):
            counts = {prompt: self._stack.count(prompt) for prompt in dict.fromkeys(prompts)}
        return cut_prompts(counts, self._length)

    @contextmanager
    def uncached(self) -> Iterator[None]:
        """Runs the body with the cache off: every prompt is encoded, and none is stored."""
        self._remember = False
        try:
            yield
        finally:
            self._remember = True

    def release(self) -> None:
        """Moves the encoders to the CPU, where later prompts are encoded."""
        for encoder in self._stack.encoders:
            encoder.to("cpu")

    def _known(self, prompt: str) -> Row | None:
        if not self._remember:
            return None
        row = self._cache.get(prompt)
        stored = self._disk.get(prompt) if row is None and self._disk is not None else None
        if stored is None:
            return row
        row = {name: x.to(self._device) for name, x in stored.items()}
        self._cache.put(prompt, row)
        return row

    @contextmanager
    def _at_work(self, needed: bool) -> Iterator[None]:
        """Runs the body with offloaded encoders on the device."""
        encoders = self._stack.encoders if needed and self._offload else ()
        rest = [encoder.device for encoder in encoders]
        for encoder in encoders:
            encoder.to(self._device)
        try:
            yield
        finally:
            for encoder, device in zip(encoders, rest, strict=True):
                encoder.to(device)

    @torch.no_grad()
    def _rows(self, prompts: list[str]) -> list[Row]:
        tensors = {name: x.to(self._device) for name, x in self._stack.embed(prompts, self._length).items()}
        # clones, because a row that is a view would keep its whole batch alive in the cache
        return [{name: x[i].clone() for name, x in tensors.items()} for i in range(len(prompts))]


def cached_encoders(
    stack: TextStack,
    folder: Path,
    components: Sequence[str],
    length: int,
    device: torch.device,
    *,
    place: Literal["model", "cpu", "offload"],
    cache: bool,
    facts: Sequence[str] = (),
) -> TextEncoders:
    """Encoders for a run, placed and cached as its recipe states.

    Args:
        stack: encoders and tokenizers.
        folder: the pipeline folder that they were read from.
        components: their subfolders.
        length: length to which tokens are padded or truncated.
        device: where the embeddings go.
        place: where the encoders compute and rest: beside the model, on the CPU, or offloaded.
        cache: whether embeddings are kept on disk.
        facts: settings that determine an embedding besides the files.
    """
    encoder = stack.encoders[-1]
    computes_on = encoder.device if place == "cpu" else device
    disk = TextCache(encoder_key(folder, components, length, encoder.dtype, computes_on, *facts)) if cache else None
    # one prompt a call, so that an embedding does not depend on what else was missing when it was made
    return TextEncoders(stack, length, device, batch_size=1, offload=place == "offload", disk=disk)


_DIGEST = "sha256"
_SUFFIXES = (".json", ".model", ".safetensors", ".txt")

Row = Mapping[str, Tensor]
"""The tensors that condition one sample, by their names in `Conditioning`."""


class TextCache:
    """Rows of prompts, kept in a separate folder for each set of encoders.

    Args:
        key: hash of everything that determines an embedding besides the prompt; see `encoder_key`.
    """

    def __init__(self, key: str) -> None:
        self._folder = cache_dir() / "text" / key

    def get(self, prompt: str) -> Row | None:
        """The row of `prompt` on the CPU; None if there is no readable one."""
        try:
            with safe_open(str(self._file(prompt)), framework="pt") as opened:
                row = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                noted = (opened.metadata() or {}).get(_DIGEST)
        except (OSError, SafetensorError):
            return None
        # a damaged file is a miss: the row is computed again and takes its place
        return row if noted == tensors_digest(sorted(row.items())) else None

    def put(self, prompt: str, row: Row) -> None:
        """Stores a row; other processes see all of it or nothing."""
        tensors = {name: x.detach().cpu().contiguous() for name, x in row.items()}
        with optional_cache(), atomic_file(self._file(prompt)) as partial:
            save_file(tensors, partial, metadata={_DIGEST: tensors_digest(sorted(tensors.items()))})

    def _file(self, prompt: str) -> Path:
        return self._folder / f"{hashlib.sha256(prompt.encode()).hexdigest()}.safetensors"


def encoder_key(
    folder: Path, components: Sequence[str], length: int, dtype: torch.dtype, device: torch.device, *facts: str
) -> str:
    """Hash of the encoders' and tokenizers' files, the length, and the encoders' device and dtype.

    The device's kind is part of it, because CPU and GPU round differently. `facts` are the other settings
    that determine an embedding.
    """
    known = [*facts, str(length), str(dtype), device.type, *_hashes(folder, components)]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()


def _hashes(folder: Path, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        for file in sorted((folder / name).iterdir()):
            if file.suffix in _SUFFIXES:
                yield f"{name}/{file.name} {content_hash(file)}"
