from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, SwinConfig
from transformers.models.mask2former.image_processing_pil_mask2former import Mask2FormerImageProcessorPil

from fmg.core.errors import CheckpointError, UsageError
from fmg.core.hub import locate
from fmg.registry import rewards
from fmg.rewards.clip import ClipEncoder, load_clip
from fmg.rewards.configs import GenEvalConfig
from fmg.rewards.geneval import ColorNamer, Mask2FormerDetector, load_detector
from fmg.rewards.geneval_rules import (
    COLORS,
    OBJECT_NAMES,
    Clause,
    Detections,
    Position,
    Specification,
    parse_prompt,
    specification_of,
)
from fmg.rewards.images import resize_and_crop
from tests.tiny_rewards import write_clip_folder

CPU = torch.device("cpu")


def write_detector(folder: Path, labels: int = 80) -> Path:
    backbone = SwinConfig(
        image_size=32,
        embed_dim=16,
        depths=[1] * 4,
        num_heads=[1] * 4,
        window_size=4,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=32,
        mask_feature_size=32,
        hidden_dim=32,
        num_queries=10,
        num_labels=labels,
        encoder_layers=1,
        decoder_layers=2,
        num_attention_heads=2,
        dim_feedforward=32,
        encoder_feedforward_dim=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Mask2FormerForUniversalSegmentation(config)
    model.save_pretrained(str(folder))
    Mask2FormerImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("geneval")
    return {"detector": str(write_detector(root / "detector")), "clip": str(write_clip_folder(root / "clip"))}


ORANGE_DOG = Clause("dog", 1, "orange")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a photo of a bench", Specification("single_object", (Clause("bench", 1),))),
        ("a photo of an orange", Specification("single_object", (Clause("orange", 1),))),
        ("a photo of a tv and an oven", Specification("two_object", (Clause("tv", 1), Clause("oven", 1)))),
        ("a photo of four buses", Specification("counting", (Clause("bus", 4),), (Clause("bus", 5),))),
        (
            "a photo of two toothbrushs",
            Specification("counting", (Clause("toothbrush", 2),), (Clause("toothbrush", 3),)),
        ),
        ("a photo of three skises", Specification("counting", (Clause("skis", 3),), (Clause("skis", 4),))),
        ("a photo of an orange dog", Specification("colors", (ORANGE_DOG,))),
        (
            "a photo of a dog right of a teddy bear",
            Specification("position", (Clause("teddy bear", 1), Clause("dog", 1, None, Position("right of", 0)))),
        ),
        (
            "a photo of an orange dog and a blue hot dog",
            Specification("color_attr", (ORANGE_DOG, Clause("hot dog", 1, "blue"))),
        ),
    ],
)
def test_prompts_of_all_six_templates(prompt: str, expected: Specification) -> None:
    assert parse_prompt(prompt) == expected


@pytest.mark.parametrize("prompt", ["", "a dog", "a photo of a unicorn", "a photo of eleven dogs", "é" * 10_000])
def test_other_prompts_are_refused(prompt: str) -> None:
    with pytest.raises(UsageError, match="GenEval prompt"):
        parse_prompt(prompt)


def test_every_single_object_and_every_plural_is_understood() -> None:
    assert len(set(OBJECT_NAMES)) == 80
    for name in OBJECT_NAMES:
        assert parse_prompt(f"a photo of a {name}").include == (Clause(name, 1),)
        plural = f"{name}es" if name.endswith("s") else f"{name}s"
        assert parse_prompt(f"a photo of two {plural}").include == (Clause(name, 2),)


def test_metadata_gives_the_same_specification_as_the_prompt() -> None:
    entry = {
        "tag": "position",
        "include": [{"class": "bed", "count": 1}, {"class": "dog", "count": 1, "position": ["above", 0]}],
        "prompt": "a photo of a dog above a bed",
    }
    assert specification_of(entry) == parse_prompt("a photo of a dog above a bed")


@pytest.mark.parametrize(
    ("include", "message"),
    [
        ([], "include"),
        ([{"class": "dog"}], "count"),
        ([{"class": "unicorn", "count": 1}], "unicorn"),
        ([{"class": "dog", "count": 1, "color": "mauve"}], "mauve"),
        ([{"class": "dog", "count": 1, "position": ["above", 0]}], "relative to clause 0"),
        ([{"class": "dog", "count": 0}], "count"),
    ],
)
def test_wrong_metadata_is_refused(include: list[dict[str, object]], message: str, tmp_path: Path) -> None:
    file = tmp_path / "metadata.jsonl"
    file.write_text(json.dumps({"tag": "colors", "include": include, "prompt": "p"}) + "\n")
    with pytest.raises(UsageError, match=rf"metadata.jsonl:1: .*{message}"):
        rewards.build("geneval", {"metadata": str(file)})


def test_prompts_outside_the_metadata_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "metadata.jsonl"
    entry = {"tag": "free", "include": [{"class": "dog", "count": 1}], "prompt": "my dog"}
    file.write_text(json.dumps(entry))
    reward = rewards.build("geneval", {"metadata": str(file)})
    reward.check_prompts(["my dog"])  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match="your dog"):
        reward.check_prompts(["my dog", "your dog"])  # type: ignore[attr-defined]


