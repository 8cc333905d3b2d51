from __future__ import annotations

import pytest
import torch

from fmg.core.types import Batch, Conditioning, SharedRows

CPU = torch.device("cpu")


def _cond(prompts: int = 3) -> Conditioning:
    tokens = torch.arange(prompts * 8, dtype=torch.float32).reshape(prompts, 4, 2)
    return Conditioning(tuple("abcdefgh"[:prompts]), {"tokens": tokens, "pooled": tokens[:, 0]})


def test_selected_rows_are_those_that_indexing_gives() -> None:
    cond = _cond()
    rows = torch.tensor([2, 0, 0, 1, 2])
    picked = cond.select(rows)
    assert picked.prompts == ("c", "a", "a", "b", "c")
    assert len(picked) == 5
    for name, tensor in cond.tensors.items():
        assert torch.equal(picked.tensors[name], tensor[rows])
    again = picked.select(torch.tensor([4, 1]))
    assert again.prompts == ("c", "a")
    assert torch.equal(again.tensors["tokens"], cond.tensors["tokens"][torch.tensor([2, 0])])


def test_any_number_of_selected_rows_shares_one_copy() -> None:
    cond = _cond()
    rows = torch.arange(3).repeat_interleave(1000)
    batch = Batch({"advantage": torch.zeros(3000)}, cond.select(rows).to(CPU))
    part = next(batch.split(7))
    for selected in (batch.cond, part.cond, part.select(torch.tensor([6, 0])).cond):
        for name, tensor in selected.stored.items():
            assert tensor.data_ptr() == cond.tensors[name].data_ptr()
    assert part.cond.tensors["tokens"].shape == (7, 4, 2)


def test_gathered_rows_are_a_copy_of_their_own() -> None:
    cond = _cond()
    picked = cond.select(torch.tensor([1]))
    picked.tensors["tokens"].zero_()
    assert bool(cond.tensors["tokens"][1].any())


def test_rows_and_prompts_must_agree() -> None:
    cond = _cond()
    with pytest.raises(ValueError, match="'tokens' has 3 rows for 2 prompts"):
        Conditioning(("a", "b"), cond.tensors)
    with pytest.raises(ValueError, match="2 rows for 1 prompts"):
        Conditioning(("a",), SharedRows(cond.tensors, torch.tensor([0, 1])))
    with pytest.raises(IndexError):
        cond.select(torch.tensor([3]))


def test_a_model_without_conditioning_selects_prompts_alone() -> None:
    assert Conditioning(("a", "b"), {}).select(torch.tensor([1, 1])).prompts == ("b", "b")
