"""The contract of an artifact: strict manifests, and files that equal the exported ones. No graph is needed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fmg.core.errors import CheckpointError, UsageError
from fmg.inference.artifact import layout, open_artifact
from fmg.inference.artifact.layout import file_entry, write_manifest
from fmg.inference.artifact.manifest import (
    GRAPHS,
    MANIFEST,
    AxisRange,
    Base,
    Check,
    Graph,
    Manifest,
    ModelFacts,
    Sampling,
    TensorSpec,
    TokenizerFacts,
)
from fmg.inference.artifact.manifest_io import from_json, to_json
from tests.support.tiny_artifact import reseal

Change = Callable[[dict[str, Any]], object]

AXES = ("image", "height", "width", "pixel_height", "pixel_width")
BORDERS: dict[str, tuple[dict[str, tuple[int | str, ...]], dict[str, tuple[int | str, ...]]]] = {
    "text_encoder": ({"input_ids": ("batch", 16)}, {"pooled": ("batch", 6)}),
    "text_encoder_2": ({"input_ids": ("batch", "text")}, {"tokens": ("batch", "text", 8)}),
    "transformer": (
        {
            "hidden_states": ("batch", "image", 16),
            "encoder_hidden_states": ("batch", "text", 8),
            "pooled_projections": ("batch", 6),
            "timestep": ("batch",),
            "second": ("batch",),
            "img_ids": ("image", 3),
            "txt_ids": ("text", 3),
        },
        {"velocity": ("batch", "image", 16)},
    ),
    "vae_decoder": (
        {"latents": ("batch", 4, "height", "width")},
        {"images": ("batch", 3, "pixel_height", "pixel_width")},
    ),
}


def specs(shapes: dict[str, tuple[int | str, ...]]) -> tuple[TensorSpec, ...]:
    return tuple(TensorSpec(name, "int64" if name == "input_ids" else "float32", s) for name, s in shapes.items())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An artifact whose files hold no graphs, but match the hashes of its manifest."""
    root = tmp_path / "artifact"
    for name in ("tokenizer", "tokenizer_2"):
        (root / name).mkdir(parents=True)
        (root / name / "tokenizer.json").write_text("{}")
    for name in GRAPHS:
        (root / layout.graph_file(name)).write_bytes(name.encode())
        (root / layout.weights_file(name)).write_bytes(b"weights of " + name.encode())
    graphs = {
        name: Graph(layout.graph_file(name), layout.weights_file(name), "fp32", *map(specs, BORDERS[name]))
        for name in GRAPHS
    }
    files = {str(path.relative_to(root)): file_entry(path) for path in sorted(root.rglob("*")) if path.is_file()}
    manifest = Manifest(
        schema=1,
        files=files,
        model=ModelFacts("meanflow-shapes", {"in_channels": 16}, {}),
        sampling=Sampling("two-time", "linear", 1000.0, "duration", None, 4, 4, 32, (32, 48), (1.0, 0.5, 0.0), 2),
        precision="fp32",
        opset=20,
        axes={"batch": AxisRange(1, 4, 16), "text": AxisRange(16, 16, 16)} | dict.fromkeys(AXES, AxisRange(8, 64, 144)),
        graphs=graphs,
        tokenizers={
            name: TokenizerFacts(f"{home}/tokenizer.json", 16, 0, "<pad>")
            for name, home in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
        },
        base=Base("meanflow-shapes", "0" * 64, ("float16",), None),
        adapter=None,
        rewards=({"name": "shapes", "weight": 1.0},),
        prompts={},
        libraries={},
        checks=(),
    )
    write_manifest(root, manifest)
    return root


def edit(folder: Path, change: Change) -> None:
    raw = json.loads((folder / MANIFEST).read_text())
    change(raw)
    (folder / MANIFEST).write_text(json.dumps(raw))
    reseal(folder)


def sampling(**values: object) -> Change:
    return lambda raw: raw["sampling"].update(values)


