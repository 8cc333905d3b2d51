"""The sampler in one graph gives the images of the loop, and is used where it fits."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

from fmg.core.errors import CheckpointError
from fmg.core.specs import MapKind
from fmg.export.fused import add_sampler
from fmg.export.verify_source import _misplaced
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.backend import artifact_backend
from fmg.inference.artifact.layout import file_entry, write_manifest
from fmg.inference.artifact.manifest import MANIFEST, SAMPLER, TRANSFORMER, VAE_DECODER
from fmg.inference.benchmark import BenchBackend, parse_backends
from fmg.inference.generator import Generated, Generator
from fmg.inference.onnxruntime import OnnxRuntime
from tests.support.cli import fmg
from tests.support.tiny_artifact import PROMPTS, RESOLUTIONS, build_tiny_artifact, reseal

MAPS: tuple[tuple[MapKind, Any], ...] = (
    ("two-time", "linear"),
    ("velocity", "linear"),
    ("single-time", "linear"),
    ("single-time", "trig"),
)


class Recorded(OnnxRuntime):
    """Counts the calls of each graph."""

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact, threads=1)
        self.calls: Counter[str] = Counter()

    def outputs(self, graph: str, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        self.calls[graph] += 1
        return super().outputs(graph, inputs)


def fused(folder: Path, **options: Any) -> Artifact:
    artifact = build_tiny_artifact(folder, **options)
    manifest = add_sampler(folder, artifact.manifest)
    write_manifest(folder, manifest)
    return open_artifact(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return fused(tmp_path_factory.mktemp("fused") / "artifact")


def drawn(artifact: Artifact, *, fuse: bool = True, **options: Any) -> tuple[Generated, Counter[str]]:
    """Images of all prompts in batches of three, and the calls that made them."""
    runtime, sampling = Recorded(artifact), artifact.manifest.sampling
    backend = artifact_backend(artifact, runtime, resolution=options.pop("resolution", None), fused=fuse)
    with Generator(backend, sampling.grid, sampling.steps, 3) as generator:
        return generator.generate(PROMPTS, seeds=list(range(len(PROMPTS))), progress=False, **options), runtime.calls


@pytest.mark.parametrize(("kind", "path"), MAPS)
def test_one_call_gives_the_images_of_the_loop(kind: MapKind, path: Any, tmp_path: Path) -> None:
    artifact = fused(tmp_path / "artifact", kind=kind, path=path)
    loop, calls = drawn(artifact, fuse=False)
    assert (calls[TRANSFORMER], calls[VAE_DECODER], calls[SAMPLER]) == (8, 2, 0)
    once, calls = drawn(artifact)
    assert (calls[TRANSFORMER], calls[VAE_DECODER], calls[SAMPLER]) == (0, 0, 2)
    # a sine in fp32 is rounded differently from one in fp64
    allowed = 2e-6 if path == "trig" else 1e-7
    assert np.ptp(loop.image_array) > 0.1
    assert np.abs(once.image_array - loop.image_array).max() <= allowed
    assert np.abs(once.latent_array - loop.latent_array).max() <= 10 * allowed
    assert once.timings_ms.keys() >= {"sampler"}


def test_times_are_inputs_and_other_steps_or_sizes_take_the_loop(tiny: Artifact) -> None:
    grid = (1.0, 0.8, 0.5, 0.1, 0.0)
    (once, calls), (loop, _) = drawn(tiny, grid=grid, steps=4), drawn(tiny, fuse=False, grid=grid, steps=4)
    assert calls[SAMPLER] == 2
    assert np.abs(once.image_array - loop.image_array).max() <= 1e-7
    plain, _ = drawn(tiny)
    assert np.abs(once.image_array - plain.image_array).max() > 1e-3
    for options in ({"steps": 2}, {"resolution": RESOLUTIONS[-1]}):
        other, calls = drawn(tiny, **options)
        assert calls[SAMPLER] == 0
        assert calls[TRANSFORMER] > 0
        assert np.array_equal(other.image_array, drawn(tiny, fuse=False, **options)[0].image_array)


def test_weights_are_not_copied_and_what_the_steps_share_is_computed_once(tiny: Artifact) -> None:
    model = onnx.load(tiny.onnx(SAMPLER), load_external_data=False)
    outside = {tensor.name for tensor in model.graph.initializer if tensor.external_data}
    parts = {
        f"{part}.{tensor.name}"
        for part in (TRANSFORMER, VAE_DECODER)
        for tensor in onnx.load(tiny.onnx(part), load_external_data=False).graph.initializer
        if tensor.external_data
    }
    assert outside == parts
    reads = Counter(name for node in model.graph.node for name in node.input)
    assert (reads["transformer.x_embedder.weight"], reads["transformer.context_embedder.weight"]) == (4, 1)
    assert {file for file in tiny.manifest.files if file.startswith("sampler")} == {"sampler.onnx"}


def test_damage_is_found(tiny: Artifact, tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    artifact = fused(folder)
    assert _misplaced(artifact, SAMPLER) == ""
    model = onnx.load(folder / "sampler.onnx", load_external_data=False)
    by_name = {tensor.name: tensor for tensor in model.graph.initializer}
    one, other = by_name["transformer.x_embedder.bias"], by_name["transformer.proj_out.bias"]
    one.external_data[1].value, other.external_data[1].value = other.external_data[1].value, one.external_data[1].value
    (folder / "sampler.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"sampler\.onnx .*is not the file that was exported|differs"):
        open_artifact(folder)
    files = {**artifact.manifest.files, "sampler.onnx": file_entry(folder / "sampler.onnx")}
    write_manifest(folder, replace(artifact.manifest, files=files))
    assert "where it is not stored" in _misplaced(open_artifact(folder), SAMPLER)
    by_name["vae_decoder.conv.bias"].external_data[0].value = "base.safetensors"
    (folder / "sampler.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match=r"weights in 'base\.safetensors', but the manifest says transformer"):
        artifact.onnx(SAMPLER)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("times", ["batch", 1], "does not state the times"),
        ("noise", ["batch", 4, 8, 8], "has 'noise' as"),
        ("pooled_projections", None, "lacks 'pooled_projections'"),
    ],
)
def test_a_manifest_with_other_inputs_is_refused(
    name: str, shape: list[object] | None, says: str, tiny: Artifact, tmp_path: Path
) -> None:
    raw = json.loads((tiny.folder / MANIFEST).read_text())
    inputs = raw["graphs"][SAMPLER]["inputs"]
    entry = next(entry for entry in inputs if entry["name"] == name)
    inputs.remove(entry) if shape is None else entry.update(shape=shape)
    (tmp_path / MANIFEST).write_text(json.dumps(raw))
    reseal(tmp_path)
    with pytest.raises(CheckpointError, match=says):
        open_artifact(tmp_path)


def test_a_graph_with_subgraphs_is_refused(tmp_path: Path) -> None:
    artifact = build_tiny_artifact(tmp_path / "artifact")
    file = artifact.folder / "vae_decoder.onnx"
    model = onnx.load(file, load_external_data=False)
    body = helper.make_graph([helper.make_node("Identity", ["latents"], ["same"])], "body", [], [])
    model.graph.node.append(helper.make_node("If", ["c"], ["d"], then_branch=body, else_branch=body))
    file.write_bytes(model.SerializeToString())
    with pytest.raises(CheckpointError, match="functions or subgraphs"):
        add_sampler(artifact.folder, artifact.manifest)
    assert not (artifact.folder / "sampler.onnx").exists()


def test_a_comparison_shows_the_loop_beside_it(tiny: Artifact, tmp_path: Path) -> None:
    compared = "onnxruntime:loop,onnxruntime"
    assert parse_backends(compared) == (BenchBackend("onnxruntime", loop=True), BenchBackend("onnxruntime"))
    done = fmg("bench", str(tiny.folder), "--compare", compared, "--repeats", "1", "--threads", "1")
    assert done.code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert sum(line.startswith("transformer x 4") for line in lines) == 1
    assert sum(line.startswith("whole sampler") for line in lines) == 1
    assert "4 steps fused" in done.stdout
    for steps in ("4", "3"):
        words = ("generate", "a red circle", "--from", str(tiny.folder), "--steps", steps, "--time")
        done = fmg(*words, "--out", str(tmp_path / steps))
        assert done.code == 0, done.stderr
        assert ("whole sampler" in done.stdout) == (steps == "4")
    # with another number of steps both are the loop, and neither is called fused
    done = fmg("bench", str(tiny.folder), "--compare", compared, "--repeats", "1", "--threads", "1", "--steps", "3")
    assert sum(line.startswith("transformer x 3") for line in done.stdout.splitlines()) == 2
    assert "fused" not in done.stdout
    # beside nothing it would be compared with itself
    plain = build_tiny_artifact(tmp_path / "plain")
    done = fmg("bench", str(plain.folder), "--compare", compared)
    assert (done.code, done.stdout) == (2, "")
    assert "has no sampler as one graph" in done.stderr
