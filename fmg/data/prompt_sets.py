"""Prompt sets: loading one by name, from a file or from a recipe, and how a recipe is tied to its prompt files."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import Field

from fmg.core.display import counted
from fmg.core.errors import FmgWarning, UsageError
from fmg.core.json_io import JsonError, located, parse, read_lines
from fmg.core.prompt import PROMPT_FILE_SUFFIXES, Prompt, is_blank
from fmg.recipe.sections import PromptsRef
from fmg.registry import prompt_sets
from fmg.registry.config import ComponentConfig

if TYPE_CHECKING:
    from fmg.core.protocols import PromptSet
    from fmg.recipe import Recipe

_JSON_KEYS = ("prompt", "tag", "metadata")
# the keys of an entry that rewards, and results by tag, read
_MEANING = ("include", "exclude", "vqa_list", "metadata")

T = TypeVar("T")


class PromptList:
    """An ordered, non-empty set of prompts without duplicates.

    Raises:
        UsageError: there is no prompt, or one occurs twice.
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


class FilePromptsConfig(ComponentConfig):
    """Prompts from a file: `.txt` with one prompt per line, `.jsonl` with one object per line."""

    path: str = Field(min_length=1, description="a .txt or .jsonl file, UTF-8, no blank lines, at most 64 MiB")
    sha256: str | None = Field(
        None,
        pattern="^[0-9a-f]{64}$",
        description="digest of the prompts, as stated by a run: a file with other prompts is refused",
    )


def file_prompts(config: FilePromptsConfig) -> PromptList:
    """The prompts of a file, in its order; surrounding white space is removed.

    A `.txt` file has one prompt per line. A `.jsonl` file has one object per line: `prompt`, and optionally `tag`
    (text) and `metadata` (object). Objects of GenEval (`prompt`, `tag`, `include` and more) and of GenEval 2 (`prompt`,
    `vqa_list`, `atom_count` and more) become the metadata as a whole. A prompt without a tag gets the tag `''`, or in
    GenEval 2 its number of atoms. Published evaluation files repeat a prompt for each of its images: a repeated prompt
    is read once, with a warning that counts them.

    Raises:
        UsageError: naming file and line: missing, not UTF-8, too long (`fmg.core.json_io`), empty, blank line,
            wrong JSON, prompts other than the config states, or a prompt that is repeated with another tag or meaning.
    """
    path = Path(config.path)
    if path.suffix not in PROMPT_FILE_SUFFIXES:
        raise UsageError(f"The prompt file '{path}' has an unknown suffix", f"Use {' or '.join(PROMPT_FILE_SUFFIXES)}.")
    lines = _lines(path)
    prompts: dict[str, tuple[int, Prompt]] = {}
    for number, text in lines:
        where = f"{path}:{number}"
        if is_blank(text):
            raise UsageError(f"{where}: the line is blank", "Remove it; every line is one prompt.")
        prompt = Prompt(text.strip(), "", {}) if path.suffix == ".txt" else _json_prompt(text, where)
        first, known = prompts.setdefault(prompt.text, (number, prompt))
        if (known.tag, *map(known.metadata.get, _MEANING)) != (prompt.tag, *map(prompt.metadata.get, _MEANING)):
            raise UsageError(
                f"{where}: the prompt '{prompt.text}' is on line {first} with another tag or metadata",
                "Keep one of the two.",
            )
    if len(prompts) < len(lines):
        warnings.warn(
            f"'{path}' has {counted(len(prompts), 'prompt')} on {len(lines)} lines:"
            " each is used once, however often it is repeated; --num of `fmg eval` sets how many images it gets",
            FmgWarning,
            stacklevel=2,
        )
    found = [prompt for _, prompt in prompts.values()]
    if config.sha256 not in (None, prompts_digest(found)):
        raise UsageError(
            f"The prompt file '{path}' has changed: its prompts do not match the digest in the recipe",
            "Restore it, or pass it again with --prompts.",
        )
    return PromptList(str(path), found)


