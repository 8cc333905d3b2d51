"""Pictures and prompts from files: what is read, how, and what is refused with which message."""

from __future__ import annotations

import json
import struct
import zlib
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image

from fmg.core.errors import CheckpointError, FmgWarning, RewardError, UsageError
from fmg.data.prompt_sets import load_prompts
from fmg.eval.image_folders import batches, geneval_dump, picture_files
from fmg.eval.score import score
from fmg.eval.scoring import ScoreCollector
from fmg.eval.set_metrics import references
from fmg.registry import feature_extractors, rewards
from fmg.rewards.images import read_image
from tests.tiny_rewards import write_clip_folder

SCHEMA = Path(__file__).resolve().parents[3] / "docs" / "schemas" / "score.schema.json"
PIXELS = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)


def png_claiming(width: int, height: int) -> bytes:
    """A PNG of 8 x 8 pixels whose header claims another size."""
    file = BytesIO()
    Image.fromarray(PIXELS[:, :, :3]).save(file, format="PNG")
    data = file.getvalue()
    header = data[12:16] + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """One picture of every kind that is read."""
    folder = tmp_path / "pictures"
    (folder / "deeper").mkdir(parents=True)
    rgb = Image.fromarray(PIXELS[:, :, :3])
    Image.fromarray(PIXELS).save(folder / "rgba.png")
    Image.fromarray(PIXELS[:, :, 0].astype(np.uint16) * 257).save(folder / "deep.png")
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("L").save(folder / "grey.PNG")
    rgb.convert("P").save(folder / "palette.gif")
    rgb.resize((12, 8)).save(folder / "deeper" / "oblong.webp")
    (folder / "notes.txt").write_text("no picture")
    return folder


def test_every_kind_of_picture_is_scored_as_it_would_be_alone(pictures: Path) -> None:
    found = score([pictures], rewards=["jpeg-compressibility"], prompt="a cup", extractors=["pixels"])
    Draft202012Validator(json.loads(SCHEMA.read_text(encoding="utf-8"))).validate(found.to_json())
    names = [Path(str(image["path"])).name for image in found.images]
    assert names == ["cmyk.jpg", "deep.png", "oblong.webp", "grey.PNG", "palette.gif", "rgba.png"]
    reward = rewards.build("jpeg-compressibility")
    for image in found.images:
        alone = reward(read_image(str(image["path"]))[None], ["a cup"]).total
        assert image["scores"] == {"jpeg-compressibility": pytest.approx(float(alone[0]))}
    assert {row.metric for row in found.metrics} == {"diversity_within_prompts", "cosine_diversity"}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("text.png", b"not an image", "is not an image file"),
        ("empty.png", b"", "is not an image file"),
        ("zero.png", png_claiming(0, 0), "cannot be decoded|no pixels|not an image"),
        ("huge.png", png_claiming(20_000, 20_000), "more than 33,554,432 pixels"),
        ("cut.png", png_claiming(8, 8)[:-60], "cannot be decoded"),
    ],
)
def test_a_picture_that_cannot_be_read_is_named(pictures: Path, name: str, content: bytes, says: str) -> None:
    (pictures / name).write_bytes(content)
    for attempt in (
        lambda: score([pictures], rewards=["jpeg-compressibility"], prompt="a cup"),
        lambda: references(str(pictures), {"pixels": feature_extractors.build("pixels")}, torch.device("cpu")),
    ):
        with pytest.raises(UsageError, match=says) as caught:
            attempt()
        assert name in caught.value.what


def test_a_truncated_picture_and_unknown_ranges_are_named(pictures: Path) -> None:
    whole = (pictures / "cmyk.jpg").read_bytes()
    (pictures / "cmyk.jpg").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UsageError, match=r"cmyk.jpg' (cannot be decoded|is not an image)"):
        score([pictures], extractors=["pixels"])
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(pictures / "cmyk.jpg", format="TIFF")
    with pytest.raises(UsageError, match="unknown range"):
        score([pictures], extractors=["pixels"])


