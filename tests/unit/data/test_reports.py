"""Pages: self-contained, escaped, and true to the run."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.data.charts import Curve, chart, figure_bytes
from fmg.data.checkpoints import CheckpointIndex, SavedCheckpoint, existing_index, write_index
from fmg.data.page import Gallery, Listing, Picture, Section, Table, Text, Tile, inline_image, page
from fmg.data.run_folder import RunFolder
from fmg.data.run_metrics import Outcome, read_numbers
from fmg.data.run_report import RunRecord, charts, kept_picture, write_comparison, write_run_report
from tests.support.pages import made_up_run, self_contained

HOSTILE = "<script>alert('x')</script>\"'&{{ 7 * 7 }} {% raw %} </style> ☃ \u202e"
CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunFolder, RunFolder]:
    folder = tmp_path_factory.mktemp("runs")
    first, second = made_up_run(folder / "first"), made_up_run(folder / "second", lr=5e-4)
    write_run_report(first)
    return first, second


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reports whose figures are empty, for tests of their words: drawing takes nearly all of the time."""
    monkeypatch.setattr("fmg.data.run_report.figure_bytes", lambda figure, kind: b"")


def test_no_control_character_of_a_name_reaches_a_page() -> None:
    hostile = "\x1b[31mred\u202e\ud800"
    shown = page(
        hostile, hostile, [Tile(hostile, hostile, hostile)], [Section(hostile, [Text(f"two\nlines {hostile}")])]
    )
    assert not set(shown) & {"\x1b", "\u202e", "\ud800"}
    assert r"\x1b[31mred\u202e\ud800" in shown
    assert "two\nlines" in shown


def test_every_text_of_a_page_is_escaped() -> None:
    picture = Picture("data:image/png;base64,AAAA", HOSTILE, HOSTILE)
    blocks = [
        Text(HOSTILE),
        Table((HOSTILE, "b"), [(HOSTILE, "1")], frozenset({"b"})),
        Gallery([picture], HOSTILE),
        Listing([(HOSTILE, HOSTILE)]),
    ]
    html = page(HOSTILE, HOSTILE, [Tile(HOSTILE, HOSTILE, HOSTILE)], [Section(HOSTILE, blocks), Section("b", [], True)])
    parsed = self_contained(html)
    # title, heading, subtitle, tile (3), section, text, table (2), gallery title and caption, listing (2)
    assert parsed.words.count("alert('x')") == 14
    assert "49" not in parsed.words
    assert parsed.words.count("{{ 7 * 7 }} {% raw %}") == 14


def test_the_report_of_a_run_says_what_its_files_say(runs: tuple[RunFolder, RunFolder]) -> None:
    run = runs[0]
    parsed = self_contained((run.path / "report.html").read_text(encoding="utf-8"))
    words = parsed.words
    assert "3 iterations, finished, keeps iteration 1, started" in words
    # the checkpoint that is kept is that of iteration 1: strict 0.32, with 1.96 sqrt(2) 0.004 around the gain
    assert "shapes strict 0.300 0.320 +0.020 [+0.009, +0.031] 0.360" in words
    assert "shapes color 0.600 0.600 +0.000 [-0.055, +0.055] 0.600" in words
    assert "update 3 3.00 9.0 45 %" in words
    assert "optimizer" in words
    assert "--lr" in words
    assert "torch 2." in words
    # reward, strict, total, by part, KL and clipping; before and after; four grids
    assert parsed.tags.count("img") == 6 + 2 + 4


