"""The files of a graph's weights, read from the ONNX file itself without onnx. Standard library only.

A graph names the files of its external data, and every runtime follows the names. A file other than the weight file of
the manifest has no hash there, so changed contents would go unnoticed.

An ONNX file is a protobuf message. Only messages that can contain a tensor are parsed, by the field numbers of
onnx.proto (https://github.com/onnx/onnx/blob/main/onnx/onnx.proto); everything else is skipped by its length.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path

from fmg.core.errors import CheckpointError

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_MAX_VARINT = 10
_MAX_TAG = 2**32 - 1
# subgraphs nest by recursion; what fmg exports has none
_MAX_DEPTH = 100

_ENTERED: Mapping[str, Mapping[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
    "external": {},
}
"""Messages inside messages, by field number."""
_KEY, _VALUE = 1, 2
_LOCATION = b"location"


def check_external(file: Path, *weights: str) -> None:
    """Checks that all external data of a graph is in its weight files.

    Args:
        file: the ONNX file; no weights are read.
        weights: the files that the manifest names, in the same folder.

    Raises:
        CheckpointError: the file is not an ONNX file, or has weights elsewhere.
    """
    strays = external_files(file) - set(weights)
    if strays:
        named = " and ".join(weights)
        raise CheckpointError(
            f"{file} has weights in {min(strays)!r}, but the manifest says {named}", "Export the artifact again."
        )


def external_files(file: Path) -> set[str]:
    """The locations of all external data of a graph, of its subgraphs and of its functions.

    Raises:
        CheckpointError: the file is not an ONNX file.
    """
    try:
        with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
            return {place.decode(errors="backslashreplace") for place in _locations(content, 0, len(content), "model")}
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not an ONNX file ({error})", "Restore the artifact, or export it again."
        ) from None


def _locations(content: mmap.mmap, start: int, end: int, kind: str, depth: int = 0) -> Iterator[bytes]:
    if depth > _MAX_DEPTH:
        raise ValueError("its subgraphs are nested too deep")
    if kind == "external":
        yield from _location(content, start, end)
        return
    inner = _ENTERED[kind]
    for number, first, last in _fields(content, start, end):
        if number in inner:
            yield from _locations(content, first, last, inner[number], depth + 1)


def _location(content: mmap.mmap, start: int, end: int) -> Iterator[bytes]:
    """Every value of an entry with the key `location`: a reader may take any of the repeated fields."""
    fields = list(_fields(content, start, end))
    if any(number == _KEY and content[first:last] == _LOCATION for number, first, last in fields):
        yield from (content[first:last] for number, first, last in fields if number == _VALUE)


def _fields(content: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of every length-delimited field of a message."""
    at = start
    while at < end:
        tag, at = _varint(content, at, end)
        # a reader that keeps 32 bits would see another field in a longer tag
        if tag > _MAX_TAG:
            raise ValueError(f"the tag before byte {at} is too large")
        kind = tag & 7
        if kind == _VARINT:
            _, at = _varint(content, at, end)
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        elif kind == _BYTES:
            length, at = _varint(content, at, end)
            first, at = at, at + length
            if at <= end:
                yield tag >> 3, first, at
        else:
            raise ValueError(f"byte {at} does not begin a field")
        if at > end:
            raise ValueError(f"it ends inside the field before byte {at}")


def _varint(content: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    # most numbers have one byte
    if at < end and content[at] < 0x80:
        return content[at], at + 1
    value = 0
    for place in range(_MAX_VARINT):
        if at + place >= end:
            raise ValueError(f"it ends inside the number at byte {at}")
        byte = content[at + place]
        value |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return value, at + place + 1
    raise ValueError(f"the number at byte {at} does not end")
