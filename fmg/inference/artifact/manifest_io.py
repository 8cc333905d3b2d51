"""Writes `manifest.json`, and reads it with every value checked. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path, PurePosixPath

from fmg.core.errors import CheckpointError
from fmg.core.json_io import JsonError, parse_object, sealed, unsealed
from fmg.inference.artifact.decode import DecodeError, decode
from fmg.inference.artifact.io_spec import check_io
from fmg.inference.artifact.manifest import (
    MANIFEST,
    MAX_LENGTH,
    OPTIONAL_GRAPHS,
    PACKED,
    SCHEMA,
    TEXT,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    FormedTokenizerFacts,
    Manifest,
)

MAX_BYTES = 1 << 21
"""Maximum bytes of a manifest: 2 MiB."""
_MAX_NAME = 255


def to_json(manifest: Manifest) -> str:
    """The text of `manifest.json`, with its own digest under `sha256`."""
    raw = asdict(manifest)
    if manifest.adapter is not None and not manifest.adapter.parts:
        # what is empty is left out, so that earlier versions of fmg read it
        del raw["adapter"]["parts"]
    for key in ("model", "base"):
        if raw[key]["options"] is None:
            del raw[key]["options"]
    return json.dumps(sealed(raw), indent=2) + "\n"


def from_json(text: str | bytes, origin: Path) -> Manifest:
    """A manifest from its text; `origin` is the file that error messages name.

    Raises:
        CheckpointError: it is not JSON, has a newer schema, was changed after it was written, lacks a key or has an
            unknown one, has an unusable value, names a path outside the artifact, refers to a file, graph or axis that
            it does not list, or has graphs with other inputs and outputs than backends provide.
    """
    if len(text) > MAX_BYTES:
        raise _unusable(origin, f"it has more than {MAX_BYTES:,} bytes")
    try:
        raw = parse_object(text)
    except JsonError as error:
        raise _unusable(origin, str(error)) from None
    schema = raw.get("schema")
    if type(schema) is not int:
        raise _unusable(origin, "it does not state its schema")
    if schema > SCHEMA:
        raise CheckpointError(
            f"{origin} has schema {schema!s:.30}, but this version of fmg reads schemas up to {SCHEMA}",
            "Export the artifact again with this one, or upgrade fmg.",
        )
    try:
        manifest = decode(Manifest, unsealed(raw))
        _check_paths(manifest)
        _check_references(manifest)
        _check_text_axis(manifest)
        check_io(manifest)
    except ValueError as error:
        raise _unusable(origin, str(error)) from None
    return manifest


def _check_paths(manifest: Manifest) -> None:
    for name in manifest.files:
        path = PurePosixPath(name)
        unusual = path.is_absolute() or ".." in path.parts or "\\" in name or ":" in name
        # what cannot be printed includes what no file system takes: NUL and halves of surrogate pairs
        unusual = unusual or not name.isprintable() or any(len(part.encode()) > _MAX_NAME for part in path.parts)
        if unusual or name != str(path) or name in (MANIFEST, "."):
            raise DecodeError(f"files has the path {name!r:.200}, which is not inside the artifact")


def _check_references(manifest: Manifest) -> None:
    if absent := [name for name in manifest.required if name not in manifest.graphs]:
        raise DecodeError(f"graphs.{absent[0]} is missing")
    if unknown := sorted(manifest.graphs.keys() - {*manifest.required, *OPTIONAL_GRAPHS}):
        raise DecodeError(f"graphs.{unknown[0]} is not a known graph")
    _check_tokenizers(manifest)
    named = [graph.file for graph in manifest.graphs.values()]
    named += [graph.weights for graph in manifest.graphs.values()]
    named += [tokenizer.file for tokenizer in manifest.tokenizers.values()]
    named += [] if manifest.base.weights is None else [manifest.base.weights]
    if absent := [name for name in named if name not in manifest.files]:
        raise DecodeError(f"files does not list {absent[0]!r:.200}")
    for name, graph in manifest.graphs.items():
        axes = {axis for spec in (*graph.inputs, *graph.outputs) for axis in spec.shape if isinstance(axis, str)}
        if unknown := sorted(axes - manifest.axes.keys()):
            raise DecodeError(f"axes.{unknown[0]} is missing, which graphs.{name} has")


def _check_tokenizers(manifest: Manifest) -> None:
    formed = {name for name, facts in manifest.tokenizers.items() if isinstance(facts, FormedTokenizerFacts)}
    if manifest.schema != PACKED:
        if not manifest.tokenizers:
            raise DecodeError("tokenizers is empty")
        if other := sorted(manifest.tokenizers.keys() - formed):
            raise DecodeError(f"tokenizers.{other[0]}.prefix is missing")
        return
    if absent := [name for name in (TEXT_ENCODER, TEXT_ENCODER_2) if name not in manifest.tokenizers]:
        raise DecodeError(f"tokenizers.{absent[0]} is missing")
    if unknown := sorted(manifest.tokenizers.keys() - {TEXT_ENCODER, TEXT_ENCODER_2}):
        raise DecodeError(f"tokenizers.{unknown[0]} belongs to no text encoder")
    if formed:
        raise DecodeError(f"tokenizers.{min(formed)}.prefix is not a known key")


def _check_text_axis(manifest: Manifest) -> None:
    if manifest.schema != PACKED:
        return
    axis, length = manifest.axes.get(TEXT), manifest.tokenizers[TEXT_ENCODER_2].length
    if axis is not None and not axis.minimum <= length <= axis.maximum <= MAX_LENGTH:
        raise DecodeError(
            f"axes.{TEXT} is {axis.minimum} to {axis.maximum}, which does not include the {length} tokens of a prompt"
            f" or goes beyond {MAX_LENGTH}"
        )


def _unusable(origin: Path, reason: str) -> CheckpointError:
    return CheckpointError(f"{origin} cannot be used: {reason}", "Restore the artifact, or export it again.")
