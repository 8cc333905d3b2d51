"""Verifies each graph: what a runtime computes against the torch modules that the graph was traced from.

Where a graph differs, `first_divergence` finds the first module, in order of execution, whose output the graph does not
compute. The graph's intermediate values become outputs, the torch modules get hooks, and both get the same inputs. A
module is matched by the scope that every node keeps from tracing; it agrees if any value that the graph computes inside
that scope equals the module's output, so fused and reordered nodes do no harm.

`widened` makes bf16 graphs run where nothing computes in bf16, as in ONNX Runtime on a CPU: the same nodes and the same
values of every weight, in fp32. Its results differ from the graph's own only by the rounding of bf16 arithmetic, so it
verifies nodes and weights, but not the size of that rounding. In an fp8 graph, what is rounded to E4M3 still is.
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmg.core.files import check_space, link_file
from fmg.export.fused import add_sampler
from fmg.export.graphs import ClipGraph, DecoderGraph, GraphModule, T5Graph, TransformerGraph
from fmg.export.model_graphs import reference
from fmg.export.precision_report import read_graph, scopes_of
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact import io_spec
from fmg.inference.artifact.backend import LatentBackend, PromptTokenizer
from fmg.inference.artifact.layout import Artifact
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    PACKED,
    SAMPLER,
    TEXT_ENCODER,
    TEXT_ENCODER_2,
    TEXT_ENCODERS,
    TRANSFORMER,
    TRANSFORMER_INT8,
    VAE_DECODER,
    WIDTH,
    Precision,
)
from fmg.inference.onnxruntime import CPU, installed
from fmg.models.common.model import AdaptedModel
from fmg.models.common.weights import TensorReader
from fmg.models.flux.latents import PATCH, image_ids
from fmg.models.flux.model import FluxModel

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

    from fmg.inference.artifact.backend import GraphRuntime


Tensors = Mapping[str, NDArray[Any]]

ALLOWED: Mapping[Precision, float] = {
    "fp32": 1e-5,
    "bf16": 2e-2,
    "fp16": 1e-2,
    "fp8": 1e-1,
    "int8": 1e-1,
}
"""Relative L2 error of one output against fp32 torch, by precision of the graph. Random inputs are hard for int8, whose
scales follow the largest value, and for fp8, which is not calibrated on them: there, images and rewards decide."""
DECODER_ALLOWED = 1e-4
"""The same for the decoder, whose images are clamped to [0, 1] after a long chain of convolutions."""
# None of these sizes was used in tracing (fmg.export.onnx)
_BATCHES = (1, 3, 4, 7)
_SMALLEST_TIME = 0.05
_INNER = "inner."
# ONNX Runtime looks for external data beside the model file, but this model is in memory
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
# Values per run: those of an 8 B model at a few tokens fit into a gigabyte
_VALUES_A_RUN = 256


@dataclass(frozen=True)
class GraphParity:
    """The worst of several shapes: relative L2 error and largest absolute error."""

    relative_l2: float
    max_abs: float
    allowed: float
    shapes: int

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return self.relative_l2 <= self.allowed


def reference_module(model: AdaptedModel[Any], graph: str) -> GraphModule:
    """The torch module with the signature of a graph, over the live components of a model."""
    if not isinstance(model, FluxModel):
        return reference(model, graph).eval()
    parts = model.components
    modules: Mapping[str, Callable[[], GraphModule]] = {
        TEXT_ENCODER: lambda: ClipGraph(parts.text.text_encoder),
        TEXT_ENCODER_2: lambda: T5Graph(parts.text.text_encoder_2),
        TRANSFORMER: lambda: TransformerGraph(parts.transformer),
        TRANSFORMER_INT8: lambda: TransformerGraph(parts.transformer),
        VAE_DECODER: lambda: DecoderGraph(parts.vae),
    }
    return modules[graph]().eval()


@torch.no_grad()
def run_reference(model: AdaptedModel[Any], graph: str, inputs: Tensors) -> tuple[NDArray[np.float32], ...]:
    """The outputs of the torch module of a graph, in fp32 on the CPU."""
    module = reference_module(model, graph)
    made = module(**module.arguments({name: torch.from_numpy(x).to(model.device) for name, x in inputs.items()}))
    return tuple(x.float().cpu().numpy() for x in (made if isinstance(made, tuple) else (made,)))


def parity(
    model: AdaptedModel[Any],
    runtime: GraphRuntime[Any],
    artifact: Artifact,
    graph: str,
    prompts: Sequence[str],
    *,
    seed: int,
) -> GraphParity:
    """Compares one graph at several shapes inside the artifact's ranges, none of which was traced.

    Args:
        model: the reference, in fp32.
        runtime: what runs the graph.
        artifact: what the graph belongs to.
        graph: its name.
        prompts: inputs of the text encoders.
        seed: seed of the other inputs.
    """
    precision = artifact.graph(graph).precision
    allowed = DECODER_ALLOWED if graph == VAE_DECODER else ALLOWED[precision]
    errors: list[tuple[float, float]] = []
    for inputs in sample_inputs(artifact, graph, prompts, seed=seed):
        outputs = _outputs(runtime, artifact, graph, inputs)
        for output, expected in zip(outputs, run_reference(model, graph, inputs), strict=True):
            errors.append((relative_l2(output, expected), float(np.abs(output - expected).max())))
    # NaN is worse than any number, which max() would ignore
    worst, largest = (float(x) for x in np.max(errors, axis=0))
    return GraphParity(worst, largest, allowed, len(_BATCHES))


def _outputs(
    runtime: GraphRuntime[Any], artifact: Artifact, graph: str, inputs: Tensors
) -> tuple[NDArray[np.float32], ...]:
    """What a runtime computes, in the order of the graph."""
    given = {name: runtime.put(value) for name, value in inputs.items()}
    if artifact.manifest.schema == PACKED:
        return (runtime.get(runtime.run(graph, given)),)
    made = runtime.outputs(graph, given)
    return tuple(runtime.get(made[spec.name]).astype(np.float32) for spec in artifact.graph(graph).outputs)


def relative_l2(output: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """`|output - expected| / |expected|` over all entries, in double precision; NaN when either is not finite."""
    difference = output.astype(np.float64) - expected
    scale = float(np.linalg.norm(expected.astype(np.float64)))
    return float(np.linalg.norm(difference)) / scale if scale else float(np.linalg.norm(difference))


def sample_inputs(artifact: Artifact, graph: str, prompts: Sequence[str], *, seed: int) -> Iterator[Tensors]:
    """Inputs of a graph at different sizes of its axes, keyed by `seed`."""
    for number in range(len(_BATCHES)):
        yield _inputs(artifact, graph, prompts, number, np.random.default_rng((seed, number)))


def _inputs(artifact: Artifact, graph: str, prompts: Sequence[str], number: int, rng: np.random.Generator) -> Tensors:
    manifest = artifact.manifest
    sides = [pixels // manifest.sampling.latent_scale for pixels in manifest.sampling.resolutions]
    side = sides[number % len(sides)]
    batch = min(_BATCHES[number], manifest.axes[BATCH].maximum)
    # the largest, smallest and middle size in turn
    sizes = {
        name: (axis.maximum, axis.minimum, (axis.minimum + axis.maximum) // 2)[number % 3]
        for name, axis in manifest.axes.items()
    }
    sizes |= {BATCH: batch, HEIGHT: side, WIDTH: side, IMAGE: (side // PATCH) ** 2}
    t = rng.uniform(_SMALLEST_TIME, 1.0, batch).astype(np.float32)
    known: dict[str, NDArray[Any]] = {
        io_spec.TIMESTEP: t,
        io_spec.SECOND: t * rng.uniform(0.0, 1.0, batch).astype(np.float32),
        io_spec.GUIDANCE: np.full(batch, manifest.sampling.guidance or 0.0, np.float32),
        io_spec.IMG_IDS: image_ids(side, side),
    }
    made: dict[str, NDArray[Any]] = {}
    if graph == TEXT_ENCODERS:
        backend: LatentBackend[Any] = LatentBackend(artifact, cast("GraphRuntime[Any]", None))
        chosen = [prompts[(number + i) % len(prompts)] for i in range(batch)]
        return backend.token_inputs(chosen)
    for spec in manifest.graphs[graph].inputs:
        shape = tuple(sizes[axis] if isinstance(axis, str) else axis for axis in spec.shape)
        if spec.name == io_spec.INPUT_IDS:
            made[spec.name] = _token_ids(artifact, graph, prompts, number)[: shape[0], : shape[1]]
        elif spec.name == io_spec.TXT_IDS:
            made[spec.name] = np.zeros(shape, np.float32)
        elif spec.dtype == "int64":
            # the mask of prompts that are not as long as they may be
            made[spec.name] = (np.arange(shape[1])[None] <= number).repeat(shape[0], 0).astype(np.int64)
        else:
            made[spec.name] = known.get(spec.name, rng.standard_normal(shape, np.float32))
    return made


def _token_ids(artifact: Artifact, graph: str, prompts: Sequence[str], number: int) -> NDArray[np.int64]:
    """Ids of as many prompts as the largest batch, starting with a different one each time."""
    facts = artifact.manifest.tokenizers[graph]
    chosen = [prompts[(number + i) % len(prompts)] for i in range(max(_BATCHES))]
    return PromptTokenizer(artifact.path(facts.file), facts)(chosen)


@dataclass(frozen=True)
class Divergence:
    """The first module that differs, in the order of execution.

    Attributes:
        graph: its graph.
        module: its dotted name in the component.
        relative_l2: of the nearest value that the graph computes inside it.
    """

    graph: str
    module: str
    relative_l2: float

    def __str__(self) -> str:
        return f"{self.graph} first differs in {self.module} (relative L2 {self.relative_l2:.1e})"


def first_divergence(
    model: AdaptedModel[Any], artifact: Artifact, graph: str, inputs: Tensors, *, allowed: float
) -> Divergence | None:
    """The first module of a graph whose output differs between ONNX Runtime and torch.

    Args:
        model: the reference.
        artifact: the artifact that the graph belongs to.
        graph: its name.
        inputs: inputs of both sides.
        allowed: relative L2 error of a module's output.

    Returns:
        None if every module that can be matched agrees: the difference is then outside the modules.
    """
    expected = _module_outputs(reference_module(model, graph), inputs)
    onnx_model = read_graph(artifact.onnx(graph))
    candidates = _values_by_module(onnx_model)
    names = [name for name in expected if candidates.get(name)]
    for chunk in _chunks(names, candidates):
        wanted = list(dict.fromkeys(value for name in chunk for value in candidates[name]))
        values = _run(artifact, onnx_model, wanted, inputs)
        for name in chunk:
            fitting = [values[v] for v in candidates[name] if values[v].shape == expected[name].shape]
            if not fitting:
                continue
            errors = [relative_l2(np.asarray(value, np.float32), expected[name]) for value in fitting]
            nearest = min(errors, key=lambda error: error if np.isfinite(error) else np.inf)
            if not nearest <= allowed:
                return Divergence(graph, name, nearest)
    return None


@torch.no_grad()
def _module_outputs(wrapper: GraphModule, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
    """Outputs of the modules that run once and return one tensor, in the order in which they finish."""
    outputs: dict[str, NDArray[np.float32]] = {}
    calls: Counter[str] = Counter()
    handles = []

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            calls[name] += 1
            if isinstance(output, Tensor):
                outputs[name] = output.detach().float().cpu().numpy()

        return hook

    for name, module in wrapper.named_modules():
        if name.startswith(_INNER):
            handles.append(module.register_forward_hook(keep(name.removeprefix(_INNER))))
    try:
        device = next(wrapper.parameters()).device
        wrapper(**wrapper.arguments({name: torch.from_numpy(value).to(device) for name, value in inputs.items()}))
    finally:
        for handle in handles:
            handle.remove()
    return {name: value for name, value in outputs.items() if calls[name] == 1}


def _values_by_module(model: ModelProto) -> dict[str, list[str]]:
    """The values that nodes inside each module compute; only values whose type the file states can become outputs."""
    stated = {value.name for value in (*model.graph.value_info, *model.graph.output)}
    found: dict[str, list[str]] = {}
    for node in model.graph.node:
        for scope in scopes_of(node):
            found.setdefault(scope, []).extend(name for name in node.output if name in stated)
    return found


def _chunks(names: Sequence[str], candidates: Mapping[str, Sequence[str]]) -> list[list[str]]:
    """The names in order, in groups whose values fit one run."""
    chunks: list[list[str]] = [[]]
    size = 0
    for name in names:
        if chunks[-1] and size + len(candidates[name]) > _VALUES_A_RUN:
            chunks.append([])
            size = 0
        chunks[-1].append(name)
        size += len(candidates[name])
    return chunks


def _run(artifact: Artifact, model: ModelProto, names: Sequence[str], inputs: Tensors) -> dict[str, NDArray[Any]]:
    """The values called `names` on ONNX Runtime's CPU."""
    import onnx

    ort = installed()
    tapped = onnx.ModelProto()
    tapped.CopyFrom(model)
    described = {value.name: value for value in model.graph.value_info}
    already = {value.name for value in model.graph.output}
    tapped.graph.output.extend(described[name] for name in names if name not in already)
    options = ort.SessionOptions()
    options.add_session_config_entry(_FOLDER_OF_WEIGHTS, str(artifact.folder.resolve()))
    options.log_severity_level = 3
    session = ort.InferenceSession(tapped.SerializeToString(), options, providers=[CPU])
    return dict(zip(names, session.run(list(names), dict(inputs)), strict=True))


