"""Traces a module to an ONNX graph that points into a safetensors file, without loading the weights.

The module is built and traced on fake tensors, so a graph takes about a gigabyte at any size. Its parameters become
initialisers without values under their state-dict names; they get their positions in the weight file only after the
optimiser has run. With values, the optimiser would merge parameters that happen to be equal and transpose others, and a
later swap of the weights would silently be wrong (docs/adr/0010-graphs-without-weights.md).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import Dim

from fmg.core.errors import CheckpointError, MissingDependencyError, reason
from fmg.export.graphs import GraphPlan
from fmg.inference.artifact.manifest import BATCH, HEIGHT, IMAGE, TEXT, WIDTH, TensorSpec
from fmg.version import install_line

if TYPE_CHECKING:
    import onnx_ir as ir

    from fmg.export.weights import Placement

OPSET = 20
"""LayerNormalization and Gelu are operators; attention is still the pattern that engines fuse in fp32."""

_INNER = "inner."
# Sizes of the example inputs: all different, so that no axis is mistaken for another, and none 1, which would be fixed
_TRACED = {BATCH: 2, IMAGE: 12, TEXT: 5, HEIGHT: 6, WIDTH: 4}
_ALMOST_ZERO = 1e-7
_KEPT_METADATA = ("namespace", "pkg.torch.onnx.name_scopes")


@dataclass(frozen=True)
class TracedGraph:
    """A traced graph whose parameters have names, shapes and dtypes but no values yet."""

    plan: GraphPlan
    model: ir.Model
    parameters: Mapping[str, tuple[int, ...]]


def require_onnx() -> None:
    """Checks that the packages that write graphs are installed.

    Raises:
        MissingDependencyError: naming the extra that installs them.
    """
    try:
        import onnx  # noqa: F401
        import onnx_ir  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingDependencyError(
            f"Exporting to ONNX needs the package '{error.name}'", f"Install it: {install_line('onnx')}."
        ) from None


def trace(plan: GraphPlan) -> TracedGraph:
    """The optimised graph of a plan, its parameters without values.

    Raises:
        CheckpointError: the module cannot be traced, or a name or an axis is not as planned.
    """
    require_onnx()
    import onnx_ir as ir
    from onnxscript.optimizer import optimize_ir

    with quiet():
        model, shapes, known, tables = _export(plan)
        for name, value in model.graph.initializers.items():
            if name in tables:
                value.const_value = ir.tensor(tables[name].cpu().numpy())
            elif name.startswith(_INNER) and name not in known:
                value.const_value = None
        hidden = _hide_small_constants(model)
        with _without_split_rule():
            # a folded Transpose would be a second copy of a weight, under another name
            optimize_ir(model, should_fold=lambda node: False if node.op_type == "Transpose" else None)
        for name, value in model.graph.initializers.items():
            value.const_value = hidden.get(name, value.const_value)
    _divide_by_roots(model)
    _take_names(model)
    _strip_metadata(model)
    for value, spec in zip(model.graph.outputs, plan.outputs, strict=True):
        # the tracer writes expressions such as `8*height`
        value.shape = ir.Shape(spec.shape)
    parameters = {name: shapes[name] for name in model.graph.initializers if name in shapes}
    _check(model, plan, parameters, shapes)
    return TracedGraph(plan, model, parameters)


def save_graph(graph: TracedGraph, file: Path, weights: str, places: Mapping[str, Placement]) -> None:
    """Writes the ONNX file; every parameter points to its position in `weights`, a file name in the same folder.

    Raises:
        CheckpointError: a parameter is missing there or has a different shape or dtype, or the checker refuses the
            file.
    """
    import onnx_ir as ir

    for name in graph.parameters:
        value, place = graph.model.graph.initializers[name], places[name]
        stated = _axes(value)
        if stated != place.shape or value.dtype != ir.DataType[_ONNX_DTYPES[place.dtype]]:
            raise CheckpointError(
                f"'{name}' is {place.dtype} {place.shape} in {weights}, but {value.dtype} {stated} in the graph",
                "This is a bug in fmg; please report it.",
            )
        point_to(value, file.parent / weights, place)
    ir.save(graph.model, file)
    check_file(file)


def point_to(value: ir.Value, weights: Path, place: Placement) -> None:
    """Makes an initialiser read its value from a position in a weight file."""
    import onnx_ir as ir

    value.const_value = ir.ExternalTensor(
        weights.name,
        place.offset,
        place.length,
        ir.DataType[_ONNX_DTYPES[place.dtype]],
        shape=ir.Shape(place.shape),
        name=str(value.name),
        base_dir=weights.parent,
    )


def inline_tensors(graph: Path) -> dict[str, Tensor]:
    """The initializers of an ONNX file whose values are in the file itself."""
    import onnx_ir as ir

    values = {name: value.const_value for name, value in ir.load(graph).graph.initializers.items()}
    return {
        name: torch.from_numpy(np.array(tensor.numpy()))
        for name, tensor in values.items()
        if tensor is not None and not isinstance(tensor, ir.ExternalTensor)
    }


def stored_dtype(value: ir.Value) -> torch.dtype:
    """The torch dtype of an initialiser."""
    assert value.dtype is not None
    return next(dtype for dtype, name in _ONNX_DTYPES.items() if name == value.dtype.name)


def check_file(file: Path) -> None:
    """Runs ONNX's checker on a file by its path, which also works with more than two gigabytes of weights.

    Raises:
        CheckpointError: the checker refuses the file; states its reason.
    """
    import onnx

    try:
        onnx.checker.check_model(str(file))
    except Exception as error:  # ValidationError, or what protobuf raises on a damaged file
        raise CheckpointError(
            f"{file} is not a valid ONNX graph: {reason(error)}", "Export the artifact again."
        ) from error


def _export(plan: GraphPlan) -> tuple[ir.Model, dict[str, tuple[int, ...]], set[str], dict[str, Tensor]]:
    """The graph, the shapes of the state dict, and constants.

    Of constants that were written in a forward pass the names, and of buffers that no file has the values: both by
    their names in the graph.
    """
    dims = {name: Dim(name, min=1) for name in _TRACED}
    kept = torch.get_default_dtype()
    with FakeTensorMode(allow_non_fake_inputs=True):
        torch.set_default_dtype(plan.dtype)
        try:
            module = plan.build().eval()
        finally:
            torch.set_default_dtype(kept)
        module.requires_grad_(False)
        shapes = {name: tuple(x.shape) for name, x in module.inner.state_dict().items()}
        buffers = ((name, x) for name, x in module.inner.named_buffers() if name not in shapes)
        tables = {_INNER + name: x for name, x in buffers if not isinstance(x, FakeTensor)}
        try:
            program: Any = torch.onnx.export(
                module,
                (),
                kwargs=module.arguments({spec.name: _example(spec) for spec in plan.inputs}),
                input_names=[spec.name for spec in plan.inputs],
                output_names=[spec.name for spec in plan.outputs],
                dynamic_shapes=module.arguments(
                    {
                        spec.name: {i: dims[axis] for i, axis in enumerate(spec.shape) if isinstance(axis, str)}
                        for spec in plan.inputs
                    }
                ),
                opset_version=OPSET,
                dynamo=True,
                optimize=False,
                verbose=False,
            )
        except torch.onnx.errors.OnnxExporterError as error:
            raise CheckpointError(
                f"The graph '{plan.name}' cannot be traced: {_reason(error)}",
                "Use the versions of torch and onnxscript in constraints.txt.",
            ) from error
    model: ir.Model = program.model
    constants = program.exported_program.constants
    return model, shapes, {name for name, x in constants.items() if not isinstance(x, FakeTensor)}, tables


def _example(spec: TensorSpec) -> Tensor:
    shape = [_TRACED[size] if isinstance(size, str) else size for size in spec.shape]
    return torch.zeros(shape, dtype=torch.int64 if spec.dtype == "int64" else torch.float32)


@contextmanager
def _without_split_rule() -> Iterator[None]:
    """Leaves out the optimiser's only rule that compares each node with all others.

    With 5,000 nodes it takes nine tenths of the time. It would write two Slices that halve a tensor as one Split, but
    finds none in our graphs.
    """
    from onnxscript.rewriter.rules.common import slice_split_rule

    slice_split_rule.try_rewrite = lambda *_, **__: None
    try:
        yield
    finally:
        del slice_split_rule.try_rewrite


def _hide_small_constants(model: ir.Model) -> dict[str, Any]:
    """Takes the values of constants that are almost 0, and returns them by name.

    The optimiser takes any number below 1e-8 for 0 and removes its addition: the 1e-15 that keeps linear attention from
    dividing 0 by 0.
    """
    import onnx_ir as ir

    hidden: dict[str, Any] = {}
    for node in [node for node in model.graph if node.op_type == "Constant" and "value" in node.attributes]:
        tensor, old = node.attributes["value"].as_tensor(), node.outputs[0]
        if (
            tensor.size == 1
            and tensor.dtype.is_floating_point()
            and 0 < abs(float(tensor.numpy().item())) < _ALMOST_ZERO
        ):
            value = ir.Value(
                name=f"{old.name}_small", shape=ir.Shape(tensor.numpy().shape), type=ir.TensorType(tensor.dtype)
            )
            model.graph.initializers[f"{old.name}_small"] = value
            hidden[f"{old.name}_small"] = tensor
            ir.convenience.replace_all_uses_with(old, value)
            model.graph.remove(node, safe=True)
    return hidden


def _divide_by_roots(model: ir.Model) -> None:
    """Writes `x * (1 / sqrt(v))`, how torch traces an RMS norm, as `x / sqrt(v)`.

    ONNX Runtime makes one operator of the second form and runs the first as seven passes over the activations.
    """
    for node in [node for node in model.graph if node.op_type == "Mul"]:
        for place, value in enumerate(node.inputs):
            inverse = None if value is None else value.producer()
            if inverse is None or inverse.op_type != "Reciprocal":
                continue
            root = inverse.inputs[0].producer() if inverse.inputs[0] is not None else None
            if root is None or root.op_type != "Sqrt":
                continue
            dividend = node.inputs[1 - place]
            node.op_type = "Div"
            node.replace_input_with(0, dividend)
            node.replace_input_with(1, root.outputs[0])
            if not inverse.outputs[0].uses():
                model.graph.remove(inverse, safe=True)
            break


def _take_names(model: ir.Model) -> None:
    """Gives parameters their names in the component's own state dict."""
    for name in [name for name in model.graph.initializers if name.startswith(_INNER)]:
        value = model.graph.initializers.pop(name)
        value.name = name.removeprefix(_INNER)
        model.graph.initializers[value.name] = value


