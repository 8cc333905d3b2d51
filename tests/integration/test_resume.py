"""A resumed run equals the uninterrupted one, bit for bit; whatever cannot be resumed ends with one clear line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fmg import Recipe, train
from fmg.core.errors import CheckpointError, FmgError, UsageError
from fmg.core.events import Event, IterationDone, Notice, StageProgress
from fmg.core.files import write_sums
from fmg.core.json_io import sealed, unsealed
from fmg.data.checkpoints import read_index
from fmg.data.resume_points import newest_state
from fmg.data.run_folder import RunFolder
from fmg.flow import TwoTimeMap
from fmg.training.api import resume
from fmg.training.checkpointing import SCHEMA, load_state
from fmg.training.state_files import read_state
from tests.support.run_files import metrics, stop_after

pytestmark = pytest.mark.slow

TINY = {
    "train.iterations": 3,
    "train.state_every": 1,
    "rollout.groups": 2,
    "rollout.group_size": 4,
    "eval.num": 4,
    "eval.every": 3,
    "eval.rewards": [],
}
COMPILED = "completed by a graph"
KINDS: dict[str, dict[str, object]] = {
    "lora and average": {"train.ema_decay": 0.9, "train.lr_schedule": "linear"},
    # dropout uses the global generator, muon joins two optimizers
    "embedder, dropout": {
        "train.trainable": "lora+duration",
        "rollout.kind": "chain",
        "objective": "rwfm",
        "optimizer": "muon",
        "train.lr_schedule": "cosine",
        "train.lr_warmup_steps": 4,
        "lora.dropout": 0.2,
        "train.shuffle_advantages": True,
    },
    # the rollouts come from an average of its own, whose decay changes: the last one depends on that after the resume
    "moving old policy": {
        "train.iterations": 4,
        "rollout.kind": "chain",
        "objective": {
            "name": "meanflow-nft",
            "draws": 1,
            "old_decay": 0.5,
            "old_decay_rise": 0.2,
            "old_decay_start": 1,
        },
        "optimizer.lr": 1e-2,
    },
    # what the choice of steps and prompts has learned is part of the state
    "branched": {
        "rollout.kind": "branch",
        "rollout.branch.steps": "adaptive",
        "rollout.branch.completion": "grid",
        "rollout.prompt_sampling": "dynamic",
    },
    # the checks of a resumed process change nothing
    COMPILED: {"rollout.kind": "branch", "rollout.branch.backend": "onnxruntime"},
    # runs where bitsandbytes is installed; smaller tensors would keep moments in fp32
    "bitsandbytes": {"optimizer": {"name": "adamw8bit", "lr": 3e-3}, "lora.rank": 64},
}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: x for key, child in value.items() for k, x in _flat(child, f"{name}/{key}").items()}
    if isinstance(value, (list, tuple)):
        return {k: x for i, child in enumerate(value) for k, x in _flat(child, f"{name}/{i}").items()}
    return {name: value.flatten().tolist() if isinstance(value, Tensor) else value}


def _weights(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "checkpoints").rglob("*.safetensors"))
    return {f"{file.relative_to(run)} {name}": x for file in files for name, x in load_file(file).items()}


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.compile] if kind == COMPILED else []) for kind in KINDS]
)
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(kind: str, tmp_path: Path) -> None:
    if kind == "bitsandbytes":
        pytest.importorskip(kind)
    recipe = Recipe.default(None, **{**TINY, **KINDS[kind]})
    last: dict[str, dict[str, Any]] = {}

    def keep_state(name: str) -> Callable[[Event], None]:
        def hear(event: Event) -> None:
            if isinstance(event, IterationDone) and event.iteration == 3:
                # the state after iteration 2, with the optimizer as it was then
                folder = newest_state(tmp_path / name)
                assert folder is not None
                last[name] = _flat({k: v for k, v in read_state(folder).items() if k != "run"})

        return hear

    whole = train(recipe, tmp_path / "whole", keep_state("whole"))
    cut = train(recipe, tmp_path / "cut", stop_after(2))
    assert cut.interrupted
    torch.manual_seed(12345)
    resumed = resume(tmp_path / "cut", keep_state("cut"))
    assert not resumed.interrupted
    assert metrics(tmp_path / "cut") == metrics(tmp_path / "whole")
    rates = {line["lr"] for line in metrics(tmp_path / "cut") if "lr" in line}
    assert len(rates) == (3 if "train.lr_schedule" in KINDS[kind] else 1)
    assert last["cut"] == last["whole"]
    ours, theirs = _weights(tmp_path / "cut"), _weights(tmp_path / "whole")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert read_index(tmp_path / "cut") == read_index(tmp_path / "whole")
    assert (resumed.initial["eval/score"], resumed.best) == (whole.initial["eval/score"], whole.best)
    assert RunFolder(tmp_path / "cut").state().state == "finished"
    assert not (tmp_path / "cut" / "state").exists()
    # as if it had been killed between its end and its report
    (tmp_path / "cut" / "report.html").unlink()
    (tmp_path / "cut" / "state").mkdir()
    assert resume(tmp_path / "cut").best == resumed.best
    assert (tmp_path / "cut" / "report.html").is_file()
    with pytest.raises(UsageError, match="is finished"):
        resume(tmp_path / "cut")


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "my run"
    heard: list[Event] = []

    def hear(event: Event) -> None:
        heard.append(event)
        stop_after(1)(event)

    train(Recipe.default(None, **{**TINY, "train.ema_decay": 0.9}), run, hear)
    assert newest_state(run) == run / "state" / "iteration-00000001"
    said = [event.text for event in heard if isinstance(event, Notice)]
    assert any(f"fmg train --resume '{run}'" in text for text in said)
    return run


def test_an_average_is_evaluated_and_saved_beside_the_weights(interrupted: Path) -> None:
    evaluation = metrics(interrupted)[0]
    keys = {key.removeprefix("eval/") for key in evaluation if key.startswith("eval/")}
    assert keys == {key.removeprefix("eval_ema/") for key in evaluation if key.startswith("eval_ema/")}
    index = read_index(interrupted)
    assert index is not None
    # without a score the raw weights represent the run, and the untouched base is kept
    assert (index.best, index.latest) == ("checkpoint-1", "checkpoint-1")
    # which has no samples, and those of the base are not its
    assert not RunFolder(interrupted).before_after.exists()
    assert [entry.name for entry in index.saved] == ["checkpoint-0", "checkpoint-1", "checkpoint-1-ema"]
    folder = interrupted / "checkpoints"
    raw, averaged = (
        load_file(folder / name / "pytorch_lora_weights.safetensors") for name in ("checkpoint-1", "checkpoint-1-ema")
    )
    assert any(not torch.equal(raw[name], averaged[name]) for name in raw)


def test_a_run_resumes_with_smaller_batches(interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = [Path(shutil.copytree(interrupted, tmp_path / name)) for name in ("as it was", "smaller")]
    changed = {"train.micro_batch": 3, "rollout.batch_size": 2, "eval.batch_size": 1}
    file = RunFolder(runs[1]).recipe
    file.write_text(Recipe.from_yaml(file).with_(changed).to_yaml(), encoding="utf-8")
    rows: list[set[int]] = []
    call = TwoTimeMap.jump
    for run in runs:
        seen: set[int] = set()

        def counting(self: TwoTimeMap, x: Tensor, *rest: Any, seen: set[int] = seen) -> Tensor:
            seen.add(len(x))
            return call(self, x, *rest)

        monkeypatch.setattr(TwoTimeMap, "jump", counting)
        assert resume(run).iterations == 3
        rows.append(seen)
    assert max(rows[1]) <= 3 < max(rows[0])
    for ours, theirs in zip(*map(metrics, runs), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def _load(run: Path) -> None:
    folder = RunFolder(run)
    load_state(folder, Recipe.from_yaml(folder.recipe))


def _edit_recipe(run: Path) -> None:
    text = (run / "recipe.yaml").read_text()
    assert "seed: 0" in text
    (run / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 1"))


def _replace_state(run: Path) -> None:
    file = run / "run.json"
    state = {**unsealed(json.loads(file.read_text())), "created": "2020-01-01T00:00:00+00:00"}
    file.write_text(json.dumps(sealed(state)))


def _truncate(run: Path) -> None:
    file = next(run.glob("state/*/state.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def _newer_schema(run: Path) -> None:
    file = next(run.glob("state/*/state.json"))
    file.write_text(file.read_text().replace(f'["schema", {SCHEMA}]', '["schema", 99]'))
    write_sums(file.parent)


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        (_edit_recipe, UsageError, "is not the recipe that the run was started with"),
        (_replace_state, UsageError, "belongs to another run"),
        (_truncate, CheckpointError, "cannot be read"),
        (_newer_schema, CheckpointError, "has schema 99"),
        (lambda run: shutil.rmtree(run / "state"), UsageError, "no saved state"),
        (lambda run: RunFolder(run).set_state("finished"), UsageError, "is finished"),
        (lambda run: (run / "run.json").unlink(), UsageError, "is not a run folder"),
    ],
)
def test_what_cannot_be_resumed_is_one_clear_error(
    change: Callable[[Path], object], error: type[FmgError], says: str, interrupted: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    _load(run)
    change(run)
    with pytest.raises(error, match=says):
        _load(run)


def _damage_index(run: Path) -> None:
    (run / "checkpoints" / "index.json").write_text("{")


def _swap_tensors(run: Path) -> None:
    file = next(run.glob("state/*/state.safetensors"))
    save_file({name: (x[..., :1] if x.ndim else x).clone() for name, x in load_file(file).items()}, file)
    write_sums(file.parent)


@pytest.mark.parametrize(
    ("change", "says"), [(_damage_index, r"index\.json"), (_swap_tensors, "tensors of the saved state")]
)
def test_a_refused_resume_leaves_the_run_as_it_was(
    change: Callable[[Path], object], says: str, interrupted: Path, tmp_path: Path
) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))
    change(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 2}\n')
    before = {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()}
    with pytest.raises(CheckpointError, match=says):
        resume(run)
    assert {path: path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()} == before
    assert RunFolder(run).state().state == "interrupted"


def test_a_run_that_is_still_trained_is_not_resumed(interrupted: Path) -> None:
    run = RunFolder(interrupted)
    with run.lock(), pytest.raises(UsageError, match="by another process"), run.lock():
        pass
    with run.lock():
        pass


def test_a_run_that_another_process_continued_meanwhile_is_not_rolled_back(interrupted: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(interrupted, tmp_path / "run"))

    def goes_on(event: Event) -> None:
        if isinstance(event, StageProgress) and event.stage == "loading":
            (run / "state" / "iteration-00000001").rename(run / "state" / "iteration-00000002")

    with pytest.raises(UsageError, match="Another process resumed the run"):
        resume(run, goes_on)
    assert RunFolder(run).state().state == "interrupted"
    assert metrics(run) == metrics(interrupted)


def test_weights_of_prompts_are_discarded_with_the_prompts(tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("a red circle\na blue square\na green circle\na red square\n")
    values = {"train.iterations": 2, "rollout.prompt_sampling": "dynamic", "prompts": str(file)}
    train(Recipe.default(None, **{**TINY, **values}), tmp_path / "run", stop_after(1))
    file.write_text("a blue circle\n")
    assert resume(tmp_path / "run", accept_changed_prompts=True).iterations == 2


def test_a_full_fine_tune_trains_and_its_best_checkpoint_is_used(tmp_path: Path) -> None:
    from fmg import load

    recipe = Recipe.default(None, **{**TINY, "train.trainable": "full", "train.iterations": 1, "optimizer.lr": 1e-5})
    result = train(recipe, tmp_path / "run")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "transformer" / "config.json").is_file()
    assert "A full fine-tune" in (tmp_path / "run" / "checkpoints" / "checkpoint-1" / "README.md").read_text()
    assert not result.interrupted
    images = load(tmp_path / "run").generate(["a red circle on the left"], [3]).images
    assert images.shape[0] == 1
