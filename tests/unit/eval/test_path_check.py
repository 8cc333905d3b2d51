"""The path check: its result for states on the path and for states off it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmg.eval.path_check import AGAIN, PathReport, PathRow, fitting, path_check
from fmg.flow.grids import make_grid
from fmg.registry import models
from tests.support.cli import fmg

GRID = make_grid("uniform", 4, image_tokens=None)


def test_what_fits_a_map() -> None:
    two, single = models.build("meanflow-shapes").spec, models.build("scm-shapes").spec
    assert {"asfmc", "asfmc-euler", "cps", "naive-noise"} <= set(fitting(two, GRID))
    assert "asfmc-endpoint" in fitting(single, GRID)
    assert not {"asfmc", "asfmc-euler", "flow-sde"} & set(fitting(single, GRID))
    # the first-order form is not defined for target times below its epsilon
    assert "asfmc-euler" not in fitting(two, (1.0, 0.5, 0.02, 0.0))


@pytest.fixture(scope="module")
def report() -> PathReport:
    return path_check("meanflow-shapes", num=96, steps=3, rewards=["shapes-quality"])


def row(report: PathReport, name: str, time: float, quantity: str) -> PathRow:
    return next(
        r for r in report.rows if (r.stochasticizer, r.quantity) == (name, quantity) and abs(r.time - time) < 1e-6
    )


@pytest.mark.slow
def test_the_control_leaves_the_path_and_the_exact_forms_do_not(report: PathReport) -> None:
    for time in (2 / 3, 1 / 3):
        assert abs(row(report, AGAIN, time, "rms").difference) < 0.015
        for name in ("asfmc", "asfmc-endpoint"):
            assert abs(row(report, name, time, "rms").difference) < 0.05, (name, time)
        # naive noise adds variance (0.7 s)^2 on top of the path's: rms sqrt(a^2 E x^2 + s^2 (1 + .49))
        assert row(report, "naive-noise", time, "rms").difference > 0.05
        assert row(report, "naive-noise", time, "rms").ci95[0] > 0


@pytest.mark.slow
def test_every_row_is_a_paired_difference(report: PathReport) -> None:
    for entry in report.rows:
        assert entry.ci95[0] <= entry.difference <= entry.ci95[1]
        if entry.quantity == "shapes-quality":
            assert entry.difference == pytest.approx(entry.value - entry.reference, abs=1e-6)
        if entry.quantity == "rms":
            ratio = entry.value / entry.reference
            # to first order in the difference
            assert entry.difference == pytest.approx((ratio**2 - 1) / 2, abs=1e-6)
    assert report.quantities() == ["rms", "mean", "shapes-quality", "shapes-quality/recognisable"]


@pytest.mark.slow
def test_the_command_writes_picture_and_data(
    report: PathReport, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fmg.eval.path_check.path_check", lambda *args, **kwargs: report)
    shown = fmg("eval", "meanflow-shapes", "--path-check", str(tmp_path / "path.png"))
    assert shown.code == 0, shown.stderr
    assert "naive-noise" in shown.stdout
    picture = np.asarray(Image.open(tmp_path / "path.png").convert("RGB"))
    assert picture.shape[1] > 1000
    assert picture.std() > 5
    data = json.loads((tmp_path / "path.json").read_text())
    assert len(data["rows"]) == len(report.rows)
    assert json.loads(json.dumps(report.to_json())) == data
