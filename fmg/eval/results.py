"""Results of an evaluation as values and as JSON (docs/schemas/eval.schema.json)."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from fmg.core.display import counted, html_table
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
        columns = ["steps", "reward", "part", self.target, "95 % interval"]
        rows = [
            [str(row.steps), row.reward, row.part, f"{row.mean:.3f}", interval_text(row.ci95)] for row in self.results
        ]
        if self.differences:
            columns += ["difference", "95 % interval"]
            rows = [
                [*row, f"{delta.mean:+.3f}", interval_text(delta.ci95)]
                for row, delta in zip(rows, self.differences, strict=True)
            ]
        return html_table(repr(self), columns, rows)

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


def interval_text(ci95: tuple[float, float], form: str = ".3f") -> str:
    """An interval for a table; unbounded sides are dashes."""
    low, high = (format(bound, form) if math.isfinite(bound) else "-" for bound in ci95)
    return f"[{low}, {high}]"
