"""Every identity check on the real sources; the mutation test shows that each of them can fail."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest

from tests.support import flow_identities, stochasticizer_identities


def checks(module: ModuleType) -> list[Callable[[], None]]:
    return [value for name, value in vars(module).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", checks(flow_identities), ids=lambda check: check.__name__)
def test_flow(check: Callable[[], None]) -> None:
    check()


@pytest.mark.parametrize("check", checks(stochasticizer_identities), ids=lambda check: check.__name__)
def test_stochasticizers(check: Callable[[], None]) -> None:
    check()
