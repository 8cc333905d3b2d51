"""Prompts to token ids with the tokenizers library alone, as the transformers tokenizers of the model make them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import CheckpointError, MissingDependencyError
from fmg.core.prompt import cut_prompts
from fmg.inference.artifact.manifest import TokenizerFacts


class PromptTokenizer:
    """One tokenizer of an artifact; pads on the right and cuts to its length.

    Args:
        file: a `tokenizer.json`.
        facts: its length and padding.

    Raises:
        MissingDependencyError: tokenizers is not installed.
        CheckpointError: the file cannot be read, or adds as many special tokens as a prompt may have.
    """

    def __init__(self, file: Path, facts: TokenizerFacts) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingDependencyError("Reading prompts needs tokenizers", "Run: pip install tokenizers") from None
        try:
            self._whole = Tokenizer.from_file(str(file))
            self._cut = Tokenizer.from_file(str(file))
        except Exception as error:
            # the library raises Exception itself
            raise CheckpointError(f"{file} cannot be read: {error}", "Export the artifact again.") from None
        self._whole.no_truncation()
        self._whole.no_padding()
        # the library does not cut special tokens, so rows would be longer than the graph takes, or hold no word
        if (special := self._whole.num_special_tokens_to_add(False)) >= facts.length:
            raise CheckpointError(
                f"{file} adds {special} special tokens to a prompt, and the manifest says it has {facts.length} in all",
                "Export the artifact again.",
            )
        self._cut.enable_truncation(facts.length)
        self._cut.enable_padding(length=facts.length, pad_id=facts.pad_id, pad_token=facts.pad_token)
        self._length = facts.length

    def __call__(self, prompts: Sequence[str]) -> NDArray[np.int64]:
        """Ids (b, length)."""
        return np.array([row.ids for row in self._cut.encode_batch(list(prompts))], dtype=np.int64)

    def cut_prompts(self, prompts: Sequence[str]) -> str:
        """What to say of prompts that are cut (`fmg.core.prompt.cut_prompts`); empty for none."""
        texts = list(dict.fromkeys(prompts))
        counts = (len(row.ids) for row in self._whole.encode_batch(texts))
        return cut_prompts(dict(zip(texts, counts, strict=True)), self._length)
