"""Requests to the builder, and those that are refused before it starts."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.export.tensorrt import build as options_module
from fmg.export.tensorrt.build import EngineOptions, check_buildable, pick_flavour, profiles, wanted
from fmg.inference.artifact.manifest import BATCH, AxisRange, Manifest
from fmg.inference.tensorrt.flavours import RTX, TENSORRT, Flavour, Gpu, load_module
from fmg.inference.tensorrt.records import ShapeRange
from tests.support.cli import fmg
from tests.support.tiny_artifact import LENGTH, build_tiny_artifact

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", "580")


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return build_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact").manifest


def test_a_profile_for_each_resolution_with_exactly_its_tokens(manifest: Manifest) -> None:
    request = wanted(manifest, None, None)
    made = profiles("transformer", manifest.graphs["transformer"], manifest, request)
    assert [profile.name for profile in made] == ["8px", "16px"]
    assert made[0].shapes["hidden_states"] == ShapeRange((1, 4, 16), (2, 4, 16), (4, 4, 16))
    assert made[1].shapes["hidden_states"] == ShapeRange((1, 16, 16), (2, 16, 16), (4, 16, 16))
    assert made[1].shapes["img_ids"] == ShapeRange((16, 3), (16, 3), (16, 3))
    assert made[1].shapes["timestep"] == ShapeRange((1,), (2,), (4,))


def test_text_has_the_one_length_that_prompts_are_padded_to(manifest: Manifest) -> None:
    (made,) = profiles("text_encoder_2", manifest.graphs["text_encoder_2"], manifest, wanted(manifest, None, None))
    assert made.shapes["input_ids"] == ShapeRange((1, LENGTH), (2, LENGTH), (4, LENGTH))


def test_the_decoder_takes_fewer_rows_at_high_resolution(manifest: Manifest) -> None:
    big = replace(manifest, axes={**manifest.axes, **dict.fromkeys(("height", "width"), AxisRange(4, 4, 512))})
    big = replace(big, axes={**big.axes, "image": AxisRange(4, 4, 512**2), BATCH: AxisRange(1, 1, 16)})
    made = profiles("vae_decoder", big.graphs["vae_decoder"], big, wanted(big, (8, 512, 1024), None))
    assert [profile.shapes["latents"].maximum[0] for profile in made] == [16, 4, 1]
    assert {profile.shapes["latents"].minimum[0] for profile in made} == {1}


@pytest.mark.parametrize(
    ("sides", "batch", "says"),
    [
        ((10,), None, "10 is not a multiple of 4"),
        ((0,), None, "0 is not a multiple of 4"),
        ((32,), None, "'image' to 64, but the artifact was exported for 4 to 16"),
        ((4,), None, "'image' to 1"),
        (None, AxisRange(1, 2, 5), "'batch' to 1 to 5, but the artifact was exported for 1 to 4"),
    ],
)
def test_what_the_artifact_was_not_exported_for_is_refused(
    manifest: Manifest, sides: tuple[int, ...] | None, batch: AxisRange | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        wanted(manifest, sides, batch)


def test_resolutions_are_sorted_and_named_once(manifest: Manifest) -> None:
    assert wanted(manifest, (16, 8, 16), AxisRange(1, 1, 2)).resolutions == (8, 16)


@pytest.mark.parametrize(
    ("options", "flavour", "gpu", "says"),
    [
        (EngineOptions(), TENSORRT, None, "torch sees none here"),
        (EngineOptions(level=6), TENSORRT, GPU, "level 6"),
        (EngineOptions(workspace_gib=0.0), TENSORRT, GPU, "is invalid"),
        (EngineOptions(hardware="turing"), TENSORRT, GPU, "'turing'"),  # type: ignore[arg-type]
        (EngineOptions(version_compatible=True), RTX, GPU, "no lean runtime"),
        (EngineOptions(hardware="ampere-plus"), RTX, GPU, "no hardware compatibility level"),
        (EngineOptions(refittable=True), RTX, None, "cannot build a refittable engine without a GPU"),
    ],
)
def test_options_that_a_flavour_cannot_honour_are_refused_with_the_reason(
    options: EngineOptions, flavour: Flavour, gpu: Gpu | None, says: str
) -> None:
    with pytest.raises(UsageError, match=says):
        options.check(flavour, gpu)


def test_options_that_fit() -> None:
    EngineOptions(5, 2.0, False, "ampere-plus", True, True, True).check(TENSORRT, GPU)
    EngineOptions(weight_streaming=True).check(RTX, None)


def test_a_timing_cache_decides_nothing_of_an_engine() -> None:
    assert EngineOptions(timing_cache=False).ingredients() == EngineOptions().ingredients()
    assert "timing_cache" not in EngineOptions().ingredients()


@pytest.mark.parametrize(
    ("installed", "gpu", "picked"),
    [
        ({"tensorrt", "rtx"}, GPU, TENSORRT),
        ({"tensorrt", "rtx"}, None, RTX),
        ({"rtx"}, GPU, RTX),
        ({"tensorrt"}, GPU, TENSORRT),
    ],
)
def test_auto_prefers_tensorrt_where_there_is_a_gpu(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Gpu | None, picked: Flavour
) -> None:
    monkeypatch.setattr(options_module, "importable", lambda flavour: flavour.name in installed)
    assert pick_flavour("auto", gpu) == picked


@pytest.mark.parametrize(("installed", "gpu"), [(set(), GPU), ({"tensorrt"}, None)])
def test_auto_without_a_builder_says_how_to_get_each(
    monkeypatch: pytest.MonkeyPatch, installed: set[str], gpu: Gpu | None
) -> None:
    monkeypatch.setattr(options_module, "importable", lambda flavour: flavour.name in installed)
    with pytest.raises(MissingDependencyError) as caught:
        pick_flavour("auto", gpu)
    assert caught.value.exit_code == 2
    assert RTX.install in str(caught.value)
    assert TENSORRT.install in str(caught.value)


def test_the_artifact_is_kept_when_no_builder_is_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    before = {path: path.read_bytes() for path in artifact.folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(options_module, "importable", lambda flavour: False)
    done = fmg("export", str(artifact.folder), "--trt", "--json")
    assert (done.code, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "the ONNX artifact is complete without one" in done.stderr
    assert {path: path.read_bytes() for path in artifact.folder.rglob("*") if path.is_file()} == before


def test_a_default_installation_needs_nothing_from_nvidias_index() -> None:
    """The sdist of tensorrt-cu13-libs ends a whole `pip install` where that index cannot be reached."""
    project = tomllib.loads((Path(__file__).resolve().parents[3] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert any(line.startswith("tensorrt-cu13") for line in extras["trt"])
    others = [line for name, lines in extras.items() if name not in ("trt", "trt-rtx") for line in lines]
    assert not [line for line in (*project["dependencies"], *others) if "tensorrt" in line or "trt" in line]


def test_half_of_a_package_counts_as_none(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "half_a_tensorrt.py").write_text("raise OSError('libnvonnxparser.so.11: cannot open')\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(MissingDependencyError, match="libnvonnxparser"):
        load_module(replace(TENSORRT, module="half_a_tensorrt"))


def test_an_unknown_flavour_is_refused() -> None:
    with pytest.raises(UsageError, match="'rtx'"):
        pick_flavour("rtxx", None)


def _attention(path: Path, opset: int, operator: str = "Attention") -> Path:
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8])
    out = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 4, 8])
    graph = helper.make_graph([helper.make_node(operator, ["x"] * 3, ["y"], name="n")], "g", [value], [out])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)]), str(path))
    return path


def test_fp32_attention_of_opset_23_is_refused_and_nothing_else_of_it(tmp_path: Path) -> None:
    path = _attention(tmp_path / "g.onnx", 23)
    with pytest.raises(UsageError, match="opset 23 in fp32, for which TensorRT has no kernel"):
        check_buildable(path, "g.safetensors", "fp32")
    check_buildable(path, "g.safetensors", "bf16")


def test_a_graph_for_onnxruntime_int8_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="quantised for ONNX Runtime"):
        check_buildable(_attention(tmp_path / "g.onnx", 20, "DynamicQuantizeLinear"), "g.safetensors", "int8")


def test_a_truncated_graph_is_refused(tmp_path: Path) -> None:
    path = _attention(tmp_path / "g.onnx", 20)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        check_buildable(path, "g.safetensors", "fp32")


def test_a_graph_that_points_into_another_file_is_refused(tmp_path: Path) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    path = artifact.onnx("transformer")
    model = onnx.load(str(path), load_external_data=False)
    next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../secret"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"has weights in '\.\./secret'"):
        check_buildable(path, "transformer.safetensors", "fp32")
