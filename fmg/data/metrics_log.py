"""`metrics.jsonl` by columns, for reports, the list of runs and their diagnostics. Imports no torch.

A line of 40 numbers takes 320 bytes here and a microsecond or two to read, so that a log of 100,000 lines takes neither
gigabytes nor minutes. Every line is JSON by the rules of `fmg.core.json_io`.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import isfinite, nan
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray
from pydantic_core import from_json

from fmg.core.errors import CheckpointError
from fmg.core.json_io import JsonError, located, read_lines
from fmg.data.run_metrics import MAX_METRICS_BYTES, Line, as_numbers, is_evaluation, metrics_entry

Numbers = NDArray[np.float64]


@dataclass
class _Alike:
    """Lines with the same keys: their values line by line, and the position of each line among all."""

    keys: tuple[str, ...]
    values: array[float] = field(default_factory=lambda: array("d"))
    places: array[int] = field(default_factory=lambda: array("q"))


@dataclass
class Lines(Sequence[Line]):
    """The lines of one kind, in the order of the log."""

    _alike: dict[tuple[str, ...], _Alike] = field(default_factory=dict)
    _of: list[_Alike] = field(default_factory=list)
    _rows: array[int] = field(default_factory=lambda: array("q"))

    def append(self, line: Line) -> None:
        self._add(tuple(line), list(line.values()))

    def _add(self, keys: tuple[str, ...], values: list[float]) -> None:
        alike = self._alike.get(keys)
        if alike is None:
            alike = self._alike[keys] = _Alike(keys)
        # adds all values, or none if one is not a number
        alike.values.fromlist(values)
        alike.places.append(len(self))
        self._rows.append(len(alike.places) - 1)
        self._of.append(alike)

    def __len__(self) -> int:
        return len(self._of)

    @overload
    def __getitem__(self, index: int) -> Line: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Line]: ...
    def __getitem__(self, index: int | slice) -> Line | Sequence[Line]:
        """The line at an index, as a new mapping, or those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        alike, row = self._of[index], self._rows[index]
        count = len(alike.keys)
        return dict(zip(alike.keys, alike.values[row * count : (row + 1) * count], strict=True))

    def __iter__(self) -> Iterator[Line]:
        return (self[i] for i in range(len(self)))

    def logged(self) -> list[str]:
        """The keys of all lines, each once."""
        return list(dict.fromkeys(key for keys in self._alike for key in keys))

    def columns(self, *keys: str, optional: str | None = None) -> tuple[Numbers, ...]:
        """The positions of the lines that have all of these keys, and the values of each key.

        Args:
            keys: keys of the log.
            optional: a key whose values come last, 0 where a line does not have it.
        """
        wanted = (*keys, optional) if optional else keys
        parts = [np.empty((0, len(wanted) + 1))]
        for known, alike in self._alike.items():
            if not set(keys) <= set(known):
                continue
            rows = np.frombuffer(alike.values).reshape(-1, len(known))
            shown = [rows[:, known.index(key)] if key in known else np.zeros(len(rows)) for key in wanted]
            parts.append(np.stack([np.frombuffer(alike.places, np.int64), *shown], axis=1))
        found = np.concatenate(parts)
        if len(parts) > 2:
            found = found[found[:, 0].argsort(kind="stable")]
        return tuple(found.T)


@dataclass(frozen=True)
class MetricsLog:
    """The lines of a run: those of iterations and those of evaluations."""

    iterations: Lines
    evaluations: Lines

    @classmethod
    def of(cls, lines: Sequence[Line]) -> MetricsLog:
        """Sorts lines that have already been read."""
        log = cls(Lines(), Lines())
        for line in lines:
            (log.evaluations if is_evaluation(line) else log.iterations).append(line)
        return log

    @classmethod
    def read(cls, path: Path, *, strict: bool = False) -> MetricsLog:
        """Reads a `metrics.jsonl` of at most `MAX_METRICS_BYTES`; an unfinished last line is left out, a missing file
        has no lines. Null, written for a value that is not finite, becomes NaN.

        Args:
            path: path of the file.
            strict: whether a value that is not a number, or a line that does not name its iteration, is an error;
                otherwise it is left out.

        Raises:
            CheckpointError: a line is not a JSON object, or as `strict` says.
        """
        log = cls(Lines(), Lines())
        kinds: dict[tuple[str, ...], Lines] = {}
        try:
            for line in read_lines(path, MAX_METRICS_BYTES) if path.is_file() else ():
                if not line.ended:
                    continue
                values = _quick(line.data)
                if values is None or (strict and not isfinite(values.get("iteration", nan))):
                    values = as_numbers(path, line.number, metrics_entry(path, line), strict=strict)
                keys = tuple(values)
                kind = kinds.get(keys)
                if kind is None:
                    kind = kinds[keys] = log.evaluations if is_evaluation(values) else log.iterations
                kind._add(keys, list(values.values()))
        except JsonError as error:
            raise CheckpointError(located(path, error), "Move the file away, or shorten it.") from None
        return log

    @property
    def done(self) -> int:
        found = np.concatenate([kind.columns("iteration")[1] for kind in (self.iterations, self.evaluations)])
        return int(found[np.isfinite(found)].max(initial=0))

    def columns(self, key: str, error: str | None = None) -> tuple[Numbers, Numbers, Numbers]:
        """The iterations at which a key was logged, its values, and their standard errors, 0 where there is none."""
        for kind in (self.iterations, self.evaluations):
            _, at, values, *errors = kind.columns("iteration", key, optional=error)
            if len(at):
                return at, values, errors[0] if errors else np.zeros(len(at))
        return np.empty(0), np.empty(0), np.empty(0)


def _quick(data: bytes) -> dict[str, float] | None:
    """The numbers of a line by a parser five times as fast; None for a line that needs the strict reader."""
    try:
        found = from_json(data)
    except ValueError:
        return None
    # as many keys as quoted texts: no key twice, and no text among the values
    if not isinstance(found, dict) or data.count(b'"') != 2 * len(found):
        return None
    for value in found.values():
        if type(value) is not float and (type(value) is not int or abs(value) > 1 << 63):
            return None
    return found
