"""Shares of rows, and that one process alone does and copies nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmg.core.errors import RewardError
from fmg.training.processes import Processes, Share


@given(total=st.integers(1, 200), count=st.integers(1, 20))
def test_shares_are_in_order_of_one_size_and_complete(total: int, count: int) -> None:
    shares = [Share(total, rank, count) for rank in range(count)]
    assert {len(share.rows) for share in shares} == {shares[0].size}
    assert [row for share in shares for row in share.rows[: share.own].tolist()] == list(range(total))
    # what `Processes.gather` cuts off is what fills up
    joined = [row for share in shares for row in share.rows.tolist()]
    assert joined[:total] == list(range(total))
    assert all(row < total for row in joined)


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