@contextmanager
def widened(artifact: Artifact) -> Iterator[Artifact]:
    """A temporary copy of an artifact whose bf16 and fp8 graphs compute in fp32; its manifest keeps the old hashes.

    Raises:
        UsageError: the disk for temporary files is too small.
        CheckpointError: a file is missing or damaged.
    """
    graphs = artifact.manifest.graphs
    half = {name: graph for name, graph in graphs.items() if graph.precision in ("bf16", "fp8")}
    narrow = {name: graph for name, graph in half.items() if name != SAMPLER}
    rewritten = {file for graph in narrow.values() for file in (graph.file, graph.weights)}
    with tempfile.TemporaryDirectory(prefix="fmg-") as place:
        folder = Path(place)
        check_space(
            folder,
            2 * sum(artifact.path(graph.weights).stat().st_size for graph in narrow.values()),
            "A copy of the bf16 weights in fp32",
            "Free some space, set TMPDIR to a folder on another disk, or verify on a GPU.",
        )
        for name in artifact.manifest.files.keys() - rewritten:
            link_file(artifact.path(name), folder / name)
        for name, graph in narrow.items():
            _widen(artifact, name, folder / graph.file, folder / graph.weights)
        wide = {name: replace(graph, precision="fp32") for name, graph in narrow.items()}
        manifest = replace(artifact.manifest, graphs={**graphs, **wide})
        if SAMPLER in graphs:
            # it points into the weights that have moved
            described = add_sampler(folder, manifest, check=False).graphs[SAMPLER]
            manifest = replace(manifest, graphs={**manifest.graphs, SAMPLER: described})
        yield Artifact(folder, manifest)


