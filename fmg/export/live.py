"""The graph of a network in training: its weights are inputs, so every call uses the current ones.

Nothing is written or reopened when weights change. Weights without an adapter are the network's own memory; the others
are merged once per iteration (docs/branching.md). The graph computes what the family's own code does from latents to
velocities, at one size of the latents and one length of prompts. It depends only on these, on the config of the
network and on that code, and is cached.
"""

from __future__ import annotations

import hashlib
import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fmg.core.cache import cache_dir, made_once, optional_cache
from fmg.core.errors import CheckpointError, FmgError, reason
from fmg.core.protocols import Model
from fmg.core.types import Conditioning
from fmg.export.graphs import GraphPlan
from fmg.export.model_graphs import network_plan
from fmg.export.onnx import trace
from fmg.export.options import library_versions, plain_config
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact import io_spec
from fmg.models.common.adapter import merged_tensors
from fmg.models.common.model import AdaptedModel
from fmg.models.common.network import LatentCall, LatentNetwork

_FILE = "transformer.onnx"
# ONNX's codes of dtypes, for tensors that are bound by address
_ONNX_TYPES = {torch.float32: 1, torch.int64: 7, torch.float16: 10, torch.bfloat16: 16}


def live_graph(model: Model) -> LiveGraph:
    """The graph of a model's network on ONNX Runtime, on its device and in its dtype.

    Raises:
        CheckpointError: the network cannot be traced.
        MissingDependencyError: the packages that write and run graphs are not installed.
        UsageError: onnxruntime was built without the provider of the device.
    """
    if not isinstance(model, AdaptedModel):
        raise CheckpointError("The model has no transformer that can be traced", "Set rollout.branch.backend to torch.")
    device = model.device
    provider = ort.CUDA if device.type == "cuda" else ort.CPU
    ort.check_provider(provider)
    content = _graph(model)
    threads = torch.get_num_threads()
    try:
        session = ort.open_session(content, tuple(dict.fromkeys((provider, ort.CPU))), threads, device.index or 0)
    except FmgError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"ONNX Runtime cannot load the graph of the network: {reason(error)}",
            "Set rollout.branch.backend to torch, or use the versions in constraints.txt.",
        ) from error
    return LiveGraph(session, model.network, device)


class LiveGraph(LatentCall):
    """A graph in place of the network that it was traced from.

    Args:
        session: session of the graph, whose weights are inputs under their names in the state dict.
        transformer: the module with these weights.
        device: device of the module.
    """

    def __init__(self, session: Any, transformer: Any, device: torch.device) -> None:
        self._session = session
        self._transformer = transformer
        self._dtype: torch.dtype = transformer.dtype
        self._where = (device.type, device.index or 0)
        self._wanted = frozenset(entry.name for entry in session.get_inputs())
        self._output = session.get_outputs()[0].name
        self._weights: dict[str, Tensor] = {}
        self.refresh()

    def refresh(self) -> None:
        """Updates it to the current weights, with an adapter merged in fp32 as in an export."""
        merged = merged_tensors(self._transformer, self._dtype)
        self._weights = {name: x.contiguous() for name, x in merged.items() if name in self._wanted}

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, s: Tensor | None, guidance: Tensor | None, cond: Conditioning) -> Tensor:
        """As `LatentCall`, in fp32.

        Raises:
            FmgError: ONNX Runtime failed.
        """
        given = {io_spec.LATENTS: x, io_spec.TIMESTEP: t, io_spec.SECOND: s, io_spec.GUIDANCE: guidance, **cond.tensors}
        bound = {name: _entering(x) for name, x in given.items() if x is not None} | self._weights
        binding = self._session.io_binding()
        for name in self._wanted:
            value = bound[name]
            binding.bind_input(name, *self._where, _ONNX_TYPES[value.dtype], tuple(value.shape), value.data_ptr())
        binding.bind_output(self._output, *self._where)
        if self._where[0] == "cuda":
            # the session has its own stream, which does not wait for torch's
            torch.cuda.current_stream(self._where[1]).synchronize()
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise FmgError(
                f"The graph of the completions failed: {reason(error)}",
                "Set rollout.branch.backend to torch.",
            ) from error
        (output,) = binding.get_outputs()
        return torch.utils.dlpack.from_dlpack(output)


def _entering(x: Tensor) -> Tensor:
    return (x.float() if x.is_floating_point() else x.long()).contiguous()


def _graph(model: AdaptedModel[Any]) -> bytes:
    """The graph with its weights as inputs, traced once for each key in the cache."""
    plan = network_plan(model)
    network: Any = model.network
    facts = {
        "config": plain_config(network.config),
        "dtype": str(plan.dtype),
        "inputs": [asdict(spec) for spec in plan.inputs],
        # the family of another package may change its call under the same version of fmg
        "code": [inspect.getsource(cls) for cls in model.network_class.__mro__ if issubclass(cls, LatentNetwork)],
        "libraries": library_versions(),
    }
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    found: list[bytes] = []

    def make(folder: Path) -> None:
        found.append(_traced(plan))
        (folder / _FILE).write_bytes(found[0])

    with optional_cache():
        found.append((made_once(cache_dir() / "graphs" / key[:32], make) / _FILE).read_bytes())
    return found[-1] if found else _traced(plan)


def _traced(plan: GraphPlan) -> bytes:
    import onnx_ir as ir

    graph = trace(plan)
    for name in graph.parameters:
        graph.model.graph.inputs.append(graph.model.graph.initializers.pop(name))
    content: bytes = ir.to_proto(graph.model).SerializeToString()
    return content
