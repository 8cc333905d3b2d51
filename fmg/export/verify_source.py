"""Verifies without a forward pass: every number and fact of an artifact against the files it was exported from.

Images of some prompts depend on only some of the weights; most of a vocabulary, for instance, is not used by them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, astuple, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from fmg.core.json_io import JsonError, parse
from fmg.export.artifact import ArtifactSource
from fmg.export.fp8 import Read, model_name, other_rounding, stored_scales
from fmg.export.int8 import other_weight
from fmg.export.onnx import inline_tensors
from fmg.export.precision_report import read_graph
from fmg.export.source import exported_options, recipe_facts
from fmg.export.weights import stored_places
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    PACKED,
    SAMPLER,
    TEXT_ENCODERS,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    Adapter,
    Check,
    Manifest,
    Sampling,
    TokenizerFacts,
)
from fmg.models.common.weights import TensorReader
from fmg.recipe.sharing import shareable

_SUM_ERROR = 1e-6
"""Tolerance of a sum of base and adapter, relative to the largest entry: CPUs add in different orders."""


def check_source(artifact: Artifact, source: ArtifactSource) -> Iterator[Check]:
    """Facts of the manifest, tokenizers, and each graph's weights, against the model and the run.

    Args:
        artifact: to verify.
        source: what it claims to be exported from.

    Raises:
        CheckpointError: a file of either side is missing or damaged.
    """
    manifest = artifact.manifest
    yield _check(artifact, "facts", TRANSFORMER, _other_fact(manifest, source), {})
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for name, facts in source.write_tokenizers(folder).items():
            graph = name if name in manifest.graphs else TEXT_ENCODERS
            yield _check(
                artifact, f"tokenizer/{name}", graph, _other_tokenizer(artifact, source, name, facts, folder), {}
            )
    for graph, described in manifest.graphs.items():
        reader = TensorReader.of(artifact.path(described.weights))
        problem = _misplaced(artifact, graph)
        if graph != SAMPLER:
            problem = problem or _other_weights(artifact, source, graph, reader)
        yield _check(artifact, f"weights/{graph}", graph, problem, {"tensors": float(len(reader.names))})


def _check(artifact: Artifact, name: str, graph: str, problem: str, values: Mapping[str, float]) -> Check:
    return Check(name, not problem, dict(values), problem, artifact.manifest.weights_digest(graph))


def _other_fact(manifest: Manifest, source: ArtifactSource) -> str:
    """The first fact of the manifest that differs from an export of `source`; empty for none."""
    facts, base, config = source.facts, source.base, source.recipe.model.config
    options = facts.options or {}
    rewards, prompts = recipe_facts(source.recipe)
    sampling = source.sampling(manifest.sampling.resolutions if manifest.schema == PACKED else None)
    stated: dict[str, tuple[object, object]] = {
        "model.name": (manifest.model.name, facts.name),
        "model.transformer": (manifest.model.transformer, facts.transformer),
        "model.vae": (manifest.model.vae, facts.vae),
        # earlier versions wrote none
        "model.options": (exported_options(manifest.model.options or options, config), options),
        "base.digest": (manifest.base.digest, base.digest),
        "base.dtypes": (manifest.base.dtypes, base.dtypes),
        "adapter": (_without_run(manifest.adapter), _without_run(source.adapter)),
        # a pushed artifact or run names no folder of the computer that it was made on
        "rewards": (shareable(manifest.rewards), shareable(rewards)),
        "prompts": (shareable(manifest.prompts), shareable(prompts)),
    }
    return _first_other({**stated, **_sampled(manifest.sampling, sampling)}, source.label)


def _sampled(ours: Sampling, theirs: Sampling) -> dict[str, tuple[object, object]]:
    names = (f"sampling.{entry.name}" for entry in fields(Sampling))
    return dict(zip(names, zip(astuple(ours), astuple(theirs), strict=True), strict=True))


def _first_other(stated: Mapping[str, tuple[object, object]], label: str) -> str:
    """The first fact whose values in the manifest and in the source differ; empty for none."""
    for key, (ours, theirs) in stated.items():
        if _json(ours) != _json(theirs):
            return f"{key} is {_short(ours)} in the manifest, but {_short(theirs)} in {label}"
    return ""


def _without_run(adapter: Adapter | None) -> Adapter | None:
    """A run may have been moved: only the digests of its files count."""
    if adapter is None:
        return None
    return replace(adapter, run="", parts=tuple(replace(part, run="") for part in adapter.parts))


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=asdict)


def _short(value: object) -> str:
    text = json.dumps(value, default=asdict)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _other_tokenizer(
    artifact: Artifact, source: ArtifactSource, name: str, expected: TokenizerFacts, folder: Path
) -> str:
    """How a tokenizer differs from the one that was written to `folder`; empty if it does not."""
    facts = artifact.manifest.tokenizers.get(name)
    if facts != expected:
        return f"the manifest says {facts}, but {source.label} has {expected}"
    same = _same_json(artifact.path(expected.file).read_bytes(), (folder / expected.file).read_bytes())
    return "" if same else f"{expected.file} differs from the one of {source.label}"


def _same_json(one: bytes, other: bytes) -> bool:
    try:
        return parse(one) == parse(other)
    except JsonError:
        return False


def _misplaced(artifact: Artifact, graph: str) -> str:
    """The first weight of a graph that is not read from its own place in its weight file; empty for none."""
    # the sampler shares the weights of these graphs, and its names say of which
    parts = {f"{part}.": part for part in (TRANSFORMER, VAE_DECODER)} if graph == SAMPLER else {"": graph}
    places = {
        (weights, prefix + name): tuple(map(str, place))
        for prefix, part in parts.items()
        for weights in [artifact.graph(part).weights]
        for name, place in stored_places(artifact.path(weights)).items()
    }
    for tensor in read_graph(artifact.onnx(graph)).graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        weights, where = entry.get("location", ""), (entry.get("offset", "0"), entry.get("length", ""))
        if entry and where != places.get((weights, tensor.name)):
            return f"the graph reads '{tensor.name}' from {weights}, byte {where[0]}, where it is not stored"
    return ""


def _other_weights(artifact: Artifact, source: ArtifactSource, graph: str, exported: TensorReader) -> str:
    """The first weight that differs from the model and the run; empty for none."""
    if graph == TRANSFORMER_INT8:
        return _other_int8(artifact)
    names = list(dict.fromkeys(map(model_name, exported.names)))
    summed = source.summed if graph == TRANSFORMER else ()
    return _first_other_weight(exported, source.graph_reader(graph, names), summed, _scales(artifact, graph))


def _other_int8(artifact: Artifact) -> str:
    """The first weight of the 8-bit graph that does not match the fp32 graph; empty for none."""
    exact = TensorReader.of(artifact.path(artifact.graph(TRANSFORMER).weights))
    # what the tracer stored in the graph, such as a table of positions
    constants = inline_tensors(artifact.onnx(TRANSFORMER))

    def read(name: str) -> Tensor:
        return constants[name] if name in constants else exact.read(name)

    return other_weight(artifact.onnx(TRANSFORMER_INT8), {*exact.names, *constants}, read)


def _scales(artifact: Artifact, graph: str) -> Mapping[str, float]:
    """The scales of a graph's 8-bit floats; none in other precisions."""
    return stored_scales(artifact.onnx(graph)) if artifact.graph(graph).precision == "fp8" else {}


