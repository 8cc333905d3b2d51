"""How many threads ONNX Runtime is given."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.inference import load
from tests.support.tiny_artifact import build_tiny_artifact


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_artifact(tmp_path_factory.mktemp("tiny") / "artifact").folder


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("3", "3 threads"),
        (" 2 ", "2 threads"),
        ("4,2", "4 threads"),
        (None, "all cores"),
        ("", "all cores"),
        ("x", "all cores"),
        ("-3", "all cores"),
        ("0", "all cores"),
        ("1.5", "all cores"),
        ("٣", "all cores"),
        ("99999999999999999999", "all cores"),
    ],
)
def test_only_a_positive_number_is_taken(
    value: str | None, says: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if value is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", value)
    with load(folder, backend="onnxruntime", device="cpu") as generator:
        assert generator.backend.detail == f"CPUExecutionProvider, {says}, fp32"
    with load(folder, backend="onnxruntime", device="cpu", threads=5) as generator:
        assert "5 threads" in generator.backend.detail
