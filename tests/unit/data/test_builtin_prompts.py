"""The built-in prompt sets: their metadata matches their text, and held-out prompts are not trained on."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest

from fmg.core.errors import UsageError
from fmg.data.prompt_sets import load_prompts, overlap_warning, spread
from fmg.rewards.geneval_rules import TAGS, parse_prompt, specification_of
from fmg.rewards.ocr import quoted_text


@pytest.mark.parametrize("name", ["geneval-train", "geneval-heldout"])
def test_geneval_prompts_say_what_their_metadata_says(name: str) -> None:
    prompts = list(load_prompts(name))
    for prompt in prompts:
        assert specification_of(prompt.metadata) == parse_prompt(prompt.text)
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", prompt.text)
    counts = Counter(prompt.tag for prompt in prompts)
    assert set(counts) == set(TAGS)
    assert min(counts.values()) >= 3


@pytest.mark.parametrize("name", ["lettering-train", "lettering-heldout"])
def test_lettering_prompts_quote_their_text(name: str) -> None:
    assert all(quoted_text(prompt.text) for prompt in load_prompts(name))


@pytest.mark.parametrize("name", ["geneval", "lettering"])
def test_what_is_held_out_is_not_trained_on(name: str) -> None:
    train, held_out = load_prompts(f"{name}-train"), load_prompts(f"{name}-heldout")
    assert overlap_warning(train, held_out) is None
    if name == "lettering":
        assert not {quoted_text(p.text) for p in train} & {quoted_text(p.text) for p in held_out}


def test_a_geneval_metadata_file_is_a_prompt_set(tmp_path: Path) -> None:
    file = tmp_path / "evaluation_metadata.jsonl"
    file.write_text(
        '{"tag": "colors", "include": [{"class": "cup", "count": 1, "color": "red"}], '
        '"prompt": "a photo of a red cup"}\n'
        '{"tag": "counting", "include": [{"class": "cup", "count": 2}], "exclude": [{"class": "cup", "count": 3}], '
        '"prompt": "a photo of two cups"}\n'
    )
    first, second = load_prompts(str(file))
    assert (first.text, first.tag) == ("a photo of a red cup", "colors")
    assert specification_of(first.metadata) == parse_prompt(first.text)
    assert specification_of(second.metadata) == parse_prompt(second.text)
    file.write_text('{"tag": "colors", "include": 3, "prompt": "a photo of a red cup"}\n')
    with pytest.raises(UsageError, match=r"jsonl:1: unknown key 'include'"):
        load_prompts(str(file))


def test_spread_keeps_ends_and_order() -> None:
    assert spread(range(10), 4) == [0, 3, 6, 9]
    assert spread("abc", 5) == ["a", "b", "c"]
    assert spread(range(5), 1) == [0]
