"""Prompt sets from files of the user's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from fmg.core.errors import FmgWarning, UsageError
from fmg.core.json_reader import JsonError, Line, located, parse, read_lines
from fmg.core.prompt import Prompt, is_blank
from fmg.data.configs import PROMPT_FILE_SUFFIXES, FilePromptsConfig
from fmg.data.prompt_sets import PromptList, prompts_digest
from fmg.registry import prompt_sets

_JSON_KEYS = ("prompt", "tag", "metadata")
# of an entry, what rewards and results by tag read
_MEANING = ("include", "exclude", "metadata")


@prompt_sets.register("file", FilePromptsConfig)
def file_prompts(config: FilePromptsConfig) -> PromptList:
    """The prompts of a file, in its order; surrounding white space is removed.

    A `.txt` file has one prompt a line. A `.jsonl` file has one object a line: `prompt`, and optionally `tag` (text)
    and `metadata` (object); or GenEval's: `prompt`, `tag`, `include` and more, all of which become the metadata.
    A prompt without a tag gets the tag `''`. Published evaluation files repeat a prompt for each of its images: a
    repeated prompt is read once, with a warning that counts them.

    Raises:
        UsageError: naming file and line: missing, not UTF-8, too long (`fmg.core.json_reader`), empty, blank line,
            wrong JSON, other prompts than the config states, or a prompt that is repeated with another tag or meaning.
    """
    path = Path(config.path)
    parsers: Mapping[str, Callable[[str, str], Prompt]] = dict(
        zip(PROMPT_FILE_SUFFIXES, (_text_line, _json_line), strict=True)
    )
    if path.suffix not in parsers:
        raise UsageError(f"The prompt file '{path}' is of an unknown kind", f"Use {' or '.join(PROMPT_FILE_SUFFIXES)}.")
    parse_line = parsers[path.suffix]
    prompts: dict[str, tuple[int, Prompt]] = {}
    lines = _lines(path)
    for line, text in lines:
        where = f"{path}:{line.number}"
        if is_blank(text):
            raise UsageError(f"{where}: the line is blank", "Remove it; every line is one prompt.")
        prompt = parse_line(text, where)
        first, known = prompts.setdefault(prompt.text, (line.number, prompt))
        if (known.tag, *map(known.metadata.get, _MEANING)) != (prompt.tag, *map(prompt.metadata.get, _MEANING)):
            raise UsageError(
                f"{where}: the prompt '{prompt.text}' is on line {first} with another tag or metadata",
                "Keep one of the two.",
            )
    if len(prompts) < len(lines):
        warnings.warn(
            f"'{path}' has {len(prompts)} {'prompt' if len(prompts) == 1 else 'prompts'} on {len(lines)} lines:"
            " each is used once, however often it is repeated; --num of `fmg eval` sets how many images it gets",
            FmgWarning,
            stacklevel=2,
        )
    found = [prompt for _, prompt in prompts.values()]
    if config.sha256 not in (None, prompts_digest(found)):
        raise UsageError(
            f"The prompt file '{path}' has other prompts than those whose digest the recipe states",
            "Restore it, or give it anew with --prompts.",
        )
    return PromptList(str(path), found)


def _lines(path: Path) -> list[tuple[Line, str]]:
    try:
        lines = [(line, line.text()) for line in read_lines(path)]
    except FileNotFoundError:
        raise UsageError(
            f"There is no prompt file '{path}'", "Check the path; one in a recipe is relative to the recipe's folder."
        ) from None
    except JsonError as error:
        raise UsageError(located(path, error), "Save it as UTF-8 text with one prompt a line.") from None
    except OSError as error:
        raise UsageError(f"The prompt file '{path}' cannot be read: {error.strerror}", "Name a text file.") from None
    if not lines:
        raise UsageError(f"The prompt file '{path}' is empty", "Write one prompt a line.")
    return lines


def _text_line(line: str, where: str) -> Prompt:
    return Prompt(line.strip(), "", {})


def _json_line(line: str, where: str) -> Prompt:
    try:
        entry = parse(line)
    except JsonError as error:
        raise UsageError(f"{where}: {error}", "Write one object a line.") from None
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: the line is not a JSON object", 'Write {"prompt": "..."}.')
    geneval = isinstance(entry.get("include"), list)
    unknown = sorted(set(entry) - set(_JSON_KEYS))
    if unknown and not geneval:
        raise UsageError(f"{where}: unknown key '{unknown[0]}'", f"Known: {', '.join(_JSON_KEYS)}.")
    text, tag, metadata = entry.get("prompt"), entry.get("tag", ""), entry if geneval else entry.get("metadata", {})
    if not isinstance(text, str) or is_blank(text):
        raise UsageError(f"{where}: 'prompt' must be a text that is not empty", 'Write {"prompt": "..."}.')
    if not isinstance(tag, str) or not isinstance(metadata, dict):
        raise UsageError(f"{where}: 'tag' must be a text and 'metadata' an object", "Correct or remove them.")
    return Prompt(text.strip(), tag, metadata)
