from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
from rich.console import Console

from fmg.cli.train import JsonReporter
from fmg.core.display import counted, signed
from fmg.core.events import Evaluated, Event, Finished, IterationDone, Notice, Resumed, StageProgress, Started
from fmg.data.run_metrics import headline
from fmg.progress.reporters import LOADING, LiveReporter, PlainReporter, reporter_for, sparkline

STORY: tuple[Event, ...] = (
    Started("meanflow-shapes", 2, {"stochasticizer": "asfmc-endpoint"}),
    Evaluated(0, {"eval/shapes_mean": 0.5, "eval/shapes_strict_mean": 0.25}, None),
    StageProgress("rollout", 1, 4),
    IterationDone(1, 2, {"iteration": 1, "reward/mean": 0.5}),
    Notice("warning", "look [red]here[/red]"),
    IterationDone(2, 2, {"iteration": 2, "reward/mean": 0.75}),
    Evaluated(2, {"eval/shapes_mean": 0.625, "eval/shapes_strict_mean": 0.5}, Path("grid.png")),
    Finished(Path("runs/a"), False, {}),
)


GOES_ON: tuple[Event, ...] = (
    Started("meanflow-shapes", 3, {}),
    Resumed(
        1,
        (
            {"iteration": 0.0, "eval/shapes_mean": 0.5},
            {"iteration": 1.0, "reward/mean": 0.25},
            {"iteration": 1.0, "eval/shapes_mean": 0.75},
        ),
    ),
    IterationDone(2, 3, {"iteration": 2, "reward/mean": 0.5}),
    Evaluated(2, {"iteration": 2, "eval/shapes_mean": 0.875}, None),
)