def _widen(artifact: Artifact, name: str, file: Path, weights: Path) -> None:
    """Writes one graph and its weights."""
    model = read_graph(artifact.onnx(name))
    stored = TensorReader.of(artifact.path(artifact.graph(name).weights))
    described = {tensor: stored.describe(tensor) for tensor in stored.names}
    wide = {tensor: torch.float32 if kind == torch.bfloat16 else kind for tensor, (kind, _) in described.items()}
    layout = lay_out({tensor: (wide[tensor], shape) for tensor, (_, shape) in described.items()})
    write_weights(weights, layout, lambda tensor: stored.read(tensor).to(wide[tensor]))
    for tensor in model.graph.initializer:
        if tensor.external_data:
            place = layout.places[tensor.name]
            del tensor.external_data[:]
            for key, value in (("location", weights.name), ("offset", place.offset), ("length", place.length)):
                tensor.external_data.add(key=key, value=str(value))
            tensor.data_type = _fp32(tensor.data_type)
        else:
            _widen_tensor(tensor)
    _widen_types(model)
    file.write_bytes(model.SerializeToString())


def _widen_types(model: ModelProto) -> None:
    """Replaces bf16 by fp32 in the types of values and nodes."""
    for value in (*model.graph.value_info, *model.graph.input, *model.graph.output):
        value.type.tensor_type.elem_type = _fp32(value.type.tensor_type.elem_type)
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.HasField("t"):
                _widen_tensor(attribute.t)
            elif attribute.name in ("to", "dtype"):
                attribute.i = _fp32(attribute.i)


def _widen_tensor(tensor: TensorProto) -> None:
    from onnx import numpy_helper

    if _fp32(tensor.data_type) != tensor.data_type:
        values = numpy_helper.to_array(tensor).astype(np.float32)
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _fp32(kind: int) -> int:
    """The ONNX type after widening."""
    from onnx import TensorProto

    return int(TensorProto.FLOAT) if kind == TensorProto.BFLOAT16 else kind
