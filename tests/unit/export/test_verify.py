"""Verification of an artifact: it passes for an intact export, and otherwise fails and names the place."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.events import Event, Notice
from fmg.core.prompt import Prompt
from fmg.core.types import RewardOutput
from fmg.eval.scoring import EvalSet
from fmg.export import verify as module
from fmg.export.precision_report import precision_of, precision_of_file
from fmg.export.verify import FULL_IMAGES, REWARD_ALLOWED, RewardGap, compare, reference_of, verify
from fmg.export.verify_graphs import relative_l2
from fmg.inference.artifact import Artifact, open_artifact
from fmg.inference.artifact.manifest import MANIFEST, Check
from fmg.inference.parity import PSNR_ALLOWED
from fmg.inference.target import resolve_target
from tests.support.artifact import copied, planted
from tests.support.tiny_artifact import reseal

pytestmark = [pytest.mark.slow, pytest.mark.compile]

WEIGHTS = "transformer.safetensors"


def by_name(checks: tuple[Check, ...]) -> dict[str, Check]:
    return {check.name: check for check in checks}


def test_an_export_is_verified(
    shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LEAST_IMAGES", 64)
    artifact = open_artifact(copied(shapes_artifact, tmp_path / "a"))
    report = verify(artifact, level="full", device="cpu", num=64)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.against == str(shapes_run)
    checks = by_name(report.checks)
    assert {f"tensors/{graph}" for graph in artifact.manifest.graphs} <= checks.keys()
    assert checks["tensors/transformer"].values["relative_l2"] <= 1e-5
    assert checks["tensors/transformer"].values["shapes"] >= 4
    assert checks["images"].values["images"] == 64
    assert checks["reward/shapes"].values["torch"] > 0.2, "a reward of nothing would compare nothing"
    assert {"images/int8", "reward/shapes/int8", "precision/transformer_int8"} <= checks.keys()
    # and the manifest keeps it, with the hash of what was verified
    again = open_artifact(artifact.folder).manifest
    assert by_name(again.checks) == checks
    assert checks["images"].weights == again.sampling_digest()
    assert checks["tensors/transformer"].weights == again.weights_digest()


def test_an_artifact_that_may_only_be_read_is_verified(
    shapes_artifact: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    # in place of chmod, which does not bind the superuser
    monkeypatch.setattr("fmg.inference.artifact.layout.write_manifest", refuse)
    events: list[Event] = []
    artifact = open_artifact(copied(shapes_artifact, tmp_path / "a"))
    report = verify(artifact, device="cpu", num=2, observer=events.append)
    assert "images" in by_name(report.checks)
    said = [event for event in events if isinstance(event, Notice)]
    assert said == [Notice("warning", "The results could not be written into the manifest: Permission denied")]


def test_long_prompts_are_truncated_on_both_sides_and_reported_once(
    shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path
) -> None:
    (tmp_path / "long.txt").write_text("red " * 100 + "circle\na blue square\n", encoding="utf-8")
    target = resolve_target(shapes_run)
    long = replace(target, recipe=target.recipe.with_({"eval.prompts": str(tmp_path / "long.txt")}))
    events: list[Event] = []
    artifact = open_artifact(copied(shapes_artifact, tmp_path / "a"))
    checks = by_name(verify(artifact, long, device="cpu", num=2, observer=events.append).checks)
    assert checks["images"].passed
    (notice,) = [event for event in events if isinstance(event, Notice)]
    assert notice.text.startswith("1 of 2 prompts have more than 16 tokens ('red red")


@pytest.mark.parametrize(
    "tensor", ["single_transformer_blocks.1.attn.to_k.weight", "transformer_blocks.0.ff.net.2.weight"]
)
def test_a_planted_error_is_found_and_its_module_named(
    tensor: str, shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path
) -> None:
    report = verify(planted(shapes_artifact, tmp_path / "bad", tensor, 2.0), shapes_run, device="cpu", num=4)
    checks = by_name(report.checks)
    assert not report.passed
    assert not checks["tensors/transformer"].passed
    assert f"first differs in {tensor.removesuffix('.weight')} " in checks["tensors/transformer"].note
    assert checks["tensors/vae_decoder"].passed


def test_another_adapter_fails_verification(shapes_artifact: Artifact, other_shapes_run: Path, tmp_path: Path) -> None:
    artifact = open_artifact(copied(shapes_artifact, tmp_path / "a"))
    checks = by_name(verify(artifact, other_shapes_run, device="cpu", num=8).checks)
    assert not checks["images"].passed
    assert not checks["tensors/transformer"].passed
    assert checks["tensors/text_encoder"].passed


def test_a_changed_file_is_refused_before_anything_is_run(shapes_artifact: Artifact, tmp_path: Path) -> None:
    folder = copied(shapes_artifact, tmp_path / "a")
    raw = bytearray((folder / WEIGHTS).read_bytes())
    raw[-1] ^= 1
    (folder / WEIGHTS).write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"transformer\.safetensors is not the file"):
        verify(open_artifact(folder, hashes=False))


def test_what_it_is_compared_with(shapes_artifact: Artifact, shapes_run: Path, tmp_path: Path) -> None:
    assert reference_of(shapes_artifact).label == str(shapes_run)
    with pytest.raises(UsageError, match="is an artifact"):
        reference_of(shapes_artifact, shapes_artifact.folder)
    folder = copied(shapes_artifact, tmp_path / "a")
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["adapter"]["run"] = "runs/gone"
    (folder / MANIFEST).write_text(json.dumps(manifest))
    reseal(folder)
    with pytest.raises(UsageError, match=r"'runs/gone' .* --against"):
        reference_of(open_artifact(folder))
    with pytest.raises(UsageError, match="no verification level 'fast'"):
        verify(shapes_artifact, level="fast")


@pytest.mark.parametrize(
    ("ci95", "passed"),
    [
        ((-0.001, 0.004), True),
        ((0.0, 0.0), True),
        ((-0.006, 0.004), False),
        ((0.006, 0.007), False),
        ((-math.inf, math.inf), False),
        ((math.nan, math.nan), False),
    ],
)
def test_an_interval_has_to_lie_inside_the_band(ci95: tuple[float, float], passed: bool) -> None:
    gap = RewardGap("shapes", "total", 0.5, 0.5, 0.0, ci95, FULL_IMAGES)
    assert gap.passed(REWARD_ALLOWED["fp32"]) is passed
    # equal scores have an interval without width, which says little of a few images
    few = replace(gap, images=2)
    assert not few.passed(REWARD_ALLOWED["fp32"])
    assert few.problem(REWARD_ALLOWED["fp32"]) == "too few images to decide: 2 of 500"


class Fixed:
    """A generator of given images."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._images = images

    def generate(self, prompts: tuple[str, ...], seeds: tuple[int, ...], *, progress: bool) -> Fixed:
        return self

    @property
    def image_array(self) -> NDArray[np.float32]:
        return self._images

    @property
    def images(self) -> torch.Tensor:
        return torch.from_numpy(self._images)


