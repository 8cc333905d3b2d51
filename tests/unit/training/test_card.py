from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from huggingface_hub import ModelCard

from fmg.data.checkpoints import CheckpointIndex, SavedCheckpoint, write_index
from fmg.data.pictures import to_pil
from fmg.data.prompt_sets import load_prompts
from fmg.data.run_folder import RunFolder
from fmg.inference import load
from fmg.recipe import Recipe
from fmg.training.card import write_cards as write_cards_of
from tests.support.artifact import make_run


def write_cards(run: RunFolder, recipe: Recipe) -> None:
    write_cards_of(run, recipe, load_prompts(recipe.prompts), load_prompts(recipe.eval.prompts))


def _run(tmp_path: Path) -> RunFolder:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    for iteration, strict, score in ((0, 0.25, 0.5), (10, 0.75, 0.875)):
        line = {"iteration": iteration, "eval/shapes_strict_mean": strict, "eval/score": score, "eval/score_se": 0.01}
        run.append_metrics(line)
        run.append_metrics({"iteration": iteration + 1, "reward/mean": 0.1})
    for name in ("checkpoint-10",):
        (run.checkpoints / name).mkdir()
    saved = (SavedCheckpoint("checkpoint-10", 10, "eval/score", 0.875),)
    write_index(run.path, CheckpointIndex(saved, "checkpoint-10", "checkpoint-10"))
    (run.samples / "iteration-0010.png").write_bytes(b"picture")
    return run


def test_a_card_states_base_terms_scores_pictures_commands_and_recipe(tmp_path: Path) -> None:
    run = _run(tmp_path)
    recipe = Recipe.default().with_({"eval.rewards": ["pickscore"]})
    write_cards(run, recipe)
    folder = run.checkpoints / "checkpoint-10"
    text = (folder / "README.md").read_text()
    front = ModelCard(text).data.to_dict()
    # the base is in the package, so there is no hub id to name
    assert "base_model" not in front
    assert front["license"] == "apache-2.0"
    assert front["library_name"] == "diffusers"
    assert "lora" in front["tags"]
    assert "# meanflow-shapes, tuned for 1 shapes" in text
    assert "| base `meanflow-shapes` | Apache-2.0 |" in text
    assert "| reward `pickscore` | MIT (code)" in text
    assert "| reward `shapes` | no published weights | - |" in text
    assert "| shapes_strict | 0.25 | 0.75 |" in text
    assert "| score | 0.5 | 0.875 |" in text
    assert "score_se" not in text
    assert (folder / "samples.png").read_bytes() == b"picture"
    assert "![Samples at fixed prompts and seeds](samples.png)" in text
    assert "fmg export --diffusers RUN OUT" in text
    assert '"clip_range": 0.001' in text
    assert "after iteration 10 of `grpo` on `asfmc` transitions" in text
    for objective, said in (("awm", "on samples of the map's own sampler"), ("reward-gradient", "on gradients of")):
        write_cards(run, recipe.with_({"objective": objective, "rewards": ["shapes-clip"], "rollout.kind": "chain"}))
        assert f"`{objective}` {said}" in (folder / "README.md").read_text()


def test_a_card_says_which_prompts_its_scores_are_of(tmp_path: Path) -> None:
    run, held_out = _run(tmp_path), Recipe.default()
    write_cards(run, held_out)
    card = run.checkpoints / "checkpoint-10" / "README.md"
    assert "images of prompts that training did not see, 4 steps each." in card.read_text()
    write_cards(run, held_out.with_({"eval.prompts": held_out.prompts.name}))
    count = len(load_prompts(held_out.prompts))
    assert f"images of prompts of which training saw {count} of {count}, 4 steps each." in card.read_text()
    assert "did not see" not in card.read_text()
    assert "Held-out" not in card.read_text()


def test_a_card_says_who_read_back_what(tmp_path: Path) -> None:
    run = _run(tmp_path)
    card = run.checkpoints / "checkpoint-10" / "README.md"
    for trainable in ("lora", "full"):
        write_cards(run, Recipe.default().with_({"train.trainable": trainable}))
        assert "stock diffusers read it back and reproduced the same image." in card.read_text()
    write_cards(run, Recipe.default().with_({"train.trainable": "lora+duration"}))
    assert "stock diffusers read it back" not in card.read_text()
    assert "stock diffusers read back its LoRA, and fmg its embedder" in card.read_text()


def test_no_path_of_the_machine_reaches_a_card(tmp_path: Path) -> None:
    run = _run(tmp_path)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n")
    recipe = Recipe.default().with_({"prompts": {"name": "file", "path": str(prompts)}})
    write_cards(run, recipe)
    text = (run.checkpoints / "checkpoint-10" / "README.md").read_text()
    assert '"path": "prompts.txt"' in text
    assert str(tmp_path) not in text


def test_a_run_without_checkpoints_gets_no_card(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", "meanflow-shapes")
    write_cards(run, Recipe.default())
    assert not list(run.path.rglob("README.md"))


def test_the_front_matter_names_a_repository_of_the_hub_or_none(tmp_path: Path) -> None:
    run = _run(tmp_path)
    card = run.checkpoints / "checkpoint-10" / "README.md"

    def front(recipe: Recipe) -> dict[str, object]:
        write_cards(run, recipe)
        return ModelCard(card.read_text()).data.to_dict()

    student = front(_held_out("meanflow-flux"))
    assert student["base_model"] == "Alibaba-DAMO-Academy/T2I-Distill"
    assert student["base_model_relation"] == "adapter"
    assert student["license"] == "other"
    local = front(_held_out("meanflow-flux", **{"model.student": str(tmp_path / "mine.safetensors")}))
    assert not {"base_model", "license"} & local.keys()


def _held_out(model: str, **options: object) -> Recipe:
    return Recipe.default(model, **{"rewards": ["jpeg-incompressibility"], **options})


@pytest.mark.parametrize("trained", ["lora", "duration", "full"])
def test_the_diffusers_code_of_a_card_generates_the_images_of_generate(
    trained: Literal["lora", "duration", "full"], tmp_path: Path
) -> None:
    trainable = {"lora": "lora", "duration": "lora+duration", "full": "full"}[trained]
    options = {"train.trainable": trainable, "lora.rank": 2, "rollout.steps": 3, "rollout.grid": "paper"}
    recipe = Recipe.default("meanflow-shapes", **options)
    run = RunFolder(make_run(tmp_path / "run", recipe, seed=2, trained=trained))
    write_cards(run, recipe)
    checkpoint = run.checkpoints / "checkpoint-1"
    text = (checkpoint / "README.md").read_text()
    code = text.partition("```python\n")[2].partition("```")[0]
    assert "FlowMapPipeline" in code
    scope: dict[str, Any] = {}
    prompt = "a red circle on the left"
    exec(code.replace("FOLDER", str(checkpoint)).replace("PROMPT", prompt), scope)
    expected = load(run.path, device="cpu").generate([prompt], [0]).images[0]
    assert np.abs(np.asarray(scope["images"][0], float) - np.asarray(to_pil(expected), float)).max() <= 1
