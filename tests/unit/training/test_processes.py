"""Shares of rows, and that one process alone does and copies nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmg.core.errors import RewardError
from fmg.training.processes import Processes, Share


@given(total=st.integers(1, 200), count=st.integers(1, 20), unit=st.integers(1, 30))
def test_shares_are_in_order_of_as_many_calls_and_complete(total: int, count: int, unit: int) -> None:
    shares = [Share(total, rank, count, unit) for rank in range(count)]
    calls = [[rows.tolist() for rows in share.rows.split(unit)] for share in shares]
    assert {len(made) for made in calls} == {shares[0].calls}
    assert [row for share in shares for row in share.rows[: share.own].tolist()] == list(range(total))
    # a filled-up share, of which `Processes.gather` cuts off what fills up
    joined = [row for share in shares for row in [*share.rows.tolist(), *[0] * (share.size - len(share.rows))]]
    assert joined[:total] == list(range(total))
    # whole calls are those of one process alone
    alone = [rows.tolist() for rows in torch.arange(total).split(unit)]
    full = [rows for share, made in zip(shares, calls, strict=True) for rows in made[: share.own // unit]]
    assert full == [rows for rows in alone if len(rows) == unit]


def test_one_process_gets_back_what_it_gave() -> None:
    alone = Processes()
    rows = torch.arange(3.0)
    assert alone.gather(rows, 3) is rows
    assert (alone.alone, alone.first, alone.texts("a"), alone.largest(2.0)) == (True, True, ["a"], 2.0)
    assert alone.combine({"loss": 1.0, "ratio_max": 3.0}) == {"loss": 1.0, "ratio_max": 3.0}
    assert alone.on_first(lambda: None) == ""
    alone.check_stop()


def test_an_error_of_one_process_alone_is_raised_as_it_is() -> None:
    def fail() -> None:
        raise error

    error = RewardError("It failed", "Repair it.")
    with pytest.raises(RewardError) as raised:
        Processes().together(fail)
    assert raised.value is error
    assert not error.reported
