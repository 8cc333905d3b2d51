"""The one reader of JSON and JSON lines: strict, bounded, standard library only.

Files that people and other programs write may have a byte order mark, U+2028 inside a text, 100,000 levels of nesting,
an integer of 5,000 digits, or half of a surrogate pair. Everything that fmg reads as JSON comes through here, so that
each of these is treated in one way:

- A byte order mark at the beginning is skipped. Text is UTF-8.
- Lines end at LF, CR LF or CR, and at nothing else.
- Refused: more than `MAX_BYTES`, more than `MAX_DEPTH` levels, numbers too large for a double (`1e400`, an integer of
  400 digits), `NaN` and `Infinity`, half of a surrogate pair, and a key that an object has twice.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from fmg.core.errors import UsageError
from fmg.core.files import write_atomic

MAX_BYTES = 1 << 24
"""Maximum bytes of a JSON document: 16 MiB."""
MAX_LINES_BYTES = 1 << 26
"""Maximum bytes of a file of lines that users provide, such as a prompt file: 64 MiB."""
MAX_LINE_BYTES = 1 << 20
"""Maximum bytes of one line: 1 MiB."""
MAX_DEPTH = 64
"""Maximum nesting depth of lists and objects."""

# safetensors: the bytes before the header, and the format's own limit on the header
_HEADER_LENGTH = 8
_LARGEST_HEADER = 100 * 2**20
# every integer of so many digits fits a double
_MAX_DIGITS = 308
_SEAL = "sha256"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")
_BOM = "\ufeff"


class JsonError(ValueError):
    """Text that is not JSON as fmg reads it. The message is the reason, without the name of the file.

    Attributes:
        line: line of the file, from 1; None for a single document.
    """

    def __init__(self, reason: str, line: int | None = None) -> None:
        super().__init__(reason)
        self.line = line


@dataclass(frozen=True)
class Line:
    """One line of a text file.

    Attributes:
        number: from 1.
        data: its bytes, without the end.
        ended: whether it has an end; only the last line may lack it.
    """

    number: int
    data: bytes
    ended: bool

    def text(self) -> str:
        """The line as text, without a byte order mark.

        Raises:
            JsonError: it is not UTF-8.
        """
        return _decoded(self.data, self.number)


def parse(text: str | bytes, *, finite: bool = True) -> object:
    """The value of a JSON text.

    Args:
        text: to read.
        finite: whether to refuse `NaN`, `Infinity` and what is too large for a double; only what fmg wrote for itself
            may contain them.

    Raises:
        JsonError: it is not JSON, or is refused for a reason that the module docstring names.
    """
    if isinstance(text, bytes):
        text = _decoded(text)
    text = text.removeprefix(_BOM)
    try:
        value: object = (_DECODER if finite else _NON_FINITE).decode(text)
    except json.JSONDecodeError as error:
        where = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise JsonError(f"not JSON ({error.msg}, {where})") from None
    except RecursionError:
        raise JsonError(_NESTED) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(value)
    if _SURROGATE.search(text):
        _check_texts(value)
    return value


def parse_object(text: str | bytes, *, finite: bool = True) -> dict[str, object]:
    """The object of a JSON text; arguments as for `parse`.

    Raises:
        JsonError: as `parse`, or it is not an object.
    """
    return _object(parse(text, finite=finite))


def read_json(file: Path, max_bytes: int = MAX_BYTES) -> object:
    """The value in a JSON file.

    Raises:
        OSError: the file cannot be read.
        JsonError: as `parse`, or it has more than `max_bytes`.
    """
    with file.open("rb") as opened:
        data = opened.read(max_bytes + 1)
    if len(data) > max_bytes:
        raise JsonError(f"it has more than {max_bytes:,} bytes")
    return parse(data)


def read_object(file: Path) -> dict[str, object]:
    """The object in a JSON file.

    Raises:
        OSError: the file cannot be read.
        JsonError: as `read_json`, or it does not contain an object.
    """
    return _object(read_json(file))


def _object(value: object) -> dict[str, object]:
    if not isinstance(value, dict):
        raise JsonError("it is not a JSON object")
    return value


def read_safetensors_header(file: Path) -> tuple[dict[str, object], int]:
    """The JSON header of a safetensors file, and where its data begin: bytes from the beginning of the file.

    Raises:
        OSError: the file cannot be read.
        JsonError: the file does not begin with such a header.
    """
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(_HEADER_LENGTH), "little")
        if size > _LARGEST_HEADER:
            raise JsonError("it has no safetensors header")
        return parse_object(opened.read(size)), _HEADER_LENGTH + size


def read_lines(file: Path, max_bytes: int = MAX_LINES_BYTES, max_line: int = MAX_LINE_BYTES) -> Iterator[Line]:
    """The lines of a text file, one after the other, so that a long file does not fill the memory.

    Raises:
        OSError: the file cannot be read.
        JsonError: the file or one of its lines is too long.
    """
    number, left = 0, max_bytes
    with file.open("rb") as opened:
        while block := opened.readline(max_line + 1):
            left -= len(block)
            if left < 0:
                raise JsonError(f"the file has more than {max_bytes:,} bytes")
            if len(block) > max_line and not block.endswith(b"\n"):
                raise JsonError(f"the line has more than {max_line:,} bytes", number + 1)
            # bytes.splitlines cuts at LF, CR LF and CR only; str.splitlines would also cut at U+2028
            for piece in block.splitlines(keepends=True):
                number += 1
                data = piece.rstrip(b"\r\n")
                yield Line(number, data, ended=len(data) < len(piece))


def read_objects(file: Path) -> Iterator[tuple[int, dict[str, object]]]:
    """The objects of a file of JSON lines with their line numbers; blank lines are skipped.

    Raises:
        UsageError: naming the file and the line: unreadable, not UTF-8, too long, not JSON.
    """
    try:
        for line in read_lines(file):
            if line.data.strip():
                try:
                    entry = parse_object(line.text())
                except JsonError as problem:
                    raise JsonError(str(problem), line.number) from None
                yield line.number, entry
    except JsonError as problem:
        raise UsageError(located(file, problem), "Write one JSON object per line, in UTF-8.") from None
    except OSError as problem:
        raise UsageError(f"'{file}' cannot be read: {problem.strerror}", "Check its name and permissions.") from None


def located(file: Path, error: JsonError) -> str:
    """What is wrong and where: `file:line: reason`, or `file: reason`."""
    return f"{file}: {error}" if error.line is None else f"{file}:{error.line}: {error}"


def write_json(file: Path, value: object) -> None:
    """Writes a JSON document in one step, indented, with a line end.

    Raises:
        StorageError: the system refused; the old contents stay.
    """
    write_atomic(file, (json.dumps(value, indent=2, allow_nan=False) + "\n").encode())


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """A JSON object with its own digest in it, so that a reader notices damage; `unsealed` takes it out again."""
    return {**content, _SEAL: _object_digest(content)}


def unsealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """The object that was sealed. One without a seal, as older versions wrote it, is taken as it is.

    Raises:
        ValueError: it was changed after it was sealed.
    """
    plain = {key: value for key, value in content.items() if key != _SEAL}
    if _SEAL in content and content[_SEAL] != _object_digest(plain):
        raise ValueError("it was changed after it was written")
    return plain


def _object_digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _decoded(data: bytes, line: int | None = None) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise JsonError(f"it is not UTF-8 (byte {error.start})", line) from None


_NESTED = f"it is nested deeper than {MAX_DEPTH} levels"


def _check_depth(value: object) -> None:
    # level by level, because what recurses over it later must not be the first to find out
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [inner for outer in level for inner in _children(outer)]
        if not level:
            return
    if any(isinstance(inner, list | dict) for inner in level):
        raise JsonError(_NESTED)


def _check_texts(value: object) -> None:
    level = [value]
    while level:
        texts = (text for outer in level for text in (outer, *(outer if isinstance(outer, dict) else ())))
        for text in texts:
            if isinstance(text, str) and not _encodable(text):
                raise JsonError("a string contains an unpaired surrogate, which is not a character")
        level = [inner for outer in level for inner in _children(outer)]


def _children(value: object) -> Iterable[object]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(text: str) -> int:
    if len(text) > _MAX_DIGITS:
        raise JsonError(f"an integer has {len(text.lstrip('-'))} digits, too many for a double")
    return int(text)


def _float(text: str) -> float:
    number = float(text)
    if number - number != 0:
        raise JsonError(f"the number {text:.40} is too large for a double")
    return number


def _constant(text: str) -> NoReturn:
    raise JsonError(f"{text} is not JSON")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    made = dict(pairs)
    if len(made) < len(pairs):
        left = dict(pairs)
        twice = next(name for name, _ in pairs if left.pop(name, _GONE) is _GONE)
        raise JsonError(f"the key {twice!r:.60} is given twice")
    return made


_GONE = object()
_DECODER = json.JSONDecoder(parse_float=_float, parse_int=_integer, parse_constant=_constant, object_pairs_hook=_unique)
_NON_FINITE = json.JSONDecoder(parse_int=_integer, object_pairs_hook=_unique)