@pytest.mark.slow
def test_a_report_of_a_branched_run_has_curves_by_step(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    for iteration in (4, 5, 6):
        # a step without groups in some iteration is not in its line
        seen = (0, 2) if iteration == 5 else (0, 1, 2)
        by_step = {f"branch/step_{k}_reward_std": 0.1 - 0.01 * k for k in seen}
        by_step |= {f"branch/zero_std_ratio_{k}": 0.2 * k for k in seen} | {
            f"branch/step_{k}_groups": 8.0 for k in seen
        }
        run.append_metrics({"iteration": iteration, "branch/completion_agreement": 0.9, **by_step})
    write_run_report(run)
    page = (run.path / "report.html").read_text(encoding="utf-8")
    for title in ("reward of siblings", "groups with equal rewards", "groups"):
        assert f"{title} by branching step" in page
    assert "agreement of one jump with the full grid" in page


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("factor", [1.0, 0.5])
def test_a_learning_rate_has_a_chart_where_it_changes(tmp_path: Path, factor: float) -> None:
    run = made_up_run(tmp_path / "run")
    lines = read_numbers(run.metrics)
    for number, line in enumerate(line for line in lines if "reward/mean" in line):
        line["lr"] = 1e-3 * factor**number
    run.metrics.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    write_index(run.path, existing_index(run.path))
    titles = [chart.alt for chart in charts(RunRecord.read(run))]
    assert ("learning rate" in titles) == (factor != 1)


@pytest.mark.usefixtures("undrawn")
def test_a_reward_with_an_underscore_has_its_chart_and_comparison(tmp_path: Path) -> None:
    runs = [made_up_run(tmp_path / name) for name in ("one", "two")]
    for run in runs:
        run.metrics.write_text(run.metrics.read_text().replace("eval/shapes", "eval/my_reward"))
        write_index(run.path, existing_index(run.path))
    page = write_run_report(runs[0]).read_text(encoding="utf-8")
    for title in ("my_reward strict, held out", "my_reward, held out", "my_reward by part, held out"):
        assert f'alt="{title}"' in page
    write_comparison(runs, tmp_path / "c.html")
    assert 'alt="my_reward, held out"' in (tmp_path / "c.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_report_shows_the_scores_of_the_moving_average_that_it_keeps(
    runs: tuple[RunFolder, RunFolder], tmp_path: Path
) -> None:
    run = made_up_run(tmp_path / "averaged", averaged=True)
    words = self_contained(write_run_report(run).read_text(encoding="utf-8")).words
    assert "shapes strict, held out 0.420 base 0.300, iteration 1, moving average" in words
    assert "The result of the run is the kept checkpoint (iteration 1, moving average)." in words
    assert "base kept (iteration 1, moving average) gain 95 % interval last (iteration 3)" in words
    assert "shapes strict 0.300 0.420 +0.120 [+0.109, +0.131] 0.460" in words
    write_comparison([runs[0], run], tmp_path / "c.html")
    words = self_contained((tmp_path / "c.html").read_text(encoding="utf-8")).words
    assert "averaged meanflow-shapes finished 3 1 (moving average) 0.300 → 0.420 0.700 → 0.800" in words
    assert "first meanflow-shapes finished 3 1 0.300 → 0.320 0.700 → 0.700" in words


def test_a_report_is_replaced_and_repeats_byte_by_byte(runs: tuple[RunFolder, RunFolder]) -> None:
    before = (runs[0].path / "report.html").read_bytes()
    write_run_report(runs[0])
    assert (runs[0].path / "report.html").read_bytes() == before


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml"])
def test_a_report_names_changed_files(tmp_path: Path, name: str) -> None:
    run = made_up_run(tmp_path / "run")
    file = run.path / name
    file.write_text(file.read_text().replace("1", "2", 1))
    with pytest.warns(FmgWarning, match=f"{name}' was changed after it was written"):
        write_run_report(run)


def test_the_before_and_after_picture_shows_the_kept_checkpoint(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    lines = read_numbers(run.metrics)
    kept, ema, base, none = (
        kept_picture(run, Outcome.of(lines, saved))
        for saved in (
            SavedCheckpoint("a", 1, "eval/score", 1.7),
            SavedCheckpoint("a-ema", 1, "eval_ema/score", 1.7),
            SavedCheckpoint("b", 0, "eval_ema/score", 0.7),
            None,
        )
    )
    assert (ema, none) == (None, None)
    assert kept is not None
    assert base is not None
    shown, grids = np.asarray(kept), [np.asarray(Image.open(run.sample(i))) for i in (0, 1)]
    # below the titles, without the second list of prompts
    assert np.array_equal(shown[26:, :900], grids[0][26:])
    assert np.array_equal(shown[26:, 924:], grids[1][26:, 146:])
    assert np.array_equal(np.asarray(base)[26:, 924:], grids[0][26:, 146:])
    run.sample(1).write_bytes(b"no picture")
    assert kept_picture(run, Outcome.of(lines, SavedCheckpoint("a", 1, "eval/score", 1.7))) is None


@pytest.mark.usefixtures("undrawn")
def test_the_result_of_a_run_that_was_not_evaluated_is_shown_as_unknown(tmp_path: Path) -> None:
    run = made_up_run(tmp_path / "run")
    write_index(
        run.path,
        CheckpointIndex((SavedCheckpoint("checkpoint-1", 5, "eval/score", None),), "checkpoint-1", "checkpoint-1"),
    )
    words = self_contained(write_run_report(run).read_text(encoding="utf-8")).words
    assert "The kept checkpoint (iteration 5) has not been evaluated." in words
    assert "shapes strict, held out 0." not in words


def test_a_run_that_has_just_begun_has_a_report(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    with pytest.raises(CheckpointError, match=r"recipe.yaml"):
        write_run_report(run)
    run.recipe.write_text("model:\n  name: x  # here\n")
    (run.path / "environment.json").write_text("[")
    (run.path / "before_after.png").write_bytes(b"no picture")
    words = self_contained(write_run_report(run).read_text(encoding="utf-8")).words
    assert "0 iterations, running" in words
    assert "The run has not been evaluated yet." in words
    assert "Curves" not in words
    assert "name: x" in words


def test_a_comparison_shows_scores_and_what_differs(runs: tuple[RunFolder, RunFolder], tmp_path: Path) -> None:
    write_comparison(runs, tmp_path / "c.html")
    words = self_contained((tmp_path / "c.html").read_text(encoding="utf-8")).words
    assert "first meanflow-shapes finished 3 1 0.300 → 0.320 0.700 → 0.700" in words
    assert "optimizer.lr 0.001 0.0005" in words
    assert "lora.rank" not in words
    with pytest.raises(UsageError, match="exists already"):
        write_comparison(runs, tmp_path / "c.html")
    with pytest.raises(UsageError, match="named twice"):
        write_comparison([runs[0], runs[0]], tmp_path / "d.html")
    with pytest.raises(CheckpointError, match="not a run folder"):
        write_comparison([runs[0], RunFolder(tmp_path)], tmp_path / "d.html")
    assert not (tmp_path / "d.html").exists()


def _svg(curves: list[Curve]) -> bytes:
    return figure_bytes(chart(curves, "t"), "svg")


def test_a_chart_draws_its_bands_and_survives_gaps() -> None:
    flat, banded = (_svg([Curve("a", [0, 1, 2], [0.1, 0.2, 0.3], band)]) for band in ([0] * 3, [0.1] * 3))
    assert banded.count(b"<path") > flat.count(b"<path")
    assert _svg([Curve("a", [0, 1], [float("nan"), 1.0], [0, 0])]).startswith(b"<?xml")


def test_large_pictures_are_scaled_down_and_small_ones_stay_exact() -> None:
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8))
    source, pixelated = inline_image(small)
    assert source.startswith("data:image/png")
    assert pixelated
    source, pixelated = inline_image(small.resize((2000, 1000)), 500)
    assert source.startswith("data:image/jpeg")
    assert not pixelated
    assert len(source) < 150_000


@pytest.mark.skipif(not CHROMIUM, reason="needs chromium (apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 420])
def test_a_browser_shows_the_report(runs: tuple[RunFolder, RunFolder], tmp_path: Path, width: int) -> None:
    """Nothing is broken or blocked, every picture decodes, and the page is not wider than the window."""
    html = (runs[0].path / "report.html").read_text(encoding="utf-8")
    # a probe that the test adds, under a policy that allows it
    probe = (
        "<script>addEventListener('load', () => { const r = document.documentElement; document.title = JSON.stringify({"
        "images: document.images.length, broken: [...document.images].filter(i => !i.naturalWidth).length,"
        "wide: r.scrollWidth - r.clientWidth, height: r.scrollHeight}); });</script></body>"
    )
    opened = html.replace("default-src 'none';", "default-src 'none'; script-src 'unsafe-inline';")
    (tmp_path / "page.html").write_text(opened.replace("</body>", probe), encoding="utf-8")
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={tmp_path / 'user'}",
    ]
    shown = subprocess.run(
        [CHROMIUM, *options, f"--window-size={width},900", "--dump-dom", (tmp_path / "page.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    found = json.loads(shown.stdout.partition("<title>")[2].partition("</title>")[0])
    assert found["images"] == 12
    assert found["broken"] == 0
    assert found["wide"] <= 0
    assert found["height"] > 1500
