from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageDraw, ImageFont

from fmg.core.errors import CheckpointError, MissingDependencyError, UsageError
from fmg.registry import rewards
from fmg.rewards.base import check_prompts
from fmg.rewards.ocr import (
    Recogniser,
    ctc_log_prob,
    edit_distance,
    greedy_labels,
    quoted_text,
    shipped_model,
    similarity,
)

pytest.importorskip("rapidocr", reason="needs the packages of flow-map-grpo[ocr]")


def strip(
    text: str, height: int = 32, width: int = 64, size: float = 18, ink: str = "black", paper: str = "white"
) -> torch.Tensor:
    picture = Image.new("RGB", (width, height), paper)
    ImageDraw.Draw(picture).text((width / 2, height / 2), text, ink, ImageFont.load_default(size), anchor="mm")
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255


def shipped_recogniser() -> Recogniser:
    return Recogniser(shipped_model("ocr-logp"), threads=1)


@pytest.fixture(scope="module")
def ocr() -> Any:
    return rewards.build("ocr")


@pytest.fixture(scope="module")
def logp() -> Any:
    return rewards.build("ocr-logp")


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ('a sign that says "HELLO 42"', "HELLO 42"),
        ("a sign that says “HELLO”", "HELLO"),
        ("ein Schild: „Grüße“ an der Wand", "Grüße"),
        ('"one" and "two"', "one"),
        ('a mixed pair: “left" here', "left"),
        ('padded " x "', "x"),
        ('a 5" disk labelled "DATA"', "DATA"),
        ('a 10"x12" print that says "HI"', "HI"),
        ('"ROUTE 66" on a 5" sign', "ROUTE 66"),
        # the only pair of quotes, as in Flow-GRPO
        ('room 5"EXIT"', "EXIT"),
        ('a board: “"HELLO"”', "HELLO"),
        ('a board: ""HELLO""', "HELLO"),
        ('a board: "“HELLO”"', "HELLO"),
        ('a board: “say "HI" now”', 'say "HI" now'),
        ('a board: "say “HI” now"', "say “HI” now"),
        ("”HEJ” on a board", "HEJ"),
        ('写着"你好"的牌子', "你好"),
    ],
)
def test_quoted_text(prompt: str, text: str) -> None:
    assert quoted_text(prompt) == text


@given(st.lists(st.text(st.characters(exclude_characters='"“”„', exclude_categories=["Cs"]), max_size=6), min_size=3))
def test_ordinary_prompts_are_read_as_flow_grpo_reads_them(parts: list[str]) -> None:
    prompt = '"'.join([parts[0] + " ", *parts[1:]])
    expected = prompt.split('"')[1].strip()
    if expected:
        assert quoted_text(prompt) == expected


@pytest.mark.parametrize("prompt", ["", "a sign that says HELLO", 'one "', 'empty ""', 'blank "  "', "'single'"])
def test_prompts_without_a_target_are_refused_when_the_set_is_loaded(prompt: str, ocr: Any, logp: Any) -> None:
    for name, reward in (("ocr", ocr), ("ocr-logp", logp)):
        with pytest.raises(UsageError, match=name):
            check_prompts(name, reward, ['say "yes"', prompt])


@pytest.mark.parametrize(
    ("reading", "target", "expected"),
    [
        ("HELLO", "hello", 1.0),
        ("he llo", "HEL LO", 1.0),
        ("SAYHELLOTHERE", "hello", 1.0),
        ("JELLO", "hello", 0.8),
        ("", "hello", 0.0),
        ("completely different", "abc", 0.0),
        ("hell", "hello", 0.8),
        ("helllo", "hello", 0.8),
    ],
)
def test_the_edit_distance_rule(reading: str, target: str, expected: float) -> None:
    assert similarity(reading, target) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("", "abc", 3), ("kitten", "sitting", 3), ("flaw", "lawn", 2), ("ab", "ba", 2), ("é", "e", 1)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def all_alignments(probabilities: np.ndarray, labels: Sequence[int]) -> float:  # type: ignore[type-arg]
    """The sum over every path whose merged classes are `labels`."""
    frames, classes = probabilities.shape
    total = 0.0
    for path in product(range(classes), repeat=frames):
        merged = [c for i, c in enumerate(path) if c != 0 and (i == 0 or path[i - 1] != c)]
        if merged == list(labels):
            total += float(np.prod([probabilities[t, c] for t, c in enumerate(path)]))
    return total


