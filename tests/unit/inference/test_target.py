"""Which run or checkpoint a target on the command line names."""

from __future__ import annotations

import shutil
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import cast

import pytest

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.protocols import Model
from fmg.data.run_folder import RunFolder, State
from fmg.inference.artifact.manifest import AdapterPart
from fmg.inference.target import Target, export_folder, resolve_target
from fmg.recipe import Recipe
from fmg.training.checkpointing import save_checkpoint
from tests.support.run_files import flip_bit, without_digests

RECIPE = Recipe.default()


class Writer:
    def save_adapter(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "pytorch_lora_weights.safetensors").write_bytes(b"tensors")


def make_run(folder: Path, *, day: int = 1, state: State = "finished", saved: bool = True) -> Path:
    run = RunFolder.create(folder, RECIPE.model.name, now=datetime(2026, 1, day, tzinfo=UTC))
    run.recipe.write_text(RECIPE.to_yaml())
    for iteration, score in ((10, 0.5), (20, 0.3)) if saved else ():
        save_checkpoint(run.path, cast(Model, Writer()), iteration, "eval/score", score)
    run.set_state(state)
    return run.path


def test_a_run_stands_for_its_best_checkpoint_and_each_can_be_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "run")
    assert resolve_target(run).adapter == run / "checkpoints" / "checkpoint-10"
    named = resolve_target(run / "checkpoints" / "checkpoint-20")
    assert named.adapter == run / "checkpoints" / "checkpoint-20"
    assert named.label == str(named.adapter)
    # the label is written into artifacts, which are read in other folders
    monkeypatch.chdir(run / "checkpoints" / "checkpoint-20")
    assert resolve_target(".") == named
    assert resolve_target("../..") == resolve_target(run)
    (run / "checkpoints" / "checkpoint-2").mkdir()
    with pytest.raises(UsageError, match=r"did not keep 'checkpoint-2'.*'checkpoint-20'"):
        resolve_target(run / "checkpoints" / "checkpoint-2")


def test_a_damaged_checkpoint_is_refused_and_the_others_can_be_used(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    flip_bit(run / "checkpoints" / "checkpoint-10" / "pytorch_lora_weights.safetensors")
    with pytest.raises(CheckpointError, match=r"checkpoint-10.pytorch_lora_weights\.safetensors' is damaged"):
        resolve_target(run)
    resolve_target(run / "checkpoints" / "checkpoint-20")


def test_an_older_run_is_used_with_one_warning(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    without_digests(run)
    with pytest.warns(FmgWarning, match="without digests") as said:
        resolve_target(run)
    assert len(said) == 1


def test_a_recipe_that_was_changed_is_named(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    (run / "recipe.yaml").write_text(RECIPE.with_({"rollout.steps": 8}).to_yaml())
    with pytest.warns(FmgWarning, match="was changed after the run began"):
        resolve_target(run)


def test_newer_runs_that_are_passed_over_are_named(tmp_path: Path) -> None:
    older = make_run(tmp_path / "older", day=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_target(None, tmp_path).label == str(older)
    make_run(tmp_path / "going", day=2, state="running")
    make_run(tmp_path / "empty", day=3, saved=False)
    (make_run(tmp_path / "bad", day=4) / "checkpoints" / "index.json").write_text("{")
    with pytest.warns(FmgWarning, match=r"going' is running, .*; .*empty' has no saved adapter; .*bad' is damaged"):
        assert resolve_target(None, tmp_path).label == str(older)
    shutil.rmtree(older)
    with pytest.warns(FmgWarning, match="empty' has no saved adapter"):
        assert resolve_target(None, tmp_path).label == str(tmp_path / "going")


def test_default_places_of_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run, merged = make_run(tmp_path / "run"), Target("0.5 a", RECIPE, tmp_path, (AdapterPart("a", "d", 0.5),))
    names = ("artifact", "diffusers", "lora.safetensors")
    assert [export_folder(run, name) for name in names] == [run / name for name in names]
    assert [str(export_folder("scm-shapes", name)) for name in names[:2]] == [
        "artifacts/scm-shapes",
        "diffusers/scm-shapes",
    ]
    hub = ("artifacts/name", "diffusers/name", "name.safetensors")
    assert tuple(str(export_folder("owner/name@main", name)) for name in names) == hub
    summed = [str(export_folder(merged, name)) for name in names]
    model = RECIPE.model.name
    assert summed == [f"artifacts/{model}-merged", f"diffusers/{model}-merged", f"{model}-merged.safetensors"]
