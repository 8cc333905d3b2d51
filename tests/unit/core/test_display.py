"""Text from a file is safe to display: no control characters, no endless values."""

from __future__ import annotations

import json
from xml.etree import ElementTree

import pytest

from fmg.core.display import LONGEST_VALUE, bounded, cut, html_table, visible, visible_json
from fmg.core.errors import CheckpointError, UsageError
from fmg.data.charts import Curve, chart, curve_figure, figure_bytes

HOSTILE = "\x1b[31m \x07 \x9b \x7f \u202e \u2066 \u200b \ufeff \udc80 \U000e0041 \r"
ORDINARY = "a red circle, 漢字\u3000かな, עברית, e\u0301, \U0001f469\u200d\U0001f52c, \xa0"


def test_invisible_characters_are_escaped() -> None:
    assert visible("\x1b[31m\n") == r"\x1b[31m\n"
    assert visible("\x1b\n\t", lines=True) == "\\x1b\n\t"
    assert visible(HOSTILE).isprintable()
    assert visible(ORDINARY) == ORDINARY


def test_json_stays_the_same_value() -> None:
    value = {HOSTILE.replace("\udc80", ""): [ORDINARY]}
    for indent in (None, 2):
        shown = visible_json(json.dumps(value, ensure_ascii=False, indent=indent))
        assert json.loads(shown) == value
        assert visible(shown, lines=True) == shown


def test_html_of_a_notebook_shows_no_control_characters() -> None:
    shown = html_table(HOSTILE, [HOSTILE], [[HOSTILE]])
    assert visible(shown) == shown


@pytest.mark.parametrize("value", ["x" * 100_000, "a b " * 30_000, "/x" * 50_000])
def test_errors_cut_what_they_quote(value: str) -> None:
    error = UsageError(f"p.txt:3: the prompt '{value}' is too long", "Shorten it.")
    assert value[:LONGEST_VALUE] in str(error)
    assert value[: LONGEST_VALUE + 1] not in str(error)
    assert f"({len(value):,} characters)' is too long. Shorten it." in str(error)


@pytest.mark.parametrize("name", [r"$\frac$", "cost $x_{", "_hidden", "\ud800", "\x1b[31m", "a<b>&c"])
def test_any_name_is_a_label_of_a_figure(name: str) -> None:
    curve = Curve(name, [0, 1], [0, 1], [0, 0])
    for figure in (chart([curve, curve], name), curve_figure([curve], [curve], name)):
        ElementTree.fromstring(figure_bytes(figure, "svg"))
        assert figure_bytes(figure, "png")


def test_errors_are_bounded_whatever_they_quote() -> None:
    assert len(str(CheckpointError("it's " * 10_000, "don't " * 10_000))) < 3000
    ordinary = "There is no reward 'x'"
    assert bounded(ordinary) == cut(ordinary) == ordinary
