from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support import branch_identities, forward_identities, gradient_identities, rl_identities, variant_identities

SLOW = {branch_identities.check_the_gradient_has_its_closed_form_and_variance}
CHECKS = [
    pytest.param(function, id=name.removeprefix("check_"), marks=[pytest.mark.slow] if function in SLOW else [])
    for module in (branch_identities, forward_identities, gradient_identities, rl_identities, variant_identities)
    for name, function in vars(module).items()
    if name.startswith("check_")
]


@pytest.mark.parametrize("check", CHECKS)
def test_identity(check: Callable[[], None]) -> None:
    check()
