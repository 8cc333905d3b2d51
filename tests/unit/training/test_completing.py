"""Completions on another backend use the trained weights, and are refused if they would differ from torch's."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmg import Recipe, train
from fmg.core.errors import CompositionError, GateError, MissingDependencyError, UsageError
from fmg.core.events import Event, Notice
from fmg.core.files import LOCK
from fmg.flow import LinearPath, TwoTimeMap
from fmg.flow.maps import PaddedBatches
from fmg.inference.compiled import CompiledNetwork
from fmg.models.common.adapter import merged_tensors
from fmg.models.flux.model import FluxModel
from fmg.models.flux.transformer import FlowMapFluxTransformer2DModel
from fmg.recipe.composition import check_backend
from fmg.training.completing import completions_gate
from fmg.training.launch import check_shares
from tests.tiny_flux import build_tiny_flux

CPU = torch.device("cpu")
BRANCH = {"rollout.kind": "branch", "rollout.branch.backend": "onnxruntime"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tiny two-time model, with its traced graphs beside it."""
    place = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMG_CACHE", str(place / "cache"))
        yield build_tiny_flux(place / "model")


@pytest.fixture
def model(folder: Path) -> FluxModel:
    return FluxModel.from_folder(folder, CPU, torch.float32, name="tiny")


def _jump(model: FluxModel, flow_map: Any = None, rows: int = 3) -> Tensor:
    x = torch.randn(rows, *model.latent_shape, generator=torch.Generator().manual_seed(0))
    t = torch.linspace(1.0, 0.6, rows)
    with torch.no_grad():
        jumped: Tensor = (flow_map or model.flow_map).jump(x, t, t / 3, model.encode(["a red circle"] * rows))
    return jumped


def _shake(model: FluxModel, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _, parameter in model.trainable():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)


def _train(model: FluxModel, trained: str) -> None:
    if trained == "full":
        model.unfreeze("full")
        return
    model.attach_adapter(2, 4.0, ["attention", "x_embedder"], 0.0, seed=0)
    if trained == "lora+duration":
        model.unfreeze("duration")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rollout.kind": "chain"}, "a chain has none"),
        ({"model": "z-image-turbo", "train.dtype": "fp32"}, "'z-image-turbo' cannot be traced as a graph"),
        ({"train.dtype": "bf16", "train.device": "cpu"}, "cannot compute in bf16 on a CPU"),
    ],
)
def test_what_cannot_be_is_refused_when_composed(changes: dict[str, object], message: str) -> None:
    with pytest.raises(CompositionError, match=message):
        Recipe.default(**{**BRANCH, **changes})


def test_a_device_that_is_only_known_later_and_fsdp2_are_refused_then() -> None:
    recipe = Recipe.default(None, **BRANCH, **{"train.dtype": "bf16"})
    check_backend(recipe, "cuda")
    with pytest.raises(CompositionError, match="cannot compute in bf16 on a CPU"):
        check_backend(recipe, "cpu")
    check_shares(recipe, 2, "ddp")
    check_shares(recipe, 1, "fsdp2")
    with pytest.raises(UsageError, match="FSDP2 keeps a shard of the weights"):
        check_shares(recipe, 2, "fsdp2")


