"""The precision of engines according to their inspector, on the stand-in for TensorRT 11."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from fmg.export.verify import ReportsPrecision, engine_precision
from fmg.inference.artifact import open_artifact
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.artifact.layout import ENGINES
from fmg.inference.artifact.manifest import GRAPHS
from fmg.inference.loading import load
from fmg.inference.tensorrt.engine import Engine, RunOptions
from fmg.inference.tensorrt.precision_report import EnginePrecision, inspect
from tests.support import tensorrt as support
from tests.support.fake_cuda import FakeCuda
from tests.support.tiny_artifact import build_tiny_artifact, reseal


@pytest.fixture
def trt() -> Iterator[ModuleType]:
    with support.stand_in() as module:
        yield module


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("precision") / "artifact"
    build_tiny_artifact(folder)
    with support.stand_in():
        support.build(folder)
    return folder


def transformer_plan(folder: Path) -> Path:
    return next((folder / ENGINES).glob("transformer-*.plan"))


def test_the_inspector_says_what_an_engine_computes_in(plain: Path, trt: ModuleType) -> None:
    found = inspect(trt, Engine(trt, transformer_plan(plain), FakeCuda(), RunOptions()))
    assert found is not None
    assert found.products == {"FLOAT": 6}
    assert found.problem("fp32") == ""
    assert found.problem("bf16") == "no layer computes in BF16, which was requested"
    backend = load(plain, backend="tensorrt").backend
    assert isinstance(backend, ArtifactBackend)
    graphs: object = backend.runtime
    assert isinstance(graphs, ReportsPrecision)
    for graph, products in (("transformer", 6), ("vae_decoder", 1)):
        counted = graphs.precision(graph)
        assert counted is not None
        assert counted.by_precision() == {"fp32": products}


def test_verification_fails_for_an_engine_of_another_precision_than_its_graph(
    plain: Path, trt: ModuleType, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "artifact"))
    passed = list(engine_precision(open_artifact(folder), load(folder, backend="tensorrt")))
    assert [check.name for check in passed] == [f"precision/tensorrt/{graph}" for graph in GRAPHS]
    assert all(check.passed for check in passed)
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest.replace('"precision": "fp32"', '"precision": "bf16"'))
    reseal(folder)
    failed = list(engine_precision(open_artifact(folder), load(folder, backend="tensorrt")))
    assert [(check.passed, check.note) for check in failed] == [
        (False, "no layer computes in BF16, which was requested")
    ] * len(GRAPHS)


def test_an_inspector_without_types_verifies_nothing(plain: Path, trt: ModuleType, tmp_path: Path) -> None:
    plan = transformer_plan(plain)
    (tmp_path / "x.plan").write_bytes(plan.read_bytes().replace(b"DETAILED", b"NONE"))
    assert inspect(trt, Engine(trt, tmp_path / "x.plan", FakeCuda(), RunOptions())) is None


def test_half_precision_has_the_names_of_manifests() -> None:
    layers = {"gemm": {"BF16": 8, "FLOAT": 2}, "kgen": {"FLOAT": 40, "INT64": 3}}
    assert EnginePrecision(layers).by_precision() == {"fp32": 2, "bf16": 8}
    assert EnginePrecision({"kgen": {"HALF": 4, "BOOL": 1}}).by_precision() == {"fp16": 4}


@pytest.mark.parametrize(
    ("layers", "precision", "says"),
    [
        ({"gemm": {"BF16": 9, "FLOAT": 1}, "myelin": {"FLOAT": 40}}, "bf16", ""),
        ({"gemm": {"BF16": 8, "FLOAT": 2}}, "bf16", "2 of 10 products compute in FLOAT where BF16"),
        ({"gemm": {"BF16": 9, "HALF": 1}}, "bf16", "1 layers compute in HALF where BF16"),
        ({"gemm": {"HALF": 9}}, "fp16", ""),
        ({"gemm": {"FLOAT": 9}, "kgen": {"FP8": 1}}, "fp32", "1 layers compute in FP8 where FLOAT"),
        ({"kgen": {"FLOAT": 3, "INT64": 2}}, "fp32", ""),
        ({"kgen": {"FLOAT": 3, "BF16": 2}}, "bf16", ""),
        ({"kgen": {"FLOAT": 3}}, "bf16", "no layer computes in BF16"),
        ({"gemm": {"INT8": 3}}, "int8", "engines have no precision 'int8'"),
        ({}, "fp32", "no layer computes in FLOAT"),
    ],
)
def test_what_an_engine_computes_in(layers: dict[str, dict[str, int]], precision: str, says: str) -> None:
    problem = EnginePrecision(layers).problem(precision)  # type: ignore[arg-type]
    assert problem.startswith(says)
    assert bool(problem) == bool(says)
