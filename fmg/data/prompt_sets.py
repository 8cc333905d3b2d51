"""Prompt sets: the value type, and loading one by name, by file or from a recipe. Imports no torch."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fmg.core.errors import UsageError
from fmg.core.prompt import Prompt
from fmg.data.configs import PROMPT_FILE_SUFFIXES, FilePromptsConfig
from fmg.registry import prompt_sets
from fmg.registry.references import PromptsRef

if TYPE_CHECKING:
    from fmg.core.protocols import PromptSet
    from fmg.registry.recipe import Recipe


T = TypeVar("T")


class PromptList:
    """An ordered, non-empty set of prompts without duplicates.

    Raises:
        UsageError: for no prompt, or two of one text.
    """

    def __init__(self, name: str, prompts: Sequence[Prompt]) -> None:
        self.name = name
        self._prompts = tuple(prompts)
        if not self._prompts:
            raise UsageError(f"The prompt set '{name}' is empty", "Give at least one prompt.")
        seen: set[str] = set()
        for prompt in self._prompts:
            if prompt.text in seen:
                raise UsageError(f"The prompt set '{name}' has '{prompt.text}' twice", "Remove one of them.")
            seen.add(prompt.text)

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Prompt:
        return self._prompts[index]

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self._prompts)


def load_prompts(reference: str | PromptsRef) -> PromptSet:
    """A prompt set by registered name, by the path of a `.txt` or `.jsonl` file, or as a recipe refers to it.

    Raises:
        UsageError: for an unknown name, or a file that `fmg.data.files` refuses.
    """
    if isinstance(reference, PromptsRef):
        return prompt_sets.build_config(reference.name, reference.config)
    if Path(reference).suffix in PROMPT_FILE_SUFFIXES:
        return prompt_sets.build("file", {"path": reference})
    return prompt_sets.build(reference)


def prompts_digest(prompts: Iterable[Prompt]) -> str:
    """Sha256 of prompts in their order, with tags and metadata."""
    entries = [[prompt.text, prompt.tag, prompt.metadata] for prompt in prompts]
    return hashlib.sha256(json.dumps(entries, sort_keys=True, default=str).encode()).hexdigest()


def prompt_references(recipe: Recipe) -> dict[str, PromptsRef]:
    """The prompt sets of a recipe by their path in it."""
    return {"prompts": recipe.prompts, "eval.prompts": recipe.eval.prompts}


def file_values(recipe: Recipe) -> dict[str, object]:
    """The values that tie a recipe to its prompt files, by dotted path: where they are, and what is in them.

    Raises:
        UsageError: as for `load_prompts`.
    """
    values: dict[str, object] = {}
    for place, ref in _files(recipe).items():
        values[f"{place}.path"] = str(Path(ref.config.path).absolute())  # type: ignore[attr-defined]
        values[f"{place}.sha256"] = prompts_digest(load_prompts(ref))
    return values


def untied(recipe: Recipe) -> Recipe:
    """The recipe, whatever prompts its files have by now."""
    return recipe.with_(dict.fromkeys(f"{place}.sha256" for place in _files(recipe)))


def stated_digests(recipe: Recipe) -> dict[str, str]:
    """The digests of prompts that a recipe states, by the path of the prompt set in it."""
    stated = {place: ref.config.sha256 for place, ref in _files(recipe).items()}  # type: ignore[attr-defined]
    return {place: digest for place, digest in stated.items() if digest is not None}


def _files(recipe: Recipe) -> dict[str, PromptsRef]:
    return {k: ref for k, ref in prompt_references(recipe).items() if isinstance(ref.config, FilePromptsConfig)}


def spread(entries: Sequence[T], count: int) -> list[T]:
    """At most `count` entries, evenly spread, so that a few of a sorted set still show its variety."""
    if len(entries) <= count:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / max(count - 1, 1))] for i in range(count)]


def shared_prompts(train_prompts: Iterable[Prompt], eval_prompts: Iterable[Prompt]) -> int:
    """How many evaluation prompts are trained on. They are compared without regard to case and white space."""
    trained = {_normal(prompt.text) for prompt in train_prompts}
    return sum(_normal(prompt.text) in trained for prompt in eval_prompts)


def overlap_warning(train_prompts: Iterable[Prompt], eval_prompts: Iterable[Prompt]) -> str | None:
    """What to tell the user when prompts are trained on and evaluated on; None when none is."""
    held_out = list(eval_prompts)
    shared = shared_prompts(train_prompts, held_out)
    if shared == 0:
        return None
    return (
        f"{shared} of the {len(held_out)} evaluation prompts are training prompts as well: the evaluation overstates "
        "what was learnt. Give eval.prompts a set of its own."
    )


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())
