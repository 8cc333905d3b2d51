from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.files import SUMS, write_sums
from fmg.core.protocols import Model
from fmg.data.checkpoints import chosen_checkpoint, read_index
from fmg.data.prompt_sets import file_values, load_prompts, prompt_references, prompts_digest
from fmg.data.run_folder import RunFolder
from fmg.recipe import Recipe
from fmg.training.checkpointing import (
    Progress,
    ResumePoint,
    TrainingState,
    drop_unscored,
    load_state,
    rewind,
    save_checkpoint,
    save_state,
    scored_index,
)
from fmg.training.hacking_monitor import HackingMonitor
from fmg.training.state_files import STRUCTURE, generator_states
from tests.support.run_files import flip_bit, without_digests


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
    with pytest.warns(FmgWarning, match="lacks checkpoint-20, which"):
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


def test_folders_that_the_index_does_not_name_are_removed_before_a_run_resumes(tmp_path: Path) -> None:
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


def test_what_was_saved_in_mid_iteration_is_removed_before_a_run_resumes(tmp_path: Path) -> None:
    save(tmp_path, 0, 0.5)
    save_checkpoint(tmp_path, cast(Model, Saver()), 3, "eval/score", None)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()) == [
        "checkpoint-0",
        "checkpoint-3",
    ]
    index = drop_unscored(tmp_path)
    assert (index.best, index.latest) == ("checkpoint-0", "checkpoint-0")
    assert [p.name for p in (tmp_path / "checkpoints").iterdir() if p.is_dir()] == ["checkpoint-0"]


def test_an_ineligible_checkpoint_is_never_the_best(tmp_path: Path) -> None:
    saver = cast(Model, Saver())
    for iteration, score, sound in ((0, 0.1, True), (10, 0.4, True), (20, 0.7, False), (30, 0.9, False)):
        save_checkpoint(tmp_path, saver, iteration, "eval/score", score, eligible=sound)
    index = read_index(tmp_path)
    assert index is not None
    assert (index.best, index.latest) == ("checkpoint-10", "checkpoint-30")
    assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-10"
    save_checkpoint(tmp_path, saver, 40, "eval/score", 0.5)
    assert chosen_checkpoint(tmp_path) == tmp_path / "checkpoints" / "checkpoint-40"


def _named(run: Path, name: str) -> None:
    """Adds a checkpoint to the index, as an attacker would."""
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
        with pytest.raises(CheckpointError, match="not a path within"):
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
    with pytest.warns(FmgWarning, match="checkpoint-20.*(damaged|missing).*is skipped"):
        assert [entry.name for entry in scored_index(tmp_path).saved] == ["checkpoint-10"]
    damage(tmp_path / "checkpoints" / "checkpoint-10")  # type: ignore[operator]
    with pytest.raises(CheckpointError, match=r"checkpoint-10.*(damaged|missing)"):
        scored_index(tmp_path)


RECIPE = Recipe.default()
KEYS = ["schema", "run", "progress", "trained", "optimizer", "ema", "ema_updates", "generators", "tripwire"]


