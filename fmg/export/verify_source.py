"""Verifies without a forward pass: every number and fact of an artifact against the files it was exported from.

Images of some prompts depend on only some of the weights; most of a vocabulary, for instance, is not used by them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from dataclasses import asdict, astuple, fields, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fmg.core.json_io import JsonError, parse
from fmg.core.model_folder import read_config
from fmg.export.artifact import sampling_of
from fmg.export.fp8 import Read, model_name, other_rounding, stored_scales
from fmg.export.int8 import other_weight
from fmg.export.model_artifact import LoadedSource
from fmg.export.onnx import inline_tensors
from fmg.export.options import plain_config
from fmg.export.precision_report import read_graph
from fmg.export.source import (
    ExportSource,
    base_dtypes,
    exported_options,
    graph_options,
    graph_tokenizer,
    model_reader,
    recipe_facts,
)
from fmg.export.weights import stored_places
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    SAMPLER,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODERS,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    Adapter,
    Check,
    Sampling,
)
from fmg.models.common.weights import TensorReader
from fmg.recipe.sharing import shareable

_SUM_ERROR = 1e-6
"""Tolerance of a sum of base and adapter, relative to the largest entry: CPUs add in different orders."""


def check_source(artifact: Artifact, source: ExportSource) -> Iterator[Check]:
    """Facts of the manifest, tokenizers, and each graph's weights, against the model and the run.

    Args:
        artifact: to verify.
        source: the files that it claims to be exported from.

    Raises:
        CheckpointError: a file of either side is missing or damaged.
    """
    yield _check(artifact, "facts", TRANSFORMER, _other_fact(artifact, source), {})
    for graph in (TEXT_ENCODER, TEXT_ENCODER_2):
        yield _check(artifact, f"tokenizer/{graph}", graph, _other_tokenizer(artifact, source, graph), {})
    for graph, described in artifact.manifest.graphs.items():
        reader = TensorReader.of(artifact.path(described.weights))
        problem = _misplaced(artifact, graph)
        if graph != SAMPLER:
            problem = problem or _other_weights(artifact, source, graph, reader)
        yield _check(artifact, f"weights/{graph}", graph, problem, {"tensors": float(len(reader.names))})


def check_loaded(artifact: Artifact, source: LoadedSource) -> Iterator[Check]:
    """As `check_source`, for an artifact of schema 2 and a model in memory.

    Raises:
        CheckpointError: a file is missing or damaged.
    """
    manifest = artifact.manifest
    rewards, prompts = recipe_facts(source.target.recipe)
    config = source.target.recipe.model.config
    options = graph_options(config)
    stated: dict[str, tuple[object, object]] = {
        "model.name": (manifest.model.name, source.facts.name),
        "model.transformer": (manifest.model.transformer, source.facts.transformer),
        "model.vae": (manifest.model.vae, source.facts.vae),
        # earlier versions wrote none
        "model.options": (exported_options(manifest.model.options or options, config), options),
        "base.digest": (manifest.base.digest, source.base.digest),
        "base.dtypes": (manifest.base.dtypes, source.base.dtypes),
        "adapter": (_without_run(manifest.adapter), _without_run(source.adapter)),
        "rewards": (shareable(manifest.rewards), shareable(rewards)),
        "prompts": (shareable(manifest.prompts), shareable(prompts)),
    }
    problem = _first_other({**stated, **_sampled(manifest.sampling, source.sampling)}, source.label)
    yield _check(artifact, "facts", TRANSFORMER, problem, {})
    with tempfile.TemporaryDirectory() as folder:
        expected = source.write_tokenizers(Path(folder))
        for name, facts in expected.items():
            stored = manifest.tokenizers.get(name)
            text = (Path(folder) / facts.file).read_bytes()
            same = stored == facts and _same_json(artifact.path(facts.file).read_bytes(), text)
            problem = "" if same else f"{facts.file} or what the manifest says of it differs from {source.label}"
            yield _check(artifact, f"tokenizer/{name}", TEXT_ENCODERS, problem, {})
    for graph, described in manifest.graphs.items():
        reader = TensorReader.of(artifact.path(described.weights))
        problem = _misplaced(artifact, graph)
        if graph != SAMPLER:
            problem = problem or _other_tensor(artifact, source, graph, reader)
        yield _check(artifact, f"weights/{graph}", graph, problem, {"tensors": float(len(reader.names))})


def _other_tensor(artifact: Artifact, source: LoadedSource, graph: str, exported: TensorReader) -> str:
    """The first weight that differs from the loaded model; empty for none."""
    if graph == TRANSFORMER_INT8:
        return _other_int8(artifact)
    summed = source.tensors[graph].keys() if graph == TRANSFORMER and source.adapter is not None else ()
    return _first_other_weight(exported, partial(source.read, graph), summed, _scales(artifact, graph))


def _check(artifact: Artifact, name: str, graph: str, problem: str, values: Mapping[str, float]) -> Check:
    return Check(name, not problem, dict(values), problem, artifact.manifest.weights_digest(graph))


def _other_fact(artifact: Artifact, source: ExportSource) -> str:
    """The first fact of the manifest that differs from an export of `source`; empty for none."""
    manifest, vae = artifact.manifest, read_config(source.folder / "vae")
    sampling = sampling_of(source, vae, manifest.sampling.resolutions)
    rewards, prompts = recipe_facts(source.recipe)
    adapter = None if source.delta is None else source.delta.adapter
    stated: dict[str, tuple[object, object]] = {
        "model.name": (manifest.model.name, source.name),
        "model.transformer": (manifest.model.transformer, plain_config(source.transformer.config)),
        "model.vae": (manifest.model.vae, plain_config(vae)),
        "base.digest": (manifest.base.digest, source.digest),
        "base.dtypes": (manifest.base.dtypes, base_dtypes(source.stored)),
        "adapter": (_without_run(manifest.adapter), _without_run(adapter)),
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


def _other_tokenizer(artifact: Artifact, source: ExportSource, graph: str) -> str:
    facts = artifact.manifest.tokenizers[graph]
    with tempfile.TemporaryDirectory() as folder:
        expected = graph_tokenizer(source, graph, Path(folder))
        text = (Path(folder) / expected.file).read_bytes()
    if facts != expected:
        return f"the manifest says {facts}, but {source.folder} has {expected}"
    ours = artifact.path(facts.file).read_bytes()
    return "" if ours == text or _same_json(ours, text) else f"{facts.file} differs from the one in {source.folder}"


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


def _other_weights(artifact: Artifact, source: ExportSource, graph: str, exported: TensorReader) -> str:
    """The first weight that differs from the model and the run; empty for none."""
    if graph == TRANSFORMER_INT8:
        return _other_int8(artifact)
    names = list(dict.fromkeys(map(model_name, exported.names)))
    summed = source.delta.lora.keys() if graph == TRANSFORMER and source.delta is not None else ()
    return _first_other_weight(exported, model_reader(source, graph, names), summed, _scales(artifact, graph))


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
