"""Prompts of the shapes world: phrasings, the three splits, and the parser that reads a prompt back into its scene."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import product
from typing import Literal, get_args

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from fmg.core.errors import UsageError
from fmg.core.prompt import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.worlds.configs import ShapesPromptsConfig
from fmg.worlds.shapes.scene import (
    COLORS,
    DIRECTIONS,
    KINDS,
    POSITIONS,
    Clause,
    Color,
    Direction,
    Kind,
    Position,
    Relation,
    Scene,
    place,
    render,
    single,
)

Split = Literal["train", "heldout", "hard"]
SPLITS: tuple[Split, ...] = get_args(Split)

PLACES: dict[Position, str] = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "center": "in the center",
}
_DESCRIBED = tuple(product(COLORS, KINDS))
_Pair = tuple[tuple[Color, Kind], tuple[Color, Kind]]
COUNT_WORDS = {"one": 1, "two": 2, "three": 3}
SINGLE_TEMPLATES = (
    "a {color} {kind} {place}",
    "one {color} {kind} {place}",
    "{place} a {color} {kind}",
    "a picture of a {color} {kind} {place}",
    "a {color} {kind} drawn {place}",
)
GRAMMAR = (
    "[a picture of] (a|one|two|three) COLOR KIND [PLACE], or two such objects joined by 'and', 'left of', 'right of', "
    f"'above' or 'below'; COLOR: {', '.join(COLORS)}; KIND: {', '.join(KINDS)} (plural with a count); "
    f"PLACE: {', '.join(PLACES.values())}"
)


@dataclass(frozen=True)
class PromptItem:
    """A prompt and the scene it describes."""

    prompt: str
    scene: Scene


def vocabulary() -> tuple[str, ...]:
    """Every word that a prompt of any split can contain, sorted."""
    words = {word for split in SPLITS for item in prompt_set(split) for word in item.prompt.split()}
    return tuple(sorted(words))


def phrasings(scene: Scene) -> tuple[str, ...]:
    """All phrasings of a scene, the plainest first."""
    clause = scene.include[0]
    if clause.position is not None:
        fields = {"color": clause.color, "kind": clause.kind, "place": PLACES[clause.position]}
        return tuple(template.format(**fields) for template in SINGLE_TEMPLATES)
    said = [_noun_phrase(c) for c in scene.include]
    if len(said) == 1:
        return (said[0], f"a picture of {said[0]}")
    joint = clause.relation.direction if clause.relation is not None else "and"
    return (f" {joint} ".join(said),)


def _noun_phrase(clause: Clause) -> str:
    if clause.count == 1:
        return f"a {clause.color} {clause.kind}"
    number = next(word for word, value in COUNT_WORDS.items() if value == clause.count)
    return f"{number} {clause.color} {_plural(clause.kind)}"


def _plural(kind: Kind) -> str:
    return "crosses" if kind == "cross" else f"{kind}s"


def is_heldout(kind: Kind, color: Color, position: Position) -> bool:
    """Whether a combination is held out, by a Latin square over colour and position, shifted by the kind.

    One combination in five is held out; each kind, colour and position appears in the same share of both splits, and
    every pair of two attributes is seen in training.
    """
    return (COLORS.index(color) + POSITIONS.index(position) + KINDS.index(kind)) % len(COLORS) == 0


@lru_cache
def prompt_set(split: Split) -> tuple[PromptItem, ...]:
    """The prompts of a split, in a fixed order; `train` and `heldout` share no attribute combination."""
    scenes = _hard_scenes() if split == "hard" else _single_scenes(heldout=split == "heldout")
    return tuple(PromptItem(prompt, scene) for scene in scenes for prompt in phrasings(scene))


def is_hard_heldout(scene: Scene) -> bool:
    """Whether objects with counts and relations are held out, one combination in three.

    The same two objects are held out in any order, side by side and in a relation; each kind, colour, count and
    relation is in both sets.
    """
    return sum(KINDS.index(c.kind) + 2 * COLORS.index(c.color) + c.count for c in scene.include) % 3 == 0


@lru_cache
def hard_prompts(*, heldout: bool) -> tuple[PromptItem, ...]:
    """Prompts with counts, two objects and relations, for evaluation or for training; the two share no combination.

    The held-out ones come from the split `hard`. Training has the rest of it, and all other pairs of objects that
    differ in colour and kind: learning to bind colours to kinds takes more pairs than the split has.
    """
    scenes = _hard_scenes() if heldout else [*_hard_scenes(), *_pair_scenes()]
    items = [
        PromptItem(text, scene) for scene in scenes if is_hard_heldout(scene) == heldout for text in phrasings(scene)
    ]
    return tuple({item.prompt: item for item in items}.values())


def _pair_scenes() -> list[Scene]:
    pairs = _pairs()
    return _joint([(a, b) for a, b in pairs if a < b]) + _related(pairs)


def _single_scenes(heldout: bool) -> list[Scene]:
    combinations = product(KINDS, COLORS, POSITIONS)
    return [single(k, c, p) for k, c, p in combinations if is_heldout(k, c, p) == heldout]


def _hard_scenes() -> list[Scene]:
    counting = [Scene("counting", (Clause(k, c, count=n),)) for c, k in _DESCRIBED for n in (2, 3)]
    number = {described: place for place, described in enumerate(_DESCRIBED)}
    pairs = [(a, b) for a, b in _pairs() if (number[a] * 7 + number[b] * 3) % 11 == 0]
    return counting + _joint(pairs) + _related(pairs)


def _pairs() -> list[_Pair]:
    """Two objects that differ in colour and kind."""
    return [(a, b) for a, b in product(_DESCRIBED, repeat=2) if a[0] != b[0] and a[1] != b[1]]


def _joint(pairs: Sequence[_Pair]) -> list[Scene]:
    return [Scene("two_object", (Clause(a[1], a[0]), Clause(b[1], b[0]))) for a, b in pairs]


def _related(pairs: Sequence[_Pair]) -> list[Scene]:
    return [
        Scene("position", (Clause(a[1], a[0], relation=Relation(DIRECTIONS[n % 4], 1)), Clause(b[1], b[0])))
        for n, (a, b) in enumerate(pairs)
    ]


_OBJECT = rf"(a|one|two|three) ({'|'.join(COLORS)}) ({'|'.join(KINDS)})(s|es)?"
_PLACE = f"({'|'.join(PLACES.values())})"
_POSITION_OF = {place: position for position, place in PLACES.items()}
_SINGLE_FIRST = re.compile(rf"(?:a picture of )?{_OBJECT} (?:drawn )?{_PLACE}")
_PLACE_FIRST = re.compile(rf"{_PLACE} {_OBJECT}")
_COUNTED = re.compile(rf"(?:a picture of )?{_OBJECT}")
_JOINED = re.compile(rf"(?:a picture of )?{_OBJECT} (and|{'|'.join(DIRECTIONS)}) {_OBJECT}")


@lru_cache(maxsize=4096)
def normalised(prompt: str) -> str:
    """The prompt in lower case, without commas, final full stops or repeated spaces."""
    return " ".join(prompt.lower().replace(",", " ").rstrip(". ").split())


def parse_prompt(prompt: str) -> Scene:
    """The scene that a prompt describes.

    Case, repeated spaces, commas and a final full stop do not matter.

    Raises:
        UsageError: the prompt is not in the grammar, which the message states.
    """
    text = normalised(prompt)
    if match := _SINGLE_FIRST.fullmatch(text):
        *words, place = match.groups()
        return _placed(words, place, prompt)
    if match := _PLACE_FIRST.fullmatch(text):
        place, *words = match.groups()
        return _placed(words, place, prompt)
    if match := _COUNTED.fullmatch(text):
        return Scene("counting", (_clause(match.groups(), prompt),))
    if match := _JOINED.fullmatch(text):
        *first, joint, count, color, kind, plural = match.groups()
        second = _clause((count, color, kind, plural), prompt)
        if joint == "and":
            return Scene("two_object", (_clause(first, prompt), second))
        direction: Direction = next(d for d in DIRECTIONS if d == joint)
        return Scene("position", (_clause(first, prompt, relation=Relation(direction, 1)), second))
    raise _unreadable(prompt)


def _placed(words: list[str], place: str, prompt: str) -> Scene:
    clause = _clause(words, prompt)
    if clause.count != 1:
        raise _unreadable(prompt)
    return single(clause.kind, clause.color, _POSITION_OF[place])


def _clause(words: tuple[str, ...] | list[str], prompt: str, relation: Relation | None = None) -> Clause:
    number, color_word, kind_word, plural = words
    count = COUNT_WORDS.get(number, 1)
    kind: Kind = next(k for k in KINDS if k == kind_word)
    color: Color = next(c for c in COLORS if c == color_word)
    expected = _plural(kind) if count > 1 else kind
    if kind + (plural or "") != expected:
        raise _unreadable(prompt)
    return Clause(kind, color, count=count, relation=relation)


def _unreadable(prompt: str) -> UsageError:
    return UsageError(f"The shapes world cannot read the prompt '{prompt}'", f"Write it as: {GRAMMAR}.")


class ShapesPrompts(PromptList):
    """Prompts of the shapes world, which can be rendered."""

    def true_images(self, prompts: Sequence[str], seed: int) -> Float[Tensor, "n 3 32 32"]:
        """One rendering of each prompt, in [0, 1]; positions and sizes are random.

        Raises:
            UsageError: for a prompt outside the grammar of the shapes world.
        """
        rng = np.random.default_rng(seed)
        return torch.from_numpy(render([place(parse_prompt(prompt), rng) for prompt in prompts]))


def shapes_train(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Training prompts: one object with a colour, a kind and a position."""
    return _prompts("shapes-train", prompt_set("train"))


def shapes_heldout(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Prompts of combinations that training never sees."""
    return _prompts("shapes-heldout", prompt_set("heldout"))


def shapes_hard(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Counts, two objects and relations: a fixed sample, for evaluation only."""
    return _prompts("shapes-hard", prompt_set("hard"))


def shapes_hard_train(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Training prompts with counts, two objects and relations."""
    return _prompts("shapes-hard-train", hard_prompts(heldout=False))


def shapes_hard_heldout(config: ShapesPromptsConfig) -> ShapesPrompts:
    """Counts, two objects and relations in combinations that training never sees."""
    return _prompts("shapes-hard-heldout", hard_prompts(heldout=True))


def _prompts(name: str, items: Sequence[PromptItem]) -> ShapesPrompts:
    return ShapesPrompts(name, [Prompt(i.prompt, i.scene.tag, i.scene.metadata(i.prompt)) for i in items])