@pytest.mark.parametrize("prompt", ["", "x " * 5000, "日本語 ☃ é \u202e", "a\nb\x00c"])
def test_any_prompt_can_be_scored(pictures: Path, tmp_path: Path, prompt: str) -> None:
    clip = str(write_clip_folder(tmp_path / "clip"))
    options = {"clipscore": {"weights": clip}}
    found = score([pictures / "rgba.png"], rewards=["clipscore"], prompt=prompt, options=options)
    assert found.images[0]["prompt"] == prompt
    assert np.isfinite(found.results[0].mean)


def test_prompts_come_from_metadata_beside_the_pictures(pictures: Path) -> None:
    lines = [
        {"file_name": "rgba.png", "prompt": "a photo of a red cup"},
        {"file_name": "deeper/oblong.webp", "text": "a photo of a bus"},
    ]
    for file in picture_files(pictures):
        if file.name not in ("rgba.png", "oblong.webp"):
            file.unlink()
    (pictures / "metadata.jsonl").write_text("\n\n".join(map(json.dumps, lines)))
    found = score([pictures], rewards=["jpeg-compressibility"])
    assert [image["prompt"] for image in found.images] == ["a photo of a red cup", "a photo of a bus"]
    alone = score([pictures / "rgba.png"], rewards=["jpeg-compressibility"])
    assert [image["prompt"] for image in alone.images] == ["a photo of a red cup"]
    over = score([pictures / "rgba.png"], rewards=["jpeg-compressibility"], prompt="mine")
    assert [image["prompt"] for image in over.images] == ["mine"]
    for broken, says in (
        ("{", r"metadata.jsonl:1: not JSON"),
        ("[1]", r"metadata.jsonl:1: .* not a JSON object"),
        ('{"file_name": "rgba.png"}', r"metadata.jsonl:1: no file_name and prompt"),
        ('{"file_name": "gone.png", "prompt": "x"}', r"names '.*gone.png'"),
    ):
        (pictures / "metadata.jsonl").write_text(broken)
        with pytest.raises(UsageError, match=says):
            score([pictures], rewards=["jpeg-compressibility"])


def test_a_picture_with_two_lines_is_scored_for_both(pictures: Path) -> None:
    lines = [{"file_name": "rgba.png", "prompt": prompt} for prompt in ("a red cup", "a dog")]
    for file in picture_files(pictures):
        if file.name != "rgba.png":
            file.unlink()
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for path in (pictures, pictures / "rgba.png"):
        found = score([path], rewards=["jpeg-compressibility"])
        assert [image["prompt"] for image in found.images] == ["a red cup", "a dog"]


def test_a_picture_without_a_caption_is_not_left_out(pictures: Path, tmp_path: Path) -> None:
    (pictures / "metadata.jsonl").write_text('{"file_name": "rgba.png", "prompt": "a red cup"}\n')
    with pytest.raises(UsageError, match=r"no prompt for '.*cmyk.jpg', the first of 5 such images"):
        score([pictures], rewards=["jpeg-compressibility"])
    found = score([pictures], rewards=["jpeg-compressibility"], prompt="a cup")
    assert [image["prompt"] for image in found.images] == ["a cup"] * 6
    with geneval_dump(tmp_path / "tree", list(load_prompts("geneval-heldout"))[:2]) as dump:
        dump(torch.rand(2, 3, 16, 16), {})
    Image.fromarray(PIXELS[:, :, :3]).save(tmp_path / "tree" / "stray.png")
    with pytest.raises(UsageError, match=r"GenEval tree .* no prompt for '.*stray.png', the first of 1 such"):
        score([tmp_path / "tree"], rewards=["jpeg-compressibility"])


def test_a_geneval_tree_is_read_back_with_its_prompts_and_tags(tmp_path: Path) -> None:
    entries = [prompt for prompt in load_prompts("geneval-heldout") if prompt.tag in ("colors", "counting")][:4] * 2
    with geneval_dump(tmp_path / "tree", entries) as dump:
        dump(torch.rand(5, 3, 16, 16), {})
        dump(torch.rand(3, 3, 16, 16), {})
    found = score([tmp_path / "tree"], rewards=["jpeg-compressibility"])
    assert len(found.images) == 8
    assert [image["prompt"] for image in found.images[::2]] == [entry.text for entry in entries[:4]]
    # the grids are not scored as pictures
    assert len(picture_files(tmp_path / "tree")) == 8


