"""A store of arrays that forgets what was not asked for longest, bounded by bytes. Standard library only."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

Row = TypeVar("Row", bound=Mapping[str, Any])


class ByteCache(Generic[Row]):
    """Least-recently-used store of rows: mappings of numpy arrays or torch tensors, which have `nbytes`.

    Args:
        capacity: bytes that the arrays of all rows may take together.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._size = 0
        self._rows: OrderedDict[str, Row] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def get(self, name: str) -> Row | None:
        """The row called `name`, which becomes the most recently used one."""
        if name in self._rows:
            self._rows.move_to_end(name)
        return self._rows.get(name)

    def put(self, name: str, row: Row) -> None:
        """Keeps a new row and drops the least recently used ones until everything fits."""
        self._rows[name] = row
        self._size += _bytes(row)
        while self._size > self._capacity:
            _, dropped = self._rows.popitem(last=False)
            self._size -= _bytes(dropped)

    def clear(self) -> None:
        """Forgets every row."""
        self._rows.clear()
        self._size = 0


def _bytes(row: Mapping[str, Any]) -> int:
    return sum(array.nbytes for array in row.values())
