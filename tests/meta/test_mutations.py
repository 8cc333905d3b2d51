"""Breaks every formula in turn and expects the identity checks to fail: a check that cannot fail is found here.

To guard a new formula, add a table of `Mutation` rows in `tests/support/mutations_<room>.py` and list it in `TABLES`.
"""

from __future__ import annotations

import importlib
import sys

import pytest

from tests.support import mutations_flow, mutations_rl
from tests.support.mutation import Mutation, imported_with, load_check, survivors

TABLES = (mutations_flow.MUTATIONS, mutations_rl.MUTATIONS)
MUTATIONS = tuple(mutation for table in TABLES for mutation in table)


@pytest.mark.parametrize(
    "mutation", MUTATIONS, ids=lambda m: f"{m.module.rpartition('.')[2]}-{m.old[:40]}->{m.new[:40]}".replace("\n", " ")
)
def test_broken_formula_is_noticed(mutation: Mutation) -> None:
    assert survivors(mutation) == []


def test_checks_pass_on_sources_imported_the_same_way() -> None:
    with imported_with(None):
        for check in sorted({check for mutation in MUTATIONS for check in mutation.checks}):
            load_check(check)()


def test_real_modules_come_back_and_a_stale_row_is_an_error() -> None:
    before = importlib.import_module("fmg.flow.path")
    with pytest.raises(LookupError, match="occurs 0 times"):
        survivors(Mutation("fmg.flow.path", "no such text", "", ()))
    assert sys.modules["fmg.flow.path"] is before
