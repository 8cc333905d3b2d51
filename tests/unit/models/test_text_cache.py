"""Embeddings that were computed once are read back bit for bit, and only for the same encoders."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from fmg.models.common.text import TextEncoders
from fmg.models.flux.loading import FluxComponents, load_folder
from fmg.models.flux.model import ENCODER_FOLDERS
from fmg.models.text_cache import TextCache, encoder_key

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square, curly “quotes”", ""]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def components(two_time_folder: Path) -> FluxComponents:
    return load_folder(two_time_folder, CPU, torch.float32)


def encoders(components: FluxComponents, disk: TextCache | None) -> TextEncoders:
    return TextEncoders(components.text, 12, CPU, batch_size=1, disk=disk)


def forbid_encoding(components: FluxComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        pytest.fail("a prompt was encoded again")

    monkeypatch.setattr(type(components.text.text_encoder_2), "forward", refuse)


def test_a_hit_is_a_miss_bit_for_bit(components: FluxComponents, monkeypatch: pytest.MonkeyPatch) -> None:
    key = encoder_key(components.folder, ENCODER_FOLDERS, 12, torch.float32, CPU)
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
    key = encoder_key(two_time_folder, ENCODER_FOLDERS, 12, torch.float32, CPU)
    assert encoder_key(folder, ENCODER_FOLDERS, 12, torch.float32, CPU) == key
    others = {
        encoder_key(folder, ENCODER_FOLDERS, 13, torch.float32, CPU),
        encoder_key(folder, ENCODER_FOLDERS, 12, torch.bfloat16, CPU),
        encoder_key(folder, ENCODER_FOLDERS, 12, torch.float32, torch.device("cuda")),
    }
    weights = folder / "text_encoder_2" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    others.add(encoder_key(folder, ENCODER_FOLDERS, 12, torch.float32, CPU))
    assert len(others | {key}) == 5
