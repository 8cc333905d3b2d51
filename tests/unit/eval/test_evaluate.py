"""`evaluate` on the embedded model: set metrics, dump, report and tags of one pass over the images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jsonschema import Draft202012Validator
from PIL import Image

from fmg.core.errors import UsageError
from fmg.core.events import Event, Notice
from fmg.core.prompt import Prompt
from fmg.data.prompt_sets import PromptList
from fmg.eval.evaluate import evaluate
from fmg.eval.report import ImageGallery
from fmg.eval.results import EvalReport, Result, TagResult, headline_tags
from fmg.eval.scoring import EvalSet, Scores, tag_rows
from fmg.inference import load
from fmg.registry import rewards
from tests.support.pages import self_contained

SCHEMAS = Path(__file__).resolve().parents[3] / "docs" / "schemas"
PROMPTS = ("two red circles", "a red circle and a blue square", "a red circle on the left")
NUM = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("evaluation")
    lines = (
        {"tag": tag, "include": [{"class": "circle", "count": 1}], "prompt": text, "note": "kept"}
        for tag, text in zip(("counting", "two_object", "single_object"), PROMPTS, strict=True)
    )
    (path / "prompts.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def report(folder: Path) -> EvalReport:
    real = folder / "real"
    real.mkdir()
    for number in range(12):
        pixels = np.random.default_rng(number).integers(0, 255, (40, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(real / f"{number}.png")
    return evaluate(
        "meanflow-shapes",
        against="scm-shapes",
        prompts=str(folder / "prompts.jsonl"),
        rewards=["shapes", "jpeg-compressibility"],
        options={"jpeg-compressibility": {"quality": 50}, "pixels": {"side": 2}},
        extractors=["pixels"],
        reference=str(real),
        steps=[2],
        num=NUM,
        device="cpu",
        dump=("geneval", folder / "tree"),
        report=folder / "out" / "page.html",
    )


def test_json_follows_its_schema_and_has_every_row_twice(report: EvalReport, folder: Path) -> None:
    document = json.loads((SCHEMAS / "eval.schema.json").read_text(encoding="utf-8"))
    written = json.loads((folder / "out" / "page.json").read_text(encoding="utf-8"))
    Draft202012Validator(document).validate(written)
    assert written == json.loads(json.dumps(report.to_json()))
    names = [row.metric for row in report.metrics]
    assert names == [row.metric for row in report.metric_differences] == [m.metric for m in report.against[0].metrics]
    for ours, theirs, gap in zip(report.metrics, report.against[0].metrics, report.metric_differences, strict=True):
        assert gap.value == pytest.approx(ours.value - theirs.value, abs=1e-9)
    assert "frechet" in names
    # noise is far from shapes: no generated image lies within it
    assert next(row.value for row in report.metrics if row.metric == "precision") == 0


def test_the_dump_is_genevals_tree(report: EvalReport, folder: Path) -> None:
    tree = folder / "tree"
    assert sorted(path.name for path in tree.iterdir()) == ["00000", "00001", "00002"]
    lines = [json.loads(line) for line in (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()]
    drawn = load("meanflow-shapes", device="cpu").generate(PROMPTS[1:2], [1], steps=2).images[0]
    for number, line in enumerate(lines):
        prompt = tree / f"{number:05d}"
        assert json.loads((prompt / "metadata.jsonl").read_text(encoding="utf-8")) == line
        assert sorted(p.name for p in (prompt / "samples").iterdir()) == [f"{i:04d}.png" for i in range(NUM // 3)]
        with Image.open(prompt / "grid.png") as grid:
            assert grid.size == (NUM // 3 * 34 + 2, 36)
    with Image.open(tree / "00001" / "samples" / "0000.png") as sample:
        assert np.abs(np.asarray(sample) / 255 - drawn.permute(1, 2, 0).numpy()).max() < 0.01


def test_the_page_shows_scores_prompts_and_pictures(report: EvalReport, folder: Path) -> None:
    page = self_contained((folder / "out" / "page.html").read_text(encoding="utf-8"))
    assert "Evaluation of meanflow-shapes against scm-shapes" in page.words
    for prompt in PROMPTS:
        assert f"{prompt}, by scm-shapes" in page.words
    strict = report.result("shapes", "strict", 2)
    assert f"{strict.mean:.3f}" in page.words
    # four images of three prompts by two targets, and the worst and best of the lower and upper two prompts
    assert page.tags.count("img") == 4 * 3 * 2 + 2 * 2 * 2


def test_tags_are_means_over_their_images(report: EvalReport) -> None:
    total = {row.tag: row for row in report.tags if (row.reward, row.part) == ("shapes", "total")}
    assert {tag: row.num for tag, row in total.items()} == {
        "counting": 8,
        "single_object": 8,
        "two_object": 8,
        "mean of tags": NUM,
    }
    overall = report.result("shapes", "total", 2).mean
    assert total["mean of tags"].mean == pytest.approx(overall)
    assert all(row.ci95[0] <= row.mean <= row.ci95[1] for row in total.values())


def test_the_mean_of_tags_weighs_tags_and_not_images() -> None:
    values = np.asarray([1.0] * 8 + [0.0] * 2)
    texts = tuple("abcdefghij")
    (_, _, mean) = tag_rows(4, Scores({("r", "total"): values}, texts, ("x",) * 8 + ("y",) * 2))
    assert (mean.mean, mean.ci95) == (0.5, (0.5, 0.5))
    assert list(tag_rows(4, Scores({("r", "total"): values}, texts, ("x",) * 10))) == []
    # two independent tags of equal spread: the half-width of their mean is 1 / sqrt(2) of one
    spread = np.random.default_rng(0).normal(size=400)
    scores = Scores({("r", "total"): spread}, tuple(map(str, range(400))), ("x",) * 200 + ("y",) * 200)
    x, y, both = (row.ci95[1] - row.ci95[0] for row in tag_rows(4, scores))
    assert both == pytest.approx((x**2 + y**2) ** 0.5 / 2)


def test_a_reward_is_shown_by_the_part_it_is_known_for() -> None:
    results = [Result(1, "geneval", part, 0, 0, (0, 0)) for part in ("total", "correct", "strict", "dense")]
    results.append(Result(1, "hpsv2", "total", 0, 0, (0, 0)))
    tags = [TagResult(1, r.reward, r.part, "colors", 1, 0, (0, 0)) for r in results]
    assert [(row.reward, row.part) for row in headline_tags(results, tags)] == [
        ("geneval", "correct"),
        ("hpsv2", "total"),
    ]


def test_the_world_knows_what_its_prompts_look_like() -> None:
    found = evaluate("meanflow-shapes", extractors=["pixels"], reference="world", rewards=["shapes"], num=20)
    assert {row.metric for row in found.metrics} >= {"frechet", "recall"}
    from fmg.data.prompt_sets import load_prompts

    truth = load_prompts("shapes-heldout").true_images(PROMPTS, 0)  # type: ignore[attr-defined]
    scores = rewards.build("shapes", {"score": "strict"})(truth, PROMPTS)
    assert scores.total.tolist() == [1, 1, 1]


def test_impossible_requests_are_refused_before_anything_is_generated(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "report.html").touch()
    (tmp_path / "two").mkdir()
    for number in range(2):
        Image.new("RGB", (4, 4)).save(tmp_path / "two" / f"{number}.png")
    wrong: list[tuple[dict[str, object], str]] = [
        ({"dump": ("geneval", tmp_path / "taken")}, "exists already"),
        ({"dump": ("geneval", tmp_path / "x"), "num": 7}, r"num=12"),
        ({"dump": ("geneval", tmp_path / "x"), "steps": [1, 2]}, "one number of steps"),
        ({"dump": ("coco", tmp_path / "x")}, "no dump format 'coco'"),
        ({"report": tmp_path}, "exists already"),
        ({"report": tmp_path / "report.html" / "x.html"}, "is a file"),
        ({"reference": "world", "extractors": ["pixels"]}, "embedded world"),
        ({"reference": str(tmp_path / "two"), "extractors": ["pixels"]}, r"has only 2 image"),
        ({"reference": str(tmp_path / "two")}, "extractors='clip'"),
        ({"reference": str(tmp_path / "none"), "extractors": ["pixels"]}, "no folder"),
        ({"extractors": ["pixel"]}, "Did you mean 'pixels'"),
        ({"extractors": ["pixels", "pixels"]}, "given twice"),
        ({"options": {"shape": {"score": "strict"}}}, "Did you mean 'shapes'"),
    ]
    before = sorted(tmp_path.rglob("*"))
    for arguments, says in wrong:
        given = {"prompts": str(folder / "prompts.jsonl"), "num": 6, **arguments}
        with pytest.raises(UsageError, match=says):
            evaluate("meanflow-shapes", **given)  # type: ignore[arg-type]
    assert sorted(tmp_path.rglob("*")) == before


def test_one_image_per_prompt_has_no_diversity_within_prompts_and_a_note() -> None:
    told: list[Event] = []
    found = evaluate("meanflow-shapes", extractors=["pixels"], rewards=["shapes"], num=6, observer=told.append)
    assert "diversity_within_prompts" not in {row.metric for row in found.metrics}
    assert any(isinstance(event, Notice) and "raise --num" in event.text for event in told)


def test_a_gallery_keeps_the_worst_and_the_best_across_batches() -> None:
    prompts = PromptList("p", [Prompt("a", "", {}), Prompt("b", "", {})])
    gallery = ImageGallery(EvalSet.make(prompts, 12, 0), ("r", "total"))
    values = np.random.default_rng(0).permutation(12).astype(float)
    for start in range(0, 12, 5):
        rows = slice(start, start + 5)
        images = torch.rand(len(values[rows]), 3, 8, 8)
        gallery(images, {("r", "total"): values[rows]})
    for offset, text in enumerate("ab"):
        own, show = values[offset::2], gallery.prompts[text]
        assert show.worst is not None
        assert show.best is not None
        assert (show.worst.value, show.best.value, show.scores) == (own.min(), own.max(), own.tolist())
        assert [shown.value for shown in show.first] == own[:4].tolist()
