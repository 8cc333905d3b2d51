"""Registers the test models for the duration of each test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fmg.registry import models
from fmg.registry.catalog import REGISTRIES
from tests.unit.recipe.components import MODELS


@pytest.fixture(autouse=True)
def _test_models() -> Iterator[None]:
    saved = [(dict(r._rows), dict(r._configs), dict(r._factories)) for r in REGISTRIES]
    for name, config in MODELS.items():
        models.add(name, f"{config.__module__}:{config.__name__}", f"{config.__module__}:none", "for tests")
    yield
    for registry, (rows, configs, factories) in zip(REGISTRIES, saved, strict=True):
        registry._rows, registry._configs, registry._factories = rows, configs, factories


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes `r.yaml` into the working directory and returns its relative path."""
    monkeypatch.chdir(tmp_path)

    def _write(text: str | bytes) -> Path:
        path = Path("r.yaml")
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return _write
