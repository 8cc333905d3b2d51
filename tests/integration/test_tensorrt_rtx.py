"""TensorRT-RTX builds real engines on a CPU (`make rtx`), and refuses the requests that fmg refuses in advance."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import NodeProto, TensorProto, helper

from fmg.core.errors import CheckpointError, FmgError, UsageError
from fmg.core.events import ignore
from fmg.export.fp8 import stored_scales
from fmg.export.options import ExportOptions
from fmg.export.precision_report import fp32_products
from fmg.export.tensorrt import worker
from fmg.export.tensorrt.build import EngineOptions, build_engines, check_network
from fmg.export.tensorrt.worker import Job
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.layout import ENGINES
from fmg.inference.artifact.manifest import GRAPHS, LATENT_GRAPHS, TRANSFORMER, AxisRange, Manifest
from fmg.inference.loading import load
from fmg.inference.tensorrt.engine import Engine, RunOptions
from fmg.inference.tensorrt.flavours import ANY, FP8_CAPABILITIES, RTX, Gpu, load_module
from fmg.inference.tensorrt.records import EngineHost, Profile, ShapeRange, check_plan, read_records
from fmg.recipe import Recipe
from tests.support.artifact import copied, exported, make_run
from tests.support.cli import fmg
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_rtx import NAMES, as_rtx
from tests.support.tensorrt import stand_in
from tests.support.tiny_artifact import build_tiny_artifact
from tests.tiny_sana import RESOLUTION, SEQUENCE, build_tiny_sana

pytestmark = pytest.mark.rtx

PLAIN = EngineOptions().ingredients()


@pytest.fixture
def tiny(tmp_path: Path) -> Artifact:
    return build_tiny_artifact(tmp_path / "artifact")


def job_of(folder: Path, nodes: list[NodeProto], *, precision: int, opset: int, axes: tuple[int | str, ...]) -> Job:
    """A graph from `x` (batch, 16, 64) to `y`, with a weight `w` (64, 64), and the job to build it."""
    value = helper.make_tensor_value_info("x", precision, ["batch", 16, 64])
    out = helper.make_tensor_value_info("y", precision, list(axes))
    used = any("w" in node.input for node in nodes)
    weight = helper.make_tensor("w", precision, (64, 64), [0.01 * (i % 7) for i in range(64 * 64)])
    graph = helper.make_graph(nodes, "g", [value], [out], [weight] if used else [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    (folder / "g.onnx").write_bytes(model.SerializeToString())
    profile = Profile("g", {"x": ShapeRange((1, 16, 64), (1, 16, 64), (2, 16, 64))})
    return Job(str(folder / "g.onnx"), str(folder / "g.plan"), "rtx", (profile,), PLAIN, None)


def product(folder: Path, precision: int = TensorProto.BFLOAT16) -> Job:
    """A matrix product."""
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="n")
    return job_of(folder, [node], precision=precision, opset=20, axes=("batch", 16, 64))


@pytest.mark.slow
@pytest.mark.compile
def test_every_graph_of_the_embedded_model_builds(shapes_artifact: Artifact, tmp_path: Path) -> None:
    artifact = open_artifact(copied(shapes_artifact, tmp_path / "artifact"))
    engines = build_engines(artifact, flavour="rtx", resolutions=(32, 48), batch=AxisRange(1, 2, 4))
    assert [engine.record.graph for engine in engines] == list(GRAPHS)
    for engine in engines:
        check_plan(artifact.engines, engine.record)
        check_network(engine.record.graph, engine.record.layers, "fp32")
        made = engine.record.ingredients
        assert (made.flavour, made.gpu, made.driver) == ("rtx", ANY, ANY)
    transformer = engines[2].record
    assert [profile.name for profile in transformer.ingredients.profiles] == ["32px", "48px"]
    assert transformer.layers["MATRIX_MULTIPLY"]["FLOAT"] > 50
    again = build_engines(artifact, flavour="auto", resolutions=(32, 48), batch=AxisRange(1, 2, 4))
    assert all(engine.reused for engine in again)


def test_the_command_builds_engines_into_an_artifact(tiny: Artifact) -> None:
    done = fmg("export", str(tiny.folder), "--trt", "--resolutions", "8")
    assert (done.code, done.stderr.count("built the engine")) == (0, len(GRAPHS))
    assert {record.graph for record in read_records(tiny.folder)} == set(GRAPHS)
    assert done.stdout.count(".plan") == len(GRAPHS)


def test_weight_streaming_builds_and_no_timing_cache_is_kept(
    tiny: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    engines = build_engines(tiny, flavour="rtx", options=EngineOptions(weight_streaming=True))
    assert not any(engine.reused for engine in engines)
    # a timing cache would need a GPU: the cache records only which engines were built here
    assert [path.name for path in (tmp_path / "cache" / "tensorrt").iterdir()] == ["built"]


def test_an_engine_that_cannot_be_loaded_without_a_gpu_says_why(tiny: Artifact) -> None:
    build_engines(tiny, flavour="rtx", resolutions=(8,))
    plan = next((tiny.folder / ENGINES).glob("transformer-*.plan"))
    with pytest.raises(CheckpointError, match=r"cannot load the engine .*cudaError 35"):
        Engine(load_module(RTX), plan, FakeCuda(), RunOptions())
    with pytest.raises(UsageError, match=r"fits here: .* there is no GPU here"):
        load(tiny, backend="tensorrt-rtx")
    assert load(tiny).backend.name == "onnxruntime"


def test_fp32_attention_of_opset_23_ends_the_builder(tmp_path: Path) -> None:
    """It ends in an error or a crash, depending on the graph: hence the refusal in advance and the separate process."""
    node = helper.make_node("Attention", ["x"] * 3, ["y"], name="n", q_num_heads=2, kv_num_heads=2)
    job = job_of(tmp_path, [node], precision=TensorProto.FLOAT, opset=23, axes=("batch", 16, 64))
    with pytest.raises(FmgError, match="engine of g was not built"):
        worker.build_engine(job, "g", ignore)
    assert not (tmp_path / "g.plan").exists()


@pytest.mark.parametrize("option", ["refittable", "version_compatible"])
def test_what_is_refused_for_rtx_really_fails_there(tmp_path: Path, option: str) -> None:
    job = product(tmp_path)
    worker.build_engine(job, "g", ignore)
    with pytest.raises(FmgError, match="engine of g was not built"):
        worker.build_engine(replace(job, options={**job.options, option: True}), "g", ignore)


def test_a_bf16_graph_becomes_a_bf16_network_and_fp32_is_refused_for_it(tmp_path: Path) -> None:
    built = worker.build_engine(product(tmp_path), "g", ignore)
    check_network("g", built.layers, "bf16")
    with pytest.raises(FmgError, match="BF16 where FLOAT was requested"):
        check_network("g", built.layers, "fp32")


def fp8_product(folder: Path, capabilities: list[str]) -> Job:
    """A matrix product whose sides are rounded to E4M3, for these GPUs."""
    job = product(folder)
    model = onnx.load(job.onnx)
    constants = [
        helper.make_tensor("scale", TensorProto.BFLOAT16, (), [0.01]),
        helper.make_tensor("zero", TensorProto.FLOAT8E4M3FN, (), b"\0", raw=True),
        helper.make_tensor("w", TensorProto.FLOAT8E4M3FN, (64, 64), bytes(i % 100 for i in range(64 * 64)), raw=True),
    ]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["x8"]),
        helper.make_node("DequantizeLinear", ["x8", "scale", "zero"], ["x16"]),
        helper.make_node("DequantizeLinear", ["w", "scale", "zero"], ["w16"]),
        helper.make_node("MatMul", ["x16", "w16"], ["y"], name="n"),
    ]
    for field, values in (("node", nodes), ("initializer", constants)):
        model.graph.ClearField(field)
        getattr(model.graph, field).extend(values)
    onnx.save(model, job.onnx)
    return replace(job, options={**PLAIN, "capabilities": capabilities})


def test_an_fp8_product_builds_for_ada_and_blackwell_and_not_for_ampere(tmp_path: Path) -> None:
    built = worker.build_engine(fp8_product(tmp_path, list(FP8_CAPABILITIES)), "g", ignore)
    check_network("g", built.layers, "fp8")
    with pytest.raises(FmgError, match="FP8 where BF16 was requested"):
        check_network("g", built.layers, "bf16")
    for older in ("8.6", "7.5"):
        with pytest.raises(FmgError, match=r"engine of g was not built: .*fp8_e4m3"):
            worker.build_engine(fp8_product(tmp_path, [*FP8_CAPABILITIES, older]), "g", ignore)


@pytest.mark.slow
@pytest.mark.compile
def test_the_fp8_transformer_of_the_embedded_model_builds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the transformer: the other graphs are those of a bf16 artifact."""
    artifact = exported("meanflow-shapes", tmp_path / "artifact", ExportOptions(precision="fp8"))
    monkeypatch.setattr(Manifest, "required", (TRANSFORMER,))
    (engine,) = build_engines(artifact, flavour="rtx", batch=AxisRange(1, 1, 4))
    record = engine.record
    assert record.ingredients.options["capabilities"] == list(FP8_CAPABILITIES)
    # products of one input share it
    quantised = len({name for name in stored_scales(artifact.onnx(TRANSFORMER)) if name.endswith(".input_scale")})
    assert (record.precision, record.layers["QUANTIZE"]["FP8"]) == ("fp8", quantised)
    assert record.layers["MATRIX_MULTIPLY"].keys() == {"BF16"}
    ampere, ada = (
        EngineHost(RTX, record.ingredients.version, Gpu(name, capability, "580"))
        for name, capability in (("RTX 3090", "8.6"), ("RTX 4090", "8.9"))
    )
    assert "is fp8, which RTX 3090 (compute capability 8.6) does not support" in record.misfit(ampere)
    assert record.misfit(ada) == ""