class FakeModel:
    """Returns fixed logits, like a detector that sees a square at the left and a long bar below."""

    device, dtype = CPU, torch.float32

    def __call__(self, pixel_values: torch.Tensor) -> FakeModel:
        assert pixel_values.shape == (1, 3, 32, 64)
        self.class_queries_logits = torch.full((1, 3, 81), -8.0)
        self.class_queries_logits[0, 0, 16] = 8
        self.class_queries_logits[0, 1, 15] = 4
        self.class_queries_logits[0, 2, 80] = 8
        self.masks_queries_logits = torch.full((1, 3, 8, 16), -6.0)
        self.masks_queries_logits[0, 0, 2:4, 2:4] = 6
        self.masks_queries_logits[0, 1, 6:8, :] = 6
        return self


def test_boxes_scores_and_masks_of_the_detector() -> None:
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    (found,) = Mask2FormerDetector(FakeModel(), processor, 0.3)(torch.rand(1, 3, 64, 128))
    assert [OBJECT_NAMES[label] for label in found.labels] == ["dog", "cat"]
    # a cell of the mask is 8 pixels; linear interpolation crosses 0 at the cells' edges
    np.testing.assert_array_equal(found.boxes, [[16, 16, 32, 32], [0, 48, 128, 64]])
    assert found.masks.shape == (2, 64, 128)
    assert found.masks[0].sum() <= 16 * 16
    assert 0.8 < found.scores[0] < 1


def test_detector_drops_what_the_rules_cannot_use() -> None:
    processor = Mask2FormerImageProcessorPil(size={"shortest_edge": 32, "longest_edge": 64})
    (found,) = Mask2FormerDetector(FakeModel(), processor, 0.9999)(torch.rand(1, 3, 64, 128))
    assert len(found.labels) == 1
    (none,) = Mask2FormerDetector(FakeModel(), processor, 1.0)(torch.rand(1, 3, 64, 128))
    assert none.boxes.shape == (0, 4)
    assert none.masks.shape == (0, 64, 128)


def test_colour_is_that_of_the_object_on_grey_cut_to_its_box(folders: dict[str, str]) -> None:
    config = GenEvalConfig(**folders)
    files = {asset.what: locate(asset, "reward", "geneval") for asset in config.assets()}
    encoder = ClipEncoder(
        *load_clip(files["model"], files["tokenizer"], CPU, torch.float32), preprocess=lambda squares, _: squares
    )
    image = torch.rand(3, 40, 60, generator=torch.Generator().manual_seed(1))
    mask = np.zeros((2, 40, 60), dtype=bool)
    mask[0, 10:30, 20:50] = mask[1, :, 3] = True
    found = Detections(
        np.array([[20, 10, 50, 30], [3, 0, 4, 40]], dtype=np.float32),
        np.zeros(2, np.int64),
        np.ones(2, np.float32),
        mask,
    )
    names = ColorNamer(encoder, 32)(image, found, "dog", [0, 1])

    inside = torch.from_numpy(mask[0])
    crop = torch.where(inside, image, 0x99 / 0xFF)[None, :, 10:30, 20:50]
    image_embedding = encoder(resize_and_crop(crop, 32))
    colours = []
    for colour in COLORS:
        texts = [f"a photo of a {colour} dog", f"a photo of a {colour}-colored dog", f"a photo of a {colour} object"]
        mean = encoder.texts(texts).mean(0)
        colours.append(mean / mean.norm())
    assert names[0] == COLORS[int((image_embedding @ torch.stack(colours).T).argmax())]
    assert names[1] in COLORS


def test_scores_end_to_end_on_tiny_folders(folders: dict[str, str]) -> None:
    reward = rewards.build("geneval", {**folders, "threshold": 0.0, "counting_threshold": 0.0, "score": "correct"})
    images = torch.rand(3, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    prompts = ["a photo of a red dog", "a photo of two cats", "a photo of a dog left of a cat"]
    output = reward(images, prompts)
    assert set(output.parts) == {"correct", "strict", "dense"}
    assert torch.equal(output.total, output.parts["correct"])
    again = torch.cat([reward(images[i : i + 1], prompts[i : i + 1]).parts["dense"] for i in range(3)])
    assert torch.equal(again, output.parts["dense"])
    # 10 queries and 80 classes above threshold 0: the 100 best pairs hold some class, which is then found
    (found,) = load_detector(
        locate(GenEvalConfig(**folders).assets()[0], "reward", "geneval"), CPU, torch.float32, 0.0
    )(images[:1])
    assert len(found.labels) > 0
    seen = OBJECT_NAMES[int(found.labels[found.scores.argmax()])]
    assert float(reward(images[:1], [f"a photo of a {seen}"]).total) == 1.0


def test_a_detector_of_other_classes_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    reward = rewards.build("geneval", {**folders, "detector": str(write_detector(tmp_path, labels=5))})
    with pytest.raises(CheckpointError, match="5 classes"):
        reward(torch.rand(1, 3, 32, 32), ["a photo of a dog"])


def test_a_detector_that_lacks_a_tensor_is_refused(folders: dict[str, str], tmp_path: Path) -> None:
    folder = write_detector(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    lost = next(name for name in tensors if name.endswith("class_predictor.weight"))
    kept = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    reward = rewards.build("geneval", {**folders, "detector": str(folder)})
    with pytest.raises(CheckpointError, match="missing keys: class_predictor"):
        reward(torch.rand(1, 3, 32, 32), ["a photo of a dog"])