class Clock:
    """A clock that the test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def plain_console() -> tuple[Console, io.StringIO]:
    text = io.StringIO()
    return Console(file=text, markup=False, emoji=False, highlight=False, width=60), text


def test_plain_lines_show_differences_from_the_start() -> None:
    console, text = plain_console()
    with PlainReporter(console, Clock()) as reporter:
        for event in STORY:
            reporter(event)
    assert text.getvalue().splitlines() == [
        "meanflow-shapes, 2 iterations",
        "  stochasticizer: asfmc-endpoint",
        "held out, after iteration 0  shapes strict 0.250  shapes 0.500",
        "iteration 1/2  reward 0.500  0.0 s",
        "warning: look [red]here[/red]",
        "iteration 2/2  reward 0.750 (+0.250)  0.0 s",
        "held out, after iteration 2  shapes strict 0.500 (+0.250)  shapes 0.625 (+0.125)",
    ]


def test_a_resumed_run_is_compared_with_its_own_first_lines() -> None:
    console, text = plain_console()
    with PlainReporter(console, Clock()) as reporter:
        for event in GOES_ON:
            reporter(event)
    assert text.getvalue().splitlines()[1:] == [
        "Resumed after iteration 1.",
        "iteration 2/3  reward 0.500 (+0.250)  0.0 s",
        "held out, after iteration 2  shapes 0.875 (+0.375)",
    ]


def test_the_live_view_of_a_resumed_run_continues_its_curve() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, markup=False, emoji=False, highlight=False)
    with LiveReporter(console) as reporter:
        for event in GOES_ON[:2]:
            reporter(event)
        frame = shown(reporter)
        assert "1/3" in frame
        assert "shapes  0.750  +0.250  held out, after iteration 1" in frame
        for event in GOES_ON[2:]:
            reporter(event)
        frame = shown(reporter)
    assert "reward  0.500  +0.250  ▁█" in frame
    assert "shapes  0.875  +0.375  held out, after iteration 2" in frame
    assert "Resumed after iteration 1." in text.getvalue()


def test_a_long_stage_gives_a_sign_of_life_every_ten_seconds() -> None:
    console, text = plain_console()
    clock = Clock()
    reporter = PlainReporter(console, clock)
    for second in range(25):
        clock.now = float(second)
        reporter(StageProgress("evaluation", second, 25))
    assert text.getvalue().splitlines() == ["evaluation: 10/25", "evaluation: 20/25"]


def test_json_lines_hold_metrics_only_and_notices_go_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    console, notices = plain_console()
    with JsonReporter(console) as reporter:
        for event in STORY:
            reporter(event)
        reporter(IterationDone(3, 3, {"iteration": 3.0, "grad_norm": float("nan")}))
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["iteration"] for line in lines] == [0, 1, 2, 2, 3]
    assert lines[1] == {"iteration": 1, "reward/mean": 0.5}
    assert lines[-1] == {"iteration": 3, "grad_norm": None}
    assert notices.getvalue() == "warning: look [red]here[/red]\n"


def test_the_live_view_shows_progress_scores_and_keeps_notices() -> None:
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, markup=False, emoji=False, highlight=False)
    with LiveReporter(console) as reporter:
        reporter(LOADING)
        assert "loading" in shown(reporter)
        for event in STORY[:3]:
            reporter(event)
        frame = shown(reporter)
        assert "loading" not in frame
        assert "rollout" in frame
        assert "1/4" in frame
        for event in STORY[3:]:
            reporter(event)
        frame = shown(reporter)
    assert "2/2" in frame
    assert "rollout" not in frame
    assert "0.750  +0.250  ▁█" in frame
    assert "shapes strict  0.500  +0.250  held out, after iteration 2" in frame
    assert "look [red]here[/red]" in text.getvalue()


def shown(reporter: LiveReporter) -> str:
    """The lines that the live view would show now."""
    target = Console(file=io.StringIO(), width=100, markup=False, highlight=False)
    with target.capture() as capture:
        target.print(reporter.view())
    return capture.get()


@pytest.mark.parametrize(("terminal", "kind"), [(True, LiveReporter), (False, PlainReporter)])
def test_a_terminal_gets_the_live_view_and_a_pipe_plain_lines(
    terminal: bool, kind: type, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert isinstance(reporter_for(Console(file=io.StringIO(), force_terminal=terminal)), kind)


def test_a_dumb_terminal_gets_plain_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(reporter_for(Console(file=io.StringIO(), force_terminal=True)), PlainReporter)


def test_the_loading_line_moves_and_names_what_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, markup=False, emoji=False, highlight=False)
    with LiveReporter(console) as reporter:
        reporter(LOADING)
        monkeypatch.setitem(sys.modules, "a_heavy_package.part", ModuleType("part"))
        frame = shown(reporter)
        assert "loading a_heavy_package" in frame
        assert " 0 s" in frame
        assert "0/" not in frame
        reporter(StageProgress("loading", 0, 0, "meanflow-shapes"))
        assert "loading meanflow-shapes" in shown(reporter)


def test_a_pipe_gets_a_line_for_slow_imports() -> None:
    console, text = plain_console()
    clock = Clock()
    reporter = PlainReporter(console, clock)
    reporter(LOADING)
    clock.now = 11.0
    reporter(StageProgress("loading", 0, 0, "meanflow-shapes"))
    assert text.getvalue() == "loading meanflow-shapes ...\n"


def test_headline_names_strict_scores_first_and_leaves_other_parts_out() -> None:
    metrics = {
        "reward/mean": 0.1,
        "eval/shapes_mean": 0.2,
        "eval/shapes_color_mean": 0.3,
        "eval/shapes_strict_mean": 0.4,
        "eval/shapes-quality_mean": 0.5,
        "eval/shapes-quality_sharpness_mean": 0.6,
        "eval/score": 0.7,
    }
    assert list(headline(metrics).items()) == [("shapes strict", 0.4), ("shapes", 0.2), ("shapes-quality", 0.5)]


def test_headline_keeps_a_total_whose_name_has_an_underscore() -> None:
    assert headline({"eval/my_mod:fn_mean": 1.0, "eval/my_mod:fn_part_mean": 2.0}) == {"my_mod:fn": 1.0}


@pytest.mark.parametrize(("delta", "text"), [(0.25, "+0.250"), (-0.25, "-0.250"), (-0.0001, "+0.000"), (0.0, "+0.000")])
def test_signed_never_prints_a_negative_zero(delta: float, text: str) -> None:
    assert signed(delta) == text


def test_sparkline_spans_lowest_to_highest() -> None:
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▅█"
    assert sparkline([2.0, 2.0], 10) == "▁▁"
    assert sparkline([], 10) == ""


@pytest.mark.parametrize("count", [1, 29, 30, 31, 1000])
def test_sparkline_has_at_most_the_width_and_rises_with_its_values(count: int) -> None:
    line = sparkline([float(i) for i in range(count)], 30)
    assert len(line) == min(count, 30)
    assert list(line) == sorted(line)


def test_scores_of_a_moving_average_follow_those_of_the_weights() -> None:
    metrics = {"eval_ema/a_mean": 0.25, "eval_ema/a_strict_mean": 0.5, "eval/a_mean": 0.75, "eval_ema/score": 0.1}
    assert list(headline(metrics).items()) == [("a", 0.75), ("a strict (EMA)", 0.5), ("a (EMA)", 0.25)]


@pytest.mark.parametrize(("number", "text"), [(0, "0 images"), (1, "1 image"), (2, "2 images"), (1000, "1000 images")])
def test_counted_has_the_right_plural(number: int, text: str) -> None:
    assert counted(number, "image") == text
