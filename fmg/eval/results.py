"""Results of an evaluation as values and as JSON (docs/schemas/eval.schema.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fmg.core.display import compact, counted, html_table, interval, number, signed
from fmg.core.errors import UsageError, python_call, writing

SCHEMA = 1
MEAN_OF_TAGS = "mean of tags"


@dataclass(frozen=True)
class Result:
    """Mean score of one part of one reward with one number of steps, with a 95 % bootstrap interval over prompts."""

    steps: int
    reward: str
    part: str
    mean: float
    std: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class TagResult:
    """The same for the `num` images whose prompts have one tag, or as the mean over tags, as GenEval reports it."""

    steps: int
    reward: str
    part: str
    tag: str
    num: int
    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Metric:
    """A metric of the whole set of images, from the features of one extractor, with a 95 % interval."""

    steps: int
    extractor: str
    metric: str
    value: float
    ci95: tuple[float, float]


@dataclass(frozen=True)
class Difference:
    """Paired difference, target minus other (same prompts and seeds), with a 95 % bootstrap interval over prompts."""

    steps: int
    reward: str
    part: str
    mean: float
    ci95: tuple[float, float]


@dataclass(frozen=True, repr=False)
class EvalReport:
    """What `fmg eval --json` prints.

    `tags` is empty unless the prompts have several tags, `metrics` without feature extractors; `against`, `differences`
    and `metric_differences` for a single target.
    """

    target: str
    adapter: str | None
    seed: int
    num: int
    grid: str
    prompts: str
    results: tuple[Result, ...]
    tags: tuple[TagResult, ...]
    metrics: tuple[Metric, ...]
    against: tuple[EvalReport, ...]
    differences: tuple[Difference, ...]
    metric_differences: tuple[Metric, ...]

    def __repr__(self) -> str:
        scores = "".join(
            f", {row.reward} {row.mean:.3f} at {counted(row.steps, 'step')}"
            for row in self.results
            if row.part == "total"
        )
        against = "".join(f" against {other.target}" for other in self.against)
        return f"EvalReport({self.target}{against}, {counted(self.num, 'image')}{scores})"

    def _repr_html_(self) -> str:
        cells = self.scores()
        return html_table(repr(self), cells.columns, cells.rows)

    def scores(self) -> Cells:
        """The scores as a table; with another target those of both, and their differences."""
        if not self.against:
            return score_cells(self.results)
        (other,) = self.against
        rows = [
            [str(a.steps), a.reward, a.part, number(b.mean), number(a.mean), signed(d.mean), interval(d.ci95)]
            for a, b, d in zip(self.results, other.results, self.differences, strict=True)
        ]
        return Cells(["steps", "reward", "part", other.target, self.target, "difference", "95 % interval"], rows)

    def set_metrics(self) -> Cells:
        """The metrics of whole sets as a table; with another target those of both, and their differences."""
        ours = metric_cells(self.metrics, self.target)
        if not self.against:
            return ours
        (other,) = self.against
        rows = [
            [*row, compact(theirs.value), f"{delta.value:+.3g}", interval(delta.ci95, compact)]
            for row, theirs, delta in zip(ours.rows, other.metrics, self.metric_differences, strict=True)
        ]
        return Cells([*ours.columns, other.target, "difference", "95 % interval of the difference"], rows)

    @python_call
    def save(self, path: str | PathLike[str]) -> Path:
        """Writes what `fmg eval --json` prints; overwrites nothing.

        Raises:
            UsageError: the file exists.
            StorageError: the system refused.
        """
        file = Path(path)
        with writing(file):
            try:
                with file.open("x", encoding="utf-8") as text:
                    json.dump(self.to_json(), text, indent=2, ensure_ascii=False)
            except FileExistsError:
                raise UsageError(f"'{file}' exists already", "Give another name; nothing is overwritten.") from None
        return file

    def result(self, reward: str, part: str, steps: int) -> Result:
        return next(r for r in self.results if (r.reward, r.part, r.steps) == (reward, part, steps))

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values; unbounded intervals are null (docs/schemas/eval.schema.json)."""
        out: dict[str, object] = {
            "schema": SCHEMA,
            "target": self.target,
            "adapter": self.adapter,
            "seed": self.seed,
            "num": self.num,
            "grid": self.grid,
            "prompts": self.prompts,
            "results": plain(self.results),
        }
        if self.tags:
            out["tags"] = plain(self.tags)
        if self.metrics:
            out["metrics"] = plain(self.metrics)
        if self.against:
            out["against"] = self.against[0].to_json()
            out["differences"] = plain(self.differences)
        if self.metric_differences:
            out["metric_differences"] = plain(self.metric_differences)
        return out


def headline_tags(results: Sequence[Result], tags: Sequence[TagResult]) -> list[TagResult]:
    """The headline part of each reward: `correct` or `strict` if it has one, else its total."""
    known_for = {row.reward: row.part for row in results if row.part in ("strict", "correct")}
    known_for |= {row.reward: row.part for row in results if row.part == "correct"}
    return [row for row in tags if row.part == known_for.get(row.reward, "total")]


def plain(rows: Sequence[Any]) -> list[dict[str, object]]:
    """Rows with a `ci95` as JSON values; bounds that are not finite are null."""
    return [asdict(row) | {"ci95": [bound if math.isfinite(bound) else None for bound in row.ci95]} for row in rows]


@dataclass(frozen=True)
class Cells:
    """A table of results as text."""

    columns: list[str]
    rows: list[list[str]]

    @property
    def numeric(self) -> list[str]:
        """The columns of numbers."""
        return [column for column in self.columns if column not in ("reward", "part", "tag", "features", "metric")]

    def without_steps(self) -> Cells:
        """For images that were not generated here."""
        return Cells(self.columns[1:], [row[1:] for row in self.rows])


def score_cells(results: Sequence[Result]) -> Cells:
    """The scores of one target."""
    columns = ["steps", "reward", "part", "mean", "95 % interval", "std"]
    rows = [[str(r.steps), r.reward, r.part, number(r.mean), interval(r.ci95), number(r.std)] for r in results]
    return Cells(columns, rows)


def tag_cells(tags: Sequence[TagResult]) -> Cells:
    """The scores by tag."""
    rows = [[str(r.steps), r.reward, r.part, r.tag, str(r.num), number(r.mean), interval(r.ci95)] for r in tags]
    return Cells(["steps", "reward", "part", "tag", "images", "mean", "95 % interval"], rows)


def metric_cells(metrics: Sequence[Metric], value: str = "value") -> Cells:
    """The metrics of whole sets, in a column called `value`."""
    rows = [[str(m.steps), m.extractor, m.metric, compact(m.value), interval(m.ci95, compact)] for m in metrics]
    return Cells(["steps", "features", "metric", value, "95 % interval"], rows)
