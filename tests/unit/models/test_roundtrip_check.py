from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg.core.errors import CheckpointError
from fmg.models.common import roundtrip_check
from fmg.models.common.saved_weights import DIFFUSERS_FILE
from fmg.models.flux.model import FluxModel

CPU = torch.device("cpu")


def _trained(folder: Path, dtype: torch.dtype = torch.float32) -> FluxModel:
    model = FluxModel.from_folder(folder, CPU, dtype, name="tiny")
    model.attach_adapter(2, 6.0, ["attention"], 0.0, seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, parameter in model.trainable():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("kind", ["two_time_folder", "single_time_folder"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_save_is_read_back_by_stock_diffusers_within_the_tolerance(
    kind: str, dtype: torch.dtype, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[float] = []
    check = roundtrip_check.check_same
    monkeypatch.setattr(roundtrip_check, "check_same", lambda *args: found.append(check(*args)))
    _trained(request.getfixturevalue(kind), dtype).save_adapter(tmp_path / "adapter")
    assert len(found) == 1
    # far inside the bound, which leaves room for other kernels
    assert found[0] <= roundtrip_check.TOLERANCE[dtype] / 2


def _zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros_like(x) for name, x in tensors.items()}


def _without_the_last(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    last = sorted(tensors)[-1].removesuffix("lora_B.weight")
    return {name: x for name, x in tensors.items() if not name.startswith(last)}


@pytest.mark.parametrize("damage", [_zeros, _without_the_last])
def test_a_file_that_lost_values_is_never_reported_as_saved(
    damage: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    two_time_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read = roundtrip_check.reloaded

    def damaged(transformer: object, folder: Path, *rest: Any) -> object:
        file = folder / DIFFUSERS_FILE
        with safe_open(str(file), framework="pt") as stored:
            metadata = stored.metadata()
        save_file(damage(load_file(file)), file, metadata=metadata)
        return read(transformer, folder, *rest)

    monkeypatch.setattr(roundtrip_check, "reloaded", damaged)
    with pytest.raises(CheckpointError, match=r"are different after diffusers loads them.*not kept"):
        _trained(two_time_folder).save_adapter(tmp_path / "runs" / "adapter")
    assert list((tmp_path / "runs").iterdir()) == []


def test_an_adapter_that_is_read_back_at_another_scale_generates_another_image(
    two_time_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = roundtrip_check.reloaded

    def rescaled(transformer: object, folder: Path, *rest: Any) -> Any:
        fresh = read(transformer, folder, *rest)
        fresh.set_adapters(["default"], [0.5])
        return fresh

    monkeypatch.setattr(roundtrip_check, "reloaded", rescaled)
    with pytest.raises(CheckpointError, match=r"generate a different image after diffusers loads them.*not kept"):
        _trained(two_time_folder).save_adapter(tmp_path / "adapter")


def test_images_that_are_not_finite_verify_nothing() -> None:
    picture = torch.full((1, 3, 2, 2), torch.nan)
    with pytest.raises(CheckpointError, match="differ by nan"):
        roundtrip_check.check_same(picture, picture, torch.float32, Path("adapter"))


def test_the_fresh_transformer_shares_the_base_and_nothing_else(two_time_folder: Path) -> None:
    model = _trained(two_time_folder)
    transformer = model.components.transformer
    fresh = roundtrip_check.fresh_transformer(transformer)
    base = {name.replace(".base_layer.", "."): x for name, x in transformer.state_dict().items() if "lora" not in name}
    stored = fresh.state_dict()
    assert stored.keys() == base.keys()
    assert all(stored[name].data_ptr() == x.data_ptr() for name, x in base.items())
    assert not any(parameter.requires_grad for parameter in fresh.parameters())
    assert all(parameter.requires_grad for _, parameter in model.trainable())