@pytest.mark.parametrize("labels", [[1], [1, 2], [1, 1], [2, 1, 2], [1, 1, 1], [3, 3, 1, 2]])
def test_ctc_equals_the_sum_over_all_alignments(labels: list[int]) -> None:
    random = np.random.default_rng(0).random((6, 4)).astype(np.float32)
    probabilities = random / random.sum(1, keepdims=True)
    expected = all_alignments(probabilities, labels)
    assert np.exp(ctc_log_prob(probabilities, np.array(labels))) == pytest.approx(expected, rel=1e-6, abs=1e-300)


def test_ctc_equals_torch() -> None:
    logits = torch.randn(12, 1, 20, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    labels = torch.tensor([3, 3, 7, 1])
    loss = torch.nn.functional.ctc_loss(logits, labels[None], torch.tensor([12]), torch.tensor([4]), reduction="none")
    ours = ctc_log_prob(logits[:, 0].exp().numpy(), labels.numpy())
    assert ours == pytest.approx(-float(loss), rel=1e-5)


def test_ctc_of_a_text_longer_than_the_frames() -> None:
    probabilities = np.full((2, 3), 1 / 3, dtype=np.float32)
    assert ctc_log_prob(probabilities, np.array([1, 1])) == -np.inf
    assert ctc_log_prob(probabilities, np.array([1, 2])) == pytest.approx(2 * np.log(1 / 3))


def test_greedy_reading_merges_repeats_and_drops_blanks() -> None:
    path = [0, 1, 1, 0, 1, 2, 2, 0]
    assert greedy_labels(np.eye(3, dtype=np.float32)[path]) == [1, 1, 2]


def test_rendered_words_are_read(ocr: Any, logp: Any) -> None:
    images = torch.stack([strip("CAT"), strip("DOG"), strip("CAT", ink="red"), torch.ones(3, 32, 64)])
    prompts = ['a sign that says "cat"'] * 2 + ["a sign that says “CAT”"] * 2
    read = ocr(images, prompts)
    assert read.total.tolist() == [1, 0, 1, 0]
    assert read.parts["exact"].tolist() == read.parts["found"].tolist() == [1, 0, 1, 0]
    dense = logp(images, ['"CAT"', '"CAT"', '"CAT"', '"CAT"'])
    assert dense.parts["exact"].tolist() == [1, 0, 1, 0]
    assert dense.total[0] > -0.05
    assert dense.total[2] > -0.05
    assert max(dense.total[1], dense.total[3]) < -5
    assert (dense.total <= 0).all()
    torch.testing.assert_close(dense.parts["probability"], dense.total.exp(), rtol=1e-4, atol=1e-6)


def test_more_text_than_requested_is_found_but_not_exact(ocr: Any) -> None:
    output = ocr(strip("HELLO", width=128, size=30, height=64)[None], ['"HELL"'])
    assert (output.total.item(), output.parts["exact"].item()) == (1, 0)


def test_logp_rises_while_the_word_appears_out_of_noise(logp: Any) -> None:
    noise = torch.rand(8, 3, 32, 64, generator=torch.Generator().manual_seed(0))
    means = [float(logp(a * strip("CAT") + (1 - a) * noise, ['"CAT"'] * 8).total.mean()) for a in (0.0, 0.25, 0.4)]
    assert means[0] < -5
    assert means[0] + 0.5 < means[1] < means[2] - 0.5
    assert means[2] > -0.5


def test_logp_distinguishes_case_and_is_bounded_by_the_floor() -> None:
    shallow = rewards.build("ocr-logp", {"floor": -3.0})
    scores = shallow(torch.stack([strip("CAT"), strip("CAT"), strip("DOG")]), ['"CAT"', '"cat"', '"CAT"']).total
    assert scores[0] > scores[1]
    assert scores[2] == -3
    long = shallow(strip("CAT")[None], ['"a text with far more letters than frames"'])
    assert long.total.item() == -3


@pytest.mark.parametrize(("ink", "paper"), [("black", "white"), ("yellow", "white"), ("#803030", "#703070")])
def test_the_recogniser_is_fed_as_rapidocr_feeds_it(ink: str, paper: str) -> None:
    """Its pipeline pads only strips that are shorter than 320 pixels at height 48; red and blue swapped differ more."""
    from rapidocr import RapidOCR

    image = strip("HELLO THERE", 24, 192, 16, ink, paper)
    quiet = {"Global.log_level": "critical", "Global.text_score": 0.0, "Global.use_preprocess_img": False}
    theirs = RapidOCR(params=quiet)(
        np.ascontiguousarray((image * 255).byte().permute(1, 2, 0).numpy()[..., ::-1]),
        use_det=False,
        use_cls=False,
        use_rec=True,
    )
    assert theirs.txts == ("HELLO THERE",)
    probabilities = shipped_recogniser().probabilities(image[None])[0]
    best = probabilities.argmax(1)
    read = (best != 0) & np.concatenate([[True], best[1:] != best[:-1]])
    assert probabilities.max(1)[read].mean() == pytest.approx(theirs.scores[0], abs=6e-4)


def test_the_score_is_the_ctc_loss_for_each_character(logp: Any) -> None:
    images = torch.stack([strip("CAT"), strip("CATS")])
    recogniser = shipped_recogniser()
    probabilities = torch.from_numpy(recogniser.probabilities(images)).clamp_min(1e-38)
    text = "COATS"
    loss = torch.nn.functional.ctc_loss(
        probabilities.log().transpose(0, 1),
        torch.from_numpy(recogniser.labels(text)).expand(2, -1),
        torch.full((2,), probabilities.shape[1]),
        torch.full((2,), len(text)),
        reduction="none",
    )
    scores = logp(images, [f'"{text}"'] * 2).total
    assert (scores > -20).all()
    torch.testing.assert_close(scores, -loss / len(text), rtol=1e-3, atol=1e-3)


def test_scores_do_not_depend_on_the_batch(logp: Any) -> None:
    images = torch.stack([strip("CAT"), strip("DOG"), strip("SUN")])
    prompts = ['"CAT"', '"DOG"', '"MOON"']
    whole = rewards.build("ocr-logp", {"batch_size": 2})(images, prompts).total
    alone = torch.cat([logp(images[i : i + 1], prompts[i : i + 1]).total for i in range(3)])
    torch.testing.assert_close(whole, alone, rtol=1e-4, atol=1e-4)


def test_characters_outside_the_alphabet_are_named(logp: Any) -> None:
    with pytest.raises(UsageError, match="\ue000"):
        check_prompts("ocr-logp", logp, ['say "A"', 'say "\ue000"'])


@pytest.mark.parametrize("size", [(1, 1), (4, 40), (40, 4), (16, 16)])
def test_pictures_of_any_shape_have_a_score(size: tuple[int, int], ocr: Any, logp: Any) -> None:
    images = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    for reward in (ocr, logp):
        assert torch.isfinite(reward(images, ['"CAT"']).total).all()


def test_another_file_than_a_recogniser_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.onnx"
    file.write_bytes(b"nonsense")
    for path in (file, tmp_path / "missing.onnx"):
        with pytest.raises(CheckpointError, match=r"\.onnx"):
            rewards.build("ocr-logp", {"model": str(path)})


@pytest.mark.parametrize("name", ["ocr", "ocr-logp"])
@pytest.mark.parametrize("package", ["rapidocr", "onnxruntime"])
def test_a_missing_package_is_one_line_with_the_command(
    name: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("fmg.core.runtime.find_spec", lambda wanted: None)
    with pytest.raises(MissingDependencyError, match=r"pip install 'flow-map-grpo\[ocr\]'"):
        rewards.build(name)
