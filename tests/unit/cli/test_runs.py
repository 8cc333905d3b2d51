from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import pytest

from fmg.core.json_io import sealed, unsealed
from fmg.data.run_folder import RunFolder
from tests.support.cli import fmg
from tests.support.pages import made_up_run


@pytest.fixture
def two_runs(tmp_path: Path) -> Path:
    root = tmp_path / "runs"
    first = RunFolder.create(None, "meanflow-shapes", root=root, now=datetime(2030, 1, 1).astimezone())
    first.append_metrics({"iteration": 0, "eval/shapes_strict_mean": 0.25, "eval/shapes_mean": 0.5})
    first.append_metrics({"iteration": 1, "reward/mean": 0.5, "grad_norm": float("nan")})
    first.append_metrics({"iteration": 2, "reward/mean": 0.75})
    first.append_metrics({"iteration": 2, "eval/shapes_strict_mean": 0.5, "eval/shapes_mean": 0.75})
    first.set_state("finished")
    RunFolder.create(None, "scm-shapes", root=root, now=datetime(2030, 1, 2).astimezone())
    return root


def test_runs_show_scores_before_and_after(two_runs: Path) -> None:
    lines = fmg("runs", str(two_runs)).stdout.splitlines()
    finished = next(line for line in lines if "finished" in line)
    assert "meanflow-shapes" in finished
    assert "0.500 -> 0.750" in finished
    assert "shapes strict 0.250 -> 0.500" in finished
    running = next(line for line in lines if "running" in line)
    assert "- -> -" in running


def test_runs_as_json(two_runs: Path) -> None:
    first, second = json.loads(fmg("runs", str(two_runs), "--json").stdout)
    assert first["iterations"] == 2
    assert first["reward"] == {"name": "reward/mean", "before": 0.5, "after": 0.75}
    assert first["held_out"] == {"name": "shapes strict", "before": 0.25, "after": 0.5, "last": 0.5}
    assert (first["kept"], first["averaged"]) == (None, False)
    assert second["reward"]["after"] is None


def test_the_result_is_the_checkpoint_that_is_kept(tmp_path: Path) -> None:
    """If the last evaluation is of another checkpoint, it is shown beside the kept one."""
    made_up_run(tmp_path / "raw")
    made_up_run(tmp_path / "averaged", averaged=True)
    averaged, raw = sorted(json.loads(fmg("runs", str(tmp_path), "--json").stdout), key=lambda row: row["run"])
    assert (raw["kept"], raw["averaged"], raw["iterations"]) == (1, False, 3)
    assert raw["held_out"] == pytest.approx({"name": "shapes strict", "before": 0.3, "after": 0.32, "last": 0.36})
    assert (averaged["kept"], averaged["averaged"]) == (1, True)
    assert averaged["held_out"] == pytest.approx({"name": "shapes strict", "before": 0.3, "after": 0.42, "last": 0.46})
    shown = " ".join(fmg("runs", str(tmp_path)).stdout.split())
    assert "1 (EMA) shapes strict 0.300 -> 0.420 0.460" in shown


def test_no_runs_yet_says_how_to_make_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for command in (["runs"], ["runs", "."]):
        shown = fmg(*command)
        assert shown.code == 0
        assert "fmg train" in shown.stdout


def test_a_damaged_run_is_a_row_and_the_others_are_shown(two_runs: Path) -> None:
    first, second = sorted(two_runs.iterdir())
    first.joinpath("metrics.jsonl").write_text('{"iteration": 1, "reward/mean": NaN}\n{"iteration": Infinity}\n')
    second.joinpath("metrics.jsonl").write_bytes(b"\xff\xfe\n{\n")
    third = two_runs / "third"
    third.mkdir()
    third.joinpath("run.json").write_text('{"schema": 1, "model": 3, "created": "2030-01-03", "state": "running"}')
    shown = json.loads(fmg("runs", str(two_runs), "--json").stdout)
    assert [(Path(row["run"]), row["state"]) for row in shown] == [
        (first, "finished"),
        (second, "damaged"),
        (third, "damaged"),
    ]
    assert shown[0]["iterations"] == 1
    assert shown[0]["reward"]["after"] is None
    said = fmg("runs", str(two_runs))
    assert said.stdout.count(" damaged ") == 2
    assert "metrics.jsonl:1: the line is damaged: it is not UTF-8" in said.stderr
    assert "third/run.json' is damaged (the model is not a name)" in said.stderr
    assert said.stderr.count("warning: ") == 2


@pytest.mark.parametrize("line", ['{"iteration": 1' + "0" * 400 + "}", "[" * 9999, '{"iteration": 1, "iteration": 2}'])
def test_one_bad_line_leaves_the_other_runs_alone(line: str, two_runs: Path) -> None:
    first, _ = sorted(two_runs.iterdir())
    first.joinpath("recipe.yaml").write_text("model: {name: meanflow-shapes}\n")
    with first.joinpath("metrics.jsonl").open("a") as metrics:
        metrics.write(f"{line}\n")
    shown = fmg("runs", str(two_runs))
    assert shown.code == 0
    assert f"{first}/metrics.jsonl:5: the line is damaged" in shown.stderr
    assert [row.split()[2] for row in shown.stdout.splitlines()[2:]] == ["damaged", "running"]
    for command in (("report", str(first)), ("doctor", "run", str(first))):
        refused = fmg(*command)
        assert refused.code == 1
        assert f"{first}/metrics.jsonl:5: the line is damaged" in refused.stderr


def test_a_name_from_a_file_does_nothing_to_the_terminal(two_runs: Path) -> None:
    first, _ = sorted(two_runs.iterdir())
    state = unsealed(json.loads(first.joinpath("run.json").read_text()))
    for name in ("\x1b]0;TITLE\x07\x1b[31mred", "a\nb", "\x9b31m", "\u202egnp"):
        first.joinpath("run.json").write_text(json.dumps(sealed(state | {"model": name})))
        table, document = fmg("runs", str(two_runs)).stdout, fmg("runs", str(two_runs), "--json").stdout
        assert table.replace("\n", "").isprintable()
        assert document.replace("\n", "").isprintable()
        assert len(table.splitlines()) == 4
        assert json.loads(document)[0]["model"] == name
