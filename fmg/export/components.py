"""Weights of every graph, and the tokenizers, from the files of a model and the changes of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import CLIPTokenizer, T5Tokenizer

from fmg.core.errors import CheckpointError
from fmg.export.merge import merged
from fmg.export.source import ExportSource
from fmg.inference.artifact.layout import TOKENIZER_FILE, TOKENIZERS
from fmg.inference.artifact.manifest import TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, TokenizerFacts
from fmg.models.common.pipeline_parts import load_tokenizer, quiet
from fmg.models.common.weights import TensorReader, folder_weights
from fmg.models.flux.loading import FLUX

_TOKENIZER_CLASSES = {TEXT_ENCODER: CLIPTokenizer, TEXT_ENCODER_2: T5Tokenizer}


def graph_reader(source: ExportSource, graph: str, names: Iterable[str], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads the weights of a graph by the names that they have in it, in `dtype`; a run changes the transformer's only.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor.
    """
    if graph == TRANSFORMER:
        return merged(source.reader, source.delta, dtype)
    component = graph if graph in (TEXT_ENCODER, TEXT_ENCODER_2) else "vae"
    return component_reader(source.folder / component, names, dtype)


def graph_tokenizer(source: ExportSource, graph: str, out: Path) -> TokenizerFacts:
    """Writes the tokenizer of a text encoder under `out`, cut to what the model reads. Errors as `write_tokenizer`."""
    length = source.conventions.max_sequence_length if graph == TEXT_ENCODER_2 else None
    return write_tokenizer(source.folder, graph, out, length)


def component_reader(folder: Path, names: Iterable[str], dtype: torch.dtype) -> Callable[[str], Tensor]:
    """Reads the tensors called `names` of a component folder, in `dtype`.

    They are streamed where the files have them under these names or a known older one. Where they do not, the library
    that wrote the folder loads and renames them.

    Raises:
        CheckpointError: a file is missing or damaged, or lacks a tensor.
    """
    files = folder_weights(folder).files
    aliases = {name: alias for name in names if (alias := _stored_name(name, files.keys())) is not None}
    if set(names) <= aliases.keys():
        reader = TensorReader({name: files[alias] for name, alias in aliases.items()}, aliases)
        return lambda name: reader.read(name).to(dtype)
    with quiet():
        tensors = FLUX.module(folder, dtype).state_dict()
    return lambda name: tensors[name]


def stored_elements(folder: Path) -> int:
    """Numbers in the weight files of a component folder.

    Raises:
        CheckpointError: there is no weight file, or one cannot be read.
    """
    files = folder_weights(folder).files
    reader = TensorReader(files)
    return sum(math.prod(reader.describe(name)[1]) for name in files)


def write_tokenizer(source: Path, graph: str, out: Path, length: int | None) -> TokenizerFacts:
    """Writes the tokenizer of a text encoder as one `tokenizer.json` under `out`.

    Args:
        source: the pipeline folder.
        graph: which text encoder it feeds.
        out: the artifact's folder.
        length: tokens to pad and cut to; None takes the tokenizer's own maximum.

    Raises:
        CheckpointError: a file is missing or damaged, or the tokenizer pads or cuts on the left.
    """
    folder = TOKENIZERS[graph]
    with quiet():
        loaded: Any = load_tokenizer(source / folder, _TOKENIZER_CLASSES[graph])
    if (loaded.padding_side, loaded.truncation_side) != ("right", "right"):
        raise CheckpointError(
            f"The tokenizer in {source / folder} does not pad and cut on the right",
            "Give a FLUX pipeline folder.",
        )
    backend = Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    # the lengths are facts of the manifest, not of the file, so that a prompt's own length can still be counted
    backend.no_padding()
    backend.no_truncation()
    (out / folder).mkdir()
    name = f"{folder}/{TOKENIZER_FILE}"
    backend.save(str(out / name))
    return TokenizerFacts(name, length or int(loaded.model_max_length), int(loaded.pad_token_id), str(loaded.pad_token))


def _stored_name(name: str, stored: Iterable[str]) -> str | None:
    """The name in the files: T5's embedding is tied, and CLIP's text model used to be one level deeper."""
    candidates = [name, f"text_model.{name}"]
    candidates += ["shared.weight"] if name == "encoder.embed_tokens.weight" else []
    candidates += ["encoder.embed_tokens.weight"] if name == "shared.weight" else []
    return next((candidate for candidate in candidates if candidate in stored), None)
