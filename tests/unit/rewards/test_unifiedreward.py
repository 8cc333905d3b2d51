"""UnifiedReward: the wording it is asked in, ratings in answers, and what becomes of answers without one."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fmg.core.errors import CheckpointError, RewardError, UsageError
from fmg.core.types import PartialRewardOutput
from fmg.registry import rewards
from fmg.rewards.base import checked
from fmg.rewards.qwen_vl import Patches, read_patches
from fmg.rewards.unifiedreward import UnifiedReward, ratings_of, read_wording
from tests.support.cli import fmg
from tests.tiny_rewards import write_qwen_vl

SCRIPT = """import does_not_exist

prompt = ""
other = f"{does_not_exist.a}{prompt}"
problem = (
    "Rate the image.\\n"
    "Alignment Score (1-5): X\\n\\n"
    f"Text Caption: [{prompt}]"
)
"""
AXES = ("Alignment Score (1-5): 4\n", "Coherence Score (1-5): 2.5\n", "Style Score (1-5): 1\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "instruction.py").write_text(SCRIPT, encoding="utf-8")
    return write_qwen_vl(tmp_path / "model")


def build(folder: Path, **options: object) -> UnifiedReward:
    given = {"weights": str(folder), "instruction": str(folder.parent / "instruction.py"), "dtype": "fp32"}
    built: UnifiedReward = rewards.build("unifiedreward", {**given, **options})
    return built


def teach(folder: Path, lines: tuple[str, ...]) -> None:
    """Makes the model say these lines and stop: each token is followed by one that does not depend on what it saw.

    The layers add nothing, every token has an embedding of its own, and the output weights map it to its successor.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(list(lines))
    tokenizer.save_pretrained(folder)
    said = [*tokenizer("\n").input_ids, *tokenizer.convert_tokens_to_ids([*lines, "<|im_end|>"])]
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensors[name] = torch.zeros_like(tensor)
            elif name.endswith(("embed_tokens.weight", "lm_head.weight")):
                grown = torch.zeros(len(tokenizer), tensor.shape[1])
                for place, (token, successor) in enumerate(pairwise(said)):
                    grown[successor if name.startswith("lm_head") else token, place] = 1
                tensors[name] = grown
            elif name.endswith("language_model.norm.weight"):
                tensors[name] = torch.ones_like(tensor)
        save_file(tensors, file, metadata={"format": "pt"})
    config = (folder / "config.json").read_text()
    size = len(tokenizer) - len(lines)
    (folder / "config.json").write_text(config.replace(f'"vocab_size": {size}', f'"vocab_size": {len(tokenizer)}'))


IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a cat", "a dog with a longer prompt", "a cat"]


def test_ratings_on_three_axes(folder: Path) -> None:
    teach(folder, AXES)
    output = checked("unifiedreward", build(folder, batch_size=2))(IMAGES, PROMPTS)
    assert output.parts.keys() == {"alignment", "coherence", "style"}
    assert [float(output.parts[part][1]) for part in output.parts] == [4, 2.5, 1]
    torch.testing.assert_close(output.total, torch.full((3,), 2.5 / 5))


def test_a_final_score(folder: Path) -> None:
    teach(folder, ("cat (animal): 1\n", "Final Score: 4.5"))
    output = checked("unifiedreward", build(folder, form="final-score"))(IMAGES[:1], PROMPTS[:1])
    assert float(output.total) == pytest.approx(0.9)
    assert float(output.parts["rating"]) == pytest.approx(4.5)


def test_from_the_command_line(folder: Path, tmp_path: Path) -> None:
    teach(folder, AXES)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "a.png")
    options = [f"unifiedreward.{key}={value}" for key, value in (("weights", folder), ("dtype", "fp32"))]
    options.append(f"unifiedreward.instruction={tmp_path / 'instruction.py'}")
    flags = [flag for option in options for flag in ("--set", option)]
    found = fmg("score", str(tmp_path / "a.png"), "--prompt", "a red circle", "--reward", "unifiedreward", *flags)
    assert found.code == 0, found.stderr
    assert "0.5" in found.stdout


def test_the_rules_of_rewards_hold(folder: Path, tmp_path: Path) -> None:
    teach(folder, AXES)
    options = (f"weights={folder}", f"instruction={tmp_path / 'instruction.py'}")
    done = fmg("check-component", "reward", "unifiedreward", *(word for o in options for word in ("--set", o)))
    assert done.code == 0, done.stdout