def test_parts_that_differ_between_batches_name_the_reward() -> None:
    collected = ScoreCollector()
    collected.add({("mine", "total"): np.ones(2), ("mine", "sharp"): np.ones(2)})
    collected.add({("mine", "total"): np.ones(1), ("mine", "sharp"): np.zeros(1)})
    for other in ({("mine", "total"): np.ones(2)}, {**collected.parts(), ("mine", "late"): np.ones(2)}):
        with pytest.raises(RewardError, match=r"The reward 'mine' reports the part '(sharp|late)' for some"):
            collected.add(other)
    assert collected.parts()["mine", "sharp"].tolist() == [1.0, 1.0, 0.0]


def test_a_dump_that_is_interrupted_leaves_nothing(tmp_path: Path) -> None:
    entries = list(load_prompts("geneval-heldout"))[:2]

    def interrupted() -> None:
        with geneval_dump(tmp_path / "tree", entries) as dump:
            dump(torch.rand(1, 3, 16, 16), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_links_to_nothing_are_named_and_files_of_macos_left_out(pictures: Path) -> None:
    (pictures / "._rgba.png").write_bytes(b"\0\5\x16\7")
    with pytest.warns(FmgWarning, match=r"1 file in '.*pictures'"):
        assert len(picture_files(pictures)) == 6
    (pictures / "._rgba.png").unlink()
    (pictures / "link.png").symlink_to(pictures / "rgba.png")
    assert len(picture_files(pictures)) == 7
    (pictures / "gone.png").symlink_to("nowhere.png")
    with pytest.raises(UsageError, match=r"gone.png' is a broken link"):
        score([pictures], rewards=["jpeg-compressibility"], prompt="x")


@pytest.mark.parametrize("name", ["../rgba.png", "/etc/passwd", "a/../../rgba.png"])
def test_metadata_names_pictures_of_its_own_folder_only(name: str, pictures: Path) -> None:
    inner = pictures / "deeper"
    (inner / "metadata.jsonl").write_bytes(b"\xef\xbb\xbf" + json.dumps({"file_name": name, "prompt": "x"}).encode())
    with pytest.raises(CheckpointError, match="which is not a path within"):
        score([inner], rewards=["jpeg-compressibility"])


@pytest.mark.slow
def test_batches_are_bounded_by_pixels(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (2900, 2900)).save(tmp_path / f"{number}.png")
    assert [len(batch) for _, batch in batches(picture_files(tmp_path))] == [1, 1, 1, 1, 1]
    for number in range(5):
        Image.new("L", (2800, 2900)).save(tmp_path / f"{number}.png")
    assert [len(batch) for _, batch in batches(picture_files(tmp_path))] == [2, 2, 1]


def test_batches_join_neighbours_of_one_size(pictures: Path) -> None:
    found = [(rows.start, rows.stop, tuple(images.shape)) for rows, images in batches(picture_files(pictures), 3)]
    assert found == [(0, 2, (2, 3, 8, 8)), (2, 3, (1, 3, 8, 12)), (3, 6, (3, 3, 8, 8))]


def test_missing_prompts_and_pictures_are_reported(pictures: Path, tmp_path: Path) -> None:
    (tmp_path / "none").mkdir()
    for arguments, says in (
        ({"rewards": []}, "nothing to measure"),
        ({"rewards": ["jpeg-compressibility"]}, "There is no prompt for"),
        ({"rewards": ["shapes"], "prompt": "a nice dog"}, "a nice dog"),
        ({"rewards": ["shapez"], "prompt": "x"}, "Did you mean 'shapes'"),
        ({"extractors": ["pixels"], "reference": "world"}, "embedded world"),
        ({"extractors": ["pixels"], "reference": str(tmp_path / "none")}, "contains no images"),
        ({"rewards": ["jpeg-compressibility"], "prompt": "x", "reference": str(pictures)}, "--features"),
    ):
        with pytest.raises(UsageError, match=says):
            score([pictures], **arguments)
    for path, says in ((tmp_path / "none", "contains no images"), (tmp_path / "gone", "no image or folder")):
        with pytest.raises(UsageError, match=says):
            score([path], extractors=["pixels"])
