"""Prompt sets: the value type, and loading one by name, by file or from a recipe."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.core.protocols import PromptSet
from fmg.core.types import Prompt
from fmg.data.configs import PROMPT_FILE_SUFFIXES
from fmg.registry import prompt_sets
from fmg.registry.references import PromptsRef


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