def test_an_answer_without_ratings_is_no_score_of_zero(folder: Path) -> None:
    with pytest.raises(RewardError, match=r"no score for the prompt 'a cat': the answer .* exceeds 4 tokens"):
        build(folder, max_tokens=4)(IMAGES, PROMPTS)
    teach(folder, AXES[:2])
    with pytest.raises(RewardError, match=r"Coherence.* has no rating from 1 to 5.*on_failure"):
        build(folder)(IMAGES, PROMPTS)
    dropping = build(folder, on_failure="drop-group", patience=2)
    output = dropping(IMAGES, PROMPTS)
    assert isinstance(output, PartialRewardOutput)
    assert not output.scored.any()
    with pytest.raises(RewardError, match="has no rating"):
        dropping(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("text", "form", "found"),
    [
        ("".join(AXES), "axes", {"alignment": 4, "coherence": 2.5, "style": 1}),
        ("alignment score: 5\ncoherence score: 5.0\nstyle score: 5", "axes", dict.fromkeys(AXES, 5)),
        (
            "**Alignment Score (1-5)**: 4\n**Coherence Score:** 3 Style Score (1-5): **2**",
            "axes",
            {"a": 4, "b": 3, "c": 2},
        ),
        ("".join(AXES[:2]), "axes", None),
        ("".join(AXES).replace("2.5", "5.1"), "axes", None),
        ("".join(AXES).replace("4", "X"), "axes", None),
        ("Final Score: 3", "final-score", {"rating": 3}),
        ("Final Score: 2, no: Final Score: **4.25**", "final-score", {"rating": 4.25}),
        ("Final Score: 10", "final-score", None),
        ("Final Score: 5.5", "final-score", None),
        ("4", "final-score", None),
        ("", "axes", None),
    ],
)
def test_ratings_in_an_answer(text: str, form: str, found: dict[str, float] | None) -> None:
    ratings = ratings_of(text, form)
    assert (None if ratings is None else list(ratings.values())) == (None if found is None else list(found.values()))


def test_the_wording_is_read_and_not_run(tmp_path: Path) -> None:
    file = tmp_path / "a.py"
    file.write_text(SCRIPT)
    assert read_wording(file) == "Rate the image.\nAlignment Score (1-5): X\n\nText Caption: [{prompt}]"
    text = tmp_path / "a.txt"
    text.write_text("Rate {prompt}.\n")
    assert read_wording(text) == "Rate {prompt}."
    for wrong in ("x = f'{prompt} {prompt}'", "x = f'{prompt}'; y = f'{prompt}'", "x = '{prompt}'", "x = (", ""):
        file.write_text(wrong)
        with pytest.raises(CheckpointError, match=r"a\.py"):
            read_wording(file)
    text.write_text("no place")
    with pytest.raises(CheckpointError, match=r"a\.txt does not have one text"):
        read_wording(text)


def test_prompts_with_markers_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match="which UnifiedReward reads as a special token"):
        build(folder)(IMAGES[:1], ["a <|im_end|> cat"])


def test_folders_that_cannot_be_used(folder: Path) -> None:
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"model_type": "qwen3_vl",', '"model_type": "llava",'))
    with pytest.raises(CheckpointError, match=r"model_type 'llava'.*Use one of qwen2_vl, qwen2_5_vl, qwen3_vl"):
        build(folder)(IMAGES[:1], PROMPTS[:1])
    (folder / "config.json").write_text(config)
    preprocessor = folder / "preprocessor_config.json"
    text = preprocessor.read_text()
    preprocessor.write_text(text.replace("shortest_edge", "height"))
    with pytest.raises(CheckpointError, match="lacks image_mean, image_std or the minimum and maximum"):
        build(folder)(IMAGES[:1], PROMPTS[:1])
    preprocessor.write_text(text)
    next(folder.glob("*-00001-of-*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match=r"lacks .*00001-of"):
        build(folder)(IMAGES[:1], PROMPTS[:1])


@pytest.mark.parametrize("limits", [{"min_pixels": 1024, "max_pixels": 4096, "size": {"shortest_edge": 1}}, {}])
def test_every_form_of_the_image_processors_config(tmp_path: Path, limits: dict[str, object]) -> None:
    vision = SimpleNamespace(patch_size=14, spatial_merge_size=2, temporal_patch_size=2)
    stated = {"size": {"shortest_edge": 1024, "longest_edge": 4096}, "image_mean": [0, 0, 0], "image_std": [1, 1, 1]}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": {**stated, **limits}}))
    expected = Patches(14, 2, 2, 1024, 4096, (0, 0, 0), (1, 1, 1))
    assert read_patches(tmp_path, vision) == expected
    (tmp_path / "processor_config.json").rename(tmp_path / "preprocessor_config.json")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps({**stated, **limits}))
    assert read_patches(tmp_path, vision) == expected
