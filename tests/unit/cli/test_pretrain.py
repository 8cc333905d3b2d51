"""`fmg pretrain` without the tool."""

from __future__ import annotations

from pathlib import Path

import pytest

from fmg.cli.main import main


def test_an_installed_package_says_where_the_tool_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fmg.cli.pretrain.CHECKOUT", tmp_path)
    assert main(["pretrain", "shapes", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "tools/pretraining" in said
    assert len(said.splitlines()) == 1
