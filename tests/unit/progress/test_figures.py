from __future__ import annotations

import pytest

from fmg.core.display import counted
from fmg.data.run_metrics import headline
from fmg.progress.figures import signed, sparkline


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


def test_counted_takes_a_plural_of_its_own() -> None:
    assert counted(2, "box", "boxes") == "2 boxes"