def _strip_metadata(model: ir.Model) -> None:
    """Removes the tracer's notes, such as paths of source files on this computer; keeps module names."""
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
    for node in model.graph.all_nodes():
        for key in [key for key in node.metadata_props if key not in _KEPT_METADATA]:
            del node.metadata_props[key]
        for output in node.outputs:
            output.metadata_props.clear()


def _check(
    model: ir.Model,
    plan: GraphPlan,
    parameters: Mapping[str, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    import onnx_ir as ir

    problems = []
    if plan.strict:
        problems += [f"the parameter {name} is not in the graph" for name in sorted(shapes.keys() - parameters.keys())]
    for name, shape in parameters.items():
        value = model.graph.initializers[name]
        if _axes(value) != shape:
            problems.append(f"the parameter {name} has shape {value.shape} instead of {shape}")
        if value.const_value is not None:
            problems.append(f"the parameter {name} has a value")
    for name, value in model.graph.initializers.items():
        if name not in parameters and value.const_value is None:
            problems.append(f"the constant {name} has no value")
    for values, specs in ((model.graph.inputs, plan.inputs), (model.graph.outputs, plan.outputs)):
        for value, spec in zip(values, specs, strict=False):
            stated = (value.name, value.dtype, _axes(value))
            if stated != (spec.name, ir.DataType[_ONNX_DTYPES[_TORCH_DTYPES[spec.dtype]]], spec.shape):
                problems.append(f"{stated} is not the planned {spec}")
        if len(values) != len(specs):
            problems.append(f"{len(values)} inputs or outputs are not the {len(specs)} planned")
    if problems:
        raise CheckpointError(
            f"The graph '{plan.name}' is not as planned: {problems[0]}",
            "Use the versions of torch and onnxscript in constraints.txt.",
        )


def _axes(value: ir.Value) -> tuple[int | str | None, ...]:
    return tuple(size if isinstance(size, int) else size.value for size in value.shape or ())


def _reason(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return reason(error)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences tracer, optimiser and quantiser, whose warnings concern only their own internals."""
    loggers = [logging.getLogger(name) for name in (None, "torch.onnx", "onnxscript", "torch.export", "onnx_ir")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


_TORCH_DTYPES = {"float32": torch.float32, "int64": torch.int64}
_ONNX_DTYPES = {
    torch.float32: "FLOAT",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
    torch.float64: "DOUBLE",
    torch.int64: "INT64",
    torch.int8: "INT8",
    torch.uint8: "UINT8",
    torch.int32: "INT32",
    torch.float8_e4m3fn: "FLOAT8E4M3FN",
}
