"""Runs checks on a copy of the package in which one formula is broken.

The package and the checks are imported afresh, with the source of one module changed on the way in, so every name
that was imported from it is the broken one. The real modules come back afterwards, untouched.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).parents[2]
_FRESH = ("fmg", "tests")


@dataclass(frozen=True)
class Mutation:
    """One broken formula and the checks that must all fail.

    Attributes:
        module: dotted name of the module to break.
        old: text that occurs exactly once in its source.
        new: the replacement.
        checks: `file:function` below `tests.support`.
    """

    module: str
    old: str
    new: str
    checks: tuple[str, ...]

    @property
    def source(self) -> Path:
        return ROOT / (self.module.replace(".", "/") + ".py")

    def mutated(self) -> str:
        text = self.source.read_text(encoding="utf-8")
        if text.count(self.old) != 1:
            raise LookupError(f"{self.old!r} occurs {text.count(self.old)} times in {self.module}, not once")
        return text.replace(self.old, self.new)


class _Loader(importlib.machinery.SourceFileLoader):
    def __init__(self, mutation: Mutation) -> None:
        super().__init__(mutation.module, str(mutation.source))
        self._mutation = mutation

    def get_code(self, fullname: str) -> object:
        return compile(self._mutation.mutated(), f"<mutated {fullname}>", "exec", dont_inherit=True)


class _Finder(importlib.abc.MetaPathFinder):
    def __init__(self, mutation: Mutation) -> None:
        self._mutation = mutation

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._mutation.module:
            return None
        return spec_from_file_location(fullname, self._mutation.source, loader=_Loader(self._mutation))


@contextmanager
def imported_with(mutation: Mutation | None) -> Iterator[None]:
    """Within the block, `fmg` and `tests` are imported afresh, with the mutation if there is one."""
    saved = {name: module for name, module in sys.modules.items() if name.split(".")[0] in _FRESH}
    finder = _Finder(mutation) if mutation else None
    for name in saved:
        del sys.modules[name]
    if finder:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder:
            sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.split(".")[0] in _FRESH]:
            del sys.modules[name]
        sys.modules.update(saved)


def survivors(mutation: Mutation) -> list[str]:
    """The mutation's checks that pass although the formula is broken."""
    with imported_with(mutation):
        importlib.import_module(mutation.module)
        functions = {check: load_check(check) for check in mutation.checks}
        return [check for check, function in functions.items() if _passes(function)]


def load_check(check: str) -> object:
    """The function named `file:function` below `tests.support`, as it is imported now."""
    module, _, name = check.partition(":")
    return getattr(importlib.import_module(f"tests.support.{module}"), name)


def _passes(function: object) -> bool:
    assert callable(function)
    try:
        function()
    except (AssertionError, ValueError):
        # a broken variance may turn negative, which Gaussian and the paths refuse with a ValueError
        return False
    return True
