"""The locations of a graph's weights: read without onnx, and compared with the manifest before a runtime opens them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto

from fmg.core.errors import CheckpointError
from fmg.inference import load
from fmg.inference.artifact import open_artifact
from fmg.inference.artifact.external_data import check_external, external_files
from fmg.inference.artifact.layout import file_entry
from fmg.inference.artifact.manifest import GRAPHS, MANIFEST
from tests.support.cli import fmg
from tests.support.tiny_artifact import build_tiny_artifact, reseal

STRAY = "unlisted.bin"


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_artifact(tmp_path_factory.mktemp("clean") / "artifact").folder


@pytest.fixture
def folder(clean: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(clean, tmp_path / "artifact"))


def redirected(folder: Path, to: str) -> None:
    """The transformer's weights in another file, and a manifest that has the hash of the changed graph."""
    name = "transformer.onnx"
    model = onnx.load(folder / name, load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = to
    (folder / name).write_bytes(model.SerializeToString())
    (folder / to).parent.mkdir(exist_ok=True)
    shutil.copy(folder / "transformer.safetensors", folder / to)
    raw = json.loads((folder / MANIFEST).read_text())
    entry = file_entry(folder / name)
    raw["files"][name] = {"sha256": entry.sha256, "size": entry.size}
    (folder / MANIFEST).write_text(json.dumps(raw))
    reseal(folder)


def test_the_weights_of_every_graph_are_in_its_own_file(clean: Path) -> None:
    for graph in GRAPHS:
        assert external_files(clean / f"{graph}.onnx") == {f"{graph}.safetensors"}


@pytest.mark.parametrize("to", [STRAY, f"engines/{STRAY}"])
def test_weights_outside_the_manifest_are_not_loaded(folder: Path, to: str) -> None:
    redirected(folder, to)
    with pytest.raises(CheckpointError, match=rf"transformer\.onnx has weights in '{to}', but the manifest says"):
        load(folder, backend="onnxruntime", device="cpu").generate(["a red circle"], [0])


@pytest.mark.parametrize("listed", [True, False])
def test_verification_finds_them(folder: Path, listed: bool) -> None:
    redirected(folder, f"engines/{STRAY}" if listed else STRAY)
    done = fmg("verify", str(folder), "--alone")
    assert done.code == 1
    assert ("has weights in" if listed else f"{STRAY} is not in the manifest") in done.stderr


@pytest.mark.parametrize("name", ["notes.txt", "tokenizer/more.json", "transformer.bin"])
def test_a_file_that_is_not_listed_fails_verification(folder: Path, name: str) -> None:
    (folder / "engines").mkdir()
    (folder / "engines" / "left.alone").touch()
    for added in ("README.md", ".gitattributes", ".cache/huggingface/download/manifest.json.metadata"):
        (folder / added).parent.mkdir(parents=True, exist_ok=True)
        (folder / added).touch()
    open_artifact(folder).check_listed()
    (folder / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is not in the manifest"):
        open_artifact(folder).check_listed()


def test_a_link_that_is_not_listed_fails_verification(folder: Path) -> None:
    (folder / "more").symlink_to(folder / "tokenizer")
    with pytest.raises(CheckpointError, match="more is not in the manifest"):
        open_artifact(folder).check_listed()


def stray_tensor(name: str = "w") -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value=STRAY)
    return tensor


def in_a_constant(model: ModelProto) -> None:
    model.graph.node.append(NodeProto(op_type="Constant", output=["w"], attribute=[AttributeProto(t=stray_tensor())]))


def in_a_list_of_tensors(model: ModelProto) -> None:
    model.graph.node.append(NodeProto(op_type="Custom", attribute=[AttributeProto(tensors=[stray_tensor()])]))


def in_a_branch(model: ModelProto) -> None:
    branch = AttributeProto(name="then_branch", g=GraphProto(initializer=[stray_tensor()]))
    model.graph.node.append(NodeProto(op_type="If", attribute=[branch]))


def in_a_function(model: ModelProto) -> None:
    function = model.functions.add(name="f", domain="d")
    function.node.append(NodeProto(op_type="Constant", output=["w"], attribute=[AttributeProto(t=stray_tensor())]))


def in_sparse_values(model: ModelProto) -> None:
    model.graph.sparse_initializer.add().values.CopyFrom(stray_tensor())


def in_training_info(model: ModelProto) -> None:
    model.training_info.add().algorithm.initializer.append(stray_tensor())


@pytest.mark.parametrize(
    "place",
    [in_a_constant, in_a_list_of_tensors, in_a_branch, in_a_function, in_sparse_values, in_training_info],
    ids=lambda place: place.__name__,
)
def test_wherever_a_graph_hides_them(place: Callable[[ModelProto], None], clean: Path, tmp_path: Path) -> None:
    model = onnx.load(clean / "transformer.onnx", load_external_data=False)
    place(model)
    file = tmp_path / "g.onnx"
    file.write_bytes(model.SerializeToString())
    assert external_files(file) == {STRAY, "transformer.safetensors"}


def test_a_graph_that_is_split_or_oddly_encoded_hides_nothing(clean: Path, tmp_path: Path) -> None:
    whole = (clean / "transformer.onnx").read_bytes()
    more = ModelProto(graph=GraphProto(initializer=[stray_tensor()])).SerializeToString()
    file = tmp_path / "g.onnx"
    file.write_bytes(whole + more)
    # protobuf merges repeated fields, and so does every loader
    assert len(onnx.load(file, load_external_data=False).graph.initializer) == 12
    assert external_files(file) == {STRAY, "transformer.safetensors"}
    # field 7 with its tag in five bytes, of which the last goes beyond 32 bits
    assert more[0] == 0x3A
    file.write_bytes(whole + bytes([0xBA, 0x80, 0x80, 0x80, 0x10]) + more[1:])
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        check_external(file, "transformer.safetensors")


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_half_a_file_is_not_a_graph(cut: int, clean: Path, tmp_path: Path) -> None:
    file = tmp_path / "g.onnx"
    file.write_bytes((clean / "transformer.onnx").read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="is not an ONNX file"):
        check_external(file, "transformer.safetensors")
