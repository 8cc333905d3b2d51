"""The examination of the installation."""

from __future__ import annotations

import json
from email.message import Message
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import Request

import pytest

from fmg.cli.doctor import trains
from fmg.core.errors import CheckpointError, UsageError
from fmg.inference import doctor
from fmg.version import DISTRIBUTION, RUNTIME
from tests.support.cli import fmg


def test_everything_is_checked_and_a_missing_extra_is_not_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "extras", lambda: {"onnx": ["numpy"], "trt": ["numpy", "no-such-package"]})
    done = fmg("doctor", "--quick", "--json")
    checks = {(check["topic"], check["name"]): check for check in json.loads(done.stdout)}
    assert {topic for topic, _ in checks} == {"environment", "device", "storage", "extra", "index"}
    assert checks["environment", "torch"]["found"]
    assert checks["extra", "onnx"]["outcome"] == "ok"
    absent = checks["extra", "trt"]
    assert absent["outcome"] == "missing"
    assert "not installed: no-such-package" in absent["found"]
    assert absent["advice"].startswith("pip install 'flow-map-grpo[trt]' --extra-index-url")
    assert done.code == (1 if any(check["outcome"] == "failed" for check in checks.values()) else 0)


def test_indexes_are_contacted_only_on_request(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def answer(request: Request, timeout: float) -> object:
        asked.append(request.full_url)
        raise [
            HTTPError(request.full_url, 403, "no", Message(), None),
            URLError("no\nroute"),
            TimeoutError("timed out"),
        ][len(asked) - 1]

    monkeypatch.setattr(doctor, "urlopen", answer)
    monkeypatch.setenv("HF_ENDPOINT", "https://mirror.test")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    quiet = [check for check in doctor.examine(None) if check.topic == "index"]
    assert {check.outcome for check in quiet} == {"not contacted"}
    assert asked == []
    loud = [check for check in doctor.examine(None, network=True) if check.topic == "index"]
    assert [check.outcome for check in loud] == ["ok", "failed", "failed"]
    assert "answers with 403" in loud[0].found
    assert "does not answer: no route" in loud[1].found
    assert asked[2] == "https://mirror.test"


def test_the_network_is_not_used_against_the_users_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match="forbids network access"):
        doctor.examine(None, network=True)
    (line,) = (check.found for check in doctor._storage() if check.name == "network")
    assert line.startswith("not used")


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
    monkeypatch.setattr("fmg.inference.doctor.os.access", lambda path, mode: False)
    assert "cannot be written" in next(doctor._storage()).advice


def test_a_self_test_that_fails_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object) -> None:
        raise CheckpointError("The weights are damaged", "Install fmg again.")

    monkeypatch.setattr("fmg.training.api.train", broken)
    check = trains()
    assert check.outcome == "failed"
    assert "The weights are damaged" in check.found
    assert check.advice


@pytest.mark.slow
def test_the_self_test_trains() -> None:
    check = trains()
    assert check.outcome == "ok", check


def test_the_self_test_of_the_runtime_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert doctor.computes().outcome == "ok"
    monkeypatch.setattr(doctor, "_SUM", "CAoSADo1")
    check = doctor.computes()
    assert check.outcome == "failed"
    assert check.found
    assert "--alone" in check.advice


def test_the_distribution_and_its_runtime_are_not_both_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {DISTRIBUTION: "0.1.0", RUNTIME: "0.2.0"}
    monkeypatch.setattr(doctor, "installed_version", versions.get)
    (check,) = doctor._distributions()
    assert check.outcome == "failed"
    assert check.found == "flow-map-grpo 0.1.0 and flow-map-grpo-runtime 0.2.0 share files"
    assert check.advice == "pip uninstall -y flow-map-grpo flow-map-grpo-runtime && pip install flow-map-grpo"
    versions.pop(RUNTIME)
    assert not list(doctor._distributions())