def refuse_all(images: torch.Tensor, prompts: object) -> RewardOutput:
    """A reward that must get only finite images."""
    assert images.isfinite().all()
    return RewardOutput(torch.zeros(len(images)), {})


def test_differences_of_pictures() -> None:
    images = np.full((200, 3, 4, 4), 0.5, np.float32)
    other = images.copy()
    other[0, 0, 0, 0] += 2e-3
    eval_set = EvalSet((Prompt("p", "", {}),) * 200, tuple(range(200)))

    def result(candidate: NDArray[np.float32]) -> tuple[bool, float]:
        sides = Fixed(images), Fixed(candidate)
        found = compare(*sides, eval_set, {}, progress=lambda *at: None).images  # type: ignore[arg-type]
        return found.passed("fp32"), found.max_abs

    assert result(images) == (True, 0.0)
    # one image in two hundred may be off by less than a level of a picture
    assert result(other) == (True, pytest.approx(2e-3, rel=1e-3))
    other[0, 0, 0, 0] += 1e-2
    assert not result(other)[0]
    other = images.copy()
    other[:5, 0, 0, 0] += 2e-3
    assert not result(other)[0]
    other = images.copy()
    other[7, 0, 0, 0] = np.nan
    assert not result(other)[0]
    # PSNR alone would not detect it: min(200, nan) is 200
    broken = Fixed(other), Fixed(other)
    found = compare(*broken, eval_set, {"r": refuse_all}, progress=lambda *at: None)  # type: ignore[arg-type]
    assert found.gaps == ()
    for precision in PSNR_ALLOWED:
        assert found.images.problem(precision) == "1 of 200 images have values that are not finite"


def test_relative_l2() -> None:
    ones = np.ones(4, np.float32)
    assert relative_l2(ones, ones) == 0
    assert relative_l2(ones * 1.5, ones) == pytest.approx(0.5)
    assert math.isnan(relative_l2(ones * math.nan, ones))
    assert relative_l2(ones, 0 * ones) == 2


def test_the_report_counts_what_is_in_the_file(shapes_artifact: Artifact) -> None:
    counted = precision_of(shapes_artifact, "transformer")
    assert counted.weights.keys() == {"fp32"}
    assert counted.products.keys() == {"fp32"}
    assert counted.foreign == ()
    quantised = precision_of(shapes_artifact, "transformer_int8")
    assert quantised.products["int8"] > quantised.products["fp32"]
    assert quantised.foreign == ()


def test_a_graph_of_another_precision_than_requested_fails(shapes_artifact: Artifact) -> None:
    file = shapes_artifact.onnx("transformer")
    for asked in ("bf16", "fp16", "int8"):
        foreign = precision_of_file(file, asked).foreign  # type: ignore[arg-type]
        assert foreign, asked
        assert "fp32" in foreign[0] or "int8" in foreign[0]
    assert precision_of_file(shapes_artifact.onnx("transformer_int8"), "fp32").foreign[0].startswith("weights: ")
