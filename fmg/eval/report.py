"""The report of an evaluation: one JSON file, and one self-contained page with its images."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from jaxtyping import Float
from torch import Tensor

from fmg.core.display import counted, interval
from fmg.core.errors import UsageError
from fmg.core.files import check_place, write_atomic
from fmg.core.json_io import write_json
from fmg.data.page import Block, Gallery, Picture, Section, Table, Text, Tile, inline_image, page
from fmg.data.pictures import to_pil
from fmg.data.prompt_sets import spread
from fmg.eval.results import Cells, EvalReport, tag_cells
from fmg.eval.scoring import EvalSet, Parts

_NAME = "report.html"
_FIRST_SHOWN = 4
_PICTURE_SIDE = 256
_SHOWN_PROMPTS = 6
_EXTREMES = 8
_ABOUT_SCORES = "Means over images. The 95 % intervals come from resampling whole prompts."
_ABOUT_METRICS = (
    "Diversity is the mean distance between images of one prompt; cosine diversity is the mean over all pairs."
    " The Fréchet distance is biased upwards for few images; the extrapolated value removes the bias of order 1/n."
)


@dataclass(frozen=True)
class ShownImage:
    """An image with its score."""

    value: float
    source: str
    pixelated: bool

    def picture(self, prompt: str) -> Picture:
        return Picture(self.source, f"{self.value:.3f}", prompt, self.pixelated)


@dataclass
class PromptImages:
    """The images of one prompt that a page shows (the first ones, the worst and the best), and all scores."""

    first: list[ShownImage] = field(default_factory=list)
    worst: ShownImage | None = None
    best: ShownImage | None = None
    scores: list[float] = field(default_factory=list)

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


class ImageGallery:
    """Keeps some images of an evaluation as they come, scaled down.

    Args:
        eval_set: the images to come.
        key: the reward and part that rank images.
    """

    def __init__(self, eval_set: EvalSet, key: tuple[str, str]) -> None:
        self.key = key
        self.prompts: dict[str, PromptImages] = {}
        self._texts = eval_set.prompts
        self._count = 0

    def __call__(self, images: Float[Tensor, "b 3 h w"], scores: Parts) -> None:
        texts = self._texts[self._count : self._count + len(images)]
        self._count += len(images)
        for image, text, value in zip(images, texts, scores[self.key].tolist(), strict=True):
            show = self.prompts.setdefault(text, PromptImages())
            show.scores.append(value)
            worse = show.worst is None or value < show.worst.value
            better = show.best is None or value > show.best.value
            if not (worse or better or len(show.first) < _FIRST_SHOWN):
                continue
            shown = ShownImage(value, *inline_image(to_pil(image), _PICTURE_SIDE))
            if worse:
                show.worst = shown
            if better:
                show.best = shown
            if len(show.first) < _FIRST_SHOWN:
                show.first.append(shown)


@dataclass(frozen=True)
class ReportFiles:
    """The files of a report."""

    html: Path
    json: Path


def report_files(path: str | Path) -> ReportFiles:
    """The files of a report: `path` if it ends in `.html`, else `report.html` in that folder; and JSON beside it."""
    given = Path(path)
    html = given if given.suffix.lower() in (".html", ".htm") else given / _NAME
    return ReportFiles(html, html.with_suffix(".json"))


def check_report(path: str | Path) -> ReportFiles:
    """The files of a report, after a check that they can be written.

    Raises:
        UsageError: one exists, a file is in the way of the folder, or the place cannot be written.
    """
    files = report_files(path)
    for file in (files.html, files.json):
        if file.exists():
            raise UsageError(f"'{file}' exists already", "Name another --report; nothing is overwritten.")
    check_place(files.html, "--report")
    return files


def write_report(
    files: ReportFiles, report: EvalReport, galleries: Sequence[Mapping[int, ImageGallery | None]]
) -> None:
    """Writes both files.

    Args:
        files: from `check_report`.
        report: report of the target, which includes that of the other target.
        galleries: images by number of steps, of the target and of the other target.
    """
    files.html.parent.mkdir(parents=True, exist_ok=True)
    write_json(files.json, report.to_json())
    write_atomic(files.html, report_page(report, galleries).encode())


def report_page(report: EvalReport, galleries: Sequence[Mapping[int, ImageGallery | None]]) -> str:
    """The HTML of a report."""
    other = report.against[0] if report.against else None
    title = f"Evaluation of {report.target}" + (f" against {other.target}" if other else "")
    images = f"{counted(report.num, 'image')} of {report.prompts} per number of steps"
    subtitle = f"{images}, grid {report.grid}, seed {report.seed}"
    sections = [Section("Scores", [Text(_ABOUT_SCORES), _table(report.scores())])]
    if report.tags:
        sections.append(Section("By tag", [_table(tag_cells(report.tags))]))
    if report.metrics:
        sections.append(Section("The whole set", [Text(_ABOUT_METRICS), _table(report.set_metrics())]))
    sections += _pictures(report, galleries)
    return page(title, subtitle, list(_tiles(report)), sections)


def _tiles(report: EvalReport) -> Iterator[Tile]:
    other = report.against[0].results if report.against else ()
    before = {(row.steps, row.reward, row.part): row.mean for row in other}
    for row in report.results:
        strict = any((r.reward, r.part) == (row.reward, "strict") for r in report.results)
        if row.part == ("strict" if strict else "total"):
            name = row.reward if row.part == "total" else f"{row.reward} {row.part}"
            known = before.get((row.steps, row.reward, row.part))
            note = interval(row.ci95) if known is None else f"from {known:.3f}"
            yield Tile(f"{name}, {counted(row.steps, 'step')}", f"{row.mean:.3f}", note)


def _table(cells: Cells) -> Table:
    return Table(cells.columns, cells.rows, frozenset(cells.numeric))


def _pictures(report: EvalReport, galleries: Sequence[Mapping[int, ImageGallery | None]]) -> Iterator[Section]:
    labels = [report.target, *(other.target for other in report.against)]
    for steps, gallery in galleries[0].items():
        if gallery is None:
            continue
        reward = gallery.key[0]
        others = [found for shown in galleries[1:] if (found := shown[steps]) is not None]
        paired = " Images in the same position share their seed." if others else ""
        blocks: list[Block] = [Text(f"Below each image is its {reward} score.{paired}")]
        for prompt in spread(list(gallery.prompts), _SHOWN_PROMPTS):
            for label, source in zip(reversed(labels), reversed([gallery, *others]), strict=True):
                title = f"{prompt}, by {label}" if others else prompt
                blocks.append(Gallery([s.picture(prompt) for s in source.prompts[prompt].first], title))
        yield Section(f"Images with {counted(steps, 'step')}", blocks)
        yield Section(f"Worst and best with {counted(steps, 'step')}, by {reward}", list(_extremes(gallery)))


def _extremes(gallery: ImageGallery) -> Iterator[Block]:
    ordered = sorted(gallery.prompts.items(), key=lambda entry: entry[1].mean)
    count = min(_EXTREMES, -(-len(ordered) // 2))
    yield Text("The prompts with the lowest and the highest mean score, each with its worst and best image.")
    for title, chosen in (("Lowest", ordered[:count]), ("Highest", ordered[-count:][::-1])):
        yield Gallery([picture for prompt, show in chosen for picture in _pair(prompt, show)], f"{title} means")
    columns = ("prompt", "images", "mean", "lowest", "highest")
    yield Table(
        columns,
        [
            (prompt, str(len(s.scores)), f"{s.mean:.3f}", f"{min(s.scores):.3f}", f"{max(s.scores):.3f}")
            for prompt, s in (*ordered[:count], *ordered[max(count, len(ordered) - count) :])
        ],
        frozenset(columns) - {"prompt"},
    )


def _pair(prompt: str, show: PromptImages) -> Iterator[Picture]:
    if show.best is not None and len(show.scores) == 1:
        yield Picture(show.best.source, f"{show.best.value:.3f}: {prompt}", prompt, show.best.pixelated)
        return
    for shown, word in ((show.worst, "worst"), (show.best, "best")):
        if shown is not None:
            yield Picture(shown.source, f"{word} {shown.value:.3f}: {prompt}", prompt, shown.pixelated)
