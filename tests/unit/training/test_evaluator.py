from __future__ import annotations

import numpy as np
import pytest

from fmg.eval.scoring import Scores, means
from fmg.training.evaluator import decline


def test_one_image_has_no_standard_error_and_shows_no_decline() -> None:
    one = means(Scores({("shapes", "total"): np.array([0.9])}, ("a",), ("",)))
    assert one["eval/shapes_mean"] == 0.9
    assert np.isnan(one["eval/shapes_se"])
    two = means(Scores({("shapes", "total"): np.array([0.9, 0.7])}, ("a", "b"), ("", "")))
    assert two["eval/shapes_se"] == pytest.approx(0.1 / 2**0.5)
    before, after = ({"eval/score": value, "eval/score_se": one["eval/shapes_se"]} for value in (0.9, 0.1))
    assert decline(before, after, "eval/score") is None


def test_only_a_clear_decline_is_reported() -> None:
    before = {"eval/score": 0.50, "eval/score_se": 0.01}
    assert decline(before, {"eval/score": 0.47, "eval/score_se": 0.01}, "eval/score") is None
    assert "0.500" in str(decline(before, {"eval/score": 0.45, "eval/score_se": 0.01}, "eval/score"))
