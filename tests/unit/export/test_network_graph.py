"""The network of every family that can be traced, as a graph on ONNX Runtime in place of the trained module."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import ignore
from fmg.export.artifact import write_graph
from fmg.export.live import live_graph
from fmg.export.loaded_source import LoadedSource
from fmg.export.model_graphs import network_plan, plans, text_plan
from fmg.export.onnx import trace
from fmg.export.precision_report import precision_of_file
from fmg.export.source import graph_options
from fmg.flow import make_grid
from fmg.flow.sampling import native_sample
from fmg.inference.artifact.manifest import TRANSFORMER
from fmg.inference.target import Target
from fmg.models.common.adapter import is_under
from fmg.recipe import Recipe
from fmg.registry import models
from tests.support.families import PROMPTS, attach, noise
from tests.tiny_flux2 import FLUX2_CASE
from tests.tiny_flux3 import FLUX3_CASE
from tests.tiny_sana import RESOLUTION, SEQUENCE, build_tiny_sana
from tests.tiny_sd35 import SD35_CASE
from tests.tiny_zimage import Z_IMAGE_CASE

# the bound of `fmg verify` for an fp32 graph (fmg.export.verify_graphs)
RELATIVE = 1e-5

FAMILIES: dict[str, Callable[[Path], dict[str, object]]] = {
    FLUX2_CASE.model: FLUX2_CASE.build,
    FLUX3_CASE.model: FLUX3_CASE.build,
    SD35_CASE.model: SD35_CASE.build,
    "sana-sprint": lambda folder: {
        "folder": str(build_tiny_sana(folder)),
        "resolution": RESOLUTION,
        "max_sequence_length": SEQUENCE,
    },
}


def loaded(name: str, options: dict[str, object]) -> Any:
    return models.build(name, {**options, "text_cache": False}).load(torch.device("cpu"), torch.float32)


def difference(ours: Tensor, torchs: Tensor) -> float:
    return float((ours - torchs).norm() / torchs.norm())


def test_the_options_that_graphs_depend_on() -> None:
    sizes = {"resolution", "max_sequence_length"}
    more = {"sana-sprint": {"instruction"}, "sd35-meanflow": {"second_time"}}
    for name in FAMILIES:
        options = graph_options(Recipe.default(name).model.config)
        assert options.keys() == sizes | more.get(name, set()), name


@pytest.mark.parametrize("name", [SD35_CASE.model, "sana-sprint"])
def test_stored_embeddings_do_not_change_the_outputs_of_the_text_encoders(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    options = FAMILIES[name](tmp_path / "folder")
    models.build(name, options).load(torch.device("cpu"), torch.float32).encode([""])
    model: Any = models.build(name, options).load(torch.device("cpu"), torch.float32)
    stack = model.components.text
    outputs = stack.states(stack.tokenise([""], model.components.conventions.max_sequence_length))
    assert [spec.name for spec in text_plan(model).outputs] == list(outputs)
    assert set(model.encode([""]).stored) == set(outputs)


def test_a_size_that_no_artifact_can_have_is_refused(tmp_path: Path) -> None:
    folder = str(build_tiny_sana(tmp_path / "folder"))
    recipe = Recipe.default("sana-sprint", **{"model.folder": folder, "model.resolution": 96})
    with pytest.raises(UsageError, match="cannot be exported as it is sampled: the resolution 96 is not a multiple"):
        LoadedSource.load(Target("mine", recipe, None)).sampling(None)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_the_graph_of_a_trained_network(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    model = loaded(name, FAMILIES[name](tmp_path / "folder"))
    attach(model)
    _scale(model, 0.3)
    graph = live_graph(model)
    # no weight that a prompt does not need
    assert not any(is_under(name, model.unused) for name in graph._wanted)
    through = model.flow_map_through(graph)
    # sizes that were not traced, and times of their own in each row
    for rows in (1, 3):
        cond, x = model.encode([*PROMPTS, "third"][:rows]), noise(model, rows)
        t = torch.linspace(1.0, 0.4, rows)
        s = torch.zeros(rows) if model.spec.map_name == "single-time" else t / 3
        assert difference(through.jump(x, t, s, cond) - x, model.flow_map.jump(x, t, s, cond) - x) <= RELATIVE
    two, start, count = model.encode(list(PROMPTS)), noise(model), model.spec.default_steps
    grid = make_grid(model.spec.default_grid, count, image_tokens=start.shape[-1] * start.shape[-2] // 4)
    ours, torchs = (
        native_sample(flow_map, two, start, grid, lambda _: noise(model)) for flow_map in (through, model.flow_map)
    )
    assert difference(ours, torchs) <= RELATIVE
    assert float((model.decode(ours) - model.decode(torchs)).abs().max()) <= 1e-4
    # the weights of the next iteration
    _scale(model, 1.5)
    behind = through.jump(x, t, s, cond)
    assert difference(behind, model.flow_map.jump(x, t, s, cond)) > 1e-4
    graph.refresh()
    assert difference(through.jump(x, t, s, cond) - x, model.flow_map.jump(x, t, s, cond) - x) <= RELATIVE


def _scale(model: Any, factor: float) -> None:
    for _, parameter in model.trainable():
        parameter.mul_(factor)


@pytest.mark.slow
def test_the_graph_of_flux3_in_half_precision_is_as_requested(tmp_path: Path) -> None:
    """The other families' are verified in tests/integration/test_family_export.py."""
    model = loaded(FLUX3_CASE.model, FLUX3_CASE.build(tmp_path / "folder"))
    tensors = model.network.state_dict()
    plan = next(plan for plan in plans(model, torch.float16) if plan.name == TRANSFORMER)
    graph, _ = write_graph(tmp_path, trace(plan), lambda name, dtype: tensors[name].to(dtype), ignore)
    assert precision_of_file(tmp_path / graph.file, "fp16").foreign == ()


@pytest.mark.slow
def test_a_network_whose_shapes_depend_on_values_is_not_traced(tmp_path: Path) -> None:
    model = loaded(Z_IMAGE_CASE.model, Z_IMAGE_CASE.build(tmp_path / "folder"))
    with pytest.raises(CheckpointError, match="The graph 'transformer' cannot be traced: "):
        trace(network_plan(model))