def test_a_missing_package_is_one_line_before_weights_are_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingDependencyError, match=r"needs the package 'onnxscript'.*pip install '.*\[onnx\]'"):
        train(Recipe.default(None, **BRANCH), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_gate_names_the_difference_and_the_bound() -> None:
    recipe = Recipe.default(None, **BRANCH)
    images = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    assert completions_gate(images, images + 5e-5, recipe) == pytest.approx(5e-5, rel=0.01)
    with pytest.raises(GateError, match=r"onnxruntime differ from torch's: 0\.001 at most over 4 .* fp32: .* 0\.0001"):
        completions_gate(images, images + 1e-3, recipe)
    with pytest.raises(GateError, match="1 of 4 images have values that are not finite"):
        completions_gate(images, torch.where(torch.arange(4)[:, None, None, None] == 2, torch.nan, images), recipe)


@pytest.mark.parametrize("trained", ["lora", "lora+duration", "full"])
def test_merged_tensors_are_those_of_a_plain_network(model: FluxModel, trained: str) -> None:
    _train(model, trained)
    _shake(model, 1)
    merged = merged_tensors(model.network, torch.float32)
    plain = FlowMapFluxTransformer2DModel.from_config(dict(model.components.transformer.config))
    plain.load_state_dict(merged)
    torch.testing.assert_close(_jump(model, model.flow_map_through(plain)), _jump(model), rtol=1e-4, atol=1e-5)
    own = dict(model.network.named_parameters())["proj_out.weight"]
    assert merged["proj_out.weight"].data_ptr() == own.data_ptr()


class Doubling(nn.Module):
    """A network with one weight, called like the network of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, *, x: Tensor, t: Tensor) -> Tensor:
        return self.weight * x + t[:, None]


@pytest.mark.slow
@pytest.mark.compile
def test_a_compiled_network_follows_the_weights_and_is_compiled_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._dynamo.utils import counters

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    module = Doubling()
    compiled = CompiledNetwork(module)
    flow_map = PaddedBatches(TwoTimeMap(lambda x, t, s, cond: compiled(x=x, t=t), LinearPath()), lambda _: 4)

    class Rows:
        def select(self, rows: Tensor) -> Rows:
            return self

    counters.clear()
    for rows, factor in ((4, 1.0), (3, 0.5), (1, 2.0)):
        module.weight.data *= factor
        x, t = torch.randn(rows, 2), torch.full((rows,), 0.5)
        after = flow_map.jump(x, t, torch.zeros(rows), Rows())  # type: ignore[arg-type]
        torch.testing.assert_close(after, x - 0.5 * (module.weight.detach() * x + 0.5))
        assert not after.requires_grad
        # an update in between
        module(x=x, t=t).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.slow
@pytest.mark.compile
@pytest.mark.parametrize("trained", ["lora", "lora+duration", "full"])
def test_a_live_graph_follows_the_weights(model: FluxModel, trained: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fmg.export import live

    _train(model, trained)
    graph = live.live_graph(model)
    flow_map = model.flow_map_through(graph)
    for seed, rows in ((1, 3), (2, 4)):
        before = _jump(model, flow_map, rows)
        _shake(model, seed)
        # weights without an adapter are the network's own memory; the others are merged on request
        assert trained != "lora" or torch.equal(_jump(model, flow_map, rows), before)
        graph.refresh()
        torch.testing.assert_close(_jump(model, flow_map, rows), _jump(model, rows=rows), rtol=1e-4, atol=1e-4)
        assert (before - _jump(model, flow_map, rows)).abs().max() > 1e-3
    # the graph follows from the config alone
    monkeypatch.setattr(live, "trace", None)
    live.live_graph(model)


@pytest.mark.slow
@pytest.mark.compile
def test_a_run_is_stopped_where_the_completions_stay_behind(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fmg.export.live import LiveGraph

    recipe = Recipe.default(
        **BRANCH,
        **{
            "model": {"name": "meanflow-shapes", "folder": str(folder)},
            "rewards": ["jpeg-compressibility"],
            "rollout.groups": 2,
            "rollout.group_size": 4,
            "train.iterations": 2,
            "optimizer.lr": 0.1,
            "eval.num": 2,
            "eval.rewards": [],
        },
    )
    heard: list[Event] = []
    train(recipe, tmp_path / "good", heard.append)
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any(text.startswith("Completions by onnxruntime checked twice: images within") for text in said)
    assert {path.name for path in (tmp_path / "good").iterdir() if path.name.startswith(".")} <= {LOCK}
    once: list[LiveGraph] = []
    refresh = LiveGraph.refresh
    monkeypatch.setattr(LiveGraph, "refresh", lambda self: None if self in once else (refresh(self), once.append(self)))
    with pytest.raises(GateError, match="Completions by onnxruntime differ from torch's"):
        train(recipe, tmp_path / "stale", heard.append)
