"""Checkpoints: what is read and refused, converted once, and put into a model with exactly its tensors."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPModel

from fmg.core.cache import cache_dir, content_hash
from fmg.core.errors import CheckpointError, FmgWarning
from fmg.registry import rewards
from fmg.rewards.clip import affine_head, from_open_clip, open_clip_config
from fmg.rewards.network import load_module, read_json, read_renamed, read_tensors
from tests.tiny_rewards import Tiny, head_shapes, random_tensors, write_clip_folder, write_open_clip

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2, dtype=torch.float16)}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "cache"))


class Attack:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (print, ("code of the file ran",))


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: {"state_dict": x, "epoch": 3}, lambda x: {"model": x}])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_of_every_form(tmp_path: Path, wrap: object, zipped: bool) -> None:
    file = tmp_path / "a.pt"
    assert callable(wrap)
    torch.save(wrap(TENSORS), file, _use_new_zipfile_serialization=zipped)
    read = read_tensors(file)
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_no_code_of_a_file_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.pt"
    for data in (Attack(), {"state_dict": {"a": Attack()}}):
        torch.save(data, file)
        with pytest.raises(CheckpointError, match="can run code"):
            read_tensors(file)
        file.write_bytes(pickle.dumps(data, protocol=2))
        with pytest.raises(CheckpointError):
            read_tensors(file)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_damaged_files(tmp_path: Path, suffix: str) -> None:
    file = tmp_path / f"a{suffix}"
    if suffix == ".pt":
        torch.save(TENSORS, file)
    else:
        save_file(TENSORS, file)
    whole = file.read_bytes()
    for data in (b"", b"nonsense", whole[: len(whole) // 2]):
        file.write_bytes(data)
        with pytest.raises(CheckpointError, match=r"a\.(pt|safetensors)"):
            read_tensors(file)
    file.unlink()
    with pytest.raises(CheckpointError):
        read_tensors(file)


@pytest.mark.parametrize("data", [[1, 2], {"a": 1}, {"state_dict": [torch.ones(1)]}, torch.ones(2)])
def test_what_is_not_a_state_dict(tmp_path: Path, data: object) -> None:
    torch.save(data, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match="not a mapping of names to tensors"):
        read_tensors(tmp_path / "a.pt")


def test_a_torch_file_is_converted_once_and_again_when_it_changes(tmp_path: Path) -> None:
    file, calls = tmp_path / "a.pt", []

    def rename(tensors: object) -> dict[str, torch.Tensor]:
        calls.append(tensors)
        assert isinstance(tensors, dict)
        return {f"new.{name}": tensor.t() for name, tensor in tensors.items()}

    torch.save(TENSORS, file)
    first, second = (read_renamed(file, "layout-1", rename) for _ in range(2))
    assert len(calls) == 1
    converted = cache_dir() / "rewards" / f"{content_hash(file)}-layout-1" / "tensors.safetensors"
    assert load_file(converted).keys() == first.keys() == second.keys() == {"new.a", "new.b"}
    assert torch.equal(second["new.a"], TENSORS["a"].T)
    read_renamed(file, "layout-2", rename)
    torch.save({"a": torch.zeros(1)}, file)
    assert torch.equal(read_renamed(file, "layout-1", rename)["new.a"], torch.zeros(1))
    assert len(calls) == 3
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_renamed(tmp_path / "none.pt", "layout-1", rename)


def test_a_torch_file_is_read_where_the_cache_cannot_be_written(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "a.pt")
    # a file where the folder should be: permissions do not stop root
    (tmp_path / "cache").touch()
    with pytest.warns(FmgWarning, match="cannot be written"):
        read = read_renamed(tmp_path / "a.pt", "layout-1", dict)
    assert torch.equal(read["a"], TENSORS["a"])


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path) -> None:
    file = tmp_path / "a.pt"
    torch.save({"visual.trunk.x": torch.ones(1)}, file)
    with pytest.raises(CheckpointError, match=r"visual\.trunk\.x"):
        read_renamed(file, "layout-1", from_open_clip)
    assert not list((cache_dir() / "rewards").rglob("*"))


def module(tiny: Tiny, tensors: dict[str, torch.Tensor]) -> None:
    config = open_clip_config(tiny.folder / "open_clip_config.json")
    load_module(CLIPModel, config, tensors, tiny.file, torch.device("cpu"), torch.float32)


def test_a_module_gets_exactly_its_tensors(tmp_path: Path) -> None:
    tiny = write_open_clip(tmp_path)
    tensors = from_open_clip(tiny.tensors)
    module(tiny, tensors | {"text_model.embeddings.position_ids": torch.zeros(1, 77)})
    name = "visual_projection.weight"
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        module(tiny, {key: x for key, x in tensors.items() if key != name})
    with pytest.raises(CheckpointError, match="does not have: extra"):
        module(tiny, tensors | {"extra": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=f"different shapes than the model: {name}"):
        module(tiny, tensors | {name: torch.zeros(3, 3)})


def test_weights_of_another_architecture_are_refused(tmp_path: Path) -> None:
    tiny = write_open_clip(tmp_path / "hps")
    (tiny.folder / "open_clip_config.json").unlink()
    folder = write_clip_folder(tmp_path / "clip")
    reward = rewards.build("hpsv2", {"weights": str(tiny.file), "tokenizer": str(folder)})
    with pytest.raises(CheckpointError, match=r"HPS_v2\.1_compressed\.pt"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])
    (tiny.folder / "open_clip_config.json").write_text('{"model_cfg": {"vision_cfg": {}}}')
    reward = rewards.build("hpsv2", {"weights": str(tiny.file), "tokenizer": str(folder)})
    with pytest.raises(CheckpointError, match=r"open_clip_config\.json"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])


@pytest.mark.parametrize("text", ["", "[1]", "{", "\udcff"])
def test_json_that_is_not_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"a\.json"):
        read_json(tmp_path / "a.json")


def test_the_affine_head_is_the_product_of_its_layers() -> None:
    tensors = random_tensors(head_shapes(7))
    head = affine_head(tensors)
    features = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    expected = features.double()
    for layer in (0, 2, 4, 6, 7):
        expected = expected @ tensors[f"layers.{layer}.weight"].double().T + tensors[f"layers.{layer}.bias"].double()
    torch.testing.assert_close(head(features).double(), expected.squeeze(1), rtol=0, atol=1e-6)


def test_heads_that_are_not_five_fitting_layers() -> None:
    tensors = random_tensors(head_shapes(7))
    with pytest.raises(CheckpointError, match=r"layers\.6\.bias"):
        affine_head({name: x for name, x in tensors.items() if name != "layers.6.bias"})
    with pytest.raises(CheckpointError, match=r"layers\.8\.bias"):
        affine_head(tensors | {"layers.8.bias": torch.ones(1)})
    with pytest.raises(CheckpointError, match="do not fit each other"):
        affine_head(tensors | {"layers.4.weight": torch.ones(2, 3)})
    with pytest.raises(CheckpointError, match="do not fit each other"):
        affine_head(tensors | {"layers.7.weight": torch.ones(2, 6), "layers.7.bias": torch.ones(2)})


def test_heads_and_models_that_do_not_belong_together(tmp_path: Path) -> None:
    folder = write_clip_folder(tmp_path / "clip")
    torch.save(random_tensors(head_shapes(7)), tmp_path / "head.pth")
    reward = rewards.build("aesthetic", {"weights": str(folder), "head": str(tmp_path / "head.pth")})
    with pytest.raises(CheckpointError, match="takes 7 numbers, but the model gives 24"):
        reward(torch.zeros(1, 3, 32, 32), ["x"])
