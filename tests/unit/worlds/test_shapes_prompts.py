from __future__ import annotations

from collections import Counter

import pytest

from fmg.core.errors import UsageError
from fmg.worlds.shapes.prompts import (
    SPLITS,
    PromptItem,
    hard_prompts,
    is_heldout,
    parse_prompt,
    phrasings,
    prompt_set,
    vocabulary,
)
from fmg.worlds.shapes.scene import COLORS, DIRECTIONS, KINDS, POSITIONS, Clause, Relation, Scene, single


@pytest.mark.parametrize("split", SPLITS)
def test_every_prompt_parses_back_to_its_scene(split: str) -> None:
    for item in prompt_set(split):
        assert parse_prompt(item.prompt) == item.scene


def test_train_and_heldout_share_no_combination_and_cover_all() -> None:
    train, heldout = ({item.scene for item in prompt_set(split)} for split in ("train", "heldout"))
    assert not train & heldout
    assert len(train | heldout) == len(KINDS) * len(COLORS) * len(POSITIONS)


@pytest.mark.parametrize("attribute", ["kind", "color", "position"])
def test_each_attribute_value_is_equally_frequent_in_both_splits(attribute: str) -> None:
    for split in ("train", "heldout"):
        counts = Counter(getattr(item.scene.include[0], attribute) for item in prompt_set(split))
        assert len(set(counts.values())) == 1


def test_every_pair_of_attributes_is_seen_in_training() -> None:
    shown = [item.scene.include[0] for item in prompt_set("train")]
    assert len({(c.kind, c.color) for c in shown}) == len(KINDS) * len(COLORS)
    assert len({(c.kind, c.position) for c in shown}) == len(KINDS) * len(POSITIONS)
    assert len({(c.color, c.position) for c in shown}) == len(COLORS) * len(POSITIONS)
    assert any(is_heldout(k, c, p) for k in KINDS for c in COLORS for p in POSITIONS)


def test_prompts_are_unique_within_and_across_splits() -> None:
    prompts = [item.prompt for split in SPLITS for item in prompt_set(split)]
    assert len(prompts) == len(set(prompts))


def test_vocabulary_is_small() -> None:
    assert len(vocabulary()) <= 40


def test_case_commas_spaces_and_a_full_stop_do_not_matter() -> None:
    assert parse_prompt("  On the left,  A red Circle. ") == single("circle", "red", "left")


def test_relations_and_counts() -> None:
    relation = (Clause("circle", "red", relation=Relation("left of", 1)), Clause("square", "blue"))
    assert parse_prompt("a red circle left of a blue square") == Scene("position", relation)
    assert parse_prompt("three green crosses") == Scene("counting", (Clause("cross", "green", count=3),))


@pytest.mark.parametrize(
    "prompt",
    ["", "a dog", "a red circle nowhere", "two red circle", "a red circles", "a orange circle on the left"],
)
def test_an_unreadable_prompt_names_the_grammar(prompt: str) -> None:
    with pytest.raises(UsageError, match="COLOR: red, green") as caught:
        parse_prompt(prompt)
    assert f"'{prompt}'" in caught.value.what


def test_metadata_has_the_form_of_geneval() -> None:
    scene = parse_prompt("a red circle above a blue square")
    assert scene.metadata(phrasings(scene)[0]) == {
        "tag": "position",
        "include": [
            {"class": "circle", "count": 1, "color": "red", "position": ["above", 1]},
            {"class": "square", "count": 1, "color": "blue"},
        ],
        "prompt": "a red circle above a blue square",
    }


def test_hard_sets_share_no_objects_and_every_attribute_is_in_both() -> None:
    train, heldout = hard_prompts(heldout=False), hard_prompts(heldout=True)
    assert {item.prompt for item in heldout} < {item.prompt for item in prompt_set("hard")}
    assert {item.prompt for item in prompt_set("hard")} <= {item.prompt for item in (*train, *heldout)}
    assert 30 <= len(heldout) < len(train) / 5

    def objects(items: tuple[PromptItem, ...]) -> set[tuple[tuple[str, str, int], ...]]:
        return {tuple(sorted((c.kind, c.color, c.count) for c in item.scene.include)) for item in items}

    assert not objects(train) & objects(heldout)
    for items in (train, heldout):
        assert len({item.prompt for item in items}) == len(items)
        clauses = [clause for item in items for clause in item.scene.include]
        assert {item.scene.tag for item in items} == {"counting", "two_object", "position"}
        assert {c.kind for c in clauses} == set(KINDS)
        assert {c.color for c in clauses} == set(COLORS)
        assert {c.count for c in clauses} == {1, 2, 3}
        assert {c.relation.direction for c in clauses if c.relation is not None} == set(DIRECTIONS)
