"""The graph of a network in training: its weights are inputs, so every call uses the current ones.

Nothing is written or reopened when weights change. Weights without an adapter are the network's own memory; the others
are merged once per iteration (docs/branching.md). The graph is the one that `fmg export` traces; it depends only on the
config of the network, and is cached.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fmg.core.cache import cache_dir, made_once, optional_cache
from fmg.core.errors import CheckpointError, FmgError, reason
from fmg.core.protocols import Model
from fmg.export.artifact import library_versions, plain_config
from fmg.export.graphs import transformer_plan
from fmg.export.onnx import trace
from fmg.inference import onnxruntime as ort
from fmg.models.common.adapter import merged_tensors
from fmg.models.flux.model import FluxModel

_FILE = "transformer.onnx"
# ONNX's codes of dtypes, for tensors that are bound by address
_ONNX_TYPES = {torch.float32: 1, torch.float16: 10, torch.bfloat16: 16}


def live_graph(model: Model) -> LiveGraph:
    """The exported graph of a model's network on ONNX Runtime, on its device and in its dtype.

    Raises:
        CheckpointError: the model has no exported graph, or it cannot be traced.
        MissingDependencyError: the packages that write and run graphs are not installed.
        UsageError: onnxruntime was built without the provider of the device.
    """
    if not isinstance(model, FluxModel):
        raise CheckpointError("The model is not of the FLUX family", "Set rollout.branch.backend to torch.")
    device = model.device
    provider = ort.CUDA if device.type == "cuda" else ort.CPU
    ort.check_provider(provider)
    transformer: Any = model.network
    content = _graph(transformer, transformer.dtype)
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
    return LiveGraph(session, transformer, device)


class LiveGraph:
    """A graph with the call signature of its transformer.

    Args:
        session: of the graph, whose weights are inputs under their names in the state dict.
        transformer: the network.
        device: of the network.
    """

    def __init__(self, session: Any, transformer: nn.Module, device: torch.device) -> None:
        self._session = session
        self._transformer = transformer
        self._dtype: torch.dtype = transformer.dtype  # type: ignore[assignment]
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
    def __call__(self, *, return_dict: bool = False, **inputs: Tensor | None) -> tuple[Tensor]:
        """The output (b, image, c) in fp32, as a tuple of one; takes the keyword arguments of the transformer.

        Raises:
            FmgError: ONNX Runtime failed.
        """
        bound = {name: x.float().contiguous() for name, x in inputs.items() if x is not None} | self._weights
        binding = self._session.io_binding()
        for name in self._wanted:
            x = bound[name]
            binding.bind_input(name, *self._where, _ONNX_TYPES[x.dtype], tuple(x.shape), x.data_ptr())
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
        return (torch.utils.dlpack.from_dlpack(output),)


def _graph(transformer: Any, dtype: torch.dtype) -> bytes:
    """The graph with its weights as inputs, traced once per config, dtype and versions of the tracing packages."""
    config = plain_config(transformer.config)
    facts = {"config": config, "dtype": str(dtype), "libraries": library_versions()}
    key = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()
    found: list[bytes] = []

    def make(folder: Path) -> None:
        found.append(_traced(config, dtype))
        (folder / _FILE).write_bytes(found[0])

    with optional_cache():
        found.append((made_once(cache_dir() / "graphs" / key[:32], make) / _FILE).read_bytes())
    return found[-1] if found else _traced(config, dtype)


def _traced(config: dict[str, object], dtype: torch.dtype) -> bytes:
    import onnx_ir as ir

    graph = trace(transformer_plan(config, dtype))
    for name in graph.parameters:
        graph.model.graph.inputs.append(graph.model.graph.initializers.pop(name))
    content: bytes = ir.to_proto(graph.model).SerializeToString()
    return content
