"""Logs read by columns: values equal those of the lines, spikes of long curves stay visible, memory is bounded."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fmg.core.errors import CheckpointError
from fmg.data.charts import FIGURE_FORMATS, MAX_POINTS, Curve, by_scale, shortened, style
from fmg.data.metrics_log import MetricsLog
from fmg.data.run_metrics import is_evaluation, read_numbers
from fmg.data.run_report import write_run_report
from tests.support.cli import fmg
from tests.support.pages import made_up_run

KEYS = st.sampled_from(["reward/mean", "loss", "eval/score", "eval/r_mean", "reward/dropped"])
VALUES = st.one_of(st.floats(allow_nan=False, allow_infinity=False), st.none(), st.integers(-5, 2**63), st.booleans())


@pytest.mark.slow
@given(st.lists(st.dictionaries(KEYS, VALUES), max_size=12))
def test_a_log_has_the_values_of_its_lines(
    tmp_path_factory: pytest.TempPathFactory, found: list[dict[str, object]]
) -> None:
    file = tmp_path_factory.mktemp("log") / "metrics.jsonl"
    file.write_text("".join(json.dumps({"iteration": i, **line}) + "\n" for i, line in enumerate(found)))
    lines, log = read_numbers(file), MetricsLog.read(file, strict=True)
    for kind, wanted in ((log.evaluations, True), (log.iterations, False)):
        own = [line for line in lines if is_evaluation(line) == wanted]
        assert [_text(line) for line in kind] == [_text(line) for line in own]
        for key in kind.logged():
            _, at, values = kind.columns("iteration", key)
            pairs = [(line["iteration"], line[key]) for line in own if key in line]
            assert _text(list(zip(at.tolist(), values.tolist(), strict=True))) == _text(pairs)
    assert log.done == max((line["iteration"] for line in lines), default=0)


def _text(value: object) -> str:
    # NaN equals itself as text
    return repr(value)


@pytest.mark.parametrize(
    "line", ['{"iteration": 1, "iteration": 2}', '{"iteration": 1' + "0" * 400 + "}", "[1]", "[" * 9999, "\ufeff", "{"]
)
def test_a_line_that_is_not_an_object_of_numbers_is_named(tmp_path: Path, line: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 0}\n' + line + "\n", encoding="utf-8")
    for strict in (True, False):
        with pytest.raises(CheckpointError, match=r"metrics.jsonl:2: the line is damaged"):
            MetricsLog.read(file, strict=strict)


def test_values_that_are_not_numbers_are_left_out_unless_they_matter(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"iteration": 1, "note": "é", "loss": NaN}\n{"iteration": Infinity}\n{"iteration": 7')
    log = MetricsLog.read(file)
    assert list(log.iterations[0]) == ["iteration", "loss"]
    assert math.isnan(log.iterations[0]["loss"])
    assert (log.done, len(log.iterations)) == (1, 2)
    with pytest.raises(CheckpointError, match="values other than numbers"):
        MetricsLog.read(file, strict=True)


def test_a_long_curve_is_short_and_shows_its_spikes() -> None:
    y = np.zeros(100_003)
    y[[777, 50_000]] = 9.0, -5.0
    y[60_000:62_000] = np.nan
    found = shortened(Curve("a", np.arange(len(y)), y, np.full(len(y), 0.5)))
    assert len(found.y) == len(found.x) == len(found.band) == MAX_POINTS
    assert (np.nanmax(found.high), np.nanmin(found.low)) == (9.0, -5.0)
    assert np.nanmax(found.y) == pytest.approx(9 / 500, rel=0.01)
    assert np.isnan(found.y).sum() in (3, 4)
    assert found.band[0] == 0.5
    assert shortened(found) is found


def test_every_curve_has_a_style_of_its_own() -> None:
    styles = [style(i) for i in range(36)]
    assert len({(look["color"], look["marker"], str(look["linestyle"])) for look in styles}) == 36
    assert len({look["color"] for look in styles[:9]}) == len({look["marker"] for look in styles[:9]}) == 9


@pytest.mark.slow
@pytest.mark.parametrize("kind", FIGURE_FORMATS)
def test_figures_of_one_run_and_of_several_in_every_format(tmp_path: Path, kind: str) -> None:
    runs = [made_up_run(tmp_path / name) for name in ("one", "two")]
    begins = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[kind]
    single = fmg("report", str(runs[0].path), "--format", kind, "--json")
    assert single.code == 0, single.stderr
    figure = Path(json.loads(single.stdout)["figure"])
    assert figure == runs[0].path / f"curve.{kind}"
    assert figure.read_bytes().startswith(begins)
    both = ["report", *(str(run.path) for run in runs), "--out", str(tmp_path / "c.html"), "--format", kind]
    assert fmg(*both).code == 0
    assert (tmp_path / f"c.{kind}").read_bytes().startswith(begins)
    (tmp_path / "c.html").unlink()
    again = fmg(*both)
    assert (again.code, (tmp_path / "c.html").exists()) == (2, False)
    assert f"c.{kind} exists already" in again.stderr
    same = fmg("report", str(runs[0].path), "--out", str(tmp_path / f"d.{kind}"), "--format", kind)
    assert (same.code, (tmp_path / f"d.{kind}").exists()) == (2, False)
    assert "both the page and the figure" in same.stderr


def test_curves_of_other_scales_have_panels_of_their_own() -> None:
    curves = [Curve(name, [0, 1], y, [0, 0]) for name, y in (("a", [0.1, 0.9]), ("b", [20, 25]), ("c", [-0.4, 0.3]))]
    assert [[curve.label for curve in panel] for panel in by_scale(curves)] == [["a", "c"], ["b"]]


@pytest.mark.slow
def test_a_report_of_many_lines_is_bounded(tmp_path: Path) -> None:
    """In memory, of which a line of ten numbers takes 80 bytes and its bookkeeping; and in the size of the page."""
    run = made_up_run(tmp_path / "run")
    line = {"reward/mean": 0.5, "reward/se": 0.1, **{f"k{i}": 0.25 * i for i in range(7)}}
    with run.metrics.open("a") as file:
        file.writelines(json.dumps({"iteration": i, **line}) + "\n" for i in range(4, 20_004))
    tracemalloc.start()
    log = MetricsLog.read(run.metrics)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(log.iterations) == 20_003
    assert held < 20_000 * 160
    assert peak < 20_000 * 200
    assert write_run_report(run).stat().st_size < 2_000_000
