"""The whole few-step sampler as one ONNX graph: every step of the transformer, then the decoder.

It is joined from the graphs of an artifact, so nothing is traced again and each node computes what it computes in the
loop of `fmg.inference.artifact.backend`. The steps are unrolled and share their weights, which stay in the files of
transformer and decoder. Nodes that depend on neither latents nor times run once
(docs/adr/0035-the-sampler-as-one-graph.md).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fmg.core.errors import CheckpointError
from fmg.export.onnx import check_file, require_onnx
from fmg.export.precision_report import read_graph
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.layout import file_entry, graph_file
from fmg.inference.artifact.manifest import (
    BATCH,
    PACKED,
    SAMPLER,
    TEXT,
    TEXT_ENCODER_2,
    TRANSFORMER,
    VAE_DECODER,
    Graph,
    Manifest,
    Sampling,
    TensorSpec,
)
from fmg.models.flux.latents import PATCH, image_ids

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TensorProto

_PER_STEP = frozenset({io_spec.HIDDEN_STATES, io_spec.LATENTS, io_spec.TIMESTEP, io_spec.SECOND})
"""Inputs of the transformer that differ from step to step."""
_POSITIONS = frozenset({io_spec.IMG_IDS, io_spec.TXT_IDS})


def add_sampler(folder: Path, manifest: Manifest, *, check: bool = True) -> Manifest:
    """Writes the sampler of an artifact beside its graphs, for the steps and the resolution of its manifest.

    Args:
        folder: the artifact, or the folder in which it is being written.
        manifest: its manifest; a sampler that it lists is replaced.
        check: run ONNX's checker, which refuses weight files with several hard links.

    Returns:
        The manifest with the graph and the file.

    Raises:
        CheckpointError: a graph is damaged, or cannot be joined with the other.
        MissingDependencyError: onnx is not installed.
    """
    require_onnx()
    transformer, decoder = (read_graph(folder / manifest.graphs[name].file) for name in (TRANSFORMER, VAE_DECODER))
    described = _described(manifest)
    model = _Join(manifest, described, transformer, decoder).model()
    file = folder / described.file
    # a link of the file may be part of another artifact
    file.unlink(missing_ok=True)
    file.write_bytes(model.SerializeToString(deterministic=True))
    if check:
        check_file(file)
    files = {**manifest.files, described.file: file_entry(file)}
    return replace(manifest, files=dict(sorted(files.items())), graphs={**manifest.graphs, SAMPLER: described})


def _described(manifest: Manifest) -> Graph:
    """The entry of the sampler in the manifest."""
    sampling, transformer = manifest.sampling, manifest.graphs[TRANSFORMER]
    own = io_spec.sampler_inputs(sampling, sampling.steps)
    inputs = [_float_spec(name, shape) for name, shape in own.items()]
    loop = {io_spec.VELOCITY, io_spec.GUIDANCE} | _PER_STEP | _POSITIONS
    inputs += [_at_full_length(spec, manifest) for spec in transformer.inputs if spec.name not in loop]
    side = sampling.resolution
    outputs = (
        _float_spec(io_spec.LATENTS, (BATCH, *sampling.latent_shape())),
        _float_spec(io_spec.IMAGES, (BATCH, 3, side, side)),
    )
    return Graph(graph_file(SAMPLER), transformer.weights, transformer.precision, tuple(inputs), outputs)


def _float_spec(name: str, shape: Iterable[int | str | None]) -> TensorSpec:
    return TensorSpec(name, "float32", tuple(axis for axis in shape if axis is not None))


def _at_full_length(spec: TensorSpec, manifest: Manifest) -> TensorSpec:
    """The input with the one length that prompts are padded to."""
    shape = (manifest.tokenizers[TEXT_ENCODER_2].length if axis == TEXT else axis for axis in spec.shape)
    return replace(spec, shape=tuple(shape))


class _Join:
    """The nodes and initialisers of the joined graph as they are added."""

    def __init__(self, manifest: Manifest, described: Graph, transformer: ModelProto, decoder: ModelProto) -> None:
        self._manifest = manifest
        self._sampling: Sampling = manifest.sampling
        self._packs = manifest.schema == PACKED
        self._described = described
        self._opsets = _common_opsets(transformer, decoder)
        self._ir_version = max(transformer.ir_version, decoder.ir_version)
        self._nodes: list[NodeProto] = []
        self._initialisers: dict[str, TensorProto] = {}
        self._constants: dict[object, str] = {}
        self._numbers = count()
        self._transformer = _Part(self, TRANSFORMER, transformer)
        self._decoder = _Part(self, VAE_DECODER, decoder)

    def model(self) -> ModelProto:
        """The graph from noise to latents and images."""
        from onnx import helper

        latents = self._sampled()
        (images,) = self._decoder.add("", self._decoder.nodes, {io_spec.LATENTS: latents}, [io_spec.IMAGES])
        for name, value in ((io_spec.LATENTS, latents), (io_spec.IMAGES, images)):
            self._nodes.append(helper.make_node("Identity", [value], [name], name=f"{SAMPLER}.{name}"))
        inputs, outputs = (
            [_value(spec) for spec in specs] for specs in (self._described.inputs, self._described.outputs)
        )
        graph = helper.make_graph(self._nodes, SAMPLER, inputs, outputs, list(self._initialisers.values()))
        return helper.make_model(graph, opset_imports=self._opsets, ir_version=self._ir_version, producer_name="fmg")

    def _sampled(self) -> str:
        """The latents after all steps: the same arithmetic as `fmg.inference.artifact.backend.few_step`."""
        steps, single = self._sampling.steps, self._sampling.map == "single-time"
        once, again = self._transformer.split(_PER_STEP)
        fixed = self._fixed_inputs()
        self._transformer.add("", once, fixed, [])
        times = [self.op("Gather", io_spec.TIMES, self.constant(np.int64(k)), axis=1) for k in range(steps + 1)]

        def velocity(x: str, t: str, step: int) -> str:
            state = io_spec.HIDDEN_STATES if self._packs else io_spec.LATENTS
            given = {**fixed, state: x, io_spec.TIMESTEP: t, io_spec.SECOND: times[step + 1]}
            (made,) = self._transformer.add(f"step{step}.", again, given, [io_spec.VELOCITY])
            return made

        x = self._enter(io_spec.NOISE)
        for step in range(steps):
            t, s = times[step], times[step + 1]
            if not single:
                x = self.op("Sub", x, self.op("Mul", self._column(self.op("Sub", t, s)), velocity(x, t, step)))
                continue
            x = self._data(x, t, step, velocity)
            if step < steps - 1:
                renoise = self.op("Gather", io_spec.RENOISE, self.constant(np.int64(step)), axis=1)
                scale, std = map(self._column, self._kernel(s))
                x = self.op("Add", self.op("Mul", scale, x), self.op("Mul", std, self._enter(renoise)))
        return self._leave(x)

    def _data(self, x: str, t: str, step: int, velocity: Callable[[str, str, int], str]) -> str:
        """A single-time map's prediction of the data."""
        if self._sampling.path != "trig":
            return self.op("Sub", x, self.op("Mul", self._column(t), velocity(x, t, step)))
        cosine, sine = self._kernel(t)
        total = self.op("Add", sine, cosine)
        time = self.op("Div", sine, total)
        z = self.op("Div", x, self._column(total))
        return self.op("Sub", z, self.op("Mul", self._column(time), velocity(z, time, step)))

    def _kernel(self, s: str) -> tuple[str, str]:
        """Scale and std of noised data at time `s`, for each row."""
        rest = self.op("Sub", self.constant(np.float32(1)), s)
        if self._sampling.path == "linear":
            return rest, s
        quarter = self.constant(np.float32(math.pi / 2))
        cosine, sine = (self.op("Sin", self.op("Mul", value, quarter)) for value in (rest, s))
        return cosine, sine

    def _fixed_inputs(self) -> dict[str, str]:
        """The inputs of the transformer that are the same in every step, by the names of values in this graph."""
        taken = {spec.name for spec in self._manifest.graphs[TRANSFORMER].inputs}
        named = {spec.name: spec.name for spec in self._described.inputs if spec.name in taken}
        if not self._packs:
            return named
        _, height, width = self._sampling.latent_shape()
        text = self._manifest.tokenizers[TEXT_ENCODER_2].length
        return {
            **named,
            io_spec.IMG_IDS: self.constant(image_ids(height, width)),
            io_spec.TXT_IDS: self.constant(np.zeros((text, 3), np.float32)),
        }

    def _enter(self, latents: str) -> str:
        """Latents as the transformer takes them (`fmg.models.flux.latents.pack`)."""
        if not self._packs:
            return latents
        c, h, w = self._sampling.latent_shape()
        rows, columns = h // PATCH, w // PATCH
        patches = self._reshaped(latents, (c, rows, PATCH, columns, PATCH))
        return self._reshaped(
            self.op("Transpose", patches, perm=[0, 2, 4, 1, 3, 5]), (rows * columns, c * PATCH * PATCH)
        )

    def _leave(self, tokens: str) -> str:
        """The transformer's output as latents (`fmg.models.flux.latents.unpack`)."""
        if not self._packs:
            return tokens
        c, h, w = self._sampling.latent_shape()
        patches = self._reshaped(tokens, (h // PATCH, w // PATCH, c, PATCH, PATCH))
        return self._reshaped(self.op("Transpose", patches, perm=[0, 3, 1, 4, 2, 5]), (c, h, w))

    def _reshaped(self, value: str, shape: Sequence[int]) -> str:
        return self.op("Reshape", value, self.constant(np.array([-1, *shape], np.int64)))

    def _column(self, rows: str) -> str:
        """One number for each row, to be multiplied with latents or tokens."""
        axes = [1, 2] if self._packs else [1, 2, 3]
        return self.op("Unsqueeze", rows, self.constant(np.array(axes, np.int64)))

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Adds a node; returns the name of its output."""
        from onnx import helper

        name = f"{SAMPLER}.{kind.lower()}_{next(self._numbers)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=name, **attributes))
        return name

    def constant(self, values: NDArray[Any] | np.generic) -> str:
        """Adds an initialiser, or finds an equal one; returns its name."""
        from onnx import numpy_helper

        array = np.asarray(values)
        key = (str(array.dtype), array.shape, array.tobytes())
        if key not in self._constants:
            name = f"{SAMPLER}.constant_{next(self._numbers)}"
            self._initialisers[name] = numpy_helper.from_array(array, name)
            self._constants[key] = name
        return self._constants[key]

    def take(self, node: NodeProto) -> None:
        """Adds a node of a part."""
        self._nodes.append(node)

    def keep(self, tensor: TensorProto, name: str) -> None:
        """Adds an initialiser of a part under its name here."""
        copy = type(tensor)()
        copy.CopyFrom(tensor)
        copy.name = name
        self._initialisers[name] = copy


class _Part:
    """A graph of the artifact inside the joined one: its values get its name, and that of the step, as a prefix."""

    def __init__(self, join: _Join, name: str, model: ModelProto) -> None:
        if model.functions or any(attribute.HasField("g") for node in model.graph.node for attribute in node.attribute):
            raise CheckpointError(
                f"The graph '{name}' has functions or subgraphs, which cannot be joined", "Leave --fused out."
            )
        self.nodes: Sequence[NodeProto] = tuple(model.graph.node)
        self._join = join
        self._prefix = f"{name}."
        # by their names in the part
        self._names: dict[str, str] = {}
        for tensor in model.graph.initializer:
            self._names[tensor.name] = self._prefix + tensor.name
            join.keep(tensor, self._names[tensor.name])

    def split(self, inputs: frozenset[str]) -> tuple[list[NodeProto], list[NodeProto]]:
        """The nodes that depend on none of the inputs, and those that do."""
        dependent = set(inputs)
        once: list[NodeProto] = []
        again: list[NodeProto] = []
        for node in self.nodes:
            depends = not dependent.isdisjoint(node.input)
            dependent.update(node.output if depends else ())
            (again if depends else once).append(node)
        return once, again

    def add(
        self, step: str, nodes: Iterable[NodeProto], inputs: Mapping[str, str], outputs: Iterable[str]
    ) -> list[str]:
        """Adds nodes to the joined graph.

        Args:
            step: prefix of the values of a step; empty: the values are the same in every step.
            nodes: nodes of this part, in order.
            inputs: names of values in the joined graph by the names of inputs of the part.
            outputs: outputs of the part.

        Returns:
            The names of the outputs in the joined graph.
        """
        names = {**self._names, **inputs, "": ""}
        for node in nodes:
            copy = type(node)()
            copy.CopyFrom(node)
            copy.name = f"{step}{self._prefix}{node.name}"
            # the scopes of modules are most of a graph's bytes, and the graphs of the loop have them
            del copy.input[:], copy.output[:], copy.metadata_props[:]
            copy.input.extend(names[value] for value in node.input)
            made = {value: f"{step}{self._prefix}{value}" if value else "" for value in node.output}
            copy.output.extend(made[value] for value in node.output)
            names |= made
            self._join.take(copy)
        if not step:
            self._names = {name: value for name, value in names.items() if name not in inputs and name}
        return [names[name] for name in outputs]


def _common_opsets(*models: ModelProto) -> list[Any]:
    """The operator sets that all graphs import.

    Raises:
        CheckpointError: they import different versions.
    """
    from onnx import helper

    versions: dict[str, int] = {}
    for model in models:
        for entry in model.opset_import:
            if versions.setdefault(entry.domain, entry.version) != entry.version:
                raise CheckpointError(
                    "Transformer and decoder have different versions of the ONNX operators",
                    "Export the artifact again.",
                )
    return [helper.make_opsetid(domain, version) for domain, version in versions.items()]


def _value(spec: TensorSpec) -> Any:
    from onnx import TensorProto, helper

    kind = TensorProto.INT64 if spec.dtype == "int64" else TensorProto.FLOAT
    return helper.make_tensor_value_info(spec.name, kind, list(spec.shape))
