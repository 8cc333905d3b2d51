"""Options of the prompt sets. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from fmg.registry.config import ComponentConfig

PROMPT_FILE_SUFFIXES = (".txt", ".jsonl")


class FilePromptsConfig(ComponentConfig):
    """Prompts from a file: `.txt` with one a line, `.jsonl` with one object a line (see `fmg.data.files`)."""

    path: str = Field(min_length=1, description="a .txt or .jsonl file, UTF-8, no blank lines, at most 64 MiB")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="digest of the prompts, which a run states: a file with others is refused",
    )


class EverydayPromptsConfig(ComponentConfig):
    """Everyday scenes in four styles, of our own making."""


class DetectionPromptsConfig(ComponentConfig):
    """Prompts in GenEval's templates, of our own making."""


class LetteringPromptsConfig(ComponentConfig):
    """Prompts that ask for written words, of our own making."""