@pytest.mark.slow
@pytest.mark.compile
def test_every_graph_of_another_family_builds_in_fp8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SANA: an encoder with a mask, and attention without a softmax, whose products are fp32 in the graph."""
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    folder = build_tiny_sana(tmp_path / "folder")
    options = {"folder": str(folder), "resolution": RESOLUTION, "max_sequence_length": SEQUENCE, "text_cache": False}
    recipe = Recipe.default("sana-sprint", **{f"model.{name}": value for name, value in options.items()})
    run = make_run(tmp_path / "run", recipe.with_({"train.dtype": "fp32", "train.device": "cpu"}), seed=1)
    artifact = exported(run, tmp_path / "artifact", ExportOptions(precision="fp8"))
    engines = build_engines(artifact, flavour="rtx", batch=AxisRange(1, 1, 4))
    records = {engine.record.graph: engine.record for engine in engines}
    assert tuple(records) == LATENT_GRAPHS
    made = records[TRANSFORMER]
    assert (made.precision, set(made.layers["MATRIX_MULTIPLY"])) == ("fp8", {"BF16", "FLOAT"})
    assert made.layers["MATRIX_MULTIPLY"]["FLOAT"] == fp32_products(artifact, TRANSFORMER) == 4


def test_a_workspace_that_is_too_small_is_the_builders_own_reason(tmp_path: Path) -> None:
    job = product(tmp_path)
    with pytest.raises(FmgError, match=r"engine of g was not built: .+"):
        worker.build_engine(replace(job, options={**job.options, "workspace_gib": 1e-7}), "g", ignore)


def test_a_profile_that_does_not_fit_the_graph_is_the_builders_own_reason(tmp_path: Path) -> None:
    job = product(tmp_path)
    narrow = Profile("g", {"x": ShapeRange((1, 16, 32), (1, 16, 32), (1, 16, 32))})
    with pytest.raises(FmgError, match="Dimension mismatch for tensor x and profile 0"):
        worker.build_engine(replace(job, profiles=(narrow,)), "g", ignore)


def test_the_parser_names_the_node_that_it_does_not_know(tmp_path: Path) -> None:
    node = helper.make_node("Unique", ["x"], ["y"], name="node_odd")
    job = job_of(tmp_path, [node], precision=TensorProto.FLOAT, opset=20, axes=("n",))
    with pytest.raises(FmgError, match=r"node_odd and operator: Unique .*UNSUPPORTED_NODE"):
        worker.build_engine(job, "g", ignore)


def test_the_stand_in_has_no_name_that_the_real_api_lacks() -> None:
    """TensorRT-RTX is the installed flavour; its Python API is that of TensorRT 11."""
    real = importlib.import_module("tensorrt_rtx")
    with stand_in() as trt:
        fake = as_rtx(trt)
        for name in (*trt.__all__, *NAMES):
            assert hasattr(real, name), name
            ours, theirs = getattr(fake, name), getattr(real, name)
            for member in vars(ours):
                assert member.startswith("_") or hasattr(theirs, member), f"{name}.{member}"
            members = getattr(ours, "__members__", {})
            assert {key: int(value) for key, value in members.items()} == {
                key: int(theirs.__members__[key]) for key in members
            }, name
