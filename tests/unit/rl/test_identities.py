from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import rl_identities

CHECKS = [function for name, function in vars(rl_identities).items() if name.startswith("check_")]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_identity(check: Callable[[], None]) -> None:
    check()
