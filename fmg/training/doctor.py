"""Examines an installation, with one tiny training run as the self-test."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

from fmg.core import metric_keys as keys
from fmg.core.events import ignore
from fmg.inference.doctor import Check, self_tested
from fmg.recipe import Recipe
from fmg.training.api import train

SELF_TEST: Mapping[str, object] = {
    "train.iterations": 1,
    "train.updates_per_iteration": 1,
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "rollout.steps": 2,
    "eval.num": 4,
    "train.device": "cpu",
}
"""The run of the self-test: every stage of a real run, on eight images."""


def trains() -> Check:
    """Trains the embedded model for one iteration."""
    return self_tested(
        "one iteration of meanflow-shapes",
        _scores,
        "generated, scored, updated, saved and read back",
        "See where: fmg --debug train --iterations 1",
    )


def _scores() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        result = train(Recipe.default(None, **SELF_TEST), Path(folder) / "run", ignore)
        return keys.SCORE in result.final
