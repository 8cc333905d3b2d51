from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fmg.core.cache import ByteCache
from fmg.models.common.text import TextCache, TextEncoders, encoder_key
from fmg.models.flux.loading import FLUX, FluxComponents, load_folder

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


PROMPTS = ["a red circle", "a blue square, curly “quotes”", ""]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


def encoders(components: FluxComponents, disk: TextCache | None) -> TextEncoders:
    return TextEncoders(components.text, 12, CPU, batch_size=1, disk=disk)


def forbid_encoding(components: FluxComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a prompt was encoded again")

    monkeypatch.setattr(type(components.text.text_encoder_2), "forward", refuse)


def test_a_hit_is_a_miss_bit_for_bit(components: FluxComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    key = encoder_key(components.folder, FLUX.text_folders, 12, torch.float32, CPU)
    without = encoders(components, None).encode(PROMPTS)
    miss = encoders(components, TextCache(key)).encode(PROMPTS)
    forbid_encoding(components, monkeypatch)
    hit = encoders(components, TextCache(key)).encode(PROMPTS[::-1])
    for name in ("tokens", "pooled"):
        assert torch.equal(miss.tensors[name], without.tensors[name])
        assert torch.equal(hit.tensors[name], without.tensors[name].flip(0))


def test_bf16_rows_come_back_as_they_were() -> None:
    row = {"tokens": torch.randn(3, 4).bfloat16(), "pooled": torch.randn(4).bfloat16()}
    TextCache("key").put("a", row)
    stored = TextCache("key").get("a")
    assert stored is not None
    assert stored.keys() == row.keys()
    assert all(torch.equal(stored[name], x) and stored[name].dtype == x.dtype for name, x in row.items())
    assert TextCache("key").get("b") is None
    assert TextCache("other").get("a") is None


def test_a_damaged_file_is_computed_again(components: FluxComponents, tmp_path: Path) -> None:
    expected = encoders(components, TextCache("key")).encode(PROMPTS)
    truncated, *flipped = (tmp_path / "cache" / "text" / "key").iterdir()
    truncated.write_bytes(b"\0" * 10)
    for file in flipped:
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
    again = encoders(components, TextCache("key")).encode(PROMPTS)
    assert torch.equal(again.tensors["tokens"], expected.tensors["tokens"])
    assert TextCache("key").get(PROMPTS[0]) is not None


def test_the_key_is_that_of_everything_that_decides_an_embedding(two_time_folder: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(two_time_folder, tmp_path / "copy"))
    key = encoder_key(two_time_folder, FLUX.text_folders, 12, torch.float32, CPU)
    assert encoder_key(folder, FLUX.text_folders, 12, torch.float32, CPU) == key
    others = {
        encoder_key(folder, FLUX.text_folders, 13, torch.float32, CPU),
        encoder_key(folder, FLUX.text_folders, 12, torch.bfloat16, CPU),
        encoder_key(folder, FLUX.text_folders, 12, torch.float32, torch.device("cuda")),
    }
    weights = folder / "text_encoder_2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    others.add(encoder_key(folder, FLUX.text_folders, 12, torch.float32, CPU))
    assert len(others | {key}) == 5