class StateSaver:
    def save_adapter(self, folder: Path) -> None:
        folder.mkdir()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two iterations, saved after the first, and a checkpoint of the second in mid-iteration."""
    folder = RunFolder.create(tmp_path / "run", RECIPE.model.name)
    for iteration in range(3):
        folder.append_metrics({"iteration": iteration, "grad_norm": float("nan")})
    save_checkpoint(folder.path, cast(Model, StateSaver()), 0, "eval/score", 0.5)
    save_checkpoint(folder.path, cast(Model, StateSaver()), 2, "eval/score", None)
    network = torch.nn.Linear(2, 1)
    live = TrainingState(
        list(network.named_parameters()), torch.optim.SGD(network.parameters(), 0.1), None, torch.device("cpu")
    )
    progress, generators = Progress(1, 1, 2, (4, 4), 0, False, True), generator_states(live.device)
    save_state(folder, RECIPE, ResumePoint(progress, generators, HackingMonitor(0.1, 0.1).state(), {}), live)
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_a_state_without_one_of_its_parts_is_damaged(key: str, run: RunFolder) -> None:
    file = next(run.path.glob(f"state/*/{STRUCTURE}"))
    pairs = json.loads(file.read_text())["$pairs"]
    # states from before branched rollouts have no sampling, and those from before trackers no tracker
    assert {name for name, _ in pairs} == {*KEYS, "sampling", "tracker"}
    load_state(run, RECIPE)
    file.write_text(json.dumps({"$pairs": [[name, value] for name, value in pairs if name != key]}))
    write_sums(file.parent)
    with pytest.raises(CheckpointError, match=f"is damaged .*'{key}'"):
        load_state(run, RECIPE)


def _files(run: RunFolder) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(run.path.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("file", "content", "says"),
    [
        ("checkpoints/index.json", "{", r"index\.json' is damaged"),
        ("checkpoints/index.json", None, "has no checkpoint index"),
        ("metrics.jsonl", '{"iteration": 0}\n', "has 1 lines, but the saved state follows line 2"),
        ("metrics.jsonl", '{"iteration": 0}\n[]\n', "the line is damaged"),
        ("checkpoints/checkpoint-0/SHA256SUMS", None, "SHA256SUMS' is missing"),
    ],
)
def test_a_run_that_cannot_resume_is_left_unchanged(file: str, content: str | None, says: str, run: RunFolder) -> None:
    path = run.path / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    before = _files(run)
    with pytest.raises(CheckpointError, match=says):
        load_state(run, RECIPE)
    with pytest.raises(CheckpointError, match=says):
        rewind(run, 2)
    assert _files(run) == before


def test_a_run_returns_to_its_state(run: RunFolder) -> None:
    progress = load_state(run, RECIPE).progress
    index, lines = rewind(run, progress.lines)
    assert [line["iteration"] for line in lines] == [0, 1]
    assert all(line["grad_norm"] != line["grad_norm"] for line in lines)
    assert len(run.metrics.read_text().splitlines()) == 2
    assert index == read_index(run.path)
    assert [entry.name for entry in index.saved] == ["checkpoint-0"]


def test_other_tensors_than_the_run_trains_are_refused(run: RunFolder) -> None:
    saved = load_state(run, RECIPE)
    saved.check_trained(torch.nn.Linear(2, 1).named_parameters())
    with pytest.raises(CheckpointError, match="tensors of the saved state"):
        saved.check_trained(torch.nn.Linear(3, 1).named_parameters())


def test_changed_metrics_are_not_resumed_from(run: RunFolder) -> None:
    run.metrics.write_text(run.metrics.read_text().replace('"iteration": 1', '"iteration": 7'))
    with pytest.raises(CheckpointError, match=r"The first 2 lines of .* have changed"):
        load_state(run, RECIPE)


def test_a_damaged_state_error_says_what_to_do(run: RunFolder) -> None:
    older = next(run.path.glob("state/*"))
    flip_bit(older / "state.safetensors")
    with pytest.raises(CheckpointError, match=r"state\.safetensors' is damaged.*fmg train --config"):
        load_state(run, RECIPE)
    shutil.copytree(older, older.with_name("iteration-00000002"))
    with pytest.raises(CheckpointError, match=r"Remove that folder; `fmg train --resume .*iteration-00000001"):
        load_state(run, RECIPE)


def test_a_state_that_lost_its_digests_is_refused(run: RunFolder) -> None:
    next(run.path.glob("state/*/SHA256SUMS")).unlink()
    with pytest.raises(CheckpointError, match="lacks its SHA256SUMS"):
        load_state(run, RECIPE)


def test_a_run_without_digests_is_resumed_with_one_warning(run: RunFolder) -> None:
    without_digests(run.path)
    with pytest.warns(FmgWarning, match="without digests") as said:
        assert load_state(run, RECIPE).progress.lines == 2
    assert len(said) == 1
    rewind(run, 2)


def test_leftovers_of_a_killed_process_go_and_links_out_are_refused(run: RunFolder, tmp_path: Path) -> None:
    left = ["checkpoints/.index.json.999999999.tmp", ".run.json.999999999.tmp", "state/.x.999999999.0123abcd.partial"]
    for name in left:
        (run.path / name).write_text("half")
    rewind(run, 2)
    assert [name for name in left if (run.path / name).exists()] == []
    (tmp_path / "victim").mkdir()
    (run.path / "samples").rmdir()
    (run.path / "samples").symlink_to(tmp_path / "victim")
    with pytest.raises(CheckpointError, match="samples' is a link that leads outside"):
        load_state(run, RECIPE)


def _begun(folder: Path, recipe: Recipe) -> RunFolder:
    """A run of a recipe as `train` would have started it, with one state."""
    run = RunFolder.create(folder / "run", recipe.model.name)
    run.recipe.write_text(recipe.with_(file_values(recipe)).to_yaml())
    run.append_metrics({"iteration": 0})
    save_checkpoint(run.path, cast(Model, StateSaver()), 0, "eval/score", 0.5)
    parameters = list(torch.nn.Linear(2, 1).named_parameters())
    digests = {place: prompts_digest(load_prompts(ref)) for place, ref in prompt_references(recipe).items()}
    optimizer = torch.optim.SGD([p for _, p in parameters], 0.1)
    live = TrainingState(parameters, optimizer, None, torch.device("cpu"), digests)
    point = ResumePoint(Progress(0, 0, 1, (4, 4), 0, False, True), generator_states(live.device), {}, {})
    save_state(run, Recipe.from_yaml(run.recipe), point, live)
    return run


def test_prompts_are_found_from_any_directory_and_changed_ones_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = tmp_path / "here", tmp_path / "there"
    here.mkdir()
    there.mkdir()
    monkeypatch.chdir(here)
    (here / "mine.txt").write_text("a red circle\na blue square\n")
    run = _begun(here, RECIPE.with_({"prompts": "mine.txt", "eval.prompts": "mine.txt"}))
    monkeypatch.chdir(there)
    (there / "mine.txt").write_text("a yellow star\n")
    recipe = Recipe.from_yaml(run.recipe)
    assert [prompt.text for prompt in load_prompts(recipe.eval.prompts)] == ["a red circle", "a blue square"]
    load_state(run, recipe)
    (here / "mine.txt").write_text("a yellow star\n")
    with pytest.raises(UsageError, match=r"mine\.txt' \(prompts\) has different prompts .*--accept-changed-prompts"):
        load_state(run, recipe)
    with pytest.raises(UsageError, match="has changed: its prompts"):
        load_prompts(recipe.eval.prompts)
    load_state(run, recipe, accept_changed_prompts=True)
    # a moved file is recognised by its content
    (there / "mine.txt").write_text("a red circle\na blue square\n")
    load_state(run, recipe.with_({f"{place}.path": str(there / "mine.txt") for place in ("prompts", "eval.prompts")}))


def test_a_version_with_more_options_resumes_an_older_run(run: RunFolder, tmp_path: Path) -> None:
    run = _begun(tmp_path / "new", RECIPE)
    text = run.recipe.read_text()
    kept = [line for line in text.splitlines() if "shuffle_advantages" not in line]
    assert len(kept) == len(text.splitlines()) - 1
    shutil.rmtree(run.path / "state")
    run.recipe.write_text("\n".join(kept))
    parameters = list(torch.nn.Linear(2, 1).named_parameters())
    live = TrainingState(parameters, torch.optim.SGD([p for _, p in parameters], 0.1), None, torch.device("cpu"))
    point = ResumePoint(Progress(0, 0, 1, (4, 4), 0, False, True), generator_states(live.device), {}, {})
    save_state(run, Recipe.from_yaml(run.recipe), point, live)
    load_state(run, Recipe.from_yaml(run.recipe))
    run.recipe.write_text("\n".join(kept).replace("seed: 0", "seed: 1", 1))
    with pytest.raises(UsageError, match="is not the recipe"):
        load_state(run, Recipe.from_yaml(run.recipe))