def tokenizer(**values: object) -> Change:
    return lambda raw: raw["tokenizers"]["text_encoder_2"].update(values)


def inputs(graph: str, change: Callable[[list[Any]], object]) -> Change:
    return lambda raw: change(raw["graphs"][graph]["inputs"])


def nested(levels: int) -> Change:
    def change(raw: dict[str, Any]) -> None:
        for _ in range(levels):
            raw["prompts"] = {"deeper": raw["prompts"]}

    return change


def test_manifest_survives_a_round_trip(folder: Path) -> None:
    manifest = open_artifact(folder).manifest
    assert from_json(to_json(manifest), folder) == manifest
    assert manifest.sampling.grid == (1.0, 0.5, 0.0)
    assert manifest.sampling.latent_shape() == (4, 8, 8)
    assert manifest.sampling.latent_shape(48) == (4, 12, 12)
    assert manifest.sampling.image_tokens(48) == 36


def smallest_batch_of_large_latents(raw: dict[str, Any]) -> None:
    raw["axes"]["batch"].update(minimum=1024, optimum=1024, maximum=1024)
    raw["sampling"].update(resolutions=[32, 4096])


def move(raw: dict[str, Any], old: str, new: str) -> None:
    raw["files"][new] = raw["files"].pop(old)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda raw: raw.update(schema=3), "has schema 3, but this version of fmg reads schemas up to 2"),
        (lambda raw: raw.pop("schema"), "it does not state its schema"),
        (lambda raw: raw.update(schema=True), "it does not state its schema"),
        (lambda raw: raw.pop("opset"), "opset is missing"),
        (lambda raw: raw.update(code="import os"), "code is not a known key"),
        (lambda raw: raw.update(opset="20"), "opset is '20' instead of int"),
        (lambda raw: raw.update(opset=True), "opset is True instead of int"),
        (lambda raw: raw["sampling"].update(time_scale=float("nan")), "NaN is not JSON"),
        (lambda raw: raw["sampling"].update(map="three-time"), "sampling.map is 'three-time' instead of one of"),
        (lambda raw: raw["axes"].pop("batch"), "axes.batch is missing, which graphs.text_encoder has"),
        (lambda raw: raw["axes"]["batch"].update(minimum=8), "axes.batch is invalid: the range 8:4:16"),
        (lambda raw: raw["graphs"].pop("transformer"), "graphs.transformer is missing"),
        (lambda raw: raw["graphs"]["transformer"].update(weights="other"), "files does not list 'other'"),
        (lambda raw: raw["tokenizers"].pop("text_encoder_2"), "tokenizers.text_encoder_2 is missing"),
        (lambda raw: move(raw, "transformer.onnx", "../transformer.onnx"), "which is not inside the artifact"),
        (lambda raw: move(raw, "transformer.onnx", "/etc/passwd"), "which is not inside the artifact"),
        (lambda raw: move(raw, "transformer.onnx", "a/../../b"), "which is not inside the artifact"),
        (lambda raw: move(raw, "transformer.onnx", "..\\b"), "which is not inside the artifact"),
        (lambda raw: move(raw, "transformer.onnx", "C:b"), "which is not inside the artifact"),
        (lambda raw: move(raw, "transformer.onnx", "./b"), "which is not inside the artifact"),
        (lambda raw: raw.update(files=[]), r"files is \[\] instead of dict"),
        (lambda raw: move(raw, "transformer.onnx", "\ud800"), "unpaired surrogate"),
        (lambda raw: move(raw, "transformer.onnx", "x" * 256), "which is not inside the artifact"),
        (nested(100), "nested deeper than 64 levels"),
        (tokenizer(length=10**12), "length is 1000000000000, which is not between 1 and 4096"),
        (tokenizer(length=10**400), "an integer has 401 digits"),
        (tokenizer(length=-1), "length is -1, which is not between"),
        (tokenizer(length=20), "axes.text is 16 to 16, which does not include the 20 tokens"),
        (tokenizer(pad_id=-1), "pad_id is -1"),
        (tokenizer(pad_id=2**70), "pad_id is 1180591620717411303424"),
        (lambda raw: raw["tokenizers"].update(weird=raw["tokenizers"]["text_encoder"]), "weird belongs to no text"),
        (sampling(guidance=10**400), "an integer has 401 digits"),
        (sampling(guidance=1e300), "guidance is 1e\\+300"),
        (sampling(guidance=3.5), "graphs.transformer.inputs lacks 'guidance'"),
        (sampling(time_scale=0), "time_scale is 0"),
        (sampling(latent_scale=0), "latent_scale is 0"),
        (sampling(latent_scale=65), "latent_scale is 65"),
        (sampling(latent_channels=-4), "latent_channels is -4"),
        (sampling(latent_channels=10**9), "latent_channels is 1000000000"),
        (sampling(latent_channels=1024, latent_scale=1, resolutions=[32, 4096]), "a latent is 17179869184"),
        (sampling(resolutions=[32, 16384]), "a resolution is 16384, which is not between 8 and 4096"),
        (lambda raw: raw["axes"]["batch"].update(maximum=10**6), "maximum of axes.batch is 1000000"),
        (smallest_batch_of_large_latents, "the smallest batch of latents is 4294967296"),
        (lambda raw: raw["files"].update({f"f{i}": {"sha256": "", "size": 0} for i in range(1001)}), "files is 10"),
        (lambda raw: raw["files"].update({"f" * 240 + str(i): {} for i in range(10**4)}), "more than 2,097,152 bytes"),
        (sampling(resolution=0), r"the resolution 0 is not one of \[32, 48\]"),
        (sampling(resolution=2**40), "the resolution 1099511627776 is not one of"),
        (sampling(resolutions=[]), r"the resolutions \[\] do not increase"),
        (sampling(resolutions=[48, 32]), "do not increase"),
        (sampling(resolutions=[32, 36]), "36 is not a multiple of 8"),
        (sampling(resolutions=[0, 32]), "a resolution is 0"),
        (sampling(resolutions=[32, 2**40]), "a resolution is 1099511627776"),
        (sampling(steps=10**9), "steps is 1000000000"),
        (sampling(grid=[]), r"the grid \[\] does not decrease from 1 to 0"),
        (sampling(grid=[1.0, 0.5]), "does not decrease from 1 to 0"),
        (sampling(grid=[1.0, 1.0, 0.0]), "does not decrease from 1 to 0"),
        (sampling(map="single-time"), "a single-time map cannot have second_time 'duration'"),
        (
            sampling(map="single-time", second_time="none"),
            "transformer.inputs has 'second', which the sampling does not",
        ),
        (inputs("transformer", lambda given: given.clear()), "graphs.transformer.inputs lacks 'hidden_states'"),
        (inputs("vae_decoder", lambda given: given.append(given[0])), "has 'latents', which the sampling does not"),
        (inputs("vae_decoder", lambda given: given[0]["shape"].pop()), r"'latents' as float32 \(batch, 4, height\)"),
        (inputs("vae_decoder", lambda given: given[0].update(dtype="int64")), "'latents' as int64"),
        (
            inputs("transformer", lambda given: given[1]["shape"].__setitem__(2, -3)),
            r"inputs\[1\] is invalid: an axis is -3",
        ),
        (lambda raw: raw["graphs"]["text_encoder"].update(outputs=[]), "graphs.text_encoder.outputs lacks 'pooled'"),
        (lambda raw: raw["graphs"].update(weird=raw["graphs"]["transformer"]), "graphs.weird is not a known graph"),
        (lambda raw: raw["axes"]["image"].update(maximum=2**70), "axes.image is invalid: maximum is"),
    ],
)
def test_a_manifest_that_is_not_as_it_must_be_is_one_clear_error(folder: Path, change: Change, says: str) -> None:
    edit(folder, change)
    with pytest.raises(CheckpointError, match=says) as caught:
        open_artifact(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\x00", "[" * 100_000, '{"schema":' * 100_000], ids=range(7))
def test_a_manifest_that_is_not_a_json_object_is_refused(folder: Path, text: str) -> None:
    (folder / MANIFEST).write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json cannot be used"):
        open_artifact(folder)


def test_changed_files_are_found(folder: Path) -> None:
    weights = folder / "transformer.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"transformer\.safetensors is not the file that was exported"):
        open_artifact(folder)
    assert open_artifact(folder, hashes=False).manifest.model.name == "meanflow-shapes"
    weights.write_bytes(content[:-4])
    with pytest.raises(CheckpointError, match=r"has \d+ bytes, but the manifest says"):
        open_artifact(folder, hashes=False)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"transformer\.safetensors is missing"):
        open_artifact(folder)


def test_a_change_that_keeps_size_and_time_is_found_when_read_afresh(folder: Path) -> None:
    import os

    artifact = open_artifact(folder)
    weights = folder / "transformer.safetensors"
    stat = weights.stat()
    weights.write_bytes(weights.read_bytes()[:-1] + b"!")
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(CheckpointError, match="sha256 differs"):
        artifact.check_hashes(afresh=True)


def test_an_artifact_opens_where_nothing_can_be_noted(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "file" / "cache"))
    assert open_artifact(folder).manifest.schema == 1


