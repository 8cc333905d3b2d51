"""Where a graph leaves its torch module: the first module, in order of execution, whose output the graph has nowhere.

The graph's intermediate values become outputs, the torch modules get hooks, and both see the same inputs. A module is
matched by the scope that every node keeps from tracing; it agrees when any value that the graph computes inside that
scope equals the module's output, so fused and reordered nodes do no harm.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fmg.export.census import read_graph, scopes_of
from fmg.export.verify_tensors import Tensors, reference_module, relative_l2
from fmg.inference.artifact.layout import Artifact
from fmg.inference.onnxruntime import CPU, installed

if TYPE_CHECKING:
    from onnx import ModelProto

    from fmg.models.flux.model import FluxModel

_INNER = "inner."
# ONNX Runtime looks for external data beside the model file, which a model in memory does not have
_FOLDER_OF_WEIGHTS = "session.model_external_initializers_file_folder_path"
# Values of one run: those of an 8 B model at a few tokens fit a gigabyte
_VALUES_A_RUN = 256


@dataclass(frozen=True)
class Divergence:
    """The first module that differs, in the order of execution.

    Attributes:
        graph: the graph it is in.
        module: its dotted name in the component.
        relative_l2: of the nearest value that the graph computes inside it.
        compared: modules that were compared until then, this one included.
    """

    graph: str
    module: str
    relative_l2: float
    compared: int

    def __str__(self) -> str:
        return f"{self.graph} first differs in {self.module} (relative L2 {self.relative_l2:.1e})"


def first_divergence(
    model: FluxModel, artifact: Artifact, graph: str, inputs: Tensors, *, allowed: float
) -> Divergence | None:
    """The first module of a graph whose output ONNX Runtime computes otherwise than torch.

    Args:
        model: the reference.
        artifact: what the graph belongs to.
        graph: its name.
        inputs: what both are given.
        allowed: relative L2 error of a module's output.

    Returns:
        None when every module that can be matched agrees: the difference is then in what no module holds.
    """
    expected = _module_outputs(reference_module(model, graph), inputs)
    onnx_model = read_graph(artifact.onnx(graph))
    candidates = _values_by_module(onnx_model)
    names = [name for name in expected if candidates.get(name)]
    compared = 0
    for chunk in _chunks(names, candidates):
        wanted = list(dict.fromkeys(value for name in chunk for value in candidates[name]))
        values = _run(artifact, onnx_model, wanted, inputs)
        for name in chunk:
            fitting = [values[v] for v in candidates[name] if values[v].shape == expected[name].shape]
            if not fitting:
                continue
            compared += 1
            errors = [relative_l2(np.asarray(value, np.float32), expected[name]) for value in fitting]
            nearest = min(errors, key=lambda error: error if np.isfinite(error) else np.inf)
            if not nearest <= allowed:
                return Divergence(graph, name, nearest, compared)
    return None


@torch.no_grad()
def _module_outputs(wrapper: nn.Module, inputs: Tensors) -> dict[str, NDArray[np.float32]]:
    """Outputs of the modules that run once and give one tensor, in the order in which they end."""
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
        wrapper(**{name: torch.from_numpy(value).to(device) for name, value in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return {name: value for name, value in outputs.items() if calls[name] == 1}


def _values_by_module(model: ModelProto) -> dict[str, list[str]]:
    """The values that nodes inside each module compute; only those whose type the file states can be asked for."""
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
