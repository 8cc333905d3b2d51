"""`fmg bench`: both sides of an artifact, backends in turn, and reward against latency."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmg.core.errors import UsageError
from fmg.export.frontier import with_bases
from fmg.export.swap import copy_without_adapter
from fmg.inference import Target, load
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.benchmark import BenchBackend, bench_cases, form_for, parse_backends
from tests.support.artifact import copied
from tests.support.cli import fmg
from tests.support.schemas import check
from tests.support.tiny_artifact import reseal

pytestmark = [pytest.mark.slow, pytest.mark.compile]


def test_each_backend_gets_its_side(shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path) -> None:
    cases = bench_cases([str(shapes_artifact.folder)], parse_backends("torch, onnxruntime,onnxruntime:int8"))
    assert [case.label for case in cases] == ["torch", "onnxruntime", "onnxruntime:int8"]
    torch, exact, small = (case.subject for case in cases)
    assert isinstance(torch, Target)
    assert torch.label == str(shapes_run)
    assert isinstance(exact, Artifact)
    assert exact == small
    # and from the run to the artifact, where `fmg export` puts it
    with pytest.raises(UsageError, match=f"fmg export {shapes_run}"):
        bench_cases([str(shapes_run)], [BenchBackend("onnxruntime")])
    run = shutil.copytree(shapes_run, tmp_path / "run")
    place = copied(shapes_artifact, run / "artifact")
    (found,) = bench_cases([str(run)], [BenchBackend("onnxruntime")])
    assert isinstance(found.subject, Artifact)
    assert found.subject.folder == place


def test_the_run_of_an_artifact_may_be_gone(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["adapter"]["run"] = "runs/gone"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    reseal(folder)
    with pytest.raises(UsageError, match="'runs/gone'"):
        form_for(open_artifact(folder), BenchBackend("torch"))


def test_a_copy_without_adapter_is_the_base_and_leaves_the_original(
    shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path
) -> None:
    before = shapes_artifact.manifest.weights_digest()
    tuned = open_artifact(copied(shapes_artifact, tmp_path / "a"))
    base = copy_without_adapter(tuned, tmp_path / "b")
    assert base.manifest.adapter is None
    assert open_artifact(tmp_path / "a").manifest.weights_digest() == before
    with load(base) as ours, load(shapes_run, device="cpu", adapter=False) as theirs:
        drawn, expected = (side.generate(["a red circle"], [3]).image_array for side in (ours, theirs))
    np.testing.assert_allclose(drawn, expected, rtol=0, atol=1e-3)


def test_a_copy_without_adapter_is_sampled_as_the_tuned_one(shapes_artifact: Artifact, tmp_path: Path) -> None:
    other = replace(shapes_artifact.manifest, sampling=replace(shapes_artifact.manifest.sampling, steps=7), rewards=())
    base = copy_without_adapter(replace(shapes_artifact, manifest=other), tmp_path / "b").manifest
    assert (base.sampling, base.rewards) == (other.sampling, other.rewards)


def test_the_frontier_has_every_point(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    picture = tmp_path / "f.png"
    done = fmg(
        *("bench", str(folder), "--frontier", "--compare", "torch,onnxruntime", "--steps", "1,2", "--num", "16"),
        *("--repeats", "2", "--warmup", "1", "--device", "cpu", "--out", str(picture), "--json"),
    )
    assert done.code == 0, done.stderr
    document = json.loads(done.stdout)
    check(document, "bench")
    points = {(p["steps"], p["backend"], p["adapter"]): p for p in document["frontier"]}
    assert len(points) == 8
    assert len(document["timings"]) == 8
    for steps in (1, 2):
        for adapter in (True, False):
            torch, onnx = (points[steps, name, adapter]["mean"] for name in ("torch", "onnxruntime"))
            assert torch == pytest.approx(onnx, abs=0.01), "the backends draw the same pictures"
    assert all(p["latency_ms"]["min"] > 0 and p["ci95"][0] <= p["mean"] <= p["ci95"][1] for p in points.values())
    with Image.open(picture) as figure:
        assert min(figure.size) > 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "f.png"], "the base was only for the while"


def test_what_has_an_adapter_is_measured_without_it_too(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    with with_bases(bench_cases([str(folder)], parse_backends("torch,onnxruntime"))) as both:
        assert [case.label for case in both] == [
            *("torch, tuned", "torch, base", "onnxruntime, tuned", "onnxruntime, base")
        ]
        assert [case.adapter for case in both] == [True, False, True, False]
        tuned, base = (case.subject for case in both[2:])
        assert isinstance(tuned, Artifact)
        assert isinstance(base, Artifact)
        assert tuned.manifest.adapter is not None
        assert base.manifest.adapter is None
    assert not base.folder.exists()


def test_backends_take_turns(shapes_artifact: Artifact) -> None:
    done = fmg(
        *("bench", str(shapes_artifact.folder), "--compare", "torch,onnxruntime,onnxruntime:int8"),
        *("--repeats", "3", "--batch-size", "2", "--steps", "1", "--device", "cpu"),
    )
    assert done.code == 0, done.stderr
    assert "2 images, batch 2, 1 step, 3 repeats" in done.stdout
    for backend in ("onnxruntime", "onnxruntime:int8"):
        assert re.search(rf"^{backend} at 1 step is [\d.]+ times as fast as torch at 1 step ", done.stdout, re.M)
    assert "transformer x 1" in done.stdout