def test_links_are_refused_wherever_they_lead(folder: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((folder / "transformer.onnx").read_bytes())
    (folder / "transformer.onnx").unlink()
    (folder / "transformer.onnx").symlink_to(secret)
    with pytest.raises(CheckpointError, match="is a link, which an artifact must not contain"):
        open_artifact(folder)


def test_a_linked_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer").rename(tmp_path / "elsewhere")
    (folder / "tokenizer").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a link"):
        open_artifact(folder)


def test_a_folder_without_manifest_and_an_unknown_graph_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="has no graph 'transformer_int8'"):
        open_artifact(folder).onnx("transformer_int8")
    (folder / MANIFEST).unlink()
    with pytest.raises(CheckpointError, match=r"is not an artifact: it has no manifest\.json"):
        open_artifact(folder)


def test_a_newer_verification_replaces_an_older_one(folder: Path) -> None:
    old, new, other = (Check(name, ok, {"gap": 0.1}, "", "0") for name, ok in (("a", False), ("a", True), ("b", True)))
    artifact = open_artifact(folder).with_checks([old, other]).with_checks([new])
    assert artifact.manifest.checks == (other, new)
    assert open_artifact(folder) == artifact


def test_verifications_are_not_written_to_an_artifact_that_changed_meanwhile(folder: Path) -> None:
    verified = open_artifact(folder)
    swapped = replace(verified.manifest, opset=21)
    write_manifest(folder, swapped)
    proof = Check("a", True, {"gap": 0.1}, "", "0")
    with pytest.raises(CheckpointError, match="changed while it was being verified"):
        verified.with_checks([proof])
    assert open_artifact(folder).manifest == swapped


def test_verifications_of_two_processes_are_kept(folder: Path) -> None:
    first, second = (Check(name, True, {"gap": 0.1}, "", "0") for name in "ab")
    mine, theirs = open_artifact(folder), open_artifact(folder)
    theirs.with_checks([first])
    assert mine.with_checks([second]).manifest.checks == (first, second)
    assert open_artifact(folder).manifest.checks == (first, second)


def test_opening_imports_the_standard_library_only() -> None:
    script = (
        "import sys; import fmg.inference.artifact;"
        "heavy = [m for m in ('torch', 'numpy', 'pydantic', 'diffusers', 'safetensors') if m in sys.modules];"
        "sys.exit(','.join(heavy) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
