"""Files of earlier revisions can still be read: `tests/fixtures/VERSION/` holds interrupted runs and an artifact.

Runs were interrupted after two of three iterations; beside each is the log of the uninterrupted run.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmg.training.api import resume
from tests.support.cli import fmg
from tests.support.run_files import metrics

FIXTURES = Path(__file__).parents[1] / "fixtures"
CUT = sorted(path.parent for path in FIXTURES.glob("*/*/state"))
ARTIFACTS = sorted(path.parent for path in FIXTURES.glob("*/*/manifest.json"))


@pytest.mark.slow
@pytest.mark.parametrize("fixture", CUT, ids=lambda path: "-".join(path.parts[-2:]))
def test_an_interrupted_run_resumes_as_if_uninterrupted(fixture: Path, tmp_path: Path) -> None:
    run = shutil.copytree(fixture, tmp_path / "run")
    seen = fmg("report", str(run), "--json")
    assert seen.code == 0, seen.stderr
    resume(run)
    # another processor rounds in its own way, so digits are compared and not bits
    expected = [json.loads(line) for line in (fixture.parent / f"{fixture.name}-whole.jsonl").read_text().splitlines()]
    found = metrics(run)
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        for key, value in other.items():
            if not key.startswith("time/"):
                assert line[key] == pytest.approx(value, rel=1e-3, abs=1e-4), key


@pytest.mark.parametrize("fixture", ARTIFACTS, ids=lambda path: "-".join(path.parts[-2:]))
def test_an_artifact_generates_the_image_that_it_generated(fixture: Path, tmp_path: Path) -> None:
    made = fmg("generate", "a red circle", "--from", str(fixture), "--seed", "0", "--out", str(tmp_path), "--json")
    assert made.code == 0, made.stderr
    (image,) = tmp_path.rglob("*.png")
    with Image.open(image) as found, Image.open(fixture.parent / f"{fixture.name}.png") as expected:
        difference = np.abs(np.asarray(found, dtype=int) - np.asarray(expected, dtype=int))
    assert difference.max() <= 1
