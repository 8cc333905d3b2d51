from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import branch_identities, forward_identities, rl_identities, variant_identities

CHECKS = [
    function
    for module in (branch_identities, forward_identities, rl_identities, variant_identities)
    for name, function in vars(module).items()
    if name.startswith("check_")
]


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__.removeprefix("check_"))
def test_identity(check: Callable[[], None]) -> None:
    check()
