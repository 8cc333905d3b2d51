from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmg.core.cache import ByteCache
from fmg.models.common.text import TextEncoders
from fmg.models.flux.loading import FluxComponents, load_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def components(two_time_folder: Path) -> FluxComponents:
    return load_folder(two_time_folder, CPU, torch.float32)


@pytest.fixture
def encoded(components: FluxComponents) -> Iterator[list[int]]:
    """Row counts of the T5 calls made during the test."""
    rows: list[int] = []
    hook = components.text.text_encoder_2.register_forward_hook(lambda _, args, __: rows.append(args[0].shape[0]))
    yield rows
    hook.remove()


def test_each_distinct_prompt_is_encoded_once_in_batches(components: FluxComponents, encoded: list[int]) -> None:
    encoders = TextEncoders(components.text, 12, CPU, batch_size=2)
    first = encoders.encode(["a", "b", "a", "c", "b"])
    assert encoded == [2, 1]
    assert first.prompts == ("a", "b", "a", "c", "b")
    assert torch.equal(first.tensors["tokens"][0], first.tensors["tokens"][2])
    assert not torch.equal(first.tensors["tokens"][0], first.tensors["tokens"][1])
    again = encoders.encode(["c", "a"])
    assert encoded == [2, 1]
    for name in ("tokens", "pooled"):
        assert torch.equal(again.tensors[name], first.tensors[name][[3, 0]])


def test_a_batch_larger_than_the_cache_is_still_right(components: FluxComponents, encoded: list[int]) -> None:
    small = TextEncoders(components.text, 12, CPU, cache_bytes=1)
    prompts = ["a red circle", "a blue square"]
    expected = TextEncoders(components.text, 12, CPU).encode(prompts)
    assert torch.equal(small.encode(prompts).tensors["tokens"], expected.tensors["tokens"])
    assert torch.equal(small.encode(prompts).tensors["pooled"], expected.tensors["pooled"])
    assert encoded == [2, 2, 2]


def test_embeddings_can_take_part_in_a_backward_pass(components: FluxComponents) -> None:
    cond = TextEncoders(components.text, 12, CPU).encode(["a red circle"])
    assert not cond.tensors["tokens"].requires_grad
    weight = torch.ones(1, requires_grad=True)
    (cond.tensors["tokens"] * weight).sum().backward()
    assert weight.grad is not None


def test_no_prompts_is_an_error(components: FluxComponents) -> None:
    with pytest.raises(ValueError, match="no prompts"):
        TextEncoders(components.text, 12, CPU).encode([])


def _row(values: int) -> dict[str, Tensor]:
    return {"tokens": torch.zeros(values), "pooled": torch.zeros(0)}


def test_the_cache_drops_what_was_used_least_recently() -> None:
    cache: ByteCache[dict[str, Tensor]] = ByteCache(capacity=3 * 4)
    for prompt in ("a", "b", "c"):
        cache.put(prompt, _row(1))
    assert cache.get("a") is not None
    cache.put("d", _row(1))
    assert cache.get("b") is None
    assert all(cache.get(prompt) is not None for prompt in ("a", "c", "d"))
    cache.put("e", _row(2))
    assert len(cache) == 2


def test_a_row_larger_than_the_cache_is_not_kept() -> None:
    cache: ByteCache[dict[str, Tensor]] = ByteCache(capacity=4)
    cache.put("a", _row(2))
    assert len(cache) == 0
