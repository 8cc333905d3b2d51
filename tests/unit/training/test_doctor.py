"""The examination of the installation."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError
from fmg.training import doctor
from tests.support.cli import fmg


def test_everything_is_looked_at_and_an_absent_extra_is_no_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extras", lambda: {"onnx": ["numpy"], "trt": ["numpy", "no-such-package"]})
    done = fmg("doctor", "--quick", "--json")
    checks = {(check["topic"], check["name"]): check for check in json.loads(done.stdout)}
    assert {topic for topic, _ in checks} == {"environment", "device", "storage", "extra", "index"}
    assert checks["environment", "torch"]["found"]
    assert checks["extra", "onnx"]["outcome"] == "ok"
    absent = checks["extra", "trt"]
    assert absent["outcome"] == "missing"
    assert "without no-such-package" in absent["found"]
    assert absent["advice"].startswith("pip install 'flow-map-grpo[trt]' --extra-index-url")
    assert done.code == (1 if any(check["outcome"] == "failed" for check in checks.values()) else 0)


def test_extras_come_from_the_metadata(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        "torch>=2.11",
        'onnx>=1.20; extra == "onnx"',
        "flow-map-grpo[onnx]; extra == 'trt'",
        "psutil>=5.9; extra == 'trt'",
    ]
    monkeypatch.setattr(doctor, "requires", lambda name: lines)
    assert doctor.extras() == {"onnx": ["onnx"], "trt": ["psutil"]}


def test_a_full_disk_and_a_closed_folder_are_faults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FMG_CACHE", str(tmp_path / "not" / "yet"))
    monkeypatch.setattr(doctor, "_LOW_DISK", 1 << 70)
    found = {check.name: check for check in doctor._storage()}
    assert found["cache of fmg"].outcome == "failed"
    assert "free some space" in found["cache of fmg"].advice
    monkeypatch.setattr("fmg.training.doctor.os.access", lambda path, mode: False)
    assert "cannot be written" in next(doctor._storage()).advice


def test_a_self_test_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise CheckpointError("The weights are damaged", "Install fmg again.")

    monkeypatch.setattr(doctor, "train", broken)
    check = doctor._self_test()
    assert check.outcome == "failed"
    assert "The weights are damaged" in check.found
    assert check.advice


@pytest.mark.slow
def test_the_self_test_trains() -> None:
    check = doctor._self_test()
    assert check.outcome == "ok", check
