from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fmg.core.errors import CheckpointError
from fmg.core.files import SUMS
from fmg.registry import optimizers
from fmg.training.state_files import read_state, write_state
from tests.support.run_files import flip_bit


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return type(b) is dict and list(a) == list(b) and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and a == b


def test_nested_values_come_back_as_they_were(tmp_path: Path) -> None:
    shared = torch.arange(6.0).reshape(2, 3)
    value = {
        "numbers": [1, 0.1 + 0.2, True, None, "text", (1, (2.5,))],
        "by index": {0: shared, 1: shared, 7: {"step": torch.tensor(3.0)}},
        "slices": [shared[:, 1], shared.T, shared.bfloat16(), torch.zeros(0)],
        "bytes": torch.arange(256, dtype=torch.uint8),
        "empty": {},
    }
    write_state(tmp_path, value)
    assert _same(value, read_state(tmp_path))


@pytest.mark.parametrize("name", ["adamw", "sgd", "muon", "adafactor"])
def test_the_state_of_every_optimizer_survives(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = optimizers.build(name)(model.named_parameters())
    model(torch.ones(5, 3)).square().mean().backward()
    optimizer.step()
    state = optimizer.state_dict()
    write_state(tmp_path, {"optimizer": state})
    assert _same({"optimizer": state}, read_state(tmp_path))


def test_what_neither_file_can_hold_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="a set cannot be saved"):
        write_state(tmp_path, {"targets": {"to_q"}})


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "state.json").unlink(),
        lambda folder: (folder / SUMS).write_text(""),
        lambda folder: (folder / SUMS).write_text((folder / SUMS).read_text().replace("safe", "sage")),
        lambda folder: flip_bit(folder / "state.safetensors"),
        lambda folder: (folder / "state.json").write_text('{"$pickle": "x"}'),
        lambda folder: (folder / "state.json").write_text("[]"),
        lambda folder: (folder / "state.json").write_text("{"),
        lambda folder: (folder / "state.safetensors").write_bytes(b"\x80\x04 no safetensors"),
        lambda folder: (folder / "state.safetensors").write_bytes((folder / "state.safetensors").read_bytes()[:-4]),
    ],
)
def test_a_damaged_state_is_one_clear_error(damage: Any, tmp_path: Path) -> None:
    write_state(tmp_path, {"x": torch.ones(3)})
    damage(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_state(tmp_path)
