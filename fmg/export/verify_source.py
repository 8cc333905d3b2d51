"""What needs no forward pass: every number and every fact of an artifact against the files that it was made from.

Pictures of some prompts reach some of the weights only; a vocabulary, for instance, is hardly touched by them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from fmg.export.artifact import plain_config, sampling_of
from fmg.export.census import read_graph
from fmg.export.components import component_reader, write_tokenizer
from fmg.export.delta import Delta
from fmg.export.int8 import other_weight
from fmg.export.merge import base_dtypes, merged
from fmg.export.source import ExportSource, recipe_facts
from fmg.export.weights import stored_places
from fmg.inference.artifact.decode import encode
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import TEXT_ENCODER, TEXT_ENCODER_2, TRANSFORMER, TRANSFORMER_INT8, Check
from fmg.models.common.loading import read_config
from fmg.models.common.reader import TensorReader

_SUM_ERROR = 1e-6
"""Of a sum of base and adapter, relative to the largest entry: another CPU adds in another order."""

Reader = Callable[[str], Tensor]


def check_source(artifact: Artifact, source: ExportSource) -> Iterator[Check]:
    """Facts of the manifest, tokenizers, and each graph's weights, against the model and the run.

    Args:
        artifact: what to check.
        source: the files that it says it was made from.

    Raises:
        CheckpointError: a file of either side is missing or damaged.
    """
    yield _check(artifact, "facts", TRANSFORMER, _other_fact(artifact, source), {})
    for graph in (TEXT_ENCODER, TEXT_ENCODER_2):
        yield _check(artifact, f"tokenizer/{graph}", graph, _other_tokenizer(artifact, source, graph), {})
    for graph, described in artifact.manifest.graphs.items():
        reader = _reader(artifact, graph)
        problem = _misplaced(artifact, graph)
        if not problem and graph == TRANSFORMER_INT8:
            exact = _reader(artifact, TRANSFORMER)
            problem = other_weight(artifact.path(described.file), exact.names, exact.read)
        elif not problem:
            expected = _expected(source, graph, reader)
            problem = _other_weight(reader, expected, source.delta if graph == TRANSFORMER else None)
        yield _check(artifact, f"weights/{graph}", graph, problem, {"tensors": float(len(reader.names))})


def _reader(artifact: Artifact, graph: str) -> TensorReader:
    file = artifact.path(artifact.graph(graph).weights)
    return TensorReader(dict.fromkeys(stored_places(file), file))


def _check(artifact: Artifact, name: str, graph: str, problem: str, values: Mapping[str, float]) -> Check:
    return Check(name, not problem, dict(values), problem, artifact.manifest.weights_digest(graph))


def _other_fact(artifact: Artifact, source: ExportSource) -> str:
    """The first fact of the manifest that an export of `source` would state otherwise; empty for none."""
    manifest, vae = artifact.manifest, read_config(source.folder / "vae")
    sampling = sampling_of(source, vae, manifest.sampling.resolutions)
    rewards, prompts = recipe_facts(source.recipe)
    adapter = None if source.delta is None else encode(source.delta.adapter)
    stated: dict[str, tuple[object, object]] = {
        "model.name": (manifest.model.name, source.name),
        "model.transformer": (manifest.model.transformer, plain_config(source.transformer.config)),
        "model.vae": (manifest.model.vae, plain_config(vae)),
        "base.digest": (manifest.base.digest, source.digest),
        "base.dtypes": (manifest.base.dtypes, base_dtypes(source.stored)),
        "adapter": (_without_run(encode(manifest.adapter)), _without_run(adapter)),
        "rewards": (manifest.rewards, rewards),
        "prompts": (manifest.prompts, prompts),
    }
    for key, (ours, theirs) in {**stated, **_fields("sampling", manifest.sampling, sampling)}.items():
        if _plain(ours) != _plain(theirs):
            return f"{key} is {_short(ours)} in the manifest and {_short(theirs)} in {source.label}"
    return ""


def _fields(name: str, ours: object, theirs: object) -> dict[str, tuple[object, object]]:
    left, right = (json.loads(json.dumps(encode(value))) for value in (ours, theirs))
    return {f"{name}.{key}": (left.get(key), right.get(key)) for key in {**left, **right}}


def _without_run(adapter: object) -> object:
    """A run may have been moved: what counts is the digest of its files."""
    return {key: value for key, value in adapter.items() if key != "run"} if isinstance(adapter, Mapping) else adapter


def _plain(value: object) -> object:
    return json.loads(json.dumps(encode(value)))


def _short(value: object) -> str:
    text = json.dumps(encode(value))
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_tokenizer(artifact: Artifact, source: ExportSource, graph: str) -> str:
    facts = artifact.manifest.tokenizers[graph]
    length = source.conventions.max_sequence_length if graph == TEXT_ENCODER_2 else None
    with tempfile.TemporaryDirectory() as folder:
        expected = write_tokenizer(source.folder, graph, Path(folder), length)
        text = (Path(folder) / expected.file).read_bytes()
    if facts != expected:
        return f"the manifest says {facts}, and {source.folder} has {expected}"
    ours = artifact.path(facts.file).read_bytes()
    return "" if ours == text or _json(ours) == _json(text) else f"{facts.file} is not the one of {source.folder}"


def _json(text: bytes) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _misplaced(artifact: Artifact, graph: str) -> str:
    """The first weight of a graph that is not read from its own place in the graph's weight file; empty for none."""
    described = artifact.graph(graph)
    places = stored_places(artifact.path(described.weights))
    for tensor in read_graph(artifact.path(described.file)).graph.initializer:
        if not tensor.external_data:
            continue
        entry = {item.key: item.value for item in tensor.external_data}
        where = (entry.get("location"), entry.get("offset", "0"), entry.get("length", ""))
        place = places.get(tensor.name)
        if place is None or where != (described.weights, str(place[0]), str(place[1])):
            return f"the graph reads '{tensor.name}' from {where[0]}, byte {where[1]}, where it is not stored"
    return ""


def _expected(source: ExportSource, graph: str, exported: TensorReader) -> Reader:
    names = exported.names
    dtype = exported.describe(names[0])[0]
    if graph == TRANSFORMER:
        return merged(source.reader, source.delta, dtype)
    component = graph if graph in (TEXT_ENCODER, TEXT_ENCODER_2) else "vae"
    return component_reader(source.folder / component, names, dtype)


def _other_weight(exported: TensorReader, expected: Reader, delta: Delta | None) -> str:
    """The first weight that is not the one of the model and the run; empty for none."""
    summed = frozenset() if delta is None else frozenset(delta.lora)
    for name in exported.names:
        ours = exported.read(name)
        try:
            theirs = expected(name)
        except KeyError:
            return f"'{name}' is no weight of the model"
        if ours.dtype == theirs.dtype and torch.equal(ours, theirs):
            continue
        if name not in summed or not _same_sum(ours, theirs):
            return f"'{name}' differs from the weight of the model and the run"
    return ""


def _same_sum(ours: Tensor, theirs: Tensor) -> bool:
    """Whether two roundings of one sum."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    a, b = ours.float(), theirs.float()
    allowed = 2 * torch.finfo(ours.dtype).eps * b.abs() + _SUM_ERROR * b.abs().max()
    return bool(((a - b).abs() <= allowed).all())
