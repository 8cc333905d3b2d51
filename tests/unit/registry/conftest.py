"""Removes what a test registers."""

from __future__ import annotations

from tests.unit.recipe.conftest import _test_models as _test_models
