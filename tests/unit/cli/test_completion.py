"""Shell completion: what it offers, and that it does not import torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fmg.cli import completion
from fmg.cli.main import main
from fmg.core.errors import UsageError
from fmg.data.run_folder import RunFolder
from tests.unit.test_lazy_import import imported


def asked(words: str) -> dict[str, str]:
    """The variables with which bash asks for the last, unfinished word of a command line."""
    return {"_FMG_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    RunFolder.create(Path("runs/demo-1"), "meanflow-shapes")
    (tmp_path / "mine.yaml").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "offers"),
    [
        ("fmg train --model scm-s", ["scm-shapes"]),
        ("fmg train --config scm-sh", ["scm-shapes"]),
        ("fmg show asfmc-e", ["asfmc-endpoint", "asfmc-euler"]),
        ("fmg show rewards shapes-", ["shapes-clip", "shapes-quality"]),
    ],
)
@pytest.mark.usefixtures("folder")
def test_the_shell_is_offered_values(
    words: str, offers: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in asked(words).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        main([])
    said = capsys.readouterr()
    assert (said.out.split(), said.err) == (offers, "")


def test_the_shell_asks_the_program(folder: Path) -> None:
    environment = {**os.environ, **asked("fmg eval runs/d")}
    done = subprocess.run(
        [sys.executable, "-m", "fmg"], env=environment, cwd=folder, capture_output=True, text=True, check=False
    )
    assert (done.stdout.split(), done.stderr) == (["runs/demo-1"], "")


CALLS = (
    "kinds",
    "kinds_and_names",
    "recipes",
    "runs",
    "artifacts",
    "targets",
    "other_targets",
    "prompt_sets",
    "grids",
    "recipe_values",
    "components('reward')",
    "one_of('cpu')",
)


def test_no_callback_imports_torch() -> None:
    calls = "; ".join(f"completion.{call}('')" for call in CALLS)
    # the command line itself needs rich
    assert imported(f"from fmg.cli import completion; {calls}") - {"rich"} == set()


def test_offers_have_a_line_about_each(folder: Path) -> None:
    assert dict(completion.targets("mean"))["meanflow-shapes"].startswith("Embedded two-time flow map")
    assert dict(completion.other_targets("b")) == {"base": "the same model without its adapter"}
    assert ("lora.rank=", "rank of every adapted matrix") in completion.recipe_values("lora.")
    assert [name for name, _ in completion.recipes("mi")] == ["mine.yaml"]
    assert [name for name, _ in completion.runs("./runs/")] == ["./runs/demo-1"]


def test_a_callback_never_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> list[str]:
        raise UsageError("a", "b")

    monkeypatch.setattr("fmg.data.run_folder.run_names", broken)
    assert completion.runs("") == []
    assert completion.components("nonsense")("") == []
