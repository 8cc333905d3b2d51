from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from fmg.core.errors import CheckpointError, UsageError
from fmg.export import artifact as exporter
from fmg.export.artifact import export_artifact
from fmg.export.diffusers import export_diffusers
from fmg.export.fused import add_sampler
from fmg.export.graphs import GraphPlan
from fmg.export.onnx import TracedGraph
from fmg.export.options import ExportOptions
from fmg.export.swap import swap_weights
from fmg.inference.artifact import Artifact, layout, open_artifact
from fmg.inference.artifact.layout import write_manifest
from fmg.inference.artifact.manifest import SAMPLER, TRANSFORMER, TRANSFORMER_INT8, Check
from fmg.inference.loading import find
from fmg.inference.target import Target, load_model, resolve_target
from fmg.recipe import Recipe
from tests.support.artifact import copied, exported, make_run, trace_once
from tests.support.cli import fmg
from tests.support.run_files import change_recipe
from tests.tiny_flux import RESOLUTION, SEQUENCE, build_tiny_flux, store_in
from tests.unit.export.test_artifact import difference, transformer_feed

pytestmark = [pytest.mark.slow, pytest.mark.compile]

WEIGHTS = "transformer.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def unchanged(folder: Path) -> Iterator[None]:
    before, beside = contents(folder), sorted(folder.parent.iterdir())
    yield
    assert contents(folder) == before
    assert sorted(folder.parent.iterdir()) == beside


