from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fmg.core.events import Event, StageProgress
from fmg.models.conventions import CONVENTIONS_FILE
from pretraining.folder import load_model
from pretraining.pipeline import pretrain
from pretraining.settings import (
    AutoencoderSettings,
    DistillSettings,
    FlowSettings,
    PretrainSettings,
    TrajectorySettings,
    TransformerSettings,
)
from pretraining.shapes import ShapesWorld

TWO_TIME, SINGLE_TIME = "meanflow-shapes", "scm-shapes"

TINY = PretrainSettings(
    autoencoder=AutoencoderSettings(width=4, pool=32, steps=2, batch=4),
    transformer=TransformerSettings(num_single_layers=1, attention_head_dim=8, axes_dims_rope=(4, 2, 2)),
    flow=FlowSettings(pool=32, steps=2, schedule_steps=2, batch=4),
    trajectories=TrajectorySettings(count=8, batch=4, subdivisions=1),
    two_time=DistillSettings(steps=2, batch=4),
    single_time=DistillSettings(steps=2, batch=4),
    evaluation_images=8,
)


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{path.parent.name}/{name}": tensor
        for path in sorted(folder.glob("*/*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    figures = pretrain(ShapesWorld(), TINY, folder, seed=3)
    assert set(figures) == {TWO_TIME, SINGLE_TIME}
    assert all(set(by_steps) == {1, 2, 4} for by_steps in figures.values())
    return folder


@pytest.mark.parametrize(
    ("name", "kind", "second_time"), [(TWO_TIME, "two-time", "duration"), (SINGLE_TIME, "single-time", "none")]
)
def test_a_folder_states_its_facts_and_loads(made: Path, name: str, kind: str, second_time: str) -> None:
    facts = json.loads((made / name / CONVENTIONS_FILE).read_text())
    assert (facts["map"], facts["second_time"], facts["time_scale"]) == (kind, second_time, 1000.0)
    assert load_model(made / name).net.transformer.config.second_time == second_time
    assert {tensor.dtype for tensor in _weights(made / name).values()} == {torch.float16}
    card = (made / name / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "{" not in card


def test_no_machine_path_is_written(made: Path) -> None:
    for path in made.glob("*-shapes/**/*.json"):
        assert str(made) not in path.read_text()
        assert "_name_or_path" not in path.read_text()


@pytest.mark.slow
def test_finished_stages_are_reused_and_a_lost_one_is_remade_bit_for_bit(made: Path) -> None:
    before = _weights(made / TWO_TIME)
    events: list[Event] = []
    pretrain(ShapesWorld(), TINY, made, seed=3, progress=events.append)
    assert not [event for event in events if isinstance(event, StageProgress)]
    (lost,) = (made / "stages").glob(f"{TWO_TIME}-*.safetensors")
    lost.unlink()
    pretrain(ShapesWorld(), TINY, made, seed=3, progress=events.append)
    assert {event.stage for event in events if isinstance(event, StageProgress)} == {TWO_TIME}
    for name, tensor in _weights(made / TWO_TIME).items():
        assert torch.equal(tensor, before[name])


def test_another_world_finds_no_finished_stage(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "copy")
    events: list[Event] = []
    pretrain(ShapesWorld(wrong_share=0.5), TINY, tmp_path / "copy", seed=3, progress=events.append)
    assert {"autoencoder", "flow", "trajectories"} <= {e.stage for e in events if isinstance(e, StageProgress)}


def test_another_seed_gives_other_weights(made: Path, tmp_path: Path) -> None:
    pretrain(ShapesWorld(), TINY, tmp_path, seed=4)
    first, second = _weights(made / SINGLE_TIME), _weights(tmp_path / SINGLE_TIME)
    assert any(not torch.equal(first[name], second[name]) for name in first)
