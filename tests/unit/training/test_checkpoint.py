from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest

from fmg.core.errors import CheckpointError, FmgWarning
from fmg.core.files import SUMS
from fmg.core.protocols import Model
from fmg.data.checkpoints import chosen_checkpoint, read_index
from fmg.training.checkpoint import drop_unscored, save_checkpoint, scored_index


class Saver:
    def save_adapter(self, folder: Path) -> None:
        folder.mkdir()


def save(run: Path, iteration: int, score: float) -> None:
    save_checkpoint(run, cast(Model, Saver()), iteration, "eval/score", score)


def test_the_best_and_the_newest_stay(tmp_path: Path) -> None:
    for iteration, score in ((0, 0.1), (10, 0.5), (20, 0.3), (30, 0.4)):
        save(tmp_path, iteration, score)
    folders = sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir())
    assert folders == ["checkpoint-10", "checkpoint-30"]
    index = read_index(tmp_path)
    assert index is not None
    assert (index.best, index.latest) == ("checkpoint-10", "checkpoint-30")
    assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"


def test_of_equal_scores_the_earlier_is_best(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    save(tmp_path, 10, 0.5)
    index = read_index(tmp_path)
    assert index is not None
    assert index.best == "checkpoint-0"


def test_saving_an_iteration_twice_keeps_the_first(tmp_path: Path) -> None:
    save(tmp_path, 10, 0.5)
    save(tmp_path, 10, 0.5)
    index = read_index(tmp_path)
    assert index is not None
    assert len(index.saved) == 1


@pytest.mark.parametrize("damage", ["{", "[]", '{"saved": [], "best": "x", "latest": "x"}'])
def test_a_damaged_index_is_named(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 0, 0.5)
    (tmp_path / "checkpoints" / "index.json").write_text(damage)
    with pytest.raises(CheckpointError, match=r"index\.json"):
        read_index(tmp_path)


def folders(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.is_dir())


def test_a_best_checkpoint_that_is_gone_is_named(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-0")
    with pytest.raises(CheckpointError, match="checkpoint-0"):
        read_index(tmp_path)


def test_another_checkpoint_that_is_gone_is_left_out_with_a_warning(tmp_path: Path) -> None:
    save(tmp_path, 10, 0.5)
    save(tmp_path, 20, 0.4)
    save_checkpoint(tmp_path, cast(Model, Saver()), 20, "eval_ema/score", 0.3, ema=True)
    shutil.rmtree(tmp_path / "checkpoints" / "checkpoint-20")
    with pytest.warns(FmgWarning, match="is without checkpoint-20, which"):
        index = read_index(tmp_path)
    assert index is not None
    assert [entry.name for entry in index.saved] == ["checkpoint-10", "checkpoint-20-ema"]
    assert (index.best, index.latest) == ("checkpoint-10", "checkpoint-20-ema")
    with pytest.warns(FmgWarning, match="checkpoint-20"):
        assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    with pytest.warns(FmgWarning, match="checkpoint-20"):
        save(tmp_path, 20, 0.4)
    # it was made again
    assert folders(tmp_path) == ["checkpoint-10", "checkpoint-20", "checkpoint-20-ema"]
    assert read_index(tmp_path) is not None


def test_a_folder_that_a_killed_run_left_does_not_keep_it_from_saving(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    left = tmp_path / "checkpoints" / "checkpoint-10"
    left.mkdir()
    (left / "half").write_text("of it")
    save(tmp_path, 10, 0.6)
    assert [path.name for path in left.iterdir()] == [SUMS]
    assert chosen_checkpoint(tmp_path) == left


def test_folders_that_the_index_does_not_name_go_before_a_run_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    for name in ("checkpoint-10", "checkpoint-10-ema", "checkpoint-of-mine"):
        (tmp_path / "checkpoints" / name).mkdir()
    index = drop_unscored(tmp_path)
    assert index == read_index(tmp_path)
    assert folders(tmp_path) == ["checkpoint-0", "checkpoint-of-mine"]


def test_an_average_is_kept_beside_the_newest_and_wins_only_when_it_is_better(tmp_path: Path) -> None:
    model = cast(Model, Saver())
    for iteration, raw, averaged in ((0, 0.1, None), (10, 0.5, 0.6), (20, 0.6, 0.6)):
        save(tmp_path, iteration, raw)
        if averaged is not None:
            save_checkpoint(tmp_path, model, iteration, "eval_ema/score", averaged, ema=True)
    index = read_index(tmp_path)
    assert index is not None
    assert (index.best, index.latest) == ("checkpoint-10-ema", "checkpoint-20")
    assert [entry.name for entry in index.saved] == ["checkpoint-10-ema", "checkpoint-20", "checkpoint-20-ema"]
    assert index.entry(index.best).score_key == "eval_ema/score"


def test_of_equal_scores_the_raw_weights_come_before_their_average(tmp_path: Path) -> None:
    save(tmp_path, 10, 0.5)
    index = save_checkpoint(tmp_path, cast(Model, Saver()), 10, "eval_ema/score", 0.5, ema=True)
    assert index.best == "checkpoint-10"


def test_what_was_saved_in_mid_iteration_goes_before_a_run_goes_on(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    save_checkpoint(tmp_path, cast(Model, Saver()), 3, "eval/score", None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == [
        "checkpoint-0",
        "checkpoint-3",
    ]
    index = drop_unscored(tmp_path)
    assert (index.best, index.latest) == ("checkpoint-0", "checkpoint-0")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["checkpoint-0"]


def test_an_unsound_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    saver = cast(Model, Saver())
    for iteration, score, sound in ((0, 0.1, True), (10, 0.4, True), (20, 0.7, False), (30, 0.9, False)):
        save_checkpoint(tmp_path, saver, iteration, "eval/score", score, sound=sound)
    index = read_index(tmp_path)
    assert index is not None
    assert (index.best, index.latest) == ("checkpoint-10", "checkpoint-30")
    assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    save_checkpoint(tmp_path, saver, 40, "eval/score", 0.5)
    assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-40"


def _named(run: Path, name: str) -> None:
    """Names one more checkpoint in the index, as a stranger would."""
    file = run / "checkpoints" / "index.json"
    index = json.loads(file.read_text())
    index.pop("sha256")
    index["saved"].append({**index["saved"][0], "name": name, "score": -1.0})
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../../victim", "ABSOLUTE", "link", "..", ""])
def test_a_checkpoint_outside_the_run_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    victim, run = tmp_path / "victim", tmp_path / "run"
    victim.mkdir()
    (victim / "thesis.txt").write_text("precious")
    save(run, 0, 0.5)
    (run / "checkpoints" / "link").symlink_to(victim)
    _named(run, str(victim) if name == "ABSOLUTE" else name)
    for read in (read_index, drop_unscored, lambda run: save(run, 10, 0.6)):
        with pytest.raises(CheckpointError, match="no path within"):
            read(run)
    assert (victim / "thesis.txt").read_text() == "precious"


def test_a_changed_index_is_refused(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    file = tmp_path / "checkpoints" / "index.json"
    file.write_text(file.read_text().replace("0.5", "0.6"))
    with pytest.raises(CheckpointError, match="changed after it was written"):
        read_index(tmp_path)


class Writer:
    def save_adapter(self, folder: Path) -> None:
        (folder / "peft").mkdir(parents=True)
        (folder / "peft" / "adapter_model.safetensors").write_bytes(b"tensors")


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "peft" / "adapter_model.safetensors").write_bytes(b"tensorz"),
        lambda folder: (folder / "peft" / "adapter_model.safetensors").unlink(),
        lambda folder: (folder / SUMS).unlink(),
        lambda folder: (folder / SUMS).write_text(""),
    ],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, damage: object) -> None:
    for iteration, score in ((0, 0.1), (10, 0.5), (20, 0.3)):
        save_checkpoint(tmp_path, cast(Model, Writer()), iteration, "eval/score", score)
    assert [entry.name for entry in scored_index(tmp_path).saved] == ["checkpoint-10", "checkpoint-20"]
    damage(tmp_path / "checkpoints" / "checkpoint-20")  # type: ignore[operator]
    with pytest.warns(FmgWarning, match="checkpoint-20.*(damaged|missing).*is left out"):
        assert [entry.name for entry in scored_index(tmp_path).saved] == ["checkpoint-10"]
    damage(tmp_path / "checkpoints" / "checkpoint-10")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"checkpoint-10.*(damaged|missing)"):
        scored_index(tmp_path)
