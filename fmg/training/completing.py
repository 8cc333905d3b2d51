"""Completes siblings with something faster than the trained network: its compiled form, or its exported graph.

Completions have no density, so no update depends on how they are computed (docs/branching.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import CompositionError
from fmg.core.protocols import FlowMap, Model, Rerouted
from fmg.flow.maps import PaddedBatches
from fmg.inference.compiled import check_compiler, compiled_network
from fmg.inference.parity import check_same_images
from fmg.recipe import Recipe
from fmg.registry.catalog import LIVE_GRAPH
from fmg.registry.registry import load
from fmg.training.compose import Composed
from fmg.training.distributed import DistContext

_USE_TORCH = "set rollout.branch.backend to torch"


class _Network(Protocol):
    """Called instead of the network module."""

    def __call__(self, **inputs: Any) -> Any: ...

    def refresh(self) -> None:
        """Updates it to the current trained weights."""


@dataclass(frozen=True)
class Completer:
    """Completes siblings.

    Attributes:
        flow_map: the map, without gradients.
        refresh: updates the map to the current trained weights.
    """

    flow_map: FlowMap
    refresh: Callable[[], None]


def open_completer(composed: Composed, rows: int, dist: DistContext) -> Completer | None:
    """The recipe's backend for completions; None for the trained network itself.

    Args:
        composed: the live parts of the run.
        rows: maximum number of siblings per call.
        dist: the processes of the run; the main one traces a graph, the others find it in the cache.

    Raises:
        CompositionError: the network of the model cannot be replaced.
        CheckpointError, MissingDependencyError, UsageError: the graph cannot be traced or run here.
    """
    backend, model = composed.recipe.rollout.branch.backend, composed.model
    if backend == "torch":
        return None
    if not isinstance(model, Rerouted):
        raise CompositionError(
            f"The model '{composed.recipe.model.name}' runs only in torch", f"{_USE_TORCH.capitalize()}."
        )
    if backend == "torch-compile":
        check_compiler(model.device, _USE_TORCH)
        compiled = compiled_network(model, instead=f"{_USE_TORCH.capitalize()}.")
        # one shape, one compilation
        return Completer(PaddedBatches(model.flow_map_through(compiled), lambda _: rows), compiled.refresh)
    # by name, so that a run without it never imports the export
    live = cast("Callable[[Model], _Network]", load(LIVE_GRAPH))
    network = dist.main_process_first(lambda: live(composed.model))
    return Completer(model.flow_map_through(network), network.refresh)


def completions_gate(ours: Float[Tensor, "n 3 h w"], torchs: Float[Tensor, "n 3 h w"], recipe: Recipe) -> float:
    """Stops a run whose completions differ from the trained network's; returns the largest difference of a value.

    Args:
        ours: images completed by the backend of the recipe.
        torchs: the same siblings, completed by the network itself.
        recipe: the recipe, which states backend and precision.

    Raises:
        GateError: they differ by more than the images of an exported artifact may.
    """
    return check_same_images(
        ours.cpu().numpy(),
        torchs.cpu().numpy(),
        recipe.train.dtype,
        f"Completions by {recipe.rollout.branch.backend}",
        f"Use the versions of torch and onnxruntime in constraints.txt, or {_USE_TORCH}.",
    )
