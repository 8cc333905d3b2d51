"""An artifact of a few hundred weights with the inputs and outputs of a real one, which every backend can run."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from fmg.core.json_io import sealed
from fmg.core.specs import MapKind
from fmg.export.weights import lay_out, write_weights
from fmg.inference.artifact.layout import Artifact, file_entry, graph_file, weights_file, write_manifest
from fmg.inference.artifact.manifest import (
    BATCH,
    HEIGHT,
    IMAGE,
    MANIFEST,
    PIXEL_HEIGHT,
    PIXEL_WIDTH,
    TEXT,
    WIDTH,
    AxisRange,
    Base,
    FileEntry,
    Graph,
    Manifest,
    ModelFacts,
    Precision,
    Sampling,
    TensorSpec,
    TokenizerFacts,
)

SCALE = 2
LENGTH = 8
RESOLUTIONS = (8, 16)
PROMPTS = ["a red circle", "a blue square", "a green triangle left", "red red blue", "circle"]
_WORDS = ["[pad]", "[unk]", "a", "red", "blue", "green", "circle", "square", "triangle", "left"]
_TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}

Node = tuple[str, Sequence[str], str, Mapping[str, Any]]


def build_tiny_artifact(
    folder: Path,
    *,
    seed: int = 0,
    batch: tuple[int, int, int] = (1, 2, 4),
    kind: MapKind = "two-time",
    path: Literal["linear", "trig"] = "linear",
) -> Artifact:
    """Writes the artifact; another `seed` gives other weights in the same graphs."""
    folder.mkdir(parents=True)
    files: dict[str, FileEntry] = {}
    two = kind == "two-time"
    chosen = PLANS if two else {**PLANS, "transformer": lambda: _of_one_time(*_transformer())}
    graphs = {name: _write(folder, name, plan, seed, files) for name, plan in chosen.items()}
    tokenizers = {}
    for name, place in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        file = f"{place}/tokenizer.json"
        tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(_WORDS)}, unk_token="[unk]"))
        tokenizer.pre_tokenizer = Whitespace()
        (folder / place).mkdir()
        tokenizer.save(str(folder / file))
        files[file] = file_entry(folder / file)
        tokenizers[name] = TokenizerFacts(file, LENGTH, 0, "[pad]")
    tokens = [(side // SCALE // 2) ** 2 for side in RESOLUTIONS]
    side = AxisRange(RESOLUTIONS[0] // SCALE, RESOLUTIONS[0] // SCALE, RESOLUTIONS[-1] // SCALE)
    pixels = AxisRange(RESOLUTIONS[0], RESOLUTIONS[0], RESOLUTIONS[-1])
    manifest = Manifest(
        schema=1,
        files=files,
        model=ModelFacts("tiny", {}, {}),
        sampling=Sampling(
            *(kind, path, 1.0, "duration" if two else "none", None),
            *(4, SCALE, RESOLUTIONS[0], RESOLUTIONS, "uniform", 4),
        ),
        precision="fp32",
        opset=20,
        axes={
            BATCH: AxisRange(*batch),
            IMAGE: AxisRange(tokens[0], tokens[0], tokens[-1]),
            TEXT: AxisRange(LENGTH, LENGTH, LENGTH),
            HEIGHT: side,
            WIDTH: side,
            PIXEL_HEIGHT: pixels,
            PIXEL_WIDTH: pixels,
        },
        graphs=graphs,
        tokenizers=tokenizers,
        base=Base("tiny", "0" * 64, ("float32",), None),
        adapter=None,
        rewards=(),
        prompts={},
        libraries={},
        checks=(),
    )
    write_manifest(folder, manifest)
    return Artifact(folder, manifest)


def reseal(folder: Path) -> None:
    """Updates a manifest that a test has changed, as its maker would have written it."""
    raw = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps(sealed({key: value for key, value in raw.items() if key != "sha256"})))


def write_graph(
    folder: Path,
    name: str,
    nodes: Sequence[Node],
    shapes: Mapping[str, tuple[int, ...]],
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    *,
    seed: int = 0,
    opset: int = 20,
) -> None:
    """Writes `NAME.onnx` and `NAME.safetensors`, the one pointing into the other."""
    generator = torch.Generator().manual_seed(seed)
    weights = {key: 0.5 * torch.randn(shape, generator=generator) for key, shape in sorted(shapes.items())}
    layout = lay_out({key: (torch.float32, shape) for key, shape in shapes.items()})
    write_weights(folder / weights_file(name), layout, lambda key: weights[key])
    initializers = []
    for key, place in layout.places.items():
        tensor = TensorProto(name=key, data_type=TensorProto.FLOAT, dims=place.shape)
        tensor.data_location = TensorProto.EXTERNAL
        for entry, value in (("location", weights_file(name)), ("offset", place.offset), ("length", place.length)):
            tensor.external_data.add(key=entry, value=str(value))
        initializers.append(tensor)
    initializers += [helper.make_tensor(f"axis_{i}", TensorProto.INT64, [1], [i]) for i in range(3)]
    graph = helper.make_graph(
        [helper.make_node(op, list(ins), [out], name=f"node_{out}", **kept) for op, ins, out, kept in nodes],
        name,
        [_value(spec) for spec in inputs],
        [_value(spec) for spec in outputs],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    (folder / graph_file(name)).write_bytes(model.SerializeToString())
    onnx.checker.check_model(str(folder / graph_file(name)))


def _write(folder: Path, name: str, plan: Callable[[], Any], seed: int, files: dict[str, FileEntry]) -> Graph:
    nodes, shapes, inputs, outputs = plan()
    write_graph(folder, name, nodes, shapes, inputs, outputs, seed=seed)
    files |= {file: file_entry(folder / file) for file in (graph_file(name), weights_file(name))}
    precision: Precision = "fp32"
    return Graph(graph_file(name), weights_file(name), precision, inputs, outputs)


def _value(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, _TYPES[spec.dtype], spec.shape)


def _floats(name: str, *shape: int | str) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def _clip() -> Any:
    nodes = [
        ("Gather", ["embedding.weight", "input_ids"], "rows", {}),
        ("ReduceMean", ["rows", "axis_1"], "pooled", {"keepdims": 0}),
    ]
    ids = TensorSpec("input_ids", "int64", (BATCH, LENGTH))
    return nodes, {"embedding.weight": (len(_WORDS), 4)}, (ids,), (_floats("pooled", BATCH, 4),)


def _t5() -> Any:
    nodes = [
        ("Gather", ["shared.weight", "input_ids"], "rows", {}),
        ("MatMul", ["rows", "wo.weight"], "tokens", {}),
    ]
    ids = TensorSpec("input_ids", "int64", (BATCH, TEXT))
    shapes = {"shared.weight": (len(_WORDS), 8), "wo.weight": (8, 8)}
    return nodes, shapes, (ids,), (_floats("tokens", BATCH, TEXT, 8),)


def _transformer() -> Any:
    nodes = [
        ("MatMul", ["hidden_states", "x_embedder.weight"], "x", {}),
        ("Add", ["x", "x_embedder.bias"], "xb", {}),
        ("ReduceMean", ["encoder_hidden_states", "axis_1"], "mean", {"keepdims": 1}),
        ("MatMul", ["mean", "context_embedder.weight"], "context", {}),
        ("MatMul", ["pooled_projections", "pooled_embedder.weight"], "p", {}),
        ("Add", ["p", "pooled_embedder.bias"], "pb", {}),
        ("Unsqueeze", ["pb", "axis_1"], "pooled", {}),
        ("MatMul", ["img_ids", "pos_embed.weight"], "position", {}),
        ("MatMul", ["txt_ids", "pos_embed.weight"], "t", {}),
        ("ReduceMean", ["t", "axis_0"], "text_position", {"keepdims": 1}),
        ("Sub", ["timestep", "second"], "duration", {}),
        ("Unsqueeze", ["duration", "axis_1"], "d1", {}),
        ("Unsqueeze", ["d1", "axis_2"], "d2", {}),
        ("Sum", ["xb", "context", "pooled", "position", "text_position", "d2"], "sum", {}),
        ("Tanh", ["sum"], "tanh", {}),
        ("MatMul", ["tanh", "proj_out.weight"], "out", {}),
        ("Add", ["out", "proj_out.bias"], "velocity", {}),
    ]
    shapes = {
        "x_embedder.weight": (16, 16),
        "x_embedder.bias": (16,),
        "context_embedder.weight": (8, 16),
        "pooled_embedder.weight": (4, 16),
        "pooled_embedder.bias": (16,),
        "pos_embed.weight": (3, 16),
        "proj_out.weight": (16, 16),
        "proj_out.bias": (16,),
    }
    inputs = (
        _floats("hidden_states", BATCH, IMAGE, 16),
        _floats("encoder_hidden_states", BATCH, TEXT, 8),
        _floats("pooled_projections", BATCH, 4),
        _floats("timestep", BATCH),
        _floats("second", BATCH),
        _floats("img_ids", IMAGE, 3),
        _floats("txt_ids", TEXT, 3),
    )
    return nodes, shapes, inputs, (_floats("velocity", BATCH, IMAGE, 16),)


def _of_one_time(nodes: Sequence[Node], shapes: Any, inputs: Sequence[TensorSpec], outputs: Any) -> Any:
    """The transformer without a second time."""
    plain = [("Identity", ["timestep"], "duration", {}) if node[2] == "duration" else node for node in nodes]
    return plain, shapes, tuple(spec for spec in inputs if spec.name != "second"), outputs


def _decoder() -> Any:
    nodes = [
        ("ConvTranspose", ["latents", "conv.weight", "conv.bias"], "raw", {"strides": [SCALE, SCALE]}),
        ("Sigmoid", ["raw"], "images", {}),
    ]
    shapes = {"conv.weight": (4, 3, SCALE, SCALE), "conv.bias": (3,)}
    latents = _floats("latents", BATCH, 4, HEIGHT, WIDTH)
    return nodes, shapes, (latents,), (_floats("images", BATCH, 3, PIXEL_HEIGHT, PIXEL_WIDTH),)


PLANS: Mapping[str, Callable[[], Any]] = {
    "text_encoder": _clip,
    "text_encoder_2": _t5,
    "transformer": _transformer,
    "vae_decoder": _decoder,
}


def random_inputs(graph: Graph, sizes: Mapping[str, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs of a graph with the given sizes of its named axes."""
    generator = np.random.default_rng(seed)
    made = {}
    for spec in graph.inputs:
        shape = [axis if isinstance(axis, int) else sizes[axis] for axis in spec.shape]
        values = generator.integers(0, 9, shape) if spec.dtype == "int64" else generator.standard_normal(shape)
        made[spec.name] = torch.from_numpy(values.astype(spec.dtype))
    return made