@torch.no_grad()
def test_another_run_equals_its_fresh_export_and_the_way_back_equals_the_base(
    shapes_artifact: Artifact, shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    options = ExportOptions(int8=True, resolutions=(32, 48), batch=(1, 4, 64), fused=True)
    folder = copied(shapes_artifact, tmp_path / "artifact")
    write_manifest(folder, add_sampler(folder, shapes_artifact.manifest))
    (folder / "engines").mkdir()
    (folder / "engines" / "key.plan").write_bytes(b"an engine")
    first = contents(folder)
    proof = Check("images", True, {"gap": 0.0}, "", shapes_artifact.manifest.weights_digest())
    open_artifact(folder).with_checks([proof])

    swapped = swap_weights(folder, other_shapes_run)
    fresh = exported(other_shapes_run, tmp_path / "fresh", options)
    assert (folder / WEIGHTS).read_bytes() == fresh.path(WEIGHTS).read_bytes()
    assert (folder / WEIGHTS).read_bytes() != first[WEIGHTS]
    assert (folder / "transformer.onnx").read_bytes() == first["transformer.onnx"]
    assert (folder / "engines" / "key.plan").read_bytes() == b"an engine"
    int8 = fresh.graph(TRANSFORMER_INT8).weights
    assert (folder / int8).read_bytes() == fresh.path(int8).read_bytes()
    assert open_artifact(folder) == swapped
    volatile = {"files": swapped.manifest.files, "checks": ()}
    assert replace(fresh.manifest, **volatile) == swapped.manifest  # type: ignore[arg-type]
    # its number of steps is that of the other run
    assert (folder / "sampler.onnx").read_bytes() == fresh.onnx(SAMPLER).read_bytes()

    model: Any = load_model(resolve_target(other_shapes_run), device="cpu")
    feed = transformer_feed(model, (3, 8, 8, 16))
    session = onnxruntime.InferenceSession(str(swapped.onnx(TRANSFORMER)), providers=["CPUExecutionProvider"])
    given = session.run(None, {name: x.numpy() for name, x in feed.items()})[0]
    assert difference(given, model.components.transformer(**feed)[0]) <= 1e-5

    base = swap_weights(folder, "base")
    stored = model.components.weights
    asset = load_file(next(iter(stored.files.values())))
    weights = load_file(folder / WEIGHTS)
    assert weights.keys() == asset.keys()
    assert all(torch.equal(weights[name], x.float()) for name, x in asset.items())
    assert not (folder / "base.safetensors").exists()
    # all of it: sampling, rewards and prompts are the base's own as well, not those of the run before
    assert base.manifest == exported("meanflow-shapes", tmp_path / "plain", options).manifest
    assert base.manifest.sampling.steps != swapped.manifest.sampling.steps

    again = swap_weights(folder, shapes_run)
    assert (folder / WEIGHTS).read_bytes() == first[WEIGHTS]
    assert again.manifest.checks == ()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact", "fresh", "plain"]
    assert np.isfinite(given).all()


def without_graphs(target: str | Path, out: Path, options: ExportOptions) -> Artifact:
    """An export with real weights and empty graph files: these tests look only at weights."""

    def traced(plan: GraphPlan) -> TracedGraph:
        graph = trace_once(replace(plan, dtype=torch.float32))
        model = graph.model.clone()
        if plan.dtype == torch.bfloat16:
            for name in graph.parameters:
                model.graph.initializers[name].type = ir.TensorType(ir.DataType.BFLOAT16)
        return replace(graph, plan=plan, model=model)

    def save(graph: TracedGraph, file: Path, *_: object) -> None:
        file.write_bytes(graph.plan.name.encode())

    with patch.object(exporter, "trace", traced), patch.object(exporter, "save_graph", save):
        return export_artifact(target, out, options)


def test_half_precision_keeps_what_it_cannot_tell(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    artifact = without_graphs(student_run, tmp_path / "artifact", ExportOptions(precision="bf16"))
    before = contents(artifact.folder)
    kept = load_file(artifact.path("base.safetensors"))
    assert all(".attn." in name and x.dtype == torch.float32 for name, x in kept.items())
    assert {x.dtype for x in load_file(artifact.path(WEIGHTS)).values()} == {torch.bfloat16}

    base = swap_weights(artifact.folder, "base")
    recipe = resolve_target(student_run).recipe
    stored: Any = load_model(Target("base", recipe, None), device="cpu")
    plain = stored.components.transformer.state_dict()
    back = load_file(base.path(WEIGHTS))
    assert all(torch.equal(back[name], x.bfloat16()) for name, x in plain.items())
    swap_weights(artifact.folder, student_run)
    assert contents(artifact.folder) == before

    # of the other modules only bf16 is left, which is not what they were
    wider = make_run(tmp_path / "wider", recipe.with_({"lora.targets": "attention-mlp"}), seed=5)
    with unchanged(artifact.folder), pytest.raises(UsageError, match=r"stores only rounded to torch\.bfloat16"):
        swap_weights(artifact.folder, wider)


@pytest.mark.parametrize(("least", "most"), [(0, 4), (10**9, 64)])
def test_the_usual_batches_follow_from_the_size_of_the_model(
    least: int, most: int, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    monkeypatch.setattr("fmg.models.published._LARGE", least)
    axis = without_graphs(student_run, tmp_path / "artifact", ExportOptions()).manifest.axes["batch"]
    assert (axis.minimum, axis.maximum) == (1, most)


def test_the_base_of_local_files_is_verified_against_them(
    student_artifact: Artifact, student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    folder = copied(student_artifact, tmp_path / "artifact")
    done = fmg("export", "base", "--swap-weights", str(folder), "--verify", "quick")
    assert done.code == 0, done.stderr + done.stdout
    assert "against scm-flux" in done.stdout
    base = open_artifact(folder).manifest.base
    assert base.options == student_artifact.manifest.base.options
    assert base.weights is None


def test_what_does_not_fit_or_fails_leaves_the_artifact_as_it_was(
    shapes_artifact: Artifact,
    student_run: Path,
    other_shapes_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = copied(shapes_artifact, tmp_path / "artifacts" / "shapes")
    with unchanged(folder):
        with pytest.raises(CheckpointError, match="does not fit the model"):
            swap_weights(folder, student_run)
        with pytest.raises(UsageError, match="'meanflow-shapes' has no adapter to put into"):
            swap_weights(folder, "meanflow-shapes")

        def fail(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("fmg.export.swap.write_base", fail)
        with pytest.raises(OSError, match="No space left"):
            swap_weights(folder, other_shapes_run)
    (folder / "engines").mkdir()
    (folder / "engines" / "key.plan").symlink_to(folder / "transformer.onnx")
    with unchanged(folder), pytest.raises(CheckpointError, match=r"key\.plan is a link"):
        swap_weights(folder, other_shapes_run)
    (folder / "engines" / "key.plan").unlink()
    weights = folder / layout.weights_file(TRANSFORMER)
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with unchanged(folder), pytest.raises(CheckpointError, match=r"is not the file that was exported"):
        swap_weights(folder, other_shapes_run)


def test_an_adapter_is_not_added_to_another_whose_base_was_not_kept(
    shapes_run: Path, other_shapes_run: Path, tmp_path: Path
) -> None:
    made = without_graphs(shapes_run, tmp_path / "artifact", ExportOptions())
    write_manifest(made.folder, replace(made.manifest, base=replace(made.manifest.base, weights=None)))
    with unchanged(made.folder), pytest.raises(UsageError, match="does not keep the weights under an adapter"):
        swap_weights(made.folder, other_shapes_run)


@pytest.fixture
def plain(tmp_path: Path) -> Artifact:
    """An artifact of the embedded two-time model without adapter and without graphs."""
    return without_graphs("meanflow-shapes", tmp_path / "in" / "artifact", ExportOptions())


@pytest.mark.parametrize("place", [".", "../artifact", "tokenizer/.."])
def test_from_inside_the_folder_and_by_a_roundabout_path(
    place: str, plain: Artifact, shapes_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(plain.folder)
    done = fmg("export", str(shapes_run), "--swap-weights", place)
    assert done.code == 0, done.stderr
    assert "cd ." in done.stderr
    assert Path("manifest.json").is_file(), "the working directory is the new folder"
    assert [path.name for path in plain.folder.parent.iterdir()] == ["artifact"]
    swapped = open_artifact(plain.folder).manifest.adapter
    assert swapped is not None
    assert swapped.run == str(shapes_run)


def test_a_link_stays_and_what_it_leads_to_is_replaced(plain: Artifact, shapes_run: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(plain.folder)
    swap_weights(link, shapes_run)
    assert link.is_symlink()
    assert open_artifact(plain.folder).manifest.adapter is not None
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "link"]


def test_a_run_that_is_sampled_otherwise_is_taken_or_refused(
    student_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(student_run.parent / "cache"))
    recipe = resolve_target(student_run).recipe
    options = ExportOptions(resolutions=(RESOLUTION, 2 * RESOLUTION))
    artifact = without_graphs(student_run, tmp_path / "in" / "artifact", options)

    def run(name: str, **changes: object) -> Path:
        """The same adapter under another recipe."""
        folder = Path(shutil.copytree(student_run, tmp_path / name))
        change_recipe(folder, recipe.with_({f"model.{k}": v for k, v in changes.items()}))
        return folder

    other = run("other", guidance=5.0, resolution=2 * RESOLUTION)
    swapped = swap_weights(artifact.folder, other).manifest
    assert (swapped.sampling.guidance, swapped.sampling.resolution) == (5.0, 2 * RESOLUTION)
    assert swapped == without_graphs(other, tmp_path / "fresh", options).manifest
    for option, value in {
        "time_scale": 1000.0,
        "guidance": None,
        "max_sequence_length": SEQUENCE + 1,
        "resolution": 3 * RESOLUTION,
    }.items():
        with (
            unchanged(artifact.folder),
            pytest.raises(UsageError, match=f"is sampled with {option} {value}, but .* was exported for"),
        ):
            swap_weights(artifact.folder, run(f"{option}-run", **{option: value}))


def test_a_swap_that_is_killed_between_its_renames_is_repaired(
    plain: Artifact, shapes_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, before = plain.folder, contents(plain.folder)
    killed = f"""
import os
import pathlib
import signal
from fmg.export.swap import swap_weights

rename = pathlib.Path.rename
def die_at_the_second(path, to):
    if path.suffix == ".partial":
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(path, to)

pathlib.Path.rename = die_at_the_second
swap_weights(pathlib.Path({str(place)!r}), {str(shapes_run)!r})
"""
    done = subprocess.run([sys.executable, "-c", killed], check=False)
    assert done.returncode == -signal.SIGKILL
    partial, old = sorted(place.parent.iterdir(), key=lambda path: path.suffix, reverse=True)
    assert (partial.suffix, old.suffix, place.exists()) == (".partial", ".old", False)
    for attempt in (
        lambda: open_artifact(place),
        lambda: find(place),
        lambda: without_graphs("meanflow-shapes", place, ExportOptions()),
    ):
        with pytest.raises(CheckpointError, match=rf"an interrupted swap left '{re.escape(old.name)}'"):
            attempt()

    swap_weights(place, shapes_run)
    swap_weights(place, "base")
    assert contents(place) == before
    assert list(place.parent.iterdir()) == [place], "what the killed process left is gone"


def test_what_is_left_beside_an_artifact_that_is_there_goes(plain: Artifact, shapes_run: Path) -> None:
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    pid = int(dead.stdout)
    for suffix in ("old", "partial"):
        (plain.folder.parent / f".artifact.{pid}.0.{suffix}" / "inside").mkdir(parents=True)
    swap_weights(plain.folder, shapes_run)
    assert list(plain.folder.parent.iterdir()) == [plain.folder]


def test_weights_of_eight_bits_are_widened_in_all_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))
    # as the tiny student, whose graphs have been traced
    plain = build_tiny_flux(tmp_path / "flux", second_time="none", guidance_embeds=True, time_scale=1.0)
    folder = store_in(plain, torch.float8_e4m3fn)
    recipe = Recipe.default(
        "flux-fewstep",
        **{
            "model.folder": str(folder),
            "model.map": "single-time",
            "model.second_time": "none",
            "model.guidance": 3.5,
            "model.time_scale": 1.0,
            "model.resolution": RESOLUTION,
            "model.max_sequence_length": SEQUENCE,
            "model.text_cache": False,
            "rewards": ["jpeg-incompressibility"],
            "lora.rank": 4,
        },
    )
    run = make_run(tmp_path / "run", recipe, seed=5)
    stored = load_file(folder / "transformer" / "diffusion_pytorch_model.safetensors")
    artifact = without_graphs(run, tmp_path / "artifact", ExportOptions())
    assert artifact.manifest.base.dtypes == ("float8_e4m3fn",)
    before = contents(artifact.folder)
    kept, weights = load_file(artifact.path("base.safetensors")), load_file(artifact.path(WEIGHTS))
    assert all(x.dtype == torch.float8_e4m3fn for x in kept.values())
    for name, x in weights.items():
        assert x.dtype == torch.float32
        assert torch.equal(x, stored[name].float()) is (name not in kept)
    base = swap_weights(artifact.folder, "base")
    assert all(torch.equal(x, stored[name].float()) for name, x in load_file(base.path(WEIGHTS)).items())
    swap_weights(artifact.folder, run)
    assert contents(artifact.folder) == before
    # rounded to 8 bits again, a merged adapter would be lost in the rounding
    merged = export_diffusers(run, tmp_path / "folder", "stored")
    for file in (merged.folder / "transformer").glob("*.safetensors"):
        assert all(torch.equal(x, weights[name].bfloat16()) for name, x in load_file(file).items())
