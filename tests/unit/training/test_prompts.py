from __future__ import annotations

from collections import Counter

from fmg.core.types import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.training.prompts import iteration_prompts

SET = PromptList("numbers", [Prompt(str(i), "", {}) for i in range(7)])


def test_every_prompt_is_visited_equally_often() -> None:
    seen = Counter(p.text for i in range(14) for p in iteration_prompts(SET, 3, i, seed=5))
    assert set(seen.values()) == {6}


def test_an_iteration_depends_on_seed_and_iteration_alone() -> None:
    late = [p.text for p in iteration_prompts(SET, 3, 9, seed=5)]
    assert late == [p.text for p in iteration_prompts(SET, 3, 9, seed=5)]
    other = [p.text for p in iteration_prompts(SET, 7, 0, seed=1)]
    assert other != [p.text for p in iteration_prompts(SET, 7, 0, seed=0)]


def test_laps_have_different_orders() -> None:
    laps = [[p.text for p in iteration_prompts(SET, 7, i, seed=0)] for i in range(4)]
    assert len({tuple(lap) for lap in laps}) > 1
