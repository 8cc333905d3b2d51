from __future__ import annotations

import json
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.files import write_atomic
from fmg.data.run_folder import RunFolder, is_run, list_runs, newest_run
from fmg.data.run_metrics import read_metrics

NOON = datetime(2026, 3, 4, 12, 30, 5)


def test_names_count_up_within_a_second(tmp_path: Path) -> None:
    runs = [RunFolder.create(None, "toy", root=tmp_path, now=NOON) for _ in range(3)]
    assert [run.path.name for run in runs] == ["toy-20260304-123005", "toy-20260304-123005-2", "toy-20260304-123005-3"]
    assert all(run.samples.is_dir() and run.checkpoints.is_dir() for run in runs)
    state = runs[0].state()
    assert (state.model, state.state, state.created) == ("toy", "running", "2026-03-04T12:30:05")


def test_runs_are_listed_by_when_they_began(tmp_path: Path) -> None:
    assert list_runs(tmp_path / "none") == []
    assert newest_run(tmp_path) is None
    later = RunFolder.create(None, "a", root=tmp_path, now=NOON + timedelta(days=300))
    named = RunFolder.create(tmp_path / "zzz", "b", now=NOON + timedelta(hours=1))
    first = RunFolder.create(None, "z", root=tmp_path, now=NOON.astimezone())
    (tmp_path / "foreign").mkdir()
    damaged = RunFolder.create(tmp_path / "damaged", "b", now=NOON + timedelta(days=900))
    (damaged.path / "run.json").write_text("{", encoding="utf-8")
    assert list_runs(tmp_path) == [first, named, later]
    assert newest_run(tmp_path) == later.path


@pytest.mark.parametrize("state", ["running", "finished", "interrupted", "failed"])
def test_a_run_is_never_overwritten(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "run"
    run = RunFolder.create(folder, "toy")
    run.set_state(state)  # type: ignore[arg-type]
    before = (folder / "run.json").read_bytes()
    with pytest.raises(UsageError, match="already contains a run"):
        RunFolder.create(str(folder), "other")
    assert (folder / "run.json").read_bytes() == before
    assert run.state().state == state


def test_foreign_folders_and_files_stay_as_they_are(tmp_path: Path) -> None:
    foreign = tmp_path / "thesis"
    foreign.mkdir()
    (foreign / "thesis.tex").write_text("mine", encoding="utf-8")
    file = tmp_path / "file"
    file.write_text("mine", encoding="utf-8")
    for taken in (foreign, file):
        with pytest.raises(UsageError, match="is not a run folder"):
            RunFolder.check_free(taken)
        with pytest.raises(UsageError):
            RunFolder.create(taken, "toy")
    with pytest.raises(UsageError, match="cannot be used for a run"):
        RunFolder.create(file / "below", "toy")
    assert [p.name for p in foreign.iterdir()] == ["thesis.tex"]


def test_an_empty_or_missing_folder_is_free(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    RunFolder.check_free(None)
    RunFolder.check_free(empty)
    assert is_run(RunFolder.create(empty, "toy").path)
    assert is_run(RunFolder.create(tmp_path / "deep" / "new", "toy").path)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        '{"schema": 1}',
        '{"schema": 2, "model": "m", "created": "2026-01-01", "state": "running"}',
        '{"schema": 1, "model": "m", "created": "2026-01-01", "state": "asleep"}',
        '{"schema": 1, "model": "m", "created": "yesterday", "state": "running"}',
    ],
)
def test_a_damaged_state_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError):
        RunFolder(tmp_path).state()


def test_a_folder_without_a_state_is_not_a_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not a run folder"):
        RunFolder(tmp_path).state()


def test_metrics_survive_a_crash_in_the_middle_of_a_line(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "toy")
    assert read_metrics(run.metrics) == []
    run.append_metrics({"iteration": 0, "reward/mean": 0.25, "note": "é"})
    with run.metrics.open("ab") as file:
        file.write(b'{"iteration": 1, "rew')
    assert read_metrics(run.metrics) == [{"iteration": 0, "reward/mean": 0.25, "note": "é"}]
    run.append_metrics({"iteration": 1})
    assert [line["iteration"] for line in read_metrics(run.metrics)] == [0, 1]
    run.metrics.write_bytes(b'{"iterat')
    run.append_metrics({"iteration": 7})
    assert read_metrics(run.metrics) == [{"iteration": 7}]


def test_metrics_are_strict_json(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "toy")
    run.append_metrics({"grad_norm": float("inf"), "loss": float("nan"), "iteration": 3})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    line = json.loads(run.metrics.read_text(encoding="utf-8"), parse_constant=refuse)
    assert line == {"grad_norm": None, "loss": None, "iteration": 3}


@pytest.mark.parametrize("damage", [b"{}\n{oops\n{}\n", b"{}\n[1]\n", b"{}\n\n{}\n", b"\xff\n"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"metrics.jsonl:\d: the line is damaged"):
        read_metrics(file)


def test_atomic_write_leaves_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "state.json"
    write_atomic(file, b"old")

    def no_space(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", no_space)
        with pytest.raises(OSError, match="No space"):
            write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]
