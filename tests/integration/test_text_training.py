"""Post-training on text, with the recogniser as the reward: a few iterations of the shipped recipe."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg import Recipe, train
from fmg.registry import prompt_sets
from fmg.rewards.ocr import quoted_text

pytestmark = pytest.mark.slow
pytest.importorskip("rapidocr", reason="needs the packages of flow-map-grpo[ocr]")


def test_the_text_recipe_trains_on_one_split_and_reads_the_other(tmp_path: Path) -> None:
    recipe = Recipe.default(
        "meanflow-text",
        **{
            "train.iterations": 2,
            "rollout.groups": 2,
            "rollout.group_size": 6,
            "eval.num": 24,
            "eval.every": 2,
            "train.updates_per_iteration": 1,
        },
    )
    result = train(recipe, tmp_path / "run")
    assert result.iterations == 2
    assert result.initial != result.final
    for scores in (result.initial, result.final):
        assert 0 <= scores["eval/ocr-logp_exact_mean"] < 0.9
        assert -20 <= scores["eval/ocr-logp_mean"] < 0
        assert 0.5 < scores["eval/text-fidelity_mean"] <= 1
    trained = {quoted_text(p.text) for p in prompt_sets.build(recipe.prompts.name)}
    read = {quoted_text(p.text) for p in prompt_sets.build(recipe.eval.prompts.name)}
    assert trained
    assert read
    assert not trained & read