def _first_other_weight(
    exported: TensorReader, read: Read, summed: Collection[str], scales: Mapping[str, float]
) -> str:
    """The first weight that differs from the model and the run; empty for none.

    Args:
        exported: the weights of a graph.
        read: reads those of the model and the run.
        summed: names of those that are sums of base and adapter.
        scales: of 8-bit floats.
    """
    for name in exported.names:
        ours, own = exported.read(name), model_name(name)
        narrow = ours.dtype == torch.float8_e4m3fn
        try:
            theirs = read(own, torch.float32 if narrow else ours.dtype).cpu()
        except KeyError:
            return f"'{own}' is not a weight of the model"
        if narrow:
            same = not other_rounding(name, ours, theirs, scales, summed=own in summed)
        else:
            same = torch.equal(ours, theirs) or (own in summed and _same_sum(ours, theirs))
        if not same:
            return f"'{own}' differs from the weight of the model and the run"
    return ""


def _same_sum(ours: Tensor, theirs: Tensor) -> bool:
    """Whether both are roundings of the same sum."""
    if (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    a, b = ours.float(), theirs.float()
    allowed = 2 * torch.finfo(ours.dtype).eps * b.abs() + _SUM_ERROR * b.abs().max()
    return bool(((a - b).abs() <= allowed).all())
