"""Prompt sets from files of the user's own."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from fmg.core.errors import UsageError
from fmg.core.prompt import Prompt
from fmg.data.configs import PROMPT_FILE_SUFFIXES, FilePromptsConfig
from fmg.data.prompt_sets import PromptList
from fmg.registry import prompt_sets

_JSON_KEYS = ("prompt", "tag", "metadata")


@prompt_sets.register("file", FilePromptsConfig)
def file_prompts(config: FilePromptsConfig) -> PromptList:
    """The prompts of a file, in its order; surrounding white space is removed.

    A `.txt` file has one prompt a line. A `.jsonl` file has one object a line: `prompt`, and optionally `tag` (text)
    and `metadata` (object); or GenEval's: `prompt`, `tag`, `include` and more, all of which become the metadata.
    A prompt without a tag gets the tag `''`.

    Raises:
        UsageError: naming file and line: missing, not UTF-8, empty, blank line, duplicate, wrong JSON.
    """
    path = Path(config.path)
    parsers: Mapping[str, Callable[[str, str], Prompt]] = dict(
        zip(PROMPT_FILE_SUFFIXES, (_text_line, _json_line), strict=True)
    )
    if path.suffix not in parsers:
        raise UsageError(f"The prompt file '{path}' is of an unknown kind", f"Use {' or '.join(PROMPT_FILE_SUFFIXES)}.")
    parse = parsers[path.suffix]
    prompts: list[Prompt] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(_lines(path), start=1):
        where = f"{path}:{number}"
        if not line.strip():
            raise UsageError(f"{where}: the line is blank", "Remove it; every line is one prompt.")
        prompt = parse(line, where)
        if prompt.text in first_line:
            raise UsageError(
                f"{where}: the prompt '{prompt.text}' is already on line {first_line[prompt.text]}", "Remove one."
            )
        first_line[prompt.text] = number
        prompts.append(prompt)
    return PromptList(str(path), prompts)


def _lines(path: Path) -> list[str]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise UsageError(f"There is no prompt file '{path}'", "Check the path.") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The prompt file '{path}' is not UTF-8 (byte {error.start})", "Save it as UTF-8 text."
        ) from None
    except OSError as error:
        raise UsageError(f"The prompt file '{path}' cannot be read: {error.strerror}", "Name a text file.") from None
    # str.splitlines would also cut at characters that JSON strings and prompts may hold, such as U+2028
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines == [""]:
        raise UsageError(f"The prompt file '{path}' is empty", "Write one prompt a line.")
    return lines


def _text_line(line: str, where: str) -> Prompt:
    return Prompt(line.strip(), "", {})


def _json_line(line: str, where: str) -> Prompt:
    try:
        entry: object = json.loads(line)
    except json.JSONDecodeError as error:
        raise UsageError(f"{where}: not JSON ({error.msg}, column {error.colno})", "Write one object a line.") from None
    if not isinstance(entry, dict):
        raise UsageError(f"{where}: the line is not a JSON object", 'Write {"prompt": "..."}.')
    geneval = isinstance(entry.get("include"), list)
    unknown = sorted(set(entry) - set(_JSON_KEYS))
    if unknown and not geneval:
        raise UsageError(f"{where}: unknown key '{unknown[0]}'", f"Known: {', '.join(_JSON_KEYS)}.")
    text, tag, metadata = entry.get("prompt"), entry.get("tag", ""), entry if geneval else entry.get("metadata", {})
    if not isinstance(text, str) or not text.strip():
        raise UsageError(f"{where}: 'prompt' must be a text that is not empty", 'Write {"prompt": "..."}.')
    if not isinstance(tag, str) or not isinstance(metadata, dict):
        raise UsageError(f"{where}: 'tag' must be a text and 'metadata' an object", "Correct or remove them.")
    return Prompt(text.strip(), tag, metadata)
