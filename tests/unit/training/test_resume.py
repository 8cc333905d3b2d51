from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import cast

import pytest
import torch

from fmg.core.errors import CheckpointError, FmgWarning, UsageError
from fmg.core.files import write_sums
from fmg.core.protocols import Model
from fmg.data.checkpoints import read_index
from fmg.data.prompt_sets import file_values, load_prompts, prompt_references, prompts_digest
from fmg.data.run_folder import RunFolder
from fmg.registry.recipe import Recipe
from fmg.training.checkpoint import save_checkpoint
from fmg.training.resume import Live, Progress, RestingPoint, load_state, rewind, save_state
from fmg.training.state_files import STRUCTURE, generator_states
from fmg.training.tripwire import Tripwire
from tests.support.run_files import flip_bit, without_digests

RECIPE = Recipe.default()
KEYS = ["schema", "run", "progress", "trained", "optimizer", "ema", "ema_updates", "generators", "tripwire"]


class Saver:
    def save_adapter(self, folder: Path) -> None:
        folder.mkdir()


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A run of two iterations, saved after the first, and a checkpoint of the second in mid-iteration."""
    folder = RunFolder.create(tmp_path / "run", RECIPE.model.name)
    for iteration in range(3):
        folder.append_metrics({"iteration": iteration, "grad_norm": float("nan")})
    save_checkpoint(folder.path, cast(Model, Saver()), 0, "eval/score", 0.5)
    save_checkpoint(folder.path, cast(Model, Saver()), 2, "eval/score", None)
    network = torch.nn.Linear(2, 1)
    live = Live(list(network.named_parameters()), torch.optim.SGD(network.parameters(), 0.1), None, torch.device("cpu"))
    progress, generators = Progress(1, 1, 2, (4, 4), 0, False, True), generator_states(live.device)
    save_state(folder, RECIPE, RestingPoint(progress, generators, Tripwire(0.1, 0.1).state(), {}), live)
    return folder


@pytest.mark.parametrize("key", KEYS)
def test_a_state_without_one_of_its_parts_is_damaged(key: str, run: RunFolder) -> None:
    file = next(run.path.glob(f"state/*/{STRUCTURE}"))
    pairs = json.loads(file.read_text())["$pairs"]
    # states of before branched rollouts have no sampling
    assert {name for name, _ in pairs} == {*KEYS, "sampling"}
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
        ("checkpoints/index.json", None, "has no index of checkpoints"),
        ("metrics.jsonl", '{"iteration": 0}\n', "has 1 lines, and the saved state follows line 2"),
        ("metrics.jsonl", '{"iteration": 0}\n[]\n', "the line is damaged"),
        ("checkpoints/checkpoint-0/SHA256SUMS", None, "SHA256SUMS' is missing"),
    ],
)
def test_a_run_that_cannot_go_on_is_left_as_it_was(file: str, content: str | None, says: str, run: RunFolder) -> None:
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


def test_a_run_goes_back_to_its_state(run: RunFolder) -> None:
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
    with pytest.raises(CheckpointError, match="other tensors"):
        saved.check_trained(torch.nn.Linear(3, 1).named_parameters())


def test_changed_metrics_are_not_resumed_from(run: RunFolder) -> None:
    run.metrics.write_text(run.metrics.read_text().replace('"iteration": 1', '"iteration": 7'))
    with pytest.raises(CheckpointError, match="was changed in its first 2 lines"):
        load_state(run, RECIPE)


def test_a_damaged_state_says_how_to_go_on(run: RunFolder) -> None:
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
    with pytest.warns(FmgWarning, match="kept no digests") as said:
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
    with pytest.raises(CheckpointError, match="samples' is a link that leads out"):
        load_state(run, RECIPE)


def _begun(folder: Path, recipe: Recipe) -> RunFolder:
    """A run of a recipe as `train` would have begun it, with one state."""
    run = RunFolder.create(folder / "run", recipe.model.name)
    run.recipe.write_text(recipe.with_(file_values(recipe)).to_yaml())
    run.append_metrics({"iteration": 0})
    save_checkpoint(run.path, cast(Model, Saver()), 0, "eval/score", 0.5)
    parameters = list(torch.nn.Linear(2, 1).named_parameters())
    digests = {place: prompts_digest(load_prompts(ref)) for place, ref in prompt_references(recipe).items()}
    optimizer = torch.optim.SGD([p for _, p in parameters], 0.1)
    live = Live(parameters, optimizer, None, torch.device("cpu"), digests)
    point = RestingPoint(Progress(0, 0, 1, (4, 4), 0, False, True), generator_states(live.device), {}, {})
    save_state(run, Recipe.from_yaml(run.recipe), point, live)
    return run


def test_prompts_are_found_from_everywhere_and_changed_ones_are_refused(
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
    with pytest.raises(UsageError, match=r"mine\.txt' \(prompts\) has other prompts .*--accept-changed-prompts"):
        load_state(run, recipe)
    with pytest.raises(UsageError, match="has other prompts"):
        load_prompts(recipe.eval.prompts)
    load_state(run, recipe, accept_changed_prompts=True)
    # a file that moved is the same by its content
    (there / "mine.txt").write_text("a red circle\na blue square\n")
    load_state(run, recipe.with_({f"{place}.path": str(there / "mine.txt") for place in ("prompts", "eval.prompts")}))


def test_a_version_with_more_options_resumes_what_an_older_one_began(run: RunFolder, tmp_path: Path) -> None:
    run = _begun(tmp_path / "new", RECIPE)
    text = run.recipe.read_text()
    kept = [line for line in text.splitlines() if "shuffle_advantages" not in line]
    assert len(kept) == len(text.splitlines()) - 1
    shutil.rmtree(run.path / "state")
    run.recipe.write_text("\n".join(kept))
    parameters = list(torch.nn.Linear(2, 1).named_parameters())
    live = Live(parameters, torch.optim.SGD([p for _, p in parameters], 0.1), None, torch.device("cpu"))
    point = RestingPoint(Progress(0, 0, 1, (4, 4), 0, False, True), generator_states(live.device), {}, {})
    save_state(run, Recipe.from_yaml(run.recipe), point, live)
    load_state(run, Recipe.from_yaml(run.recipe))
    run.recipe.write_text("\n".join(kept).replace("seed: 0", "seed: 1", 1))
    with pytest.raises(UsageError, match="is not the recipe"):
        load_state(run, Recipe.from_yaml(run.recipe))
