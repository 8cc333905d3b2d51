"""Options of `fmg export`, checked from their text alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

from fmg.cli.options import checked_folder, given_text
from fmg.core.errors import UsageError, suggestion
from fmg.core.specs import MAX_ROWS, MAX_SIDE

ExportPrecision = Literal["fp32", "bf16", "fp16"]

_ARTIFACT: Mapping[str, ExportPrecision] = {"fp32": "fp32", "bf16": "bf16", "fp16": "fp16"}
_STORED = "stored"
_OFF = "off"
_LEVELS = ("quick", "full", _OFF)


def check_combination(forms: Mapping[str, bool], artifact: Mapping[str, bool], fresh: Mapping[str, bool]) -> None:
    """Whether the options that were given go together.

    Args:
        forms: what is to be made; at most one.
        artifact: options of a new artifact only.
        fresh: options of anything that is made anew.

    Raises:
        UsageError: naming two that do not.
    """
    asked = [name for name, given in forms.items() if given]
    if len(asked) > 1:
        raise UsageError(f"{asked[0]} and {asked[1]} exclude each other", "Give one of them.")
    form = asked[0] if asked else "--onnx"
    taken = [] if form == "--onnx" else [name for name, given in artifact.items() if given]
    unfit = {"--swap-weights": tuple(fresh), "--kohya": ("--precision",)}.get(form, ())
    taken += [name for name in unfit if fresh[name]]
    if taken:
        raise UsageError(f"{taken[0]} does not go with {form}", "Leave one of them out.")


def check_artifact_only(fresh: Mapping[str, object]) -> None:
    """Whether nothing was said about a new artifact where engines are added to one that is there.

    Raises:
        UsageError: naming the first option of a new one.
    """
    if given := [name for name, value in fresh.items() if value]:
        raise UsageError(
            f"{given[0]} does not go with --trt of an artifact that is there", "Leave it out, or name the run instead."
        )


def precision_of(text: str | None) -> ExportPrecision:
    """The precision of an artifact.

    Raises:
        UsageError: for a name that is not known.
    """
    return "fp32" if text is None else _ARTIFACT[_known(text, _ARTIFACT)]


def folder_precision(text: str | None) -> str:
    """The precision of a diffusers folder, which may also be the stored one.

    Raises:
        UsageError: for a name that is not known.
    """
    return _STORED if text is None else _known(text, (_STORED, *_ARTIFACT))


def verify_level(text: str, other: str | None) -> str | None:
    """How much to prove, or None for nothing.

    Args:
        text: what was given.
        other: the option that asks for something else than an artifact, which has no such proof.

    Raises:
        UsageError: for a word that is not known, or together with `other`.
    """
    if text not in _LEVELS:
        raise UsageError(f"--verify: '{text}' is not a level", suggestion(text, _LEVELS))
    if text == _OFF:
        return None
    if other is not None:
        raise UsageError(f"--verify does not go with {other}", "Leave one of them out.")
    return text


def resolution_list(text: str | None) -> tuple[int, ...] | None:
    """Sides in pixels from a list such as `256,512`.

    Raises:
        UsageError: an entry is not a whole number of pixels.
    """
    if text is None:
        return None
    return tuple(_number("--resolutions", text, part, MAX_SIDE, "512,1024") for part in text.split(","))


def batch_range(text: str | None) -> tuple[int, int, int] | None:
    """Least, usual and largest number of rows from `MIN:OPT:MAX`.

    Raises:
        UsageError: it is not three numbers that rise.
    """
    if text is None:
        return None
    numbers = [_number("--batch", text, part, MAX_ROWS, "1:4:16") for part in text.split(":")]
    if len(numbers) != 3 or sorted(numbers) != numbers:
        raise UsageError(f"--batch {text}: these are not three numbers that rise", "Write --batch 1:4:16.")
    least, usual, largest = numbers
    return least, usual, largest


def one_place(place: str | None, out: str | None, *, file: bool = False) -> Path | None:
    """The folder (or file) to make, which is given as OUT or as --out.

    Raises:
        UsageError: it is given twice, is empty, exists, or a file is in the way.
    """
    if place is not None and out is not None:
        raise UsageError("OUT is given twice, as a word and as --out", "Give it once.")
    from fmg.inference.target import absent_folder

    text = place if place is not None else out
    if text is None:
        return None
    flag = "OUT" if out is None else "--out"
    return absent_folder(Path(given_text(text, flag) or "") if file else checked_folder(text, flag))


def _known(text: str, names: Iterable[str]) -> str:
    if text not in tuple(names):
        raise UsageError(f"--precision: '{text}' is not a precision", suggestion(text, names))
    return text


def _number(flag: str, text: str, part: str, most: int, example: str) -> int:
    word = part.strip()
    if not word.isascii() or not word.isdigit() or len(word) > 9 or not 1 <= int(word) <= most:
        raise UsageError(f"{flag} {text}: '{word}' is not a whole number from 1 to {most}", f"Write {flag} {example}.")
    return int(word)
