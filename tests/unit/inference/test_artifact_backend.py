"""Artifacts on ONNX Runtime: they generate torch's images, and what cannot be generated is one clear line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fmg.core.errors import CheckpointError, FmgError, FmgWarning, MissingDependencyError, UsageError
from fmg.core.profiling import NOISE, TEXT_ENCODERS, TOKENISE, TOTAL, TRANSFORMER, VAE
from fmg.inference import load
from fmg.inference import onnxruntime as ort
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.backend import ArtifactBackend
from fmg.inference.artifact.manifest import MANIFEST, Graph
from fmg.inference.benchmark import Workload, measure, ratios
from fmg.inference.loading import find, pick_backend
from tests.support.artifact import copied
from tests.support.tiny_artifact import reseal

pytestmark = [pytest.mark.slow, pytest.mark.compile]

SUBJECTS = ("a red circle", "a big blue square", "a small green triangle", "a yellow star left", "a purple circle top")
PROMPTS = [SUBJECTS[i % 5] for i in range(20)]
SEEDS = [7 * i for i in range(20)]


def drawn(target: object, prompts: Sequence[str] = PROMPTS, **options: object) -> NDArray[np.float32]:
    with load(target, device="cpu", **options) as generator:  # type: ignore[arg-type]
        return generator.generate(prompts, SEEDS).image_array


def largest(first: NDArray[np.float32], second: NDArray[np.float32]) -> float:
    return float(np.abs(first.astype(np.float64) - second).max())


@pytest.mark.parametrize("kind", ["shapes", "student"])
def test_it_generates_the_images_of_torch(kind: str, request: pytest.FixtureRequest) -> None:
    run, artifact = (request.getfixturevalue(f"{kind}_{what}") for what in ("run", "artifact"))
    if kind == "student":
        request.getfixturevalue("monkeypatch").setenv("FMG_CACHE", str(run.parent / "cache"))
    # the tiny student reads no more than twelve tokens, which are hardly more than letters
    prompts = [text[-4:] for text in PROMPTS] if kind == "student" else PROMPTS
    expected = drawn(run, prompts)
    assert largest(drawn(artifact, prompts), expected) <= 1e-4
    assert largest(drawn(artifact, prompts, batch_size=1), expected) <= 1e-4
    base = drawn(run, prompts, adapter=False)
    assert largest(base, expected) > 1 / 255, "the adapter must matter, or this test could not fail"


def test_io_binding_generates_the_same(shapes_artifact: Artifact) -> None:
    runtime = ort.BoundOnnxRuntime(shapes_artifact, torch.device("cpu"), [ort.CPU])
    with load(shapes_artifact, device="cpu") as plain:
        expected = plain.generate(PROMPTS[:3], SEEDS[:3], steps=2)
        plain.backend = ArtifactBackend(shapes_artifact, runtime)
        bound = plain.generate(PROMPTS[:3], SEEDS[:3], steps=2)
    np.testing.assert_allclose(bound.image_array, expected.image_array, rtol=0, atol=1e-5)
    assert "IO binding" in runtime.detail


def test_int8_and_other_sizes(shapes_artifact: Artifact) -> None:
    exact, small = drawn(shapes_artifact), drawn(shapes_artifact, int8=True)
    error = float(np.square(small.astype(np.float64) - exact).mean())
    assert 1e-12 < error < 1e-2
    with load(shapes_artifact, resolution=48) as generator:
        assert generator.generate(PROMPTS[:1], [0], steps=1).image_array.shape == (1, 3, 48, 48)


def test_text_encoders_are_freed_and_come_back(shapes_artifact: Artifact) -> None:
    with load(shapes_artifact) as generator:
        runtime = generator.backend.runtime  # type: ignore[attr-defined]
        whole = generator.generate(PROMPTS[:2], [0, 1], release_text=True)
        assert {name for name in runtime._sessions._sessions if name.startswith("text")} == set()
        again = generator.generate([*PROMPTS[:2], "a white square"], [0, 1, 2])
        np.testing.assert_allclose(again.image_array[:2], whole.image_array, rtol=0, atol=1e-5)
        assert len(runtime._sessions._sessions) == 4
    assert runtime._sessions._sessions == {}


def test_stages_and_ratios(shapes_artifact: Artifact, shapes_run: Path) -> None:
    generators = {"torch": load(shapes_run, device="cpu"), "onnx": load(shapes_artifact)}
    seen: list[tuple[int, int]] = []
    timings = measure(
        generators, Workload.of(PROMPTS, 2, steps=2), repeats=3, warmup=1, progress=lambda *at: seen.append(at)
    )
    for timing in timings.values():
        parts = [timing.stages[name] for name in (TOKENISE, TEXT_ENCODERS, NOISE, TRANSFORMER, VAE)]
        # embeddings are cached, but every repeat must encode
        assert all(0 < part.min <= part.p50 <= part.p90 for part in parts)
        assert sum(part.min for part in parts) <= timing.stages[TOTAL].p90
        assert (timing.steps, timing.images, timing.repeats, len(timing.totals_ms)) == (2, 2, 3, 3)
        assert timing.peak_memory > 10**7
    (ratio,) = ratios(timings)
    assert (ratio.label, ratio.reference) == ("onnx", "torch")
    assert ratio.p10 <= ratio.p50 <= ratio.p90
    assert seen == [(i + 1, 8) for i in range(8)]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"resolution": 40}, None),
        ({"resolution": 64}, "32 to 48 pixels in steps of 8, not 64"),
        ({"resolution": 42}, "32 to 48"),
        ({"batch_size": 65}, "1 to 64 images per call, not 65"),
        ({"dtype": "bf16"}, "set when it is exported"),
        ({"adapter": False}, "set when it is exported"),
        ({"backend": "torch"}, "does not run exported artifacts"),
        ({"backend": "onnx"}, "Did you mean 'onnxruntime'"),
        ({"device": "tpu"}, "'tpu' is not supported"),
        ({"device": "cuda"}, "has no CUDAExecutionProvider"),
    ],
    ids=str,
)
def test_what_an_artifact_cannot_do(shapes_artifact: Artifact, options: dict[str, object], says: str | None) -> None:
    if says is None:
        load(shapes_artifact, **options)  # type: ignore[arg-type]
        return
    with pytest.raises(UsageError, match=says):
        load(shapes_artifact, **options)  # type: ignore[arg-type]


def test_what_a_model_cannot_do(shapes_artifact: Artifact, student_artifact: Artifact) -> None:
    with pytest.raises(UsageError, match="runs exported artifacts"):
        pick_backend(find("meanflow-shapes"), "onnxruntime")
    with pytest.raises(UsageError, match="not an exported artifact"):
        load("meanflow-shapes", int8=True)
    with pytest.raises(UsageError, match="no int8 transformer"):
        load(student_artifact, int8=True)


def test_a_missing_runtime_is_one_line(shapes_artifact: Artifact, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"onnxruntime .* pip install 'flow-map-grpo\[onnx\]'"):
        load(shapes_artifact)


def test_bf16_needs_a_gpu(shapes_artifact: Artifact) -> None:
    graphs = {name: replace(graph, precision="bf16") for name, graph in shapes_artifact.manifest.graphs.items()}
    artifact = replace(shapes_artifact, manifest=replace(shapes_artifact.manifest, graphs=graphs))
    with load(artifact) as generator, pytest.raises(UsageError, match=r"is bf16, .* on a CPU"):
        generator.generate(PROMPTS[:1], [0])


def test_every_backend_reports_a_truncated_prompt_once(shapes_artifact: Artifact, shapes_run: Path) -> None:
    said, images = [], []
    for target in (shapes_artifact, shapes_run):
        with load(target) as generator:
            with pytest.warns(FmgWarning, match="has 601 tokens; the model reads the first 16") as caught:
                drawn = generator.generate(["red " * 600] * 2, [0, 1])
            images.append(drawn.image_array)
            said += [str(warning.message) for warning in caught]
    assert len(said) == 2
    assert len(set(said)) == 1
    assert np.abs(images[0] - images[1]).max() < 1e-3


def test_a_damaged_graph_is_named(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    (folder / "vae_decoder.onnx").write_bytes((folder / "vae_decoder.onnx").read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"vae_decoder\.onnx has 2000 bytes"):
        load(folder)
    # also if the manifest was changed to match
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["files"]["vae_decoder.onnx"]["size"] = 2000
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reseal(folder)
    with (
        load(open_artifact(folder, hashes=False)) as generator,
        pytest.raises(CheckpointError, match=r"vae_decoder\.onnx is not an ONNX file"),
    ):
        generator.generate(PROMPTS[:1], [0])


def test_a_graph_that_fails_is_named(shapes_artifact: Artifact) -> None:
    runtime = ort.OnnxRuntime(shapes_artifact)
    with pytest.raises(FmgError, match="The graph 'text_encoder' failed"):
        runtime.run("text_encoder", {"input_ids": np.zeros((1, 5, 5), np.int64)})
    assert isinstance(shapes_artifact.graph("text_encoder"), Graph)
