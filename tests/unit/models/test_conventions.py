from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError
from fmg.models.conventions import CONVENTIONS_FILE, read_conventions

VALID = {
    "schema": 1,
    "map": "two-time",
    "path": "linear",
    "time_scale": 1000.0,
    "second_time": "duration",
    "resolution": 32,
    "max_sequence_length": 16,
    "default_steps": 4,
    "default_grid": "uniform",
}


def _write(folder: Path, content: object) -> Path:
    (folder / CONVENTIONS_FILE).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def test_spec_of_two_time_and_single_time_maps(tmp_path: Path) -> None:
    spec = read_conventions(_write(tmp_path, VALID)).spec("a-recipe")
    assert (spec.anchors, spec.path, spec.resolution, spec.default_steps) == ("any", "linear", 32, 4)
    assert spec.default_recipe == "a-recipe"
    single = {**VALID, "map": "single-time", "second_time": "none"}
    assert read_conventions(_write(tmp_path, single)).spec("a-recipe").anchors == "endpoint"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({**VALID, "schema": 2}, "schema"),
        ({**VALID, "time_scale": 0}, "time_scale"),
        ({**VALID, "second_time": "both"}, "second_time"),
        ({**VALID, "second_time": "none"}, "two-time map cannot have second_time 'none'"),
        ({**VALID, "map": "single-time"}, "single-time map cannot have second_time 'duration'"),
        ({**VALID, "resolutoin": 32}, "resolutoin"),
        ({key: value for key, value in VALID.items() if key != "time_scale"}, "time_scale"),
        ("{", "Expecting property name"),
    ],
)
def test_unusable_conventions_are_refused_by_name(tmp_path: Path, content: object, expected: str) -> None:
    with pytest.raises(CheckpointError, match=expected):
        read_conventions(_write(tmp_path, content))


def test_a_folder_without_conventions_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"no {CONVENTIONS_FILE}"):
        read_conventions(tmp_path / "missing")
