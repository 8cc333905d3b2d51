from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from safetensors.torch import load_file
from torch import Tensor, nn

from fmg.core.errors import CheckpointError
from fmg.core.files import digest
from fmg.export.source import Delta
from fmg.export.weights import PAGE, lay_out, write_weights
from fmg.inference.artifact.manifest import Adapter
from fmg.models.common import adapter as adapter_module

TENSORS = {
    "b.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).bfloat16(),
    "a.weight": torch.randn(7, 2, generator=torch.Generator().manual_seed(1)),
    "ids": torch.arange(9),
    "scale": torch.tensor(2, dtype=torch.int8),
    "empty": torch.zeros(0, 4),
}


def written(file: Path, tensors: dict[str, Tensor]) -> Any:
    layout = lay_out({name: (x.dtype, tuple(x.shape)) for name, x in tensors.items()})
    entry = write_weights(file, layout, tensors.__getitem__)
    return layout, entry


def test_file_is_safetensors_with_aligned_data_and_the_hash_it_says(tmp_path: Path) -> None:
    layout, entry = written(tmp_path / "w.safetensors", TENSORS)
    stored = load_file(tmp_path / "w.safetensors")
    assert stored.keys() == TENSORS.keys()
    assert all(torch.equal(stored[name], x) for name, x in TENSORS.items())
    assert entry.sha256 == digest(tmp_path / "w.safetensors")
    assert entry.size == (tmp_path / "w.safetensors").stat().st_size
    assert len(layout.header) % PAGE == 0
    raw = (tmp_path / "w.safetensors").read_bytes()
    for name, place in layout.places.items():
        assert place.offset % place.dtype.itemsize == 0
        data = TENSORS[name].contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        assert raw[place.offset : place.offset + place.length] == data


def test_layout_depends_on_names_and_shapes_alone(tmp_path: Path) -> None:
    first, _ = written(tmp_path / "first", TENSORS)
    second, _ = written(tmp_path / "second", {name: 0 * TENSORS[name] for name in reversed(TENSORS)})
    assert first == second


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_values_out_of_range_and_other_shapes_are_refused(tmp_path: Path, bad: float) -> None:
    with pytest.raises(CheckpointError, match="'x' is not finite in float16"):
        written(tmp_path / "w", {"x": torch.tensor([1.0, bad]).half()})
    layout = lay_out({"x": (torch.float32, (2,))})
    with pytest.raises(CheckpointError, match=r"'x' is torch.float32 \(3,\) instead of"):
        write_weights(tmp_path / "v", layout, lambda name: torch.zeros(3))


def _delta(lora: dict[str, tuple[Tensor, Tensor]], scale: float, replaced: dict[str, Tensor] | None = None) -> Delta:
    return Delta(lora, replaced or {}, Adapter("", 2, 2 * scale, scale, (), "run"), "tiny", "")


@pytest.mark.parametrize("rows", [1, 40, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merge_is_that_of_peft_however_many_rows_are_merged_at_once(
    rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 96))
    stored = base[0].weight.detach().clone().to(dtype)
    base[0].weight.data = stored.float().clone()
    tuned: Any = inject_adapter_in_model(LoraConfig(r=2, lora_alpha=6.0, target_modules=["0"]), base)
    nn.init.normal_(tuned[0].lora_B["default"].weight)
    a, b = tuned[0].lora_A["default"].weight.detach().clone(), tuned[0].lora_B["default"].weight.detach().clone()
    tuned[0].merge()
    monkeypatch.setattr(adapter_module, "_ROWS_BYTES", rows * 4 * 24)
    given = _delta({"0.weight": (a, b)}, 3.0).apply("0.weight", stored, torch.float32)
    wanted = tuned[0].base_layer.weight.detach()
    assert torch.allclose(given, wanted, rtol=0, atol=1e-6 * float(wanted.abs().max()))
    rounded = _delta({"0.weight": (a, b)}, 3.0).apply("0.weight", stored, torch.bfloat16)
    assert torch.equal(rounded, given.bfloat16())


def test_what_was_trained_whole_takes_the_place_of_the_base() -> None:
    delta = _delta({}, 1.0, {"time.weight": torch.full((2,), 7.0)})
    assert delta.changed == {"time.weight"}
    assert torch.equal(delta.apply("time.weight", torch.zeros(2), torch.bfloat16), torch.full((2,), 7.0).bfloat16())
    assert torch.equal(delta.apply("other", torch.ones(2).half(), torch.float32), torch.ones(2))