def _lines(path: Path) -> list[tuple[int, str]]:
    try:
        lines = [(line.number, line.text()) for line in read_lines(path)]
    except FileNotFoundError:
        raise UsageError(
            f"There is no prompt file '{path}'",
            "Check the path, which in a recipe is relative to the recipe's folder, or name other prompts: --prompts.",
        ) from None
    except JsonError as error:
        raise UsageError(located(path, error), "Save it as UTF-8 text with one prompt per line.") from None
    except OSError as error:
        raise UsageError(f"The prompt file '{path}' cannot be read: {error.strerror}", "Name a text file.") from None
    if not lines:
        raise UsageError(f"The prompt file '{path}' is empty", "Write one prompt per line.")
    return lines


def _json_prompt(line: str, where: str) -> Prompt:
    try:
        entry = parse(line)
    except JsonError as error:
        raise UsageError(f"{where}: {error}", "Write one JSON object per line.") from None
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: the line is not a JSON object", 'Write {"prompt": "..."}.')
    benchmark = isinstance(entry.get("include"), list) or isinstance(entry.get("vqa_list"), list)
    unknown = sorted(set(entry) - set(_JSON_KEYS))
    if unknown and not benchmark:
        raise UsageError(f"{where}: unknown key '{unknown[0]}'", f"Known: {', '.join(_JSON_KEYS)}.")
    atoms = f"{entry['atom_count']} atoms" if benchmark and "atom_count" in entry else ""
    text, tag = entry.get("prompt"), entry.get("tag", atoms)
    metadata = entry if benchmark else entry.get("metadata", {})
    if not isinstance(text, str) or is_blank(text):
        raise UsageError(f"{where}: 'prompt' must be non-empty text", 'Write {"prompt": "..."}.')
    if not isinstance(tag, str) or not isinstance(metadata, dict):
        raise UsageError(f"{where}: 'tag' must be text and 'metadata' an object", "Correct or remove them.")
    return Prompt(text.strip(), tag, metadata)


def load_prompts(reference: str | PromptsRef) -> PromptSet:
    """A prompt set by registered name, by the path of a `.txt` or `.jsonl` file, or as a recipe refers to it.

    Raises:
        UsageError: for an unknown name, or a file that `file_prompts` refuses.
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
    """The values that tie a recipe to its prompt files, by dotted path: their paths and digests.

    Raises:
        UsageError: as for `load_prompts`.
    """
    values: dict[str, object] = {}
    for place, (ref, config) in _files(recipe).items():
        values[f"{place}.path"] = str(Path(config.path).absolute())
        values[f"{place}.sha256"] = prompts_digest(load_prompts(ref))
    return values


def untied(recipe: Recipe) -> Recipe:
    """The recipe without the digests of its prompt files, so that changed files are read as they are now."""
    return recipe.with_(dict.fromkeys(f"{place}.sha256" for place in _files(recipe)))


def stated_digests(recipe: Recipe) -> dict[str, str]:
    """The digests of prompts that a recipe states, by the path of the prompt set in it."""
    return {place: config.sha256 for place, (_, config) in _files(recipe).items() if config.sha256 is not None}


def _files(recipe: Recipe) -> dict[str, tuple[PromptsRef, FilePromptsConfig]]:
    return {
        place: (ref, ref.config)
        for place, ref in prompt_references(recipe).items()
        if isinstance(ref.config, FilePromptsConfig)
    }


def spread(entries: Sequence[T], count: int) -> list[T]:
    """At most `count` entries, evenly spread, so that a small selection of a sorted set still shows its variety."""
    if len(entries) <= count:
        return list(entries)
    return [entries[round(i * (len(entries) - 1) / max(count - 1, 1))] for i in range(count)]


def shared_prompts(train_prompts: Iterable[Prompt], eval_prompts: Iterable[Prompt]) -> int:
    """How many evaluation prompts are also training prompts, ignoring case and white space."""
    trained = {" ".join(prompt.text.casefold().split()) for prompt in train_prompts}
    return sum(" ".join(prompt.text.casefold().split()) in trained for prompt in eval_prompts)


def overlap_warning(train_prompts: Iterable[Prompt], eval_prompts: Iterable[Prompt]) -> str | None:
    """The warning for prompts that are both trained on and evaluated on; None when there are none."""
    held_out = list(eval_prompts)
    shared = shared_prompts(train_prompts, held_out)
    if shared == 0:
        return None
    return (
        f"{shared} of the {len(held_out)} evaluation prompts are training prompts as well: the evaluation overstates "
        "what was learned. Give eval.prompts a set of its own."
    )
