"""The shipped scorer of the shapes world: as good as its card says on renders, small, and strict about its input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import fmg
from fmg.core.errors import CheckpointError, RefusedImageError, UsageError
from fmg.registry import rewards
from fmg.worlds.shapes.clip import MAX_WORDS, WEIGHTS, load_network, word_ids
from fmg.worlds.shapes.prompts import prompt_set
from fmg.worlds.shapes.scene import place, render
from pretraining.scorer import ScorerSettings, agreement, train_scorer

FOLDER = Path(fmg.__file__).parent / "assets" / "shapes-clip"


def test_it_tells_right_prompts_from_wrong_ones() -> None:
    rng, items = np.random.default_rng(5), prompt_set("heldout")
    images = torch.from_numpy(render([place(items[i % len(items)].scene, rng) for i in range(200)]))
    # half of them those of the image before
    prompts = [items[(i - (i % 2)) % len(items)].prompt for i in range(200)]
    found = agreement(load_network(FOLDER / WEIGHTS), images, prompts)
    assert found.auc > 0.99
    assert found.accuracy > 0.97
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 2e6


def test_every_prompt_of_the_world_is_read_and_other_input_is_refused(tmp_path: Path) -> None:
    ids = word_ids([item.prompt for split in ("train", "heldout", "hard") for item in prompt_set(split)])  # type: ignore[arg-type]
    assert ids.shape[1] == MAX_WORDS
    assert int(ids[:, 0].min()) > 0
    reward = rewards.build("shapes-clip")
    with pytest.raises(RefusedImageError, match="32 x 32"):
        reward(torch.zeros(1, 3, 24, 24), ["a red circle"])
    with pytest.raises(UsageError, match="cannot read the prompt 'a dog'"):
        reward(torch.zeros(1, 3, 32, 32), ["a dog"])
    (tmp_path / WEIGHTS).write_bytes(b"nothing")
    with pytest.raises(CheckpointError, match="Install fmg again"):
        load_network(tmp_path / WEIGHTS)


@pytest.mark.slow
def test_a_short_training_learns_and_writes_its_card(tmp_path: Path) -> None:
    figures = train_scorer(ScorerSettings(steps=30, batch=64, evaluation_images=200), tmp_path)
    assert figures["renders"].auc > 0.8
    assert "fmg pretrain shapes-clip --seed 0" in (tmp_path / "README.md").read_text(encoding="utf-8")
