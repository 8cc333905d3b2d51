"""Interactive use of the Python API: it takes names and functions, and its results print, save and load."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from torch import Tensor

import fmg
from fmg.core.errors import UsageError
from tests.support.run_files import stop_after

pytestmark = pytest.mark.slow

TINY: dict[str, object] = {
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "eval.num": 4,
    "eval.rewards": [],
    "train.state_every": 1,
}


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images[:, 0].mean((1, 2)) - images[:, 2].mean((1, 2))


def test_a_function_trains_is_recorded_by_name_and_is_needed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cut = fmg.train("meanflow-shapes", "cut", stop_after(1), rewards=[redness], iterations=2, **TINY)
    assert cut.interrupted
    assert "redness" in Path("cut/recipe.yaml").read_text()
    assert "eval/redness_mean" in cut.initial
    with pytest.raises(UsageError, match=r"rewards=\[redness\]"):
        fmg.resume(cut)
    result = fmg.resume(cut, rewards=[redness])
    assert (result.iterations, result.interrupted) == (2, False)
    with pytest.raises(UsageError, match="'redness' is a Python function"):
        fmg.evaluate(result, num=2)
    report = fmg.evaluate(result, against="base", rewards=redness, steps=2, num=2)
    assert [row.reward for row in report.results] == ["redness"]

    assert repr(result).startswith("TrainResult('cut', 2 iterations, keeps iteration ")
    assert result.plot().width > 100
    assert [line["iteration"] for line in result.metrics] == [0, 1, 2, 2]
    assert result._repr_html_().count("<img") == 2
    assert "redness" in report._repr_html_()
    report.save("report.json")
    with fmg.load(result) as generator:
        assert len(generator.generate("a red circle", num=2)) == 2


def test_a_fresh_interpreter_prints_only_what_was_asked() -> None:
    program = "from fmg import load\nprint(load('meanflow-shapes').generate('a red circle'))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "Generated(1 image of 32 x 32 pixels)\n"
    assert done.stderr == ""
