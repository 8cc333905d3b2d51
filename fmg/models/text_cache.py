"""Prompt embeddings on disk: what the text encoders computed once is read back bit for bit.

<cache>/text/<encoders>/<prompt>.safetensors, where `<encoders>` is a hash of everything that decides an embedding
besides the prompt, and `<prompt>` the hash of its text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fmg.core.cache import cache_dir, content_hash, optional_cache
from fmg.core.files import atomic_file
from fmg.models.common.digest import tensors_digest

_DIGEST = "sha256"
_SUFFIXES = (".json", ".model", ".safetensors", ".txt")

Row = Mapping[str, Tensor]
"""What conditions one sample, by the names that `Conditioning` has."""


class TextCache:
    """Rows of prompts, kept under a folder of their own for each set of encoders.

    Args:
        key: hash of what decides an embedding besides the prompt; see `encoder_key`.
    """

    def __init__(self, key: str) -> None:
        self._folder = cache_dir() / "text" / key

    def get(self, prompt: str) -> Row | None:
        """The row of `prompt` on the CPU; None where there is none that can be read."""
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
    """Hash of the encoders' and tokenizers' files, the length, and where and in what the encoders compute.

    The device's kind is part of it, because CPU and GPU round differently. `facts` is what else decides an embedding.
    """
    known = [*facts, str(length), str(dtype), device.type, *_hashes(folder, components)]
    return hashlib.sha256("\n".join(known).encode()).hexdigest()


def _hashes(folder: Path, names: Sequence[str]) -> Iterator[str]:
    for name in names:
        for file in sorted((folder / name).iterdir()):
            if file.suffix in _SUFFIXES:
                yield f"{name}/{file.name} {content_hash(file)}"
